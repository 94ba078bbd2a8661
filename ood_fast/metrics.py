"""Metrics of out-of-distribution detection and of calibration.

Scores follow the package's direction, higher = more in-distribution, for both populations.

FPR at 95 % TPR has two conventions in the literature, and they differ a lot. Both are here, by the name of what is
*positive*:

    "ood"  OpenOOD: the share of ID inputs rejected by the threshold that catches 95 % of the OOD inputs
    "id"   most papers: the share of OOD inputs accepted by the threshold that keeps 95 % of the ID inputs

All functions take 1-D tensors (or anything `torch.as_tensor` takes) and compute in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POSITIVES = ("ood", "id")
ECE_BINS = 15


def roc_curve(id_scores: Any, ood_scores: Any, positive: str = "ood") -> tuple[Tensor, Tensor]:
    """The ROC curve: false- and true-positive rates, from (0, 0) to (1, 1), one point for each distinct score.

    Equal scores are one point: no order is invented among ties.
    """
    false_positives, true_positives = _counts(id_scores, ood_scores, positive)
    return false_positives / false_positives[-1], true_positives / true_positives[-1]


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Area under the ROC curve = P(ID score > OOD score) + ½ P(equal). The same for either positive class."""
    return torch.trapezoid(*reversed(roc_curve(id_scores, ood_scores))).item()


def fpr_at_tpr(id_scores: Any, ood_scores: Any, tpr: float = 0.95, positive: str = "ood") -> float:
    """False-positive rate at the first ROC point whose true-positive rate is at least `tpr`; no interpolation.

    `positive="ood"` is OpenOOD's FPR@95; see the module docstring. Every distinct score is a point here; scikit-learn's
    default, which OpenOOD calls, leaves out points on straight pieces, which can only matter among tied scores.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr: got {tpr}, expected a number in (0, 1]")
    false_positive_rate, true_positive_rate = roc_curve(id_scores, ood_scores, positive)
    return false_positive_rate[int((true_positive_rate >= tpr).int().argmax())].item()


def aupr(id_scores: Any, ood_scores: Any, positive: str = "ood") -> float:
    """Area under the precision-recall curve, trapezoid over recall (as OpenOOD; this is not average precision).

    `positive="id"` is AUPR_IN, `positive="ood"` is AUPR_OUT. The curve starts at recall 0 with precision 1.
    """
    false_positives, true_positives = _counts(id_scores, ood_scores, positive)
    predicted_positive = true_positives + false_positives
    precision = torch.where(predicted_positive > 0, true_positives / predicted_positive, 1.0)
    return torch.trapezoid(precision, true_positives / true_positives[-1]).item()


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of rows of `logits` (n, c) whose arg-max is `target` (n,)."""
    return (logits.argmax(dim=1) == target).double().mean().item()


def expected_calibration_error(probabilities: Tensor, target: Tensor, n_bins: int = ECE_BINS) -> float:
    """ECE = Σ_b (n_b / n) · |accuracy_b − mean confidence_b| over `n_bins` equal bins (lo, hi] of the confidence.

    Args:
        probabilities: (n, c), each row sums to 1; the confidence is its largest entry.
        target: (n,) class indices.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])  # right=False: a value on an edge belongs to the bin below it
    gap = (predicted == target).double() - confidence
    return (
        torch.zeros(n_bins, dtype=torch.float64, device=gap.device).index_add_(0, bins, gap).abs().sum() / len(gap)
    ).item()


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
    predicted_positive = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    last_of_ties = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
    true_positives = true_positives[last_of_ties]
    false_positives = predicted_positive[last_of_ties] - true_positives
    start = true_positives.new_zeros(1)
    return torch.cat([start, false_positives]), torch.cat([start, true_positives])


def _scores(argument: str, values: Any) -> Tensor:
    scores = torch.as_tensor(values).detach().double()
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"{argument}: got shape {tuple(scores.shape)}, expected (n,) with n >= 1")
    if scores.isnan().any():
        raise ValueError(f"{argument}: {int(scores.isnan().sum())} of {len(scores)} scores are NaN, expected numbers")
    return scores
