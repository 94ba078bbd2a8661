"""The runs and evaluations that folders hold.

records = open_records(["runs/cifar10-ce/s0", "runs/cifar10-elogitnorm/s0"])
diagnose_runs(records)       # of `.diagnoses`: from the features that `ood-fast evaluate` keeps
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .. import checks, evaluation, spreadsheet
from ..evaluation.results import CSID, GROUPS
from ..evaluation.write import RESULTS
from ..training.folder import CHECKPOINTS, DIAGNOSTICS, LOG, RUN, read_info
from .diagnoses import checkpoints_of, read_change
from .record import Columns, Evaluated, Record, place_of


def open_records(paths: Sequence[str | os.PathLike[str]]) -> list[Record]:
    """The runs that `paths` mean.

    Args:
        paths: folders of `ood-fast train`, with the evaluations below their `eval/`; folders with such runs as s0/,
            s1/, ...; folders that `ood-fast evaluate` wrote, for the runs it was about. A run is taken once.

    Raises:
        UserError: a folder is missing or is none of these, or a file in it cannot be read.
    """
    found: dict[str, Record] = {}
    for given in paths:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise checks.UserError(f"{given}: no such folder, expected one of `ood-fast train` or `ood-fast evaluate`")
        if (folder / RESULTS).is_file():
            evaluations = [Evaluated.read(folder)]
            told = [(place_of(each.run.trained), each.run.trained.name) for each in evaluations[0]]
            runs = [(place if (place / RUN).is_file() else None, place, name) for place, name in told]  # it may be gone
        else:
            runs = [(Path(path), Path(path), path) for path in evaluation.paths_of(folder)]
            evaluations = list(_evaluations(folder))
        for path, place, name in runs:
            record = found.setdefault(str(place.resolve()), _read(path, name if path else str(place)))
            own = list(_evaluations(path)) if path and path != folder else []
            for held in (*evaluations, *own, *_above(path)):
                entry = _entry(held, path, name, record.info.get("id"))
                if entry is not None:
                    shown = record.evaluated.setdefault(entry.results.benchmark, entry)
                    if entry.folder == folder and not folder.samefile(shown.folder):
                        told_of = f"the evaluation in {folder}: that in {shown.folder} is shown, of the same benchmark"
                        record.missing.append(f"{told_of}; report it by itself")
            if not record.info and not record.evaluated:
                raise checks.UserError(
                    f"{path}: neither a run of `ood-fast train` ({RUN}) nor evaluated (eval/); expected one of them"
                )
    records = list(found.values())
    for record, name in zip(records, _short_names([record.name for record in records]), strict=True):
        record.name = name
        record.missing += _missing(record)
    _refuse_other_sets(records)
    return records


def _refuse_other_sets(records: Sequence[Record]) -> None:
    """UserError for evaluations on one benchmark whose means are over other sets: no difference of them means much."""
    for benchmark in dict.fromkeys(name for record in records for name in record.evaluated):
        for group in (*GROUPS, CSID):
            first: tuple[str, list[str]] | None = None
            for record in records:
                sets = record.evaluated[benchmark].results.sets.items() if benchmark in record.evaluated else ()
                names = sorted(name for name, part in sets if part.group == group)
                if not sets or (group == CSID and not names):
                    continue
                first = first or (record.name, names)
                if names != first[1]:
                    told = (f"{', '.join(of) or 'none'} ({name})" for name, of in (first, (record.name, names)))
                    raise checks.UserError(
                        f"{benchmark}: evaluated on other {group} sets, {' and '.join(told)}, whose means cannot be "
                        "compared; evaluate all on the same, or report them one by one"
                    )


def _read(path: Path | None, name: str) -> Record:
    record = Record(name, path)
    if path is not None:
        record.info = read_info(path) if (path / RUN).is_file() else {}
        record.log, record.by_epoch = _columns(path / LOG), _columns(path / DIAGNOSTICS)
        read_change(record, path)
    return record


def _columns(file: Path) -> Columns:
    """The columns of a table of numbers; nothing if it is not there. What is empty is NaN."""
    try:
        rows = spreadsheet.read_records(file)
        return {name: [float(row[name] or math.nan) for row in rows] for name in (rows[0] if rows else ())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise checks.UserError(f"{file}: cannot be read as a table of numbers ({error})") from error


def _evaluations(folder: Path) -> Iterator[list[Evaluated]]:
    for file in sorted(folder.glob(f"eval/*/{RESULTS}")):
        yield Evaluated.read(file.parent)


def _above(path: Path | None) -> list[list[Evaluated]]:
    """Those of the folder around a run: `ood-fast evaluate RUNS` writes RUNS/eval, about RUNS/s0, RUNS/s1, ..."""
    with suppress(checks.UserError):  # a file that is not about this run must not stop its report
        return list(_evaluations(path.resolve().parent)) if path else []
    return []


def _entry(held: Sequence[Evaluated], path: Path | None, name: str, id_: str | None) -> Evaluated | None:
    """What an evaluation says of a run, by its id. Where one of the two has none, folders that were moved are known by
    their names."""
    ids = [(each.run.trained.info or {}).get("id") for each in held]
    if id_ is not None and all(ids):
        same = [each for each, of in zip(held, ids, strict=True) if of == id_]
    elif path is not None:
        same = [each for each in held if place_of(each.run.trained) == path.resolve()]
        if not same and len(held) == 1 and path in held[0].folder.parents:  # RUN/eval/BENCHMARK
            same = [*held]
        same = same or [each for each in held if Path(each.run.trained.name).name == path.name]
    else:
        same = [each for each in held if each.run.trained.name == name]
    return same[0] if len(same) == 1 else None


def _short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart; of a seed's folder (s0) the one above too."""
    parts = [Path(name).resolve().parts if Path(name).exists() else Path(name).parts for name in names]

    def shortened(length: int) -> list[str]:
        kept = [p[-max(length, 2 if p and p[-1][:1] == "s" and p[-1][1:].isdigit() else 1) :] for p in parts]
        return ["/".join(part.strip("/") for part in of) for of in kept]

    candidates = map(shortened, range(1, max(map(len, parts)) + 1))
    return next((short for short in candidates if len(set(short)) == len(short)), list(names))


def _missing(record: Record) -> list[str]:
    found = []
    if not record.info:
        found.append("training curves: there is no run.json, `ood-fast train` did not train it here")
    elif not record.log.get("epoch"):
        found.append("training curves: no epoch is complete")
    elif not record.by_epoch.get("epoch"):
        found.append("diagnostics by epoch: train with --diagnostics")
    if not record.evaluated:
        found.append(f"evaluation and diagnostics: run {_evaluate_command(record)}")
    for benchmark, evaluated in record.evaluated.items():
        trained, now = evaluated.run.trained, record.info.get("epochs")
        then = (trained.info or {}).get("epochs")
        replaced = Path(trained.checkpoint).name in CHECKPOINTS.values()  # by the training that went on
        if replaced and None not in (then, now) and then != now:
            again = evaluated.command
            found.append(f"evaluation on {benchmark} after the last epoch: it is of epoch {then} of {now}; run {again}")
    if record.info and record.change is None:
        again = f"ood-fast report {shlex.quote(str(record.path))} --feature-change"
        if len(checkpoints_of(record.path)) < 2:
            again = f"train with --keep-every 1, then {again}"
        found.append(f"change of the features by norm (it runs the model of each checkpoint): {again}")
    return found


def missing(records: Sequence[Record]) -> dict[str, list[str]]:
    """What the report cannot show, with the names of the runs, which are counted where it is missing in more than two
    and in all; RUN stands for each where several have the same note."""
    found: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        path = re.escape(shlex.quote(str(record.path)))
        for note in record.missing:
            found.setdefault(re.sub(rf"(?<!\S){path}(?!\S)", "RUN", note), []).append((record.name, note))
    told = {}
    for common, notes in found.items():
        names = [name for name, _ in notes]
        everywhere = len(names) == len(records) > 2
        told[common if len(notes) > 1 else notes[0][1]] = [f"all {len(names)} runs"] if everywhere else names
    return told


def _evaluate_command(record: Record) -> str:
    data = record.info.get("data", {})
    layout = data.get("layout", "auto")
    given = [("--data-root", data.get("root")), ("--layout", layout if layout != "auto" else None)]
    given += [("--image-size", data.get("image_size")), *(("--plugin", of) for of in record.info.get("plugins", ()))]
    arguments = [str(part) for option, value in given if value for part in (option, value)]
    return shlex.join(["ood-fast", "evaluate", str(record.path), *arguments])
