"""The mathematics of a row: target distribution, sums, loss and gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from .sizes import take


def is_plain(scale: Tensor, floor: float) -> bool:
    """Whether every D (or ||f||) is an ordinary number above `floor`: nothing masked (inf, NaN), tied or NaN."""
    low, high = torch.aminmax(scale)
    return low.item() > floor and high.item() < math.inf


def mask_gaps(logits: Tensor, gap: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """(live classes, gaps with 0 on masked ones and NaN throughout rows that hold NaN or +inf or nothing live)."""
    live = logits != -math.inf
    gap = gap.masked_fill_(~live, 0.0).masked_fill_(~top.isfinite().unsqueeze(1), math.nan)
    return live, gap


def temperature_of(distance: Tensor, eps: float = 1e-6) -> Tensor:
    """The temperature that ELogitNorm divides by: D, or the constant 1 where D <= eps; NaN stays NaN."""
    return torch.where(distance <= eps, 1.0, distance)


class Targets:
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
        return take(self.own, rows) if isinstance(self.own, Tensor) else self.own

    def _mass(self, rows: slice | None, dtype: torch.dtype) -> Tensor:
        """(1 - e) w_j t_j, (r, c)."""
        mass = take(self.probability, rows).to(dtype)
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
            weighted = weighted + (gap * self._smoothed(live, gap.shape[1])).sum(1)
        return weighted, impossible

    def subtract_from(self, gradient: Tensor, scale: Tensor, rows: slice | None, live: Tensor | None) -> None:
        """gradient_ij -= scale_i q_ij, in place; `scale` is (r, 1)."""
        if self.index is not None:
            own = self._own(rows)
            mass = scale.neg() if not isinstance(own, Tensor) and own == 1.0 else scale * own * -1.0
            gradient.scatter_add_(1, take(self.index, rows), mass)
        else:
            gradient.addcmul_(self._mass(rows, gradient.dtype), scale, value=-1)
        if self.smoothing:
            gradient.sub_(scale * self._smoothed(live, gradient.shape[1]))

    def settle(self, rows: slice | None, loss: Tensor, slope: Tensor) -> None:
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


def tempered_forward(
    gap: Tensor,
    temperature: Tensor,
    targets: Targets,
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


def tempered_backward(
    gap: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    sample_grad: Tensor,
    targets: Targets,
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
