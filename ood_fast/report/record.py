"""What the report knows of a trained run and of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import evaluation, recipes
from ..diagnostics import Diagnosis, FeatureChange
from ..evaluation.results import Results, RunResult
from ..evaluation.trained import Trained

Columns = dict[str, list[float]]


@dataclass
class Evaluated:
    """What an evaluation found of one run.

    Attributes:
        folder: of the evaluation. told: its results.json. results: the same, read.
        index: which of its runs this is.
        diagnosis: None until `diagnose_runs`, or where the features are gone.
        images: HTML of what `gallery.add` found; empty where it was not asked.
    """

    folder: Path
    told: dict[str, Any]
    results: Results
    index: int = 0
    diagnosis: Diagnosis | None = None
    images: str = ""

    @classmethod
    def read(cls, folder: Path) -> list[Evaluated]:
        """Of each run that is told of in the folder of an evaluation."""
        told = evaluation.read(folder)
        results = Results.from_json(told)
        return [cls(folder, told, results, index) for index in range(len(results.runs))]

    @property
    def run(self) -> RunResult:
        """What it says of this run."""
        return self.results.runs[self.index]

    @property
    def command(self) -> str:
        """What made it."""
        return self.told["command"] or "ood_fast.evaluation.write(folder, results, {})"

    @property
    def outputs(self) -> dict[str, str]:
        """The folder of the cache of each set, as it was."""
        return dict(self.told["runs"][self.index]["outputs"])

    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """See `evaluation.read_scores`."""
        return evaluation.read_scores(self.folder, self.told["runs"][self.index])


@dataclass
class Record:
    """What is known of one run.

    Attributes:
        name: what the report calls it; no two have the same.
        path: its folder; None for a run that an evaluation tells of, whose folder is gone.
        info: run.json, or nothing.
        log, by_epoch: the columns of log.csv and of diagnostics.csv, or nothing.
        evaluated: by benchmark.
        change: of the features from checkpoint to checkpoint, and the epoch of each; None if it was not measured.
        missing: what the report cannot show, and how to get it.
    """

    name: str
    path: Path | None
    info: dict[str, Any] = field(default_factory=dict)
    log: Columns = field(default_factory=dict)
    by_epoch: Columns = field(default_factory=dict)
    evaluated: dict[str, Evaluated] = field(default_factory=dict)
    change: FeatureChange | None = None
    change_epochs: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings of the training, or nothing."""
        told = (evaluated.run.trained.recipe for evaluated in self.evaluated.values())
        return self.info.get("recipe") or next((recipes.as_dict(recipe) for recipe in told if recipe), {})


def first_of_each(records: Sequence[Record]) -> list[Record]:
    """One run of each method, the first: whose plots stand for the others."""
    found: dict[Any, Record] = {}
    for record in records:
        methods = [evaluated.run.trained.method for evaluated in record.evaluated.values()]
        found.setdefault(methods[0] if methods else record.name, record)
    return list(found.values())


def place_of(trained: Trained) -> Path:
    """Where a run or checkpoint was. Its name was seen from where the evaluation was made, and may be another here."""
    folder, name = trained.folder.expanduser().resolve(), Path(trained.name).expanduser()
    return folder / name.name if name == Path(trained.checkpoint).expanduser() else folder
