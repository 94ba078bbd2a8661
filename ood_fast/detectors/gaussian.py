"""Detectors that describe the training features by class means and covariances."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..functional import l2_normalize
from . import streaming
from .detector import Detector
from .fitting import tell_missing
from .numbers import at_least_float32, exact_linear, nan_where_too_long
from .registry import register

METRICS = ("inner", "euclidean", "cosine")


class _UnitScatter(streaming.Scatter):
    def update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        super().update(_unit(features), logits, targets)


class _UnitMeans(streaming.ClassMeans):
    def update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        super().update(_unit(features), logits, targets)


def _unit(features: Tensor) -> Tensor:
    return l2_normalize(at_least_float32(features))[0]


@register
class Mahalanobis(Detector):
    """Minus the squared Mahalanobis distance to the nearest class mean, with one covariance for all classes:

        max_c −(z − μ_c)ᵀ P (z − μ_c)        P = pseudo-inverse of Σ_i (z_i − μ_{y_i})(z_i − μ_{y_i})ᵀ / N

    Eigenvalues of the covariance up to rtol times the largest count as 0, and so do those within the rounding error of
    the sums, m · 2⁻⁵² times the norm of the covariance about the common mean: directions in which classes do not vary
    take no part. Classes without training samples are left out, with a warning; one sample a class is refused, as no
    direction is left. Fitted on features and targets.

    Scored by one product with the root P^½ and one with the class means that it has been applied to: the nearest class
    is ranked by the expanded square, its distance measured by the difference.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    NeurIPS 2018, arXiv:1807.03888. pytorch-ood's is `Mahalanobis(half=True, scatter=True, ridge=1e-6)`.

    Args:
        half: times ½, the factor in the Gaussian's logarithm. (It hides the method `half` of modules: take
            ``.to(torch.float16)``; models and sets that hold the detector have theirs.)
        scatter: not divided by N.
        ridge: added to every eigenvalue of the covariance (or scatter), >= 0.
        rtol: see above, >= 0; None: m · 2⁻⁵². OpenOOD inverts in float64, too, with the same share of the largest.
        normalize: z/‖z‖ in place of z throughout: Mahalanobis++ (Müller and Hein, ICML 2025, arXiv:2505.18032).
    """

    needs_features = True
    state: ClassVar[tuple[str, ...]] = ("mean", "root", "class_means")  # class_means: (μ_c − μ) P^½ of the classes seen

    half: bool  # type: ignore[assignment]  # hides a method of nn.Module: .to(torch.float16) does what that does

    def __init__(
        self,
        *,
        half: bool = False,
        scatter: bool = False,
        ridge: float = 0.0,
        rtol: float | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        checks.real("ridge", ridge, 0.0)
        if rtol is not None:
            checks.real("rtol", rtol, 0.0)
        self.half, self.scatter, self.ridge, self.rtol, self.normalize = half, scatter, ridge, rtol, normalize

    def gathers(self) -> dict[str, streaming.Gathered]:
        if self.normalize:
            return {"scatter": _UnitScatter(), "means": _UnitMeans()}
        return {"scatter": streaming.Scatter(), "means": streaming.ClassMeans()}

    def _finish(self, scatter: streaming.Scatter, means: streaming.ClassMeans) -> None:
        if not self.ridge and means.count.max() < 2:
            raise ValueError(
                "targets: got one training sample a class, expected two or more of some class: their covariance is 0; "
                "take more data, or a ridge"
            )
        tell_missing(self, means.missing(), "no training sample of {}: inputs of it count as those of others")
        root = self._root(means.within(scatter), scatter)
        class_means = (means.value() - scatter.mean)[means.count > 0] @ root
        self.mean, self.root, self.class_means = (t.to(scatter.like) for t in (scatter.mean, root, class_means))

    def _root(self, matrix: Tensor, scatter: streaming.Scatter) -> Tensor:
        """The symmetric root of the pseudo-inverse of a scatter matrix (m, m), with the settings applied."""
        values, vectors = torch.linalg.eigh(matrix)
        rtol = len(matrix) * torch.finfo(torch.float64).eps
        rounding = rtol * torch.linalg.matrix_norm(scatter.scatter)
        # Features that do not vary seem to: the mean of n equal numbers is off by up to n · 2⁻⁵² of them.
        of_means = scatter.rows * (scatter.rows * torch.finfo(torch.float64).eps * scatter.mean).square().sum()
        cut = torch.maximum(rounding + of_means, values[-1] * (rtol if self.rtol is None else self.rtol))
        values = torch.where(values > cut, values, 0.0) / (1 if self.scatter else scatter.rows) + self.ridge
        inverse = torch.where(values > 0, (0.5 if self.half else 1.0) / values, 0.0)
        root: Tensor = (vectors * inverse.sqrt()) @ vectors.T
        return root

    def _centred(self, features: Tensor) -> Tensor:
        return (_unit(features) if self.normalize else at_least_float32(features)).to(self.mean.dtype) - self.mean

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        z = exact_linear(self._centred(features), self.root)
        # ‖z‖² is the same for every class: their order does not need it.
        table = self.class_means.square().sum(dim=1) - 2 * exact_linear(z, self.class_means)
        return -(z - self.class_means[table.argmin(dim=1)]).square().sum(dim=1)


@register
class RMDS(Mahalanobis):
    """Relative Mahalanobis distance: less the distance under one Gaussian for all training features,

        max_c −(z − μ_c)ᵀ P (z − μ_c) + (z − μ)ᵀ P₀ (z − μ)        P₀ = pseudo-inverse of Σ_i (z_i − μ)(z_i − μ)ᵀ / N

    P, keywords and what classes without samples mean: as in `Mahalanobis`. Rounding errors are relative to the two
    distances, not to their difference: `detector.double()` after a fit in float64 scores with those of float64.
    pytorch-ood's is `RMDS(scatter=True, ridge=1e-6)`.

    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021, arXiv:2106.09022.
    """

    state = (*Mahalanobis.state, "common_root")

    def _finish(self, scatter: streaming.Scatter, means: streaming.ClassMeans) -> None:
        super()._finish(scatter, means)
        self.common_root = self._root(scatter.scatter, scatter).to(scatter.like)

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        common = exact_linear(self._centred(features), self.common_root).square().sum(dim=1)
        return super()._score(features, logits) + common


@register
class SHE(Detector):
    """Simplified Hopfield energy: the inner product with the pattern of the predicted class p,

        z · S_p        S_c = mean feature of the training samples of class c that are classified correctly

    A class without such a sample has no pattern, of which a warning tells: an input predicted as one scores −inf, below
    all others. Fitted on features, logits and targets.

    Zhang et al., "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with Modern
    Hopfield Energy", ICLR 2023.

    Args:
        metric: "inner"; or OpenOOD's others: "euclidean", −‖z − S_p‖₂, and "cosine", where a zero vector has 0.
    """

    needs_features = True
    needs_logits = True
    of_classes = True
    state = ("patterns", "known")  # known: (c,) bool, the classes that have one

    def __init__(self, metric: str = "inner") -> None:
        super().__init__()
        checks.one_of("metric", metric, METRICS)
        self.metric = metric

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"means": streaming.ClassMeans("correct")}

    def _finish(self, means: streaming.ClassMeans) -> None:
        if not means.count.any():
            raise ValueError(
                "targets: got no training sample that is classified correctly, expected some of each class; look at "
                "the order of the classes"
            )
        text = "no training sample of {} is classified correctly: inputs predicted as one score -inf"
        tell_missing(self, means.missing(), text)
        self.patterns = means.value().to(means.like)
        self.known = (means.count > 0).to(means.like.device)

    def widths(self) -> tuple[int | None, int | None]:
        """(m, c) of the patterns."""
        return (None, None) if self.patterns is None else (self.patterns.shape[1], self.patterns.shape[0])

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        top, predicted = logits.max(dim=1)  # argmax need not give the first of ties
        pattern = at_least_float32(self.patterns[predicted])
        z = at_least_float32(features).to(pattern.dtype)
        if self.metric == "inner":
            score = (z * pattern).sum(dim=1)
        elif self.metric == "euclidean":
            length = torch.linalg.vector_norm(z - pattern, dim=1)
            score = nan_where_too_long(-length, length)
        else:
            score = torch.cosine_similarity(z, pattern, dim=1)
            score = nan_where_too_long(score, torch.linalg.vector_norm(z, dim=1))
        return torch.where(self.known[predicted] | score.isnan(), score, -torch.inf).masked_fill(top.isnan(), torch.nan)
