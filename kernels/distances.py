"""The table R of inverse distances between rows of W, and which row of it each sample needs.

    R_pj = 1 / |w_p - w_j|        0 at j = p and where the rows coincide

Nothing of shape (c, c, m) is formed, and the number of products is that of the smaller side: n >= c has a table of
all classes, n < c a table of the distinct predictions.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry
from .launch import (
    Layout,
    StepLaunch,
    TileConfig,
    cdiv,
    launch,
    prepared,
    tile_config,
)
from .rows import add_product

# The Gram form of s has an error of up to 1e-6 (|w_p|^2 + |w_j|^2), from rounding m products (README.md, section 2).
# At a share of 1/64 of the norms that is 6e-5 of s and 3e-5 of R, under the 1e-4 that D is held to. Closer pairs are
# recomputed; heads that have learnt have few, because rows of unrelated classes have s near |w_p|^2 + |w_j|^2.
CLOSE_PAIR = tl.constexpr(1 / 64)
# Squares between these, and cubes of their roots, keep all digits in float32; others are recomputed likewise.
LARGE_SQUARE = tl.constexpr(2.0**40)
SMALL_SQUARE = tl.constexpr(2.0**-40)
# The smallest normal float32: GPUs take less as 0. Rows of which no entry is further apart coincide.
SMALLEST = tl.constexpr(2.0**-126)
# Rows of W whose median is the origin: as many as three medians of three have.
SAMPLED_ROWS = tl.constexpr(9)
# Features of a turn of the programs that find the origin.
ORIGIN_BLOCK = 512


@triton.jit
def load_rows(weight_pointer, weight_stride, origin_pointer, classes, mask, features, n_features, UPCAST: tl.constexpr):
    """Rows of W (classes, features), 0 outside the mask, if there is one: less the origin, in fp32, where one is given.

    Differences of rows do not change when one is subtracted from all, but fp32 products of the rest lose far
    fewer digits. Without one the dtype stays, for a product that is exact; UPCAST: fp32, for the interpreter.
    """
    inside = (features < n_features)[None, :]
    if mask is not None:
        inside = mask[:, None] & inside
    places = weight_pointer + (classes.to(tl.int64) * weight_stride)[:, None] + features[None, :]
    weight = tl.load(places, mask=inside, other=0.0)
    if origin_pointer is not None:
        origin = tl.load(origin_pointer + features, mask=features < n_features, other=0.0)
        return tl.where(inside, weight.to(tl.float32) - origin[None, :], 0.0)
    elif UPCAST:
        return weight.to(tl.float32)
    else:
        return weight


@triton.jit
def load_columns(weight_pointer, weight_stride, origin_pointer, classes, features, n_features, UPCAST: tl.constexpr):
    """The transpose of `load_rows` without a mask, (features, classes)."""
    inside = (features < n_features)[:, None]
    places = weight_pointer + (classes.to(tl.int64) * weight_stride)[None, :] + features[:, None]
    weight = tl.load(places, mask=inside, other=0.0)
    if origin_pointer is not None:
        origin = tl.load(origin_pointer + features, mask=features < n_features, other=0.0)
        return tl.where(inside, weight.to(tl.float32) - origin[:, None], 0.0)
    elif UPCAST:
        return weight.to(tl.float32)
    else:
        return weight


@triton.jit
def _sampled_median(weight_pointer, weight_stride, n_classes, features, mask, FIRST: tl.constexpr):
    """The median, entry by entry, of three of the sampled rows."""
    a = weight_pointer + tl.cast(n_classes * FIRST // SAMPLED_ROWS, tl.int64) * weight_stride
    b = weight_pointer + tl.cast(n_classes * (FIRST + 1) // SAMPLED_ROWS, tl.int64) * weight_stride
    c = weight_pointer + tl.cast(n_classes * (FIRST + 2) // SAMPLED_ROWS, tl.int64) * weight_stride
    return _median(
        tl.load(a + features, mask=mask, other=0.0).to(tl.float32),
        tl.load(b + features, mask=mask, other=0.0).to(tl.float32),
        tl.load(c + features, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _median(a, b, c):
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def write_origin(
    weight_pointer, weight_stride, origin_pointer, start, n_classes, n_features, ORIGIN_BLOCK: tl.constexpr
):
    """The origin of some features: a row near to most rows, however long a few of them are."""
    features = start + tl.arange(0, ORIGIN_BLOCK)
    mask = features < n_features
    origin = _median(
        _sampled_median(weight_pointer, weight_stride, n_classes, features, mask, 0),
        _sampled_median(weight_pointer, weight_stride, n_classes, features, mask, 3),
        _sampled_median(weight_pointer, weight_stride, n_classes, features, mask, 6),
    )
    tl.store(origin_pointer + features, origin, mask=mask)


@triton.jit
def origin_kernel(
    weight_pointer,  # (c, m)
    weight_stride,
    origin_pointer,  # (m,) fp32: written
    n_classes,
    n_features,
    ORIGIN_BLOCK: tl.constexpr,
):
    """The origin alone, for a gradient whose table was made before."""
    start = tl.program_id(0) * ORIGIN_BLOCK
    write_origin(weight_pointer, weight_stride, origin_pointer, start, n_classes, n_features, ORIGIN_BLOCK)


@triton.jit
def with_last_bit(inverse_distance, BIT: tl.constexpr):
    """R with its last bit set where the pair is to be worked by differences in the gradient of W as well
    (`is_alone`), and without it elsewhere: half a rounding error, and no second table."""
    bits = inverse_distance.to(tl.int32, bitcast=True)
    return ((bits & -2) | BIT).to(tl.float32, bitcast=True)


@triton.jit
def is_alone(inverse_distance):
    """1 for a pair that no product serves: close, or of rows whose squares or cubes would leave the range."""
    return inverse_distance.to(tl.int32, bitcast=True) & 1


@triton.jit
def table_classes(row_class_pointer, left_pointer, rows, n_rows):
    """(the class of each table row, where among the `predicted_rows` it is, whether there is one)."""
    inside = rows < n_rows
    if row_class_pointer is None:
        return rows, rows.to(tl.int64), inside
    else:
        row_class = tl.load(row_class_pointer + rows, mask=inside, other=-1)
        if left_pointer is None:
            return row_class, row_class, row_class >= 0
        else:
            return row_class, rows.to(tl.int64), inside


@triton.jit
def predicted_rows(left_pointer, weight_pointer, weight_stride, n_features):
    """(pointer, stride) of the rows w_p: those of `left` (u, m), contiguous, or of W where it is None."""
    if left_pointer is None:
        return weight_pointer, weight_stride
    else:
        return left_pointer, n_features


@triton.jit
def refine_tile(
    weight_pointer,
    weight_stride,
    left_pointer,
    row_class_pointer,
    table_pointer,
    n_rows,
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Replace the entries of -1 in a tile of R, 32 x 32 at a time: the products have the registers."""
    source, source_stride = predicted_rows(left_pointer, weight_pointer, weight_stride, n_features)
    PARTS: tl.constexpr = COLUMNS // 32
    for part in range(ROWS // 32 * PARTS):
        rows = tl.program_id(1) * ROWS + part // PARTS * 32 + tl.arange(0, 32)
        classes = tl.program_id(0) * COLUMNS + part % PARTS * 32 + tl.arange(0, 32)
        _, place, row_mask = table_classes(row_class_pointer, left_pointer, rows, n_rows)
        class_mask = classes < n_classes
        places = table_pointer + rows.to(tl.int64)[:, None] * n_classes + classes[None, :]
        is_close = tl.load(places, mask=row_mask[:, None] & class_mask[None, :], other=0.0) < 0
        if tl.max(tl.max(is_close.to(tl.int32), axis=1), axis=0) > 0:
            largest = tl.zeros([32, 32], tl.float32)
            row_place = source + place * source_stride
            class_place = weight_pointer + classes.to(tl.int64) * weight_stride
            for feature in range(n_features):
                a = tl.load(row_place + feature, mask=row_mask, other=0.0).to(tl.float32)
                b = tl.load(class_place + feature, mask=class_mask, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.abs(a[:, None] - b[None, :]))
            is_apart = largest >= SMALLEST
            # Squares of what has the size 1 stay in range, however long the rows are.
            inverse_size = 1.0 / tl.where(is_apart, largest, 1.0)
            squared_distance = tl.zeros([32, 32], tl.float32)
            for feature in range(n_features):
                a = tl.load(row_place + feature, mask=row_mask, other=0.0).to(tl.float32)
                b = tl.load(class_place + feature, mask=class_mask, other=0.0).to(tl.float32)
                difference = (a[:, None] - b[None, :]) * inverse_size
                squared_distance += difference * difference
            inverse_distance = tl.rsqrt(tl.where(is_apart, squared_distance, 1.0)) * inverse_size
            inverse_distance = with_last_bit(inverse_distance, 1)
            tl.store(places, tl.where(is_apart, inverse_distance, 0.0), mask=is_close)


@triton.jit
def _bound(norms):
    """The part of each side, with |a|^2, of the bound up to which a pair is close: infinite where squares may leave the
    range."""
    return tl.where(norms > 0.5 * LARGE_SQUARE, float("inf"), tl.maximum(norms * CLOSE_PAIR, 0.5 * SMALL_SQUARE))


@triton.jit(do_not_specialize=["n_rows"])
def distance_gram_kernel(
    weight_pointer,  # (c, m)
    left_pointer,  # (k, m) contiguous: w_p of each table row; None: they are among the rows of W
    origin_pointer,  # (m,) fp32: the origin, written; None: the rows are multiplied as they are
    norm_pointer,  # (c,) fp32 |w_j|, and (k,) of `left` behind them, read where there is no origin
    row_class_pointer,  # (k,) int64: the class of each table row, -1 for none; None: row r is class r
    table_pointer,  # (k, c) fp32: written
    flag_pointer,  # (row tiles, class tiles) fp32, or None: whether a tile has a pair that is alone, written
    weight_stride,
    n_rows,
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ORIGIN_BLOCK: tl.constexpr,
):
    """A tile of R from s = |a|^2 + |b|^2 - 2 a.b, and from sum (w_p - w_j)^2 where that is too small (CLOSE_PAIR), or
    squares would leave the range.

    Differences of neighbouring floats are exact, so equal rows have s = 0 (no boundary: R = 0) and rows 1e-4 apart keep
    all their digits. bf16 rows are not centred: their products are exact, and a common offset only makes more pairs
    close. Each program finds the origin for itself, and all of them write the same.
    """
    classes = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # axis x: the others end at 65,535
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    class_mask = classes < n_classes
    row_class, place, row_mask = table_classes(row_class_pointer, left_pointer, rows, n_rows)
    inverse_distance = tl.zeros([ROWS, COLUMNS], tl.float32)  # of rows that nobody uses: two runs give the same bits
    any_close = 0
    if tl.max(row_mask.to(tl.int32), axis=0) > 0:
        if origin_pointer is not None:
            for start in range(0, n_features, ORIGIN_BLOCK):
                write_origin(weight_pointer, weight_stride, origin_pointer, start, n_classes, n_features, ORIGIN_BLOCK)
            tl.debug_barrier()
        # What is not there is another row of W, read instead of a mask each turn, and left out in the end.
        source, source_stride = predicted_rows(left_pointer, weight_pointer, weight_stride, n_features)
        read_rows = tl.where(row_mask, place, 0)
        read_columns = tl.minimum(classes, n_classes - 1)
        row_norms = tl.zeros([ROWS], tl.float32)
        class_norms = tl.zeros([COLUMNS], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, n_features, INNER):
            features = start + tl.arange(0, INNER)
            a = load_rows(source, source_stride, origin_pointer, read_rows, None, features, n_features, UPCAST)
            b = load_columns(weight_pointer, weight_stride, origin_pointer, read_columns, features, n_features, UPCAST)
            if origin_pointer is not None:
                row_norms += tl.sum(a * a, axis=1)
                class_norms += tl.sum(b * b, axis=0)
            products = add_product(products, a, b, PRECISION)
        if origin_pointer is None:
            if left_pointer is not None:
                place += n_classes
            row_norms = tl.load(norm_pointer + place, mask=row_mask, other=0.0)
            class_norms = tl.load(norm_pointer + classes, mask=class_mask, other=0.0)
            row_norms *= row_norms
            class_norms *= class_norms
        # A row that is not there is far from all: s = inf, R = 0.
        row_bound = tl.where(row_mask, _bound(row_norms), float("-inf"))
        row_norms = tl.where(row_mask, row_norms, float("inf"))
        squared_distance = row_norms[:, None] + class_norms[None, :] - 2.0 * products
        is_close = squared_distance <= row_bound[:, None] + _bound(class_norms)[None, :]
        own = row_class.to(tl.int32)[:, None] == classes[None, :]
        # 1 where it will not be used, so that no root of a negative rounding error is taken
        inverse_distance = with_last_bit(tl.rsqrt(tl.where(is_close, 1.0, squared_distance)), 0)
        inverse_distance = tl.where(own, 0.0, tl.where(is_close, -1.0, inverse_distance))
        is_close = is_close & (own == 0) & class_mask[None, :]
        any_close = tl.max(tl.max(is_close.to(tl.int32), axis=1), axis=0)
    places = table_pointer + rows.to(tl.int64)[:, None] * n_classes + classes[None, :]
    tl.store(places, inverse_distance, mask=(rows < n_rows)[:, None] & class_mask[None, :])
    if flag_pointer is not None:
        tl.store(flag_pointer + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), any_close)
    if any_close > 0:
        tl.debug_barrier()
        refine_tile(
            weight_pointer,
            weight_stride,
            left_pointer,
            row_class_pointer,
            table_pointer,
            n_rows,
            n_classes,
            n_features,
            ROWS,
            COLUMNS,
        )


@triton.jit(do_not_specialize=["n_rows"])
def flag_kernel(
    table_pointer,  # (k, c)
    flag_pointer,  # (row tiles, class tiles) fp32: written
    n_rows,
    n_classes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The flags alone, for a gradient whose table was made before."""
    classes = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    places = table_pointer + rows.to(tl.int64)[:, None] * n_classes + classes[None, :]
    table = tl.load(places, mask=(rows < n_rows)[:, None] & (classes < n_classes)[None, :], other=0.0)
    any_alone = tl.max(tl.max(is_alone(table), axis=1), axis=0)
    tl.store(flag_pointer + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), any_alone)


class Kept(NamedTuple):
    """What the gradient of W needs beside the table."""

    origin: Tensor | None = None
    """(m,) fp32; None: rows are multiplied as they are"""
    flags: Tensor | None = None
    """(row tiles, class tiles) fp32, of `distance_gram_kernel`"""
    n_distinct: Tensor | None = None
    """() int64, for n < c"""


@functools.cache
def product_of(target: str, dtype: torch.dtype, columns: int = 64) -> tuple[TileConfig, dict[str, Any]]:
    """How rows of W are multiplied: the tile, and what it is to a kernel. bf16 rows are multiplied as they are, which
    is exact; others in fp32, less an origin."""
    tile = tile_config(target, dtype == torch.bfloat16, columns)
    constants = {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "PRECISION": tile.precision,
        "UPCAST": target == "interpreter",  # which multiplies bf16 as if it were an integer
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return tile, constants


@prepared
def _tile(layout: Layout) -> tuple[TileConfig, dict[str, Any], tuple[int, int]]:
    """`product_of` the table, and the grid of its tiles."""
    tile, constants = product_of(layout.target, layout.weight_dtype, 128 if layout.by_row else 64)
    return tile, constants, (cdiv(layout.n_classes, tile.columns), cdiv(layout.n_rows, tile.rows))


def kept_sizes(layout: Layout) -> tuple[int, int]:
    """Numbers of fp32 that the origin and the flags take."""
    return layout.weight_shape[1] if layout.weight_dtype != torch.bfloat16 else 0, math.prod(_tile(layout)[2])


def kept_of(layout: Layout, geometry: Geometry, weight: Tensor) -> Kept:
    """What `distance_table` left when it made this table."""
    _, table, row_class = geometry
    n_features = weight.shape[1]
    tile, _, grid = _tile(layout)
    origin, flags = None, torch.empty(grid[::-1], dtype=torch.float32, device=table.device)
    launch(flag_kernel, grid, table, flags, *table.shape, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=8)
    if weight.dtype != torch.bfloat16:
        origin = torch.empty(n_features, dtype=torch.float32, device=table.device)
        launch(
            origin_kernel, (cdiv(n_features, ORIGIN_BLOCK),), weight, weight.stride(0), origin, weight.shape[0],
            n_features, ORIGIN_BLOCK=ORIGIN_BLOCK, num_warps=4,
        )  # fmt: skip
    return Kept(origin, flags, (row_class >= 0).sum() if layout.by_row else None)


def distance_table(
    layout: Layout,
    weight: Tensor,
    row_class: Tensor | None,
    kept: Kept = Kept(),  # noqa: B008
    left: Tensor | None = None,
) -> Tensor:
    """R (k, c) fp32 between the classes in `row_class` (None: all) and all classes; 0 in rows of class -1.

    `kept`: where origin and flags are left. `left` (k, m), in the dtype of W: the rows of these classes, where those of
    class -1 are not in W.
    """
    new = {"dtype": torch.float32, "device": weight.device}
    table = torch.empty(layout.n_rows, layout.n_classes, **new)
    norms, origin = None, kept.origin
    if weight.dtype == torch.bfloat16:
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        if left is not None:
            norms = torch.cat([norms, torch.linalg.vector_norm(left, dim=1, dtype=torch.float32)])
    elif origin is None:
        origin = torch.empty(weight.shape[1], **new)
    _gram(layout)(weight, left, origin, norms, row_class, table, kept.flags)
    return table


@prepared
def _gram(layout: Layout) -> StepLaunch:
    _, constants, grid = _tile(layout)
    numbers = layout.weight_stride, layout.n_rows, *layout.weight_shape
    return StepLaunch(distance_gram_kernel, grid, *numbers, **constants, ORIGIN_BLOCK=ORIGIN_BLOCK)
