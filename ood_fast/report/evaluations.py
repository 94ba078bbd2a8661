"""The tables of evaluations, made by `ood_fast.evaluation` from what they left on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

from .. import evaluation
from ..evaluation.results import Summary, TestSet
from .runs import Evaluated, Record
from .tables import Table


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
    """Those of `evaluation.build`."""
    once = {evaluated.folder.resolve(): evaluated for _, evaluated in found}
    built = []
    for table in evaluation.build(StoredResults([*once.values()])):
        by_method = not any(section.heading for section in table.sections)
        built.append(replace(table, sortable=True, corner="method" if by_method else "detector"))
    return built
