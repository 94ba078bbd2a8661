"""The mathematics of a row: target distribution, sums, loss and gradient.

It is the same for one process and for many. What is here works on the columns of the classes at hand; where these are
those of one process among many, what needs all classes comes in as a sum over the processes (`RowSums`, `Part.n_live`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..records import Labels
from ..values import EPS
from .sizes import take

if TYPE_CHECKING:
    from ..distributed.shards import Shards


def is_plain(scale: Tensor, floor: float) -> bool:
    """Whether every D (or ||f||) is an ordinary number above `floor`: nothing masked (inf, NaN), tied or NaN."""
    low, high = torch.aminmax(scale)
    return low.item() > floor and high.item() < math.inf


def mask_gaps(logits: Tensor, gap: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """(live classes, gaps with 0 on masked ones and NaN throughout rows that hold NaN or +inf or nothing live)."""
    live = logits != -math.inf
    gap = gap.masked_fill_(~live, 0.0).masked_fill_(~top.isfinite().unsqueeze(1), math.nan)
    return live, gap


def gaps_of(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor | None]:
    """(gaps g (r, c) below the largest logit `top` (r, 1), live classes; None where all are and every row is sound)."""
    gap = top - logits
    # The largest gap is finite exactly when no class is masked and the row is sound.
    if gap.amax().item() < math.inf:
        return gap, None
    live, gap = mask_gaps(logits, gap, top.squeeze(1))
    return gap, live


def temperature_of(distance: Tensor, eps: float = EPS) -> Tensor:
    """The temperature that ELogitNorm divides by: D, or the constant 1 where D <= eps; NaN stays NaN."""
    return torch.where(distance <= eps, 1.0, distance)


class Part(NamedTuple):
    """A chunk of the rows of a batch."""

    rows: slice | None  # None: all
    live: Tensor | None  # (r, c) classes that are not masked; None where none is
    n_live: Tensor | None = None  # (r,) their number over all processes; None for one


class Targets:
    """q and its sums, as F.cross_entropy defines them, for one chunk of rows at a time.

    index y:        q_j = w_j ((1 - e) [j = y] + e/c_live [j live])
    probability t:  q_j = w_j ((1 - e) t_j     + e/c_live [j live])

    Smoothing spreads over the live classes only: those whose logit is not -inf. With `shards` the columns are only
    those of this process, and y is an index among all `n_classes`.
    """

    def __init__(self, labels: Labels, n_classes: int, dtype: torch.dtype, shards: Shards | None = None) -> None:
        self.labels, self.shards, self.n_classes = labels, shards, n_classes
        target, class_weight, ignore_index, self.smoothing = labels
        self.class_weight = None if class_weight is None else class_weight.to(dtype)
        self.dtype = dtype
        self.ignored: Tensor | None = None  # (n,) samples with ignore_index
        self.invalid: Tensor | None = None  # (n,) class indices out of range; on the CPU those raise instead
        self.index: Tensor | None = None  # (n, 1)
        self.probability = target  # (n, c) where there is no index
        if target.is_floating_point():
            return
        if shards is not None or target.device.type != "cpu":
            self.ignored = target == ignore_index
            self.invalid = ((target < 0) | (target >= n_classes)) & ~self.ignored
            target = target.masked_fill(self.ignored | self.invalid, 0)
        elif checks.index_range(target, n_classes, ignore_index):
            self.ignored = target == ignore_index
            target = target.masked_fill(self.ignored, 0)
        self.own: Tensor | float = 1.0 - self.smoothing  # the mass on y: a number, or (n, 1)
        if shards is not None:
            mine, target = shards.locate(target)
            self.own = mine.unsqueeze(1).to(dtype) * self.own  # 0 where another process holds y
        self.index = target.unsqueeze(1)
        if self.class_weight is not None:
            self.own = self.class_weight[self.index] * self.own

    def _own(self, rows: slice | None) -> Tensor | float:
        return take(self.own, rows) if isinstance(self.own, Tensor) else self.own

    def _mass(self, rows: slice | None, dtype: torch.dtype) -> Tensor:
        """(1 - e) w_j t_j, (r, c)."""
        mass = take(self.probability, rows).to(dtype)
        if self.class_weight is not None:
            mass = mass * self.class_weight
        return mass * (1.0 - self.smoothing) if self.smoothing else mass

    def _smoothed(self, part: Part, n_columns: int) -> Tensor | float:
        """The smoothing's share of q: a number, (1, c) or (r, c), whichever is smallest."""
        n_live = part.n_live
        if n_live is None:
            if part.live is None:
                even = self.smoothing / n_columns
                return even if self.class_weight is None else (self.class_weight * even).unsqueeze(0)
            n_live = part.live.sum(1)
        share = self.smoothing / n_live.clamp(min=1).to(self.dtype).unsqueeze(1)
        share = share.expand(-1, n_columns) if part.live is None else part.live * share
        return share if self.class_weight is None else share * self.class_weight

    def total(self, part: Part, n_columns: int, dtype: torch.dtype) -> Tensor | float:
        """Q = sum_j q_j, (r,) or a number."""
        if self.index is not None:
            own = self._own(part.rows)
            total = own.squeeze(1) if isinstance(own, Tensor) else own
        else:
            total = self._mass(part.rows, dtype).sum(1)
        if self.smoothing:
            smoothed = self._smoothed(part, n_columns)
            total = total + (smoothed.sum(1) if isinstance(smoothed, Tensor) else smoothed * n_columns)
        return total

    def weighted_gap(self, gap: Tensor, part: Part) -> tuple[Tensor, Tensor | None]:
        """(sum_j q_j g_j, whether a masked class holds target mass), both (r,); `gap` is 0 on masked classes."""
        rows, live, _ = part
        impossible = None
        if self.index is not None:
            y, own = take(self.index, rows), self._own(rows)
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
            weighted = weighted + (gap * self._smoothed(part, gap.shape[1])).sum(1)
        return weighted, impossible

    def subtract_from(self, gradient: Tensor, scale: Tensor, part: Part) -> None:
        """gradient_ij -= scale_i q_ij, in place; `scale` is (r, 1)."""
        if self.index is not None:
            own = self._own(part.rows)
            mass = scale.neg() if not isinstance(own, Tensor) and own == 1.0 else scale * own * -1.0
            gradient.scatter_add_(1, take(self.index, part.rows), mass)
        else:
            gradient.addcmul_(self._mass(part.rows, gradient.dtype), scale, value=-1)
        if self.smoothing:
            gradient.sub_(scale * self._smoothed(part, gradient.shape[1]))

    def settle(self, loss: Tensor, slope: Tensor, rows: slice | None = None) -> None:
        """Ignored samples cost nothing; an index out of range gives NaN, never a read of memory that is not ours."""
        if self.ignored is not None:
            loss.masked_fill_(take(self.ignored, rows), 0.0)
            slope.masked_fill_(take(self.ignored, rows), 0.0)
        if self.invalid is not None:
            loss.masked_fill_(take(self.invalid, rows), math.nan)

    def silence(self, gradient: Tensor, rows: slice | None) -> None:
        """The gradient of ignored samples is 0, whatever their logits; of an index out of range NaN, as its loss is."""
        if self.ignored is not None:
            gradient.masked_fill_(take(self.ignored, rows).unsqueeze(1), 0.0)
        if self.invalid is not None:
            gradient.masked_fill_(take(self.invalid, rows).unsqueeze(1), math.nan)


class RowSums(NamedTuple):
    """Sums over the classes of a row, (r,): all that its loss needs. Those of many processes add up."""

    partition: Tensor  # sum_j exp(-g_j / T)
    weighted_gap: Tensor  # sum_j q_j g_j
    total: Tensor | float  # Q = sum_j q_j
    impossible: Tensor | None  # whether a masked class holds target mass
    weighted_exponent: Tensor | None  # sum_j exp(-g_j / T) g_j; None where no slope is wanted


def row_sums(
    gap: Tensor, temperature: Tensor, targets: Targets, part: Part, scratch: Tensor, with_slope: bool
) -> RowSums:
    """The sums of a chunk of rows. `gap` is 0 on masked classes; `scratch` is spent."""
    exponent = torch.mul(gap, temperature.reciprocal().neg_().unsqueeze(1), out=scratch)
    if part.live is not None:
        exponent.masked_fill_(~part.live, -math.inf)
    exponential = exponent.exp_()
    partition = exponential.sum(1)
    weighted_gap, impossible = targets.weighted_gap(gap, part)
    total = targets.total(part, gap.shape[1], gap.dtype)
    return RowSums(partition, weighted_gap, total, impossible, exponential.mul_(gap).sum(1) if with_slope else None)


def row_loss(sums: RowSums, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log sum_j exp(-g_j/T), dL/dT), all (r,); the last is undefined where no slope is wanted."""
    partition, weighted_gap, total, impossible, mean_gap = sums
    log_partition = partition.log()
    # A number 1 is the mass of a class index without weights or smoothing: one product less.
    unit_mass = not isinstance(total, Tensor) and total == 1.0
    loss = torch.addcdiv(log_partition if unit_mass else log_partition * total, weighted_gap, temperature)
    if impossible is not None:
        loss.masked_fill_(impossible & ~loss.isnan(), math.inf)
    if mean_gap is None:
        return loss, log_partition, torch.empty_like(loss)
    mean_gap.div_(partition)
    if not unit_mass:
        mean_gap.mul_(total)
    # Divided twice: T * T would underflow for a small tau.
    slope = mean_gap.sub_(weighted_gap).div_(temperature).div_(temperature)
    if impossible is not None:
        slope.masked_fill_(impossible, 0.0)
    return loss, log_partition, slope


class Softmax(NamedTuple):
    """What the gradient of the cross-entropy needs, vectors (n,), or (r,) of a chunk of rows."""

    targets: Targets
    temperature: Tensor
    log_partition: Tensor
    total: Tensor | None = None  # Q, over the classes of all processes; None for one

    def of(self, rows: slice | None) -> Softmax:
        """That of a chunk."""
        total = None if self.total is None else take(self.total, rows)
        return Softmax(self.targets, take(self.temperature, rows), take(self.log_partition, rows), total)


def row_gradient(gap: Tensor, sample_grad: Tensor, softmax: Softmax, part: Part) -> Tensor:
    """(Q P_j - q_j) / T times the incoming gradient of the row: the logit gradient at constant T, (r, c), fresh."""
    targets, temperature, log_partition, mass = softmax
    total = targets.total(part, gap.shape[1], gap.dtype) if mass is None else mass
    inverse = temperature.reciprocal().unsqueeze(1)
    gradient = torch.addcmul(log_partition.neg().unsqueeze(1), gap, inverse, value=-1).exp_()
    if part.live is not None:
        gradient.masked_fill_(~part.live, 0.0).masked_fill_(gap.isnan(), math.nan)
    scale = inverse * sample_grad.unsqueeze(1)
    if isinstance(total, Tensor):
        total = total.unsqueeze(1)
    gradient.mul_(scale if not isinstance(total, Tensor) and total == 1.0 else scale * total)
    targets.subtract_from(gradient, scale, part)
    return gradient
