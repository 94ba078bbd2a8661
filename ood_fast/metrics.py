"""Metrics of out-of-distribution detection and of calibration.

Scores follow the package's direction, higher = more in-distribution, for both populations.

FPR at 95 % TPR has two conventions in the literature, and they differ a lot. Both are here, by the name of what is
*positive*:

    "ood"  OpenOOD: the share of ID inputs rejected by the threshold that catches 95 % of the OOD inputs
    "id"   most papers: the share of OOD inputs accepted by the threshold that keeps 95 % of the ID inputs

All functions take 1-D tensors (or anything `torch.as_tensor` takes) and compute in float64.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .eager.precision import double

POSITIVES = ("ood", "id")
ECE_BINS = 15
BINNED_FPR = ("fpr95_ood_positive", "fpr95_id_positive")


def roc_curve(id_scores: Any, ood_scores: Any, positive: str = "ood") -> tuple[Tensor, Tensor]:
    """The ROC curve: false- and true-positive rates, from (0, 0) to (1, 1), one point for each distinct score.

    Equal scores are one point: no order is invented among ties.
    """
    false_positives, true_positives = _counts(id_scores, ood_scores, positive)
    return false_positives / false_positives[-1], true_positives / true_positives[-1]


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Area under the ROC curve = P(ID score > OOD score) + ½ P(equal). The same for either positive class."""
    return _auroc(*_counts(id_scores, ood_scores, "ood")).item()


def fpr_at_tpr(
    id_scores: Any, ood_scores: Any, tpr: float = 0.95, positive: str = "ood", *, drop_intermediate: bool = False
) -> float:
    """False-positive rate at the first ROC point whose true-positive rate is at least `tpr`; no interpolation.

    `positive="ood"` is OpenOOD's FPR@95; see the module docstring. Every distinct score is a point here.
    `drop_intermediate=True` leaves out points in the middle of straight pieces, as scikit-learn's default and so
    OpenOOD do: among tied scores the first point that is left can lie further up.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr: got {tpr}, expected a number in (0, 1]")
    false_positives, true_positives = _counts(id_scores, ood_scores, positive)
    if drop_intermediate:
        kept = _corners(false_positives, true_positives)
        false_positives, true_positives = false_positives[kept], true_positives[kept]
    return _fpr_at_tpr(false_positives, true_positives, tpr).item()


def aupr(id_scores: Any, ood_scores: Any, positive: str = "ood") -> float:
    """Area under the precision-recall curve, trapezoid over recall (as OpenOOD; this is not average precision).

    `positive="id"` is AUPR_IN, `positive="ood"` is AUPR_OUT. The curve starts at recall 0 with precision 1.
    """
    return _aupr(*_counts(id_scores, ood_scores, positive)).item()


def detection(id_scores: Any, ood_scores: Any) -> dict[str, float]:
    """All five from one sort: AUROC, AUPR and FPR95 as OpenOOD's `compute_all_metrics` gives them, ties included, and
    FPR95 in the other convention: {"auroc", "fpr95_ood_positive", "fpr95_id_positive", "aupr_in", "aupr_out"}."""
    id_counts, ood_counts = _counts(id_scores, ood_scores, "ood")
    result = _detection(id_counts, ood_counts)
    corners = _corners(id_counts, ood_counts)
    result["fpr95_ood_positive"] = _fpr_at_tpr(id_counts[corners], ood_counts[corners], 0.95)
    return {name: value.item() for name, value in result.items()}


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of rows of `logits` (n, c) whose arg-max is `target` (n,); ValueError for NaN, or without a row."""
    _check_rows("logits", logits, target)
    target = target.to(logits.device)
    return double(logits.argmax(dim=1) == target).mean().item()


def expected_calibration_error(probabilities: Tensor, target: Tensor, n_bins: int = ECE_BINS) -> float:
    """ECE = Σ_b (n_b / n) · |accuracy_b − mean confidence_b| over `n_bins` equal bins (lo, hi] of the confidence.

    Args:
        probabilities: (n, c), each row sums to 1; the confidence is its largest entry.
        target: (n,) class indices.
        n_bins: >= 1.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit; NaN; rows that are no probabilities, such as logits.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    """
    _check_rows("probabilities", probabilities, target)
    confidence, predicted = double(probabilities).max(dim=1)
    largest, sums = confidence.max().item(), double(probabilities).sum(dim=1)
    if probabilities.min() < 0 or largest > 1.01 or not ((sums - 1).abs() < 0.02).all():
        raise ValueError(
            f"probabilities: got numbers from {probabilities.min():.4g} to {largest:.4g} and rows that sum to "
            f"{sums.min():.4g} to {sums.max():.4g}, expected probabilities, such as logits.softmax(1)"
        )
    return calibration_error(confidence, predicted == target.to(predicted.device), n_bins)


def calibration_error(confidence: Tensor, correct: Tensor, n_bins: int = ECE_BINS) -> float:
    """`expected_calibration_error` from the confidence (n,) and whether the prediction is right, (n,) bool."""
    checks.positive_int("n_bins", n_bins)
    if confidence.dim() != 1 or confidence.shape != correct.shape:
        shapes = f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        raise ValueError(f"confidence, correct: got shapes {shapes}, expected (n,) of both")
    bins, gap = _gaps(confidence, correct, n_bins)
    by_bin = torch.zeros(n_bins, dtype=torch.float64, device="cpu").index_add_(0, bins, gap)
    return (by_bin.abs().sum() / len(gap)).item()


def confidence_bins(confidence: Tensor, n_bins: int = ECE_BINS) -> Tensor:
    """Which of `n_bins` equal bins (lo, hi] each confidence (n,) is in, (n,) int64."""
    confidence = double(confidence)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence, edges[1:-1])  # right=False: an edge belongs to the bin below it


def _gaps(confidence: Tensor, correct: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """The bin of each sample (n,), and whether it is right less its confidence (n,), in float64, on the CPU."""
    confidence = confidence.cpu()
    return confidence_bins(confidence, n_bins), correct.cpu().double() - confidence.double()


# ---- from counts in bins


class Binned(NamedTuple):
    """A metric of samples that were counted in bins, and the bounds of what it is without bins."""

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """How far the metric can be from the value."""
        return max(self.value - self.low, self.high - self.value)


def binned(id_counts: Tensor, ood_counts: Tensor) -> dict[str, Binned]:
    """Metrics of ID and OOD samples that were counted in bins (b,) of their score, the lowest first:
    {"auroc", "fpr95_ood_positive", "fpr95_id_positive", "ap_ood_positive"}.

    The value takes the samples of a bin for ties. The bounds are those of the best and the worst order in every bin,
    all OOD samples below all ID samples and the reverse, so that no scores with these counts give anything beyond them.
    AP is average precision, Σ_k (R_k − R_{k−1}) P_k over the thresholds k, as scikit-learn has it, OOD positive.

    ValueError for counts that are negative, of other lengths, or none.
    """
    counts = [torch.as_tensor(part, device="cpu").double() for part in (id_counts, ood_counts)]
    for name, part in zip(("id_counts", "ood_counts"), counts, strict=True):
        if part.dim() != 1 or part.shape != counts[0].shape or (part < 0).any() or not part.sum() > 0:
            got = f"shape {tuple(part.shape)}, sum {part.sum():g}"
            raise ValueError(f"{name}: got {got}, expected counts (b,) of at least one sample, as many of both")
    inside, outside = counts
    none = torch.zeros_like(inside)
    best = _in_order(torch.stack([none, inside], 1), torch.stack([outside, none], 1))
    worst = _in_order(torch.stack([inside, none], 1), torch.stack([none, outside], 1))
    found = [_of_counts(*order) for order in (_in_order(inside, outside), worst, best)]
    # in the worst order the precision rises from one OOD sample of a bin to the next: each counts with its own
    before, above = outside.cumsum(0) - outside, inside.cumsum(0)
    told = outside - above * (torch.digamma(before + outside + above + 1) - torch.digamma(before + above + 1))
    found[1]["ap_ood_positive"] = torch.where(outside > 0, told, 0.0).sum() / outside.sum()
    several = {name: [of[name].item() for of in found] for name in found[0]}
    return {name: Binned(values[0], min(values), max(values)) for name, values in several.items()}


def _in_order(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Counts up to each threshold, with a leading 0."""
    return F.pad(inside.flatten().cumsum(0), (1, 0)), F.pad(outside.flatten().cumsum(0), (1, 0))


def _of_counts(id_counts: Tensor, ood_counts: Tensor) -> dict[str, Tensor]:
    found = _detection(id_counts, ood_counts)
    precision = ood_counts[1:] / (ood_counts + id_counts)[1:].clamp(min=1)
    area = (ood_counts.diff() * precision).sum() / ood_counts[-1]
    return {name: found[name] for name in ("auroc", *BINNED_FPR)} | {"ap_ood_positive": area}


# ---- intervals: the metrics of samples drawn anew


class Bootstrap:
    """The metrics of `n_draws` samples drawn with replacement from the ID test images and from each OOD set.

    Stratified: each draw has as many images of each set as there are. The draws of a set depend on the seed, its name
    and its size alone. So all detectors, and all runs that are tested on the same images, see the same draws: means
    over sets and runs can be taken draw by draw, and differences are paired. An image drawn k times counts k times;
    nothing is sorted anew.

    Args:
        n_draws: B >= 1.
        seed: of the draws.
    """

    POINTS = 1 << 12  # of a curve; with more distinct scores every k-th is one, k <= images of both sets / POINTS + 1
    BLOCK = 256  # draws that are worked on at a time

    def __init__(self, n_draws: int, seed: int = 0) -> None:
        self.n_draws, self.seed = n_draws, seed
        self._counts: dict[tuple[str, int], Tensor] = {}

    def counts(self, name: str, n_images: int) -> Tensor:
        """How often each image of the set is in each draw, (B, n) uint8 (int32 if one is drawn more than 255 times)."""
        if (name, n_images) not in self._counts:
            key = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
            draws = []
            for _ in range(self.n_draws):
                rows = torch.randint(n_images, (n_images,), generator=generator, device="cpu")
                counts = torch.bincount(rows, minlength=n_images)
                draws.append(counts.byte() if counts.max() < 256 else counts.int())
            self._counts[name, n_images] = torch.stack(draws)
        return self._counts[name, n_images]

    def below(self, scores: Any, name: str, *others: tuple[Any, str]) -> tuple[Tensor, Tensor]:
        """The scores (n,) of a set in ascending order, and how many of each draw are among the first k, (B, n + 1).
        With `others`, (scores, name), of all these sets together, each drawn apart."""
        parts = [(_scores("scores", values), of) for values, of in ((scores, name), *others)]
        counts = torch.cat([self.counts(of, len(values)) for values, of in parts], dim=1)
        joined, order = torch.cat([values for values, _ in parts]).sort()
        return joined, F.pad(counts[:, order].cumsum(1, dtype=torch.int32), (1, 0))

    def detection(self, id_below: tuple[Tensor, Tensor], ood_below: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The metrics of `detection` for each draw, {name: (B,)}, from what `below` gives for the two sets."""
        points = torch.cat([id_below[0], ood_below[0]]).unique()
        step = -(-len(points) // self.POINTS)
        points = points.flip(0)[::step].flip(0)  # the last one is always there
        at_id, at_ood = (F.pad(torch.searchsorted(s, points, right=True), (1, 0)) for s, _ in (id_below, ood_below))
        parts = []
        for start in range(0, self.n_draws, self.BLOCK):
            rows = slice(start, start + self.BLOCK)
            parts.append(_detection(id_below[1][rows][:, at_id].double(), ood_below[1][rows][:, at_ood].double()))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def mean(self, values: Tensor, name: str) -> Tensor:
        """The mean of `values` (n,) over each draw from that set, (B,): of what is right, the accuracy."""
        return self.counts(name, len(values)).double() @ values.cpu().double() / len(values)

    def calibration_error(self, confidence: Tensor, correct: Tensor, name: str, n_bins: int = ECE_BINS) -> Tensor:
        """`calibration_error` e_b of each draw, reflected about that of the set: 2 e − e_b, from 0 to 1, (B,).

        The ECE of few images is too large, and that of a draw from them is so once more. Percentiles of e_b held a true
        ECE of 3 % in 31 of 100 sets of 500 images (`tests/test_metrics.py`), reflected in 92; of one near 0 in fewer.
        """
        bins, gap = _gaps(confidence, correct, n_bins)
        by_bin = torch.zeros(len(gap), n_bins, dtype=torch.float64, device="cpu")
        by_bin.scatter_(1, bins.unsqueeze(1), gap.unsqueeze(1))
        drawn = (self.counts(name, len(gap)).double() @ by_bin).abs().sum(dim=1)
        return ((2 * by_bin.sum(dim=0).abs().sum() - drawn) / len(gap)).clamp(0, 1)


def percentile_interval(draws: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval: the (1 − level)/2 and (1 + level)/2 quantiles of the draws (B,)."""
    draws = draws.double()
    low, high = torch.quantile(draws, draws.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return low, high


# ---- from counts (..., points): the samples that count as positive at each threshold, with a leading 0


def _detection(id_counts: Tensor, ood_counts: Tensor) -> dict[str, Tensor]:
    """All metrics from the ID and OOD samples up to each distinct score, the lowest first."""
    # With ID positive the thresholds come from the other end.
    id_above, ood_above = ((counts[..., -1:] - counts).flip(-1) for counts in (id_counts, ood_counts))
    return {
        "auroc": _auroc(id_counts, ood_counts),
        "fpr95_ood_positive": _fpr_at_tpr(id_counts, ood_counts, 0.95),
        "fpr95_id_positive": _fpr_at_tpr(ood_above, id_above, 0.95),
        "aupr_in": _aupr(ood_above, id_above),
        "aupr_out": _aupr(id_counts, ood_counts),
    }


def _auroc(false_positives: Tensor, true_positives: Tensor) -> Tensor:
    return torch.trapezoid(true_positives / true_positives[..., -1:], false_positives / false_positives[..., -1:])


def _fpr_at_tpr(false_positives: Tensor, true_positives: Tensor, tpr: float) -> Tensor:
    first = (true_positives / true_positives[..., -1:] >= tpr).int().argmax(dim=-1, keepdim=True)
    return (false_positives.gather(-1, first) / false_positives[..., -1:]).squeeze(-1)


def _aupr(false_positives: Tensor, true_positives: Tensor) -> Tensor:
    predicted_positive = true_positives + false_positives
    precision = torch.where(predicted_positive > 0, true_positives / predicted_positive, 1.0)
    return torch.trapezoid(precision, true_positives / true_positives[..., -1:])


def _corners(false_positives: Tensor, true_positives: Tensor) -> Tensor:
    """Which points scikit-learn's `drop_intermediate` keeps: the first, which it adds, and of the others the first, the
    last and those where a step differs from the step before it."""
    turns = (false_positives[1:].diff(n=2) != 0) | (true_positives[1:].diff(n=2) != 0)
    one = turns.new_ones(1)
    return torch.cat([one, one, turns, one])[: len(false_positives)]


def _counts(id_scores: Any, ood_scores: Any, positive: str) -> tuple[Tensor, Tensor]:
    """False and true positives at each distinct threshold, most positive first, with a leading (0, 0)."""
    if positive not in POSITIVES:
        raise ValueError(f"positive: got {positive!r}, expected 'ood' or 'id'")
    id_scores, ood_scores = _scores("id_scores", id_scores), _scores("ood_scores", ood_scores)
    scores = torch.cat([id_scores, ood_scores])
    is_positive = torch.cat([torch.zeros_like(id_scores), torch.ones_like(ood_scores)])
    if positive == "id":
        is_positive = 1 - is_positive
    else:
        scores = -scores
    scores, order = scores.sort(descending=True)
    true_positives = is_positive[order].cumsum(0)
    predicted_positive = torch.ones_like(scores).cumsum(0)
    last_of_ties = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
    true_positives = true_positives[last_of_ties]
    false_positives = predicted_positive[last_of_ties] - true_positives
    start = true_positives.new_zeros(1)
    return torch.cat([start, false_positives]), torch.cat([start, true_positives])


def _check_rows(argument: str, rows: Tensor, target: Tensor) -> None:
    """(n, c) of numbers, n >= 1, and class indices (n,)."""
    checks.float_tensor(argument, rows, 2, "(n, c)")
    checks.instance("target", target, Tensor, "class indices (n,)")
    if target.shape != rows.shape[:1] or target.is_floating_point() or target.dtype == torch.bool or not rows.numel():
        raise ValueError(
            f"target: got {target.dtype} of shape {tuple(target.shape)} for {argument} {tuple(rows.shape)}, expected "
            "class indices (n,), n >= 1"
        )
    if rows.isnan().any():
        raise ValueError(f"{argument}: got NaN, expected numbers")


def _scores(argument: str, values: Any) -> Tensor:
    try:
        values = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: got {type(values).__name__}, expected numbers (n,)") from error
    if values.is_complex():
        raise TypeError(f"{argument}: got {values.dtype}, expected real numbers")
    scores: Tensor = values.detach().cpu().double()  # use_deterministic_algorithms refuses cumsum on a GPU
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"{argument}: got shape {tuple(scores.shape)}, expected (n,) with n >= 1")
    if scores.isnan().any():
        raise ValueError(f"{argument}: {int(scores.isnan().sum())} of {len(scores)} scores are NaN, expected numbers")
    return scores
