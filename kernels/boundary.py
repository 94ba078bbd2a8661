"""The mean distance to the decision boundaries and its gradients.

D = sum_j g_j R_pj / K
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry, Needs
from .geometry import geometry_of
from .launch import alignment, gradient_buffer, laid_out, launch, packed, row_config, target_of, unit_stride
from .rows import boundary_terms, finite_or_nan, mean_distance, scan_maximum
from .segments import Segments
from .tempered import temperature_sums
from .weight_gradient import weight_gradient


@triton.jit
def boundary_distance_forward_kernel(
    logits_pointer,  # (n, c)
    logits_stride,
    table_pointer,  # (k, c)
    table_row_pointer,  # (n,) int64: read where PREDICTION_KNOWN, otherwise it is p, and written
    predicted_pointer,  # (n,) int64: likewise
    distance_pointer,  # (n,): written
    slope_pointer,  # (n,): written
    n_classes,
    average_offset,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    LOOPED: tl.constexpr,
    PREDICTION_KNOWN: tl.constexpr,
):
    """D of one sample and dD / d(sum_j g_j R_j) = 1 / (K + average_offset), 0 where no class is live."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    logits_row = logits_pointer + row * logits_stride
    if PREDICTION_KNOWN:
        predicted = tl.load(predicted_pointer + row)
        row_maximum = tl.load(logits_row + predicted).to(tl.float32)
        table_row = tl.load(table_row_pointer + row)
    else:
        row_maximum, predicted = scan_maximum(logits_row, n_classes, BLOCK, LOOPED)
        table_row = predicted.to(tl.int64)
        tl.store(predicted_pointer + row, table_row)
        tl.store(table_row_pointer + row, table_row)
    valid_maximum = finite_or_nan(row_maximum)
    total, n_boundaries, _, _ = temperature_sums(
        logits_row, table_pointer + table_row * n_classes, valid_maximum, n_classes, BLOCK, True, LOOPED
    )
    distance, share = mean_distance(total, n_boundaries, average_offset, valid_maximum == valid_maximum)
    tl.store(distance_pointer + row, distance)
    tl.store(slope_pointer + row, tl.where(row_maximum == float("-inf"), 0.0, share))


@triton.jit
def boundary_distance_backward_kernel(
    sample_grad_pointer,  # (n,)
    logits_pointer,  # (n, c)
    logits_stride,
    table_pointer,  # (k, c)
    table_row_pointer,  # (n,) int64
    predicted_pointer,  # (n,) int64
    slope_pointer,  # (n,)
    inverse_sum_pointer,  # (n,) sum R over the classes of all processes; None in one, which has all classes
    grad_logits_pointer,  # (n, c) contiguous: written
    n_classes,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """dD/df_j = -slope R_j, and slope sum_j R_j at p. The logits are read only to tell which classes are live."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    logits_row = logits_pointer + row * logits_stride
    grad_row = grad_logits_pointer + row * n_classes
    table_row = table_pointer + tl.load(table_row_pointer + row) * n_classes
    predicted = tl.load(predicted_pointer + row)
    # NaN for a row that holds NaN or +inf
    scale = tl.load(sample_grad_pointer + row).to(tl.float32) * tl.load(slope_pointer + row)
    if inverse_sum_pointer is None:
        inverse_distance_sum = temperature_sums(logits_row, table_row, 0.0, n_classes, BLOCK, True, LOOPED)[2]
    else:
        inverse_distance_sum = tl.load(inverse_sum_pointer + row)
    for start in range(0, n_classes if LOOPED else BLOCK, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_row + columns, mask=columns < n_classes, other=float("-inf")).to(tl.float32)
        inverse_distance = boundary_terms(table_row, columns, n_classes, logit != float("-inf"))[0]
        gradient = scale * (tl.where(columns == predicted, inverse_distance_sum, 0.0) - inverse_distance)
        tl.store(grad_row + columns, gradient, mask=columns < n_classes)


def boundary_distance_forward(
    logits: Tensor, head_weight: Tensor, average_offset: int
) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """Mean distance of each sample to the boundaries of its predicted class: see
    `ood_fast.functional.boundary_distance`.

    Returns distance, predicted, slope (notation: the package's docstring) and the geometry.
    """
    layout, logits, weight = laid_out("distance", logits, head_weight)
    geometry, predicted, _ = geometry_of(layout, logits, weight)
    n_samples, n_classes = layout.shape
    distance, slope = (torch.empty(n_samples, dtype=torch.float32, device=logits.device) for _ in range(2))
    config = row_config(n_classes, target_of(logits))
    launch(
        boundary_distance_forward_kernel, (n_samples,), logits, logits.stride(0), geometry.table, geometry.table_row,
        predicted, distance, slope, n_classes, float(average_offset), BLOCK=config.block,
        ALIGN=alignment(n_classes, logits.stride(0)), LOOPED=config.looped, PREDICTION_KNOWN=layout.by_row,
        num_warps=config.num_warps,
    )  # fmt: skip
    return distance, predicted, slope, geometry


def boundary_distance_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    predicted: Tensor,
    slope: Tensor,
    geometry: Geometry,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i D_i by the logits and by the head weight, each None unless needed."""
    grad_logits = grad_weight = None
    sample_grad, predicted, slope = sample_grad.contiguous(), predicted.contiguous(), slope.contiguous()
    geometry = packed(geometry)
    layout, rows, weight = laid_out("distance backward", logits, head_weight, sample_grad, predicted, slope, *geometry)
    if needs.logits:
        grad_logits = distance_gradient(sample_grad, rows, predicted, slope, geometry)
    if needs.weight:
        segments = Segments(geometry.table_row, sample_grad, slope, rows)
        grad_weight = weight_gradient(layout, segments, weight, predicted, geometry)
    return grad_logits, grad_weight


def distance_gradient(
    sample_grad: Tensor,
    logits: Tensor,
    predicted: Tensor,
    slope: Tensor,
    geometry: Geometry,
    inverse_sum: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits. `inverse_sum` (n,): sum R, where these are the classes of one process among many."""
    rows = unit_stride(logits)
    n_samples, n_classes = rows.shape
    grad_logits = gradient_buffer(logits, (n_samples, n_classes))
    config = row_config(n_classes, target_of(logits))
    launch(
        boundary_distance_backward_kernel, (n_samples,), sample_grad.contiguous(), rows, rows.stride(0), geometry.table,
        geometry.table_row, predicted, slope, inverse_sum, grad_logits, n_classes, BLOCK=config.block,
        ALIGN=alignment(n_classes, rows.stride(0)), LOOPED=config.looped, num_warps=config.num_warps,
    )  # fmt: skip
    return grad_logits.to(logits.dtype)
