"""From files in CIFAR's formats to tables, through the real command line: one process, and two under torchrun."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import test_data
import torch
from processes import COMMAND, forked

from ood_fast import train

RECIPE = "cifar10-elogitnorm"
SETTINGS = ["--set=model=small_cnn", "--set=epochs=4", "--set=lr=0.05"]
BATCH = 16  # of all processes together
OOD = {"cifar100": "near", "tin": "near", "mnist": "far", "svhn": "far", "texture": "far", "places365": "far"}
DETECTORS = ["MSP", "KNN", "NCI", "FDBD"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """CIFAR-10 whose classes can be learnt: ten patterns under noise. The OOD sets are noise, textures and colours."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (10, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)

    def batch(n: int) -> dict:
        labels = [row % 10 for row in range(n)]
        pixels = patterns[labels] + random.normal(0, 40, (n, 32, 32, 3))
        return {"data": test_data.planes(pixels.clip(0, 255).astype(np.uint8)), "labels": labels}

    test_data.write_cifar10(folder)  # then its images in place of noise
    for number in range(1, 6):
        test_data.dump_python2(batch(80), folder / f"cifar-10-batches-py/data_batch_{number}")
    test_data.dump_python2(batch(200), folder / "cifar-10-batches-py/test_batch")
    test_data.write_cifar100(folder)
    test_data.write_mnist(folder)
    test_data.write_svhn(folder)
    test_data.write_dtd(folder)
    test_data.write_places(folder)
    test_data.write_tiny_imagenet(folder)
    return folder


def command(*arguments: str | Path, folder: Path, n_processes: int = 1) -> str:
    """`ood-fast` with these arguments in `folder`; what it printed."""
    finished = forked(*COMMAND, *arguments, processes=n_processes, folder=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(results: Path) -> dict[tuple[str, ...], float]:
    keys = ("seed", "metric", "detector", "ood_set")
    return {tuple(row[key] for key in keys): float(row["value"]) for row in rows(results / "results.csv")}


def evaluate(root: Path, folder: Path, *more: str, n_processes: int = 1) -> str:
    detectors = f"--detectors={','.join(DETECTORS)}"
    options = [f"--data-root={root}", detectors, "--set=KNN.k=20", "--bootstrap=20", "--workers=0", "--device=cpu"]
    return command("evaluate", f"runs/{RECIPE}", *options, *more, folder=folder, n_processes=n_processes)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_train_evaluate_report(n_processes, root, tmp_path):
    if n_processes > 1 and not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    seeds = (0, 1) if n_processes == 1 else (0,)
    batch = f"--set=batch_size={BATCH // n_processes}"
    for seed in seeds:
        told = command(
            *("train", f"--recipe={RECIPE}", *SETTINGS, batch, f"--seed={seed}"),
            *(f"--data-root={root}", "--workers=0", "--device=cpu", "--diagnostics"),
            folder=tmp_path,
            n_processes=n_processes,
        )
        assert told.count("Trained 4 epochs") == 1
    runs = tmp_path / "runs" / RECIPE
    for seed in seeds:
        _, recipe, info = train.load_run(runs / f"s{seed}")
        assert (info["status"], info["processes"], recipe.batch_size) == ("complete", n_processes, BATCH // n_processes)
        assert [int(row["epoch"]) for row in rows(runs / f"s{seed}" / "diagnostics.csv")] == [1, 2, 3, 4]

    told = evaluate(root, tmp_path, n_processes=n_processes)
    results = runs / "eval" / "cifar10"
    assert told.count("Evaluated in ") == 1
    found = numbers(results)
    for seed in map(str, seeds):
        assert found[seed, "accuracy", "", ""] > 0.9  # of ten classes
        for detector in DETECTORS:
            for metric in ("auroc", "fpr95_ood_positive", "fpr95_id_positive", "aupr_in", "aupr_out"):
                for ood_set in (*OOD, "nearood", "farood"):
                    assert 0 <= found[seed, metric, detector, ood_set] <= 1
        for group in ("near", "far"):
            members = [found[seed, "auroc", "KNN", name] for name, of in OOD.items() if of == group]
            assert found[seed, "auroc", "KNN", f"{group}ood"] == pytest.approx(np.mean(members))
        assert found[seed, "auroc", "KNN", "cifar100"] > 0.9  # noise
    table = rows(results / "openood" / "knn.csv")
    assert " ".join(row[""] for row in table) == "cifar100 tin nearood mnist svhn texture places365 farood"
    over_seeds = [100 * found[seed, "auroc", "KNN", "farood"] for seed in map(str, seeds)]
    assert table[-1]["AUROC"] == f"{np.mean(over_seeds):.2f} ± {np.std(over_seeds):.2f}"
    assert json.loads((results / "results.json").read_text())["benchmark"] == "cifar10"

    command("report", f"runs/{RECIPE}", folder=tmp_path)
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    for row in rows(results / "summary.csv"):
        if (row["metric"], row["ood_set"]) == ("auroc", "farood"):
            assert f"{100 * float(row['mean']):.2f}" in page

    if n_processes == 1:  # two with nothing kept: the same, but for the order of scores as close as float32 rounds
        evaluate(root, tmp_path, "--cache=anew", "--out=again", n_processes=2)
        again = numbers(tmp_path / "again")
        assert again.keys() == found.keys()
        for key in found:
            if key[1] in ("accuracy", "auroc"):
                assert again[key] == pytest.approx(found[key], abs=0.01), key
