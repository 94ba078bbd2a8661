"""One pass of a model over data, and one pass of the data for all detectors that are fitted on it.

`Detector` and `DetectorSet` are the interface to the functions here, which take any number of detectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .. import checks
from ..heads import capture_features, given_head, inference_head
from . import streaming

if TYPE_CHECKING:
    from .base import Detector

FIT_CHUNK = 65536  # rows of stored features per partial_fit: bounds the float64 copy that the sums make
Head = nn.Linear | tuple[Tensor, Tensor | None]

_TARGETS = ("labels", "label", "targets", "target", "y")  # what a batch that is a mapping may call them


class Batch(NamedTuple):
    """What a model makes of one batch."""

    inputs: Any  # a tensor, or the keyword arguments of the model, on its device
    features: Tensor | None  # (n, m)
    logits: Tensor  # (n, c)
    targets: Tensor | None  # (n,)
    given: Any  # the batch as the loader gave it


@torch.no_grad()
def run_model(model: nn.Module, loader: Iterable, head: nn.Linear | None) -> Iterator[Batch]:
    """Run `model` over the batches of `loader`: x, or (x, y, ...), or a mapping of the model's keyword arguments.

    One forward pass a batch, in eval mode, without gradients; the modes of all modules are restored, also when
    something raises. Batches are moved to the device of the model. Without a head the features are None.
    """
    parameter = next((model if head is None else head).parameters(), None)
    device = None if parameter is None else parameter.device  # None: everything stays where it is
    with evaluating(model), nullcontext() if head is None else capture_features(head) as captured:
        for given in loader:
            x, targets = inputs_and_targets(given)
            x = x.to(device) if isinstance(x, Tensor) else {name: value.to(device) for name, value in x.items()}
            logits = logits_of(model(x) if isinstance(x, Tensor) else model(**x))
            if head is not None:
                check_head(head, logits)
            features = None if head is None else captured.features
            yield Batch(x, features, logits, None if targets is None else targets.to(device), given)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every layer is in the mode that it was in: frozen ones may differ from the model."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: a tensor, an object or mapping with `logits`, or a tuple's first."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model: got an output of {got}, expected logits (n, c), or an object or mapping with `logits`"
        )
    return output


def inputs_and_targets(batch: Any) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
    """x and y of a batch; what is no tensor, such as file names, is no y."""
    x, targets = batch, None
    if isinstance(batch, Mapping):
        x = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in _TARGETS}
        targets = next((batch[name] for name in _TARGETS if name in batch), None)
        if x:
            return x, targets if isinstance(targets, Tensor) else None
    elif isinstance(batch, (tuple, list)) and batch:
        x, targets = batch[0], batch[1] if len(batch) > 1 else None
    checks.instance("loader: x of a batch", x, Tensor, "a tensor; batches are x, (x, y, ...) or {name: tensor}")
    return x, targets if isinstance(targets, Tensor) else None


def check_loader(loader: object, argument: str = "loader", or_else: str = "") -> None:
    """TypeError for what looks like a loader and gives single samples: a tensor, or a data set without a DataLoader."""
    single = hasattr(loader, "__array__") or (isinstance(loader, Dataset) and not isinstance(loader, IterableDataset))
    if single or not isinstance(loader, Iterable):
        raise TypeError(
            f"{argument}: got {type(loader).__name__}, expected {or_else}an iterable of batches x or (x, y, ...), such "
            "as a DataLoader or [x]"
        )


def batches_of(x: Any) -> Iterable:
    """The batches that `score` is given: x alone, or those of a loader.

    TypeError for what is neither; also for one batch (x, y), whose y would pass as the next inputs.
    """
    if isinstance(x, (Tensor, Mapping)):
        return [x]
    if isinstance(x, (tuple, list)) and any(isinstance(item, Tensor) and item.dim() < 2 for item in x):
        raise TypeError(f"x: got a {type(x).__name__} (x, y), expected the tensor x of that batch, or a loader")
    check_loader(x, "x", "a tensor, one batch of inputs, or ")
    return x


def joined(scores: list[Tensor]) -> Tensor:
    """The scores (N,) of all batches; ValueError if there was none."""
    if not scores:
        raise ValueError("x: got a loader without a batch, expected inputs to score")
    return scores[0] if len(scores) == 1 else torch.cat(scores)


def check_head(head: nn.Linear, logits: Tensor) -> None:
    """ValueError for a layer that cannot have made the logits: the features would be those of a hidden layer."""
    if logits.shape[1] != head.out_features:
        raise ValueError(
            f"head: got a layer {head.in_features} → {head.out_features}, but the logits have shape "
            f"{tuple(logits.shape)}; pass head=..., the nn.Linear that makes them or its name; with a head of "
            "another kind, use fit_features and score_features"
        )


# ---- fitting


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
