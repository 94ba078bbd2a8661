"""Detectors that reshape the features before the head, and take the energy of the logits that come of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..eager.precision import double
from . import streaming
from .detector import Detector
from .fitting import BELOW_0, tell
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
        return {"values": streaming.Percentiles()}

    def _finish(self, values: streaming.Percentiles) -> None:
        self.clip = values.like.new_tensor(values.percentile(self.p))

    def _reshape(self, z: Tensor) -> Tensor:
        return z.clamp(max=self.clip)


@register
class VRA(ReshapedEnergy):
    """Energy of the features clipped from both sides: ẑ = min(max(z, q_low), q_high), percentiles of all fitted
    features pooled.

    Xu et al., "VRA: Variational Rectified Activation for Out-of-distribution Detection", NeurIPS 2023,
    arXiv:2302.11716, set what lies below q_low to 0: below="zero". pytorch-ood's is
    `VRA(99, 1, per_feature=True)`.

    Args:
        high, low: in percent, 0 <= low <= high <= 100.
        below: "clip" as in OpenOOD, or "zero".
        per_feature: each feature has percentiles of its own: of all rows up to 2²⁵ numbers, beyond of a random sample.
    """

    state = ("clip", "floor")
    fits_on = "validation"
    grid = {"high": (85, 90, 95, 99), "low": (1, 5, 10, 15)}

    def __init__(
        self, high: float = 90.0, low: float = 10.0, *, below: str = "clip", per_feature: bool = False
    ) -> None:
        super().__init__()
        checks.real("high", high, 0.0, 100.0)
        checks.real("low", low, 0.0, 100.0)
        checks.one_of("below", below, ("clip", "zero"))
        if low > high:
            raise ValueError(f"low: got {low}, expected at most high, {high}")
        self.high, self.low, self.below, self.per_feature = high, low, below, per_feature

    def gathers(self) -> dict[str, streaming.Gathered]:
        whole = streaming.Bank(values=streaming.SAMPLE_VALUES) if self.per_feature else streaming.Percentiles()
        return {"values": whole}

    def _finish(self, values: Any) -> None:
        if self.per_feature:
            found = np.percentile(values.value().cpu().numpy(), (self.high, self.low), axis=0)
        else:
            found = [values.percentile(p) for p in (self.high, self.low)]
        self.clip, self.floor = (values.like.new_tensor(bound) for bound in found)

    def _reshape(self, z: Tensor) -> Tensor:
        clipped = z.clamp(max=self.clip)
        if self.below == "clip":
            return clipped.clamp(min=self.floor)
        return torch.where(z < self.floor, 0.0, clipped)


@register
class DICE(ReshapedEnergy):
    """Energy of a sparse head: log Σ_j exp f_j with f = Ŵ z + b, where Ŵ keeps the weights W_jk whose contribution
    W_jk μ_k is above the p-th percentile of all of them, μ the mean of the training features, and is 0 elsewhere.

    Sun and Li, "DICE: Leveraging Sparsification for Out-of-Distribution Detection", ECCV 2022, arXiv:2111.09805.

    Args:
        p: in percent, 0 <= p <= 100; pytorch-ood's `p` is p / 100. 90 as in OpenOOD, which searches no other; the
            paper's are 10, 30, 50, 70 and 90.
    """

    state = ("sparse_weight",)

    def __init__(self, p: float = 90.0) -> None:
        super().__init__()
        checks.real("p", p, 0.0, 100.0)
        self.p = p

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"mean": streaming.FeatureMean()}

    def _finish(self, mean: streaming.FeatureMean) -> None:
        weight = self.head_weight
        contribution = double(weight) * (mean.total / mean.rows).to(double(weight))
        threshold = float(np.percentile(contribution.cpu().numpy(), self.p))
        self.sparse_weight = weight * (contribution > threshold).to(weight)

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        return torch.logsumexp(exact_linear(at_least_float32(features), self.sparse_weight, self.head_bias), dim=1)


def largest_features(z: Tensor, p: float) -> Tensor:
    """The k = m − round(m p / 100) largest of each row, at least one, (n, k), in no order."""
    n_features = z.shape[1]
    return z.topk(max(1, n_features - round(n_features * p / 100)), dim=1, sorted=False).values


@register
class LTS(Detector):
    """Energy of scaled logits: log Σ_j exp(s f_j) with s = (s1/s2)², s1 = Σ max(z, 0), s2 the sum of the
    k = m − round(m p / 100) largest of them in that sample, at least one; s = 1 where none is above 0.

    Djurisic, Liu and Nikolic, "Logit Scaling for Out-of-Distribution Detection", Machine Vision and Applications 2025,
    arXiv:2409.01175. pytorch-ood's `p` is 1 − p / 100.

    Args:
        p: in percent, 0 <= p <= 100.
    """

    needs_features = True
    needs_logits = True

    def __init__(self, p: float = 95.0) -> None:
        super().__init__()
        checks.real("p", p, 0.0, 100.0)
        self.p = p

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        positive = at_least_float32(features).relu()
        largest = largest_features(positive, self.p).sum(dim=1, keepdim=True)
        share = positive.sum(dim=1, keepdim=True) / largest
        scale = torch.where(largest == 0, 1.0, share).square()
        return torch.logsumexp(at_least_float32(logits) * scale, dim=1)


class PrunedEnergy(ReshapedEnergy):
    """Base class of what looks at the k = m − round(m p / 100) largest features of each sample, at least one."""

    of_positive = True
    grid = {"p": (65, 70, 75, 80, 85, 90, 95)}

    def __init__(self, p: float) -> None:
        super().__init__()
        checks.real("p", p, 0.0, 100.0)
        self.p, self.looked = p, False

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """As `Detector.score_features`; the first features are looked at: a fit on the head alone sees none."""
        scores = super().score_features(features, logits)
        if not self.looked and not torch.compiler.is_compiling() and features is not None and features.numel():
            self.looked = True
            if (features < 0).any():
                tell(self, BELOW_0)
        return scores

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
        largest = largest_features(z, self.p)
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
        return z * self._factor(z, largest_features(z, self.p))
