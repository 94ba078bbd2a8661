"""Fitting: one pass of the data for all detectors that are fitted on it.

`Detector` and `DetectorSet` are the interface to the functions here, which take any number of detectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..heads import given_head, inference_head
from ..models.running import check_loader, run_model
from . import streaming

if TYPE_CHECKING:
    from .base import Detector

FIT_CHUNK = 65536  # rows of stored features per partial_fit: bounds the float64 copy that the sums make
Head = nn.Linear | tuple[Tensor, Tensor | None]


def fit(
    detectors: Iterable[Detector],
    model: nn.Module,
    loader: Iterable,
    head: str | nn.Linear | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Fit all of `detectors` on one pass of `model` over `loader`."""
    checks.instance("model", model, nn.Module, "an nn.Module")
    check_loader(loader)
    fitting = [detector for detector in detectors if detector.needs_fit]
    if not fitting:
        return
    _begin(fitting)
    reads_features = any("features" in part.reads for part in _parts(fitting))
    needs_head = reads_features or any(detector.needs_head for detector in fitting)
    head = given_head(model, head) if needs_head else None
    if _parts(fitting):
        with closing(run_model(model, loader, head)) as batches:  # also when partial_fit raises, the model is set back
            for batch in batches:
                partial_fit(fitting, batch.features, batch.logits, batch.targets)
    finalize(fitting, head, group)


def fit_features(
    detectors: Iterable[Detector],
    features: Tensor | None,
    logits: Tensor | None,
    targets: Tensor | None,
    head: Head | None,
) -> None:
    """Fit all of `detectors` on stored features, cut into batches."""
    fitting = [detector for detector in detectors if detector.needs_fit]
    _begin(fitting)
    n_rows = next((len(given) for given in (features, logits, targets) if given is not None), 0)
    for start in range(0, n_rows if fitting else 0, FIT_CHUNK):
        rows = slice(start, start + FIT_CHUNK)
        partial_fit(fitting, *(None if given is None else given[rows] for given in (features, logits, targets)))
    finalize(fitting, head, None)


@torch.no_grad()
def partial_fit(
    detectors: Iterable[Detector], features: Tensor | None, logits: Tensor | None, targets: Tensor | None
) -> None:
    """Take in one batch, each thing that is gathered once, whatever the number of detectors that want it."""
    fitting = [detector for detector in detectors if detector.needs_fit]
    _begin([detector for detector in fitting if detector._gathered is None])
    _check_batch(fitting, features, logits, targets)
    for part in _parts(fitting):
        part.take(features, logits, targets)


@torch.no_grad()
def finalize(detectors: Iterable[Detector], head: Head | None, group: dist.ProcessGroup | None) -> None:
    """End the fit of `detectors`, of this process or of all processes of `group`.

    With a head that does not fit nothing is lost: what was gathered stays for the right one.
    """
    _check_head_fits(detectors, head)
    fitting = [detector for detector in detectors if detector.needs_fit]
    _begin([detector for detector in fitting if detector._gathered is None])  # a process may have had no data
    if group is not None:
        streaming.gather(_parts(fitting), group)
    if head is not None and any(detector.needs_head for detector in fitting):
        weight, bias = head if isinstance(head, tuple) else inference_head(head)
        head = (weight.detach().clone(), None if bias is None else bias.detach().clone())  # one copy for all
    try:
        for detector in fitting:
            if not all(part.rows for part in detector._gathered.values()):
                raise ValueError(f"{detector.label}: no data to fit on; the loader or the feature tensor was empty")
            if detector.needs_head:
                if head is None:
                    raise ValueError(
                        f"{detector.label}: head: got None, expected the nn.Linear that made the logits, or (W, b)"
                    )
                detector.head_weight, detector.head_bias = head
            detector._failure = None
            try:
                detector._finish(**detector._gathered)
            except ValueError as error:  # k or dim does not fit the data: `Search.leave_out` drops the candidate
                if not detector._is_candidate:
                    raise ValueError(f"{detector.label}: {error}") from error
                detector._failure = error
    finally:
        for detector in fitting:
            detector._gathered = None


def _check_head_fits(detectors: Iterable[Detector], head: Head | None) -> None:
    """Whether `head` is an `nn.Linear` or (W, b) that fits the features and logits that `detectors` gathered."""
    if head is None:
        return
    if not isinstance(head, nn.Linear) and not (isinstance(head, tuple) and len(head) == 2):
        raise TypeError(f"head: got {type(head).__name__}, expected an nn.Linear or (W, b)")
    weight, bias = head if isinstance(head, tuple) else (head.weight, head.bias)
    checks.float_tensor("head: W", weight, 2, "(c, m)")
    checks.head_bias(bias, weight)
    for part in _parts(detector for detector in detectors if detector._gathered is not None):
        n_classes, n_features = (
            part.widths.get(name, n) for name, n in zip(("logits", "features"), weight.shape, strict=True)
        )
        if weight.shape != (n_classes, n_features):
            raise ValueError(
                f"head: got W of shape {tuple(weight.shape)}, expected ({n_classes}, {n_features}) to fit the features "
                "and logits given"
            )


def _begin(detectors: Iterable[Detector]) -> None:
    """Start a fit: detectors that gather the same thing share it."""
    pool: dict[tuple, streaming.Gathered] = {}
    for detector in detectors:
        detector._gathered = {name: pool.setdefault(part.key(), part) for name, part in detector.gathers().items()}


def _parts(detectors: Iterable[Detector]) -> list[streaming.Gathered]:
    """What they gather, each once."""
    parts = [part for detector in detectors for part in detector._gathered.values()]
    return list({id(part): part for part in parts}.values())


_EXPECTED = {
    "features": "the features (n, m) of the training data",
    "logits": "their logits (n, c)",
    "targets": "their class indices (n,), int64",
}


def _check_batch(
    detectors: Iterable[Detector], features: Tensor | None, logits: Tensor | None, targets: Tensor | None
) -> None:
    given = {"features": features, "logits": logits, "targets": targets}
    for detector in detectors:
        for name in sorted({name for part in detector._gathered.values() for name in part.reads}):
            if given[name] is None:
                raise ValueError(
                    f"{detector.label}: {name}: got None, expected {_EXPECTED[name]}, which it is fitted on"
                )
    if features is not None:
        checks.float_tensor("features", features, 2, "(n, m)")
        refuse_nan("features", features, 0 * features.sum(dim=1))  # NaN where a row holds inf, too
    if logits is not None:
        checks.logits(logits)
        refuse_nan("logits", logits, 0 * logits.amax(dim=1))
    if targets is not None:
        checks.instance("targets", targets, Tensor, _EXPECTED["targets"])
        if targets.dtype != torch.int64 or targets.dim() != 1:
            raise TypeError(f"targets: got {targets.dtype} {tuple(targets.shape)}, expected {_EXPECTED['targets']}")
    lengths = {name: len(value) for name, value in given.items() if value is not None}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"features, logits, targets: got {got}, expected as many of each")
    for part in _parts(detectors):
        for name, width in part.widths.items():
            if given[name].shape[1] != width:
                got = tuple(given[name].shape)
                raise ValueError(f"{name}: got shape {got}, expected (n, {width}) as in the batches before")


def refuse_nan(argument: str, values: Tensor, of_rows: Tensor) -> None:
    """ValueError naming the first row of `values` with NaN or, if none has, with the infinities that made NaN of it;
    `of_rows` (n,) is NaN where a row holds either.

    One word from the device; the rows are looked at only where something is wrong.
    """
    suspect = of_rows.isnan()
    if suspect.any():
        found, rows = "NaN", values.isnan().any(dim=1)
        if not rows.any():
            found, rows = "inf", suspect & values.isinf().any(dim=1)
        rows = rows.nonzero()
        if len(rows):
            raise ValueError(
                f"{argument}: got {found} in {len(rows)} of {len(values)} rows, the first is row {int(rows[0])}, "
                "expected numbers; look at that input, and at the model in reduced precision"
            )
