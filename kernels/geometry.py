"""What the row kernels take of a batch: its predictions, and for each sample the row of the table R."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry
from .distances import Kept, distance_table
from .launch import SCAN_SAMPLES, alignment, launch, next_power_of_2, scan_config, target_of, unit_stride
from .rows import scan_maximum


@triton.jit
def predict_kernel(
    logits_pointer,  # (n, c)
    logits_stride,
    predicted_pointer,  # (n,) int64: written
    n_classes,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Arg-max of one row."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    predicted = scan_maximum(logits_pointer + row * logits_stride, n_classes, BLOCK)[1]
    tl.store(predicted_pointer + row, predicted.to(tl.int64))


@triton.jit(do_not_specialize=["n_samples"])
def distinct_kernel(
    predicted_pointer,  # (n,) int64
    table_row_pointer,  # (n,) int64: written
    row_class_pointer,  # (n,) int64: written
    n_distinct_pointer,  # () int64: written
    n_samples,
    PLACES: tl.constexpr,  # at least n
    CHUNK: tl.constexpr,
):
    """The distinct predictions, in one program that compares each pair of samples: see `_distinct`."""
    places = tl.arange(0, PLACES)
    inside = places < n_samples
    predicted = tl.load(predicted_pointer + places, mask=inside, other=0)
    met_before = tl.zeros([PLACES], tl.int32)
    for start in range(0, n_samples, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other = tl.load(predicted_pointer + others, mask=others < n_samples, other=-1)
        before = (other[None, :] == predicted[:, None]) & (others[None, :] < places[:, None])
        met_before = tl.maximum(met_before, tl.max(before.to(tl.int32), axis=1))
    is_first = inside & (met_before == 0)
    n_distinct = tl.sum(is_first.to(tl.int32), axis=0)
    # The first of each class, kept for a moment where the ranks will be.
    tl.store(table_row_pointer + places, tl.where(is_first, predicted, -1), mask=inside)
    tl.debug_barrier()
    rank = tl.zeros([PLACES], tl.int32)
    for start in range(0, n_samples, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other = tl.load(table_row_pointer + others, mask=others < n_samples, other=-1)
        rank += tl.sum(((other >= 0)[None, :] & (other[None, :] < predicted[:, None])).to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(table_row_pointer + places, rank.to(tl.int64), mask=inside)
    tl.store(row_class_pointer + rank, predicted, mask=is_first)
    tl.store(row_class_pointer + places, tl.full([PLACES], -1, tl.int64), mask=inside & (places >= n_distinct))
    tl.store(n_distinct_pointer, n_distinct.to(tl.int64))


class Located(NamedTuple):
    """What is known before the row kernels run."""

    geometry: Geometry
    predicted: Tensor
    is_known: bool
    """whether `predicted` is, and `table_row`; otherwise the row kernels find and write both, which are the same"""
    kept: Kept


def geometry_of(logits: Tensor, head_weight: Tensor, kept: Kept | None = None) -> Located:
    """The table R for a batch, and the predictions where it needs them: for n < c.

    `kept`: where to leave the origin and the flags; then outputs may be one tensor, or parts of one: for n >= c
    `predicted` is `table_row`, and stands for the row_class that nothing reads then, too.
    """
    n_samples, n_classes = logits.shape
    aliased, kept = kept is not None, kept or Kept()
    new = {"dtype": torch.int64, "device": logits.device}
    if n_samples >= n_classes:
        predicted = torch.empty(n_samples, **new)
        table = distance_table(head_weight, None, kept)
        if aliased:
            return Located(Geometry(predicted, table, predicted), predicted, False, kept)
        row_class = torch.arange(n_classes, device=logits.device)
        return Located(Geometry(torch.empty_like(predicted), table, row_class), predicted, False, kept)
    if aliased:
        room = torch.empty(3 * n_samples + 1, **new)
        predicted, *places, n_distinct = room.split_with_sizes((n_samples,) * 3 + (1,))
    else:
        predicted, *places, n_distinct = (torch.empty(size, **new) for size in (n_samples,) * 3 + (1,))
    logits = unit_stride(logits)
    config = scan_config(n_classes, target_of(logits))
    launch(
        predict_kernel, (n_samples,), logits, logits.stride(0), predicted, n_classes, BLOCK=config.block,
        ALIGN=alignment(n_classes, logits.stride(0)), num_warps=config.num_warps,
    )  # fmt: skip
    if n_samples <= SCAN_SAMPLES:
        block = max(next_power_of_2(n_samples), 32)
        launch(
            distinct_kernel, (1,), predicted, *places, n_distinct, n_samples, PLACES=block, CHUNK=32,
            num_warps=max(block // 64, 1),
        )  # fmt: skip
    else:
        places = _distinct(predicted)
        n_distinct = (places[1] >= 0).sum()
    table_row, row_class = places
    table = distance_table(head_weight, row_class, kept)
    return Located(Geometry(table_row, table, row_class), predicted, True, kept._replace(n_distinct=n_distinct))


def _distinct(predicted: Tensor) -> tuple[Tensor, Tensor]:
    """(table_row, row_class): the distinct predictions ascending, -1 behind them, and the place of each sample's
    among them.

    Both have n entries, whatever the number of distinct ones is: nothing is read back by the host.
    """
    ordered, order = torch.sort(predicted, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
    rank = torch.cumsum(is_first, 0) - 1
    table_row = torch.empty_like(rank).scatter_(0, order, rank)
    # Equal predictions write the same value to the same place.
    row_class = torch.full_like(rank, -1).scatter_(0, rank, ordered)
    return table_row, row_class
