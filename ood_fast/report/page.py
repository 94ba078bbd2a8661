"""The page: one HTML file without requests, for light and dark, large and small screens."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import checks, evaluation, files
from ..diagnostics import NUMBERS
from ..evaluation.results import ID
from ..evaluation.tables import by_note, test_images
from ..evaluation.verdict import ranking
from . import evaluations, figures, pages
from .charts import Chart
from .record import Evaluated, Record, place_of
from .runs import missing
from .tables import Cell, Rows, Section, Table, as_html, as_page, number, percent

NAME = "report.html"
GENERATOR = "ood_fast report"  # marks a file that a new report may replace
SHOWN = ("MSP", "Energy", "NCI", "FDBD", "KNN", "FeatureNorm")  # histograms of other detectors are folded
OPEN_NOTES = 3  # more of what is missing are folded
EPOCH_CURVES = 6  # of the diagnostics by epoch that are not folded


def page(records: Sequence[Record], context: Mapping[str, Any]) -> str:
    """All of it. `context`: the command and the time of the report."""
    names = ", ".join(record.name for record in records)
    benchmarks = list(dict.fromkeys(benchmark for record in records for benchmark in record.evaluated))
    first: dict[str, str] = {}  # title -> HTML, of what is open
    sections: dict[str, str] = {}  # of what is folded
    if curves := figures.training(records):
        sections["Training"] = figures.shown(curves, "training")
    if curves := figures.by_epoch(records):
        sections["Diagnostics by epoch"] = _by_epoch(curves)
    if curves := figures.change(records):
        sections["Change of the features"] = figures.shown(curves, "change")
    for benchmark in benchmarks:
        found = [(r, r.evaluated[benchmark]) for r in records if benchmark in r.evaluated]
        prefix = f"{benchmark}-" if len(benchmarks) > 1 else ""
        first[f"OOD detection on {benchmark}"] = _evaluation(found, prefix)
        diagnosed = [(records.index(r), r, e, e.diagnosis) for r, e in found if e.diagnosis is not None]
        if diagnosed:
            sections |= _diagnoses(benchmark, diagnosed, prefix)
        for images in [e.images for _, e in found if e.images]:
            sections[f"Images of {benchmark}"] = images
        sections[f"Scores on {benchmark}"] = _scores(found, prefix)
    sections["How it was run"] = _how(records, benchmarks, context)
    links = "".join(f'<a href="#{_anchor(title)}">{html.escape(title)}</a>' for title in [*first, *sections])
    body = f"<h1>{html.escape(' and '.join(first) or names)}</h1>\n"
    for title, content in first.items():
        head = f"<h2>{html.escape(title)}</h2>" if len(first) > 1 else ""
        body += f'<section class=part id="{_anchor(title)}">{head}{content}</section>\n'
    body += f"""<p class=lead>{html.escape(_lead(records, benchmarks))}</p>
<pre>{html.escape(context["command"])}</pre>
<nav>{links}</nav>
{_notes("Not in this report", missing(records), opened=True)}
{as_html(_runs(records))}
"""
    for title, content in sections.items():
        head = f"<summary><h2>{html.escape(title)}</h2></summary>"
        body += f'<section class=part id="{_anchor(title)}"><details>{head}{content}</details></section>\n'
    return pages.document(f"ood_fast report: {names}", body, GENERATOR)


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _lead(records: Sequence[Record], benchmarks: Sequence[str]) -> str:
    n_runs = "One run" if len(records) == 1 else f"{len(records)} runs"
    measured = [run for record in records for held in record.evaluated.values() for run in held.results.runs]
    more = len({str(place_of(run.trained)) for run in measured}) - len(records)
    others = f" {more} more are in the tables above alone." * (more > 0)
    on = f", evaluated on {', '.join(benchmarks)}" if benchmarks else ", not evaluated yet"
    trained = " of ood-fast train" * all(bool(record.info) for record in records)
    return f"{n_runs}{trained}{on}. The numbers of each plot can be saved as CSV.{others}"


def _notes(title: str, notes: Mapping[str, Sequence[str]], *, opened: bool) -> str:
    """Each with the runs that it is about; nothing if there are none. Long lists are folded anyway."""
    if not notes:
        return ""
    texts = ((html.escape(", ".join(names)), html.escape(note)) for note, names in notes.items())
    items = "".join(f"<li><b>{names}</b>: {note}</li>" for names, note in texts)
    opened = opened and len(notes) <= OPEN_NOTES
    return pages.folded(f"{title} ({len(notes)})", f"<ul class=notes>{items}</ul>", opened=opened)


# ---- what was run


def _runs(records: Sequence[Record]) -> Table:
    """A row for each run."""
    columns: dict[str, Callable[[Record], str]] = {
        "model": lambda r: str(r.recipe.get("model", "–")),
        "loss": lambda r: _loss(r.recipe),
        "seed": _seed,
        "epochs": lambda r: f"{r.info['epochs']} of {r.recipe['epochs']}" if "epochs" in r.info else "–",
        "status": lambda r: str(r.info.get("status", "–")),
        "last loss": lambda r: number(r.log["loss"][-1]) if r.log.get("loss") else "–",
        "best validation accuracy (%)": lambda r: percent((r.info.get("best") or {}).get("validation_accuracy")),
        "training time": lambda r: _duration(sum(r.log["seconds"])) if r.log.get("seconds") else "–",
        "device": lambda r: str(r.info.get("device", "–")),
    }
    for benchmark in dict.fromkeys(name for record in records for name in record.evaluated):
        columns[f"test accuracy on {benchmark} (%)"] = partial(_accuracy, benchmark)
    cells = [(head, lambda record, of=of: Cell(of(record))) for head, of in columns.items()]
    caption = "Test accuracy: of the checkpoint that was evaluated. Training time: of the epochs, with validation."
    return Table.of("Runs", caption, cells, [("", [(r.name, (r,)) for r in records])], corner="run", sortable=True)


def _loss(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return "–"
    return f"{recipe['loss']}, L2-normalised features" if recipe.get("head") == "l2norm" else str(recipe["loss"])


def _seed(record: Record) -> str:
    told = [record.info.get("seed"), *(evaluated.run.trained.seed for evaluated in record.evaluated.values())]
    return next((str(seed) for seed in told if seed is not None), "–")


def _accuracy(benchmark: str, record: Record) -> str:
    evaluated = record.evaluated.get(benchmark)
    known = evaluated and evaluated.run.holds([("accuracy", "", "")])
    return percent(evaluated.run.value("accuracy") if evaluated and known else None)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- an evaluation


def _evaluation(found: Sequence[tuple[Record, Evaluated]], prefix: str) -> str:
    """The verdict in sentences and in a picture, then the tables."""
    results = evaluations.stored(found)
    told = test_images(results)
    notes = by_note((record.name, note) for record, evaluated in found for note in evaluated.run.notes)
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in evaluation.verdict(results))
    picture = figures.shown(figures.dots(results), f"{prefix}verdict")
    return (
        f"<ul class=verdict>{sentences}</ul>{picture}<p class=caption>Test images: {html.escape(told)}.</p>"
        f"{as_page(evaluations.tables(results))}{_notes('Notes of the evaluation', notes, opened=False)}"
    )


def _scores(found: Sequence[tuple[Record, Evaluated]], prefix: str) -> str:
    """A row for each detector."""
    of_detectors: dict[str, list[Chart]] = {}
    curves: list[Chart] = []
    ranked = ranking(evaluations.stored(found))
    for record, evaluated in found:
        try:
            scores = evaluated.scores()
        except ValueError as error:
            told = f"cannot read its scores ({error}); make them again: {evaluated.command}"
            raise checks.UserError(f"{evaluated.folder}: {told}") from error
        for chart, detector in zip(figures.scores(record, evaluated, scores), scores, strict=True):
            of_detectors.setdefault(detector, []).append(chart)
        if ranked and ID in scores.get(ranked[0].detector, ()):
            curves.append(figures.roc(record, evaluated, ranked[0].detector, scores[ranked[0].detector]))
    shown = [name for name in of_detectors if name in SHOWN] or list(of_detectors)
    content = figures.by_kind([*([curves] * bool(curves)), *(of_detectors[n] for n in shown)], f"{prefix}scores")
    if others := [of_detectors[name] for name in of_detectors if name not in shown]:
        content += pages.folded(f"{len(others)} more detectors", figures.by_kind(others, f"{prefix}scores"))
    return content


# ---- diagnostics


def _by_epoch(curves: Sequence[Chart]) -> str:
    text = (
        "Of the model after each epoch. Spectrum, class means and norms are of the training images, not augmented; "
        "what needs other images is of the validation images, ID and OOD."
    )
    content = f"<p class=caption>{text}</p>{figures.shown(curves[:EPOCH_CURVES], 'epochs')}"
    if more := curves[EPOCH_CURVES:]:
        content += pages.folded(f"{len(more)} more", figures.shown(more, "epochs"))
    return content


def _diagnoses(benchmark: str, diagnosed: figures.Found, prefix: str) -> dict[str, str]:
    """The sections about the features."""
    kinds: dict[str, list[Chart]] = {}  # by the title without the run
    for of_run in diagnosed:
        for chart in figures.of_sets(*of_run):
            kinds.setdefault(chart.title.partition(":")[0], []).append(chart)
    return {
        f"Diagnostics on {benchmark}": as_page(_numbers(diagnosed)),
        f"Spectrum and neural collapse on {benchmark}": figures.shown(figures.collapse(diagnosed), f"{prefix}features"),
        f"Features of the test images of {benchmark}": figures.by_kind([*kinds.values()], f"{prefix}images"),
    }


def _numbers(found: figures.Found) -> list[Table]:
    """The numbers of each diagnosis: a row for each run, and for each run and OOD set."""
    plain = [name for name in NUMBERS if any(name in diagnosis.numbers for *_, diagnosis in found)]
    of_ood = [name for name in NUMBERS if name not in plain]

    def table(title: str, names: Sequence[str], rows: Sequence[Rows], corner: str) -> Table:
        caption = ". ".join(f"{NUMBERS[name][0]}: {NUMBERS[name][1]}" for name in names) + "."
        columns = [(NUMBERS[n][0], lambda held, suffix, n=n: Cell(number(held.get(n + suffix)))) for n in names]
        return Table.of(title, caption, columns, rows, corner=corner, sortable=True)

    tables = [table("Numbers", plain, [("", [(record.name, (d.numbers, "")) for _, record, _, d in found])], "run")]
    rows = []
    for _, record, evaluated, diagnosis in found if of_ood else ():
        sets, numbers = evaluated.results.sets, diagnosis.numbers
        names = [name for name in diagnosis.sets if f"{of_ood[0]}/{name}" in numbers]
        under = [(sets[name].title, (numbers, f"/{name}")) for name in names]
        rows.append((record.name if len(found) > 1 else "", under))
    return [*tables, table("Numbers by OOD set", of_ood, rows, "OOD set")] if of_ood else tables


# ---- how it was run


def _how(records: Sequence[Record], benchmarks: Sequence[str], context: Mapping[str, Any]) -> str:
    """Settings, with a column for each run; versions, machines and commands."""
    settings = list(dict.fromkeys(name for record in records for name in record.recipe))
    more = ("seed", "processes", "sync_bn", "training_images", "validation_images", "compile", "channels_last")
    rows = []
    for name in [*settings, *(name for name in more if any(name in record.info for record in records))]:
        values = [_setting(r.recipe.get(name, r.info.get(name))) for r in records]
        rows.append((name, tuple(Cell(value, bold=len(set(values)) > 1) for value in values)))
    caption = "The recipe, and how it was run. Bold: where the runs differ." if len(records) > 1 else ""
    columns = tuple(record.name for record in records)
    table = Table("Settings", caption, columns, (Section("", tuple(rows)),), corner="setting", sortable=True)
    facts = {}
    for record in records:
        if record.info:
            facts[f"{record.name}: training"] = _facts(record.info, record.info.get("updated"))
        for benchmark, evaluated in record.evaluated.items():
            told, checkpoint = evaluated.told, evaluated.run.trained.checkpoint or "–"
            how = f"checkpoint {checkpoint}; {_facts(told, told['started'])}; {told['seconds']:.0f} s"
            facts[f"{record.name}: evaluation on {benchmark}"] = how
    facts["this report"] = _facts(context, context.get("started"))
    evaluations = (record.evaluated[b] for b in benchmarks[:1] for record in records if b in record.evaluated)
    facts |= next((evaluated.told["conventions"] for evaluated in evaluations), {})
    return (as_html(table) if rows else "") + pages.definitions(facts)


def _setting(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(told: Mapping[str, Any], when: str | None) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in (told.get("versions") or {}).items())
    parts = (told.get("command"), when, versions, ", ".join((told.get("machine") or {}).values()))
    return "; ".join(part for part in parts if part)


# ---- the file


def check_file(path: str | os.PathLike[str]) -> Path:
    """The file for the report: `path`, or report.html in it if it is a folder. UserError if it cannot be written, or is
    something else than an earlier report."""
    if not str(path).strip():
        raise checks.UserError("--out: got '', expected a file")
    file = Path(path).expanduser()
    file = file / NAME if file.is_dir() else file
    checks.writable_folder("--out", file.parent)
    if file.exists():
        try:
            with file.open(encoding="utf-8", errors="replace") as stream:
                beginning = stream.read(1000)
        except OSError as error:
            raise checks.UserError(f"--out: cannot read {file}: {error.strerror}") from error
        if f'content="{GENERATOR}"' not in beginning:
            raise checks.UserError(f"--out: {file} is there and is no report of `ood-fast report`; choose another file")
    return file


def write(file: str | os.PathLike[str], records: Sequence[Record], context: Mapping[str, Any]) -> None:
    """Write the page, in place of an earlier one when all of it is written.

    Args:
        context: the command and when it was "started"; "versions" and "machine" if known.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(file, page(records, context))
