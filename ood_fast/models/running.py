"""Running a classifier over data: batches in, and for each what enters the head, the logits and the targets.

Detectors, evaluation and diagnostics read models through `run_model`; `deployment` reads outputs as it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .. import checks
from ..heads import capture_features

_TARGETS = ("labels", "label", "targets", "target", "y")  # what a batch that is a mapping may call them


class Batch(NamedTuple):
    """What a model makes of one batch."""

    inputs: Any  # a tensor, or the keyword arguments of the model, on its device
    features: Tensor | None  # (n, m)
    logits: Tensor  # (n, c)
    targets: Tensor | None  # (n,)
    given: Any  # the batch as the loader gave it


@torch.no_grad()
def run_model(model: nn.Module, loader: Iterable, head: nn.Linear | None) -> Iterator[Batch]:
    """Run `model` over the batches of `loader`: x, or (x, y, ...), or a mapping of the model's keyword arguments.

    One forward pass a batch, in eval mode, without gradients; the modes of all modules are restored, also when
    something raises. Batches are moved to the device of the model. Without a head the features are None.
    """
    parameter = next((model if head is None else head).parameters(), None)
    device = None if parameter is None else parameter.device  # None: everything stays where it is
    with evaluating(model), nullcontext() if head is None else capture_features(head) as captured:
        for given in loader:
            x, targets = inputs_and_targets(given)
            x = x.to(device) if isinstance(x, Tensor) else {name: value.to(device) for name, value in x.items()}
            logits = logits_of(model(x) if isinstance(x, Tensor) else model(**x))
            if head is not None:
                check_head(head, logits)
            features = None if head is None else captured.features
            yield Batch(x, features, logits, None if targets is None else targets.to(device), given)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every layer is in the mode that it was in: frozen ones may differ from the model."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: a tensor, an object or mapping with `logits`, or a tuple's first."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model: got an output of {got}, expected logits (n, c), or an object or mapping with `logits`"
        )
    return output


def inputs_and_targets(batch: Any) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
    """x and y of a batch; what is no tensor, such as file names, is no y."""
    x, targets = batch, None
    if isinstance(batch, Mapping):
        x = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in _TARGETS}
        targets = next((batch[name] for name in _TARGETS if name in batch), None)
        if x:
            return x, targets if isinstance(targets, Tensor) else None
    elif isinstance(batch, (tuple, list)) and batch:
        x, targets = batch[0], batch[1] if len(batch) > 1 else None
    checks.instance("loader: x of a batch", x, Tensor, "a tensor; batches are x, (x, y, ...) or {name: tensor}")
    return x, targets if isinstance(targets, Tensor) else None


def check_loader(loader: object, argument: str = "loader", or_else: str = "") -> None:
    """TypeError for what looks like a loader and gives single samples: a tensor, or a data set without a DataLoader."""
    single = hasattr(loader, "__array__") or (isinstance(loader, Dataset) and not isinstance(loader, IterableDataset))
    if single or not isinstance(loader, Iterable):
        raise TypeError(
            f"{argument}: got {type(loader).__name__}, expected {or_else}an iterable of batches x or (x, y, ...), such "
            "as a DataLoader or [x]"
        )


def batches_of(x: Any) -> Iterable:
    """The batches that `score` is given: x alone, or those of a loader.

    TypeError for what is neither; also for one batch (x, y), whose y would pass as the next inputs.
    """
    if isinstance(x, (Tensor, Mapping)):
        return [x]
    if isinstance(x, (tuple, list)) and any(isinstance(item, Tensor) and item.dim() < 2 for item in x):
        raise TypeError(f"x: got a {type(x).__name__} (x, y), expected the tensor x of that batch, or a loader")
    check_loader(x, "x", "a tensor, one batch of inputs, or ")
    return x


def joined(scores: list[Tensor]) -> Tensor:
    """The scores (N,) of all batches; ValueError if there was none."""
    if not scores:
        raise ValueError("x: got a loader without a batch, expected inputs to score")
    return scores[0] if len(scores) == 1 else torch.cat(scores)


def check_head(head: nn.Linear, logits: Tensor) -> None:
    """ValueError for a layer that cannot have made the logits: the features would be those of a hidden layer."""
    if logits.shape[1] != head.out_features:
        raise ValueError(
            f"head: got a layer {head.in_features} → {head.out_features}, but the logits have shape "
            f"{tuple(logits.shape)}; pass head=..., the nn.Linear that makes them or its name; with a head of "
            "another kind, use fit_features and score_features"
        )
