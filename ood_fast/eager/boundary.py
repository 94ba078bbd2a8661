"""The distance D to the decision boundaries, and the backward pass through it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .distances import table_of_batch
from .precision import compute_dtype, full_precision
from .rows import Targets, is_plain, mask_gaps, tempered_backward
from .sizes import join, row_chunks, take
from .weight_gradient import weight_gradient


def boundary_gaps(
    logits: Tensor,
    top: Tensor,
    inverse: Tensor,
    distinct: bool,
    average_offset: int,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | float, Tensor | None]:
    """For a chunk of rows: (gaps, a spent (r, c) buffer, D, 1/(K + offset), live classes or None).

    `inverse` (r, c) holds the table's row of each sample; where classes are masked, it is set to 0 in place.
    """
    gap = top.unsqueeze(1) - logits
    n_boundaries = gap.shape[1] - 1
    share = 1.0 / (n_boundaries + average_offset) if n_boundaries else 0.0
    product = inverse * gap
    distance = product.sum(1).mul_(share)
    if distinct and is_plain(distance, floor):
        return gap, product, distance, share, None
    live, gap = mask_gaps(logits, gap, top)
    inverse.masked_fill_(~live, 0.0)
    count = (inverse > 0).sum(1)
    # In the dtype of the arithmetic: a quotient of integers would be float32 whatever that is.
    shares = torch.where(count > 0, (count + average_offset).to(gap.dtype).reciprocal(), 0.0)
    distance = torch.mul(inverse, gap, out=product).sum(1).mul_(shares)
    return gap, product, distance, shares, live


def boundary_distance_forward(logits: Tensor, head_weight: Tensor, average_offset: int) -> tuple[Tensor, ...]:
    """distance, predicted, slope = 1/(K + average_offset) (0 where K = 0), table_row, table, row_class."""
    dtype = compute_dtype(logits, head_weight)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    with full_precision(logits.device):
        (table_row, table, row_class), distinct = table_of_batch(head_weight, predicted, dtype)
    chunks = []
    for rows in row_chunks(*logits.shape):
        inverse = table.index_select(0, take(table_row, rows))
        _, _, distance, share, _ = boundary_gaps(
            take(logits, rows), take(top, rows), inverse, distinct, average_offset, 0.0
        )
        chunks.append((distance, share if isinstance(share, Tensor) else torch.full_like(distance, share)))
    distance, slope = join(chunks)
    return distance, predicted, slope, table_row, table, row_class


def boundary_distance_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    predicted: Tensor,
    slope: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
    need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i D_i for logits and W, only those asked for."""
    return boundary_backward(
        sample_grad.to(table.dtype),
        logits,
        head_weight,
        None,
        predicted,
        None,
        None,
        slope,
        table_row,
        table,
        row_class,
        need_logits,
        need_weight,
    )


def boundary_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    targets: Targets | None,
    predicted: Tensor,
    temperature: Tensor | None,
    log_partition: Tensor | None,
    slope: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
    need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass through D, and through the cross-entropy as well where `targets` are given."""
    dtype = table.dtype
    gap_sums = torch.zeros_like(table) if need_weight else None
    d_distance = sample_grad * slope
    # Written in place where there are several chunks: joining them would hold the gradient twice.
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if need_logits else None
    for rows in row_chunks(*logits.shape):
        chunk = take(logits, rows).to(dtype)
        p = take(predicted, rows).unsqueeze(1)
        table_rows = take(table_row, rows)
        top = chunk.gather(1, p)
        gap = top - chunk
        live = None
        # The largest gap is finite exactly when no class is masked and the row is sound.
        if not gap.amax().item() < math.inf:
            live, gap = mask_gaps(chunk, gap, top.squeeze(1))
        push = take(d_distance, rows).unsqueeze(1)
        if need_logits:
            if targets is not None:
                gradient = tempered_backward(
                    gap,
                    take(temperature, rows),
                    take(log_partition, rows),
                    take(sample_grad, rows),
                    targets,
                    rows,
                    live,
                )
            else:
                gradient = gap * 0.0  # NaN rows stay NaN
            inverse = table.index_select(0, table_rows)
            if live is not None:
                inverse.masked_fill_(~live, 0.0)
            add_distance_gradient(gradient, inverse, p, push)
            if targets is not None:
                targets.silence(gradient, rows)
            if rows is None:
                grad_logits = gradient.to(logits.dtype).contiguous()
            else:
                grad_logits[rows] = gradient
        if need_weight:
            if live is not None:
                # 0 * NaN: an ignored sample's row may be anything, and its slope is 0.
                gap.masked_fill_(push == 0, 0.0)
            gap_sums.index_add_(0, table_rows, gap.mul_(push))
    grad_weight = None
    if need_weight:
        with full_precision(logits.device):
            grad_weight = weight_gradient(gap_sums, head_weight, table, row_class)
    return grad_logits, grad_weight


def add_distance_gradient(gradient: Tensor, inverse: Tensor, predicted: Tensor, push: Tensor) -> None:
    """gradient_j -= push R_j for j != p, and += push sum_j R_j at p; `predicted` and `push` are (r, 1)."""
    gradient.addcmul_(inverse, push, value=-1)
    gradient.scatter_add_(1, predicted, inverse.sum(1, keepdim=True).mul_(push))
