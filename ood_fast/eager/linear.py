"""ELogitNorm of z W^T + b in chunks of rows: the logits are never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sizes
from .boundary import add_distance_gradient, boundary_gaps
from .distances import centered, centered_rows, inverse_distances, weight_tile
from .precision import compute_dtype, full_precision, matmul
from .rows import Targets, tempered_backward
from .sizes import join, slices
from .tempered import _elogitnorm_rows
from .weight_gradient import weight_gradient


def linear_elogitnorm(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    eps: float,
    average_offset: int,
    sample_grad: Tensor | None,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    detach_geometry: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """ELogitNorm of z W^T + b in chunks of rows: (loss, D, dz, dW, db), the logits (n, c) are never stored.

    The gradients are those of sum_i sample_grad_i loss_i, and come from the same pass over the logits; None if not
    needed or without `sample_grad`, and in the dtype of the arithmetic (they may still be scaled).

    A chunk of rows works in place: the logits become their gradient G, and with n < c the inverse distances R, a row
    for each sample, become -S = sample_grad slope g R^3 (`weight_gradient`). Then one product with [G; -S] gives dz
    and another dW, tile by tile of W. With n >= c the distances are a table of all classes as usual.
    """
    n_samples, n_classes = features.shape[0], head_weight.shape[0]
    dtype = compute_dtype(features, head_weight)
    device = features.device
    targets = Targets(target, class_weight, ignore_index, label_smoothing, n_classes, dtype)
    mean_row = head_weight.mean(0, dtype=dtype)
    bias = torch.zeros((), dtype=dtype, device=device) if head_bias is None else head_bias.to(dtype)
    grads = sample_grad is not None
    geometry = grads and need_weight and not detach_geometry
    grad_features = torch.empty_like(features, dtype=dtype) if grads and need_features else None
    grad_weight = torch.zeros(head_weight.shape, dtype=dtype, device=device) if grads and need_weight else None
    grad_bias = torch.zeros(n_classes, dtype=dtype, device=device) if grads and need_bias else None
    square = n_samples >= n_classes
    results = []
    with full_precision(device):
        if square:
            table = torch.empty(n_classes, n_classes, dtype=dtype, device=device)
            gap_sums = torch.zeros_like(table) if geometry else None
            distinct = inverse_distances(head_weight, None, table)
        # Chunks of one size: a short last one would stream all of W for a few rows.
        widths = 1 if square else 2
        n_chunks = -(-n_samples // max(sizes.MIN_LINEAR_ROWS, sizes.LINEAR_BUFFER_ELEMENTS // (widths * n_classes)))
        step = -(-n_samples // n_chunks)
        buffer = torch.empty(widths * step, n_classes, dtype=dtype, device=device)
        for chunk in slices(n_samples, step):
            n_rows = chunk.stop - chunk.start
            logits = buffer[:n_rows]
            z = features[chunk].to(dtype)
            _linear_into(logits, z, head_weight, bias)
            top, predicted = logits.max(1)
            if not square:
                inverses = buffer[n_rows : 2 * n_rows]
                distinct = inverse_distances(head_weight, predicted, inverses)
            for rows in slices(n_rows, sizes.ROW_CHUNK_ELEMENTS // n_classes):
                at = slice(chunk.start + rows.start, chunk.start + rows.stop)
                p = predicted[rows]
                inverse = table.index_select(0, p) if square else inverses[rows]
                gap, scratch, distance, share, live = boundary_gaps(
                    logits[rows], top[rows], inverse, distinct, average_offset, eps
                )
                loss, temperature, log_partition, slope = _elogitnorm_rows(
                    gap, distance, share, targets, at, live, scratch, eps, grads
                )
                targets.settle(at, loss, slope)
                results.append((loss, distance))
                if not grads:
                    continue
                scale = sample_grad[at].to(dtype)
                push = (scale * slope).unsqueeze(1)
                gradient = tempered_backward(gap, temperature, log_partition, scale, targets, at, live)
                add_distance_gradient(gradient, inverse, p.unsqueeze(1), push)
                targets.silence(gradient, at)
                logits[rows] = gradient
                if geometry:
                    if live is not None:
                        gap.masked_fill_(push == 0, 0.0)
                    gap.mul_(push)
                    if square:
                        gap_sums.index_add_(0, p, gap)
                    else:
                        inverse.mul_(torch.mul(inverse, inverse, out=scratch)).mul_(gap)
            if grads:
                pair_push = inverses if geometry and not square else None
                dz = _linear_backward(
                    logits, pair_push, z, predicted, head_weight, mean_row, grad_weight, need_features
                )
                if need_features:
                    grad_features[chunk] = dz
                if need_bias:
                    grad_bias.add_(logits.sum(0))
        if geometry and square:
            every_class = torch.arange(n_classes, device=device)
            grad_weight.add_(weight_gradient(gap_sums, head_weight, table, every_class))
    return *join(results), grad_features, grad_weight, grad_bias


def _linear_into(logits: Tensor, z: Tensor, head_weight: Tensor, bias: Tensor) -> None:
    """logits = z W^T + b, tile by tile of W: in one product the matrix library would pack half of W beside it."""
    for columns in slices(head_weight.shape[0], sizes.WEIGHT_TILE_ELEMENTS // max(1, z.shape[1])):
        tile_bias = bias[columns] if bias.dim() else bias
        torch.add(matmul(z, head_weight[columns].to(logits.dtype).t()), tile_bias, out=logits[:, columns])


def _linear_backward(
    gradient: Tensor,
    push: Tensor | None,
    z: Tensor,
    predicted: Tensor,
    head_weight: Tensor,
    mean_row: Tensor,
    grad_weight: Tensor | None,
    need_features: bool,
) -> Tensor | None:
    """dz = G W, (r, m), from the logit gradient G (r, c); adds to `grad_weight` G^T z and what `push` (r, c) says.

    `push` is -S of `weight_gradient`, the second half of the buffer that `gradient` begins, so that both are one
    operand. W is read once, in centred tiles: the rows of G sum to 0 but for rounding, which the last line puts back.
    """
    n_rows, n_features = z.shape
    n_used = n_rows if push is None else 2 * n_rows
    both = gradient.as_strided((n_used, gradient.shape[1]), gradient.stride())
    read_weight = need_features or push is not None
    product = z.new_zeros(n_used, n_features)
    outer = z
    if push is not None:
        left = centered_rows(head_weight, predicted, mean_row)
        outer = torch.cat([z, left])
    buffer = weight_tile(head_weight, z.dtype)
    for columns in slices(both.shape[1], buffer.shape[0]):
        if read_weight:
            right = centered(head_weight[columns], mean_row, buffer)
            product.add_(matmul(both[:, columns], right))
        if grad_weight is not None:
            grad_weight[columns].add_(matmul(both[:, columns].t(), outer))
            if push is not None:
                grad_weight[columns].addcmul_(right, push[:, columns].sum(0).unsqueeze(1), value=-1)
    if push is not None:
        own = product[n_rows:].sub_(left.mul_(push.sum(1, keepdim=True)))
        grad_weight.index_add_(0, predicted, own)
    if not need_features:
        return None
    return product[:n_rows].addmm_(gradient.sum(1, keepdim=True), mean_row.unsqueeze(0))
