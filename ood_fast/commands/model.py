"""The model that the options of `fit` and `score` name: its weights, and how its images are prepared."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .. import models, registry
from ..checks import UserError, unknown
from ..data.own import SMALL_IMAGE
from ..detectors import DetectorSet
from ..heads import given_head
from ..models import TIMM, checkpoints, own_preparation, weight_fingerprint
from ..models.hugging_face import HF
from ..models.preparation import IMAGENET
from ..training.folder import RUN, load_run, read_info
from . import code
from .common import listed, read_detectors, say, warn

REMEMBERED = ("model", "checkpoint", "head", "pretrained")  # by a detectors file, for later commands
PREPARATION = ("size", "resize", "mean", "std", "interpolation", "orientation", "truncated")
OF_IMAGES = (*REMEMBERED, "n_classes", *PREPARATION, "skip_bad")  # options that stored features have no use for


def load_model(
    options: argparse.Namespace, n_classes: int | None, device: str, kept: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """The model of `--model` with the weights that were asked for, in eval mode on `device`; `kept` says how its
    images are prepared where the options do not.

    The weights are those of `--checkpoint`, those published with the model (`--pretrained`), or what a callable of the
    user makes. No detector is worth anything on weights that were just drawn, so others are refused.
    """

    if not options.model:
        raise UserError("--model: got none, expected the model whose features the detectors read; or pass --features")
    if options.checkpoint is not None and options.pretrained:
        raise UserError("--checkpoint, --pretrained: expected one of them")
    place = Path(options.model).expanduser()
    if (place / RUN).is_file():
        return _of_run(options).to(torch.device(device))
    if not is_callable(options.model):
        _refuse_beside_runs(place)
    of_checkpoint = None if options.checkpoint is None else checkpoints.n_classes_of(options.checkpoint)
    if is_callable(options.model):
        model = named(options.model)
    elif options.pretrained or (options.checkpoint is None and options.model.startswith(HF)):
        published = models.n_published(options.model)
        if options.n_classes not in (None, published):
            raise UserError(
                f"--n-classes: got {options.n_classes}, but the published weights of {options.model} have {published}; "
                "another head would be drawn at random: train one, and pass it with --checkpoint"
            )
        model = models.create(options.model, published, pretrained=True)
    elif options.checkpoint is None:
        models.create(options.model, n_classes or 1, **_takes(options, kept))  # tells of a name that is none
        raise UserError(
            f"--model {options.model}: got no weights, and detectors on weights drawn at random mean nothing; pass "
            "--checkpoint FILE, or --pretrained for those that were published"
        )
    else:
        n_classes = options.n_classes or of_checkpoint or n_classes
        if n_classes is None:
            raise UserError("--n-classes: give the number of classes, it follows from nothing else here")
        model = models.create(options.model, n_classes, **_takes(options, kept))
    if options.checkpoint is not None:
        models.load_checkpoint(model, options.checkpoint)
        if ((folder := Path(options.checkpoint).expanduser().parent) / RUN).is_file():
            _prepare_as(model, read_info(folder))
    return model.to(torch.device(device)).eval()


def _refuse_beside_runs(place: Path) -> None:
    """UserError for the folder of several runs, and for one that is not there below a run."""
    if runs := sorted(run.parent.name for run in place.glob(f"*/{RUN}")):
        raise UserError(f"--model {place}: holds the runs {', '.join(runs)}, expected one: {place / runs[0]}")
    if place.name != str(place) and not place.exists() and (place.parent / RUN).is_file():
        raise UserError(f"--model {place}: no such folder, expected the run {place.parent}")


def _takes(options: argparse.Namespace, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The channels of the images; of a model of the user's their size too."""
    n_channels = len(_numbers("mean", options.mean) or kept.get("mean") or IMAGENET["mean"])
    size = options.size or kept.get("size") or IMAGENET["size"]
    own = options.model in registry.added("model")
    return {"in_channels": n_channels} | ({"image_size": size} if own else {})


def _of_run(options: argparse.Namespace) -> nn.Module:
    """The model of the run that `--model` names, at its best epoch, with the preparation that it was trained with."""
    for name in ("checkpoint", "pretrained", "n_classes"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: {options.model} is a run, which says it; leave it out")
    info = read_info(options.model)
    allow(info["recipe"]["model"], None, str(Path(options.model) / RUN))
    model, _, _ = load_run(options.model)
    _prepare_as(model, info)
    if not info.get("prepared") and None in (options.size, options.mean, options.std):
        raise UserError(f"--model {options.model}: does not say how images were prepared; pass --size, --mean, --std")
    return model


def _prepare_as(model: nn.Module, info: Mapping[str, Any]) -> None:
    """Let a model say what its run says of images, see `own_preparation`."""
    model.__dict__["preparation"] = info.get("prepared")


def is_callable(name: str) -> bool:
    """Whether it is MODULE:CALLABLE, code of the user."""
    return ":" in name and not name.startswith((TIMM, HF))


def _found(path: str) -> Any:
    """MODULE:CALLABLE, which the command line names."""
    module, _, name = path.partition(":")
    try:
        return getattr(code.import_asked_for(module, f"--model {path}"), name)
    except AttributeError as error:
        raise UserError(f"--model {path}: {error}; expected MODULE:CALLABLE, as in mymodels:build") from error


def named(path: str) -> nn.Module:
    """What MODULE:CALLABLE gives, which the command line names."""
    found = _found(path)
    code.remember(path)
    try:
        with suppress(ValueError):  # none can be told
            inspect.signature(found.forward if isinstance(found, nn.Module) else found, follow_wrapped=False).bind()
    except TypeError as error:
        expected = "expected a function without arguments that gives an nn.Module"
        raise UserError(f"--model {path}: {error}; {expected}") from error
    model = found()
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {path}: gave a {type(model).__name__}, expected an nn.Module")
    return model


def allow(name: str, said: str | None, where: str) -> None:
    """Let `models.create` call MODULE:CALLABLE, which the file `where` names, if the command line has `said` the same.

    Also if this user's command lines have named that code before. UserError otherwise.
    """

    if not is_callable(name):
        return
    if said != name and not code.is_known(name):
        raise UserError(
            f"{where} names the model {name}; code is not run because a file names it, pass --model {name} if it is "
            "yours"
        )

    def make(n_classes: int, in_channels: int, image_size: int) -> nn.Module:
        return named(name)

    vars(make)["__wrapped__"] = _found(name)  # whose code is the model's, see `registry.code_key`
    registry.register("model", name)(make)


def recall(options: argparse.Namespace, notes: dict[str, Any]) -> None:
    """Take from the notes of a detectors file what the command line leaves open.

    Code that a file names is not run, unless a command line of this user has named the same.
    """
    if options.model is None and (named := notes.get("model")) is not None and is_callable(str(named)):
        if not code.is_known(str(named)):
            raise UserError(
                f"--model: the detectors were fitted with --model {named}; code is not run because a file names it, "
                "pass it again if it is yours"
            )
        say(options, f"ood-fast: --model {named}, which was named here before")
    chosen = options.checkpoint is not None or options.pretrained  # weights belong together
    for name in REMEMBERED:
        if getattr(options, name) in (None, False) and not (chosen and name in ("checkpoint", "pretrained")):
            setattr(options, name, notes.get(name))


def named_head(model: nn.Module, name: str | None) -> nn.Linear | None:
    """The head; None where it cannot be told: what needs one says where it lacks."""
    try:
        return given_head(model, name)
    except ValueError as error:
        if name is not None:
            raise UserError(f"--{error}") from error
        return None


def fitted(options: argparse.Namespace) -> tuple[nn.Module, DetectorSet, dict[str, Any]]:
    """The model and detectors of the file `options.file`, on the CPU, and how its images are prepared."""
    detectors, notes = read_detectors(options.file, "cpu")
    detectors = deployable(detectors, listed(options.detectors or ""))
    model, prepared = fitted_on(options, detectors, notes, "cpu")
    return model, detectors, prepared


def fitted_on(
    options: argparse.Namespace, detectors: DetectorSet, notes: dict[str, Any], device: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that detectors were fitted on, and how its images are prepared.

    UserError where the weights are not those that they were fitted on, unless --other-model says so.
    """
    recall(options, notes)
    n_classes = next((d.widths()[1] for d in detectors.detectors if d.needs_head), None)
    model, there = load_model(options, n_classes, device, notes), notes.get("fingerprint")
    if options.other_model:
        for detector in detectors.detectors:
            detector.fitted_on = None
    elif there is not None and weight_fingerprint(model, named_head(model, options.head)) != there:
        raise UserError(
            f"--model {options.model}: its weights are not those that the detectors were fitted on; pass that model's "
            "--checkpoint, fit anew, or pass --other-model if scores and thresholds need not hold"
        )
    prepared = preparation_of(options, model, notes)
    unsaid = [f"--{name}" for name in ("size", "mean", "std") if name not in notes and getattr(options, name) is None]
    if unsaid and own_preparation(model, options.model, options.pretrained) is None:  # of a file that Python wrote
        warn(f"neither detectors nor model say how images are prepared: {text_of(prepared)}; give {', '.join(unsaid)}")
    return model, prepared


def deployable(detectors: DetectorSet, names: Sequence[str]) -> DetectorSet:
    """Those of `--detectors`, or all, each of which can be deployed."""
    for name in names:
        if name not in detectors:
            raise UserError(f"--detectors: {unknown('detector of the file', name, detectors)}")
    chosen = detectors.only(names or detectors)
    for name, detector in chosen.items():
        others = ",".join(other for other in chosen if other != name)
        leave_out = f"; leave it out with --detectors {others}" if others else ""
        if detector.needs_model:
            raise UserError(f"{name} passes images of its own through the model, no file can do that{leave_out}")
        if detector.threshold is None:
            raise UserError(f"{name} has no threshold: fit with --validation{leave_out}")
    return chosen


# ---- images


def preparation_of(options: argparse.Namespace, model: nn.Module, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `PREPARATION` names: as given, else as `kept` with the detectors, else the model's own."""
    kept = kept or {}
    # older files do not say the orientation: it was not read
    own: dict[str, Any] = {"orientation": "stored" if "size" in kept else "exif", "truncated": "refuse"}
    own |= own_preparation(model, options.model, options.pretrained) or _unsaid(kept.get("size") or options.size)
    own |= {name: kept[name] for name in PREPARATION if name in kept}
    size, resize = options.size or own["size"], options.resize
    if resize is None:
        lengths = own["resize"] if isinstance(own["resize"], (list, tuple)) else [own["resize"]]
        scaled = tuple(round(length * size / own["size"]) for length in lengths)
        resize = scaled if len(scaled) > 1 else scaled[0]
    if size < 1 or (isinstance(resize, int) and resize < size):
        raise UserError(f"--size, --resize: got {size} and {resize}, expected 1 <= size <= resize")
    numbers = {name: _numbers(name, getattr(options, name)) or tuple(own[name]) for name in ("mean", "std")}
    if len(numbers["mean"]) != len(numbers["std"]):
        raise UserError(
            f"--mean, --std: got {len(numbers['mean'])} and {len(numbers['std'])} numbers, expected as many"
        )
    chosen = {name: getattr(options, name) or own[name] for name in ("interpolation", "orientation", "truncated")}
    return {"size": size, "resize": resize, **numbers, **chosen}


def _unsaid(size: int | None) -> dict[str, Any]:
    """The preparation where nobody says: ImageNet's, but small images are taken whole, as by the benchmark `folder`."""
    return IMAGENET | ({"size": size, "resize": size} if size and size <= SMALL_IMAGE else {})


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise UserError(
            f"--{name}: got {text!r}, expected three numbers as in 0.485,0.456,0.406, or one for grey images"
        )
    for number in numbers:
        if not (0 < number < math.inf if name == "std" else -math.inf < number <= 1):  # also NaN
            expected = "numbers above 0" if name == "std" else "numbers up to 1"
            raise UserError(f"--{name}: got {text!r}, expected {expected}: pixels are from 0 to 1, not to 255")
    return numbers


def cannot_take(prepared: dict[str, Any], error: RuntimeError) -> str:
    """What a model said of its input, in a line, with what the input was."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "gloo" in reason or "NCCL" in reason:  # what PyTorch says of a process that is gone
        return f"another process has ended, or cannot be reached ({reason})"
    if "size" not in prepared:
        return reason
    shape = (len(prepared["mean"]), prepared["size"], prepared["size"])
    return f"the model cannot take images of {shape}: {reason}; see --size, and --mean, a number for each channel"


def text_of(prepared: dict[str, Any]) -> str:
    """A preparation in a line."""
    mean, std = (",".join(f"{number:g}" for number in prepared[name]) for name in ("mean", "std"))
    whole = prepared["resize"] if isinstance(prepared["resize"], (list, tuple)) else None
    scaled = f"short side {prepared['resize']}" if whole is None else f"{whole[0]}×{whole[1]}"
    resized = f"{scaled} ({prepared['interpolation']}), middle {prepared['size']}"
    return f"{resized}, mean {mean}, std {std}"
