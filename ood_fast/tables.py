"""The tables of a comparison. Each is built once (`build`) and rendered for terminals, Markdown and HTML."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import detectors
from .compare import Comparison, Summary
from .recipes import BASELINE


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


def build(comparison: Comparison) -> list[Table]:
    """The tables of a comparison: AUROC, FPR95, differences to the baseline, accuracy and calibration."""
    settings = comparison.settings
    several = len(settings.seeds) > 1
    over = f"Mean ± std over {len(settings.seeds)} seeds" if several else "One seed"
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
    return result


def _by_set(
    comparison: Comparison,
    losses: tuple[str, ...],
    metric: str,
    cells_of: Callable[[list[Summary]], tuple[Cell, ...]],
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


def _values(summaries: list[Summary], best: Callable) -> tuple[Cell, ...]:
    """mean ± std in percent; the best mean, as printed, in bold (all of them when several print alike)."""
    means = [round(100 * summary.mean, 1) for summary in summaries]
    spreads = [f" ± {100 * summary.std:.1f}" if summary.n_seeds > 1 else "" for summary in summaries]
    return tuple(
        Cell(f"{mean:.1f}{spread}", bold=len(means) > 1 and mean == best(means))
        for mean, spread in zip(means, spreads, strict=True)
    )


def _difference(summary: Summary, better: int) -> Cell:
    """mean [low, high] in percentage points, bold where 0 is outside. `better` is the sign of what is good."""
    text = f"{100 * summary.difference:+.1f}"
    if summary.low is None:
        return Cell(text)
    text += f" [{100 * summary.low:+.1f}, {100 * summary.high:+.1f}]"
    return Cell(text, bold=summary.low > 0 or summary.high < 0, worse=summary.difference * better < 0)


def print_tables(comparison: Comparison) -> None:
    """The tables on standard output, with rich: colour and bold on a terminal, plain text elsewhere."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    for table in build(comparison):
        if not table.on_terminal:
            continue
        rows = [row for section in table.sections for row in section.rows]
        # All sections of a table in the same columns, so that they read as one; headings may be wider than a column.
        name_width = max(len(name) for name, _ in rows)
        widths = [max(len(cells[i].text) for _, cells in rows) for i in range(len(table.columns))]
        console.print(Text(table.title, style="bold underline"))
        for section in table.sections:
            if section.heading:
                console.print(Text(section.heading, style="italic"))
            grid = RichTable(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
            grid.add_column("", min_width=name_width, no_wrap=True)
            for column, width in zip(table.columns, widths, strict=True):
                grid.add_column(Text(column), justify="right", min_width=min(width, 12))
            for name, cells in section.rows:
                grid.add_row(name, *(Text(cell.text, style=_style(cell)) for cell in cells))
            console.print(grid)
            console.print()
        console.print(Text(table.caption, style="dim"))
        console.print()


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
    body = []
    for section in table.sections:
        if section.heading:
            span = len(table.columns) + 1
            body.append(f"<tr class=section><th colspan={span}>{html.escape(section.heading)}</th></tr>")
        for name, cells in section.rows:
            body.append(f"<tr><th scope=row>{html.escape(name)}</th>{''.join(map(cell_html, cells))}</tr>")
    return (
        f"<section><h2>{html.escape(table.title)}</h2>"
        f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<p class=caption>{html.escape(table.caption)}</p></section>"
    )
