"""Numbers of each sample: norm, distance to the boundaries, confidence; and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import metrics
from ..eager.precision import double
from ..functional import boundary_distance, nci_score, temperature_of
from .collapse import Chunk, Moments
from .plane import Plane

NORM_BINS = 125  # of Haas et al., fig. 7


@dataclass(frozen=True)
class Samples:
    """A few numbers of each sample of a data set, (n,) in float64 on the CPU.

    Attributes:
        predicted, target: p = argmax f and y, int64; y is −1 where the sample has no class.
        norm: ‖z‖₂.
        distance: D, the mean distance to the decision boundaries of p, see `ood_fast.boundary_distance`.
        confidence, confidence_by_distance: max softmax(f), and of f / D (of f where D ≤ 1e-6: no boundary, or a tie).
        p_score: w_p·(z − μ)/‖z − μ‖₂, see `ood_fast.nci_score`.
        nearest: argmin_c ‖z − μ_c‖, int64, over the classes with training samples, the first on ties.
        place: where the sample is in the plane, (n, 2).
    """

    predicted: Tensor
    target: Tensor
    norm: Tensor
    distance: Tensor
    confidence: Tensor
    confidence_by_distance: Tensor
    p_score: Tensor
    nearest: Tensor
    place: Tensor

    def __len__(self) -> int:
        return len(self.norm)

    @property
    def correct(self) -> Tensor:
        """(n,) bool: p = y."""
        return self.predicted == self.target

    def nearest_mean_agreement(self) -> float:
        """NC4: the share of samples whose predicted class is that of the nearest class mean, argmax f = argmin_c
        ‖z − μ_c‖; 1 in complete collapse. Papyan, Han and Donoho, PNAS 2020 (their NC4 is 1 minus this)."""
        return (self.nearest == self.predicted).double().mean().item()


@torch.no_grad()
def samples(chunks: Iterable[Chunk], head: tuple[Tensor, Tensor | None], geometry: Moments, plane: Plane) -> Samples:
    """`Samples` of a data set in one pass; `head` is (W, b), computed with in float64."""
    weight = double(head[0])
    empty = (weight.new_zeros(0, weight.shape[1]), weight.new_zeros(0, len(weight)), None)  # for a set without samples
    parts = [_of_chunk(*chunk, weight, geometry, plane) for chunk in (empty, *chunks)]
    return Samples(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Samples)))


def _of_chunk(
    features: Tensor, logits: Tensor, targets: Tensor | None, weight: Tensor, geometry: Moments, plane: Plane
) -> Samples:
    z, f = double(features), double(logits)
    weight, mean = weight.to(z.device), geometry.mean.to(z.device)
    confidence, predicted = torch.softmax(f, dim=1).max(dim=1)
    distance = boundary_distance(f, weight)
    temperature = temperature_of(distance).unsqueeze(1)
    classes = geometry.class_count.nonzero().squeeze(1).to(z.device)
    # ‖z − μ_c‖² without ‖z‖², which is the same for all c; centred first, for the digits.
    class_mean = geometry.class_mean.to(z.device)[classes] - mean
    nearest = ((z - mean) @ class_mean.T - class_mean.square().sum(dim=1) / 2).max(dim=1).indices
    parts = (
        predicted,
        torch.full_like(predicted, -1) if targets is None else targets.to(predicted),
        torch.linalg.vector_norm(z, dim=1),
        distance,
        confidence,
        torch.softmax(f / temperature, dim=1).amax(dim=1),
        nci_score(z, weight, None, mean, f, alpha=0.0),
        classes[nearest],
        plane.project(z),
    )
    return Samples(*(part.cpu() for part in parts))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r of x and y, (n,): 1 where D(z) grows with ‖z‖ along a line (Ding et al., fig. 2); NaN where either
    does not vary."""
    x, y = (double(values) - double(values).mean() for values in (x, y))
    size = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    return ((x @ y) / size).clamp(-1, 1).item() if size > 0 else math.nan


def coefficient_of_variation(values: Tensor) -> float:
    """std / mean of (n,), ddof 0; NaN where the mean is 0. Of the feature norms, by epoch: Haas et al., fig. 3."""
    values = double(values)
    mean = values.mean()
    return (values.std(correction=0) / mean).item() if mean != 0 else math.nan


@dataclass(frozen=True)
class NormBins:
    """Accuracy by feature norm: bins of equally many samples (as far as n allows), the smallest norms first.

    Attributes:
        norm, accuracy, count: of each bin: mean norm, share of right predictions, samples.
        rank_correlation: Spearman's ρ of the bins' order and their accuracy: 1 where accuracy grows with the norm
            throughout; NaN where it is the same in all.
    """

    norm: Tensor
    accuracy: Tensor
    count: Tensor
    rank_correlation: float


def accuracy_by_norm(norm: Tensor, correct: Tensor, n_bins: int = NORM_BINS) -> NormBins:
    """Accuracy in `n_bins` equal bins of the samples sorted by ‖z‖₂; with fewer than 20 samples a bin, fewer bins.

    Haas et al., TMLR 2024, fig. 7: 125 bins of CIFAR-10's 10,000 test images.
    """
    n_bins = max(1, min(n_bins, len(norm) // 20))
    norm, order = double(norm).sort(stable=True)
    correct = double(correct)[order]
    bins = zip(norm.tensor_split(n_bins), correct.tensor_split(n_bins), strict=True)
    parts = [(part.mean().item(), right.mean().item(), len(part)) for part, right in bins]
    norms, accuracies, counts = torch.tensor(parts, dtype=torch.float64, device="cpu").T
    order = torch.arange(n_bins, device="cpu")
    return NormBins(norms, accuracies, counts.long(), correlation(order, _ranks(accuracies)))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0).double() - (counts.double() + 1) / 2
    return ranks[group]


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in equal bins (lo, hi] of the confidence; NaN in a bin without samples.

    Attributes:
        confidence, accuracy, count: of each bin: mean confidence, share of right predictions, samples.
        ece: expected calibration error, see `ood_fast.metrics.expected_calibration_error`.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    ece: float


def reliability(confidence: Tensor, correct: Tensor, n_bins: int = metrics.ECE_BINS) -> Reliability:
    """The reliability diagram of confidences (n,) and right predictions (n,) bool.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599. Of softmax(f) and of
    softmax(f / D): Ding et al., arXiv:2504.11434.
    """
    confidence, correct = confidence.cpu().double(), correct.cpu().double()
    bins = metrics.confidence_bins(confidence, n_bins)
    count = torch.bincount(bins, minlength=n_bins)
    mean_confidence, accuracy = (
        torch.bincount(bins, values, minlength=n_bins) / count
        for values in (confidence, correct)  # 0 / 0 is NaN
    )
    return Reliability(mean_confidence, accuracy, count, metrics.calibration_error(confidence, correct, n_bins))
