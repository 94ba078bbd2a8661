"""The evaluation of stored features: the same numbers, from files that any tool can write, see `ood_fast.features`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from .. import checks, features
from ..detectors import Detector
from .cache import CHUNK_VALUES, refuse_nan
from .results import ID, Results, RunResult, TestSet
from .run import FIT, RESERVED, TEST, VALIDATION, VALIDATION_OOD, Progress, _given, _grids, measure
from .trained import Trained

METHOD = BENCHMARK = "features"
Head = tuple[Tensor, Tensor | None]


class StoredOutputs:
    """What a model made of one data set, in a feature file or a folder of them; one file is in memory at a time.

    As `cache.Outputs`, without features and logits as tensors. All files are read once to begin with.

    Raises:
        UserError: a file cannot be read, holds nothing, or does not hold what the others do.
    """

    path = None  # no folder of the cache
    scores: Mapping[str, Tensor] = {}

    def __init__(self, name: str, path: str | os.PathLike, head: Head | None, group: str) -> None:
        self.name, self.title, self.group, self.head = name, str(path), group, head
        self.file = Path(path).expanduser()
        rows, held = 0, set()
        self.n_features = self.n_classes = None
        for stored in self._stored():
            shape = (stored.features.shape[1], None if stored.logits is None else stored.logits.shape[1])
            held.add((*shape, stored.targets is not None))
            if group == "id":
                self._check_targets(stored, rows)
            rows += len(stored)
        if len(held) != 1:
            reason = "holds no sample" if not held else "features, logits or targets are not alike in all of it"
            raise checks.UserError(f"{self.file}: {reason}")
        ((self.n_features, self.n_classes, self.has_targets),) = held
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def _check_targets(self, stored: features.Stored, first: int) -> None:
        if stored.targets is None or stored.logits is None:
            return
        n_classes = stored.logits.shape[1]
        if (outside := (stored.targets < 0) | (stored.targets >= n_classes)).any():
            row = int(outside.int().argmax())
            raise checks.UserError(
                f"{self.file}: row {first + row}: got target {int(stored.targets[row])}, expected a class index in "
                f"[0, {n_classes})"
            )

    def _stored(self) -> Iterator[features.Stored]:
        for stored in features.batches(self.file):
            try:
                yield stored.with_logits(self.head)
            except ValueError as error:  # the head is of another width
                raise checks.UserError(f"{self.file}: {error}") from error

    def chunks(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Features, logits and targets, as many rows at a time as `cache.CHUNK_VALUES` allows, in order.

        Raises ValueError for NaN.
        """
        first, step = 0, max(1, CHUNK_VALUES // (self.n_features + (self.n_classes or 0)))
        for stored in self._stored():
            refuse_nan(
                lambda row, first=first: f"{self.file}: row {first + row}",
                features=stored.features,
                logits=stored.logits,
            )
            for start in range(0, len(stored), step):
                part = stored.rows(slice(start, start + step))
                yield (
                    part.features.to(device=device, dtype=dtype),
                    None if part.logits is None else part.logits.to(device=device, dtype=dtype),
                    None if part.targets is None else part.targets.to(device),
                )
            first += len(stored)


def evaluate_features(
    train: str | os.PathLike,
    test: str | os.PathLike,
    ood: Mapping[str, tuple[str, str | os.PathLike]],
    chosen: Mapping[str, Detector] | Iterable[str] | None = None,
    *,
    validation: str | os.PathLike | None = None,
    ood_validation: Sequence[str | os.PathLike] = (),
    head: Head | None = None,
    tune: bool = True,
    grids: Mapping[str, Mapping[str, Iterable]] | None = None,
    device: torch.device | str = "cpu",
    bootstrap: int = 200,
    seed: int = 0,
    leave_out: bool | None = None,
    progress: Progress = lambda what, total: nullcontext(),
) -> Results:
    """As `evaluate_run`, from stored features in place of a model and images.

    Detectors that pass images through the model, or read what is not stored (logits, the head, the targets of the
    training data), are left out, with a note. Without logits and targets of the test data there is no accuracy.

    Args:
        train, test: feature files or folders of them, of the ID training and test data.
        ood: name -> (group, files), group "near" or "far".
        validation: ID data that was not trained on; detectors with `fits_on = "validation"` are fitted on it, else on
            `train`.
        ood_validation: sets of OOD data by which parameters are chosen, with `validation`; their AUROCs are averaged.
        head: (W, b); None: the one stored with `train`, if any.
        tune: False: parameters as they are. So too without `validation` and `ood_validation`.
        chosen, grids, device, bootstrap, seed, leave_out, progress: as in `evaluate_run`.

    Raises:
        UserError: a file that cannot be read or does not fit the others; an ID target that is no class index; test data
            for validation; a detector asked for by name that cannot be fitted.
        ValueError: NaN in features or logits.
    """
    _check_names(test, ood, validation, ood_validation)
    given, optional = _given(chosen), chosen is None if leave_out is None else leave_out
    if head is None:
        head = features.load_head(features.files(train)[0])
    parts = {FIT: StoredOutputs(FIT, train, head, "id")}
    if validation is not None:
        parts[VALIDATION] = StoredOutputs(VALIDATION, validation, head, "id")
    against = [f"{VALIDATION_OOD} {index}" for index in range(len(ood_validation))]
    for name, path in zip(against, ood_validation, strict=True):
        parts[name] = StoredOutputs(name, path, head, "validation")
    parts[TEST] = StoredOutputs(TEST, test, head, "id")
    for name, (group, path) in ood.items():
        parts[name] = StoredOutputs(name, path, head, group)
    _check_alike(parts, head)

    sets = {ID: TestSet(str(test), "id", len(parts[TEST]))}
    sets |= {name: TestSet(str(path), group, len(parts[name])) for name, (group, path) in ood.items()}
    run = Trained(str(train), None, METHOD, Path(train).expanduser(), "")
    result = RunResult(run, "", sets, outputs=parts)
    result.head = head and tuple(None if tensor is None else tensor.double() for tensor in head)
    usable = {}
    for name, detector in given.items():
        if reason := _unusable(detector, parts, head):
            if not optional:
                raise checks.UserError(f"{name}: {reason}")
            result.notes.append(f"{name}: left out: {reason}")
        else:
            usable[name] = detector
    tuned = tune and validation is not None and bool(ood_validation)
    if tune and not tuned:
        result.notes.append("parameters as they are: choosing them needs validation data, ID and OOD")
    if parts[TEST].n_classes is None or not parts[TEST].has_targets:
        result.notes.append("accuracy and calibration: need logits and targets of the test data")
    measure(
        result,
        usable,
        against,
        grids=_grids(usable, tuned, grids),
        optional=optional,
        device="cpu" if torch.device(device).type == "mps" else device,
        bootstrap=bootstrap,
        seed=seed,
        progress=progress,
    )
    return Results(BENCHMARK, [result], bootstrap, tuned)


def _check_names(test: object, ood: Mapping, validation: object | None, ood_validation: Sequence) -> None:
    if not ood:
        raise checks.UserError("ood: got no OOD set, expected at least one")
    for name, (group, _) in ood.items():
        if name in RESERVED:
            raise checks.UserError(f"OOD set {name!r}: tables call something else by this name; choose another")
        if group not in ("near", "far"):
            raise checks.UserError(f"OOD set {name!r}: got group {group!r}, expected 'near' or 'far'")
    if ood_validation and validation is None:
        raise checks.UserError("ood_validation: only used together with validation")
    tested = {Path(path).expanduser().resolve() for path in [test, *(path for _, path in ood.values())]}
    for path in [validation, *ood_validation]:
        if path is not None and Path(path).expanduser().resolve() in tested:
            raise checks.UserError(
                f"validation, ood_validation: {path} is tested with; parameters that were chosen on it make its "
                "results worthless, choose on other data"
            )


def _check_alike(parts: Mapping[str, StoredOutputs], head: Head | None) -> None:
    first = parts[FIT]
    if head is not None and tuple(head[0].shape) != (first.n_classes, first.n_features):
        raise checks.UserError(
            f"head: got W of shape {tuple(head[0].shape)}, expected ({first.n_classes}, {first.n_features}), as logits "
            f"and features in {first.file}"
        )
    for part in parts.values():
        for what in ("n_features", "n_classes"):
            if getattr(part, what) != getattr(first, what):
                got, expected = getattr(part, what) or "no", getattr(first, what) or "none"
                raise checks.UserError(
                    f"{part.file}: got {got} {what.removeprefix('n_')}, expected {expected} as in {first.file}; all "
                    "must come from one model"
                )


def _unusable(detector: Detector, parts: Mapping[str, StoredOutputs], head: Head | None) -> str:
    """Why a detector cannot be used on what is stored; empty if it can."""
    fitted_on = parts[VALIDATION] if detector.fits_on == "validation" and VALIDATION in parts else parts[FIT]
    reads = {name for gathered in detector.gathers().values() for name in gathered.reads}
    if detector.needs_model:
        return "passes images through the model, features do not suffice"
    if detector.needs_head and head is None:
        return "needs the head, W and b in the first feature file or in one of its own"
    if fitted_on.n_classes is None and (detector.needs_logits or "logits" in reads):
        return "needs logits, or the head to make them with"
    if "targets" in reads and not fitted_on.has_targets:
        return f"needs targets, {fitted_on.file} holds none"
    return ""
