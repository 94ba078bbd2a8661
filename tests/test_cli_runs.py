"""`fit` and `score` with a run that `train` made: its model, and its images as it had them."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ood_fast import checks, cli
from ood_fast.commands.model import OF_IMAGES, load_model
from ood_fast.detectors import store

PLUGIN = """
import ood_fast
from torch import nn

@ood_fast.register("model")
def two_layers(n_classes, in_channels, image_size):
    n_pixels = in_channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(n_pixels, 8), nn.ReLU(), nn.Linear(8, n_classes))
"""
FIT = [
    "fit",
    "--plugin",
    "ownplugin",
    "--data",
    "data/train",
    "--detectors",
    "NCI",
    "--workers",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def trained(tmp_path, monkeypatch, own_names) -> None:
    """A run of an own model on 12-pixel images, in runs/q/s0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "ownplugin", raising=False)
    Path("ownplugin.py").write_text(PLUGIN)
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for level, name in enumerate("ab"):
            (folder := Path("data") / part / name).mkdir(parents=True)
            for index in range(10):
                pixels = (random.random((14, 14, 3)) * 60 + 180 * level).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{index}.png")
    settings = ["model=two_layers", "epochs=2", "batch_size=4", "lr=0.01"]
    given = ["train", "--recipe", "folder-ce", "--data-root", "data", "--image-size", "12", "--plugin", "ownplugin"]
    given += [part for setting in settings for part in ("--set", setting)]
    assert cli.main([*given, "--out", "runs/q/s0", "--workers", "0", "--device", "cpu", "--quiet"]) == 0


def test_a_run_is_a_model_with_its_own_preparation(capsys, monkeypatch):
    assert cli.main([*FIT, "--model", "runs/q/s0", "--out", "d.safetensors"]) == 0
    notes = store.notes("d.safetensors")
    assert (notes["size"], notes["resize"], notes["model"]) == (12, 12, "runs/q/s0")
    given = ["--detectors", "d.safetensors", "--data", "data/test", "--out", "s.csv", "--workers", "0"]
    assert cli.main(["score", *given, "--plugin", "ownplugin"]) == 0
    assert len(Path("s.csv").read_text().splitlines()) == 21
    for more in (["--checkpoint", "runs/q/s0/best.ckpt"], ["--pretrained"], ["--n-classes", "2"]):
        assert cli.main([*FIT, "--model", "runs/q/s0", *more, "--out", "e.safetensors"]) == 2
        assert f"{more[0]}: runs/q/s0 is a run" in capsys.readouterr().err
    assert cli.main([*FIT, "--model", "runs/q", "--out", "e.safetensors"]) == 2
    assert "holds the runs s0, expected one: runs/q/s0" in capsys.readouterr().err
    assert cli.main([*FIT, "--model", "runs/q/s0/s1", "--out", "e.safetensors"]) == 2
    assert "--model runs/q/s0/s1: no such folder, expected the run runs/q/s0" in capsys.readouterr().err

    monkeypatch.chdir("runs/q/s0")  # where other names than those of runs hold as anywhere
    Path("own.py").write_text("from torch import nn\ndef build(): return nn.Linear(1, 10)\n")
    for name, said in (("resnet18", "got no weights"), ("own:build", None)):
        with pytest.raises(checks.UserError, match=said) if said else nullcontext():
            load_model(argparse.Namespace(**dict.fromkeys(OF_IMAGES) | {"model": name}), 10, "cpu")


def test_a_checkpoint_of_a_run_has_the_preparation_of_the_run():
    given = [*FIT, "--model", "two_layers", "--checkpoint", "runs/q/s0/best.ckpt", "--size", "12"]
    assert cli.main([*given, "--out", "d.safetensors"]) == 0
    assert store.notes("d.safetensors")["size"] == 12


def test_a_run_that_does_not_say_how_images_were_prepared(capsys):
    place = Path("runs/q/s0/run.json")
    info = json.loads(place.read_text())
    del info["prepared"]
    place.write_text(json.dumps(info))
    given = [*FIT, "--model", "runs/q/s0", "--out", "d.safetensors"]
    assert cli.main(given) == 2
    assert "does not say how images were prepared; pass --size, --mean, --std" in capsys.readouterr().err
    assert cli.main([*given, "--size", "12", "--mean", "0,0,0", "--std", "1,1,1"]) == 0
