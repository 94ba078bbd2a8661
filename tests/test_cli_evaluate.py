"""`ood-fast evaluate` as a user runs it: on runs, checkpoints, own folders and stored features; on two processes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import COMMAND, forked
from test_data import (
    write_cifar10,
    write_cifar100,
    write_dtd,
    write_image,
    write_mnist,
    write_openood,
    write_places,
    write_svhn,
    write_tiny_imagenet,
)

from ood_fast import cli, evaluation, models
from ood_fast.compare import one_thread

QUICK = ["--workers=0", "--bootstrap=10"]
SOME = ["--detectors=MSP,KNN,NCI,ReAct", "--set=KNN.k=5"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All sets of the benchmark cifar10, in torchvision's layout."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar10(folder, n_train=70, n_test=60)
    for write in (write_cifar100, write_mnist, write_svhn, write_dtd, write_places, write_tiny_imagenet):
        write(folder)
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


@pytest.fixture
def seeds(tmp_path) -> Path:
    """OpenOOD's folder of a method: s0/best.ckpt, s1/best.ckpt, s10/best.ckpt."""
    for seed in (0, 1, 10):
        write_checkpoint(tmp_path / f"net/s{seed}/best.ckpt", seed)
    return tmp_path / "net"


def write_checkpoint(path: Path, seed: int, n_classes: int = 10) -> None:
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(models.create("small_cnn", n_classes, in_channels=3).state_dict(), path)


def evaluate(*arguments: str | Path) -> int:
    return cli.main(["evaluate", *map(str, arguments), *QUICK])


def on_cifar10(root: Path, *more: str) -> list[str]:
    return ["--benchmark=cifar10", f"--data-root={root}", "--model=small_cnn", "--any-accuracy", *(more or SOME)]


def read_csv(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measured(folder: str | Path) -> dict[tuple, float]:
    keys = ("run", "metric", "detector", "ood_set")
    return {tuple(row[key] for key in keys): float(row["value"]) for row in read_csv(Path(folder) / "results.csv")}


# ---- runs and checkpoints


def test_openoods_folder_of_seeds(root, seeds, capsys):
    assert evaluate(seeds, *on_cifar10(root)) == 0
    output = capsys.readouterr()
    for text in ("AUROC (%)", "near-OOD", "Mean ± sample standard deviation over 3 seeds", "far-OOD", "ID positive"):
        assert text in output.out
    assert "Results: net/eval/cifar10/" in output.out.replace(str(seeds.parent) + "/", "")
    out = seeds / "eval/cifar10"
    held = evaluation.read(out)
    assert [run["seed"] for run in held["runs"]] == [0, 1, 10]
    assert {run["method"] for run in held["runs"]} == {"net"}
    assert held["command"].startswith("ood-fast evaluate")
    with open(out / "openood/knn.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == [
        *("", "cifar100", "tin", "nearood", "mnist", "svhn", "texture", "places365", "farood")
    ]
    found = measured(out)
    values = [100 * found[str(seeds / f"s{seed}"), "auroc", "KNN", "svhn"] for seed in (0, 1, 10)]
    assert rows[5][2] == f"{np.mean(values):.2f} ± {np.std(values):.2f}"
    assert all(run["detectors"]["KNN"]["k"] == 5 for run in held["runs"]), "what is set is not searched"
    assert all(len(run["trials"]["NCI"]) == 4 for run in held["runs"])


def test_a_second_evaluation_runs_no_model(root, seeds, capsys, monkeypatch):
    assert evaluate(seeds / "s0", *on_cifar10(root)) == 0
    before = measured(seeds / "s0/eval/cifar10")
    capsys.readouterr()

    def no_pass(self, x):
        raise AssertionError("the model ran")

    monkeypatch.setattr(models.SmallCNN, "forward", no_pass)
    assert evaluate(seeds / "s0", *on_cifar10(root)) == 0
    assert "scoring svhn" in capsys.readouterr().err
    assert measured(seeds / "s0/eval/cifar10") == before


def test_train_then_evaluate_and_nothing_more_to_say(root, tmp_path, capsys):
    """The run knows benchmark, data, model and recipe."""
    settings = ["model=small_cnn", "small_images=false", "epochs=1", "batch_size=16"]
    train = ["train", "--recipe=cifar10-elogitnorm", f"--data-root={root}", "--out=run", "--workers=0", "--quiet"]
    assert cli.main([*train, *(f"--set={setting}" for setting in settings)]) == 0
    assert evaluate("run", "--ood=svhn,tin", "--ood-folder=mine=own", "--detectors=MSP") == 2  # no such folder
    write_image(tmp_path / "own/a.png")
    assert evaluate("run", "--ood=svhn,tin", "--ood-folder=mine=own", "--synthetic", "--detectors=MSP") == 0
    held = evaluation.read("run/eval/cifar10")
    assert "not complete" not in capsys.readouterr().out
    info = json.loads(Path("run/run.json").read_text())
    stopped = {**info, "status": "stopped", "recipe": {**info["recipe"], "epochs": 300}}
    Path("run/run.json").write_text(json.dumps(stopped))
    assert evaluate("run", "--ood=svhn", "--detectors=MSP", "--out=stopped") == 0
    assert "run: the training is not complete: 1 of 300 epochs" in capsys.readouterr().out
    assert {name: part["group"] for name, part in held["sets"].items()} == {
        "id": "id",
        "tin": "near",
        "svhn": "far",
        "mine": "far",
        "noise": "synthetic",
        "scrambled": "synthetic",
    }
    assert held["runs"][0]["method"].startswith("cifar10-elogitnorm ")
    assert held["runs"][0]["recipe"]["epochs"] == 1
    assert all(row["published"] is None for row in held["summary"]), "not the recipe that is published"


def test_several_methods_are_compared_in_one_folder(root, seeds, tmp_path, capsys):
    """What is called by another folder is another method; a folder elsewhere with the same name is refused."""
    write_checkpoint(tmp_path / "other/best.ckpt", 7)
    write_checkpoint(tmp_path / "else/net/s3/best.ckpt", 8)
    several = [seeds / "s0", seeds / "s10", tmp_path / "other"]
    assert evaluate(*several, *on_cifar10(root, "--detectors=MSP"), "--out=both") == 0
    assert {row["method"]: row["n_runs"] for row in read_csv("both/summary.csv")} == {"net": "2", "other": "1"}
    assert sorted(entry.name for entry in Path("both/openood").iterdir()) == ["net", "other"]
    several.append(tmp_path / "else/net/s3")
    assert evaluate(*several, *on_cifar10(root, "--detectors=MSP"), "--out=all") == 2
    assert "both are called net, but are no seeds of each other" in capsys.readouterr().err


def test_own_folders(tmp_path, capsys):
    """train/<class>, test/<class>, near/<name>, ood/<name>; no val: a tenth of the training images."""
    for index in range(40):
        write_image(tmp_path / f"photos/train/{'abc'[index % 3]}/{index}.png", (20, 16), index)
    for index in range(12):
        write_image(tmp_path / f"photos/test/{'abc'[index % 3]}/{index}.png", (20, 16), 100 + index)
        write_image(tmp_path / f"photos/near/fog/{index}.png", (16, 16), 200 + index)
        write_image(tmp_path / f"photos/ood/text/{index}.png", (16, 20), 300 + index)
    for index in range(6):
        write_image(tmp_path / f"photos/csid/dusk/{'abc'[index % 3]}/{index}.png", (20, 16), 400 + index)
    write_checkpoint(tmp_path / "net.pt", 0, n_classes=3)
    arguments = ["--benchmark=folder", "--data-root=photos", "--image-size=16", "--model=small_cnn"]
    assert evaluate("net.pt", *arguments, *SOME, "--out=out") == 0
    held = evaluation.read("out")
    assert {name: (part["group"], part["n_images"]) for name, part in held["sets"].items()} == {
        "id": ("id", 12),
        "dusk": ("csid", 6),
        "fog": ("near", 12),
        "text": ("far", 12),
    }
    assert {row["ood_set"] for row in held["summary"]} == {"", "dusk", "fog", "text", "nearood", "farood"}
    again, full = evaluation.Results.from_json(held), read_csv("out/openood/fsood/msp.csv")
    assert again.csid == ["dusk"]
    values = {
        (found.metric, found.ood_set): found.value for found in again.runs[0].measurements if found.detector == "MSP"
    }
    assert full[-1]["AUROC"] == f"{100 * values['fsood_auroc', 'farood']:.2f} ± 0.00"
    assert full[0]["ACC"] == f"{100 * again.runs[0].value('fsood_accuracy'):.2f} ± 0.00"
    assert "Full-spectrum" in Path("out/results.md").read_text()
    arguments.append("--csid-folder=dusk=photos/csid/dusk")
    assert evaluate("net.pt", *arguments, "--ood-folder=dusk=photos/csid/dusk", *SOME, "--out=out2") == 2
    assert "csid: 'dusk' is an OOD set already" in capsys.readouterr().err
    arguments.pop()
    (tmp_path / "photos/ood/text/5.png").write_bytes(b"no image")
    assert evaluate("net.pt", *arguments, *SOME, "--out=out") == 2
    assert "photos/ood/text/5.png: cannot be read" in capsys.readouterr().err
    assert evaluation.read("out") == held, "the earlier results stay"


def test_results_of_another_request_stay(root, seeds, capsys, monkeypatch):
    """A quick look with one detector must not cost the evaluation of all; the same request again is no loss."""
    from ood_fast import evaluation as package

    def no_evaluation(*given, **named):
        raise AssertionError("an evaluation ran")

    first = [seeds / "s0", *on_cifar10(root), "--ood=svhn,tin", "--quiet"]
    assert evaluate(*first) == 0
    out = seeds / "s0/eval/cifar10"
    before = (out / "results.json").read_bytes()
    other = [seeds / "s0", *on_cifar10(root, "--detectors=KNN,ASH", "--set=knn.k=10"), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(package, "evaluate_runs", no_evaluation)
        assert evaluate(*other) == 2
    told = capsys.readouterr().err
    differences = "only there: MSP, NCI, ReAct and 1 more; only here: ASH; set otherwise: KNN"
    assert f"{out} holds results of another request ({differences})" in told
    assert "--out DIR" in told
    assert "--overwrite" in told
    assert (out / "results.json").read_bytes() == before
    assert evaluate(*first, "--bootstrap=0", "--seed=3") == 0, "the same detectors and settings"
    assert evaluate(*other, "--out=elsewhere") == 0
    assert evaluate(seeds / "s1", *other[1:], "--out=elsewhere") == 2, "of another run"
    assert "elsewhere holds results of another request (set otherwise: RUN)" in capsys.readouterr().err
    assert len(evaluation.read(out)["runs"][0]["detectors"]) == 4
    assert evaluate(*other, "--overwrite") == 0
    assert set(evaluation.read(out)["runs"][0]["detectors"]) == {"KNN", "ASH"}
    for text in ("--no-tune", "--synthetic", "--checkpoint=final", "--skip-bad"):
        assert evaluate(*other, text) == 2, text
    assert evaluate(*other, "--set=KNN.k=11") == 2
    held = evaluation.read(out)
    (out / "results.json").write_text(json.dumps({name: value for name, value in held.items() if name != "request"}))
    capsys.readouterr()
    assert evaluate(*other) == 2
    assert "another request (which it does not tell)" in capsys.readouterr().err


def test_images_that_cannot_be_read_may_be_left_out(root, tmp_path, capsys):
    for index in range(5):
        write_image(tmp_path / f"own/{index}.png", seed=index)
    (tmp_path / "own/3.png").write_bytes(b"no image")
    write_checkpoint(tmp_path / "net/best.ckpt", 0)
    arguments = ["net", *on_cifar10(root, "--detectors=MSP,KNN", "--ood=svhn"), "--ood-folder=mine=own", "--synthetic"]
    assert evaluate(*arguments) == 2
    assert "own/3.png: cannot be read" in capsys.readouterr().err
    assert evaluate(*arguments, "--skip-bad") == 0
    note = "mine: left out 1 of 5 images: image own/3.png: cannot be read"
    assert f"net: {note}" in capsys.readouterr().out
    (held,) = evaluation.read("net/eval/cifar10")["runs"]
    assert held["notes"][0].startswith(note)
    assert evaluation.read("net/eval/cifar10")["sets"]["mine"]["n_images"] == 4
    with_bad, n_folders = held["outputs"], len(list(tmp_path.glob("net/cache/*/mine-*")))
    write_image(tmp_path / "own/3.png", seed=3)
    assert evaluate(*arguments, "--out=whole") == 0
    (whole,) = evaluation.read("whole")["runs"]
    assert whole["outputs"].pop("mine") != with_bad.pop("mine"), "nothing is taken for the other"
    assert whole["outputs"] == with_bad, "sets that lack none are the same"
    assert len(list(tmp_path.glob("net/cache/*/mine-*"))) == n_folders + 1
    scores = [
        evaluation.read_scores(out, run)["MSP"]["mine"] for out, run in (("net/eval/cifar10", held), ("whole", whole))
    ]
    np.testing.assert_allclose(np.delete(scores[1], 3), scores[0], rtol=1e-6)
    for file in (tmp_path / "own").iterdir():
        file.write_bytes(b"no image")
    assert evaluate(*arguments, "--skip-bad") == 2
    assert "mine: none of its 5 images can be read; the first: image own/0.png" in capsys.readouterr().err


def test_quiet_prints_nothing(root, seeds, capsys):
    assert evaluate(seeds / "s0", *on_cifar10(root), "--quiet") == 0
    output = capsys.readouterr()
    assert output.out + output.err == ""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(root, seeds, tmp_path):
    """ODIN too, which each process chooses by itself."""
    arguments = [*on_cifar10(root, "--detectors=MSP,KNN,ReAct,ODIN", "--set=KNN.k=5"), *QUICK, "--quiet"]
    command = ["evaluate", str(seeds / "s0"), *arguments]
    assert cli.main([*command, "--cache=one cache", "--out=one"]) == 0
    done = forked(*COMMAND, *command, "--cache=two cache", "--out=two", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    one, two = evaluation.read("one"), evaluation.read("two")
    (one, scores), (two, other_scores) = (
        (held["runs"][0], evaluation.read_scores(name, held["runs"][0])) for name, held in (("one", one), ("two", two))
    )
    for key in ("model", "detectors", "notes"):
        assert one[key] == two[key], key
    for detector, sets in scores.items():  # to rounding: the images come in other batches
        for name, values in sets.items():
            np.testing.assert_allclose(other_scores[detector][name], values, rtol=1e-4, atol=1e-5, err_msg=detector)
    for name, path in one["outputs"].items():
        here, there = evaluation.read_outputs(path), evaluation.read_outputs(two["outputs"][name])
        torch.testing.assert_close(there.features, here.features)
        torch.testing.assert_close(there.logits, here.logits)
        assert torch.equal(there.targets, here.targets)
    # an image that one of the processes cannot read ends both, with its name
    data = tmp_path / "broken"
    data.mkdir()
    for entry in root.iterdir():
        (data / entry.name).symlink_to(entry)
    (data / "dtd").unlink()
    write_dtd(data)
    next(data.glob("dtd/dtd/images/woven/*_2.jpg")).write_bytes(b"no image")
    done = forked(*COMMAND, *command, f"--data-root={data}", "--cache=c", "--out=three", processes=2)
    assert done.returncode != 0
    assert "woven_2.jpg: cannot be read" in done.stderr
    assert not Path("three/results.json").exists()


# ---- stored features


def from_cache(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What the evaluation of a run kept: set -> features, logits, targets; and the head with "fit"."""
    (held,) = evaluation.read(folder)["runs"]
    sets = {name: evaluation.read_outputs(path) for name, path in held["outputs"].items()}
    found = {
        name: {"features": part.features, "logits": part.logits, "targets": part.targets} for name, part in sets.items()
    }
    weight, bias = evaluation.read_head(held["outputs"]["fit"])
    found["fit"] |= {"W": weight, "b": bias}
    return found


def write_features(path: Path, held: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in held.items()})
    elif path.suffix == ".pt":
        torch.save({name: value.clone() for name, value in held.items()}, path)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {name: held[name].tolist() for name in ("features", "logits")}
        table = arrow.table({**columns, "target": held["targets"].numpy()})
        parquet.write_table(table, path)


def feature_arguments(suffix: str = ".npz", folder: str = "f") -> list[str]:
    ood = {"near/cifar100": "cifar100", "near/tin": "tin", "mnist": "mnist", "far/svhn": "svhn"}
    arguments = [f"--features={folder}/fit{suffix}", f"--test={folder}/test{suffix}"]
    arguments += [f"--ood-features={name}={folder}/{file}{suffix}" for name, file in ood.items()]
    return [*arguments, f"--validation={folder}/validation{suffix}"]


@pytest.fixture
def stored(root, seeds, tmp_path) -> dict[str, dict[str, torch.Tensor]]:
    """Feature files in f/ of what the evaluation of a run kept, which is in `images`."""
    assert (
        evaluate(seeds / "s0", *on_cifar10(root, *SOME), "--ood=cifar100,tin,mnist,svhn", "--out=images", "--quiet")
        == 0
    )
    held = from_cache(tmp_path / "images")
    for name, values in held.items():
        write_features(tmp_path / f"f/{name}.npz", values)
    return held


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".parquet"])
def test_stored_features_give_the_numbers_of_the_images(stored, tmp_path, suffix, capsys):
    for name, values in stored.items():
        write_features(tmp_path / f"g/{name}{suffix}", values)
    write_features(tmp_path / "g/head.npz", {"features": torch.zeros(0, 1), **stored["fit"]})
    head = ["--head-file=g/head.npz"] if suffix == ".parquet" else []
    tuning = f"--ood-validation=g/validation_ood{suffix}"
    assert evaluate(*feature_arguments(suffix, "g"), *head, tuning, *SOME) == 0
    out = tmp_path / "g/eval"
    of_images, of_features = evaluation.read("images"), evaluation.read(out)
    assert of_features["runs"][0]["detectors"].keys() == of_images["runs"][0]["detectors"].keys()
    for name, trials in of_images["runs"][0]["trials"].items():
        for one, other in zip(trials, of_features["runs"][0]["trials"][name], strict=True):
            assert one == pytest.approx(other, abs=1e-9)

    def found(held: dict) -> dict:
        keys = ("metric", "detector", "ood_set", "group")
        return {tuple(row[key] for key in keys): (row["mean"], row["low"], row["high"]) for row in held["summary"]}

    expected = found(of_images)
    assert found(of_features).keys() == expected.keys()
    for key, values in found(of_features).items():
        assert values == pytest.approx(expected[key], abs=1e-6), key
    assert (out / "openood/knn.csv").read_text(encoding="utf-8") == Path("images/openood/knn.csv").read_text(
        encoding="utf-8"
    )
    assert (out / "scores/fit" / "KNN.npz").is_file() or list((out / "scores").rglob("KNN.npz"))
    assert "Accuracy and expected calibration error" in capsys.readouterr().out


def test_a_folder_of_feature_files_is_read_as_one(stored, tmp_path):
    for name, values in stored.items():
        for part, rows in enumerate((slice(0, 13), slice(13, None))):
            cut = {key: value if key in "Wb" else value[rows] for key, value in values.items()}
            if len(cut["features"]):
                write_features(tmp_path / f"h/{name}/{part}.npz", cut)
    assert evaluate(*feature_arguments(), *SOME, "--out=files") == 0
    assert evaluate(*feature_arguments("", "h"), *SOME, "--out=folders") == 0
    of_files, of_folders = ({key[1:]: value for key, value in measured(name).items()} for name in ("files", "folders"))
    assert of_folders == pytest.approx(of_files, abs=1e-9)


def test_detectors_that_want_more_than_is_stored_are_left_out(stored, tmp_path, capsys):
    assert evaluate(*feature_arguments()) == 0
    output = capsys.readouterr().out.replace("\n", " ")
    assert "ODIN" not in evaluation.read("f/eval")["runs"][0]["detectors"]
    assert "parameters as they are: choosing them needs validation data, ID and OOD" in output
    for name, values in stored.items():
        write_features(tmp_path / f"bare/{name}.npz", {"features": values["features"]})
    assert evaluate(*feature_arguments(folder="bare")) == 0
    (held,) = evaluation.read("bare/eval")["runs"]
    assert set(held["detectors"]) == {"FeatureNorm", "KNN", "CombOOD"}
    notes = "\n".join(held["notes"])
    for text in (
        "MSP: left out: needs logits, or the head to make them with",
        "NCI: left out: needs the head, W and b",
        "Mahalanobis: left out: needs targets, bare/fit.npz holds none",
        "accuracy and calibration: need logits and targets of the test data",
    ):
        assert text in notes
    assert not any(row["metric"] == "accuracy" for row in evaluation.read("bare/eval")["summary"])
    assert Path("bare/eval/openood/knn.csv").read_text(encoding="utf-8").splitlines()[1].endswith(",")
    capsys.readouterr()
    assert evaluate(*feature_arguments(folder="bare"), "--detectors=KNN,NCI", "--out=two") == 2
    assert "NCI: needs the head" in capsys.readouterr().err


def test_logits_are_made_with_the_head(stored, tmp_path):
    for name, values in stored.items():
        kept = {key: value for key, value in values.items() if key != "logits"}
        write_features(tmp_path / f"g/{name}.npz", kept)
    assert evaluate(*feature_arguments(), "--detectors=MSP,NCI", "--out=with") == 0
    assert evaluate(*feature_arguments(folder="g"), "--detectors=MSP,NCI", "--out=without") == 0
    of_both = [{key[1:]: value for key, value in measured(name).items()} for name in ("with", "without")]
    assert of_both[0] == pytest.approx(of_both[1], abs=1e-5)


def test_nan_in_stored_features_names_file_and_row(stored, tmp_path, capsys):
    bad = {**stored["svhn"], "features": stored["svhn"]["features"].clone()}
    bad["features"][13, 2] = torch.nan
    write_features(tmp_path / "f/svhn.npz", bad)
    assert evaluate(*feature_arguments(), "--detectors=MSP,KNN") == 1
    error = capsys.readouterr().err
    assert "ood-fast: failed: f/svhn.npz: row 13: features: got NaN, expected numbers" in error
    assert not Path("f/eval").exists()


# ---- what cannot be done

WRONG_FEATURES = {
    "a model too": (["net", "--features=f/fit.npz"], "RUN, --features: expected one of them"),
    "neither": ([], "RUN, --features: expected one of them"),
    "no test": (["--features=f/fit.npz"], "--features: needs --test and --ood-features"),
    "images too": (["--features=f/fit.npz", "--benchmark=cifar10"], "--benchmark: not used with --features"),
    "features of a run": (["net", "--test=f/test.npz"], "--test: only used with --features"),
    "no name": (["--ood-features=f/svhn.npz"], "--ood-features: got 'f/svhn.npz', expected [near/]NAME=PATH"),
    "no group": (["--ood-features=middle/a=f/svhn.npz"], "expected near/NAME=PATH, far/NAME=PATH or NAME=PATH"),
    "twice": (["--ood-features=near/svhn=f/tin.npz"], "--ood-features: svhn is there twice"),
    "taken name": (["--ood-features=farood=f/svhn.npz"], "'farood': tables call something else by this name"),
    "no file": (["--ood-features=new=f/new.npz"], "f/new.npz: no such file or folder"),
    "tuned on tests": (["--ood-validation=f/tin.npz"], "f/tin.npz is tested with"),
    "needs the model": (["--detectors=ODIN"], "ODIN passes images through the model"),
    "no such detector": (["--detectors=MPS"], "unknown detector 'MPS'"),
    "k too large": (["--detectors=KNN", "--set=KNN.k=71"], "KNN: k: got 71, expected at most 70"),
    "no head there": (["--head-file=f/tin.npz"], "--head-file f/tin.npz: holds no W"),
    "no draws": (["--bootstrap=-1"], "--bootstrap: got -1, expected at least 0"),
}


@pytest.fixture(scope="module")
def made_features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    for name, n in {"fit": 70, "validation": 20, "test": 30, "cifar100": 9, "tin": 8, "mnist": 7, "svhn": 6}.items():
        z = torch.randn(n, 6)
        held = {"features": z, "logits": z @ weight.T + bias, "targets": torch.arange(n) % 4}
        write_features(folder / f"f/{name}.npz", held | ({"W": weight, "b": bias} if name == "fit" else {}))
    return folder


def test_stored_features_of_a_shifted_set(made_features, tmp_path):
    """The test data themselves, once more: the same numbers."""
    (tmp_path / "f").symlink_to(made_features / "f")
    assert evaluate(*feature_arguments(), "--ood-features=csid/again=f/test.npz", "--detectors=MSP", "--out=out") == 0
    run = evaluation.Results.from_json(evaluation.read("out")).runs[0]
    for ood_set in ("mnist", "nearood", "farood"):
        assert run.value("fsood_auroc", "MSP", ood_set) == pytest.approx(run.value("auroc", "MSP", ood_set), abs=1e-12)
    assert run.value("fsood_accuracy") == run.value("accuracy", "", "again") == run.value("accuracy")
    only = [text for text in feature_arguments() if not text.startswith("--ood-f")]
    assert evaluate(*only, "--ood-features=csid/again=f/test.npz") == 2


@pytest.mark.parametrize(("given", "message"), WRONG_FEATURES.values(), ids=WRONG_FEATURES)
def test_wrong_requests_for_stored_features(made_features, tmp_path, given, message, capsys):
    (tmp_path / "f").symlink_to(made_features / "f")
    alone = any(text.startswith("--features") or text == "net" for text in given) or not given
    arguments = given if alone else [*feature_arguments(), *given]
    assert cli.main(["evaluate", *arguments, "--out=out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


DAMAGED = {
    "other width": (lambda held: {**held, "features": held["features"][:, :5]}, "got 5 features, expected 6 as in"),
    "other classes": (lambda held: {**held, "logits": held["logits"][:, :3]}, "got 3 classes, expected 4 as in"),
    "more targets": (lambda held: {**held, "targets": torch.zeros(99).long()}, "got 99 targets and 6 features"),
    "empty": (lambda held: {name: value[:0] for name, value in held.items()}, "holds no sample"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_feature_files_that_do_not_fit(made_features, tmp_path, change, message, capsys):
    for file in (made_features / "f").iterdir():
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / file.name).write_bytes(file.read_bytes())
    with np.load("f/svhn.npz") as held:
        write_features(tmp_path / "f/svhn.npz", change({name: torch.from_numpy(held[name]) for name in held}))
    assert evaluate(*feature_arguments()) == 2
    assert message in capsys.readouterr().err
    with np.load("f/test.npz") as held:
        wrong = {**held, "targets": np.where(np.arange(30) == 17, -1, held["targets"])}
    kept = Path("f/test.npz").read_bytes()
    np.savez("f/test.npz", **wrong)
    write_features(tmp_path / "f/svhn.npz", {"features": torch.zeros(3, 6), "logits": torch.zeros(3, 4)})
    assert evaluate(*feature_arguments()) == 2
    assert "f/test.npz: row 17: got target -1, expected a class index in [0, 4)" in capsys.readouterr().err
    Path("f/test.npz").write_bytes(kept)
    Path("f/svhn.npz").write_bytes(b"no archive")
    assert evaluate(*feature_arguments()) == 2
    assert "f/svhn.npz: is damaged, or not a file of .npz" in capsys.readouterr().err


WRONG_RUNS = {
    "no run": (["nothing"], "nothing: no such file or folder"),
    "an empty folder": (["empty", "--benchmark=cifar10", "--data-root=DATA"], "empty: no run there, expected run.json"),
    "no benchmark": (["net"], "--benchmark: "),
    "no such benchmark": (["net", "--benchmark=cifar1"], "unknown benchmark 'cifar1'"),
    "no data": (["net", "--benchmark=cifar10"], "needs the folder of its data (--data-root)"),
    "no sets": (["net", "--benchmark=cifar10", "--data-root=.", "--model=small_cnn"], "cifar-10-batches-py"),
    "no model": (["net", "--benchmark=cifar10", "--data-root=DATA"], "give --model or --recipe"),
    "another model": (["net", "--benchmark=cifar10", "--data-root=DATA", "--model=resnet18_32x32"], "does not fit"),
    "other classes": (["net", "--benchmark=cifar100", "--data-root=DATA", "--model=small_cnn"], "does not fit"),
    "no such set": (["net", "--benchmark=cifar10", "--data-root=DATA", "--ood=snhv"], "unknown OOD set 'snhv'"),
    "no such folder": (["net", "--benchmark=cifar10", "--data-root=DATA", "--ood-folder=a"], "expected NAME=DIR"),
    "a path for a name": (["net", "--benchmark=cifar10", "--data-root=DATA", "--ood-folder=a/b=c"], "without /"),
    "a set of the benchmark": (
        ["net", "--benchmark=cifar10", "--data-root=DATA", "--model=small_cnn", "--ood-folder=svhn=empty"],
        "--ood-folder: 'svhn' is a set of the benchmark already",
    ),
    "a set that is made": (
        ["net", "--benchmark=cifar10", "--data-root=DATA", "--ood-folder=noise=empty", "--synthetic"],
        "--ood-folder: 'noise' is a set of the benchmark already",
    ),
    "several and no out": (
        ["net", "net/s0", "--benchmark=cifar10", "--data-root=DATA"],
        "as in: ood-fast evaluate net net/s0 --out runs/both",
    ),
    "twice": (
        ["net/s0", "net/s0", "--benchmark=cifar10", "--data-root=DATA", "--out=x", "--any-accuracy"],
        "same weights",
    ),
    "a file for a folder": (["net", "--benchmark=cifar10", "--data-root=DATA", "--out=file"], "file is a file"),
}


@pytest.mark.parametrize(("given", "message"), WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_wrong_requests_for_runs(root, seeds, given, message, capsys):
    Path("file").write_text("")
    Path("empty").mkdir()
    arguments = [text.replace("DATA", str(root)) for text in given]
    if "--out=x" in arguments:
        arguments += ["--model=small_cnn", "--detectors=MSP", "--ood=svhn"]
    assert evaluate(*arguments, "--quiet") == 2
    error = capsys.readouterr().err
    assert error.startswith("ood-fast: error: ")
    assert message in error


def test_a_full_disk_is_a_failure(root, seeds, capsys, monkeypatch):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    assert evaluate(seeds / "s0", *on_cifar10(root), "--quiet") == 0
    before = json.loads((seeds / "s0/eval/cifar10/results.json").read_text())
    monkeypatch.setattr(sys.modules["ood_fast.evaluation.write"], "write_npz", full)
    assert evaluate(seeds / "s0", *on_cifar10(root), "--quiet") == 1
    assert (
        f"ood-fast: failed: cannot write {seeds}/s0/eval/cifar10: No space left on device\n" in capsys.readouterr().err
    )
    assert json.loads((seeds / "s0/eval/cifar10/results.json").read_text()) == before


# ---- what is read, chosen and left out


def without(root: Path, folder: Path, *names: str) -> Path:
    """The data without some of its folders."""
    folder.mkdir()
    for entry in root.iterdir():
        if entry.name not in names:
            (folder / entry.name).symlink_to(entry)
    return folder


def test_only_what_the_detectors_need_is_read(root, seeds, tmp_path, capsys):
    """Tiny ImageNet is near-OOD too: `--ood` leaves the OOD images for validation alone to need it."""
    there = without(root, tmp_path / "less", "tiny-imagenet-200")
    chosen = ["--detectors=MSP,Energy", "--ood=svhn", "--no-tune", "--quiet"]
    assert evaluate(seeds / "s0", *on_cifar10(there, *chosen)) == 0, capsys.readouterr().err
    assert {json.loads(file.read_text())["set"] for file in (seeds / "s0/cache").rglob("meta.json")} == {"test", "svhn"}
    held = evaluation.read(seeds / "s0/eval/cifar10")["runs"][0]
    assert set(held["images_per_second"]) == {"test", "svhn"}
    assert evaluate(seeds / "s0", *on_cifar10(there, "--detectors=NCI", "--ood=svhn", "--quiet", "--overwrite")) == 2


def test_the_list_of_training_images_is_not_read_for_logits_alone(seeds, tmp_path):
    write_openood(tmp_path)
    (tmp_path / "benchmark_imglist/cifar10/train_cifar10.txt").unlink()
    chosen = ["--detectors=MSP,Energy", "--ood=svhn", "--no-tune", "--quiet"]
    assert evaluate(seeds / "s0", *on_cifar10(tmp_path, *chosen)) == 0
    chosen[0] = "--detectors=KNN"
    assert evaluate(seeds / "s0", *on_cifar10(tmp_path, *chosen, "--overwrite")) == 2


def test_odin_is_asked_for(root, seeds, capsys):
    given = ["--ood=svhn", "--no-tune", "--set=KNN.k=5"]
    assert evaluate(seeds / "s0", *on_cifar10(root, *given)) == 0
    output = capsys.readouterr()
    told = next(line for line in output.err.splitlines() if "left out, as it takes long" in line)
    assert "ODIN, IODIN" in told
    assert told.endswith("; --detectors all has it")
    assert "ODIN" not in output.out
    assert evaluate(seeds / "s0", *on_cifar10(root, "--detectors=ODIN,MSP", "--overwrite", *given[:2])) == 0
    output = capsys.readouterr()
    assert "ODIN runs the model forth and back for each image" in output.err
    assert "ODIN" in output.out


def test_chosen_parameters_are_told(root, seeds, capsys):
    assert evaluate(seeds / "s0", *on_cifar10(root, "--detectors=NCI,FDBD", "--ood=svhn")) == 0
    assert "(AUROC on validation data):\n  NCI: alpha=" in (output := capsys.readouterr().out)
    assert "\n  FDBD: denominator=" in output


def test_a_choice_that_costs_is_told(capsys):
    """Validation says that norms tell the sets apart, the test sets say the opposite."""
    random = np.random.default_rng(2)
    W = random.normal(size=(3, 8)).astype(np.float32)
    Path("f").mkdir()
    for name, scale, shift in (("train", 1, 1), ("test", 1, 1), ("val", 1, 1), ("valood", 0.1, 0.3), ("far", 9, 0.3)):
        z = (scale * (random.normal(size=(60, 8)) / 2 + shift * W[random.integers(0, 3, 60)])).astype(np.float32)
        targets = (z @ W.T).argmax(1)
        np.savez(f"f/{name}.npz", features=z, logits=z @ W.T, targets=targets, W=W)
    given = ["--features=f/train.npz", "--test=f/test.npz", "--ood-features=far=f/far.npz", "--validation=f/val.npz"]
    assert evaluate(*given, "--ood-validation=f/valood.npz", "--detectors=NCI", "--out=out") == 0
    output, told = capsys.readouterr()
    assert told.count("scoring test") == 1
    assert "chosen on validation data, costs" in output
    assert "AUROC on far-OOD test sets beside the default, which --set NCI.alpha=0.0001 keeps" in output


def test_one_sample_a_class_fits_no_class(capsys):
    random = np.random.default_rng(0)
    W = random.normal(size=(12, 8)).astype(np.float32)
    for name, n in (("train", 12), ("test", 24), ("far", 24)):
        z = random.normal(size=(n, 8)).astype(np.float32)
        np.savez(f"{name}.npz", features=z, logits=z @ W.T, targets=np.arange(n) % 12, W=W)
    given = ["--features=train.npz", "--test=test.npz", "--ood-features=far=far.npz"]
    assert evaluate(*given, "--out=out") == 0
    output = capsys.readouterr().out
    for name in ("Mahalanobis", "RMDS", "GMM", "OpenMax", "SHE", "KLMatching"):
        assert f"{name}: left out: " in output
    assert "TemperatureScaling: left out" not in output
    assert evaluate(*given, "--out=out", "--detectors=SHE,MSP", "--overwrite") == 2
    assert "SHE: is fitted on each class, but no class has two training samples" in capsys.readouterr().err
