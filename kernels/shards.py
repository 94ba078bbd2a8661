"""The row of ELogitNorm where each process holds some of the classes: sums over these, with collectives between them.

What `tempered.py` finds in one program for a whole row comes in three parts, because D needs the largest logit of all
processes, and the softmax needs D. The gradients are those of one process, given the sums. The table of distances has
a row for each of the u predictions, whose rows of W (`left`) come from the processes that hold them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry, Needs, Shard, Tempered
from .boundary import distance_gradient
from .distances import Kept, distance_table, kept_of, kept_sizes
from .launch import Layout, alignment, kinds_of, launch, layout_of, packed, row_config, target_of, unit_stride
from .losses import contiguous, loop_constants, tempered_gradient
from .rows import finite_or_nan, own_label, read_label
from .segments import Segments, gap_sum
from .tempered import softmax_sums, temperature_sums
from .weight_gradient import pull_rows

if TYPE_CHECKING:
    from ..eager.distances import Head
    from ..eager.rows import Softmax, Targets


@triton.jit
def boundary_sums_kernel(
    logits_pointer,  # (n, c)
    logits_stride,
    top_pointer,  # (n,) fp32 the largest logit of all classes
    table_pointer,  # (u, c) R
    table_row_pointer,  # (n,) int64
    sums_pointer,  # (4, n) fp32: written
    n_samples,
    n_classes,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """sum g R, K, sum R and the number of live classes, of one sample; NaN in a row that is not valid."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    row_maximum = finite_or_nan(tl.load(top_pointer + row))
    table_row = table_pointer + tl.load(table_row_pointer + row) * n_classes
    total, n_boundaries, inverse_sum, n_live = temperature_sums(
        logits_pointer + row * logits_stride, table_row, row_maximum, n_classes, BLOCK, True, LOOPED
    )
    tl.store(sums_pointer + row, tl.where(row_maximum == row_maximum, total, float("nan")))
    tl.store(sums_pointer + n_samples + row, n_boundaries.to(tl.float32))
    tl.store(sums_pointer + 2 * n_samples + row, inverse_sum)
    tl.store(sums_pointer + 3 * n_samples + row, n_live.to(tl.float32))


@triton.jit(do_not_specialize=["ignore_index", "first_class"])
def softmax_sums_kernel(
    logits_pointer,  # (n, c)
    logits_stride,
    target_pointer,  # (n,) int64 among all classes, or (n, c)
    target_stride,
    class_weight_pointer,  # (c,) or None
    top_pointer,  # (n,) fp32
    temperature_pointer,  # (n,) fp32
    n_live_pointer,  # (n,) fp32 of all processes
    sums_pointer,  # (5, n) fp32: written
    n_samples,
    n_classes,
    ignore_index,
    label_smoothing,
    first_class,
    n_all_classes,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """`eager.rows.RowSums` of one sample: sum e, sum q g, Q, whether a masked class holds mass, sum e g."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    target_stride = target_stride // ALIGN * ALIGN
    row_maximum = finite_or_nan(tl.load(top_pointer + row))
    label = -1
    if not PROBABILITIES:
        label = read_label(target_pointer + row, ignore_index, n_all_classes)[0]
        label = own_label(label, first_class, n_classes)
    partition, gap_sum, target_mass, target_gap, impossible = softmax_sums(
        logits_pointer + row * logits_stride, row_maximum, 1.0 / tl.load(temperature_pointer + row), n_classes,
        tl.load(n_live_pointer + row), label, target_pointer + row * target_stride, class_weight_pointer,
        label_smoothing, BLOCK, True, PROBABILITIES, WEIGHTED, SMOOTHED, HARDWARE,
    )  # fmt: skip
    tl.store(sums_pointer + row, tl.where(row_maximum == row_maximum, partition, float("nan")))
    tl.store(sums_pointer + n_samples + row, target_gap)
    tl.store(sums_pointer + 2 * n_samples + row, target_mass)
    tl.store(sums_pointer + 3 * n_samples + row, impossible)
    tl.store(sums_pointer + 4 * n_samples + row, gap_sum)


def shard_distances(head: Head, left: Tensor, row_class: Tensor) -> tuple[Tensor, bool, Tensor | None, Tensor]:
    """R (u, c_r), nothing, and the origin and flags of `Kept`; see `eager.shards`."""
    weight = unit_stride(head.weight)
    left = left.to(weight.dtype)
    layout = _layout("distances", weight, left, row_class)
    origin, flags = (torch.empty(size, dtype=torch.float32, device=left.device) for size in kept_sizes(layout))
    kept = Kept(origin if origin.numel() else None, flags)
    return distance_table(layout, weight, row_class, kept, left), False, kept.origin, flags


def _layout(step: str, weight: Tensor, left: Tensor, *others: Tensor | None) -> Layout:
    """Of a table of distances (u, c_r)."""
    (n_rows, n_classes), kinds = (left.shape[0], weight.shape[0]), kinds_of(left, weight, *others)
    shape, strides = (n_rows, n_classes), (n_classes, 1)
    return layout_of(f"shard {step}", target_of(left), kinds, shape, strides, weight.shape, weight.stride(), n_rows)


def shard_boundary_sums(logits: Tensor, top: Tensor, geometry: Geometry) -> Tensor:
    """sum g R, K, sum R and the number of live classes among those of this process, (4, n)."""
    logits = unit_stride(logits)
    n_samples, n_classes = logits.shape
    sums = torch.empty(4, n_samples, dtype=torch.float32, device=logits.device)
    config = row_config(n_classes, target_of(logits))
    launch(
        boundary_sums_kernel, (n_samples,), logits, logits.stride(0), top, geometry.table, geometry.table_row, sums,
        n_samples, n_classes, BLOCK=config.block, ALIGN=alignment(n_classes, logits.stride(0)), LOOPED=config.looped,
        num_warps=config.num_warps,
    )  # fmt: skip
    return sums


def shard_softmax_sums(logits: Tensor, top: Tensor, temperature: Tensor, n_live: Tensor, targets: Targets) -> Tensor:
    """The fields of `eager.rows.RowSums` for the classes of this process, (5, n)."""
    logits, labels = unit_stride(logits), contiguous(targets.labels)
    n_samples, n_classes = logits.shape
    sums = torch.empty(5, n_samples, dtype=torch.float32, device=logits.device)
    target, class_weight, ignore_index, label_smoothing = labels
    constants = loop_constants(logits, labels)
    del constants["BOUNDARY"]
    launch(
        softmax_sums_kernel, (n_samples,), logits, logits.stride(0), target, target.stride(0), class_weight, top,
        temperature, n_live.contiguous(), sums, n_samples, n_classes, ignore_index, float(label_smoothing),
        targets.shards.start, targets.n_classes, **constants,
    )  # fmt: skip
    return sums


def shard_gradients(
    sample_grad: Tensor, logits: Tensor, softmax: Softmax | None, slope: Tensor, shard: Shard, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient of the logits, S for `shard_pull`), None where not needed; see `eager.shards`."""
    grad_logits = summed = None
    geometry, place, top, inverse_sum, n_live, *_ = packed(shard)
    rows, sample_grad, slope = unit_stride(logits), sample_grad.contiguous(), slope.contiguous()
    if needs.logits and softmax is None:
        grad_logits = distance_gradient(sample_grad, rows, place, slope, geometry, inverse_sum)
    elif needs.logits:
        targets, temperature, log_partition, total = packed(softmax)
        tempered = Tempered(place, temperature, log_partition, slope)
        given = top, total, inverse_sum, n_live, targets.shards.start, targets.n_classes
        grad_logits = tempered_gradient(sample_grad, rows, targets.labels, tempered, geometry, given)
    if needs.weight:
        kinds = kinds_of(rows, None, sample_grad, slope, top, *geometry)
        n_rows = geometry.table.shape[0]
        layout = layout_of("shard sums", target_of(rows), kinds, rows.shape, rows.stride(), n_rows=n_rows)
        summed = gap_sum(layout, Segments(geometry.table_row, sample_grad, slope, rows), top, geometry.table)
    return grad_logits, summed


def shard_pull(summed: Tensor, shard: Shard, head: Head, grad_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dW of the classes here, but for what they make of the predicted; that, (u, m)), fp32; see `eager.shards`."""
    weight, shard = unit_stride(head.weight), packed(shard)
    geometry = shard.geometry
    left, kept = shard.left.to(weight.dtype), Kept(shard.origin, shard.flags)
    layout = _layout("pull", weight, left, summed, *geometry, *kept)
    if kept.flags is None:  # a table that PyTorch has made
        kept = kept_of(layout, geometry, weight)
    kept = kept._replace(n_distinct=torch.full((), len(left), device=left.device))
    made = torch.empty(weight.shape, dtype=torch.float32, device=left.device)
    own = pull_rows(layout, summed, geometry, kept, weight, left, made).sum(0)
    return made if grad_weight is None else grad_weight.add_(made), own
