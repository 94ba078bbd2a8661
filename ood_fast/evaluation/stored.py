"""The evaluation of stored features: the same numbers, from files that any tool can write, see `ood_fast.features`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import agreement, checks, features
from ..detectors import Detector
from .cache import CHUNK_VALUES, Outputs, moved, refuse_nan
from .measure import Named, by_name, check_names, measure, separate
from .results import CSID, FIT, ID, TEST, VALIDATION, VALIDATION_OOD, Results, RunResult, TestSet
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

    def __init__(self, name: str, path: str | os.PathLike[str], head: Head | None, group: str) -> None:
        self.name, self.title, self.group, self.head = name, str(path), group, head
        self.file = Path(path).expanduser()
        rows, counts = 0, None
        held: set[tuple[int, int | None, bool]] = set()
        for stored in self._stored():
            n_classes = None if stored.logits is None else stored.logits.shape[1]
            held.add((stored.features.shape[1], n_classes, stored.targets is not None))
            if group in (ID, CSID) and stored.targets is not None and stored.logits is not None:
                self._check_targets(stored.targets, stored.logits.shape[1], rows)
                counted = agreement.confusion(stored.logits, stored.targets)
                counts = counted if counts is None or counts.shape != counted.shape else counts + counted
            rows += len(stored)
        if counts is not None:
            agreement.refuse_order(counts, str(self.file))
        if len(held) != 1:
            reason = "holds no sample" if not held else "features, logits or targets are not alike in all of it"
            raise checks.UserError(f"{self.file}: {reason}")
        ((self.n_features, self.n_classes, self.has_targets),) = held
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def _check_targets(self, targets: Tensor, n_classes: int, first: int) -> None:
        if (outside := (targets < 0) | (targets >= n_classes)).any():
            row = int(outside.int().argmax())
            raise checks.UserError(
                f"{self.file}: row {first + row}: got target {int(targets[row])}, expected a class index in "
                f"[0, {n_classes})"
            )

    def _stored(self) -> Iterator[features.Stored]:
        for stored in features.batches(self.file, nan=True):  # `chunks` refuses it
            try:
                yield stored.with_logits(self.head)
            except ValueError as error:  # the head is of another width
                raise checks.UserError(f"{self.file}: {error}") from error

    def chunks(self, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """As those of `cache.Outputs`; ValueError for NaN."""
        first, step = 0, max(1, CHUNK_VALUES // (self.n_features + (self.n_classes or 0)))
        for stored in self._stored():
            named = lambda row, first=first: f"{self.file}: row {first + row}"  # noqa: E731
            refuse_nan(named, features=stored.features, logits=stored.logits)
            for start in range(0, len(stored), step):
                part = stored.rows(slice(start, start + step))
                yield moved(part.features, part.logits, part.targets, device)
            first += len(stored)


@dataclass(frozen=True)
class StoredValidation:
    """What detectors are chosen by, where features are stored.

    Attributes:
        validation: ID data that was not trained on; detectors with `fits_on = "validation"` are fitted on it, else on
            the training data.
        ood_validation: sets of OOD data by which parameters are chosen, with `validation`; their AUROCs are averaged.
        head: (W, b); None: the one stored with the training data, if any.
    """

    validation: str | os.PathLike[str] | None = None
    ood_validation: Sequence[str | os.PathLike[str]] = ()
    head: Head | None = None


def evaluate_features(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str],
    ood: Mapping[str, tuple[str, str | os.PathLike[str]]],
    chosen: Named = None,
    **options: Any,
) -> Results:
    """As `evaluate_run`, from stored features in place of a model and images.

    Detectors that pass images through the model, or read what is not stored (logits, the head, the targets of the
    training data), are left out, with a note. Without logits and targets of the test data there is no accuracy.

    Args:
        train, test: feature files or folders of them, of the ID training and test data.
        ood: name -> (group, files), group "near", "far" or "csid", a covariate-shifted in-distribution set.
        chosen: as in `evaluate_run`.
        options: the keywords of `StoredValidation`, without which parameters are as they are, and of `Measuring`.

    Raises:
        UserError: a file that cannot be read or does not fit the others; an ID target that is no class index; test data
            for validation; a detector asked for by name that cannot be fitted.
        ValueError: NaN in features or logits.
    """
    how, given = separate(options, StoredValidation)
    how = how.for_chosen(chosen)
    _check_names(train, test, ood, given.validation, given.ood_validation)
    head = features.load_head(features.files(train)[0]) if given.head is None else given.head
    parts, against = _open_parts(train, test, ood, replace(given, head=head))

    sets = {ID: TestSet(str(test), "id", len(parts[TEST]))}
    sets |= {name: TestSet(str(path), group, len(parts[name])) for name, (group, path) in ood.items()}
    run = Trained(str(train), None, METHOD, Path(train).expanduser(), "")
    result = RunResult(run, "", sets, outputs=cast(dict[str, Outputs], parts))  # that have what is read of them
    if head is not None:
        result.head = head[0].double(), None if head[1] is None else head[1].double()
    usable = {}
    for name, detector in by_name(chosen).items():
        if reason := _unusable(detector, parts, head):
            if not how.leave_out:
                raise checks.UserError(f"{name}: {reason}")
            result.notes.append(f"{name}: left out: {reason}")
        else:
            usable[name] = detector
    tuned = how.tune and given.validation is not None and bool(given.ood_validation)
    if how.tune and not tuned:
        result.notes.append("parameters as they are: choosing them needs validation data, ID and OOD")
    if parts[TEST].n_classes is None or not parts[TEST].has_targets:
        result.notes.append("accuracy and calibration: need logits and targets of the test data")
    measure(result, usable, against, replace(how, tune=tuned))
    return Results(BENCHMARK, [result], how.bootstrap, tuned)


def _open_parts(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str],
    ood: Mapping[str, tuple[Any, ...]],
    given: StoredValidation,
) -> tuple[dict[str, StoredOutputs], list[str]]:
    """Every data set by its name, and the names of those that parameters are chosen by."""
    head = given.head
    parts = {FIT: StoredOutputs(FIT, train, head, "id")}
    if given.validation is not None:
        parts[VALIDATION] = StoredOutputs(VALIDATION, given.validation, head, "id")
    against = [f"{VALIDATION_OOD} {index}" for index in range(len(given.ood_validation))]
    for name, path in zip(against, given.ood_validation, strict=True):
        parts[name] = StoredOutputs(name, path, head, "validation")
    parts[TEST] = StoredOutputs(TEST, test, head, "id")
    for name, (group, path) in ood.items():
        parts[name] = StoredOutputs(name, path, head, group)
    _check_alike(parts, head)
    return parts, against


def _check_names(
    train: object, test: object, ood: Mapping[str, Any], validation: object | None, ood_validation: Sequence[Any]
) -> None:
    check_names(ood)
    for name, (group, _) in ood.items():
        if group not in ("near", "far", CSID):
            raise checks.UserError(f"OOD set {name!r}: got group {group!r}, expected 'near', 'far' or '{CSID}'")
    if all(group == CSID for group, _ in ood.values()):
        raise checks.UserError(f"ood: got {list(ood) or 'no OOD set'}, expected at least one OOD set")
    if ood_validation and validation is None:
        raise checks.UserError("ood_validation: only used together with validation")
    places = {"train": train, "test": test, **{name: path for name, (group, path) in ood.items() if group != CSID}}
    first: dict[Path, str] = {}
    for name, path in places.items():
        if (other := first.setdefault(Path(path).expanduser().resolve(), name)) != name:
            raise checks.UserError(
                f"{name}: is the same as {other}, expected other data; what a detector was fitted on or is told from "
                "cannot test it"
            )
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
