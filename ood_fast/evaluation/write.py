"""The folder that an evaluation leaves behind, and its tables.

results.json         everything but the scores: numbers, intervals, published numbers, settings, trials, notes
results.csv          one number of one run a line; summary.csv: one of a method, over its runs
results.md           the tables
openood/KNN.csv      OpenOOD's form and names (knn.csv, ebo.csv, ...), in a folder for each method if there are several
scores/<run>/X.npz   the scores of detector X, an array for each set, "id" the in-distribution test images
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks, files, recipes, spreadsheet
from ..detectors.fitting import Note
from ..detectors.registry import label_of
from ..intact import read_json, read_npz
from ..registry import added
from ..report.tables import Cell, Column, Table, as_markdown, percent, show
from .results import ECE, FULL_SPECTRUM, GROUPS, Measurement, Results, RunResult, Summary
from .verdict import compared, full_spectrum, means_of, over_seeds, ranking, title, verdict

FORMAT = "ood_fast evaluate 1"
JSON = "results.json"
FILES = ("results.csv", "summary.csv", "results.md", "openood", "scores", JSON)

CONVENTIONS = {
    "direction": "higher score = more in-distribution",
    "precision": "scores and metrics in float64, from the model's float32 features and logits",
    "unit": "0 to 1 in CSV and JSON, percent in tables",
    "std": "sample standard deviation over the runs of a method, ddof 1; in openood/ ddof 0, as there",
    "interval": "95 %, percentile bootstrap: test images drawn anew, ID and each OOD set apart; the mean of these runs",
    "nearood, farood": "unweighted means over the sets of the group",
    "fsood_*": "the same with the covariate-shifted ID sets (group csid) beside the ID test images, as OpenOOD's fsood",
    "fpr95_ood_positive": "share of ID images rejected by the threshold that catches 95 % of the OOD images; OpenOOD's",
    "fpr95_id_positive": "share of OOD images accepted by the threshold that keeps 95 % of the ID images",
    "aupr_in": "area under precision-recall with ID positive, trapezoid over recall",
    "aupr_out": "area under precision-recall with OOD positive, trapezoid over recall",
    "ece_softmax": "expected calibration error of softmax(f) on the ID test images, 15 equal bins (lo, hi]",
    "ece_scaled_by_norm": f"the same of softmax(f / (τ‖f‖)), τ = {recipes.TAU}",
    "ece_scaled_by_distance": "the same of softmax(f / D), D = mean distance to the decision boundaries",
}

# What commands add, where nobody did
CONTEXT: dict[str, Any] = {"command": "ood-fast evaluate", "started": "", "seconds": 0.0}
CONTEXT |= {"versions": {}, "machine": {}, "conventions": {}}

# What the columns of accuracy and calibration are called.
CALIBRATION = dict(zip(("accuracy", *ECE), ("accuracy", "ECE f", "ECE f/(τ‖f‖)", "ECE f/D"), strict=True))

# How OpenOOD calls the detectors in its file names; others by their own name in lower case.
OPENOOD_NAMES = {"MaxLogit": "mls", "Energy": "ebo", "KLMatching": "klm", "Mahalanobis": "mds"}
OPENOOD_COLUMNS = {"FPR@95": "fpr95_ood_positive", "AUROC": "auroc", "AUPR_IN": "aupr_in", "AUPR_OUT": "aupr_out"}
OPENOOD_COLUMNS |= {"ACC": "accuracy"}


# ---- files


def check_folder(path: str | os.PathLike, request: Mapping[str, Any] | None = None) -> Path:
    """The folder `path` if results can be written there; UserError if not. It may be missing, empty, or hold what an
    earlier evaluation wrote; other files in it are left alone.

    Args:
        request: what is asked for, as `write` keeps it in `context["request"]`; UserError if there are results of
            another one, which would be lost. None: they are replaced.
    """
    if not str(path):
        raise checks.UserError("--out: got '', expected a folder")
    folder = checks.writable_folder("--out", path)
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and not holds(folder):
        raise checks.UserError(f"--out: {folder} holds {taken[0]}, which no evaluation wrote; choose another folder")
    if request is not None and holds(folder) and (others := _differences(read(folder), request)):
        raise checks.UserError(
            f"{folder} holds results of another request ({others}), which these would replace; keep them with another "
            "folder, --out DIR, or replace them with --overwrite"
        )
    return folder


def _differences(held: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Where what is asked for differs from what is there; empty if it does not."""
    if "request" not in held:
        return "which it does not tell"
    there, here = ({**request["detectors"], **request["options"]} for request in (held["request"], request))
    told = {
        "only there": [name for name in there if name not in here],
        "only here": [name for name in here if name not in there],
        "set otherwise": [name for name in here if name in there and there[name] != here[name]],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in told.items()
        if names
    )


def holds(folder: Path, kind: str = FORMAT) -> bool:
    """Whether its results.json says that it is of this kind; it begins so even where the rest of it is damaged."""
    try:
        files.settle(folder)
        with open(folder / JSON, "rb") as file:
            return bool(re.match(rb'\s*\{\s*"format": "%b"' % re.escape(kind).encode(), file.read(200)))
    except OSError:
        return False


def write(folder: str | os.PathLike, results: Results, context: Mapping[str, Any]) -> None:
    """Write all of `FILES` into `folder`, in place of what an earlier evaluation left there.

    All of it or nothing, see `files.staged`. Of two evaluations that write into one folder, the second waits.
    """
    with files.staged(folder) as staging:
        spreadsheet.write(staging / "results.csv", _long(results))
        spreadsheet.write(staging / "summary.csv", map(_summary_row, results.summaries()))
        text = "\n\n".join([*verdict(results), *map(as_markdown, build(results))])
        (staging / "results.md").write_text(text, encoding="utf-8")
        _write_openood(staging / "openood", results)
        (staging / "scores").mkdir()
        for run, name in zip(results.runs, run_names(results), strict=True):
            (staging / "scores" / name).mkdir()
            for detector, scores in run.scores.items():
                np.savez(staging / "scores" / name / f"{detector}.npz", **scores)
        text = json.dumps(results_as_dict(results, context), indent=1, ensure_ascii=False, allow_nan=False)
        (staging / JSON).write_text(text, encoding="utf-8")


def read(folder: str | os.PathLike) -> dict[str, Any]:
    """results.json of a folder that `write` wrote; UserError if it is none, or damaged. See `Results.from_json`."""
    if not holds(Path(folder)):
        raise checks.UserError(f"{folder}: holds no evaluation; make one with: ood-fast evaluate")
    content = read_json(Path(folder) / JSON)
    content |= {name: value for name, value in CONTEXT.items() if name not in content}
    try:
        Results.from_json(content)
        for name, value in CONTEXT.items():
            if not isinstance(content[name], (int, float) if isinstance(value, float) else type(value)):
                raise ValueError(f"{name}: got {content[name]!r}")
    except ValueError as error:
        raise checks.UserError(f"{Path(folder) / JSON}: is damaged: {error}; --overwrite makes it anew") from error
    return content


def read_scores(folder: str | os.PathLike, run: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """detector -> set -> (n,), of one of the `runs` of `read(folder)`."""
    files = {name: Path(folder) / run["scores"] / f"{name}.npz" for name in run["detectors"]}
    return {name: read_npz(file) for name, file in files.items()}


def run_names(results: Results) -> list[str]:
    """A name for the scores of each run: the last part of its path, with a number where that is not enough."""
    names = [Path(run.trained.name).name.replace(":", "-") or "run" for run in results.runs]
    return [name if names.count(name) == 1 else f"{index}-{name}" for index, name in enumerate(names)]


def results_as_dict(results: Results, context: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of results.json. `context` says how it was run (command, versions, machine, times)."""
    return {
        "format": FORMAT,
        **context,
        "benchmark": results.benchmark,
        "tuned": results.tuned,
        "bootstrap": results.n_bootstrap,
        "conventions": CONVENTIONS,
        "sets": {name: asdict(part) for name, part in results.sets.items()},
        "runs": [_run_dict(run, name) for run, name in zip(results.runs, run_names(results), strict=True)],
        "summary": [_summary_row(summary) for summary in results.summaries()],
    }


def _run_dict(run: RunResult, name: str) -> dict[str, Any]:
    trained = run.trained
    return {
        "run": trained.name,
        "id": (trained.info or {}).get("id"),
        "folder": str(trained.folder.resolve()),
        "scores": f"scores/{name}",
        "method": trained.method,
        "seed": trained.seed,
        "epochs": (trained.info or {}).get("epochs"),
        "checkpoint": trained.checkpoint,
        "model": run.model_key,
        "recipe": None if trained.recipe is None else recipes.as_dict(trained.recipe),
        "images_per_second": run.images_per_second,
        "outputs": {name: str(held.path.resolve()) for name, held in run.outputs.items() if held.path is not None},
        "detectors": run.settings,
        "trials": run.trials,
        "notes": run.notes,
        "measurements": [asdict(number) for number in run.measurements],
    }


def _summary_row(summary: Summary) -> dict[str, Any]:
    return {**asdict(summary), "difference": summary.difference}


def _long(results: Results) -> Iterable[dict[str, Any]]:
    for run in results.runs:
        of_run = {"method": run.trained.method, "run": run.trained.name, "seed": run.trained.seed}
        names = [field.name for field in fields(Measurement)]
        for number in run.measurements:
            yield {**of_run, **{name: getattr(number, name) for name in names}}


def _write_openood(folder: Path, results: Results) -> None:
    """What OpenOOD's scripts save: a file for each detector, a row for each set and group, `mean ± std` in percent,
    the standard deviation as there, of the seeds themselves (`np.std`, ddof 0)."""
    methods = results.methods
    for index, (method, runs) in enumerate(methods.items()):
        inside = folder if len(methods) == 1 else folder / _file_name(method, index)
        inside.mkdir(parents=True)
        for detector in dict.fromkeys(name for run in runs for name in run.scores):
            scored = [run for run in runs if detector in run.scores]
            for place, prefix in ((inside, ""), (inside / "fsood", FULL_SPECTRUM))[: 2 if results.csid else 1]:
                place.mkdir(exist_ok=True)
                name = OPENOOD_NAMES.get(detector, detector.lower())
                with (place / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                    spreadsheet.write_rows(file, openood_rows(scored, detector, prefix))


def _file_name(method: str, index: int) -> str:
    safe = "".join(letter if letter.isalnum() or letter in "-_.=" else "_" for letter in method)
    return safe if safe == method else f"{index}-{safe}"


def openood_rows(runs: list[RunResult], detector: str, prefix: str = "") -> list[list[str]]:
    """OpenOOD's table of one detector over the seeds: a header and rows of text; `prefix` `FULL_SPECTRUM`: of fsood."""
    sets = runs[0].sets
    rows = [["", *OPENOOD_COLUMNS]]
    for group, mean_name in GROUPS.items():
        members = [name for name, part in sets.items() if part.group == group]
        for ood_set in [*members, mean_name] if members else ():
            cells = []
            for metric in OPENOOD_COLUMNS.values():
                where = () if metric == "accuracy" else (detector, ood_set)
                try:
                    values = [100 * run.value(prefix + metric, *where) for run in runs]
                except KeyError:  # stored features may lack targets, and so the accuracy
                    cells.append("")
                    continue
                cells.append(f"{np.mean(values):.2f} \u00b1 {np.std(values):.2f}")
            rows.append([ood_set, *cells])
    return rows


# ---- tables


class Columns:
    """What was found, as columns of tables whose rows are about a method and a detector."""

    def __init__(self, results: Results) -> None:
        self.results, self.over = results, f"{over_seeds(results)}."
        self.found = {(s.method, s.detector, s.metric, s.ood_set): s for s in results.summaries()}
        self.published = {key[2:] for key, summary in self.found.items() if summary.published is not None}

    def of(self, head: str, metric: str, ood_set: str = "", with_interval: bool = False, unit: int = 100) -> Column:
        """A metric on a set."""
        return head, lambda *of: _cell(self.found.get((*of, metric, ood_set)), with_interval, unit)

    def beside(self, metric: str, ood_set: str = "", head: str = "published") -> list[Column]:
        """The same with its interval, what is published, and ours less that, if anything is."""
        if (metric, ood_set) not in self.published:
            return []
        summary = lambda *of: self.found.get((*of, metric, ood_set))  # noqa: E731
        return [(head, lambda *of: _published(summary(*of))), ("difference", lambda *of: _difference(summary(*of)))]

    def by_detector(self, name: str, caption: str, columns: Iterable[Column], **more: bool) -> Table:
        """A table with the detectors of each method, the best first."""
        order = [ranked.detector for ranked in ranking(self.results)]
        rows = []
        for method, runs in self.results.methods.items():
            names = sorted({name for run in runs for name in run.scores}, key=lambda name: [*order, name].index(name))
            rows.append((method, [(label_of(name), (method, name)) for name in names]))
        return Table.of(name, caption, columns, rows, **more)

    def calibration(self) -> list[Table]:
        """None where nothing of it was measured."""
        measured = [metric for metric in CALIBRATION if any(key[1:] == ("", metric, "") for key in self.found)]
        columns = [c for m in measured for c in (self.of(CALIBRATION[m], m, with_interval=True), *self.beside(m))]
        caption = f"{self.over} ECE of the softmax of what the column names, 15 bins, on the ID test images; "
        rows = [("", [(method, (method, "")) for method in self.results.methods])]
        title = "Accuracy and expected calibration error (%)"
        return [Table.of(title, f"{caption}lower is better.", columns, rows)] if measured else []

    def under_shift(self) -> list[Table]:
        """The accuracy on the ID test images, on each covariate-shifted set, and on all of them."""
        rows = [("ID test images", ("accuracy", ""))]
        rows += [(self.results.sets[name].title, ("accuracy", name)) for name in self.results.csid]
        rows.append(("all together", (f"{FULL_SPECTRUM}accuracy", "")))
        if not self.results.csid or not any(key[2:] == about for key in self.found for _, about in rows[1:]):
            return []
        columns = [(m, lambda *key, m=m: _cell(self.found.get((m, "", *key)), True)) for m in self.results.methods]
        return [Table.of("Accuracy under covariate shift (%)", self.over, columns, [("", rows)])]


def build(results: Results) -> list[Table]:
    """The tables: AUROC beside published numbers, FPR95 in both conventions, AUROC by set, AUPR, accuracy and
    calibration; of several methods those of `verdict.compared`, and AUROC beside what is published."""
    columns, means = Columns(results), means_of(results)
    over, by_detector = columns.over, columns.by_detector
    tuned = "parameters chosen on validation images" if results.tuned else "parameters as they are, not tuned"
    interval = f" [95 % interval over test images, {results.n_bootstrap} draws]." if results.n_bootstrap else "."
    if columns.published:
        interval += " Published: the same recipe and parameters on the authors' test images; OpenOOD's are those of its"
        interval += " lists."

    def auroc(names: Iterable[str], with_interval: bool) -> list[Column]:
        """With what is published of it."""
        heads = [(name, title(name) if with_interval else name) for name in names]
        own = {name: columns.of(head, "auroc", name, with_interval) for name, head in heads}
        return [c for name in own for c in (own[name], *columns.beside("auroc", name, f"{title(name)} published"))]

    told = f"{over[:-1]}; {tuned}{interval}"
    own = [by_detector(name, over, [columns.of(title(m), name, m, unit=1) for m in means]) for name in added("metric")]
    last = [*columns.calibration(), *columns.under_shift()]
    if len(results.methods) > 1:
        known = [by_detector("AUROC beside what is published (%)", told, auroc(means, True))]
        return [*compared(results), *known * bool(columns.published), *own, *last]
    both = [(name, positive) for name in means for positive in ("OOD", "ID")]
    fpr95 = [columns.of(f"{title(of)}, {p} positive", f"fpr95_{p.lower()}_positive", of) for of, p in both]
    caption = (
        f"{over} OOD positive, as OpenOOD: share of ID images rejected by the threshold that catches 95 % of the OOD "
        "images. ID positive, as most papers: share of OOD images accepted by the threshold that keeps 95 % of the ID "
        "images."
    )
    tables = [by_detector("AUROC (%)", told, auroc(means, True))]
    tables.append(by_detector("FPR95 (%), lower is better", caption, fpr95))
    if len(results.ood) > 1:
        tables.append(by_detector("AUROC by set (%)", over, auroc(results.ood, False)))
    if results.csid:
        shown = {"AUROC": "auroc", "FPR95, OOD positive": "fpr95_ood_positive"}.items()
        full = [columns.of(f"{title(of)} {head}", FULL_SPECTRUM + key, of) for of in means for head, key in shown]
        tables.append(by_detector("Full-spectrum (%)", f"{over} {full_spectrum(results)}", full))
    aupr = [
        columns.of(f"{title(name)}, {p.upper()} positive", f"aupr_{p}", name) for name in means for p in ("in", "out")
    ]
    caption = f"{over} Area under precision-recall; depends on how many images there are. IN: ID, OUT: OOD."
    tables += [by_detector("AUPR (%)", caption, aupr, on_terminal=False, folded=True), *own]
    return [*(table for table in tables if table.columns), *last]  # without OOD sets there are none


def _cell(summary: Summary | None, with_interval: bool = False, unit: int = 100) -> Cell:
    if summary is None:
        return Cell("–")
    text = f"{unit * summary.mean:.2f}" + (f" ± {unit * summary.std:.2f}" if summary.n_runs > 1 else "")
    if with_interval and summary.low is not None:
        text += f" [{100 * summary.low:.2f}, {100 * summary.high:.2f}]"
    return Cell(text)


def _published(summary: Summary | None) -> Cell:
    return Cell(percent(summary and summary.published))


def _difference(summary: Summary | None) -> Cell:
    if summary is None or summary.difference is None or math.isnan(summary.difference):
        return Cell("–")
    return Cell(f"{100 * summary.difference:+.2f}")


def print_tables(results: Results) -> None:
    """The verdict, the tables and notes on standard output."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for index, sentence in enumerate(verdict(results)):
        console.print(Text(sentence, style="" if index else "bold"))
    console.print()
    show(build(results))
    for note, names in by_note((run.trained.name, note) for run in results.runs for note in run.notes).items():
        told = f"{', '.join(names)}: {with_option(note)}"
        Console(highlight=False).print(Text(told, style="yellow"), soft_wrap=True)


def with_option(note: str) -> str:
    """The note, with the option that follows its advice."""
    if isinstance(note, Note) and note.advice is not None:
        return f"{note} (--set {note.detector}.{note.parameter}={note.advice})"
    return note


def by_note(notes: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names that each note is about, of (name, note)."""
    found: dict[str, list[str]] = {}
    for name, note in notes:
        found.setdefault(note, []).append(name)
    return found
