"""The definitions, written down literally in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

Nothing here is fast. The distances between the rows of the head come from the (c, c, m) tensor of their differences,
and every gradient is autograd's. The arithmetic runs in the dtype of the inputs: hand in float64 for the truth,
float32 or bfloat16 for what plain PyTorch achieves in that dtype. Arguments are those of the fast functions of the
same name, which also check them; here they are trusted.

Symbols: n samples, c classes, m features; features z (n, m), head weight W (c, m) and bias b (c,), logits f = z Wᵀ + b
(n, c), predicted class p = argmax f (first index on ties), gap g_j = f_p − f_j.

Each quotient, and each norm, has a corner where autograd would give NaN = 0 · inf although the value is defined. Such
entries are replaced by a harmless constant *before* the operation, never after it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .values import ALPHA, EPS, TAU


def elogitnorm(
    logits: Tensor,
    z: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = EPS,
    average: str = "boundaries",
    detach_geometry: bool = False,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ELogitNorm: cross-entropy of the logits divided by the mean distance D of a sample to its decision boundaries.

        loss = F.cross_entropy(f / D[:, None], y),      D = 1/(c−1) · Σ_{j≠p} |(w_p − w_j)ᵀz + b_p − b_j| / ‖w_p − w_j‖

    Since f = z Wᵀ + b, the numerator is the gap f_p − f_j, so `z` and `b` are not read. Ding et al., "Enhancing
    Out-of-Distribution Detection with Extended Logit Normalization", arXiv 2504.11434.

    Args:
        logits: (n, c). A logit of −inf masks its class: no part of the softmax, of D, or of label smoothing.
        z, b: accepted for the signature.
        W: (c, m). Rows that coincide have no boundary between them, which then counts neither in the sum nor in c − 1.
        y: class indices (n,) or class probabilities (n, c).
        weight, ignore_index, reduction, label_smoothing: as in `torch.nn.functional.cross_entropy`.
        eps: a sample with D <= eps, or without any boundary, gets plain cross-entropy: its D counts as the constant 1.
        average: "boundaries" divides by the number of boundaries (the paper), "classes" by one more, which counts the
            predicted class with distance 0 (the authors' code, whose result this is wherever theirs is not NaN).
        detach_geometry: hold the lengths ‖w_p − w_j‖ constant. Gradients still flow through the gaps inside D.
        return_distance: return (loss, D), D (n,) detached and without the fallback at eps.

    A target on a masked class costs +inf; that sample's logit gradient is that of `F.cross_entropy` and D is constant.
    A row that holds NaN or +inf, or only −inf, costs NaN. An ignored row costs 0, has gradient 0, whatever it holds.
    """
    q, kept = _target_distribution(logits, y, weight, ignore_index, label_smoothing)
    f = logits.masked_fill(~kept[:, None], 0)
    D = boundary_distance(f, W, average=average, detach_geometry=detach_geometry)
    # Without any boundary D is 0, so one comparison covers both reasons to fall back; NaN fails it and stays.
    temperature = torch.where(D <= eps, torch.ones_like(D), D)
    masked_target = ((q != 0) & f.isneginf()).any(1)
    temperature = torch.where(masked_target, temperature.detach(), temperature)
    loss = _reduce(_tempered_cross_entropy(f, temperature, q), y, weight, kept, reduction)
    if return_distance:
        return loss, boundary_distance(logits.detach(), W.detach(), average=average)
    return loss


def linear_elogitnorm(
    z: Tensor, W: Tensor, b: Tensor | None, y: Tensor, *, logits_dtype: torch.dtype | None = None, **keywords: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`elogitnorm` of the logits z Wᵀ + b; with `logits_dtype`, of these rounded to it, gradients passing as through
    no rounding: what the fast function of this name does where z and W are of half precision and on a GPU."""
    logits = F.linear(z, W, b)
    if logits_dtype is not None:
        logits = logits + (logits.detach().to(logits_dtype).to(logits.dtype) - logits.detach())
    return elogitnorm(logits, z, W, b, y, **keywords)


def logitnorm(
    logits: Tensor,
    y: Tensor,
    *,
    tau: float = TAU,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """LogitNorm: cross-entropy of logits that are scaled to the norm 1/τ.

        loss = F.cross_entropy(f / (τ (‖f‖₂ + 1e-7)), y)

    Wei et al., "Mitigating Neural Network Overconfidence with Logit Normalization", arXiv 2205.09310. Shapes, masked
    classes (left out of the norm) and the keywords of `F.cross_entropy` as in `elogitnorm`. Logits that are all 0 have
    norm 0, of which the gradient counts as 0.
    """
    q, kept = _target_distribution(logits, y, weight, ignore_index, label_smoothing)
    f = logits.masked_fill(~kept[:, None], 0)
    # vector_norm gives the gradient 0 at the origin, unlike a square root of a sum.
    temperature = tau * (torch.linalg.vector_norm(f.masked_fill(f.isneginf(), 0), dim=1) + 1e-7)
    masked_target = ((q != 0) & f.isneginf()).any(1)
    temperature = torch.where(masked_target, temperature.detach(), temperature)
    return _reduce(_tempered_cross_entropy(f, temperature, q), y, weight, kept, reduction)


def boundary_distance(
    logits: Tensor, W: Tensor, *, average: str = "boundaries", detach_geometry: bool = False
) -> Tensor:
    """Mean distance of each sample to the decision boundaries of its predicted class, (n,).

        D = 1/K · Σ_{j≠p} (f_p − f_j) / ‖w_p − w_j‖

    over the K classes j ≠ p that are not masked (f_j = −inf) and whose w_j differs from w_p; 0 where K = 0;
    average="classes" divides by K + 1. NaN where the row of logits holds NaN or +inf, or only −inf.
    The prediction p is a constant for the gradient. arXiv 2504.11434, equation of the average distance.
    """
    checks.one_of("average", average, checks.AVERAGES)
    length = torch.linalg.vector_norm(W[:, None, :] - W[None, :, :], dim=2)  # (c, c); the gradient at length 0 is 0
    if detach_geometry:
        length = length.detach()
    predicted = logits.argmax(1)
    gap = logits.gather(1, predicted[:, None]) - logits
    length = length[predicted]  # (n, c)
    boundary = (length != 0) & ~logits.isneginf()  # length_pp = 0: the predicted class is left out, too
    to_boundary = gap.masked_fill(~boundary, 0) / length.masked_fill(~boundary, 1)
    n_counted = boundary.sum(1) + (1 if average == "classes" else 0)
    D: Tensor = to_boundary.sum(1) / n_counted.clamp(min=1)
    # f_p − f_p is NaN exactly where f_p is not finite. A factor, not a fill, so that the gradient is NaN as well.
    not_finite = gap.detach().gather(1, predicted[:, None]).squeeze(1).isnan()
    return D * torch.ones_like(D).masked_fill(not_finite, torch.nan)


def nci_score(
    z: Tensor, W: Tensor, b: Tensor | None, mean: Tensor, logits: Tensor | None = None, alpha: float = ALPHA
) -> Tensor:
    """Neural-collapse score of each sample, (n,); higher = more in-distribution.

        score = w_p · (z − μ) / ‖z − μ‖₂ + α ‖z‖₁

    Liu and Qin, "Detecting Out-of-Distribution through the Lens of Neural Collapse", arXiv 2311.01479.

    Args:
        z: features (n, m).  W: (c, m).  b: (c,) or None; read only without `logits`.
        mean: μ, the mean of the training features, (m,).
        logits: (n, c), from which p is taken; computed from z, W, b when None. p is a constant for the gradient.
        alpha: α, the weight of the feature norm.

    z = μ has no direction: the first term is 0, as is its gradient. A NaN among the logits of a sample gives NaN.
    """
    if logits is None:
        logits = F.linear(z, W, b)
    centred = z - mean
    norm = torch.linalg.vector_norm(centred, dim=1)
    projection = (W[logits.argmax(1)] * centred).sum(1)
    at_mean = norm == 0
    p_score = projection.masked_fill(at_mean, 0) / norm.masked_fill(at_mean, 1)
    score: Tensor = p_score + alpha * z.abs().sum(1)
    return score * torch.ones_like(score).masked_fill(logits.isnan().any(1), torch.nan)


def l2_normalize(z: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Features scaled to unit length, and their length before: (z / max(‖z‖₂, eps), ‖z‖₂), shapes (n, m) and (n,).

    The first is `torch.nn.functional.normalize(z, eps=eps)`. Haas, Yolland and Rabus, "Exploring Simple, High Quality
    Out-of-Distribution Detection with L2 Normalization", TMLR 2024.
    """
    norms = torch.linalg.vector_norm(z, dim=1)
    return z / norms.clamp(min=eps)[:, None], norms


def _target_distribution(
    logits: Tensor, y: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """q (n, c), the mass of each class after smoothing over the live classes and weighting, and which rows count (n,).

    q_j = weight_j · ((1 − e) · y_j + e / c_live · [j is live]), with y one-hot for class indices, 0 for an ignored row.
    """
    if y.is_floating_point():
        kept = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
        probability = y
    else:
        kept = y != ignore_index
        probability = torch.zeros_like(logits).scatter(1, y.where(kept, 0)[:, None], 1)
    live = ~logits.isneginf()
    uniform = live.to(logits.dtype) / live.sum(1, keepdim=True).clamp(min=1)
    q = (1 - label_smoothing) * probability + label_smoothing * uniform
    if weight is not None:
        q = q * weight
    return q.masked_fill(~kept[:, None], 0).detach(), kept


def _tempered_cross_entropy(f: Tensor, temperature: Tensor, q: Tensor) -> Tensor:
    """−Σ_j q_j log softmax(f / T)_j for each sample, (n,), with 0 · inf = 0.

    The softmax does not change when f_p is subtracted first: then the largest term is exp(0), however small T is.
    """
    live = ~f.isneginf()
    shifted = f - f.max(1, keepdim=True).values.detach()
    temperature = temperature[:, None]
    # For a masked class −inf / T is −inf, but its derivative by T is not 0: there T must be a constant.
    scaled = torch.where(live, shifted.masked_fill(~live, 0) / temperature, shifted / temperature.detach())
    log_probability = torch.log_softmax(scaled, dim=1)
    no_mass = (q == 0) & log_probability.isneginf()
    return -(q * log_probability.masked_fill(no_mass, 0)).sum(1)


def _reduce(loss: Tensor, y: Tensor, weight: Tensor | None, kept: Tensor, reduction: str) -> Tensor:
    """The reductions of F.cross_entropy: for class indices "mean" divides by the weights of the targets that count."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if y.is_floating_point():
        return loss.sum() / loss.shape[0]
    if weight is None:
        return loss.sum() / kept.sum()
    return loss.sum() / weight[y[kept]].sum()
