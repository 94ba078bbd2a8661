"""Detectors that read nothing but the logits f (n, c). None needs fitting."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .base import Detector, at_least_float32, register


@register
class MSP(Detector):
    """Maximum softmax probability: max_j softmax(f)_j.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
    ICLR 2017, arXiv:1610.02136.
    """

    needs_logits = True

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        # exp(max - logsumexp): one pass, and the (n, c) probabilities are never stored
        return (logits.amax(dim=1) - torch.logsumexp(logits, dim=1)).exp()


@register
class MaxLogit(Detector):
    """The largest logit: max_j f_j.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022, arXiv:1911.11132.
    """

    needs_logits = True

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        return at_least_float32(logits).amax(dim=1)


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

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        return self.temperature * torch.logsumexp(at_least_float32(logits) / self.temperature, dim=1)
