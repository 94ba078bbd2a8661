"""The NCI score through the public function, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from support import Batch, assert_no_worse
from test_elogitnorm import DTYPES

import ood_fast
from ood_fast import reference

# (n, c, m): one class and one feature; small; no block size divides anything; many classes; many features
SHAPES = [(3, 1, 1), (6, 5, 7), (5, 37, 33), (2, 1000, 16), (2, 3, 2500)]


def run(function, z, W, b, mean, upstream, **keywords):
    z, W, mean = (t.detach().requires_grad_() for t in (z, W, mean))
    score = function(z, W, b, mean, **keywords)
    return [score.detach(), *torch.autograd.grad(score, [z, W, mean], upstream.to(score))]


NAMES = ["score", "feature gradient", "weight gradient", "mean gradient"]


@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "features alone"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain_pytorch(shape, dtype, with_logits, backend):
    batch = Batch.of(*shape).to(dtype)
    # The prediction of the rounded tensors, well apart, so that no summation order can change it.
    batch.b = (torch.randperm(shape[1]) * 3.0).to(dtype) if shape[1] < 100 else batch.b
    logits = (batch.z.double() @ batch.W.double().T + batch.b.double()).to(dtype)
    mean = torch.randn(shape[2]).to(dtype)
    upstream = torch.randn(shape[0])
    keywords = {"logits": logits} if with_logits else {}
    if not with_logits and shape[1] >= 100:
        pytest.skip("half-precision ties: the prediction from features is tested by its own test")
    on = backend.device
    ours = run(
        ood_fast.nci_score,
        *(t.to(on) for t in (batch.z, batch.W, batch.b, mean, upstream)),
        **{k: v.to(on) for k, v in keywords.items()},
    )
    truth = run(
        reference.nci_score,
        *(t.double() for t in (batch.z, batch.W, batch.b, mean, upstream)),
        **{k: v.double() for k, v in keywords.items()},
    )
    plain = run(reference.nci_score, batch.z, batch.W, batch.b, mean, upstream, logits=logits)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    for name, a, t, p in zip(NAMES, ours, truth, plain, strict=True):
        assert_no_worse(a, t, p, dtype, f"{name} {dtype} {shape}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 37, 33), (3, 200, 8), (2, 1000, 16)], ids=str)
def test_prediction_from_features_alone(shape, bias, backend):
    """Same score as with the logits, whatever the tiles; c and m that no tile divides."""
    batch = Batch.of(*shape, device=backend.device)
    b = batch.b if bias else None
    logits = torch.nn.functional.linear(batch.z, batch.W, b)
    mean = torch.randn(shape[2], device=backend.device)
    torch.testing.assert_close(
        ood_fast.nci_score(batch.z, batch.W, b, mean),
        ood_fast.nci_score(batch.z, batch.W, b, mean, logits=logits),
        rtol=1e-5,
        atol=1e-5,
    )


def test_prediction_ties_take_the_first_class(backend):
    W = torch.tensor([[1.0, 0.0], [2.0, 1.0], [2.0, 1.0], [0.0, 5.0]], device=backend.device)
    z = torch.tensor([[1.0, 0.0]], device=backend.device)
    mean = torch.tensor([0.0, 1.0], device=backend.device)
    expected = (W[1] @ (z[0] - mean)) / math.sqrt(2)
    torch.testing.assert_close(ood_fast.nci_score(z, W, None, mean, alpha=0)[0], expected)


def test_prediction_of_float64_logits_is_not_rounded(backend):
    z, W, mean = torch.randn(3, 4), torch.randn(2, 4), torch.randn(4)
    logits = torch.tensor([[1.0, 1.0 + 1e-12]] * 3, dtype=torch.float64)
    given = [t.to(backend.device) for t in (z, W, mean, logits)]
    score = ood_fast.nci_score(given[0], given[1], None, given[2], logits=given[3])
    torch.testing.assert_close(score.cpu(), reference.nci_score(z, W, None, mean, logits=logits))


def test_corners(backend):
    """z = mu has no direction: pScore 0 and finite gradients. A NaN logit gives NaN."""
    batch = Batch.of(4, 3, 5)
    mean = batch.z[1].clone()
    batch.z[2] = 0
    logits = batch.logits.clone()
    logits[3, 1] = math.nan
    upstream = torch.randn(4)
    on = backend.device
    ours = run(
        ood_fast.nci_score,
        *(t.to(on) for t in (batch.z, batch.W, batch.b, mean, upstream)),
        logits=logits.to(on),
        alpha=0.1,
    )
    truth = run(
        reference.nci_score,
        *(t.double() for t in (batch.z, batch.W, batch.b, mean, upstream)),
        logits=logits.double(),
        alpha=0.1,
    )
    assert_no_worse(ours[0], truth[0], None, torch.float32, "score")
    torch.testing.assert_close(ours[0][1].cpu(), 0.1 * batch.z[1].abs().sum())
    assert ours[0][3].isnan()
    assert ours[1][3].isnan().all()
    assert ours[1][1].isfinite().all()
    assert_no_worse(ours[1][:3], truth[1][:3], None, torch.float32, "feature gradient")


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_input_alone(needs, backend):
    batch = Batch.of(6, 4, 5, device=backend.device)
    mean = torch.randn(5, device=backend.device)
    full = run(ood_fast.nci_score, batch.z, batch.W, batch.b, mean, torch.ones(6, device=backend.device))[1:]
    inputs = [t.detach().requires_grad_(need) for t, need in zip((batch.z, batch.W, mean), needs, strict=True)]
    ood_fast.nci_score(inputs[0], inputs[1], batch.b, inputs[2]).sum().backward()
    for t, need, expected in zip(inputs, needs, full, strict=True):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, expected)


def test_non_contiguous_and_mixed_dtypes(backend):
    batch = Batch.of(6, 4, 5)
    mean = torch.randn(5)
    on = backend.device
    expected = reference.nci_score(
        batch.z.bfloat16().double(), batch.W.double(), None, mean.double(), logits=batch.logits.double()
    )
    z = torch.empty(12, 10, dtype=torch.bfloat16, device=on)[::2, ::2].copy_(batch.z)
    W = batch.W.to(on).t().contiguous().t()
    logits = batch.logits.to(on).t().contiguous().t()
    score = ood_fast.nci_score(z, W, None, mean.to(on), logits=logits)
    assert_no_worse(score, expected, None, torch.float32, "score")


def test_two_runs_give_the_same_bits(backend):
    batch = Batch.of(150, 3, 5, device=backend.device)
    mean = torch.randn(5, device=backend.device)
    upstream = torch.randn(150, device=backend.device)
    runs = [run(ood_fast.nci_score, batch.z, batch.W, batch.b, mean, upstream, logits=batch.logits) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_empty_batch(backend):
    W, mean = torch.randn(3, 4, device=backend.device), torch.randn(4, device=backend.device)
    assert ood_fast.nci_score(torch.empty(0, 4, device=backend.device), W, None, mean).shape == (0,)


def test_gradcheck_in_float64():
    batch = Batch.of(4, 3, 5, dtype=torch.float64)
    mean = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda z, W, mean: ood_fast.nci_score(z, W, None, mean, logits=batch.logits, alpha=0.1),
        (batch.z.requires_grad_(), batch.W.requires_grad_(), mean),
    )


def test_nan_in_the_bias_is_not_a_finite_score(backend):
    batch = Batch.of(3, 600, 5, device=backend.device)
    batch.b[500] = math.nan
    assert ood_fast.nci_score(batch.z, batch.W, batch.b, batch.z.mean(0)).isnan().all()
