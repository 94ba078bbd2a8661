"""Evaluations that are on the disk, as `Results`: the verdict and the tables of `ood_fast.evaluation`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from .. import evaluation
from ..evaluation.results import Numbers, Results, RunResult, Summary
from ..evaluation.trained import Trained
from .record import Evaluated, Record, place_of
from .tables import Table

TOLD = ("low", "high", "published", "source", "gain", "gain_low", "gain_high")  # what draws and recipes were needed for


class StoredResults(Results):
    """Some results.json of one benchmark as one; without draws: intervals are those that were written.

    Runs of one method are its seeds, also where they were evaluated one by one. Two of one seed are told apart by name.
    """

    def __init__(self, evaluations: Sequence[Evaluated]) -> None:
        found = [evaluated.results for evaluated in evaluations]
        sets = {name: part for results in found for name, part in results.sets.items()}
        runs: list[RunResult] = []
        self.told: dict[tuple[str, str, str, str], Summary] = {}
        for results in found:
            there = {(run.trained.method, run.trained.seed) for run in runs}
            again = [run.trained for run in results.runs if (run.trained.method, run.trained.seed) in there]
            apart = {trained.method: _apart(trained, {method for method, _ in there}) for trained in again}
            for run in results.runs:
                method = apart.get(run.trained.method, run.trained.method)
                runs.append(replace(run, sets=sets, trained=replace(run.trained, method=method)))
            for summary in results.kept or ():
                method = apart.get(summary.method, summary.method)
                self.told[method, summary.metric, summary.detector, summary.ood_set] = summary
        n_bootstrap, tuned = max(results.n_bootstrap for results in found), all(results.tuned for results in found)
        super().__init__(found[0].benchmark, runs, n_bootstrap, tuned)

    def summaries(self) -> Iterator[Summary]:
        """As they were written, as far as they are about the same runs."""
        for summary in super().summaries():
            told = self.told.get((summary.method, summary.metric, summary.detector, summary.ood_set))
            same = told is not None and told.n_runs == summary.n_runs
            written = {name: getattr(told, name) for name in TOLD} if same else {}
            yield replace(summary, **{name: value for name, value in written.items() if value is not None})

    def gain(self, of: Numbers, over: Numbers) -> tuple[float, float, float] | tuple[float, None, None] | None:
        """Of one seed, what was written, if it was."""
        found = super().gain(of, over)
        one = self.one_each and len(of[1]) == 1 and list(of[1]) == list(over[1]) and over[0] == self.baseline
        told = self.told.get((of[0], *of[1][0])) if one else None
        if found and found[1] is None and told and told.gain_low is not None and told.gain_high is not None:
            return found[0], told.gain_low, told.gain_high
        return found

    def _published(self, runs: list[RunResult]) -> dict[str, Any]:
        return {}  # that of `summaries`


def _apart(trained: Trained, taken: set[str]) -> str:
    """A name of its method that is not taken: with its name, as far as its place is needed to tell it from others."""
    place = place_of(trained)
    names = (f"{trained.method} ({told})" for told in (trained.name, f"{place.parent.name}/{place.name}"))
    return next((name for name in names if name not in taken), f"{trained.method} ({place})")


def stored(found: Sequence[tuple[Record, Evaluated]]) -> StoredResults:
    """Those of all records; an evaluation of several runs once."""
    return StoredResults([*{evaluated.folder.resolve(): evaluated for _, evaluated in found}.values()])


def tables(results: Results) -> list[Table]:
    """Those of `evaluation.build`, to be sorted."""
    built = []
    for table in evaluation.build(results):
        by_method = not any(section.heading for section in table.sections)
        built.append(replace(table, sortable=True, corner="method" if by_method else "detector"))
    return built
