"""Detectors that read the penultimate features z (n, m): their norm, and their proximity to the head's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..functional import nci_score
from . import streaming
from .base import Detector
from .registry import register
from .streaming import at_least_float32


@register
class FeatureNorm(Detector):
    """The p-norm of the features: ‖z‖_p. A head that normalises its input is scored on z before normalisation.

    p = 2: Haas, Yolland and Rabus, "Exploring Simple, High Quality Out-of-Distribution Detection with L2
    Normalization", TMLR 2024, arXiv:2306.04072. p = 1 is the filter term of NCI (Liu and Qin, CVPR 2025).

    Args:
        p: order of the norm, 1 <= p <= inf.
    """

    label = "Feature norm"
    needs_features = True

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        checks.real("p", p, 1.0)
        self.p = float(p)

    def statistics(self) -> tuple[str, ...]:
        return {1.0: ("norm1",), 2.0: ("norm2",)}.get(self.p, ())

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return statistics[self.statistics()[0]]

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        if self.statistics():
            return super()._score(features, logits)
        return torch.linalg.vector_norm(at_least_float32(features), ord=self.p, dim=1)


@register
class NCI(Detector):
    """Proximity of the centred feature to the weight of its predicted class, plus the L1 norm of the feature:

        w_p · (z − μ) / ‖z − μ‖₂ + α ‖z‖₁        p = argmax_j f_j,  μ = mean of the training features

    Without logits the prediction is made from the kept head, and the (n, c) logits are never stored.

    Liu and Qin, "Detecting Out-of-Distribution through the Lens of Neural Collapse", CVPR 2025, arXiv:2311.01479.

    Args:
        alpha: weight of the norm. Fitting keeps the one given; the papers choose it from `grid` on validation data, see
            `ood_fast.detectors.tune`.
    """

    needs_features = True
    needs_head = True
    state = ("mean",)
    grid: ClassVar = {"alpha": (1e-4, 1e-3, 1e-2, 1e-1)}

    def __init__(self, alpha: float = 1e-4) -> None:
        super().__init__()
        checks.real("alpha", alpha, 0.0)
        self.alpha = alpha

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"mean": streaming.FeatureMean()}

    def _finish(self, mean: streaming.FeatureMean) -> None:
        self.mean = mean.value()

    def statistics(self) -> tuple[str, ...]:
        return ("predicted", "norm1", "centred_norm", "projection")

    def constants(self) -> dict[str, Any]:
        return {"W": self.head_weight, "mean": self.mean}

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        length = statistics["centred_norm"]
        proximity = torch.where(length > 0, statistics["projection"] / length, 0.0)  # z = μ has pScore 0
        return proximity + self.alpha * statistics["norm1"]

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        if logits is None:
            return nci_score(features, self.head_weight, self.head_bias, self.mean, None, self.alpha)
        return super()._score(features, logits)
