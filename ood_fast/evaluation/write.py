"""The folder that an evaluation leaves behind.

results.json         everything but the scores: numbers, intervals, published numbers, settings, trials, notes
results.csv          one number of one run a line; summary.csv: one of a method, over its runs
results.md           the tables
openood/KNN.csv      OpenOOD's form and names (knn.csv, ebo.csv, ...), in a folder for each method if there are several
scores/<run>/X.npz   the scores of detector X, an array for each set, "id" the in-distribution test images
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks, files, spreadsheet
from ..intact import read_json, read_npz, write_npz
from ..report.tables import as_markdown
from .results import FORMAT, FULL_SPECTRUM, GROUPS, Results, RunResult, Summary, run_names
from .tables import build
from .verdict import verdict

RESULTS = "results.json"
FILES = ("results.csv", "summary.csv", "results.md", "openood", "scores", RESULTS)

# What commands add, where nobody did
CONTEXT: dict[str, Any] = {"command": "ood-fast evaluate", "started": "", "seconds": 0.0}
CONTEXT |= {"versions": {}, "machine": {}, "conventions": {}}

# How OpenOOD calls the detectors in its file names; others by their own name in lower case.
OPENOOD_NAMES = {"MaxLogit": "mls", "Energy": "ebo", "KLMatching": "klm", "Mahalanobis": "mds"}
OPENOOD_COLUMNS = {"FPR@95": "fpr95_ood_positive", "AUROC": "auroc", "AUPR_IN": "aupr_in", "AUPR_OUT": "aupr_out"}
OPENOOD_COLUMNS |= {"ACC": "accuracy"}


# ---- files


def check_folder(path: str | os.PathLike[str], request: Mapping[str, Any] | None = None) -> Path:
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
    return "; ".join(f"{what}: {checks.shortened(names, 3)}" for what, names in told.items() if names)


def holds(folder: Path) -> bool:
    """Whether its results.json is of an evaluation; it says so first, even where the rest of it is damaged."""
    try:
        files.settle(folder)
        with open(folder / RESULTS, "rb") as file:
            return bool(re.match(rb'\s*\{\s*"format": "%b"' % re.escape(FORMAT).encode(), file.read(200)))
    except OSError:
        return False


def write(folder: str | os.PathLike[str], results: Results, context: Mapping[str, Any]) -> None:
    """Write all of `FILES` into `folder`, in place of what an earlier evaluation left there.

    All of it or nothing, see `files.staged`. Of two evaluations that write into one folder, the second waits.
    """
    with files.staged(folder) as staging:
        spreadsheet.write(staging / "results.csv", _long(results))
        spreadsheet.write(staging / "summary.csv", map(Summary.as_row, results.summaries()))
        text = "\n\n".join([*verdict(results), *map(as_markdown, build(results))])
        (staging / "results.md").write_text(text, encoding="utf-8")
        _write_openood(staging / "openood", results)
        (staging / "scores").mkdir()
        for run, name in zip(results.runs, run_names(results), strict=True):
            (staging / "scores" / name).mkdir()
            for detector, scores in run.scores.items():
                write_npz(staging / "scores" / name / f"{detector}.npz", scores)
        text = json.dumps(results.to_json(context), indent=1, ensure_ascii=False, allow_nan=False)
        (staging / RESULTS).write_text(text, encoding="utf-8")


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """results.json of a folder that `write` wrote; UserError if it is none, or damaged. See `Results.from_json`."""
    if not holds(Path(folder)):
        raise checks.UserError(f"{folder}: holds no evaluation; make one with: ood-fast evaluate")
    content: dict[str, Any] = read_json(Path(folder) / RESULTS)
    content |= {name: value for name, value in CONTEXT.items() if name not in content}
    try:
        Results.from_json(content)
        for name, value in CONTEXT.items():
            if not isinstance(content[name], (int, float) if isinstance(value, float) else type(value)):
                raise ValueError(f"{name}: got {content[name]!r}")
    except ValueError as error:
        raise checks.UserError(f"{Path(folder) / RESULTS}: is damaged: {error}; --overwrite makes it anew") from error
    return content


def read_scores(folder: str | os.PathLike[str], run: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """detector -> set -> (n,), of one of the `runs` of `read(folder)`."""
    files = {name: Path(folder) / run["scores"] / f"{name}.npz" for name in run["detectors"]}
    return {name: {k: v for k, v in read_npz(file).items() if v is not None} for name, file in files.items()}


def _long(results: Results) -> Iterable[dict[str, Any]]:
    for run in results.runs:
        of_run = {"method": run.trained.method, "run": run.trained.name, "seed": run.trained.seed}
        for number in run.measurements:
            yield {**of_run, **asdict(number)}


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
