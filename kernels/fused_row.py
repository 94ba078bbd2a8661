"""The loss of a row and the gradient of its logits from one read and one write: what most rows take.

The formulas are those of `tempered.py`. The row, its gaps and its row of the table stay in registers, up to
`launch.ROW_IN_REGISTERS` classes, for class indices with class weights or label smoothing (not both). Given a gradient
of the losses, the gradient of the logits is written at once; without statistics to write it is the backward pass alone.

Masked classes and NaN cost nothing where there are none: they make the sum of a row inf or NaN, and such rows pass
through a branch of their own, which takes the masked classes out. Two columns differ from the others, the label's and
the prediction's: they are written again behind a barrier, which is cheaper than two comparisons for each column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import FAR, LARGE, LOG2_E, exp2, finite_or_nan, maximum, read_label, reciprocal
from .tempered import boundary_temperature, norm_temperature


@triton.jit
def _temperature_sums(gap, slopes, BOUNDARY: tl.constexpr):
    """(sum g R, sum R, K) or, for LogitNorm, (sum f^2, 0, 0)."""
    if BOUNDARY:
        total, slope_sum = tl.sum(gap * slopes, axis=0), tl.sum(slopes, axis=0)
        # R is not negative: its bits are 0 only where it is. Cheaper than a comparison.
        n_boundaries = tl.sum(tl.minimum(slopes.to(tl.int32, bitcast=True), 1), axis=0)
        return total, slope_sum, n_boundaries
    else:
        return tl.sum(slopes * slopes, axis=0), 0.0, 0


@triton.jit(do_not_specialize=["ignore_index"])
def fused_row_kernel(
    logits_pointer,  # (n, c)
    sample_grad_pointer,  # (n,) or expanded, or () what the losses are divided by; None: no gradient, or COUNT
    target_pointer,  # (n,) int64
    class_weight_pointer,  # (c,) or None
    table_pointer,  # (k, c) R; None for LogitNorm
    table_row_pointer,  # (n,) int64: read where PREDICTION_KNOWN, otherwise it is p, and written; None: it is p
    predicted_pointer,  # (n,) int64: read or written likewise
    loss_pointer,  # (n,) this and what follows is written; None in the backward pass
    distance_pointer,  # (n,), None for LogitNorm
    temperature_pointer,  # (n,): read in the backward pass; this and the next two None where there will be none
    log_partition_pointer,  # (n,), None in the backward pass
    slope_pointer,  # (n,): read in the backward pass
    pull_pointer,  # (n,) or None: sample_grad slope boost, written
    grad_logits_pointer,  # (n, c) contiguous: written, None without sample_grad
    label_smoothing,
    eps,
    average_offset,
    tau,
    boost,
    sample_grad_stride,
    ignore_index,
    logits_stride,
    n_samples,
    n_classes,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    BOUNDARY: tl.constexpr,
    PREDICTION_KNOWN: tl.constexpr,
    SMOOTHED: tl.constexpr,
    IS_DIVISOR: tl.constexpr,
    COUNT: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Loss of one sample, what its backward pass needs, and the gradient of its logits.

    IS_DIVISOR: the loss is divided, too. COUNT, at least n or 0: the divisor is how many targets are not ignored.
    """
    row = tl.program_id(0).to(tl.int64)
    n_classes = n_classes // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    logits_row = logits_pointer + row * logits_stride
    columns = tl.arange(0, BLOCK)
    inside = columns < n_classes
    # Single numbers are read before anything is stored: the compiler cannot move a load over a store.
    label, ignored, usable = read_label(target_pointer + row, ignore_index, n_classes)
    mass = 1.0
    if class_weight_pointer is not None:
        mass = tl.load(class_weight_pointer + label).to(tl.float32)
    own = tl.load(logits_row + label).to(tl.float32)
    own_live = own != float("-inf")
    sample_grad = 1.0
    if COUNT:
        samples = tl.arange(0, COUNT)
        targets = tl.load(target_pointer + samples, mask=samples < n_samples, other=ignore_index)
        sample_grad = 1.0 / tl.sum((targets != ignore_index).to(tl.float32), axis=0)
    elif IS_DIVISOR:
        sample_grad = 1.0 / tl.load(sample_grad_pointer).to(tl.float32)
    elif sample_grad_pointer is not None:
        sample_grad = tl.load(sample_grad_pointer + row * sample_grad_stride).to(tl.float32)

    # The prediction and the largest logit. The padding is far below every logit.
    if logits_pointer.dtype.element_ty == tl.float16:  # which cannot hold it
        logit = tl.load(logits_row + columns, mask=inside, other=0.0).to(tl.float32)
        logit = tl.where(inside, logit, -FAR)
    else:
        logit = tl.load(logits_row + columns, mask=inside, other=-FAR).to(tl.float32)
    if PREDICTION_KNOWN:
        predicted = tl.load(predicted_pointer + row)
        table_row = predicted
        if table_row_pointer is not None:
            table_row = tl.load(table_row_pointer + row)
        top = finite_or_nan(tl.load(logits_row + predicted).to(tl.float32))
    else:
        top = maximum(logit, 0)
        predicted = tl.min(tl.where(logit == top, columns, n_classes - 1), axis=0).to(tl.int64)
        table_row = predicted
        top = finite_or_nan(tl.where(top > -FAR, top, float("-inf")))  # no live class: only the padding is left

    # The temperature. `slopes`: what D or |f|^2/2 have as derivatives by -f.
    gap = top - logit
    if BOUNDARY:
        inverse_distances = table_pointer + table_row * n_classes
        slopes = tl.load(inverse_distances + columns, mask=inside, other=0.0)
        own_slope = tl.load(inverse_distances + label)
    else:
        slopes = tl.where(inside, -logit, 0.0)
        own_slope = -own
    total, slope_sum, n_boundaries = _temperature_sums(gap, slopes, BOUNDARY)
    n_live = n_classes
    if ignored | (total == float("inf")) | (total != total):
        live = inside & (logit != float("-inf"))
        gap = tl.where(live, gap, FAR)
        slopes = tl.where(live, slopes, 0.0)
        total, slope_sum, n_boundaries = _temperature_sums(gap, slopes, BOUNDARY)
        n_live = tl.sum(live.to(tl.int32), axis=0)
        gap = tl.where(ignored, 0.0, gap)  # an ignored row has gradient 0 even if it holds NaN
        slopes = tl.where(ignored, 0.0, slopes)
        if not PREDICTION_KNOWN:  # the first NaN, if there is one
            unknown = tl.min(tl.where(logit != logit, columns, n_classes), axis=0)
            predicted = tl.where(unknown < n_classes, unknown.to(tl.int64), predicted)
    if not PREDICTION_KNOWN:
        tl.store(predicted_pointer + row, predicted)
        if table_row_pointer is not None:
            tl.store(table_row_pointer + row, predicted)
    if BOUNDARY:
        distance, temperature, slope_factor = boundary_temperature(total, n_boundaries, average_offset, eps, top == top)
    else:
        temperature, slope_factor = norm_temperature(tl.where(top == top, total, float("nan")), tau)
    if loss_pointer is None:
        temperature = tl.load(temperature_pointer + row)

    # The loss, sum_j q_j g_j / T + Q log Z. dL/dT is divided by T twice: T^2 would underflow for a small tau.
    inverse_temperature = tl.where(ignored, 0.0, 1.0 / temperature)
    scale = inverse_temperature * -LOG2_E
    exponential = exp2(gap * scale, HARDWARE)
    if temperature > FAR / 128:  # up to there exp(-FAR / T) is 0
        exponential = tl.where(inside & (gap != FAR), exponential, 0.0)
    partition, gap_sum = tl.sum(exponential, axis=0), tl.sum(exponential * gap, axis=0)
    own_mass = mass
    own_gap = tl.where(own_live, top - own, 0.0)
    target_gap = mass * own_gap
    spread = 0.0  # what smoothing gives to each live class
    if SMOOTHED:
        own_mass = 1.0 - label_smoothing
        spread = label_smoothing / tl.maximum(n_live, 1).to(tl.float32)
        target_gap = own_mass * own_gap + spread * tl.sum(tl.where(gap < FAR, gap, 0.0), axis=0)
    inverse_partition = reciprocal(partition, HARDWARE)
    if loss_pointer is None:
        slope = tl.where(ignored, 0.0, tl.load(slope_pointer + row) * temperature)
    else:
        impossible = (own_live == 0) & (own_mass != 0)
        slope = -(target_gap - mass * (gap_sum * inverse_partition)) * inverse_temperature * slope_factor
        slope = tl.where(usable, tl.where(impossible, 0.0, slope), float("nan"))
        slope = tl.where(ignored, 0.0, slope)  # T times what it will be
        log_partition = tl.log(partition)
        loss = target_gap * inverse_temperature + mass * log_partition
        loss = tl.where(impossible & (loss == loss), float("inf"), loss)  # NaN stays NaN
        loss = tl.where(ignored, 0.0, tl.where(usable, loss, float("nan")))
        if IS_DIVISOR:
            loss *= sample_grad
        tl.store(loss_pointer + row, loss)
        if temperature_pointer is not None:
            tl.store(temperature_pointer + row, temperature)
            tl.store(log_partition_pointer + row, log_partition)
            tl.store(slope_pointer + row, slope * tl.where(slope == 0, 0.0, inverse_temperature))  # T may be NaN there
        if BOUNDARY:
            tl.store(distance_pointer + row, distance)

    # dL/df_j = (Q P_j - q_j) / T - slope R_j, in fp32 and rounded once: as P_y approaches 1, Q P_y - q_y cancels.
    if grad_logits_pointer is not None:
        sample_grad = tl.where(ignored, 0.0, tl.where(usable, sample_grad, float("nan")))
        by_logit = sample_grad * inverse_temperature
        by_exponential = mass * by_logit * inverse_partition
        if pull_pointer is not None:
            by_temperature = tl.where(slope == 0, 0.0, inverse_temperature)
            tl.store(pull_pointer + row, (sample_grad * boost) * slope * by_temperature)
        by_slope = by_logit * slope
        if temperature > LARGE:  # of rows very near to each other: 1 / T^2 would leave the range, but R / T does not
            by_slope = sample_grad * slope
            slopes *= inverse_temperature
            own_slope *= inverse_temperature
            slope_sum *= inverse_temperature
        spread = spread * by_logit
        gradient = exponential * by_exponential - slopes * by_slope
        if SMOOTHED:
            gradient -= tl.where(gap < FAR, spread, 0.0)
        grad_row = grad_logits_pointer + row * n_classes
        tl.store(grad_row + columns, gradient, mask=inside)
        tl.debug_barrier()
        computed = usable & (ignored == 0)
        own_exponential = exp2(own_gap * scale, HARDWARE)
        own_gradient = own_exponential * by_exponential - own_slope * by_slope - spread
        own_gradient = tl.where(own_live, own_gradient, 0.0) - own_mass * by_logit
        tl.store(grad_row + label, own_gradient, mask=computed)
        if BOUNDARY:
            at_top = by_exponential + by_slope * slope_sum - spread
            at_top -= tl.where(label == predicted, own_mass * by_logit, 0.0)
            tl.store(grad_row + predicted, at_top, mask=computed)


@triton.jit
def scale_block(values_pointer, factor_pointer, block, n_values, BLOCK: tl.constexpr):
    """Values block * BLOCK and on *= factor, 0-dim; nothing is read or written where it is 1, which only the device
    knows."""
    factor = tl.load(factor_pointer).to(tl.float32)
    if factor != 1.0:
        for start in range(0, BLOCK, 1024):  # 8 values a thread of 4 warps: a 128-bit load in half precision
            place = block.to(tl.int64) * BLOCK + start + tl.arange(0, 1024)
            values = tl.load(values_pointer + place, mask=place < n_values, other=0.0).to(tl.float32)
            tl.store(values_pointer + place, values * factor, mask=place < n_values)


@triton.jit
def scale_kernel(values_pointer, factor_pointer, n_values, BLOCK: tl.constexpr):
    """`scale_block` of all values."""
    scale_block(values_pointer, factor_pointer, tl.program_id(0), n_values, BLOCK)
