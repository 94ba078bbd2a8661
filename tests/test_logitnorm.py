"""LogitNorm and L2 normalisation through the public functions, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import Batch, assert_no_worse
from test_elogitnorm import DTYPES, KEYWORDS, build_keywords

import ood_fast
from ood_fast import reference

# (n, c): two classes; a small row; a row that no block size divides; ImageNet's classes; a row in several blocks
SHAPES = [(4, 2), (6, 5), (3, 37), (2, 1000), (1, 9000)]


def run(function, logits, y, upstream, **keywords):
    logits = logits.detach().requires_grad_()
    loss = function(logits, y, **keywords)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream.to(loss).expand_as(loss))[0]


def check(logits, y, backend, **keywords):
    dtype = logits.dtype
    upstream = torch.rand(logits.shape[0]) + 0.5 if keywords.get("reduction") == "none" else torch.tensor(1.7)
    on_device = {k: v.to(backend.device) if torch.is_tensor(v) else v for k, v in keywords.items()}
    in_double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in keywords.items()}
    double_y = y.double() if y.is_floating_point() else y
    ours = run(
        ood_fast.logitnorm, logits.to(backend.device), y.to(backend.device), upstream.to(backend.device), **on_device
    )
    truth = run(reference.logitnorm, logits.double(), double_y, upstream, **in_double)
    plain = run(reference.logitnorm, logits, y, upstream, **keywords)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert ours[1].dtype == dtype
    for what, a, t, p in zip(["loss", "gradient"], ours, truth, plain, strict=True):
        assert_no_worse(a, t, p, dtype, f"{what} {dtype} {tuple(logits.shape)} {keywords}")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain_pytorch(shape, dtype, backend):
    check(torch.randn(shape).to(dtype), torch.randint(0, shape[1], shape[:1]), backend)


@pytest.mark.parametrize("spec", [s for k, s in KEYWORDS.items() if k != "average"])
def test_keywords(spec, backend):
    batch = Batch.of(7, 4, 6)
    keywords = build_keywords(spec, batch)
    check(batch.logits, keywords.pop("y", batch.y), backend, tau=0.5, **keywords)


def test_it_is_cross_entropy_of_normalised_logits(backend):
    logits, y = torch.randn(6, 5, device=backend.device), torch.randint(0, 5, (6,), device=backend.device)
    expected = F.cross_entropy(logits / (0.04 * (logits.norm(dim=1, keepdim=True) + 1e-7)), y)
    torch.testing.assert_close(ood_fast.logitnorm(logits, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("corner", ["zero", "masked", "masked target", "nan", "+inf", "all -inf", "ignored nan"])
def test_corner(corner, backend):
    logits, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    if corner == "zero":
        logits[1] = 0
    elif corner == "masked":
        logits[:, 3] = -math.inf
    elif corner == "masked target":
        logits[1, y[1]] = -math.inf
    elif corner == "nan":
        logits[1, 2] = math.nan
    elif corner == "+inf":
        logits[1, 2] = math.inf
    elif corner == "all -inf":
        logits[1] = -math.inf
    else:
        logits[1], y[1] = math.nan, -100
    upstream = torch.rand(5) + 0.5
    ours = run(
        ood_fast.logitnorm,
        logits.to(backend.device),
        y.to(backend.device),
        upstream.to(backend.device),
        reduction="none",
    )
    truth = run(reference.logitnorm, logits.double(), y, upstream, reduction="none")
    for what, a, t in zip(["loss", "gradient"], ours, truth, strict=True):
        assert_no_worse(a, t, None, torch.float32, f"{corner}: {what}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction, backend):
    logits = torch.empty(0, 4, device=backend.device)
    y = torch.empty(0, dtype=torch.int64, device=backend.device)
    loss = ood_fast.logitnorm(logits, y, reduction=reduction)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y, reduction=reduction), equal_nan=True)


def test_gradcheck_in_float64():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 3, (4,))
    torch.autograd.gradcheck(lambda f: ood_fast.logitnorm(f, y, tau=0.7, label_smoothing=0.1, reduction="none"), logits)


def test_second_derivative_is_an_error(backend):
    logits = torch.randn(4, 3, device=backend.device, requires_grad=True)
    loss = ood_fast.logitnorm(logits, torch.tensor([0, 1, 2, 0], device=backend.device))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="logitnorm: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_l2_normalize(dtype):
    z = torch.randn(5, 7, dtype=torch.float64).to(dtype)
    z[2] = 0
    unit, norms = ood_fast.l2_normalize(z)
    truth_unit, truth_norms = reference.l2_normalize(z.double())
    assert unit.dtype == dtype
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    assert_no_worse(unit, truth_unit, None, dtype, "unit features")
    assert_no_worse(norms, truth_norms, None, norms.dtype, "norms")
    assert (unit[2] == 0).all()
    assert norms[2] == 0
    if dtype == torch.float64:
        torch.testing.assert_close(unit, F.normalize(z))
        z = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
        torch.autograd.gradcheck(ood_fast.l2_normalize, z)


def test_l2_normalize_gradient_at_zero_is_finite():
    z = torch.zeros(2, 3, requires_grad=True)
    unit, norms = ood_fast.l2_normalize(z)
    (unit.sum() + norms.sum()).backward()
    assert z.grad.isfinite().all()
