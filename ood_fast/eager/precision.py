"""The dtype and the precision of all arithmetic, and the matrix product that keeps them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_JIT: Any = torch.jit  # modules of torch that do not say what they hold
MKLDNN: Any = torch.backends.mkldnn


def is_exporting() -> bool:
    """Whether this run makes a graph for torch.export or ONNX."""
    return _JIT.is_tracing() or torch.compiler.is_exporting()


def keep_tensors(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`functools.lru_cache` for a function that makes one tensor or a tuple of them. Those of a mode that makes others
    than plain ones, such as FakeTensorMode, serve once."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        kept = functools.lru_cache(maxsize)(function)

        @functools.wraps(function)
        def made(*args: Any) -> Any:
            tensors = kept(*args)
            if not all(type(t) is Tensor for t in (tensors if isinstance(tensors, tuple) else (tensors,))):
                kept.cache_clear()
            return tensors

        return made

    return keep


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of all arithmetic: float64 if any input has it, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


WITHOUT_FLOAT64 = ("mps",)


def has_float64(device: torch.device | str) -> bool:
    """Whether a device knows float64. What asks for it goes by `double`, or asks here."""
    return torch.device(device).type not in WITHOUT_FLOAT64


def double(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (values if has_float64(values.device) else values.cpu()).double()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products at full precision inside, whatever autocast or `torch.set_float32_matmul_precision` say."""
    if torch.compiler.is_compiling():  # a graph cannot hold the setting: a compiled program follows the caller's
        return _NOTHING_TO_DO
    setting = torch.backends.cuda.matmul if device.type == "cuda" else MKLDNN.matmul
    if setting.fp32_precision in ("none", "ieee") and not torch.is_autocast_enabled(device.type):
        return _NOTHING_TO_DO
    return _within_full_precision(device, setting)


_NOTHING_TO_DO = contextlib.nullcontext()


@contextlib.contextmanager
def _within_full_precision(device: torch.device, setting: Any) -> Iterator[None]:
    chosen = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setting.fp32_precision = chosen


# Multiply-adds from which a product goes to oneDNN; below, its call costs more than it saves.
ONEDNN_PRODUCT = 1 << 20


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """x W^T where oneDNN can multiply float32 matrices with AVX-512 here, at full precision."""
    from ..ops.registration import ONEDNN_LINEAR  # importing it makes `ops`, which is made of this

    modes = (os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT") for name in ("ONEDNN", "DNNL"))
    can = (
        MKLDNN.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and all(mode.upper() == "STRICT" for mode in modes)
    )
    return ONEDNN_LINEAR if can else None


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, fresh.

    MKL, which torch.mm calls, leaves AVX-512 unused on AMD's processors and takes twice the time of oneDNN there; this
    is the operator that torch's own compiler calls for a linear layer.
    """
    if (
        left.dtype == torch.float32
        and left.device.type == "cpu"
        and left.shape[0] * right.numel() >= ONEDNN_PRODUCT
        and torch.backends.mkldnn.enabled
    ):
        linear = _onednn_linear()
        if linear is not None:
            return linear(left, right.t(), None, "none", [], "")
    return left @ right
