"""The page of `ood-fast score --html`: images sorted by score, the most out-of-distribution ones first."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checks import UserError
from ..data.images import Files
from ..files import write_text
from ..report.pages import document, thumbnail
from .table import FORMATS

SHOWN = 500  # rows


def write(page: Path, table: Path, source: Files | None, command: str) -> None:
    """Write the page of a table of `score`; with the images of `source`. OSError if it cannot be written."""
    columns, rows = FORMATS[table.suffix].read(table)
    rows.sort(key=lambda row: (not math.isnan(row[2]), row[2]))  # NaN, which is flagged, first
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *columns])
    image = _images(source)
    lines = [f"<tr><td>{image(row[0])}</td>{''.join(map(_cell, row))}</tr>" for row in rows[:SHOWN]]
    told = f"{len(rows)} rows of {table.name}" + f", the first {SHOWN} of them" * (len(rows) > SHOWN)
    told += f", by {columns[2]}: the lowest, most out-of-distribution, first."
    verdict = "".join(f"<li>{html.escape(line)}</li>" for line in [*_flagged(columns, rows), told])
    body = f"""<h1>{html.escape(table.name)}</h1>
<ul class=verdict>{verdict}</ul>
<pre>{html.escape(command)}</pre>
<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>
{chr(10).join(lines)}
</tbody></table></div>"""
    write_text(page, document(f"ood_fast score: {table.name}", body, "ood_fast score"))


def _flagged(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """How many rows each detector with a threshold flags, in one line."""
    told = []
    for place, column in enumerate(columns):
        flags = [str(row[place]) for row in rows] if column.endswith("is_ood") else []
        if set(flags) & {"True", "False"}:
            n, of = flags.count("True"), column.removesuffix("is_ood").rstrip("_")
            told.append(f"{of}: " * bool(of) + f"{n} of {len(rows)} ({100 * n / len(rows):.1f} %)")
    return [f"Out-of-distribution: {'; '.join(told)}"] if told else []


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str("" if value is None else value)
    text = html.escape(text)
    return f"<td><b class=worse>{text}</b></td>" if text == "True" else f"<td>{text}</td>"


def _images(source: Files | None) -> Callable[[str], str]:
    """A small image for a path of the table; nothing where there is none."""
    if source is None:
        return lambda path: ""

    places = {source.path(index): index for index in range(len(source))}

    def image(path: str) -> str:
        try:
            found = source.image(places[path])
        except (KeyError, UserError):
            return ""
        return thumbnail(found)

    return image
