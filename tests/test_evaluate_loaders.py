"""`ood_fast.evaluate(model, id_loader, {...})`: the numbers of the detectors by hand, as a table and as rows."""

from __future__ import annotations

import re
import sys
import warnings
from types import SimpleNamespace

import detector_cases as cases
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ood_fast
from ood_fast import detectors, metrics
from ood_fast.evaluate import evaluate_loaders


@pytest.fixture
def model():
    return cases.Net().eval()


def loader(n: int, shift: float = 0.0, classes: bool = True) -> DataLoader:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) + shift
    y = (torch.arange(n) % cases.C,) if classes else ()
    return DataLoader(TensorDataset(x, *y), batch_size=16)


def test_the_numbers_are_those_of_the_detectors(model):
    train, test, near, far = loader(60), loader(40), loader(30, 0.5), loader(20, 3.0, classes=False)
    found = ood_fast.evaluate(model, test, {"near": near, "far": far}, fit=train, detectors=["MSP", "NCI"])
    for name in ("MSP", "NCI"):
        detector = detectors.create(name).fit(model, train)
        inside, outside = (detector.score(model, part) for part in (test, far))
        expected = metrics.auroc(inside, outside)
        assert found.runs[0].value("auroc", name, "far") == pytest.approx(expected, abs=1e-6)
        assert found.runs[0].value("auroc", name, "farood") == pytest.approx(expected, abs=1e-6)
    right = torch.cat([model(x).argmax(1) == y for x, y in test]).double().mean().item()
    assert found.runs[0].value("accuracy") == pytest.approx(right)
    assert model.training is False
    text = str(found)
    assert "near-OOD" in text
    assert "NCI" in text
    rows = list(found.rows())
    assert {row["group"] for row in rows if row["set"] in ("near", "far")} == {"near", "far"}


def test_without_training_data_those_that_need_none(model):
    found = evaluate_loaders(model, loader(40), {"x": loader(20, 3.0)})
    assert {"MSP", "Energy"} <= set(found.detectors)
    assert "KNN" not in found.detectors
    with pytest.raises(ValueError, match="fit: got None, but KNN"):
        ood_fast.evaluate(model, loader(40), {"x": loader(20)}, detectors=["KNN", "MSP"])


def test_without_classes_there_is_no_accuracy(model):
    found = ood_fast.evaluate(model, loader(40, classes=False), {"x": loader(20)}, detectors=["MSP"])
    assert {row["metric"] for row in found.rows()}.isdisjoint({"accuracy", "ece_softmax"})
    with pytest.raises(KeyError):
        found.runs[0].value("accuracy")


def test_a_few_without_classes_are_told(model):
    x, y = loader(40).dataset.tensors
    some = DataLoader(TensorDataset(x, y.where(torch.arange(40) != 7, -1)), batch_size=16)
    found = ood_fast.evaluate(model, some, {"x": loader(20)}, detectors=["MSP"]).runs[0]
    assert found.notes == ["id: no accuracy, as 39 of 40 images have a class"]


@pytest.mark.filterwarnings("error")
def test_without_classes_no_accuracy_is_told_to_be_at_chance(model):
    ood_fast.evaluate(model, loader(40, classes=False), {"x": loader(20)}, detectors=["MSP"])


class ConvolutionAtTheEnd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(6, cases.C, 1)

    def forward(self, x):
        return self.head(x[:, :, None, None]).flatten(1)


@pytest.mark.parametrize("model", [ConvolutionAtTheEnd(), cases.Net()], ids=["convolution", "temperature"])
def test_logits_alone_are_read_of_a_model_without_a_head(model):
    """Also of one whose logits its last linear layer did not make, and by a loader that can be read once."""
    if isinstance(model, cases.Net):
        model.register_forward_hook(lambda module, given, logits: 2 * logits)
    model.eval()
    found = ood_fast.evaluate(model, iter(loader(40)), {"x": iter(loader(20, 3.0))}, detectors="MSP")
    inside, outside = (detectors.MSP().score(model, part) for part in (loader(40), loader(20, 3.0)))
    assert found.runs[0].value("auroc", "MSP", "x") == pytest.approx(metrics.auroc(inside, outside), abs=1e-6)
    with pytest.raises(ValueError, match=r"head|nn\.Linear"):
        ood_fast.evaluate(model, loader(40), {"x": loader(20)}, fit=loader(60), detectors="NCI")


@pytest.mark.parametrize(
    ("name", "group"),
    [("near", "near"), ("Near-OOD", "near"), ("near c100", "near"), ("nearby", "far"), ("CSID", "csid")],
)
def test_the_name_says_the_group(model, name, group):
    found = ood_fast.evaluate(model, loader(40), {name: loader(20, 1.0), "x": loader(30)}, detectors="MSP")
    assert found.sets[name].group == group


def test_odin_runs_the_model_itself(model):
    found = ood_fast.evaluate(model, loader(20), {"x": loader(20, 2.0)}, detectors=["ODIN"])
    assert found.detectors == ["ODIN"]


def test_as_pandas(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))
    found = ood_fast.evaluate(model, loader(40), {"x": loader(20)}, detectors=["MSP"])
    kind, rows = found.to_pandas()
    assert kind == "frame"
    assert rows == list(found.rows())


def test_bad_input(model):
    with pytest.raises(ValueError, match="ood: got no loader"):
        ood_fast.evaluate(model, loader(40), {})
    with pytest.raises(ValueError, match="without a batch"):
        ood_fast.evaluate(model, loader(40), {"x": []})
    with pytest.raises(TypeError, match="id_loader"):
        ood_fast.evaluate(model, torch.zeros(3, 6), {"x": loader(20)})
    with pytest.raises(TypeError, match="near: got dict, expected an iterable of batches"):
        ood_fast.evaluate(model, loader(40), {"near": {"a": loader(20)}})
    with pytest.raises(ValueError, match="bootstrap: got -1"):
        ood_fast.evaluate(model, loader(40), {"x": loader(20)}, bootstrap=-1)
    with pytest.raises(ValueError, match="unknown detector 'MPS'; did you mean 'MSP'"):
        ood_fast.evaluate(model, loader(40), {"x": loader(20)}, detectors="MPS")


@pytest.mark.parametrize("where", ["test", "fit", "csid"])
def test_targets_that_are_no_classes_of_the_model_are_refused(where):
    model = torch.nn.Linear(cases.C, cases.C).eval()
    torch.nn.init.eye_(model.weight)
    torch.nn.init.zeros_(model.bias)
    y = torch.arange(40) % cases.C
    x = torch.nn.functional.one_hot(y, cases.C).float()

    def evaluated(y: torch.Tensor, far: torch.Tensor = x) -> None:
        given = {name: [(x, y if name == where else x.argmax(1))] for name in ("test", "fit", "csid")}
        ood = {"csid": given["csid"], "far": [(far, y)]}
        ood_fast.evaluate(model, given["test"], ood, fit=given["fit"], detectors=["MSP", "NCI"])

    evaluated(y if where == "fit" else y.int())
    for wrong in (x, x.long(), y.float(), y > 1):
        with pytest.raises(ValueError, match=f"{where}: targets: got torch.* expected class indices"):
            evaluated(wrong)
    with pytest.raises(
        ValueError, match=f"{where}: the targets are not in the order .* 0.0 % .* 100.0 % .*0 -> {cases.C - 1}"
    ):
        evaluated((y + 1) % cases.C)
    with pytest.raises(
        ValueError, match=f"{where}: targets: got {cases.C}, expected indices of the model's {cases.C} "
    ):
        evaluated(y + 1)
    with pytest.raises(ValueError, match="far: got a loader without an input"):
        evaluated(y, x[:0])


def test_full_spectrum_takes_shifted_images_as_in_distribution(model):
    parts = {"near": loader(30, 0.5), "csid/dim": loader(24, 0.2), "csid_blur": loader(36, 0.4), "far": loader(20, 3.0)}
    found = ood_fast.evaluate(model, loader(40), parts, detectors=["MSP", "Energy"], bootstrap=10)
    run = found.runs[0]
    assert (found.ood, found.csid) == (["near", "far"], ["csid/dim", "csid_blur"])
    for name in ("MSP", "Energy"):
        scores = {part: run.scores[name][part] for part in ("id", *parts)}
        inside = np.concatenate([scores[part] for part in ("id", "csid/dim", "csid_blur")])
        for part, mean in (("near", "nearood"), ("far", "farood")):
            for metric, expected in metrics.detection(inside, scores[part]).items():
                for where in (part, mean):
                    assert run.value(f"fsood_{metric}", name, where) == pytest.approx(expected, abs=1e-12)
            plain = metrics.auroc(scores["id"], scores[part])
            assert run.value("auroc", name, part) == pytest.approx(plain, abs=1e-12)
    right = {p: torch.cat([model(x).argmax(1) == y for x, y in of]).double() for p, of in parts.items() if "csid" in p}
    for part, correct in right.items():
        assert run.value("accuracy", "", part) == pytest.approx(correct.mean().item())
    n_right = round(run.value("accuracy") * 40) + sum(correct.sum().item() for correct in right.values())
    assert run.value("fsood_accuracy") == pytest.approx(n_right / 100)
    assert len(run.draws["fsood_auroc", "MSP", "farood"]) == 10
    assert run.measurements[0].low is not None
    assert "Full-spectrum (%)" in str(found)
    assert "Accuracy under covariate shift" in str(found)


def test_the_draws_of_several_sets_are_those_of_each():
    draws, values = metrics.Bootstrap(7), {"id": torch.randn(50), "a": torch.randn(30).round(decimals=1)}
    outside = torch.randn(40) - 1
    joined = draws.detection(draws.below(values["id"], "id", (values["a"], "a")), draws.below(outside, "o"))
    for b in range(7):
        inside, far = (
            torch.cat([of.repeat_interleave(draws.counts(name, len(of))[b].long()) for name, of in parts.items()])
            for parts in (values, {"o": outside})
        )
        expected = metrics.detection(inside, far)
        assert {name: joined[name][b].item() for name in expected} == pytest.approx(expected, abs=1e-12)


def test_shifted_images_without_classes_or_without_ood(model):
    parts = {"csid": loader(24, 0.2, classes=False), "x": loader(20, 2.0)}
    found = ood_fast.evaluate(model, loader(40), parts, detectors=["MSP"])
    assert found.runs[0].holds([("accuracy", "", ""), ("fsood_auroc", "MSP", "farood")])
    assert not found.runs[0].holds([("fsood_accuracy", "", "")])
    assert "Accuracy under covariate shift" not in str(found)
    with pytest.raises(ValueError, match=r"ood: got \['csid'\], expected"):
        ood_fast.evaluate(model, loader(40), {"csid": loader(24)}, detectors=["MSP"])
    assert not any(
        row["metric"].startswith("fsood")
        for row in ood_fast.evaluate(model, loader(40), {"x": loader(20, 2.0)}, detectors=["MSP"]).rows()
    )


@pytest.mark.parametrize("name", ["KNN", "NCI", "LayerMahalanobis", "MCDropout"])
def test_detectors_of_the_user_stay_as_they_are(model, name):
    options = {"KNN": {"k": 3}, "LayerMahalanobis": {"layers": ("backbone",)}, "MCDropout": {"of": "NCI"}}
    fitted = detectors.create(name, **options.get(name, {})).fit(model, loader(50))
    x = next(iter(loader(20)))[0]
    before = fitted.score(model, x)
    fitted.calibrate(before)
    found = ood_fast.evaluate(model, loader(40), {"far": loader(20, 3.0)}, fit=loader(60), detectors={"mine": fitted})
    assert torch.equal(fitted.score(model, x), before)
    assert fitted.threshold is not None
    again = detectors.create(name, **options.get(name, {})).fit(model, loader(60))
    inside, outside = (again.score(model, part) for part in (loader(40), loader(20, 3.0)))
    assert found.runs[0].value("auroc", "mine", "far") == pytest.approx(metrics.auroc(inside, outside), abs=1e-6)


def test_an_ensemble_of_several_models():
    nets = [cases.Net().eval() for _ in range(2)]
    train, test, far = loader(60), loader(40), loader(20, 3.0, classes=False)
    both = detectors.ModelEnsemble(nets)
    chosen = {"NCI of each": detectors.Ensemble("NCI"), "MSP": detectors.MSP()}
    found = ood_fast.evaluate(both, test, {"far": far}, fit=train, detectors=chosen)
    ensemble = detectors.Ensemble("NCI").fit(nets, train)
    expected = metrics.auroc(*(ensemble.score(nets, part) for part in (test, far)))
    assert found.runs[0].value("auroc", "NCI of each", "far") == pytest.approx(expected, abs=1e-6)
    logits = torch.cat([(nets[0](x) + nets[1](x)) / 2 for x, _ in test])
    right = (logits.argmax(1) == torch.arange(40) % cases.C).double().mean().item()
    assert found.runs[0].value("accuracy") == pytest.approx(right)
    assert "NCI of each" in str(found)
    with pytest.raises(ValueError, match="cannot tell which layer of ModelEnsemble makes the logits"):
        ood_fast.evaluate(both, test, {"far": far}, fit=train, detectors=["NCI"])


def test_one_loader_as_id_and_as_ood_is_told_apart_by_chance(model):
    test = loader(20)
    with pytest.warns(UserWarning, match="100 % of its images are among those of"):
        found = ood_fast.evaluate(model, test, {"far": test}, detectors=["MSP"])
    assert [row["value"] for row in found.rows() if (row["metric"], row["set"]) == ("auroc", "far")] == [0.5]


@pytest.mark.parametrize(
    ("test", "near", "far", "told"),
    [
        (loader(40), loader(30, 0.5), loader(20, 3.0), None),
        ([loader(90).dataset[torch.randperm(90)[:40]]], loader(30), loader(20), "test: 100 % .* of fit"),
        (loader(40), [loader(40).dataset[:12]], loader(20), "near/a: 100 % .* of test"),
        (
            loader(40),
            loader(30),
            [loader(30).dataset[5:], loader(20).dataset[:5]],
            "(near/a|far): 83 % .* of (near/a|far)",
        ),
    ],
    ids=["apart", "fit is test", "part of test", "near is far"],
)
def test_images_in_two_roles_are_told(test, near, far, told, model, recwarn):
    """In other batches and orders, too; constant outputs tell nothing."""
    asked = {"fit": loader(90), "detectors": ["MSP", "NCI"]}
    notes = ood_fast.evaluate(model, test, {"near/a": near, "far": far}, **asked).runs[0].notes
    found = [str(each.message) for each in recwarn if "% of its images" in str(each.message)]
    assert len(found) == (told is not None)
    assert set(found) <= set(notes)
    if told:
        assert re.match(told, found[0])
    torch.nn.init.zeros_(model.backbone[0].weight)
    with warnings.catch_warnings(record=True) as later:
        ood_fast.evaluate(model, test, {"near/a": near, "far": far}, detectors=["MSP"])
    assert not [each for each in later if "% of its images" in str(each.message)]


def test_one_loader_of_ood_data_needs_a_name(model):
    with pytest.raises(TypeError, match=r"^ood: got DataLoader, expected a mapping from names to loaders"):
        ood_fast.evaluate(model, loader(20), loader(20))


def test_chance_level_is_told_once(model, recwarn):
    ood_fast.evaluate(
        model, loader(60), {"csid": loader(50), "far": loader(20, 3.0)}, fit=loader(90), detectors=["NCI"]
    )
    told = [each for each in recwarn if "no better than chance" in str(each.message)]
    assert [str(each.message)[:4] for each in told] == ["fit:"]
    assert told[0].filename == __file__, "the line of the user's"
