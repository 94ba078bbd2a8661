"""Detectors that read nothing but the logits f (n, c)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import checks
from .base import Detector
from .registry import register
from .streaming import at_least_float32


@register
class MSP(Detector):
    """Maximum softmax probability: max_j softmax(f)_j.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
    ICLR 2017, arXiv:1610.02136.
    """

    needs_logits = True

    def statistics(self) -> tuple[str, ...]:
        return ("max", "logsumexp")

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return (statistics["max"] - statistics["logsumexp"]).exp()


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
class Energy(Detector):
    """Negative free energy: T · log Σ_j exp(f_j / T).

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, arXiv:2010.03759.

    Args:
        temperature: T > 0.
    """

    needs_logits = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        checks.real("temperature", temperature, 0.0, open_low=True)
        self.temperature = temperature

    def statistics(self) -> tuple[str, ...]:
        return ("logsumexp",) if self.temperature == 1 else ()

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return statistics["logsumexp"]

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        if self.temperature == 1:
            return super()._score(features, logits)
        return self.temperature * torch.logsumexp(at_least_float32(logits) / self.temperature, dim=1)
