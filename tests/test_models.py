"""Models by name: their forms, options and heads; and checkpoints: what is accepted, what is refused, what survives."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from ood_fast import checks, models
from ood_fast.heads import L2NormLinear, capture_features, find_head
from ood_fast.models import checkpoints

FEATURES = {
    "small_cnn": 64,
    "resnet18_32x32": 512,
    "cct_7_3x1": 256,
    "resnet18": 512,
    "resnet50": 2048,
    "vgg16": 4096,
    "densenet121": 1024,
    "vit_b_16": 768,
    "swin_t": 768,
    "swin_v2_t": 768,
    "convnext_tiny": 768,
}
OWN = dict(models.MODELS)  # the package's own, whatever plugins register while the tests run
LARGE = [name for name, kind in OWN.items() if kind.build and name != "small_cnn"]


def cnn(n_classes: int = 10, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return models.create("small_cnn", n_classes, **options)


def resnet(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return models.create("resnet18_32x32", 10, **options)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- models


def test_every_name_is_tested():
    assert set(OWN) == set(FEATURES)


@pytest.mark.parametrize("name", FEATURES)
def test_small_form_and_head(name):
    """On the meta device: shapes without the arithmetic."""
    with torch.device("meta"):
        model = models.create(name, 17, small_images=True, head=L2NormLinear).eval()
        head = find_head(model)
        with capture_features(head) as captured:
            logits = model(torch.randn(2, 3, 32, 32))
    assert type(head) is L2NormLinear
    assert logits.shape == (2, 17)
    assert captured.features.shape == (2, 512 if name == "vgg16" else FEATURES[name])


@pytest.mark.parametrize("name", LARGE)
def test_large_form_is_torchvisions(name):
    with torch.device("meta"):
        model = models.create(name, 17).eval()
        theirs = getattr(torchvision.models, name)(num_classes=17)
        assert model(torch.randn(2, 3, 224, 224)).shape == (2, 17)
    assert find_head(model).in_features == FEATURES[name]
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (model, theirs)]
    assert shapes[0] == shapes[1]


def test_small_stems():
    with torch.device("meta"):
        convnext = models.create("convnext_tiny", 10, small_images=True)
        densenet = models.create("densenet121", 10, small_images=True)
        swin = models.create("swin_t", 10, small_images=True)
        vit = models.create("vit_b_16", 10, small_images=True)
        for name in ("resnet18", "resnet50"):
            model = models.create(name, 10, small_images=True)
            assert (model.conv1.kernel_size, model.conv1.stride, type(model.maxpool)) == ((3, 3), (1, 1), nn.Identity)
    convs = [module for module in convnext.modules() if isinstance(module, nn.Conv2d)]
    assert (convs[0].kernel_size, convs[0].stride) == ((3, 3), (2, 2))  # Haas et al., A.1: 4 to 3, 4 to 2
    depthwise = [conv for conv in convs if conv.groups > 1]
    assert len(depthwise) == 18
    assert {conv.kernel_size for conv in depthwise} == {(3, 3)}
    assert (densenet.features.conv0.stride, type(densenet.features.pool0)) == ((1, 1), nn.Identity)
    assert swin.features[0][0].stride == (2, 2)
    assert vit.conv_proj.stride == (4, 4)


def test_convnext_small_weights_are_initialised():
    torch.manual_seed(0)
    conv = models.vision._three_by_three(nn.Conv2d(96, 96, 7, padding=3, groups=96))
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert conv.bias.abs().max() == 0


def test_resnet18_32x32_is_openoods():
    """Its keys, shapes and count, from the definition: four stages of two blocks, projections between."""
    expected = {"conv1.weight": (64, 3, 3, 3), "fc.weight": (10, 512), "fc.bias": (10,)}

    def norm(name: str, width: int) -> None:
        expected.update({f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")})
        expected[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            expected[f"{name}.conv1.weight"] = (width, before, 3, 3)
            expected[f"{name}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{name}.bn1", width)
            norm(f"{name}.bn2", width)
            if before != width:
                expected[f"{name}.shortcut.0.weight"] = (width, before, 1, 1)
                norm(f"{name}.shortcut.1", width)
            before = width
    state = models.openood_keys(resnet().state_dict())
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    model = resnet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert [model.layer1[0].conv1.stride, model.layer2[0].conv1.stride] == [(1, 1), (2, 2)]
    # PyTorch's own initialisation, uniform within 1/√fan_in, as OpenOOD leaves it
    weight = model.layer4[1].conv2.weight
    assert weight.abs().max().item() == pytest.approx((512 * 9) ** -0.5, rel=1e-3)


def test_cct_has_the_parameters_of_the_paper():
    torch.manual_seed(0)
    model = models.create("cct_7_3x1", 10)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(3.76, abs=0.005)
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.no_grad(), capture_features(model.fc) as captured:
        once, twice = model(x), model(x)
    assert torch.equal(once, twice)  # no dropout in evaluation
    # Sequence pooling and a layer, literally.
    with torch.no_grad():
        tokens = model.tokenizer(x).flatten(2).transpose(1, 2) + model.positions
        assert tokens.shape == (2, 256, 256)
        for layer in model.layers:
            q, k, v = layer.qkv(layer.norm1(tokens)).chunk(3, dim=2)
            heads = []
            for part in range(4):
                columns = slice(64 * part, 64 * (part + 1))
                attention = (q[..., columns] @ k[..., columns].transpose(1, 2) / 8).softmax(dim=2)
                heads.append(attention @ v[..., columns])
            tokens = tokens + layer.proj(torch.cat(heads, dim=2))
            tokens = tokens + layer.mlp(layer.norm2(tokens))
        tokens = model.norm(tokens)
        pooled = torch.einsum("nk,nkm->nm", model.pool(tokens).squeeze(2).softmax(dim=1), tokens)
    torch.testing.assert_close(captured.features, pooled, rtol=1e-4, atol=1e-5)
    model.train()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [layer.drop_rate for layer in model.layers] == pytest.approx([0.1 * row / 6 for row in range(7)])
    with pytest.raises(ValueError, match="got images of 64×64, expected 32×32"):
        model(torch.randn(1, 3, 64, 64))


def test_stochastic_depth_keeps_the_mean():
    layer = models.cct._Layer(0.25).train()
    torch.manual_seed(0)
    dropped = layer._drop(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(dropped[:, :1, :1].expand(-1, 2, 3), dropped)  # whole samples
    assert torch.equal(layer.eval()._drop(torch.ones(2, 2, 3)), torch.ones(2, 2, 3))


# ---- options


@pytest.mark.parametrize("head", [L2NormLinear, partial(L2NormLinear, tau=0.1)])
def test_heads_start_from_the_same_weights(head):
    plain, other = resnet(), resnet(head=head)
    assert isinstance(other.fc, L2NormLinear)
    assert same(plain.state_dict(), other.state_dict())
    assert other.fc.tau == (0.1 if isinstance(head, partial) else None)


def test_a_head_that_is_none():
    with pytest.raises(TypeError, match="head"):
        cnn(head=lambda m, c: nn.Identity())


def test_leaky_relu_in_place_of_every_relu():
    model = resnet(activation="leaky_relu")
    kinds = [type(module) for module in model.modules()]
    assert nn.ReLU not in kinds
    assert kinds.count(nn.LeakyReLU) == 9  # the stem, and one that the two activations of each block share
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.eval()(x), resnet().eval()(x))


def test_spectral_normalisation_of_every_convolution():
    model = cnn(spectral_norm=True)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 3
    for _ in range(200):  # power iterations, one a forward pass
        model.train()(torch.randn(2, 3, 4, 4))
    for conv in convs:
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)
    assert type(model.fc) is nn.Linear
    assert torch.linalg.matrix_norm(model.fc.weight, 2).item() != pytest.approx(1, rel=1e-3)
    again = cnn(seed=5, spectral_norm=True)  # the state of the iterations is in the checkpoint
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_one_channel():
    assert resnet(in_channels=1).conv1.in_channels == 1
    assert cnn(in_channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_the_digits_model_is_as_it_was():
    torch.manual_seed(0)
    direct = models.SmallCNN(6)
    assert same(direct.state_dict(), cnn(6, in_channels=1).state_dict())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18_32", {}, "unknown model 'resnet18_32'.*did you mean 'resnet18_32x32'"),
        ("densenet121", {"activation": "leaky_relu"}, "activation: not for densenet121"),
        ("swin_t", {"spectral_norm": True}, "spectral_norm: not for swin_t"),
        ("resnet18", {"in_channels": 1}, "in_channels: got 1, expected 3"),
        ("resnet18_32x32", {"pretrained": True}, "there are no weights for resnet18_32x32"),
        ("resnet18", {"pretrained": True, "small_images": True}, "no weights for resnet18 for small images"),
        ("timm:resnett18", {}, "has no model 'resnett18'"),
        ("timm:test_resnet", {"small_images": True}, "small_images: not for timm:test_resnet"),
        ("small_cnn", {"pretrained": "nowhere.ckpt"}, "no checkpoint nowhere.ckpt"),
    ],
)
def test_requests_that_cannot_be_met(name, options, message):
    with torch.device("meta"), pytest.raises(checks.UserError, match=message):
        models.create(name, 10, **options)


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="activation: got 'gelu'"):
        models.create("small_cnn", 10, activation="gelu")
    for n_classes in (0, 2.0, True):
        with pytest.raises(ValueError, match="n_classes"):
            models.create("small_cnn", n_classes)


def test_timm_models_with_our_heads():
    torch.manual_seed(0)
    model = models.create("timm:test_resnet", 7, head=L2NormLinear, in_channels=1)
    assert isinstance(find_head(model), L2NormLinear)
    assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    torch.manual_seed(0)
    assert same(timm.create_model("test_resnet", num_classes=7, in_chans=1).state_dict(), model.state_dict())


@pytest.mark.parametrize(("module", "name"), [("torchvision", "resnet18_32x32"), ("timm", "timm:resnet18")])
def test_what_is_not_installed(module, name, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(checks.UserError, match=f"pip install {module}"):
        models.create(name, 10)


def test_weights_of_timm_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise FileNotFoundError("check your connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(checks.UserError, match=r"cannot get the weights of timm:resnet18 \(check your connection\);"):
        models.create("timm:resnet18", 10, pretrained=True)


def test_without_torchvision_its_models_are_not_unknown_for_good(monkeypatch):
    monkeypatch.setattr(models.vision, "names", frozenset)
    with pytest.raises(checks.UserError, match=r"unknown model 'efficientnet_b0'.* others with torchvision,"):
        models.create("efficientnet_b0", 10)


def test_weights_of_torchvision_without_it(monkeypatch):
    """It said that there are none."""
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(checks.UserError, match=r"pretrained resnet50 needs torchvision.* pip install torchvision"):
        models.create("resnet50", 10, pretrained=True)


def test_pretrained_weights_are_torchvisions_and_the_head_is_new(monkeypatch):
    """The real path through torchvision's enum; what would come from the network is made here."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    asked = []

    def get_state_dict(self, *_, **__):
        asked.append(self)
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    full = models.create("resnet18", 1000, pretrained=True, head=L2NormLinear)
    assert same(full.state_dict(), state)
    model = models.create("resnet18", 10, pretrained=True)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert model.fc.weight.shape == (10, 512)
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1] * 2

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(
        checks.UserError, match=r"no network\); put https://download.pytorch.org.*checkpoints/ yourself"
    ):
        models.create("resnet18", 10, pretrained=True)


def test_pretrained_from_a_file(tmp_path):
    source = cnn(seed=3)
    models.save_checkpoint(source, tmp_path / "a.ckpt")
    assert same(cnn(pretrained=tmp_path / "a.ckpt").state_dict(), source.state_dict())


# ---- checkpoints


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_round_trip(tmp_path, suffix):
    source, target = cnn(seed=1), cnn(seed=2)
    path = tmp_path / f"model{suffix}"
    models.save_checkpoint(source, path)
    models.load_checkpoint(target, path)
    assert same(source.state_dict(), target.state_dict())
    assert os.listdir(tmp_path) == [path.name]
    if suffix == ".safetensors":
        assert same(load_file(path), source.state_dict())


WRAPPINGS = {
    "plain": lambda state: state,
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "a part": lambda state: {key.replace(".", "._orig_mod.", 1): value for key, value in state.items()},
    "Lightning": lambda state: {"epoch": 3, "state_dict": {f"model.{key}": value for key, value in state.items()}},
    "wrapped": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "lr": 0.1},
    "OpenOOD": models.openood_keys,
    "OpenOOD on two GPUs": lambda state: {f"module.{key}": v for key, v in models.openood_keys(state).items()},
    "OpenOOD in Lightning": lambda state: {
        "state_dict": {f"model.{k}": v for k, v in models.openood_keys(state).items()}
    },
    "backbone and criterion": lambda state: {
        "state_dict": {"criterion.weight": torch.ones(10), **{f"backbone.{key}": v for key, v in state.items()}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    },
    "DataParallel of a part": lambda state: {key.replace(".", ".module.", 1): value for key, value in state.items()},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}},
    "model_state": lambda state: {
        "model_state": state,
        "optimizer": {"param_groups": [], "state": {"fc.weight": {"exp_avg": torch.ones(3)}}},
        "criterion": {"weight": torch.ones(10)},
    },
    "class weights": lambda state: {"class_weights": torch.ones(10), "optimal_model": state, "epoch": 3},
    "flat, EMA below": lambda state: {**state, "ema": {key: torch.zeros_like(v) for key, v in state.items()}},
    "optimizers of any name": lambda state: {"weights": state, "optimizerG_state": {"exp_avg": state}, "optims": state},
    "nested": lambda state: {"checkpoint": {"weights": {"epoch": 3, **state}}},
    "no counters": lambda state: {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_of_others(tmp_path, wrapping):
    source, target = resnet(seed=1), resnet(seed=2)
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "best.ckpt")
    models.load_checkpoint(target, tmp_path / "best.ckpt")
    assert same(source.state_dict(), target.state_dict())


def test_weights_of_several_models(tmp_path):
    """Two of one kind are told or refused; the first one by its name is taken."""
    state, other, path = resnet(seed=1).state_dict(), resnet(seed=2).state_dict(), tmp_path / "last.pt"
    target = resnet(seed=3)
    torch.save({"state_dict_ema": other, "state_dict": state}, path)
    with pytest.warns(
        UserWarning, match=r"weights in \['state_dict'\] and \['state_dict_ema'\]; .*\)\['state_dict_ema'\]"
    ):
        models.load_checkpoint(target, path)
    assert same(state, target.state_dict())
    torch.save({"student": state, "teacher": other}, path)
    with pytest.raises(checks.UserError, match=r"weights in \['student'\] and \['teacher'\]; save those"):
        models.load_checkpoint(target, path)
    torch.save({f"{owner}.{key}": v for owner in ("model", "ema") for key, v in state.items()}, path)
    with pytest.raises(checks.UserError, match=r"of this model below 'ema\.', 'model\.'; save those"):
        models.load_checkpoint(target, path)


def test_weights_that_are_left_out_are_told(tmp_path):
    """A head behind that of the model, or a normalisation before it, which the model alone does not have."""
    state, target = resnet(seed=1).state_dict(), resnet(seed=2)
    beside = {"normalize.mean": torch.ones(3), "head.weight": torch.ones(2, 10), "steps": torch.tensor(3)}
    torch.save({**{f"model.{key}": value for key, value in state.items()}, **beside}, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match=r"weights below 'model\.' are taken, not .* normalize\.mean, head\.weight$"):
        models.load_checkpoint(target, tmp_path / "last.pt")
    assert same(state, target.state_dict())


def test_safetensors_and_pickles_are_told_by_their_content(tmp_path):
    state, target = cnn(seed=1).state_dict(), cnn(seed=2)
    keys = list(state)
    models.save_checkpoint({key: state[key] for key in keys[:3]}, tmp_path / "m-1-of-2.safetensors")
    models.save_checkpoint({key: state[key] for key in keys[3:]}, tmp_path / "m-2-of-2.safetensors")
    files = {key: f"m-{1 + (index > 2)}-of-2.safetensors" for index, key in enumerate(keys)}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    torch.save(state, tmp_path / "pickle.safetensors")
    models.save_checkpoint(state, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "x.pth")
    torch.save({key: state[key] for key in keys[:3]}, tmp_path / "m-1-of-2.bin")
    torch.save({key: state[key] for key in keys[3:]}, tmp_path / "m-2-of-2.bin")
    files = {key: name.replace(".safetensors", ".bin") for key, name in files.items()}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    for name in ("m.safetensors.index.json", "pytorch_model.bin.index.json", "pickle.safetensors", "x.pth"):
        target.load_state_dict(cnn(seed=2).state_dict())
        models.load_checkpoint(target, tmp_path / name)
        assert same(state, target.state_dict())


def test_openood_keys_both_ways(tmp_path):
    state = resnet().state_dict()
    theirs = models.openood_keys(state)
    assert [key for key in theirs if "shortcut" in key][:2] == [
        "layer2.0.shortcut.0.weight",
        "layer2.0.shortcut.1.weight",
    ]
    assert not any("downsample" in key for key in theirs)
    assert same(models.torchvision_keys(theirs), state)
    assert models.torchvision_keys(state).keys() == state.keys()


class OpenOODBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(1, 1, 1))


def test_a_model_with_openoods_names_takes_torchvisions(tmp_path):
    model = nn.Sequential(OpenOODBlock())
    models.save_checkpoint(models.torchvision_keys(model.state_dict()), tmp_path / "a.pt")
    other = nn.Sequential(OpenOODBlock())
    models.load_checkpoint(other, tmp_path / "a.pt")
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_models(tmp_path, wrap):
    source, target = cnn(seed=1), cnn(seed=2)
    models.save_checkpoint(wrap(source), tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt").keys() == source.state_dict().keys()
    models.load_checkpoint(wrap(target), tmp_path / "a.ckpt")
    assert same(source.state_dict(), target.state_dict())


def test_a_mismatch_lists_all_keys_and_changes_nothing(tmp_path):
    state = cnn(100, seed=1).state_dict()
    state["extra.weight"] = state.pop("backbone.0.weight")
    torch.save(state, tmp_path / "a.ckpt")
    model = cnn()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(checks.UserError) as error:
        models.load_checkpoint(model, tmp_path / "a.ckpt")
    assert str(error.value) == (
        f"{tmp_path / 'a.ckpt'} does not fit SmallCNN: missing: backbone.0.weight; unexpected: extra.weight; "
        "of another shape: fc.weight (100, 64) for (10, 64), fc.bias (100,) for (10,)"
    )
    assert same(model.state_dict(), before)


def test_a_long_mismatch_is_counted(tmp_path):
    models.save_checkpoint(cnn(), tmp_path / "a.ckpt")
    with pytest.raises(checks.UserError, match=r"missing: conv1.weight, .* and \d\d more; unexpected: backbone"):
        models.load_checkpoint(resnet(), tmp_path / "a.ckpt")


class Malicious:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.pt",
            lambda path: torch.save({"fc.weight": Malicious()}, path),
            "cannot be read as tensors and plain values",
        ),
        ("a.pt", lambda path: path.write_bytes(pickle.dumps(Malicious())), "cannot be read as tensors"),
        ("a.pt", lambda path: path.write_bytes(b"<html>404</html>"), "cannot be read as tensors"),
        ("a.pt", lambda path: path.write_bytes(b""), "cannot be read as tensors"),
        ("a.safetensors", lambda path: path.write_bytes(b"\xff" * 40), "cannot be read as tensors"),
        ("a.pt", lambda path: torch.save([1, 2], path), "holds a list, expected a state_dict"),
        ("a.pt", lambda path: torch.save({"epoch": 3}, path), "holds no state_dict; got epoch"),
        ("a.pt", lambda path: torch.save({}, path), "holds no state_dict; got nothing"),
        ("a.pt", lambda path: None, "no checkpoint"),
        (
            "a.pt",
            lambda path: torch.save({at + k: v for at in ("", "module.") for k, v in cnn().state_dict().items()}, path),
            "weights of this model below '', 'module.'",
        ),
        (
            "a.pt",  # of another architecture, blocks of which have a name that is this model's too
            lambda path: torch.save({f"block{k}.fc.bias": torch.ones(1) for k in range(3)}, path),
            "does not fit SmallCNN: missing: .*unexpected: block0",
        ),
        ("a.safetensors.index.json", lambda path: path.write_text("{}"), "cannot be read as tensors"),
        (
            "a.pt",
            lambda path: torch.save({"a.module.bias": torch.ones(1), "a.bias": torch.ones(1)}, path),
            "more than one key means a.bias",
        ),
    ],
)
def test_what_is_no_checkpoint(tmp_path, capsys, name, content, message):
    content(tmp_path / name)
    with pytest.raises(checks.UserError, match=message):
        models.load_checkpoint(cnn(), tmp_path / name)
    assert capsys.readouterr().out == ""


def test_any_plain_values_can_be_saved(tmp_path):
    contents = {"model": cnn().state_dict(), "epoch": 7, "rng": torch.get_rng_state(), "name": "a"}
    models.save_checkpoint(contents, tmp_path / "last.ckpt")
    back = checkpoints.read_checkpoint(tmp_path / "last.ckpt")
    assert (back["epoch"], back["name"]) == (7, "a")
    assert torch.equal(back["rng"], contents["rng"])
    models.load_checkpoint(cnn(seed=4), tmp_path / "last.ckpt")


@pytest.mark.parametrize("where", ["write", "fsync"])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, where, suffix):
    path = tmp_path / f"last{suffix}"
    good = cnn(seed=1)
    models.save_checkpoint(good, path)
    if where == "fsync":

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            models.save_checkpoint(cnn(seed=2), path)
    else:
        limit = """
import resource, signal, sys, torch
from ood_fast import models
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG, as on a full disk with ENOSPC
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    models.save_checkpoint(models.SmallCNN(10, in_channels=3), sys.argv[1])
except OSError as error:
    print("OSError")
"""
        result = subprocess.run([sys.executable, "-c", limit, path], capture_output=True, text=True)
        assert result.stdout == "OSError\n", result.stderr
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name]
    target = cnn(seed=3)
    models.load_checkpoint(target, path)
    assert same(target.state_dict(), good.state_dict())


def test_a_killed_writer_leaves_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    code = """
import sys, torch
from ood_fast import models
print("ready", flush=True)
step = 0
while True:
    step += 1
    models.save_checkpoint({"step": step, "fill": torch.full((300_000,), float(step))}, sys.argv[1])
"""
    for delay in (0.05, 0.13):
        process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        content = checkpoints.read_checkpoint(path)
        assert (content["fill"] == content["step"]).all()
    models.save_checkpoint({"step": 0}, path)  # what a killed writer left is overwritten
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_saving_where_nothing_can_be_written(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        models.save_checkpoint(cnn(), tmp_path / "nowhere" / "a.ckpt")


@pytest.mark.parametrize(("wrapped", "suffix"), [(lambda s: s, ".safetensors"), (lambda s: {"model": s}, ".pt")])
def test_number_of_classes_of_a_checkpoint(wrapped, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    checkpoints.save_checkpoint(wrapped(models.create("resnet18_32x32", 7).state_dict()), path)
    assert checkpoints.n_classes_of(path) == 7
    names = ("layers.0.fc", "classifier.linear", "levit.block.linear")  # sorted, the head is not the last
    state = {f"module.model.{name}.weight": torch.zeros(7 if "class" in name else 5, 5) for name in names}
    checkpoints.save_checkpoint(wrapped(state), path)
    assert checkpoints.n_classes_of(path) == 7
    torch.save({"mean": torch.zeros(3)}, tmp_path / "flat.pt")
    assert checkpoints.n_classes_of(tmp_path / "flat.pt") is None
