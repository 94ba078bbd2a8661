"""CSV files whose names are no formulas: the only writer and the only reader of them.

A spreadsheet computes a cell that begins with = + - @ or a control character, and what it computes may run programs.
Such text gets an apostrophe in front, as a spreadsheet marks text; numbers stay. `from_cell` gives the name back.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # also in their wide forms
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|nan)", re.IGNORECASE | re.ASCII)


def as_cell(value: Any) -> Any:
    """What is written for a value."""
    formula = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return "'" + value if formula else value


def from_cell(text: str) -> str:
    """The text that `as_cell` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def write_rows(file: TextIO, rows: Iterable[Sequence[Any]], end: str = "\n") -> None:
    """Rows of values, each on a line; the file is open with newline=""."""
    stream = SimpleNamespace(write=lambda line: file.write(line[:-2] + end))  # csv quotes what is in its own line end
    csv.writer(stream, lineterminator="\r\n").writerows(list(map(as_cell, row)) for row in rows)


def write_records(file: TextIO, records: Sequence[Mapping[str, Any]], end: str = "\n") -> None:
    """A header with all names, in the order in which they come, and a row for each record."""
    names = list(dict.fromkeys(name for record in records for name in record))
    write_rows(file, [names, *([record.get(name, "") for name in names] for record in records)], end)


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """`write_records` into a file, with the line ends that RFC 4180 asks for."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        write_records(file, list(records), "\r\n")


def read_rows(path: str | os.PathLike[str], errors: str = "strict") -> list[list[str]]:
    """What `write_rows` wrote, as text, the header first. `errors`: as of `open`, of bytes that are no UTF-8.

    Raises:
        OSError, ValueError: it cannot be read; no UTF-8, no CSV, or a row of another length than the first.
    """
    with open(path, newline="", encoding="utf-8", errors=errors) as file:
        try:
            rows = [list(map(from_cell, row)) for row in csv.reader(file) if row] or [[]]
        except csv.Error as error:
            raise ValueError(str(error)) from error
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} entries, the header {len(rows[0])}")
    return rows


def read_records(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """What `write_records` wrote, as text; raises as `read_rows`."""
    header, *rows = read_rows(path)
    return [dict(zip(header, row, strict=True)) for row in rows]
