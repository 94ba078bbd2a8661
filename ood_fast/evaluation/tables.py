"""The tables of an evaluation: a column for each method, or of one method for each metric and group of sets.

`build` has all of them, `compared` those of several methods, `print_tables` puts them below the verdict.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean, stdev

from ..detectors.fitting import Note
from ..detectors.registry import label_of
from ..metrics import ECE_BINS
from ..registry import added
from ..report.tables import Cell, Column, Section, Table, and_list, percent, show
from .results import CONVENTIONS, ECE, FULL_SPECTRUM, Numbers, Results, Summary
from .verdict import Key, means_of, over_detectors, overall, points, ranking, shows, sign, title, verdict

# What the columns of accuracy and calibration are called.
CALIBRATION = dict(zip(("accuracy", *ECE), ("accuracy", "ECE f", "ECE f/(τ‖f‖)", "ECE f/D"), strict=True))
AUROC, FPR95, AUPR, BY_SET = "AUROC (%)", "FPR95 (%), lower is better", "AUPR (%)", "AUROC by set (%)"
OF_IMAGES = "It depends on how many images there are."
MANY = 15  # detectors; a terminal shows neither FPR95 nor single sets of more
LOWER = ("fpr95_ood_positive", "fpr95_id_positive", f"{FULL_SPECTRUM}fpr95_ood_positive")  # of which less is better


class Columns:
    """What was found, as columns of tables whose rows are about a method and a detector."""

    def __init__(self, results: Results) -> None:
        self.results, self.over = results, f"{over_seeds(results)}."
        n_draws = results.n_bootstrap
        self.interval = f" [95 % interval over test images, {n_draws} draws]." if n_draws else "."
        self.found = {(s.method, s.detector, s.metric, s.ood_set): s for s in results.summaries()}
        self.published = {key[2:] for key, summary in self.found.items() if summary.published is not None}

    def of(self, head: str, metric: str, ood_set: str = "", with_interval: bool = False, unit: int = 100) -> Column:
        """A metric on a set."""
        return head, lambda *of: _cell(self.found.get((*of, metric, ood_set)), with_interval, unit)

    def beside(self, metric: str, ood_set: str = "", head: str = "published") -> list[Column]:
        """The same with its interval, what is published, and ours less that, if anything is."""
        if (metric, ood_set) not in self.published:
            return []

        def summary(method: str, detector: str) -> Summary | None:
            return self.found.get((method, detector, metric, ood_set))

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
        over = f"{self.over[:-1]}{self.interval}"
        caption = f"{over} ECE of the softmax of what the column names, {ECE_BINS} bins, on the ID test images; "
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
        told = f"{self.over[:-1]}{self.interval}"
        return [Table.of("Accuracy under covariate shift (%)", told, columns, [("", rows)])]


def build(results: Results) -> list[Table]:
    """The tables: AUROC beside published numbers, FPR95 in both conventions, AUROC by set, AUPR, accuracy and
    calibration; of several methods those of `compared`, and AUROC beside what is published."""
    columns, means = Columns(results), means_of(results)
    over, by_detector = columns.over, columns.by_detector
    tuned = "parameters chosen on validation images" if results.tuned else "parameters as they are, not tuned"
    interval = columns.interval
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
    tables = [by_detector(AUROC, told, auroc(means, True))]
    few = len(ranking(results)) <= MANY
    told = f"{over} {_told('fpr95_ood_positive', 'fpr95_id_positive')}"
    tables.append(by_detector(FPR95, told, fpr95, on_terminal=few))
    if len(results.ood) > 1:
        tables.append(by_detector(BY_SET, over, auroc(results.ood, False), on_terminal=few))
    if results.csid:
        shown = {"AUROC": "auroc", "FPR95, OOD positive": "fpr95_ood_positive"}.items()
        full = [columns.of(f"{title(of)} {head}", FULL_SPECTRUM + key, of) for of in means for head, key in shown]
        tables.append(by_detector("Full-spectrum (%)", f"{over} {full_spectrum(results)}", full))
    sides = {"ID": "aupr_in", "OOD": "aupr_out"}.items()
    aupr = [columns.of(f"{title(name)}, {p} positive", metric, name) for name in means for p, metric in sides]
    tables += [
        by_detector(AUPR, f"{over} {_told('aupr_in', 'aupr_out')} {OF_IMAGES}", aupr, on_terminal=False, folded=True),
        *own,
    ]
    return [*(table for table in tables if table.columns), *last]  # without OOD sets there are none


def _told(*metrics: str) -> str:
    """What they are, as a sentence; "OOD positive: " before each of several."""
    sides = ["OOD" if "out" in metric or "_ood_" in metric else "ID" for metric in metrics]
    texts = [f"{side} positive: " * (len(metrics) > 1) + CONVENTIONS[m] for side, m in zip(sides, metrics, strict=True)]
    return ". ".join(text[0].upper() + text[1:] for text in texts) + "."


def _cell(summary: Summary | None, with_interval: bool = False, unit: int = 100) -> Cell:
    if summary is None:
        return Cell("–")
    text = f"{unit * summary.mean:.2f}" + ("" if summary.std is None else f" ± {unit * summary.std:.2f}")
    if with_interval and summary.low is not None and summary.high is not None:
        text += f" [{unit * summary.low:.2f}, {unit * summary.high:.2f}]"
    return Cell(text)


def _published(summary: Summary | None) -> Cell:
    return Cell(percent(None if summary is None else summary.published))


def _difference(summary: Summary | None) -> Cell:
    if summary is None or summary.difference is None or math.isnan(summary.difference):
        return Cell("–")
    return Cell(f"{100 * summary.difference:+.2f}")


# ---- a column for each method


def compared(results: Results) -> list[Table]:
    """Each method against the baseline, AUROC, its differences, FPR95; folded AUROC by set, other metrics, and FPR95 of
    many detectors. What is folded is not on terminals, nor is FPR95."""
    means, sets = means_of(results), results.ood
    caught, kept = (f"fpr95_{positive}_positive" for positive in ("ood", "id"))
    order = list(dict.fromkeys(ranked.detector for ranked in ranking(results)))
    wanted = [
        (AUROC, "auroc", means, "", False),
        ("AUROC", "auroc", means, None, False),
        (FPR95, caught, means, _told(caught), len(order) > MANY),
        ("FPR95 (%), ID positive, lower is better", kept, means, _told(kept), True),
        (BY_SET, "auroc", sets, "", True),
        (f"{AUPR}, ID positive", "aupr_in", means, f"{_told('aupr_in')} {OF_IMAGES}", True),
        (f"{AUPR}, OOD positive", "aupr_out", means, f"{_told('aupr_out')} {OF_IMAGES}", True),
    ]
    if results.csid:
        full = [(AUROC, "auroc", full_spectrum(results)), (FPR95, caught, "")]
        wanted[3:3] = [(f"Full-spectrum {of}", FULL_SPECTRUM + key, means, told, False) for of, key, told in full]
    tables = _over_detectors(results)
    for name, metric, names, caption, folded in wanted:
        if not order or (caption is None and results.baseline is None) or (name == BY_SET and sets == means):
            continue
        columns = [method for method in results.methods if caption is not None or method != results.baseline]
        cells = _values if caption is not None else _gains
        sections = tuple(
            Section(title(of), tuple((label_of(d), tuple(cells(results, columns, (metric, d, of)))) for d in order))
            for of in names
        )
        judged = _judged(results, [(metric, detector, of) for of in names for detector in order])
        if caption is None:
            name = f"{name}: paired difference to {results.baseline} (percentage points)"
            caption = _more(results, judged)
        else:
            marks = "; bold: better than every other, the interval excludes 0" * judged
            caption = f"{over_seeds(results)}{marks}. {caption}".strip()
        shown = not folded and metric != caught
        tables.append(Table(name, caption, tuple(columns), sections, on_terminal=shown, folded=folded))
    return tables


def _over_detectors(results: Results) -> list[Table]:
    """What each method has more than the baseline over all detectors, and in accuracy."""
    found = overall(results)
    heads = dict.fromkeys(head for pairs in found.values() for head in pairs)

    def column(head: str) -> Column:
        return title(head), lambda pairs: _gain(results, *pairs[head]) if head in pairs else Cell("–")

    gains = [results.gain(*both) for pairs in found.values() for both in pairs.values()]
    judged = any(gain is not None and gain[1] is not None for gain in gains)
    name = f"Against {results.baseline}, {over_detectors(results)}: AUROC and accuracy (percentage points)"
    rows = [("", [(method, (pairs,)) for method, pairs in found.items()])]
    return [Table.of(name, _more(results, judged), map(column, heads), rows)] if any(gains) else []


def _more(results: Results, judged: bool) -> str:
    """What a table of gains says."""
    interval = (" [95 % interval]", "; bold where it excludes 0") if judged else ("", "")
    over = "One run each" if results.one_each else "Mean over the seeds that both have"
    return f"{over}{interval[0]}: what a method has more{interval[1]}."


def _judged(results: Results, keys: Sequence[Key]) -> bool:
    """Whether a difference of two methods has an interval: of one run without draws, or read without them, none has."""
    gains = (results.gain((a, [key]), (b, [key])) for a, b in combinations(results.methods, 2) for key in keys)
    return any(gain is not None and gain[1] is not None for gain in gains)


def full_spectrum(results: Results) -> str:
    """What the full-spectrum tables take as in-distribution."""
    names = and_list([results.sets[name].title for name in results.csid])
    return f"In-distribution are the ID test images and the covariate-shifted {names}, as in OpenOOD's fsood."


def over_seeds(results: Results) -> str:
    """Over what the means of tables are taken."""
    n_runs = sorted({len(runs) for runs in results.methods.values()})
    several = f"Mean ± sample standard deviation over {' or '.join(map(str, n_runs))} seeds"
    return "One run" if n_runs == [1] else several


def _values(results: Results, methods: Sequence[str], key: Key) -> list[Cell]:
    """mean ± std in percent; bold where it is better than every other, in pairs."""
    better = -1 if key[0] in LOWER else 1
    found = {m: [run.value(*key) for run in results.methods[m] if run.holds([key])] for m in methods}
    cells = []
    for method in methods:
        others = [other for other in methods if other != method and found[other]]
        best = bool(others) and all(sign(results, (method, [key]), (other, [key])) == better for other in others)
        spread = f" ± {100 * stdev(found[method]):.1f}" if len(found[method]) > 1 else ""
        cells.append(Cell(f"{100 * fmean(found[method]):.1f}{spread}", bold=best) if found[method] else Cell("–"))
    return cells


def _gains(results: Results, methods: Sequence[str], key: Key) -> list[Cell]:
    """What each has more than the baseline."""
    return [_gain(results, (method, [key]), (results.baseline or "", [key])) for method in methods]


def _gain(results: Results, of: Numbers, over: Numbers) -> Cell:
    gain = results.gain(of, over)
    shown = 0 if gain is None else shows(*gain)
    worse = shown * (-1 if of[1][0][0] in LOWER else 1) < 0
    return Cell("–") if gain is None else Cell(points(*gain), bold=shown != 0, worse=worse)


def print_tables(results: Results) -> None:
    """The verdict, the tables and notes on standard output."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for index, sentence in enumerate(verdict(results)):
        console.print(Text(sentence, style="" if index else "bold"))
    console.print(f"Test images: {test_images(results)}.\n", style="dim")
    show(build(results))
    for note, names in by_note((run.trained.name, note) for run in results.runs for note in run.notes).items():
        told = f"{', '.join(names)}: {with_option(note)}"
        Console(highlight=False).print(Text(told, style="yellow"), soft_wrap=True)


def test_images(results: Results) -> str:
    """The sets that were tested with, their groups and numbers of images."""
    return "; ".join(f"{part.title} ({part.group}, {part.n_images:,})" for part in results.sets.values())


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
