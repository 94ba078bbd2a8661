"""NCI in one pass: how far the centred feature points along the weight of its predicted class, and how long the
feature is.

    projection = w_p . (z - mu) / |z - mu|        score = projection + alpha |z|_1

A program reads its row of logits (arg-max), its row of features and the row w_p once, and keeps three sums. From
features alone, the arg-max comes from tiles of z W^T + b that are never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Needs, Projected
from .launch import (
    PIECE,
    alignment,
    argmax_splits,
    cdiv,
    feature_block,
    gradient_buffer,
    launch,
    packed,
    scan_config,
    segment_config,
    target_of,
    tile_config,
    unit_stride,
)
from .rows import add_3, add_product, first_maximum, keep_better, scan_maximum
from .segments import Segments, segment_sum


@triton.jit
def features_argmax_kernel(
    features_pointer,  # (n, m)
    features_stride,
    weight_pointer,  # (c, m)
    weight_stride,
    bias_pointer,  # (c,) or None
    maximum_pointer,  # (n, splits) fp32: written
    class_pointer,  # (n, splits) int64: written
    n_samples,
    n_classes,
    n_features,
    split_classes,  # classes of a split, a multiple of CLASSES
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Largest logit, and its class, of a tile of samples over one split of the classes. UPCAST: multiply as fp32,
    where the dtypes differ; otherwise half-precision products go to the tensor cores as they are, and are exact
    there."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    lanes = tl.arange(0, CLASSES)
    row_mask = rows < n_samples
    begin = split * split_classes
    row_offset = rows.to(tl.int64) * features_stride
    best = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32) + begin
    for class_start in range(begin, tl.minimum(begin + split_classes, n_classes), CLASSES):
        classes = class_start + lanes
        class_mask = classes < n_classes
        class_offset = classes.to(tl.int64) * weight_stride
        logit = tl.zeros([ROWS, CLASSES], tl.float32)
        for start in range(0, n_features, INNER):
            columns = start + tl.arange(0, INNER)
            column_mask = columns < n_features
            z = tl.load(
                features_pointer + row_offset[:, None] + columns[None, :],
                mask=row_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            weight = tl.load(
                weight_pointer + class_offset[None, :] + columns[:, None],
                mask=column_mask[:, None] & class_mask[None, :],
                other=0.0,
            )
            if UPCAST:
                z = z.to(tl.float32)
                weight = weight.to(tl.float32)
            logit = add_product(logit, z, weight, PRECISION)
        if BIASED:
            logit += tl.load(bias_pointer + classes, mask=class_mask, other=0.0).to(tl.float32)[None, :]
        logit = tl.where(class_mask[None, :], logit, float("-inf"))
        top, column = first_maximum(logit, classes[None, :], 1)
        best, index = keep_better(best, index, top, column)
    output = rows.to(tl.int64) * tl.num_programs(1) + split
    tl.store(maximum_pointer + output, best, mask=row_mask)
    tl.store(class_pointer + output, index.to(tl.int64), mask=row_mask)


@triton.jit
def nci_forward_kernel(
    logits_pointer,  # (n, c), or (n, splits) the largest logit of each split
    logits_stride,
    class_pointer,  # (n, splits) int64 the class of each split's largest logit; None where the columns are the classes
    features_pointer,  # (n, m)
    features_stride,
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,)
    score_pointer,  # (n,) this and what follows is written
    predicted_pointer,  # (n,) int64
    projection_pointer,  # (n,)
    inverse_norm_pointer,  # (n,)
    n_columns,  # of the logits
    n_features,
    alpha,
    CLASS_BLOCK: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    CLASS_ALIGN: tl.constexpr,
    FEATURE_ALIGN: tl.constexpr,
    BY_SPLIT: tl.constexpr,
):
    """The score of one sample. A NaN logit makes it NaN, as the prediction means nothing then."""
    row = tl.program_id(0).to(tl.int64)
    n_columns = n_columns // CLASS_ALIGN * CLASS_ALIGN
    logits_stride = logits_stride // CLASS_ALIGN * CLASS_ALIGN
    n_features = n_features // FEATURE_ALIGN * FEATURE_ALIGN
    features_stride = features_stride // FEATURE_ALIGN * FEATURE_ALIGN
    weight_stride = weight_stride // FEATURE_ALIGN * FEATURE_ALIGN
    maximum, column = scan_maximum(logits_pointer + row * logits_stride, n_columns, CLASS_BLOCK)
    predicted = column.to(tl.int64)
    if BY_SPLIT:
        predicted = tl.load(class_pointer + row * n_columns + column)

    features_row = features_pointer + row * features_stride
    weight_row = weight_pointer + predicted * weight_stride
    lanes = tl.arange(0, FEATURE_BLOCK)
    lengths = tl.zeros([FEATURE_BLOCK], tl.float32)
    squares = tl.zeros([FEATURE_BLOCK], tl.float32)
    products = tl.zeros([FEATURE_BLOCK], tl.float32)
    for start in range(0, n_features, FEATURE_BLOCK):
        columns = start + lanes
        mask = columns < n_features
        z = tl.load(features_row + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_pointer + columns, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_row + columns, mask=mask, other=0.0).to(tl.float32)
        centred = z - mean
        lengths += tl.abs(z)
        squares += centred * centred
        products += weight * centred
    length, square, product = tl.reduce((lengths, squares, products), 0, add_3)
    norm = tl.sqrt(square)
    # z = mu has no direction: 0, not NaN. A NaN norm is not 0, and stays.
    inverse_norm = tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))
    projection = tl.where(maximum == maximum, product * inverse_norm, float("nan"))
    tl.store(score_pointer + row, projection + alpha * length)
    tl.store(predicted_pointer + row, predicted)
    tl.store(projection_pointer + row, projection)
    tl.store(inverse_norm_pointer + row, inverse_norm)


@triton.jit
def _projection_gradient(scale, weight, centred, projection, inverse_norm):
    """d(sample_grad projection)/dz = scale (w_p - projection (z - mu) / |z - mu|), scale = sample_grad / |z - mu|;
    and with the opposite sign by mu."""
    return scale * (weight - projection * inverse_norm * centred)


@triton.jit
def nci_features_backward_kernel(
    sample_grad_pointer,  # (n,)
    features_pointer,  # (n, m)
    features_stride,
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,)
    predicted_pointer,  # (n,) int64
    projection_pointer,  # (n,)
    inverse_norm_pointer,  # (n,)
    grad_features_pointer,  # (n, m) contiguous: written
    n_features,
    alpha,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradient of one sample's features: of the projection, and alpha sign(z) of the length."""
    row = tl.program_id(0).to(tl.int64)
    n_features = n_features // ALIGN * ALIGN
    features_stride = features_stride // ALIGN * ALIGN
    weight_stride = weight_stride // ALIGN * ALIGN
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n_features
    sample_grad = tl.load(sample_grad_pointer + row).to(tl.float32)
    predicted = tl.load(predicted_pointer + row)
    projection = tl.load(projection_pointer + row)
    inverse_norm = tl.load(inverse_norm_pointer + row)
    z = tl.load(features_pointer + row * features_stride + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_pointer + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_pointer + predicted * weight_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gradient = _projection_gradient(sample_grad * inverse_norm, weight, z - mean, projection, inverse_norm)
    sign = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
    gradient += sample_grad * alpha * sign
    tl.store(grad_features_pointer + row * n_features + columns, gradient, mask=mask)


@triton.jit
def nci_mean_backward_kernel(
    sample_grad_pointer,  # (n,)
    features_pointer,  # (n, m)
    features_stride,
    weight_pointer,  # (c, m)
    weight_stride,
    mean_pointer,  # (m,)
    predicted_pointer,  # (n,) int64
    projection_pointer,  # (n,)
    inverse_norm_pointer,  # (n,)
    partial_pointer,  # (pieces, m) fp32: written
    n_samples,
    n_features,
    piece_samples,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradient of the mean over one piece of the batch, in the order of the batch."""
    piece = tl.program_id(0)
    n_features = n_features // ALIGN * ALIGN
    features_stride = features_stride // ALIGN * ALIGN
    weight_stride = weight_stride // ALIGN * ALIGN
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < n_features
    mean = tl.load(mean_pointer + columns, mask=column_mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    begin = piece * piece_samples
    end = tl.minimum(begin + piece_samples, n_samples)
    for start in range(begin, end, SAMPLES):
        rows = start + tl.arange(0, SAMPLES)
        row_mask = rows < end
        mask = row_mask[:, None] & column_mask[None, :]
        inverse_norm = tl.load(inverse_norm_pointer + rows, mask=row_mask, other=0.0)
        projection = tl.load(projection_pointer + rows, mask=row_mask, other=0.0)
        scale = tl.load(sample_grad_pointer + rows, mask=row_mask, other=0.0).to(tl.float32) * inverse_norm
        predicted = tl.load(predicted_pointer + rows, mask=row_mask, other=0)
        row_offset = rows.to(tl.int64) * features_stride
        z = tl.load(features_pointer + row_offset[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(
            weight_pointer + (predicted * weight_stride)[:, None] + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        gradient = _projection_gradient(
            scale[:, None], weight, z - mean[None, :], projection[:, None], inverse_norm[:, None]
        )
        total -= tl.sum(gradient, axis=0)
    tl.store(partial_pointer + piece.to(tl.int64) * n_features + columns, total, mask=column_mask)


def predict_from_features(features: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(largest logit, its class) of each sample in each split of the classes, both (n, splits); splits ascend in
    class order."""
    features, head_weight = unit_stride(features), unit_stride(head_weight)
    n_samples, n_features = features.shape
    n_classes = head_weight.shape[0]
    target = target_of(features)
    tile = tile_config(target)
    # The interpreter multiplies bf16 as if it were an integer, so there everything is fp32.
    upcast = features.dtype != head_weight.dtype or target == "interpreter"
    row_tiles, class_tiles = cdiv(n_samples, tile.rows), cdiv(n_classes, tile.columns)
    split_classes = tile.columns * cdiv(class_tiles, argmax_splits(row_tiles, class_tiles))
    n_splits = cdiv(n_classes, split_classes)
    maximum = torch.empty(n_samples, n_splits, dtype=torch.float32, device=features.device)
    classes = torch.empty(n_samples, n_splits, dtype=torch.int64, device=features.device)
    launch(
        features_argmax_kernel, (row_tiles, n_splits), features, features.stride(0), head_weight,
        head_weight.stride(0), None if head_bias is None else head_bias.contiguous(), maximum, classes, n_samples,
        n_classes, n_features, split_classes, ROWS=tile.rows, CLASSES=tile.columns, INNER=tile.inner,
        PRECISION=tile.precision if upcast or features.dtype == torch.float32 else "ieee", UPCAST=upcast,
        BIASED=head_bias is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return maximum, classes


def nci_forward(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, mean: Tensor, logits: Tensor | None, alpha: float
) -> tuple[Tensor, Projected]:
    """NCI of (n, m) features under the (c, m) head: see `ood_fast.functional.nci_score` for the mathematics.

    Returns the score, (n,), and what the backward pass needs.
    """
    classes = None
    if logits is None:
        logits, classes = predict_from_features(features, head_weight, head_bias)
    elif logits.dtype == torch.float64:  # in float32, in which kernels compare, others than the largest may tie with it
        logits, classes = logits.max(1, keepdim=True)
    features, head_weight, logits = unit_stride(features), unit_stride(head_weight), unit_stride(logits)
    n_samples, n_features = features.shape
    n_columns = logits.shape[1]
    score, projection, inverse_norm = (
        torch.empty(n_samples, dtype=torch.float32, device=features.device) for _ in range(3)
    )
    predicted = torch.empty(n_samples, dtype=torch.int64, device=features.device)
    target = target_of(features)
    scan = scan_config(n_columns, target)
    num_warps = max(scan.num_warps, min(scan_config(n_features, target).num_warps, 2))
    launch(
        nci_forward_kernel, (n_samples,), logits, logits.stride(0), classes, features, features.stride(0),
        head_weight, head_weight.stride(0), mean.contiguous(), score, predicted, projection, inverse_norm, n_columns,
        n_features, float(alpha), CLASS_BLOCK=scan.block, FEATURE_BLOCK=feature_block(n_features, num_warps, target),
        CLASS_ALIGN=alignment(n_columns, logits.stride(0)),
        FEATURE_ALIGN=alignment(n_features, features.stride(0), head_weight.stride(0)), BY_SPLIT=classes is not None,
        num_warps=num_warps,
    )  # fmt: skip
    return score, Projected(predicted, projection, inverse_norm)


def nci_backward(
    sample_grad: Tensor,
    features: Tensor,
    head_weight: Tensor,
    mean: Tensor,
    projected: Projected,
    alpha: float,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i score_i by features, head weight and mean, each None unless needed.

    The prediction is a constant. dW_p is the segmented sum of sample_grad (z - mu) / |z - mu| over the samples
    predicted as p.
    """
    z, weight = unit_stride(features), unit_stride(head_weight)
    sample_grad, center, projected = sample_grad.contiguous(), mean.contiguous(), packed(projected)
    n_samples, n_features = z.shape
    align = alignment(n_features, z.stride(0), weight.stride(0))
    config = segment_config(n_features, n_samples, 1)
    column_blocks = cdiv(n_features, config.columns)
    grad_features = grad_weight = grad_mean = None
    if needs.features:
        grad_features = gradient_buffer(features, (n_samples, n_features))
        scan = scan_config(n_features, target_of(z))
        launch(
            nci_features_backward_kernel, (n_samples, cdiv(n_features, scan.block)), sample_grad, z, z.stride(0),
            weight, weight.stride(0), center, *projected, grad_features, n_features, float(alpha), BLOCK=scan.block,
            ALIGN=align, num_warps=scan.num_warps,
        )  # fmt: skip
        grad_features = grad_features.to(features.dtype)
    if needs.weight:
        grad_weight = gradient_buffer(head_weight, tuple(head_weight.shape))
        segment_sum(Segments(projected.predicted, sample_grad, projected.inverse_norm, z), grad_weight, center)
        grad_weight = grad_weight.to(head_weight.dtype)
    if needs.mean:
        pieces = cdiv(n_samples, PIECE)
        partial = torch.empty(pieces, n_features, dtype=torch.float32, device=z.device)
        launch(
            nci_mean_backward_kernel, (pieces, column_blocks), sample_grad, z, z.stride(0), weight, weight.stride(0),
            center, *projected, partial, n_samples, n_features, PIECE, SAMPLES=config.samples, BLOCK=config.columns,
            ALIGN=align, num_warps=config.num_warps,
        )  # fmt: skip
        grad_mean = partial.sum(0).to(mean.dtype)
    return grad_features, grad_weight, grad_mean
