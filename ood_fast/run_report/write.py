"""The report on the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import checks, pages
from .page import GENERATOR, page
from .records import Record

NAME = "report.html"


def check_file(path: str | os.PathLike) -> Path:
    """The file for the report: `path`, or report.html in it if it is a folder. UserError if it cannot be written, or is
    something else than an earlier report.
    """
    if not str(path).strip():
        raise checks.UserError("--out: got '', expected a file")
    file = Path(path).expanduser()
    file = file / NAME if file.is_dir() else file
    checks.writable_folder("--out", file.parent)
    if file.exists() and f'content="{GENERATOR}"' not in _beginning(file):
        raise checks.UserError(f"--out: {file} is there and is no report of `ood-fast report`; choose another file")
    return file


def _beginning(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(1000)
    except OSError as error:
        raise checks.UserError(f"--out: cannot read {file}: {error.strerror}") from error


def write(file: str | os.PathLike, records: Sequence[Record], context: Mapping[str, Any]) -> None:
    """Write the page, in place of an earlier one when all of it is written.

    Args:
        context: the command and when it was "started"; "versions" and "machine" if known.
    """
    text = page(records, context)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    pages.write(file, text)
