"""The layers of a model beside its head: which are its stages, and what is read of the output of one.

`run_model(model, loader, head, readings)` reads them in the pass that it makes anyway, while the layer runs: whole maps
are never kept.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..heads import path_to_layer, refuse_script, unwrapped

Key = tuple[str, str]
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_channels_last: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], bool]] = weakref.WeakKeyDictionary()


class LayerReading(NamedTuple):
    """What is read of a layer: `read` makes rows (n, d) of its maps (n, channels, positions)."""

    layer: str
    kind: str  # names what `read` does
    read: Callable[[Tensor], Tensor]

    @property
    def key(self) -> Key:
        """Equal for two that give the same rows."""
        return (self.layer, self.kind)

    def of_output(self, model: nn.Module, output: Any) -> Tensor:
        """The rows, of what the layer of `model` returns."""
        return self.read(maps(model, self.layer, output))

    def check(self, rows: Tensor | None, n_rows: int) -> None:
        """ValueError unless the layer has run, once for each row of the batch."""
        if rows is None:
            raise ValueError(f"layers: {self.layer!r} does not run in a pass of the model, expected a layer that does")
        if len(rows) != n_rows:
            raise ValueError(
                f"layers: {self.layer!r} gives {len(rows)} rows for {n_rows} inputs, expected one an input: the batch "
                "has to be the first dimension of its output"
            )


def numbers_of(layer: str, output: Any) -> Tensor:
    """The tensor in what a layer returns: itself, the first of a tuple, or `last_hidden_state`."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = getattr(output, "last_hidden_state", output)
    if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layers: {layer!r} gives {got}, expected numbers (n, c, h, w), tokens (n, t, c) or (n, c)")
    return output


def maps(model: nn.Module, layer: str, output: Any) -> Tensor:
    """The output of a layer of `model` as (n, channels, positions): of (n, c, h, w), (n, h, w, c), (n, c, length),
    tokens (n, t, c) and (n, c). float32 at least. ValueError where nothing tells which are the channels."""
    output = numbers_of(layer, output)
    if output.dim() > 2:
        batch_second = any(getattr(module, "batch_first", True) is False for module in layer_of(model, layer).modules())
        if batch_second and len(output) == output.shape[1]:
            raise ValueError(
                f"layers: {layer!r} gives {tuple(output.shape)}, of attention with batch_first=False: which dimension "
                "is the batch cannot be told; take batches of another size"
            )
        known = _channels_last.setdefault(layer_of(model, layer), {})
        if (shape := tuple(output.shape[1:])) not in known:
            known[shape] = _is_channels_last(model, layer, shape)
        output = output.movedim(-1, 1) if known[shape] else output
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    flat: Tensor = output.reshape(*output.shape[:2], math.prod(output.shape[2:]))
    return flat


def _is_channels_last(model: nn.Module, layer: str, shape: tuple[int, ...]) -> bool:
    """Whether the channels of an output (n, *shape) come last.

    Told by which of the two dimensions is as wide as a layer of the model; if both are, by what the layer consists of,
    convolutions and batch norms or linear layers and layer norms; if of both, by which is as wide as one of its own.
    """
    own, every = ([m for m in module.modules() if _widths(m)] for module in (layer_of(model, layer), unwrapped(model)))
    if not own:  # an activation, pooling: as what is before it
        every_module = [*unwrapped(model).modules()]
        own = [m for m in every_module[: every_module.index(layer_of(model, layer))] if _widths(m)][-1:]
    weights = [getattr(m, "weight", None) for m in own]
    dims = [weight.dim() for weight in weights if isinstance(weight, Tensor)]
    first = 1 + len(shape) in dims or any(hasattr(m, "running_mean") for m in own)
    last = 2 in dims or any(isinstance(m, (nn.LayerNorm, nn.RNNBase)) for m in own)
    wide, own_wide = (set().union(*map(_widths, modules)) for modules in (every, own))
    for second, at_end in (
        (shape[0] in wide, shape[-1] in wide),
        (first, last),
        (shape[0] in own_wide, shape[-1] in own_wide),
    ):
        if second != at_end:
            return at_end
    if len(shape) > 2:  # images, and blocks of both
        return False
    raise ValueError(
        f"layers: {layer!r} gives {('n', *shape)}, and nothing tells which dimension are its channels, those of a "
        "convolution (n, c, length) or of tokens (n, t, c); name a layer inside it, such as its last convolution, norm "
        "or linear layer"
    )


def _widths(module: nn.Module) -> set[int]:
    """How many channels a convolution, norm or linear layer takes and makes; empty for other modules."""
    if isinstance(module, nn.RNNBase):
        return {module.input_size, module.hidden_size * (1 + module.bidirectional)}
    if len(getattr(module, "normalized_shape", ())) > 1:
        return set()
    weights = [getattr(module, name, None) for name in ("weight", "running_mean")]
    there = [weight.shape for weight in weights if isinstance(weight, Tensor) and weight.dim()]
    return {size for shape in there for size in (shape[0], *(n * getattr(module, "groups", 1) for n in shape[1:2]))}


def watched(
    model: nn.Module, readings: Iterable[LayerReading]
) -> dict[Hashable, tuple[nn.Module, Callable[[Any], Tensor]]]:
    """What `heads.capture_features` takes as `others`."""
    return {r.key: (layer_of(model, r.layer), partial(r.of_output, model)) for r in readings}


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name; ValueError that lists those there are."""
    refuse_script(model)
    try:
        return path_to_layer(model, name, "layers")[0]
    except ValueError:
        known = [path for path, _ in unwrapped(model).named_modules() if path]
        raise ValueError("layers: " + checks.unknown(f"layer of {type(model).__name__}", name, known)) from None


def stages(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that end its stages, in their order: each of the largest family of blocks (`layer1` …
    `layer4`, `blocks.0` … `blocks.11`, `features.denseblock1` …); without blocks what comes before each pooling; else
    the children of the model but the last.

    Raises ValueError, which lists the layers, where there is none of these.
    """
    refuse_script(model)
    model = unwrapped(model)
    families: dict[tuple[str, str], list[tuple[str, nn.Module]]] = {}
    for parent, module in model.named_modules():
        for name, child in module.named_children():
            if next(child.children(), None) is not None:
                path = f"{parent}.{name}" if parent else name
                families.setdefault((parent, name.rstrip("0123456789")), []).append((path, child))
    sizes: Mapping[tuple[str, str], int] = {
        key: sum(p.numel() for _, child in members for p in child.parameters())
        for key, members in families.items()
        if len(members) > 1
    }
    if sizes:
        return tuple(path for path, _ in families[max(sizes, key=lambda key: sizes[key])])  # the outermost of equals
    leaves = [(path, module) for path, module in model.named_modules() if not [*module.children()] and path]
    pools = [isinstance(module, _POOLS) for _, module in leaves]
    before = [path for (path, _), here, then in zip(leaves, pools, pools[1:], strict=False) if then and not here]
    if found := before or [name for name, _ in model.named_children()][:-1]:
        return tuple(found)
    known = ", ".join(path for path, _ in model.named_modules() if path) or "none"
    raise ValueError(f"layers: cannot tell the stages of {type(model).__name__}, pass their names; its layers: {known}")
