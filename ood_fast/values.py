"""How values of settings are written, by the type of their field; short names of types; defaults that several places
have. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

AnyPath = str | os.PathLike[str]
Grid = Mapping[str, Iterable[Any]]  # parameter -> the candidates of its search
Grids = Mapping[str, Grid]  # of each detector

# Defaults.
TAU = 0.04  # LogitNorm's temperature (Wei et al., ICML 2022), for its loss and for softmax(f / (τ‖f‖))
EPS = 1e-6  # of ELogitNorm: D up to which a sample's temperature is 1
ALPHA = 1e-3  # of nci_score: the weight of the norm, for which the detector NCI takes 1e-4
GAMMA = 0.1  # of GEN: the exponent
TPR = 0.95  # the share of in-distribution scores that a threshold keeps
DRAWS = 200  # for intervals over test images
SAVE_MINUTES = 15.0  # from one checkpoint of a training to the next
IMAGE_SIZE = 224  # of images of one's own


@dataclass(frozen=True)
class Kind:
    """How a value is written on the command line (`parse`, ValueError otherwise), and what JSON gives (`accepts`)."""

    expected: str
    parse: Callable[[str], Any]
    accepts: Callable[[Any], bool]


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(text)
    return _BOOLEANS[text.lower()]


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


KINDS = {
    "str": Kind("a name", str, lambda value: isinstance(value, str)),
    "bool": Kind("true or false", _boolean, lambda value: isinstance(value, bool)),
    "int": Kind("a whole number", int, _is_int),
    "float": Kind("a number", _number, _is_number),
    "float | None": Kind(
        "a number or none",
        lambda text: None if text.lower() == "none" else _number(text),
        lambda value: value is None or _is_number(value),
    ),
    "tuple[int, ...]": Kind(
        "whole numbers, as 40,50",
        lambda text: tuple(int(part) for part in text.split(",") if part.strip()),
        lambda value: isinstance(value, (list, tuple)) and all(map(_is_int, value)),
    ),
}
