"""Which weights a model has, told by a few numbers: so that a detector knows the model that it was fitted on.

Of every floating-point parameter w, k elements (all, or 256 evenly spread) are projected onto fixed waves, j = 1…4:
√2 Σ_i w_i cos(i √j) / max(‖w‖, 1e-3 √k). These numbers, about 1 in size, are others for other weights, and nearly the
same in another dtype, on another device, wrapped, compiled or replicated. `models.weight_fingerprint` is exact.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..heads import unwrapped
from ..ops.registration import version_of

N_ELEMENTS, N_WAVES = 256, 4
# bfloat16 moves a number by 0.003, 8 bits by 0.02; all four of other weights are within 0.05 with a chance of 1e-6.
TOLERANCE = 0.05
TINY = 1e-3  # a parameter of smaller elements counts for less: float16 rounds them away


class Weights(NamedTuple):
    """What is kept of the weights of a model."""

    shapes: int  # CRC-32 of the shapes of all parameters
    waves: tuple[float, ...]  # N_WAVES numbers a parameter


# model -> its parameters with their versions as they were read, and what was read
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[list, Weights | None]] = weakref.WeakKeyDictionary()


def identity_of(model: nn.Module | Sequence[nn.Module]) -> Weights | None:
    """`Weights` of a model, or of several together; None where a process does not hold them whole: FSDP, DTensor,
    ZeRO-3, lazy modules.

    They are read once, and again when a parameter was replaced or changed in place.
    """
    if isinstance(model, nn.ModuleList) or not isinstance(model, nn.Module):
        each = [identity_of(one) for one in model]
        known = [weights for weights in each if weights is not None]
        if len(known) < len(each):
            return None
        shapes = zlib.crc32(str([weights.shapes for weights in known]).encode())
        return Weights(shapes, tuple(wave for weights in known for wave in weights.waves))
    model = unwrapped(model)
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    versions, found = _seen.get(model, ([], None))
    if len(versions) != len(parameters) or not all(
        kept() is parameter and version == version_of(parameter)
        for (kept, version), parameter in zip(versions, parameters, strict=True)
    ):
        versions, found = [(weakref.ref(each), version_of(each)) for each in parameters], _read(parameters)
        _seen[model] = versions, found
    return found


def refuse_other(model: nn.Module | Sequence[nn.Module], fitted_on: Weights | None, what: str) -> None:
    """ValueError if the model has other weights than those of the model that `what` was fitted on."""
    if fitted_on is None or torch.compiler.is_compiling() or (here := identity_of(model)) is None or here is fitted_on:
        return
    if here.shapes == fitted_on.shapes and all(
        abs(a - b) <= TOLERANCE for a, b in zip(here.waves, fitted_on.waves, strict=True)
    ):
        return
    raise ValueError(
        f"model: its weights are not those of the model that {what} was fitted on, for which alone scores and "
        "threshold hold; pass that model, fit anew, or set the detector's fitted_on = None"
    )


def _read(parameters: list[nn.Parameter]) -> Weights | None:
    whole = (Tensor, nn.Parameter)
    if any(type(each) not in whole or each.is_meta or not each.numel() for each in parameters) or not parameters:
        return None
    with torch.no_grad():
        parts = [_spread(parameter).float() for parameter in parameters]
        values = torch.cat([part.to(parts[0].device) for part in parts]).cpu().double()
    waves = []
    for part in values.split([len(part) for part in parts]):
        size = max(float(torch.linalg.vector_norm(part)), TINY * math.sqrt(len(part)))
        at = torch.arange(1, 1 + len(part), dtype=torch.float64)[:, None] * torch.arange(1, 1 + N_WAVES).sqrt().double()
        waves += (math.sqrt(2) * (part[:, None] * at.cos()).sum(0) / size).tolist()
    shapes = zlib.crc32(str([tuple(parameter.shape) for parameter in parameters]).encode())
    return Weights(shapes, tuple(round(wave, 4) for wave in waves))


def _spread(parameter: Tensor) -> Tensor:
    """Elements (k,), the same ones in every memory format."""
    n = parameter.numel()
    if n <= N_ELEMENTS:
        return parameter.flatten()
    rows = torch.linspace(0, n - 1, N_ELEMENTS, dtype=torch.float64).long().to(parameter.device)
    return parameter[torch.unravel_index(rows, parameter.shape)]
