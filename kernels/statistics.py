"""Row statistics: what the scores of most detectors are made of, from one read of the logits and one of the features.

    rest = sum_{j != p} exp(-g_j)          Z = 1 + rest
    logsumexp = f_p + log Z                entropy = log Z + sum_j exp(-g_j) g_j / Z
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
from .launch import alignment, cdiv, launch, row_config, scan_config, target_of, unit_stride
from .rows import boundary_terms, finite_or_nan, first_maximum, keep_better, live_gap, mean_distance

# The statistics, in the order of the kernel's outputs.
OF_LOGITS = ("max", "predicted", "logsumexp", "entropy", "gen", "logit_norm1", "logit_norm2", "distance")
OF_FEATURES = ("norm1", "norm2", "centred_norm", "projection")


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: dividing by the sum less 1 undoes the rounding of the sum."""
    total = 1.0 + x
    return tl.where(total == 1.0, x, tl.log(total) * (x / tl.where(total == 1.0, 1.0, total - 1.0)))


@triton.jit
def add_exponential(best, rest, product, logit):
    """Bring one more logit of each lane into its running sums relative to `best`, the largest so far:

        rest = sum exp(x - best) over all but the largest        product = sum exp(x - best) (best - x)

    One exponential a logit: whichever of the two is smaller is the one that is weighed down.
    """
    both = (best != float("-inf")) & (logit != float("-inf"))
    difference = tl.where(both, tl.abs(best - logit), 0.0)
    scale = tl.where(both, tl.exp(-difference), 0.0)
    rises = logit > best
    product = tl.where(rises, scale * (product + difference * (1.0 + rest)), product + scale * difference)
    rest = tl.where(rises, scale * (1.0 + rest), rest + scale)
    return rest, product


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
):
    """What a class adds to "gen", to the sum of the distances and to K, once p and Z are known; [ROWS, BLOCK].

    (P_j (1 - P_j))^gamma = exp(gamma (-g_j + log(1 - P_j) - log Z)), with 1 - P_p = rest / Z: as a difference it would
    lose its digits as P_p approaches 1. For the others P_j <= 1/2.
    """
    live, gap = live_gap(logit, row_maximum)
    term = tl.zeros_like(gap)
    product = tl.zeros_like(gap)
    is_boundary = tl.zeros(gap.shape, tl.int32)
    if WITH_GEN:
        others = tl.where(columns == predicted, rest, 1.0 + rest - tl.exp(-gap))
        counts = live & (others > 0)
        term = tl.exp(gamma * (tl.log(tl.where(counts, others, 1.0)) - gap - 2.0 * log_partition))
        term = tl.where(counts, term, 0.0)
    if WITH_DISTANCE:
        inverse_distance, is_boundary = boundary_terms(table_row_pointer, columns, n_classes, live)
        product = gap * inverse_distance
    return term, product, is_boundary


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
):
    """The statistics of ROWS samples. Where a row of logits fits the block it is read once, otherwise "gen" and the
    distance, which need Z and p first, read it again."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_samples
    row_offset = rows.to(tl.int64)[:, None]
    predicted = tl.zeros([ROWS], tl.int64)
    row_maximum = tl.zeros([ROWS], tl.float32)
    if CLASS_ALIGN > 1:
        n_classes = n_classes // CLASS_ALIGN * CLASS_ALIGN
        logits_stride = logits_stride // CLASS_ALIGN * CLASS_ALIGN
        table_stride = table_stride // CLASS_ALIGN * CLASS_ALIGN
    if FEATURE_ALIGN > 1:
        n_features = n_features // FEATURE_ALIGN * FEATURE_ALIGN
        features_stride = features_stride // FEATURE_ALIGN * FEATURE_ALIGN
        weight_stride = weight_stride // FEATURE_ALIGN * FEATURE_ALIGN

    if logits_pointer is not None:
        WITH_ENTROPY: tl.constexpr = entropy_pointer is not None
        WITH_GEN: tl.constexpr = gen_pointer is not None
        WITH_DISTANCE: tl.constexpr = distance_pointer is not None
        WITH_SUM: tl.constexpr = WITH_ENTROPY or WITH_GEN or logsumexp_pointer is not None
        WITH_NORMS: tl.constexpr = logit_norm1_pointer is not None or logit_norm2_pointer is not None
        logits_row = logits_pointer + row_offset * logits_stride
        lanes = tl.arange(0, CLASS_BLOCK)[None, :]
        mask = row_mask[:, None] & (lanes < n_classes)
        best = tl.load(logits_row + lanes, mask=mask, other=float("-inf")).to(tl.float32)
        index = tl.zeros([ROWS, CLASS_BLOCK], tl.int32) + lanes
        rest = tl.zeros([ROWS, CLASS_BLOCK], tl.float32)
        product = tl.zeros([ROWS, CLASS_BLOCK], tl.float32)
        if WITH_NORMS:
            value = tl.where(best != float("-inf"), best, 0.0)
            lengths = tl.abs(value)
            squares = value * value
        if LOOPED:
            for start in range(CLASS_BLOCK, n_classes, CLASS_BLOCK):
                columns = start + lanes
                mask = row_mask[:, None] & (columns < n_classes)
                logit = tl.load(logits_row + columns, mask=mask, other=float("-inf")).to(tl.float32)
                if WITH_NORMS:
                    value = tl.where(logit != float("-inf"), logit, 0.0)
                    lengths += tl.abs(value)
                    squares += value * value
                if WITH_SUM:
                    rest, product = add_exponential(best, rest, product, logit)
                best, index = keep_better(best, index, logit, columns)
        row_maximum, column = first_maximum(best, index, 1)
        predicted = column.to(tl.int64)
        if max_pointer is not None:
            tl.store(max_pointer + rows, row_maximum, mask=row_mask)
        if predicted_pointer is not None:
            tl.store(predicted_pointer + rows, predicted, mask=row_mask)
        if logit_norm1_pointer is not None:
            tl.store(logit_norm1_pointer + rows, tl.sum(lengths, axis=1), mask=row_mask)
        if logit_norm2_pointer is not None:
            tl.store(logit_norm2_pointer + rows, tl.sqrt(tl.sum(squares, axis=1)), mask=row_mask)

        top = finite_or_nan(row_maximum)
        log_partition = tl.zeros([ROWS], tl.float32)
        rest_of_row = tl.zeros([ROWS], tl.float32)
        if WITH_SUM:
            # The lanes together, relative to the maximum of the row; the lane that holds it leaves it out.
            live, gap = live_gap(best, top[:, None])
            scale = tl.where(live, tl.exp(-gap), 0.0)
            own = tl.where(index == column[:, None], 0.0, 1.0)
            rest_of_row = tl.sum(scale * (own + rest), axis=1)
            rest_of_row = tl.where(top == top, rest_of_row, float("nan"))
            log_partition = log1p(rest_of_row)
            if logsumexp_pointer is not None:
                tl.store(logsumexp_pointer + rows, top + log_partition, mask=row_mask)
            if WITH_ENTROPY:
                mean_gap = tl.sum(scale * (product + gap * (1.0 + rest)), axis=1) / (1.0 + rest_of_row)
                tl.store(entropy_pointer + rows, log_partition + mean_gap, mask=row_mask)
        if WITH_GEN or WITH_DISTANCE:
            table_row = table_pointer
            if WITH_DISTANCE:
                table_row = table_pointer + predicted[:, None] * table_stride
            if LOOPED:
                terms = tl.zeros([ROWS, CLASS_BLOCK], tl.float32)
                products = tl.zeros([ROWS, CLASS_BLOCK], tl.float32)
                counts = tl.zeros([ROWS, CLASS_BLOCK], tl.int32)
                for start in range(0, n_classes, CLASS_BLOCK):
                    columns = start + lanes
                    mask = row_mask[:, None] & (columns < n_classes)
                    logit = tl.load(logits_row + columns, mask=mask, other=float("-inf")).to(tl.float32)
                    term, product, is_boundary = tail_terms(
                        logit, columns, top[:, None], column[:, None], rest_of_row[:, None], log_partition[:, None],
                        gamma, table_row, n_classes, WITH_GEN, WITH_DISTANCE,
                    )  # fmt: skip
                    terms += term
                    products += product
                    counts += is_boundary
            else:
                terms, products, counts = tail_terms(
                    best, lanes, top[:, None], column[:, None], rest_of_row[:, None], log_partition[:, None],
                    gamma, table_row, n_classes, WITH_GEN, WITH_DISTANCE,
                )  # fmt: skip
            if WITH_GEN:
                gen = tl.where(top == top, tl.sum(terms, axis=1), float("nan"))
                tl.store(gen_pointer + rows, gen, mask=row_mask)
            if WITH_DISTANCE:
                distance, _ = mean_distance(tl.sum(products, axis=1), tl.sum(counts, axis=1), 0, top == top)
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


# Logits of the samples that share a program: 8 a thread with 4 warps, as much as a row of 1000 classes has.
SHARED_ELEMENTS = 1024
# Programs that sharing must leave: eight for each of the 132 multiprocessors of an H100.
SHARED_PROGRAMS = 1024


def statistics_config(n_samples: int, n_classes: int, n_features: int, target: str) -> StatisticsConfig:
    """0 classes or features: none are read.

    A row of 10 logits would leave most lanes of a program idle, so short rows share one, where there are enough of
    them. Features are wide: with them each sample has a program of its own. Looped rows have 16 warps, because a lane
    keeps seven running values for each of its columns: with 8 warps the bf16 form spills 8 bytes on sm_90.
    """
    row, scan = row_config(n_classes, target), scan_config(n_features, target)
    rows, lanes = 1, 64 if target == "hip" else 32
    while n_features == 0 and rows * 2 * row.block <= SHARED_ELEMENTS and cdiv(n_samples, rows * 2) >= SHARED_PROGRAMS:
        rows *= 2
    num_warps = max(scan.num_warps, 16 if row.looped else row.num_warps, rows * row.block // (8 * lanes))
    return StatisticsConfig(rows, row.block, row.looped, scan.block, min(num_warps, 16))


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
    config = statistics_config(n_samples, n_classes, n_features, target_of(first))
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
        num_warps=config.num_warps,
    )
    return [found[name] for name in names]


def distance_table(head_weight: Tensor) -> Tensor:
    """R of all pairs of classes, (c, c), 0 on the diagonal and where rows coincide."""
    return rows_of_distance_table(head_weight, torch.arange(head_weight.shape[0], device=head_weight.device))
