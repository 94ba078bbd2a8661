"""Segmented sums: rows of equal prediction, added in the order of the batch, so that two runs give the same bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distances import is_alone
from .fused_row import scale_block, scale_kernel
from .launch import (
    PIECE,
    SCALE_BLOCK,
    SCAN_SAMPLES,
    Layout,
    StepLaunch,
    alignment,
    cdiv,
    kinds_of,
    launch,
    next_power_of_2,
    prepared,
    segment_config,
    target_of,
)
from .rows import finite_or_nan, live_gap


@triton.jit
def _place(n_columns, BLOCK: tl.constexpr):
    """(row of the result, block of its columns) of a program: one axis for both, for the others end at 65,535."""
    blocks = tl.cdiv(n_columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    return program // blocks, program % blocks


@triton.jit
def _sum_samples(
    begin,
    end,
    order_pointer,
    mine,
    sample_grad_pointer,
    factor_pointer,
    boost,
    values_pointer,
    values_stride,
    predicted_pointer,
    center,
    columns,
    n_columns,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    GAPS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """sum_i scale_i (x_ij - shift_ij) over the samples order[begin:end], scale = sample_grad factor boost, or factor
    alone, which is boosted, where there is no sample_grad. SCAN: over those whose number in `mine` is in begin:end.

    GAPS: x are logits, the shift is f_p, the largest of the sample, and a masked class adds nothing: the sum of
    scale (-g). Where another process may have p, `predicted` is f_p itself, in fp32. Otherwise the shift is `center`.
    A sample of scale 0 (ignored, or without a gradient) adds nothing whatever its row holds.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, SAMPLES):
        position = start + tl.arange(0, SAMPLES)
        inside = position < end
        if SCAN:
            chosen = mine[None, :] == position[:, None]
            sample = tl.sum(tl.where(chosen, tl.arange(0, SCAN)[None, :], 0), axis=1).to(tl.int64)
        else:
            sample = tl.load(order_pointer + position, mask=inside, other=0)
        scale = tl.load(factor_pointer + sample, mask=inside, other=0.0)
        if sample_grad_pointer is not None:
            scale *= boost
            scale *= tl.load(sample_grad_pointer + sample, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(
            values_pointer + (sample * values_stride)[:, None] + columns[None, :],
            mask=inside[:, None] & (columns < n_columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        if GAPS:
            row_maximum = tl.load(predicted_pointer + sample, mask=inside, other=0)
            if predicted_pointer.dtype.element_ty == tl.int64:
                place = values_pointer + sample * values_stride + row_maximum
                row_maximum = tl.load(place, mask=inside, other=0.0)
            term = -live_gap(values, finite_or_nan(row_maximum.to(tl.float32))[:, None])[1]
        else:
            term = values - center[None, :]
        total += tl.sum(tl.where(scale[:, None] == 0, 0.0, scale[:, None] * term), axis=0)
    return total


@triton.jit(do_not_specialize=["n_segments"])
def segment_piece_kernel(
    offsets_pointer,  # (k + 1,) int64: samples of segment r are order[offsets[r]:offsets[r + 1]]
    order_pointer,  # (n,) int64
    piece_segment_pointer,  # (pieces,) int64: the segment of each piece, k where the piece is unused
    piece_start_pointer,  # (k,) int64: the first piece of each segment
    sample_grad_pointer,  # (n,), or None: it is in the factor, and so is the boost
    factor_pointer,  # (n,)
    boost,
    values_pointer,  # (n, columns)
    values_stride,
    predicted_pointer,  # (n,) int64 p, or fp32 f_p; None unless GAPS
    center_pointer,  # (columns,); None if GAPS
    partial_pointer,  # (pieces, columns) fp32: written
    n_segments,
    n_columns,
    PIECE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    GAPS: tl.constexpr,
):
    """Sum of one piece, at most PIECE samples, of a segment that has more: however uneven the segments, no program
    has more."""
    piece, block = _place(n_columns, BLOCK)
    n_columns = n_columns // ALIGN * ALIGN
    values_stride = values_stride // ALIGN * ALIGN
    columns = block * BLOCK + tl.arange(0, BLOCK)
    segment = tl.load(piece_segment_pointer + piece)
    if segment < n_segments:
        begin = tl.load(offsets_pointer + segment) + (piece - tl.load(piece_start_pointer + segment)) * PIECE
        end = tl.minimum(begin + PIECE, tl.load(offsets_pointer + segment + 1))
        center = 0.0 if GAPS else tl.load(center_pointer + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
        total = _sum_samples(
            begin, end, order_pointer, None, sample_grad_pointer, factor_pointer, boost, values_pointer,
            values_stride, predicted_pointer, center, columns, n_columns, SAMPLES, BLOCK, GAPS, 0,
        )  # fmt: skip
        tl.store(partial_pointer + piece * n_columns + columns, total, mask=columns < n_columns)


@triton.jit(do_not_specialize=["n_segments", "n_samples"])
def segment_sum_kernel(
    segment_pointer,  # (n,) int64, read where SCAN
    offsets_pointer,  # (k + 1,) int64; this and the next three None where SCAN
    order_pointer,  # (n,) int64
    piece_start_pointer,  # (k,) int64
    partial_pointer,  # (pieces, columns) fp32
    sample_grad_pointer,  # (n,), or None: it is in the factor, and so is the boost
    factor_pointer,  # (n,)
    values_pointer,  # (n, columns)
    predicted_pointer,  # (n,) int64 p, or fp32 f_p; None unless GAPS
    center_pointer,  # (columns,); None if GAPS
    table_pointer,  # (k, columns) R; None unless GAPS
    summed_pointer,  # (k, columns or more): written, 0 for an empty segment and behind the columns
    gradient_pointer,  # (n, columns) or None: multiplied by `upstream`, as S is
    upstream_pointer,  # () or None: 1
    boost,
    values_stride,
    summed_stride,
    n_segments,
    n_samples,
    n_columns,
    PIECE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    GAPS: tl.constexpr,
    SCAN: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Sum of one segment: of its samples, or of its pieces in order where it has more than PIECE.

    If GAPS, times R^3; R^2 for pairs that are alone (`distances.is_alone`). Programs behind the last segment scale the
    gradient of the logits.
    """
    segment, block = _place(summed_stride, BLOCK)
    if gradient_pointer is not None:  # noqa: SIM102 - decided when compiled
        if segment >= n_segments:
            first = n_segments * tl.cdiv(summed_stride, BLOCK)
            n_values = tl.cast(n_samples, tl.int64) * n_columns
            scale_block(gradient_pointer, upstream_pointer, tl.program_id(0) - first, n_values, SCALE)
            return
    n_columns = n_columns // ALIGN * ALIGN
    values_stride = values_stride // ALIGN * ALIGN
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    if SCAN:  # at least n: the program counts the samples of its segment instead of a sort for all
        places = tl.arange(0, SCAN)
        is_mine = tl.load(segment_pointer + places, mask=places < n_samples, other=-1) == segment
        number = tl.cumsum(is_mine.to(tl.int32), axis=0)
        mine = tl.where(is_mine, number - 1, -1)
        begin = 0
        end = tl.max(number, axis=0)
    else:
        mine = None
        begin = tl.load(offsets_pointer + segment)
        end = tl.load(offsets_pointer + segment + 1)
    count = end - begin
    center = 0.0 if GAPS else tl.load(center_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    last = end
    if not SCAN:
        last = tl.where(count > PIECE, begin, end)
    total = _sum_samples(
        begin, last, order_pointer, mine, sample_grad_pointer, factor_pointer, boost, values_pointer, values_stride,
        predicted_pointer, center, columns, n_columns, SAMPLES, BLOCK, GAPS, SCAN,
    )  # fmt: skip
    if not SCAN:
        piece = tl.load(piece_start_pointer + segment)
        for index in range(piece, piece + tl.where(count > PIECE, (count + PIECE - 1) // PIECE, 0)):
            total += tl.load(partial_pointer + tl.cast(index, tl.int64) * n_columns + columns, mask=inside, other=0.0)
    if GAPS:  # noqa: SIM102 - decided when compiled; `and` would ask at run time for a table that may be None
        if count > 0:  # an unused table row may hold anything
            inverse_distance = tl.load(table_pointer + segment * n_columns + columns, mask=inside, other=0.0)
            if upstream_pointer is not None:
                total *= tl.load(upstream_pointer).to(tl.float32)
            # Step by step: R^2 alone leaves fp32 for rows 1e-20 apart, whose gaps are as small.
            total = total * inverse_distance * inverse_distance
            total *= tl.where(is_alone(inverse_distance) == 1, 1.0, inverse_distance) * (1.0 / boost)
    tl.store(
        summed_pointer + segment * summed_stride + columns, tl.where(inside, total, 0.0), mask=columns < summed_stride
    )


class Upstream(NamedTuple):
    """What a loss is multiplied by, known when the gradient of its logits has been made: that is multiplied, too."""

    factor: Tensor
    """()"""
    grad_logits: Tensor
    """(n, c) contiguous"""


class Segments(NamedTuple):
    """What is summed over which samples: sample_grad_i factor_i times a row of values, or factor_i times it."""

    segment: Tensor
    """(n,) int64"""
    sample_grad: Tensor | None
    """(n,)"""
    factor: Tensor
    """(n,)"""
    values: Tensor
    """(n, columns)"""


def gap_sum(
    layout: Layout, segments: Segments, predicted: Tensor, table: Tensor, upstream: Upstream | None = None
) -> Tensor:
    """S_rj = R_rj^3 sum over the samples i of table row r, in the order of the batch, of
    sample_grad_i factor_i (f_ij - f_ip); masked classes count 0. Without sample_grad the factor is boosted.

    `values` are logits; `predicted` is p, or f_p where these are the classes of one process among many. (k, c or more):
    rows of whole 128-bit loads, 0 behind the classes. The last R is left out of pairs that are alone
    (`distances.is_alone`).
    """
    segment, sample_grad, factor, values = segments
    summed = torch.empty(layout.n_rows, layout.width, dtype=torch.float32, device=table.device)
    by, gradient = upstream or (None, None)
    if gradient is not None and _truncates(gradient):
        gradient.mul_(by)
        gradient = None
    cut = (None,) * 4
    if layout.n_samples > SCAN_SAMPLES:
        cut = _cut(segments, layout.n_rows, predicted, None, layout.boost)
    _gap_sums(layout, gradient is not None)(
        segment, *cut, sample_grad, factor, values, predicted, None, table, summed, gradient, by,
        floats=(layout.boost,),
    )  # fmt: skip
    return summed


@prepared
def _gap_sums(layout: Layout, scales: bool) -> StepLaunch:
    return _sums(layout.shape, layout.stride, (layout.n_rows, layout.width), True, scales)


@prepared
def _plain_sums(kinds: tuple, shape: tuple[int, int], stride: int, output: tuple[int, int]) -> StepLaunch:
    return _sums(shape, stride, output, False, False)


def _truncates(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and target_of(tensor) == "interpreter"


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values (contiguous) times factor (0-dim), in place, and without a pass over them where the factor is 1."""
    if _truncates(values):
        return values.mul_(factor)
    _scale(kinds_of(values, factor), values.numel())(values, factor)
    return values


@prepared
def _scale(kinds: tuple, size: int) -> StepLaunch:
    return StepLaunch(scale_kernel, (cdiv(size, SCALE_BLOCK),), size, BLOCK=SCALE_BLOCK, num_warps=4)


def segment_sum(segments: Segments, output: Tensor, center: Tensor) -> Tensor:
    """output_rj = sum over the samples i with segment_i = r, in the order of the batch, of
    sample_grad_i factor_i (x_ij - center_j).

    Writes all of `output`, (n_segments, columns), and returns it. Deterministic, without atomics; the host reads
    nothing back.
    """
    segment, sample_grad, factor, values = segments
    cut = (None,) * 4
    if values.shape[0] > SCAN_SAMPLES:
        cut = _cut(segments, output.shape[0], None, center, 1.0)
    kinds = kinds_of(segment, sample_grad, factor, values, center, output)
    _plain_sums(kinds, values.shape, values.stride(0), output.shape)(
        segment, *cut, sample_grad, factor, values, None, center, None, output, None, None, floats=(1.0,)
    )
    return output


def _cut(
    segments: Segments, n_segments: int, predicted: Tensor | None, center: Tensor | None, boost: float
) -> tuple[Tensor, ...]:
    """(offsets, order, first piece of each segment, sums of the pieces) of `segment_sum_kernel`."""
    segment, sample_grad, factor, values = segments
    n_samples, n_columns = values.shape
    ordered, order = torch.sort(segment, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(n_segments + 1, device=segment.device))
    # Only segments of more than PIECE samples are cut, so there are at most 2 n / PIECE pieces, whatever the segments
    # are.
    n_pieces = cdiv(2 * n_samples, PIECE)
    counts = offsets.diff()
    pieces = torch.where(counts > PIECE, (counts + (PIECE - 1)) // PIECE, 0)
    piece_end = pieces.cumsum(0)
    piece_start = piece_end - pieces
    piece_segment = torch.searchsorted(piece_end, torch.arange(n_pieces, device=segment.device), right=True)
    partial = torch.empty(n_pieces, n_columns, dtype=torch.float32, device=values.device)
    config = segment_config(n_columns, n_samples, n_segments)
    launch(
        segment_piece_kernel, (n_pieces * cdiv(n_columns, config.columns),), offsets, order, piece_segment, piece_start,
        sample_grad, factor, boost, values, values.stride(0), predicted, center, partial, n_segments, n_columns,
        PIECE=PIECE, SAMPLES=config.samples, BLOCK=config.columns, ALIGN=alignment(n_columns, values.stride(0)),
        GAPS=center is None, num_warps=config.num_warps,
    )  # fmt: skip
    return offsets, order, piece_start, partial


def _sums(shape: tuple[int, int], stride: int, output: tuple[int, int], gaps: bool, scales: bool) -> StepLaunch:
    (n_samples, n_columns), (n_segments, width) = shape, output
    config = segment_config(n_columns, n_samples, n_segments)
    programs = n_segments * cdiv(width, config.columns)
    if scales:
        programs += cdiv(n_samples * n_columns, SCALE_BLOCK)
    return StepLaunch(
        segment_sum_kernel, (programs,), stride, width, n_segments, n_samples, n_columns, PIECE=PIECE,
        SAMPLES=config.samples, BLOCK=config.columns, ALIGN=alignment(n_columns, stride), GAPS=gaps,
        SCAN=next_power_of_2(n_samples) if n_samples <= SCAN_SAMPLES else 0, SCALE=SCALE_BLOCK,
        num_warps=config.num_warps,
    )  # fmt: skip
