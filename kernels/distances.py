"""The table R of inverse distances between rows of W, and which row of it each sample needs.

    R_pj = 1 / |w_p - w_j|        0 at j = p and where the rows coincide

Nothing of shape (c, c, m) is formed, and the number of products is that of the smaller side: n >= c has a table of
all classes, n < c a table of the distinct predictions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry
from .launch import TileConfig, alignment, cdiv, launch, scan_config, target_of, tile_config, unit_stride
from .rows import add_product, scan_maximum

# The Gram form of s has an error of up to 1e-6 (|w_p|^2 + |w_j|^2), from rounding m products (README.md, section 2).
# At a share of 1/64 of the norms that is 6e-5 of s and 3e-5 of R, under the 1e-4 that D is held to. Closer pairs are
# recomputed; heads that have learnt have few, because rows of unrelated classes have s near |w_p|^2 + |w_j|^2.
CLOSE_PAIR = tl.constexpr(1 / 64)
# Squares between these, and their sums and products, keep all digits in float32; others are recomputed likewise.
LARGE_SQUARE = tl.constexpr(2.0**80)
SMALL_SQUARE = tl.constexpr(2.0**-80)
# The smallest normal float32: GPUs take less as 0. Rows of which no entry is further apart coincide.
SMALLEST = tl.constexpr(2.0**-126)
# Rows of W whose median is the origin.
SAMPLED_ROWS = 31


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
def load_rows(weight_pointer, weight_stride, mean_pointer, classes, mask, features, n_features, UPCAST: tl.constexpr):
    """Rows of W (classes, features), 0 outside the matrix: less the origin, in fp32, where one is given.

    Differences of rows do not change when one is subtracted from all, but fp32 products of the rest lose far
    fewer digits. Without one the dtype stays, for a product that is exact; UPCAST: fp32, for the interpreter.
    """
    inside = mask[:, None] & (features < n_features)[None, :]
    places = weight_pointer + (classes.to(tl.int64) * weight_stride)[:, None] + features[None, :]
    weight = tl.load(places, mask=inside, other=0.0)
    if mean_pointer is not None:
        mean = tl.load(mean_pointer + features, mask=features < n_features, other=0.0)
        return tl.where(inside, weight.to(tl.float32) - mean[None, :], 0.0)
    elif UPCAST:
        return weight.to(tl.float32)
    else:
        return weight


@triton.jit
def load_columns(
    weight_pointer, weight_stride, mean_pointer, classes, mask, features, n_features, UPCAST: tl.constexpr
):
    """The transpose of `load_rows`, (features, classes)."""
    inside = mask[None, :] & (features < n_features)[:, None]
    places = weight_pointer + (classes.to(tl.int64) * weight_stride)[None, :] + features[:, None]
    weight = tl.load(places, mask=inside, other=0.0)
    if mean_pointer is not None:
        mean = tl.load(mean_pointer + features, mask=features < n_features, other=0.0)
        return tl.where(inside, weight.to(tl.float32) - mean[:, None], 0.0)
    elif UPCAST:
        return weight.to(tl.float32)
    else:
        return weight


@triton.jit
def table_classes(row_class_pointer, rows, n_rows):
    """The class of each table row, -1 for none."""
    if row_class_pointer is None:
        return tl.where(rows < n_rows, rows, -1).to(tl.int64)
    else:
        return tl.load(row_class_pointer + rows, mask=rows < n_rows, other=-1)


@triton.jit
def refine_tile(
    weight_pointer,
    weight_stride,
    row_class_pointer,
    table_pointer,
    n_rows,
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Replace the entries of -1 in a tile of R, 32 x 32 at a time: the products have the registers."""
    PARTS: tl.constexpr = COLUMNS // 32
    for part in range(ROWS // 32 * PARTS):
        rows = tl.program_id(1) * ROWS + part // PARTS * 32 + tl.arange(0, 32)
        classes = tl.program_id(0) * COLUMNS + part % PARTS * 32 + tl.arange(0, 32)
        row_class = table_classes(row_class_pointer, rows, n_rows)
        row_mask, class_mask = row_class >= 0, classes < n_classes
        places = table_pointer + rows.to(tl.int64)[:, None] * n_classes + classes[None, :]
        is_close = tl.load(places, mask=row_mask[:, None] & class_mask[None, :], other=0.0) < 0
        if tl.max(tl.max(is_close.to(tl.int32), axis=1), axis=0) > 0:
            largest = tl.zeros([32, 32], tl.float32)
            row_place = weight_pointer + row_class * weight_stride
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
            tl.store(places, tl.where(is_apart, inverse_distance, 0.0), mask=is_close)


@triton.jit(do_not_specialize=["n_rows"])
def distance_gram_kernel(
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,) fp32 the origin, or None: the rows are multiplied as they are
    norm_pointer,  # (c,) fp32 |w_j|, read where there is no origin
    row_class_pointer,  # (k,) int64: the class of each table row, -1 for none; None: row r is class r
    table_pointer,  # (k, c) fp32: written
    n_rows,
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of R from s = |a|^2 + |b|^2 - 2 a.b, and from sum (w_p - w_j)^2 where that is too small (CLOSE_PAIR), or
    squares would leave the range.

    Differences of neighbouring floats are exact, so equal rows have s = 0 (no boundary: R = 0) and rows 1e-4 apart keep
    all their digits. bf16 rows are not centred: their products are exact, and a common offset only makes more pairs
    close.
    """
    classes = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # axis x: the others end at 65,535
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    class_mask = classes < n_classes
    row_class = table_classes(row_class_pointer, rows, n_rows)
    row_mask = row_class >= 0
    inverse_distance = tl.zeros([ROWS, COLUMNS], tl.float32)  # of rows that nobody uses: two runs give the same bits
    any_close = False
    if tl.max(row_class, axis=0) >= 0:
        row_norms = tl.zeros([ROWS], tl.float32)
        class_norms = tl.zeros([COLUMNS], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, n_features, INNER):
            features = start + tl.arange(0, INNER)
            a = load_rows(
                weight_pointer, weight_stride, mean_pointer, row_class, row_mask, features, n_features, UPCAST
            )
            b = load_columns(
                weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, UPCAST
            )
            if mean_pointer is not None:
                row_norms += tl.sum(a * a, axis=1)
                class_norms += tl.sum(b * b, axis=0)
            products = add_product(products, a, b, PRECISION)
        if mean_pointer is None:
            row_norms = tl.load(norm_pointer + row_class, mask=row_mask, other=0.0)
            class_norms = tl.load(norm_pointer + classes, mask=class_mask, other=0.0)
            row_norms *= row_norms
            class_norms *= class_norms
        norms = row_norms[:, None] + class_norms[None, :]
        squared_distance = norms - 2.0 * products
        own = row_class[:, None] == classes[None, :]
        is_close = (squared_distance <= norms * CLOSE_PAIR) | (norms > LARGE_SQUARE) | (squared_distance < SMALL_SQUARE)
        is_close = is_close & row_mask[:, None] & class_mask[None, :] & (own == 0)
        # 1 where it will not be used, so that no root of a negative rounding error is taken
        inverse_distance = tl.rsqrt(tl.where(is_close | own, 1.0, squared_distance))
        inverse_distance = tl.where(own | (row_mask[:, None] == 0), 0.0, tl.where(is_close, -1.0, inverse_distance))
        any_close = tl.max(tl.max(is_close.to(tl.int32), axis=1), axis=0) > 0
    places = table_pointer + rows.to(tl.int64)[:, None] * n_classes + classes[None, :]
    tl.store(places, inverse_distance, mask=(rows < n_rows)[:, None] & class_mask[None, :])
    if any_close:
        tl.debug_barrier()
        refine_tile(
            weight_pointer,
            weight_stride,
            row_class_pointer,
            table_pointer,
            n_rows,
            n_classes,
            n_features,
            ROWS,
            COLUMNS,
        )


def geometry_of(logits: Tensor, head_weight: Tensor, aliased: bool = False) -> tuple[Geometry, Tensor, bool]:
    """(the table R for a batch, the predictions, whether these are known).

    For n >= c the row kernels find them, and write both `predicted` and `table_row`, which are the same; `aliased`:
    they are one tensor, which stands for the row_class that nothing reads then, too.
    """
    n_samples, n_classes = logits.shape
    predicted = torch.empty(n_samples, dtype=torch.int64, device=logits.device)
    if n_samples >= n_classes:
        table = distance_table(head_weight, None)
        if aliased:
            return Geometry(predicted, table, predicted), predicted, False
        row_class = torch.arange(n_classes, device=logits.device)
        return Geometry(torch.empty_like(predicted), table, row_class), predicted, False
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


class Product(NamedTuple):
    """How rows of W are multiplied: what is read beside them, and the constants of the kernel."""

    mean: Tensor | None  # (m,) fp32: the origin
    tile: TileConfig
    constants: dict[str, object]


def product_of(head_weight: Tensor, mean: Tensor | None = None, columns: int = 64) -> Product:
    """bf16 rows as they are, which is exact; others in fp32, less an origin: the one given, or the median, entry by
    entry, of some of them. One row much longer than the others would move their mean away from all of them.
    """
    target = target_of(head_weight)
    exact = head_weight.dtype == torch.bfloat16
    tile = tile_config(target, exact, columns)
    if mean is None and not exact:
        sample = head_weight[:: cdiv(head_weight.shape[0], SAMPLED_ROWS)].float()
        # Not `median`, which torch.use_deterministic_algorithms refuses on a GPU.
        mean = sample.sort(0).values[sample.shape[0] // 2]
    constants = {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "PRECISION": tile.precision,
        "UPCAST": target == "interpreter",  # which multiplies bf16 as if it were an integer
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return Product(mean, tile, constants)


def distance_table(head_weight: Tensor, row_class: Tensor | None) -> Tensor:
    """R (k, c) fp32 between the classes in `row_class` (None: all) and all classes; 0 in rows of class -1."""
    head_weight = unit_stride(head_weight)
    n_classes, n_features = head_weight.shape
    n_rows = n_classes if row_class is None else row_class.shape[0]
    table = torch.empty(n_rows, n_classes, dtype=torch.float32, device=head_weight.device)
    product = product_of(head_weight, columns=64 if row_class is None else 128)
    norms = None
    if product.mean is None:
        norms = torch.linalg.vector_norm(head_weight, dim=1, dtype=torch.float32)
    launch(
        distance_gram_kernel,
        (cdiv(n_classes, product.tile.columns), cdiv(n_rows, product.tile.rows)),
        head_weight,
        head_weight.stride(0),
        product.mean,
        norms,
        row_class,
        table,
        n_rows,
        n_classes,
        n_features,
        **product.constants,
    )
    return table
