"""What `score --data` takes, and the order of the classes, as a user runs them."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ood_fast import cli
from ood_fast.commands import gallery
from ood_fast.detectors import MSP

pytest.importorskip("torchvision")
from PIL import Image

C = 12
MODEL = f"""
import torch
from torch import nn

class Net(nn.Module):
    '''Class k by the mean red level k / {C - 1}: right without training.'''
    def __init__(self, order=range({C})):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, {C})
        level = torch.tensor([float(k) for k in order]) / {C - 1}
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.weight[:, 0] = 160 * level
            self.fc.bias.copy_(-80 * level * level)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))

def build():
    return Net()

def shuffled():
    return Net([3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10])

class Broken(Net):
    def forward(self, x):
        return super().forward(torch.where((x[:, 0].mean((1, 2)) > 0.9)[:, None, None, None], torch.nan, x))

def broken():
    return Broken()

def labelled():
    model = shuffled()
    order = [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10]
    model.config = type("Config", (), {{"id2label": {{i: NAMES[k] for i, k in enumerate(order)}}}})
    return model

NAMES = [f"cls{{k}}" for k in range({C})]
"""
SIZES = ["--size", "8", "--resize", "8", "--mean", "0,0,0", "--std", "1,1,1"]
MODEL_OPTIONS = [*SIZES, "--workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(folder_with) -> Path:
    return folder_with(leveller=MODEL)


def draw(path: str, k: int) -> None:
    pixels = np.random.default_rng(k).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    pixels[..., 0] = 255 * min(k, C - 1) // (C - 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def fit(names: list[str], *options: str, model: str = "build") -> int:
    for k, name in enumerate(names):
        for i in range(3):
            draw(f"train/{name}/{i}.png", k)
    given = ["fit", "--data", "train", "--model", f"leveller:{model}", *MODEL_OPTIONS, "--detectors", "MSP,SHE"]
    return cli.main([*given, "--out", "d.safetensors", *options])


def score(*data: str, options: tuple[str, ...] = ()) -> list[dict]:
    given = ["score", "--detectors", "d.safetensors", "--model", "leveller:build", "--other-model", "--workers", "0"]
    assert cli.main([*given, "--out", "s.csv", "--overwrite", "--device", "cpu", *options, "--data", *data]) == 0
    with open("s.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_what_can_be_scored(monkeypatch, capsys):
    assert fit([f"cls{k}" for k in range(C)]) == 0
    for k, name in enumerate(["p/a.png", "p/b.gif", "p/deep/c.png", "q/d.jpg"]):
        draw(name, k)
    Path("p/notes.txt").write_text("")
    capsys.readouterr()

    def paths(*data: str) -> list[str]:
        return [row["path"] for row in score(*data)]

    assert paths("p/a.png") == ["p/a.png"]
    assert paths("q/d.jpg", "p/a.png", "q") == ["q/d.jpg", "p/a.png", "q/d.jpg"]
    assert paths("p") == ["p/a.png", "p/b.gif", "p/deep/c.png"]
    assert "1 below p left out: 1 × .txt (notes.txt)" in capsys.readouterr().err
    assert paths("p/*") == ["p/a.png", "p/b.gif"]
    assert "1 that match p/* left out (p/notes.txt)" in capsys.readouterr().err
    assert paths("p/**/*.png") == ["p/a.png", "p/deep/c.png"]
    for separator in ("\n", "\r\n", "\0"):
        listed = separator.join(["q/d.jpg", "p/a.png", ""]).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
        assert paths("-") == ["q/d.jpg", "p/a.png"]
    assert [row["prediction"] for row in score("p/*.png", "p/deep/c.png", "q")] == ["cls0", "cls2", "cls3"]


def test_how_images_are_prepared_is_told_where_nobody_said_it(capsys):
    """Detectors fitted in Python or on features know nothing of images; ImageNet's preparation was taken in silence."""
    draw("p/a.png", 0)
    MSP().save("d.safetensors")
    score("p")
    told = capsys.readouterr().err
    assert "warning: neither detectors nor model say how images are prepared: short side 256 (bilinear)" in told
    assert "; give --size, --mean, --std" in told
    score("p", options=("--size", "8", "--std", "1,1,1"))
    assert (
        "short side 8 (bilinear), middle 8, mean 0.485,0.456,0.406, std 1,1,1; give --mean\n" in capsys.readouterr().err
    )
    score("p", options=tuple(SIZES))
    MSP().save("d.safetensors", notes={"size": 8, "resize": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    score("p")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "stdin", "message"),
    [
        (["nowhere"], b"", "--data nowhere: no such file or folder"),
        (["*.png"], b"", "no image matches the pattern"),
        (["-"], b"", "got no path on stdin"),
        (["-"], b"train/cls1/0.png\ngone.png\n", "--data -, path 2: gone.png: no such file"),
        (["pipe.png"], b"", "pipe.png: is no regular file"),
        (["link.png"], b"", "link.png: no such file"),
        (["empty"], b"", "no images in empty"),
        ([""], b"", "--data: got an empty path"),
        (["loop.png"], b"", "loop.png: no such file"),
    ],
)
def test_what_cannot_be_scored(data, stdin, message, monkeypatch, capsys):
    assert fit([f"cls{k}" for k in range(C)]) == 0
    os.mkfifo("pipe.png")
    Path("link.png").symlink_to("gone.png")
    Path("loop.png").symlink_to("loop.png")
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    given = ["score", "--detectors", "d.safetensors", "--model", "leveller:build", "--workers", "0", "--out", "s.csv"]
    assert cli.main([*given, "--data", *data]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not Path("s.csv").exists()


def test_bad_ones_that_are_named_are_skipped_on_request():
    assert fit([f"cls{k}" for k in range(C)]) == 0
    os.mkfifo("pipe.png")
    Path("link.png").symlink_to("gone.png")
    Path("text.png").write_text("no image")
    rows = score("pipe.png", "train/cls1/0.png", "link.png", "text.png", options=("--skip-bad",))
    assert [row["path"] for row in rows] == ["train/cls1/0.png"]


ORDERS = {
    "numbers": [str(k) for k in range(C)],
    "cls2 before cls10": [f"cls{k}" for k in range(C)],
    "Zebra after apple": ["apple", *[f"m{k:02d}" for k in range(C - 2)], "Zebra"],
}


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_class_order(names, capsys):
    """The model was trained in the natural order, the names sort otherwise."""
    assert sorted(names) != names
    assert fit(names) == 0
    error = capsys.readouterr().err
    assert f"natural order, {', '.join(names)}: 36 of 36" in error
    assert "accuracy on train: 100.0 %" in error
    assert all(Path(row["path"]).parent.name == row["prediction"] for row in score("train"))


def test_a_model_in_the_order_of_the_names_stays_so(capsys):
    names = sorted(str(k) for k in range(C))  # as torchvision's ImageFolder numbers them
    assert fit(names) == 0
    assert "natural order" not in capsys.readouterr().err
    assert all(Path(row["path"]).parent.name == row["prediction"] for row in score("train"))


def test_another_order_is_refused_until_it_is_given(capsys):
    names = [f"cls{k}" for k in range(C)]
    assert fit(names, model="shuffled") == 2
    error = capsys.readouterr().err
    assert "not in the order of the model's classes" in error
    assert "--classes FILE" in error
    assert not Path("d.safetensors").exists()
    order = [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10]
    Path("classes.txt").write_text("\n".join(names[k] for k in order))
    assert fit(names, "--classes", "classes.txt", model="shuffled") == 0
    assert "accuracy on train: 100.0 %" in capsys.readouterr().err
    Path("few.txt").write_text("\n".join(names[:-1]))
    assert fit(names, "--classes", "few.txt", model="shuffled") == 2
    assert "few.txt: 11 names, but the model has 12 outputs" in capsys.readouterr().err


def test_the_labels_of_the_model_order_the_folders(capsys):
    assert fit([f"cls{k}" for k in range(C)], model="labelled") == 0
    assert "accuracy on train: 100.0 %" in capsys.readouterr().err


def test_names_given_to_score():
    assert fit([f"cls{k}" for k in range(C)]) == 0
    Path("names.json").write_text(str([f"species {k}" for k in range(C)]).replace("'", '"'))
    assert score("train/cls7", options=("--classes", "names.json"))[0]["prediction"] == "species 7"
    Path("names.txt").write_text("a\nb")
    given = ["score", "--detectors", "d.safetensors", "--model", "leveller:build", "--out", "t.csv", "--data", "train"]
    assert cli.main([*given, "--classes", "names.txt"]) == 2


def test_the_orientation_is_remembered():
    assert fit([f"cls{k}" for k in range(C)], "--orientation", "stored") == 0
    from ood_fast.detectors import store

    assert store.notes("d.safetensors")["orientation"] == "stored"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["evalute"], "unknown command 'evalute'; did you mean evaluate?"),
        (["fit", "--workers", "-1"], "--workers: got -1, expected at least 0"),
        (["score", "--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
        (["evaluate", "--seed", "x"], "--seed: got x, expected a whole number of at least 0"),
        (["train", "--save-minutes", "nan"], "--save-minutes: got nan, expected at least 0"),
        (["report", "--batch-size", "1.5"], "--batch-size: got 1.5, expected a whole number of at least 1"),
    ],
)
def test_typos_are_told_before_anything_is_imported(given, message, capsys):
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err


def test_an_image_that_the_model_makes_nan_of_is_named(capsys):
    names = [f"c{k:02d}" for k in range(C)]
    assert fit(names, model="broken") == 2
    assert "image train/c10/0.png: features: got NaN in 6 of" in capsys.readouterr().err
    assert fit(names) == 0
    given = ["--detectors", "d.safetensors", "--model", "leveller:broken", "--other-model", "--workers", "0"]
    assert cli.main(["score", *given, "--data", "train", "--out", "s.csv", "--batch-size", "4"]) == 1
    error = capsys.readouterr().err
    assert "image train/c10/0.png: " in error
    assert "the first is this one" in error
    assert "what was scored before is kept" in error


def test_names_that_are_no_utf8(capsys):
    odd = os.fsdecode(b"c03\xff")
    names = [odd if k == 3 else f"c{k:02d}" for k in range(C)]
    assert fit(names) == 0
    parquet = pytest.importorskip("pyarrow.parquet")
    for table in ("s.parquet", "s.csv"):
        given = ["score", "--detectors", "d.safetensors", "--data", f"train/{odd}", "--out", table, "--workers", "0"]
        given += ["--model", "leveller:build"]
        assert cli.main([*given, "--html", os.fsdecode(b"p\xff.html"), "--overwrite"]) == 0
        assert b"c03\\udcff" in Path(os.fsdecode(b"p\xff.html")).read_bytes()
    assert parquet.read_table("s.parquet")["prediction"].to_pylist() == ["c03\\udcff"] * 3
    assert Path("s.csv").read_bytes().count(b",c03\xff,") == 3
    assert fit(names, "--out", os.fsdecode(b"d\xff.safetensors")) == 2
    assert "expected a path in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--std", "0,0,0"], "--std: got '0,0,0', expected numbers above 0: pixels are from 0 to 1, not to 255"),
        (["--std", "1,inf,1"], "--std: got '1,inf,1', expected numbers above 0"),
        (["--mean", "123.7,116.3,103.5"], "expected numbers up to 1: pixels are from 0 to 1"),
        (["--mean", "nan"], "--mean: got 'nan', expected numbers up to 1"),
        (["--set", "MSP.temperature=1e999"], "temperature: got inf, expected a finite number"),
    ],
)
def test_numbers_that_mean_nothing(given, message, capsys):
    assert fit(["a", "b"], *given) == 2
    assert message in capsys.readouterr().err


def test_what_is_not_as_it_seems_is_told(capsys):
    names = [f"c{k:02d}" for k in range(C)]
    assert fit([*names, "c99"], "--validation", "./train", "--detectors", "MSP") == 0
    error = capsys.readouterr().err
    assert "13 class folders, but the model has 12 outputs: predictions are numbers" in error
    assert "warning: --validation: ./train is what the detectors are fitted on" in error


def test_fit_says_whether_detectors_work(capsys, own_names):
    """A detector that is worth nothing is told beside one that is."""
    Path("useless.py").write_text(
        "import torch\nfrom ood_fast.detectors import MSP, register\n\n"
        "@register\nclass Useless(MSP):\n    def _score(self, features, logits):\n"
        "        return -super()._score(features, logits)\n"
    )
    sys.modules.pop("useless", None)
    names = [f"c{k:02}" for k in range(C)]
    for folder in ("train", "val"):
        for k, name in enumerate(names):
            for index in range(3):
                draw(f"{folder}/{name}/{index}.png", k)
    given = ["fit", *MODEL_OPTIONS, "--model", "leveller:build", "--data", "train", "--validation", "val"]
    assert cli.main([*given, "--detectors", "MSP,Useless", "--plugin", "useless", "--out", "d.safetensors"]) == 0
    lines = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines() if "AUROC" in line}
    assert "do not use, an AUROC is below 60" in lines["Useless"]
    assert "(scrambled)" in lines["MSP"]
    assert "(noise)" in lines["MSP"]
    assert "% of validation" in lines["MSP"]


def test_a_score_that_is_nan_comes_first():
    rows = [f"{name},0,{score},False" for name, score in (("b", 2.0), ("x", "nan"), ("c", 3.0), ("a", 1.0))]
    Path("s.csv").write_text("\n".join(["path,prediction,score,is_ood", *rows]))
    gallery.write(Path("s.html"), Path("s.csv"), None, "")
    page = Path("s.html").read_text()
    assert re.findall("<td>([abcx])</td>", page) == ["x", "a", "b", "c"]
    assert "<li>Out-of-distribution: 0 of 4 (0.0 %)</li>" in page


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_page_sorted_by_score(suffix, capsys):
    names = [f"c{k:02}" for k in range(C)]
    for k, name in enumerate(names):
        for index in range(2):
            draw(f"train/{name}/{index}.png", k)
    assert fit(names) == 0
    draw("photos/<script>alert(1)&.png", 3)
    draw("photos/plain.png", 7)
    given = ["score", "--detectors", "d.safetensors", "--model", "leveller:build", "--data", "photos", "--workers", "0"]
    assert cli.main([*given, "--out", f"s{suffix}", "--html", "s.html"]) == 0, capsys.readouterr().err
    page = Path("s.html").read_text()
    assert "Out-of-distribution" not in page, "there is no threshold"
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&amp;.png" in page
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert "img-src data:;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert cli.main([*given, "--out", f"t{suffix}", "--html", "s.html"]) == 2, "--overwrite replaces it"
    assert cli.main([*given, "--out", f"t{suffix}", "--html", "s.csv"]) == 2
