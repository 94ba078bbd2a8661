"""Every public function on inputs that nobody chose (Hypothesis): any shape, dtype, stride, NaN, infinities, ties.

Three oracles: `reference` in float64, what must not change (order, strides, splits), and "raises exactly this": bad
input ends in an error whose text begins with the name of an argument. 500 examples over all of them;
`make fuzz` draws 20,000 new ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from support import assert_no_worse
from torch import Tensor, nn

import ood_fast
from ood_fast import detectors, functional, metrics, ops, reference, statistics
from ood_fast.detectors import threshold

EXAMPLES = int(os.environ.get("OOD_FAST_EXAMPLES", "500"))
SPECIAL = (math.nan, math.inf, -math.inf)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PROPERTIES: dict[str, Callable] = {}


def about(*names: str) -> Callable:
    """Marks a property of these public functions."""

    def add(function: Callable) -> Callable:
        PROPERTIES[" ".join(names)] = function
        return function

    return add


def tensor(draw: Callable, shape: tuple[int, ...], dtype: torch.dtype, special: tuple[float, ...] = ()) -> Tensor:
    """Numbers of a drawn scale, rounded so that ties occur, in memory of any order; some entries are `special`."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = torch.from_numpy(numbers.standard_normal(shape)) * 10.0 ** draw(st.integers(-3, 3))
    if draw(st.booleans()):
        x = x.round()
    if special and draw(st.booleans()):
        x = torch.where(torch.from_numpy(numbers.random(shape) < 0.15), draw(st.sampled_from(special)), x)
    x = x.to(dtype)
    if x.dim() == 2 and draw(st.booleans()):
        x = x.t().contiguous().t() if draw(st.booleans()) else torch.stack([x, x], 2)[:, :, 1]
    return x


class Case:
    """logits, z, W, b, y and the keywords of a loss."""

    def __init__(self, draw: Callable, special: tuple[float, ...] = SPECIAL, least: int = 0) -> None:
        self.n, self.c, self.m = draw(st.integers(least, 7)), draw(st.integers(2, 7)), draw(st.integers(1, 5))
        self.dtype = draw(st.sampled_from(DTYPES))
        self.logits = tensor(draw, (self.n, self.c), self.dtype, special)
        self.z, self.W = tensor(draw, (self.n, self.m), self.dtype), tensor(draw, (self.c, self.m), self.dtype)
        self.b = draw(st.sampled_from([None, torch.zeros(self.c, dtype=self.dtype)]))
        self.y = torch.tensor([draw(st.sampled_from([0, self.c - 1])) for _ in range(self.n)], dtype=torch.int64)
        kept = draw(st.sampled_from([0, self.c - 1, -100, -1]))
        self.keywords = {"ignore_index": kept, "reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
        self.keywords["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
        if draw(st.booleans()):
            least = 0.5 if self.keywords["reduction"] == "mean" else 0.0  # a mean of no weight is inf or NaN
            self.keywords["weight"] = torch.arange(self.c, dtype=self.dtype) + least

    def wide(self) -> dict:
        """The keywords in float64."""
        return {name: v.double() if isinstance(v, Tensor) else v for name, v in self.keywords.items()}


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def agree(actual: Tensor, truth: Tensor, what: str, tolerance: float | None = None, least: float = 0.0) -> None:
    """To 1e-4 of the largest number (or of `least`) in float32, 1e-9 in float64; exact in what is not finite."""
    assert actual.shape == truth.shape, what
    assert actual.dtype in (torch.float32, torch.float64), what
    tolerance = tolerance or (1e-9 if actual.dtype == torch.float64 else 1e-4)
    size = max(least, truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 1.0)
    torch.testing.assert_close(actual.double(), truth, rtol=tolerance, atol=tolerance * size + 1e-37, equal_nan=True)


def decided(case: Case) -> bool:
    """Whether no D is so near eps that rounding decides whether it counts as 0."""
    D = reference.boundary_distance(*double(case.logits, case.W))
    return bool((D.isnan() | (D == 0) | (D > 1e-5)).all())


@about("elogitnorm", "ELogitNormLoss")
def elogitnorm(draw):
    case = Case(draw, (-math.inf, math.nan), least=1)
    live = case.logits.gather(1, case.y[:, None])[:, 0]
    case.logits[live.isneginf(), :] = 0.0  # a masked target has an infinite loss, of which gradients are another test
    assume(decided(case))
    arguments = (case.logits, case.z, case.W, case.b, case.y)
    loss = ood_fast.elogitnorm(*arguments, **case.keywords)
    truth = reference.elogitnorm(*double(*arguments[:4]), case.y, **case.wide())
    agree(loss, truth, str(case.keywords), None if case.dtype == torch.float64 else 1e-3, least=1.0)
    if case.dtype in (torch.float32, torch.float64):
        head = nn.Linear(case.m, case.c, bias=case.b is not None, dtype=case.dtype)
        head.load_state_dict({"weight": case.W} | ({} if case.b is None else {"bias": case.b}))
        module = ood_fast.ELogitNormLoss(head, **case.keywords)(case.logits, case.y)
        torch.testing.assert_close(module.detach(), loss, rtol=1e-5, atol=1e-6, equal_nan=True)


@about("linear_elogitnorm")
def linear_elogitnorm(draw):
    case = Case(draw, least=1)
    z, W = (t.float() for t in (case.z, case.W))
    case.logits = z @ W.T
    best = case.logits.double().topk(2).values
    assume((best[:, 0] - best[:, 1] > 1e-4 * best.abs().amax(1)).all() and decided(case))
    b = None if case.b is None else case.b.float()
    keywords = {name: v.float() if isinstance(v, Tensor) else v for name, v in case.keywords.items()}
    loss = ood_fast.linear_elogitnorm(z, W, b, case.y, **keywords)
    truth = reference.linear_elogitnorm(*double(z, W, b), case.y, **case.wide())
    agree(loss, truth, str(keywords), 5e-3, least=1.0)


@about("logitnorm", "LogitNormLoss")
def logitnorm(draw):
    case = Case(draw, (-math.inf, math.nan), least=1)
    case.logits[case.logits.gather(1, case.y[:, None])[:, 0].isneginf(), :] = 0.0
    loss = ood_fast.logitnorm(case.logits, case.y, **case.keywords)
    agree(loss, reference.logitnorm(case.logits.double(), case.y, **case.wide()), str(case.keywords), least=1.0)
    module = ood_fast.LogitNormLoss(**case.keywords)(case.logits, case.y)
    assert torch.equal(module.nan_to_num(), loss.nan_to_num())


@about("boundary_distance", "distance_table")
def boundary_distance(draw):
    case = Case(draw)
    D = ood_fast.boundary_distance(case.logits, case.W)
    agree(D, reference.boundary_distance(*double(case.logits, case.W)), "D")
    rows = torch.randperm(case.n, generator=torch.Generator().manual_seed(case.n))
    assert torch.equal(ood_fast.boundary_distance(case.logits[rows], case.W).nan_to_num(-1), D[rows].nan_to_num(-1))
    R, W = statistics.distance_table(case.W), case.W.double()
    apart = torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")
    agree(R, torch.where(apart > 0, 1 / apart, 0.0), "R")


@about("nci_score")
def nci_score(draw):
    case, alpha = Case(draw), draw(st.sampled_from([0.0, 1e-3, -2.0]))
    mean = tensor(draw, (case.m,), case.dtype)
    score = ood_fast.nci_score(case.z, case.W, case.b, mean, case.logits, alpha)
    truth = reference.nci_score(*double(case.z, case.W, case.b, mean, case.logits), alpha)
    agree(score, truth, f"alpha {alpha}")


@about("l2_normalize", "L2NormLinear")
def l2_normalize(draw):
    case = Case(draw)
    (unit, norms), (true_unit, true_norms) = ood_fast.l2_normalize(case.z), reference.l2_normalize(case.z.double())
    assert unit.dtype == case.z.dtype
    assert_no_worse(norms, true_norms, None, norms.dtype, "norms")
    assert_no_worse(unit, true_unit, None, case.dtype, "unit features")
    head = ood_fast.L2NormLinear(case.m, case.c, dtype=torch.float64)
    z = case.z.double()
    agree(head(z).detach(), nn.functional.linear(true_unit, head.weight, head.bias).detach(), "training")
    agree(head.eval()(z).detach(), nn.functional.linear(z, head.weight, head.bias).detach(), "evaluation")


@about("row_statistics")
def row_statistics(draw):
    case = Case(draw, (-math.inf,))
    case.logits[case.logits.isneginf().all(1)] = 0.0
    names = draw(st.sets(st.sampled_from(statistics.STATISTICS), min_size=1))
    mean = tensor(draw, (case.m,), case.dtype)
    given_ = {"logits": case.logits, "features": case.z, "W": case.W, "mean": mean}
    together = statistics.row_statistics(names, **given_)
    assert list(together) == [name for name in statistics.STATISTICS if name in names]
    f, z = double(case.logits, case.z)
    share = (f - f.amax(1, keepdim=True)).exp() if case.n else f
    rest = share.sort(1).values[:, :-1].sum(1)  # of all but the largest, which is 1: log1p keeps what is tiny
    truth = {
        "max": f.amax(1) if case.n else f.sum(1), "logsumexp": f.logsumexp(1),
        "entropy": rest.log1p() + torch.special.entr(share).sum(1) / (1 + rest),
        "norm1": z.abs().sum(1), "norm2": z.norm(dim=1), "centred_norm": (z - mean.double()).norm(dim=1),
    }  # fmt: skip
    for name in names:
        alone = statistics.row_statistics([name], **given_)[name]
        torch.testing.assert_close(together[name], alone, rtol=1e-5, atol=1e-6, equal_nan=True)
        if name in truth and name != "entropy":
            agree(together[name], truth[name], name)
        elif name == "entropy":  # it may be tiny, and keeps its digits
            torch.testing.assert_close(alone.double(), truth[name], rtol=1e-4, atol=1e-37)


def score_sets(draw: Callable) -> tuple[Tensor, Tensor]:
    """ID and OOD scores with ties and infinities."""
    numbers = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-30, 1.0, 2.0, 3.0, math.inf])
    return tuple(torch.tensor(draw(st.lists(numbers, min_size=1, max_size=30))) for _ in range(2))


@about("roc_curve", "auroc", "fpr_at_tpr", "aupr", "detection")
def of_two_sets(draw):
    inside, outside = score_sets(draw)
    above = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    assert metrics.auroc(inside, outside) == pytest.approx(above.mean().item(), abs=1e-12)
    assert metrics.auroc(outside, inside) == pytest.approx(1 - above.mean().item(), abs=1e-12)
    thresholds = sorted({*inside.tolist(), *outside.tolist()})
    points = {((outside >= t).double().mean().item(), (inside >= t).double().mean().item()) for t in thresholds}
    fpr, tpr = metrics.roc_curve(inside, outside, positive="id")
    assert {*zip(fpr.tolist(), tpr.tolist(), strict=True)} == points | {(0.0, 0.0)}
    level = draw(st.sampled_from([0.05, 0.5, 0.95, 1.0]))
    expected = min(x for x, y in points if y >= level)
    assert metrics.fpr_at_tpr(inside, outside, level, positive="id") == pytest.approx(expected, abs=1e-12)
    found = metrics.detection(inside, outside)
    assert found["fpr95_id_positive"] == metrics.fpr_at_tpr(inside, outside, positive="id")
    assert found["aupr_in"] == pytest.approx(metrics.aupr(inside, outside, "id"), abs=1e-12)
    assert found["aupr_in"] == pytest.approx(metrics.aupr(-outside, -inside, "ood"), abs=1e-12)
    assert all(0 <= value <= 1 for value in found.values())
    transformed = metrics.detection(inside.atan() / 2, outside.atan() / 2)
    distinct = inside.unique().numel() == inside.atan().unique().numel()
    assert not distinct or found["auroc"] == pytest.approx(transformed["auroc"], abs=1e-12)


@about("Bootstrap", "percentile_interval")
def bootstrap(draw):
    inside, outside = (scores.clamp(-9, 9) for scores in score_sets(draw))
    drawn = metrics.Bootstrap(4, seed=draw(st.integers(0, 99)))
    found = drawn.detection(drawn.below(inside, "id"), drawn.below(outside, "ood"))["auroc"]
    counts = drawn.counts("id", len(inside)), drawn.counts("ood", len(outside))
    for value, *of in zip(found, *counts, strict=True):
        again = [scores.repeat_interleave(n.long()) for scores, n in zip((inside, outside), of, strict=True)]
        assert value.item() == pytest.approx(metrics.auroc(*again), abs=1e-12)
    low, high = metrics.percentile_interval(found)
    assert found.min() - 1e-12 <= low <= high <= found.max() + 1e-12


@about("accuracy", "expected_calibration_error", "calibration_error", "confidence_bins")
def calibration(draw):
    case = Case(draw, least=1)
    probabilities = case.logits.nan_to_num(0.0, 9.0, -9.0).double().softmax(1)
    confidence, predicted = probabilities.max(1)
    right, n_bins = predicted == case.y, draw(st.integers(1, 20))
    assert metrics.accuracy(probabilities, case.y) == pytest.approx(right.double().mean().item())
    bins, total = metrics.confidence_bins(confidence, n_bins), 0.0
    for k in range(n_bins):
        held = bins == k
        assert ((confidence[held] > k / n_bins - 1e-9) & (confidence[held] <= (k + 1) / n_bins + 1e-9)).all()
        total += (right[held].double() - confidence[held]).sum().abs().item() / case.n
    assert metrics.calibration_error(confidence, right, n_bins) == pytest.approx(total, abs=1e-12)
    assert metrics.expected_calibration_error(probabilities, case.y, n_bins) == pytest.approx(total, abs=1e-12)


@about("tpr_threshold", "conformal_threshold", "conformal_pvalue")
def thresholds(draw):
    scores = tensor(draw, (draw(st.integers(1, 60)),), draw(st.sampled_from(DTYPES)))
    tpr, alpha = draw(st.floats(0.01, 1.0)), draw(st.floats(0.01, 0.99))
    t = threshold.tpr_threshold(scores, tpr)
    assert (scores >= t).double().mean() >= tpr - 1e-9
    higher = scores[scores > t]
    assert not len(higher) or (scores >= higher.min()).double().mean() < tpr
    new = torch.cat([scores, tensor(draw, (5,), scores.dtype)])
    p = threshold.conformal_pvalue(new, scores)
    literal = torch.tensor([(1 + (scores <= s).sum().item()) / (len(scores) + 1) for s in new])
    torch.testing.assert_close(p, literal)
    k = math.floor(alpha * (len(scores) + 1) + 1e-9)
    if k == 0:
        with pytest.raises(ValueError, match="scores"):
            threshold.conformal_threshold(scores, alpha)
    else:
        t = threshold.conformal_threshold(scores, alpha)
        assert t == scores.sort().values[k - 1]


@about("Monitor")
def monitor(draw):
    """However the stream is split, and over a stop, the reading is the same; alarms never go off again."""
    calibration_ = tensor(draw, (draw(st.integers(20, 60)),), torch.float32)
    stream = tensor(draw, (draw(st.integers(0, 40)),), torch.float32, SPECIAL)
    whole, parts = (ood_fast.Monitor(calibration_, alpha=0.05, seed=1) for _ in range(2))
    cut = draw(st.integers(0, len(stream)))
    at_once, first = whole.update(stream), parts.update(stream[:cut])
    again = parts.update(stream[cut:])
    assert str(at_once) == str(again)
    assert at_once.n_flagged == (~(stream.double() >= whole.threshold) | (stream == math.inf)).sum()
    assert again.alarm or not first.alarm


@about("deploy")
def deploy(draw):
    case = Case(draw, least=2)
    torch.manual_seed(draw(st.integers(0, 99)))
    model, z = nn.Sequential(nn.Flatten(), nn.Linear(case.m, case.c)).eval(), case.z.float()
    detector = detectors.create(draw(st.sampled_from(["MSP", "Energy", "MaxLogit", "GEN"]))).fit(model, [(z, case.y)])
    scores = detector.score(model, z)
    detector.threshold = scores.median()
    logits, score, is_ood = ood_fast.deploy(model, detector)(z)
    torch.testing.assert_close(logits, model(z))
    torch.testing.assert_close(score, scores)
    assert torch.equal(is_ood, ~(score >= detector.threshold))


# ---- raises exactly this

CALLS = {  # function, and what it is given; `Case` draws them
    "elogitnorm": (ood_fast.elogitnorm, ("logits", "z", "W", "b", "y")),
    "linear_elogitnorm": (ood_fast.linear_elogitnorm, ("z", "W", "b", "y")),
    "logitnorm": (ood_fast.logitnorm, ("logits", "y")),
    "boundary_distance": (ood_fast.boundary_distance, ("logits", "W")),
    "nci_score": (ood_fast.nci_score, ("z", "W", "b", "mean", "logits")),
}
BREAKS: dict[str, tuple[Callable, type]] = {
    "text": (lambda t: "text", TypeError),
    "list": (lambda t: t.tolist(), TypeError),
    "whole numbers": (lambda t: t.int(), TypeError),
    "complex": (lambda t: t.to(torch.complex64), TypeError),
    "one more": (lambda t: torch.cat([t, t[..., :1]], -1), ValueError),
    "one row more": (lambda t: torch.cat([t, t[:1]]), ValueError),
    "flat": (lambda t: t.flatten()[:, None, None], ValueError),
    "scalar": (lambda t: t.flatten()[0], ValueError),
    "elsewhere": (lambda t: t.to("meta"), ValueError),
}
FITS = (  # what is still right
    (ood_fast.boundary_distance, "logits", "one row more"),
    (ood_fast.boundary_distance, "W", "one more"),
    (ood_fast.logitnorm, "logits", "one more"),  # a class more, for indices
)


@about("raises exactly this")
def raises(draw):
    case = Case(draw, (), least=2)
    called, names = CALLS[draw(st.sampled_from(sorted(CALLS)))]
    case.mean, case.b = torch.zeros(case.m, dtype=case.dtype), torch.zeros(case.c, dtype=case.dtype)
    good = {name: getattr(case, name) for name in names}
    called(**good)
    broken = draw(st.sampled_from(names))
    how, error = BREAKS[kind := draw(st.sampled_from(sorted(BREAKS)))]
    assume((called, broken, kind) not in FITS)
    with pytest.raises((error, ValueError)) as raised:
        called(**good | {broken: how(good[broken])})
    text = str(raised.value)
    assert text.partition(":")[0].split(",")[0] in names, f"{broken} {kind}: {text}"
    assert isinstance(raised.value, error) or kind == "complex", f"{broken} {kind}: {text}"


@about("binned", "Binned")
def binned_metrics(draw: Callable) -> None:
    """Between the bounds lie value and exact number, whatever the scores in the bins; no bin is too many."""
    n_bins = draw(st.integers(1, 6))
    bins = [torch.tensor(draw(st.lists(st.integers(0, n_bins - 1), min_size=1, max_size=9))) for _ in range(2)]
    counts = [torch.bincount(part, minlength=n_bins) for part in bins]
    found = metrics.binned(*counts)["auroc"]
    inside = torch.rand(
        sum(map(len, bins)),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1))),
    )
    scores = [part + some for part, some in zip(bins, inside.split([len(part) for part in bins]), strict=True)]
    assert found.low - 1e-12 <= metrics.auroc(*scores) <= found.high + 1e-12
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    ours = EXAMPLES == 500
    common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    phases = (Phase.generate, Phase.shrink)
    examples = max(1, EXAMPLES // len(PROPERTIES))

    @settings(max_examples=examples, derandomize=ours, print_blob=True, phases=phases, **common)
    @given(st.data())
    def holds(data):
        PROPERTIES[name](data.draw)

    with ops.use_backend("eager"):
        holds()


def test_every_public_function_has_a_property():
    """But for what the tests of files and of names hold."""
    covered = {part for name in PROPERTIES for part in name.split()}
    elsewhere = {"register", "load_bundle", "save_bundle"}
    assert {*ood_fast.__all__} - covered == elsewhere
    for module in (functional, metrics, threshold, statistics):
        own = {n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__}
        inside = {"as_rows", "as_places", "nothing", "empty_loss", "average_offset", "plan", "Calibration", "check"}
        assert {n for n in own if not n.startswith("_")} - covered - inside <= {"calibration"}, module
