"""A device without float64: its tensors lie on the CPU and refuse every operator that gives float64. Or one with it,
that refuses what CUDA has only one way to compute, other in each run.

They say "meta", a device whose guards every PyTorch has; those of "mps" are not in PyTorch for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ood_fast.eager import precision

HERE = torch.device("meta")
# What torch.use_deterministic_algorithms refuses on CUDA; of the first three, what is not of integers.
REFUSED = ("cumsum", "cumprod", "logcumsumexp", "kthvalue", "median.dim", "nanmedian.dim", "histc", "put_", "put")
has_float64 = False


class There(Tensor):
    """Holds `inner` on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        told = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, device=HERE, **told)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any) -> There:
        return There(self.inner.new_tensor(data))

    def __repr__(self) -> str:
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU; its results are on the device unless it moves them away."""
    leaves = tree_flatten((args, kwargs))[0]
    asked = kwargs.get("device")
    here = any(isinstance(leaf, There) for leaf in leaves) if asked is None else torch.device(asked).type == "meta"
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    name = str(function).removeprefix("aten.").removesuffix(".default")
    if here and has_float64 and name in REFUSED and (inputs[0].is_floating_point() or name not in REFUSED[:3]):
        raise RuntimeError(f"{function} has no deterministic implementation")
    if here and has_float64 and name == "bincount" and len(inputs) > 1:
        raise RuntimeError("bincount with weights has no deterministic implementation")
    apart = any(not isinstance(leaf, There) and leaf.dim() > 0 for leaf in inputs)
    if here and asked is None and apart and "copy_" not in str(function):
        raise RuntimeError(f"{function}: expected all tensors on one device")
    if asked is not None:
        kwargs = kwargs | {"device": "cpu"}
    plain = tree_map(lambda leaf: leaf.inner if isinstance(leaf, There) else leaf, (args, kwargs))
    result = function(*plain[0], **plain[1])
    written = [leaf for leaf in leaves if isinstance(leaf, There)]

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not here:
            return value
        if value.dtype == torch.float64 and not has_float64:
            raise TypeError(f"{function}: the device has no float64")
        return _same(value, written)

    return tree_map(placed, result)


def _same(value: Tensor, written: list[There]) -> Tensor:
    """What an operator wrote in place is the same tensor."""
    for leaf in written:
        if leaf.inner is value:
            return leaf
    return There(value)


class _Made(TorchDispatchMode):
    """Tensors that are made on the device from nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


@contextmanager
def device(float64: bool = False) -> Iterator[Any]:
    """Inside, `There(tensor)` gives what lies there."""
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **keywords: Any) -> Tensor:  # no operator that a mode would see
        value = made(tree_map(lambda leaf: leaf.inner if isinstance(leaf, There) else leaf, data), **keywords)
        if device is None or torch.device(device).type != "meta":
            return value.to(device)
        if value.dtype == torch.float64 and not has_float64:
            raise TypeError("torch.tensor: the device has no float64")
        return There(value)

    with pytest.MonkeyPatch.context() as patched, _Made():
        patched.setattr(torch, "tensor", tensor)
        patched.setattr(torch, "is_autocast_enabled", lambda device=None: False)
        patched.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        patched.setattr(precision, "WITHOUT_FLOAT64", () if float64 else ("meta",))
        patched.setitem(globals(), "has_float64", float64)
        yield There
