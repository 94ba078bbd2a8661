"""Distances to decision boundaries: the table of weight distances, D and its gradients, segmented sums, the weight
gradient.

    R_pj = 1 / |w_p - w_j|        D = sum_j (f_p - f_j) R_pj / K

Nothing of shape (c, c, m) is formed, and the number of products is that of the smaller side: n >= c has a table of
all classes, n < c a table of the distinct predictions. Every sum has a fixed order: two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    PIECE,
    alignment,
    cdiv,
    class_splits,
    difference_config,
    launch,
    row_config,
    scan_config,
    segment_config,
    target_of,
    tile_config,
)
from .rows import add_product, boundary_terms, finite_or_nan, first_maximum, live_gap, mean_distance, scan_maximum

# The Gram form of s has an error of up to 1e-6 (|w_p|^2 + |w_j|^2), from rounding m products (README.md, section 2).
# At a share of 1/64 of the norms that is 6e-5 of s and 3e-5 of R, under the 1e-4 that D is held to. Closer pairs are
# recomputed; heads that have learnt have few, because rows of unrelated classes have s near |w_p|^2 + |w_j|^2.
CLOSE_PAIR = tl.constexpr(1 / 64)


def unit_stride(matrix: Tensor) -> Tensor:
    """The matrix itself where its columns are neighbours in memory (rows may lie anywhere); otherwise a contiguous
    copy.

    Any op that reads a transposed matrix row by row pays for the strided reads; one copy pays once.
    """
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def gradient_buffer(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where a kernel writes the gradient of `like`: in its dtype, rounded once, at the store.

    Triton's interpreter truncates fp32 to bf16 instead of rounding, so there PyTorch rounds afterwards.
    """
    truncates = like.dtype == torch.bfloat16 and target_of(like) == "interpreter"
    return torch.empty(shape, dtype=torch.float32 if truncates else like.dtype, device=like.device)


# ----------------------------------------------------------------------------------------------------------------------
# The table R: one row for each class (n >= c), or for each distinct prediction (n < c)
# ----------------------------------------------------------------------------------------------------------------------


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
    if ALIGN > 1:
        n_classes = n_classes // ALIGN * ALIGN
        logits_stride = logits_stride // ALIGN * ALIGN
    predicted = scan_maximum(logits_pointer + row * logits_stride, n_classes, BLOCK)[1]
    tl.store(predicted_pointer + row, predicted.to(tl.int64))


@triton.jit
def load_centred(
    weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, BY_COLUMN: tl.constexpr
):
    """w_class - mean row, (classes, features) or, BY_COLUMN, its transpose, in fp32; 0 outside the matrix.

    Differences of rows do not change when the mean row is subtracted from all, but products of the rest lose far
    fewer digits.
    """
    feature_mask = features < n_features
    mean = tl.load(mean_pointer + features, mask=feature_mask, other=0.0)
    row = classes.to(tl.int64) * weight_stride
    if BY_COLUMN:
        mask = feature_mask[:, None] & class_mask[None, :]
        weight = tl.load(weight_pointer + row[None, :] + features[:, None], mask=mask, other=0.0).to(tl.float32)
        return tl.where(mask, weight - mean[:, None], 0.0)
    else:
        mask = class_mask[:, None] & feature_mask[None, :]
        weight = tl.load(weight_pointer + row[:, None] + features[None, :], mask=mask, other=0.0).to(tl.float32)
        return tl.where(mask, weight - mean[None, :], 0.0)


@triton.jit
def distance_gram_kernel(
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,) fp32
    row_class_pointer,  # (k,) int64: the class of each table row, -1 for none
    table_pointer,  # (k, c) fp32: written
    n_rows,
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of R from s = |a|^2 + |b|^2 - 2 a.b, a and b centred; -1 where s is too small for this form
    (CLOSE_PAIR)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_class = tl.load(row_class_pointer + rows, mask=rows < n_rows, other=-1)
    if tl.max(row_class, axis=0) >= 0:
        row_mask = row_class >= 0
        class_mask = classes < n_classes
        row_norms = tl.zeros([ROWS], tl.float32)
        class_norms = tl.zeros([COLUMNS], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, n_features, INNER):
            features = start + tl.arange(0, INNER)
            a = load_centred(
                weight_pointer, weight_stride, mean_pointer, row_class, row_mask, features, n_features, False
            )
            b = load_centred(
                weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, True
            )
            row_norms += tl.sum(a * a, axis=1)
            class_norms += tl.sum(b * b, axis=0)
            products = add_product(products, a, b, PRECISION)
        norms = row_norms[:, None] + class_norms[None, :]
        squared_distance = norms - 2.0 * products
        is_close = squared_distance <= norms * CLOSE_PAIR
        # 1 where it will not be used, so that no root of a negative rounding error is taken
        inverse_distance = tl.rsqrt(tl.where(is_close, 1.0, squared_distance))
        inverse_distance = tl.where(is_close, -1.0, inverse_distance)
        inverse_distance = tl.where(row_class[:, None] == classes[None, :], 0.0, inverse_distance)
        offsets = rows.to(tl.int64)[:, None] * n_classes + classes[None, :]
        tl.store(table_pointer + offsets, inverse_distance, mask=row_mask[:, None] & class_mask[None, :])


@triton.jit
def distance_refine_kernel(
    weight_pointer,  # (c, m)
    weight_stride,
    row_class_pointer,  # (k,) int64
    table_pointer,  # (k, c) fp32: entries of -1 are replaced
    n_rows,
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Recompute the close pairs of a tile from sum (w_p - w_j)^2: the difference of neighbouring floats is exact,
    so equal rows have s = 0 (no boundary: R = 0) and rows 1e-4 apart keep all their digits. A tile without a close
    pair costs one read."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_class = tl.load(row_class_pointer + rows, mask=rows < n_rows, other=-1)
    if tl.max(row_class, axis=0) >= 0:
        row_mask = row_class >= 0
        class_mask = classes < n_classes
        offsets = rows.to(tl.int64)[:, None] * n_classes + classes[None, :]
        is_close = tl.load(table_pointer + offsets, mask=row_mask[:, None] & class_mask[None, :], other=0.0) < 0
        if tl.max(is_close.to(tl.int32)) > 0:
            squared_distance = tl.zeros([ROWS, COLUMNS], tl.float32)
            row_offset = row_class * weight_stride
            class_offset = classes.to(tl.int64) * weight_stride
            for start in range(0, n_features, INNER):
                features = start + tl.arange(0, INNER)
                feature_mask = (features < n_features)[None, :]
                a = tl.load(
                    weight_pointer + row_offset[:, None] + features[None, :],
                    mask=row_mask[:, None] & feature_mask,
                    other=0.0,
                ).to(tl.float32)
                b = tl.load(
                    weight_pointer + class_offset[:, None] + features[None, :],
                    mask=class_mask[:, None] & feature_mask,
                    other=0.0,
                ).to(tl.float32)
                difference = a[:, None, :] - b[None, :, :]
                squared_distance += tl.sum(difference * difference, axis=2)
            is_apart = squared_distance > 0
            inverse_distance = tl.where(is_apart, tl.rsqrt(tl.where(is_apart, squared_distance, 1.0)), 0.0)
            tl.store(table_pointer + offsets, inverse_distance, mask=is_close)


@dataclass(frozen=True)
class Geometry:
    """The table R for a batch, and which row of it each sample needs."""

    table: Tensor  # (k, c) fp32, k = min(n, c)
    row_class: Tensor  # (k,) int64, -1 for unused rows
    table_row: Tensor  # (n,) int64, not yet written unless prediction_known
    predicted: Tensor  # (n,) int64, not yet written unless prediction_known
    prediction_known: bool

    @classmethod
    def of(cls, logits: Tensor, head_weight: Tensor) -> Geometry:
        n_samples, n_classes = logits.shape
        predicted = torch.empty(n_samples, dtype=torch.int64, device=logits.device)
        if n_samples < n_classes:
            logits = unit_stride(logits)
            config = scan_config(n_classes, target_of(logits))
            launch(
                predict_kernel,
                (n_samples,),
                logits,
                logits.stride(0),
                predicted,
                n_classes,
                BLOCK=config.block,
                ALIGN=alignment(n_classes, logits.stride(0)),
                num_warps=config.num_warps,
            )
            table_row, row_class = _distinct(predicted)
            return cls(distance_table(head_weight, row_class), row_class, table_row, predicted, True)
        row_class = torch.arange(n_classes, device=logits.device)
        return cls(distance_table(head_weight, row_class), row_class, torch.empty_like(predicted), predicted, False)


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


def mean_row(head_weight: Tensor) -> Tensor:
    """The mean row of W, (m,) fp32."""
    return torch.mean(head_weight, dim=0, dtype=torch.float32)


def distance_table(head_weight: Tensor, row_class: Tensor) -> Tensor:
    """R (k, c) fp32 between the classes in `row_class` and all classes; rows of class -1 are left as they are."""
    head_weight = unit_stride(head_weight)
    n_classes, n_features = head_weight.shape
    n_rows = row_class.shape[0]
    # Zeros where rows may stay unused: they are returned, and an operator must give the same twice.
    new = torch.empty if n_rows == n_classes else torch.zeros
    table = new(n_rows, n_classes, dtype=torch.float32, device=head_weight.device)
    tile = tile_config(target_of(head_weight))
    launch(
        distance_gram_kernel,
        (cdiv(n_rows, tile.rows), cdiv(n_classes, tile.columns)),
        head_weight,
        head_weight.stride(0),
        mean_row(head_weight),
        row_class,
        table,
        n_rows,
        n_classes,
        n_features,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        PRECISION=tile.precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    tile = difference_config()
    launch(
        distance_refine_kernel,
        (cdiv(n_rows, tile.rows), cdiv(n_classes, tile.columns)),
        head_weight,
        head_weight.stride(0),
        row_class,
        table,
        n_rows,
        n_classes,
        n_features,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return table


# ----------------------------------------------------------------------------------------------------------------------
# D and its gradient by the logits
# ----------------------------------------------------------------------------------------------------------------------


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
    LOOPED: tl.constexpr,
    ALIGN: tl.constexpr,
    PREDICTION_KNOWN: tl.constexpr,
):
    """D of one sample and dD / d(sum_j g_j R_j) = 1 / (K + average_offset)."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGN > 1:
        n_classes = n_classes // ALIGN * ALIGN
        logits_stride = logits_stride // ALIGN * ALIGN
    logits_row = logits_pointer + row * logits_stride
    columns = tl.arange(0, BLOCK)
    if not LOOPED:
        logit = tl.load(logits_row + columns, mask=columns < n_classes, other=float("-inf")).to(tl.float32)
    if PREDICTION_KNOWN:
        predicted = tl.load(predicted_pointer + row)
        row_maximum = tl.load(logits_row + predicted).to(tl.float32)
        table_row = tl.load(table_row_pointer + row)
    else:
        if LOOPED:
            row_maximum, predicted = scan_maximum(logits_row, n_classes, BLOCK)
        else:
            row_maximum, predicted = first_maximum(logit, columns, 0)
        table_row = predicted.to(tl.int64)
        tl.store(predicted_pointer + row, table_row)
        tl.store(table_row_pointer + row, table_row)
    row_maximum = finite_or_nan(row_maximum)
    table_row_pointer = table_pointer + table_row * n_classes
    if LOOPED:
        distance_sums = tl.zeros([BLOCK], tl.float32)
        boundary_counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n_classes, BLOCK):
            offset = start + columns
            logit = tl.load(logits_row + offset, mask=offset < n_classes, other=float("-inf")).to(tl.float32)
            live, gap = live_gap(logit, row_maximum)
            inverse_distance, is_boundary = boundary_terms(table_row_pointer, offset, n_classes, live)
            distance_sums += gap * inverse_distance
            boundary_counts += is_boundary
    else:
        live, gap = live_gap(logit, row_maximum)
        inverse_distance, boundary_counts = boundary_terms(table_row_pointer, columns, n_classes, live)
        distance_sums = gap * inverse_distance
    distance, share = mean_distance(
        tl.sum(distance_sums, axis=0), tl.sum(boundary_counts, axis=0), average_offset, row_maximum == row_maximum
    )
    tl.store(distance_pointer + row, distance)
    tl.store(slope_pointer + row, share)


@triton.jit
def boundary_distance_backward_kernel(
    sample_grad_pointer,  # (n,)
    logits_pointer,  # (n, c)
    logits_stride,
    table_pointer,  # (k, c)
    table_row_pointer,  # (n,) int64
    predicted_pointer,  # (n,) int64
    slope_pointer,  # (n,)
    grad_logits_pointer,  # (n, c) contiguous: written
    n_classes,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dD/df_j = -slope R_j, and slope sum_j R_j at p. The logits are read only to tell which classes are live."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGN > 1:
        n_classes = n_classes // ALIGN * ALIGN
        logits_stride = logits_stride // ALIGN * ALIGN
    logits_row = logits_pointer + row * logits_stride
    grad_row = grad_logits_pointer + row * n_classes
    table_row = table_pointer + tl.load(table_row_pointer + row) * n_classes
    columns = tl.arange(0, BLOCK)
    predicted = tl.load(predicted_pointer + row)
    scale = tl.load(sample_grad_pointer + row).to(tl.float32) * tl.load(
        slope_pointer + row
    )  # NaN for a row that is not valid
    if LOOPED:
        inverse_distance_sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n_classes, BLOCK):
            offset = start + columns
            logit = tl.load(logits_row + offset, mask=offset < n_classes, other=float("-inf")).to(tl.float32)
            inverse_distance_sums += boundary_terms(table_row, offset, n_classes, logit != float("-inf"))[0]
        inverse_distance_sum = tl.sum(inverse_distance_sums, axis=0)
        for start in range(0, n_classes, BLOCK):
            offset = start + columns
            logit = tl.load(logits_row + offset, mask=offset < n_classes, other=float("-inf")).to(tl.float32)
            inverse_distance = boundary_terms(table_row, offset, n_classes, logit != float("-inf"))[0]
            gradient = scale * (tl.where(offset == predicted, inverse_distance_sum, 0.0) - inverse_distance)
            tl.store(grad_row + offset, gradient, mask=offset < n_classes)
    else:
        logit = tl.load(logits_row + columns, mask=columns < n_classes, other=float("-inf")).to(tl.float32)
        inverse_distance = boundary_terms(table_row, columns, n_classes, logit != float("-inf"))[0]
        inverse_distance_sum = tl.sum(inverse_distance, axis=0)
        gradient = scale * (tl.where(columns == predicted, inverse_distance_sum, 0.0) - inverse_distance)
        tl.store(grad_row + columns, gradient, mask=columns < n_classes)


# ----------------------------------------------------------------------------------------------------------------------
# Segmented sums: rows of equal prediction, added in the order of the batch
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_samples(
    begin,
    end,
    order_pointer,
    sample_grad_pointer,
    factor_pointer,
    values_pointer,
    values_stride,
    predicted_pointer,
    center,
    columns,
    n_columns,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    GAPS: tl.constexpr,
):
    """sum_i scale_i (x_ij - shift_ij) over the samples order[begin:end], scale = sample_grad factor.

    GAPS: x are logits, the shift is the largest of the sample, f_p, and a masked class adds nothing: the sum of
    scale (-g). Otherwise the shift is `center`. A sample of scale 0 (ignored, or without a gradient) adds nothing
    whatever its row holds.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, SAMPLES):
        position = start + tl.arange(0, SAMPLES)
        inside = position < end
        sample = tl.load(order_pointer + position, mask=inside, other=0)
        scale = tl.load(sample_grad_pointer + sample, mask=inside, other=0.0).to(tl.float32)
        scale = scale * tl.load(factor_pointer + sample, mask=inside, other=0.0)
        values = tl.load(
            values_pointer + (sample * values_stride)[:, None] + columns[None, :],
            mask=inside[:, None] & (columns < n_columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        if GAPS:
            predicted = tl.load(predicted_pointer + sample, mask=inside, other=0)
            row_maximum = tl.load(values_pointer + sample * values_stride + predicted, mask=inside, other=0.0)
            term = -live_gap(values, finite_or_nan(row_maximum.to(tl.float32))[:, None])[1]
        else:
            term = values - center[None, :]
        total += tl.sum(tl.where(scale[:, None] == 0, 0.0, scale[:, None] * term), axis=0)
    return total


@triton.jit
def segment_piece_kernel(
    offsets_pointer,  # (k + 1,) int64: samples of segment r are order[offsets[r]:offsets[r + 1]]
    order_pointer,  # (n,) int64
    piece_segment_pointer,  # (pieces,) int64: the segment of each piece, k where the piece is unused
    piece_start_pointer,  # (k,) int64: the first piece of each segment
    sample_grad_pointer,  # (n,)
    factor_pointer,  # (n,)
    values_pointer,  # (n, columns)
    values_stride,
    predicted_pointer,  # (n,) int64; None unless GAPS
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
    piece = tl.program_id(0).to(tl.int64)
    if ALIGN > 1:
        n_columns = n_columns // ALIGN * ALIGN
        values_stride = values_stride // ALIGN * ALIGN
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.load(piece_segment_pointer + piece)
    if segment < n_segments:
        begin = tl.load(offsets_pointer + segment) + (piece - tl.load(piece_start_pointer + segment)) * PIECE
        end = tl.minimum(begin + PIECE, tl.load(offsets_pointer + segment + 1))
        center = 0.0 if GAPS else tl.load(center_pointer + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
        total = _sum_samples(
            begin, end, order_pointer, sample_grad_pointer, factor_pointer, values_pointer, values_stride,
            predicted_pointer, center, columns, n_columns, SAMPLES, BLOCK, GAPS,
        )  # fmt: skip
        tl.store(partial_pointer + piece * n_columns + columns, total, mask=columns < n_columns)


@triton.jit
def segment_sum_kernel(
    offsets_pointer,  # (k + 1,) int64
    order_pointer,  # (n,) int64
    piece_start_pointer,  # (k,) int64; None unless HAS_PIECES
    sample_grad_pointer,  # (n,)
    factor_pointer,  # (n,)
    values_pointer,  # (n, columns)
    values_stride,
    predicted_pointer,  # (n,) int64; None unless GAPS
    center_pointer,  # (columns,); None if GAPS
    partial_pointer,  # (pieces, columns) fp32; None unless HAS_PIECES
    table_pointer,  # (k, columns) R; None unless GAPS
    summed_pointer,  # (k, columns): written, 0 for an empty segment
    n_columns,
    PIECE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    GAPS: tl.constexpr,
    HAS_PIECES: tl.constexpr,
):
    """Sum of one segment: of its samples, or of its pieces in order where it has more than PIECE; times R^3 if GAPS."""
    segment = tl.program_id(0).to(tl.int64)
    if ALIGN > 1:
        n_columns = n_columns // ALIGN * ALIGN
        values_stride = values_stride // ALIGN * ALIGN
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    begin = tl.load(offsets_pointer + segment)
    end = tl.load(offsets_pointer + segment + 1)
    count = end - begin
    center = 0.0 if GAPS else tl.load(center_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_PIECES:
        in_pieces = count > PIECE
        total = _sum_samples(
            begin, tl.where(in_pieces, begin, end), order_pointer, sample_grad_pointer, factor_pointer, values_pointer,
            values_stride, predicted_pointer, center, columns, n_columns, SAMPLES, BLOCK, GAPS,
        )  # fmt: skip
        piece = tl.load(piece_start_pointer + segment)
        for index in range(piece, piece + tl.where(in_pieces, (count + PIECE - 1) // PIECE, 0)):
            total += tl.load(partial_pointer + tl.cast(index, tl.int64) * n_columns + columns, mask=inside, other=0.0)
    else:
        total = _sum_samples(
            begin, end, order_pointer, sample_grad_pointer, factor_pointer, values_pointer, values_stride,
            predicted_pointer, center, columns, n_columns, SAMPLES, BLOCK, GAPS,
        )  # fmt: skip
    if GAPS:  # noqa: SIM102 - decided when compiled; `and` would ask at run time for a table that may be None
        if count > 0:  # an unused table row may hold anything
            inverse_distance = tl.load(table_pointer + segment * n_columns + columns, mask=inside, other=0.0)
            # Step by step: R^3 alone leaves fp32 for rows 1e-13 apart, whose gaps are as small.
            total = total * inverse_distance * inverse_distance * inverse_distance
    tl.store(summed_pointer + segment * n_columns + columns, total, mask=inside)


def segment_sum(
    segment: Tensor,
    n_segments: int,
    sample_grad: Tensor,
    factor: Tensor,
    values: Tensor,
    output: Tensor,
    predicted: Tensor | None = None,
    table: Tensor | None = None,
    center: Tensor | None = None,
) -> Tensor:
    """output_rj = sum over the samples i with segment_i = r, in the order of the batch, of sample_grad_i factor_i times

    - (f_ij - f_ip) R_rj^3, values = logits, where `predicted` and `table` are given; masked classes count 0;
    - x_ij - center_j otherwise.

    Writes all of `output`, (n_segments, columns), and returns it. Deterministic, without atomics; the host reads
    nothing back.
    """
    n_samples, n_columns = values.shape
    config = segment_config(n_columns)
    gaps = center is None
    ordered, order = torch.sort(segment, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(n_segments + 1, device=segment.device))
    align = alignment(n_columns, values.stride(0))
    column_blocks = cdiv(n_columns, config.columns)
    piece_start = partial = None
    if n_samples > PIECE:
        # Only segments of more than PIECE samples are cut, so there are at most 2 n / PIECE pieces, whatever the
        # segments are.
        n_pieces = cdiv(2 * n_samples, PIECE)
        counts = offsets.diff()
        pieces = torch.where(counts > PIECE, (counts + (PIECE - 1)) // PIECE, 0)
        piece_end = pieces.cumsum(0)
        piece_start = piece_end - pieces
        piece_segment = torch.searchsorted(piece_end, torch.arange(n_pieces, device=segment.device), right=True)
        partial = torch.empty(n_pieces, n_columns, dtype=torch.float32, device=values.device)
        launch(
            segment_piece_kernel,
            (n_pieces, column_blocks),
            offsets,
            order,
            piece_segment,
            piece_start,
            sample_grad,
            factor,
            values,
            values.stride(0),
            predicted,
            center,
            partial,
            n_segments,
            n_columns,
            PIECE=PIECE,
            SAMPLES=config.samples,
            BLOCK=config.columns,
            ALIGN=align,
            GAPS=gaps,
            num_warps=config.num_warps,
        )
    launch(
        segment_sum_kernel,
        (n_segments, column_blocks),
        offsets,
        order,
        piece_start,
        sample_grad,
        factor,
        values,
        values.stride(0),
        predicted,
        center,
        partial,
        table,
        output,
        n_columns,
        PIECE=PIECE,
        SAMPLES=config.samples,
        BLOCK=config.columns,
        ALIGN=align,
        GAPS=gaps,
        HAS_PIECES=partial is not None,
        num_warps=config.num_warps,
    )
    return output


# ----------------------------------------------------------------------------------------------------------------------
# The weight gradient: dW_p += sum_j S_pj (w_p - w_j), dW_j += S_pj (w_j - w_p)
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def weight_gradient_table_kernel(
    summed_pointer,  # (c, c) S
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,)
    grad_weight_pointer,  # (c, m) contiguous: written
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """n >= c: a tile of dW = rowsum(M) W - M W, M = S + S^T formed as it is loaded. One product instead of two."""
    classes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    class_mask = classes < n_classes
    class_offset = classes.to(tl.int64)
    row_sums = tl.zeros([ROWS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n_classes, INNER):
        others = start + tl.arange(0, INNER)
        other_mask = others < n_classes
        other_offset = others.to(tl.int64)
        mask = class_mask[:, None] & other_mask[None, :]
        pairs = tl.load(
            summed_pointer + (class_offset * n_classes)[:, None] + others[None, :], mask=mask, other=0.0
        ) + tl.load(summed_pointer + (other_offset * n_classes)[None, :] + classes[:, None], mask=mask, other=0.0)
        row_sums += tl.sum(pairs, axis=1)
        weight = load_centred(
            weight_pointer, weight_stride, mean_pointer, others, other_mask, features, n_features, False
        )
        products = add_product(products, pairs, weight, PRECISION)
    weight = load_centred(weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, False)
    tl.store(
        grad_weight_pointer + (class_offset * n_features)[:, None] + features[None, :],
        row_sums[:, None] * weight - products,
        mask=class_mask[:, None] & (features < n_features)[None, :],
    )


@triton.jit
def weight_gradient_own_kernel(
    summed_pointer,  # (k, c) S
    row_class_pointer,  # (k,) int64
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,)
    own_pointer,  # (splits, k, m) fp32: written
    n_rows,
    n_classes,
    n_features,
    split_classes,  # classes of a split, a multiple of INNER
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """n < c, the rows of the distinct predictions: rowsum(S) W[u] - S W, over one split of the classes."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    row_class = tl.load(row_class_pointer + rows, mask=rows < n_rows, other=-1)
    if tl.max(row_class, axis=0) >= 0:
        row_mask = row_class >= 0
        row_offset = rows.to(tl.int64)
        row_sums = tl.zeros([ROWS], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        begin = split * split_classes
        for start in range(begin, tl.minimum(begin + split_classes, n_classes), INNER):
            classes = start + tl.arange(0, INNER)
            class_mask = classes < n_classes
            summed = tl.load(
                summed_pointer + (row_offset * n_classes)[:, None] + classes[None, :],
                mask=row_mask[:, None] & class_mask[None, :],
                other=0.0,
            )
            row_sums += tl.sum(summed, axis=1)
            weight = load_centred(
                weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, False
            )
            products = add_product(products, summed, weight, PRECISION)
        weight = load_centred(
            weight_pointer, weight_stride, mean_pointer, row_class, row_mask, features, n_features, False
        )
        tl.store(
            own_pointer + ((split * tl.cast(n_rows, tl.int64) + row_offset) * n_features)[:, None] + features[None, :],
            row_sums[:, None] * weight - products,
            mask=row_mask[:, None] & (features < n_features)[None, :],
        )


@triton.jit
def weight_gradient_all_kernel(
    summed_pointer,  # (k, c) S
    row_class_pointer,  # (k,) int64
    n_distinct_pointer,  # () int64: how many table rows are in use
    class_row_pointer,  # (c + 1,) int64: the table row of each class, -1 for none
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,)
    own_pointer,  # (splits, k, m) fp32
    grad_weight_pointer,  # (c, m) contiguous: written
    n_rows,
    n_classes,
    n_features,
    n_splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """n < c, a tile of all classes: dW = colsum(S) W - S^T W[u], plus what `weight_gradient_own_kernel` found for
    the classes that were predicted. dW is written once, and rounded once."""
    classes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    class_mask = classes < n_classes
    feature_mask = features < n_features
    column_sums = tl.zeros([ROWS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    n_distinct = tl.load(n_distinct_pointer)
    for start in range(0, n_distinct, INNER):
        rows = start + tl.arange(0, INNER)
        row_mask = rows < n_distinct
        row_class = tl.load(row_class_pointer + rows, mask=row_mask, other=0)
        summed = tl.load(
            summed_pointer + (rows.to(tl.int64) * n_classes)[None, :] + classes[:, None],
            mask=class_mask[:, None] & row_mask[None, :],
            other=0.0,
        )
        column_sums += tl.sum(summed, axis=1)
        weight = load_centred(
            weight_pointer, weight_stride, mean_pointer, row_class, row_mask, features, n_features, False
        )
        products = add_product(products, summed, weight, PRECISION)
    weight = load_centred(weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, False)
    gradient = column_sums[:, None] * weight - products
    row = tl.load(class_row_pointer + classes, mask=class_mask, other=-1)
    own_offset = (row * n_features)[:, None] + features[None, :]
    own_mask = (row >= 0)[:, None] & feature_mask[None, :]
    for split in range(n_splits):
        own = own_pointer + tl.cast(split, tl.int64) * n_rows * n_features
        gradient += tl.load(own + own_offset, mask=own_mask, other=0.0)
    tl.store(
        grad_weight_pointer + (classes.to(tl.int64) * n_features)[:, None] + features[None, :],
        gradient,
        mask=class_mask[:, None] & feature_mask[None, :],
    )


def weight_gradient(
    sample_grad: Tensor,
    slope: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    predicted: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
) -> Tensor:
    """Gradient by W of sum_i sample_grad_i L_i, where slope_i = dL_i/dD_i / (K_i + average_offset); (c, m) in W's
    dtype."""
    logits, weight = unit_stride(logits), unit_stride(head_weight)
    n_classes, n_features = weight.shape
    n_rows = table.shape[0]
    summed = segment_sum(
        table_row,
        n_rows,
        sample_grad.contiguous(),
        slope,
        logits,
        torch.empty_like(table),
        predicted=predicted,
        table=table,
    )
    mean = mean_row(weight)
    grad_weight = gradient_buffer(head_weight, (n_classes, n_features))
    tile = tile_config(target_of(weight))
    class_tiles, feature_tiles = cdiv(n_classes, tile.rows), cdiv(n_features, tile.columns)
    shape = {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "PRECISION": tile.precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if n_rows == n_classes:
        launch(
            weight_gradient_table_kernel,
            (class_tiles, feature_tiles),
            summed,
            weight,
            weight.stride(0),
            mean,
            grad_weight,
            n_classes,
            n_features,
            **shape,
        )
        return grad_weight.to(head_weight.dtype)

    row_tiles = cdiv(n_rows, tile.rows)
    split_classes = tile.inner * cdiv(
        n_classes, tile.inner * class_splits(row_tiles * feature_tiles, n_classes, tile.inner)
    )
    n_splits = cdiv(n_classes, split_classes)
    own = torch.empty(n_splits, n_rows, n_features, dtype=torch.float32, device=weight.device)
    launch(
        weight_gradient_own_kernel,
        (row_tiles, feature_tiles, n_splits),
        summed,
        row_class,
        weight,
        weight.stride(0),
        mean,
        own,
        n_rows,
        n_classes,
        n_features,
        split_classes,
        **shape,
    )
    is_used = row_class >= 0
    # Unused rows are written behind the last class, where nothing reads.
    class_row = torch.full((n_classes + 1,), -1, dtype=torch.int64, device=weight.device)
    class_row.scatter_(0, torch.where(is_used, row_class, n_classes), torch.arange(n_rows, device=weight.device))
    launch(
        weight_gradient_all_kernel,
        (class_tiles, feature_tiles),
        summed,
        row_class,
        is_used.sum(),
        class_row,
        weight,
        weight.stride(0),
        mean,
        own,
        grad_weight,
        n_rows,
        n_classes,
        n_features,
        n_splits,
        **shape,
    )
    return grad_weight.to(head_weight.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# What the package offers
# ----------------------------------------------------------------------------------------------------------------------


def boundary_distance_forward(
    logits: Tensor, head_weight: Tensor, average_offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean distance of each sample to the boundaries of its predicted class: see
    `ood_fast.functional.boundary_distance`.

    Returns distance, predicted, slope, table_row, table and row_class (notation: the package's docstring).
    """
    geometry = Geometry.of(logits, head_weight)
    logits = unit_stride(logits)
    n_samples, n_classes = logits.shape
    distance, slope = (torch.empty(n_samples, dtype=torch.float32, device=logits.device) for _ in range(2))
    config = row_config(n_classes, target_of(logits))
    launch(
        boundary_distance_forward_kernel,
        (n_samples,),
        logits,
        logits.stride(0),
        geometry.table,
        geometry.table_row,
        geometry.predicted,
        distance,
        slope,
        n_classes,
        float(average_offset),
        BLOCK=config.block,
        LOOPED=config.looped,
        ALIGN=alignment(n_classes, logits.stride(0)),
        PREDICTION_KNOWN=geometry.prediction_known,
        num_warps=config.num_warps,
    )
    return distance, geometry.predicted, slope, geometry.table_row, geometry.table, geometry.row_class


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
    """Gradients of sum_i sample_grad_i D_i by the logits and by the head weight, each None unless needed."""
    grad_logits = grad_weight = None
    if need_logits:
        rows = unit_stride(logits)
        n_samples, n_classes = rows.shape
        grad_logits = gradient_buffer(logits, (n_samples, n_classes))
        config = row_config(n_classes, target_of(logits))
        launch(
            boundary_distance_backward_kernel,
            (n_samples,),
            sample_grad.contiguous(),
            rows,
            rows.stride(0),
            table,
            table_row,
            predicted,
            slope,
            grad_logits,
            n_classes,
            BLOCK=config.block,
            LOOPED=config.looped,
            ALIGN=alignment(n_classes, rows.stride(0)),
            num_warps=config.num_warps,
        )
        grad_logits = grad_logits.to(logits.dtype)
    if need_weight:
        grad_weight = weight_gradient(sample_grad, slope, logits, head_weight, predicted, table_row, table, row_class)
    return grad_logits, grad_weight
