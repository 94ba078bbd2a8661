"""What fitting gathers while the data passes: sums in float64, counts, and, only where a method needs them, rows.

Each class takes in batches (`update`), joins what another process gathered (`merge`) and gives its result at the end.
Two detectors that gather the same thing (equal class, equal settings) share one of them, see `DetectorSet`: that is why
each reads the batch itself. Memory does not grow with the number of rows, except in a `Bank` without a budget, and in
`Percentiles` and `Bank` up to a stated size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..eager.precision import double
from ..functional import l2_normalize
from .numbers import at_least_float32, check_targets

# Values up to which percentiles are exact: 128 MiB in float32. OpenOOD's 5,000 validation images of 2,048 features are
# 10 million.
EXACT_PERCENTILE_VALUES = 1 << 25
# Above it, the leading bits of a float32 that are counted apart: sign, exponent and 11 bits of the mantissa, so that a
# percentile is off by at most 2**-12 of its value. The counts take 8 MiB.
SKETCH_BITS = 20
COUNTED_AT_ONCE = 1 << 22  # values: as int64, 32 MiB for each of the temporaries
HASHED_AT_ONCE = 1 << 17  # values
# Values that a `Bank` keeps where only an average is taken of them: 128 MiB in float32.
SAMPLE_VALUES = 1 << 25


class Gathered:
    """Base class. A subclass is a dataclass, whose fields are its settings; other attributes are what was gathered."""

    reads: tuple[str, ...] = ("features",)  # of "features", "logits", "targets": what a batch must hold
    rows = 0  # taken in so far, before the batch that `update` is called with
    widths: Mapping[str, int] = {}  # m of the "features" and c of the "logits" that were taken in
    like: Tensor  # no rows, of the dtype and on the device of those that were taken in
    total: Tensor  # where there is a sum
    on_cpu: tuple[str, ...] = ()  # what stays there
    extent: Tensor | None = None  # of the features that were taken in, see `numbers.refuse_short`

    def key(self) -> tuple[Any, ...]:
        """Equal for two that gather the same thing."""
        made: Any = self
        return (type(self), *(getattr(self, setting.name) for setting in fields(made)))

    def take(self, features: Any, logits: Any, targets: Any) -> None:
        """Take in one batch: features (n, m), logits (n, c), targets (n,). What `reads` does not name may be None."""
        if n_rows := len(features if logits is None else logits):
            self.update(features, logits, targets)
            self.rows += n_rows
            given = {"features": features, "logits": logits}
            self.widths = {name: value.shape[1] for name, value in given.items() if name in self.reads}

    def join(self, other: Gathered) -> None:
        """Take in what `other`, of equal class and settings, gathered from other rows. `other` is spent."""
        if other.rows and self.rows:
            self.merge(other)
            self.rows += other.rows
            self.reach(other.extent)
        elif other.rows:
            vars(self).update(vars(other))

    def reach(self, extent: Tensor | None) -> None:
        """Widen the extent."""
        if extent is not None:
            self.extent = extent if self.extent is None else torch.maximum(self.extent, extent)

    def to(self, device: torch.device | str) -> Gathered:
        """Move what was gathered; returns self."""
        vars(self).update({n: _moved(held, device) for n, held in vars(self).items() if n not in self.on_cpu})
        return self

    # ---- what a subclass supplies; never called with no rows

    def update(self, features: Any, logits: Any, targets: Any) -> None:
        """Take in one batch."""
        raise NotImplementedError

    def merge(self, other: Any) -> None:
        """Take in what `other` gathered from other rows."""
        raise NotImplementedError


def _moved(held: Any, device: torch.device | str) -> Any:
    """Tensors and parts on a device, also those in lists and mappings; anything else as it is."""
    if isinstance(held, (Tensor, Gathered)):
        return held.to(device)
    if isinstance(held, dict):
        return {key: _moved(each, device) for key, each in held.items()}
    return [_moved(each, device) for each in held] if isinstance(held, list) else held


def gather(parts: Sequence[Gathered], group: dist.ProcessGroup) -> None:
    """Make every process of `group` hold in `parts` what all of them gathered, joined in the order of the ranks.

    Everything passes through the memory of every process: little, except for a `Bank` without a budget. What a process
    that had no data receives stays on the CPU.
    """
    devices = [part.like.device if part.rows else "cpu" for part in parts]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, [part.to("cpu") for part in parts], group)
    for part, device, of_ranks in zip(parts, devices, zip(*everyone, strict=True), strict=True):
        first, *others = of_ranks
        for other in others:
            first.join(other)
        vars(part).update(vars(first.to(device)))


@dataclass
class Scatter(Gathered):
    """Mean μ and scatter Σ (z − μ)(z − μ)ᵀ of the features: Chan, Golub and LeVeque's pairwise update, in float64."""

    def update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        self.like = at_least_float32(features[:0])
        rows = double(features)
        mean = rows.mean(dim=0)
        rows = rows - mean
        self._add(len(rows), mean, rows.T @ rows)

    def merge(self, other: Scatter) -> None:
        self._add(other.rows, other.mean, other.scatter)

    def _add(self, rows: int, mean: Tensor, scatter: Tensor) -> None:
        if self.rows == 0:
            self.mean, self.scatter = mean, scatter
            return
        total = self.rows + rows
        shift = mean - self.mean
        self.scatter.add_(scatter).addr_(shift, shift, alpha=self.rows * rows / total)
        self.mean = self.mean + shift * (rows / total)

    def covariance(self) -> Tensor:
        """Σ (z − μ)(z − μ)ᵀ / N, (m, m) in float64."""
        return self.scatter / self.rows


@dataclass
class FeatureMean(Gathered):
    """The mean of the features."""

    def update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        self.like = at_least_float32(features[:0])
        total = double(features).sum(dim=0)
        self.total = self.total + total if self.rows else total

    def merge(self, other: FeatureMean) -> None:
        self.total = self.total + other.total

    def value(self) -> Tensor:
        """μ (m,), in the dtype of the features (float32 at least) and where they were."""
        return (self.total / self.rows).to(self.like)


@dataclass
class MeanMaxLogit(Gathered):
    """The mean of max_j f_j."""

    reads = ("logits",)

    def update(self, features: Tensor | None, logits: Tensor, targets: Tensor | None) -> None:
        self.like = at_least_float32(logits[:0])
        total = double(logits.amax(dim=1)).sum()
        self.total = self.total + total if self.rows else total

    def merge(self, other: MeanMaxLogit) -> None:
        self.total = self.total + other.total

    def value(self) -> Tensor:
        """(), in float64."""
        return self.total / self.rows


@dataclass
class ClassMeans(Gathered):
    """The mean over the rows of each class, of the features, of the softmax, or of the largest logit and its square.

    Settings:
        by: what the class of a row is: "target", "correct" (the target, rows classified wrongly left out) or
            "predicted" (argmax, first index on ties).
        of: "features", "softmax" or "top".
    """

    by: str = "target"
    of: str = "features"

    def __post_init__(self) -> None:
        self.count = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.total = torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    @property
    def reads(self) -> tuple[str, ...]:
        """What a batch must hold."""
        by = {"target": ("targets",), "correct": ("logits", "targets"), "predicted": ("logits",)}[self.by]
        return (*by, "features" if self.of == "features" else "logits")

    def update(self, features: Any, logits: Any, targets: Any) -> None:
        # Of a binary classifier with one logit the targets are two classes. (argmax need not give the first of ties.)
        n_logits = None if logits is None or logits.shape[1] == 1 else logits.shape[1]
        classes = targets if self.by == "target" else logits.max(dim=1).indices
        if self.of == "top":
            top = double(logits.amax(dim=1, keepdim=True))
            rows = torch.cat([top, top.square()], dim=1)
        else:
            rows = features if self.of == "features" else torch.softmax(at_least_float32(logits), dim=1)
        if self.by != "predicted":
            check_targets(targets, n_logits)
        if self.by == "correct":
            right = classes == targets
            classes, rows = classes[right], rows[right]
        self.like = at_least_float32((features if self.of == "features" else logits)[:0])
        rows = double(rows)
        classes = classes.to(rows.device)
        n_classes = int(targets.max()) + 1 if n_logits is None else n_logits
        self._widen(max(n_classes, len(self.count)), rows)
        # index_put_ adds in a fixed order on a GPU too; index_add_ does not.
        self.total.index_put_((classes,), rows, accumulate=True)
        self.count += torch.bincount(classes, minlength=len(self.count))

    def _widen(self, n_classes: int, rows: Tensor) -> None:
        """Room for `n_classes` classes of rows like these."""
        total = torch.zeros(n_classes, rows.shape[1], dtype=torch.float64, device=rows.device)
        count = torch.zeros(n_classes, dtype=torch.int64, device=rows.device)
        if len(self.count) == n_classes and self.total.shape == total.shape:
            return
        if len(self.count):
            total[: len(self.count)], count[: len(self.count)] = self.total, self.count
        self.total, self.count = total, count

    def merge(self, other: ClassMeans) -> None:
        n_classes = max(len(self.count), len(other.count))
        self._widen(n_classes, other.total)
        self.total[: len(other.count)] += other.total
        self.count[: len(other.count)] += other.count

    def value(self) -> Tensor:
        """(c, m) in float64, (c, c) of the softmax, (c, 2) of "top"; zero for a class without rows, see `count`."""
        return self.total / self.count.clamp(min=1).unsqueeze(1)

    def missing(self) -> list[int]:
        """The classes without rows, of those that logits or targets told of."""
        return (self.count == 0).nonzero().flatten().tolist()

    def within(self, scatter: Scatter) -> Tensor:
        """Scatter about the class means, Σ (z − μ_y)(z − μ_y)ᵀ (m, m), from that about the mean of the same rows."""
        offset = (self.value() - scatter.mean) * self.count.to(self.total).sqrt().unsqueeze(1)
        return scatter.scatter - offset.T @ offset


@dataclass
class Percentiles(Gathered):
    """Percentiles of all features pooled, each value of each row counted alike.

    Linear interpolation between order statistics, as `numpy.percentile`. Exact up to `exact` values. Beyond, counts of
    float32 values by their leading `SKETCH_BITS` bits: each order statistic is then off by at most 2**-12 of its value,
    and counts as 0 below the smallest normal number.
    """

    exact: int = EXACT_PERCENTILE_VALUES
    on_cpu = ("kept", "counts")

    def __post_init__(self) -> None:
        self.kept: list[Tensor] = []
        self.size = 0
        self.counts: Tensor | None = None

    def update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        self.like = at_least_float32(features[:0])
        self._take(at_least_float32(features).flatten().cpu())

    def merge(self, other: Percentiles) -> None:
        for values in other.kept:
            self._take(values)
        if other.counts is not None:
            self._sketch().add_(other.counts)
            self.size += int(other.counts.sum())

    def _take(self, values: Tensor) -> None:
        self.size += values.numel()
        if self.counts is None and self.size <= self.exact:
            self.kept.append(values.clone())
            return
        self._count(values, self._sketch())

    def _sketch(self) -> Tensor:
        """Go over from values to counts."""
        if self.counts is None:
            self.counts = torch.zeros(1 << SKETCH_BITS, dtype=torch.int64, device="cpu")
            while self.kept:
                self._count(self.kept.pop(), self.counts)
        return self.counts

    @staticmethod
    def _count(values: Tensor, counts: Tensor) -> None:
        for piece in values.split(COUNTED_AT_ONCE):
            bits = piece.float().view(torch.int32).long()
            # As integers, floats are in order once the negative ones are turned round.
            ordered = torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits + (1 << 31))
            counts += torch.bincount(ordered >> (32 - SKETCH_BITS), minlength=1 << SKETCH_BITS)

    def percentile(self, p: float) -> float:
        """The value that p percent of all lie below."""
        if self.counts is None:
            self.kept = [torch.cat(self.kept)]
            return float(np.percentile(self.kept[0].numpy(), p))
        below, share = divmod(p / 100 * (self.size - 1), 1)
        ranks = torch.tensor([below, min(below + 1, self.size - 1)], dtype=torch.int64, device="cpu")
        low, high = map(float, self._middle(torch.searchsorted(self.counts.cumsum(0), ranks, right=True)).tolist())
        return low if low == high or share == 0 else low * (1 - share) + high * share  # either may be infinite

    @staticmethod
    def _middle(cell: Tensor) -> Tensor:
        """The middle of the values that are counted in each cell."""
        edges = torch.stack([cell, cell + 1]) << (32 - SKETCH_BITS)
        bits = torch.where(edges >= 1 << 31, edges - (1 << 31), ~edges)  # the inverse of the order above
        low, high = bits.to(torch.int32).view(torch.float32).double()
        middle = (low + high) / 2
        middle[middle.abs() < torch.finfo(torch.float32).tiny] = 0.0
        infinite = torch.where(cell >> (SKETCH_BITS - 1) > 0, torch.inf, -torch.inf)
        return torch.where(middle.isnan(), infinite, middle)  # beyond ±inf lie the bits of NaN


@dataclass
class Bank(Gathered):
    """Rows that are kept: the features, all of them or a random sample.

    A row is drawn by a hash of its features and the seed: how the stream is ordered, cut into batches and spread over
    processes does not change the sample. Equal rows share one fate.

    Settings:
        kind: "raw" z; "unit" z/‖z‖ (0 stays 0); "energy" z/‖z‖ · log Σ_j exp f_j; "logits" f, behind it the class;
            "softmax" z/‖z‖, behind it the softmax.
        budget: at most so many rows, every one of the stream with the same chance (None: no limit).
        values: a budget in numbers instead of rows: at most values // m rows.
        fraction: each row is kept with this chance.
        least: but at least so many, if there are.
        dtype: what they are stored in (None: as they come, float32 at least).
        seed: of the choice.
    """

    kind: str = "raw"
    budget: int | None = None
    values: int | None = None
    fraction: float = 1.0
    least: int = 0
    dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.kept: list[Tensor] = []
        self.keys: list[Tensor] = []  # a number in [0, 1) a row; the rows with the smallest stay
        self.size = 0

    @property
    def reads(self) -> tuple[str, ...]:
        """What a batch must hold."""
        others = {"energy": ("features", "logits"), "softmax": ("features", "logits"), "logits": ("logits", "targets")}
        return others.get(self.kind, ("features",))

    def update(self, features: Tensor, logits: Any, targets: Any) -> None:
        if self.kind == "logits":
            check_targets(targets, logits.shape[1])
            features = torch.cat([at_least_float32(logits), targets.to(logits.device).unsqueeze(1)], dim=1)
        z = at_least_float32(features)
        self.like = z[:0]
        keys = self.draw(z) if self._samples else torch.zeros(len(z), dtype=torch.float64, device="cpu")
        if self.fraction < 1:
            chosen = self._chosen(keys)
            z, keys = z[chosen.to(z.device)], keys[chosen]
            logits = logits[chosen.to(logits.device)] if "logits" in self.reads else None
        if self.kind in ("unit", "energy", "softmax"):
            z = l2_normalize(z)[0]
        if self.kind == "softmax":
            z = torch.cat([z, torch.softmax(at_least_float32(logits), dim=1).to(z.dtype)], dim=1)
        if self.kind == "energy":
            z = z * torch.logsumexp(at_least_float32(logits), dim=1, keepdim=True)
        self._keep(z.to(self.dtype or z.dtype), keys)

    @property
    def _samples(self) -> bool:
        return self.fraction < 1 or self.budget is not None or self.values is not None

    def draw(self, z: Tensor) -> Tensor:
        """A number in [0, 1) for each row (n,), float64: its bits times random odd factors, summed, and mixed. The bits
        are those of float64, so that numbers draw the same whatever dtype holds them.

        Sums of products modulo 2**64 tell rows apart; the mixing is the finaliser of SplitMix64 (Steele, Lea and Flood,
        2014), which makes uniform numbers of them.
        """
        offset, *factors = np.random.default_rng(self.seed).integers(-(1 << 63), 1 << 63, z.shape[1] + 1) | 1
        # Few rows at a time stay in cache: a third of the time.
        by = torch.tensor(factors, device=double(z[:0]).device)
        parts = z.split(max(1, HASHED_AT_ONCE // z.shape[1]))
        totals = [(double(rows).contiguous().view(torch.int64) * by).sum(dim=1) for rows in parts]
        x = (torch.cat(totals) + int(offset)).cpu().numpy().view(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def merge(self, other: Bank) -> None:
        for rows, keys in zip(other.kept, other.keys, strict=True):
            self._keep(rows, keys)

    def _keep(self, rows: Tensor, keys: Tensor) -> None:
        self.kept.append(rows.clone())
        self.keys.append(keys)
        self.size += len(rows)
        limit = self._limit(rows.shape[1])
        if limit is not None and self.size > 2 * limit:  # twice: each row is then moved twice on average, not always
            self._shrink(limit)

    def _chosen(self, keys: Tensor) -> Tensor:
        """The places of the keys below `fraction`, and of others that are among the `least` smallest so far."""
        bound = self.fraction
        if self.least:
            smallest = torch.cat([*self.keys, keys]).topk(min(self.least, self.size + len(keys)), largest=False).values
            bound = max(bound, float(smallest[-1]) + 2.0**-53)
        return (keys < bound).nonzero().squeeze(1)

    def _limit(self, n_features: int) -> int | None:
        return self.budget if self.values is None else max(1, self.values // n_features)

    def _shrink(self, limit: int) -> None:
        rows, keys = torch.cat(self.kept), torch.cat(self.keys)
        if len(rows) > limit:
            chosen = keys.topk(limit, largest=False).indices.sort().values  # in the order in which they came
            rows, keys = rows[chosen.to(rows.device)], keys[chosen]
        self.kept, self.keys, self.size = [rows], [keys], len(rows)

    def value(self) -> Tensor:
        """The rows kept, (k, m), in the order in which they came; one tensor for all who ask."""
        if self.least and self.size > self.least:  # others have come that are drawn before some of them
            rows, keys = torch.cat(self.kept), torch.cat(self.keys)
            chosen = keys < max(self.fraction, float(keys.kthvalue(self.least).values) + 2.0**-53)
            self.kept, self.keys, self.size = [rows[chosen.to(rows.device)]], [keys[chosen]], int(chosen.sum())
        limit = self._limit(self.like.shape[1])
        if len(self.kept) > 1 or (limit is not None and self.size > limit):
            self._shrink(self.size if limit is None else limit)
        return self.kept[0]
