"""Settings as data: the losses, how they are trained, and what `compare` scores with. Imports no torch.

`RECIPES` holds the settings of the papers and of their authors' code, each with the table or section that it repeats:

    recipe = recipes.find("cifar10-elogitnorm")
    recipe = recipes.override(recipe, ["lr=0.05", "epochs=200"])
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..values import KINDS
from .papers import BASELINE, BENCHMARKS, DETECTORS, LOSSES, METHODS, MORE_LOSSES, OF_THE_LOSS, RECIPES
from .recipe import BENCHMARK_NAMES, CHOICES, TAU, Recipe, TrainingRecipe, require

__all__ = ["ALIASES", "BASELINE", "BENCHMARKS", "BENCHMARK_NAMES", "CHOICES", "DETECTORS", "LOSSES", "METHODS"]
__all__ += ["MORE_LOSSES", "OF_THE_LOSS", "RECIPES", "TAU", "Recipe", "TrainingRecipe", "as_dict", "find"]
__all__ += ["from_dict", "override"]

# ---- by name, from a file, with changes

ALIASES = {"lr": "learning_rate", "optimiser": "optimizer"}


def find(name: str | os.PathLike[str]) -> TrainingRecipe:
    """The recipe of that name, or from a JSON file: its settings, on top of those of `"base"` if it names a recipe.

    Raises:
        UserError: an unknown name, with the nearest known; a file that is not there or makes no sense.
    """
    if str(name) in RECIPES:
        return RECIPES[str(name)]
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(unknown("recipe", str(name), RECIPES))
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UserError("is no regular file")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise UserError("expected an object of settings")
        settings = {"name": path.stem, **settings}
        require("name", "''", settings["name"] != "", "a name that a folder can have")
        return from_dict(settings)
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"recipe {path}: no JSON ({error})") from error
    except ValueError as error:
        raise UserError(f"recipe {path}: {error}") from error


def override(recipe: TrainingRecipe, settings: Iterable[str]) -> TrainingRecipe:
    """The recipe with changes, each written `key=value`: `lr=0.05`, `milestones=40,50`, `head_tau=none`, `amp=bf16`.

    Raises:
        UserError: an unknown key, with the nearest known; a value that is not of the field's type or makes no sense.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise UserError(f"setting {setting!r}: expected key=value")
        name = _field(key)
        try:
            changes[name] = _FIELDS[name].parse(text.strip())
        except ValueError:
            raise UserError(f"{key}: got {text!r}, expected {_FIELDS[name].expected}") from None
    return replace(recipe, **changes)


def as_dict(recipe: TrainingRecipe) -> dict[str, Any]:
    """Plain values for JSON; `from_dict` gives the recipe back."""
    return asdict(recipe) | {"milestones": list(recipe.milestones)}


def from_dict(settings: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe with these values, on top of `"base"` if it names one. `UserError` as in `override`."""
    settings = dict(settings)
    base = _base(settings.pop("base")) if "base" in settings else TrainingRecipe()
    name = settings.get("name", base.name)  # of the folder that a run is written in; empty for settings without a name
    if not isinstance(name, str) or name in (".", "..") or set(name) & set('/\\\0:*?"<>|'):
        raise UserError(f"name: got {name!r}, expected a name that a folder can have")
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        name = key if key in ("name", "source") else _field(key)
        if not _FIELDS[name].accepts(value):
            raise UserError(f"{key}: got {value!r}, expected {_FIELDS[name].expected}")
        changes[name] = tuple(value) if isinstance(value, list) else value
    return replace(base, **changes)


def _base(name: Any) -> TrainingRecipe:
    """A recipe of the package: files on top of files could go round."""
    if not isinstance(name, str) or name not in RECIPES:
        raise UserError(f"base: {unknown('recipe', name, RECIPES)}")
    return RECIPES[name]


def _field(key: str) -> str:
    name = ALIASES.get(key, key)
    if name not in _FIELDS or name in ("name", "source"):
        known = [*(field for field in _FIELDS if field not in ("name", "source")), *ALIASES]
        raise UserError(unknown("setting", key, known))
    return name


_FIELDS = {field.name: KINDS[str(field.type)] for field in fields(TrainingRecipe)}
