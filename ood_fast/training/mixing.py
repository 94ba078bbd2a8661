"""Mixup and CutMix: two images in one, and a target that says how much of each."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipes import TrainingRecipe


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
        if kind == "mixup":
            x = torch.lerp(x[other], x, share)
        else:
            rows, columns = _rectangle(random, tuple(x.shape[-2:]), 1 - share)
            x, theirs = x.clone(), x[other]
            x[..., rows, columns] = theirs[..., rows, columns]
            share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / x[0, 0].numel()
        ours = F.one_hot(y, self.n_classes).to(x.dtype)
        return x, torch.lerp(ours[other], ours, share)


def _rectangle(random: np.random.Generator, shape: tuple[int, int], area: float) -> tuple[slice, slice]:
    """About `area` of the image, of its shape, the middle anywhere, cut at the edges."""
    slices = []
    for length in shape:
        middle, half = random.integers(length), round(length * area**0.5) // 2
        slices.append(slice(int(max(middle - half, 0)), int(min(middle + half, length))))
    return slices[0], slices[1]
