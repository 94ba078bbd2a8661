"""The distance D to the decision boundaries, and the backward pass through it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Geometry, Needs, Shard
from .distances import Head, geometry_of
from .precision import compute_dtype, full_precision
from .rows import Part, Softmax, gaps_of, is_plain, mask_gaps, row_gradient
from .sizes import join, row_chunks, take
from .weight_gradient import add_rows, unit_of, weight_gradient


class Gaps(NamedTuple):
    """Of a chunk of rows."""

    gap: Tensor  # (r, c)
    spent: Tensor  # (r, c), to be written over
    distance: Tensor  # D, (r,)
    share: Tensor | float  # 1 / (K + average_offset), 0 where K = 0
    live: Tensor | None  # (r, c); None where no class is masked and no row broken, tied or below the floor


def share_of(n_boundaries: Tensor, average_offset: int, dtype: torch.dtype) -> Tensor:
    """1 / (K + average_offset); 0 where K = 0."""
    # In the dtype of the arithmetic: a quotient of integers would be float32 whatever that is.
    return torch.where(n_boundaries > 0, (n_boundaries + average_offset).to(dtype).reciprocal(), 0.0)


def slope_of(share: Tensor, top: Tensor) -> Tensor:
    """dD / d(sum_j g_j R_j): the share; NaN, as D is, for rows that hold NaN or +inf, whatever D is multiplied by."""
    return share.masked_fill(~(top < math.inf), math.nan)


def boundary_gaps(
    logits: Tensor, top: Tensor, inverse: Tensor, distinct: bool, average_offset: int, floor: float
) -> Gaps:
    """Gaps and D of a chunk of rows.

    `inverse` (r, c) holds the table's row of each sample; where classes are masked, it is set to 0 in place.
    """
    gap = top.unsqueeze(1) - logits
    n_boundaries = gap.shape[1] - 1
    share = 1.0 / (n_boundaries + average_offset) if n_boundaries else 0.0
    spent = inverse * gap
    distance = spent.sum(1).mul_(share)
    if distinct and is_plain(distance, floor):
        return Gaps(gap, spent, distance, share, None)
    live, gap = mask_gaps(logits, gap, top)
    inverse.masked_fill_(~live, 0.0)
    shares = share_of((inverse > 0).sum(1), average_offset, gap.dtype)
    distance = torch.mul(inverse, gap, out=spent).sum(1).mul_(shares)
    return Gaps(gap, spent, distance, shares, live)


def boundary_distance_forward(
    logits: Tensor, head_weight: Tensor, average_offset: int
) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """distance, predicted, slope = 1/(K + average_offset), geometry; slope as of `slope_of`."""
    dtype = compute_dtype(logits, head_weight)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    with full_precision(logits.device):
        geometry, distinct = geometry_of(head_weight, predicted, dtype)
    chunks = []
    for rows in row_chunks(*logits.shape):
        inverse = geometry.table.index_select(0, take(geometry.table_row, rows))
        found = boundary_gaps(take(logits, rows), take(top, rows), inverse, distinct, average_offset, 0.0)
        share = found.share
        chunks.append((found.distance, share if isinstance(share, Tensor) else torch.full_like(found.distance, share)))
    distance, slope = join(chunks)
    return distance, predicted, slope_of(slope, top), geometry


def boundary_distance_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    predicted: Tensor,
    slope: Tensor,
    geometry: Geometry,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i D_i for logits and W, only those asked for."""
    return boundary_backward(sample_grad, logits, head_weight, None, geometry, predicted, slope, needs)


def boundary_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    softmax: Softmax | None,
    geometry: Geometry,
    predicted: Tensor,
    slope: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass through D, and through the cross-entropy as well where `softmax` is given."""
    sample_grad = sample_grad.to(geometry.table.dtype)
    grad_logits, gap_sums, units = gradients(sample_grad, logits, softmax, geometry, predicted, slope, needs)
    if gap_sums is None:
        return grad_logits, None
    with full_precision(logits.device):
        head = Head(head_weight, gap_sums.dtype)
        return grad_logits, weight_gradient(gap_sums, head, geometry, *units).to(head_weight.dtype)


def gradients(
    sample_grad: Tensor,
    logits: Tensor,
    softmax: Softmax | None,
    geometry: Geometry,
    predicted: Tensor,
    slope: Tensor,
    needs: Needs,
    shard: Shard | None = None,
) -> tuple[Tensor | None, Tensor | None, tuple[float, float]]:
    """(the gradient of the logits, sum_i push_i unit g_i over the samples i of each table row, `unit_of` the table),
    only what is asked for.

    `shard`: None in one process, where each row's own sums are those over all classes.
    """
    dtype = geometry.table.dtype
    gap_sums = torch.zeros_like(geometry.table) if needs.weight else None
    nearest, unit = unit_of(geometry.table) if needs.weight else (0.0, 1.0)
    d_distance = sample_grad * slope
    at_predicted = None
    if shard is not None:
        at_predicted = (d_distance * shard.inverse_sum).masked_fill_(predicted < 0, 0.0)
        predicted = predicted.clamp(min=0)
    grad_logits = None
    for rows in row_chunks(*logits.shape):
        chunk = take(logits, rows).to(dtype)
        p = take(predicted, rows).unsqueeze(1)
        gap, live = gaps_of(chunk, chunk.gather(1, p) if shard is None else take(shard.top, rows).unsqueeze(1))
        push = take(d_distance, rows).unsqueeze(1)
        if needs.logits:
            if softmax is None:
                gradient = torch.zeros_like(gap)
            else:
                part = Part(rows, live, None if shard is None else take(shard.n_live, rows))
                gradient = row_gradient(gap, take(sample_grad, rows), softmax.of(rows), part)
            inverse = geometry.table.index_select(0, take(geometry.table_row, rows))
            if live is not None:
                inverse.masked_fill_(~live, 0.0)
            add_distance_gradient(
                gradient, inverse, p, push, None if at_predicted is None else take(at_predicted, rows)
            )
            if softmax is not None:
                softmax.targets.silence(gradient, rows)
            if rows is None:
                grad_logits = gradient.to(logits.dtype).contiguous()
            else:  # in place: joining the chunks would hold the gradient twice
                if grad_logits is None:
                    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
                grad_logits[rows] = gradient
        if gap_sums is not None:
            if live is not None:
                # 0 * NaN: an ignored sample's row may be anything, and its slope is 0.
                gap.masked_fill_(push == 0, 0.0)
            add_rows(gap_sums, take(geometry.table_row, rows), gap.mul_(push if unit == 1.0 else push * unit))
    return grad_logits, gap_sums, (nearest, unit)


def add_distance_gradient(
    gradient: Tensor, inverse: Tensor, predicted: Tensor, push: Tensor, at_predicted: Tensor | None = None
) -> None:
    """gradient_j -= push R_j for j != p, and += push sum_j R_j at p, which is `at_predicted` (r,) where that is known;
    `predicted` and `push` are (r, 1)."""
    gradient.addcmul_(inverse, push, value=-1)
    sums = inverse.sum(1, keepdim=True).mul_(push) if at_predicted is None else at_predicted.unsqueeze(1)
    gradient.scatter_add_(1, predicted, sums)
