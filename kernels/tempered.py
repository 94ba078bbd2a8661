"""Softmax cross-entropy with a temperature of its own for every sample: ELogitNorm and LogitNorm.

    loss = sum_j q_j g_j / T + Q log sum_j exp(-g_j / T),      g_j = f_p - f_j

    ELogitNorm: T = D = sum_j g_j R_pj / (K + average_offset); 1, without a gradient, if K = 0 or D <= eps
    LogitNorm:  T = tau (|f| + 1e-7)

The gaps give the stable form at no cost: the largest term of the partition is exp(0). Here are the kernels for rows of
any length and any target distribution, which read the row once for each step; most rows take `fused_row.py`. The
backward keeps nothing of shape (n, c) from the forward: P comes from the logits, the temperature and the partition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    LOG2_E,
    boundary_terms,
    exp2,
    finite_or_nan,
    label_mass,
    live_gap,
    mean_distance,
    own_label,
    read_label,
    scan_maximum,
    target_distribution,
)


@triton.jit
def boundary_temperature(distance_sum, n_boundaries, average_offset, eps, valid):
    """(D, T, dT/dD / (K + average_offset)) of ELogitNorm."""
    distance, share = mean_distance(distance_sum, n_boundaries, average_offset, valid)
    falls_back = distance <= eps  # K = 0 has D = 0; the kernel's caller has eps >= 0
    return distance, tl.where(falls_back, 1.0, distance), tl.where(falls_back, 0.0, share)


@triton.jit
def norm_temperature(squared_norm, tau):
    """(T, tau / |f|) of LogitNorm; the derivative of T by f_j is tau f_j / |f|, taken as 0 at f = 0."""
    norm = tl.sqrt(squared_norm)
    return tau * (norm + 1e-7), tl.where(norm > 0, tau / tl.where(norm > 0, norm, 1.0), 0.0)


@triton.jit
def temperature_sums(
    logits_row,
    table_row,
    row_maximum,
    n_classes,
    BLOCK: tl.constexpr,
    BOUNDARY: tl.constexpr,
    LOOPED: tl.constexpr = True,
):
    """(sum g R, or sum f^2 unless BOUNDARY; K; sum R; the number of live classes) of a row; LOOPED as in
    `scan_maximum`."""
    totals = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int32)
    inverse_distances = tl.zeros([BLOCK], tl.float32)
    live_counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_classes if LOOPED else BLOCK, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_row + columns, mask=columns < n_classes, other=float("-inf")).to(tl.float32)
        live, gap = live_gap(logit, row_maximum)
        if BOUNDARY:
            inverse_distance, is_boundary = boundary_terms(table_row, columns, n_classes, live)
            totals += gap * inverse_distance
            counts += is_boundary
            inverse_distances += inverse_distance
        else:
            totals += tl.where(live, logit * logit, 0.0)
        live_counts += live.to(tl.int32)
    total, n_boundaries = tl.sum(totals, axis=0), tl.sum(counts, axis=0)
    return total, n_boundaries, tl.sum(inverse_distances, axis=0), tl.sum(live_counts, axis=0)


@triton.jit
def softmax_sums(
    logits_row,
    row_maximum,
    inverse_temperature,
    n_classes,
    n_live,
    label,
    target_row,
    class_weight_pointer,
    label_smoothing,
    BLOCK: tl.constexpr,
    WITH_TARGETS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """(sum e, sum e g; and WITH_TARGETS Q, sum q g, whether a masked class holds mass as 0 or 1) of a row."""
    exponentials = tl.zeros([BLOCK], tl.float32)
    gap_sums = tl.zeros([BLOCK], tl.float32)
    q_sums = tl.zeros([BLOCK], tl.float32)
    q_gap_sums = tl.zeros([BLOCK], tl.float32)
    impossible = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_row + columns, mask=columns < n_classes, other=float("-inf")).to(tl.float32)
        live, gap = live_gap(logit, row_maximum)
        exponential = tl.where(live, exp2(gap * (inverse_temperature * -LOG2_E), HARDWARE), 0.0)
        exponentials += exponential
        gap_sums += exponential * gap
        if WITH_TARGETS:
            q = target_distribution(
                columns, n_classes, live, n_live, label, target_row, class_weight_pointer, label_smoothing,
                PROBABILITIES, WEIGHTED, SMOOTHED,
            )  # fmt: skip
            q_sums += q
            q_gap_sums += q * gap
            impossible = tl.maximum(impossible, tl.where(live | (q == 0), 0.0, 1.0))
    partition, gap_sum = tl.sum(exponentials, axis=0), tl.sum(gap_sums, axis=0)
    return partition, gap_sum, tl.sum(q_sums, axis=0), tl.sum(q_gap_sums, axis=0), tl.max(impossible, axis=0)


@triton.jit
def _loss_and_slope(partition, gap_sum, target_mass, target_gap, impossible, temperature, slope_factor, valid, ignored):
    """(log-partition, loss, slope) from the sums of a row: sum e, sum e g, Q, sum q g and whether a masked class holds
    mass."""
    partition = tl.where(valid, partition, 1.0)  # at least exp(0) in a valid row
    log_partition = tl.log(partition)
    loss = target_gap / temperature + target_mass * log_partition
    # dL/dT, divided by T twice: T^2 would underflow for a small tau.
    derivative = -(target_gap - target_mass * (gap_sum / partition)) / temperature / temperature
    impossible = impossible != 0
    loss = tl.where(impossible & (loss == loss), float("inf"), loss)  # NaN stays NaN
    slope = tl.where(impossible, 0.0, derivative * slope_factor)
    loss = tl.where(valid, loss, float("nan"))
    slope = tl.where(valid | impossible, slope, float("nan"))
    return log_partition, tl.where(ignored, 0.0, loss), tl.where(ignored, 0.0, slope)


@triton.jit(do_not_specialize=["ignore_index"])
def tempered_forward_kernel(
    logits_pointer,  # (n, c)
    logits_stride,
    target_pointer,  # (n,) int64 or (n, c)
    target_stride,
    class_weight_pointer,  # (c,) or None
    table_pointer,  # (k, c) R; None for LogitNorm
    table_row_pointer,  # (n,) int64: read where PREDICTION_KNOWN, otherwise it is p, and written
    predicted_pointer,  # (n,) int64: likewise
    loss_pointer,  # (n,) this and what follows is written
    distance_pointer,  # (n,), None for LogitNorm
    temperature_pointer,  # (n,)
    log_partition_pointer,  # (n,)
    slope_pointer,  # (n,)
    n_classes,
    ignore_index,
    label_smoothing,
    eps,
    average_offset,
    tau,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    BOUNDARY: tl.constexpr,
    PREDICTION_KNOWN: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Loss of one sample and all that its backward needs. Each step is one loop over the row, with a sum in every
    lane."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    target_stride = target_stride // ALIGN * ALIGN
    logits_row = logits_pointer + row * logits_stride

    # The prediction and the largest logit.
    if PREDICTION_KNOWN:
        predicted = tl.load(predicted_pointer + row)
        row_maximum = tl.load(logits_row + predicted).to(tl.float32)
        table_row = tl.load(table_row_pointer + row)
    else:
        row_maximum, predicted = scan_maximum(logits_row, n_classes, BLOCK)
        table_row = predicted.to(tl.int64)
        tl.store(predicted_pointer + row, table_row)
        if BOUNDARY:
            tl.store(table_row_pointer + row, table_row)
    row_maximum = finite_or_nan(row_maximum)
    valid = row_maximum == row_maximum

    total, n_boundaries, _, n_live = temperature_sums(
        logits_row, table_pointer + table_row * n_classes if BOUNDARY else None, row_maximum, n_classes, BLOCK, BOUNDARY
    )
    if BOUNDARY:
        distance, temperature, slope_factor = boundary_temperature(total, n_boundaries, average_offset, eps, valid)
        tl.store(distance_pointer + row, distance)
    else:
        temperature, slope_factor = norm_temperature(tl.where(valid, total, float("nan")), tau)

    # The loss: sums of the softmax and of the target distribution.
    if PROBABILITIES:
        label = 0
        ignored = False
        target_row = target_pointer + row * target_stride
    else:
        label, ignored, usable = read_label(target_pointer + row, ignore_index, n_classes)
        valid = valid & (usable | ignored)
        target_row = target_pointer
    WITH_TARGETS: tl.constexpr = PROBABILITIES or SMOOTHED
    partition, gap_sum, target_mass, target_gap, impossible = softmax_sums(
        logits_row, row_maximum, 1.0 / temperature, n_classes, n_live, label, target_row, class_weight_pointer,
        label_smoothing, BLOCK, WITH_TARGETS, PROBABILITIES, WEIGHTED, SMOOTHED, HARDWARE,
    )  # fmt: skip
    if not WITH_TARGETS:  # one class holds all the mass: no sums
        target_mass = label_mass(label, class_weight_pointer, WEIGHTED)
        label_live, label_gap = live_gap(tl.load(logits_row + label).to(tl.float32), row_maximum)
        target_gap = target_mass * label_gap
        impossible = tl.where(label_live, 0.0, target_mass)
    log_partition, loss, slope = _loss_and_slope(
        partition, gap_sum, target_mass, target_gap, impossible, temperature, slope_factor, valid, ignored
    )
    tl.store(loss_pointer + row, loss)
    tl.store(temperature_pointer + row, temperature)
    tl.store(log_partition_pointer + row, log_partition)
    tl.store(slope_pointer + row, slope)


@triton.jit
def _logit_gradient(
    logit,
    row_maximum,
    columns,
    predicted,
    q,
    target_mass,
    inverse_distance,
    inverse_distance_sum,
    inverse_temperature,
    log_partition,
    slope,
    BOUNDARY: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """dL/df_j = (Q P_j - q_j) / T, and through the temperature -slope R_j (slope sum R at p), or slope f_j for
    LogitNorm."""
    live, gap = live_gap(logit, row_maximum)
    probability = tl.where(live, exp2((gap * inverse_temperature + log_partition) * -LOG2_E, HARDWARE), 0.0)
    gradient = (target_mass * probability - q) * inverse_temperature
    if BOUNDARY:
        return gradient + slope * (tl.where(columns == predicted, inverse_distance_sum, 0.0) - inverse_distance)
    else:
        return gradient + slope * tl.where(live, logit, 0.0)


@triton.jit(do_not_specialize=["ignore_index", "first_class", "n_all_classes"])
def tempered_backward_kernel(
    sample_grad_pointer,  # (n,)
    logits_pointer,  # (n, c)
    logits_stride,
    target_pointer,  # (n,) int64 or (n, c)
    target_stride,
    class_weight_pointer,  # (c,) or None
    table_pointer,  # (k, c) R; None for LogitNorm
    table_row_pointer,  # (n,) int64
    predicted_pointer,  # (n,) int64
    temperature_pointer,  # (n,)
    log_partition_pointer,  # (n,)
    slope_pointer,  # (n,)
    grad_logits_pointer,  # (n, c) contiguous: written
    top_pointer,  # (n,) fp32 the largest logit; this and the next three None in one process, which has all classes
    target_mass_pointer,  # (n,) fp32 Q
    inverse_sum_pointer,  # (n,) fp32 sum R where p is a class of this process, 0 elsewhere
    n_live_pointer,  # (n,) fp32
    first_class,
    n_all_classes,
    n_classes,
    ignore_index,
    label_smoothing,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    BOUNDARY: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Gradient of one sample's logits, formed in fp32 and rounded once: as P_y approaches 1, Q P_y - q_y cancels."""
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    target_stride = target_stride // ALIGN * ALIGN
    logits_row = logits_pointer + row * logits_stride
    grad_row = grad_logits_pointer + row * n_classes
    columns = tl.arange(0, BLOCK)

    sample_grad = tl.load(sample_grad_pointer + row).to(tl.float32)
    predicted = tl.load(predicted_pointer + row)
    if top_pointer is None:
        row_maximum = finite_or_nan(tl.load(logits_row + predicted).to(tl.float32))
    else:
        row_maximum = finite_or_nan(tl.load(top_pointer + row))
    inverse_temperature = 1.0 / tl.load(temperature_pointer + row)
    log_partition = tl.load(log_partition_pointer + row)
    slope = tl.load(slope_pointer + row)
    valid = row_maximum == row_maximum
    if PROBABILITIES:
        label = 0
        ignored = False
        target_row = target_pointer + row * target_stride
    else:
        label, ignored, usable = read_label(target_pointer + row, ignore_index, n_all_classes)
        valid = valid & (usable | ignored)
        if top_pointer is not None:
            label = own_label(label, first_class, n_classes)
        target_row = target_pointer
    table_row = table_pointer + tl.load(table_row_pointer + row) * n_classes if BOUNDARY else table_pointer
    # An ignored row has gradient 0 even if it holds NaN, and a row that is not valid has NaN even in masked classes.
    whole_row = tl.where(ignored, 0.0, float("nan"))
    computed = valid & (ignored == 0)

    # What must be known before the first gradient is written: sum R, and c_live for q, then Q.
    if top_pointer is not None:
        inverse_distance_sum = tl.load(inverse_sum_pointer + row)
        n_live = tl.load(n_live_pointer + row)
        target_mass = tl.load(target_mass_pointer + row)
    else:
        _, _, inverse_distance_sum, n_live = temperature_sums(
            logits_row, table_row, row_maximum, n_classes, BLOCK, BOUNDARY
        )
        if PROBABILITIES or SMOOTHED:
            target_mass = softmax_sums(
                logits_row, row_maximum, inverse_temperature, n_classes, n_live, label, target_row,
                class_weight_pointer, label_smoothing, BLOCK, True, PROBABILITIES, WEIGHTED, SMOOTHED, HARDWARE,
            )[2]  # fmt: skip
        else:
            target_mass = label_mass(label, class_weight_pointer, WEIGHTED)
    for start in range(0, n_classes, BLOCK):
        offset = start + columns
        logit = tl.load(logits_row + offset, mask=offset < n_classes, other=float("-inf")).to(tl.float32)
        live = logit != float("-inf")
        q = target_distribution(
            offset, n_classes, live, n_live, label, target_row, class_weight_pointer, label_smoothing,
            PROBABILITIES, WEIGHTED, SMOOTHED,
        )  # fmt: skip
        inverse_distance = boundary_terms(table_row, offset, n_classes, live)[0] if BOUNDARY else 0.0
        gradient = _logit_gradient(
            logit, row_maximum, offset, predicted, q, target_mass, inverse_distance, inverse_distance_sum,
            inverse_temperature, log_partition, slope, BOUNDARY, HARDWARE,
        )  # fmt: skip
        tl.store(grad_row + offset, tl.where(computed, gradient * sample_grad, whole_row), mask=offset < n_classes)
