"""Many detectors at once: the same scores as one by one, from one pass of the model and one read of each row."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from detector_cases import FITTED, NAMES, C, M, Net, classes_of, make
from torch import nn

from ood_fast import checks, detectors
from ood_fast.detectors import DetectorSet, sets
from ood_fast.detectors.fitting import Fit
from ood_fast.statistics import row_statistics

X = torch.randn(60, 6)
Y = torch.arange(60) % C


class CountingNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.n_passes = 0

    def forward(self, x):
        self.n_passes += 1
        return super().forward(x)


def all_of_them() -> DetectorSet:
    return DetectorSet({name: make(name) for name in NAMES})


def test_scores_are_those_of_each_by_itself():
    net = Net().eval()
    loader = [(X[:40], Y[:40]), (X[40:], Y[40:])]
    together = all_of_them().fit(net, loader).score(net, X)
    assert list(together) == list(NAMES)
    for name in NAMES:
        alone = make(name).fit(net, loader).score(net, X)
        torch.testing.assert_close(together[name], alone, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_model_runs_once_a_batch():
    net = CountingNet()
    loader = [(X[:40], Y[:40]), (X[40:], Y[40:])]
    fitted = all_of_them().fit(net, loader)
    assert net.n_passes == 2
    assert len(list(fitted.score_loader(net, loader))) == 2
    assert net.n_passes == 4


def test_each_statistic_is_gathered_once():
    """NCI and fDBD want the mean of the same features; all Gaussians the same scatter."""
    fitting = all_of_them()
    parts = Fit(fitting.detectors).parts
    assert len({part.key() for part in parts}) == len(parts)
    assert fitting["NCI"].gathered["mean"] is fitting["FDBD"].gathered["mean"]


def test_rows_are_read_once(monkeypatch):
    names = ["MSP", "MaxLogit", "Energy", "NCI", "FeatureNorm", "FDBD", "BoundaryDistance"]
    fitted = DetectorSet(names)
    net = Net().eval()
    fitted.fit(net, [X])
    calls = []

    def counted(names, *args, **keywords):
        calls.append(names)
        return row_statistics(names, *args, **keywords)

    monkeypatch.setattr(sets, "row_statistics", counted)
    fitted.score(net, X)
    assert len(calls) == 1
    assert set(calls[0]) == {
        "max",
        "logsumexp",
        "confidence",
        "distance",
        "norm1",
        "norm2",
        "centred_norm",
        "projection",
    }
    # Sharing is found again after a move and after loading, which copy every buffer.
    fitted.double().float()
    fitted.score(net, X)
    fitted.load_state_dict({name: value.clone() for name, value in fitted.state_dict().items()})
    fitted.score(net, X)
    within = nn.ModuleDict({"detectors": DetectorSet(names)})
    within.load_state_dict({f"detectors.{name}": value.clone() for name, value in fitted.state_dict().items()})
    within["detectors"].score(net, X)
    pickle.loads(pickle.dumps(within))["detectors"].score(net, X)
    assert len(calls) == 5


@pytest.mark.parametrize("n_classes", [10, 200])
def test_a_score_in_a_set_is_the_score_alone(n_classes):
    """But for rounding: in a set the sum behind MSP, Energy, Entropy and GEN may be taken in another way."""
    z, head = torch.randn(300, 32).relu(), nn.Linear(32, n_classes).requires_grad_(False)
    logits = 3 * head(z)
    logits[3, 5], logits[4] = -math.inf, torch.arange(n_classes) * -30.0
    made = {name: name for name in ("MSP", "MaxLogit", "Energy", "Entropy", "FeatureNorm", "NCI")}
    made |= {"GEN": detectors.GEN(M=None), "fDBD": "FDBD", "D": "BoundaryDistance"}
    together = DetectorSet(made).fit_features(z, logits, None, head)
    for name, scores in together.score_features(z, logits).items():
        alone = together[name].score_features(z, logits)
        if name in ("MaxLogit", "FeatureNorm", "NCI", "fDBD", "D"):
            assert torch.equal(scores, alone), name
        torch.testing.assert_close(scores, alone, rtol=1e-6, atol=1e-12, msg=name)


def test_detectors_fitted_apart_are_read_apart():
    """Two NCIs with different means cannot share what is measured from the mean."""
    z, head = torch.randn(30, M), nn.Linear(M, C)
    first, second = detectors.NCI().fit_features(z, head=head), detectors.NCI().fit_features(z + 1, head=head)
    together = DetectorSet({"first": first, "second": second}).score_features(z, head(z).detach())
    torch.testing.assert_close(together["first"], first.score_features(z, head(z).detach()))
    torch.testing.assert_close(together["second"], second.score_features(z, head(z).detach()))
    assert not torch.allclose(together["first"], together["second"])


def test_validation_data_goes_to_those_that_are_fitted_on_it():
    net = Net().eval()
    train, validation = [(X[:40], Y[:40])], [(X[40:], Y[40:])]
    fitted = all_of_them().fit(net, train, validation=validation)
    scores = fitted.score(net, X)
    for name in FITTED:
        data = validation if make(name).fits_on == "validation" else train
        torch.testing.assert_close(scores[name], make(name).fit(net, data).score(net, X), rtol=1e-5, atol=1e-6)


def test_a_set_keeps_its_state_dict():
    net = Net().eval()
    fitted = all_of_them().fit(net, [(X, Y)])
    fresh = all_of_them()
    fresh.load_state_dict(fitted.state_dict())
    for name, scores in fresh.score(net, X).items():
        torch.testing.assert_close(scores, fitted[name].score(net, X), rtol=1e-5, atol=1e-6)


def test_variants_take_part_in_one_fit():
    z, head = torch.randn(50, M).relu(), nn.Linear(M, C).requires_grad_(False)
    original = detectors.NCI()
    Fit([original])
    variants = list(original.variants())
    assert [variant.alpha for variant in variants] == list(detectors.NCI.grid["alpha"])
    Fit(variants).take(z, head(z), classes_of(head(z)))
    Fit(variants).finish(head)
    for variant in variants:
        alone = detectors.NCI(alpha=variant.alpha).fit_features(z, head=head)
        torch.testing.assert_close(variant.score_features(z, head(z)), alone.score_features(z, head(z)))


def test_no_variant_takes_part_in_a_fit_that_gathers_something_else():
    begun = detectors.Mahalanobis().partial_fit(torch.randn(50, M), None, torch.arange(50) % C)
    with pytest.raises(ValueError, match=r"grid: got \{'normalize': True\}"):
        list(begun.variants({"normalize": (True,)}))
    assert [variant.ridge for variant in begun.variants({"ridge": (0.0, 1.0)})] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "detectors: got none"),
        ([detectors.KNN(k=1), detectors.KNN(k=2)], ValueError, "detectors: got KNN, KNN, expected different classes"),
        ({"mine": 3}, TypeError, r"detectors\['mine'\]: got int 3, expected a Detector"),
        (["MSPP"], checks.UserError, "unknown detector 'MSPP'"),
    ],
)
def test_what_is_no_set(given, error, message):
    with pytest.raises(error, match=message):
        DetectorSet(given)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="got 5 features, 4 logits, 5 targets, expected as many of each"):
        all_of_them().partial_fit(torch.randn(5, M), torch.randn(4, C), torch.zeros(5, dtype=torch.int64))
