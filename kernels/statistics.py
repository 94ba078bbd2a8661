"""Row statistics: what the scores of most detectors are made of, from one read of the logits and one of the features.

    rest = sum_{j != p} exp(-g_j)          Z = 1 + rest
    logsumexp = f_p + log Z                confidence = 1 / Z
    entropy = log Z + sum_j exp(-g_j) g_j / Z
    gen = sum_j (P_j (1 - P_j))^gamma      D = sum_j g_j R_pj / K

Statistics are chosen by their output pointers: what has none is compiled away, and so is the read that only it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Inputs
from .distances import distance_table as rows_of_distance_table
from .launch import (
    alignment,
    cdiv,
    feature_block,
    has_exp2,
    kinds_of,
    lanes_of,
    launch,
    layout_of,
    row_config,
    scan_config,
    target_of,
    unit_stride,
)
from .rows import (
    FAR,
    LOG2_E,
    add_2,
    add_3,
    exp2,
    finite_or_nan,
    first_maximum,
    keep_better,
    log2,
    maximum,
    mean_distance,
)

# The statistics, in the order of the kernel's outputs.
OF_LOGITS = ("max", "predicted", "logsumexp", "confidence", "entropy", "gen", "logit_norm1", "logit_norm2", "distance")
OF_FEATURES = ("norm1", "norm2", "centred_norm", "projection")


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: dividing by the sum less 1 undoes the rounding of the sum."""
    total = 1.0 + x
    return tl.where(total == 1.0, x, tl.log(total) * (x / tl.where(total == 1.0, 1.0, total - 1.0)))


@triton.jit
def partial_sums(
    logit,
    columns,
    WITH_INDEX: tl.constexpr,
    WITH_SUM: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """(f_p, p, sum exp(-g) without p, sum exp(-g) g) of some columns, each (rows,); 0 where nothing is made of it."""
    if WITH_INDEX:
        top, column = first_maximum(logit, columns, 1)
        is_top = columns == column[:, None]
    else:  # all that are equal to the largest stand aside, and all but one are added again
        top = maximum(logit, 1)
        column = tl.zeros_like(top).to(tl.int32)
        is_top = logit == top[:, None]
    rest = tl.zeros_like(top)
    product = tl.zeros_like(top)
    if WITH_SUM:
        gap = top[:, None] - logit
        if WITH_INDEX or WITH_ENTROPY:  # inf * 0, and -inf - -inf beside the one that is p
            gap = tl.minimum(gap, FAR)
        exponential = exp2(gap * -LOG2_E, HARDWARE)
        others = tl.where(is_top, 0.0, exponential)
        if WITH_ENTROPY:
            rest, product = tl.reduce((others, exponential * gap), 1, add_2)
        else:
            rest = tl.sum(others, axis=1)
        if not WITH_INDEX:
            rest += tl.maximum(tl.sum(is_top.to(tl.int32), axis=1) - 1, 0).to(tl.float32)
    return top, column, rest, product


@triton.jit
def join_sums(top, column, rest, product, later_top, later_column, later_rest, later_product):
    """`partial_sums` of earlier and later columns together: the side with the smaller maximum is weighed down."""
    best, index = keep_better(top, column, later_top, later_column)
    rises = later_top > top
    both = (top != float("-inf")) & (later_top != float("-inf"))
    difference = tl.where(both, tl.abs(top - later_top), 0.0)
    scale = tl.where(both, tl.exp(-difference), 0.0)
    low_rest, low_product = tl.where(rises, rest, later_rest), tl.where(rises, product, later_product)
    rest = tl.where(rises, later_rest, rest) + scale * (1.0 + low_rest)
    product = tl.where(rises, later_product, product) + scale * (low_product + difference * (1.0 + low_rest))
    return best, index, rest, product


@triton.jit
def tail_terms(
    logit,
    columns,
    row_maximum,
    predicted,
    rest,
    log_partition,
    gamma,
    table_row_pointer,
    n_classes,
    WITH_GEN: tl.constexpr,
    WITH_DISTANCE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """What these columns add to "gen", to the sum of the distances and to K, once p and Z are known; each (rows,).

    (P_j (1 - P_j))^gamma = exp(gamma (-g_j + log(1 - P_j) - log Z)), with 1 - P_p = rest / Z: as a difference it would
    lose its digits as P_p approaches 1. For the others P_j <= 1/2. Where there is no other class, log 0 = -inf gives 0.
    """
    gap = tl.minimum(row_maximum - logit, FAR)
    term = tl.zeros_like(gap)
    product = tl.zeros_like(gap)
    is_boundary = tl.zeros_like(gap).to(tl.int32)
    if WITH_GEN:
        scaled = gap * -LOG2_E
        others = tl.where(columns == predicted, rest, 1.0 + rest - exp2(scaled, HARDWARE))
        term = exp2(
            gamma * (log2(tl.maximum(others, 0.0), HARDWARE) + (scaled - 2.0 * LOG2_E * log_partition)), HARDWARE
        )
    if WITH_DISTANCE:
        inverse_distance = tl.load(table_row_pointer + columns, mask=columns < n_classes, other=0.0)
        inverse_distance = tl.where(logit != float("-inf"), inverse_distance, 0.0)
        product = gap * inverse_distance
        is_boundary = tl.minimum(inverse_distance.to(tl.int32, bitcast=True), 1)  # R's bits are 0 only where it is
    return tl.reduce((term, product, is_boundary), 1, add_3)


@triton.jit
def row_statistics_kernel(
    logits_pointer,  # (n, c), or None where no statistic needs them
    logits_stride,
    features_pointer,  # (n, m), or None
    features_stride,
    weight_pointer,  # (c, m), for the projection
    weight_stride,
    mean_pointer,  # (m,), for the centred norm and the projection
    table_pointer,  # (c, c) fp32, for the distance
    table_stride,
    max_pointer,  # (n,) this and what follows is written, None where it is not asked for
    predicted_pointer,  # (n,) int64
    logsumexp_pointer,  # (n,)
    confidence_pointer,  # (n,)
    entropy_pointer,  # (n,)
    gen_pointer,  # (n,)
    logit_norm1_pointer,  # (n,)
    logit_norm2_pointer,  # (n,)
    distance_pointer,  # (n,)
    norm1_pointer,  # (n,)
    norm2_pointer,  # (n,)
    centred_norm_pointer,  # (n,)
    projection_pointer,  # (n,)
    n_samples,
    n_classes,
    n_features,
    gamma,
    ROWS: tl.constexpr,
    CLASS_BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    CLASS_ALIGN: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    FEATURE_ALIGN: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The statistics of ROWS samples. Where a row of logits fits the block it is read once, otherwise "gen" and the
    distance, which need Z and p first, read it again."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_samples
    row_offset = rows.to(tl.int64)[:, None]
    predicted = tl.zeros([ROWS], tl.int64)
    row_maximum = tl.zeros([ROWS], tl.float32)
    n_classes = n_classes // CLASS_ALIGN * CLASS_ALIGN
    logits_stride = logits_stride // CLASS_ALIGN * CLASS_ALIGN
    table_stride = table_stride // CLASS_ALIGN * CLASS_ALIGN
    n_features = n_features // FEATURE_ALIGN * FEATURE_ALIGN
    features_stride = features_stride // FEATURE_ALIGN * FEATURE_ALIGN
    weight_stride = weight_stride // FEATURE_ALIGN * FEATURE_ALIGN

    if logits_pointer is not None:
        WITH_ENTROPY: tl.constexpr = entropy_pointer is not None
        WITH_GEN: tl.constexpr = gen_pointer is not None
        WITH_DISTANCE: tl.constexpr = distance_pointer is not None
        WITH_INDEX: tl.constexpr = (
            predicted_pointer is not None or projection_pointer is not None or WITH_GEN or WITH_DISTANCE
        )
        WITH_SUM: tl.constexpr = (
            WITH_ENTROPY or WITH_GEN or logsumexp_pointer is not None or confidence_pointer is not None
        )
        WITH_NORMS: tl.constexpr = logit_norm1_pointer is not None or logit_norm2_pointer is not None
        logits_row = logits_pointer + row_offset * logits_stride
        lanes = tl.arange(0, CLASS_BLOCK)[None, :]
        mask = row_mask[:, None] & (lanes < n_classes)
        logit = tl.load(logits_row + lanes, mask=mask, other=float("-inf")).to(tl.float32)
        row_maximum, column, rest, product = partial_sums(logit, lanes, WITH_INDEX, WITH_SUM, WITH_ENTROPY, HARDWARE)
        if WITH_NORMS:
            value = tl.where(logit != float("-inf"), logit, 0.0)
            length, square = tl.reduce((tl.abs(value), value * value), 1, add_2)
        if LOOPED:
            for start in range(CLASS_BLOCK, n_classes, CLASS_BLOCK):
                columns = start + lanes
                mask = row_mask[:, None] & (columns < n_classes)
                logit = tl.load(logits_row + columns, mask=mask, other=float("-inf")).to(tl.float32)
                later_top, later_column, later_rest, later_product = partial_sums(
                    logit, columns, WITH_INDEX, WITH_SUM, WITH_ENTROPY, HARDWARE
                )
                row_maximum, column, rest, product = join_sums(
                    row_maximum, column, rest, product, later_top, later_column, later_rest, later_product
                )
                if WITH_NORMS:
                    value = tl.where(logit != float("-inf"), logit, 0.0)
                    more_length, more_square = tl.reduce((tl.abs(value), value * value), 1, add_2)
                    length += more_length
                    square += more_square
        predicted = column.to(tl.int64)
        if max_pointer is not None:
            tl.store(max_pointer + rows, row_maximum, mask=row_mask)
        if predicted_pointer is not None:
            tl.store(predicted_pointer + rows, predicted, mask=row_mask)
        if logit_norm1_pointer is not None:
            tl.store(logit_norm1_pointer + rows, length, mask=row_mask)
        if logit_norm2_pointer is not None:
            tl.store(logit_norm2_pointer + rows, tl.sqrt(square), mask=row_mask)

        top = finite_or_nan(row_maximum)
        rest = tl.where(top == top, rest, float("nan"))
        log_partition = log1p(rest)
        if logsumexp_pointer is not None:
            tl.store(logsumexp_pointer + rows, top + log_partition, mask=row_mask)
        if confidence_pointer is not None:
            tl.store(confidence_pointer + rows, 1.0 / (1.0 + rest), mask=row_mask)
        if WITH_ENTROPY:
            tl.store(entropy_pointer + rows, log_partition + product / (1.0 + rest), mask=row_mask)
        if WITH_GEN or WITH_DISTANCE:
            table_row = table_pointer
            if WITH_DISTANCE:
                table_row = table_pointer + predicted[:, None] * table_stride
            if LOOPED:
                gen = tl.zeros([ROWS], tl.float32)
                distance_sum = tl.zeros([ROWS], tl.float32)
                n_boundaries = tl.zeros([ROWS], tl.int32)
                for start in range(0, n_classes, CLASS_BLOCK):
                    columns = start + lanes
                    mask = row_mask[:, None] & (columns < n_classes)
                    logit = tl.load(logits_row + columns, mask=mask, other=float("-inf")).to(tl.float32)
                    more_gen, more_distance, more_boundaries = tail_terms(
                        logit, columns, top[:, None], column[:, None], rest[:, None], log_partition[:, None],
                        gamma, table_row, n_classes, WITH_GEN, WITH_DISTANCE, HARDWARE,
                    )  # fmt: skip
                    gen += more_gen
                    distance_sum += more_distance
                    n_boundaries += more_boundaries
            else:
                gen, distance_sum, n_boundaries = tail_terms(
                    logit, lanes, top[:, None], column[:, None], rest[:, None], log_partition[:, None],
                    gamma, table_row, n_classes, WITH_GEN, WITH_DISTANCE, HARDWARE,
                )  # fmt: skip
            if WITH_GEN:
                tl.store(gen_pointer + rows, tl.where(top == top, gen, float("nan")), mask=row_mask)
            if WITH_DISTANCE:
                distance, _ = mean_distance(distance_sum, n_boundaries, 0, top == top)
                tl.store(distance_pointer + rows, distance, mask=row_mask)

    if features_pointer is not None:
        WITH_PROJECTION: tl.constexpr = projection_pointer is not None
        CENTRED: tl.constexpr = WITH_PROJECTION or centred_norm_pointer is not None
        features_row = features_pointer + row_offset * features_stride
        places = tl.arange(0, FEATURE_BLOCK)[None, :]
        feature_lengths = tl.zeros([ROWS, FEATURE_BLOCK], tl.float32)
        feature_squares = tl.zeros([ROWS, FEATURE_BLOCK], tl.float32)
        centred_squares = tl.zeros([ROWS, FEATURE_BLOCK], tl.float32)
        projections = tl.zeros([ROWS, FEATURE_BLOCK], tl.float32)
        for start in range(0, n_features, FEATURE_BLOCK):
            feature = start + places
            inside = feature < n_features
            both_inside = row_mask[:, None] & inside
            z = tl.load(features_row + feature, mask=both_inside, other=0.0).to(tl.float32)
            if norm1_pointer is not None:
                feature_lengths += tl.abs(z)
            if norm2_pointer is not None:
                feature_squares += z * z
            if CENTRED:
                centred = z - tl.load(mean_pointer + feature, mask=inside, other=0.0).to(tl.float32)
                centred_squares += centred * centred
                if WITH_PROJECTION:
                    weight_row = weight_pointer + predicted[:, None] * weight_stride
                    weight = tl.load(weight_row + feature, mask=both_inside, other=0.0).to(tl.float32)
                    projections += weight * centred
        if norm1_pointer is not None:
            tl.store(norm1_pointer + rows, tl.sum(feature_lengths, axis=1), mask=row_mask)
        if norm2_pointer is not None:
            tl.store(norm2_pointer + rows, tl.sqrt(tl.sum(feature_squares, axis=1)), mask=row_mask)
        if centred_norm_pointer is not None:
            tl.store(centred_norm_pointer + rows, tl.sqrt(tl.sum(centred_squares, axis=1)), mask=row_mask)
        if WITH_PROJECTION:
            # The prediction of a row of logits with NaN means nothing.
            projection = tl.where(row_maximum == row_maximum, tl.sum(projections, axis=1), float("nan"))
            tl.store(projection_pointer + rows, projection, mask=row_mask)


@dataclass(frozen=True)
class StatisticsConfig:
    """A program has `rows` samples: `class_block` logits and `feature_block` features of each at a time."""

    rows: int
    class_block: int
    looped: bool
    feature_block: int
    num_warps: int


# Logits of the samples that share a program: 8 a thread with 4 warps.
SHARED_ELEMENTS = 1024
# Programs that sharing must leave: eight for each of the 132 multiprocessors of an H100.
SHARED_PROGRAMS = 1024


def statistics_config(n_samples: int, n_classes: int, n_features: int, target: str) -> StatisticsConfig:
    """0 classes or features: none are read.

    A row of 10 logits would leave most lanes of a program idle, so short rows share one, where there are enough of
    them. Features are wide: with them each sample has a program of its own.
    """
    row = row_config(n_classes, target)
    rows = 1
    while n_features == 0 and rows * 2 * row.block <= SHARED_ELEMENTS and cdiv(n_samples, rows * 2) >= SHARED_PROGRAMS:
        rows *= 2
    num_warps = row.num_warps if n_classes else min(scan_config(n_features, target).num_warps, 2)
    num_warps = max(num_warps, rows * row.block // (8 * lanes_of(target)) if rows > 1 else 1)
    return StatisticsConfig(rows, row.block, row.looped, feature_block(n_features, num_warps, target), num_warps)


def row_statistics(names: list[str], inputs: Inputs, gamma: float) -> list[Tensor]:
    """The statistics `names` of (n, c) logits and (n, m) features, each (n,), in that order; see
    `ood_fast.statistics.row_statistics` for their definitions. What none of them needs is None."""
    mean = inputs.mean
    logits, features, head_weight, table = (
        None if matrix is None else unit_stride(matrix)
        for matrix in (inputs.logits, inputs.features, inputs.head_weight, inputs.table)
    )
    first = features if logits is None else logits
    n_samples = first.shape[0]
    n_classes, n_features = (0 if matrix is None else matrix.shape[1] for matrix in (logits, features))
    table = None if table is None else table.float()
    found = {
        name: torch.empty(n_samples, dtype=torch.int64 if name == "predicted" else torch.float32, device=first.device)
        for name in names
    }
    stride = {name: 0 if matrix is None else matrix.stride(0) for name, matrix in (
        ("logits", logits), ("features", features), ("weight", head_weight), ("table", table)
    )}  # fmt: skip
    target = target_of(first)
    config = statistics_config(n_samples, n_classes, n_features, target)
    launch(
        row_statistics_kernel,
        (cdiv(n_samples, config.rows),),
        logits,
        stride["logits"],
        features,
        stride["features"],
        head_weight,
        stride["weight"],
        None if mean is None else mean.contiguous(),
        table,
        stride["table"],
        *(found.get(name) for name in OF_LOGITS + OF_FEATURES),
        n_samples,
        n_classes,
        n_features,
        float(gamma),
        ROWS=config.rows,
        CLASS_BLOCK=config.class_block,
        LOOPED=config.looped,
        CLASS_ALIGN=alignment(n_classes, stride["logits"], stride["table"]),
        FEATURE_BLOCK=config.feature_block,
        FEATURE_ALIGN=alignment(n_features, stride["features"], stride["weight"]),
        HARDWARE=has_exp2(target),
        num_warps=config.num_warps,
    )
    return [found[name] for name in names]


def distance_table(head_weight: Tensor) -> Tensor:
    """R of all pairs of classes, (c, c), 0 on the diagonal and where rows coincide."""
    weight = unit_stride(head_weight)
    n_classes = weight.shape[0]
    kinds = kinds_of(weight, weight)  # there are no logits
    sizes = (n_classes, n_classes), (0, 1), weight.shape, weight.stride()
    layout = layout_of("table", target_of(weight), kinds, *sizes)
    return rows_of_distance_table(layout, weight, None)
