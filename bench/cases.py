"""What is measured: the cases as data, and their inputs. The same cases run on a GPU, with more samples."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_fast.ops import backend_name

SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Case:
    """A head of `n_classes` on `n_features`, and a batch of `n_samples`; on a GPU of `gpu_samples`."""

    name: str
    n_samples: int
    n_classes: int
    n_features: int
    gpu_samples: int = 65536
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.n_samples, self.n_classes, self.n_features

    def __str__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f" {SHORT_NAMES[self.dtype]}"
        return f"{self.name} {self.shape}{dtype}"

    def on(self, device: torch.device | str) -> Case:
        """This case as `device` runs it: a CPU step is a batch of the papers' recipes, a GPU step fills the GPU."""
        return replace(self, n_samples=self.gpu_samples) if torch.device(device).type == "cuda" else self

    def of_dtype(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)


# Batch 128 on the 512 features of a ResNet-18, as in the papers' CIFAR recipes; 256 on the 2048 of a ResNet-50 and the
# 768 of a ViT-B.
CIFAR10 = Case("CIFAR-10", 128, 10, 512)
CIFAR100 = Case("CIFAR-100", 128, 100, 512)
IMAGENET200_VIT = Case("ImageNet-200 ViT-B", 256, 200, 768)
IMAGENET200 = Case("ImageNet-200 ResNet-50", 256, 200, 2048)
IMAGENET_VIT = Case("ImageNet-1K ViT-B", 256, 1000, 768)
IMAGENET = Case("ImageNet-1K", 256, 1000, 2048)
IMAGENET21K = Case("ImageNet-21K ViT-B", 64, 21841, 768, gpu_samples=4096)

# The usual three, for whatever has no reason to choose others.
CASES = (CIFAR10, CIFAR100, IMAGENET)
# The loss for given logits.
DENSE = (CIFAR10, CIFAR100, IMAGENET200_VIT, IMAGENET200, IMAGENET_VIT, IMAGENET, IMAGENET21K)
# The loss without logits. With 128 samples of 100,000 classes and 16 of a million, a step takes a second or two on
# two cores; bench/ratios.py has the batch of 512.
LINEAR = (
    Case("ImageNet-21K ViT-B", 64, 21841, 768, gpu_samples=8192),
    Case("100k classes", 64, 100_000, 512, gpu_samples=8192),
    Case("1M classes", 16, 1_000_000, 64, gpu_samples=1024),
)


def cases(which: tuple[Case, ...], device: torch.device | str) -> list[Case]:
    """The cases with their dtypes: float32, and bfloat16 at ImageNet-1K; on a GPU bfloat16, and float32 there."""
    gpu = torch.device(device).type == "cuda"
    chosen = []
    for case in which:
        case = case.on(device)
        if gpu or case.name == IMAGENET.name:
            chosen.append(case.of_dtype(torch.bfloat16))
        if not gpu or case.name == IMAGENET.name:
            chosen.append(case)
    return chosen


@dataclass(frozen=True)
class Inputs:
    """What a training step or a scoring pass has at hand; z, W, b and the logits are leaves that want a gradient."""

    logits: Tensor | None
    z: Tensor
    W: Tensor
    b: Tensor
    y: Tensor
    mean: Tensor

    @classmethod
    def of(
        cls, case: Case, device: torch.device | str, dtype: torch.dtype | None = None, *, with_logits: bool = True
    ) -> Inputs:
        """The inputs of `case`: features after a ReLU and a pooling, a freshly initialised head, random targets.

        An untrained head predicts many classes within a batch, which is the expensive end for ELogitNorm: its products
        grow with the number of distinct predictions.
        """
        n, c, m = case.shape
        device, dtype = torch.device(device), dtype or case.dtype
        generator = torch.Generator(device).manual_seed(0)
        z = torch.randn(n, m, generator=generator, device=device).abs_()
        W, b = (
            torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1).div_(m**0.5)
            for shape in ((c, m), (c,))
        )
        # Less the common part of the features: with it one class would win nearly everywhere.
        z = z - 0.9 * z.mean(0)
        y = torch.randint(c, (n,), generator=generator, device=device)
        z, W, b = (tensor.to(dtype) for tensor in (z, W, b))
        logits = F.linear(z, W, b) if with_logits else None
        return cls._leaves(logits, z, W, b, y, z.mean(0))

    @classmethod
    def _leaves(cls, logits: Tensor | None, z: Tensor, W: Tensor, b: Tensor, y: Tensor, mean: Tensor) -> Inputs:
        logits, z, W, b = (None if t is None else t.detach().requires_grad_() for t in (logits, z, W, b))
        return cls(logits, z, W, b, y, mean)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        return self._leaves(**{name: None if t is None else change(name, t.detach()) for name, t in vars(self).items()})

    def double(self) -> Inputs:
        """The same values in float64: what the truth is computed from. The kernels without logits have them rounded:
        which of two near ones is the largest decides more than all other digits, so these come with them."""
        if self.logits is None and backend_name(self.z.device) == "triton":
            return replace(self, logits=F.linear(self.z, self.W, self.b)).double()
        return self._map(lambda name, t: t.double() if t.is_floating_point() else t.clone())

    def copy(self) -> Inputs:
        return self._map(lambda name, t: t.clone())

    def first(self, n_samples: int) -> Inputs:
        """The first samples, with the whole head."""
        return self._map(lambda name, t: t[:n_samples].clone() if name in ("logits", "z", "y") else t)

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values() if t is not None)

    @property
    def distinct_predictions(self) -> int | None:
        """u, or None where there are no logits to tell."""
        return None if self.logits is None else int(self.logits.argmax(1).unique().numel())


def machine() -> str:
    """The processor by name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.system()} {platform.machine()} {platform.processor()}".strip()
