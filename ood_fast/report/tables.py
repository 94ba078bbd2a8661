"""Tables of results: made once, shown on terminals, in Markdown and in HTML."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import pages


@dataclass(frozen=True)
class Cell:
    """What stands in one place."""

    text: str
    bold: bool = False
    worse: bool = False  # bold because it is worse, not better


Column = tuple[str, Callable[..., Cell]]  # its head, and the cell of what a row is about
Rows = tuple[str, Iterable[tuple[str, tuple[Any, ...]]]]  # a heading, and each row: its name, and what it is about


@dataclass(frozen=True)
class Section:
    """Rows under one heading (empty for none); each is its name and its cells."""

    heading: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Table:
    """A name and a cell in each column for every row, and what it says."""

    title: str
    caption: str
    columns: tuple[str, ...]
    sections: tuple[Section, ...]
    on_terminal: bool = True
    folded: bool = False  # on the page: to be opened with a click
    corner: str = ""  # what the names of the rows are
    sortable: bool = False  # on a page, by a click on a header

    @classmethod
    def of(cls, title: str, caption: str, columns: Iterable[Column], rows: Iterable[Rows], **more: Any) -> Table:
        """A table of what `columns` make of what each row is about; `more`: as of the class."""
        columns = list(columns)
        sections = tuple(
            Section(heading, tuple((name, tuple(cell(*about) for _, cell in columns)) for name, about in under))
            for heading, under in rows
        )
        return cls(title, caption, tuple(head for head, _ in columns), sections, **more)

    def rows(self) -> list[tuple[str, tuple[Cell, ...]]]:
        """Of all sections."""
        return [row for section in self.sections for row in section.rows]

    def widths(self, mark: int = 0, header: int = 0) -> list[int]:
        """The letters of each column; `mark` more in each cell, `header` more in each header."""
        cells = [row for _, row in self.rows()]
        return [
            max(len(c) + header, *(len(row[i].text) + mark for row in cells), 0) for i, c in enumerate(self.columns)
        ]


def number(value: float | None, digits: int = 4) -> str:
    """For people: "–" where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share as percent; "–" where there is none."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def each(values: Mapping[str, float]) -> str:
    """Names and their numbers in a line."""
    return "; ".join(f"{name}: {number(value)}" for name, value in values.items()) + "."


def and_list(parts: Sequence[str]) -> str:
    """As "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""


GAP = "  "  # between the columns on a terminal


def show(tables: Iterable[Table]) -> None:
    """Tables on standard output, with rich: colour and bold on a terminal, plain text with * elsewhere.

    Columns that find no room stand below the others, with the names repeated.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    marks = console.color_system is None  # no colour, then no bold either
    for table in tables:
        if not table.on_terminal:
            continue
        console.print(Text(table.title, style="bold underline"))
        rows = table.rows()
        # All sections of a table in the same columns, so that they read as one.
        name_width = max((len(name) for name, _ in rows), default=0)
        if alone := name_width > console.width // 2:  # long names have lines of their own
            name_width = 0
        widths = table.widths(marks)
        for section in table.sections:
            if section.heading:
                console.print(Text(section.heading, style="italic"))
            for block in _blocks(widths, console.width - name_width):
                header = "".join(GAP + table.columns[i].rjust(widths[i] - marks) + " " * marks for i in block)
                lines = [Text(" " * name_width + header, style="dim")]
                for name, cells in section.rows:
                    lines += [Text(name)] * alone
                    line = Text("" if alone else name.ljust(name_width))
                    for i in block:
                        # The mark has a column of its own, so that the digits stay below each other.
                        text = cells[i].text + ("*" if cells[i].bold else " ") * marks
                        line.append(GAP + text.rjust(widths[i]), style=_style(cells[i]))
                    lines.append(line)
                for line in lines:
                    line.rstrip()
                    console.print(line, no_wrap=True, overflow="ignore", crop=False)
                console.print()
        console.print(Text(table.caption.replace("bold", "marked *") if marks else table.caption, style="dim"))
        console.print()


def _blocks(widths: list[int], room: int) -> list[list[int]]:
    """The columns in groups that fit into `room`, at least one in each."""
    blocks: list[list[int]] = []
    left = 0
    for i, width in enumerate(widths):
        left -= len(GAP) + width
        if left < 0 or not blocks:
            blocks.append([])
            left = room - len(GAP) - width
        blocks[-1].append(i)
    return blocks


def _style(cell: Cell) -> str:
    if not cell.bold:
        return ""
    return "bold red" if cell.worse else "bold green"


def as_markdown(table: Table) -> str:
    """The table, bold what is bold, with its caption."""
    lines = [f"**{table.title}**", ""]
    lines.append("| | " + " | ".join(map(_unbarred, table.columns)) + " |")
    lines.append("|---|" + "---:|" * len(table.columns))
    for section in table.sections:
        if section.heading:
            lines.append(f"| *{_unbarred(section.heading)}* |" + " |" * len(table.columns))
        for name, cells in section.rows:
            texts = (f"**{cell.text}**" if cell.bold else cell.text for cell in cells)
            lines.append(f"| {_unbarred(name)} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", table.caption, ""])


def _unbarred(text: str) -> str:
    """Without bars that would be those of the table."""
    return text.replace("|", "\\|")


def as_page(tables: Iterable[Table]) -> str:
    """Tables beside each other, as far as a page has room; those that are folded after the others."""
    return f"<div class=tables>{''.join(map(as_html, sorted(tables, key=lambda table: table.folded)))}</div>"


def as_html(table: Table) -> str:
    """The table as a section of a page."""

    def cell_html(cell: Cell) -> str:
        mark = (" class=worse" if cell.worse else " class=best") if cell.bold else ""
        return f"<td{mark}>{html.escape(cell.text)}</td>"

    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in table.columns)
    bodies = []
    for section in table.sections:
        named = [(html.escape(name), "".join(map(cell_html, cells))) for name, cells in section.rows]
        rows = [f"<tr><th scope=row>{name}</th>{cells}</tr>" for name, cells in named]
        if section.heading:
            span = len(table.columns) + 1
            rows.insert(0, f"<tr class=section><th colspan={span}>{html.escape(section.heading)}</th></tr>")
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    kind = " class=sortable" if table.sortable else ""
    content = (
        f"<div class=scroll tabindex=0><table{kind}><thead><tr><th>{html.escape(table.corner)}</th>{head}</tr></thead>"
        f"{''.join(bodies)}</table></div>"
        f"<p class=caption>{html.escape(table.caption)}</p>"
    )
    opened = "<section class=full>" if _width(table) > HALF_PAGE else "<section>"
    if table.folded:
        return f"{opened}{pages.folded(table.title, content)}</section>"
    return f"{opened}<h2>{html.escape(table.title)}</h2>{content}</section>"


HALF_PAGE = 600  # CSS pixels: a wider table has the row of the page to itself
LETTER, PADDING = 7.4, 18  # of a column, as style.css shows it


def _width(table: Table) -> float:
    """About how wide the table is on a page, in CSS pixels."""
    mark = 2 if table.sortable else 0  # the arrow beside a header
    names = max(len(table.corner) + mark, *(len(name) for name, _ in table.rows()), 0)
    return sum(LETTER * letters + PADDING for letters in (names, *table.widths(header=mark)))
