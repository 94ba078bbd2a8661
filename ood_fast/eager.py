"""The analytic forward and backward passes in plain PyTorch: the path of CPUs, of devices without Triton, of float64.

The notation and the formulas are those of `ood_fast.kernels` (see `kernels/README.md`); `ops.py` chooses between the
two, which offer the same functions. `ops.py` has checked shapes, dtypes and devices before anything here runs, and n >=
1.

What is worth knowing before reading:

- Rows are worked in chunks that stay in a core's cache, so the temporaries of a batch are a few megabytes whatever n
  is.
- The gaps g_j = f_p - f_j carry the whole computation: softmax is shift-invariant, so exp(-g_j / T) needs no second
  maximum.
- Most batches have no masked class, no coincident rows and no tied row. Whether that is so falls out of the distances
  themselves (`_is_plain`), and only the other batches pay for the `where`s.
- Nothing autograd records is run: every function is called below autograd, and returns gradients in closed form.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import checks

# Elements of a chunk of rows: three float32 temporaries of this size (3 MiB) stay in the caches of one core pair.
ROW_CHUNK_ELEMENTS = 1 << 18
# Elements of a tile of the distance table: bounds the two temporaries of the Gram form at 8 MiB in float32 each.
TABLE_TILE_ELEMENTS = 1 << 21
# Elements of a tile of centred rows of W where only some rows of the table are wanted: W itself is never copied whole.
WEIGHT_TILE_ELEMENTS = 1 << 19
# Elements of the buffer in which the form without logits works: 64 MiB in float32, so that with the tiles it stays
# below 100 MB. Fewer rows than MIN_LINEAR_ROWS would stream W from memory for too little arithmetic.
LINEAR_BUFFER_ELEMENTS = 1 << 24
MIN_LINEAR_ROWS = 16
# Classes of a tile in which a prediction is looked for, at least: fewer make thin products.
PREDICTION_CLASSES = 256
# Multiply-adds from which a product goes to oneDNN; below, its call costs more than it saves.
ONEDNN_PRODUCT = 1 << 20
# Elements gathered at a time for direct differences.
DIFFERENCE_ELEMENTS = 1 << 18
# The Gram form of s = |w_p|^2 + |w_j|^2 - 2 w_p.w_j has an absolute error of about eps * sqrt(m) * (|w_p|^2 + |w_j|^2),
# in float32 up to 1e-6 of the norms at m = 2048. Below this share of the norms the relative error of 1/sqrt(s) could
# pass 5e-5: such pairs are recomputed from their differences.
CLOSE_PAIR = 1e-2

_LOGITNORM_EPS = 1e-7


def is_exporting() -> bool:
    """Whether this run makes a graph for torch.export or ONNX."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def keep_tensors(maxsize: int) -> Callable[[Callable], Callable]:
    """`functools.lru_cache` for a function that makes one tensor or a tuple of them. Those of a mode that makes others
    than plain ones, such as FakeTensorMode, serve once."""

    def keep(function: Callable) -> Callable:
        kept = functools.lru_cache(maxsize)(function)

        @functools.wraps(function)
        def made(*args: Any) -> Any:
            tensors = kept(*args)
            if not all(type(t) is Tensor for t in (tensors if isinstance(tensors, tuple) else (tensors,))):
                kept.cache_clear()
            return tensors

        return made

    return keep


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of all arithmetic: float64 if any input has it, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Matrix products at full precision inside, whatever autocast or `torch.set_float32_matmul_precision` say."""
    if torch.compiler.is_compiling():  # a graph cannot hold the setting: a compiled program follows the caller's
        return _NOTHING_TO_DO
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    if matmul.fp32_precision in ("none", "ieee") and not torch.is_autocast_enabled(device.type):
        return _NOTHING_TO_DO
    return _full_precision(device, matmul)


_NOTHING_TO_DO = contextlib.nullcontext()


@contextlib.contextmanager
def _full_precision(device: torch.device, matmul: object) -> Iterator[None]:
    chosen = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = chosen


@functools.cache
def _has_onednn() -> bool:
    """Whether oneDNN can multiply float32 matrices with AVX-512 here, at full precision."""
    modes = (os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT") for name in ("ONEDNN", "DNNL"))
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and all(mode.upper() == "STRICT" for mode in modes)
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, fresh.

    MKL, which torch.mm calls, leaves AVX-512 unused on AMD's processors and takes twice the time of oneDNN there; this
    is the operator that torch's own compiler calls for a linear layer.
    """
    if (
        left.dtype == torch.float32
        and left.device.type == "cpu"
        and left.shape[0] * right.numel() >= ONEDNN_PRODUCT
        and _has_onednn()
        and torch.backends.mkldnn.enabled
    ):
        return torch.ops.mkldnn._linear_pointwise.default(left, right.t(), None, "none", [], "")
    return left @ right


def _row_chunks(n_samples: int, width: int) -> Iterator[slice | None]:
    """Slices of rows that stay in cache; None, which `_take` reads as all rows, where one chunk holds the batch.

    A small batch costs its calls, not its arithmetic: there each slice saved is a microsecond of a hundred.
    """
    step = max(1, ROW_CHUNK_ELEMENTS // max(1, width))
    if step >= n_samples:
        yield None
        return
    for start in range(0, n_samples, step):
        yield slice(start, min(start + step, n_samples))


def _take(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _join(chunks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The n-vectors (or (n, .) buffers) of all chunks, in order."""
    return chunks[0] if len(chunks) == 1 else tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Targets: q_j, the target distribution of a sample after class weights and label smoothing
# ----------------------------------------------------------------------------------------------------------------------


class _Targets:
    """q and its sums, as F.cross_entropy defines them, for one chunk of rows at a time.

    index y:        q_j = w_j ((1 - e) [j = y] + e/c_live [j live])
    probability t:  q_j = w_j ((1 - e) t_j     + e/c_live [j live])

    Smoothing spreads over the live classes only: those whose logit is not -inf. `live` is None where every class is.
    """

    def __init__(
        self,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        n_classes: int,
        dtype: torch.dtype,
    ):
        self.class_weight = None if class_weight is None else class_weight.to(dtype)
        self.smoothing = smoothing
        self.dtype = dtype
        self.ignored: Tensor | None = None  # (n,) samples with ignore_index
        self.invalid: Tensor | None = None  # (n,) class indices out of range; on the CPU those raise instead
        self.index: Tensor | None = None  # (n, 1)
        self.probability: Tensor | None = None  # (n, c)
        if target.is_floating_point():
            self.probability = target
            return
        if target.device.type != "cpu":
            self.ignored = target == ignore_index
            self.invalid = ((target < 0) | (target >= n_classes)) & ~self.ignored
            target = target.masked_fill(self.ignored | self.invalid, 0)
        elif checks.index_range(target, n_classes, ignore_index):
            self.ignored = target == ignore_index
            target = target.masked_fill(self.ignored, 0)
        self.index = target.unsqueeze(1)
        self.own: Tensor | float = 1.0 - smoothing  # the mass on y: a number, or (n, 1)
        if self.class_weight is not None:
            self.own = self.class_weight[self.index] * self.own

    def _own(self, rows: slice | None) -> Tensor | float:
        return _take(self.own, rows) if isinstance(self.own, Tensor) else self.own

    def _mass(self, rows: slice | None, dtype: torch.dtype) -> Tensor:
        """(1 - e) w_j t_j, (r, c)."""
        mass = _take(self.probability, rows).to(dtype)
        if self.class_weight is not None:
            mass = mass * self.class_weight
        return mass * (1.0 - self.smoothing) if self.smoothing else mass

    def _smoothed(self, live: Tensor | None, n_classes: int) -> Tensor | float:
        """The smoothing's share of q: a number, (1, c) or (r, c), whichever is smallest."""
        if live is None:
            share: Tensor | float = self.smoothing / n_classes
            return share if self.class_weight is None else (self.class_weight * share).unsqueeze(0)
        share = live * (self.smoothing / live.sum(1, keepdim=True).clamp_(min=1).to(self.dtype))
        return share if self.class_weight is None else share * self.class_weight

    def total(self, rows: slice | None, live: Tensor | None, n_classes: int, dtype: torch.dtype) -> Tensor | float:
        """Q = sum_j q_j, (r,) or a number."""
        if self.index is not None:
            own = self._own(rows)
            total = own.squeeze(1) if isinstance(own, Tensor) else own
        else:
            total = self._mass(rows, dtype).sum(1)
        if self.smoothing:
            smoothed = self._smoothed(live, n_classes)
            total = total + (smoothed.sum(1) if isinstance(smoothed, Tensor) else smoothed * n_classes)
        return total

    def weighted_gap(self, gap: Tensor, rows: slice | None, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(sum_j q_j g_j, whether a masked class holds target mass), both (r,); `gap` is 0 on masked classes."""
        impossible = None
        if self.index is not None:
            y, own = _take(self.index, rows), self._own(rows)
            weighted = gap.gather(1, y)
            if isinstance(own, Tensor) or own != 1.0:
                weighted = weighted * own
            weighted = weighted.squeeze(1)
            if live is not None:
                impossible = (~live.gather(1, y) & torch.as_tensor(own != 0, device=gap.device)).squeeze(1)
        else:
            mass = self._mass(rows, gap.dtype)
            weighted = (mass * gap).sum(1)
            if live is not None:
                impossible = ((mass != 0) & ~live).any(1)
        if self.smoothing:
            weighted = weighted + (gap * self._smoothed(live, gap.shape[1])).sum(1)
        return weighted, impossible

    def subtract_from(self, gradient: Tensor, scale: Tensor, rows: slice | None, live: Tensor | None) -> None:
        """gradient_ij -= scale_i q_ij, in place; `scale` is (r, 1)."""
        if self.index is not None:
            own = self._own(rows)
            mass = scale.neg() if not isinstance(own, Tensor) and own == 1.0 else scale * own * -1.0
            gradient.scatter_add_(1, _take(self.index, rows), mass)
        else:
            gradient.addcmul_(self._mass(rows, gradient.dtype), scale, value=-1)
        if self.smoothing:
            gradient.sub_(scale * self._smoothed(live, gradient.shape[1]))

    def settle(self, rows: slice | None, loss: Tensor, slope: Tensor) -> None:
        """Ignored samples cost nothing; an index out of range gives NaN, never a read of memory that is not ours."""
        if self.ignored is not None:
            loss.masked_fill_(_take(self.ignored, rows), 0.0)
            slope.masked_fill_(_take(self.ignored, rows), 0.0)
        if self.invalid is not None:
            loss.masked_fill_(_take(self.invalid, rows), math.nan)

    def silence(self, gradient: Tensor, rows: slice | None) -> None:
        """The gradient of ignored samples is 0, whatever their logits; of an index out of range NaN, as its loss is."""
        if self.ignored is not None:
            gradient.masked_fill_(_take(self.ignored, rows).unsqueeze(1), 0.0)
        if self.invalid is not None:
            gradient.masked_fill_(_take(self.invalid, rows).unsqueeze(1), math.nan)


# ----------------------------------------------------------------------------------------------------------------------
# Softmax cross-entropy with a temperature per sample, from the gaps: ELogitNorm and LogitNorm share it
# ----------------------------------------------------------------------------------------------------------------------


def _is_plain(scale: Tensor, floor: float) -> bool:
    """Whether every D (or ||f||) is an ordinary number above `floor`: nothing masked (inf, NaN), tied or NaN."""
    low, high = torch.aminmax(scale)
    return low.item() > floor and high.item() < math.inf


def _tempered_forward(
    gap: Tensor,
    temperature: Tensor,
    targets: _Targets,
    rows: slice | None,
    live: Tensor | None,
    scratch: Tensor,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log sum_j exp(-g_j/T), dL/dT), all (r,). `gap` is 0 on masked classes; `scratch` is spent."""
    exponent = torch.mul(gap, temperature.reciprocal().neg_().unsqueeze(1), out=scratch)
    if live is not None:
        exponent.masked_fill_(~live, -math.inf)
    weight = exponent.exp_()
    partition = weight.sum(1)
    log_partition = partition.log()
    weighted_gap, impossible = targets.weighted_gap(gap, rows, live)
    total = targets.total(rows, live, gap.shape[1], gap.dtype)
    # A number 1 is the mass of a class index without weights or smoothing: one product less.
    unit_mass = not isinstance(total, Tensor) and total == 1.0
    loss = torch.addcdiv(log_partition if unit_mass else log_partition * total, weighted_gap, temperature)
    if impossible is not None:
        loss.masked_fill_(impossible & ~loss.isnan(), math.inf)
    if not with_slope:
        return loss, log_partition, torch.empty_like(loss)
    mean_gap = weight.mul_(gap).sum(1).div_(partition)
    if not unit_mass:
        mean_gap.mul_(total)
    # Divided twice: T * T would underflow for a small tau.
    slope = mean_gap.sub_(weighted_gap).div_(temperature).div_(temperature)
    if impossible is not None:
        slope.masked_fill_(impossible, 0.0)
    return loss, log_partition, slope


def _tempered_backward(
    gap: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    sample_grad: Tensor,
    targets: _Targets,
    rows: slice | None,
    live: Tensor | None,
) -> Tensor:
    """(Q P_j - q_j) / T times the incoming gradient of the row: the logit gradient at constant T, (r, c), fresh."""
    inverse = temperature.reciprocal().unsqueeze(1)
    gradient = torch.addcmul(log_partition.neg().unsqueeze(1), gap, inverse, value=-1).exp_()
    if live is not None:
        gradient.masked_fill_(~live, 0.0).masked_fill_(gap.isnan(), math.nan)
    scale = inverse * sample_grad.unsqueeze(1)
    total = targets.total(rows, live, gap.shape[1], gap.dtype)
    if isinstance(total, Tensor):
        total = total.unsqueeze(1)
    gradient.mul_(scale if not isinstance(total, Tensor) and total == 1.0 else scale * total)
    targets.subtract_from(gradient, scale, rows, live)
    return gradient


def _mask_gaps(logits: Tensor, gap: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """(live classes, gaps with 0 on masked ones and NaN throughout rows that hold NaN or +inf or nothing live)."""
    live = logits != -math.inf
    gap = gap.masked_fill_(~live, 0.0).masked_fill_(~top.isfinite().unsqueeze(1), math.nan)
    return live, gap


# ----------------------------------------------------------------------------------------------------------------------
# Distances between rows of the head
# ----------------------------------------------------------------------------------------------------------------------


def _centered(weight: Tensor, mean_row: Tensor, out: Tensor | None = None) -> Tensor:
    """W less its mean row: differences stay as they are, and products of the rest lose no digits to a common offset.

    Written over the first rows of `out` where it is given: a fresh tile costs more in page faults than in arithmetic.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=mean_row.dtype, device=weight.device)
    return torch.sub(weight, mean_row, out=out[: weight.shape[0]])


def _centered_rows(head_weight: Tensor, classes: Tensor, mean_row: Tensor) -> Tensor:
    """`_centered` rows W[classes]: in the place of what was gathered."""
    return head_weight[classes].to(mean_row.dtype).sub_(mean_row)


def _weight_tile(head_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a tile of rows of W: as many as WEIGHT_TILE_ELEMENTS holds."""
    n_classes, n_features = head_weight.shape
    n_rows = min(n_classes, max(1, WEIGHT_TILE_ELEMENTS // max(1, n_features)))
    return torch.empty(n_rows, n_features, dtype=dtype, device=head_weight.device)


def _slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _inverse_distances(head_weight: Tensor, classes: Tensor | None, out: Tensor) -> bool:
    """out[r, j] = 1 / ||w_p - w_j||, p = classes[r] (all of them in order if None); 0 where j = p or rows coincide.

    Returns whether no two of the rows compared coincide: then every row has c - 1 boundaries.
    """
    n_rows, n_classes = out.shape
    mean_row = head_weight.mean(0, dtype=out.dtype)
    square = classes is None
    if square:
        classes = torch.arange(n_classes, device=out.device)
    left = _centered(head_weight, mean_row) if square else _centered_rows(head_weight, classes, mean_row)
    left_norms = torch.linalg.vector_norm(left, dim=1).square_()
    buffer = left if square else _weight_tile(head_weight, out.dtype)
    distinct = True
    for columns in _slices(n_classes, buffer.shape[0]):
        right = left if square else _centered(head_weight[columns], mean_row, buffer)
        norms = left_norms if square else torch.linalg.vector_norm(right, dim=1).square_()
        for rows in _slices(n_rows, TABLE_TILE_ELEMENTS // (columns.stop - columns.start)):
            tile = torch.add(left_norms[rows].unsqueeze(1), norms, out=out[rows, columns])
            tile.sub_(_product(left[rows], right.t()), alpha=2)
            own = classes[rows] - columns.start
            if square:
                tile.scatter_(1, own.unsqueeze(1), math.inf)
            else:
                here = ((own >= 0) & (own < tile.shape[1])).nonzero().squeeze(1)
                tile[here, own[here]] = math.inf
            distinct &= _finish_tile(tile, left_norms[rows], norms, head_weight, classes[rows], columns)
    return distinct


def _finish_tile(
    tile: Tensor, left_norms: Tensor, norms: Tensor, head_weight: Tensor, own: Tensor, columns: slice
) -> bool:
    """Turn squared distances into inverse distances in place, close pairs recomputed; whether no pair coincides."""
    # Most heads are settled by their extremes: one pass instead of three.
    if tile.amin() > (left_norms.amax() + norms.amax()) * CLOSE_PAIR:
        tile.rsqrt_()
        return True
    bound = left_norms.unsqueeze(1) + norms
    close = tile <= bound * CLOSE_PAIR
    if not close.any():
        tile.rsqrt_()
        return True
    # Rows that centring made zero coincide with each other: their s is exactly 0 already.
    row, other = (close & (bound > 0)).nonzero(as_tuple=True)
    tile[close] = 0.0
    _differences_into(tile, head_weight[columns], row, other, head_weight, own)
    coincident = tile == 0
    tile.rsqrt_().masked_fill_(coincident, 0.0)
    return not coincident.any()


def _differences_into(
    tile: Tensor, right: Tensor, row: Tensor, other: Tensor, head_weight: Tensor, own: Tensor
) -> None:
    """tile[row, other] = ||w_own[row] - right_other||^2 by direct differences, a batch of pairs in cache at a time."""
    for pairs in _slices(row.shape[0], DIFFERENCE_ELEMENTS // max(1, right.shape[1])):
        r, j = row[pairs], other[pairs]
        difference = head_weight[own[r]].to(tile.dtype) - right[j].to(tile.dtype)
        tile[r, j] = difference.square_().sum(1)


def _distance_table(
    head_weight: Tensor, predicted: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """(table_row, table, row_class), rows of all classes when n >= c, of the distinct predictions when n < c;
    and whether none of them coincides with another row of W."""
    n_samples, n_classes = predicted.shape[0], head_weight.shape[0]
    # Zeros, not empty: rows that no prediction uses are returned too, and an operator must give the same twice.
    table = torch.zeros(min(n_samples, n_classes), n_classes, dtype=dtype, device=predicted.device)
    if n_samples >= n_classes:
        distinct = _inverse_distances(head_weight, None, table)
        # A copy: an operator may not return one tensor twice.
        return (predicted.clone(), table, torch.arange(n_classes, device=predicted.device)), distinct
    classes, table_row = torch.unique(predicted, return_inverse=True)
    distinct = _inverse_distances(head_weight, classes, table[: classes.shape[0]])
    row_class = torch.full((n_samples,), -1, dtype=torch.int64, device=predicted.device)
    row_class[: classes.shape[0]] = classes
    return (table_row, table, row_class), distinct


def _boundary_gaps(
    logits: Tensor,
    top: Tensor,
    inverse: Tensor,
    distinct: bool,
    average_offset: int,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | float, Tensor | None]:
    """For a chunk of rows: (gaps, a spent (r, c) buffer, D, 1/(K + offset), live classes or None).

    `inverse` (r, c) holds the table's row of each sample; where classes are masked, it is set to 0 in place.
    """
    gap = top.unsqueeze(1) - logits
    n_boundaries = gap.shape[1] - 1
    share = 1.0 / (n_boundaries + average_offset) if n_boundaries else 0.0
    product = inverse * gap
    distance = product.sum(1).mul_(share)
    if distinct and _is_plain(distance, floor):
        return gap, product, distance, share, None
    live, gap = _mask_gaps(logits, gap, top)
    inverse.masked_fill_(~live, 0.0)
    count = (inverse > 0).sum(1)
    # In the dtype of the arithmetic: a quotient of integers would be float32 whatever that is.
    shares = torch.where(count > 0, (count + average_offset).to(gap.dtype).reciprocal(), 0.0)
    distance = torch.mul(inverse, gap, out=product).sum(1).mul_(shares)
    return gap, product, distance, shares, live


# ----------------------------------------------------------------------------------------------------------------------
# ELogitNorm
# ----------------------------------------------------------------------------------------------------------------------


def temperature_of(distance: Tensor, eps: float = 1e-6) -> Tensor:
    """The temperature that ELogitNorm divides by: D, or the constant 1 where D <= eps; NaN stays NaN."""
    return torch.where(distance <= eps, 1.0, distance)


def _elogitnorm_rows(
    gap: Tensor,
    distance: Tensor,
    share: Tensor | float,
    targets: _Targets,
    rows: slice | None,
    live: Tensor | None,
    scratch: Tensor,
    eps: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, T, log-partition, slope) of a chunk of rows: T is D, or the constant 1 where D <= eps."""
    temperature = distance.clone() if live is None else temperature_of(distance, eps)
    loss, log_partition, slope = _tempered_forward(gap, temperature, targets, rows, live, scratch, with_slope)
    if with_slope:
        slope.mul_(share)
        if live is not None:
            slope.masked_fill_(distance <= eps, 0.0)
    return loss, temperature, log_partition, slope


def elogitnorm_forward(
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    eps: float,
    average_offset: int,
    with_slope: bool,
) -> tuple[Tensor, ...]:
    """The unreduced loss, D, and what the backward pass needs: n-vectors and one table of at most (n, c).

    Returns loss, distance, predicted, temperature, log_partition, slope (all (n,)), table_row (n,), table (k, c),
    row_class (k,) with k = min(n, c); slope is dL/dD / (K + average_offset), left undefined unless `with_slope`. See
    `kernels/README.md`.
    """
    dtype = compute_dtype(logits, head_weight)
    targets = _Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    with full_precision(logits.device):
        (table_row, table, row_class), distinct = _distance_table(head_weight, predicted, dtype)
    chunks = []
    for rows in _row_chunks(*logits.shape):
        inverse = table.index_select(0, _take(table_row, rows))
        gap, scratch, distance, share, live = _boundary_gaps(
            _take(logits, rows), _take(top, rows), inverse, distinct, average_offset, eps
        )
        chunks.append(
            (distance, *_elogitnorm_rows(gap, distance, share, targets, rows, live, scratch, eps, with_slope))
        )
    distance, loss, temperature, log_partition, slope = _join(chunks)
    targets.settle(None, loss, slope)
    return loss, distance, predicted, temperature, log_partition, slope, table_row, table, row_class


def elogitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    predicted: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    slope: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
    need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i loss_i for logits and W, only those asked for."""
    dtype = table.dtype
    targets = None
    if need_logits:
        targets = _Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    return _boundary_backward(
        sample_grad.to(dtype),
        logits,
        head_weight,
        targets,
        predicted,
        temperature,
        log_partition,
        slope,
        table_row,
        table,
        row_class,
        need_logits,
        need_weight,
    )


def _boundary_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    targets: _Targets | None,
    predicted: Tensor,
    temperature: Tensor | None,
    log_partition: Tensor | None,
    slope: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
    need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass through D, and through the cross-entropy as well where `targets` are given."""
    dtype = table.dtype
    gap_sums = torch.zeros_like(table) if need_weight else None
    d_distance = sample_grad * slope
    # Written in place where there are several chunks: joining them would hold the gradient twice.
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if need_logits else None
    for rows in _row_chunks(*logits.shape):
        chunk = _take(logits, rows).to(dtype)
        p = _take(predicted, rows).unsqueeze(1)
        table_rows = _take(table_row, rows)
        top = chunk.gather(1, p)
        gap = top - chunk
        live = None
        # The largest gap is finite exactly when no class is masked and the row is sound.
        if not gap.amax().item() < math.inf:
            live, gap = _mask_gaps(chunk, gap, top.squeeze(1))
        push = _take(d_distance, rows).unsqueeze(1)
        if need_logits:
            if targets is not None:
                gradient = _tempered_backward(
                    gap,
                    _take(temperature, rows),
                    _take(log_partition, rows),
                    _take(sample_grad, rows),
                    targets,
                    rows,
                    live,
                )
            else:
                gradient = gap * 0.0  # NaN rows stay NaN
            inverse = table.index_select(0, table_rows)
            if live is not None:
                inverse.masked_fill_(~live, 0.0)
            _add_distance_gradient(gradient, inverse, p, push)
            if targets is not None:
                targets.silence(gradient, rows)
            if rows is None:
                grad_logits = gradient.to(logits.dtype).contiguous()
            else:
                grad_logits[rows] = gradient
        if need_weight:
            if live is not None:
                # 0 * NaN: an ignored sample's row may be anything, and its slope is 0.
                gap.masked_fill_(push == 0, 0.0)
            gap_sums.index_add_(0, table_rows, gap.mul_(push))
    grad_weight = None
    if need_weight:
        with full_precision(logits.device):
            grad_weight = _weight_gradient(gap_sums, head_weight, table, row_class)
    return grad_logits, grad_weight


def _add_distance_gradient(gradient: Tensor, inverse: Tensor, predicted: Tensor, push: Tensor) -> None:
    """gradient_j -= push R_j for j != p, and += push sum_j R_j at p; `predicted` and `push` are (r, 1)."""
    gradient.addcmul_(inverse, push, value=-1)
    gradient.scatter_add_(1, predicted, inverse.sum(1, keepdim=True).mul_(push))


def _weight_gradient(gap_sums: Tensor, head_weight: Tensor, table: Tensor, row_class: Tensor) -> Tensor:
    """dW from the summed gaps of each table row: S = -R^3 * gap_sums, then the pull of every pair along its difference.

    dw_p += sum_j S_pj (w_p - w_j) and dw_j += S_pj (w_j - w_p), on centred rows. `gap_sums` is spent; it becomes -S,
    the sign in which the products are added.
    """
    n_rows, n_classes = table.shape
    mean_row = head_weight.mean(0, dtype=table.dtype)
    if n_rows == n_classes:
        push = gap_sums.mul_(table).mul_(table).mul_(table)
        push = push + push.t()
        push.diagonal().sub_(push.sum(1))
        return _product(push, _centered(head_weight, mean_row)).to(head_weight.dtype)
    n_distinct = int((row_class >= 0).sum())
    classes, inverse = row_class[:n_distinct], table[:n_distinct]
    push = gap_sums[:n_distinct].mul_(inverse).mul_(inverse).mul_(inverse)
    left = _centered_rows(head_weight, classes, mean_row)
    grad_weight = _product(push.t(), left)
    own = left.mul_(push.sum(1, keepdim=True).neg_())
    buffer = _weight_tile(head_weight, table.dtype)
    for columns in _slices(n_classes, buffer.shape[0]):
        right = _centered(head_weight[columns], mean_row, buffer)
        part = push[:, columns]
        own.add_(_product(part, right))
        grad_weight[columns].addcmul_(right, part.sum(0).unsqueeze(1), value=-1)
    return grad_weight.index_add_(0, classes, own).to(head_weight.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# ELogitNorm without logits
# ----------------------------------------------------------------------------------------------------------------------


def linear_elogitnorm(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    eps: float,
    average_offset: int,
    sample_grad: Tensor | None,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    detach_geometry: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """ELogitNorm of z W^T + b in chunks of rows: (loss, D, dz, dW, db), the logits (n, c) are never stored.

    The gradients are those of sum_i sample_grad_i loss_i, and come from the same pass over the logits; None if not
    needed or without `sample_grad`, and in the dtype of the arithmetic (they may still be scaled).

    A chunk of rows works in place: the logits become their gradient G, and with n < c the inverse distances R, a row
    for each sample, become -S = sample_grad slope g R^3 (`_weight_gradient`). Then one product with [G; -S] gives dz
    and another dW, tile by tile of W. With n >= c the distances are a table of all classes as usual.
    """
    n_samples, n_classes = features.shape[0], head_weight.shape[0]
    dtype = compute_dtype(features, head_weight)
    device = features.device
    targets = _Targets(target, class_weight, ignore_index, label_smoothing, n_classes, dtype)
    mean_row = head_weight.mean(0, dtype=dtype)
    bias = torch.zeros((), dtype=dtype, device=device) if head_bias is None else head_bias.to(dtype)
    grads = sample_grad is not None
    geometry = grads and need_weight and not detach_geometry
    grad_features = torch.empty_like(features, dtype=dtype) if grads and need_features else None
    grad_weight = torch.zeros(head_weight.shape, dtype=dtype, device=device) if grads and need_weight else None
    grad_bias = torch.zeros(n_classes, dtype=dtype, device=device) if grads and need_bias else None
    square = n_samples >= n_classes
    results = []
    with full_precision(device):
        if square:
            table = torch.empty(n_classes, n_classes, dtype=dtype, device=device)
            gap_sums = torch.zeros_like(table) if geometry else None
            distinct = _inverse_distances(head_weight, None, table)
        # Chunks of one size: a short last one would stream all of W for a few rows.
        widths = 1 if square else 2
        n_chunks = -(-n_samples // max(MIN_LINEAR_ROWS, LINEAR_BUFFER_ELEMENTS // (widths * n_classes)))
        step = -(-n_samples // n_chunks)
        buffer = torch.empty(widths * step, n_classes, dtype=dtype, device=device)
        for chunk in _slices(n_samples, step):
            n_rows = chunk.stop - chunk.start
            logits = buffer[:n_rows]
            z = features[chunk].to(dtype)
            _linear_into(logits, z, head_weight, bias)
            top, predicted = logits.max(1)
            if not square:
                inverses = buffer[n_rows : 2 * n_rows]
                distinct = _inverse_distances(head_weight, predicted, inverses)
            for rows in _slices(n_rows, ROW_CHUNK_ELEMENTS // n_classes):
                at = slice(chunk.start + rows.start, chunk.start + rows.stop)
                p = predicted[rows]
                inverse = table.index_select(0, p) if square else inverses[rows]
                gap, scratch, distance, share, live = _boundary_gaps(
                    logits[rows], top[rows], inverse, distinct, average_offset, eps
                )
                loss, temperature, log_partition, slope = _elogitnorm_rows(
                    gap, distance, share, targets, at, live, scratch, eps, grads
                )
                targets.settle(at, loss, slope)
                results.append((loss, distance))
                if not grads:
                    continue
                scale = sample_grad[at].to(dtype)
                push = (scale * slope).unsqueeze(1)
                gradient = _tempered_backward(gap, temperature, log_partition, scale, targets, at, live)
                _add_distance_gradient(gradient, inverse, p.unsqueeze(1), push)
                targets.silence(gradient, at)
                logits[rows] = gradient
                if geometry:
                    if live is not None:
                        gap.masked_fill_(push == 0, 0.0)
                    gap.mul_(push)
                    if square:
                        gap_sums.index_add_(0, p, gap)
                    else:
                        inverse.mul_(torch.mul(inverse, inverse, out=scratch)).mul_(gap)
            if grads:
                pair_push = inverses if geometry and not square else None
                dz = _linear_backward(
                    logits, pair_push, z, predicted, head_weight, mean_row, grad_weight, need_features
                )
                if need_features:
                    grad_features[chunk] = dz
                if need_bias:
                    grad_bias.add_(logits.sum(0))
        if geometry and square:
            every_class = torch.arange(n_classes, device=device)
            grad_weight.add_(_weight_gradient(gap_sums, head_weight, table, every_class))
    return *_join(results), grad_features, grad_weight, grad_bias


def _linear_into(logits: Tensor, z: Tensor, head_weight: Tensor, bias: Tensor) -> None:
    """logits = z W^T + b, tile by tile of W: in one product the matrix library would pack half of W beside it."""
    for columns in _slices(head_weight.shape[0], WEIGHT_TILE_ELEMENTS // max(1, z.shape[1])):
        tile_bias = bias[columns] if bias.dim() else bias
        torch.add(_product(z, head_weight[columns].to(logits.dtype).t()), tile_bias, out=logits[:, columns])


def _linear_backward(
    gradient: Tensor,
    push: Tensor | None,
    z: Tensor,
    predicted: Tensor,
    head_weight: Tensor,
    mean_row: Tensor,
    grad_weight: Tensor | None,
    need_features: bool,
) -> Tensor | None:
    """dz = G W, (r, m), from the logit gradient G (r, c); adds to `grad_weight` G^T z and what `push` (r, c) says.

    `push` is -S of `_weight_gradient`, the second half of the buffer that `gradient` begins, so that both are one
    operand. W is read once, in centred tiles: the rows of G sum to 0 but for rounding, which the last line puts back.
    """
    n_rows, n_features = z.shape
    n_used = n_rows if push is None else 2 * n_rows
    both = gradient.as_strided((n_used, gradient.shape[1]), gradient.stride())
    read_weight = need_features or push is not None
    product = z.new_zeros(n_used, n_features)
    outer = z
    if push is not None:
        left = _centered_rows(head_weight, predicted, mean_row)
        outer = torch.cat([z, left])
    buffer = _weight_tile(head_weight, z.dtype)
    for columns in _slices(both.shape[1], buffer.shape[0]):
        if read_weight:
            right = _centered(head_weight[columns], mean_row, buffer)
            product.add_(_product(both[:, columns], right))
        if grad_weight is not None:
            grad_weight[columns].add_(_product(both[:, columns].t(), outer))
            if push is not None:
                grad_weight[columns].addcmul_(right, push[:, columns].sum(0).unsqueeze(1), value=-1)
    if push is not None:
        own = product[n_rows:].sub_(left.mul_(push.sum(1, keepdim=True)))
        grad_weight.index_add_(0, predicted, own)
    if not need_features:
        return None
    return product[:n_rows].addmm_(gradient.sum(1, keepdim=True), mean_row.unsqueeze(0))


# ----------------------------------------------------------------------------------------------------------------------
# The distance D itself
# ----------------------------------------------------------------------------------------------------------------------


def boundary_distance_forward(logits: Tensor, head_weight: Tensor, average_offset: int) -> tuple[Tensor, ...]:
    """distance, predicted, slope = 1/(K + average_offset) (0 where K = 0), table_row, table, row_class."""
    dtype = compute_dtype(logits, head_weight)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    with full_precision(logits.device):
        (table_row, table, row_class), distinct = _distance_table(head_weight, predicted, dtype)
    chunks = []
    for rows in _row_chunks(*logits.shape):
        inverse = table.index_select(0, _take(table_row, rows))
        _, _, distance, share, _ = _boundary_gaps(
            _take(logits, rows), _take(top, rows), inverse, distinct, average_offset, 0.0
        )
        chunks.append((distance, share if isinstance(share, Tensor) else torch.full_like(distance, share)))
    distance, slope = _join(chunks)
    return distance, predicted, slope, table_row, table, row_class


def boundary_distance_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    predicted: Tensor,
    slope: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
    need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i D_i for logits and W, only those asked for."""
    return _boundary_backward(
        sample_grad.to(table.dtype),
        logits,
        head_weight,
        None,
        predicted,
        None,
        None,
        slope,
        table_row,
        table,
        row_class,
        need_logits,
        need_weight,
    )


# ----------------------------------------------------------------------------------------------------------------------
# LogitNorm
# ----------------------------------------------------------------------------------------------------------------------


def logitnorm_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    tau: float,
    with_slope: bool,
) -> tuple[Tensor, ...]:
    """loss, predicted, temperature T = tau (||f|| + 1e-7), log_partition, slope = dL/dT tau / ||f|| (0 at f = 0)."""
    dtype = compute_dtype(logits)
    targets = _Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    top, predicted = logits.max(1)
    top = top.to(dtype)
    chunks = []
    for rows in _row_chunks(*logits.shape):
        chunk, highest = _take(logits, rows).to(dtype), _take(top, rows)
        gap = highest.unsqueeze(1) - chunk
        norm = torch.linalg.vector_norm(chunk, dim=1)
        live = None
        if not _is_plain(norm, 0.0):
            live, gap = _mask_gaps(chunk, gap, highest)
            norm = torch.linalg.vector_norm(chunk.masked_fill(~live, 0.0), dim=1)
        temperature = norm.add(_LOGITNORM_EPS).mul_(tau)
        loss, log_partition, slope = _tempered_forward(
            gap, temperature, targets, rows, live, torch.empty_like(gap), with_slope
        )
        if with_slope:
            slope.mul_(tau).div_(norm)
            if live is not None:
                slope.masked_fill_(norm == 0, 0.0)
        chunks.append((loss, temperature, log_partition, slope))
    loss, temperature, log_partition, slope = _join(chunks)
    targets.settle(None, loss, slope)
    return loss, predicted, temperature, log_partition, slope


def logitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    predicted: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    slope: Tensor,
) -> Tensor:
    """The gradient of sum_i sample_grad_i loss_i for the logits."""
    dtype = temperature.dtype
    sample_grad = sample_grad.to(dtype)
    targets = _Targets(target, class_weight, ignore_index, label_smoothing, logits.shape[1], dtype)
    push = sample_grad * slope
    chunks = []
    for rows in _row_chunks(*logits.shape):
        chunk = _take(logits, rows).to(dtype)
        top = chunk.gather(1, _take(predicted, rows).unsqueeze(1))
        gap = top - chunk
        live = None
        if not gap.amax().item() < math.inf:
            live, gap = _mask_gaps(chunk, gap, top.squeeze(1))
            chunk = chunk.masked_fill(~live, 0.0)
        gradient = _tempered_backward(
            gap, _take(temperature, rows), _take(log_partition, rows), _take(sample_grad, rows), targets, rows, live
        )
        gradient.addcmul_(chunk, _take(push, rows).unsqueeze(1))
        targets.silence(gradient, rows)
        chunks.append((gradient.to(logits.dtype),))
    return _join(chunks)[0].contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# NCI
# ----------------------------------------------------------------------------------------------------------------------


def _predict_from_features(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(max, arg-max) over j of (z W^T + b)_j, (n,), first index on ties; NaN wins; in tiles, no (n, c)."""
    n_classes, n_features = head_weight.shape
    tiles = list(_slices(n_classes, max(PREDICTION_CLASSES, WEIGHT_TILE_ELEMENTS // max(1, n_features))))
    chunks = []
    for rows in _slices(features.shape[0], TABLE_TILE_ELEMENTS // (tiles[0].stop - tiles[0].start)):
        z = features[rows].to(dtype)
        top = predicted = None
        for columns in tiles:
            bias = None if head_bias is None else head_bias[columns].to(dtype)
            logits = torch.nn.functional.linear(z, head_weight[columns].to(dtype), bias)
            highest, index = logits.max(1)
            if top is None:
                top, predicted = highest, index
                continue
            better = (highest > top) | (highest.isnan() & ~top.isnan())
            predicted = torch.where(better, index + columns.start, predicted)
            top = torch.where(better, highest, top)
        chunks.append((top, predicted))
    return _join(chunks)


def nci_forward(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    mean: Tensor,
    logits: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """score, predicted, projection w_p.(z - mu)/||z - mu||_2, 1/||z - mu||_2 (both 0 at z = mu), all (n,)."""
    dtype = compute_dtype(features, head_weight, mean)
    with full_precision(features.device):
        if logits is None:
            top, predicted = _predict_from_features(features, head_weight, head_bias, dtype)
        else:
            top, predicted = logits.max(1)
        mean = mean.to(dtype)
        chunks = []
        for rows in _row_chunks(*features.shape):
            z = _take(features, rows).to(dtype)
            centered = z - mean
            norm = torch.linalg.vector_norm(centered, dim=1)
            inverse_norm = norm.reciprocal().masked_fill_(norm == 0, 0.0)
            projection = centered.mul_(head_weight[_take(predicted, rows)]).sum(1).mul_(inverse_norm)
            score = torch.linalg.vector_norm(z, ord=1, dim=1).mul_(alpha).add_(projection)
            chunks.append((score, projection, inverse_norm))
        score, projection, inverse_norm = _join(chunks)
    score.masked_fill_(top.isnan(), math.nan)
    return score, predicted, projection, inverse_norm


def nci_backward(
    sample_grad: Tensor,
    features: Tensor,
    head_weight: Tensor,
    mean: Tensor,
    predicted: Tensor,
    projection: Tensor,
    inverse_norm: Tensor,
    alpha: float,
    need_features: bool,
    need_weight: bool,
    need_mean: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i score_i for z, W and the mean; the prediction is a constant.

    With u = (z - mu)/||z - mu||:  d pScore/dz = (w_p - pScore u)/||z - mu||,  d pScore/dw_p = u,  d pScore/dmu =
    -d pScore/dz.
    """
    dtype = projection.dtype
    mean_row = mean.to(dtype)
    chunks = []
    grad_weight = torch.zeros(head_weight.shape, dtype=dtype, device=features.device) if need_weight else None
    grad_mean = torch.zeros_like(mean_row) if need_mean else None
    for rows in _row_chunks(*features.shape):
        z = _take(features, rows).to(dtype)
        p = _take(predicted, rows)
        grad = _take(sample_grad, rows).to(dtype).unsqueeze(1)
        inverse = _take(inverse_norm, rows).unsqueeze(1)
        unit = (z - mean_row).mul_(inverse)
        if need_weight:
            grad_weight.index_add_(0, p, unit * grad)
        if need_features or need_mean:
            pull = unit.mul_(_take(projection, rows).unsqueeze(1).neg()).add_(head_weight[p])
            pull.mul_(inverse * grad)
            if need_mean:
                grad_mean.sub_(pull.sum(0))
            if need_features:
                chunks.append((pull.addcmul_(z.sign(), grad, value=alpha).to(features.dtype),))
    return (
        _join(chunks)[0].contiguous() if need_features else None,
        None if grad_weight is None else grad_weight.to(head_weight.dtype),
        None if grad_mean is None else grad_mean.to(mean.dtype),
    )
