"""The comparison from end to end with few epochs, and its parts: recipes, runs, pairs, what is there already."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ood_fast import L2NormLinear, checks, compare, data, detectors, diagnostics, evaluate, evaluation, recipes
from ood_fast.compare import Comparison, recipes_of
from ood_fast.data.loading import batched
from ood_fast.evaluation.results import Measurement, Results, RunResult, mean_interval
from ood_fast.evaluation.trained import Trained
from ood_fast.train import Run, criterion_of, model_of
from ood_fast.training.folder import describe

SEEDS = (0, 3)
MEASURING = {"bootstrap": 0, "grids": {"MSP": {}, "NCI": {"alpha": (1e-4, 1e-2)}}}


@pytest.fixture(scope="module")
def benchmark_of():
    opened = {}
    return lambda seed: opened.setdefault(seed, data.open_benchmark("digits", seed=seed))


@pytest.fixture(scope="module")
def comparison_in(benchmark_of):
    def made(folder, losses=("ce", "elogitnorm"), seeds=SEEDS, epochs=2, **keywords) -> Comparison:
        given = {"chosen": ["MSP", "NCI"], "measuring": MEASURING, **keywords}
        return Comparison(
            folder, recipes_of("digits", losses, changes=[f"epochs={epochs}"]), seeds, benchmark_of, **given
        )

    return made


@pytest.fixture(scope="module")
def folder(comparison_in, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compare") / "new" / "folder"


@pytest.fixture(scope="module")
def results(comparison_in, folder) -> Results:
    return comparison_in(folder).run()


def numbers(results: Results) -> dict:
    return {(r.trained.method, r.trained.seed, *m.key): m.value for r in results.runs for m in r.measurements}


# ---- recipes


def test_recipes_are_alike_but_for_the_loss():
    found = recipes_of("digits", ["CE", "logitnorm", "ELogitNorm", "l2norm", "t2fnorm"], changes=["epochs=3"])
    settings = {name: recipes.as_dict(recipe) for name, recipe in found.items()}
    for of_loss in settings.values():
        for name in ("name", "source", *recipes.OF_THE_LOSS):
            del of_loss[name]
        assert of_loss == settings["ce"]
        assert of_loss["epochs"] == 3
    assert {name: compare.loss_of(recipe) for name, recipe in found.items()} == {name: name for name in found}


def test_recipes_of_a_benchmark_and_of_any_recipe():
    assert recipes_of("cifar10", ["elogitnorm"])["elogitnorm"] == recipes.find("cifar10-elogitnorm")
    made = recipes_of("cifar10", ["l2norm"])["l2norm"]
    assert (made.model, made.head, made.loss, made.epochs) == ("resnet18_32x32", "l2norm", "ce", 100)
    given = recipes_of("folder", ["ce", "t2fnorm"], "cifar100-elogitnorm-200", ["lr=0.05"])
    assert {r.benchmark for r in given.values()} == {"folder"}
    assert [(r.loss, r.head, r.head_tau, r.epochs) for r in given.values()] == [
        ("ce", "linear", None, 200),
        ("ce", "l2norm", 0.1, 200),
    ]
    own = recipes_of("cifar10", ["ce", "palm"], "cifar10-palm")
    assert [own[loss].prototype_momentum for loss in own] == [None, 0.9], "its own loss keeps its numbers"
    assert compare.loss_of(None) == ""


@pytest.mark.parametrize(("loss", "change"), [("t2fnorm", "head_tau=0.2"), ("regmixup", "regmixup=10")])
def test_a_stopped_comparison_of_other_numbers_is_its_own(loss, change, tmp_path):
    recipe = recipes_of("digits", [loss], changes=[change])[loss]
    place = tmp_path / "runs" / loss / "s0"
    place.mkdir(parents=True)
    info = {"recipe": recipes.as_dict(recipe), "benchmark": "digits", "n_classes": 6, "image_shape": [1, 8, 8]}
    (place / "run.json").write_text(json.dumps(info))
    assert compare.free_folder(tmp_path) == tmp_path
    compare.remove_runs(tmp_path)
    assert not place.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits", ["ce", "elogitnrm"]), r"unknown loss 'elogitnrm'; did you mean 'elogitnorm'\? known: "),
        (("digits", []), "losses: got none"),
        (("digits", ["ce", "CE"]), "losses: got ce, ce, expected each only once"),
        (("gtsrb", ["ce"]), "--recipe: benchmark gtsrb has none of its own; name one, such as gtsrb-l2norm-60"),
        (("digits", ["ce"], None, ["epochs=0"]), "epochs: got 0"),
    ],
)
def test_recipes_that_make_no_sense(arguments, message):
    with pytest.raises(checks.UserError, match=message):
        recipes_of(*arguments)


@pytest.mark.parametrize(("seeds", "message"), [((), "got none"), ((1, 1), "got 1, 1"), ((0, -1), "got -1")])
def test_seeds_that_make_no_sense(seeds, message, comparison_in, tmp_path):
    with pytest.raises(checks.UserError, match=f"seeds: {message}"):
        comparison_in(tmp_path, seeds=seeds)


def test_every_loss_starts_from_the_same_weights():
    models = {}
    for loss, recipe in recipes_of("digits", recipes.LOSSES).items():
        torch.manual_seed(5)
        models[loss] = model_of(recipe, 6, (1, 8, 8))
        for name, value in models["ce"].state_dict().items():
            assert torch.equal(models[loss].state_dict()[name], value), name
        assert isinstance(models[loss].fc, L2NormLinear) == (loss == "l2norm")


def test_the_criterion_of_each_name():
    made = recipes_of("digits", recipes.LOSSES)
    torch.manual_seed(0)
    model = model_of(made["ce"], 6, (1, 8, 8))
    logits, y = model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 6
    distances = [
        np.mean(
            [
                abs((row[row.argmax()] - row[j]).item())
                / (model.fc.weight[row.argmax()] - model.fc.weight[j]).norm().item()
                for j in range(6)
                if j != row.argmax()
            ]
        )
        for row in logits
    ]
    temperatures = {
        "ce": torch.ones(16),
        "l2norm": torch.ones(16),
        "logitnorm": 0.04 * logits.norm(dim=1),
        "elogitnorm": torch.tensor(distances),
    }
    assert set(temperatures) == set(recipes.LOSSES)
    for loss, temperature in temperatures.items():
        expected = nn.functional.cross_entropy(logits / temperature.unsqueeze(1), y)
        torch.testing.assert_close(criterion_of(made[loss], model)(logits, y), expected.float(), rtol=1e-4, atol=1e-4)


# ---- images in memory


def test_images_in_memory_come_in_the_batches_of_a_loader(benchmark_of):
    train = benchmark_of(0).train
    rows = [[3, 1, 2], [0, 5]]
    for (x, y), wanted in zip(batched(train, batch_sampler=rows, num_workers=2), rows, strict=True):
        assert torch.equal(x, torch.stack([train[row][0] for row in wanted]))
        assert y.tolist() == [train[row][1] for row in wanted]
    part = torch.utils.data.Subset(train, range(4, 11))
    x, y = zip(*batched(part, batch_size=3), strict=True)
    assert list(map(len, x)) == [3, 3, 1]
    assert torch.equal(torch.cat(x), torch.stack([train[row][0] for row in range(4, 11)]))
    scrambled = benchmark_of(0).validation_ood
    assert torch.equal(next(iter(batched(scrambled, batch_size=2)))[0][1], scrambled[1][0])


# ---- parts of the measuring


def test_temperatures_are_one_scaled_norm_and_distance():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[6.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    temperatures = evaluate.temperatures(logits, weight)
    distance = (5 / 5 + 4 / 3) / 2  # gaps 5 and 4, rows 5 and 3 apart
    assert temperatures["ece_softmax"].tolist() == [1, 1]
    assert temperatures["ece_scaled_by_norm"].tolist() == pytest.approx([0.04 * math.sqrt(41), 0], abs=1e-8)
    assert temperatures["ece_scaled_by_distance"].tolist() == pytest.approx([distance, 1])


def test_singular_values_and_effective_rank():
    # Variances 9, 4 and 0 along three orthogonal directions, and a mean that must not count.
    directions = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    features = signs @ torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)) @ directions[:2] + 100
    values = diagnostics.singular_values(features)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 0, 0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert diagnostics.effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert diagnostics.effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert diagnostics.effective_rank(torch.zeros(4)) == 0


# ---- the comparison


def test_every_number_is_there_and_finite(results):
    found = numbers(results)
    assert all(math.isfinite(value) for value in found.values())
    assert list(results.methods) == ["ce", "elogitnorm"]
    assert results.baseline == "ce"
    for loss in results.methods:
        assert [run.trained.seed for run in results.methods[loss]] == list(SEEDS)
        for seed in SEEDS:
            for metric in ("accuracy", *evaluation.results.ECE):
                assert 0 <= found[loss, seed, metric, "", ""] <= 1
            for ood_set in ("near", "photographs", "noise", "nearood", "farood"):
                for metric in evaluate.DETECTION:
                    assert 0 <= found[loss, seed, metric, "NCI", ood_set] <= 1
    for run in results.runs:
        assert run.settings["NCI"]["alpha"] in detectors.NCI.grid["alpha"]
        assert [trial["alpha"] for trial in run.trials["NCI"]] == [1e-4, 1e-2]


def test_the_same_settings_give_the_same_numbers_and_a_part_gives_its_part(results, comparison_in, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before != 2 else 3)
    try:
        part = comparison_in(tmp_path, ("elogitnorm",), (3,)).run()
        assert torch.get_num_threads() == (2 if before != 2 else 3)
    finally:
        torch.set_num_threads(before)
    expected = {key: value for key, value in numbers(results).items() if key[:2] == ("elogitnorm", 3)}
    assert numbers(part) == expected


class Stop(Exception):
    pass


class Killed(compare.ComparisonWatcher):
    def on_epoch(self, run, row):
        if (run.recipe.loss, run.epoch) == ("elogitnorm", 1):
            raise Stop


class Counted(compare.ComparisonWatcher):
    def __init__(self):
        self.trained, self.taken, self.results = [], [], 0

    def on_run(self, loss, seed, run):
        (self.taken if run is None else self.trained).append((loss, seed))

    def on_result(self, result):
        self.results += 1


def test_killed_and_continued_and_extended(results, comparison_in, tmp_path):
    with pytest.raises(Stop):
        comparison_in(tmp_path, seeds=(3,), told=Killed(), training={"epoch_seconds": 0}).run()
    again = Counted()
    found = comparison_in(tmp_path, seeds=(3,), told=again).run()
    assert (again.taken, again.trained) == ([("ce", 3)], [("elogitnorm", 3)])
    assert numbers(found) == {key: value for key, value in numbers(results).items() if key[1] == 3}
    more = Counted()
    extended = comparison_in(tmp_path, ("l2norm",), (0, 3), told=more).run()
    assert (more.trained, more.taken, more.results) == (
        [("l2norm", 0), ("l2norm", 3)],
        [("ce", 3), ("elogitnorm", 3)],
        4,
    )
    assert list(extended.methods) == ["l2norm", "ce", "elogitnorm"]
    with pytest.raises(checks.UserError, match=r"ce/s3 holds a run with other settings \(epochs: 2 there, 1 here\)"):
        comparison_in(tmp_path, ("l2norm",), epochs=1).run()
    with pytest.raises(checks.UserError, match=r"ce/s3 holds a run with other settings \(epochs: 2 there, 1 here\)"):
        comparison_in(tmp_path, ("ce",), epochs=1).run()


def test_short_epochs_are_saved_by_time_and_the_best_of_them_is_kept(results, folder, comparison_in, tmp_path):
    comparison_in(tmp_path, ("ce",), (0,), training={"epoch_seconds": 0}).run()
    for name in ("best.ckpt", "final.ckpt"):
        one, other = (torch.load(f / "runs/ce/s0" / name, weights_only=True) for f in (tmp_path, folder))
        for key, value in one.items():
            assert torch.equal(value, other[key])
    tables = [(f / "runs/ce/s0/log.csv").read_text().splitlines() for f in (tmp_path, folder)]
    assert [[line.split(",")[:5] for line in table] for table in tables] == [
        [line.split(",")[:5] for line in tables[0]]
    ] * 2


def test_runs_that_are_trained_are_taken(results, folder, benchmark_of, tmp_path):
    paths = [folder / "runs" / loss for loss in ("ce", "elogitnorm")]
    runs = compare.open_runs(paths, benchmark_of)
    assert [(run.method, run.seed) for run in runs] == [("ce", 0), ("ce", 3), ("elogitnorm", 0), ("elogitnorm", 3)]
    found = evaluation.evaluate_runs(runs, lambda run: benchmark_of(run.seed), ["MSP", "NCI"], **MEASURING)
    assert numbers(found) == numbers(results)


def test_checkpoints_of_one_model_are_taken_apart(folder, results, benchmark_of):
    files = [folder / "runs" / loss / "s0/final.ckpt" for loss in ("ce", "elogitnorm")]
    net = compare.open_runs([folder / "runs/ce/s0"], benchmark_of)[0].model
    runs = compare.open_runs(files, benchmark_of, net)
    for file, run in zip(files, runs, strict=True):
        held = torch.load(file, weights_only=True)
        assert all(torch.equal(value, held[name]) for name, value in run.model.state_dict().items())


def test_runs_of_other_data_or_classes_are_refused(results, folder, benchmark_of, tmp_path):
    here = folder / "runs" / "ce" / "s0"
    other = tmp_path / "other"
    other.mkdir()
    info = json.loads((here / "run.json").read_text())
    for what, value in (("class_names", list("abcdef")), ("training_content", "7"), ("benchmark", "cifar10")):
        (other / "run.json").write_text(json.dumps(info | {what: value}))
        with pytest.raises(checks.UserError, match=f"not to be compared, their {what.replace('_', ' ')} differ"):
            compare.open_runs([here, other], lambda seed: benchmark_of(0))
        with pytest.raises(checks.UserError, match="not to be compared"):
            compare.open_runs([here / "final.ckpt", here, other], lambda seed: benchmark_of(0), "small_cnn")


def test_a_comparison_is_not_extended_by_runs_of_other_images(folder, results, comparison_in, tmp_path):
    here = tmp_path / "runs/ce/s3"
    here.mkdir(parents=True)
    info = json.loads((folder / "runs/ce/s3/run.json").read_text())
    for what in ("training_images", "validation_content"):
        (here / "run.json").write_text(json.dumps(info | {what: 7}))
        with pytest.raises(checks.UserError, match=rf"ce/s3 holds a run with other settings \({what}: 7 there, "):
            comparison_in(tmp_path, ("elogitnorm",), (0,)).run()


def test_outliers_belong_to_the_losses_that_take_them(folder, results, comparison_in, benchmark_of):
    """`--losses ce` is extended by `--losses ce,oe --outliers DIR`."""
    run = Run(comparison_in(folder).recipes["ce"], benchmark_of(0), folder / "runs/ce/s0", 0)
    described = describe(run, "new") | {"outlier_images": 5}
    assert run.folder.finished(described)
    described["recipe"]["outliers"] = "oe"
    with pytest.raises(checks.UserError, match="outlier_images: null there, 5 here"):
        run.folder.claim(described, resume=True)


def test_a_parameter_that_so_few_images_do_not_allow_is_refused_before_a_run_is_trained(comparison_in, tmp_path):
    def made(chosen, **measuring) -> Comparison:
        return comparison_in(tmp_path, chosen=chosen, measuring={"tune": False, **measuring})

    searched = {"tune": True, "grids": {"KNN": {"k": (700, 900)}}}
    for comparison, told in (
        (made({"MSP": detectors.MSP(), "KNN": detectors.KNN(k=651)}), "k: got 651, expected at most 650"),
        (made({"ViM": detectors.ViM(dim=64)}), "dim: got 64, expected less than 64, the number of features"),
        (made({"KNN": detectors.KNN()}, **searched), "k: got 700, expected at most 650"),
    ):
        with pytest.raises(checks.UserError, match=told):
            comparison.run()
    assert not list(tmp_path.iterdir())
    before = torch.random.get_rng_state()
    made({"KNN": detectors.KNN(k=650)}).check()
    made({"KNN": detectors.KNN(k=651)}, leave_out=True).check()
    made(["KNN"], tune=True, grids={"KNN": {"k": (10, 700)}}).check()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_to_start_from(folder, results, comparison_in, tmp_path):
    start = folder / "runs/ce/s0/final.ckpt"
    made = {name: replace(recipe, init=str(start)) for name, recipe in recipes_of("digits", ["ce"]).items()}
    short = replace(comparison_in(tmp_path, ("ce",), (0,)), recipes={"ce": replace(made["ce"], epochs=1)})
    first = []

    class Look(compare.ComparisonWatcher):
        def on_start(self, run):
            first.append({name: value.clone() for name, value in run.model.state_dict().items()})

    replace(short, told=Look()).run()
    assert all(torch.equal(value, first[0][name]) for name, value in torch.load(start, weights_only=True).items())
    assert len(json.loads((tmp_path / "runs/ce/s0/run.json").read_text())["init_weights"]) == 16
    taken = compare.open_runs([tmp_path / "runs/ce", folder / "runs/ce"], short.benchmark_of)
    assert [Path(run.checkpoint).name for run in taken] == ["final.ckpt", "best.ckpt", "best.ckpt"]
    other = tmp_path / "other.ckpt"
    other.write_bytes((folder / "runs/ce/s3/final.ckpt").read_bytes())
    more = {"l2norm": replace(recipes_of("digits", ["l2norm"])["l2norm"], init=str(other), epochs=1)}
    with pytest.raises(checks.UserError, match=r"ce/s0 holds a run with other settings \(init_weights: "):
        replace(short, recipes=more).check()
    other.write_bytes(start.read_bytes())
    replace(short, recipes=more).check()  # the same weights elsewhere
    with pytest.raises(checks.UserError, match="init, pretrained: expected one of them"):
        replace(made["ce"], pretrained=True)


# ---- pairs


def hand_made(values: dict[str, list[float]], draws: dict[str, list[float]] | None = None) -> Results:
    """AUROC of MSP on "near" for each method and seed."""
    runs = []
    for method, of_method in values.items():
        for seed, value in enumerate(of_method):
            recipe = recipes_of("digits", [method])[method]
            run = RunResult(Trained(method, None, method, Path(), "", None, recipe, seed), "", {})
            run.sets = {
                "id": evaluation.results.TestSet("id", "id", 9),
                "near": evaluation.results.TestSet("other digits", "near", 9),
            }
            run.measurements = [Measurement("auroc", value, "MSP", "near", "near")]
            if draws is not None:
                run.draws["auroc", "MSP", "near"] = torch.tensor(draws[method], dtype=torch.float64)
            runs.append(run)
    return Results("digits", runs, 0, False)


def test_summaries_pair_the_seeds():
    ce, other = hand_made({"ce": [0.5, 0.6, 0.7], "elogitnorm": [0.6, 0.8, 1.0]}).summaries()
    assert (ce.mean, ce.std, ce.n_runs) == pytest.approx((0.6, 0.1, 3))
    assert (ce.gain, ce.gain_low, ce.gain_high) == (None, None, None)
    assert other.gain == pytest.approx(0.2)
    half_width = 4.302652729911275 * 0.1 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) from a table
    assert (other.gain_low, other.gain_high) == pytest.approx((0.2 - half_width, 0.2 + half_width))


def test_pairs_are_of_the_seeds_that_both_have():
    results = hand_made({"ce": [0.5, 0.6, 0.7], "elogitnorm": [0.6, 0.8]})
    results.runs.reverse()
    summary = next(s for s in results.summaries() if s.method == "elogitnorm")
    assert summary.gain == pytest.approx(0.15)


def test_one_seed_has_an_interval_over_the_test_images_or_none():
    *_, other = hand_made({"ce": [0.5], "l2norm": [0.6]}).summaries()
    assert (other.gain, other.gain_low, other.gain_high) == (pytest.approx(0.1), None, None)
    draws = {"ce": [0.4, 0.5, 0.6], "l2norm": [0.5, 0.61, 0.72]}
    *_, other = hand_made({"ce": [0.5], "l2norm": [0.6]}, draws).summaries()
    assert 0.1 <= other.gain_low < 0.105 < 0.115 < other.gain_high <= 0.12


def test_without_the_baseline_there_are_no_differences():
    results = hand_made({"elogitnorm": [0.5], "l2norm": [0.6]})
    assert results.baseline is None
    assert [s.gain for s in results.summaries()] == [None, None]
    assert hand_made({"ce": [0.5]}).baseline is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    covered = [low <= 3.0 <= high for low, high in (mean_interval(list(values)) for values in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


# ---- the folder


def test_free_folder_tries_and_leaves_nothing(tmp_path):
    assert compare.free_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    assert compare.free_folder(tmp_path) == tmp_path  # an empty folder will do


def test_free_folder_takes_an_earlier_comparison_also_an_unfinished_one(results, folder, tmp_path):
    assert compare.free_folder(folder) == folder, "runs alone: interrupted before anything was written"
    evaluation.write(tmp_path, results, {})
    (tmp_path / "notes.txt").write_text("mine")
    assert compare.free_folder(tmp_path) == tmp_path


def test_free_folder_refuses_the_runs_of_train(results, folder, tmp_path):
    """RECIPE/sSEED, not LOSS/sSEED: `--overwrite` would remove them."""
    (tmp_path / "runs/digits-ce/s0").mkdir(parents=True)
    shutil.copy(folder / "runs/ce/s0/run.json", tmp_path / "runs/digits-ce/s0")
    with pytest.raises(checks.UserError, match=r"holds no earlier comparison \(found runs\)"):
        compare.free_folder(tmp_path)
    compare.remove_runs(tmp_path)
    assert (tmp_path / "runs/digits-ce/s0/run.json").is_file()
    (tmp_path / "named/runs/ce/s0").mkdir(parents=True)
    info = json.loads((folder / "runs/ce/s0/run.json").read_text())
    (tmp_path / "named/runs/ce/s0/run.json").write_text(json.dumps({**info, "command": "ood-fast train --recipe ce"}))
    with pytest.raises(checks.UserError, match="holds no earlier comparison"):
        compare.free_folder(tmp_path / "named")
    compare.remove_runs(tmp_path / "named")
    assert (tmp_path / "named/runs/ce/s0/run.json").is_file(), "a recipe that is called as a loss is"
    (tmp_path / "stopped/runs/ce/s0").mkdir(parents=True)
    assert compare.free_folder(tmp_path / "stopped"), "before anything was written"
    compare.remove_runs(tmp_path / "stopped")
    assert not (tmp_path / "stopped/runs/ce/s0").exists()


def test_free_folder_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(checks.UserError, match=r"is not empty and holds no earlier comparison \(found thesis\.tex\)"):
        compare.free_folder(tmp_path)
    with pytest.raises(checks.UserError, match=r"thesis\.tex is a file"):
        compare.free_folder(tmp_path / "thesis.tex" / "results")
    # Someone else's file by one of our names does not make a folder ours.
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, text in (
        ("results.csv", "a,b"),
        ("results.json", '{"format": "something else"}'),
        ("results.json", "[1]"),
    ):
        (theirs / name).write_text(text)
        with pytest.raises(checks.UserError, match="which no evaluation wrote"):
            compare.free_folder(theirs)


def test_free_folder_finds_a_file_system_that_cannot_be_written():
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, which nobody can write to, not even root")
    with pytest.raises(checks.UserError, match="--out: cannot write to /proc/results"):
        compare.free_folder("/proc/results")
