"""The NCI score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..records import Needs, Projected
from . import sizes
from .precision import compute_dtype, full_precision
from .sizes import join, row_chunks, slices, take
from .weight_gradient import add_rows


def _predict_from_features(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(max, arg-max) over j of (z W^T + b)_j, (n,), first index on ties; NaN wins; in tiles, no (n, c)."""
    n_classes, n_features = head_weight.shape
    tiles = list(slices(n_classes, max(sizes.PREDICTION_CLASSES, sizes.WEIGHT_TILE_ELEMENTS // max(1, n_features))))
    chunks = []
    for rows in slices(features.shape[0], sizes.TABLE_TILE_ELEMENTS // (tiles[0].stop - tiles[0].start)):
        z = features[rows].to(dtype)
        for columns in tiles:
            bias = None if head_bias is None else head_bias[columns].to(dtype)
            logits = torch.nn.functional.linear(z, head_weight[columns].to(dtype), bias)
            highest, index = logits.max(1)
            if columns.start == 0:
                top, predicted = highest, index
                continue
            better = (highest > top) | (highest.isnan() & ~top.isnan())
            predicted = torch.where(better, index + columns.start, predicted)
            top = torch.where(better, highest, top)
        chunks.append((top, predicted))
    return join(chunks)


def nci_forward(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, mean: Tensor, logits: Tensor | None, alpha: float
) -> tuple[Tensor, Projected]:
    """The score, (n,), and what the backward pass needs."""
    dtype = compute_dtype(features, head_weight, mean)
    with full_precision(features.device):
        if logits is None:
            top, predicted = _predict_from_features(features, head_weight, head_bias, dtype)
        else:
            top, predicted = logits.max(1)
        mean = mean.to(dtype)
        chunks = []
        for rows in row_chunks(*features.shape):
            z = take(features, rows).to(dtype)
            centered = z - mean
            norm = torch.linalg.vector_norm(centered, dim=1)
            inverse_norm = norm.reciprocal().masked_fill_(norm == 0, 0.0)
            projection = centered.mul_(head_weight[take(predicted, rows)]).sum(1).mul_(inverse_norm)
            weighted_norm = torch.linalg.vector_norm(z, ord=1, dim=1).mul_(alpha)
            chunks.append((weighted_norm, projection, inverse_norm))
        weighted_norm, projection, inverse_norm = join(chunks)
        score = weighted_norm.add_(projection.masked_fill_(top.isnan(), math.nan))  # the gradient is NaN with it
    return score, Projected(predicted, projection, inverse_norm)


def nci_backward(
    sample_grad: Tensor,
    features: Tensor,
    head_weight: Tensor,
    mean: Tensor,
    projected: Projected,
    alpha: float,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i score_i for z, W and the mean; the prediction is a constant.

    With u = (z - mu)/||z - mu||:  d pScore/dz = (w_p - pScore u)/||z - mu||,  d pScore/dw_p = u,  d pScore/dmu =
    -d pScore/dz.
    """
    predicted, projection, inverse_norm = projected
    dtype = projection.dtype
    mean_row = mean.to(dtype)
    chunks = []
    grad_weight = torch.zeros(head_weight.shape, dtype=dtype, device=features.device) if needs.weight else None
    grad_mean = torch.zeros_like(mean_row) if needs.mean else None
    for rows in row_chunks(*features.shape):
        z = take(features, rows).to(dtype)
        p = take(predicted, rows)
        grad = take(sample_grad, rows).to(dtype).unsqueeze(1)
        inverse = take(inverse_norm, rows).unsqueeze(1)
        unit = (z - mean_row).mul_(inverse)
        if grad_weight is not None:
            add_rows(grad_weight, p, unit * grad)
        if needs.features or needs.mean:
            pull = unit.mul_(take(projection, rows).unsqueeze(1).neg()).add_(head_weight[p])
            pull.mul_(inverse * grad)
            if grad_mean is not None:
                grad_mean.sub_(pull.sum(0))
            if needs.features:
                chunks.append((pull.addcmul_(z.sign(), grad, value=alpha).to(features.dtype),))
    return (
        join(chunks)[0].contiguous() if needs.features else None,
        None if grad_weight is None else grad_weight.to(head_weight.dtype),
        None if grad_mean is None else grad_mean.to(mean.dtype),
    )
