"""Softmax cross-entropy with a temperature for each sample: ELogitNorm and LogitNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import Geometry, Labels, Needs, Tempered
from .boundary import Gaps, boundary_backward, boundary_gaps
from .distances import geometry_of
from .precision import compute_dtype, full_precision
from .rows import Part, Softmax, Targets, gaps_of, is_plain, mask_gaps, row_gradient, row_loss, row_sums, temperature_of
from .sizes import join, row_chunks, take

_LOGITNORM_EPS = 1e-7


def elogitnorm_rows(
    found: Gaps, targets: Targets, rows: slice | None, eps: float, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, T, log-partition, slope) of a chunk of rows: T is D, or the constant 1 where D <= eps."""
    gap, spent, distance, share, live = found
    temperature = distance.clone() if live is None else temperature_of(distance, eps)
    sums = row_sums(gap, temperature, targets, Part(rows, live), spent, with_slope)
    loss, log_partition, slope = row_loss(sums, temperature)
    if with_slope:
        slope.mul_(share)
        if live is not None:
            slope.masked_fill_(distance <= eps, 0.0)
    return loss, temperature, log_partition, slope


def elogitnorm_forward(
    logits: Tensor, head_weight: Tensor, labels: Labels, eps: float, average_offset: int, with_slope: bool
) -> tuple[Tensor, Tensor, Tempered, Geometry]:
    """The unreduced loss, D, and what the backward pass needs: n-vectors and one table of at most (n, c).

    The slope is left undefined unless `with_slope`. See `kernels/README.md`.
    """
    dtype = compute_dtype(logits, head_weight)
    targets = Targets(labels, logits.shape[1], dtype)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    with full_precision(logits.device):
        geometry, distinct = geometry_of(head_weight, predicted, dtype)
    chunks = []
    for rows in row_chunks(*logits.shape):
        inverse = geometry.table.index_select(0, take(geometry.table_row, rows))
        found = boundary_gaps(take(logits, rows), take(top, rows), inverse, distinct, average_offset, eps)
        chunks.append((found.distance, *elogitnorm_rows(found, targets, rows, eps, with_slope)))
    distance, loss, temperature, log_partition, slope = join(chunks)
    targets.settle(loss, slope)
    return loss, distance, Tempered(predicted, temperature, log_partition, slope), geometry


def elogitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    labels: Labels,
    geometry: Geometry,
    tempered: Tempered,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i loss_i for logits and W, only those asked for."""
    predicted, temperature, log_partition, slope = tempered
    softmax = None
    if needs.logits:
        softmax = Softmax(Targets(labels, logits.shape[1], geometry.table.dtype), temperature, log_partition)
    return boundary_backward(sample_grad, logits, head_weight, softmax, geometry, predicted, slope, needs)


def logitnorm_forward(logits: Tensor, labels: Labels, tau: float, with_slope: bool) -> tuple[Tensor, Tempered]:
    """The unreduced loss, and with T = tau (||f|| + 1e-7) what the backward pass needs."""
    dtype = compute_dtype(logits)
    targets = Targets(labels, logits.shape[1], dtype)
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
        sums = row_sums(gap, temperature, targets, Part(rows, live), torch.empty_like(gap), with_slope)
        loss, log_partition, slope = row_loss(sums, temperature)
        if with_slope:
            slope.mul_(tau).div_(norm)
            if live is not None:
                slope.masked_fill_(norm == 0, 0.0)
        chunks.append((loss, temperature, log_partition, slope))
    loss, temperature, log_partition, slope = join(chunks)
    targets.settle(loss, slope)
    return loss, Tempered(predicted, temperature, log_partition, slope)


def logitnorm_backward(sample_grad: Tensor, logits: Tensor, labels: Labels, tempered: Tempered) -> Tensor:
    """The gradient of sum_i sample_grad_i loss_i for the logits."""
    predicted, temperature, log_partition, slope = tempered
    dtype = temperature.dtype
    sample_grad = sample_grad.to(dtype)
    targets = Targets(labels, logits.shape[1], dtype)
    softmax = Softmax(targets, temperature, log_partition)
    push = sample_grad * slope
    chunks = []
    for rows in row_chunks(*logits.shape):
        chunk = take(logits, rows).to(dtype)
        gap, live = gaps_of(chunk, chunk.gather(1, take(predicted, rows).unsqueeze(1)))
        if live is not None:
            chunk = chunk.masked_fill(~live, 0.0)
        gradient = row_gradient(gap, take(sample_grad, rows), softmax.of(rows), Part(rows, live))
        gradient.addcmul_(chunk, take(push, rows).unsqueeze(1))
        targets.silence(gradient, rows)
        chunks.append((gradient.to(logits.dtype),))
    return join(chunks)[0].contiguous()
