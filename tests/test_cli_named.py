"""Models, classes and images as all commands name them: `hf:`, `timm:`, torchvision's, own code; orders; truncation."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ood_fast import checks, cli, evaluation, models, registry
from ood_fast.data import open_benchmark
from ood_fast.detectors import store
from ood_fast.models.hugging_face import of_processor

QUICK = ["--workers", "0", "--device", "cpu"]
PLAIN = ["--size", "8", "--resize", "8", "--mean", "0,0,0", "--std", "1,1,1"]
ORDERS = {"numbers": [str(k) for k in range(12)], "suffixes": [f"cls{k}" for k in range(1, 13)]}
ORDERS["cases"] = ["apple", "Banana", "cherry", "Date", "elder", "Fig"]  # as timm sorts; by name capitals come first
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, len(order))
        level = torch.tensor([float(k) for k in order]) / (len(order) - 1)
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.weight[:, 0] = 400 * level
            self.fc.bias.copy_(-200 * level**2)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))

def twelve(): return Net(range(12))
def six(): return Net(range(6))
def turned(): return Net([11 - k for k in range(12)])
def trainable():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
"""


@pytest.fixture(autouse=True)
def folder(folder_with, monkeypatch) -> Path:
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    return folder_with(namedmodel=MODEL)


def draw(root: str, names: list[str], n_images: int = 5, size: int = 8) -> None:
    """Class k has the red level k / (c - 1)."""
    random = np.random.default_rng(0)
    for k, name in enumerate(names):
        (Path(root) / name).mkdir(parents=True)
        for index in range(n_images):
            pixels = random.integers(0, 255, (size, size, 3)).astype(np.uint8)
            pixels[..., 0] = 255 * k // (len(names) - 1)
            Image.fromarray(pixels).save(Path(root) / name / f"{index}.png")


def own_benchmark(names: list[str], size: int = 8) -> None:
    draw("data/train", names, size=size)
    draw("data/test", names, size=size)
    draw("data/ood/far", ["x", "y"], size=size)


def checkpoint(model: str) -> None:
    sys.path.insert(0, str(Path.cwd()))  # a finder of "." would stay with the folder of an earlier test
    import namedmodel

    torch.save(getattr(namedmodel, model)().state_dict(), "w.pth")
    sys.path.pop(0)


def evaluate(*arguments: str, model: str = "namedmodel:twelve") -> int:
    given = ["evaluate", "w.pth", "--benchmark", "folder", "--data-root", "data", "--model", model, "--bootstrap", "0"]
    return cli.main([*given, "--detectors", "MSP", "--no-tune", *PLAIN, *QUICK, "--overwrite", *arguments])


def accuracy(folder: str = "eval/folder") -> float:
    held = json.loads(Path(folder, "results.json").read_text())["runs"][0]
    return held["accuracy"]["value"] if isinstance(held.get("accuracy"), dict) else held["accuracy"]


def test_copies_of_the_test_images_in_an_ood_folder_are_told():
    own_benchmark(list("abcdef"))
    checkpoint("six")
    for index, image in enumerate(Path("data/test").rglob("*.png")):
        Path("copies").mkdir(exist_ok=True)
        shutil.copy(image, f"copies/{97 * index % 30}.png")
    with pytest.warns(UserWarning, match=r"100 % of its images are among those of .*, expected other data"):
        assert evaluate("--ood-folder", "copies=copies", "--any-accuracy", model="namedmodel:six") == 0


# ---- the order of the classes


@pytest.mark.parametrize("kind", ORDERS)
def test_evaluate_takes_the_order_that_the_predictions_say(kind, capsys):
    names = ORDERS[kind]
    own_benchmark(names)
    model = "twelve" if len(names) == 12 else "six"
    checkpoint(model)
    assert evaluate(model=f"namedmodel:{model}") == 0
    output = capsys.readouterr()
    assert "classes in their natural order" in output.err
    assert "100.0" in output.out


def test_evaluate_refuses_another_order_and_shows_both(capsys):
    own_benchmark([f"{chr(97 + k)}" for k in range(12)])
    checkpoint("turned")
    assert evaluate(model="namedmodel:turned") == 2
    error = capsys.readouterr().err
    assert "not in the order of the model's classes" in error
    assert "a -> 11, b -> 10" in error
    assert not Path("eval").exists()
    Path("names.txt").write_text("\n".join(chr(97 + k) for k in reversed(range(12))))
    assert evaluate("--classes", "names.txt", model="namedmodel:turned") == 0


def test_evaluate_refuses_an_accuracy_at_chance_level_unless_told(capsys):
    own_benchmark([f"c{k:02d}" for k in range(12)])
    checkpoint("twelve")
    torch.save({name: 0 * value for name, value in torch.load("w.pth").items()}, "w.pth")
    assert evaluate() == 2
    error = capsys.readouterr().err
    assert "no better than chance (8.3 %); usual causes" in error
    assert not Path("eval").exists()
    assert evaluate("--any-accuracy") == 0
    assert "no better than chance" in Path("eval/folder/results.json").read_text()


def test_train_keeps_the_order_and_evaluate_takes_it(capsys):
    names = ["b", "a", "c"]
    own_benchmark(names)
    Path("names.json").write_text(json.dumps(names))
    given = ["train", "--recipe", "folder-ce", "--data-root", "data", "--image-size", "8", "--out", "run", *QUICK]
    settings = ["--model", "namedmodel:trainable", "--set", "small_images=false", "--set", "epochs=1"]
    assert cli.main([*given, "--classes", "names.json", *settings, "--quiet"]) == 0, capsys.readouterr().err
    assert json.loads(Path("run/run.json").read_text())["class_names"] == names
    told = ["evaluate", "run", "--detectors", "MSP", "--no-tune", "--bootstrap", "0", "--quiet", *QUICK]
    assert cli.main(told) == 2, "the run names code, and the current folder is looked in on request only"
    assert (
        "run names the model namedmodel:trainable; code is not run because a file names it" in capsys.readouterr().err
    )
    assert cli.main([*told, "--model", "namedmodel:trainable"]) == 0, capsys.readouterr().err


def test_a_recipe_file_names_no_code(capsys):
    own_benchmark(["a", "b", "c"])
    Path("recipe.json").write_text(json.dumps({"base": "folder-ce", "model": "namedmodel:trainable"}))
    given = ["train", "--recipe", "recipe.json", "--data-root", "data", "--image-size", "8", "--out", "run", *QUICK]
    assert cli.main(given) == 2
    assert "code is not run because a file names it" in capsys.readouterr().err
    assert "namedmodel" not in sys.modules


# ---- models by name


@pytest.fixture
def vit(folder) -> str:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "b", 1: "a", 2: "c"}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, id2label=labels, label2id=labels)
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    processor = transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=(0.5,) * 3, image_std=(0.25,) * 3, resample=3
    )
    processor.save_pretrained("vit")
    return "hf:vit"


def test_a_folder_of_transformers_in_fit_and_score(vit, capsys):
    draw("train", ["a", "b", "c"], n_images=2, size=20)
    given = ["fit", "--data", "train", "--model", vit, "--detectors", "NCI", "--out", "d.safetensors", *QUICK]
    assert cli.main(given) == 0, capsys.readouterr().err
    notes = store.notes("d.safetensors")
    assert (notes["size"], notes["resize"], notes["interpolation"]) == (16, [16, 16], "bicubic")
    assert (notes["mean"], notes["std"]) == ([0.5] * 3, [0.25] * 3)
    assert "images: 16×16 (bicubic), middle 16, mean 0.5,0.5,0.5" in capsys.readouterr().err
    told = ["score", "--detectors", "d.safetensors", "--data", "train", "--out", "s.csv", *QUICK, "--quiet"]
    assert cli.main(told) == 0
    assert len(Path("s.csv").read_text().splitlines()) == 7


def test_its_labels_and_preparation_in_evaluate(vit, capsys):
    own_benchmark(["a", "b", "c"], size=20)
    model = models.create(vit, None, pretrained=True)
    torch.save(model.model.state_dict(), "w.pth")  # as transformers has it: without a prefix
    given = ["evaluate", "w.pth", "--benchmark", "folder", "--data-root", "data", "--image-size", "16", "--model", vit]
    assert cli.main([*given, "--detectors", "MSP", "--no-tune", "--bootstrap", "0", *QUICK]) == 0
    assert "images: 16×16 (bicubic), middle 16" in capsys.readouterr().err


def test_transformers_models_as_modules(vit):
    model = models.create(vit, None, pretrained=True)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    other = models.create(vit, 5, pretrained=True)
    assert other(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert torch.equal(other.model.vit.layernorm.weight, model.model.vit.layernorm.weight)
    fresh = models.create(vit, 4)
    assert fresh(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    with pytest.raises(checks.UserError, match="hf:nowhere/at/all"):
        models.create("hf:nowhere/at/all", None, pretrained=True)


def test_published_weights_of_other_classes_are_not_evaluated(vit):
    """Their head would be one that nobody has trained."""
    assert evaluation.open_run(f"pretrained:{vit}", 3, (3, 16, 16)).model is not None
    with pytest.raises(checks.UserError, match=r"the published weights have 3 classes, the benchmark 5"):
        evaluation.open_run(f"pretrained:{vit}", 5, (3, 16, 16))


def test_weights_without_a_head_are_refused(vit):
    from transformers import ViTModel

    ViTModel.from_pretrained("vit").save_pretrained("vit")
    with pytest.raises(checks.UserError, match="lack classifier"):
        models.create(vit, None, pretrained=True)


def test_code_in_a_folder_of_transformers_is_not_run(vit):
    config = json.loads(Path("vit/config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.M"},
    }
    Path("vit/config.json").write_text(json.dumps(config))
    Path("vit/own.py").write_text("open('RAN', 'w').close()\n")
    with pytest.raises(checks.UserError, match="hf:vit"):
        models.create(vit, None, pretrained=True)
    assert not Path("RAN").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (256, 224)),  # ConvNeXt
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, ((384, 384), 384)),
        ({"size": {"height": 224, "width": 224}}, ((224, 224), 224)),  # ViT
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            (256, 224),
        ),
        ({"size": {"height": 346, "width": 346}, "do_center_crop": True, "crop_size": 289}, ((346, 346), 289)),
    ],
)
def test_sizes_of_processors(settings, expected):
    found = of_processor({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings})
    assert (found["resize"], found["size"]) == expected


def test_pixels_of_processors_are_those_of_ours():
    transformers = pytest.importorskip("transformers")
    processor = transformers.EfficientNetImageProcessor(size={"height": 12, "width": 12}, do_center_crop=False)
    processor.rescale_offset, processor.rescale_factor = True, 1 / 127.5
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    from ood_fast.data.images import preparation

    told = of_processor(processor.to_dict())
    ours = preparation(*(told[name] for name in ("resize", "size", "mean", "std", "interpolation")))(image)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["LevitImageProcessor", "MobileViTImageProcessor", "Siglip2ImageProcessor"])
def test_processors_that_do_more_are_refused(vit, kind):
    """Of LeViT it scales by 256/224 more, of MobileViT it exchanges red and blue, of SigLIP 2 nothing says the size."""
    import transformers

    getattr(transformers, kind)().save_pretrained("vit")
    with pytest.raises(checks.UserError, match=f"hf:vit: its {kind}.* prepares images as no size"):
        models.create(vit, None, pretrained=True)


def test_grey_images_have_one_channel(capsys):
    """Also when `score` takes the preparation from the file."""
    draw("train", ["a", "b"])
    models.save_checkpoint(models.create("small_cnn", 2, in_channels=1), "net.safetensors")
    given = [
        "fit",
        "--model",
        "small_cnn",
        "--checkpoint",
        "net.safetensors",
        "--data",
        "train",
        "--any-accuracy",
        *QUICK,
    ]
    grey = ["--size", "8", "--mean", "0.5", "--std", "0.5", "--detectors", "MSP", "--out", "d.safetensors"]
    assert cli.main([*given, *grey]) == 0, capsys.readouterr().err
    assert cli.main(["score", "--detectors", "d.safetensors", "--data", "train", "--out", "s.csv", *QUICK]) == 0


def test_torchvisions_other_models():
    with torch.device("meta"):
        assert models.create("mobilenet_v3_small", 7).classifier[-1].out_features == 7
    with pytest.raises(checks.UserError, match="did you mean 'efficientnet_b0'"):
        models.create("efficientnet_b00", 7)


HEADS = """
import torch
from torch import nn
torch.manual_seed(0)
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x):
        return self.fc1(self.pool(x).flatten(1))
class Sum(Two):
    def forward(self, x):
        return super().forward(x) + self.fc2(self.pool(x).flatten(1))
def none(): return nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.mark.parametrize(
    ("asked", "detectors", "told"),
    [
        ("squeezenet1_1", "NCI", "SqueezeNet has no nn.Linear"),
        ("squeezenet1_1", "MSP,Energy", ""),
        ("headless:none", "NCI", "Sequential has no nn.Linear"),
        ("headless:none", "MSP", ""),
        ("headless:Two", "NCI", "did not run as a module; pass head=..., the nn.Linear that makes the logits"),
        ("headless:Two --head fc1", "NCI", ""),
        ("headless:Two --head fc3", "MSP", "--head: unknown layer of Two 'fc3'; known: fc1, fc2"),
    ],
)
def test_models_whose_head_is_not_found(asked, detectors, told, monkeypatch, capsys):
    """A line and an exit code; what reads logits alone needs no head."""
    draw("train", ["a", "b", "c"], n_images=2, size=40)
    Path("headless.py").write_text(HEADS)
    monkeypatch.delitem(sys.modules, "headless", raising=False)
    model, *rest = asked.split()
    if model == "squeezenet1_1":
        torch.manual_seed(0)
        torch.save(models.create(model, 3).state_dict(), "w.pth")
        rest = ["--checkpoint", "w.pth"]
    given = ["--model", model, *rest, "--data", "train", *QUICK]
    fit = ["fit", *given, "--size", "40", "--detectors", detectors, "--out", "d.safetensors", "--any-accuracy"]
    if told:
        assert cli.main(fit) in (1, 2)
        assert told in capsys.readouterr().err
        return
    assert cli.main(fit) == 0, capsys.readouterr().err
    sys.modules.pop("headless", None)  # the same weights again
    assert cli.main(["score", *given, "--detectors", "d.safetensors", "--out", "s.csv"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["none", "Two", "Sum"])
def test_evaluations_of_models_whose_head_is_not_found(name, monkeypatch, capsys):
    """There is none, it does not run, it does not make the logits: kept are logits alone."""
    own_benchmark(["a", "b", "c"])
    Path("headless.py").write_text(HEADS)
    monkeypatch.delitem(sys.modules, "headless", raising=False)
    monkeypatch.syspath_prepend(Path.cwd())
    net = getattr(importlib.import_module("headless"), name)().eval()
    torch.save(net.state_dict(), "w.pth")
    asked = ["w.pth", "--model", f"headless:{name}", "--benchmark", "folder", "--data-root", "data"]
    asked += ["--image-size", "8", "--any-accuracy", "--out", "results", "--overwrite", *QUICK]
    assert cli.main(["evaluate", *asked, "--detectors", "MSP,TemperatureScaling,GEN"]) == 0, capsys.readouterr().err
    (run,) = evaluation.read("results")["runs"]
    held = evaluation.read_outputs(run["outputs"]["far"])
    x = torch.stack([x for x, _ in open_benchmark("folder", "data", image_size=8).ood["far"]])
    torch.testing.assert_close(held.logits, net(x).detach())
    assert held.features.shape == (len(x), 0)
    scores = evaluation.read_scores("results", run)["MSP"]["far"]
    np.testing.assert_allclose(scores, net(x).detach().double().softmax(1).amax(1).numpy(), rtol=1e-5)
    capsys.readouterr()
    assert cli.main(["evaluate", *asked, "--detectors", "MSP", "--ood", ""]) == 0
    assert "no OOD set is measured" in capsys.readouterr().out
    assert cli.main(["evaluate", *asked, "--detectors", "MSP,NCI"]) == 1
    assert "head" in capsys.readouterr().err


def test_own_preparation_of_timm():
    net = nn.Linear(1, 1)
    net.default_cfg = {"mean": (0.1,), "std": (0.2,), "input_size": (1, 20, 20), "crop_pct": 1.0, "crop_mode": "squash"}
    assert models.own_preparation(net, "", False)["resize"] == (20, 20)
    assert models.own_preparation(nn.Linear(1, 1), "resnet18", False) is None
    assert models.own_preparation(nn.Linear(1, 1), "resnet18", True)["resize"] == 256


def test_images_of_another_size_are_resized_in_proportion():
    """Those of a small net are not scaled up to cut their middle out, nor is what a model says of it forgotten."""
    from ood_fast.commands.model import preparation_of

    def resized(asked: int | None, kept: dict | None = None, **own: object) -> object:
        net = nn.Linear(1, 1)
        net.preparation = {"mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", **own} if own else None
        unset = ("resize", "mean", "std", "interpolation", "orientation", "truncated", "model", "pretrained")
        found = preparation_of(SimpleNamespace(size=asked, **dict.fromkeys(unset)), net, kept)
        assert asked in (None, found["size"])
        return found["resize"]

    assert [resized(size) for size in (32, 64, 65, 68, 224, 448)] == [32, 64, 74, 78, 256, 512]
    assert [resized(size, size=200, resize=210) for size in (100, 200, 400)] == [105, 210, 420]
    assert resized(10, size=20, resize=(20, 22)) == (10, 11)
    assert [resized(size, {"size": 16, "resize": 16}) for size in (16, 24)] == [16, 24]
    assert resized(None, {"size": 16}) == 16


def test_a_run_remembers_its_plugin(monkeypatch, capsys):
    """Outside of the current folder it is imported again, else the message says what to pass."""
    own_benchmark(["a", "b", "c"])
    Path("lib").mkdir()
    Path("lib/rememberedplugin.py").write_text(
        "from torch import nn\nimport ood_fast\n"
        "@ood_fast.register('model')\ndef own(c, channels, size):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, c))\n"
    )
    monkeypatch.setattr(sys, "path", [str(Path("lib").resolve()), *sys.path])
    given = ["train", "--recipe", "folder-ce", "--data-root", "data", "--image-size", "8", "--out", "run", *QUICK]
    settings = ["--plugin", "rememberedplugin", "--model", "own", "--set", "epochs=1", "--quiet"]
    assert cli.main([*given, *settings]) == 0, capsys.readouterr().err
    told = ["evaluate", "run", "--detectors", "MSP", "--no-tune", "--bootstrap", "0", "--quiet", *QUICK]
    for known, code in ((True, 0), (False, 2)):
        sys.modules.pop("rememberedplugin")
        registry.added("model").pop("own")
        if not known:
            Path("lib/rememberedplugin.py").write_text("open('RAN', 'w').close()\n")
        assert cli.main(told) == code
    assert "it was trained with --plugin rememberedplugin, pass it if it is yours" in capsys.readouterr().err
    assert not Path("RAN").exists()


# ---- files that end too early


def cut(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) * 2 // 3])


def test_truncated_files(capsys):
    draw("train", ["a", "b", "c"], n_images=2, size=64)
    cut("train/b/1.png")
    model = ["--model", "namedmodel:twelve", "--n-classes", "12"]
    flat = ["fit", "--data", "train", "--detectors", "MSP,NCI", "--out", "d.safetensors", *model, *PLAIN, *QUICK]
    assert cli.main(flat) == 1
    assert "train/b/1.png: cannot be read" in (error := capsys.readouterr().err)
    assert "--truncated allow takes what is there" in error
    assert cli.main([*flat, "--truncated", "allow"]) == 0
    given = ["score", "--detectors", "d.safetensors", "--data", "train", "--out", "s.csv", *QUICK, *model[:2]]
    assert cli.main([*given, "--truncated", "refuse"]) == 1
    assert cli.main([*given, "--overwrite"]) == 0, "as fitted"


def test_truncated_files_of_a_benchmark():
    own_benchmark(["a", "b"], size=64)
    cut("data/test/a/0.png")
    with pytest.raises(checks.UserError, match=r"a/0.png.*truncated"):
        open_benchmark("folder", "data", image_size=8).test[0]
    allowed = open_benchmark("folder", "data", image_size=8, truncated=True).test
    assert allowed[0][0].shape == (3, 8, 8)
    draw("data/ood/unlike", ["x", "y"], n_images=1, size=64)
    cut("data/ood/unlike/x/0.png")
    assert open_benchmark("folder", "data", image_size=8, truncated=True).ood["unlike"][0][0].shape == (3, 8, 8)
    assert allowed.fingerprint() != open_benchmark("folder", "data", image_size=8).test.fingerprint()
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_benchmark_prepared_for_a_model():
    own_benchmark(["a", "b"], size=64)
    told = {"size": 10, "resize": (12, 12), "mean": (0.5,), "std": (0.25,), "interpolation": "bicubic"}
    benchmark = open_benchmark("folder", "data", prepared=told, synthetic=True)
    assert benchmark.image_shape == (1, 10, 10)
    assert benchmark.test[0][0].shape == benchmark.ood["noise"][0][0].shape == (1, 10, 10)


def test_a_new_head_is_no_published_weight(vit, capsys):
    draw("train", ["a", "b"], n_images=1)
    given = ["fit", "--data", "train", "--detectors", "NCI", "--out", "d.safetensors", *QUICK, "--n-classes", "2"]
    for model in ("hf:vit", "resnet18"):
        assert cli.main([*given, "--model", model, "--pretrained"]) == 2
        assert "another head would be drawn at random" in capsys.readouterr().err


def test_a_processor_holds_on_benchmarks_of_smaller_images(vit, capsys):
    """A transformer that was tuned to CIFAR at its own size; timm's configuration is not of these weights."""
    from ood_fast.commands.benchmarks import Benchmarks

    own_benchmark(["a", "b", "c"], size=20)
    torch.save(models.create(vit, None, pretrained=True).state_dict(), "w.pth")
    options = SimpleNamespace(benchmark="folder", data_root="data", layout=None, ood_folder=[], csid_folder=[])
    vars(options).update(
        dict.fromkeys(("size", "resize", "mean", "std", "interpolation", "orientation", "truncated"), None)
    )
    benchmarks = Benchmarks(options, "w.pth")
    spec = {"size": 100, "resize": 100, "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}
    options.quiet, options.model = True, vit
    for model, size in ((models.create(vit, None, pretrained=True), 16), (nn.Linear(1, 1), None)):
        run = SimpleNamespace(model=model, info=None, name="w.pth")
        found = benchmarks._prepared(run, SimpleNamespace(prepared=spec))
        assert (found and found["size"]) == size
