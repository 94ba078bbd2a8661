"""The table R of inverse distances between rows of W, and which row of it each sample needs.

    R_pj = 1 / |w_p - w_j|        0 at j = p and where the rows coincide

Nothing of shape (c, c, m) is formed, and the number of products is that of the smaller side: n >= c has a table of
all classes, n < c a table of the distinct predictions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry
from .launch import alignment, cdiv, difference_config, launch, scan_config, target_of, tile_config, unit_stride
from .rows import add_product, scan_maximum

# The Gram form of s has an error of up to 1e-6 (|w_p|^2 + |w_j|^2), from rounding m products (README.md, section 2).
# At a share of 1/64 of the norms that is 6e-5 of s and 3e-5 of R, under the 1e-4 that D is held to. Closer pairs are
# recomputed; heads that have learnt have few, because rows of unrelated classes have s near |w_p|^2 + |w_j|^2.
CLOSE_PAIR = tl.constexpr(1 / 64)
# The smallest normal float32: GPUs take the root of less as that of 0. Rows less than 1.1e-19 apart coincide.
SMALLEST_SQUARE = tl.constexpr(2.0**-126)


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
    classes = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # axis x: the others end at 65,535
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
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
    classes = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # axis x: the others end at 65,535
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
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
            is_apart = squared_distance >= SMALLEST_SQUARE
            inverse_distance = tl.where(is_apart, tl.rsqrt(tl.where(is_apart, squared_distance, 1.0)), 0.0)
            tl.store(table_pointer + offsets, inverse_distance, mask=is_close)


def geometry_of(logits: Tensor, head_weight: Tensor) -> tuple[Geometry, Tensor, bool]:
    """(the table R for a batch, the predictions, whether these are known).

    For n >= c the row kernels find them, and write both `predicted` and `table_row`, which are the same.
    """
    n_samples, n_classes = logits.shape
    predicted = torch.empty(n_samples, dtype=torch.int64, device=logits.device)
    if n_samples >= n_classes:
        row_class = torch.arange(n_classes, device=logits.device)
        return (
            Geometry(torch.empty_like(predicted), distance_table(head_weight, row_class), row_class),
            predicted,
            False,
        )
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
    return Geometry(table_row, distance_table(head_weight, row_class), row_class), predicted, True


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
        (cdiv(n_classes, tile.columns), cdiv(n_rows, tile.rows)),
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
        (cdiv(n_classes, tile.columns), cdiv(n_rows, tile.rows)),
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
