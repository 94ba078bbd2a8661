"""Code of the user: imported because a command line names it, never because a file does.

What a command line has named is remembered in `$XDG_STATE_HOME/ood_fast/code.json` (`~/.local/state` without it): the
name, where its module was found and a checksum. A file that `fit` or `train` wrote may then name it again, if it is the
same code and found without looking into the current folder. No file beside the data can say so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checks import UserError
from ..files import sha256, write_text
from ..registry import KINDS, added
from .common import say

MOST_REMEMBERED = 500
_appended: set[str] = set()  # current folders that are on the path because a command line asked


def import_asked_for(name: str, option: str) -> ModuleType:
    """A module that the command line names, from where packages are or, at last, the current folder.

    Last, and only then: a `PIL.py` that lies beside the data must not run in the place of the package.

    Raises:
        UserError: it cannot be imported, or has the name of another that lies in the current folder; neither runs then.
    """
    if not all(name.split(".")) or "/" in name or os.sep in name:
        raise UserError(f"{option}: got {name!r}, expected the name of a module, as in mymodels or package.models")
    here = os.getcwd()
    for before in _appended - {here}:  # of a command in another folder
        sys.path[:] = [entry for entry in sys.path if entry != before]
    _appended.intersection_update({here})
    if here not in sys.path:
        sys.path.append(here)
        _appended.add(here)
    _refuse_namesake(name, Path(here), option)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{option}: cannot import {name!r} ({error}), looked for it where packages are and here"
        ) from error


def import_plugins(options: Any) -> None:
    """Import the user's modules, whose detectors and models register themselves; a word where nothing does."""
    for name in options.plugin:
        is_new, before = name not in sys.modules, _registered()
        module = import_asked_for(name, "--plugin")
        if is_new and _registered() == before:
            where = getattr(module, "__file__", None) or ", ".join(module.__path__)
            say(options, f"ood-fast: warning: --plugin {name}, {where}, registers nothing with @ood_fast.register")
        remember(name)


def _registered() -> list[dict[str, Any]]:
    return [dict(added(kind)) for kind in KINDS]


def _refuse_namesake(name: str, here: Path, option: str) -> None:
    """UserError where `name` is found elsewhere, and the current folder has a module of that name too."""
    top = name.partition(".")[0]
    own = [path for path in (here / f"{top}.py", here / top) if path.is_file() or any(path.glob("*.py"))]
    spec = None
    with suppress(ImportError, ValueError):  # the import tells
        spec = importlib.util.find_spec(top)
    found = [] if spec is None else [*(spec.submodule_search_locations or ()), str(spec.origin)]
    if own and found and not {*map(os.path.realpath, own)} & {*map(os.path.realpath, found)}:
        raise UserError(
            f"{option}: {top!r} is {found[0]}, not {own[0]}: packages come before the current folder; rename yours"
        )


def remember(name: str) -> None:
    """The command line has named the code `name`, MODULE or MODULE:CALLABLE. Where nothing can be kept, nothing is."""
    known = {"name": name, "files": _files(name)}
    held = _remembered()
    if known["files"] and known not in held:
        with suppress(OSError, RuntimeError):  # RuntimeError: no home
            _store().parent.mkdir(parents=True, exist_ok=True)
            write_text(_store(), json.dumps([*held, known][-MOST_REMEMBERED:], indent=1) + "\n")


def is_known(name: str) -> bool:
    """Whether a command line of this user has named this very code, and it is found outside of the current folder."""
    files = _files(name)
    return bool(files) and {"name": name, "files": files} in _remembered()


def import_known(modules: list[str]) -> list[str]:
    """Import those plugins that a file names and that are known; the others."""
    unknown = []
    for name in modules:
        if name in sys.modules:
            continue
        if is_known(name):
            importlib.import_module(name)
        else:
            unknown.append(name)
    return unknown


def _store() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "ood_fast/code.json"


def _remembered() -> list[Any]:
    try:
        held = json.loads(_store().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # none yet; no home
        return []
    return held if isinstance(held, list) else []


def _files(name: str) -> dict[str, str]:
    """The files that importing a module would run, with checksums, found without running any; empty if it is not."""
    path: list[str] | None = [entry for entry in sys.path if entry and entry not in _appended]
    found, module = {}, ""
    for part in name.partition(":")[0].split("."):
        module = f"{module}.{part}" if module else part
        spec = PathFinder.find_spec(module, path)
        if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
            return {}
        origin = os.path.realpath(spec.origin)
        found[origin] = sha256(origin)
        path = list(spec.submodule_search_locations or ())
    return found
