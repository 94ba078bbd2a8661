"""The folder that a comparison leaves behind: every number, the plots, and one self-contained page."""

from __future__ import annotations

import functools
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import checks, detectors, files
from ..evaluation.results import ID
from ..evaluation.write import CALIBRATION, calibration_table, holds, write_csv
from ..evaluation.write import CONVENTIONS as OF_EVALUATION
from ..recipes import BASELINE, LOSSES
from . import charts, pages
from .charts import Chart, Series
from .tables import Cell, Section, Table, as_markdown, as_page

if TYPE_CHECKING:
    from ..compare import Comparison, PairedSummary

FORMAT = "ood_fast compare 1"  # marks results.json, and so a folder that a new comparison may replace
FILES = ("histograms.svg", "roc.svg", "spectrum.svg", "results.csv", "results.md", "report.html", "results.json")
FORMER = ("histograms.png", "roc.png", "spectrum.png")  # what comparisons once wrote: of another one than this, so gone

CONVENTIONS = {
    **{name: text for name, text in OF_EVALUATION.items() if name not in ("unit", "nearood, farood")},
    "std": "sample standard deviation over the seeds, ddof 1",
    "interval": "95 % interval of Student's t for the mean paired difference to ce over the seeds",
    "singular_value_i": "of the centred training features / √n, largest first",
}


# ---- the folder


def results_dict(comparison: Comparison, context: Mapping[str, Any]) -> dict[str, Any]:
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


def write(folder: str | os.PathLike, comparison: Comparison, context: Mapping[str, Any]) -> None:
    """Write all of `FILES` into `folder`, in place of what an earlier comparison left there, when all are complete."""
    tables, plots = tables_of(comparison), plots_of(comparison)
    with files.staged(folder) as staging:
        for plot in plots:
            (staging / plot.file).write_text(charts.as_file(plot.svg), encoding="utf-8")
        write_csv(staging / "results.csv", map(asdict, comparison.rows))
        (staging / "results.md").write_text("\n".join(map(as_markdown, tables)), encoding="utf-8")
        (staging / "report.html").write_text(_page(comparison, context, tables, plots), encoding="utf-8")
        text = json.dumps(results_dict(comparison, context), indent=1, ensure_ascii=False, allow_nan=False)
        (staging / "results.json").write_text(text, encoding="utf-8")  # vouches for the others: last
    for name in FORMER:
        (Path(folder) / name).unlink(missing_ok=True)


class _TriedError(Exception):
    """Undoes what `files.staged` has made."""


def free_folder(path: str | os.PathLike) -> Path:
    """The folder `path` if a comparison can be written there; `UserError` if not. Leaves nothing behind.

    It may be missing, empty, or hold an earlier comparison. Tried out, because permissions do not tell about read-only
    and virtual file systems.
    """
    if not str(path):
        raise checks.UserError("--out: got '', expected a folder")
    try:
        folder = checks.writable_folder("--out", path)
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        if found and not holds_comparison(folder):
            told = f"is not empty and holds no earlier comparison (found {found[0]}); choose another folder"
            raise checks.UserError(f"--out: {folder} {told}")
        with suppress(_TriedError), files.staged(folder):
            raise _TriedError
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise checks.UserError(f"--out: cannot write to {path}: {reason}") from error
    except RuntimeError as error:  # ~ of an unknown user
        raise checks.UserError(f"--out: got {str(path)!r}: {error}") from error
    return folder


def holds_comparison(folder: Path) -> bool:
    """Whether `write` wrote it."""
    return holds(folder, FORMAT)


# ---- tables


def tables_of(comparison: Comparison) -> list[Table]:
    """The tables of a comparison: AUROC, FPR95, differences to the baseline, accuracy and calibration; then, folded and
    not on terminals, FPR95 in the other convention and AUPR in both.
    """
    settings, summaries = comparison.settings, comparison.summaries()
    several = len(settings.seeds) > 1
    over = f"Mean ± sample standard deviation over {len(settings.seeds)} seeds" if several else "One seed"
    highest, lowest = functools.partial(_values, best=max), functools.partial(_values, best=min)
    others = tuple(loss for loss in settings.losses if loss != BASELINE)

    def by_set(metric: str, cells: Callable, title: str, caption: str, losses: tuple = settings.losses) -> Table:
        """A section for each OOD set, a row for each detector, a column for each loss."""
        found = {(s.loss, s.detector, s.ood_set): s for s in summaries if s.metric == metric}

        def row(name: str, ood_set: str) -> tuple[str, tuple[Cell, ...]]:
            return detectors.find(name).label, cells([found[loss, name, ood_set] for loss in losses])

        sections = (
            Section(heading, tuple(row(name, ood_set) for name in settings.detectors))
            for ood_set, heading in comparison.ood_titles.items()
        )
        return Table(title, caption, losses, tuple(sections))

    caught = "the share of ID images rejected by the threshold that catches 95 % of the OOD images."
    kept = "the share of OOD images accepted by the threshold that keeps 95 % of the ID images."
    each = "each seed draws its own classes and split. The best loss of each row is bold."
    fpr95, openood = "FPR95 (%), lower is better", f"{over}. OpenOOD's convention: {caught}"
    result = [
        by_set("auroc", highest, "AUROC (%)", f"{over}; {each}"),
        by_set("fpr95_ood_positive", lowest, fpr95, openood),
    ]
    if BASELINE in settings.losses and others:
        rises, falls = (
            lambda row, better=better: tuple(_difference(summary, better) for summary in row) for better in (1, -1)
        )
        interval = "mean [95 % interval, Student's t], bold where it excludes 0" if several else "one seed, no interval"
        paired = f"Loss minus baseline with the same classes, split, first weights and batches; {interval}."
        title = f": paired difference to {BASELINE} (percentage points)"
        lower = by_set("fpr95_ood_positive", falls, f"FPR95{title}", f"{paired} Below 0 is better.", others)
        result += [by_set("auroc", rises, f"AUROC{title}", paired, others), replace(lower, on_terminal=False)]
    result.append(_calibration(settings.losses, summaries, over))
    area = f"{over}. Area under precision-recall; depends on how many images there are."
    other = "FPR95 (%), ID positive, lower is better"
    folded = (
        by_set("fpr95_id_positive", lowest, other, f"{over}. The other convention: {kept}"),
        by_set("aupr_in", highest, "AUPR (%), ID positive", area),
        by_set("aupr_out", highest, "AUPR (%), OOD positive", area),
    )
    return [*result, *(replace(table, on_terminal=False, folded=True) for table in folded)]


def _calibration(losses: tuple[str, ...], summaries: list[PairedSummary], over: str) -> Table:
    """A row for each loss; the best of each column is bold."""
    found = {(s.metric, s.loss): s for s in summaries if not s.detector}
    best = {"accuracy": max}
    cells = (_values([found[name, loss] for loss in losses], best.get(name, min)) for name in CALIBRATION)
    return calibration_table(over, CALIBRATION.values(), zip(losses, zip(*cells, strict=True), strict=True))


def _values(summaries: list[PairedSummary], best: Callable[[list[float]], float]) -> tuple[Cell, ...]:
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


# ---- plots

LOSS_COLORS = (5, 1, 0, 2)  # of the losses in their order; the baseline is grey
SET_COLORS = (0, 1, 3, 4)  # of ID and the OOD sets
SPECTRUM_FLOOR = 1e-6


class Plot(NamedTuple):
    """One file of the folder, and its section of the page."""

    file: str
    title: str
    caption: str
    svg: str


def plots_of(comparison: Comparison) -> list[Plot]:
    """The plots of a comparison: scores, ROC curves, spectra."""
    losses, names, seeds = comparison.settings.losses, comparison.settings.detectors, comparison.settings.seeds
    labels = {name: detectors.find(name).label for name in names}
    over = f"mean over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    scores = {loss: [_histogram(comparison, loss, name, labels[name]) for name in names] for loss in losses}
    curves = {
        heading: [_roc(comparison, name, ood_set, labels[name]) for name in names]
        for ood_set, heading in comparison.ood_titles.items()
    }
    sheets = (
        (
            *("Scores", "histograms.svg", {"rows": scores}),
            f"Share of the images by score, seed {seeds[0]}; right = more in-distribution. The height grows with the "
            "square root of the share, so that small shares show; the outermost 1 % of the scores on each side are in "
            "the first and last bin.",
        ),
        (
            *("ROC curves", "roc.svg", {"rows": curves, "x_label": "share of ID images rejected"}),
            "OOD is the positive class: share of OOD images caught (upwards) against share of ID images rejected, "
            f"{over}.",
        ),
        (
            *("Singular values of the features", "spectrum.svg", {"rows": {"": [_spectrum(comparison)]}}),
            f"σ of the centred training features, relative to the largest, {over}; values below {SPECTRUM_FLOOR:g} are "
            "drawn there. A spectrum that falls early: features on few directions.",
        ),
    )
    return [Plot(file, title, caption, charts.sheet(title, **drawn)) for title, file, drawn, caption in sheets]


def _color(colors: Sequence[int], index: int) -> int:
    """Of the series at `index`; where they do not suffice they come again, dashed."""
    return colors[index % len(colors)] + charts.COLORS * (index // len(colors))


def _histogram(comparison: Comparison, loss: str, detector: str, label: str) -> Chart:
    titles = {ID: "ID test images", **comparison.ood_titles}
    scores = {title: np.asarray(comparison.scores[loss][detector][name]) for name, title in titles.items()}
    chart = charts.histogram(label, "", scores, "", bins=30, beyond=0.01)
    roots = [
        replace(series, ys=np.sqrt(series.ys).tolist(), color=_color(SET_COLORS, index))
        for index, series in enumerate(chart.series)
    ]
    return replace(chart, y_label="", series=roots, y_range=(0.0, 1.05 * max(max(s.ys) for s in roots)), y_ticks=False)


def _roc(comparison: Comparison, detector: str, ood_set: str, label: str) -> Chart:
    series = []
    for index, loss in enumerate(comparison.settings.losses):
        curve = np.mean(comparison.roc_curves[loss, detector, ood_set], axis=0)
        grid = np.linspace(0.0, 1.0, len(curve)).tolist()
        series.append(Series(loss, grid, curve.tolist(), color=_color(LOSS_COLORS, index)))
    diagonal = [(0.0, 0.0), (1.0, 1.0)]
    return Chart(label, "", "", series, x_range=(0.0, 1.0), y_range=(0.0, 1.0), guides=[diagonal])


def _spectrum(comparison: Comparison) -> Chart:
    series = []
    for index, loss in enumerate(comparison.settings.losses):
        relative = [values / max(values[0], np.finfo(float).tiny) for values in comparison.singular_values[loss]]
        shown = np.clip(np.mean(relative, axis=0), SPECTRUM_FLOOR, None)
        series.append(Series(loss, list(range(1, len(shown) + 1)), shown.tolist(), color=_color(LOSS_COLORS, index)))
    return Chart("", "index", "σ / largest σ", series, y_log=True)


# ---- the page


def _page(comparison: Comparison, context: Mapping[str, Any], tables: list[Table], plots: list[Plot]) -> str:
    """The self-contained report: no script, no request."""
    settings, recipe = comparison.settings, comparison.settings.recipe
    figures = "".join(
        f"<section><h2>{html.escape(plot.title)}</h2><div class=scroll tabindex=0>{plot.svg}</div>"
        f"<p class=caption>{html.escape(plot.caption)}</p></section>"
        for plot in plots
    )
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
        "machine": ", ".join(context["machine"].values()),
        "run": f"{context['started']}, {context['seconds']:.0f} s, device {settings.device}",
        **CONVENTIONS,
    }
    seeds = ", ".join(map(str, settings.seeds))
    body = f"""<h1>Training losses × detectors on {html.escape(settings.data)}</h1>
<p class=lead>{len(settings.losses)} losses, {len(settings.detectors)} detectors, seeds {seeds}. Every number is in
results.csv and results.json beside this page.</p>
<pre>{html.escape(context["command"])}</pre>
{as_page(tables)} {figures}
<section><h2>How it was run</h2>{pages.definitions(facts)}</section>"""
    return pages.document(f"ood_fast compare: {settings.data}", body)


def _detector_text(name: str, parameters: Mapping[str, Any]) -> str:
    texts = [f"{key} = {value}" for key, value in parameters.items()]
    if name == "NCI":
        texts.append("α chosen on ID validation images against their pixel-scrambled copies")
    return f"{name} ({'; '.join(texts)})" if texts else name
