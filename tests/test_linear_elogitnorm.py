"""ELogitNorm without logits: the same numbers as through the logits, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import Batch, assert_no_worse
from test_elogitnorm import KEYWORDS, build_keywords

import ood_fast
from ood_fast import ops, reference
from ood_fast.eager import sizes


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Once as these small batches run, once cut into chunks of two rows, tiles of W included."""
    if request.param == "many chunks":
        monkeypatch.setattr(sizes, "LINEAR_BUFFER_ELEMENTS", 1)
        monkeypatch.setattr(sizes, "MIN_LINEAR_ROWS", 2)
        monkeypatch.setattr(sizes, "WEIGHT_TILE_ELEMENTS", 12)
        monkeypatch.setattr(sizes, "ROW_CHUNK_ELEMENTS", 1)
        if ops.has_triton():
            from ood_fast.kernels import linear

            monkeypatch.setattr(linear, "LINEAR_LOGIT_ELEMENTS", 1)
    return request.param


def test_elogitnorm_without_logits_names_this_function():
    batch = Batch.of(4, 3, 2)
    with pytest.raises(TypeError, match=r"logits: got None, expected a tensor; .*linear_elogitnorm\(z, W, b, y\)"):
        ood_fast.elogitnorm(None, batch.z, batch.W, batch.b, batch.y)


def run(function, batch, upstream=None, y=None, **keywords):
    z, W, b = (t.detach().requires_grad_() for t in (batch.z, batch.W, batch.b))
    loss = function(z, W, b, batch.y if y is None else y, **keywords)
    upstream = torch.tensor(1.7) if upstream is None else upstream
    return [loss.detach(), *torch.autograd.grad(loss, [z, W, b], upstream.to(loss))]


through_logits = reference.linear_elogitnorm


NAMES = ["loss", "dz", "dW", "db"]


def check(batch, backend, dtype=torch.float32, **keywords):
    upstream = torch.rand(batch.z.shape[0]) + 0.5 if keywords.get("reduction") == "none" else None
    on_device = {k: v.to(backend.device) if torch.is_tensor(v) else v for k, v in keywords.items()}
    in_double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in keywords.items()}
    ours = run(ood_fast.linear_elogitnorm, batch.to(dtype, backend.device), upstream, **on_device)
    truth = run(through_logits, batch.to(dtype).to(torch.float64), upstream, **in_double)
    plain = run(through_logits, batch.to(dtype), upstream, **keywords)
    for name, a, t, p, like in zip(NAMES, ours, truth, plain, [None, batch.z, batch.W, batch.b], strict=True):
        assert a.dtype == (torch.float32 if like is None and dtype != torch.float64 else dtype)
        assert_no_worse(a, t, p, dtype, f"{name} {tuple(batch.W.shape)} {keywords}")


@pytest.mark.parametrize("shape", [(5, 2, 3), (8, 5, 7), (3, 37, 5), (6, 6, 4), (5, 7, 3)], ids=str)
def test_agrees_with_the_logits(shape, chunks, backend):
    check(Batch.of(*shape), backend)


@pytest.mark.parametrize("shape", [(7, 4, 6), (4, 9, 3)], ids=["n>=c", "n<c"])
@pytest.mark.parametrize("spec", KEYWORDS.values(), ids=KEYWORDS.keys())
def test_keywords(spec, shape, chunks, backend):
    batch = Batch.of(*shape)
    check(batch, backend, **build_keywords(spec, batch))


@pytest.mark.parametrize("shape", [(7, 4, 6), (4, 9, 3)], ids=["n>=c", "n<c"])
def test_detached_geometry(shape, chunks, backend):
    check(Batch.of(*shape), backend, detach_geometry=True)


def test_float64_and_half(backend):
    check(Batch.of(5, 7, 3, dtype=torch.float64), backend, torch.float64)
    if backend.name == "eager":  # all arithmetic is fp32 there, the logits included
        batch = Batch.of(4, 9, 6).to(torch.bfloat16)
        ours = run(ood_fast.linear_elogitnorm, batch)
        truth = run(through_logits, batch.to(torch.float64))
        for name, a, t in zip(NAMES, ours, truth, strict=True):
            assert_no_worse(a, t, None, torch.float32 if name == "loss" else torch.bfloat16, name)


@pytest.mark.parametrize("shape", [(6, 4, 5), (4, 9, 5)], ids=["n>=c", "n<c"])
def test_corners(shape, chunks, backend):
    """Coincident rows, a tie, an ignored sample, -inf and NaN through the bias."""
    batch = Batch.of(*shape)
    batch.W[3] = batch.W[1]
    batch.b[3] = batch.b[1]
    y = batch.y.clone()
    y[0] = -100
    check(batch, backend, y=y, reduction="none")
    batch.b[2] = -torch.inf
    y[y == 2] = 0
    upstream = torch.rand(shape[0]) + 0.5
    ours = run(
        ood_fast.linear_elogitnorm,
        batch.to(torch.float32, backend.device),
        upstream,
        y=y.to(backend.device),
        reduction="none",
    )
    truth = run(through_logits, batch.to(torch.float64), upstream, y=y, reduction="none")
    for name, a, t in zip(NAMES, ours, truth, strict=True):
        assert_no_worse(a, t, None, torch.float32, name)


def test_retained_graph_and_scaled_gradients(backend):
    """The first backward hands its buffers over, scaled in place; the second computes them again."""
    batch = Batch.of(4, 9, 5, device=backend.device)
    z, W, b = (t.requires_grad_() for t in (batch.z, batch.W, batch.b))
    loss = ood_fast.linear_elogitnorm(z, W, b, batch.y)
    first = torch.autograd.grad(loss, [z, W, b], torch.tensor(2.0, device=backend.device), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [z, W, b], torch.tensor(-6.0, device=backend.device), retain_graph=True)
    for a, k, s in zip(first, kept, second, strict=True):
        assert torch.equal(a, k)
        torch.testing.assert_close(s, -3 * a)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(6, 4, 5), (4, 9, 5)], ids=["n>=c", "n<c"])
def test_each_input_alone(shape, reduction, needs, backend):
    batch = Batch.of(*shape, device=backend.device)
    full = run(
        ood_fast.linear_elogitnorm,
        batch,
        torch.ones(()).expand(shape[0] if reduction == "none" else ()),
        reduction=reduction,
    )
    inputs = [t.detach().requires_grad_(need) for t, need in zip((batch.z, batch.W, batch.b), needs, strict=True)]
    ood_fast.linear_elogitnorm(*inputs, batch.y, reduction=reduction).sum().backward()
    for t, need, expected in zip(inputs, needs, full[1:], strict=True):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, expected, rtol=1e-5, atol=1e-6)


def test_no_bias_return_distance_and_no_grad(backend):
    batch = Batch.of(4, 9, 5, device=backend.device)
    with torch.no_grad():
        loss, distance = ood_fast.linear_elogitnorm(batch.z, batch.W, None, batch.y, return_distance=True)
    logits = F.linear(batch.z, batch.W)
    expected = ood_fast.elogitnorm(logits, batch.z, batch.W, None, batch.y, return_distance=True)
    torch.testing.assert_close((loss, distance), expected)
    assert loss.grad_fn is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction, backend):
    torch.compiler.reset()
    batch = Batch.of(6, 9, 4, device=backend.device)
    batch.y[1] = -100

    def loss(z, W, b, y):
        return ood_fast.linear_elogitnorm(z, W, b, y, reduction=reduction)

    upstream = torch.ones(6, device=backend.device) if reduction == "none" else torch.ones((), device=backend.device)
    expected = run(loss, batch, upstream)
    compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"), batch, upstream)
    for a, e in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shape", [(8, 5, 6), (4, 9, 6)], ids=["n>=c", "n<c"])
def test_compile_takes_any_strides(shape):
    """Every input transposed or with gaps: eager results, and gradients of the inputs' shapes."""
    n, c, m = shape
    compiler = "inductor" if n > c else "aot_eager"  # which takes seconds, and holds operators to their strides
    z, W, b = torch.randn(m, n).t(), torch.randn(m, 2 * c).t()[::2], torch.randn(2 * c)[::2]
    y = torch.randint(0, c, (n, 2))[:, 0]
    for reduction in ("mean", "none"):

        def loss(z, W, b, reduction=reduction):
            whole = ood_fast.linear_elogitnorm(z, W, b, y, reduction=reduction)
            return whole.sum() + ood_fast.elogitnorm((z @ W.t()).t().contiguous().t(), None, W, None, y)

        inputs = [t.detach().requires_grad_() for t in (z, W, b)]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(*inputs), inputs)
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)


def test_second_derivative_is_an_error(backend):
    batch = Batch.of(4, 5, 3, device=backend.device)
    z = batch.z.requires_grad_()
    (grad,) = torch.autograd.grad(ood_fast.linear_elogitnorm(z, batch.W, None, batch.y), z, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_elogitnorm: second derivatives"):
        grad.sum().backward()


def test_two_runs_give_the_same_bits(chunks, backend):
    batch = Batch.of(5, 9, 4, device=backend.device)
    for a, b in zip(run(ood_fast.linear_elogitnorm, batch), run(ood_fast.linear_elogitnorm, batch), strict=True):
        assert torch.equal(a, b)


def test_the_logits_are_never_stored():
    """No tensor of n x c elements, forward or backward: the largest is the gradient of W (c, m), next the chunk."""
    n_samples, n_classes, n_features = 512, 4000, 8
    batch = Batch.of(n_samples, n_classes, n_features)
    batch.y = torch.randint(0, n_classes, (n_samples,))
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    saved, sizes.LINEAR_BUFFER_ELEMENTS = sizes.LINEAR_BUFFER_ELEMENTS, 1 << 18
    try:
        with ops.use_backend("eager"), Watch():
            run(ood_fast.linear_elogitnorm, batch)
    finally:
        sizes.LINEAR_BUFFER_ELEMENTS = saved
    assert largest < n_samples * n_classes / 4


def test_a_million_classes():
    batch_z, W = torch.randn(4, 8), torch.randn(1_000_000, 8)
    y = torch.tensor([0, 999_999, 5, 7])
    loss, _, dW, _ = run(ood_fast.linear_elogitnorm, Batch(None, batch_z, W, torch.zeros(1_000_000), y))
    assert loss.isfinite()
    assert dW.isfinite().all()


def test_gradcheck_in_float64():
    batch = Batch.of(3, 5, 4, dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda z, W, b, r=reduction: ood_fast.linear_elogitnorm(z, W, b, batch.y, reduction=r),
            tuple(t.detach().requires_grad_() for t in (batch.z, batch.W, batch.b)),
        )


def test_bad_input():
    batch = Batch.of(5, 4, 3)
    with pytest.raises(ValueError, match=r"z: got shape \(5, 3\), expected \(n, 7\) to fit W"):
        ood_fast.linear_elogitnorm(batch.z, torch.randn(4, 7), None, batch.y)
    with pytest.raises(
        ValueError, match=r"y: got torch.int64 of shape \(4,\), expected int64 class indices of shape \(5,\)"
    ):
        ood_fast.linear_elogitnorm(batch.z, batch.W, None, batch.y[:4])
    with pytest.raises(IndexError, match="target 9 at position 0"):
        ood_fast.linear_elogitnorm(batch.z, batch.W, None, torch.tensor([9, 0, 0, 0, 0]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction):
    z, W = torch.empty(0, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = ood_fast.linear_elogitnorm(z, W, None, torch.empty(0, dtype=torch.int64), reduction=reduction)
    expected = F.cross_entropy(F.linear(z, W), torch.empty(0, dtype=torch.int64), reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert (W.grad == 0).all()
    assert z.grad.shape == (0, 3)


def test_chunks_with_close_rows_leave_those_after_them_alone(monkeypatch):
    """n < c, several chunks; only the first predicts one of two rows that nearly coincide."""
    W = torch.randn(12, 5)
    W[0] = torch.eye(5)[0]  # so that every product rounds the two logits alike
    W[1] = W[0] * (1 + 2**-21)
    z = 3 * torch.stack([W[0], W[0], W[5], W[6]])
    y = torch.tensor([0, 3, 5, 7])

    def gradient():
        head = W.clone().requires_grad_()
        ood_fast.linear_elogitnorm(z, head, None, y, reduction="sum").backward()
        return head.grad

    whole = gradient()
    monkeypatch.setattr(sizes, "MIN_LINEAR_ROWS", 2)
    monkeypatch.setattr(sizes, "LINEAR_BUFFER_ELEMENTS", 1)
    torch.testing.assert_close(gradient()[2:], whole[2:])
