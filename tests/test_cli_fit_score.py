"""`ood-fast fit` and `ood-fast score` as a user runs them: on image folders and on stored features."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import COMMAND, forked

from ood_fast import checks, cli, detectors, features, models

pytest.importorskip("torchvision")
from PIL import Image

C, SIZE = 3, 16
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)).eval()
    with torch.no_grad():  # class k is that of the channel 2 - k: b, g, r
        model[0].weight[:3] = 0
        for k in range(3):
            model[0].weight[k, 2 - k, 1, 1] = 1
            model[4].weight[k, 4 * k : 4 * k + 4] += 2
    return model
"""
PLUGIN = """
from ood_fast.detectors import Detector, register

@register
class SecondLogit(Detector):
    needs_logits = True

    def _score(self, features, logits):
        return -logits.topk(2, dim=1).values[:, 1]
"""
PREPARED = "images: short side 16 (bilinear), middle 16, mean 0.485,0.456,0.406, std 0.229,0.224,0.225"
PREPARED += "; the model does not say: give --mean, --std if it was trained otherwise\n"
OWN = ["--model", "mymodel:build"]
ON_IMAGES = [*OWN, "--size", str(SIZE), "--resize", str(SIZE), "--workers", "0"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(folder_with) -> Path:
    return folder_with(mymodel=MODEL)


@pytest.fixture
def photos() -> None:
    """train/<class>, val, ood: 20 + 12 + 6 images of 16×16, each class of a colour of its own."""
    random = np.random.default_rng(0)

    def draw(folder: str, name: str, colour: int | None) -> None:
        pixels = random.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
        if colour is not None:
            pixels[..., colour] += 130
        Path(folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(f"{folder}/{name}.png")

    for index in range(21):
        draw(f"train/{'rgb'[index % C]}", f"{index:02d}", index % C)
    for index in range(12):
        draw("val", f"{index:02d}", index % C)
    for index in range(6):
        draw("ood", f"{index:02d}", None)


def rows_of(path: str) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fit(*arguments: str) -> int:
    return cli.main(["fit", *arguments, "--quiet"])


def score(*arguments: str) -> int:
    return cli.main(["score", *arguments, "--quiet"])


def scoring(data: str, file: str = "d.safetensors") -> list[str]:
    return ["score", "--detectors", file, "--data", data, *OWN, "--workers", "0"]


def test_confident_scores_do_not_tie_in_the_table(tmp_path, monkeypatch):
    """In float32 the softmax of each of these is 1; the flags are those of a deployed detector, in float32."""
    monkeypatch.chdir(tmp_path)
    logits = torch.stack([torch.linspace(18, 30, 40), *torch.zeros(2, 40)], dim=1)
    np.savez("f.npz", logits=logits.numpy(), features=logits.numpy())
    assert (
        fit("--features", "f.npz", "--validation", "f.npz", "--detectors", "MSP,MaxLogit", "--out", "d.safetensors")
        == 0
    )
    assert score("--detectors", "d.safetensors", "--features", "f.npz", "--out", "s.csv") == 0
    rows = rows_of("s.csv")
    written = [float(row["MSP"]) for row in rows]
    assert written == logits.double().softmax(dim=1).amax(dim=1).tolist()
    assert len(set(written)) == len(rows)
    assert {row["MSP_is_ood"] for row in rows} == {"False"}


# ---- images


def test_fit_and_score_image_folders(photos, capsys):
    fitted = ["fit", "--data", "train", "--validation", "val", "--detectors", "MSP,KNN,NCI", "--set", "KNN.k=3"]
    assert cli.main([*fitted, "--out", "out/d.safetensors", *ON_IMAGES]) == 0
    told = capsys.readouterr()
    assert "Wrote out/d.safetensors" in told.out
    assert "fitting on train: 21 in" in told.err
    # How images are prepared is remembered; what to type is told, with the model, which a file may not name.
    command = told.out.rpartition("score with: ood-fast ")[2].replace("FOLDER", "ood").replace("scores.csv", "s.csv")
    assert cli.main([*shlex.split(command), "--workers", "0"]) == 0
    assert "6 rows in s.csv" in capsys.readouterr().out
    rows = rows_of("s.csv")
    assert [Path(row["path"]).name for row in rows] == [f"{index:02d}.png" for index in range(6)]
    assert list(rows[0]) == ["path", "prediction", "MSP", "MSP_is_ood", "KNN", "KNN_is_ood", "NCI", "NCI_is_ood"]
    assert {row["prediction"] for row in rows} <= {"r", "g", "b"}

    # The same by hand.
    sys.path.insert(0, "")
    import mymodel

    from ood_fast.data.images import preparation

    loaded = detectors.load("out/d.safetensors")
    prepare = preparation(SIZE, SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.stack([prepare(Image.open(f"ood/{index:02d}.png").convert("RGB")) for index in range(6)])
    for name, expected in loaded.score(mymodel.build(), x).items():
        torch.testing.assert_close(torch.tensor([float(row[name]) for row in rows]), expected.float())
        flagged = [row[f"{name}_is_ood"] == "True" for row in rows]
        assert flagged == loaded[name].is_ood(expected).tolist()
    assert not list(Path().glob(".*part*"))


def test_one_detector_has_the_columns_score_and_is_ood(photos):
    assert fit("--data", "train", "--detectors", "NCI", "--out", "d.safetensors", *ON_IMAGES) == 0
    assert cli.main([*scoring("val"), "--out", "s.csv", "--quiet"]) == 0
    assert list(rows_of("s.csv")[0]) == ["path", "prediction", "score", "is_ood"]
    assert {row["is_ood"] for row in rows_of("s.csv")} == {""}, "without a threshold nothing is decided"


def test_a_bad_image_is_told_by_its_path_and_skipped_only_when_asked(photos, capsys):
    Path("ood/02.png").write_bytes(b"no image")
    assert fit("--data", "train", "--detectors", "MSP", "--out", "d.safetensors", *ON_IMAGES) == 0
    arguments = [*scoring("ood"), "--out", "s.csv", "--workers", "2", "--batch-size", "2"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "ood/02.png" in error
    assert "--skip-bad" in error
    assert "Traceback" not in error
    assert not Path("s.csv").exists()
    assert cli.main([*arguments, "--skip-bad"]) == 0
    told = capsys.readouterr()
    assert "skipped image" in told.err
    assert "1 images could not be read" in told.out
    assert [Path(row["path"]).name for row in rows_of("s.csv")] == ["00.png", "01.png", "03.png", "04.png", "05.png"]


def test_an_interrupted_run_goes_on_where_it_stopped(photos, monkeypatch):
    assert fit("--data", "train", "--detectors", "MSP,NCI", "--out", "d.safetensors", *ON_IMAGES) == 0
    arguments = [*scoring("val")[1:], "--batch-size", "2"]
    assert score(*arguments, "--out", "whole.csv") == 0

    from ood_fast.commands.table import ScoreTable

    write, n_calls = ScoreTable.write, []

    def interrupted(self, *args):
        if len(n_calls) == 3:
            raise KeyboardInterrupt
        n_calls.append(1)
        write(self, *args)

    monkeypatch.setattr(ScoreTable, "write", interrupted)
    assert score(*arguments, "--out", "s.csv") == 130
    assert not Path("s.csv").exists()
    part = Path(".s.csv.part0")
    assert len(part.read_text().splitlines()) == 1 + 6
    with open(part, "a") as file:
        file.write('[6, "val/06')  # the line that a killed process did not finish
    positions = []
    monkeypatch.setattr(ScoreTable, "write", lambda self, at, *args: positions.extend(at) or write(self, at, *args))
    assert score(*arguments, "--out", "s.csv") == 0
    assert positions == list(range(6, 12)), "what was scored is not scored again"
    assert Path("s.csv").read_bytes() == Path("whole.csv").read_bytes()

    # With other data, what is left of a run is not continued.
    part.write_text(json.dumps({"identity": "other", "processes": 1}) + "\n")
    assert score(*arguments, "--out", "s.csv", "--overwrite") == 0
    Path("s.csv").unlink()
    part.write_text(json.dumps({"identity": "other", "processes": 1}) + "\n")
    assert score(*arguments, "--out", "s.csv") == 2


def test_an_interruption_after_a_bad_image_loses_nothing(photos, monkeypatch):
    """The bad image is known before its batch is scored: it must not hide that the rows before it are missing."""
    Path("ood/04.png").write_bytes(b"no image")
    assert fit("--data", "train", "--detectors", "MSP", "--out", "d.safetensors", *ON_IMAGES) == 0
    arguments = [*scoring("ood")[1:], "--skip-bad", "--out", "s.csv"]

    from ood_fast.commands.table import ScoreTable

    with monkeypatch.context() as patch:
        patch.setattr(ScoreTable, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert score(*arguments) == 130
    assert score(*arguments) == 0
    assert [Path(row["path"]).stem for row in rows_of("s.csv")] == ["00", "01", "02", "03", "05"]


def test_a_batch_of_bad_images_only(photos, capsys):
    for name in ("00", "01", "04", "05"):
        Path(f"ood/{name}.png").write_bytes(b"no image")
    assert fit("--data", "train", "--detectors", "MSP", "--out", "d.safetensors", *ON_IMAGES) == 0
    capsys.readouterr()
    assert cli.main([*scoring("ood"), "--batch-size", "2", "--skip-bad", "--out", "s.csv"]) == 0
    assert "4 images could not be read" in capsys.readouterr().out
    assert [Path(row["path"]).stem for row in rows_of("s.csv")] == ["02", "03"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
@pytest.mark.parametrize("out", ["s.csv", "s.parquet"])
def test_file_names_that_are_no_text(out, photos):
    name = os.fsdecode(b"ood/07 \xff \xc3\xa9.png")
    os.rename("ood/05.png", name)
    assert fit("--data", "train", "--detectors", "MSP", "--out", "d.safetensors", *ON_IMAGES) == 0
    assert score(*scoring("ood")[1:], "--out", out) == 0
    if out == "s.csv":
        assert Path(out).read_bytes().splitlines()[-1].startswith(os.fsencode(name))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_table(out).column("path").to_pylist()[-1] == "ood/07 \\udcff é.png"


def test_other_data_in_the_same_folder_is_not_continued(photos, monkeypatch, capsys):
    model = runpy.run_path("mymodel.py")["build"]()
    models.save_checkpoint(model, "w.pth")
    weights = ["--checkpoint", "w.pth"]
    assert fit("--data", "train", "--detectors", "MSP", "--out", "d.safetensors", *ON_IMAGES, *weights) == 0
    arguments = [*scoring("ood")[1:], "--batch-size", "2", *weights]

    from ood_fast.commands.table import ScoreTable

    with monkeypatch.context() as patch:
        patch.setattr(ScoreTable, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert score(*arguments, "--out", "s.csv") == 130
        assert score(*arguments, "--out", "t.csv") == 130
    capsys.readouterr()
    os.rename("w.pth", "same.pth")
    assert score(*arguments[:-1], "same.pth", "--out", "t.csv") == 0, "the same weights by another name"
    with torch.no_grad():
        model[4].weight[0, 0] += 1e-3
    models.save_checkpoint(model, "w.pth")
    assert score(*arguments, "--out", "s.csv", "--other-model") == 2
    assert "interrupted run with other options or data" in capsys.readouterr().err
    os.replace("same.pth", "w.pth")
    os.rename("ood/05.png", "ood/00b.png")  # before what was scored: it would never be looked at
    capsys.readouterr()
    assert score(*arguments, "--out", "s.csv") == 2
    assert "interrupted run with other options or data" in capsys.readouterr().err
    assert score(*arguments, "--out", "s.csv", "--overwrite") == 0
    assert [Path(row["path"]).stem for row in rows_of("s.csv")] == ["00", "00b", "01", "02", "03", "04"]


def test_odin_steps_by_the_deviation_that_images_are_divided_by(photos):
    arguments = ["--data", "train", "--detectors", "ODIN,LayerMahalanobis", *ON_IMAGES]
    assert fit(*arguments, "--std", "0.5,0.25,0.2", "--out", "d.safetensors") == 0
    assert [d.std for d in detectors.load("d.safetensors").detectors] == [(0.5, 0.25, 0.2)] * 2
    assert fit(*arguments, "--set", "ODIN.std=(1, 1, 1)", "--out", "d.safetensors") == 0
    assert detectors.load("d.safetensors")["ODIN"].std == (1, 1, 1)


def test_tuning_chooses_on_validation_data_and_refuses_test_data(photos, capsys):
    arguments = ["fit", "--data", "train", "--detectors", "NCI,KNN", "--set", "KNN.k=2", *ON_IMAGES]
    tuned = ["--tune", "--validation", "val", "--ood-validation", "ood", "--out", "d.safetensors"]
    # OpenOOD's candidates for k need at least 50 features: the smallest is lowered.
    with pytest.warns(UserWarning, match=r"KNN: k: the default of 50 does not fit, .*: takes 21"):
        assert cli.main([*arguments, *tuned]) == 0
    assert detectors.load("d.safetensors")["KNN"].k == 21
    arguments[4] = "NCI"
    arguments = [argument for argument in arguments if argument not in ("--set", "KNN.k=2")]
    assert cli.main([*arguments, *tuned]) == 0
    assert "NCI: alpha=" in capsys.readouterr().out
    assert detectors.load("d.safetensors")["NCI"].threshold is not None
    assert cli.main([*arguments, "--tune", "--validation", "val", "--ood-validation", "./val", "--out", "e"]) == 2
    assert "--ood-validation: ./val is in-distribution data by --data or --validation" in capsys.readouterr().err
    shutil.copytree("val", "copy")
    assert cli.main([*arguments, "--tune", "--validation", "val", "--ood-validation", "copy", "--out", "e"]) == 2
    assert "--ood-validation: copy scores as --validation does" in capsys.readouterr().err
    Path("val").rename("test")
    assert cli.main([*arguments, "--tune", "--validation", "test", "--ood-validation", "ood", "--out", "e"]) == 0
    assert "warning: --tune: test is called like test data" in capsys.readouterr().err


def test_a_folder_without_class_folders(photos, capsys):
    arguments = ["fit", "--data", "val", "--out", "d.safetensors", *ON_IMAGES, "--detectors"]
    assert cli.main([*arguments, "Mahalanobis,KNN,RMDS"]) == 2
    error = capsys.readouterr().err
    assert error == PREPARED + (
        "ood-fast: error: no class folders in val: Mahalanobis, RMDS need classes, "
        "expected a folder of images for each class\n"
    )
    assert not Path("d.safetensors").exists()
    assert cli.main([*arguments, "KNN", "--set", "KNN.k=2"]) == 0
    error = capsys.readouterr().err
    assert "no class folders in val: fitting without classes" in error
    assert "fitting on val: 12 in" in error
    # Flat validation data is as it should be.
    on_both = ["fit", "--data", "train", "--validation", "val", "--out", "d.safetensors", *ON_IMAGES]
    assert cli.main([*on_both, "--detectors", "MSP,ReAct"]) == 0
    assert "no class folders" not in capsys.readouterr().err


def test_what_needs_no_fit_is_told_so(photos, stored, capsys):
    on_images = ["--data", "train", *ON_IMAGES]
    for name in ("MSP", "BoundaryDistance"):  # the latter keeps the head
        assert cli.main(["fit", *on_images, "--detectors", name, "--out", "d.safetensors"]) == 0
        assert capsys.readouterr().err == PREPARED + "no pass over train: nothing has to be fitted\n"
        assert detectors.load("d.safetensors")[name].fitted
    assert fit(*on_images, "--detectors", "MSP", "--out", "d.safetensors") == 0
    assert capsys.readouterr().err == ""
    train = write("train.npz", stored)
    assert cli.main(["fit", "--features", train, "--detectors", "MSP", "--out", "d.safetensors"]) == 0
    assert capsys.readouterr().err.startswith("nothing has to be fitted, checked train.npz: 50 in")


def test_other_settings_than_those_fitted_with_are_warned_of(photos, capsys):
    assert fit("--data", "train", "--detectors", "NCI", "--out", "d.safetensors", *ON_IMAGES) == 0
    Path("other.py").write_text(MODEL)
    arguments = [*scoring("ood"), "--overwrite", "--out", "s.csv"]
    same = ["--model", "mymodel:build", "--size", "16", "--resize", "16", "--mean", "0.485,0.456,0.4060"]
    for given in ([], same):
        assert cli.main([*arguments, *given]) == 0
        assert "warning" not in capsys.readouterr().err
    cases = [
        (["--size", "24"], "--size 24 (fitted with 16), --resize 24 (fitted with 16)"),
        (["--resize", "20"], "--resize 20 (fitted with 16)"),
        (["--std", ".5,.5,.5"], "--std 0.5,0.5,0.5 (fitted with 0.229,0.224,0.225)"),
        (["--model", "other:build"], "--model other:build (fitted with mymodel:build)"),
    ]
    for given, told in cases:
        assert cli.main([*arguments, *given]) == 0
        assert f"ood-fast: warning: {told}: not what the detectors were fitted on" in capsys.readouterr().err
        assert cli.main([*arguments, *given, "--quiet"]) == 0
        assert capsys.readouterr().err == ""
    assert cli.main(["score", "--help"]) == 0
    assert "--detectors remembers the model and the image settings" in " ".join(capsys.readouterr().out.split())


# ---- stored features


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    z, W, b = torch.randn(50, 8).relu(), torch.randn(C, 8), torch.randn(C)
    f = torch.nn.functional.linear(z, W, b)
    return {"features": z, "logits": f, "targets": f.argmax(1), "W": W, "b": b}


def write(path: str, held: dict) -> str:
    if path.endswith(".npz"):
        np.savez(path, **{name: np.asarray(value) for name, value in held.items()})
    elif path.endswith(".pt"):
        torch.save(held, path)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        names = {"features": "features", "logits": "logits", "targets": "target", "paths": "path"}
        columns = {names[name]: list(np.asarray(value)) for name, value in held.items() if name in names}
        parquet.write_table(pyarrow.table(columns), path)
    return path


def test_targets_that_the_logits_do_not_know_are_refused(stored, capsys):
    """Another numbering, other rows: both would fit detectors of classes to the wrong classes."""
    swapped = (stored["targets"] + 1) % stored["logits"].shape[1]
    shuffled = stored["targets"][torch.randperm(len(stored["targets"]), generator=torch.Generator().manual_seed(0))]
    fitting = ["--detectors", "MSP,Mahalanobis", "--out", "d.safetensors"]
    assert fit("--features", write("swapped.npz", {**stored, "targets": swapped}), *fitting) == 2
    assert "the targets are not in the order of the model's classes" in capsys.readouterr().err
    wrong = write("shuffled.npz", {**stored, "targets": shuffled})
    assert fit("--features", wrong, *fitting) == 2
    assert "no better than chance" in capsys.readouterr().err
    assert not Path("d.safetensors").exists()
    assert fit("--features", wrong, *fitting, "--any-accuracy") == 0
    capsys.readouterr()
    assert cli.main(["fit", "--features", write("right.npz", stored), *fitting]) == 0
    assert "accuracy on right.npz: 100.0 %" in "".join(capsys.readouterr())


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".parquet"])
@pytest.mark.parametrize("out", ["s.csv", "s.parquet"])
def test_features_in_every_format(suffix, out, stored):
    train = write(f"train{suffix}", stored)
    head = write("head.npz", {"W": stored["W"], "b": stored["b"]})
    test = {"features": stored["features"][:7] + 0.1, "paths": [f"image {i}, a\nb" for i in range(7)]}
    names = "MSP,NCI,FDBD"
    assert fit("--features", train, "--head-file", head, "--detectors", names, "--out", "d.safetensors") == 0
    assert score("--detectors", "d.safetensors", "--features", write(f"test{suffix}", test), "--out", out) == 0
    if out.endswith(".csv"):
        rows = rows_of(out)
    else:
        from pyarrow import parquet

        rows = parquet.read_table(out).to_pylist()
    assert [row["path"] for row in rows] == test["paths"]
    expected = detectors.DetectorSet(names.split(","))
    expected.fit_features(stored["features"], stored["logits"], stored["targets"], (stored["W"], stored["b"]))
    logits = torch.nn.functional.linear(test["features"], stored["W"], stored["b"])
    assert [int(row["prediction"]) for row in rows] == logits.argmax(1).tolist()
    for name, scores in expected.score_features(test["features"], logits).items():
        torch.testing.assert_close(torch.tensor([float(row[name]) for row in rows]), scores, rtol=1e-5, atol=1e-6)


def test_a_folder_of_feature_files_is_one_data_set(stored):
    for part in range(5):
        rows = slice(10 * part, 10 * part + 10)
        Path("parts").mkdir(exist_ok=True)
        held = {name: stored[name][rows] for name in ("features", "logits", "targets")}
        write(f"parts/{part}.npz", {**held, "W": stored["W"], "b": stored["b"]})
    whole = write("whole.pt", stored)
    for source, out in (("parts", "a"), (whole, "b")):
        assert fit("--features", source, "--detectors", "all", "--out", f"{out}.safetensors", *SMALL) == 0
        assert score("--detectors", f"{out}.safetensors", "--features", "parts", "--out", f"{out}.csv") == 0
    for one, other in zip(rows_of("a.csv"), rows_of("b.csv"), strict=True):
        for column, value in one.items():
            if column in detectors.known():
                assert float(value) == pytest.approx(float(other[column]), rel=1e-4, abs=1e-5), column


SMALL = [
    argument
    for setting in ("KNN.k=5", "NNGuide.k=5", "NNGuide.fraction=1.0", "ViM.dim=3", "NECO.dim=3")
    if setting.partition(".")[0] in detectors.known()
    for argument in ("--set", setting)
]


def test_names_of_other_classes_are_refused(stored, capsys):
    """Detectors of logits alone do not know how many classes there are."""
    train = write("train.npz", stored)
    assert fit("--features", train, "--detectors", "MSP", "--out", "d.safetensors") == 0
    for names in (["a", "b"], list("abcdefg")):
        Path("names.json").write_text(json.dumps(names))
        given = ["--classes", "names.json", "--out", "s.csv"]
        assert score("--detectors", "d.safetensors", "--features", train, *given) == 2
        assert f"--classes: {len(names)} names, but there are {C} logits" in capsys.readouterr().err
    assert not Path("s.csv").exists()


def test_own_detectors(stored):
    Path("mydetector.py").write_text(PLUGIN)
    train = write("train.npz", stored)
    own = ["--plugin", "mydetector"]
    fitted = ["fit", "--features", train, "--detectors", "SecondLogit", *own, "--out", "d.safetensors"]
    told = forked(*COMMAND, *fitted)
    assert told.returncode == 0
    scores = "score with: ood-fast score --plugin mydetector --detectors d.safetensors --features FILE --out scores.csv"
    assert scores in told.stdout
    scored = [*COMMAND, "score", "--detectors", "d.safetensors", "--features", train, "--out", "s.csv"]
    refused = forked(*scored)
    assert refused.returncode == 2
    assert "SecondLogit" in refused.stderr
    assert forked(*scored, *own).returncode == 0
    expected = -stored["logits"].topk(2, dim=1).values[:, 1]
    torch.testing.assert_close(torch.tensor([float(row["score"]) for row in rows_of("s.csv")]), expected)


@pytest.mark.slow
def test_torchrun_gives_the_same_file_and_table(stored):
    train = write("train.pt", stored)
    Path("parts").mkdir()
    for part in range(3):
        held = {name: stored[name][20 * part : 20 * part + 20] for name in ("features", "logits", "targets")}
        write(f"parts/{part}.pt", {**held, "W": stored["W"], "b": stored["b"]})
    names = ["--detectors", "MSP,NCI,KNN,FDBD", "--set", "KNN.k=5"]
    assert fit("--features", train, *names, "--validation", train, "--out", "one.safetensors") == 0
    assert score("--detectors", "one.safetensors", "--features", "parts", "--out", "one.csv") == 0
    fitted = ["fit", "--features", "parts", *names, "--validation", "parts", "--out", "two.safetensors"]
    scored = ["score", "--detectors", "two.safetensors", "--features", "parts", "--out", "two.csv"]
    for command in (fitted, scored):
        done = forked(*COMMAND, *command, processes=2)
        assert done.returncode == 0, done.stderr
    for one, other in zip(rows_of("one.csv"), rows_of("two.csv"), strict=True):
        assert one["path"] == other["path"]
        for name in ("MSP", "NCI", "KNN", "FDBD"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5, abs=1e-6)
            assert one[f"{name}_is_ood"] == other[f"{name}_is_ood"]


# ---- what cannot be done


def test_bad_requests(stored, capsys, photos):
    train = write("train.npz", stored)
    no_head = write("bare.npz", {"features": stored["features"]})
    Path("torn.npz").write_bytes(Path("train.npz").read_bytes()[:200])
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    wrong = write("wrong.npz", {"features": np.arange(3)})
    nan = write("nan.npz", {**stored, "features": stored["features"] * float("nan")})
    out = ["--out", "d.safetensors"]
    cases = [
        (["fit", *out], "expected one of them"),
        (["fit", "--features", "nowhere.npz", *out], "nowhere.npz: no such file"),
        (["fit", "--features", "mymodel.py", *out], "ending in '.py', expected .npz"),
        (["fit", "--features", "torn.npz", *out], "torn.npz: is damaged"),
        (["fit", "--features", "evil.pt", *out], "evil.pt: is damaged, or not"),
        (["fit", "--features", wrong, *out], "features: got torch.int64 (3,)"),
        (["fit", "--features", no_head, "--detectors", "NCI", *out], "NCI: head: got None"),
        (["fit", "--features", nan, "--detectors", "NCI", *out], "features: got NaN in 50 of 50 rows"),
        (["fit", "--features", train, "--detectors", "NCJ", *out], "did you mean 'NCI'?"),
        (["fit", "--features", train, "--set", "KNN.q=1", *out], "unknown parameter of KNN 'q'"),
        (["fit", "--features", train, "--set", "KNN.k=zero", *out], "k: got 'zero'"),
        (["fit", "--features", train, "--tune", *out], "--tune: needs --validation"),
        (["fit", "--features", train, "--tpr", "0.9", *out], "need --validation"),
        (["fit", "--features", train, "--classes", "names.txt", *out], "--classes: not used with --features"),
        (["fit", "--data", "train", "--head-file", train, *out], "--head-file: only used with --features"),
        (["score", "--detectors", "d", "--features", train, "--size", "8", "--out", "s.csv"], "--size: not used with"),
        (["fit", "--data", "nowhere", "--model", "resnet18", *out], "no folder nowhere"),
        (["fit", "--data", "train", *out], "--model: got none"),
        (["fit", "--data", "train", "--model", "mymodel:nothing", *out], "has no attribute 'nothing'"),
        (
            ["fit", "--data", "train", "--model", "torch.nn:Linear", *out],
            "missing a required argument: 'in_features'",
        ),
        (["fit", "--data", "train", "--model", ":build", *out], "got '', expected the name of a module"),
        (["fit", "--data", "train", "--plugin", "../mymodel", *out], "got '../mymodel', expected the name of a module"),
        (["fit", "--data", "train", "--model", "", *out], "--model: got none"),
        (["fit", "--data", "train", "--model", "resnet17", *out], "unknown model 'resnet17'; did you mean 'resnet18'?"),
        (["fit", "--data", "train", "--model", "resnet18", *out], "got no weights"),
        (["fit", "--data", "train", "--model", "mymodel:build", "--mean", "1,2", *out], "expected three numbers"),
        (["score", "--detectors", "none", "--features", train, "--out", "s.csv"], "none"),
        (["score", "--detectors", train, "--features", train, "--out", "s.csv"], "train.npz"),
        (["score", "--detectors", "d", "--features", train, "--out", "s.txt"], "ending in .csv or .parquet"),
    ]
    for arguments, message in cases:
        assert cli.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert "Traceback" not in error
    assert not Path("hacked").exists()
    assert not Path("d.safetensors").exists()
    assert fit("--features", train, "--detectors", "NCI", *out) == 0
    Path("s.csv").write_text("mine")
    assert score("--detectors", "d.safetensors", "--features", train, "--out", "s.csv") == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert Path("s.csv").read_text() == "mine"
    narrow = write("narrow.npz", {"features": torch.randn(3, 5), "logits": torch.randn(3, C)})
    assert score("--detectors", "d.safetensors", "--features", narrow, "--out", "t.csv") == 1
    assert "expected (n, 8)" in capsys.readouterr().err
    assert score("--detectors", "d.safetensors", "--data", "ood", "--out", "u.csv") == 2
    assert "--model: got none" in capsys.readouterr().err


def test_a_file_that_holds_no_detectors_is_not_replaced(stored, capsys):
    """The weights of the model have the same ending."""
    given = ["--features", write("train.npz", stored), "--detectors", "NCI", "--out", "net.safetensors"]
    models.save_checkpoint({"fc.weight": stored["W"]}, "net.safetensors")
    before = Path("net.safetensors").read_bytes()
    assert fit(*given) == 2
    assert "net.safetensors is there and holds no detectors" in capsys.readouterr().err
    assert Path("net.safetensors").read_bytes() == before
    Path("net.safetensors").unlink()
    assert fit(*given) == fit(*given) == 0, "detectors are"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("NCI,KNN,FDBD", "KNN: k: got 50, expected at most 48, .*, or more training data; --set KNN.k=5"),
        ("NNGuide", "NNGuide: k: got 100, expected at most 0, .*; take a larger .*; --set NNGuide.PARAMETER=VALUE"),
        ("NECO", "NECO: dim: got 100, expected less than 8, .*; --set NECO.dim=4"),
        ("ViM", "ViM: dim: got 256, expected less than 8, .*; --set ViM.dim=4"),
    ],
)
def test_a_parameter_that_does_not_fit_the_data_is_told_with_its_flag(names, told, stored, capsys):
    held = {name: value[:48] if len(value) == 50 else value for name, value in stored.items()}
    arguments = ["fit", "--features", write("train.npz", held), "--out", "d.safetensors", "--detectors", names]
    if names == "NNGuide":
        arguments += ["--set", "NNGuide.fraction=1e-8"]
    else:  # at their defaults they take the largest that fits
        with pytest.warns(UserWarning, match=r"the default of \d+ does not fit, .*, the largest that does"):
            assert cli.main(arguments) == 0
        given = {"NCI,KNN,FDBD": "KNN.k=50", "NECO": "NECO.dim=100", "ViM": "ViM.dim=256"}
        arguments += ["--set", given[names]]
    capsys.readouterr()
    Path("d.safetensors").unlink(missing_ok=True)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"ood-fast: error: {told}\n", error)
    if names != "NNGuide":
        assert cli.main([*arguments[:-2], *error.split("; ")[-1].split()]) == 0


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".parquet"])
def test_a_feature_file_of_other_names_lists_them(suffix, stored):
    file = f"train{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"feats": [[1.0]], "label": [0]}), file)
    else:
        write(file, {"feats": stored["features"], "label": stored["targets"]})
    with pytest.raises(checks.UserError, match=r"got 'feats', 'label', expected `features` \(n, m\), and .* `logits`"):
        list(features.batches(file))
    if suffix != ".parquet":
        write(file, {})
        with pytest.raises(checks.UserError, match="got nothing, expected `features`"):
            features.load(file)


def test_batches_of_stored_features_keep_the_head(stored):
    (first, second) = list(features.batches(write("train.pt", stored), size=30))
    assert (len(first), len(second)) == (30, 20)
    assert torch.equal(second.W, stored["W"])
    assert torch.equal(second.with_logits(None).logits, stored["logits"][30:])
