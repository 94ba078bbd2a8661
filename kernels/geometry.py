"""What the row kernels take of a batch: its predictions, and for each sample the row of the table R."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry
from .distances import Kept, distance_table
from .launch import SCAN_SAMPLES, Layout, StepLaunch, alignment, next_power_of_2, prepared, scan_config
from .rows import scan_maximum


@triton.jit
def predict_kernel(
    logits_pointer,  # (n, c)
    predicted_pointer,  # (n,) int64: written
    logits_stride,
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


def geometry_of(
    layout: Layout, logits: Tensor, weight: Tensor, kept: Kept | None = None
) -> tuple[Geometry, Tensor, Kept]:
    """(the table R for a batch, the predictions, what is kept). For n < c the table needs the predictions; otherwise
    the row kernels find and write them, and `table_row`, which is the same.

    `kept`: where to leave the origin and the flags; then outputs may be one tensor, or parts of one: for n >= c
    `predicted` is `table_row`, and stands for the row_class that nothing reads then, too.
    """
    n_samples, aliased = layout.n_samples, kept is not None
    new = {"dtype": torch.int64, "device": logits.device}
    if not layout.by_row:
        predicted = table_row = row_class = torch.empty(n_samples, **new)
        if not aliased:
            table_row, row_class = torch.empty_like(predicted), torch.arange(layout.n_classes, device=logits.device)
        kept = kept or Kept()
        return Geometry(table_row, distance_table(layout, weight, None, kept), row_class), predicted, kept
    sizes = (n_samples,) * 3 + (1,)
    if aliased:
        if n_samples <= SCAN_SAMPLES:  # each part on 16 bytes
            sizes = (n_samples + n_samples % 2,) * 3 + (1,)
        predicted, table_row, row_class, n_distinct = torch.empty(sum(sizes), **new).split_with_sizes(sizes)
    else:
        predicted, table_row, row_class, n_distinct = (torch.empty(size, **new) for size in sizes)
    _predict(layout)(logits, predicted)
    if n_samples <= SCAN_SAMPLES:
        _distinct_in_one(layout)(predicted, table_row, row_class, n_distinct)
    else:
        table_row, row_class = _distinct(predicted)
        n_distinct = (row_class >= 0).sum()
    origin, flags, _ = kept or Kept()
    kept = Kept(origin, flags, n_distinct)
    return Geometry(table_row, distance_table(layout, weight, row_class, kept), row_class), predicted, kept


@prepared
def _predict(layout: Layout) -> StepLaunch:
    (n_samples, n_classes), stride = layout.shape, layout.stride
    config = scan_config(n_classes, layout.target)
    return StepLaunch(
        predict_kernel, (n_samples,), stride, n_classes, BLOCK=config.block, ALIGN=alignment(n_classes, stride),
        num_warps=config.num_warps,
    )  # fmt: skip


@prepared
def _distinct_in_one(layout: Layout) -> StepLaunch:
    block = max(next_power_of_2(layout.n_samples), 32)
    return StepLaunch(distinct_kernel, (1,), layout.n_samples, PLACES=block, CHUNK=32, num_warps=max(block // 64, 1))


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
