"""What the features of a trained model look like."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(features: Tensor) -> Tensor:
    """Singular values of the centred features, largest first: σ_i of (Z − mean) / √n, in float64.

    σ_i² is the variance of the features along their i-th principal direction. Values that fall to zero early mean that
    the features have collapsed onto few directions (Ding et al., "Enhancing Out-of-Distribution Detection with Extended
    Logit Normalization", CVPR 2026, arXiv:2504.11434).

    Args:
        features: (n, m).

    Returns:
        (min(n, m),) in float64.
    """
    centred = features.double() - features.double().mean(dim=0)
    return torch.linalg.svdvals(centred / len(features) ** 0.5)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values scaled to sum 1: the number of directions that the features really use.

    0 when all values are 0. Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO
    2007.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()
