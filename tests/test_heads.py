"""Finding the head of a classifier, capturing what enters it, and the head that normalises."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ood_fast import detectors
from ood_fast.heads import L2NormLinear, capture_features, find_head
from ood_fast.models.running import run_model


class Named(nn.Module):
    """A module with the given children, in that order, run one after the other."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


def linear(m: int = 8, c: int = 3) -> nn.Linear:
    return nn.Linear(m, c)


def mlp(m: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(m, m), nn.ReLU())


# Each model with the path of its head; the shapes of the zoos, without the zoos.
MODELS = {
    "only a linear layer": (lambda: linear(), ""),
    "torchvision ResNet": (lambda: Named(body=mlp(), fc=linear()), "fc"),
    "torchvision VGG": (lambda: Named(features=mlp(), classifier=nn.Sequential(*mlp(), linear())), "classifier.2"),
    "torchvision ViT": (
        lambda: Named(encoder=mlp(), heads=nn.Sequential(OrderedDict(pre_logits=linear(8, 8), head=linear()))),
        "heads.head",
    ),
    "torchvision GoogLeNet: auxiliary heads": (
        lambda: Named(aux1=Named(fc=linear()), aux2=Named(fc=linear()), fc=linear()),
        "fc",
    ),
    "timm ConvNeXt": (lambda: Named(stages=mlp(), head=Named(norm=nn.LayerNorm(8), fc=linear())), "head.fc"),
    "transformers": (lambda: Named(vit=mlp(), classifier=linear()), "classifier"),
    "head registered before the body": (lambda: Named(head=linear(), body=mlp()), "head"),
    "LeNet: one behind the other": (lambda: Named(fc1=linear(8, 6), fc2=linear(6, 5), fc3=linear(5, 3)), "fc3"),
    "any name, registered last": (lambda: Named(body=mlp(), out=linear()), "out"),
    "sequential": (lambda: nn.Sequential(mlp(), linear(), nn.LogSoftmax(1)), "1"),
    "a normalisation in front": (lambda: nn.Sequential(nn.BatchNorm1d(8), Named(body=mlp(), fc=linear())), "1.fc"),
    "a wrapper": (lambda: nn.DataParallel(Named(body=mlp(), fc=linear())), "module.fc"),
    "a subclass of Linear": (lambda: Named(body=mlp(), fc=L2NormLinear(8, 3)), "fc"),
}


@pytest.mark.parametrize("name", MODELS)
def test_find_head(name):
    build, path = MODELS[name]
    model = build()
    assert find_head(model) is model.get_submodule(path)


def test_find_head_through_compile():
    model = Named(body=mlp(), fc=linear())
    assert find_head(torch.compile(model)) is model.fc


def test_find_head_by_name():
    model = Named(body=mlp(), fc=linear())
    assert find_head(model, "body.0") is model.body[0]
    with pytest.raises(ValueError, match=r"unknown layer of Named 'fcc'; known: body\.0, fc; did you mean 'fc'"):
        find_head(model, "fcc")
    deep = Named(body=nn.Sequential(*(linear(8, 8) for _ in range(12))), fc=linear())
    with pytest.raises(ValueError, match=r"^name: unknown layer of Named 'top'; its head is 'fc'$"):
        find_head(deep, "top")
    with pytest.raises(ValueError, match=r"'body' is a Sequential, expected an nn\.Linear"):
        find_head(model, "body")


AMBIGUOUS = {
    "two names": lambda: Named(head=linear(), classifier=linear()),
    "two heads of one width": lambda: Named(body=mlp(), head=linear(), head_dist=linear()),
    "linear layers that do not fit": lambda: Named(a=linear(8, 4), b=linear(8, 3)),
    "a block comes last": lambda: Named(a=linear(8, 8), block=mlp()),
    "two heads behind normalisations, as LeViT has them": lambda: Named(
        body=mlp(),
        head=Named(norm=nn.LayerNorm(8), linear=linear()),
        head_dist=Named(norm=nn.LayerNorm(8), linear=linear()),
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_head_lists_the_candidates(name):
    model = AMBIGUOUS[name]()
    with pytest.raises(ValueError, match="cannot tell which layer of Named makes the logits; pass its name") as error:
        find_head(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert f"{path} ({module.in_features} → {module.out_features})" in str(error.value)


def test_model_without_a_linear_layer():
    """Torchvision's SqueezeNet, some of timm's: the layer that may make the logits, and the way without a head."""
    with pytest.raises(
        ValueError,
        match=r"Sequential has no nn\.Linear.*\(the last convolution is 1, 8 → 10\).*"
        r"fit_features\(features, logits, targets, head=\(W, b\)\)",
    ):
        find_head(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 1), nn.Flatten()))
    with pytest.raises(ValueError, match="With logits made otherwise, take features"):
        find_head(nn.Flatten())


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model: got NoneType, expected an nn\.Module"):
        find_head(None)


def test_capture_features():
    """What enters the head, of the last pass; logits = head(features); nothing is left behind on the model."""
    model = Named(body=mlp(), fc=linear())
    first, second = torch.randn(4, 8), torch.randn(5, 8)
    with capture_features(model.fc) as captured:
        with pytest.raises(RuntimeError, match="has not run"):
            _ = captured.features
        model(first)
        assert torch.equal(captured.features, model.body(first))
        logits = model(second)
        assert torch.equal(model.fc(captured.features), logits)
        assert captured.features.requires_grad
        model.fc(input=first)
        assert captured.features is first
    model(second)
    assert captured.features is first
    assert not model.fc._forward_pre_hooks


def test_capture_features_removes_its_hook_when_the_model_fails():
    model = Named(body=mlp(), fc=linear())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), capture_features(model.fc):
        model(torch.randn(4, 7))
    assert not model.fc._forward_pre_hooks


# The zoos. On the meta device a model of any size is made and run at once; the head is the right one if what it returns
# is the very tensor that the model returns.


def assert_head_makes_the_logits(model: nn.Module, x: torch.Tensor | dict[str, torch.Tensor]) -> nn.Linear:
    head = find_head(model)
    returned = []
    handle = head.register_forward_hook(lambda module, args, output: returned.append(output))
    ((_, features, logits, *_),) = run_model(model, [x], head)
    handle.remove()
    assert returned[-1] is logits
    assert features.shape == (2, head.in_features)
    return head


TORCHVISION = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnext50_32x4d", "wide_resnet50_2"),
    *("shufflenet_v2_x0_5", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16"),
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    models = pytest.importorskip("torchvision").models
    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **settings)
        head = assert_head_makes_the_logits(model, torch.empty(2, 3, 299 if name == "inception_v3" else 224, 224))
    assert head.out_features == 1000


def test_torchvision_is_covered():
    """Every family of classifiers that torchvision lists, but for those two, is in the test above."""
    models = pytest.importorskip("torchvision").models
    families = {models.get_model_builder(name).__module__ for name in models.list_models(module=models)}
    covered = {models.get_model_builder(name).__module__ for name in TORCHVISION}
    left = {family.rpartition(".")[2] for family in families - covered}
    assert left <= {"regnet", "squeezenet"}  # neither is made on the meta device; see below


def test_torchvision_regnet_and_squeezenet():
    models = pytest.importorskip("torchvision").models
    assert_head_makes_the_logits(models.regnet_y_400mf(), torch.randn(2, 3, 32, 32))
    with pytest.raises(
        ValueError, match=r"SqueezeNet has no nn\.Linear.*the last convolution is classifier\.1, 512 → 1000"
    ):
        find_head(models.squeezenet1_1())


TIMM = [
    *("resnet18", "resnetv2_50", "convnext_atto", "convnextv2_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "efficientnet_b0", "tf_efficientnetv2_b0"),
    *("mobilenetv3_small_050", "mixer_s32_224", "coatnet_nano_rw_224", "maxvit_tiny_rw_224", "regnetx_002", "vgg11"),
    *("beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "poolformer_s12"),
    *("caformer_s18", "densenet121", "nfnet_f0", "hrnet_w18_small", "tiny_vit_5m_224", "edgenext_xx_small"),
    *("efficientvit_b0", "pvt_v2_b0", "davit_tiny", "fastvit_t8", "mambaout_femto", "hiera_tiny_224"),
]
TIMM_CONVOLUTION = {"resnetv2_50": "head.fc"}  # a 1 × 1 convolution makes the logits


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=7)
        if name in TIMM_CONVOLUTION:
            with pytest.raises(ValueError, match=rf"the last convolution is {TIMM_CONVOLUTION[name]}, \d+ → 7\)"):
                find_head(model)
            return
        head = assert_head_makes_the_logits(model, torch.empty(2, *model.pretrained_cfg["input_size"]))
    assert head.out_features == 7


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("deit_tiny_distilled_patch16_224", ("head (192 → 7)", "head_dist (192 → 7)")),
        ("levit_128s", ("head.linear (384 → 7)", "head_dist.linear (384 → 7)")),
        ("repvit_m0_9", ("head.head.l (384 → 7)", "head.head_dist.l (384 → 7)")),
        ("swiftformer_xs", ("head (220 → 7)", "head_dist (220 → 7)")),
        ("crossvit_tiny_240", ("head.0 (96 → 7)", "head.1 (192 → 7)")),
    ],
)
def test_timm_models_that_average_two_heads(name, candidates):
    """No one layer makes their logits, whatever the names say."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=7)
    with pytest.raises(ValueError, match="cannot tell which layer") as error:
        find_head(model)
    for candidate in candidates:
        assert candidate in str(error.value)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
STAGES = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TRANSFORMERS = {
    "ViT": {**TINY, "image_size": 32, "patch_size": 16},
    "Deit": {**TINY, "image_size": 32, "patch_size": 16},
    "Beit": {**TINY, "image_size": 32, "patch_size": 16},
    "Dinov2": {**TINY, "image_size": 32, "patch_size": 16},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ConvNext": STAGES,
    "Swin": WINDOWS,
    "RegNet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "PoolFormer": STAGES,
}


def hugging_face(name: str, suffix: str = "ForImageClassification") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    known = {known.lower(): known for known in dir(transformers)}
    config = getattr(transformers, known[f"{name}config".lower()])(num_labels=5, **TRANSFORMERS[name])
    return getattr(transformers, known[f"{name}{suffix}".lower()])(config)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hugging_face(name):
    """Batches are the mappings that their processors and data sets make; the output is an object with logits."""
    model = hugging_face(name)
    assert_head_makes_the_logits(model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 4])})


def test_hugging_face_model_that_averages_two_heads():
    with pytest.raises(ValueError, match=r"cls_classifier \(16 → 5\), distillation_classifier \(16 → 5\)"):
        find_head(hugging_face("Deit", "ForImageClassificationWithTeacher"))


def test_hugging_face_from_fit_to_score():
    """Targets are found under "labels", also in what a data set with names of files gives."""
    model = hugging_face("ViT")
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    loader = [{"pixel_values": x[:4], "labels": y[:4]}, {"pixel_values": x[4:], "labels": y[4:], "path": ["a", "b"]}]
    plain = [(x[:4], y[:4]), (x[4:], y[4:])]
    for name in ("NCI", "KNN"):
        settings = {"k": 2} if name == "KNN" else {}
        detector = detectors.create(name, **settings).fit(model, loader)
        scores = detector.score(model, {"pixel_values": x})
        assert torch.equal(scores, detectors.create(name, **settings).fit(model, plain).score(model, x))
    assert not model.classifier._forward_pre_hooks
    (batch,) = run_model(model, loader[:1], model.classifier)
    assert torch.equal(batch.targets, y[:4])
    assert set(batch.inputs) == {"pixel_values"}


# What running a model leaves behind: nothing


def test_modes_and_hooks_are_restored_when_the_model_raises():
    model = Named(body=mlp(), frozen=nn.BatchNorm1d(8), fc=linear())
    model.train()
    model.frozen.eval()
    modes = [module.training for module in model.modules()]
    batches = run_model(model, [torch.randn(3, 8), torch.randn(3, 7)], model.fc)
    assert not next(batches).features.requires_grad
    assert not model.fc.training
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        next(batches)
    assert [module.training for module in model.modules()] == modes
    assert not model.fc._forward_pre_hooks


def test_modes_and_hooks_are_restored_when_the_loader_raises():
    def loader():
        yield torch.randn(3, 8)
        raise OSError("disk gone")

    model = Named(body=mlp(), fc=linear())
    with pytest.raises(OSError, match="disk gone"):
        detectors.NCI().fit(model, loader())
    assert model.training
    assert not model.fc._forward_pre_hooks


def test_batches_go_to_the_model_and_the_model_stays():
    model = Named(body=mlp(), fc=linear()).to("meta")
    (batch,) = run_model(model, [(torch.randn(3, 8), torch.arange(3))], model.fc)
    assert {t.device.type for t in (batch.inputs, batch.features, batch.logits, batch.targets)} == {"meta"}
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """Features as the head sees them, in the reduced precision; scores in float32, near those without autocast."""
    torch.manual_seed(0)
    model = Named(body=mlp(), fc=linear()).eval()
    x, y = torch.randn(50, 8), torch.arange(50) % 3
    for name in ("MSP", "NCI", "FDBD", "KNN"):
        detector = detectors.create(name, **({"k": 3} if name == "KNN" else {})).fit(model, [(x, y)])
        exact = detector.score(model, x)
        with torch.autocast("cpu", dtype=dtype):
            with capture_features(model.fc) as captured:
                model(x)
            assert captured.features.dtype == dtype
            scores = detector.score(model, x)
            assert detectors.create(name, **detector.settings()).fit(model, [(x, y)]).score(model, x).isfinite().all()
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, exact, rtol=0.05, atol=0.1 * exact.abs().max().item())


# L2NormLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tau", "scale_at_test", "scale_in_training", "scale_in_evaluation"),
    [(None, True, 1, 1), (0.1, True, 10, 10), (0.1, False, 10, 1)],
)
def test_l2norm_linear_is_its_formula(tau, scale_at_test, scale_in_training, scale_in_evaluation, bias):
    head = L2NormLinear(6, 4, bias, tau, scale_at_test=scale_at_test, dtype=torch.float64)
    z = torch.randn(5, 6, dtype=torch.float64)
    b = head.bias if bias else 0
    unit = z / z.norm(dim=1, keepdim=True)
    assert head.last_norm is None
    torch.testing.assert_close(head(z), scale_in_training * unit @ head.weight.T + b, rtol=1e-12, atol=1e-12)
    for _ in range(2):
        torch.testing.assert_close(head.last_norm, z.norm(dim=1), rtol=1e-12, atol=0)
        head.eval()
        torch.testing.assert_close(head(z), scale_in_evaluation * z @ head.weight.T + b, rtol=1e-12, atol=1e-12)


def test_l2norm_linear_in_evaluation_is_the_plain_layer():
    head, plain = L2NormLinear(6, 4).eval(), nn.Linear(6, 4)
    plain.load_state_dict(head.state_dict())
    z = torch.randn(5, 6)
    assert torch.equal(head(z), plain(z))


def test_l2norm_linear_gradient():
    """Training normalises inside the graph: gradcheck, and no gradient along z; last_norm is detached."""
    head = L2NormLinear(6, 4, tau=0.5, dtype=torch.float64)
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (z,))
    (gradient,) = torch.autograd.grad(head(z).square().sum(), z)
    torch.testing.assert_close((gradient * z).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not head.last_norm.requires_grad


def test_l2norm_linear_at_the_origin():
    """A feature of length 0 gives the bias, and finite gradients."""
    head = L2NormLinear(6, 4)
    z = torch.zeros(2, 6, requires_grad=True)
    logits = head(z)
    assert torch.equal(logits, head.bias.expand(2, 4))
    logits.sum().backward()
    assert z.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_l2norm_linear_is_copied_saved_and_loaded_as_a_linear_layer():
    head = L2NormLinear(6, 4, tau=0.1)
    z = torch.randn(5, 6, requires_grad=True)
    head(z).sum().backward()
    twin = copy.deepcopy(head)
    assert torch.equal(twin(z), head(z))
    assert twin.weight is not head.weight
    assert list(head.state_dict()) == ["weight", "bias"]
    fresh = L2NormLinear(6, 4, tau=0.1)
    fresh.load_state_dict(nn.Linear(6, 4).state_dict())
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh(z), head(z))


def test_l2norm_linear_compiles_whole():
    torch._dynamo.reset()
    head = L2NormLinear(6, 4)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    z = torch.randn(5, 6)
    for mode in (True, False):
        head.train(mode)
        expected = copy.deepcopy(head)(z)
        torch.testing.assert_close(compiled(z), expected)
        torch.testing.assert_close(head.last_norm, z.norm(dim=1))


def test_l2norm_linear_under_autocast():
    """The product runs in bf16; the norms stay float32, also of features that are bf16 already."""
    head = L2NormLinear(64, 4)
    z = 1000 * torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(z)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(head.last_norm, z.norm(dim=1))
        head(z.bfloat16())
        assert head.last_norm.dtype == torch.float32
    torch.testing.assert_close(logits.float(), F.linear(F.normalize(z), head.weight, head.bias), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("argument", "value"), [("tau", 0.0), ("tau", -1.0), ("eps", 0.0)])
def test_l2norm_linear_refuses(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: got {value}"):
        L2NormLinear(6, 4, **{argument: value})


def test_names_are_found_inside_wrappers():
    model = nn.Sequential()
    model.fc = nn.Linear(3, 2)
    assert find_head(torch.compile(model, backend="eager"), "fc") is model.fc
    assert find_head(nn.DataParallel(model), "fc") is model.fc
