"""Detectors that measure the distance to the decision boundaries of the head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import boundary_distance
from . import streaming
from .base import Detector
from .registry import register
from .streaming import at_least_float32


@register
class FDBD(Detector):
    """Distances to the decision boundaries of the predicted class p, relative to the distance from the training mean:

        Σ_j |f_p − f_j| / ‖w_p − w_j‖ / ‖z − μ‖₂  =  (c − 1) · D / ‖z − μ‖₂

    The sum over j, as OpenOOD has it; D is `boundary_distance`, the mean over the boundaries that exist (coincident
    rows of W and logits of −inf have none). ‖z − μ‖ counts as the machine epsilon at least: z = μ scores high, not inf.

    Liu and Qin, "Fast Decision Boundary based Out-of-Distribution Detector", ICML 2024, arXiv:2312.11536.
    """

    label = "fDBD"
    needs_features = True
    needs_logits = True
    needs_head = True
    state = ("mean",)

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"mean": streaming.FeatureMean()}

    def _finish(self, mean: streaming.FeatureMean) -> None:
        self.mean = mean.value()

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        distance_from_mean = torch.linalg.vector_norm(at_least_float32(features) - self.mean, dim=1)
        total = boundary_distance(logits, self.head_weight) * (logits.shape[1] - 1)
        return total / distance_from_mean.clamp_min(torch.finfo(distance_from_mean.dtype).eps)
