"""What a model makes of data sets, kept on the disk: a second evaluation reads it and runs no model.

    cache/<model>/head.npz                                           W, b
    cache/<model>/Gram-<settings>-<data>.fit                         a detector that reads layers, fitted
    cache/<model>/<set>-<data>/features.npy  logits.npy  targets.npy  meta.json  ODIN-<settings>.npy

<model> is a hash of the weights, the layers with their settings and code (`model_key`) and the place of the head;
<data> one of the images, their labels and their preparation (`ImageDataset.fingerprint`). So nothing stale is read:
other weights or other images have another name. Features (n, m) and logits (n, c) are float32, and mapped into memory
when read. Files appear under their names when all is written (`files.staged`), each with a checksum, which is looked at
before it is used. Under `torchrun` every process writes its rows of the same files: they must lie on a disk that all of
them see.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, intact
from ..data.loading import batched
from ..detectors import Detector, DetectorSet, load
from ..detectors.fitting import readings_of
from ..files import replacing, settle, staged
from ..heads import given_head, inference_head
from ..models.checkpoints import update_with_weights, weight_fingerprint
from ..models.running import run_model
from ..processes import Processes
from ..registry import code_key

META, HEAD = "meta.json", "head.npz"
CHUNK_VALUES = 1 << 23  # numbers of features and logits that are worked on at a time: 64 MiB in float64
Progress = Callable[[str, int], Any]  # (what, total) -> a context with `advance(n)`


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Any]:
    """Shows nothing."""
    yield SimpleNamespace(advance=lambda n: None)


@dataclass(frozen=True)
class Outputs:
    """What a model makes of one data set. Features and logits are maps of files: rows that are not read take no memory.

    Attributes:
        name: "fit", "validation", "validation_ood", "test", or the name of an OOD set.
        title, group: as of the `ImageDataset`.
        features, logits: (n, m) and (n, c), float32.
        targets: (n,) int64, −1 for images without a class.
        scores: (n,) float64 of the detectors that need the model, by the key of `score_key`.
        path: the folder in the cache; `read_outputs(path)` gives this again.
    """

    name: str
    title: str
    group: str
    features: Tensor
    logits: Tensor
    targets: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def chunks(self, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features and logits in float64, and targets, as many rows at a time as `CHUNK_VALUES` allows, in order."""
        rows = max(1, CHUNK_VALUES // (self.features.shape[1] + self.logits.shape[1]))
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            yield moved(self.features[part], self.logits[part], self.targets[part], device)


def moved(
    features: Tensor, logits: Tensor | None, targets: Tensor | None, device: torch.device | str
) -> tuple[Tensor, Any, Any]:
    """A chunk on a device, its numbers in float64."""
    logits = None if logits is None else logits.to(device, torch.float64)
    return features.to(device, torch.float64), logits, None if targets is None else targets.to(device)


def read_outputs(path: str | os.PathLike[str]) -> Outputs:
    """What a folder of the cache holds; UserError if it does not hold all of it, as it was written."""
    path = Path(path)
    try:
        settle(path)
        for file in path.glob("*.npy"):
            intact.check_seal(file)
        return _opened(path)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:  # as JSON and NumPy say of damaged files
        raise checks.UserError(f"{path}: no features of a model there, or damaged ({error})") from error


def _opened(path: Path) -> Outputs:
    """The same without a look at the checksums of the arrays, which is one more pass over the files."""
    meta = json.loads((path / META).read_text(encoding="utf-8"))
    if meta[intact.CHECKSUM] != intact.checksum_of(meta):
        raise ValueError(f"{META} does not agree with its checksum")
    features, logits, targets = (_mapped(path / f"{file}.npy") for file in ("features", "logits", "targets"))
    scores = {file.stem: _mapped(file) for file in path.glob("*-*.npy")}
    if not {len(features), len(logits), len(targets), *map(len, scores.values())} == {len(targets)}:
        raise ValueError("files of different lengths")
    return Outputs(meta["set"], meta["title"], meta["group"], features, logits, targets, scores, path)


def read_head(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
    """W (c, m) and b (c,) or None, with which the model made the outputs in a folder of the cache; as the model has
    them. UserError if they cannot be read."""
    file = Path(path).parent / HEAD
    try:
        held = intact.read_npz(file)
        return torch.from_numpy(held["W"]), torch.from_numpy(held["b"]) if "b" in held else None
    except (KeyError, TypeError, ValueError) as error:
        raise checks.UserError(f"{file}: no head of a model there, or damaged ({error})") from error


def model_key(model: nn.Module, head: nn.Linear | None) -> str:
    """A hash of what decides features and logits: `models.weight_fingerprint`, the layers with their settings, and
    the code that is the user's own, see `registry.code_key`."""
    plain = [  # whole numbers are left out: they may count passes
        f"{path}.{name}={value!r}"
        for path, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, float, str)) and name != "training" and not name.startswith("_")
    ]
    text = f"{model!r} {weight_fingerprint(model, head)} {plain} {code_key(map(type, model.modules()))}"
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_nan(what: Callable[[int], str], **values: Tensor | None) -> None:
    """ValueError for NaN in tensors (n, ...); `what(i)` is what row i, the first with NaN, is called."""
    for name, rows in values.items():
        if rows is not None and (bad := rows.isnan().any(dim=1)).any():
            row = int(bad.int().argmax())
            raise ValueError(
                f"{what(row)}: {name}: got NaN, expected numbers; look at that input, and at the model in low precision"
            )


def score_key(detector: Detector) -> str:
    """The name of the scores of a detector that needs the model: of its settings, and of what it was fitted on."""
    digest = hashlib.sha256(repr(sorted(detector.settings().items())).encode())
    if buffers := detector.state_dict():
        update_with_weights(digest, buffers)
    return f"{type(detector).__name__}-{digest.hexdigest()[:16]}"


class FeatureCache:
    """The outputs of one model, from `folder` or, where they are not there, from one pass of the model.

    Args:
        folder: may be missing.
        model: on the device where it shall run.
        head: as in `Detector.fit`.
        n_outputs: of a model whose head is not known, of which logits alone are kept, and features (n, 0).
        batch_size, workers: of the data loader.
        progress: `progress(what, total)` gives a context with `advance(n)`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        head: str | nn.Linear | None = None,
        *,
        n_outputs: int | None = None,
        batch_size: int = 256,
        workers: int = 0,
        progress: Progress = no_progress,
    ) -> None:
        self.model, self.head = model, given_head(model, head) if n_outputs is None else None
        self.widths = (0, n_outputs or 0) if self.head is None else (self.head.in_features, self.head.out_features)
        self.key = model_key(model, self.head)
        self.folder = Path(folder).expanduser() / self.key[:16]
        self.batch_size, self.workers, self.progress = batch_size, workers, progress
        self.images_per_second: dict[str, float] = {}  # of the sets that the model ran over

    def outputs(self, name: str, dataset: Any, detectors: Sequence[Detector] = ()) -> Outputs:
        """What the model makes of `dataset`, and the scores of `detectors`, which need the model.

        Collective: under torch.distributed every process calls it, and runs the model over its share of the images.

        Raises:
            UserError: an image cannot be read; the disk has no room.
            OSError: it cannot be written. RuntimeError: another process failed.
        """
        processes = Processes.joined()
        with ExitStack() as stack:
            plan = processes.first(self._plan(name, dataset, detectors, stack) if processes.rank == 0 else None)
            if isinstance(plan, str):
                raise checks.UserError(plan)
            if plan.missing:
                error = None
                try:
                    self._run(plan, dataset, detectors)
                except BaseException as raised:
                    error = raised
                failures = [text for text in processes.everyone(error and f"{error}") if text is not None]
                if failures:
                    raise error or RuntimeError(f"another process failed: {failures[0]}")
                if processes.rank == 0:
                    self._complete(plan)
        processes.everyone(None)
        return _opened(plan.folder)

    def fitted(
        self, detectors: Mapping[str, Detector], dataset: Any, failures: dict[Detector, ValueError] | None
    ) -> dict[str, Detector]:
        """These detectors fitted on `dataset`, as they are kept in the folder; those that are not, in one more pass.

        Collective. `failures`: as in `Fit`; those take no part.
        """
        data = dataset.fingerprint()[:16]  # looks at every file
        files = {n: self.folder / f"{score_key(d)}-{data}.fit" for n, d in detectors.items()}
        kept: dict[str, Detector] = {}
        for name, file in files.items():
            with suppress(OSError, ValueError):  # not there yet, or damaged
                if isinstance(held := load(file), Detector):
                    kept[name] = held
        processes = Processes.joined()
        kept = {name: kept[name] for name in processes.first(list(kept))}
        missing = DetectorSet(rest) if (rest := {n: d for n, d in detectors.items() if n not in kept}) else None
        if missing is not None:
            missing.failures = failures
            rows = processes.share(len(dataset))
            with self.progress("fitting on layers", len(rows)) as bar:
                loader = counted(self._loader(dataset, rows), bar)
                missing.fit(self.model, loader, self.head, processes.group)
            kept |= {name: detector for name, detector in missing.items() if detector not in (failures or {})}
            if processes.rank == 0:
                for name in set(kept) & set(missing):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    kept[name].save(files[name])
        device = next(self.model.parameters()).device
        return {name: kept[name].to(device) for name in detectors if name in kept}

    def _loader(self, dataset: Any, rows: range) -> Iterable[Any]:
        return batched(
            torch.utils.data.Subset(dataset, rows),
            batch_size=self.batch_size,
            num_workers=self.workers,
            pin_memory=next(self.model.parameters()).device.type == "cuda",
        )

    def _plan(self, name: str, dataset: Any, detectors: Sequence[Detector], stack: ExitStack) -> _Plan | str:
        """What is missing, and where it is written until `stack` closes; the message of a UserError if there is no
        room."""
        data = dataset.fingerprint()
        folder = self.folder / f"{name}-{data[:16]}"
        shapes = {name: (len(dataset), width) for name, width in zip(("features", "logits"), self.widths, strict=True)}
        missing: dict[str, tuple[tuple[int, ...], str]] = {}
        if not _is_whole(folder, shapes):
            missing = {file: (shape, "<f4") for file, shape in shapes.items()}
        for key in map(score_key, detectors):
            if missing or not (folder / f"{key}.npy").is_file():
                missing[key] = ((len(dataset),), "<f8")
        meta = {"set": name, "title": dataset.title, "group": dataset.group, "data": data, "model": self.key}
        staging = folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if missing:
                needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in missing.values())
                free = shutil.disk_usage(self.folder).free
                if needed > free:
                    return (
                        f"the cache {self.folder} has {free / 2**30:.1f} GiB free, but features and logits of {name} "
                        f"take {needed / 2**30:.1f} GiB"
                    )
                staging = stack.enter_context(staged(folder))
                _remove_damaged(folder)
            else:
                self._write_head()
            for file, (shape, dtype) in missing.items():
                np.lib.format.open_memmap(staging / f"{file}.npy", "w+", np.dtype(dtype), shape).flush()
            if "features" in missing:
                np.save(staging / "targets.npy", dataset.targets.numpy())
        except OSError as error:
            return f"cannot write the cache {self.folder}: {os.strerror(error.errno) if error.errno else error}"
        return _Plan(folder, staging, missing, meta)

    def _write_head(self) -> None:
        with suppress(checks.UserError):  # not there yet, or damaged
            read_head(self.folder / META)
            return
        if self.head is None:
            return
        weight, bias = inference_head(self.head)
        held = {"W": weight} if bias is None else {"W": weight, "b": bias}
        with replacing(self.folder / HEAD) as part, open(part, "wb") as file:
            intact.write_npz(file, {name: value.detach().cpu().numpy() for name, value in held.items()})

    def _run(self, plan: _Plan, dataset: Any, detectors: Sequence[Detector]) -> None:
        """One pass over the share of this process; its rows into the files."""
        rows = Processes.joined().share(len(dataset))
        loader = self._loader(dataset, rows)
        wanted = [d for d in detectors if score_key(d) in plan.missing]
        done = rows.start
        writers = {file: _Rows(plan.staging / f"{file}.npy", rows.start) for file in plan.missing}
        start = time.perf_counter()
        try:
            with self.progress(plan.meta["set"], len(rows)) as bar:
                for batch in run_model(self.model, loader, self.head, readings_of(wanted)):
                    called = functools.partial(_image_of, plan.meta["set"], dataset, done)
                    refuse_nan(called, features=batch.features, logits=batch.logits)
                    done += len(batch.logits)
                    if "logits" in writers:
                        writers["features"].write(batch.logits[:, :0] if batch.features is None else batch.features)
                        writers["logits"].write(batch.logits)
                    for detector in wanted:
                        writers[score_key(detector)].write(detector.score_batch(self.model, batch, self.head))
                    bar.advance(len(batch.logits))
        finally:
            for writer in writers.values():
                writer.close()
        self.images_per_second[plan.meta["set"]] = len(rows) / max(time.perf_counter() - start, 1e-9)

    def _complete(self, plan: _Plan) -> None:
        """Checksums, and what names the set; the head, which made these logits."""
        self._write_head()
        for file in plan.staging.glob("*.npy"):
            intact.seal(file)
        if "features" in plan.missing:
            meta = {**plan.meta, intact.CHECKSUM: intact.checksum_of(plan.meta)}
            (plan.staging / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")


def counted(batches: Iterable[Any], bar: Any) -> Iterator[Any]:
    """The batches (x, ...), each told to a progress bar when the next is asked for."""
    for batch in batches:
        yield batch
        bar.advance(len(batch[0]))


def _is_whole(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether all is there that was published there: a disk may have lost some of it, a copy have ended early."""
    try:
        held = read_outputs(folder)
    except checks.UserError:
        return False
    found = {name: (tuple(getattr(held, name).shape), getattr(held, name).dtype) for name in shapes}
    return found == {name: (shape, torch.float32) for name, shape in shapes.items()}


def _remove_damaged(folder: Path) -> None:
    """Scores that nobody asks for now would be found damaged every time."""
    for file in folder.glob("*-*.npy"):
        try:
            intact.check_seal(file)
        except (OSError, ValueError):
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Plan:
    folder: Path
    staging: Path
    missing: dict[str, tuple[tuple[int, ...], str]]  # file -> shape, dtype
    meta: dict[str, Any]


class _Rows:
    """Consecutive rows of a .npy file that exists, from row `first`.

    Written, not mapped: on a full disk a write raises, a store into a map kills the process.
    """

    def __init__(self, path: Path, first: int) -> None:
        mapped = np.load(path, mmap_mode="r")
        self.dtype, self.row = mapped.dtype, mapped.shape[1:]
        self.file = open(path, "r+b")  # noqa: SIM115 (see close)
        self.file.seek(mapped.offset + first * mapped.dtype.itemsize * int(np.prod(self.row)))

    def write(self, values: Tensor) -> None:
        rows = values.detach().cpu().numpy().astype(self.dtype)
        if rows.shape[1:] != self.row:
            raise ValueError(f"model: got outputs of shape {rows.shape}, expected (n, {', '.join(map(str, self.row))})")
        self.file.write(rows.tobytes())

    def close(self) -> None:
        """With what was written on the disk: a file whose length is right must not lack its end after a crash."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def _image_of(name: str, dataset: Any, first: int, row: int) -> str:
    """What messages call an image of a batch that begins at `first`."""
    path = dataset.path(first + row)
    return f"{name}: image {first + row}" + ("" if path is None else f" ({path})")


def _mapped(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # "c": pages are shared until somebody writes, in memory only
