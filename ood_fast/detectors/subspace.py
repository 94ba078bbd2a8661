"""Detectors that tell the directions that the training features use from those that they do not."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..eager.precision import double
from . import streaming
from .detector import Detector
from .fitting import DoesNotFit, Limit, at_most
from .numbers import at_least_float32, exact_linear, nan_where_too_long
from .registry import register

NO_RESIDUAL = 1e-7  # of the length of the features: what float32 leaves of a residual that is 0


def principal_directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a symmetric matrix (m, m) as columns, and its eigenvalues, (m,); the largest first.

    The component of largest size is positive: processes that sum in another order get the same signs.
    """
    values, vectors = torch.linalg.eigh(matrix)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0), values.flip(0)


def rounding_of_mean(scatter: streaming.Scatter) -> Tensor:
    """What a constant feature seems to vary by, (m,)."""
    return scatter.rows * torch.finfo(scatter.mean.dtype).eps * scatter.mean


def deviations(scatter: streaming.Scatter) -> Tensor:
    """Standard deviation (÷N) of each feature, (m,) in float64, 1 for one that does not vary."""
    variance = scatter.covariance().diagonal()
    return torch.where(variance > rounding_of_mean(scatter).square(), variance.sqrt(), 1.0)


def leading(directions: Tensor, dim: int) -> Tensor:
    """The first `dim` columns, by themselves."""
    # `contiguous` would leave a single column as it lies, and products of it round otherwise than those of a copy.
    return directions[:, :dim].clone(memory_format=torch.contiguous_format)


def limit_of_dim(most: int, why: str, advice: int, or_else: str = "") -> Limit:
    """Of the dimensions of a principal space."""
    if most < 1:
        return Limit(most, why, "no dim fits such data", None)
    advice = max(1, advice)
    return Limit(most, why, f"take a smaller dim, such as {advice}{or_else}", advice)


def by_width(n_features: int) -> Limit:
    """There are more features than dimensions."""
    return limit_of_dim(n_features - 1, f"expected less than {n_features}, the number of features", n_features // 2)


class ResidualDetector(Detector):
    """Base class of what measures the residual: r = x − V Vᵀ x, x = z − u, u = −W⁺b.

    V (m, dim): the eigenvectors of the largest eigenvalues of the second moment Σ x xᵀ / N of the features fitted on.
    """

    needs_features = True
    needs_head = True
    state: ClassVar[tuple[str, ...]] = ("origin", "principal")

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive_int("dim", dim)
        self.dim = dim

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"scatter": streaming.Scatter(), "sample": streaming.Bank(values=streaming.SAMPLE_VALUES)}

    def _finish(self, scatter: streaming.Scatter, sample: streaming.Bank, **others: Any) -> None:
        weight = double(self.head_weight).to(scatter.mean.device)
        origin = torch.zeros_like(scatter.mean)
        if self.head_bias is not None:
            live = self.head_bias.to(weight.device) > -math.inf  # of a masked class there is no logit to be 0
            origin = -torch.linalg.pinv(weight[live]) @ self.head_bias.to(weight)[live]
        moment = scatter.covariance().addr(scatter.mean - origin, scatter.mean - origin)
        directions, values = principal_directions(moment)
        limits = [by_width(len(values))]
        if "dim" not in self.given:
            limits.append(self._by_residual(values))
        at_most(self, "dim", *limits)
        principal = leading(directions, self.dim)
        residual, length = self._mean_lengths(sample.value(), origin, principal)
        if residual <= NO_RESIDUAL * length:
            raise DoesNotFit(
                f"dim: got {self.dim}, but the training features lie in {self.dim} dimensions and leave no residual; "
                "take a smaller dim, or more training data",
                "dim",
            )
        self.origin, self.principal = origin.to(scatter.like), principal.to(scatter.like)
        self._finish_residual(residual, **others)

    def _finish_residual(self, residual: Tensor, **others: Any) -> None:
        """What else is made of the mean of ‖r‖."""

    @staticmethod
    def _by_residual(values: Tensor) -> Limit:
        """The space leaves a residual; `values`: of the second moment, the largest first."""
        # Of the first d directions, for each d; not on a GPU, where use_deterministic_algorithms refuses cumsum.
        outside = values.cpu().clamp(min=0).flip(0).cumsum(0).flip(0)
        share = max(NO_RESIDUAL**2, 2 * len(values) * torch.finfo(values.dtype).eps)
        used = int((outside > share * outside[0]).sum())
        return limit_of_dim(used - 1, f"but the training features lie in {used} dimensions", used // 2)

    @staticmethod
    def _mean_lengths(rows: Tensor, origin: Tensor, principal: Tensor) -> Tensor:
        """The means of ‖r‖ and of ‖x‖, in float64."""
        total = origin.new_zeros(2)
        for chunk in rows.split(8192):
            x = double(chunk) - origin
            lengths = [torch.linalg.vector_norm(t, dim=1).sum() for t in (x - x @ principal @ principal.T, x)]
            total += torch.stack(lengths)
        return total / len(rows)

    def _lengths(self, features: Tensor) -> Tensor:
        """‖r‖₂, (n,)."""
        x = at_least_float32(features).to(self.origin.dtype) - self.origin
        residual = x - exact_linear(exact_linear(x, self.principal.T), self.principal)
        lengths: Tensor = torch.linalg.vector_norm(residual, dim=1)
        return lengths


@register
class ViM(ResidualDetector):
    """Virtual-logit matching: the energy less the length of the residual, the part of z outside the principal space,

        log Σ_j exp f_j − α ‖r‖₂        r = x − V Vᵀ x,  x = z − u,  u = −W⁺b

    V (m, dim): the eigenvectors of the largest eigenvalues of the second moment Σ x xᵀ / N of the training features;
    α = mean of max_j f_j / mean of ‖r‖₂ over the training samples. The latter mean is taken over all of them up to
    2²⁵ numbers of features, and over a random sample of that size above: a relative standard error of v / √k, with v
    the coefficient of variation of ‖r‖ and k = 2²⁵ / m rows. Fitted on features, logits and head.

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022, arXiv:2203.10807.

    Args:
        dim: dimensions of the principal space, 1 <= dim < m.
    """

    needs_logits = True
    state = (*ResidualDetector.state, "alpha")
    grid = {"dim": (256, 1000)}

    def __init__(self, dim: int = 256) -> None:
        super().__init__(dim)

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {**super().gathers(), "max_logit": streaming.MeanMaxLogit()}

    def _finish_residual(self, residual: Tensor, *, max_logit: streaming.MeanMaxLogit) -> None:
        self.alpha = (max_logit.value().to(residual.device) / residual).to(self.origin)

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        length = self._lengths(features)
        energy = torch.logsumexp(at_least_float32(logits), dim=1)
        return nan_where_too_long(energy - self.alpha * length, length)


@register
class Residual(ResidualDetector):
    """Minus the length of the residual alone, the second term of `ViM`: −‖r‖₂. Fitted on features and head.

    OpenOOD fits it on validation data, the paper on training data. OpenOOD's dim of a net with 512 features leaves
    nothing; here the default is lowered.

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022, arXiv:2203.10807.

    Args:
        dim: dimensions of the principal space, 1 <= dim < m.
    """

    fits_on = "validation"

    def __init__(self, dim: int = 512) -> None:
        super().__init__(dim)

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        length = self._lengths(features)
        return nan_where_too_long(-length, length)


@register
class NECO(Detector):
    """Share of the feature's length that lies in the principal space of the training features, times the largest logit:

        ‖V_dᵀ x‖₂ / ‖x‖₂ · max_j f_j        x = (z − μ) / σ

    μ, σ: mean and standard deviation (÷N) of each training feature, σ = 1 for one that does not vary; V_d (m, dim): the
    first principal directions of x. x = 0 has the share 0. Fitted on features.

    Ben Ammar et al., "NECO: NEural Collapse Based Out-of-distribution detection", ICLR 2024, arXiv:2310.06823.

    Args:
        dim: d, 1 <= dim < m.
        standardize: False leaves σ out.
        use_max_logit: False leaves out the largest logit, as the authors do for ResNets; then no logits are needed.
        raw_length: divide by ‖z‖₂ in place of ‖x‖₂, as the authors do for DeiT and Swin; z = 0 has the share 0.
    """

    needs_features = True
    needs_logits = True
    state = ("mean", "deviation", "principal")

    def __init__(
        self, dim: int = 100, *, standardize: bool = True, use_max_logit: bool = True, raw_length: bool = False
    ) -> None:
        super().__init__()
        checks.positive_int("dim", dim)
        self.dim, self.standardize, self.use_max_logit, self.raw_length = dim, standardize, use_max_logit, raw_length
        self.needs_logits = use_max_logit

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"scatter": streaming.Scatter()}

    def _finish(self, scatter: streaming.Scatter) -> None:
        covariance = scatter.covariance()
        deviation = deviations(scatter) if self.standardize else torch.ones_like(scatter.mean)
        directions, values = principal_directions(covariance / torch.outer(deviation, deviation))
        # Beyond the rank lie whatever directions rounding leaves, others for each order of the batches.
        noise = len(values) * torch.finfo(values.dtype).eps * values[0]
        noise = noise + (rounding_of_mean(scatter) / deviation).square().sum()
        rank = int((values > noise).sum())
        span, vary = (
            f"but {scatter.rows} training features span less",
            f"but the training features vary in {rank} directions only",
        )
        at_most(
            self,
            "dim",
            by_width(len(values)),
            limit_of_dim(scatter.rows - 1, span, math.ceil(scatter.rows / 2), ", or more data"),
            limit_of_dim(rank, vary, rank // 2, ", or more data"),
        )
        principal = leading(directions, self.dim)
        self.mean, self.deviation, self.principal = (t.to(scatter.like) for t in (scatter.mean, deviation, principal))

    def _score(self, features: Tensor, logits: Any) -> Tensor:
        z = at_least_float32(features).to(self.mean.dtype)
        x = (z - self.mean) / self.deviation
        inside = torch.linalg.vector_norm(exact_linear(x, self.principal.T), dim=1)
        length = torch.linalg.vector_norm(z if self.raw_length else x, dim=1)
        share = nan_where_too_long(torch.where(length == 0, 0.0, inside / length), length)
        return share * at_least_float32(logits).amax(dim=1) if self.use_max_logit else share
