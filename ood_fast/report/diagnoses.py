"""What a report computes of runs: the diagnosis of their features, and how these change from checkpoint to checkpoint.

Both are kept beside the features, for the next report. Only `measure_change` runs models.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from .. import checks, evaluation, files
from ..data.benchmarks import ImageBenchmark, open_benchmark
from ..data.loading import Loader
from ..data.specs import SPECS
from ..diagnostics import Diagnosis, FeatureChange, diagnose, feature_change
from ..evaluation.cache import Progress, counted, no_progress
from ..evaluation.results import FIT, TEST, VALIDATION, VALIDATION_OOD
from ..intact import read_npz, write_npz
from ..training.folder import EPOCHS, load_run
from .record import Evaluated, Record

DIAGNOSIS = "ood_fast diagnosis of features 1"  # part of the name of a kept one: another way to compute is another name
CHANGE = "ood_fast change of features 1"


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
    checkpoints = checkpoints_of(path)
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


def opened(
    record: Record, data_root: str | os.PathLike[str] | None = None, wanted: Iterable[str] | None = None
) -> ImageBenchmark:
    """The benchmark that a run was trained on, from `data_root` or where it was trained from, with those OOD sets of it
    that are `wanted`. UserError if it cannot be."""
    if not record.info:
        raise checks.UserError(f"{record.name}: no run of `ood-fast train`, which says where its images are")
    data, seed = record.info.get("data", {}), record.info.get("seed", 0)
    given = {"layout": data.get("layout", "auto"), "image_size": data.get("image_size"), "seed": seed}
    name = str(record.info["benchmark"])
    if wanted is not None and (spec := SPECS.get(name)) is not None:  # the others need not be there
        given["ood"] = [title for title in wanted if title in (*spec.near, *spec.far)]
    return open_benchmark(name, data_root or data.get("root"), **given)


def read_change(record: Record, path: Path) -> None:
    """Into the record: what `measure_change` kept in the folder of a run."""
    checkpoints = checkpoints_of(path)
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


def checkpoints_of(path: Path | None) -> list[Path]:
    """By epoch; the folder holds 0010.ckpt and the like."""
    checkpoints = [] if path is None else [file for file in (path / EPOCHS).glob("*.ckpt") if file.stem.isdigit()]
    return sorted(checkpoints, key=_epoch)


def _epoch(file: Path) -> int:
    return int(file.stem)
