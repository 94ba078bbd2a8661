"""Options that several commands have, each written once, and what `type=` checks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """A `type=`: a number of that kind which is not below `least`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:  # also NaN
            what = "a whole number of " if kind is int and value is None else ""
            raise argparse.ArgumentTypeError(f"got {text}, expected {what}at least {least:g}")
        return value

    return number


MODEL_HELP = "resnet18_32x32, one of torchvision's classifiers, timm:NAME, hf:FOLDER, or MODULE:CALLABLE"
_MANY: dict[str, Any] = {"action": "append", "default": []}
SHARED: dict[str, dict[str, Any]] = {
    "set": _MANY | {"metavar": "KNN.k=10", "help": "a parameter of a detector"},
    "ood": {"metavar": "A,B", "help": "only these OOD sets"},
    "ood-folder": _MANY | {"metavar": "NAME=DIR", "help": "a far-OOD set of your own; may be repeated"},
    "csid": {"metavar": "A,B", "help": "covariate-shifted in-distribution sets, or all: full-spectrum metrics beside"},
    "csid-folder": _MANY | {"metavar": "NAME=DIR", "help": "one of your own, DIR/<class>/ or .npy; may be repeated"},
    "outliers": {"metavar": "DIR", "help": "images to train against, any depth, for losses as oe and mixoe"},
    "features": {"metavar": "PATH", "help": "stored features: .npz, .pt, .parquet, or a folder of them"},
    "validation": {"metavar": "PATH", "help": "in-distribution data that was not trained on"},
    "ood-validation": _MANY | {"metavar": "PATH", "help": "OOD data, by which parameters are chosen; may be repeated"},
    "model": {"metavar": "NAME", "help": MODEL_HELP},
    "classes": {
        "metavar": "FILE",
        "help": "names of the classes in the order of the model's outputs: one a line, or JSON",
    },
    "overwrite": {"action": "store_true"},
    "other-model": {"action": "store_true", "help": "also with weights that the detectors were not fitted on"},
    "plugin": _MANY | {"metavar": "MODULE", "help": "import own detectors, models from it"},
    "data-root": {"metavar": "DIR", "help": "folder of the data sets (default: where it was trained from)"},
    "layout": {"metavar": "L", "help": "auto (default), torchvision, openood"},
    "download": {"action": "store_true", "help": "fetch what is missing, where torchvision can"},
    "image-size": {"type": at_least(1), "metavar": "PIXELS", "help": "of the benchmark folder (default: 224)"},
    "truncated": {
        "choices": ("refuse", "allow"),
        "help": "image files that end too early: an error (default), or what is there, as OpenOOD takes them",
    },
    "any-accuracy": {
        "action": "store_true",
        "help": "go on where the accuracy is no better than chance, which is an error (wrong images, weights, classes)",
    },
    "skip-bad": {"action": "store_true", "help": "leave out images that cannot be read"},
    "head": {"metavar": "LAYER", "help": "name of the layer that makes the logits, if it is not found"},
    "head-file": {"metavar": "FILE", "help": "feature file with the head W, b, if --features has none"},
    "batch-size": {"type": at_least(1), "default": 256, "metavar": "N", "help": "(default: %(default)s)"},
    "workers": {
        "type": at_least(0),
        "default": min(4, os.cpu_count() or 1),
        "metavar": "N",
        "help": "loading processes, of each process",
    },
    "device": {"default": "auto", "help": "auto (default), cpu, cuda, cuda:1, mps, ..."},
    "quiet": {"action": "store_true", "help": "print nothing but errors"},
    "seed": {"type": at_least(0), "default": 0, "metavar": "N", "help": "(default: %(default)s)"},
}


def share(group: Any, *names: str, **changes: str | dict[str, Any]) -> None:
    """Add options of `SHARED` to a parser or group; `changes` of some by their names, or their help."""
    for name in names:
        change = changes.get(name.replace("-", "_"), {})
        group.add_argument(f"--{name}", **SHARED[name] | ({"help": change} if isinstance(change, str) else change))
