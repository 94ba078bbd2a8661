"""What `fit` and `score` must not do: run code that files or folders bring, take weights and classes for granted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ood_fast import cli, detectors, models
from ood_fast.detectors import MSP, store

N_CLASSES = 5
MODEL = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, order=range({N_CLASSES})):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, {N_CLASSES})
        level = torch.tensor([float(k) for k in order]) / {N_CLASSES - 1}
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.weight[:, 0] = 160 * level
            self.fc.bias.copy_(-80 * level**2)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))

def build(): return Net()
def shuffled(): return Net([3, 0, 4, 1, 2])
def random(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, {N_CLASSES}))
def constant(): return Net([0] * {N_CLASSES})
"""
OPTIONS = ["--size", "8", "--resize", "8", "--mean", "0,0,0", "--std", "1,1,1", "--workers", "0", "--device", "cpu"]
PACKAGES = ("safetensors", "torchvision", "pyarrow", "PIL", "timm", "torch", "numpy", "rich", "sklearn")


@pytest.fixture(autouse=True)
def folder(folder_with) -> Path:
    payload = "def go():\n    open('RAN', 'w').close()\n"
    place = folder_with(ownmodel=MODEL, payload=payload)
    draw("train", [f"class{k}" for k in range(N_CLASSES)])
    return place


def draw(root: str, names: list[str], n_images: int = 8) -> None:
    """Class k has the red level k / (c - 1)."""
    random = np.random.default_rng(0)
    for k, name in enumerate(names):
        (Path(root) / name).mkdir(parents=True)
        for index in range(n_images):
            pixels = random.integers(0, 255, (8, 8, 3)).astype(np.uint8)
            pixels[..., 0] = 255 * k // (N_CLASSES - 1)
            Image.fromarray(pixels).save(Path(root) / name / f"{index}.png")


def fit(*arguments: str, model: str = "ownmodel:build") -> int:
    given = ["fit", "--data", "train", "--detectors", "NCI", "--out", "d.safetensors", "--model", model, *OPTIONS]
    return cli.main([*given, *arguments])


def score(*arguments: str) -> int:
    given = ["score", "--detectors", "d.safetensors", "--data", "train", "--out", "s.csv", "--workers", "0"]
    return cli.main([*given, "--device", "cpu", "--overwrite", *arguments])


# ---- code


@pytest.mark.parametrize("named", ["payload:go", "os:abort", "builtins:exit", "timm.x:y", ":", "a:b:c"])
def test_code_that_a_file_names_is_shown_and_not_run(named, capsys):
    MSP().save("d.safetensors", notes={"model": named, "size": 8, "resize": 8})
    assert score() == 2
    error = capsys.readouterr().err
    assert f"--model {named}" in error
    assert "not run because a file names it" in error
    assert not Path("RAN").exists()


def test_code_that_a_file_names_runs_when_the_command_line_says_the_same(capsys):
    assert fit() == 0
    assert score() == 2
    assert score("--model", "ownmodel:build") == 0


@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("command", ["info", "fit", "score", "train", "evaluate", "compare", "report"])
def test_modules_beside_the_data_do_not_run(module, command, tmp_path):
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in PACKAGES:
        (hostile / f"{name}.py").write_text(f"open('RAN-{name}', 'w').close()\nraise ImportError('{name}')\n")
    features = {"features": np.random.default_rng(0).normal(size=(60, 6)), "W": np.ones((3, 6))}
    np.savez(hostile / "train.npz", **{name: value.astype(np.float32) for name, value in features.items()})
    MSP().save(hostile / "d.safetensors")
    arguments = {
        "info": [],
        "fit": ["--features", "train.npz", "--detectors", "NCI", "--out", "x.safetensors"],
        "score": ["--detectors", "d.safetensors", "--features", "train.npz", "--out", "s.csv"],
        "train": ["--recipe", "digits-ce", "--show"],
        "evaluate": ["nowhere"],
        "compare": ["--epochs", "x"],
        "report": ["nowhere"],
    }[command]
    program = [sys.executable, "-m", "ood_fast"] if module else [str(Path(sys.executable).parent / "ood-fast")]
    if not module and not Path(program[0]).exists():
        pytest.skip("the console script is not beside this Python")
    # As a user has it: without a path of its own for packages, which may name the current folder.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*program, command, *arguments], cwd=hostile, capture_output=True, env=environment, check=False)
    assert not list(hostile.glob("RAN-*"))


def test_a_plugin_is_found_behind_the_packages(capsys):
    Path("json.py").write_text("open('RAN', 'w').close()\n")
    Path("ownplugin.py").write_text("import json\nopen('IMPORTED', 'w').close()\n")
    sys.modules.pop("ownplugin", None)
    assert fit("--plugin", "ownplugin") == 0
    assert Path("IMPORTED").exists()
    assert not Path("RAN").exists()


# ---- weights


@pytest.mark.parametrize("model", ["resnet18_32x32", "small_cnn", "timm:test_resnet"])
def test_weights_drawn_at_random_are_refused(model, capsys):
    assert fit("--n-classes", str(N_CLASSES), model=model) == 2
    assert "got no weights" in capsys.readouterr().err
    assert not Path("d.safetensors").exists()


def test_two_sources_of_weights_are_refused(capsys):
    assert fit("--pretrained", "--checkpoint", "w.pth", model="resnet18") == 2
    assert "--checkpoint, --pretrained: expected one of them" in capsys.readouterr().err


def test_another_models_weights_are_refused_unless_told(capsys):
    def save(scale: float) -> None:
        model = models.create("small_cnn", N_CLASSES, in_channels=3)
        with torch.no_grad():
            model.fc.bias.zero_().add_(torch.arange(N_CLASSES) * scale)
        torch.save(model.state_dict(), "w.pth")

    torch.manual_seed(0)
    Path("flat").mkdir()
    for file in Path("train/class0").iterdir():
        file.rename(Path("flat") / file.name)
    save(0.1)
    three = ["--model", "own3:build", "--checkpoint", "w.pth"]
    Path("own3.py").write_text(
        f"from ood_fast import models\ndef build(): return models.create('small_cnn', {N_CLASSES}, in_channels=3)\n"
    )
    sys.modules.pop("own3", None)
    assert fit("--data", "flat", *three) == 0
    assert score(*three) == 0
    save(0.2)  # one number of the bias
    assert score(*three) == 2
    assert "its weights are not those that the detectors were fitted on" in capsys.readouterr().err
    assert score(*three, "--other-model") == 0


def test_a_model_that_draws_its_weights_anew_is_refused(capsys):
    Path("flat").mkdir()
    for file in Path("train/class0").iterdir():
        file.rename(Path("flat") / file.name)
    assert fit("--data", "flat", model="ownmodel:random") == 0
    assert score("--model", "ownmodel:random") == 2
    assert "its weights are not those" in capsys.readouterr().err


def test_the_fingerprint_is_of_weights_buffers_and_head_not_of_wrappers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    of = models.weight_fingerprint(model, model[2])
    assert of == models.weight_fingerprint(model, model[2])
    assert of == models.weight_fingerprint(nn.DataParallel(model), model[2])
    assert of != models.weight_fingerprint(model, model[0])
    model[1].running_mean[0] = 1e-3
    assert of != models.weight_fingerprint(model, model[2])


# ---- classes and images


def test_accuracy_is_told(capsys):
    assert fit() == 0
    assert "accuracy on train: 100.0 %" in capsys.readouterr().err


def test_folders_in_another_order_than_the_classes_are_refused_with_both_orders(capsys):
    assert fit(model="ownmodel:shuffled") == 2
    error = capsys.readouterr().err
    assert "not in the order of the model's classes" in error
    assert "class0, class1, class2, class3, class4" in error
    assert "class0 -> 1, class1 -> 3, class2 -> 4, class3 -> 0, class4 -> 2" in error
    assert not Path("d.safetensors").exists()


def test_accuracy_at_chance_level_names_the_causes(capsys):
    assert fit(model="ownmodel:constant") == 2
    error = capsys.readouterr().err
    assert "no better than chance (20.0 %)" in error
    assert "--mean, --std" in error
    assert fit("--any-accuracy", model="ownmodel:constant") == 0


def test_folders_of_other_classes_are_refused_before_the_pass(capsys):
    Path("ownmodel.py").write_text(
        MODEL + "\ndef wider():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 7))\n"
        "    net[1].weight.data.zero_()\n    net[1].bias.data = torch.arange(7.0)\n    return net\n"
    )
    assert fit(model="ownmodel:wider") == 2
    error = capsys.readouterr().err
    assert "5 class folders, but the model has 7 outputs" in error
    assert "no better than chance" in error
    assert "fitting on" not in error


def test_a_modest_model_is_no_error():
    """Two of five classes right, the others all taken for one of them: not an order, and better than chance."""
    Path("ownmodel.py").write_text(MODEL + "\ndef modest(): return Net([0, 1, 1.01, 1.02, 1.03])\n")
    assert fit(model="ownmodel:modest") == 0


@pytest.mark.parametrize("mean", ["0.5", "0,0,0"])
def test_grey_images_for_one_mean(mean, capsys):
    Path("grey.py").write_text(
        "import torch.nn as nn\n"
        "def build(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))"
    )
    sys.modules.pop("grey", None)
    Path("flat").mkdir()
    for file in Path("train/class0").iterdir():
        file.rename(Path("flat") / file.name)
    std = "1" if mean == "0.5" else "1,1,1"
    code = fit("--data", "flat", "--mean", mean, "--std", std, model="grey:build")
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if mean == "0.5":
        assert code == 0
        assert detectors.load("d.safetensors")["NCI"].fitted
    else:
        assert code == 1
        assert "the model cannot take images of (3, 8, 8)" in error


def test_a_timm_model_says_how_its_images_are_prepared(capsys):
    timm = pytest.importorskip("timm")
    name = "swinv2_tiny_window8_256"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=2).state_dict(), "w.pth")
    Path("flat").mkdir()
    for file in list(Path("train/class0").iterdir())[:1]:
        file.rename(Path("flat") / file.name)
    given = ["fit", "--data", "flat", "--detectors", "NCI", "--out", "d.safetensors", "--workers", "0"]
    assert cli.main([*given, "--model", "timm:test_vit", "--checkpoint", "w.pth", "--device", "cpu"]) == 0
    config = timm.get_pretrained_cfg("test_vit")
    notes = store.notes("d.safetensors")
    assert notes["size"] == config.input_size[-1]
    assert tuple(notes["mean"]) == tuple(config.mean)
    assert notes["interpolation"] == config.interpolation
    assert f"middle {config.input_size[-1]}" in capsys.readouterr().err
    assert timm.get_pretrained_cfg(name).input_size[-1] == 256


# ---- requests that were refused for no reason


def test_validation_data_may_lie_below_a_folder_called_test():
    draw("test/val", ["a", "b"])
    draw("test/oodval", ["x"])
    arguments = ["--validation", "test/val", "--ood-validation", "test/oodval", "--tune"]
    assert fit(*arguments) == 0


# ---- code that was named here before


def on_the_path(monkeypatch, folder: str) -> None:
    """As PYTHONPATH has it: found without the current folder."""
    Path(folder).mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "path", [str(Path(folder).resolve()), *sys.path])
    Path("ownmodel.py").rename(Path(folder) / "ownmodel.py")


def test_code_that_this_user_has_named_before_may_be_named_by_a_file(monkeypatch, capsys):
    on_the_path(monkeypatch, "lib")
    assert fit() == 0
    assert score() == 0
    assert "--model ownmodel:build, which was named here before" in capsys.readouterr().err
    MSP().save("d.safetensors", notes={"model": "ownmodel:shuffled", "size": 8, "resize": 8})
    assert score() == 2, "another callable of the same module was not named"


@pytest.mark.parametrize("change", ["content", "place", "state"])
def test_other_code_of_that_name_does_not_run(change, monkeypatch, tmp_path, capsys):
    on_the_path(monkeypatch, "lib")
    assert fit() == 0
    hostile = "open('RAN', 'w').close()\n" + MODEL
    sys.modules.pop("ownmodel", None)
    if change == "content":
        Path("lib/ownmodel.py").write_text(hostile)
    elif change == "place":
        Path("other").mkdir()
        Path("other/ownmodel.py").write_text(hostile)
        monkeypatch.setattr(sys, "path", [str(tmp_path / "other"), *sys.path[1:]])
    else:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nothing"))
    assert score() == 2
    assert "not run because a file names it" in capsys.readouterr().err
    assert not Path("RAN").exists()


def test_where_nothing_can_be_kept_nothing_is(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    on_the_path(monkeypatch, "lib")
    assert fit() == 0
    assert score() == 2
