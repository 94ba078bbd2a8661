"""ELogitNorm and the boundary distance, through the public functions, on every backend."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.nn.functional as F
from support import Batch, assert_no_worse, loss_and_gradients

import ood_fast
from ood_fast import eager, ops, reference

# (n, c, m): what the shape reaches
SHAPES = [
    (4, 2, 3),  # two classes: one boundary
    (8, 5, 7),  # n >= c: the full table
    (3, 37, 5),  # n < c: rows of the distinct predictions; nothing divides a block size
    (6, 6, 1),  # n = c; one feature, so that the rows of W lie on a line
    (1, 10, 4),  # one sample
    (130, 4, 3),  # more samples of a class than one piece of the segmented sum holds
    (2, 1000, 16),  # ImageNet's classes
]
LARGE_SHAPES = [
    (2, 4100, 3),  # several tiles of the table; looped rows at float32 where registers end
    (70, 65, 40),  # full table of more than one tile
]
CPU = SimpleNamespace(name="eager", device=torch.device("cpu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_against_truth(batch: Batch, backend, dtype, **keywords) -> None:
    rounded = batch.to(dtype)
    n_samples = batch.logits.shape[0]
    upstream = torch.randn(n_samples) if keywords.get("reduction") == "none" else torch.tensor(1.7)
    names = ["loss", "logit gradient", "weight gradient"]
    on_device = {k: v.to(backend.device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    in_double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in keywords.items()}
    ours = loss_and_gradients(
        ood_fast.elogitnorm, rounded.to(dtype, backend.device), upstream.to(backend.device), **on_device
    )
    truth = loss_and_gradients(reference.elogitnorm, rounded.to(torch.float64), upstream, **in_double)
    plain = loss_and_gradients(reference.elogitnorm, rounded, upstream, **keywords)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert ours[1].dtype == ours[2].dtype == dtype
    for name, a, t, p in zip(names, ours, truth, plain, strict=True):
        assert_no_worse(a, t, p, dtype, f"{name} {dtype} {tuple(batch.W.shape)} {keywords}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_no_worse_than_plain_pytorch(shape, dtype, backend):
    check_against_truth(Batch.of(*shape), backend, dtype)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_shapes(shape, backend):
    check_against_truth(Batch.of(*shape), backend, torch.float32)


@pytest.mark.parametrize("shape", [(8, 5, 7), (3, 37, 5)], ids=str)
def test_float64_agrees_to_rounding(shape, backend):
    check_against_truth(Batch.of(*shape, dtype=torch.float64), backend, torch.float64)


KEYWORDS = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing all": {"label_smoothing": 1.0},
    "weight, smoothing, none": {"weight": True, "label_smoothing": 0.2, "reduction": "none"},
    "ignore": {"ignore": -100},
    "ignore a class": {"ignore": 2, "weight": True},
    "ignore, none, smoothing": {"ignore": -100, "reduction": "none", "label_smoothing": 0.1},
    "probabilities": {"probabilities": True},
    "probabilities, weight, smoothing": {"probabilities": True, "weight": True, "label_smoothing": 0.3},
    "probabilities, none": {"probabilities": True, "reduction": "none"},
    "average": {"average": "classes"},
}


def build_keywords(spec: dict, batch: Batch) -> dict:
    """Turn a row of KEYWORDS into arguments for this batch, `y` included where it changes."""
    n_samples, n_classes = batch.logits.shape
    keywords = {k: v for k, v in spec.items() if k in ("reduction", "label_smoothing", "average")}
    if spec.get("weight"):
        keywords["weight"] = torch.rand(n_classes) + 0.1
    if spec.get("probabilities"):
        keywords["y"] = torch.rand(n_samples, n_classes).softmax(1)
    if "ignore" in spec:
        keywords["ignore_index"] = spec["ignore"]
        keywords["y"] = batch.y.clone()
        keywords["y"][::3] = spec["ignore"]
    return keywords


@pytest.mark.parametrize("shape", [(7, 4, 6), (4, 9, 3)], ids=["n>=c", "n<c"])
@pytest.mark.parametrize("spec", KEYWORDS.values(), ids=KEYWORDS.keys())
def test_keywords(spec, shape, backend):
    batch = Batch.of(*shape)
    check_against_truth(batch, backend, torch.float32, **build_keywords(spec, batch))


@pytest.mark.parametrize("spec", KEYWORDS.values(), ids=KEYWORDS.keys())
def test_keywords_mean_what_cross_entropy_means(spec, backend):
    """With eps above every D each sample falls back to temperature 1: then the loss *is* F.cross_entropy."""
    batch = Batch.of(7, 4, 6)
    keywords = {k: v.to(backend.device) if torch.is_tensor(v) else v for k, v in build_keywords(spec, batch).items()}
    y = keywords.pop("y", batch.y.to(backend.device))
    batch = batch.to(torch.float32, backend.device)
    ours, theirs = (batch.logits.clone().requires_grad_() for _ in range(2))
    loss = ood_fast.elogitnorm(ours, batch.z, batch.W, batch.b, y, eps=1e9, **keywords)
    keywords.pop("average", None)
    expected = F.cross_entropy(theirs, y, **keywords)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(loss, expected)
    loss.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("keywords", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
@pytest.mark.parametrize("shape", [(4, 3, 2), (3, 8, 2)], ids=["n>=c", "n<c"])
def test_every_sample_ignored(shape, keywords, backend):
    """The mean is NaN, as in F.cross_entropy, and the gradients are 0: one such batch must not destroy the head."""
    batch = Batch.of(*shape, device=backend.device)
    y = torch.full(shape[:1], -100, device=backend.device)
    loss, d_logits, d_weight = loss_and_gradients(ood_fast.elogitnorm, batch, y=y, **keywords)
    assert loss.isnan()
    assert (d_logits == 0).all()
    assert (d_weight == 0).all()
    z, W = batch.z.detach().requires_grad_(), batch.W.detach().requires_grad_()
    ood_fast.linear_elogitnorm(z, W, batch.b, y, **keywords).backward()
    assert (z.grad == 0).all()
    assert (W.grad == 0).all()
    assert ood_fast.elogitnorm(batch.logits, batch.z, batch.W, batch.b, y, reduction="sum") == 0


# ----------------------------------------------------------------------------------------------------------------------
# Corners: each is NaN in the authors' code
# ----------------------------------------------------------------------------------------------------------------------


def corner_batches() -> dict[str, tuple[Batch, dict]]:
    """Name -> (batch, keywords), float32. The reference defines the values (and is proved for itself)."""
    torch.manual_seed(1)
    corners: dict[str, tuple[Batch, dict]] = {}

    batch = Batch.of(7, 5, 6)
    batch.W[3] = batch.W[1]
    corners["two rows of W coincide"] = batch, {}

    batch = Batch.of(7, 5, 6)
    batch.W[3] = batch.W[1]
    batch.logits[:, 2] = batch.logits.max() + 1
    corners["two rows of W coincide that no sample predicts"] = batch, {}

    batch = Batch.of(4, 9, 6)
    batch.W[:] = batch.W[0]
    corners["all rows of W coincide, n < c"] = batch, {}

    batch = Batch.of(7, 5, 6)
    batch.W[:] = 0
    corners["zero-initialised head"] = batch, {}

    batch = Batch.of(6, 5, 6)
    batch.logits[2] = 0.25
    corners["all logits of a sample tied"] = batch, {}

    batch = Batch.of(6, 5, 6)
    batch.logits[2, 1] = batch.logits[2, 4] = batch.logits[2].max() + 1
    corners["a tie for the first place"] = batch, {}

    for name, shape in {"n >= c": (7, 5, 6), "n < c": (4, 9, 6)}.items():
        batch = Batch.of(*shape)
        batch.logits[0, 1:3] = -math.inf
        batch.logits[2, 0] = -math.inf
        batch.y[:] = 4
        corners[f"masked classes, {name}"] = batch, {}
        corners[f"masked classes, smoothing and weights, {name}"] = (
            batch,
            {"label_smoothing": 0.3, "weight": torch.rand(shape[1]) + 0.1, "reduction": "none"},
        )
        y = torch.rand(shape[0], shape[1])
        y[batch.logits == -math.inf] = 0
        corners[f"masked classes, probabilities 0 there, {name}"] = batch, {"y": y, "label_smoothing": 0.1}

    batch = Batch.of(5, 4, 3)
    batch.logits[1, batch.y[1]] = -math.inf
    corners["masked target"] = batch, {"reduction": "none"}
    corners["masked target, sum"] = batch, {"reduction": "sum"}

    batch = Batch.of(5, 4, 3)
    batch.logits[1, 2] = -math.inf
    y = torch.rand(5, 4)
    corners["probability on a masked class"] = batch, {"reduction": "none", "y": y}
    corners["weight 0 on a masked target"] = (
        batch,
        {"y": batch.y.new_full((5,), 2), "weight": torch.tensor([1, 1, 0, 1.0])},
    )

    corners["NaN weight of a masked target"] = (
        batch,
        {"y": batch.y.new_full((5,), 2), "weight": torch.tensor([1, 1, math.nan, 1.0]), "reduction": "none"},
    )
    y = y.clone()
    y[1, 2] = math.nan
    corners["NaN probability on a masked class"] = batch, {"reduction": "none", "y": y}

    batch = Batch.of(5, 4, 3)
    batch.logits[3, :3] = -math.inf
    batch.y[3] = 3
    corners["one live class"] = batch, {"reduction": "none"}

    for name, value in {"NaN": math.nan, "+inf": math.inf}.items():
        for position in (0, 2):
            batch = Batch.of(5, 4, 3)
            batch.logits[1, position] = value
            corners[f"{name} in the logits at {position}"] = batch, {"reduction": "none"}
    batch = Batch.of(5, 4, 3)
    batch.logits[1] = -math.inf
    corners["all logits -inf"] = batch, {"reduction": "none"}

    batch = Batch.of(5, 4, 3)
    batch.logits[1] = math.nan
    y = batch.y.clone()
    y[1] = -100
    corners["ignored sample full of NaN"] = batch, {"y": y}

    batch = Batch.of(6, 5, 4)
    batch.logits *= 1e4
    corners["huge logits"] = batch, {}
    batch = Batch.of(6, 5, 4)
    batch.logits[1] *= 1e37
    batch.logits[3] = torch.tensor([1e37, -1.0, -math.inf, 2e37, 0.0])
    corners["logits near the largest number"] = batch, {"reduction": "none"}
    return corners


CORNERS = corner_batches()


@pytest.mark.parametrize("name", CORNERS)
def test_corner(name, backend):
    batch, keywords = CORNERS[name]
    keywords = dict(keywords)
    upstream = torch.rand(batch.logits.shape[0]) + 0.5 if keywords.get("reduction") == "none" else torch.tensor(1.3)
    on_device = {k: v.to(backend.device) if torch.is_tensor(v) else v for k, v in keywords.items()}
    ours = loss_and_gradients(
        ood_fast.elogitnorm, batch.to(torch.float32, backend.device), upstream.to(backend.device), **on_device
    )
    in_double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in keywords.items()}
    truth = loss_and_gradients(reference.elogitnorm, batch.to(torch.float64), upstream, **in_double)
    for what, a, t in zip(["loss", "logit gradient", "weight gradient"], ours, truth, strict=True):
        assert_no_worse(a, t, None, torch.float32, f"{name}: {what}")
    distance = ood_fast.boundary_distance(batch.logits.to(backend.device), batch.W.to(backend.device))
    expected = reference.boundary_distance(batch.logits.double(), batch.W.double())
    assert_no_worse(distance, expected, None, torch.float32, f"{name}: D")


def test_corner_values_by_hand(backend):
    """Values worked out by hand, not by way of the reference."""
    eye = torch.eye(3, device=backend.device)
    y = torch.tensor([0, 1], device=backend.device)
    tied = torch.zeros(2, 3, device=backend.device)
    loss, distance = ood_fast.elogitnorm(tied, tied, eye, None, y, reduction="none", return_distance=True)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(3)))
    assert (distance == 0).all()
    logits = torch.tensor([[2.0, -math.inf, 0.0], [1.0, 0.0, -math.inf]], device=backend.device)
    loss = ood_fast.elogitnorm(logits, None, eye, None, y, reduction="none")
    # D = gap / sqrt(2) over the one live boundary, so gap / D = sqrt(2) for both samples.
    expected = [math.log1p(math.exp(-math.sqrt(2))), math.sqrt(2) + math.log1p(math.exp(-math.sqrt(2)))]
    torch.testing.assert_close(loss.cpu(), torch.tensor(expected))
    assert (ood_fast.boundary_distance(logits[:, :1], eye[:1]) == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction, backend):
    logits = torch.empty(0, 4, device=backend.device, requires_grad=True)
    W = torch.randn(4, 3, device=backend.device, requires_grad=True)
    y = torch.empty(0, dtype=torch.int64, device=backend.device)
    loss = ood_fast.elogitnorm(logits, None, W, None, y, reduction=reduction)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y, reduction=reduction), equal_nan=True)
    (loss.sum() + ood_fast.boundary_distance(logits, W).sum()).backward()
    assert logits.grad.shape == (0, 4)
    assert (W.grad == 0).all()
    assert ood_fast.boundary_distance(logits, W).shape == (0,)


@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
def test_probabilities_of_an_empty_batch(ignore_index):
    logits, z = torch.empty(0, 4, requires_grad=True), torch.empty(0, 3, requires_grad=True)
    W, y = torch.randn(4, 3, requires_grad=True), torch.empty(0, 4)
    keywords = {"ignore_index": ignore_index, "reduction": "sum"}
    for loss in (
        ood_fast.elogitnorm(logits, None, W, None, y, **keywords),
        ood_fast.linear_elogitnorm(z, W, None, y, **keywords),
        ood_fast.logitnorm(logits, y, **keywords),
        ood_fast.nci_score(z, W, None, torch.zeros(3)).sum(),
    ):
        assert loss == 0
        loss.backward()


@pytest.mark.parametrize("n_samples", [6, 3], ids=["n>=c", "n<c"])
def test_close_rows_keep_their_digits(n_samples, backend):
    """D to 1e-4 and dW to 1e-3 relative in float32: all rows 1e-3 apart, and one pair 1e-4 apart."""
    for kind in ("all rows", "a pair"):
        batch = Batch.of(n_samples, 5, 64)
        if kind == "all rows":
            batch.W = torch.randn(64) + 1e-3 * torch.randn(5, 64) / 8
        else:
            batch.W[3] = batch.W[1] + 1e-4 * torch.randn(64) / 8
            batch.logits[0, 3] = batch.logits[0].max() + 1
        ours = loss_and_gradients(ood_fast.elogitnorm, batch.to(torch.float32, backend.device))
        truth = loss_and_gradients(reference.elogitnorm, batch.to(torch.float64))
        distance = ood_fast.boundary_distance(batch.logits.to(backend.device), batch.W.to(backend.device)).cpu()
        true_distance = reference.boundary_distance(batch.logits.double(), batch.W.double())
        torch.testing.assert_close(distance.double(), true_distance, rtol=1e-4, atol=0)
        error = (ours[2].cpu().double() - truth[2]).norm() / truth[2].norm()
        assert error < 1e-3, f"{kind}: dW is off by {error:.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# How autograd uses it
# ----------------------------------------------------------------------------------------------------------------------


def test_second_backward_and_retain_graph(backend):
    batch = Batch.of(6, 5, 4, device=backend.device)
    logits, W = batch.logits.requires_grad_(), batch.W.requires_grad_()
    loss = ood_fast.elogitnorm(logits, batch.z, W, batch.b, batch.y)
    first = torch.autograd.grad(loss, [logits, W], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [logits, W], torch.tensor(3.0, device=backend.device))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b), "the second backward wrote into the first one's gradients"
        torch.testing.assert_close(c, 3 * a)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=["logits", "W", "both"])
@pytest.mark.parametrize("n_samples", [6, 3], ids=["n>=c", "n<c"])
def test_each_subset_of_inputs(needs, n_samples, backend):
    batch = Batch.of(n_samples, 5, 4, device=backend.device)
    full = loss_and_gradients(ood_fast.elogitnorm, batch)[1:]
    inputs = [t.detach().requires_grad_(need) for t, need in zip((batch.logits, batch.W), needs, strict=True)]
    ood_fast.elogitnorm(inputs[0], batch.z, inputs[1], batch.b, batch.y).backward()
    for t, need, expected in zip(inputs, needs, full, strict=True):
        assert (t.grad is not None) == need
        if need and backend.name == "eager":
            assert torch.equal(t.grad, expected)
        elif need:  # W alone is not made ahead: the same factors in another order
            torch.testing.assert_close(t.grad, expected, rtol=1e-6, atol=3e-7)


def test_gradients_reach_features_and_bias_through_the_logits(backend):
    batch = Batch.of(6, 5, 4)
    grads = []
    for function, b in ((ood_fast.elogitnorm, batch.to(torch.float32, backend.device)), (reference.elogitnorm, batch)):
        z, W, bias = (t.detach().requires_grad_() for t in (b.z, b.W, b.b))
        loss = function(F.linear(z, W, bias), z, W, bias, b.y)
        grads.append([g.cpu() for g in torch.autograd.grad(loss, [z, W, bias])])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_detach_geometry_stops_only_the_distances_between_rows(backend):
    batch = Batch.of(6, 5, 4)
    device_batch = batch.to(torch.float32, backend.device)
    logits, W = device_batch.logits.requires_grad_(), device_batch.W.requires_grad_()
    loss = ood_fast.elogitnorm(logits, None, W, None, device_batch.y, detach_geometry=True)
    loss.backward()
    assert W.grad is None
    _, d_logits, _ = loss_and_gradients(ood_fast.elogitnorm, device_batch)
    assert torch.equal(logits.grad, d_logits), "the gaps inside D carry gradients either way"


def test_no_grad_builds_no_graph(backend):
    batch = Batch.of(6, 5, 4, device=backend.device)
    with torch.no_grad():
        quiet = ood_fast.elogitnorm(batch.logits, batch.z, batch.W.requires_grad_(), batch.b, batch.y)
    assert quiet.grad_fn is None
    loud = ood_fast.elogitnorm(batch.logits, batch.z, batch.W, batch.b, batch.y)
    assert loud.grad_fn is not None
    assert torch.equal(quiet, loud)


def test_second_derivative_is_an_error_not_a_wrong_number(backend):
    batch = Batch.of(6, 5, 4, device=backend.device)
    logits, W = batch.logits.requires_grad_(), batch.W.requires_grad_()
    loss = ood_fast.elogitnorm(logits, batch.z, W, batch.b, batch.y)
    d_logits, d_weight = torch.autograd.grad(loss, [logits, W], create_graph=True)
    with pytest.raises(RuntimeError, match=r"elogitnorm: second derivatives"):
        (d_logits.square().sum() + d_weight.sum()).backward()


def test_return_distance_is_detached_and_true(backend):
    batch = Batch.of(6, 5, 4, device=backend.device)
    logits = batch.logits.requires_grad_()
    loss, distance = ood_fast.elogitnorm(logits, None, batch.W, None, batch.y, return_distance=True)
    assert loss.requires_grad
    assert not distance.requires_grad
    torch.testing.assert_close(distance, ood_fast.boundary_distance(logits, batch.W).detach())


def test_inputs_are_never_written(backend):
    batch = Batch.of(6, 5, 4, device=backend.device)
    batch.logits[0, 1] = -math.inf
    before = [t.clone() for t in (batch.logits, batch.W, batch.y)]
    loss_and_gradients(ood_fast.elogitnorm, batch)
    for now, then in zip((batch.logits, batch.W, batch.y), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("shape", [(6, 5, 4), (4, 9, 6)], ids=["n>=c", "n<c"])
def test_non_contiguous_inputs(shape, backend):
    batch = Batch.of(*shape, device=backend.device)
    expected = loss_and_gradients(ood_fast.elogitnorm, batch)
    spread = Batch(
        torch.empty(shape[0] * 2, shape[1] * 3, device=backend.device)[::2, ::3].copy_(batch.logits),
        batch.z,
        batch.W.t().contiguous().t(),
        batch.b,
        torch.stack([batch.y, batch.y], 1)[:, 0],
    )
    for a, b in zip(loss_and_gradients(ood_fast.elogitnorm, spread), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    one_row = batch.logits[:1].expand(shape[0], -1)
    loss = ood_fast.elogitnorm(one_row, None, batch.W, None, batch.y[:1].expand(shape[0]))
    torch.testing.assert_close(
        loss, ood_fast.elogitnorm(batch.logits[:1], None, batch.W, None, batch.y[:1]), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("shape", [(70, 5, 4), (4, 9, 6)], ids=["n>=c", "n<c"])
def test_two_runs_give_the_same_bits(shape, backend):
    batch = Batch.of(*shape, device=backend.device)
    runs = [loss_and_gradients(ood_fast.elogitnorm, batch) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_mixed_dtypes(backend):
    """bf16 logits against a float32 head, as autocast makes them."""
    batch = Batch.of(6, 5, 4)
    logits = batch.logits.bfloat16()
    lo, W = logits.to(backend.device).requires_grad_(), batch.W.to(backend.device).requires_grad_()
    loss = ood_fast.elogitnorm(lo, None, W, None, batch.y.to(backend.device))
    loss.backward()
    assert (loss.dtype, lo.grad.dtype, W.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    truth = loss_and_gradients(
        reference.elogitnorm, Batch(logits.double(), batch.z.double(), batch.W.double(), batch.b.double(), batch.y)
    )
    assert_no_worse(loss, truth[0], None, torch.float32, "loss")
    assert_no_worse(W.grad, truth[2], None, torch.float32, "weight gradient")
    assert_no_worse(lo.grad, truth[1], None, torch.bfloat16, "logit gradient")


@pytest.mark.parametrize("shape", [(8, 5, 7), (3, 11, 5)], ids=["n>=c", "n<c"])
def test_boundary_distance_gradients(shape, backend):
    batch = Batch.of(*shape)
    batch.logits[0, 2] = -math.inf
    batch.W[4] = batch.W[1]
    upstream = torch.randn(shape[0])
    results = []
    for function, b in (
        (ood_fast.boundary_distance, batch.to(torch.float32, backend.device)),
        (reference.boundary_distance, batch.to(torch.float64)),
    ):
        logits, W = b.logits.requires_grad_(), b.W.requires_grad_()
        distance = function(logits, W, average="classes")
        results.append([distance, *torch.autograd.grad(distance, [logits, W], upstream.to(distance))])
    for what, a, t in zip(["D", "logit gradient", "weight gradient"], *results, strict=True):
        assert_no_worse(a, t, None, torch.float32, what)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(8, 5, 7), (3, 11, 5)], ids=["n>=c", "n<c"])
def test_gradients_of_the_distance_of_a_broken_row(shape, value, backend):
    """0 * NaN is NaN, as in PyTorch; a row without a live class has no boundary, and moves no row of W."""
    batch = Batch.of(*shape)
    batch.logits[1, slice(None) if value == -math.inf else 2] = value
    for of_broken in (0.0, 1.0):
        upstream, grads = torch.ones(shape[0]), []
        upstream[1] = of_broken
        for module, b in ((ood_fast, batch.to(torch.float32, backend.device)), (reference, batch.to(torch.float64))):
            logits, W = b.logits.requires_grad_(), b.W.requires_grad_()
            distance = module.boundary_distance(logits, W)
            assert distance[1].isnan()
            grads.append(torch.autograd.grad(distance, [logits, W], upstream.to(distance)))
        for a, t in zip(*grads, strict=True):
            assert_no_worse(a, t, None, torch.float32, f"upstream {of_broken}")


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 6, 5)], ids=["n>=c", "n<c"])
def test_gradcheck_in_float64(shape):
    """Finite differences of the function itself: independent of the reference."""
    batch = Batch.of(*shape, dtype=torch.float64)
    logits, W = batch.logits.requires_grad_(), batch.W.requires_grad_()
    weight = torch.rand(shape[1], dtype=torch.float64)

    def loss(logits, W):
        return ood_fast.elogitnorm(logits, None, W, None, batch.y, weight=weight, label_smoothing=0.1, reduction="none")

    torch.autograd.gradcheck(loss, (logits, W))
    torch.autograd.gradcheck(ood_fast.boundary_distance, (logits, W))


# ----------------------------------------------------------------------------------------------------------------------
# Small heads on the CPU
# ----------------------------------------------------------------------------------------------------------------------

SMALL = {"n > c": (8, 5, 7), "wide": (70, 65, 160)}


@pytest.mark.parametrize("spec", KEYWORDS.values(), ids=KEYWORDS.keys())
@pytest.mark.parametrize("shape", [(8, 5, 7), (130, 4, 3), (70, 65, 40)], ids=str)
def test_small_heads(shape, spec):
    with ops.use_backend("eager"):
        batch = Batch.of(*shape)
        check_against_truth(batch, CPU, torch.float32, **build_keywords(spec, batch))


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_given_away_only_once(reduction, shape):
    """What a caller does with the first ones does not reach the second; an upstream of 1 and any other agree."""
    with ops.use_backend("eager"):
        batch = Batch.of(*shape)
        inputs = batch.logits.requires_grad_(), batch.W.requires_grad_()
        loss = ood_fast.elogitnorm(inputs[0], None, inputs[1], None, batch.y, reduction=reduction)
        one = torch.ones_like(loss)
        first = torch.autograd.grad(loss, inputs, one, retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        second = torch.autograd.grad(loss, inputs, one, retain_graph=True)
        third = torch.autograd.grad(loss, inputs, 3 * one)
        fresh = ood_fast.elogitnorm(inputs[0], None, inputs[1], None, batch.y, reduction=reduction)
        scaled = torch.autograd.grad(fresh, inputs, 3 * one)
        for g, again, thrice, also_thrice in zip(kept, second, third, scaled, strict=True):
            assert torch.equal(again, g)
            for tripled in (thrice, also_thrice):
                torch.testing.assert_close(tripled, 3 * g, rtol=1e-5, atol=1e-6 * g.abs().max().item())


def test_no_gradient_is_computed_that_nobody_asked_for(monkeypatch):
    asked, run = [], eager.elogitnorm_backward
    monkeypatch.setattr(eager, "elogitnorm_backward", lambda *args: asked.append(args[-1][::2][:2]) or run(*args))
    with ops.use_backend("eager"):
        batch = Batch.of(8, 5, 7)
        logits, W = batch.logits.requires_grad_(), batch.W.requires_grad_()

        def loss(logits=logits, W=W, **keywords):
            return ood_fast.elogitnorm(logits, None, W, None, batch.y, **keywords)

        with torch.no_grad():
            loss()
        loss(logits.detach(), W.detach())
        assert not asked
        loss(detach_geometry=True).backward()
        loss(logits.detach()).backward()
        loss().backward()
        loss(reduction="none").sum().backward()
        assert asked == [(True, False), (False, True), (True, True), (True, True)]


def test_inputs_that_changed_before_backward_are_noticed():
    """As F.cross_entropy does."""
    with ops.use_backend("eager"):
        batch = Batch.of(8, 5, 7)
        W = batch.W.requires_grad_()
        loss = ood_fast.elogitnorm(batch.logits, None, W, None, batch.y)
        with torch.no_grad():
            W.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
def test_close_rows_of_a_small_head(shape):
    """A few close pairs keep their digits, also where an outlier makes all others close."""
    with ops.use_backend("eager"):
        batch = Batch.of(*shape)
        for target, source, gap in ((1, 0, 1e-4), (3, 2, 1e-3), (4, 2, 1e-3)):
            batch.W[target] = batch.W[source] + gap * batch.W[source].norm() * torch.randn(shape[2]) / shape[2] ** 0.5
        truth = loss_and_gradients(reference.elogitnorm, batch.to(torch.float64))
        ours = loss_and_gradients(ood_fast.elogitnorm, batch)
        for a, t in zip(ours, truth, strict=True):
            assert (a.double() - t).norm() <= 2e-5 * t.norm()
        batch.W[2] *= 1000
        truth = loss_and_gradients(reference.elogitnorm, batch.to(torch.float64))
        ours = loss_and_gradients(ood_fast.elogitnorm, batch)
        for a, t in zip(ours, truth, strict=True):
            assert (a.double() - t).norm() <= 1e-3 * t.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_of_inf(reduction):
    """A GradScaler's first steps: ignored samples have gradient 0 all the same."""
    with ops.use_backend("eager"):
        batch = Batch.of(8, 5, 7)
        batch.y[0] = -100
        logits = batch.logits.requires_grad_()
        loss = ood_fast.elogitnorm(logits, None, batch.W, None, batch.y, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, logits, torch.full_like(loss, math.inf))
        assert not gradient[0].any()
        assert not gradient[1:].isfinite().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tangent_of_the_upstream_gradient(reduction):
    forward_ad = torch.autograd.forward_ad
    with ops.use_backend("eager"):
        batch = Batch.of(8, 5, 7)
        inputs = batch.logits.requires_grad_(), batch.W.requires_grad_()
        loss = ood_fast.elogitnorm(inputs[0], None, inputs[1], None, batch.y, reduction=reduction)
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
            for gradient in torch.autograd.grad(loss, inputs, upstream):
                primal, tangent = forward_ad.unpack_dual(gradient)
                torch.testing.assert_close(tangent, 2 * primal)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_autograd(reduction):
    """The loss in eager mode, its backward pass traced: by the operators."""
    torch.compiler.reset()
    with ops.use_backend("eager"):
        batch = Batch.of(8, 5, 7)
        upstream = torch.rand(8) if reduction == "none" else torch.tensor(1.7)
        plain = loss_and_gradients(ood_fast.elogitnorm, batch, upstream, reduction=reduction)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            logits, W = batch.logits.detach().requires_grad_(), batch.W.detach().requires_grad_()
            loss = ood_fast.elogitnorm(logits, None, W, None, batch.y, reduction=reduction)
            loss.backward(upstream)
        for traced, expected in zip((logits.grad, W.grad), plain[1:], strict=True):
            torch.testing.assert_close(traced, expected, rtol=1e-5, atol=1e-6)
