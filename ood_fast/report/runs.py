"""What trained runs left on the disk. Nothing here runs a model but `measure_change`.

records = open_records(["runs/cifar10-ce/s0", "runs/cifar10-elogitnorm/s0"])
diagnose_runs(records)       # from the features that `ood-fast evaluate` keeps; itself kept beside them
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checks, evaluation, files, recipes, spreadsheet
from ..data.benchmarks import ImageBenchmark, open_benchmark
from ..data.loading import Loader
from ..diagnostics import Diagnosis, FeatureChange, diagnose, feature_change
from ..evaluation.cache import Progress, counted, no_progress
from ..evaluation.results import CSID, FIT, GROUPS, TEST, VALIDATION, VALIDATION_OOD, Results, RunResult
from ..evaluation.trained import Trained
from ..evaluation.write import RESULTS
from ..intact import read_npz, write_npz
from ..training.folder import CHECKPOINTS, DIAGNOSTICS, EPOCHS, LOG, RUN, load_run, read_info

Columns = dict[str, list[float]]
DIAGNOSIS = "ood_fast diagnosis of features 1"  # part of the name of a kept one: another way to compute is another name
CHANGE = "ood_fast change of features 1"


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


# ---- finding what is there


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
                    if entry.folder == folder != shown.folder:
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
        _read_change(record, path)
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


def place_of(trained: Trained) -> Path:
    """Where a run or checkpoint was. Its name was seen from where the evaluation was made, and may be another here."""
    folder, name = trained.folder.expanduser().resolve(), Path(trained.name).expanduser()
    return folder / name.name if name == Path(trained.checkpoint).expanduser() else folder


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
        if len(_checkpoints(record.path)) < 2:
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


# ---- diagnoses, from the cached features


def diagnose_runs(records: Sequence[Record], progress: Progress = no_progress) -> None:
    """The `Diagnosis` of each run on each benchmark that it was evaluated on, from the features in the cache of the
    evaluation. What was found is kept there too: the next report reads it. Where it cannot be, `missing` says why."""
    for record in records:
        for benchmark, evaluated in record.evaluated.items():
            try:
                outputs = _outputs(record, evaluated)
                evaluated.diagnosis = _kept(outputs) or _diagnosed(outputs, f"{record.name} on {benchmark}", progress)
            except checks.UserError as error:
                again = evaluated.command
                record.missing.append(f"diagnostics on {benchmark}: {error}; to make them again: {again}")
            except (ValueError, FloatingPointError) as error:
                record.missing.append(f"diagnostics on {benchmark}: {error}")


def _outputs(record: Record, evaluated: Evaluated) -> dict[str, Path]:
    """The folder of the cache of each set, which may have been moved with the run; UserError if one is not there."""
    folders = {}
    if FIT not in evaluated.outputs:
        unread = "no detector of it read the training images"
        raise ValueError(unread if evaluated.outputs else "evaluated from stored features, not from a run")
    for name, told in evaluated.outputs.items():
        if name in (VALIDATION, VALIDATION_OOD):
            continue
        below = Path(*Path(told).parts[-2:])
        own = [] if record.path is None else [record.path / "cache" / below]
        places = [*own, Path(told), evaluated.folder.parent.parent / "cache" / below]
        place = next((place for place in places if place.is_dir()), None)
        if place is None:
            raise checks.UserError(f"the features of {name} are no longer in {told}")
        folders[name] = place
    return folders


def _kept_file(outputs: Mapping[str, Path]) -> Path:
    """The names of folders in the cache stand for the weights of the model and the images of the sets."""
    key = hashlib.sha256(repr([DIAGNOSIS, *((name, path.name) for name, path in outputs.items())]).encode())
    return outputs[FIT].parent / f"diagnosis-{key.hexdigest()[:16]}.npz"


def _kept(outputs: Mapping[str, Path]) -> Diagnosis | None:
    file = _kept_file(outputs)
    try:
        return Diagnosis.load(file) if file.is_file() else None
    except checks.UserError:  # damaged, or of another version: computed anew
        return None


def _diagnosed(folders: Mapping[str, Path], what: str, progress: Progress) -> Diagnosis:
    outputs = {name: evaluation.read_outputs(folder) for name, folder in folders.items()}
    weight, bias = evaluation.read_head(folders[FIT])
    with progress(f"diagnosing {what}", sum(map(len, outputs.values()))) as bar:
        chunks = {name: counted(part.chunks(), bar) for name, part in outputs.items()}
        train, test = chunks.pop(FIT), chunks.pop(TEST)
        found = diagnose(train, test, chunks, (weight, bias))
    with suppress(OSError):  # a cache that cannot be written: it is computed again the next time
        found.save(_kept_file(folders))
    return found


# ---- change of the features; this one runs models


def measure_change(
    record: Record,
    data_root: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 0,
    progress: Progress = no_progress,
) -> None:
    """`feature_change` over the checkpoints in `RUN/epochs`, on the ID test images (Haas et al., fig. 3, centre), kept
    in `RUN/cache`.

    Args:
        data_root: None: the folder that the run was trained from.

    Raises:
        UserError: fewer than two checkpoints; images or checkpoints cannot be read.
    """
    path = record.path
    if path is None or not record.info:
        raise checks.UserError(f"{record.name}: no run of `ood-fast train`; its checkpoints cannot be opened")
    checkpoints = _checkpoints(path)
    if len(checkpoints) < 2:
        told = f"got {len(checkpoints)} checkpoints, expected two or more; train with --keep-every 1"
        raise checks.UserError(f"{path / EPOCHS}: {told}")
    loader = Loader(opened(record, data_root).test, batch_size=batch_size, num_workers=workers)
    with progress(f"change of the features of {record.name}", len(checkpoints)) as bar:

        def models() -> Iterator[torch.nn.Module]:
            for file in checkpoints:
                yield load_run(path, f"{EPOCHS}/{file.name}")[0].to(device)
                bar.advance(1)

        record.change, record.change_epochs = feature_change(models(), loader), list(map(_epoch, checkpoints))
    record.missing = [note for note in record.missing if not note.startswith("change of the features")]
    kept = _change_file(path, checkpoints)
    found = {name: getattr(record.change, name).numpy() for name in ("edges", "count", "steps")}
    with suppress(OSError):  # measured again the next time
        kept.parent.mkdir(exist_ok=True)
        with files.replacing(kept) as part, part.open("wb") as stream:
            write_npz(stream, found)


def opened(record: Record, data_root: str | os.PathLike[str] | None = None) -> ImageBenchmark:
    """The benchmark that a run was trained on, from `data_root` or where it was trained from. UserError if it cannot
    be."""
    if not record.info:
        raise checks.UserError(f"{record.name}: no run of `ood-fast train`, which says where its images are")
    data, seed = record.info.get("data", {}), record.info.get("seed", 0)
    given = {"layout": data.get("layout", "auto"), "image_size": data.get("image_size"), "seed": seed}
    return open_benchmark(str(record.info["benchmark"]), data_root or data.get("root"), **given)


def _read_change(record: Record, path: Path) -> None:
    checkpoints = _checkpoints(path)
    kept = _change_file(path, checkpoints)
    if kept.is_file():
        with suppress(checks.UserError, KeyError):  # damaged: it can be measured again
            held = read_npz(kept)
            record.change = FeatureChange(*(torch.from_numpy(held[name]) for name in ("edges", "count", "steps")))
            record.change_epochs = list(map(_epoch, checkpoints))


def _change_file(path: Path, checkpoints: Sequence[Path]) -> Path:
    """Where the change over these checkpoints is kept: other checkpoints have another name."""
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoints]
    return path / "cache" / f"change-{hashlib.sha256(repr([CHANGE, told]).encode()).hexdigest()[:16]}.npz"


def _checkpoints(path: Path | None) -> list[Path]:
    """By epoch; the folder holds 0010.ckpt and the like."""
    checkpoints = [] if path is None else [file for file in (path / EPOCHS).glob("*.ckpt") if file.stem.isdigit()]
    return sorted(checkpoints, key=_epoch)


def _epoch(file: Path) -> int:
    return int(file.stem)
