"""The row of ELogitNorm where each process holds some of the classes: sums over these, with collectives between them.

What `tempered.py` finds in one program for a whole row comes in three parts, because D needs the largest logit of all
processes, and the softmax needs D. The gradient is `losses.tempered_gradient`, given the sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry, Labels
from .launch import alignment, launch, loop_config, target_of, unit_stride
from .losses import loop_constants
from .rows import finite_or_nan, own_label, read_label
from .tempered import softmax_sums, temperature_sums

if TYPE_CHECKING:
    from ..distributed.shards import Shards


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
):
    """sum g R, K, sum R and the number of live classes, of one sample; NaN in a row that is not valid."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    row_maximum = finite_or_nan(tl.load(top_pointer + row))
    table_row = table_pointer + tl.load(table_row_pointer + row) * n_classes
    total, n_boundaries, inverse_sum, n_live = temperature_sums(
        logits_pointer + row * logits_stride, table_row, row_maximum, n_classes, BLOCK, True
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


def shard_boundary_sums(logits: Tensor, top: Tensor, geometry: Geometry) -> Tensor:
    """sum g R, K, sum R and the number of live classes among those of this process, (4, n)."""
    logits = unit_stride(logits)
    n_samples, n_classes = logits.shape
    sums = torch.empty(4, n_samples, dtype=torch.float32, device=logits.device)
    config = loop_config(n_classes, target_of(logits))
    launch(
        boundary_sums_kernel, (n_samples,), logits, logits.stride(0), top, geometry.table, geometry.table_row, sums,
        n_samples, n_classes, BLOCK=config.block, ALIGN=alignment(n_classes, logits.stride(0)),
        num_warps=config.num_warps,
    )  # fmt: skip
    return sums


def shard_softmax_sums(
    logits: Tensor, top: Tensor, temperature: Tensor, n_live: Tensor, labels: Labels, shards: Shards
) -> Tensor:
    """The fields of `eager.rows.RowSums` for the classes of this process, (5, n)."""
    logits, labels = unit_stride(logits), labels._replace(target=unit_stride(labels.target))
    n_samples, n_classes = logits.shape
    sums = torch.empty(5, n_samples, dtype=torch.float32, device=logits.device)
    target, class_weight, ignore_index, label_smoothing = labels
    constants = loop_constants(logits, labels)
    del constants["BOUNDARY"]
    launch(
        softmax_sums_kernel, (n_samples,), logits, logits.stride(0), target, target.stride(0),
        None if class_weight is None else class_weight.contiguous(), top, temperature, n_live.contiguous(), sums,
        n_samples, n_classes, ignore_index, float(label_smoothing), shards.start, shards.n_classes,
        **constants,
    )  # fmt: skip
    return sums
