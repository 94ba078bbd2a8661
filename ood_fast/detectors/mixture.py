"""Detectors that describe each class by a distribution of its own: of the features, or of distances between logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..eager.precision import double
from . import streaming
from .detector import Detector
from .fitting import DoesNotFit, tell, tell_missing
from .neighbour import query_chunks
from .numbers import at_least_float32, check_targets, exact_linear, first_largest, nan_where_too_long
from .registry import register

# Numbers of the scatter matrices of all classes: 512 MiB in float64. 100 classes of 768 features are 59 million.
CLASS_SCATTER_VALUES = 1 << 26
LIBMR_SHIFT = 1e4  # of distances before a Weibull distribution is fitted, as in the library that OpenMax comes with
TAIL_SPREAD = 1e-6  # of the largest distance: what a tail has to vary by
STEPS = 60  # of a bisection: to float64's last digit


@dataclass
class ClassScatter(streaming.Gathered):
    """The `Scatter` of each class, as long as all of them take at most `most` numbers."""

    most: int = CLASS_SCATTER_VALUES
    reads = ("features", "targets")

    def __post_init__(self) -> None:
        self.classes: dict[int, streaming.Scatter] = {}
        self.dropped = False

    def update(self, features: Tensor, logits: Tensor | None, targets: Tensor) -> None:
        check_targets(targets, None)
        self.like = at_least_float32(features[:0])
        for k in () if self.dropped else targets.unique().cpu().tolist():
            part = self.classes.setdefault(k, streaming.Scatter())
            part.take(features[(targets == k).to(features.device)], None, None)
            self._drop()

    def merge(self, other: ClassScatter) -> None:
        self.dropped |= other.dropped
        for k, part in other.classes.items():
            self.classes.setdefault(k, streaming.Scatter()).join(part)
        self._drop()

    def _drop(self) -> None:
        if self.dropped or len(self.classes) * self.like.shape[1] ** 2 > self.most:
            self.classes, self.dropped = {}, True


@register
class GMM(Detector):
    """Log density of the features under one Gaussian a class, as DDU has it:

        log Σ_c π_c N(z; μ_c, Σ_c + ρ v I)        v = tr(Σ) / m,  Σ = Σ_i (z_i − μ_{y_i})(z_i − μ_{y_i})ᵀ / N

    π_c: share of the training samples; ρ v: a share of the mean variance within classes, so that any unit does.
    Classes without training samples are left out, with a warning. Fitted on features and targets.

    Mukhoti et al., "Deep Deterministic Uncertainty: A New Simple Baseline", CVPR 2023, arXiv:2102.11582, add the first
    jitter that makes all matrices positive definite, pytorch-ood 10⁻⁶ I. OpenOOD's GMM is another: a mixture without
    targets and with one covariance, of several layers.

    Args:
        covariance: "class" or "tied", Σ for all. c matrices of m² numbers that would take more than 2²⁶ are not
            gathered: "class" is then lowered to "tied", with a warning, and refused if it was given.
        ridge: ρ > 0.
    """

    needs_features = True
    state = ("mean", "roots", "class_means", "offset")  # roots (c or 1, m, m): of the inverses; class_means: under them

    def __init__(self, covariance: str = "class", ridge: float = 1e-6) -> None:
        super().__init__()
        checks.one_of("covariance", covariance, ("class", "tied"))
        checks.real("ridge", ridge, 0.0, open_low=True)
        self.covariance, self.ridge = covariance, ridge

    def gathers(self) -> dict[str, streaming.Gathered]:
        shared = {"scatter": streaming.Scatter(), "means": streaming.ClassMeans()}
        return shared if self.covariance == "tied" else {**shared, "of_classes": ClassScatter()}

    def _finish(
        self, scatter: streaming.Scatter, means: streaming.ClassMeans, of_classes: ClassScatter | None = None
    ) -> None:
        tell_missing(self, means.missing(), "no training sample of {}: inputs of it count as those of others")
        within = means.within(scatter) / scatter.rows
        variance = within.diagonal().mean()
        # Features that do not vary seem to: the mean of n equal numbers is off by up to n · 2⁻⁵² of them.
        if not variance > (scatter.rows * torch.finfo(within.dtype).eps * scatter.mean).square().mean():
            raise ValueError("features: got the same for all samples of a class, expected some that differ")
        seen = means.count > 0
        matrices = within.unsqueeze(0)
        if of_classes is not None and self._has_all(of_classes):
            matrices = torch.stack([part.covariance() for _, part in sorted(of_classes.classes.items())])
        values, vectors = torch.linalg.eigh(matrices)
        values = values.clamp(min=0) + self.ridge * variance
        roots = (vectors / values.sqrt().unsqueeze(1)).mT
        class_means = (roots @ (means.value()[seen] - scatter.mean).unsqueeze(2)).squeeze(2)
        log_share = (means.count[seen].to(values) / scatter.rows).log()
        offset = log_share - (values.log().sum(dim=1) + len(within) * math.log(2 * math.pi)) / 2
        kept = (scatter.mean, roots, class_means, offset)
        self.mean, self.roots, self.class_means, self.offset = (t.to(scatter.like) for t in kept)

    def _has_all(self, of_classes: ClassScatter) -> bool:
        """Whether the classes have their own covariance; see `covariance`."""
        if not of_classes.dropped:
            return True
        text = f"of all classes takes more than {of_classes.most} numbers"
        if "covariance" in self.given:
            raise DoesNotFit(f"covariance: got 'class', which {text}; take covariance=\"tied\"", "covariance")
        tell(self, f"covariance: one a class, which {text}: takes one for all; give covariance to choose")
        return False

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        centred = at_least_float32(features).to(self.mean.dtype) - self.mean
        n_roots, n_features, _ = self.roots.shape
        logs = []
        for z in query_chunks(centred, len(self.class_means) * n_features):
            x = exact_linear(z, self.roots.flatten(0, 1)).unflatten(1, (n_roots, n_features))
            logs.append(self.offset - (x - self.class_means).square().sum(dim=2) / 2)
        density = torch.logsumexp(torch.cat(logs), dim=1)
        return nan_where_too_long(density, density)


@register
class OpenMax(Detector):
    """Log odds of the known classes, after the α largest logits are cut by how far the sample is from those classes:

        log Σ_j exp(f_j (1 − ω_j w_j)) − Σ_j f_j ω_j w_j        w_j = Weibull(‖f − μ_j‖),  ω = 1, (α−1)/α, ..., 1/α, 0

    ω in the order of the logits; μ_j: the mean logits of the training samples of class j that are classified correctly;
    the Weibull distribution is fitted to the `tail` largest of their distances from it by maximum likelihood, after
    libMR's shift of 10⁴. A class without such samples, or whose distances are all the same, has w = 1, with a warning.
    OpenOOD's score, minus the probability of the unknown class, is a rising function of this one that rounds to −1 and
    0; pytorch-ood takes all samples of a class, tail 25, α 10. Masked classes (−inf) do not count. Fitted on logits and
    targets: all of them up to 2²⁵ numbers, beyond a random sample of so many.

    Bendale and Boult, "Towards Open Set Deep Networks", CVPR 2016, arXiv:1511.06233.

    Args:
        tail: how many distances, at least 2; a class with fewer has all of its own.
        alpha: how many logits; more than there are: all.
    """

    needs_logits = True
    state = ("means", "start", "location", "scale")  # (c, c), and (c,) of the log of shifted distances

    def __init__(self, tail: int = 20, alpha: int = 3) -> None:
        super().__init__()
        checks.positive_int("tail", tail)
        checks.positive_int("alpha", alpha)
        if tail < 2:
            raise ValueError(f"tail: got {tail}, expected 2 or more")
        self.tail, self.alpha = tail, alpha

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"sample": streaming.Bank("logits", values=streaming.SAMPLE_VALUES)}

    def _finish(self, sample: streaming.Bank) -> None:
        rows = double(sample.value())
        logits, targets = rows[:, :-1], rows[:, -1].long()
        n_classes = logits.shape[1]
        right = logits.max(dim=1).indices == targets
        live = logits.masked_fill(logits.isneginf(), 0.0)
        means = logits.new_zeros(n_classes, n_classes)
        start, location, scale = logits.new_zeros(3, n_classes)
        unknown = []
        for k in range(n_classes):
            of_class = live[right & (targets == k)]
            if len(of_class):
                means[k] = of_class.mean(dim=0)
            distances = torch.linalg.vector_norm(of_class - means[k], dim=1).sort().values[-self.tail :]
            if len(distances) and distances[-1] - distances[0] > TAIL_SPREAD * distances[-1]:
                start[k] = distances[0]
                location[k], scale[k] = _log_weibull(torch.log1p((distances - start[k]) / LIBMR_SHIFT))
            else:
                unknown.append(k)
        if len(unknown) == n_classes:
            raise ValueError("logits: got no class with correct samples at different distances from their mean; "
                             "expected some; look at the order of the classes, or take more data")  # fmt: skip
        tell_missing(self, unknown, "no tail of correct training samples of {}: inputs predicted so count as unknown")
        kept = (means, start, location, scale)
        self.means, self.start, self.location, self.scale = (t.to(sample.like) for t in kept)

    def widths(self) -> tuple[int | None, int | None]:
        """(None, c) of the means."""
        return None, None if self.means is None else len(self.means)

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits).to(self.means.dtype)
        alpha = min(self.alpha, logits.shape[1])
        top, classes = first_largest(logits, alpha)
        masked = logits.isneginf().unsqueeze(1)
        difference = (logits.unsqueeze(1) - self.means[classes]).masked_fill(masked, 0.0)
        distance = torch.linalg.vector_norm(difference, dim=2)
        start, location, scale = (t[classes] for t in (self.start, self.location, self.scale))
        above = (distance - start).clamp(min=-LIBMR_SHIFT) / LIBMR_SHIFT
        t = 2 * torch.atanh(above / (2 + above))  # log1p, of which ONNX makes log(1 + x)
        known = scale > 0
        w = -torch.expm1(-torch.exp((t - location) / torch.where(known, scale, 1.0)))
        order = torch.arange(alpha, device=logits.device, dtype=logits.dtype)
        cut = torch.where(known, w, 1.0) * (1 - order / alpha)
        of_unknown = (top * cut).masked_fill(top.isneginf(), 0.0).sum(dim=1)
        left = logits.scatter(1, classes, torch.where(top.isneginf(), top, top * (1 - cut)))
        return torch.logsumexp(left, dim=1) - of_unknown


def _log_weibull(t: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of t = log x, (n,) in float64, of a Weibull-distributed x, by maximum likelihood:

        P(t < s) = 1 − exp(−exp((s − location) / scale))

    The scale solves Σ t e^{t/scale} / Σ e^{t/scale} − scale = mean t, whose left side falls in scale.
    """
    largest = t.amax()
    low, high = torch.zeros_like(largest), largest - t.amin()  # the mean under any weights is at most the largest
    for _ in range(STEPS):
        scale = (low + high) / 2
        weight = ((t - largest) / scale).exp()
        is_low = (weight * t).sum() / weight.sum() - scale > t.mean()
        low, high = (scale, high) if is_low else (low, scale)
    return largest + scale * weight.mean().log(), scale
