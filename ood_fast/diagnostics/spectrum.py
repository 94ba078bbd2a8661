"""How many directions the features use."""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager.precision import double


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
    centred = double(features) - double(features).mean(dim=0)
    values: Tensor = torch.linalg.svdvals(centred / len(features) ** 0.5)
    return values


def spectrum(covariance: Tensor) -> Tensor:
    """The singular values of `singular_values` from the covariance Σ (z − μ)(z − μ)ᵀ / n (m, m), where no features are
    kept: σ_i = √λ_i, largest first, (m,) in float64.

    An eigenvalue is known to about m · 2⁻⁵² of the largest: those below count as 0, so that σ_i is 0 where it would be
    smaller than about 1e-7 σ_1 (at m = 512). Beyond min(n − 1, m) they are 0 in any case.
    """
    values = torch.linalg.eigvalsh(double(covariance)).flip(0)
    noise = len(values) * torch.finfo(torch.float64).eps * values[:1].clamp(min=0)
    return torch.where(values > noise, values, 0.0).sqrt()


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values scaled to sum 1: the number of directions that the features really use.

    0 when all values are 0. Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO
    2007.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())
