"""Made images in place of a data set: each class a pattern of its own under noise; OOD images are noise alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

N_CLASSES, SIZE = 4, 32


def images(n: int, seed: int) -> TensorDataset:
    """n images (3, 32, 32) with their classes."""
    patterns = torch.randn(N_CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(N_CLASSES, (n,), generator=generator)
    return TensorDataset(patterns[y] + 0.5 * torch.randn(n, 3, SIZE, SIZE, generator=generator), y)


def noise(n: int) -> Tensor:
    """n images of no class."""
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
