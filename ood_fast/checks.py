"""Every input error of the package, in one wording: the argument, what came, what was expected.

A wrong type raises TypeError, a wrong value ValueError, a class index out of range IndexError (as
`torch.nn.functional.cross_entropy` does on the CPU). Nothing here reads the contents of a tensor that is not on the
CPU: on a GPU a bad target gives that sample a NaN loss instead of a host sync.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import SHORT_LIST as SHORT_LIST
from .errors import UserError as UserError
from .errors import shortened as shortened
from .errors import unknown as unknown
from .errors import warn_caller as warn_caller
from .records import Labels

REDUCTIONS = ("mean", "sum", "none")
AVERAGES = ("boundaries", "classes")

PACKAGES = {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}  # as pip calls a module, if not by its name

_PLAIN = (Tensor, torch.nn.Parameter)


class RowError(ValueError):
    """Something is wrong with one row of a batch. Whoever counts the rows before it names it by that, see `behind`.

    Attributes:
        row: in all data that was counted. in_batch: in its batch.
    """

    def __init__(self, text: str, row: int = 0, in_batch: int | None = None) -> None:
        super().__init__(text.replace(ROW, f"row {row}"))
        self.text, self.row, self.in_batch = text, row, row if in_batch is None else in_batch


ROW = "<row>"  # in the text of a `RowError`


@contextmanager
def behind(n_rows: int) -> Iterator[None]:
    """A `RowError` raised inside is of a batch behind `n_rows` others."""
    try:
        yield
    except RowError as error:
        raise RowError(error.text, error.row + n_rows, error.in_batch) from None


def optional_import(who: str, *modules: str) -> Any:
    """The first of these modules; UserError that says how to install what is missing of them."""
    missing = [PACKAGES.get(module, module) for module in modules if util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        told = f"{who} needs {', '.join(missing)}, which {verb} not installed"
        raise UserError(f"{told}: pip install {' '.join(missing)}")
    return importlib.import_module(modules[0])


def one_of(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def real(
    argument: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    infinite: bool = False,
) -> None:
    """TypeError unless `value` is a number, ValueError unless low <= value <= high (not low itself with `open_low`, not
    high with `open_high`), and finite without `infinite`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: got {_describe(value)}, expected a number")
    if not low <= value <= high or (open_low and value == low) or (open_high and value == high):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{argument}: got {value}, expected a number in {left}{low}, {high}{right}")
    if value in (math.inf, -math.inf) and not infinite:
        raise ValueError(f"{argument}: got {value}, expected a finite number")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__


def is_float(value: Tensor) -> bool:
    """Floating-point numbers of 16 bits or more; those of 8 have no arithmetic in torch."""
    return value.is_floating_point() and value.dtype.itemsize > 1


def float_tensor(argument: str, value: Any, n_dims: int, shape_text: str) -> None:
    """TypeError unless `value` is a floating-point tensor, ValueError unless it has `n_dims` dimensions."""
    if not isinstance(value, Tensor):
        of_output = "; pass its .logits" * isinstance(getattr(value, "logits", None), Tensor)
        raise TypeError(f"{argument}: got {_describe(value)}, expected a tensor of shape {shape_text}{of_output}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{argument}: got {got}, expected a dense tensor of shape {shape_text}")
    if not is_float(value):
        raise TypeError(f"{argument}: got dtype {value.dtype}, expected a floating-point tensor of shape {shape_text}")
    if value.dim() != n_dims:
        raise ValueError(f"{argument}: got shape {tuple(value.shape)}, expected {n_dims} dimensions {shape_text}")


def same_device(argument: str, value: Any, other_argument: str, other: Any) -> None:
    """ValueError unless both tensors live on one device; TypeError where only one of them is a DTensor."""
    if value.device != other.device:
        raise ValueError(f"{argument}: is on {value.device}, expected {other.device}, where {other_argument} is")
    if type(value) in _PLAIN and type(other) in _PLAIN:
        return
    sharded = [hasattr(t, "full_tensor") for t in (value, other)]
    if any(sharded) and not all(sharded):
        (argument, value), (other_argument, _) = sorted(
            ((argument, value), (other_argument, other)), key=lambda pair: not hasattr(pair[1], "full_tensor")
        )
        raise TypeError(
            f"{argument}: got a DTensor with placements {value.placements}, expected a plain tensor, which "
            f"{other_argument} is; ELogitNormLoss(model, 'fc') gathers a head that fully_shard has sharded, as "
            "model.fc.unshard() before a function (the gradient through W.full_tensor() would not be averaged over "
            "the processes)"
        )


def logits(value: Any, *, dense: bool = False) -> None:
    """Logits: floating point, (n, c) with c >= 1; with `dense` also (n, c, d1, ...)."""
    if dense:
        float_tensor("logits", value, max(2, getattr(value, "ndim", 2)), "(n, c) or (n, c, d1, ...)")
    else:
        float_tensor("logits", value, 2, "(n, c)")
    if value.shape[1] == 0:
        raise ValueError(f"logits: got shape {tuple(value.shape)}, expected at least one class")


def several_classes(name: str, n_classes: int) -> None:
    """At least two classes, for a loss to train something."""
    if n_classes == 1:
        raise ValueError(
            f"{name}: got one class, whose softmax is 1 whatever the input: the loss is 0 and trains nothing; give the "
            "head two outputs, nn.Linear(m, 2), and y the classes 0 and 1"
        )


def head_weight(weight: Any, logits_: Tensor) -> None:
    """W: floating point, (c, m), on the device of the logits."""
    float_tensor("W", weight, 2, "(c, m)")
    if weight.shape[0] != logits_.shape[1]:
        raise ValueError(
            f"W: got shape {tuple(weight.shape)}, expected ({logits_.shape[1]}, m), "
            f"one row for each of the {logits_.shape[1]} classes of logits {tuple(logits_.shape)}"
        )
    same_device("W", weight, "logits", logits_)


def vector(argument: str, value: Any, n: int, to_fit: str, other: Tensor) -> None:
    """Floating point, (n,), on the device of `other`, which the message calls `to_fit`."""
    float_tensor(argument, value, 1, f"({n},)")
    if value.shape[0] != n:
        got = f"{argument}: got shape {tuple(value.shape)}, expected ({n},)"
        raise ValueError(f"{got} to fit {to_fit} {tuple(other.shape)}")
    same_device(argument, value, to_fit, other)


def head_bias(bias: Any, weight: Tensor) -> None:
    """b: None, or floating point, (c,), on the device of W."""
    if bias is not None:
        vector("b", bias, weight.shape[0], "W", weight)


def features(z: Any, weight: Tensor, n_samples: int | None = None, places: tuple[int, ...] = ()) -> None:
    """z: floating point, (n, m, *places) with m of W (and n and d1, ... of the logits), on the device of W."""
    float_tensor("z", z, 2 + len(places), "(n, m, d1, ...)" if places else "(n, m)")
    if z.shape[1] != weight.shape[1]:
        raise ValueError(
            f"z: got shape {tuple(z.shape)}, expected (n, {weight.shape[1]}) to fit W {tuple(weight.shape)}; "
            "z is what enters the last linear layer"
        )
    if n_samples is not None and z.shape[0] != n_samples:
        raise ValueError(f"z: got {z.shape[0]} rows, expected {n_samples}, one for each row of logits")
    if places and z.shape[2:] != places:
        raise ValueError(
            f"z: got shape {tuple(z.shape)}, expected {(z.shape[0], z.shape[1], *places)} to fit logits "
            f"{(z.shape[0], weight.shape[0], *places)}"
        )
    same_device("z", z, "W", weight)


def target(y: Any, logits_: Tensor) -> None:
    """y: int64 class indices (n,), or floating-point class probabilities (n, c), on the device of the logits.

    For logits (n, c, d1, ...): (n, d1, ...) or (n, c, d1, ...).
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y: got {_describe(y)}, expected {_expected_target(logits_)}")
    if y.is_floating_point():
        if y.shape != logits_.shape:
            raise ValueError(f"y: got {y.dtype} of shape {tuple(y.shape)}, expected {_expected_target(logits_)}")
        if y.requires_grad and torch.is_grad_enabled():
            raise ValueError("y: requires grad, expected class probabilities that are constants; pass y.detach()")
    elif y.dtype != torch.int64:
        raise TypeError(f"y: got dtype {y.dtype}, expected {_expected_target(logits_)}")
    elif y.shape != _per_sample(logits_.shape):
        raise ValueError(f"y: got {y.dtype} of shape {tuple(y.shape)}, expected {_expected_target(logits_)}")
    same_device("y", y, "logits", logits_)


def _per_sample(shape: torch.Size) -> tuple[int, ...]:
    """(n, c, d1, ...) without c."""
    return shape[:1] if len(shape) == 2 else shape[:1] + shape[2:]


def _expected_target(logits_: Tensor) -> str:
    shape = logits_.shape
    return (
        f"int64 class indices of shape {tuple(_per_sample(shape))} or float class probabilities of shape {tuple(shape)}"
    )


def class_weight(weight: Any, logits_: Tensor) -> None:
    """weight: None, or floating point, (c,), one non-trainable factor a class."""
    if weight is None:
        return
    vector("weight", weight, logits_.shape[1], "logits", logits_)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: requires grad, expected class weights that are constants; pass weight.detach()")


def labels(
    y: Any, logits_: Tensor, weight: Any, ignore_index: int, reduction: object, label_smoothing: float
) -> Labels:
    """What the losses are given beside the logits, checked."""
    target(y, logits_)
    class_weight(weight, logits_)
    loss_keywords(ignore_index, reduction, label_smoothing)
    return Labels(y, weight, ignore_index, float(label_smoothing))


def loss_keywords(ignore_index: object, reduction: object, label_smoothing: object) -> None:
    """The keywords that the losses share with F.cross_entropy."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {_describe(ignore_index)}, expected an int")
    one_of("reduction", reduction, REDUCTIONS)
    real("label_smoothing", label_smoothing, 0.0, 1.0)


def index_range(y: Tensor, n_classes: int, ignore_index: int) -> bool:
    """Check class indices that lie on the CPU; return whether any of them may equal `ignore_index`.

    IndexError names the first index outside [0, c) that is not `ignore_index`. One pass: the extremes decide the common
    case.
    """
    low, high = (extreme.item() for extreme in torch.aminmax(y))
    if low < 0 or high >= n_classes:
        outside = ((y < 0) | (y >= n_classes)) & (y != ignore_index)
        if outside.any():
            position = int(outside.int().argmax())
            raise IndexError(
                f"y: target {y[position].item()} at position {position} is out of bounds, "
                f"expected a class index in [0, {n_classes}) or ignore_index={ignore_index}"
            )
    return low <= ignore_index <= high


def writable_folder(argument: str, path: str | os.PathLike[str]) -> Path:
    """The folder `path`, if it exists and can be written or could be made; UserError otherwise. Makes nothing."""
    folder = Path(path).expanduser()
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{argument}: {folder} cannot be a folder, because {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{argument}: cannot write to {folder}: no permission in {nearest}")
    return folder


def utf8_path(argument: str, path: Path) -> None:
    """UserError for a path that is no UTF-8, which safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{argument}: got {str(path)!r}, expected a path in UTF-8: safetensors opens no other"
        ) from error


def instance(argument: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """TypeError unless `value` is a `kind`, or one of several."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: got {_describe(value)}, expected {expected}")


def positive_int(argument: str, value: object, alternative: str = "") -> None:
    """ValueError unless `value` is an int >= 1; `alternative` ends the sentence that says so."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: got {value!r}, expected an int >= 1{alternative}")


def seed(value: object) -> None:
    """ValueError unless `value` is an int >= 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"seed: got {value!r}, expected an int >= 0")


def why_not_read(path: Path, error: Exception) -> str:
    """Of a file that `torch.load` did not read, in words of our own: torch's advise what is dangerous, in colours."""
    try:
        others = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no checkpoint at all
        others = []
    if not others:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")[0]
        if "TorchScript" in reason:
            return f'is a TorchScript archive: torch.save(torch.jit.load({str(path)!r}).state_dict(), "weights.pth")'
        if "weights_only" in reason:  # advice of torch, which does not hold here
            reason = "no file of torch.save, or a damaged one"
        return f"cannot be read as tensors and plain values ({reason})"
    state = 'model.state_dict() if isinstance(model, torch.nn.Module) else model["model"]'
    return (
        f"cannot be read as tensors and plain values: holds objects of {', '.join(others[:SHORT_LIST])}, whose reading "
        f"could run code. If you trust the file, convert it once: model = torch.load({str(path)!r}, "
        "weights_only=False); "
        f'torch.save({state}, "weights.pth")  (or the key under which the weights are)'
    )
