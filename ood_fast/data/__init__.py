"""Data sets: one in-distribution classification task, and the sets that are to be told from it.

- `open_benchmark(name, root)` gives an `ImageBenchmark`, map-style data sets read from the disk: CIFAR, ImageNet, own
  folders (`benchmarks.py`, with the readers in `readers.py`).
- `load(name, seed)` gives a `Benchmark`, tensors that fit in memory, for `ood-fast compare`; the names are in
  `BENCHMARKS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import checks

BENCHMARKS = (
    "digits",
)  # each is a module of this package with `load(seed) -> Benchmark`; imported when it is asked for


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width) in float32, normalised, and class indices (n,)."""

    images: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Split:
        """The same on `device`."""
        return Split(self.images.to(device), self.targets.to(device))


@dataclass(frozen=True)
class OODSet:
    """Images (n, channels, height, width) of a set without labels. `group` is "near" or "far"."""

    title: str
    group: str
    images: Tensor


@dataclass(frozen=True)
class Benchmark:
    """One in-distribution task with its three splits, and the OOD sets by name. All images are normalised alike."""

    name: str
    seed: int
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    ood: dict[str, OODSet] = field(repr=False)

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def to(self, device: torch.device | str) -> Benchmark:
        """The same benchmark with its tensors on `device`."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        ood = {name: replace(ood_set, images=ood_set.images.to(device)) for name, ood_set in self.ood.items()}
        return replace(self, **splits, ood=ood)


def __getattr__(name: str) -> Any:
    if name in ("ImageBenchmark", "open_benchmark"):
        return getattr(importlib.import_module(".benchmarks", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(name: str, seed: int) -> Benchmark:
    """The benchmark of that name, drawn by `seed`; `UserError` lists the known names."""
    if name not in BENCHMARKS:
        raise checks.UserError(checks.unknown("data set", name, BENCHMARKS))
    return importlib.import_module(f".{name}", __name__).load(seed)
