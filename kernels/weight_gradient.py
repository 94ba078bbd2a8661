"""The gradient by W through the distances: dW_p += sum_j S_pj (w_p - w_j), dW_j += S_pj (w_j - w_p).

Products serve nearly all tiles. Where rows are near to each other their difference is lost in a product, and where they
are very long or short S leaves the range: such pairs are alone (`distances.is_alone`), and flags tell which tiles of
the table hold one. A program that meets a flag works its pairs one by one, by their differences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry
from .distances import Kept, is_alone, kept_of, load_rows, predicted_rows, product_of
from .launch import Layout, StepLaunch, cdiv, class_splits, gradient_buffer, prepared
from .rows import add_split_product
from .segments import Segments, Upstream, gap_sum


@triton.jit
def _any_flag(flag_pointer, n_flags, stride):
    """Whether one of these flags is set."""
    found = tl.zeros([256], tl.float32)
    for start in range(0, n_flags, 256):
        index = start + tl.arange(0, 256)
        found = tl.maximum(found, tl.load(flag_pointer + index.to(tl.int64) * stride, mask=index < n_flags, other=0.0))
    return tl.max(found, axis=0)


@triton.jit
def _class_flag(flag_pointer, n_rows, n_classes, ROWS: tl.constexpr, FLAG_COLUMNS: tl.constexpr):
    """Whether a tile of the table with one of this program's classes is flagged; a tile of it has as many rows."""
    n_columns = tl.cdiv(n_classes, FLAG_COLUMNS)
    found = 0.0
    for part in tl.static_range(ROWS // FLAG_COLUMNS):
        column = tl.program_id(0) * ROWS // FLAG_COLUMNS + part
        n_flags = tl.where(column < n_columns, tl.cdiv(n_rows, ROWS), 0)
        found += _any_flag(flag_pointer + column, n_flags, n_columns)
    return found


@triton.jit
def _pull(force, inverse_distance, difference):
    """S (w_p - w_j), S = force R; for a pair that is not alone, S = force."""
    near = tl.where(is_alone(inverse_distance) == 1, inverse_distance, 1.0)
    return force[:, None] * (near[:, None] * difference)


@triton.jit
def _rows(weight_pointer, weight_stride, classes, mask, features, n_features):
    """Rows of W in fp32, with nothing taken from them."""
    return load_rows(weight_pointer, weight_stride, None, classes, mask, features, n_features, True)


@triton.jit
def _places(row_class_pointer, left_pointer, rows, mask):
    """Where among the `predicted_rows` those of the table are."""
    if left_pointer is None:
        return tl.load(row_class_pointer + rows, mask=mask, other=0)
    else:
        return rows


@triton.jit
def weight_gradient_table_kernel(
    summed_pointer,  # (c, c) S, its rows padded by zeros
    table_pointer,  # (c, c) R
    flag_pointer,  # (row tiles, class tiles) of the table
    weight_pointer,  # (c, m)
    origin_pointer,  # (m,) fp32, or None
    grad_weight_pointer,  # (c, m) contiguous: written
    summed_stride,
    weight_stride,
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FLAG_COLUMNS: tl.constexpr,
    APART: tl.constexpr,
):
    """n >= c: a tile of dW = rowsum(M) W - M W, M = S + S^T formed as it is loaded. One product instead of two.

    Rows of S^T lie across the warps, so that row sums of M in each turn would cost barriers: entry by entry until the
    end. Rows behind the last class read it again, and are not stored: a mask would take the registers that keep the
    sums.
    """
    classes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    class_mask = classes < n_classes
    class_offset = classes.to(tl.int64)
    n_columns = tl.cdiv(n_classes, FLAG_COLUMNS)
    flag = _any_flag(flag_pointer + tl.program_id(0) * n_columns, n_columns, 1)
    flag += _class_flag(flag_pointer, n_classes, n_classes, ROWS, FLAG_COLUMNS)
    if flag > 0:
        gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
        ours = _rows(weight_pointer, weight_stride, classes, class_mask, features, n_features)
        for other in range(n_classes):
            place = tl.cast(other, tl.int64)
            row = tl.load(weight_pointer + place * weight_stride + features, mask=features < n_features, other=0.0)
            difference = ours - row.to(tl.float32)[None, :]
            force = tl.load(summed_pointer + class_offset * summed_stride + other, mask=class_mask, other=0.0)
            near = tl.load(table_pointer + class_offset * n_classes + other, mask=class_mask, other=0.0)
            gradient += _pull(force, near, difference)
            force = tl.load(summed_pointer + place * summed_stride + classes, mask=class_mask, other=0.0)
            near = tl.load(table_pointer + place * n_classes + classes, mask=class_mask, other=0.0)
            gradient += _pull(force, near, difference)
    else:
        read_offset = tl.minimum(classes, n_classes - 1).to(tl.int64)
        sums = tl.zeros([ROWS, INNER], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, n_classes, INNER):
            others = start + tl.arange(0, INNER)
            other_mask = others < n_classes
            other_offset = others.to(tl.int64)
            pairs = tl.load(
                summed_pointer + (read_offset * summed_stride)[:, None] + others[None, :],
                mask=(others < summed_stride)[None, :],
                other=0.0,
            ) + tl.load(
                summed_pointer + (other_offset * summed_stride)[None, :] + classes[:, None],
                mask=other_mask[None, :] & (classes < summed_stride)[:, None],
                other=0.0,
            )
            sums += pairs
            weight = load_rows(
                weight_pointer, weight_stride, origin_pointer, others, other_mask, features, n_features, UPCAST
            )
            products = add_split_product(products, pairs, weight, PRECISION, APART)
        weight = load_rows(
            weight_pointer, weight_stride, origin_pointer, classes, class_mask, features, n_features, UPCAST
        )
        gradient = tl.sum(sums, axis=1)[:, None] * weight.to(tl.float32) - products
    tl.store(
        grad_weight_pointer + (class_offset * n_features)[:, None] + features[None, :],
        gradient,
        mask=class_mask[:, None] & (features < n_features)[None, :],
    )


@triton.jit(do_not_specialize=["n_rows", "split_classes"])
def weight_gradient_own_kernel(
    summed_pointer,  # (k, c) S, its rows padded by zeros
    table_pointer,  # (k, c) R
    flag_pointer,  # (row tiles, class tiles) of the table
    row_class_pointer,  # (k,) int64
    n_distinct_pointer,  # () int64: how many table rows are in use
    weight_pointer,  # (c, m)
    left_pointer,  # (k, m) contiguous: w_p of each table row; None: they are among the rows of W
    origin_pointer,  # (m,) fp32, or None
    own_pointer,  # (splits, k, m) fp32: written
    summed_stride,
    weight_stride,
    n_rows,
    n_classes,
    n_features,
    split_classes,  # classes of a split, a multiple of INNER
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FLAG_COLUMNS: tl.constexpr,
    APART: tl.constexpr,
):
    """n < c, the rows of the distinct predictions: rowsum(S) W[u] - S W, over one split of the classes. Rows behind the
    last read it again, as in `weight_gradient_table_kernel`."""
    features = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    n_distinct = tl.load(n_distinct_pointer)
    if tl.program_id(0) * ROWS < n_distinct:
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row_mask = rows < n_distinct
        row_offset = rows.to(tl.int64)
        split_classes = split_classes // INNER * INNER  # which tells the compiler: loads are 128 bits wide
        begin = split * split_classes
        end = tl.minimum(begin + split_classes, n_classes)
        n_columns = tl.cdiv(n_classes, FLAG_COLUMNS)
        source, source_stride = predicted_rows(left_pointer, weight_pointer, weight_stride, n_features)
        if _any_flag(flag_pointer + tl.program_id(0) * n_columns, n_columns, 1) > 0:
            own = tl.zeros([ROWS, COLUMNS], tl.float32)
            places = _places(row_class_pointer, left_pointer, rows, row_mask)
            ours = _rows(source, source_stride, places, row_mask, features, n_features)
            for other in range(begin, end):
                row = weight_pointer + tl.cast(other, tl.int64) * weight_stride + features
                difference = ours - tl.load(row, mask=features < n_features, other=0.0).to(tl.float32)[None, :]
                force = tl.load(summed_pointer + row_offset * summed_stride + other, mask=row_mask, other=0.0)
                near = tl.load(table_pointer + row_offset * n_classes + other, mask=row_mask, other=0.0)
                own += _pull(force, near, difference)
        else:
            read_offset = tl.minimum(rows, n_rows - 1).to(tl.int64)
            row_sums = tl.zeros([ROWS], tl.float32)
            products = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(begin, end, INNER):
                classes = start + tl.arange(0, INNER)
                class_mask = classes < n_classes
                summed = tl.load(
                    summed_pointer + (read_offset * summed_stride)[:, None] + classes[None, :],
                    mask=(classes < summed_stride)[None, :],
                    other=0.0,
                )
                row_sums += tl.sum(summed, axis=1)
                weight = load_rows(
                    weight_pointer, weight_stride, origin_pointer, classes, class_mask, features, n_features, UPCAST
                )
                products = add_split_product(products, summed, weight, PRECISION, APART)
            # Without a mask, as S: rows behind the last read another one. Names of their own: the branches join none.
            own_places = _places(row_class_pointer, left_pointer, read_offset, row_mask)
            mine = load_rows(source, source_stride, origin_pointer, own_places, None, features, n_features, UPCAST)
            own = row_sums[:, None] * mine.to(tl.float32) - products
        tl.store(
            own_pointer + ((split * tl.cast(n_rows, tl.int64) + row_offset) * n_features)[:, None] + features[None, :],
            own,
            mask=row_mask[:, None] & (features < n_features)[None, :],
        )


@triton.jit(do_not_specialize=["n_rows", "n_splits", "n_halvings"])
def weight_gradient_all_kernel(
    summed_pointer,  # (k, c) S, its rows padded by zeros
    table_pointer,  # (k, c) R
    flag_pointer,  # (row tiles, class tiles) of the table
    row_class_pointer,  # (k,) int64
    n_distinct_pointer,  # () int64: how many table rows are in use
    weight_pointer,  # (c, m)
    left_pointer,  # (k, m) contiguous: w_p of each table row; None: they are among the rows of W
    origin_pointer,  # (m,) fp32, or None
    own_pointer,  # (splits, k, m) fp32
    grad_weight_pointer,  # (c, m) contiguous: written
    summed_stride,
    weight_stride,
    n_rows,
    n_classes,
    n_features,
    n_splits,
    n_halvings,  # of n_rows, to 0
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FLAG_COLUMNS: tl.constexpr,
    APART: tl.constexpr,
):
    """n < c, a tile of all classes: dW = colsum(S) W - S^T W[u], plus what `weight_gradient_own_kernel` found for
    the classes that were predicted, unless its splits are 0. dW is written once, and rounded once."""
    classes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    class_mask = classes < n_classes
    feature_mask = features < n_features
    n_distinct = tl.load(n_distinct_pointer)
    source, source_stride = predicted_rows(left_pointer, weight_pointer, weight_stride, n_features)
    if _class_flag(flag_pointer, n_rows, n_classes, ROWS, FLAG_COLUMNS) > 0:
        gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
        ours = _rows(weight_pointer, weight_stride, classes, class_mask, features, n_features)
        for other in range(n_distinct):
            place = tl.cast(other, tl.int64)
            row = source + _places(row_class_pointer, left_pointer, place, other < n_distinct) * source_stride
            difference = ours - tl.load(row + features, mask=feature_mask, other=0.0).to(tl.float32)[None, :]
            force = tl.load(summed_pointer + place * summed_stride + classes, mask=class_mask, other=0.0)
            near = tl.load(table_pointer + place * n_classes + classes, mask=class_mask, other=0.0)
            gradient += _pull(force, near, difference)
    else:
        column_sums = tl.zeros([ROWS], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, n_distinct, INNER):
            rows = start + tl.arange(0, INNER)
            row_mask = rows < n_distinct
            places = _places(row_class_pointer, left_pointer, rows, row_mask)
            summed = tl.load(
                summed_pointer + (rows.to(tl.int64) * summed_stride)[None, :] + classes[:, None],
                mask=(classes < summed_stride)[:, None] & row_mask[None, :],
                other=0.0,
            )
            column_sums += tl.sum(summed, axis=1)
            weight = load_rows(source, source_stride, origin_pointer, places, row_mask, features, n_features, UPCAST)
            products = add_split_product(products, summed, weight, PRECISION, APART)
        weight = load_rows(
            weight_pointer, weight_stride, origin_pointer, classes, class_mask, features, n_features, UPCAST
        )
        gradient = column_sums[:, None] * weight.to(tl.float32) - products
    # The table row of each class: the classes in `row_class` ascend.
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + n_distinct.to(tl.int32)
    for _ in range(n_halvings):
        middle = (low + high) // 2
        below = tl.load(row_class_pointer + middle, mask=low < high, other=n_classes) < classes
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    found = tl.load(row_class_pointer + low, mask=low < n_distinct, other=-1) == classes
    row = tl.where(found & class_mask, low, -1).to(tl.int64)
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
    layout: Layout,
    segments: Segments,
    weight: Tensor,
    predicted: Tensor,
    geometry: Geometry,
    kept: Kept | None = None,
    upstream: Upstream | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient by W of sum_i sample_grad_i L_i, where slope_i = dL_i/dD_i / (K_i + average_offset); (c, m) in W's
    dtype, or in `dtype`. `segments`: the table rows, sample_grad, slope and logits."""
    dtype = dtype or weight.dtype
    table = geometry.table
    summed = gap_sum(layout, segments, predicted, table, upstream)
    kept = kept or kept_of(layout, geometry, weight)
    grad_weight = gradient_buffer(weight, weight.shape, dtype)
    if layout.by_row:
        pull_rows(layout, summed, geometry, kept, weight, None, grad_weight)
    else:
        _of_table(layout, grad_weight.dtype)(summed, table, kept.flags, weight, kept.origin, grad_weight)
    return grad_weight if grad_weight.dtype == dtype else grad_weight.to(dtype)


def pull_rows(
    layout: Layout,
    summed: Tensor,
    geometry: Geometry,
    kept: Kept,
    weight: Tensor,
    left: Tensor | None,
    grad_weight: Tensor,
) -> Tensor:
    """dW of all classes, written, from S with a row for each distinct prediction. What the classes make of these is
    returned, (splits, k, m), and is in dW, too, unless their rows are given as `left` (k, m)."""
    _, table, row_class = geometry
    origin, flags, n_distinct = kept
    n_splits, of_own, of_all = _of_rows(layout, grad_weight.dtype)
    own = torch.empty(n_splits, layout.n_rows, weight.shape[1], dtype=torch.float32, device=weight.device)
    of_own(summed, table, flags, row_class, n_distinct, weight, left, origin, own)
    of_all(summed, table, flags, row_class, n_distinct, weight, left, origin, own, grad_weight)
    return own


@prepared
def _of_table(layout: Layout, _: torch.dtype) -> StepLaunch:
    """n >= c, for a gradient of that dtype."""
    narrow, _ = product_of(layout.target, layout.weight_dtype)  # the tiles of the table, and of its flags
    tile, constants = product_of(layout.target, layout.weight_dtype, 128)
    (n_classes, n_features), stride = layout.weight_shape, layout.weight_stride
    return StepLaunch(
        weight_gradient_table_kernel, (cdiv(n_classes, tile.rows), cdiv(n_features, tile.columns)), layout.width,
        stride, n_classes, n_features, **constants, FLAG_COLUMNS=narrow.columns, APART=_apart(layout),
    )  # fmt: skip


@prepared
def _of_rows(layout: Layout, _: torch.dtype) -> tuple[int, StepLaunch, StepLaunch]:
    """n < c, for a gradient of that dtype: the number of splits, and both kernels."""
    (n_classes, n_features), n_rows = layout.weight_shape, layout.n_rows
    tile, constants = product_of(layout.target, layout.weight_dtype, 128)
    row_tiles, feature_tiles = cdiv(n_rows, tile.rows), cdiv(n_features, tile.columns)
    splits = class_splits(row_tiles * feature_tiles, n_classes, tile.inner)
    split_classes = tile.inner * cdiv(n_classes, tile.inner * splits)
    n_splits = cdiv(n_classes, split_classes)
    numbers = layout.width, layout.weight_stride, n_rows, n_classes, n_features
    constants = {**constants, "FLAG_COLUMNS": tile.columns, "APART": _apart(layout)}
    own_grid, all_grid = (row_tiles, feature_tiles, n_splits), (cdiv(n_classes, tile.rows), feature_tiles)
    added = (0, 0) if layout.is_shard else (n_splits, n_rows.bit_length())
    return (
        n_splits,
        StepLaunch(weight_gradient_own_kernel, own_grid, *numbers, split_classes, **constants),
        StepLaunch(weight_gradient_all_kernel, all_grid, *numbers, *added, **constants),
    )


def _apart(layout: Layout) -> bool:
    """How S is split: on gfx942 the other way takes fewer registers."""
    return layout.target != "hip"
