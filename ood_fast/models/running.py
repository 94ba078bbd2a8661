"""Running a classifier over data: batches in, and for each what enters the head, the logits and the targets.

Detectors, evaluation and diagnostics read models through `run_model`. What a model may give is said in `outputs`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .. import checks
from ..capturing import capture_features
from ..heads import last_linear, may_run_compiled, modules_around, unwrapped
from ..ops.registration import is_compiled, uncompiled
from .inputs import random_states, warn_of_batches, warn_random
from .layers import LayerReading, watched
from .outputs import check_head, check_output, check_width, logits_of, maker_of

TARGETS = ("labels", "label", "targets", "target", "y")  # what a batch that is a mapping may call them
_IMAGES = ("pixel_values", "image", "images", "img", "imgs", "x", "input", "inputs", "data")


class Batch(NamedTuple):
    """What a model makes of one batch."""

    inputs: Any  # a tensor, or the keyword arguments of the model, on its device
    features: Tensor | None  # (n, m)
    logits: Tensor  # (n, c)
    targets: Tensor | None  # (n,)
    given: Any  # the batch as the loader gave it
    read: dict[Any, Tensor]  # of other layers by the key of the reading, and by passes of detectors, each (n, d)
    maker: nn.Linear | bool | None = None  # the layer whose output the logits are; False: none; None: nobody looked


@torch.no_grad()
def run_model(
    model: nn.Module,
    loader: Iterable[Any],
    head: nn.Linear | None,
    readings: Sequence[LayerReading] = (),
    *,
    find_maker: bool = False,
) -> Generator[Batch, None, None]:
    """Run `model` over the batches of `loader`: x, or (x, y, ...), or a mapping of the model's keyword arguments.

    One forward pass a batch, in eval mode, without gradients; the modes of all modules are restored, also when
    something raises. Batches are moved to the device of the model. Without a head the features are None.

    Safe in any number of threads that share the model, as long as none of them trains it: see `evaluating` and
    `heads.capture_features`. With a head, what runs is the module inside torch.compile, DataParallel and DDP; what else
    is compiled stays so unless it runs the head. `readings`: what to read of other layers in the same pass.
    `find_maker`: without a head, look in the first batch, of what is not compiled, which layer made the logits.

    Raises ValueError for a layer that is not there or does not run, and where the head cannot have made the logits: on
    the first batch they are computed from the features once more, see `check_head`. Without a head, where the output is
    none of logits, see `check_output`.
    """
    if head is not None or readings or any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        model = unwrapped(model)  # DDP waits for the other processes, which may have nothing to score
    warn_of_batches(model)
    parameter = next((model if head is None else head).parameters(), None)
    device = None if parameter is None else parameter.device  # None: everything stays where it is
    last = last_linear(model) if head is None else head  # tells what the output is where no features are read
    checked = False
    others = watched(model, readings)
    linears: dict[Any, Any] = {}
    if find_maker and head is None and not is_compiled(model) and not may_run_compiled([*model.modules()]):
        linears = {m: (m, _flat) for m in model.modules() if isinstance(m, nn.Linear)}
    call = model if head is None and not others else uncompiled(model)
    all_uncompiled = bool(others) or (head is not None and may_run_compiled(modules_around(model, head)))
    with evaluating(model):
        for given in loader:
            x, targets = inputs_and_targets(given, model)
            x = x.to(device) if isinstance(x, Tensor) else {name: value.to(device) for name, value in x.items()}
            watching = others if checked else others | linears
            before = () if checked else random_states(device)
            with _capturing(head if checked else last, all_uncompiled, watching) as captured:
                logits = _logits_by(call, x)
            if head is not None and not captured.seen and not all_uncompiled:  # something that was not found runs it
                all_uncompiled = True
                with _capturing(head, all_uncompiled) as captured:
                    logits = _logits_by(call, x)
            warn_random(model, before, device, logits, partial(_logits_by, call, x))
            maker: nn.Linear | bool | None = head
            if head is not None:
                check_width(head, logits)
            if not checked and len(logits):
                checked = True
                if head is None:
                    check_output(logits, last, captured)
                    maker = maker_of({m: captured.read.pop(m, None) for m in linears}, logits)
                else:
                    check_head(head, captured, logits)
            features = None if head is None else captured.features
            for reading in readings:
                reading.check(captured.read.get(reading.key), len(logits))
            read = captured.read if others else {}
            yield Batch(x, features, logits, None if targets is None else targets.to(device), given, read, maker)


def _logits_by(model: Callable[..., Any], x: Tensor | Mapping[str, Tensor]) -> Tensor:
    return logits_of(model(x) if isinstance(x, Tensor) else model(**x))


def _flat(output: Any) -> Tensor | None:
    """What a linear layer gives for each input, before the model changes it in place; other outputs are not held."""
    return output.clone() if isinstance(output, Tensor) and output.dim() == 2 else None


def refuse_meta(model: nn.Module) -> None:
    """TypeError for what is no module, ValueError for parameters or buffers on the meta device, without numbers."""
    checks.instance("model", model, nn.Module, "an nn.Module")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device, without numbers; load the weights first, "
                "model.load_state_dict(..., assign=True) or from_pretrained without device_map"
            )


def _capturing(
    head: nn.Linear | None, all_uncompiled: bool, others: Mapping[Hashable, Any] = MappingProxyType({})
) -> AbstractContextManager[Any]:
    if head is None and not others:
        return nullcontext()
    return capture_features(head, all_uncompiled=all_uncompiled, others=others)


_SWITCHED: dict[int, tuple[nn.Module, bool, int]] = {}  # by id: a module, its own mode, how many hold it in eval mode
_SWITCHING = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every layer is in the mode that it was in: frozen ones may differ from the model.

    Counted: of several threads that evaluate models with common layers, the last one out restores these.
    """
    with _SWITCHING:
        # What torch.jit has frozen knows no mode.
        held = [m for m in model.modules() if getattr(m, "training", False) or id(m) in _SWITCHED]
        for module in held:
            _, training, count = _SWITCHED.get(id(module), (module, module.training, 0))
            _SWITCHED[id(module)] = (module, training, count + 1)
        if any(module.training for module in held):
            try:
                model.eval()
            except NotImplementedError as error:  # what torch.export made
                raise TypeError(
                    f"model: a {type(model).__name__} cannot be put into eval mode, expected the nn.Module that it was "
                    "exported from"
                ) from error
    try:
        yield
    finally:
        with _SWITCHING:
            for module in held:
                _, training, count = _SWITCHED.pop(id(module))
                if count > 1:
                    _SWITCHED[id(module)] = (module, training, count - 1)
                else:
                    module.training = training


def inputs_and_targets(batch: Any, model: nn.Module | None = None) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
    """x and y of a batch; what is no tensor, such as file names, is no y.

    Of a mapping, what `model` takes by these names goes by keyword; else its one tensor of images, by itself. Of a
    named tuple, fields that are called as images and targets are, wherever they stand; else the first two.
    """
    x, targets = batch, None
    if isinstance(batch, Mapping):
        x = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in TARGETS}
        targets = next((batch[name] for name in TARGETS if name in batch), None)
        targets = _as_tensor(targets)
        indices = [name for name, value in x.items() if value.dim() == 1 and not value.is_floating_point()]
        if targets is None and len(indices) == 1 and len(x) > 1:  # the classes, by a name of the user's
            targets = x.pop(indices[0])
        x = _input_of(x, model)
        if isinstance(x, Tensor) or x:
            return x, targets if isinstance(targets, Tensor) else None
    elif isinstance(batch, (tuple, list)) and batch:
        named = batch._asdict() if hasattr(batch, "_asdict") else {}
        x = next((named[name] for name in _IMAGES if name in named), batch[0])
        second = batch[1] if len(batch) > 1 else None
        targets = _as_tensor(next((named[name] for name in TARGETS if name in named), second))
        if isinstance(x, Tensor) and x.dim() == 1 and not x.is_floating_point() and isinstance(second, Tensor):
            raise ValueError(
                f"loader: got a batch that begins with {x.dtype} of shape {tuple(x.shape)}, such as indices of the "
                "data, expected the inputs first: (x, y, ...), or {name: tensor}"
            )
    checks.instance("loader: x of a batch", x, Tensor, "a tensor; batches are x, (x, y, ...) or {name: tensor}")
    return x, targets if isinstance(targets, Tensor) else None


def _as_tensor(targets: Any) -> Any:
    """A list or array of class indices as a tensor; anything else as it is."""
    listed = isinstance(targets, (list, np.ndarray)) and len(targets)
    if listed and all(isinstance(y, (int, np.integer)) for y in targets):
        return torch.as_tensor(np.asarray(targets))
    return targets


def _input_of(given: dict[str, Tensor], model: nn.Module | None) -> Tensor | dict[str, Tensor]:
    """What of the tensors of a batch goes into the model: by keyword what it takes by name, else the one of images."""
    if not given:
        return given
    if len(given) == 1 and "pixel_values" not in given:  # that name of transformers goes by keyword
        return next(iter(given.values()))
    takes = inspect.signature(unwrapped(model).forward).parameters if model is not None else {}
    if not takes or any(taken.kind is taken.VAR_KEYWORD for taken in takes.values()):
        return given
    if named := {name: value for name, value in given.items() if name in takes}:
        return named
    images = {name: value for name, value in given.items() if value.dim() > 1 and value.is_floating_point()}
    images = {name: value for name, value in images.items() if name in _IMAGES} or images
    if len(images) == 1:
        return next(iter(images.values()))
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
    raise ValueError(
        f"loader: got a batch of {shapes}, expected one tensor of images, or names that the model takes "
        f"({', '.join(takes)})"
    )


def check_loader(loader: object, argument: str = "loader", or_else: str = "") -> None:
    """TypeError for what looks like a loader and gives single samples, a tensor or a data set without a DataLoader, or
    names, a mapping."""
    single = isinstance(loader, (Dataset, Mapping)) and not isinstance(loader, IterableDataset)
    if single or hasattr(loader, "__array__") or not isinstance(loader, Iterable):
        raise TypeError(
            f"{argument}: got {type(loader).__name__}, expected {or_else}an iterable of batches x or (x, y, ...), such "
            "as a DataLoader or [x]"
        )


def batches_of(x: Any) -> Any:
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
