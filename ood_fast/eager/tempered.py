"""Softmax cross-entropy with a temperature for each sample: ELogitNorm and LogitNorm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .boundary import boundary_backward, boundary_gaps
from .distances import table_of_batch
from .precision import compute_dtype, full_precision
from .rows import Targets, is_plain, mask_gaps, temperature_of, tempered_backward, tempered_forward
from .sizes import join, row_chunks, take

_LOGITNORM_EPS = 1e-7


def _elogitnorm_rows(
    gap: Tensor,
    distance: Tensor,
    share: Tensor | float,
    targets: Targets,
    rows: slice | None,
    live: Tensor | None,
    scratch: Tensor,
    eps: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, T, log-partition, slope) of a chunk of rows: T is D, or the constant 1 where D <= eps."""
    temperature = distance.clone() if live is None else temperature_of(distance, eps)
    loss, log_partition, slope = tempered_forward(gap, temperature, targets, rows, live, scratch, with_slope)
    if with_slope:
        slope.mul_(share)
        if live is not None:
            slope.masked_fill_(distance <= eps, 0.0)
    return loss, temperature, log_partition, slope


def elogitnorm_forward(
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    eps: float,
    average_offset: int,
    with_slope: bool,
) -> tuple[Tensor, ...]:
    """The unreduced loss, D, and what the backward pass needs: n-vectors and one table of at most (n, c).

    Returns loss, distance, predicted, temperature, log_partition, slope (all (n,)), table_row (n,), table (k, c),
    row_class (k,) with k = min(n, c); slope is dL/dD / (K + average_offset), left undefined unless `with_slope`. See
    `kernels/README.md`.
    """
    dtype = compute_dtype(logits, head_weight)
    targets = Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    with full_precision(logits.device):
        (table_row, table, row_class), distinct = table_of_batch(head_weight, predicted, dtype)
    chunks = []
    for rows in row_chunks(*logits.shape):
        inverse = table.index_select(0, take(table_row, rows))
        gap, scratch, distance, share, live = boundary_gaps(
            take(logits, rows), take(top, rows), inverse, distinct, average_offset, eps
        )
        chunks.append(
            (distance, *_elogitnorm_rows(gap, distance, share, targets, rows, live, scratch, eps, with_slope))
        )
    distance, loss, temperature, log_partition, slope = join(chunks)
    targets.settle(None, loss, slope)
    return loss, distance, predicted, temperature, log_partition, slope, table_row, table, row_class


def elogitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    predicted: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    slope: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
    need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i loss_i for logits and W, only those asked for."""
    dtype = table.dtype
    targets = None
    if need_logits:
        targets = Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    return boundary_backward(
        sample_grad.to(dtype),
        logits,
        head_weight,
        targets,
        predicted,
        temperature,
        log_partition,
        slope,
        table_row,
        table,
        row_class,
        need_logits,
        need_weight,
    )


def logitnorm_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    tau: float,
    with_slope: bool,
) -> tuple[Tensor, ...]:
    """loss, predicted, temperature T = tau (||f|| + 1e-7), log_partition, slope = dL/dT tau / ||f|| (0 at f = 0)."""
    dtype = compute_dtype(logits)
    targets = Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    chunks = []
    for rows in row_chunks(*logits.shape):
        chunk, highest = take(logits, rows).to(dtype), take(top, rows)
        gap = highest.unsqueeze(1) - chunk
        norm = torch.linalg.vector_norm(chunk, dim=1)
        live = None
        if not is_plain(norm, 0.0):
            live, gap = mask_gaps(chunk, gap, highest)
            norm = torch.linalg.vector_norm(chunk.masked_fill(~live, 0.0), dim=1)
        temperature = norm.add(_LOGITNORM_EPS).mul_(tau)
        loss, log_partition, slope = tempered_forward(
            gap, temperature, targets, rows, live, torch.empty_like(gap), with_slope
        )
        if with_slope:
            slope.mul_(tau).div_(norm)
            if live is not None:
                slope.masked_fill_(norm == 0, 0.0)
        chunks.append((loss, temperature, log_partition, slope))
    loss, temperature, log_partition, slope = join(chunks)
    targets.settle(None, loss, slope)
    return loss, predicted, temperature, log_partition, slope


def logitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    predicted: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    slope: Tensor,
) -> Tensor:
    """The gradient of sum_i sample_grad_i loss_i for the logits."""
    dtype = temperature.dtype
    sample_grad = sample_grad.to(dtype)
    targets = Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    push = sample_grad * slope
    chunks = []
    for rows in row_chunks(*logits.shape):
        chunk = take(logits, rows).to(dtype)
        top = chunk.gather(1, take(predicted, rows).unsqueeze(1))
        gap = top - chunk
        live = None
        if not gap.amax().item() < math.inf:
            live, gap = mask_gaps(chunk, gap, top.squeeze(1))
            chunk = chunk.masked_fill(~live, 0.0)
        gradient = tempered_backward(
            gap, take(temperature, rows), take(log_partition, rows), take(sample_grad, rows), targets, rows, live
        )
        gradient.addcmul_(chunk, take(push, rows).unsqueeze(1))
        targets.silence(gradient, rows)
        chunks.append((gradient.to(logits.dtype),))
    return join(chunks)[0].contiguous()
