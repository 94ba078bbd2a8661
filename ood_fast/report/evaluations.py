"""The tables of evaluations, made by `ood_fast.evaluation` from what they left on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

from .. import evaluation
from ..detectors import find
from ..evaluation.results import GROUPS, TITLES, Summary, TestSet
from .runs import Evaluated, Record
from .tables import Cell, Section, Table


class StoredResults:
    """Some results.json of one benchmark, in the form that `evaluation.build` reads.

    Methods of one name in several evaluations, as seeds that were evaluated one by one, are told apart by their folder.
    """

    def __init__(self, evaluations: Sequence[Evaluated]) -> None:
        self._named: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.methods: dict[str, list[SimpleNamespace]] = {}
        self.sets: dict[str, TestSet] = {}
        names = [{run["method"] for run in evaluated.results["runs"]} for evaluated in evaluations]
        for index, evaluated in enumerate(evaluations):
            others = set().union(*names[:index], *names[index + 1 :])
            called = {m: f"{m} ({evaluated.run['run']})" if m in others else m for m in names[index]}
            self._named.append((evaluated.results, called))
            for run in evaluated.results["runs"]:
                self.methods.setdefault(called[run["method"]], []).append(SimpleNamespace(scores=run["detectors"]))
            self.sets |= {name: TestSet(**part) for name, part in evaluated.results["sets"].items()}
        self.tuned = all(evaluated.results["tuned"] for evaluated in evaluations)
        self.n_bootstrap = max(evaluated.results["bootstrap"] for evaluated in evaluations)

    def summaries(self) -> Iterator[Summary]:
        """Of all evaluations."""
        for results, called in self._named:
            for row in results["summary"]:
                kept = {part.name: row[part.name] for part in fields(Summary)}
                yield Summary(**{**kept, "method": called[row["method"]]})


def tables(found: Sequence[tuple[Record, Evaluated]]) -> list[Table]:
    """Those of `evaluation.build`; before them, where there are several runs, one with a column for each."""
    once = {evaluated.folder.resolve(): evaluated for _, evaluated in found}
    built = []
    for table in evaluation.build(StoredResults([*once.values()])):
        by_method = not any(section.heading for section in table.sections)
        built.append(replace(table, sortable=True, corner="method" if by_method else "detector"))
    return [*side_by_side(found), *built]


def side_by_side(found: Sequence[tuple[Record, Evaluated]]) -> list[Table]:
    """AUROC with a row for each detector and a column for each run: near, far, or else each set."""
    if len(found) < 2:
        return []
    values = {
        (record.name, row["detector"], row["ood_set"]): row["value"]
        for record, evaluated in found
        for row in evaluated.measured("auroc")
    }
    names = [record.name for record, _ in found]
    there = list(dict.fromkeys(ood_set for _, _, ood_set in values))
    sections = []
    for ood_set in [mean for mean in GROUPS.values() if mean in there] or there:
        detectors = dict.fromkeys(detector for _, detector, of in values if of == ood_set)
        rows = []
        for detector in detectors:
            of_runs = [values.get((name, detector, ood_set)) for name in names]
            best = max(round(100 * value, 2) for value in of_runs if value is not None)
            cells = (
                Cell("–") if value is None else Cell(f"{100 * value:.2f}", bold=round(100 * value, 2) == best)
                for value in of_runs
            )
            rows.append((find(detector).label, tuple(cells)))
        sections.append(Section(TITLES.get(ood_set, ood_set), tuple(rows)))
    caption = "Each run by itself; the best of each row is bold. near-OOD, far-OOD: means over the sets of the group."
    return [Table("AUROC by run (%)", caption, tuple(names), tuple(sections), corner="detector", sortable=True)]
