"""The folder that a comparison leaves behind: every number, the plots, and one self-contained page."""

from __future__ import annotations

import base64
import csv
import functools
import html
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import checks, detectors, plots
from ..recipes import BASELINE, LOSSES, TAU
from . import pages
from .tables import Cell, Section, Table, as_html, as_markdown

if TYPE_CHECKING:
    from ..compare import Comparison, PairedSummary

FORMAT = "ood_fast compare 1"  # marks results.json, and so a folder that a new comparison may replace
FILES = ("histograms.png", "roc.png", "spectrum.png", "results.csv", "results.md", "report.html", "results.json")

CONVENTIONS = {
    "direction": "higher score = more in-distribution",
    "precision": "scores and metrics in float64, from the model's float32 features and logits",
    "std": "sample standard deviation over the seeds, ddof 1",
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
    light = {name: plots.as_png(figure) for name, figure in plots.draw(comparison, plots.LIGHT).items()}
    dark = {name: plots.as_png(figure) for name, figure in plots.draw(comparison, plots.DARK).items()}
    all_tables = tables_of(comparison)
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
    if not str(path):
        raise checks.UserError("--out: got '', expected a folder")
    try:
        return _tried_out(path)
    except OSError as error:
        raise checks.UserError(f"--out: cannot write to {path}: {error.strerror}") from error
    except RuntimeError as error:  # ~ of an unknown user
        raise checks.UserError(f"--out: got {str(path)!r}: {error}") from error


def _tried_out(path: str | Path) -> Path:
    folder = checks.writable_folder("--out", path)
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if found and not holds_comparison(folder):
        raise checks.UserError(
            f"--out: {folder} is not empty and holds no earlier comparison (found {found[0]}); choose another folder"
        )
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    finally:
        for parent in missing:
            if os.path.isdir(parent):  # unlike Path.is_dir, False for a name that is too long
                parent.rmdir()
    return folder


def holds_comparison(folder: Path) -> bool:
    """Whether `write` wrote it."""
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


# ---- tables


def tables_of(comparison: Comparison) -> list[Table]:
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


# ---- the page


def _page(
    comparison: Comparison,
    context: dict,
    all_tables: list[Table],
    light: dict[str, bytes],
    dark: dict[str, bytes],
) -> str:
    """The self-contained report: no script, no request, images inside."""
    settings = comparison.settings
    captions = plots.captions(comparison)
    figures = "".join(
        f"<section><h2>{html.escape(title)}</h2>"
        f"<div class='scroll{' wide' if name in plots.WIDE else ''}' tabindex=0><picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{_data_uri(dark[name])}'>"
        f"<img src='{_data_uri(light[name])}' alt='{html.escape(title)}'></picture></div>"
        f"<p class=caption>{html.escape(captions[name])}</p></section>"
        for name, title in plots.TITLES.items()
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
        "machine": ", ".join(context["machine"].values()),
        "run": f"{context['started']}, {context['seconds']:.0f} s, device {settings.device}",
        **CONVENTIONS,
    }
    seeds = ", ".join(map(str, settings.seeds))
    body = f"""<h1>Training losses × detectors on {html.escape(settings.data)}</h1>
<p class=lead>{len(settings.losses)} losses, {len(settings.detectors)} detectors, seeds {seeds}. Every number is in
results.csv and results.json beside this page.</p>
<pre>{html.escape(context["command"])}</pre>
<div class=tables>{"".join(map(as_html, all_tables))}</div> {figures}
<section><h2>How it was run</h2>{pages.definitions(facts)}</section>"""
    return pages.document(f"ood_fast compare: {settings.data}", body)


def _detector_text(name: str, parameters: dict) -> str:
    texts = [f"{key} = {value}" for key, value in parameters.items()]
    if name == "NCI":
        texts.append("α chosen on ID validation images against their pixel-scrambled copies")
    return f"{name} ({'; '.join(texts)})" if texts else name


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
