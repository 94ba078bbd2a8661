"""What is measured: the cases as data, and their inputs."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A head of `n_classes` on `n_features`, and a batch of `n_samples`."""

    name: str
    n_samples: int
    n_classes: int
    n_features: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.n_samples, self.n_classes, self.n_features

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


# Above this the reference takes seconds a step on a CPU, and the whole run should take a minute.
CPU_REFERENCE_LIMIT = 2**30

# Batch 128 on the 512 features of a ResNet-18, as in the papers' CIFAR recipes; 256 on the 2048 of a ResNet-50.
CASES = (
    Case("CIFAR-10", 128, 10, 512),
    Case("CIFAR-100", 128, 100, 512),
    Case("ImageNet-1K", 256, 1000, 2048),
)


@dataclass(frozen=True)
class Inputs:
    """What a training step or a scoring pass has at hand; `logits` and `W` are leaves that want a gradient."""

    logits: Tensor
    z: Tensor
    W: Tensor
    b: Tensor
    y: Tensor
    mean: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
        """The inputs of `case`: features after a ReLU and a pooling, a freshly initialised head, random targets.

        An untrained head predicts many classes within a batch, which is the expensive end for ELogitNorm: its products
        grow with the number of distinct predictions.
        """
        n, c, m = case.shape
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(n, m, generator=generator, dtype=torch.float64).abs()
        W, b = (
            (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) / m**0.5 for shape in ((c, m), (c,))
        )
        # Less the common part of the features: with it one class would win nearly everywhere.
        z = z - 0.9 * z.mean(0)
        y = torch.randint(c, (n,), generator=generator).to(device)
        z, W, b = (tensor.to(device, dtype) for tensor in (z, W, b))
        logits = F.linear(z, W, b)
        return cls(logits.requires_grad_(), z, W.requires_grad_(), b, y, z.mean(0))

    @property
    def distinct_predictions(self) -> int:
        return int(self.logits.argmax(1).unique().numel())


def skip_unless_reference_fits(case: Case, device: torch.device) -> None:
    """Skips the test, with the reason, where the reference needs too much memory: three tensors (c, c, m) at once.

    They are the differences of all pairs of rows of W, kept for the backward pass; there their gradient; a temporary.
    """
    c, m = case.n_classes, case.n_features
    needed = 3 * c * c * m * 4
    limit = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_REFERENCE_LIMIT
    if needed > limit:
        pytest.skip(
            f"reference at {case}: 3 × {c}×{c}×{m} floats are {needed / 1e9:.1f} GB, limit {limit / 1e9:.1f} GB"
        )


def machine() -> str:
    """The processor by name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.system()} {platform.machine()} {platform.processor()}".strip()
