"""Finding the head of a classifier, capturing what enters it, and the head that normalises."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ood_fast.heads import L2NormLinear, capture_features, find_head


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
    with pytest.raises(ValueError, match=r"'body' is a Sequential, expected an nn\.Linear"):
        find_head(model, "body")


AMBIGUOUS = {
    "two names": lambda: Named(head=linear(), classifier=linear()),
    "two heads of one width": lambda: Named(body=mlp(), head=linear(), head_dist=linear()),
    "linear layers that do not fit": lambda: Named(a=linear(8, 4), b=linear(8, 3)),
    "a block comes last": lambda: Named(a=linear(8, 8), block=mlp()),
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
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear"):
        find_head(nn.Sequential(nn.Conv2d(3, 10, 1), nn.Flatten()))


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
