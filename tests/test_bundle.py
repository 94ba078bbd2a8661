"""`save_bundle` and `load_bundle`: the same scores afterwards, and nothing but what was saved passes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import registered, without_norms
from torch import nn

import ood_fast
from ood_fast import files, models
from ood_fast.detectors import MSP, DetectorSet

PREPARED = {"size": 16, "resize": [18, 20], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
NAMES = ["model.safetensors", "detectors.safetensors", "bundle.json", "README.md"]


@pytest.fixture
def model() -> nn.Module:
    return without_norms(3, 3, None).eval()


@pytest.fixture
def detectors(model) -> DetectorSet:
    return fitted(model)


def fitted(model: nn.Module) -> DetectorSet:
    x = torch.randn(30, 3, 16, 16)
    made = DetectorSet(["MSP", "NCI"]).fit(model, [(x, torch.arange(30) % 3)])
    for name, scores in made.score(model, x).items():
        made[name].calibrate(scores)
    return made


def test_saved_and_loaded(model, detectors, tmp_path):
    x = torch.randn(5, 3, 16, 16)
    folder = tmp_path / "new" / "flowers"
    classes = ("a", "b", "c")
    with registered():
        given = {"architecture": "tiny", "classes": classes, "card": "Of *three*."}
        ood_fast.save_bundle(folder, model, detectors, PREPARED, **given)
        bundles = [ood_fast.load_bundle(folder), ood_fast.load_bundle(folder, "tiny")]
    bundles.append(ood_fast.load_bundle(folder, without_norms(3, 3, None).train()))
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    expected = ood_fast.deploy(model, detectors)(x)
    for bundle in bundles:
        assert not bundle.model.training
        assert bundle.classes == bundle.detectors["NCI"].class_names == classes
        assert bundle.preparation == PREPARED
        for one, other in zip(bundle.deploy()(x), expected, strict=True):
            assert torch.equal(one, other)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: ood_fast\n")
    assert "# flowers\n\nOf *three*." in card
    assert 'ood_fast.load_bundle("flowers")' in card
    assert f"| MSP | `MSP(temperature=1.0)` | {float(detectors['MSP'].threshold):.6g} |" in card


def test_images_are_prepared_as_it_says(model, detectors, tmp_path):
    transforms = pytest.importorskip("torchvision").transforms
    from PIL import Image

    ood_fast.save_bundle(tmp_path, model, detectors["MSP"], PREPARED)
    bundle = ood_fast.load_bundle(tmp_path, model)
    assert isinstance(bundle.detectors, MSP)
    assert bundle.classes is None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    by_hand = transforms.CenterCrop(16)(transforms.Resize((18, 20))(image))
    by_hand = transforms.Normalize(PREPARED["mean"], PREPARED["std"])(transforms.ToTensor()(by_hand))
    assert torch.equal(bundle.transform()(image), by_hand)


def test_what_was_there_is_replaced_and_the_rest_stays(model, detectors, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ood_fast.save_bundle(tmp_path, model, detectors, PREPARED)
    with torch.no_grad():
        model[0].bias.add_(1)
    ood_fast.save_bundle(tmp_path, nn.DataParallel(model), fitted(model), PREPARED)
    loaded = ood_fast.load_bundle(tmp_path, without_norms(3, 3, None))
    assert torch.equal(loaded.model[0].bias, model[0].bias)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "notes.txt"])


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_what_is_no_bundle_is_not_replaced(model, detectors, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}: is there, and no bundle"):
        ood_fast.save_bundle(tmp_path, model, detectors, PREPARED)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_save_leaves_the_old_one(model, detectors, tmp_path, monkeypatch):
    ood_fast.save_bundle(tmp_path, model, detectors, PREPARED)
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}

    def full(path: Path, text: str) -> None:
        raise OSError("full")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_text", full)
        with pytest.raises(OSError, match="full"):
            ood_fast.save_bundle(tmp_path, model, fitted(model), PREPARED)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damage_and_mixtures_are_refused(model, detectors, tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    ood_fast.save_bundle(whole, model, detectors, PREPARED)
    another = without_norms(3, 3, None)
    ood_fast.save_bundle(other, another, fitted(another)["MSP"], PREPARED)
    for name in NAMES[:2]:
        shutil.copytree(whole, mixed := tmp_path / f"mixed {name}")
        shutil.copy(other / name, mixed / name)
        with pytest.raises(ValueError, match=f"{name}: is damaged, or of another bundle"):
            ood_fast.load_bundle(mixed, model)
        (mixed / name).unlink()
        with pytest.raises(OSError, match=name):
            ood_fast.load_bundle(mixed, model)
    about = json.loads((whole / "bundle.json").read_text())
    edited = about["preparation"] | {"mean": [0.4, 0.5, 0.5]}
    changes = [("format", "other"), ("sha256", "x"), ("preparation", {"size": 3}), ("classes", 7)]
    for key, value in [*changes, ("preparation", edited), ("classes", list("abc"))]:
        (whole / "bundle.json").write_text(json.dumps(about | {key: value}))
        with pytest.raises(ValueError, match="whole"):
            ood_fast.load_bundle(whole, model)
    older = {key: value for key, value in about.items() if key != "crc32"}
    (whole / "bundle.json").write_text(json.dumps(older))
    assert ood_fast.load_bundle(whole, model).preparation == about["preparation"]
    for text in ("{", "[]", "7"):
        (whole / "bundle.json").write_text(text)
        with pytest.raises(ValueError, match=r"bundle\.json"):
            ood_fast.load_bundle(whole, model)


def test_a_name_that_makes_another_model_of_the_weights_is_refused(tmp_path):
    options = [{"activation": "leaky_relu"}, {"head": partial(ood_fast.L2NormLinear, tau=0.1)}, {}]
    for chosen in options:
        model = models.create("small_cnn", 3, **chosen).train()
        save = partial(ood_fast.save_bundle, tmp_path, model, fitted(model), PREPARED)
        if chosen:
            with pytest.raises(ValueError, match="architecture: 'small_cnn' makes other logits"):
                save(architecture="small_cnn")
            assert not list(tmp_path.iterdir())
        else:
            save(architecture="small_cnn")
            assert model.training


def test_a_preparation_of_tensors_is_kept_as_numbers(model, detectors, tmp_path):
    arrays = {
        "size": np.int64(16),
        "mean": torch.tensor(PREPARED["mean"], dtype=torch.float64),
        "std": np.array(PREPARED["std"]),
    }
    ood_fast.save_bundle(tmp_path, model, detectors, PREPARED | arrays)
    assert ood_fast.load_bundle(tmp_path, model).preparation == PREPARED


def test_refuses(model, detectors, tmp_path):
    with pytest.raises(ValueError, match="preparation: got no mean, std"):
        ood_fast.save_bundle(tmp_path / "x", model, detectors, {"size": 3, "resize": 3})
    for wrong in ({"size": "16"}, {"resize": None}, {"mean": [0.5]}, {"mean": [float("nan")] * 3}, {"std": [0, 1, 1]}):
        with pytest.raises(ValueError, match=r"preparation: got .*, expected a size, resize"):
            ood_fast.save_bundle(tmp_path / "x", model, detectors, PREPARED | wrong)
    with pytest.raises(ValueError, match="preparation: interpolation: got 'cubic'"):
        ood_fast.save_bundle(tmp_path / "x", model, detectors, PREPARED | {"interpolation": "cubic"})
    with pytest.raises(TypeError, match="detectors: got list"):
        ood_fast.save_bundle(tmp_path / "x", model, [MSP()], PREPARED)
    with pytest.raises(RuntimeError, match="NCI is not fitted"):
        ood_fast.save_bundle(tmp_path / "x", model, DetectorSet(["NCI"]), PREPARED)
    with pytest.raises(ValueError, match="classes: got 2 names, expected 3"):
        ood_fast.save_bundle(tmp_path / "x", model, detectors["MSP"], PREPARED, classes=("a", "b"))
    assert not list(tmp_path.iterdir())
    ood_fast.save_bundle(tmp_path, model, detectors, PREPARED)
    with pytest.raises(ValueError, match="the bundle names no architecture"):
        ood_fast.load_bundle(tmp_path)
    with pytest.raises(ValueError, match="does not fit Sequential"):
        ood_fast.load_bundle(tmp_path, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="unknown model 'os:system'"):
        ood_fast.load_bundle(tmp_path, "os:system")
