"""The page: one HTML file without requests, for light and dark, large and small screens."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import charts, evaluation, pages
from ..diagnostics import NUMBERS, Diagnosis
from ..tables import Cell, Section, Table, as_html
from . import evaluations, figures
from .figures import number
from .records import Evaluated, Record

GENERATOR = "ood_fast report"  # marks a file that a new report may replace
SHOWN = ("MSP", "Energy", "NCI", "FDBD", "KNN", "FeatureNorm")  # histograms of other detectors are folded


def page(records: Sequence[Record], context: Mapping[str, Any]) -> str:
    """All of it. `context`: the command and the time of the report."""
    names = ", ".join(record.name for record in records)
    benchmarks = list(dict.fromkeys(benchmark for record in records for benchmark in record.evaluated))
    parts = [
        f"<h1>{html.escape(names)}</h1>",
        f"<p class=lead>{html.escape(_lead(records, benchmarks))}</p>",
        f"<pre>{html.escape(context['command'])}</pre>",
        _missing(records),
        as_html(_runs(records)),
    ]
    if curves := figures.training(records):
        parts.append(_section("Training", figures.files(curves, "training")))
    if curves := figures.by_epoch(records):
        text = (
            "Of the model after each epoch. Spectrum, class means and norms are of the training images, not augmented; "
            "what needs other images is of the validation images."
        )
        parts.append(_section("Diagnostics by epoch", figures.files(curves, "epochs"), text))
    if curves := figures.change(records):
        parts.append(_section("Change of the features", figures.files(curves, "change")))
    for benchmark in benchmarks:
        found = [(r, r.evaluated[benchmark]) for r in records if benchmark in r.evaluated]
        parts.append(_evaluation(benchmark, found, len(benchmarks) > 1))
        parts.append(_diagnoses(benchmark, records, found, len(benchmarks) > 1))
    parts.append(_how(records, benchmarks, context))
    style = charts.STYLE
    return pages.document(f"ood_fast report: {names}", "\n".join(parts), style, pages.SORTING, GENERATOR)


def _section(title: str, content: str, lead: str = "") -> str:
    text = f"<p class=caption>{html.escape(lead)}</p>" if lead else ""
    return f"<section><h2>{html.escape(title)}</h2>{text}{content}</section>"


def _lead(records: Sequence[Record], benchmarks: Sequence[str]) -> str:
    n_runs = "One run" if len(records) == 1 else f"{len(records)} runs"
    on = f", evaluated on {', '.join(benchmarks)}" if benchmarks else ", not evaluated yet"
    return f"{n_runs} of ood-fast train{on}. The numbers of each plot can be saved as CSV."


def _missing(records: Sequence[Record]) -> str:
    notes = [(record.name, note) for record in records for note in record.missing]
    notes += [(r.name, note) for r in records for e in r.evaluated.values() for note in e.run["notes"]]
    if not notes:
        return ""
    items = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(note)}</li>" for name, note in notes)
    return (
        f"<section><details open><summary>Not in this report</summary><ul class=notes>{items}</ul></details></section>"
    )


# ---- what was run


def _runs(records: Sequence[Record]) -> Table:
    """A row for each run."""
    columns: dict[str, Callable[[Record], str]] = {
        "model": lambda r: str(r.recipe.get("model", "–")),
        "loss": lambda r: _loss(r.recipe),
        "seed": lambda r: _told(r, "seed"),
        "epochs": lambda r: f"{r.info['epochs']} of {r.recipe['epochs']}" if "epochs" in r.info else "–",
        "status": lambda r: str(r.info.get("status", "–")),
        "last loss": lambda r: number(r.log["loss"][-1]) if r.log.get("loss") else "–",
        "best validation accuracy (%)": lambda r: _percent((r.info.get("best") or {}).get("validation_accuracy")),
        "training time": lambda r: _duration(sum(r.log["seconds"])) if r.log.get("seconds") else "–",
        "device": lambda r: str(r.info.get("device", "–")),
    }
    for benchmark in dict.fromkeys(name for record in records for name in record.evaluated):
        columns[f"test accuracy on {benchmark} (%)"] = lambda r, b=benchmark: _percent(_accuracy(r.evaluated.get(b)))
    rows = tuple((r.name, tuple(Cell(of(r)) for of in columns.values())) for r in records)
    caption = "Test accuracy: of the checkpoint that was evaluated. Training time: of the epochs, with validation."
    return Table("Runs", caption, tuple(columns), (Section("", rows),), corner="run", sortable=True)


def _loss(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return "–"
    return f"{recipe['loss']}, L2-normalised features" if recipe.get("head") == "l2norm" else str(recipe["loss"])


def _told(record: Record, name: str) -> str:
    told = [record.info.get(name), *(evaluated.run.get(name) for evaluated in record.evaluated.values())]
    return next((str(value) for value in told if value is not None), "–")


def _accuracy(evaluated: Evaluated | None) -> float | None:
    rows = evaluated.run["measurements"] if evaluated else ()
    return next((row["value"] for row in rows if row["metric"] == "accuracy"), None)


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- an evaluation


def _evaluation(benchmark: str, found: Sequence[tuple[Record, Evaluated]], several: bool) -> str:
    title = f"Out-of-distribution detection on {benchmark}"
    sets = {}
    for _, evaluated in found:
        sets |= evaluated.results["sets"]
    told = "; ".join(f"{part['title']} ({part['group']}, {part['n_images']:,})" for part in sets.values())
    built = evaluations.tables(found)
    return (
        f"<section><h2>{html.escape(title)}</h2><p class=caption>Test images: {html.escape(told)}.</p>"
        f"<div class=tables>{''.join(as_html(table) for table in built)}</div></section>"
    )


def _diagnoses(
    benchmark: str, records: Sequence[Record], found: Sequence[tuple[Record, Evaluated]], several: bool
) -> str:
    prefix = f"{benchmark}-" if several else ""
    diagnosed = [(records.index(r), r, e, e.diagnosis) for r, e in found if e.diagnosis is not None]
    parts = []
    if diagnosed:
        parts.append(_section(f"Features on {benchmark}", "".join(map(as_html, _numbers(diagnosed)))))
        parts.append(
            _section("Spectrum and neural collapse", figures.files(figures.collapse(diagnosed), f"{prefix}features"))
        )
        of_runs = [figures.of_sets(*of_run) for of_run in diagnosed]
        kinds = [figure for same in zip(*of_runs, strict=False) for figure in same]  # runs beside each other
        parts.append(_section("Test images", figures.files(kinds, f"{prefix}images")))
    shown, folded = [], []
    for record, evaluated in found:
        scores = evaluation.read_scores(evaluated.folder, evaluated.run)
        for figure, detector in zip(figures.scores(record, evaluated, scores), scores, strict=True):
            (shown if detector in SHOWN else folded).append((detector, figure))
    for title, of in (("Scores", shown or folded), ("Scores of the other detectors", folded if shown else [])):
        if of:
            order = list(dict.fromkeys(detector for detector, _ in of))
            ordered = [figure for _, figure in sorted(of, key=lambda pair: order.index(pair[0]))]
            content = figures.files(ordered, f"{prefix}scores")
            if of is folded and shown:
                parts.append(f"<section><details><summary>{title}</summary>{content}</details></section>")
            else:
                parts.append(_section(title, content))
    return "".join(parts)


def _numbers(found: figures.Found) -> list[Table]:
    """The numbers of each diagnosis: a row for each run, and for each run and OOD set."""
    plain = [name for name in NUMBERS if any(name in diagnosis.numbers for *_, diagnosis in found)]
    of_ood = [name for name in NUMBERS if name not in plain]

    def cells(diagnosis: Diagnosis, names: Sequence[str], suffix: str = "") -> tuple[Cell, ...]:
        return tuple(Cell(number(diagnosis.numbers.get(f"{name}{suffix}"))) for name in names)

    titles = {name: NUMBERS[name][0] for name in NUMBERS}
    rows = tuple((record.name, cells(diagnosis, plain)) for _, record, _, diagnosis in found)
    told = lambda names: "; ".join(f"{titles[name]}: {NUMBERS[name][1]}" for name in names) + "."  # noqa: E731
    columns = tuple(map(titles.get, plain))
    tables = [Table("Numbers", told(plain), columns, (Section("", rows),), corner="run", sortable=True)]
    sections = []
    for _, record, evaluated, diagnosis in found:
        sets = [name for name in diagnosis.sets if f"{of_ood[0]}/{name}" in diagnosis.numbers] if of_ood else []
        rows = tuple((evaluated.results["sets"][s]["title"], cells(diagnosis, of_ood, f"/{s}")) for s in sets)
        sections.append(Section(record.name if len(found) > 1 else "", rows))
    if of_ood:
        columns = tuple(map(titles.get, of_ood))
        title = "Numbers by OOD set"
        tables.append(Table(title, told(of_ood), columns, tuple(sections), corner="OOD set", sortable=True))
    return tables


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
            results = evaluated.results
            facts[f"{record.name}: evaluation on {benchmark}"] = (
                f"checkpoint {evaluated.run['checkpoint'] or '–'}; {_facts(results, results['started'])}; "
                f"{results['seconds']:.0f} s"
            )
    facts["this report"] = _facts(context, context["started"])
    for evaluated in (record.evaluated[b] for b in benchmarks[:1] for record in records if b in record.evaluated):
        facts |= evaluated.results["conventions"]
        break
    return (as_html(table) if rows else "") + _section("How it was run", pages.definitions(facts))


def _setting(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(told: Mapping[str, Any], when: str | None) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in (told.get("versions") or {}).items())
    parts = (told.get("command"), when, versions, ", ".join((told.get("machine") or {}).values()))
    return "; ".join(part for part in parts if part)
