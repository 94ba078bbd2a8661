"""The tables of evaluations, made by `ood_fast.evaluation` from what they left on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .. import evaluation
from ..evaluation.results import Results, RunResult, Summary
from .runs import Evaluated, Record
from .tables import Table


def as_one(evaluations: Sequence[Evaluated]) -> Results:
    """Some results.json of one benchmark as one.

    Methods of one name in several evaluations, as seeds that were evaluated one by one, are told apart by their folder.
    """
    found = [Results.from_json(evaluated.results) for evaluated in evaluations]
    sets = {name: part for results in found for name, part in results.sets.items()}
    runs, kept = list[RunResult](), list[Summary]()
    for index, (evaluated, results) in enumerate(zip(evaluations, found, strict=True)):
        others = {method for other in (*found[:index], *found[index + 1 :]) for method in other.methods}
        called = {m: f"{m} ({evaluated.run['run']})" if m in others else m for m in results.methods}
        for run in results.runs:
            runs.append(replace(run, sets=sets, trained=replace(run.trained, method=called[run.trained.method])))
        kept += [replace(summary, method=called[summary.method]) for summary in results.summaries()]
    n_bootstrap, tuned = max(results.n_bootstrap for results in found), all(results.tuned for results in found)
    return Results(found[0].benchmark, runs, n_bootstrap, tuned, tuple(kept))


def tables(found: Sequence[tuple[Record, Evaluated]]) -> list[Table]:
    """Those of `evaluation.build`."""
    once = {evaluated.folder.resolve(): evaluated for _, evaluated in found}
    built = []
    for table in evaluation.build(as_one([*once.values()])):
        by_method = not any(section.heading for section in table.sections)
        built.append(replace(table, sortable=True, corner="method" if by_method else "detector"))
    return built
