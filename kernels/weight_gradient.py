"""The gradient by W through the distances: dW_p += sum_j S_pj (w_p - w_j), dW_j += S_pj (w_j - w_p)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Geometry
from .distances import load_rows, product_of
from .launch import cdiv, class_splits, gradient_buffer, launch, unit_stride
from .rows import add_split_product
from .segments import segment_sum


@triton.jit
def weight_gradient_table_kernel(
    summed_pointer,  # (c, c) S, its rows padded by zeros
    summed_stride,
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,) fp32, or None
    grad_weight_pointer,  # (c, m) contiguous: written
    n_classes,
    n_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
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
        pairs = tl.load(
            summed_pointer + (class_offset * summed_stride)[:, None] + others[None, :],
            mask=class_mask[:, None] & (others < summed_stride)[None, :],
            other=0.0,
        ) + tl.load(
            summed_pointer + (other_offset * summed_stride)[None, :] + classes[:, None],
            mask=other_mask[None, :] & (classes < summed_stride)[:, None],
            other=0.0,
        )
        row_sums += tl.sum(pairs, axis=1)
        weight = load_rows(
            weight_pointer, weight_stride, mean_pointer, others, other_mask, features, n_features, UPCAST
        )
        products = add_split_product(products, pairs, weight, PRECISION)
    weight = load_rows(weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, UPCAST)
    tl.store(
        grad_weight_pointer + (class_offset * n_features)[:, None] + features[None, :],
        row_sums[:, None] * weight.to(tl.float32) - products,
        mask=class_mask[:, None] & (features < n_features)[None, :],
    )


@triton.jit(do_not_specialize=["n_rows", "split_classes"])
def weight_gradient_own_kernel(
    summed_pointer,  # (k, c) S, its rows padded by zeros
    summed_stride,
    row_class_pointer,  # (k,) int64
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,) fp32, or None
    own_pointer,  # (splits, k, m) fp32: written
    n_rows,
    n_classes,
    n_features,
    split_classes,  # classes of a split, a multiple of INNER
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
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
                summed_pointer + (row_offset * summed_stride)[:, None] + classes[None, :],
                mask=row_mask[:, None] & (classes < summed_stride)[None, :],
                other=0.0,
            )
            row_sums += tl.sum(summed, axis=1)
            weight = load_rows(
                weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, UPCAST
            )
            products = add_split_product(products, summed, weight, PRECISION)
        weight = load_rows(
            weight_pointer, weight_stride, mean_pointer, row_class, row_mask, features, n_features, UPCAST
        )
        tl.store(
            own_pointer + ((split * tl.cast(n_rows, tl.int64) + row_offset) * n_features)[:, None] + features[None, :],
            row_sums[:, None] * weight.to(tl.float32) - products,
            mask=row_mask[:, None] & (features < n_features)[None, :],
        )


@triton.jit(do_not_specialize=["n_rows", "n_splits", "n_halvings"])
def weight_gradient_all_kernel(
    summed_pointer,  # (k, c) S, its rows padded by zeros
    summed_stride,
    row_class_pointer,  # (k,) int64
    n_distinct_pointer,  # () int64: how many table rows are in use
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,) fp32, or None
    own_pointer,  # (splits, k, m) fp32
    grad_weight_pointer,  # (c, m) contiguous: written
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
            summed_pointer + (rows.to(tl.int64) * summed_stride)[None, :] + classes[:, None],
            mask=(classes < summed_stride)[:, None] & row_mask[None, :],
            other=0.0,
        )
        column_sums += tl.sum(summed, axis=1)
        weight = load_rows(
            weight_pointer, weight_stride, mean_pointer, row_class, row_mask, features, n_features, UPCAST
        )
        products = add_split_product(products, summed, weight, PRECISION)
    weight = load_rows(weight_pointer, weight_stride, mean_pointer, classes, class_mask, features, n_features, UPCAST)
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
    sample_grad: Tensor | None,
    slope: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    predicted: Tensor,
    geometry: Geometry,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient by W of sum_i sample_grad_i L_i, where slope_i = dL_i/dD_i / (K_i + average_offset); (c, m) in W's
    dtype, or in `dtype`. Without sample_grad it is in the slope."""
    dtype = dtype or head_weight.dtype
    table_row, table, row_class = geometry
    logits, weight = unit_stride(logits), unit_stride(head_weight)
    n_classes, n_features = weight.shape
    n_rows = table.shape[0]
    summed = segment_sum(
        table_row,
        None if sample_grad is None else sample_grad.contiguous(),
        slope,
        logits,
        table.new_empty(n_rows, 16 * cdiv(n_classes, 16)),  # rows of whole 128-bit loads
        predicted=predicted,
        table=table,
    )
    mean, tile, shape = product_of(weight)
    grad_weight = gradient_buffer(head_weight, (n_classes, n_features), dtype)
    class_tiles, feature_tiles = cdiv(n_classes, tile.rows), cdiv(n_features, tile.columns)
    if n_rows == n_classes:
        launch(
            weight_gradient_table_kernel, (class_tiles, feature_tiles), summed, summed.stride(0), weight,
            weight.stride(0), mean, grad_weight, n_classes, n_features, **shape,
        )  # fmt: skip
        return grad_weight.to(dtype)

    row_tiles = cdiv(n_rows, tile.rows)
    split_classes = tile.inner * cdiv(
        n_classes, tile.inner * class_splits(row_tiles * feature_tiles, n_classes, tile.inner)
    )
    n_splits = cdiv(n_classes, split_classes)
    own = torch.empty(n_splits, n_rows, n_features, dtype=torch.float32, device=weight.device)
    launch(
        weight_gradient_own_kernel, (row_tiles, feature_tiles, n_splits), summed, summed.stride(0), row_class,
        weight, weight.stride(0), mean, own, n_rows, n_classes, n_features, split_classes, **shape,
    )  # fmt: skip
    _, tile, shape = product_of(weight, mean, columns=128)
    launch(
        weight_gradient_all_kernel, (cdiv(n_classes, tile.rows), cdiv(n_features, tile.columns)), summed,
        summed.stride(0), row_class, (row_class >= 0).sum(), weight, weight.stride(0), mean, own, grad_weight,
        n_rows, n_classes, n_features, n_splits, n_rows.bit_length(), **shape,
    )  # fmt: skip
    return grad_weight.to(dtype)
