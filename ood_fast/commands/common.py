"""What the commands share: errors, devices, versions."""

from __future__ import annotations

import ast
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__, checks, features, ops
from ..checks import UserError
from ..detectors import Detector, DetectorSet, find, in_all, known, load, store
from ..processes import Processes
from ..values import KINDS, Grids

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "rich")


def say(options: Any, text: str) -> None:
    """A line on stderr, where `--quiet` does not forbid it."""
    if not options.quiet:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A warning, told with `--quiet` too."""
    print(f"ood-fast: warning: {text}", file=sys.stderr, flush=True)


def device(name: str) -> str:
    """The device of `--device` as torch names it; UserError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(2, device=name).sum().item()  # a device without numbers (meta) fails here
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises each of them for some device
        raise UserError(f"--device: cannot use {name!r}, {_why_not(name)}; use --device cpu") from error
    try:
        ops.backend_name(torch.device(name))
    except RuntimeError as error:
        raise UserError(str(error)) from error
    return name


def _why_not(device: str) -> str:
    """In a few words; what torch says names drivers and every kind of device it knows."""
    if device.partition(":")[0] == "cuda":
        n_devices = torch.cuda.device_count()
        return f"PyTorch finds {n_devices} such devices" if n_devices else "PyTorch finds no such GPU"
    try:
        torch.device(device)
    except RuntimeError:
        return "PyTorch knows no such device"
    return "PyTorch cannot compute on it here"


def versions() -> dict[str, str]:
    """What results say of the software."""
    found = {"ood_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str]:
    """What results say of the machine."""
    return {"system": f"{platform.system()} {platform.machine()}", "cpus": f"{os.cpu_count()} CPUs"}


def context_of(command: str) -> dict[str, Any]:
    """What results say of how they came about."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": command, "started": started, "versions": versions(), "machine": machine()}


def given(options: Any, *names: str) -> dict[str, Any]:
    """Options as keywords of the same names."""
    return {name: getattr(options, name) for name in names}


def refuse_given(options: Any, told: str, *names: str) -> None:
    """UserError for the first of these options that was given: it would have no effect."""
    for name in names:
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: {told}")


def data_of(options: Any) -> dict[str, Any]:
    """What runs keep of where their images are, so that later commands find them."""
    return {"root": whole_path(options.data_root), **given(options, "layout", "image_size")}


def whole_path(path: str | None) -> str | None:
    """A path as it is from every folder."""
    return path and str(Path(path).expanduser().resolve())


def training_settings(options: Any) -> list[str]:
    """ "KEY=VALUE" of a recipe, of --set and of the options for the most usual."""
    if options.init and not Path(options.init).expanduser().is_file():
        raise UserError(f"--init: no file {options.init}")
    named = {"model": options.model, "init": whole_path(options.init), "epochs": options.epochs}
    named |= {"pretrained": options.pretrained, "amp": options.amp}
    return [*options.set, *(f"{name}={value}" for name, value in named.items() if value)]


def said(settings: Iterable[str]) -> str | None:
    """The model that "KEY=VALUE" of the command line name, the last one; None if they name none."""
    named = [text.partition("=")[2].strip() for text in settings if text.partition("=")[0].strip() == "model"]
    return named[-1] if named else None


# ---- what `fit`, `score` and their like share


def detector_set(names: str, settings: list[str], on_features: bool) -> DetectorSet:
    """The `DetectorSet` of "A,B" (or "all" that can be used) and "A.k=3"; for stored features or for images."""
    chosen: dict[str, Any] = {}
    usable = [name for name in known() if not (on_features and find(name).needs_model)]
    for name in (n for n in in_all() if n in usable) if names == "all" else listed(names):
        cls = find(name)
        if cls.__name__ not in usable:
            raise UserError(f"--detectors: {cls.label} passes images through the model, features do not suffice")
        chosen[cls.__name__] = (cls, {})
    if not chosen:
        raise UserError("--detectors: got none, expected at least one")
    for text in settings:
        path, equals, value = text.partition("=")
        name, dot, setting = path.strip().partition(".")
        if not equals or not dot:
            raise UserError(f"--set: got {text!r}, expected DETECTOR.PARAMETER=VALUE, as in KNN.k=10")
        cls = find(name)
        if cls.__name__ not in chosen:
            raise UserError(f"--set {text}: {cls.__name__} is not among the detectors {', '.join(chosen)}")
        parameters = cls.parameters_of()
        if setting not in parameters:
            raise UserError(f"--set {text}: {checks.unknown(f'parameter of {cls.__name__}', setting, parameters)}")
        try:
            chosen[cls.__name__][1][setting] = _parsed(cls, setting, value.strip())
        except ValueError:
            raise UserError(f"--set {text}: expected true or false") from None
    try:
        return DetectorSet({name: cls(**given) for name, (cls, given) in chosen.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"--set: {error}") from error


def searched(settings: list[str], chosen: DetectorSet) -> Grids:
    """The grids of the detectors that `--set` speaks of, without what it sets."""
    grids: dict[str, dict[str, Iterable[Any]]] = {}
    for text in settings:
        name, _, parameter = text.partition("=")[0].strip().partition(".")
        name = find(name).__name__
        grids.setdefault(name, dict(chosen[name].grid)).pop(parameter, None)
    return grids


def read_head_file(path: str) -> tuple[Any, Any]:
    """(W, b) of `--head-file`."""
    file = features.files(path)[0]
    if (head := features.load_head(file)) is None:
        raise UserError(f"--head-file {file}: holds no W, expected .npz or .pt with W (c, m) and b (c,)")
    return head


def read_detectors(path: str, where: str) -> tuple[DetectorSet, dict[str, Any]]:
    """The detectors of a file on the device `where`, and what it says of their fit."""
    try:
        loaded, notes = load(path, where), store.notes(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--detectors: {error}") from error
    return loaded if isinstance(loaded, DetectorSet) else DetectorSet([loaded]), notes


def listed(text: str) -> tuple[str, ...]:
    """ "A, B" -> ("A", "B")."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _parsed(cls: type[Detector], parameter: str, text: str) -> Any:
    """The value of a parameter: true or false where it is one of these, dtypes by name, else a literal."""
    if parameter in cls.switches():
        return KINDS["bool"].parse(text)
    if parameter == "dtype":
        named = getattr(torch, text.removeprefix("torch."), None)
        if isinstance(named, torch.dtype):
            return named
    return literal(text)


def literal(text: str) -> Any:
    """A Python number, True, None, ... or, if it is none of these, the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@contextmanager
def processes(device: str, options: Any) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, if it did; all but the first are quiet."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Processes()
        return

    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        options.quiet |= dist.get_rank() > 0
        yield Processes.joined()
    finally:
        dist.destroy_process_group()
        # DistributedDataParallel keeps the group and so gloo's threads. One that still drops the tensors of the last
        # collective needs the interpreter: if that ends first, PyTorch aborts the process (SIGABRT).
        time.sleep(0.1)
