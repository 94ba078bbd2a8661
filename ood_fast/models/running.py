"""Running a classifier over data: batches in, and for each what enters the head, the logits and the targets.

Detectors, evaluation and diagnostics read models through `run_model`; `deployment` reads outputs as it does.
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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .. import checks
from ..capturing import CapturedFeatures, capture_features
from ..eager.precision import MKLDNN, is_exporting
from ..heads import inference_head, last_linear, may_run_compiled, modules_around, unwrapped
from ..ops.registration import is_compiled, uncompiled
from .inputs import random_states, warn_random
from .layers import LayerReading, watched

TARGETS = ("labels", "label", "targets", "target", "y")  # what a batch that is a mapping may call them
CHECKED = 8, 64  # rows of logits by themselves: the fewest that tell, one sums to 1 by chance, and the most looked at
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
                    maker = _maker({m: captured.read.pop(m, None) for m in linears}, logits)
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


def _maker(outputs: Mapping[nn.Linear, Tensor | None], logits: Tensor) -> nn.Linear | bool | None:
    """The layer whose output the logits are, up to a cast to half precision and back; False where layers as wide made
    others, None where there are none."""
    wide = {layer: out for layer, out in outputs.items() if out is not None and out.shape == logits.shape}
    same = (m for m, out in wide.items() if torch.allclose(out.float(), logits.float(), 2**-8, 1e-7, equal_nan=True))
    return next(same, False) if wide else None


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


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: a tensor, an object or mapping with `logits`, or a tuple's first."""
    got = None
    if isinstance(output, Mapping):
        got = f"a mapping of {', '.join(map(str, output))}"
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if hasattr(output, "full_tensor"):  # of a head that tensor parallelism shards
        output = output.full_tensor()
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = got or (f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__)
        raise ValueError(
            f"model: got an output of {got}, expected logits (n, c), or an object or mapping with `logits`"
        )
    return output


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
    """TypeError for what looks like a loader and gives single samples: a tensor, or a data set without a DataLoader."""
    single = hasattr(loader, "__array__") or (isinstance(loader, Dataset) and not isinstance(loader, IterableDataset))
    if single or not isinstance(loader, Iterable):
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


def check_width(head: nn.Linear, logits: Tensor) -> None:
    """ValueError for a layer that has not as many outputs as there are logits."""
    if logits.shape[1] != head.out_features:
        raise ValueError(
            f"head: got a layer {head.in_features} → {head.out_features}, but the logits have shape "
            f"{tuple(logits.shape)}; pass head=..., the nn.Linear that makes them or its name; with a head of "
            "another kind, use fit_features and score_features; of a model that returns a tuple the first is read, of "
            "a mapping `logits`"
        )


def check_head(head: nn.Linear, captured: CapturedFeatures, logits: Tensor) -> None:
    """ValueError where F.linear(z, W, b) are not the logits, up to rounding: something adds to them or changes them.

    An error of many roundings of relative size u is about u (Σ_j z_j² W_kj² + b_k²)^½: eight of them are allowed, u
    that of the least exact dtype at hand.
    """
    if not captured.seen:
        raise ValueError(
            f"head: the layer {head.in_features} → {head.out_features} did not run as a module; pass head=..., the "
            "nn.Linear that makes the logits; of a model that computes with its weight, as by F.linear, use "
            "fit_features and score_features"
        )
    if type(head.weight).__module__.startswith("torchao."):
        raise ValueError(
            f"head: got a quantized weight ({type(head.weight).__name__}), expected a plain one; leave the head out as "
            "you quantize the model, by the filter_fn of quantize_"
        )
    z = captured.features.detach()
    if z.is_meta or logits.is_meta:
        return
    if z.shape[:-1] != logits.shape[:1]:
        raise ValueError(
            f"features: got shape {tuple(z.shape)} at the head for logits {tuple(logits.shape)}, expected (n, m): the "
            "model makes its logits of several rows; pass it through fit_features and score_features"
        )
    weight, bias = inference_head(head)
    dtypes = {value.dtype for value in (z, weight, logits)} | ({captured.dtype} if captured.dtype else set())
    wide = torch.float64 if dtypes == {torch.float64} else torch.float32
    z, weight, given = (value.detach().to(wide) for value in (z, weight, logits))
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(wide)
    with torch.autocast(z.device.type, enabled=False):
        expected = F.linear(z, weight, bias)
        spread = F.linear(z.square(), weight.square(), bias.square()).sqrt()
        length = F.linear(z.abs(), weight.abs(), bias.abs())
    unit = max(_unit(dtype, z.device) for dtype in dtypes)
    allowed = 8 * unit * spread + 32 * torch.finfo(wide).eps * length
    allowed += 2 * unit * expected.abs() + max(torch.finfo(dtype).tiny for dtype in dtypes)
    difference = (expected - given).abs()
    beyond = (difference > allowed) & ~(given.isinf() & (expected.abs() > torch.finfo(logits.dtype).max))
    if not beyond.any():  # also where something is NaN, which has messages of its own
        return
    worst = int(difference.masked_fill(~beyond, -1.0).argmax())
    row, k = divmod(worst, given.shape[1])
    raise ValueError(
        f"head: the layer {head.in_features} → {head.out_features} does not make the logits: they differ from "
        f"F.linear(z, W, b) by up to {difference[row, k]:.3g} (row {row}, class {k}: {given[row, k]:.4g} for "
        f"{expected[row, k]:.4g}){_cause(expected, given)}. Let the model return what its last linear layer makes; "
        "merge an adapter such as LoRA (model.merge_and_unload()) or several heads into one nn.Linear; or call "
        "fit_features(features, logits, targets, head=(W, b)) and score_features with those that belong together"
    )


def _unit(dtype: torch.dtype, device: torch.device) -> float:
    """The relative size of one rounding of a linear layer: float32 may be multiplied in fewer digits."""
    if dtype != torch.float32:
        return torch.finfo(dtype).eps
    if device.type == "cpu":
        fewer = {"bf16": 2.0**-7, "tf32": 2.0**-10}
        return fewer.get(MKLDNN.matmul.fp32_precision, torch.finfo(dtype).eps)
    return 2.0**-10


def _cause(expected: Tensor, given: Tensor) -> str:
    """What the logits look like beside those of the head, for a message."""
    scale = float((given * expected).sum() / expected.square().sum().clamp_min(1e-30))
    candidates = _changed(expected, given)
    candidates[f"{scale:.4g} times (a temperature?) the output"] = scale * expected
    for name, candidate in candidates.items():
        if _close(candidate, given):
            return f": the model returns {name} of this layer"
    if _close(expected.sort(1).values, given.sort(1).values):
        return ": the model returns the output of this layer with its classes in another order"
    return ""


def _changed(expected: Tensor, given: Tensor) -> dict[str, Tensor]:
    return {
        "the softmax": expected.softmax(1),
        "the log-softmax": expected.log_softmax(1),
        "the sigmoid": expected.sigmoid(),
        "the clamped output": expected.clamp(given.min(), given.max()),
    }


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-2, atol=1e-3)


def check_output(logits: Tensor, beside: nn.Linear | None = None, captured: CapturedFeatures | None = None) -> None:
    """ValueError for an output that scores of logits would take for logits: rows of probabilities or of their
    logarithms; beside the last linear layer that ran, if it makes as many outputs, its sigmoid or clamped outputs; and
    what enters that layer. A temperature, an average of heads, another order of classes pass: these are logits.
    """
    if logits.is_meta or logits.shape[1] < 2:
        return
    rows, expected = logits.detach().float(), None
    z = captured.features.detach() if beside is not None and captured is not None and captured.seen else None
    fits = z is not None and z.dim() == 2 and len(z) == len(rows)
    if beside is not None and z is not None and fits and beside.out_features == logits.shape[1]:
        weight, bias = inference_head(beside)
        with torch.autocast(z.device.type, enabled=False):
            expected = F.linear(z.float(), weight.float(), None if bias is None else bias.float())
        if _close(expected, rows):
            return
    what, cure = _no_logits(rows, expected, 16 * torch.finfo(logits.dtype).eps, beside is None)
    if z is not None and z.shape == logits.shape and expected is None and torch.equal(z, logits):
        what = f"the features {tuple(z.shape)} that enter its last layer"
        cure = (
            "of a model that returns a tuple the first is read, of a mapping `logits`: let it return the logits first"
        )
    if what:
        raise ValueError(f"model: got {what}, expected logits: {cure}")


def refuse_probabilities(logits: Tensor) -> None:
    """ValueError for logits (n, c) that came without a model, of which enough rows are probabilities or logarithms of
    these."""
    if torch.compiler.is_compiling() or is_exporting() or logits.is_meta:
        return
    if len(logits) < CHECKED[0] or logits.shape[1] < 2:
        return
    rows = logits.detach()[: CHECKED[1]].float()
    low, high = torch.stack(rows.aminmax()).tolist()
    if not (high <= 0 or 0 <= low <= high <= 1):
        return
    if what := _no_logits(rows, None, 16 * torch.finfo(logits.dtype).eps, True)[0]:
        raise ValueError(f"logits: got {what}, expected what the last layer makes, before a softmax")


def _no_logits(rows: Tensor, expected: Tensor | None, rounding: float, unknown: bool) -> tuple[str, str]:
    """What the output is instead, and the cure; two empty texts if nothing speaks against logits."""
    sharp = unknown and not ((rows > 0) & (rows < 1)).any()  # ones and zeros: nothing tells what made them
    slack = 1e-2 * rows.shape[1] ** -0.5
    if not sharp and ((rows >= 0) & (rows <= 1)).all() and ((rows.sum(1) - 1).abs() < slack).all():
        return "an output whose rows are probabilities, 0 to 1 with sum 1", "leave out the softmax at its end"
    if (rows <= 0).all() and (rows.logsumexp(1).abs() <= rounding * (1 + rows.abs().amax(1))).all():
        return "an output whose rows are logarithms of probabilities", "leave out the log-softmax at its end"
    relu = bool(rows.min() == 0)  # a network of features that ends so has a norm of its outputs
    for name in ("the sigmoid", *(() if relu else ("the clamped output",))):
        if expected is not None and _close(_changed(expected, rows)[name], rows):
            return f"{name} of its last layer", "let it return what that layer makes"
    return "", ""
