"""What a comparison looks like: tables (terminal, Markdown, HTML), plots, and the folder that holds them.

A table is built once (`tables`) and rendered three times; a plot is drawn on paper for the PNG files, and once more for
dark screens in the HTML page.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import checks, detectors
from .compare import ROC_GRID, Comparison, Summary
from .evaluate import ID
from .recipes import BASELINE, LOSSES, TAU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "ood_fast compare 1"  # marks results.json, and so a folder that a new comparison may replace
FILES = ("histograms.png", "roc.png", "spectrum.png", "results.csv", "results.md", "report.html", "results.json")

CONVENTIONS = {
    "direction": "higher score = more in-distribution",
    "precision": "scores and metrics in float64, from the model's float32 features and logits",
    "std": "standard deviation over the seeds, ddof 0",
    "interval": "95 % interval of Student's t for the mean paired difference to ce over the seeds",
    "fpr95_ood_positive": "share of ID images rejected by the threshold that catches 95 % of the OOD images; OpenOOD's",
    "fpr95_id_positive": "share of OOD images accepted by the threshold that keeps 95 % of the ID images",
    "aupr_in": "area under precision-recall with ID positive, trapezoid over recall",
    "aupr_out": "area under precision-recall with OOD positive, trapezoid over recall",
    "ece_softmax": "expected calibration error of softmax(f) on the ID test images, 15 equal bins (lo, hi]",
    "ece_scaled_by_norm": f"the same of softmax(f / (τ‖f‖)), τ = {TAU}",
    "ece_scaled_by_distance": "the same of softmax(f / D), D = mean distance to the decision boundaries",
    "singular_value_i": "of the centred training features / √n, largest first",
}


# ---- tables


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


def tables(comparison: Comparison) -> list[Table]:
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
    for table in tables(comparison):
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


# ---- plots


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    grid: str
    losses: tuple[str, ...]  # one colour a loss, in order
    sets: tuple[str, ...]  # ID, then the OOD sets


# Okabe and Ito's palette, which stays apart for colour-blind eyes; lighter on dark paper.
LIGHT = Theme(
    "#ffffff",
    "#222222",
    "#dddddd",
    ("#7a7a7a", "#e08e00", "#0072b2", "#009e73"),
    ("#0072b2", "#e69f00", "#d55e00", "#9467bd"),
)
DARK = Theme(
    "#16191d",
    "#d6d9dd",
    "#3a3f46",
    ("#a8a8a8", "#f5b335", "#56b4e9", "#3ccb9f"),
    ("#56b4e9", "#f0c04f", "#ff7f50", "#c5a3ff"),
)


def plots(comparison: Comparison, theme: Theme) -> dict[str, Figure]:
    """The figures of a comparison by file name."""
    return {
        "histograms.png": _histograms(comparison, theme),
        "roc.png": _roc(comparison, theme),
        "spectrum.png": _spectrum(comparison, theme),
    }


SPECTRUM_FLOOR = 1e-6
PLOT_TITLES = {
    "histograms.png": "Scores",
    "roc.png": "ROC curves",
    "spectrum.png": "Singular values of the features",
}
WIDE_PLOTS = ("histograms.png", "roc.png")  # not shrunk below what can be read; they scroll on a phone


def plot_captions(comparison: Comparison) -> dict[str, str]:
    seeds = comparison.settings.seeds
    over = f"mean over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return {
        "histograms.png": f"Share of the images by score, seed {seeds[0]}; right = more in-distribution. The height "
        "grows with the square root of the share, so that small shares show; the outermost 1 % of the scores on each "
        "side are in the first and last bin.",
        "roc.png": "OOD is the positive class: share of OOD images caught (upwards) against share of ID images "
        f"rejected, {over}.",
        "spectrum.png": f"σ of the centred training features, relative to the largest, {over}; values below "
        f"{SPECTRUM_FLOOR:g} are drawn there. A spectrum that falls early: features on few directions.",
    }


def _histograms(comparison: Comparison, theme: Theme) -> Figure:
    names, losses = comparison.settings.detectors, comparison.settings.losses
    figure, axes = _grid(len(losses), len(names), theme, width=2.1, height=1.7)
    titles = {ID: "ID test images", **comparison.ood_titles}
    for row, loss in enumerate(losses):
        for column, name in enumerate(names):
            axis = axes[row, column]
            scores = comparison.scores[loss][name]
            low, high = np.quantile(np.concatenate(list(scores.values())), (0.01, 0.99))
            if high <= low:
                low, high = low - 0.5, high + 0.5
            edges = np.linspace(low, high, 31)
            for (set_name, title), color in zip(titles.items(), theme.sets, strict=False):
                values = scores[set_name]
                share = np.histogram(np.clip(values, low, high), edges)[0] / len(values)
                axis.stairs(share, edges, color=color, alpha=0.25, fill=True)
                axis.stairs(share, edges, color=color, linewidth=1.2, label=title)
            axis.set_yscale("function", functions=(np.sqrt, np.square))
            axis.set_yticks([])
            axis.locator_params(axis="x", nbins=3)
            if row == 0:
                axis.set_title(detectors.find(name).label, fontsize=10, color=theme.ink)
            if column == 0:
                axis.set_ylabel(loss, fontsize=10, color=theme.ink)
    _legend(figure, axes[0, 0], theme)
    return figure


def _roc(comparison: Comparison, theme: Theme) -> Figure:
    names, n_sets = comparison.settings.detectors, len(comparison.ood_titles)
    figure, axes = _grid(n_sets, len(names), theme, width=2.1, height=2.1)
    for row, (ood_set, heading) in enumerate(comparison.ood_titles.items()):
        for column, name in enumerate(names):
            axis = axes[row, column]
            axis.plot([0, 1], [0, 1], color=theme.grid, linewidth=1, linestyle=":")
            for loss, color in zip(comparison.settings.losses, theme.losses, strict=False):
                curve = np.mean(comparison.roc_curves[loss, name, ood_set], axis=0)
                axis.plot(ROC_GRID, curve, color=color, linewidth=1.5, label=loss, drawstyle="steps-post")
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axis.set_aspect("equal")
            axis.tick_params(labelbottom=row == n_sets - 1, labelleft=column == 0)
            if row == 0:
                axis.set_title(detectors.find(name).label, fontsize=10, color=theme.ink)
            if column == 0:
                axis.set_ylabel(heading.replace(": ", "\n"), fontsize=9, color=theme.ink)
    figure.supxlabel("share of ID images rejected", fontsize=9, color=theme.ink)
    _legend(figure, axes[0, 0], theme)
    return figure


def _spectrum(comparison: Comparison, theme: Theme) -> Figure:
    figure, axes = _grid(1, 1, theme, width=6.4, height=3.6)
    axis = axes[0, 0]
    for loss, color in zip(comparison.settings.losses, theme.losses, strict=False):
        relative = [values / max(values[0], np.finfo(float).tiny) for values in comparison.singular_values[loss]]
        shown = np.clip(np.mean(relative, axis=0), SPECTRUM_FLOOR, None)
        axis.semilogy(np.arange(1, len(shown) + 1), shown, color=color, linewidth=1.8, label=loss)
    axis.set_xlabel("index", color=theme.ink)
    axis.set_ylabel("σ / largest σ", color=theme.ink)
    axis.grid(color=theme.grid, linewidth=0.5)
    _legend(figure, axis, theme)
    return figure


def _grid(rows: int, columns: int, theme: Theme, width: float, height: float) -> tuple[Figure, np.ndarray]:
    # Figure, not pyplot: no global state, no window system, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(width * columns, 4.0), height * rows + 0.6), layout="constrained", facecolor=theme.paper
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_facecolor(theme.paper)
        axis.tick_params(colors=theme.ink, labelsize=7, length=2)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.grid)
    return figure, axes


def _legend(figure: Figure, axis, theme: Theme) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, labelcolor=theme.ink, fontsize=9
    )


def _png(figure: Figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


# ---- files


def results_dict(comparison: Comparison, context: dict) -> dict:
    """Everything of results.json. `context` says how the comparison was run (command, versions, machine, times)."""
    return {
        "format": FORMAT,
        **context,
        "settings": comparison.settings.as_dict(),
        "conventions": CONVENTIONS,
        "losses": {loss: LOSSES[loss] for loss in comparison.settings.losses},
        "ood_sets": comparison.ood_titles,
        "results": [asdict(row) for row in comparison.rows],
        "summary": [asdict(summary) for summary in comparison.summaries()],
        "runs": [asdict(run) for run in comparison.runs],
    }


def write(folder: Path, comparison: Comparison, context: dict) -> None:
    """Write all of `FILES` into `folder`, replacing what an earlier comparison left there.

    Everything is written to a temporary folder inside it first and moved when complete.
    """
    light = {name: _png(figure) for name, figure in plots(comparison, LIGHT).items()}
    dark = {name: _png(figure) for name, figure in plots(comparison, DARK).items()}
    all_tables = tables(comparison)
    with _staged(folder) as staging:
        for name, png in light.items():
            (staging / name).write_bytes(png)
        with (staging / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("loss", "seed", "detector", "ood_set", "metric", "value"))
            writer.writeheader()
            writer.writerows(asdict(row) for row in comparison.rows)
        (staging / "results.md").write_text("\n".join(map(as_markdown, all_tables)), encoding="utf-8")
        page = _page(comparison, context, all_tables, light, dark)
        (staging / "report.html").write_text(page, encoding="utf-8")
        results = results_dict(comparison, context)
        (staging / "results.json").write_text(
            json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
        )


def check_folder(path: str | Path) -> Path:
    """The folder `path` if a comparison can be written there; `UserError` if not. Leaves nothing behind.

    It may be missing, empty, or hold an earlier comparison. Tried out, because permissions do not tell about read-only
    and virtual file systems.
    """
    folder = checks.writable_folder("--out", path)
    foreign = [entry.name for entry in folder.iterdir() if entry.name not in FILES] if folder.is_dir() else []
    if foreign and not _holds_comparison(folder):
        raise checks.UserError(
            f"--out: {folder} is not empty and holds no earlier comparison (found {foreign[0]}); choose another folder"
        )
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise checks.UserError(f"--out: cannot write to {folder}: {error.strerror}") from error
    finally:
        for parent in missing:
            if parent.is_dir():
                parent.rmdir()
    return folder


def _holds_comparison(folder: Path) -> bool:
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`. At the end its files are moved up; after an error everything is undone."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging)
        for parent in missing:
            parent.rmdir()
        raise
    with _interrupts_wait():
        for name in FILES:  # results.json, which vouches for the others, comes last
            (staging / name).replace(folder / name)
        staging.rmdir()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread may set handlers, and gets them
        yield
        return
    arrived = []
    before = signal.signal(signal.SIGINT, lambda *_: arrived.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #222222; --soft: #666b72; --line: #dcdfe3;
  --best: #0a7d55; --worse: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #d6d9dd; --soft: #9aa1a9; --line: #3a3f46;
    --best: #4fd1a1; --worse: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .92rem; }
th, td { padding: .22rem .7rem; text-align: right; } th { font-weight: 500; text-align: left; }
thead th { text-align: right; border-bottom: 2px solid var(--line); color: var(--soft); }
tbody tr + tr:not(.section) > * { border-top: 1px solid var(--line); }
th[scope=row] { position: sticky; left: 0; background: var(--paper); }
.section th { padding-top: .9rem; font-style: italic; color: var(--soft); }
.best, .worse { font-weight: 700; color: var(--best); } .worse { color: var(--worse); }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 38rem), 1fr)); gap: 0 2.5rem; }
section { min-width: 0; }
.caption, .lead { color: var(--soft); font-size: .9rem; max-width: 60rem; margin: .4rem 0 0; }
img { display: block; max-width: none; height: auto; } .wide img { min-width: 60rem; width: 100%; }
code, pre { font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; padding: .7rem 1rem; border: 1px solid var(--line); border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def _page(
    comparison: Comparison, context: dict, all_tables: list[Table], light: dict[str, bytes], dark: dict[str, bytes]
) -> str:
    """The self-contained report: no script, no request, images inside."""
    settings = comparison.settings
    captions = plot_captions(comparison)
    figures = "".join(
        f"<section><h2>{html.escape(title)}</h2>"
        f"<div class='scroll{' wide' if name in WIDE_PLOTS else ''}'><picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{_data_uri(dark[name])}'>"
        f"<img src='{_data_uri(light[name])}' alt='{html.escape(title)}'></picture></div>"
        f"<p class=caption>{html.escape(captions[name])}</p></section>"
        for name, title in PLOT_TITLES.items()
    )
    recipe = settings.recipe
    classes = {run.seed: " ".join(run.class_names) for run in comparison.runs}
    facts = {
        "data": f"{settings.data}; ID classes by seed: "
        + "; ".join(f"{seed}: {names}" for seed, names in classes.items()),
        **{f"loss {loss}": LOSSES[loss] for loss in settings.losses},
        "training": f"{recipe.epochs} epochs, batch {recipe.batch_size}, SGD with Nesterov momentum {recipe.momentum}, "
        f"weight decay {recipe.weight_decay}, learning rate {recipe.learning_rate} to {recipe.final_learning_rate} by "
        "cosine",
        "detectors": ", ".join(_detector_text(name, given) for name, given in settings.as_dict()["detectors"].items()),
        "versions": ", ".join(f"{package} {version}" for package, version in context["versions"].items()),
        "machine": ", ".join(f"{key} {value}" for key, value in context["machine"].items()),
        "run": f"{context['started']}, {context['seconds']:.0f} s, device {settings.device}",
        **CONVENTIONS,
    }
    listed = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>ood_fast compare: {html.escape(settings.data)}</title><style>{STYLE}</style></head><body>
<h1>Training losses × detectors on {html.escape(settings.data)}</h1>
<p class=lead>{len(settings.losses)} losses, {len(settings.detectors)} detectors, seeds {
        ", ".join(map(str, settings.seeds))
    }. Every number is in results.csv and results.json beside this page.</p>
<pre>{html.escape(context["command"])}</pre> <div class=tables>{"".join(map(as_html, all_tables))}</div> {
        figures
    } <section><h2>How it was
run</h2><dl>{listed}</dl></section> </body></html>
"""


def _detector_text(name: str, parameters: dict) -> str:
    texts = [f"{key} = {value}" for key, value in parameters.items()]
    if name == "NCI":
        texts.append("α chosen on ID validation images against their pixel-scrambled copies")
    return f"{name} ({'; '.join(texts)})" if texts else name


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
