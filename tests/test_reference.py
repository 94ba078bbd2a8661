"""The reference is the oracle of every other test, so it is proved here by itself.

(a) A scalar loop in Python floats, written from the definitions and not from the code; (b) examples worked by hand;
(c) float64 gradcheck of every function, in the corners too; (d) invariances; (e) F.cross_entropy for the keywords.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_fast import reference

INF = math.inf
NAN = math.nan


# (a) -------------------------------------------------------------------------------------------- the scalar loop


def scalar_distance(f: list[float], W: list[list[float]], average: str) -> float:
    """Mean distance to the boundaries of the predicted class, for one sample."""
    if any(math.isnan(f_j) or f_j == INF for f_j in f) or all(f_j == -INF for f_j in f):
        return NAN
    p = f.index(max(f))
    total, count = 0.0, 0
    for j in range(len(f)):
        length = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(W[p], W[j], strict=True)))
        if j == p or f[j] == -INF or length == 0.0:
            continue
        total += (f[p] - f[j]) / length
        count += 1
    if count == 0:
        return 0.0
    return total / (count + (1 if average == "classes" else 0))


def scalar_cross_entropy(f: list[float], T: float, y, weight: list[float], smoothing: float) -> float:
    """Cross-entropy of softmax(f / T) with the target y, an index or a list of probabilities, for one sample."""
    if any(math.isnan(f_j) or f_j == INF for f_j in f) or all(f_j == -INF for f_j in f):
        return NAN
    top = max(f)
    partition = math.fsum(math.exp((f_j - top) / T) for f_j in f)
    n_live = sum(f_j != -INF for f_j in f)
    loss = 0.0
    for j, f_j in enumerate(f):
        probability = float(j == y) if isinstance(y, int) else y[j]
        mass = weight[j] * ((1 - smoothing) * probability + (smoothing / n_live if f_j != -INF else 0.0))
        if mass != 0.0:
            loss += mass * (INF if f_j == -INF else math.log(partition) - (f_j - top) / T)
    return loss


def scalar_elogitnorm(f, W, y, weight, smoothing, eps, average) -> float:
    D = scalar_distance(f, W, average)
    return scalar_cross_entropy(f, 1.0 if D <= eps else D, y, weight, smoothing)


def scalar_logitnorm(f, y, weight, smoothing, tau) -> float:
    norm = math.sqrt(math.fsum(f_j * f_j for f_j in f if f_j != -INF))
    return scalar_cross_entropy(f, tau * (norm + 1e-7), y, weight, smoothing)


def scalar_mean(losses: list[float], y: list, weight: list[float]) -> float:
    """Class indices: weighted by the weight of the target; probabilities: a plain mean."""
    share = sum(weight[label] for label in y) if isinstance(y[0], int) else len(y)
    return sum(losses) / share


def head(n: int = 6, c: int = 5, m: int = 4) -> dict[str, torch.Tensor]:
    """A random head and what comes out of it, float64."""
    z, W, b = (torch.randn(shape, dtype=torch.float64) for shape in ((n, m), (c, m), (c,)))
    return {"logits": F.linear(z, W, b), "z": z, "W": W, "b": b}


def targets(n: int, c: int, kind: str) -> torch.Tensor:
    if kind == "indices":
        return torch.randint(c, (n,))
    return torch.rand(n, c, dtype=torch.float64).softmax(1)


def assert_same(actual: torch.Tensor, expected, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("average", ["boundaries", "classes"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_losses_equal_the_scalar_loop(kind, weighted, smoothing, average):
    inputs = head()
    n, c = inputs["logits"].shape
    y = targets(n, c, kind)
    weight = torch.rand(c, dtype=torch.float64) if weighted else None
    f_rows, W_rows, y_rows = inputs["logits"].tolist(), inputs["W"].tolist(), y.tolist()
    weights = weight.tolist() if weighted else [1.0] * c

    expected = [
        scalar_elogitnorm(f, W_rows, y_i, weights, smoothing, 1e-6, average)
        for f, y_i in zip(f_rows, y_rows, strict=True)
    ]
    keywords = {"weight": weight, "label_smoothing": smoothing}
    assert_same(reference.elogitnorm(**inputs, y=y, reduction="none", average=average, **keywords), expected)
    assert_same(reference.elogitnorm(**inputs, y=y, reduction="sum", average=average, **keywords), sum(expected))
    mean = scalar_mean(expected, y_rows, weights)
    assert_same(reference.elogitnorm(**inputs, y=y, average=average, **keywords), mean)

    expected = [scalar_logitnorm(f, y_i, weights, smoothing, 0.04) for f, y_i in zip(f_rows, y_rows, strict=True)]
    assert_same(reference.logitnorm(inputs["logits"], y, reduction="none", **keywords), expected)
    assert_same(reference.logitnorm(inputs["logits"], y, **keywords), scalar_mean(expected, y_rows, weights))


# One row of logits a corner, beside a regular one; with `coincident` the rows 0 and 1 of W are equal as well.
CORNERS = {
    "regular": [1.0, -0.5, 2.0, 0.25],
    "tied": [0.5, 0.5, 0.5, 0.5],
    "all zero": [0.0, 0.0, 0.0, 0.0],
    "two highest": [2.0, -1.0, 2.0, 0.0],
    "masked": [1.0, -INF, 2.0, 0.25],
    "masked but one": [-INF, -INF, 3.0, -INF],
    "masked but the coincident": [1.0, 3.0, -INF, -INF],
    "D just above eps": [0.0, 0.0, 0.0, -1e-4],
    "far from the origin": [1e6, 1e6 - 1e-3, 1e6 + 1e-3, 1e6 - 2e-3],  # f/D in place of −g/D would lose 6 more digits
    "all masked": [-INF, -INF, -INF, -INF],
    "NaN": [1.0, NAN, 0.0, 0.0],
    "+inf": [1.0, 0.0, INF, 0.0],
    "-inf and +inf": [-INF, 0.0, INF, INF],
}


@pytest.mark.parametrize("average", ["boundaries", "classes"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("geometry", ["regular", "coincident", "zero head"])
@pytest.mark.parametrize("corner", CORNERS)
def test_corners_equal_the_scalar_loop(corner, geometry, smoothing, average):
    """Every corner with every target: value, distance and loss, and a gradient free of NaN where the loss is."""
    W = torch.randn(4, 3, dtype=torch.float64)
    if geometry == "coincident":
        W[1] = W[0]
    elif geometry == "zero head":
        W.zero_()
    rows = torch.tensor([CORNERS["regular"], CORNERS[corner]], dtype=torch.float64)
    weights = [1.0, 0.5, 2.0, 0.0]  # class 3 weighs nothing: 0 · inf must be 0 where it is masked
    for label in range(4):
        y = torch.tensor([label, label])
        logits, W_leaf = rows.clone().requires_grad_(), W.clone().requires_grad_()
        loss, D = reference.elogitnorm(
            logits,
            torch.zeros(2, 3),
            W_leaf,
            None,
            y,
            weight=torch.tensor(weights, dtype=torch.float64),
            reduction="none",
            label_smoothing=smoothing,
            average=average,
            return_distance=True,
        )
        assert_same(D, [scalar_distance(f, W.tolist(), average) for f in rows.tolist()])
        expected = [scalar_elogitnorm(f, W.tolist(), label, weights, smoothing, 1e-6, average) for f in rows.tolist()]
        assert_same(loss, expected, rtol=1e-10)
        grad_logits, grad_W = torch.autograd.grad(loss[1], (logits, W_leaf))
        if math.isnan(expected[1]):
            assert grad_logits[1].isnan().all()
        else:
            assert grad_logits.isfinite().all()
            assert grad_W.isfinite().all()
            assert (grad_logits[0] == 0).all()


def test_logitnorm_corners_equal_the_scalar_loop():
    rows = torch.tensor(list(CORNERS.values()), dtype=torch.float64)
    for label in range(4):
        y = torch.full((len(rows),), label)
        for smoothing in (0.0, 0.1):
            logits = rows.clone().requires_grad_()
            loss = reference.logitnorm(logits, y, reduction="none", label_smoothing=smoothing)
            expected = [scalar_logitnorm(f, label, [1.0] * 4, smoothing, 0.04) for f in rows.tolist()]
            assert_same(loss, expected)
            (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
            for row, value in zip(gradient, expected, strict=True):
                assert row.isnan().all() if math.isnan(value) else row.isfinite().all()


@pytest.mark.parametrize("corner", ["masked", "masked but one", "masked but the coincident"])
def test_masked_target_has_the_gradient_of_cross_entropy_and_none_through_the_distance(corner):
    row = torch.tensor([CORNERS[corner]], dtype=torch.float64)
    masked = row[0].isneginf().nonzero().flatten().tolist()
    W = torch.randn(4, 3, dtype=torch.float64)
    D = scalar_distance(row[0].tolist(), W.tolist(), "boundaries")
    T = 1.0 if D <= 1e-6 else D
    norm = row.masked_fill(row.isneginf(), 0).norm().item()
    for label in masked:
        y = torch.tensor([label])
        logits, W_leaf = row.clone().requires_grad_(), W.clone().requires_grad_()
        loss = reference.elogitnorm(logits, None, W_leaf, None, y)
        assert loss == INF
        gradient, grad_W = torch.autograd.grad(loss, (logits, W_leaf))
        assert (grad_W == 0).all()
        for function_gradient, temperature in (
            (gradient, T),
            (torch.autograd.grad(reference.logitnorm(logits, y), logits)[0], 0.04 * (norm + 1e-7)),
        ):
            plain = logits.detach().requires_grad_()
            (expected,) = torch.autograd.grad(F.cross_entropy(plain / temperature, y), plain)
            assert_same(function_gradient, expected)


def test_ignored_rows_cost_nothing_whatever_they_hold():
    """Rows beside them get the mean over the rows that count; the gradient of the ignored ones is 0, also for NaN."""
    rows = torch.tensor([CORNERS["regular"], *CORNERS.values()], dtype=torch.float64)
    W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.full((len(rows),), 7)
    y[0] = 3
    for function in (
        lambda f, **keywords: reference.elogitnorm(f, None, W, None, y, ignore_index=7, **keywords),
        lambda f, **keywords: reference.logitnorm(f, y, ignore_index=7, **keywords),
    ):
        logits = rows.clone().requires_grad_()
        each = function(logits, reduction="none")
        assert (each[1:] == 0).all()
        assert_same(function(logits), each[0])
        (gradient,) = torch.autograd.grad(function(logits, label_smoothing=0.1), logits)
        assert (gradient[1:] == 0).all()
        assert (gradient[0] != 0).any()
    _, D = reference.elogitnorm(rows, None, W, None, y, ignore_index=7, return_distance=True)
    assert_same(D, [scalar_distance(f, W.tolist(), "boundaries") for f in rows.tolist()])
    assert not D.requires_grad


@pytest.mark.parametrize("with_logits", [False, True])
def test_nci_equals_the_scalar_loop(with_logits):
    inputs = head()
    z, W, b, mean = inputs["z"], inputs["W"], inputs["b"], torch.randn(4, dtype=torch.float64)
    z[2] = mean  # no direction
    z[3] = 0
    logits = torch.randn(6, 5, dtype=torch.float64) if with_logits else inputs["logits"]
    if with_logits:
        logits[4, 1] = NAN
    else:
        logits = F.linear(z, W, b)
    expected = []
    for f_i, z_i in zip(logits.tolist(), z.tolist(), strict=True):
        w_p = W[f_i.index(max(f_i))].tolist()
        moved = [a - b for a, b in zip(z_i, mean.tolist(), strict=True)]
        norm = math.hypot(*moved)
        p_score = 0.0 if norm == 0 else sum(a * b for a, b in zip(w_p, moved, strict=True)) / norm
        expected.append(NAN if any(map(math.isnan, f_i)) else p_score + 0.1 * sum(map(abs, z_i)))
    actual = reference.nci_score(z, W, b, mean, logits=logits if with_logits else None, alpha=0.1)
    assert_same(actual, expected)


def test_l2_normalize_is_normalize_and_its_norms():
    z = torch.randn(5, 3, dtype=torch.float64)
    z[1] = 0
    z[2] *= 1e-14
    unit, norms = reference.l2_normalize(z)
    assert_same(unit, F.normalize(z))
    assert_same(norms, [math.hypot(*row) for row in z.tolist()])
    assert_same(reference.l2_normalize(z, eps=2.0)[0], F.normalize(z, eps=2.0))


# (b) ---------------------------------------------------------------------------------------- examples worked by hand


def test_elogitnorm_worked_by_hand():
    """Three classes in the plane, w_0 = (3, 0), w_1 = (0, 4), w_2 = (0, 0), b = (0, 0, 5), z = (4, 1).

    f = (12, 4, 5), so p = 0.   ‖w_0 − w_1‖ = 5,  ‖w_0 − w_2‖ = 3.
    Distances to the boundaries: (12 − 4)/5 = 8/5 and (12 − 5)/3 = 7/3.   Sum 24/15 + 35/15 = 59/15.
    The first is indeed the distance of (4, 1) from the line (w_0 − w_1)·z + b_0 − b_1 = 0, 3 x − 4 y = 0: |12 − 4|/5.
    D = 59/30 over the two boundaries, 59/45 over the three classes.
    Loss for y = 2, D = 59/30: g_2/D + log(1 + exp(−8/D) + exp(−7/D)) = 210/59 + log(1 + exp(−240/59) + exp(−210/59)).
    """
    W = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64)
    z = torch.tensor([[4.0, 1.0]], dtype=torch.float64)
    logits = F.linear(z, W, b)
    assert logits.tolist() == [[12.0, 4.0, 5.0]]
    loss, D = reference.elogitnorm(logits, z, W, b, torch.tensor([2]), return_distance=True)
    assert D.item() == pytest.approx(59 / 30, rel=1e-14)
    assert loss.item() == pytest.approx(210 / 59 + math.log(1 + math.exp(-240 / 59) + math.exp(-210 / 59)), rel=1e-14)
    assert loss.item() == pytest.approx(3.60389, abs=1e-5)  # 3.55932 + log(1 + 0.01711 + 0.02846) = 3.55932 + 0.04457
    loss, D = reference.elogitnorm(logits, z, W, b, torch.tensor([0]), average="classes", return_distance=True)
    assert D.item() == pytest.approx(59 / 45, rel=1e-14)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-360 / 59) + math.exp(-315 / 59)), rel=1e-13)


def test_elogitnorm_gradient_worked_by_hand():
    """Two classes on a line: w_0 = a, w_1 = 0, no bias, z > 0: f = (az, 0), D = az/a = z, whatever a is.

    So f/D = (a, 0), and for y = 1 the loss is log(1 + e^a) as a function of W through f AND the length: at a = 2 the
    derivative of the composed loss by a is e²/(1 + e²), by z it is 0.
    With detached geometry D = az/2 with 2 held fixed: f/D = (2, 0) whatever a is, and the derivative by a is 0.
    """
    z = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    W = torch.tensor([[2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1])
    loss = reference.elogitnorm(F.linear(z, W), z, W, None, y)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2)), rel=1e-14)
    grad_z, grad_W = torch.autograd.grad(loss, (z, W))
    assert grad_W[0].item() == pytest.approx(math.exp(2) / (1 + math.exp(2)), rel=1e-13)
    assert grad_z.item() == pytest.approx(0, abs=1e-15)
    loss = reference.elogitnorm(F.linear(z, W), z, W, None, y, detach_geometry=True)
    (grad_W,) = torch.autograd.grad(loss, W)
    assert grad_W[0].item() == pytest.approx(0, abs=1e-15)


def test_logitnorm_worked_by_hand():
    """f = (3, 4): norm 5; τ = 0.2 makes the temperature 1 (but for 1e-7): loss for y = 0 is log(1 + e)."""
    loss = reference.logitnorm(torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([0]), tau=0.2)
    assert loss.item() == pytest.approx(math.log(1 + math.e), rel=1e-7)


def test_nci_worked_by_hand():
    """z = (4, −2), μ = (1, 2): z − μ = (3, −4), length 5. W = ((2, 0), (0, 1)), no bias: f = (8, −2), w_p = (2, 0).

    (2·3 + 0·(−4))/5 = 6/5;  ‖z‖₁ = 6;  α = 0.1: 1.2 + 0.6 = 1.8.  With logits that predict class 1: −4/5 + 0.6 = −0.2.
    """
    z, mean = torch.tensor([[4.0, -2.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    W = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert reference.nci_score(z, W, None, mean, alpha=0.1).item() == pytest.approx(1.8, rel=1e-14)
    logits = torch.tensor([[0.0, 1.0]])
    assert reference.nci_score(z, W, None, mean, logits=logits, alpha=0.1).item() == pytest.approx(-0.2, rel=1e-13)


# (c) ------------------------------------------------------------------------------------------------- gradcheck


def gradcheck(function, *inputs: torch.Tensor) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("average", ["boundaries", "classes"])
def test_elogitnorm_gradcheck(average, kind):
    """Through logits and W as separate inputs, and composed through z, W, b."""
    inputs = head()
    n, c = inputs["logits"].shape
    y = targets(n, c, kind)
    keywords = {"weight": torch.rand(c, dtype=torch.float64), "label_smoothing": 0.2, "average": average}

    def apart(logits, W):
        return reference.elogitnorm(logits, None, W, None, y, reduction="none", **keywords)

    def composed(z, W, b):
        return reference.elogitnorm(F.linear(z, W, b), z, W, b, y, **keywords)

    gradcheck(apart, inputs["logits"], inputs["W"])
    gradcheck(composed, inputs["z"], inputs["W"], inputs["b"])


@pytest.mark.parametrize("function", ["elogitnorm", "logitnorm", "boundary_distance"])
def test_gradcheck_with_masked_classes_and_an_ignored_row(function):
    """Masked logits are −inf and stay so: the check moves the live ones only."""
    inputs = head()
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[0, 1] = mask[0, 4] = mask[3, 0] = True
    y = torch.tensor([0, 1, -100, 3, 4, 2])

    def masked(logits, W):
        f = logits.masked_fill(mask, -INF)
        if function == "elogitnorm":
            return reference.elogitnorm(f, None, W, None, y, label_smoothing=0.2, reduction="none")
        if function == "logitnorm":
            return reference.logitnorm(f, y, label_smoothing=0.2, reduction="none") + 0 * W.sum()
        return reference.boundary_distance(f, W)

    gradcheck(masked, inputs["logits"], inputs["W"])


def test_gradcheck_where_rows_of_the_head_coincide():
    """W[1] is W[0] by construction, so that they coincide wherever the check moves them."""
    inputs = head()
    y = torch.randint(5, (6,))

    def coincident(logits, rows):
        W = torch.cat([rows[:1], rows])
        return reference.elogitnorm(logits, None, W, None, y, reduction="none")

    gradcheck(coincident, inputs["logits"], inputs["W"][1:])


def test_gradient_falls_back_to_cross_entropy_without_a_boundary():
    """A zero head, and a sample at D <= eps: the gradient of F.cross_entropy exactly, nothing for W."""
    for logits, W, eps in (
        (torch.randn(3, 4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64), 1e-6),
        (torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64), 1e6),
        (torch.zeros(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64), 1e-6),
    ):
        y = torch.tensor([0, 1, 3])
        f, W_leaf, plain = logits.clone().requires_grad_(), W.requires_grad_(), logits.clone().requires_grad_()
        loss, expected = reference.elogitnorm(f, None, W_leaf, None, y, eps=eps), F.cross_entropy(plain, y)
        assert_same(loss, expected.detach())
        gradient, grad_W = torch.autograd.grad(loss, (f, W_leaf))
        assert_same(gradient, torch.autograd.grad(expected, plain)[0])
        assert (grad_W == 0).all()


def test_detached_geometry_differs_only_in_the_length():
    """The gradient of the logits is the same, the gaps inside D included; W is reached through the lengths alone."""
    inputs = head()
    y = torch.randint(5, (6,))
    logits, W = inputs["logits"].requires_grad_(), inputs["W"].requires_grad_()
    full = torch.autograd.grad(reference.elogitnorm(logits, None, W, None, y), (logits, W))
    detached = torch.autograd.grad(
        reference.elogitnorm(logits, None, W, None, y, detach_geometry=True), (logits, W), allow_unused=True
    )
    assert_same(detached[0], full[0])
    assert (full[1] != 0).all()
    assert detached[1] is None


def test_other_functions_gradcheck():
    inputs = head()
    y, mean = torch.randint(5, (6,)), torch.randn(4, dtype=torch.float64)
    gradcheck(lambda f: reference.logitnorm(f, y, label_smoothing=0.1, reduction="none"), inputs["logits"])
    for average in ("boundaries", "classes"):
        gradcheck(
            lambda f, W, average=average: reference.boundary_distance(f, W, average=average),
            inputs["logits"],
            inputs["W"],
        )
    gradcheck(
        lambda z, W, mu: reference.nci_score(z, W, None, mu, logits=inputs["logits"]), inputs["z"], inputs["W"], mean
    )
    gradcheck(reference.l2_normalize, inputs["z"])
    gradcheck(lambda z: reference.l2_normalize(z, eps=1e3)[0], inputs["z"])


def test_nci_gradient_at_the_mean_is_that_of_the_feature_norm():
    mean = torch.randn(4, dtype=torch.float64)
    z = mean[None].clone().requires_grad_()
    W = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grad_z, grad_W = torch.autograd.grad(reference.nci_score(z, W, None, mean, alpha=0.5).sum(), (z, W))
    assert_same(grad_z, 0.5 * mean.sign()[None])
    assert (grad_W == 0).all()


def test_l2_normalize_gradient_at_the_origin_is_finite():
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    unit, norms = reference.l2_normalize(z)
    (gradient,) = torch.autograd.grad(unit.sum() + norms.sum(), z)
    assert_same(gradient, torch.full((2, 3), 1e12, dtype=torch.float64))


# (d) ------------------------------------------------------------------------------------------------ invariances

shapes = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(1, 4))


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 2**31), st.floats(-50, 50), st.floats(0.1, 10))
def test_invariances(shape, seed, shift, scale):
    """What the definitions say of every input, not only of those above.

    A constant added to a row of logits changes neither loss nor distance. Renaming the classes changes nothing.
    A vector added to every row of W changes no distance. Logits and W scaled together leave D, and scale f/D.
    """
    n, c, m = shape
    generator = torch.Generator().manual_seed(seed)
    logits, W = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k, d in ((n, c), (c, m)))
    y = torch.randint(c, (n,), generator=generator)

    def both(logits, W, y):
        return reference.elogitnorm(logits, None, W, None, y, reduction="none", return_distance=True)

    loss, D = both(logits, W, y)
    assert (loss >= 0).all()
    assert (D >= 0).all()
    order = torch.randperm(c, generator=generator)
    moved = (
        both(logits + shift, W, y),
        both(logits, W + shift, y),
        both(logits[:, order], W[order], order.argsort()[y]),
    )
    for moved_loss, moved_D in moved:
        assert_same(moved_loss, loss, rtol=1e-9, atol=1e-9)
        assert_same(moved_D, D, rtol=1e-9, atol=1e-9)
    scaled_loss, scaled_D = both(logits * scale, W * scale, y)
    assert_same(scaled_D, D, rtol=1e-9)
    expected = F.cross_entropy(logits * scale / D[:, None], y, reduction="none")
    assert_same(scaled_loss, expected, rtol=1e-9, atol=1e-9)
    assert_same(reference.logitnorm(logits * scale, y), reference.logitnorm(logits, y), rtol=1e-4, atol=1e-6)


# (e) ---------------------------------------------------------------------------------- the keywords of F.cross_entropy


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "ignored", "all ignored", "probabilities", "no samples"])
def test_keywords_mean_what_they_mean_in_cross_entropy(kind, weighted, smoothing, reduction):
    """A large eps makes every temperature 1: then ELogitNorm is F.cross_entropy, gradient included."""
    n, c = (0 if kind == "no samples" else 6), 5
    logits = torch.randn(n, c, dtype=torch.float64)
    y = targets(n, c, "probabilities" if kind == "probabilities" else "indices")
    keywords = {
        "weight": torch.rand(c, dtype=torch.float64) if weighted else None,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    if kind == "ignored":
        y[1], keywords["ignore_index"] = 3, 3
    elif kind == "all ignored":
        y.fill_(-100)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = reference.elogitnorm(ours, None, torch.randn(c, 2, dtype=torch.float64), None, y, eps=1e9, **keywords)
    expected = F.cross_entropy(plain, y, **keywords)
    assert_same(loss, expected.detach())
    if n and kind != "all ignored":
        upstream = torch.rand_like(loss)
        (gradient,) = torch.autograd.grad(loss, ours, upstream)
        assert_same(gradient, torch.autograd.grad(expected, plain, upstream)[0])


def test_one_class_costs_nothing():
    logits, W = torch.randn(3, 1, requires_grad=True), torch.randn(1, 2, requires_grad=True)
    loss = reference.elogitnorm(logits, None, W, None, torch.zeros(3, dtype=torch.int64))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (logits, W)):
        assert (gradient == 0).all()


def test_unknown_reduction_and_average_are_refused():
    logits, W, y = torch.randn(2, 3), torch.randn(3, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="reduction: got 'batchmean'"):
        reference.logitnorm(logits, y, reduction="batchmean")
    with pytest.raises(ValueError, match="average: got 'all'"):
        reference.boundary_distance(logits, W, average="all")
