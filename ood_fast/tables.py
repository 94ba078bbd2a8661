"""The tables of a comparison. Each is built once (`build`) and rendered for terminals, Markdown and HTML."""

from __future__ import annotations

import functools
import html
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import detectors
from .recipes import BASELINE

if TYPE_CHECKING:
    from .compare import Comparison, PairedSummary


@dataclass(frozen=True)
class Cell:
    text: str
    bold: bool = False
    worse: bool = False  # bold because it is worse, not better


@dataclass(frozen=True)
class Section:
    """Rows under one heading (empty for none); each is its name and its cells."""

    heading: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    columns: tuple[str, ...]
    sections: tuple[Section, ...]
    on_terminal: bool = True
    folded: bool = False  # on the page: to be opened with a click
    corner: str = ""  # what the names of the rows are
    sortable: bool = False  # on a page with `pages.SORTING`


def build(comparison: Comparison) -> list[Table]:
    """The tables of a comparison: AUROC, FPR95, differences to the baseline, accuracy and calibration; then, folded and
    not on terminals, FPR95 in the other convention and AUPR in both.
    """
    settings = comparison.settings
    several = len(settings.seeds) > 1
    over = f"Mean ± sample standard deviation over {len(settings.seeds)} seeds" if several else "One seed"
    result = [
        _by_set(
            comparison,
            settings.losses,
            "auroc",
            lambda row: _values(row, best=max),
            title="AUROC (%)",
            caption=f"{over}; each seed draws its own classes and split. The best loss of each row is bold.",
        ),
        _by_set(
            comparison,
            settings.losses,
            "fpr95_ood_positive",
            lambda row: _values(row, best=min),
            title="FPR95 (%), lower is better",
            caption=f"{over}. OpenOOD's convention: the share of ID images rejected by the threshold that catches "
            "95 % of the OOD images.",
        ),
    ]
    others = tuple(loss for loss in settings.losses if loss != BASELINE)
    if BASELINE in settings.losses and others:
        paired = "Loss minus baseline with the same classes, split, first weights and batches"
        interval = "mean [95 % interval, Student's t], bold where it excludes 0" if several else "one seed, no interval"
        for metric, name, better, note, on_terminal in (
            ("auroc", "AUROC", 1, "", True),
            ("fpr95_ood_positive", "FPR95", -1, " Below 0 is better.", False),
        ):
            table = _by_set(
                comparison,
                others,
                metric,
                lambda row, better=better: tuple(_difference(summary, better) for summary in row),
                title=f"{name}: paired difference to {BASELINE} (percentage points)",
                caption=f"{paired}; {interval}.{note}",
            )
            result.append(replace(table, on_terminal=on_terminal))
    result.append(_calibration(comparison, over))
    for metric, title, best, what in (
        (
            "fpr95_id_positive",
            "FPR95 (%), ID positive, lower is better",
            min,
            "The other convention: the share of OOD images accepted by the threshold that keeps 95 % of the ID images.",
        ),
        ("aupr_in", "AUPR (%), ID positive", max, "Area under precision-recall; depends on how many images there are."),
        (
            "aupr_out",
            "AUPR (%), OOD positive",
            max,
            "Area under precision-recall; depends on how many images there are.",
        ),
    ):
        cells_of = functools.partial(_values, best=best)
        table = _by_set(comparison, settings.losses, metric, cells_of, title=title, caption=f"{over}. {what}")
        result.append(replace(table, on_terminal=False, folded=True))
    return result


def _by_set(
    comparison: Comparison,
    losses: tuple[str, ...],
    metric: str,
    cells_of: Callable[[list[PairedSummary]], tuple[Cell, ...]],
    title: str,
    caption: str,
) -> Table:
    """A section for each OOD set, a row for each detector, a column for each loss."""
    summaries = {(s.loss, s.detector, s.ood_set): s for s in comparison.summaries() if s.metric == metric}
    sections = tuple(
        Section(
            heading,
            tuple(
                (detectors.find(name).label, cells_of([summaries[loss, name, ood_set] for loss in losses]))
                for name in comparison.settings.detectors
            ),
        )
        for ood_set, heading in comparison.ood_titles.items()
    )
    return Table(title, caption, losses, sections)


def _calibration(comparison: Comparison, over: str) -> Table:
    """A row for each loss; the best of each column is bold."""
    losses = comparison.settings.losses
    summaries = {(s.metric, s.loss): s for s in comparison.summaries() if not s.detector}
    columns = {
        "accuracy": _values([summaries["accuracy", loss] for loss in losses], best=max),
        "ECE f": _values([summaries["ece_softmax", loss] for loss in losses], best=min),
        "ECE f/(τ‖f‖)": _values([summaries["ece_scaled_by_norm", loss] for loss in losses], best=min),
        "ECE f/D": _values([summaries["ece_scaled_by_distance", loss] for loss in losses], best=min),
    }
    rows = tuple(zip(losses, zip(*columns.values(), strict=True), strict=True))
    return Table(
        "Accuracy and expected calibration error (%)",
        f"{over}. ECE of the softmax of what the column names, 15 bins, on the ID test images; lower is better.",
        tuple(columns),
        (Section("", rows),),
    )


def _values(summaries: list[PairedSummary], best: Callable) -> tuple[Cell, ...]:
    """mean ± std in percent; the best mean, as printed, in bold (all of them when several print alike)."""
    means = [round(100 * summary.mean, 1) for summary in summaries]
    spreads = [f" ± {100 * summary.std:.1f}" if summary.n_seeds > 1 else "" for summary in summaries]
    return tuple(
        Cell(f"{mean:.1f}{spread}", bold=len(means) > 1 and mean == best(means))
        for mean, spread in zip(means, spreads, strict=True)
    )


def _difference(summary: PairedSummary, better: int) -> Cell:
    """mean [low, high] in percentage points, bold where 0 is outside. `better` is the sign of what is good."""
    text = f"{100 * summary.difference:+.1f}"
    if summary.low is None:
        return Cell(text)
    text += f" [{100 * summary.low:+.1f}, {100 * summary.high:+.1f}]"
    return Cell(text, bold=summary.low > 0 or summary.high < 0, worse=summary.difference * better < 0)


GAP = "  "  # between the columns on a terminal


def print_tables(comparison: Comparison) -> None:
    """The tables on standard output, with rich: colour and bold on a terminal, plain text with * elsewhere.

    Columns that find no room stand below the others, with the names repeated.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    marks = console.color_system is None  # no colour, then no bold either
    for table in build(comparison):
        if not table.on_terminal:
            continue
        console.print(Text(table.title, style="bold underline"))
        rows = [row for section in table.sections for row in section.rows]
        # All sections of a table in the same columns, so that they read as one.
        name_width = max(len(name) for name, _ in rows)
        widths = [
            max(len(column), *(len(cells[i].text) + marks for _, cells in rows))
            for i, column in enumerate(table.columns)
        ]
        for section in table.sections:
            if section.heading:
                console.print(Text(section.heading, style="italic"))
            for block in _blocks(widths, console.width - name_width):
                header = "".join(GAP + table.columns[i].rjust(widths[i] - marks) + " " * marks for i in block)
                lines = [Text(" " * name_width + header, style="dim")]
                for name, cells in section.rows:
                    line = Text(name.ljust(name_width))
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
    lines = [f"**{table.title}**", ""]
    lines.append("| | " + " | ".join(table.columns) + " |")
    lines.append("|---|" + "---:|" * len(table.columns))
    for section in table.sections:
        if section.heading:
            lines.append(f"| *{section.heading}* |" + " |" * len(table.columns))
        for name, cells in section.rows:
            texts = (f"**{cell.text}**" if cell.bold else cell.text for cell in cells)
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", table.caption, ""])


def as_html(table: Table) -> str:
    def cell_html(cell: Cell) -> str:
        mark = (" class=worse" if cell.worse else " class=best") if cell.bold else ""
        return f"<td{mark}>{html.escape(cell.text)}</td>"

    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in table.columns)
    bodies = []
    for section in table.sections:
        rows = [
            f"<tr><th scope=row>{html.escape(name)}</th>{''.join(map(cell_html, cells))}</tr>"
            for name, cells in section.rows
        ]
        if section.heading:
            span = len(table.columns) + 1
            rows.insert(0, f"<tr class=section><th colspan={span}>{html.escape(section.heading)}</th></tr>")
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    title = html.escape(table.title)
    kind = " class=sortable" if table.sortable else ""
    content = (
        f"<div class=scroll tabindex=0><table{kind}><thead><tr><th>{html.escape(table.corner)}</th>{head}</tr></thead>"
        f"{''.join(bodies)}</table></div>"
        f"<p class=caption>{html.escape(table.caption)}</p>"
    )
    section = "<section class=full>" if _width(table) > HALF_PAGE else "<section>"
    if table.folded:
        return f"{section}<details><summary>{title}</summary>{content}</details></section>"
    return f"{section}<h2>{title}</h2>{content}</section>"


HALF_PAGE = 600  # CSS pixels: a wider table has the row of the page to itself
LETTER, PADDING = 7.4, 18  # of a column, as `pages.STYLE` shows it


def _width(table: Table) -> float:
    """About how wide the table is on a page, in CSS pixels."""
    rows = [row for section in table.sections for row in section.rows]
    mark = 2 if table.sortable else 0  # the arrow beside a header
    longest = [max(len(table.corner) + mark, *(len(name) for name, _ in rows), 0)]
    longest += [
        max(len(column) + mark, *(len(cells[i].text) for _, cells in rows), 0) for i, column in enumerate(table.columns)
    ]
    return sum(LETTER * letters + PADDING for letters in longest)
