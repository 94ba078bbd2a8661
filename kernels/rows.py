"""Device functions that the kernels share. One program works one row; `columns` are its column indices.

A row is padded to a power of two with -inf, so that padding is the same as a masked class: not *live*, and without
effect.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LAST = tl.constexpr((1 << 31) - 1)  # above every column index
LOG2_E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(2.0**40)  # a temperature whose square, times gradients, may leave the range
# The gap of a class that is not there: its exponential is 0, and so is 0 * FAR. Exact in bfloat16.
FAR = tl.constexpr(227 * 2.0**120)


@triton.jit
def exp2(x, HARDWARE: tl.constexpr):
    """2^x. HARDWARE: NVIDIA's instruction, results below 2^-126 as 0; kept, they would cost four more of them."""
    if HARDWARE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, HARDWARE: tl.constexpr):
    """log2 x for x >= 0, as `exp2`."""
    if HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, HARDWARE: tl.constexpr):
    """1 / x for x whose reciprocal is no denormal, as `exp2`."""
    if HARDWARE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_2(a0, a1, b0, b1):
    """Two sums in one reduction."""
    return a0 + b0, a1 + b1


@triton.jit
def add_3(a0, a1, a2, b0, b1, b2):
    """Three sums in one reduction."""
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def maximum(values, axis: tl.constexpr):
    """The largest along `axis`, NaN if there is one."""
    return tl.reduce(values, axis, _larger)


@triton.jit
def first_maximum(values, indices, axis: tl.constexpr):
    """(maximum, index of its first occurrence) along `axis`; the first NaN, if there is one, is the maximum."""
    largest = maximum(values, axis)
    found = (values != values) | (values == (largest[:, None] if axis == 1 else largest))
    return largest, tl.min(tl.where(found, indices, _LAST), axis=axis)


@triton.jit
def keep_better(best, index, values, columns):
    """The maximum so far and its column against a later one: the first occurrence stays, the first NaN for good."""
    better = (values > best) | ((values != values) & (best == best))
    return tl.where(better, values, best), tl.where(better, columns, index)


@triton.jit
def scan_maximum(row_pointer, n_columns, BLOCK: tl.constexpr, LOOPED: tl.constexpr = True):
    """`first_maximum` of a row of any length, BLOCK columns at a time; at most BLOCK unless LOOPED, which the compiler
    makes no loop of."""
    lanes = tl.arange(0, BLOCK)
    values = tl.load(row_pointer + lanes, mask=lanes < n_columns, other=float("-inf")).to(tl.float32)
    best, index = first_maximum(values, lanes, 0)
    for start in range(BLOCK, n_columns if LOOPED else BLOCK, BLOCK):
        columns = start + lanes
        values = tl.load(row_pointer + columns, mask=columns < n_columns, other=float("-inf")).to(tl.float32)
        top, column = first_maximum(values, columns, 0)
        best, index = keep_better(best, index, top, column)
    return best, index


@triton.jit
def live_gap(logit, row_maximum):
    """(live, g): whether a class is not masked, and f_p - f_j there, 0 elsewhere."""
    live = logit != float("-inf")
    return live, tl.where(live, row_maximum - tl.where(live, logit, 0.0), 0.0)


@triton.jit
def finite_or_nan(row_maximum):
    """The largest logit of a valid row; NaN for a row that holds NaN (its maximum) or +inf, or has no live class.
    Gaps and all that is made of them are then NaN as well."""
    return tl.where(tl.abs(row_maximum) < float("inf"), row_maximum, float("nan"))


@triton.jit
def boundary_terms(table_row_pointer, columns, n_classes, live):
    """(R, whether there is a boundary) of the predicted class against these columns; masked classes have none."""
    inverse_distance = tl.load(table_row_pointer + columns, mask=columns < n_classes, other=0.0)
    inverse_distance = tl.where(live, inverse_distance, 0.0)
    return inverse_distance, (inverse_distance > 0).to(tl.int32)


@triton.jit
def mean_distance(distance_sum, n_boundaries, average_offset, valid):
    """(D, 1 / (K + average_offset)), both 0 where there is no boundary, and NaN where the row is not valid."""
    share = tl.where(n_boundaries > 0, 1.0 / (tl.maximum(n_boundaries, 1).to(tl.float32) + average_offset), 0.0)
    share = tl.where(valid, share, float("nan"))
    return distance_sum * share, share


@triton.jit
def read_label(target_pointer, ignore_index, n_classes):
    """(class, whether the sample is ignored, whether there is such a class): if not, 0 is read in its place."""
    label = tl.load(target_pointer)
    ignored = label == ignore_index
    usable = (label >= 0) & (label < n_classes)
    return tl.where(usable, label, 0), ignored, usable


@triton.jit
def own_label(label, first_class, n_classes):
    """The place of a class among those of this process, -1 for those of others."""
    return tl.where((label >= first_class) & (label < first_class + n_classes), label - first_class, -1)


@triton.jit
def target_distribution(
    columns,
    n_classes,
    live,
    n_live,
    label,
    target_row_pointer,
    class_weight_pointer,
    label_smoothing,
    PROBABILITIES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """q_j = w_j ((1 - e) t_j + e / c_live [j live]), with t the given probabilities or one-hot at `label`; 0 in the
    padding."""
    inside = columns < n_classes
    if PROBABILITIES:
        q = tl.load(target_row_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        q = tl.where(columns == label, 1.0, 0.0)
    if SMOOTHED:
        share = label_smoothing / tl.maximum(n_live, 1).to(tl.float32)
        q = q * (1.0 - label_smoothing) + tl.where(live, share, 0.0)
    if WEIGHTED:
        q = q * tl.load(class_weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    return q


@triton.jit
def label_mass(label, class_weight_pointer, WEIGHTED: tl.constexpr):
    """q_y = Q of a class index without smoothing."""
    if WEIGHTED:
        return tl.load(class_weight_pointer + label).to(tl.float32)
    else:
        return 1.0


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a b, the sum rounded to nearest.

    Tensor cores truncate what they accumulate. Over a row of 2048 features that bias reaches 2e-5 of the norms,
    which is 6e-4 of R for a pair at the edge of `boundary.CLOSE_PAIR`. A product that starts from zero truncates a
    few times only; but Triton would fold the addition back into the product, unless `max_num_imprecise_acc` (which
    means nothing else for these dtypes) asks for it to be apart.
    """
    return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])


@triton.jit
def add_split_product(total, values, weight, PRECISION: tl.constexpr, APART: tl.constexpr):
    """total + values weight, `values` in fp32. With weight in bf16, values in two bf16 parts, 16 bits: what is left out
    is 1.5e-5 of each, in a gradient that is stored in bf16.

    APART: the parts share no operation, and the compiler takes both from registers. Otherwise the first goes through
    shared memory, which costs a barrier and instructions, and saves registers.
    """
    if weight.dtype == tl.bfloat16:
        if APART:
            bits = values.to(tl.int32, bitcast=True)
            high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            low = (values - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        else:
            high = values.to(tl.bfloat16)
            low = (values - high.to(tl.float32)).to(tl.bfloat16)
        part = tl.dot(low, weight, max_num_imprecise_acc=values.shape[1])
        return total + tl.dot(high, weight, part, max_num_imprecise_acc=values.shape[1])
    else:
        return add_product(total, values, weight, PRECISION)
