"""The evaluation of trained models: numbers against plain loops, what is kept, when it is made anew, seeds, files."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import forked
from test_metrics import compute_all_metrics, ece_by_loop
from torch import nn

import ood_fast
from ood_fast import checks, data, detectors, evaluation, files, metrics, published, recipes
from ood_fast.data import ImageBenchmark
from ood_fast.data.images import ImageDataset, Tensors
from ood_fast.detectors import KNN, NCI, ODIN, DetectorSet, FeatureNorm
from ood_fast.detectors.fitting import DoesNotFit, Note
from ood_fast.evaluation.cache import model_key, score_key
from ood_fast.evaluation.trained import Trained
from ood_fast.evaluation.write import FILES
from ood_fast.train import fit_recipe

C, SHAPE, M = 3, (3, 4, 4), 8
NEAR, FAR = ("cifar100", "tin"), ("mnist", "svhn", "texture", "places365")  # the sets of the benchmark cifar10
CHOSEN = ("MSP", "Energy", "KNN", "NCI", "ReAct", "Mahalanobis", "ODIN")
FAST = {"bootstrap": 0, "leave_out": True}


@pytest.fixture(autouse=True)
def one_thread():
    """More only get into each other's way in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n: int, seed: int, shift: float = 0.0, has_classes: bool = False) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % C
    x = torch.randn(n, *SHAPE, generator=random) + shift
    if has_classes:
        x += y.view(-1, 1, 1, 1)
    return Tensors(x, y if has_classes else torch.full((n,), -1))


def make_benchmark(name: str = "cifar10", **parts: Tensors) -> ImageBenchmark:
    """60 training images of three classes, with the sets of CIFAR-10; `parts` takes the place of some of them."""
    sources = {
        "fit": images(60, 1, has_classes=True),
        "validation": images(30, 2, has_classes=True),
        "test": images(45, 3, has_classes=True),
        "validation_ood": images(20, 4, 1.5),
        **{ood_set: images(18 + number, 5 + number, number / 2) for number, ood_set in enumerate((*NEAR, *FAR))},
        **parts,
    }

    def opened(part: str):
        group = "near" if part in NEAR else "far" if part not in ("fit", "validation", "test") else "id"
        return lambda: ImageDataset(sources[part], title=f"images of {part}", group=group)

    inside = {part: opened(part) for part in ("fit", "validation", "test", "validation_ood")}
    ood = {part: opened(part) for part in sources if part not in inside}
    return ImageBenchmark(name, C, SHAPE, {"train": inside["fit"], **inside}, ood)


class Net(nn.Sequential):
    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(nn.Flatten(), nn.Linear(math.prod(SHAPE), M), nn.ReLU(), nn.Linear(M, C))
        self.n_images = 0

    def forward(self, x):
        self.n_images += len(x)
        return super().forward(x)


def no_pass(x):
    """In place of `forward`."""
    raise AssertionError("the model ran")


def trained(folder: Path, seed: int = 0, recipe: str | None = None, method: str = "net", **more) -> Trained:
    given = None if recipe is None else recipes.find(recipe)
    name = f"runs/s{seed}"
    return Trained(name, Net(seed).eval(), recipe or method, folder / f"s{seed}", "best.ckpt", recipe=given, **more)


def evaluate(folder: Path, chosen=CHOSEN, benchmark: ImageBenchmark | None = None, run=None, **options):
    run = trained(folder) if run is None else run
    return evaluation.evaluate_run(run, benchmark or make_benchmark(), chosen, **{**FAST, **options})


def numbers(result) -> dict[tuple[str, str, str], float]:
    return {(m.metric, m.detector, m.ood_set): m.value for m in result.measurements}


@torch.no_grad()
def outputs_of(model: nn.Module, dataset: ImageDataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, logits, targets in float64."""
    x = torch.stack([dataset[row][0] for row in range(len(dataset))])
    *layers, head = model
    z = nn.Sequential(*layers)(x)
    return z.double(), head(z).double(), dataset.targets


# ---- the numbers


def test_numbers_are_those_of_a_plain_evaluation(tmp_path):
    """Fit, score and measure each detector by itself, all in float64, with OpenOOD's metrics transcribed."""
    benchmark, run = make_benchmark(), trained(tmp_path)
    settings = {"MSP": {}, "Energy": {}, "KNN": {"k": 5}, "NCI": {}, "ReAct": {}, "Mahalanobis": {}, "FDBD": {}}
    chosen = {name: detectors.create(name, **given) for name, given in settings.items()}
    result = evaluate(tmp_path, chosen, benchmark, run, tune=False)
    model = run.model
    head = (model[3].weight.detach().double(), model[3].bias.detach().double())
    fit, validation, test = (outputs_of(model, part) for part in (benchmark.fit, benchmark.validation, benchmark.test))
    ood = {name: outputs_of(model, part)[:2] for name, part in benchmark.ood.items()}
    for name, given in settings.items():
        detector = detectors.create(name, **given)
        if detector.needs_fit:
            detector.fit_features(*(validation if detector.fits_on == "validation" else fit), head)
        inside = detector.score_features(*test[:2])
        found = {ood_set: compute_all_metrics(inside, detector.score_features(*z)) for ood_set, z in ood.items()}
        for mean_name, members in (("nearood", NEAR), ("farood", FAR)):
            found[mean_name] = {
                metric: sum(found[member][metric] for member in members) / len(members) for metric in found["tin"]
            }
        for ood_set, expected in found.items():
            for metric, value in expected.items():
                assert result.value(metric, name, ood_set) == pytest.approx(value, abs=1e-6), (name, ood_set, metric)
        outside = detector.score_features(*ood["svhn"])
        assert result.value("fpr95_id_positive", name, "svhn") == pytest.approx(
            metrics.fpr_at_tpr(inside, outside, positive="id"), abs=1e-6
        )
    _, logits, targets = test
    right = (logits.argmax(dim=1) == targets).tolist()
    assert result.value("accuracy") == pytest.approx(sum(right) / len(right))
    norm = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
    distance = detectors.BoundaryDistance().fit_features(*fit, head).score_features(*test[:2]).unsqueeze(1)
    for metric, scaled in {
        "ece_softmax": logits,
        "ece_scaled_by_norm": logits / (recipes.TAU * norm),
        "ece_scaled_by_distance": logits / distance,
    }.items():
        confidence = torch.softmax(scaled, dim=1).amax(dim=1).tolist()
        assert result.value(metric) == pytest.approx(ece_by_loop(confidence, right), abs=1e-6)
    assert run.model.n_images == sum(map(len, (benchmark.fit, benchmark.validation, benchmark.test))) + sum(
        map(len, benchmark.ood.values())
    ), "each image once, and OOD images for validation not where nothing is chosen"


def test_parameters_are_chosen_on_validation_images_alone(tmp_path):
    """Other test images, the same parameters; other validation images, others. ODIN's are searched as well."""
    chosen = {"NCI": NCI(), "ODIN": ODIN(), "KNN": KNN(k=3)}
    grids = {"KNN": {"k": (1, 40)}, "ODIN": {"temperature": (0.01, 1000.0), "eps": (0.0, 3.0)}}
    first = evaluate(tmp_path, chosen, grids=grids)
    others = {name: images(20, 50 + number, -4.0) for number, name in enumerate((*NEAR, *FAR))}
    other_test = evaluate(
        tmp_path, chosen, make_benchmark(test=images(30, 60, 3.0, has_classes=True), **others), grids=grids
    )
    assert other_test.settings == first.settings
    assert other_test.trials == first.trials
    other_validation = evaluate(tmp_path, chosen, make_benchmark(validation_ood=images(20, 70, -1.0)), grids=grids)
    assert other_validation.trials != first.trials
    for name, trials in first.trials.items():
        best = max(trials, key=lambda trial: trial["auroc"])
        assert all(first.settings[name][parameter] == best[parameter] for parameter in best if parameter != "auroc")
    benchmark, model = make_benchmark(), trained(tmp_path).model
    fit, inside, outside = (
        outputs_of(model, part) for part in (benchmark.fit, benchmark.validation, benchmark.validation_ood)
    )
    for trial in first.trials["KNN"]:
        alone = KNN(k=trial["k"], dtype=torch.float32).fit_features(*fit)
        expected = metrics.auroc(alone.score_features(*inside[:2]), alone.score_features(*outside[:2]))
        assert trial["auroc"] == pytest.approx(expected, abs=1e-9)


def test_what_runs_the_model_and_is_fitted_is_searched_as_tune_does(tmp_path):
    """AdaSCALE's p, and NAC's alpha at a layer: fitted once for all candidates, the second time read from the disk."""
    chosen = {"AdaSCALE": detectors.AdaSCALE("l"), "NAC": detectors.NAC(("1",)), "Block": detectors.BlockNorm(("1",))}
    benchmark, first = make_benchmark(), evaluate(tmp_path, chosen)
    train, *of_validation = (
        [torch.utils.data.default_collate([part[row] for row in range(len(part))])[:2]]
        for part in (benchmark.fit, benchmark.validation, benchmark.validation_ood)
    )
    far = {"validation_ood": of_validation[1]}
    tuned, trials = detectors.tune(DetectorSet(chosen), trained(tmp_path).model, train, of_validation[0], far)
    assert {name: len(tried) for name, tried in trials.items()} == {"AdaSCALE": 36, "NAC": 8, "Block": 0}
    for name in ("AdaSCALE", "NAC"):
        found = [trial["auroc"] for trial in first.trials[name]]
        assert found == pytest.approx([trial.auroc for trial in trials[name]], abs=1e-6)
    assert first.settings["AdaSCALE"]["p"] == list(tuned["AdaSCALE"].p)
    assert first.settings["NAC"]["alpha"] == tuned["NAC"].alpha
    run = trained(tmp_path)
    run.model.forward = no_pass
    assert numbers(evaluate(tmp_path, chosen, run=run)) == numbers(first)


def test_nothing_of_the_test_images_is_seen_before_parameters_are_chosen(tmp_path, monkeypatch):
    seen = []
    outputs, choose = evaluation.FeatureCache.outputs, ood_fast.detectors.search.Search.choose
    monkeypatch.setattr(
        evaluation.FeatureCache, "outputs", lambda self, name, *rest: seen.append(name) or outputs(self, name, *rest)
    )
    monkeypatch.setattr(
        ood_fast.detectors.search.Search, "choose", lambda self, *given: seen.append("choice") or choose(self, *given)
    )
    evaluate(tmp_path, ["ODIN"])
    assert seen == ["validation", "validation_ood", "choice", "test", *NEAR, *FAR], "ODIN is not fitted"


def test_what_does_not_fit_the_data_is_left_out_with_a_note(tmp_path):
    result = evaluate(tmp_path, ["MSP", "KNN", "ViM"])
    assert list(result.scores) == ["MSP", "KNN", "ViM"]
    assert result.settings["ViM"]["dim"] == 7
    assert result.settings["KNN"]["k"] == 50, "of OpenOOD's candidates, 60 training images have only these neighbours"
    chance, *notes = [note.partition(": got ")[0] for note in result.notes]
    assert chance.startswith("accuracy 33.3 %, no better than chance")
    assert notes == [
        "ViM: dim=256 does not fit the data: 7 is taken, the largest that does",
        *(f"KNN: k={k} left out: k" for k in (100, 200, 500, 1000)),
        "ViM: dim=1000 left out: dim",
    ]
    with pytest.raises(checks.UserError, match="ViM: dim: got 256, expected less than 8"):
        evaluate(tmp_path, ["MSP", "ViM"], leave_out=False, grids={"ViM": {"dim": (256,)}})
    with pytest.raises(checks.UserError, match=r"no detector could be fitted: .*ViM: left out"):
        evaluate(tmp_path, ["ViM"], grids={"ViM": {"dim": (256,)}})


def test_odin_steps_by_the_deviation_of_the_normalisation(tmp_path):
    class Normalised:
        transforms = (type("Step", (), {"std": (0.5, 0.25, 0.2)})(),)

        def __call__(self, x):
            return x

    benchmark = make_benchmark()
    benchmark.test.transform = Normalised()
    result = evaluate(tmp_path, {"ODIN": ODIN(eps=0.1)}, benchmark, tune=False)
    assert result.settings["ODIN"]["std"] == [0.5, 0.25, 0.2]
    x = torch.stack([benchmark.test[row][0] for row in range(len(benchmark.test))])
    expected = ODIN(eps=0.1, std=(0.5, 0.25, 0.2)).score(trained(tmp_path).model, x)
    torch.testing.assert_close(torch.from_numpy(result.scores["ODIN"]["id"]), expected)  # both in float64


# ---- intervals and seeds


def test_intervals_are_quantiles_of_the_drawn_metrics(tmp_path):
    result = evaluate(tmp_path, ["MSP"], bootstrap=30, seed=5)
    draws = metrics.Bootstrap(30, 5)
    scores = result.scores["MSP"]
    inside = draws.below(scores["id"], "id")
    of_set = {name: draws.detection(inside, draws.below(scores[name], name))["auroc"] for name in FAR}
    for ood_set, values in {**of_set, "farood": sum(of_set.values()) / len(FAR)}.items():
        number = next(m for m in result.measurements if (m.metric, m.ood_set) == ("auroc", ood_set))
        assert (number.low, number.high) == pytest.approx(metrics.percentile_interval(values))
        assert number.low <= number.value <= number.high
    plain = evaluate(tmp_path, ["MSP"])
    assert all(m.low is None for m in plain.measurements)
    assert numbers(plain) == numbers(result)


def test_runs_of_one_method_are_its_seeds(tmp_path):
    runs = [trained(tmp_path, seed) for seed in (0, 1, 2)] + [trained(tmp_path, 3, method="other")]
    results = evaluation.evaluate_runs(runs, make_benchmark(), ["MSP", "NCI"], bootstrap=20)
    assert {name: len(members) for name, members in results.methods.items()} == {"net": 3, "other": 1}
    found = {(s.method, s.metric, s.detector, s.ood_set): s for s in results.summaries()}
    for (method, *key), summary in found.items():
        members = results.methods[method]
        values = [run.value(*key) for run in members]
        assert summary.n_runs == len(members)
        assert summary.mean == pytest.approx(np.mean(values))
        spread = np.std(values, ddof=1) if len(values) > 1 else None
        assert summary.std == pytest.approx(spread, abs=1e-12)
        draws = torch.stack([run.draws[tuple(key)] for run in members]).mean(dim=0)
        assert (summary.low, summary.high) == pytest.approx(metrics.percentile_interval(draws))


def test_runs_that_are_no_seeds_of_each_other(tmp_path):
    twice = [trained(tmp_path, 0), replace(trained(tmp_path, 0), name="copy")]
    with pytest.raises(checks.UserError, match=r"copy: has the same weights as runs/s0"):
        evaluation.evaluate_runs(twice, make_benchmark(), ["MSP"], bootstrap=0)
    recipe = replace(recipes.find("cifar10-ce"), name="mine")
    runs = [
        replace(trained(tmp_path, seed), method="mine", recipe=replace(recipe, epochs=epochs))
        for seed, epochs in ((0, 100), (1, 200))
    ]
    with pytest.raises(checks.UserError, match=r"runs/s1, runs/s0: both are called mine, but are no seeds"):
        evaluation.evaluate_runs(runs, make_benchmark(), ["MSP"], bootstrap=0)


# ---- published numbers


def published_of(folder: Path, run: Trained | None = None, chosen=("MSP", "KNN", "Mahalanobis"), **options):
    benchmark = options.pop("benchmark", None) or make_benchmark()
    run = run or trained(folder, recipe="cifar10-ce")
    results = evaluation.evaluate_runs([run], benchmark, chosen, **{**FAST, **options})
    return {(s.metric, s.detector, s.ood_set): s for s in results.summaries() if s.published is not None}


def test_published_numbers_stand_beside_ours(tmp_path):
    found = published_of(tmp_path)
    expected = {
        ("auroc", "MSP", "nearood"): 0.8803,
        ("auroc", "MSP", "farood"): 0.9073,
        ("auroc", "KNN", "nearood"): 0.9064,
        ("auroc", "KNN", "farood"): 0.9296,
        ("auroc", "Mahalanobis", "nearood"): 0.8420,
        ("auroc", "Mahalanobis", "farood"): 0.8972,
        ("accuracy", "", ""): 0.9506,
        ("ece_softmax", "", ""): 0.033,
        ("ece_scaled_by_norm", "", ""): 0.048,
        ("ece_scaled_by_distance", "", ""): 0.023,
    }
    assert {key: summary.published for key, summary in found.items()} == pytest.approx(expected)
    for summary in found.values():
        assert summary.difference == summary.mean - summary.published
        assert "OpenOOD" in summary.source or "Ding" in summary.source


def test_published_numbers_stand_only_beside_the_same_setting(tmp_path):
    everything = set(published_of(tmp_path))
    # other training
    changed = replace(recipes.find("cifar10-ce"), learning_rate=0.05)
    for number, other in enumerate(
        (
            {"recipe": changed, "method": "cifar10-ce"},
            {"recipe": None, "method": "cifar10-ce"},  # the name of its folder
            {"info": {"status": "training", "image_shape": SHAPE}},
            {"info": {"status": "complete", "image_shape": SHAPE}, "checkpoint": "run/epochs/0010.ckpt"},
        )
    ):
        run = replace(trained(tmp_path / str(number), recipe="cifar10-ce"), **other)
        assert published_of(tmp_path, run) == {}, other
    done = replace(trained(tmp_path, recipe="cifar10-ce"), info={"status": "complete"}, checkpoint="run/final.ckpt")
    assert set(published_of(tmp_path, done)) == everything
    # other precision, or the batch spread over processes: the same training
    spread = replace(recipes.find("cifar10-ce"), amp="bf16", n_processes=2, batch_size=64)
    same = replace(trained(tmp_path, recipe="cifar10-ce"), recipe=spread)
    assert set(published_of(tmp_path, same)) == everything
    # parameters of one's own
    own = {"MSP": "MSP", "KNN": KNN(k=5), "Mahalanobis": "Mahalanobis"}
    own = dict(DetectorSet(own).items())
    without_knn = {key for key in everything if key[1] != "KNN"}
    assert set(published_of(tmp_path, chosen=own, grids={"KNN": {}})) == without_knn
    assert set(published_of(tmp_path, chosen=own)) == everything, "k is searched anyway"
    assert set(published_of(tmp_path, tune=False, chosen=own)) == without_knn
    # other sets in a mean
    with_another = make_benchmark(mine=images(9, 99))
    assert set(published_of(tmp_path, benchmark=with_another)) == {key for key in everything if key[2] != "farood"}
    elsewhere = make_benchmark("cifar100")
    assert published_of(tmp_path, benchmark=elsewhere) == {}


def test_the_processes_of_a_run_decide_its_batch(tmp_path):
    """A recipe with 128 images a step, run by two processes with 128 each: another training, by another name."""
    digits = data.open_benchmark("digits")
    fit_recipe(replace(recipes.find("digits-ce"), epochs=1), digits, tmp_path)
    info = json.loads((tmp_path / "run.json").read_text())
    for n_processes, method in ((1, "digits-ce epochs=1"), (2, "digits-ce epochs=1 batch_size=256")):
        (tmp_path / "run.json").write_text(json.dumps({**info, "processes": n_processes}))
        assert evaluation.open_run(tmp_path, digits.n_classes, digits.image_shape).method == method


def test_published_numbers_are_of_recipes_and_detectors_that_are_there():
    for benchmark, method in published.PUBLISHED:
        if not method.startswith("pretrained-"):
            assert recipes.find(method).benchmark == benchmark
        for metric, detector, ood_set in published.of(benchmark, method):
            assert metric in sys.modules["ood_fast.evaluation.results"].CONVENTIONS or metric in ("auroc", "accuracy")
            assert not detector or detector in detectors.known()
            spec = ood_fast.data.benchmarks.SPECS[benchmark]
            assert not ood_set or ood_set in ("nearood", "farood", *spec.near, *spec.far)
    assert all(0 < number.value < 100 for table in published.PUBLISHED.values() for number in table.values())


# ---- the cache


def test_a_second_evaluation_runs_no_model(tmp_path):
    first = evaluate(tmp_path)
    run = trained(tmp_path)
    run.model.forward = no_pass
    second = evaluate(tmp_path, run=run)
    assert numbers(second) == numbers(first)
    assert second.images_per_second == {}
    third = evaluate(tmp_path, [*CHOSEN, "FDBD"], run=run)
    assert {key: value for key, value in numbers(third).items() if key[1] != "FDBD"} == numbers(first)


def test_other_weights_or_a_mode_of_a_layer_are_another_model(tmp_path):
    first = evaluate(tmp_path, ["MSP"])
    run = trained(tmp_path)
    with torch.no_grad():
        run.model[1].weight[0, 0] += 1e-3
    other = evaluate(tmp_path, ["MSP"], run=run)
    assert run.model.n_images > 0
    assert other.model_key != first.model_key
    leaky = trained(tmp_path)
    leaky.model[2] = nn.LeakyReLU(0.1)
    assert evaluate(tmp_path, ["MSP"], run=leaky).model_key not in (first.model_key, other.model_key)
    assert leaky.model.n_images > 0


def test_code_and_numbers_that_no_layer_shows_are_another_model(tmp_path, monkeypatch):
    """A forward pass that was mended must not give the features of before."""
    monkeypatch.syspath_prepend(tmp_path)
    text = "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        return super().forward(x)"
    keys = []
    for name, code, scale in (("a", text, 1.0), ("b", text, 1.0), ("c", text, 2.0), ("d", f"{text}.relu()", 1.0)):
        (tmp_path / f"keyed_{name}.py").write_text(code)
        net = importlib.import_module(f"keyed_{name}").Net(4, 3)
        nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
        net.scale = scale
        keys.append(model_key(net, net))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_only_the_sets_that_changed_are_run_again(tmp_path):
    evaluate(tmp_path, ["MSP"])
    run, changed = trained(tmp_path), make_benchmark(svhn=images(25, 99, 2.0))
    again = evaluate(tmp_path, ["MSP"], changed, run)
    assert run.model.n_images == 25
    fresh = evaluate(tmp_path / "fresh", ["MSP"], changed)
    assert numbers(again) == numbers(fresh)


def test_scores_of_a_detector_that_needs_the_model_are_kept_by_its_settings(tmp_path):
    evaluate(tmp_path, {"ODIN": ODIN()}, tune=False)
    run = trained(tmp_path)
    run.model.forward = no_pass
    evaluate(tmp_path, {"ODIN": ODIN()}, run=run, tune=False)
    with pytest.raises(AssertionError, match="the model ran"):
        evaluate(tmp_path, {"ODIN": ODIN(eps=0.01)}, run=run, tune=False)
    other = evaluate(tmp_path, {"ODIN": ODIN(eps=0.01)}, tune=False)
    assert numbers(other) == numbers(evaluate(tmp_path / "fresh", {"ODIN": ODIN(eps=0.01)}, tune=False))


def damages():
    def truncated(folder: Path) -> None:
        with open(next(folder.glob("test-*/features.npy")), "r+b") as file:
            file.truncate(200)

    def of_another_shape(folder: Path) -> None:
        np.save(next(folder.glob("test-*/logits.npy")), np.zeros((45, C + 1), np.float32))

    def no_header(folder: Path) -> None:
        next(folder.glob("test-*/logits.npy")).write_bytes(b"\0" * 900)

    def empty(folder: Path) -> None:
        next(folder.glob("test-*/targets.npy")).write_bytes(b"")

    def fewer_scores(folder: Path) -> None:
        np.save(next(folder.glob("test-*/ODIN-*.npy")), np.zeros(3))

    def no_meta(folder: Path) -> None:
        next(folder.glob("test-*/meta.json")).write_text('{"set": "te')

    def no_file(folder: Path) -> None:
        next(folder.glob("test-*/features.npy")).unlink()

    def flipped(name: str) -> Callable[[Path], None]:
        def flip(folder: Path) -> None:
            file = next(folder.glob(f"test-*/{name}"))
            content = bytearray(file.read_bytes())
            content[-40] ^= 1
            file.write_bytes(content)

        flip.__name__ = f"a bit of {name}"
        return flip

    flips = map(flipped, ("features.npy", "logits.npy", "targets.npy", "ODIN-*.npy", "meta.json"))
    return [truncated, of_another_shape, no_header, empty, fewer_scores, no_meta, no_file, *flips]


@pytest.mark.parametrize("damage", damages(), ids=lambda damage: damage.__name__)
def test_a_damaged_set_is_made_anew(tmp_path, damage):
    benchmark = make_benchmark()
    first = evaluate(tmp_path, ["MSP", "KNN", "ODIN"], benchmark, tune=False)
    (folder,) = (tmp_path / "s0/cache").iterdir()
    damage(folder)
    run = trained(tmp_path)
    again = evaluate(tmp_path, ["MSP", "KNN", "ODIN"], benchmark, run, tune=False)
    assert numbers(again) == numbers(first)
    assert len(benchmark.test) <= run.model.n_images <= 3 * len(benchmark.test), "the test set alone, ODIN's passes too"


def test_a_damaged_head_is_written_anew(tmp_path):
    evaluate(tmp_path, ["MSP"])
    (file,) = (tmp_path / "s0/cache").glob("*/head.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(checks.UserError, match=r"head.npz: no head of a model there, or damaged"):
        evaluation.read_head(next(file.parent.glob("test-*")))
    run = trained(tmp_path)
    evaluate(tmp_path, ["MSP"], run=run)
    assert run.model.n_images == 0
    weight, bias = evaluation.read_head(next(file.parent.glob("test-*")))
    assert torch.equal(weight, run.model[3].weight)
    assert torch.equal(bias, run.model[3].bias)


def test_what_the_cache_holds_can_be_read(tmp_path):
    result = evaluate(tmp_path, ["ODIN"], tune=False)
    held = evaluation.read_outputs(result.outputs["svhn"].path)
    z, logits, targets = outputs_of(trained(tmp_path).model, make_benchmark().ood["svhn"])
    torch.testing.assert_close(held.features, z.float())
    torch.testing.assert_close(held.logits, logits.float())
    assert torch.equal(held.targets, targets)
    assert (held.name, held.title, held.group) == ("svhn", "images of svhn", "far")
    ((_, scores),) = held.scores.items()
    np.testing.assert_array_equal(scores.numpy(), result.scores["ODIN"]["svhn"])
    chunks = list(held.chunks())
    assert torch.equal(torch.cat([chunk[0] for chunk in chunks]), held.features.double())
    with pytest.raises(checks.UserError, match="no features of a model there"):
        evaluation.read_outputs(tmp_path)


def test_chunks_give_the_same_numbers(tmp_path, monkeypatch):
    whole = evaluate(tmp_path)
    monkeypatch.setattr(evaluation.cache, "CHUNK_VALUES", 7 * (M + C))
    parts = evaluate(tmp_path)
    assert {len(chunk[0]) for chunk in parts.outputs["fit"].chunks()} == {7, 60 % 7}
    assert numbers(parts) == pytest.approx(numbers(whole), abs=1e-9)


class Dying(Net):
    """The 4th batch of test images is never done."""

    def forward(self, x):
        if self.n_images == 60 + 30 + 20 + 3 * 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def evaluate_and_die(folder: str) -> None:
    run = replace(trained(Path(folder)), model=Dying().eval())
    evaluate(Path(folder), ["MSP", "KNN"], run=run, batch_size=10)


def test_a_killed_evaluation_leaves_no_half_written_set(tmp_path):
    code = f"import test_evaluate; test_evaluate.evaluate_and_die({str(tmp_path)!r})"
    killed = forked("-c", code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = (tmp_path / "s0/cache").iterdir()
    names = {entry.parent.name.partition("-")[0] for entry in folder.glob("*/meta.json")}
    assert names == {"fit", "validation", "validation_ood"}
    assert list(folder.glob("test-*/.staged*"))
    # Dying's repr, and so the key, is another than Net's: the run goes on in the same folder with the same class.
    run = replace(trained(tmp_path), model=Dying().eval())
    run.model.n_images = -1000
    again = evaluate(tmp_path, ["MSP", "KNN"], run=run)
    assert run.model.n_images == -1000 + 45 + sum(len(part) for part in make_benchmark().ood.values())
    assert numbers(again) == numbers(evaluate(tmp_path / "fresh", ["MSP", "KNN"]))
    assert not list(folder.rglob(".staged*"))


def test_what_another_evaluation_keeps_meanwhile_stays(tmp_path, monkeypatch):
    is_whole, kept = evaluation.cache._is_whole, []

    def another_comes_between(folder, shapes):
        answer = is_whole(folder, shapes)
        if not kept:
            kept.append(None)
            kept[0] = evaluate(tmp_path, ["MSP", "KNN"])
        return answer

    monkeypatch.setattr(evaluation.cache, "_is_whole", another_comes_between)
    result = evaluate(tmp_path, ["MSP"])
    for name, outputs in result.outputs.items():  # both still have theirs, whoever came last
        assert torch.equal(outputs.features, kept[0].outputs[name].features)
    assert not list((tmp_path / "s0/cache").rglob(".staged*"))


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(checks.UserError, match=r"the cache .* has 0.0 GiB free, but features and logits of test take"):
        evaluate(tmp_path, ["MSP"])
    monkeypatch.undo()

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "touch", full)
        patch.setattr(files.os, "mkdir", full)
        with pytest.raises(checks.UserError, match=r"^cannot write the cache \S+: No space left on device$"):
            evaluate(tmp_path, ["MSP"])

    monkeypatch.setattr(evaluation.cache._Rows, "write", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(tmp_path, ["MSP"])
    (folder,) = (tmp_path / "s0/cache").iterdir()
    assert not list(folder.iterdir())


def test_nan_names_the_image_and_is_not_kept(tmp_path):
    bad = images(25, 11)
    bad.images[17, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="svhn: image 17: features: got NaN"):
        evaluate(tmp_path, ["MSP"], make_benchmark(svhn=bad), batch_size=10)
    (folder,) = (tmp_path / "s0/cache").iterdir()
    assert not list(folder.glob("svhn-*"))
    assert not list(folder.rglob(".staged*"))


# ---- bad input


def test_what_does_not_belong_together(tmp_path):
    with pytest.raises(checks.UserError, match="OOD set 'test': tables call something else by this name"):
        evaluate(
            tmp_path, benchmark=ImageBenchmark("x", C, SHAPE, make_benchmark()._parts, {"test": lambda: images(3, 1)})
        )
    run = trained(tmp_path)
    run.model[3] = nn.Linear(M, 7)
    with pytest.raises(checks.UserError, match="a model of 7 classes, but benchmark cifar10 has 3"):
        evaluate(tmp_path, run=run)
    other_size = replace(trained(tmp_path), info={"image_shape": [3, 8, 8]})
    with pytest.raises(
        checks.UserError, match=r"trained on images of \(3, 8, 8\), but benchmark cifar10 has \(3, 4, 4\)"
    ):
        evaluate(tmp_path, run=other_size)
    own = make_benchmark("folder")
    own.class_names = ("cat", "dog", "eel")
    told = {"image_shape": SHAPE, "benchmark": "folder", "class_names": ["cat", "dog", "emu"]}
    with pytest.raises(checks.UserError, match=r"class 2 was 'emu' in training, but is 'eel' in these images"):
        evaluate(tmp_path, benchmark=own, run=replace(trained(tmp_path), info=told))
    with pytest.raises(checks.UserError, match=r"unknown detector 'MPS'.*did you mean 'MSP'"):
        evaluate(tmp_path, ["MPS"])


def test_a_run_of_ours_at_chance_level_is_told(tmp_path):
    """The verdict on an untrained net looked as any other."""
    assert trained(tmp_path).info is None
    untrained = replace(trained(tmp_path), info={"status": "complete", "recipe": {}})
    (note, *_) = evaluate(tmp_path, ["MSP"], run=untrained).notes
    assert "no better than chance (33.3 %); usual causes: too few epochs" in note


def test_training_images_that_were_changed_since_are_told(tmp_path):
    def notes(name: str, **parts: Tensors) -> str:
        info = {"benchmark": name, "training_images": 60, "training_content": make_benchmark().fit.content}
        run = replace(trained(tmp_path), info={**info, "status": "complete", "recipe": {}})
        return " ".join(evaluate(tmp_path, ["MSP", "KNN"], make_benchmark(name, **parts), run).notes)

    told = "are not the 60 that the model was trained on: they were changed"
    assert told not in notes("own")
    assert f"the training images, 60, {told}" in notes("own", fit=images(60, 9, has_classes=True))
    assert told not in notes("cifar10", fit=images(60, 9, has_classes=True)), "perhaps another layout"
    assert f"the training images, 57, {told}" in notes("cifar10", fit=images(57, 1, has_classes=True))


# ---- files


@pytest.fixture
def results(tmp_path) -> evaluation.Results:
    runs = [trained(tmp_path, seed, recipe="cifar10-ce") for seed in (0, 1, 2)]
    return evaluation.evaluate_runs(runs, make_benchmark(), ["MSP", "Energy", "KNN"], bootstrap=10, leave_out=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_openoods_table_to_the_byte(results, tmp_path):
    evaluation.write(tmp_path / "out", results, {})
    assert sorted(file.name for file in (tmp_path / "out/openood").iterdir()) == ["ebo.csv", "knn.csv", "msp.csv"]
    columns = ("fpr95_ood_positive", "auroc", "aupr_in", "aupr_out", "accuracy")

    def row(ood_set: str) -> str:
        cells = []
        for metric in columns:
            where = () if metric == "accuracy" else ("KNN", ood_set)
            values = np.array([100 * run.value(metric, *where) for run in results.runs])
            cells.append(f"{values.mean():.2f} ± {values.std():.2f}")
        return ",".join([ood_set, *cells]) + "\n"

    expected = ",FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\n" + "".join(
        row(name) for name in ("cifar100", "tin", "nearood", "mnist", "svhn", "texture", "places365", "farood")
    )
    assert (tmp_path / "out/openood/knn.csv").read_bytes() == expected.encode()


def test_without_ood_sets_there_is_no_table_of_them(tmp_path):
    benchmark = make_benchmark()
    benchmark.tested = {}
    results = evaluation.evaluate_runs([trained(tmp_path)], benchmark, ["MSP", "KNN"], **FAST)
    assert [table.title for table in evaluation.build(results)] == ["Accuracy and expected calibration error (%)"]
    evaluation.write(tmp_path / "out", results, {})
    assert evaluation.read(tmp_path / "out")["sets"].keys() == {"id"}


def test_files_hold_all_numbers(results, tmp_path):
    out = tmp_path / "out"
    evaluation.write(out, results, {"command": "ood-fast evaluate ..."})
    rows = read_csv(out / "results.csv")
    assert len(rows) == sum(len(run.measurements) for run in results.runs)
    for row in rows:
        run = next(run for run in results.runs if run.trained.name == row["run"])
        assert float(row["value"]) == run.value(row["metric"], row["detector"], row["ood_set"])
        assert float(row["low"]) <= float(row["high"])
    held = evaluation.read(out)
    assert held["command"] == "ood-fast evaluate ..."
    assert [run["method"] for run in held["runs"]] == ["cifar10-ce"] * 3
    summaries = list(results.summaries())
    for text, kept, summary in zip(read_csv(out / "summary.csv"), held["summary"], summaries, strict=True):
        assert kept["mean"] == float(text["mean"]) == summary.mean
        assert kept["published"] == summary.published
        assert text["published"] == ("" if summary.published is None else str(summary.published))
        assert kept["difference"] == summary.difference
    for kept, run in zip(held["runs"], results.runs, strict=True):
        assert kept["detectors"] == run.settings
        for detector, sets in evaluation.read_scores(out, kept).items():
            for name, scores in sets.items():
                np.testing.assert_array_equal(scores, run.scores[detector][name])
        assert evaluation.read_outputs(kept["outputs"]["svhn"]).name == "svhn"


def test_results_stay_in_their_folder_and_are_json(tmp_path):
    """A run may be called "..", and a parameter infinite."""
    loader = [(torch.randn(9, 4), torch.arange(9) % 3)]
    found = ood_fast.evaluate(nn.Linear(4, 3), loader, {"far": loader}, detectors={"inf": FeatureNorm(p=math.inf)})
    (run,) = found.runs
    run.trained = replace(run.trained, name="..")
    evaluation.write(tmp_path / "out", found, {})
    (kept,) = evaluation.read(tmp_path / "out")["runs"]
    assert (kept["scores"], kept["detectors"]["inf"]["p"]) == (f"scores/{Path.cwd().parent.name}", "inf")


def test_the_images_are_looked_at_once_for_all_that_is_fitted(tmp_path):
    looked, named = [], {"a": detectors.MSP(), "b": detectors.Energy()}
    for detector in named.values():
        detector.save(tmp_path / f"{score_key(detector)}-{'0' * 16}.fit")
    images = SimpleNamespace(fingerprint=lambda: looked.append(1) or "0" * 64)
    cached = SimpleNamespace(folder=tmp_path, model=nn.Linear(1, 1))
    assert list(evaluation.FeatureCache.fitted(cached, named, images, None)) == ["a", "b"]
    assert len(looked) == 1


def test_the_spread_is_that_of_a_sample(results, tmp_path):
    """In tables, CSV and JSON; OpenOOD's file keeps its own, see above. Of one run there is none."""
    values = [run.value("auroc", "MSP", "svhn") for run in results.runs]
    (summary,) = [s for s in results.summaries() if (s.metric, s.detector, s.ood_set) == ("auroc", "MSP", "svhn")]
    assert summary.std == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert all("Mean ± sample standard deviation over 3 seeds" in table.caption for table in evaluation.build(results))
    one = replace(results, runs=results.runs[:1])
    assert {summary.std for summary in one.summaries()} == {None}
    evaluation.write(tmp_path / "out", one, {})
    assert {row["std"] for row in read_csv(tmp_path / "out/summary.csv")} == {""}
    assert {row["std"] for row in evaluation.read(tmp_path / "out")["summary"]} == {None}
    assert not any("±" in evaluation_table.caption for evaluation_table in evaluation.build(one))


def test_a_note_of_several_runs_is_one_line(results, capsys):
    for run in results.runs:
        reason = "dim: got 512, expected less than 64, the number of features; take a smaller dim, such as 32"
        run.notes = [Note.left_out("ViM", DoesNotFit(reason, "dim", 32))]
    results.runs[2].notes.append("another")
    evaluation.print_tables(results)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("runs/s")]
    assert lines == [f"runs/s0, runs/s1, runs/s2: {results.runs[0].notes[0]} (--set ViM.dim=32)", "runs/s2: another"]


def test_tables_show_both_conventions_and_the_difference(results):
    tables = {table.title: table for table in evaluation.build(results)}
    assert tables["AUROC (%)"].columns == (
        *("near-OOD", "near-OOD published", "difference", "far-OOD", "far-OOD published", "difference"),
    )
    (section,) = tables["AUROC (%)"].sections
    assert section.heading == "cifar10-ce"
    found = {(s.metric, s.detector, s.ood_set): s for s in results.summaries()}
    ours = found["auroc", "MSP", "nearood"]
    cells = [cell.text for cell in dict(section.rows)["MSP"][:3]]
    assert cells == [
        f"{100 * ours.mean:.2f} ± {100 * ours.std:.2f} [{100 * ours.low:.2f}, {100 * ours.high:.2f}]",
        "88.03",
        f"{100 * ours.mean - 88.03:+.2f}",
    ]
    fpr = tables["FPR95 (%), lower is better"]
    assert fpr.columns[:2] == ("near-OOD, OOD positive", "near-OOD, ID positive")
    assert dict(fpr.sections[0].rows)["MSP"][1].text.startswith(
        f"{100 * found['fpr95_id_positive', 'MSP', 'nearood'].mean:.2f}"
    )
    assert tables["AUPR (%)"].columns[:2] == ("near-OOD, ID positive", "near-OOD, OOD positive")
    assert "published" in tables["Accuracy and expected calibration error (%)"].columns


def test_of_many_detectors_a_terminal_shows_auroc_alone(results, monkeypatch, capsys):
    monkeypatch.setattr("ood_fast.evaluation.tables.MANY", 2)
    others = [replace(run, trained=replace(run.trained, method="other")) for run in results.runs]
    several = replace(results, runs=[*results.runs, *others])
    for of in (results, several):
        evaluation.print_tables(of)
        output = capsys.readouterr().out
        assert "AUROC (%)" in output
        assert "FPR95 (%)" not in output
        assert "AUROC by set" not in output
        assert any(table.title.startswith("FPR95") for table in evaluation.build(of))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_full_disk_leaves_the_earlier_results(results, tmp_path, monkeypatch):
    out = tmp_path / "out"
    evaluation.write(out, results, {"command": "first"})
    before = tree(out)

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["ood_fast.evaluation.write"], "write_npz", full)
    with pytest.raises(OSError, match="No space left"):
        evaluation.write(out, results, {"command": "second"})
    assert tree(out) == before
    with pytest.raises(OSError, match="No space left"):
        evaluation.write(tmp_path / "new", results, {})
    assert not (tmp_path / "new").exists()


def test_two_that_write_into_one_folder_take_turns(results, tmp_path):
    out = tmp_path / "out"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: evaluation.write(out, results, {"command": str(number)}), range(12)))
    assert sorted(entry.name for entry in out.iterdir()) == sorted(FILES)
    assert evaluation.read_scores(out, evaluation.read(out)["runs"][0])


def test_results_take_the_place_of_earlier_ones_and_of_nothing_else(results, tmp_path):
    out = tmp_path / "out"
    evaluation.write(out, results, {"command": "first"})
    (out / "notes.txt").write_text("mine")
    assert evaluation.check_folder(out) == out
    evaluation.write(out, results, {"command": "second"})
    assert evaluation.read(out)["command"] == "second"
    assert (out / "notes.txt").read_text() == "mine"
    (out / "results.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(checks.UserError, match=r"holds results\.csv, which no evaluation wrote"):
        evaluation.check_folder(out)
    with pytest.raises(checks.UserError, match="holds no evaluation"):
        evaluation.read(tmp_path)
