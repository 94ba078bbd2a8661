"""Thresholds: from which score on an input is taken for out-of-distribution.

`Detector.calibrate(scores, tpr=0.95)` and `calibrate(scores, alpha=0.05)` set them from scores of in-distribution data
that took no part in the fit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..values import TPR


class Calibration(NamedTuple):
    """What a threshold was set from; saved with the detector."""

    by: str  # "tpr" or "alpha", the keyword of `Detector.calibrate`
    level: float  # its value
    n_samples: int  # scores
    threshold: float  # that came of it: another one in the detector was set by other means


def tpr_threshold(scores: Tensor, tpr: float = TPR) -> Tensor:
    """The largest threshold t with at least the share `tpr` of these in-distribution scores >= t; a scalar tensor."""
    _check_scores("scores", scores)
    checks.real("tpr", tpr, 0.0, 1.0, open_low=True)
    n_kept = max(1, math.ceil(tpr * len(scores) - 1e-9))  # 0.95 · 20 is 19, not 19.000000000000004
    return _finite(torch.topk(scores.detach(), n_kept).values[-1].clone(), scores)


def conformal_threshold(scores: Tensor, alpha: float = 0.05) -> Tensor:
    """The largest threshold that flags a new in-distribution input with a chance of at most alpha; a scalar tensor.

        t = s_(k), the k-th smallest of the n scores, k = ⌊alpha (n + 1)⌋;  flagged: s < t

    A new score that is exchangeable with the n given is below s_(k) only if it is among the k lowest of all n + 1,
    which has a chance of k / (n + 1) without ties and less with them: P(s < t) <= k / (n + 1) <= alpha, whatever the
    distribution. The chance is over the calibration data too: without ties, the share that one threshold flags in the
    long run is distributed as Beta(k, n + 1 − k).

    Raises ValueError where k = 0, n < 1 / alpha − 1: only t = −inf, which flags nothing, would hold.

    Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005; for outliers Bates et al., "Testing for
    Outliers with Conformal p-Values", Annals of Statistics 2023, arXiv:2104.08279.
    """
    _check_scores("scores", scores)
    checks.real("alpha", alpha, 0.0, 1.0, open_low=True, open_high=True)
    k = math.floor(alpha * (len(scores) + 1) + 1e-9)  # 0.29 · 100 is 29, not 28.999999999999996
    if k == 0:
        raise ValueError(
            f"scores: got {len(scores)}, expected at least {math.ceil(1 / alpha - 1 - 1e-9)} for alpha={alpha}: with "
            "fewer no threshold that flags anything has the guarantee; give more scores or a larger alpha"
        )
    return _finite(torch.topk(scores.detach(), k, largest=False).values[-1].clone(), scores)


def conformal_pvalue(scores: Tensor, calibration: Tensor) -> Tensor:
    """The conformal p-value of each score (k,), float32: (1 + #{calibration <= score}) / (n + 1), small = OOD.

    For in-distribution inputs P(p <= alpha) <= alpha, ties included; p <= alpha exactly where the score is below
    `conformal_threshold(calibration, alpha)`.
    """
    checks.float_tensor("scores", scores, 1, "(k,)")
    if scores.isnan().any():
        raise ValueError("scores: got NaN, expected numbers")
    _check_scores("calibration", calibration)
    checks.same_device("calibration", calibration, "scores", scores)
    dtype = torch.promote_types(scores.dtype, calibration.dtype)
    ordered = calibration.detach().to(dtype).sort().values
    at_most = torch.searchsorted(ordered, scores.detach().to(dtype).contiguous(), right=True)
    return (1 + at_most) / (len(calibration) + 1)


def calibration(scores: Tensor, tpr: float | None = None, alpha: float | None = None) -> tuple[Tensor, Calibration]:
    """The threshold by one of the two, `TPR` if neither is given, and the record of it."""
    if tpr is not None and alpha is not None:
        raise ValueError(f"tpr, alpha: got {tpr} and {alpha}, expected one of them")
    if alpha is not None:
        threshold, by, level = conformal_threshold(scores, alpha), "alpha", alpha
    else:
        level = TPR if tpr is None else tpr
        threshold, by = tpr_threshold(scores, level), "tpr"
    return threshold, Calibration(by, float(level), len(scores), float(threshold))


def _finite(threshold: Tensor, scores: Tensor) -> Tensor:
    """ValueError for a threshold at infinity, which flags nothing, or all."""
    if threshold.isinf():
        n_such = int((scores == threshold).sum())
        raise ValueError(
            f"scores: got {float(threshold)} in {n_such} of {len(scores)}, so that it would be the threshold, expected "
            "a number: with -inf nothing is flagged; fit on data of all classes, or calibrate on other data"
        )
    return threshold


def check(threshold: Tensor) -> None:
    """ValueError for NaN or an infinity: everything would be flagged, or nothing; and for several numbers."""
    if threshold.numel() != 1 or not (threshold.is_meta or math.isfinite(threshold.item())):
        raise ValueError(f"threshold: got {threshold.tolist()}, expected a number; calibrate on other data")


def _check_scores(argument: str, scores: Tensor) -> None:
    checks.float_tensor(argument, scores, 1, "(n,)")
    if not len(scores):
        raise ValueError(f"{argument}: got none, expected the scores of in-distribution data")
    if scores.isnan().any():
        raise ValueError(f"{argument}: got NaN, expected the scores of in-distribution data")
