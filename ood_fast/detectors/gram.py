"""Deviations of Gram matrices of the maps of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..eager.precision import full_precision
from . import streaming
from .detector import Detector
from .fitting import tell_missing
from .layers import EachLayer, LayerDetector
from .numbers import at_least_float32
from .registry import register

HELD = 1000  # training samples whose deviations are averaged
SHARE = 0.1  # of the samples, drawn by a hash, are held for that and take no part in the bounds


@dataclass
class Bounds(streaming.Gathered):
    """The smallest and the largest of each feature over the rows of each class, `by` its "predicted" one or its
    "target"; rows held out of that."""

    by: str = "predicted"

    def __post_init__(self) -> None:
        self.reads = ("features", "logits", "targets") if self.by == "target" else ("features", "logits")
        self.held = streaming.Bank(budget=HELD)
        self.low = self.high = torch.empty(0)

    def update(self, features: Tensor, logits: Tensor, targets: Any) -> None:
        z = at_least_float32(features)
        self.like = z[:0]
        c, classes = logits.shape[1], targets.to(z.device) if self.by == "target" else logits.max(dim=1).indices
        kept = (self.held.draw(z) < SHARE).to(z.device)
        self.held.take(torch.cat([z, classes.unsqueeze(1)], dim=1)[kept], None, None)
        z, classes = z[~kept], classes[~kept].unsqueeze(1).expand(-1, z.shape[1])
        low = z.new_full((c, z.shape[1]), torch.inf).scatter_reduce(0, classes, z, "amin")
        high = z.new_full((c, z.shape[1]), -torch.inf).scatter_reduce(0, classes, z, "amax")
        self.low = torch.minimum(self.low, low) if self.rows else low
        self.high = torch.maximum(self.high, high) if self.rows else high

    def merge(self, other: Bounds) -> None:
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.held.join(other.held)


class _GramLayer(Detector):
    needs_features = True
    needs_logits = True
    low: Tensor
    high: Tensor
    mean: Tensor
    state = ("low", "high", "mean")  # (c, d), (c, d) and (): the mean deviation of held samples

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"bounds": Bounds(self.by)}

    def _finish(self, bounds: Bounds) -> None:
        self.low, self.high = bounds.low, bounds.high
        rows = bounds.held.value() if bounds.held.rows else self.low.new_zeros(0, self.low.shape[1] + 1)
        found = self.deviation(rows[:, :-1], rows[:, -1].long())
        found = found[found.isfinite()]
        if not len(found):
            raise ValueError(
                f"got {bounds.rows} training samples, too few or too alike to hold a tenth of them for their deviations"
            )
        self.mean = found.mean()

    def deviation(self, z: Tensor, classes: Tensor) -> Tensor:
        """(n,), inf for a class that has no bounds."""
        low, high = self.low[classes], self.high[classes]
        below, above = (low - z).clamp(min=0) / (low.abs() + 1e-6), (z - high).clamp(min=0) / (high.abs() + 1e-6)
        return (below + above).sum(dim=1).masked_fill(low[:, 0] > high[:, 0], torch.inf)

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        z = at_least_float32(features).to(self.low.dtype)
        score = -self.deviation(z, logits.max(dim=1).indices) / (self.mean + 1e-7)
        return score.masked_fill(z.isnan().any(dim=1) | logits.isnan().any(dim=1), torch.nan)


@register
class Gram(LayerDetector):
    """Deviation of Gram matrices from the values that training samples of the predicted class p took:

        −Σ_l δ_l / E[δ_l],    δ_l = Σ_q Σ_i relu(low_pqi − g_qi) / |low_pqi| + relu(g_qi − high_pqi) / |high_pqi|

    g_q: the row sums of F^q (F^q)ᵀ, to the power 1/q with their sign, of the maps F (channels, positions) of layer l,
    for the orders q = 1 … `orders`. As in the authors' code, row sums stand for the matrix, which is not made.
    low, high: over the training samples predicted as p, but for a random tenth, 1,000 at most, over which E is taken:
    drawn by what is read of them, so that batches of another size, which a model rounds otherwise, draw another one.
    A sample predicted as a class without training samples scores −inf. OpenOOD and pytorch-ood take the training
    samples of the class p: by="target"; OpenOOD five orders, pytorch-ood as many as there are layers. The authors' code
    and OpenOOD also divide by the confidence of the prediction: divide the score by that of `MSP` for theirs.

    Sastry and Oore, "Detecting Out-of-Distribution Examples with Gram Matrices", ICML 2020, arXiv:1912.12510.

    Args:
        layers: names; None: each stage. The authors take the output of every convolution, block and activation.
        orders: 1 or more.
        by: "predicted" or "target", see above.
    """

    def __init__(self, layers: Sequence[str] | None = None, *, orders: int = 10, by: str = "predicted") -> None:
        super().__init__(layers)
        checks.positive_int("orders", orders)
        checks.one_of("by", by, ("predicted", "target"))
        self.orders, self.kind, self.by = orders, f"gram {orders}", by
        self.make_members()

    def member(self) -> Detector:
        return _GramLayer(self.by)

    def read(self, maps: Tensor) -> Tensor:
        """Row sums of Gram matrices of maps (n, c, s): (n, orders · c)."""
        # g is homogeneous, of degree 2: powers of numbers in [-1, 1] do not overflow, of small channels do not vanish
        largest = maps.abs().amax(dim=2, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        scale = largest.amax(dim=1, keepdim=True)
        unit, share, found = maps / largest, largest / scale, []
        for q in range(1, self.orders + 1):
            powers = unit**q
            with full_precision(maps.device):
                sums = (powers @ (powers.mT @ share**q)).squeeze(2)
            found.append(sums.sign() * sums.abs() ** (1 / q) * share.squeeze(2))
        return torch.cat(found, dim=1) * scale.squeeze(2).square()

    def finish_layers(self, layers: EachLayer) -> None:
        """Tell of classes without bounds."""
        first = self.members[0]
        missing = (first.low[:, 0] > first.high[:, 0]).nonzero().flatten().tolist()
        of = "is predicted as" if self.by == "predicted" else "is of"
        tell_missing(self, missing, f"no training sample {of} {{}}: an input predicted so scores -inf")
