"""The geometry of the training features, and how near it is to neural collapse.

Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep learning training", PNAS 2020,
arXiv:2008.08186; Haas, Yolland and Rabus, "Exploring Simple, High Quality Out-of-Distribution Detection with L2
Normalization", TMLR 2024, arXiv:2306.04072, equations 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors.streaming import ClassMeans, Scatter
from ..eager.precision import double

Chunk = tuple[Tensor, Tensor, Tensor | None]  # features (n, m), logits (n, c), targets (n,)
COSINE_BINS = 200
ROWS_AT_ONCE = 1024  # classes whose cosines with all others are held at a time


@dataclass(frozen=True)
class Moments:
    """The first two moments of the training features, overall and by class; float64, on the CPU.

    Attributes:
        mean, covariance: μ (m,), and Σ (z − μ)(z − μ)ᵀ / n, (m, m).
        class_count, class_mean: of the c classes of the logits, (c,) and (c, m); 0 for a class without samples.
        within: Σ_W = Σ_i (z_i − μ_y)(z_i − μ_y)ᵀ / n, (m, m).
        norms: ‖z‖₂ of each sample, (n,).
    """

    mean: Tensor
    covariance: Tensor
    class_count: Tensor
    class_mean: Tensor
    within: Tensor
    norms: Tensor

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Moments:
        """In one pass over the training data.

        Raises:
            ValueError: it is empty, or without targets. FloatingPointError: a feature is NaN or infinite.
        """
        scatter, means = Scatter(), ClassMeans(by="target")
        lengths: list[Tensor] = []
        for features, logits, targets in chunks:
            if targets is None:
                raise ValueError("targets: got None, expected the class indices (n,) of the training data")
            scatter.take(features, logits, targets)
            means.take(features, logits, targets)
            lengths.append(torch.linalg.vector_norm(double(features), dim=1).cpu())
        if not scatter.rows:
            raise ValueError("chunks: got no training sample, expected at least one")
        norms = torch.cat(lengths)
        if not norms.isfinite().all():
            raise FloatingPointError(f"features: {int((~norms.isfinite()).sum())} rows hold NaN or infinity")
        covariance, within = scatter.covariance(), means.within(scatter) / scatter.rows
        parts = scatter.mean, covariance, means.count, means.value(), within, norms
        return cls(*(part.cpu() for part in parts))


@dataclass(frozen=True)
class NeuralCollapse:
    """How near the class means, and the weights of the head, are to a simplex with nothing around its corners.

    All are 0 in complete collapse, and NaN where they have no meaning: one class, or equal class means. C is the number
    of classes that have samples, μ_c their means, μ_G = Σ_c μ_c / C the global mean of classes, M the (C, m) matrix of
    μ_c − μ_G.

    Attributes:
        nc1: variability of the samples around the means, tr(Σ_W Σ_B⁺) / C (Haas et al., eq. 2), with Σ_W of `Moments`
            and Σ_B = Mᵀ M / C. From the singular vectors v_k and values s_k of M: Σ_k r_k / C.
        ratios: r_k = v_kᵀ Σ_W v_k / (s_k² / C), the within- over the between-class variance along the k-th direction
            between the means, the widest first; at most C − 1. What s_k is rounding is left out, as in Σ_B⁺.
        equinormality: EN (eq. 3) = std_c ‖μ_c − μ_G‖ / mean_c ‖μ_c − μ_G‖; the standard deviation is that of the C
            classes (ddof 0).
        mean_norms: ‖μ_c − μ_G‖, (C,).
        equiangularity: EA (eq. 4) = mean over c ≠ c' of |cos(μ_c − μ_G, μ_c' − μ_G) + 1/(C − 1)|. In the matrix form of
            eq. 4 the constant must be +1/(C − 1), as Papyan et al. have it, to vanish for a simplex; it is printed
            with the other sign. A mean at μ_G has cosine 0 with all.
        cosine_counts: the cosines of all pairs c < c' counted in `COSINE_BINS` equal bins from −1 to 1.
        nc3: self-duality ‖W/‖W‖_F − M/‖M‖_F‖_F² (Papyan et al.), between 0 (aligned) and 4; 2 = no relation.
        weight_cosines: cos(w_c, μ_c − μ_G), (C,).
        classes: the indices of the C classes, (C,).
    """

    nc1: float
    ratios: Tensor
    equinormality: float
    mean_norms: Tensor
    equiangularity: float
    cosine_counts: Tensor
    nc3: float
    weight_cosines: Tensor
    classes: Tensor


def neural_collapse(geometry: Moments, head_weight: Tensor) -> NeuralCollapse:
    """`NeuralCollapse` of the training features, and of the weight (c, m) of the head."""
    classes = geometry.class_count.nonzero().squeeze(1)
    centred = geometry.class_mean[classes]
    centred = centred - centred.mean(dim=0)
    weight = double(head_weight.detach()).cpu()[classes]
    n_classes, norms = len(classes), torch.linalg.vector_norm(centred, dim=1)
    # Means that differ by the rounding of their sums alone are equal.
    rounding = torch.finfo(torch.float64).eps * max(centred.shape) * geometry.class_mean.abs().max()
    apart = n_classes > 1 and bool(norms.max() > rounding)

    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = (values > rounding) & (torch.arange(len(values)) < n_classes - 1)
    directions, between = directions[kept], values[kept].square() / n_classes
    ratios = ((directions @ geometry.within) * directions).sum(dim=1).clamp(min=0) / between
    if not apart:
        ratios = ratios[:0]

    angle, counts = _angles(centred)
    both = torch.linalg.vector_norm(weight) * torch.linalg.vector_norm(centred)
    return NeuralCollapse(
        nc1=(ratios.sum() / n_classes).item() if apart else math.nan,
        ratios=ratios,
        equinormality=(norms.std(correction=0) / norms.mean()).item() if apart else math.nan,
        mean_norms=norms,
        equiangularity=angle if apart else math.nan,
        cosine_counts=counts,
        nc3=(2 - 2 * (weight * centred).sum() / both).clamp(min=0).item() if apart and both > 0 else math.nan,
        weight_cosines=torch.nn.functional.cosine_similarity(weight, centred, dim=1, eps=1e-300),
        classes=classes,
    )


def _angles(centred: Tensor) -> tuple[float, Tensor]:
    """Equiangularity, and the counts of the cosines, of the rows of `centred` (C, m); a few rows at a time."""
    unit, n_classes = torch.nn.functional.normalize(centred, dim=1, eps=1e-300), len(centred)
    total, counts = 0.0, torch.zeros(COSINE_BINS, dtype=torch.float64)
    if n_classes < 2:
        return math.nan, counts
    for first in range(0, n_classes, ROWS_AT_ONCE):
        cosines = (unit[first : first + ROWS_AT_ONCE] @ unit.T).clamp(-1, 1)
        rows = torch.arange(first, first + len(cosines)).unsqueeze(1)
        cosines = cosines[torch.arange(n_classes) > rows]
        total += (cosines + 1 / (n_classes - 1)).abs().sum().item()
        counts += torch.histc(cosines, COSINE_BINS, -1, 1)
    return total / (n_classes * (n_classes - 1) / 2), counts
