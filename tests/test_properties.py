"""What must hold whatever the numbers are (Hypothesis), and the digits that are promised where they are hard to keep.

The examples are derived from the code of the tests, not drawn anew each time: a red run stays red.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import Batch, loss_and_gradients

import ood_fast
from ood_fast import ops, reference

COMMON = settings(
    max_examples=70, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def batches(draw, dtype=torch.float64, corners: bool = True) -> Batch:
    """Batches of every proportion: n < c and n >= c, two classes, one feature, scales from 1e-3 to 1e3.

    With `corners`: tied logits, coincident rows of W, masked classes.
    """
    n_samples, n_classes, n_features = draw(st.integers(1, 9)), draw(st.integers(2, 9)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(n_samples, n_classes, generator=generator, dtype=torch.float64)
    logits = logits * 10 ** draw(st.floats(-3, 3))
    W = torch.randn(n_classes, n_features, generator=generator, dtype=torch.float64) * 10 ** draw(st.floats(-2, 2))
    W = W + 10 * draw(st.floats(-1, 1))
    y = torch.randint(0, n_classes, (n_samples,), generator=generator)
    if corners:
        if draw(st.booleans()):
            logits = (logits * 2).round() / 2  # ties
        if draw(st.booleans()):
            W[draw(st.integers(0, n_classes - 1))] = W[draw(st.integers(0, n_classes - 1))]
        if draw(st.booleans()):
            masked = torch.rand(logits.shape, generator=generator) < 0.3
            masked[torch.arange(n_samples), y] = False
            logits = logits.masked_fill(masked, -math.inf)
    z = torch.zeros(n_samples, n_features)
    return Batch(logits.to(dtype), z.to(dtype), W.to(dtype), torch.zeros(n_classes, dtype=dtype), y)


@st.composite
def loss_keywords(draw, batch: Batch) -> dict:
    """Every keyword of F.cross_entropy, and ours; `y` where it is not the one of the batch."""
    n_samples, n_classes = batch.logits.shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keywords = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "average": draw(st.sampled_from(["boundaries", "classes"])),
    }
    if draw(st.booleans()):
        keywords["weight"] = torch.rand(n_classes, generator=generator, dtype=torch.float64) + 0.1
    target = draw(st.sampled_from(["indices", "ignored", "probabilities"]))
    if target == "ignored":
        keywords["y"] = batch.y.masked_fill(torch.rand(n_samples, generator=generator) < 0.3, -100)
        assume((keywords["y"] != -100).any())  # a mean over nothing is NaN: tested by itself
    elif target == "probabilities":
        y = torch.rand(n_samples, n_classes, generator=generator, dtype=torch.float64)
        keywords["y"] = (y * batch.logits.isfinite()).to(batch.logits.dtype)
    return keywords


def distances(batch: Batch) -> torch.Tensor:
    return ood_fast.boundary_distance(batch.logits, batch.W)


def none_near_eps(distance: torch.Tensor) -> bool:
    """Whether no D is so near eps that rounding decides on which side it is: there the loss jumps."""
    return bool(((distance == 0) | (distance > 1e-5)).all())


def term_sizes(batch: Batch, mass: float = 1.0) -> tuple[float, float, float]:
    """How large the terms are that loss, logit gradient and weight gradient add up: they may cancel to nothing.

    `mass` bounds what class weights multiply a sample with. With g the gaps, R the inverse distances between rows and T
    the temperature: g/T;  1/T and (g/T) R/(K T);  (g/T) R.
    """
    f, W = batch.logits.double(), batch.W.double()
    D = reference.boundary_distance(f, W)
    T = torch.where(D <= 1e-6, 1.0, D)[:, None]
    gap = (f.max(1, keepdim=True).values - f).masked_fill(f.isinf(), 0.0)
    apart = torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")[f.argmax(1)]
    R = torch.where(apart > 0, 1 / apart, 0.0)
    steepest = 1 + (gap / T).max()
    sizes = steepest, (1 / T).max() + steepest * (R / T).max(), steepest * R.max()
    return tuple(mass * len(f) * size.item() + 1e-300 for size in sizes)


WHAT = ["loss", "logit gradient", "weight gradient"]


def assert_close(actual, expected, what: str, size: float = 0.0, tolerance: float = 1e-11) -> None:
    """To `tolerance` of the entry or, where terms cancel, of the size of these terms."""
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance * size, msg=lambda text: f"{what}: {text}"
    )


@pytest.fixture(autouse=True, scope="module")
def eager_by_default():
    with ops.use_backend("eager"):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Properties
# ----------------------------------------------------------------------------------------------------------------------


@COMMON
@given(st.data())
def test_float64_agrees_with_the_reference(data):
    batch = data.draw(batches())
    keywords = data.draw(loss_keywords(batch))
    assume(none_near_eps(distances(batch)))
    ours = loss_and_gradients(ood_fast.elogitnorm, batch, **dict(keywords))
    truth = loss_and_gradients(reference.elogitnorm, batch, **dict(keywords))
    for a, t, what, size in zip(ours, truth, WHAT, term_sizes(batch, mass=10), strict=True):
        assert_close(a, t, f"{what} {keywords}", size)


@COMMON
@given(st.data())
def test_float32_agrees_with_the_reference(data):
    """Loss and logit gradient to rounding; dW to what differences of rows keep after their mean row is subtracted."""
    batch = data.draw(batches(torch.float32))
    assume(none_near_eps(distances(batch)))
    ours = loss_and_gradients(ood_fast.elogitnorm, batch)
    truth = loss_and_gradients(reference.elogitnorm, batch.to(torch.float64))
    sizes = term_sizes(batch)
    for a, t, what, size in zip(ours, truth, WHAT, sizes, strict=True):
        assert_close(a.double(), t, what, size, 1e-3 if what == "weight gradient" else 5e-5)


@COMMON
@given(st.data())
def test_boundary_distance_agrees_with_the_reference(data):
    """D itself, its gradients, and that it is never negative."""
    batch = data.draw(batches(data.draw(st.sampled_from([torch.float32, torch.float64]))))
    results = []
    for module, b in ((ood_fast, batch), (reference, batch.to(torch.float64))):
        logits, W = b.logits.requires_grad_(), b.W.requires_grad_()
        distance = module.boundary_distance(logits, W, average="classes")
        results.append([distance.detach(), *torch.autograd.grad(distance.sum(), [logits, W])])
    assert (results[0][0] >= 0).all()
    is_double = batch.logits.dtype == torch.float64
    D, d_logits, d_weight = results[1]
    for a, t, what, tolerance in zip(*results, ["D", *WHAT[1:]], [1e-4, 1e-4, 1e-3], strict=True):
        size = d_logits.abs().max().item() * (D.max().item() if what == "D" else 1.0)
        if what == "weight gradient":
            size = (D.max() * d_logits.max()).item() + d_weight.abs().max().item()
        assert_close(a.double(), t, what, size, 1e-11 if is_double else tolerance)


@COMMON
@given(st.data())
def test_a_shift_of_a_row_of_logits_changes_nothing(data):
    """In eighths, where float64 makes no rounding error: then the very same bits are wanted."""
    batch = data.draw(batches())
    keywords = data.draw(loss_keywords(batch))
    batch.logits = (batch.logits * 8).round() / 8
    shift = torch.arange(len(batch.y))[:, None] - data.draw(st.integers(-1000, 1000)) / 8
    moved = Batch(batch.logits + shift, batch.z, batch.W, batch.b, batch.y)
    assert torch.equal(distances(moved), distances(batch))
    for a, t, what in zip(
        loss_and_gradients(ood_fast.elogitnorm, moved, **dict(keywords)),
        loss_and_gradients(ood_fast.elogitnorm, batch, **dict(keywords)),
        WHAT,
        strict=True,
    ):
        assert torch.equal(a, t), what


@COMMON
@given(st.data())
def test_a_scale_of_the_logits_leaves_the_loss(data):
    """f -> a f: D -> a D, dL/df -> dL/df / a, dL/dW as before; and W -> a W: D -> D / a."""
    batch = data.draw(batches())
    a = 10 ** data.draw(st.floats(-2, 2))
    D = distances(batch)
    assume((torch.stack([D, D * a]) > 1e-5).all())  # above eps before and after
    loss, d_logits, d_weight = loss_and_gradients(ood_fast.elogitnorm, batch)
    of_loss, of_logits, of_weight = term_sizes(batch)

    scaled = Batch(batch.logits * a, batch.z, batch.W, batch.b, batch.y)
    scaled_loss, scaled_d_logits, scaled_d_weight = loss_and_gradients(ood_fast.elogitnorm, scaled)
    assert_close(distances(scaled), D * a, "D")
    assert_close(scaled_loss, loss, "loss", of_loss)
    assert_close(scaled_d_logits * a, d_logits, "logit gradient", of_logits)
    assert_close(scaled_d_weight, d_weight, "weight gradient", of_weight)
    assert_close(ood_fast.boundary_distance(batch.logits, batch.W * a), D / a, "D of a scaled head")


@COMMON
@given(st.data())
def test_the_order_of_classes_and_samples_does_not_matter(data):
    batch = data.draw(batches())
    keywords = {**data.draw(loss_keywords(batch)), "reduction": "none"}
    best = batch.logits.topk(min(2, batch.logits.shape[1])).values
    assume(best.shape[1] == 1 or (best[:, 0] != best[:, 1]).all())  # on a tie the first class is the predicted one
    assume(none_near_eps(distances(batch)))
    n_samples, n_classes = batch.logits.shape
    generator = torch.Generator().manual_seed(n_samples + 10 * n_classes)
    classes, samples = (torch.randperm(k, generator=generator) for k in (n_classes, n_samples))
    loss, d_logits, d_weight = loss_and_gradients(ood_fast.elogitnorm, batch, **dict(keywords))

    y = keywords.pop("y", batch.y)[samples]
    y = y[:, classes] if y.is_floating_point() else torch.where(y == -100, y, classes.argsort()[y.clamp(min=0)])
    if "weight" in keywords:
        keywords["weight"] = keywords["weight"][classes]
    moved = Batch(batch.logits[samples][:, classes], batch.z[samples], batch.W[classes], batch.b[classes], y)
    moved_loss, moved_d_logits, moved_d_weight = loss_and_gradients(ood_fast.elogitnorm, moved, **keywords)
    of_loss, of_logits, of_weight = term_sizes(batch, mass=10)
    assert_close(moved_loss, loss[samples], "loss", of_loss)
    assert_close(moved_d_logits, d_logits[samples][:, classes], "logit gradient", of_logits)
    assert_close(moved_d_weight, d_weight[classes], "weight gradient", of_weight)


@COMMON
@given(st.data())
def test_gradients_are_orthogonal_to_what_the_loss_does_not_see(data):
    """A shift of a row of logits, a shift of all rows of W, and without fallback the scale of a row of logits.

    sum_j dL/df_j = 0,  sum_j dL/dw_j = 0,  sum_j f_j dL/df_j = 0.
    """
    batch = data.draw(batches(data.draw(st.sampled_from([torch.float32, torch.float64]))))
    keywords = data.draw(loss_keywords(batch))
    D = distances(batch)
    assume(none_near_eps(D))
    loss, d_logits, d_weight = (t.double() for t in loss_and_gradients(ood_fast.elogitnorm, batch, **keywords))
    assert loss.isfinite().all()
    _, of_logits, of_weight = term_sizes(batch, mass=10)
    tolerance = 1e-12 if batch.logits.dtype == torch.float64 else 1e-4
    assert d_logits.sum(1).abs().max() <= tolerance * of_logits
    assert d_weight.sum(0).abs().max() <= tolerance * of_weight
    if (D > 1e-5).all():
        f = (batch.logits - batch.logits.max(1, keepdim=True).values).masked_fill(batch.logits.isinf(), 0.0).double()
        assert (d_logits * f).sum(1).abs().max() <= tolerance * of_logits * f.abs().max() + 1e-300


@COMMON
@given(st.data())
def test_logitnorm_agrees_with_the_reference(data):
    batch = data.draw(batches())
    keywords = data.draw(loss_keywords(batch))
    del keywords["average"]
    y = keywords.pop("y", batch.y)
    tau = 10 ** data.draw(st.floats(-2, 1))
    results = []
    for module in (ood_fast, reference):
        logits = batch.logits.detach().requires_grad_()
        loss = module.logitnorm(logits, y, tau=tau, **keywords)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), logits)])
    norm = torch.linalg.vector_norm(batch.logits.masked_fill(batch.logits.isinf(), 0.0), dim=1).min().item() + 1e-7
    for a, t, what, size in zip(*results, WHAT[:2], [100 / min(tau, 1.0), 1000 / (tau * norm)], strict=True):
        assert_close(a, t, f"{what} {keywords}", size)


# ----------------------------------------------------------------------------------------------------------------------
# Digits: D to 1e-4 and dW to 1e-3 relative in float32, for given logits
# ----------------------------------------------------------------------------------------------------------------------

# n, c, m: a full table; a larger one, in float32 alone, as it takes the interpreter long; rows of the predicted classes
HARD_SHAPES = {"n>=c": (24, 17, 64), "n>=c, product": (70, 65, 64), "n<c": (5, 40, 64)}


def rows_close_together(W):
    """All rows 1e-3 apart, on a common row of length sqrt(m)."""
    m = W.shape[1]
    return torch.randn(m, dtype=W.dtype) + 1e-3 * torch.randn_like(W) / (2 * m) ** 0.5


def one_close_pair(W):
    """Two rows of ordinary length, 1e-4 apart."""
    W = W.clone()
    W[3] = W[1] + 1e-4 * torch.nn.functional.normalize(torch.randn_like(W[1]), dim=0)
    return W


def every_row_twice(W):
    """Every row has a neighbour 1e-4 away."""
    half = len(W) // 2
    W = W.clone()
    W[half : 2 * half] = W[:half] + 1e-4 * torch.nn.functional.normalize(torch.randn_like(W[:half]), dim=1)
    return W


def large_common_component(W):
    """An offset a thousand times the rows themselves."""
    return W + 1e3 * torch.randn(W.shape[1], dtype=W.dtype)


def lengths_from_small_to_large(W):
    return W * torch.logspace(-2, 2, len(W), dtype=W.dtype)[:, None]


HARD_HEADS = [
    (rows_close_together, torch.float32),
    (rows_close_together, torch.float16),
    (one_close_pair, torch.float32),
    (every_row_twice, torch.float32),
    (large_common_component, torch.float32),
    (large_common_component, torch.bfloat16),
    (lengths_from_small_to_large, torch.float32),
]


def hard_shapes(dtype) -> list[str]:
    return [name for name in HARD_SHAPES if dtype == torch.float32 or "product" not in name]


@pytest.mark.parametrize(
    ("head", "dtype", "shape"),
    [(*hard, shape) for hard in HARD_HEADS for shape in hard_shapes(hard[1])],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_digits_of_hard_heads(head, shape, dtype, backend):
    """A float32 head, logits of any dtype: their rounding is not the loss's, which takes the truth on the same ones."""
    batch = Batch.of(*HARD_SHAPES[shape])
    W = head(batch.W.double()).float()
    if head in (one_close_pair, every_row_twice):
        batch.logits[::3, 1] = batch.logits.max() + 1  # the pair matters to these samples
    logits = batch.logits.to(dtype)
    ours = loss_and_gradients(
        ood_fast.elogitnorm, Batch(*(t.to(backend.device) for t in (logits, batch.z, W, batch.b, batch.y)))
    )
    truth = loss_and_gradients(
        reference.elogitnorm, Batch(logits.double(), batch.z.double(), W.double(), batch.b.double(), batch.y)
    )
    distance = ood_fast.boundary_distance(logits.to(backend.device), W.to(backend.device)).cpu()
    torch.testing.assert_close(
        distance.double(), reference.boundary_distance(logits.double(), W.double()), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(ours[0].cpu().double(), truth[0], rtol=1e-4, atol=1e-6)
    error = (ours[2].cpu().double() - truth[2]).norm() / truth[2].norm()
    assert error < 1e-3, f"dW is off by {error:.1e}"
    assert_rounded(ours[1].cpu(), truth[1], dtype)


def assert_rounded(gradient, truth, dtype) -> None:
    """A logit gradient that is the truth rounded to its dtype, but for 1e-4; float16 may be below its normal range."""
    spacing = 2.0**-24 if dtype == torch.float16 else 0.0
    relative = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype] + 1e-4
    excess = (gradient.double() - truth).abs() - relative * truth.abs().amax(1, keepdim=True) - spacing
    assert excess.max() <= 0, f"the logit gradient is off by {excess.max():.1e} too much"


@pytest.mark.parametrize(("size", "offset"), [(1e4, 0.0), (1e4, 1.0), (1e-4, 0.0)], ids=["1e4", "1e4, shifted", "1e-4"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(dtype, shape) for dtype in (torch.float32, torch.float16, torch.bfloat16) for shape in hard_shapes(dtype)],
    ids=str,
)
def test_digits_of_large_and_small_logits(shape, dtype, offset, size, backend):
    """Logits of magnitude 1e4 (float16 ends at 65504), also with a common offset, and 1e-4: D is still above eps."""
    batch = Batch.of(*HARD_SHAPES[shape])
    logits = (size * (batch.logits / batch.logits.abs().max() + offset)).to(dtype)
    ours = loss_and_gradients(
        ood_fast.elogitnorm, Batch(*(t.to(backend.device) for t in (logits, batch.z, batch.W, batch.b, batch.y)))
    )
    in_double = Batch(logits.double(), batch.z.double(), batch.W.double(), batch.b.double(), batch.y)
    assert reference.boundary_distance(in_double.logits, in_double.W).min() > 1e-5
    truth = loss_and_gradients(reference.elogitnorm, in_double)
    torch.testing.assert_close(ours[0].cpu().double(), truth[0], rtol=1e-4, atol=1e-6)
    assert_rounded(ours[1].cpu(), truth[1], dtype)
    error = (ours[2].cpu().double() - truth[2]).norm() / truth[2].norm()
    assert error < 1e-3, f"dW is off by {error:.1e}"
