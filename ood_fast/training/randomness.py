"""The global random states of a run: taken, set, and left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the global generators of Python, NumPy, torch and the device, as what torch.load reads safely."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*_which(device))
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Back to a `random_state`; of a device of another kind, its generator stays as it is."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *others = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], *_which(device))


def _which(device: torch.device) -> tuple[int, ...]:
    """What tells its generator from that of the current device; on MPS there is one."""
    return () if device.index is None or device.type == "mps" else (device.index,)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """All global generators are afterwards as they were before."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


@contextmanager
def convolutions_timed() -> Iterator[None]:
    """cuDNN tries its algorithms once for each shape, of which training has one."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
