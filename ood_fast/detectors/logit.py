"""Detectors that read nothing but the logits f (n, c). A logit of −inf is a masked class, which none of them counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..eager.precision import double
from ..eager.statistics import exp_of_minus, softmax_rest
from ..statistics import row_statistics
from ..values import GAMMA
from . import streaming
from .detector import Detector
from .fitting import tell, tell_missing
from .numbers import at_least_float32, exact_linear, k_smallest, nan_where_too_long, widened
from .registry import register


def confidence(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """max_j softmax(f / T)_j, (n,), with T > 0 a number or (n, 1); from gaps, so that f / T cannot overflow. In
    float64: of models that were trained with a temperature most are 1 in float32."""
    logits = widened(logits)
    gap = logits.amax(dim=1, keepdim=True) - logits
    return exp_of_minus(gap / temperature).sum(dim=1).reciprocal()


class AtTemperature(Detector):
    """Base class: a score of f / T that is the row statistic `statistic` where T = 1. A subclass supplies
    `_at_temperature`, the score at any T."""

    needs_logits = True
    statistic: ClassVar[str]

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        checks.real("temperature", temperature, 0.0, open_low=True)
        self.temperature = temperature

    def statistics(self) -> tuple[str, ...]:
        return (self.statistic,) if self.temperature == 1 else ()

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return statistics[self.statistic]

    def _at_temperature(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        if self.temperature == 1:
            return super()._score(features, logits)
        return self._at_temperature(at_least_float32(logits))


@register
class MSP(AtTemperature):
    """Maximum softmax probability: max_j softmax(f / T)_j.

    In float32 all predictions with more than 17 between their logits have 1, and tie; evaluations and `ood-fast score`
    take `logits.double()`, which tells them apart. With T ≠ 1 scores are float64 anyway.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
    ICLR 2017, arXiv:1610.02136.

    Args:
        temperature: T > 0, the same for all samples; `TemperedMSP` has those that differ.
    """

    statistic = "confidence"

    def _at_temperature(self, logits: Tensor) -> Tensor:
        return confidence(logits, self.temperature)


@register
class MaxLogit(Detector):
    """The largest logit: max_j f_j.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022, arXiv:1911.11132.
    """

    needs_logits = True

    def statistics(self) -> tuple[str, ...]:
        return ("max",)

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return statistics["max"]


@register
class Energy(AtTemperature):
    """Negative free energy: T · log Σ_j exp(f_j / T).

    A level, not a gap: a constant added to all logits is added to it, and what lies below the last digit of logits of
    that size is lost (float32 holds 6e-5 beside 1e3). The same is so of `MaxLogit` and of all energies of features.

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, arXiv:2010.03759.

    Args:
        temperature: T > 0.
    """

    statistic = "logsumexp"

    def _at_temperature(self, logits: Tensor) -> Tensor:
        return self.temperature * torch.logsumexp(logits / self.temperature, dim=1)


@register
class Entropy(Detector):
    """Negative entropy of the softmax P: Σ_j P_j log P_j, with 0 log 0 = 0.

    Chan et al., "Entropy Maximization and Meta Classification for Out-of-Distribution Detection in Semantic
    Segmentation", ICCV 2021, arXiv:2012.06575.
    """

    needs_logits = True

    def statistics(self) -> tuple[str, ...]:
        return ("entropy",)

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return -statistics["entropy"]


@register
class GEN(Detector):
    """Negative generalised entropy of the M largest softmax probabilities: −Σ P_j^γ (1 − P_j)^γ.

    1 − P_j keeps its digits where P_j is nearly 1, so that certain predictions are told apart. With γ > 1 scores are
    float64 where the device has it: (1 − P_j)^γ is 0 in float32 from P_j = 0.9998 on at γ = 10.

    Liu, Lochman and Zach, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection", CVPR 2023.

    Args:
        gamma: γ > 0.
        M: how many classes; None, or as many as there are: all. All with the other defaults shares the read of the
            other logit detectors.
        reduction: "sum" as OpenOOD has it, or "mean" over the M classes as pytorch-ood.
        clamp: probabilities count as [clamp, 1 − clamp]. 0 as in the paper and OpenOOD; pytorch-ood's value is 1e-7.
            GEN(M=None, reduction="mean", clamp=1e-7) is pytorch-ood's default.
    """

    needs_logits = True
    grid = {"gamma": (0.01, 0.1, 0.5, 1, 2, 5, 10), "M": (10, 50, 100, 200, 500, 1000)}

    def __init__(self, gamma: float = GAMMA, M: int | None = 100, reduction: str = "sum", clamp: float = 0.0) -> None:
        super().__init__()
        checks.real("gamma", gamma, 0.0, open_low=True)
        if M is not None:
            checks.positive_int("M", M, ", or None for all classes")
        checks.one_of("reduction", reduction, ("sum", "mean"))
        checks.real("clamp", clamp, 0.0, 0.5)
        self.gamma, self.M, self.reduction, self.clamp = gamma, M, reduction, clamp

    def statistics(self) -> tuple[str, ...]:
        shared = self.M is None and self.reduction == "sum" and not self.clamp and self.gamma <= 1
        return ("gen",) if shared else ()

    def constants(self) -> dict[str, Any]:
        return {"gamma": self.gamma}

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return -statistics["gen"]

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        n_largest = logits.shape[1] if self.M is None else min(self.M, logits.shape[1])
        logits = at_least_float32(logits) if self.gamma <= 1 else widened(logits)
        if n_largest == logits.shape[1] and not self.clamp:
            total = row_statistics(("gen",), logits, gamma=self.gamma)["gen"]
        else:
            total = self._largest_terms(logits, n_largest).sum(dim=1)
        return -total / n_largest if self.reduction == "mean" else -total

    def _largest_terms(self, logits: Tensor, n_largest: int) -> Tensor:
        """(n, M). With e_j = exp(f_j − f_p) and rest = Σ_{j≠p} e_j: P_j = e_j / (1 + rest), and 1 − P_j is
        ((1 − e_j) + rest) / (1 + rest), which does not cancel at j = p. Logarithms, as P_j itself underflows."""
        gap = logits.amax(dim=1, keepdim=True) - logits
        rest = softmax_rest(exp_of_minus(gap)).unsqueeze(1)
        gap = k_smallest(gap, n_largest)
        log_p = -gap - rest.log1p()
        log_other = (rest - torch.expm1(-gap)).log() - rest.log1p()
        if self.clamp:
            low, high = math.log(self.clamp), math.log1p(-self.clamp)
            log_p, log_other = log_p.clamp(low, high), log_other.clamp(low, high)
        return (self.gamma * (log_p + log_other)).exp()


@register
class KLMatching(Detector):
    """Minus the smallest Kullback-Leibler divergence of the softmax P from the typical softmax of a class:

        −min_k Σ_j P_j log(P_j / d_kj),    d_k = mean softmax of the validation samples that are predicted as k

    Classes that are never predicted in fitting have no d_k and are left out of the minimum, with a warning. A d_kj
    below the smallest normal float counts as that: a class that fitting never saw possible costs much, not infinity.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022, arXiv:1911.11132.
    """

    label = "KL matching"
    needs_logits = True
    of_classes = True
    state = ("log_typical",)  # log d_k, a row for each class that was predicted, (k, c)
    fits_on = "validation"

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"typical": streaming.ClassMeans(by="predicted", of="softmax")}

    def _finish(self, typical: streaming.ClassMeans) -> None:
        tell_missing(
            self, typical.missing(), "no sample is predicted as {}: inputs predicted so are compared with others"
        )
        means = typical.value()[typical.count > 0]
        self.log_typical = means.clamp_min(torch.finfo(typical.like.dtype).tiny).log().to(typical.like)

    def widths(self) -> tuple[int | None, int | None]:
        """(None, c) of the typical softmax."""
        return None, None if self.log_typical is None else self.log_typical.shape[1]

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        probability = torch.softmax(at_least_float32(logits), dim=1)
        entropy = row_statistics(("entropy",), logits)["entropy"]
        # The KL is −entropy − Σ_j P_j log d_kj.
        return entropy + exact_linear(probability, self.log_typical).amax(dim=1)


@register
class TemperatureScaling(Detector):
    """Maximum softmax probability at the temperature that fits validation data best: max_j softmax(f / T)_j,

        T = argmin Σ_i −log softmax(f_i / T)_{y_i},    2⁻⁶ <= T <= 2¹⁰

    The sum is convex in 1/T, whose derivative Σ_i (gap of y_i − mean gap under the softmax) is bisected in float64;
    OpenOOD and pytorch-ood take at most 50 small steps of L-BFGS, which may end before. Where every sample is
    classified correctly T is the smallest, with a warning. Fitted on logits and targets: all of them up to 2²⁵ numbers,
    beyond a random sample of so many.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    """

    label = "Temperature scaling"
    needs_logits = True
    state = ("temperature",)
    fits_on = "validation"

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"sample": streaming.Bank("logits", values=streaming.SAMPLE_VALUES)}

    def _finish(self, sample: streaming.Bank) -> None:
        rows = double(sample.value())
        logits, targets = rows[:, :-1], rows[:, -1:].long()
        gap = logits.amax(dim=1, keepdim=True) - logits
        of_target = gap.gather(1, targets)
        if of_target.isinf().any():
            raise ValueError(
                f"targets: got class {int(targets[of_target.isinf()][0])} where its logit is -inf, a masked class, "
                "expected classes that can be predicted"
            )
        finite = gap.masked_fill(gap.isinf(), 0.0)
        low, high = -10.0, 6.0  # of log2 1/T
        for _ in range(40):
            middle = (low + high) / 2
            weight = exp_of_minus(gap * 2.0**middle)
            falls = of_target.mean() < ((weight * finite).sum(dim=1) / weight.sum(dim=1)).mean()
            low, high = (middle, high) if falls else (low, middle)
        if high == 6.0 or low == -10.0:
            tell(
                self,
                f"the temperature is at its bound, {2.0**-low:g}: all samples are right, or the logits tell nothing",
            )
        self.temperature = sample.like.new_tensor(2.0 ** -((low + high) / 2))

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        return confidence(at_least_float32(logits), self.temperature)


@register
class SML(Detector):
    """Standardised max logit: (f_p − μ_p) / σ_p, p = argmax_j f_j, with mean and standard deviation (÷N) of the largest
    logit over the training samples that are predicted as p.

    A class that is predicted for fewer than two of them, or always with one value, takes those of all samples; of those
    that are never predicted a warning tells.

    Jung et al., "Standardized Max Logits: A Simple yet Effective Approach for Identifying Unexpected Road Obstacles in
    Urban-Scene Segmentation", ICCV 2021, arXiv:2107.11264, whose smoothing over neighbouring pixels images do not need.
    """

    label = "Standardised max logit"
    needs_logits = True
    state = ("mean", "deviation")  # (c,)

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"top": streaming.ClassMeans(by="predicted", of="top")}

    def _finish(self, top: streaming.ClassMeans) -> None:
        tell_missing(self, top.missing(), "no sample is predicted as {}: inputs predicted so are compared with all")
        count = top.count.unsqueeze(1)
        moments = torch.cat([top.value(), (top.total.sum(0) / count.sum()).unsqueeze(0)])
        mean, variance = moments[:, 0], moments[:, 1] - moments[:, 0].square()
        # The mean of n squares is off by up to n · 2⁻⁵² of them.
        varies = variance > top.rows * torch.finfo(variance.dtype).eps * moments[:, 1]
        if not varies[-1]:
            raise ValueError(
                f"logits: got the largest logit {float(mean[-1]):g} in all rows, expected some that differ"
            )
        of_class = (top.count > 1) & varies[:-1]
        values = (torch.where(of_class, t[:-1], t[-1]) for t in (mean, variance.clamp(min=0).sqrt()))
        self.mean, self.deviation = (t.to(top.like) for t in values)

    def widths(self) -> tuple[int | None, int | None]:
        """(None, c) of the means."""
        return None, None if self.mean is None else len(self.mean)

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        top, predicted = at_least_float32(logits).max(dim=1)
        return (top - self.mean[predicted]) / self.deviation[predicted]


@register
class GradNorm(Detector):
    """L1 norm of the gradient that the weights W of the head get from the divergence of the softmax P from the uniform
    distribution, Σ_j −log P_j, in closed form:

        ‖∂/∂W‖₁ = ‖z‖₁ · Σ_j |c P_j − 1|

    No backward pass, no parameter is touched, and z may have any sign. Masked classes (−inf) do not count, also in c.
    c P_j − 1 keeps its digits where P is nearly uniform. pytorch-ood takes the mean over j, which divides all scores by
    c, and by default the gradients of all layers, which need backward passes.

    Huang, Geng and Li, "On the Importance of Gradients for Detecting Distributional Shifts in the Wild", NeurIPS 2021,
    arXiv:2110.00218.

    Args:
        temperature: T > 0 of the softmax of f / T; the factor 1/T of its gradient is left out.
    """

    needs_features = True
    needs_logits = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        checks.real("temperature", temperature, 0.0, open_low=True)
        self.temperature = temperature

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        gap = (logits.amax(dim=1, keepdim=True) - logits) / self.temperature
        live = ~gap.isposinf()
        # With e_j = exp(−gap_j) and mean e over the live classes, c P_j − 1 = (e_j − mean e) / mean e.
        less = torch.expm1(-gap.masked_fill(~live, 0.0))
        mean = (less.sum(dim=1) / live.sum(dim=1)).unsqueeze(1)
        spread = ((less - mean).abs() * live).sum(dim=1) / (1 + mean.squeeze(1))
        norm = row_statistics(("norm1",), None, features)["norm1"]
        return nan_where_too_long(norm * spread, norm)
