"""Detectors that reshape the features before the head, and take the energy of the logits that come of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from . import streaming
from .detector import Detector
from .numbers import at_least_float32, exact_linear
from .registry import register

# exp(s1/s2) of ASH-S and SCALE. Features >= 0 have s1/s2 <= m/k, 20 at p = 95; beyond, only features below 0 with a sum
# s2 near 0 come, whose exponential would be inf.
MAX_EXPONENT = 50.0


class ReshapedEnergy(Detector):
    """Base class: log Σ_j exp f_j with f = W ẑ + b, where `_reshape` makes ẑ of z. A subclass supplies that."""

    needs_features = True
    needs_head = True

    def _reshape(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        reshaped = self._reshape(at_least_float32(features))
        return torch.logsumexp(exact_linear(reshaped, self.head_weight, self.head_bias), dim=1)


@register
class ReAct(ReshapedEnergy):
    """Energy of the features clipped from above: ẑ = min(z, q), q the p-th percentile of all fitted features pooled.

    Sun, Guo and Li, "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS 2021, arXiv:2111.12797.

    Args:
        p: in percent, 0 <= p <= 100; pytorch-ood's `percentile` is p / 100.
    """

    state = ("clip",)
    fits_on = "validation"
    grid = {"p": (85, 90, 95, 99)}

    def __init__(self, p: float = 90.0) -> None:
        super().__init__()
        checks.real("p", p, 0.0, 100.0)
        self.p = p

    def gathers(self) -> dict[str, streaming.Gathered]:
        """What `_finish` takes."""
        return {"values": streaming.Percentiles()}

    def _finish(self, values: streaming.Percentiles) -> None:
        self.clip = values.like.new_tensor(values.percentile(self.p))

    def _reshape(self, z: Tensor) -> Tensor:
        return z.clamp(max=self.clip)


class PrunedEnergy(ReshapedEnergy):
    """Base class of what looks at the k = m − round(m p / 100) largest features of each sample, at least one."""

    grid = {"p": (65, 70, 75, 80, 85, 90, 95)}

    def __init__(self, p: float) -> None:
        super().__init__()
        checks.real("p", p, 0.0, 100.0)
        self.p = p

    def _largest(self, z: Tensor) -> Tensor:
        """(n, k), in no order."""
        n_features = z.shape[1]
        return z.topk(max(1, n_features - round(n_features * self.p / 100)), dim=1, sorted=False).values

    @staticmethod
    def _factor(z: Tensor, largest: Tensor) -> Tensor:
        """exp(s1/s2), (n, 1): s1 = Σ z, s2 the sum of the largest; 1 where s2 = 0."""
        s2 = largest.sum(dim=1, keepdim=True)
        exponent = z.sum(dim=1, keepdim=True) / s2.masked_fill(s2 == 0, torch.inf)
        return exponent.clamp(max=MAX_EXPONENT).exp()


@register
class ASH(PrunedEnergy):
    """Energy of pruned features: of each sample the k = m − round(m p / 100) largest stay (of equal ones the first),
    the others become 0, and

        variant="b"    each of them becomes Σ z / k
        variant="s"    they are multiplied by exp(s1/s2), s1 = Σ z, s2 = their sum
        variant="p"    they stay as they are

    Features of 0 give the energy of the bias. In "s" the factor is 1 where s2 = 0, and e^50 at most.

    Djurisic et al., "Extremely Simple Activation Shaping for Out-of-Distribution Detection", ICLR 2023,
    arXiv:2209.09858.

    Args:
        variant: "b" as in OpenOOD, "s" is pytorch-ood's default, or "p".
        p: in percent, 0 <= p <= 100; pytorch-ood's `percentile` is p / 100, 0.65 by default.
    """

    def __init__(self, variant: str = "b", p: float = 90.0) -> None:
        super().__init__(p)
        checks.one_of("variant", variant, ("b", "s", "p"))
        self.variant = variant

    def _reshape(self, z: Tensor) -> Tensor:
        largest = self._largest(z)
        smallest = largest.amin(dim=1, keepdim=True)
        above, tied = z > smallest, z == smallest
        n_tied = largest.shape[1] - above.sum(dim=1, keepdim=True)  # how many of the tied ones stay
        keep = (above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= n_tied))).to(z.dtype)
        if self.variant == "b":
            return keep * (z.sum(dim=1, keepdim=True) / largest.shape[1])
        pruned = keep * z  # a product, so that NaN stays NaN
        return pruned if self.variant == "p" else pruned * self._factor(z, largest)


@register
class SCALE(PrunedEnergy):
    """Energy of scaled features: ẑ = z · exp(s1/s2), s1 = Σ z, s2 the sum of the k = m − round(m p / 100) largest of
    that sample. Features of 0 give the energy of the bias; the factor is 1 where s2 = 0, and e^50 at most.

    Xu et al., "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement", ICLR 2024,
    arXiv:2310.00227.

    Args:
        p: in percent, 0 <= p <= 100; pytorch-ood's `percentile` is p / 100, 0.65 by default.
    """

    def __init__(self, p: float = 85.0) -> None:
        super().__init__(p)

    def _reshape(self, z: Tensor) -> Tensor:
        return z * self._factor(z, self._largest(z))
