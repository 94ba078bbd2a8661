"""Which backend serves: Triton kernels on CUDA and ROCm devices, fused PyTorch (`eager`) elsewhere and for float64.

The environment variable `OOD_FAST_BACKEND` (`eager` or `triton`, read at import) or `use_backend` overrides the choice;
with `TRITON_INTERPRET=1` the Triton kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from .. import checks, eager

BACKENDS = ("auto", "eager", "triton")
_chosen = os.environ.get("OOD_FAST_BACKEND", "auto") or "auto"
if _chosen not in BACKENDS:
    raise ValueError(f"OOD_FAST_BACKEND: got {_chosen!r}, expected one of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside on the backend `name`: "auto", "eager" or "triton"."""
    global _chosen
    checks.one_of("backend", name, BACKENDS)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed. Looks for it without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_no_triton() -> None:
    warnings.warn(
        "ood_fast: triton is not installed, so tensors on the GPU take the slower PyTorch path; pip install triton",
        stacklevel=2,
    )


def backend_name(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Which backend ("eager" or "triton") serves tensors of this device and dtype."""
    device = torch.device(device)
    if dtype == torch.float64 or _chosen == "eager":
        return "eager"
    if _chosen == "triton":
        if not has_triton():
            raise RuntimeError("OOD_FAST_BACKEND=triton, but triton is not installed; pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "OOD_FAST_BACKEND=triton: Triton runs CPU tensors only through its interpreter; "
                "set TRITON_INTERPRET=1 before Python starts"
            )
        return "triton"
    if device.type == "cuda":  # also ROCm
        if has_triton():
            return "triton"
        _warn_no_triton()
    return "eager"


def backend_of(*tensors: Tensor | None) -> ModuleType:
    """The module whose functions serve these tensors, of which one is given: `eager` or `kernels`."""
    given = tensors[0] if tensors[0] is not None else next(t for t in tensors if t is not None)
    name = backend_name(given.device, eager.compute_dtype(*tensors))
    backend: ModuleType = eager if name == "eager" else _kernels()
    return backend


@functools.cache  # an import statement in a function looks its module up each time
def _kernels() -> ModuleType:
    from .. import kernels

    backend: ModuleType = kernels
    return backend
