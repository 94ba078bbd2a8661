"""Two images in one, and a target that says how much of each: mixup, CutMix, RegMixup, and MixOE with outliers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..recipes import TrainingRecipe
from .objective import Around, Criterion, StepBatch
from .outliers import OutlierExposureLoss, outliers_of


class Mixing:
    """Mixes a batch with itself in another order; what is drawn depends on the numbers of the call alone.

        mixup:   x_i ← λ x_i + (1 − λ) x_j                                 λ ~ Beta(α, α), one for the batch
        CutMix:  x_i ← x_i with a rectangle of x_j, 1 − λ of the area
        both:    y_i ← λ e(y_i) + (1 − λ) e(y_j)

    A rectangle that reaches over the edge is cut there, and λ is the share that is left of x_i. With both on, each
    batch gets one of them, at even chances.

    Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018, arXiv:1710.09412; Yun et al., "CutMix:
    Regularization strategy to train strong classifiers with localizable features", ICCV 2019, arXiv:1905.04899.
    """

    def __init__(self, recipe: TrainingRecipe, n_classes: int, seed: int) -> None:
        self.mixup, self.cutmix, self.n_classes, self.seed = recipe.mixup, recipe.cutmix, n_classes, seed

    def __call__(self, x: Tensor, y: Tensor, *numbers: int) -> tuple[Tensor, Tensor]:
        """x (n, channels, height, width) and y (n,) -> mixed x, and probabilities (n, c); as they are if both are 0.

        Args:
            numbers: not negative, as epoch, step and rank: what makes this draw differ from others of the same seed.
        """
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(self, kind)]
        if not kinds:
            return x, y
        random = np.random.default_rng([self.seed, *numbers])
        kind = kinds[random.integers(len(kinds))]
        alpha = getattr(self, kind)
        share = float(random.beta(alpha, alpha))
        other = torch.from_numpy(random.permutation(len(x))).to(x.device)
        x, share = _in_one(kind, x, x[other], share, random)
        ours = F.one_hot(y, self.n_classes).to(x.dtype)
        return x, torch.lerp(ours[other], ours, share)


def _in_one(kind: str, x: Tensor, theirs: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """x and theirs in one, and the share that is of x."""
    if kind == "mixup":
        return torch.lerp(theirs, x, share), share
    rows, columns = _rectangle(random, (x.shape[-2], x.shape[-1]), 1 - share)
    x = x.clone()
    x[..., rows, columns] = theirs[..., rows, columns]
    return x, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / x[0, 0].numel()


def _drawn() -> np.random.Generator:
    """Numbers that torch's global generator decides, whose state a run saves."""
    return np.random.default_rng(int(torch.randint(2**62, (), device="cpu")))


def _rectangle(random: np.random.Generator, shape: tuple[int, int], area: float) -> tuple[slice, slice]:
    """About `area` of the image, of its shape, the middle anywhere, cut at the edges."""
    slices = []
    for length in shape:
        middle, half = random.integers(length), round(length * area**0.5) // 2
        slices.append(slice(int(max(middle - half, 0)), int(min(middle + half, length))))
    return slices[0], slices[1]


class RegMixupLoss(Around):
    """RegMixup: mixed images beside the images, not in their place.

        loss = (criterion(f(x), y) + criterion(f(x̃), ỹ)) / 2      x̃ = λ x_i + (1 − λ) x_j      λ ~ Beta(alpha, alpha)

    An image whose target is ignored has no part in ỹ = λ e(y_i) + (1 − λ) e(y_j).

    Args:
        criterion: (logits, y) -> scalar that takes class probabilities (n, c) too; None: cross-entropy.
        alpha: above 0. The larger, the nearer is λ to a half; 20 as OpenOOD trains CIFAR-10, 10 elsewhere.
        average: "mean", as the authors' code and OpenOOD have it, or "sum", the paper's sum of both (η = 1).

    Pinto et al., "RegMixup: Mixup as a Regularizer Can Surprisingly Improve Accuracy and Out Distribution Robustness",
    NeurIPS 2022, arXiv:2206.14502.
    """

    shown = ("alpha", "average")

    def __init__(self, criterion: Criterion | None = None, alpha: float = 20.0, average: str = "mean") -> None:
        super().__init__(criterion)
        checks.real("alpha", alpha, 0.0, open_low=True)
        checks.one_of("average", average, ("mean", "sum"))
        self.alpha, self.average = alpha, average

    def forward(self, logits: Tensor, mixed_logits: Tensor, y: Tensor, mixed_y: Tensor) -> Tensor:
        """The loss of logits (n, c) with y, as the criterion takes it, and of those of mixed images with mixed_y."""
        total = self.criterion(logits, y) + self.criterion(mixed_logits, mixed_y)
        return total / 2 if self.average == "mean" else total

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """As `forward`; images and mixed images go through the network together."""
        random = _drawn()
        other = torch.from_numpy(random.permutation(len(batch.x))).to(batch.x.device)
        share = float(random.beta(self.alpha, self.alpha))
        mixed, share = _in_one("mixup", batch.x, batch.x[other], share, random)
        logits, mixed_logits = network(torch.cat([batch.x, mixed])).chunk(2)
        ours = _probabilities(batch.target, logits)
        return self(logits, mixed_logits, batch.target, torch.lerp(ours[other], ours, share)), logits


class MixOELoss(OutlierExposureLoss):
    """MixOE: outlier exposure on the way from the images to the outliers.

        loss = criterion(f(x), y) + weight · criterion(f(x̃), λ e(y) + (1 − λ)/c)

        cutmix:  x̃ = x with a rectangle of an outlier, 1 − λ of the area       λ ~ Beta(alpha, beta)
        mixup:   x̃ = λ x + (1 − λ) outlier

    The defaults are OpenOOD's, which trains 10 epochs from trained weights.

    Args:
        criterion: (logits, y) -> scalar that takes class probabilities (n, c) too; None: cross-entropy.
        weight: not negative. kind: "cutmix" or "mixup". alpha, beta: above 0.

    Zhang et al., "Mixture Outlier Exposure: Towards Out-of-Distribution Detection in Fine-grained Environments", WACV
    2023, arXiv:2106.03917.
    """

    shown = ("weight", "kind", "alpha", "beta")

    def __init__(
        self,
        criterion: Criterion | None = None,
        weight: float = 1.0,
        kind: str = "cutmix",
        alpha: float = 0.1,
        beta: float = 1.0,
    ) -> None:
        super().__init__(criterion, weight)
        checks.one_of("kind", kind, ("cutmix", "mixup"))
        for name, value in (("alpha", alpha), ("beta", beta)):
            checks.real(name, value, 0.0, open_low=True)
        self.kind, self.alpha, self.beta = kind, alpha, beta

    def forward(self, logits: Tensor, mixed_logits: Tensor, y: Tensor, share: float = 0.0) -> Tensor:
        """The loss of logits (n, c) with y, and of the logits (n, c) of mixed images, whose share of y is `share`."""
        checks.logits(logits)
        checks.several_classes("logits", logits.shape[1])
        ours = _probabilities(y, logits)
        mixed = torch.lerp(torch.full_like(ours, 1 / logits.shape[1]), ours, share)
        return self.criterion(logits, y) + self.weight * self.criterion(mixed_logits, mixed)

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """As `forward`; images and mixed images go through the network together. Of fewer outliers some come twice."""
        random, outliers = _drawn(), outliers_of(batch)
        outliers = outliers[torch.arange(len(batch.x), device=outliers.device) % len(outliers)]
        share = float(random.beta(self.alpha, self.beta))
        mixed, share = _in_one(self.kind, batch.x, outliers, share, random)
        logits, mixed_logits = network(torch.cat([batch.x, mixed])).chunk(2)
        return self(logits, mixed_logits, batch.target, share), logits


def _probabilities(y: Tensor, logits: Tensor) -> Tensor:
    """e(y) (n, c) in float32, 0 of ignored indices; probabilities as they are."""
    checks.target(y, logits)
    if y.is_floating_point():
        return y.float()
    return (y[:, None] == torch.arange(logits.shape[1], device=y.device)).float()
