"""Which weights a model has, told by a few numbers: so that a detector knows the model that it was fitted on.

Of every floating-point parameter w, and of the running means and variances of norms, k elements (all, or 256 evenly
spread) have a length l = max(‖w‖, 1e-3 √k) and are projected onto fixed waves, j = 1…4: √2 Σ_i w_i cos(i √j) / l. These
and log₂ l are others for other weights, and nearly the same in another dtype, on another device, wrapped, compiled or
replicated. `models.weight_fingerprint` is exact: it tells a step of training from another, and a cast as well.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..heads import given_head, inference_head, unwrapped
from ..ops.registration import version_of, versions_of

N_ELEMENTS, N_WAVES = 256, 4
# bfloat16 moves a number by 0.003, 8 bits by 0.02; all four of other weights are within 0.05 with a chance of 1e-6.
TOLERANCE = 0.05
STATISTICS = ("running_mean", "running_var")  # buffers of norms that count as weights
N_LOOKED_AT = 16  # parameters of which a few elements are looked at in every call: `.data` counts no changes
CURE = "set detector.fitted_on = None, of a set for each of detectors.detectors; in the shell pass --other-model"
TINY = 1e-3  # a parameter of smaller elements counts for less: float16 rounds them away


class Weights(NamedTuple):
    """What is kept of the weights of a model."""

    shapes: int  # CRC-32 of the shapes of all parameters
    waves: tuple[float, ...]  # 1 + N_WAVES numbers a parameter
    made_by: tuple[float, ...] = ()  # the waves of the head that made the logits, where one did


class _Seen(NamedTuple):
    refs: list[weakref.ref[Tensor]]  # to the parameters as they were read
    versions: list[tuple[Any, ...]]
    elements: Tensor  # some of them
    found: Weights


_seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()
_heads: weakref.WeakKeyDictionary[nn.Module, tuple[Weights, Weights]] = weakref.WeakKeyDictionary()


def identity_of(model: nn.Module | Sequence[nn.Module]) -> Weights | None:
    """`Weights` of a model, or of several together; None where a process does not hold them whole: FSDP, DTensor,
    ZeRO-3, lazy modules.

    They are read once, and again when a parameter was replaced or changed in place.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    if isinstance(model, nn.ModuleList) or not isinstance(model, nn.Module):
        each = [identity_of(one) for one in model]
        known = [weights for weights in each if weights is not None]
        if len(known) < len(each):
            return None
        shapes = zlib.crc32(str([weights.shapes for weights in known]).encode())
        return Weights(shapes, tuple(wave for weights in known for wave in weights.waves))
    normed = [buffer for name, buffer in model.named_buffers() if name.endswith(STATISTICS)]
    tensors = [tensor for tensor in (*model.parameters(), *normed) if tensor.is_floating_point()]
    whole = all(type(each) in (Tensor, nn.Parameter) and not each.is_meta and each.numel() for each in tensors)
    if not whole or not tensors:
        return None
    versions, elements = [(version_of(each), each.data_ptr()) for each in tensors], _looked_at(tensors)
    seen = _seen.get(model)
    if (
        seen is None
        or seen.versions != versions
        or not all(kept() is each for kept, each in zip(seen.refs, tensors, strict=True))
        or not torch.equal(seen.elements, elements)
    ):
        _seen[model] = seen = _Seen([weakref.ref(each) for each in tensors], versions, elements, _read(tensors))
    return seen.found


class Watched:
    """The weights of a module, and whether it is in eval mode: equal `state`s are of the same ones, as long as nobody
    changed them through `.data` or exchanged a module. Tens of microseconds a look."""

    def __init__(self, model: nn.Module) -> None:
        # ScriptModules keep them elsewhere
        self.modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.places: list[tuple[dict[str, Any], str]] = []
        for own in map(vars, self.modules):
            self.places += [(own["_parameters"], name) for name, held in own["_parameters"].items() if held is not None]
            self.places += [(own["_buffers"], name) for name in STATISTICS if own["_buffers"].get(name) is not None]

    def state(self) -> tuple[list[Any], ...]:
        """Which they are, how often each was changed in place, and the modes. It keeps them: of what is gone, another
        one may have the place in memory."""
        there = [place.get(name) for place, name in self.places]
        return [*map(id, there)], versions_of(there), [module.training for module in self.modules], there


def identity_of_head(weight: Tensor, bias: Tensor | None) -> Weights:
    """`Weights` of a head alone, as `heads.inference_head` has it: of what was fitted on features that came with it."""
    found = _read([weight, weight.new_zeros(len(weight)) if bias is None else bias])
    return found._replace(made_by=found.waves)


def refuse_other(
    model: nn.Module | Sequence[nn.Module],
    fitted_on: Weights | None,
    what: str,
    head: str | nn.Linear | None = None,
) -> None:
    """ValueError if the model has other weights than those of the model that `what` was fitted on; if it was fitted on
    features, another head than came with these."""
    if fitted_on is None or torch.compiler.is_compiling() or (here := identity_of(model)) is None:
        return
    # Of weight and bias alone; a model that is but its head is compared as any.
    of_head = len(fitted_on.waves) == 2 * (1 + N_WAVES) != len(here.waves)
    if of_head and isinstance(model, nn.Module) and (here := _of_head(model, head)) is None:
        return
    if here.shapes == fitted_on.shapes and _near(here.waves, fitted_on.waves):
        return
    raise ValueError(
        f"model: its {'head is not the one' if of_head else 'weights are not those of the model'} that {what} was "
        "fitted on, for which alone scores and threshold hold; pass that model, fit anew, or, if it is the same in "
        f"another form (fused, quantized, reparametrized), {CURE}"
    )


def refuse_other_head(maker: nn.Linear | bool | None, fitted_on: Weights | None, what: str) -> None:
    """ValueError where a batch has its logits from another linear layer of the model than in the fit of `what`, or from
    none; `maker` is that of `Batch`."""
    if maker is None or fitted_on is None or not fitted_on.made_by or torch.compiler.is_compiling():
        return
    here = identity_of_layer(maker) if isinstance(maker, nn.Linear) else Weights(0, ())
    if here is not None and not _near(here.made_by, fitted_on.made_by):
        made = "made by another linear layer than" if here.made_by else "not what the linear layer gives that made them"
        raise ValueError(
            f"model: its logits are {made} when {what} was fitted: a head was switched, or a hook changes its output; "
            f"score the model as it was fitted, fit anew, or, if that is meant, {CURE}"
        )


def _near(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    if one is other:
        return True
    return len(one) == len(other) and all(abs(a - b) <= TOLERANCE for a, b in zip(one, other, strict=True))


def _of_head(model: nn.Module, head: str | nn.Linear | None) -> Weights | None:
    """Of its head; None where it cannot be told."""
    try:
        return identity_of_layer(given_head(model, head))
    except ValueError:
        return None


def identity_of_layer(layer: nn.Linear) -> Weights | None:
    """`identity_of_head` of a layer, once for weights that stay; None where a process does not hold them whole."""
    if (now := identity_of(layer)) is None:
        return None
    before, found = _heads.get(layer, (None, None))
    if before is not now:
        found = identity_of_head(*inference_head(layer))
        _heads[layer] = now, found
    return found


@torch.no_grad()
def _looked_at(parameters: list[Tensor]) -> Tensor:
    few = [*parameters[:: -(-len(parameters) // N_LOOKED_AT)], parameters[-1]]
    parts = [each[(0,) * (each.dim() - 1)].flatten()[:4].float() for each in few]
    return torch.cat([part.to(parts[0].device) for part in parts]).cpu()


def _read(parameters: list[Tensor]) -> Weights:
    with torch.no_grad():
        parts = [_spread(parameter).float() for parameter in parameters]
        values = torch.cat([part.to(parts[0].device) for part in parts]).cpu().double()
    waves = []
    for part in values.split([len(part) for part in parts]):
        size = max(float(torch.linalg.vector_norm(part)), TINY * math.sqrt(max(1, len(part))))
        at = torch.arange(1, 1 + len(part), dtype=torch.float64)[:, None] * torch.arange(1, 1 + N_WAVES).sqrt().double()
        waves += [math.log2(size), *(math.sqrt(2) * (part[:, None] * at.cos()).sum(0) / size).tolist()]
    shapes = zlib.crc32(str([tuple(parameter.shape) for parameter in parameters]).encode())
    return Weights(shapes, tuple(round(wave, 4) for wave in waves))


def _spread(parameter: Tensor) -> Tensor:
    """Elements (k,), the same ones in every memory format."""
    n = parameter.numel()
    if n <= N_ELEMENTS:
        return parameter.flatten()
    rows = torch.linspace(0, n - 1, N_ELEMENTS, dtype=torch.float64).long().to(parameter.device)
    return parameter[torch.unravel_index(rows, parameter.shape)]
