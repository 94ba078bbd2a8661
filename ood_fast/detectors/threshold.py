"""Thresholds: from which score on an input is taken for out-of-distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks


def tpr_threshold(scores: Tensor, tpr: float = 0.95) -> Tensor:
    """The largest threshold t with at least the share `tpr` of these in-distribution scores >= t; a scalar tensor."""
    checks.float_tensor("scores", scores, 1, "(n,)")
    checks.real("tpr", tpr, 0.0, 1.0, open_low=True)
    if not len(scores):
        raise ValueError("scores: got none, expected the scores of in-distribution data")
    if scores.isnan().any():
        raise ValueError("scores: got NaN, expected the scores of in-distribution data")
    n_kept = math.ceil(tpr * len(scores) - 1e-9)  # 0.95 · 20 is 19, not 19.000000000000004
    return torch.topk(scores.detach(), n_kept).values[-1].clone()
