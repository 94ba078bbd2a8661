"""Detectors that read the penultimate features z (n, m): their norm, and their proximity to the head's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..functional import nci_score
from .base import CentredDetector, Detector, at_least_float32, register


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

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        return torch.linalg.vector_norm(at_least_float32(features), ord=self.p, dim=1)


@register
class NCI(CentredDetector):
    """Proximity of the centred feature to the weight of its predicted class, plus the L1 norm of the feature:

        w_p · (z − μ) / ‖z − μ‖₂ + α ‖z‖₁        p = argmax_j f_j,  μ = mean of the training features

    Without logits the prediction is made from the kept head, and the (n, c) logits are never stored.

    Liu and Qin, "Detecting Out-of-Distribution through the Lens of Neural Collapse", CVPR 2025, arXiv:2311.01479.

    Args:
        alpha: weight of the norm. Fitting keeps the one given; the papers choose it from `ALPHAS` on validation data,
            as `ood_fast.evaluate.best_alpha` and `ood-fast compare` do.
    """

    ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)  # the papers' grid

    def __init__(self, alpha: float = 1e-3) -> None:
        super().__init__()
        checks.real("alpha", alpha, 0.0)
        self.alpha = alpha

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        return nci_score(features, self.head_weight, self.head_bias, self.mean, logits, self.alpha)
