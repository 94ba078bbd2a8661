"""Many detectors, one pass: the model runs once over the data, each statistic is taken once, each row is read once."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..models.running import Batch, batches_of, check_loader, joined
from ..statistics import row_statistics
from ..values import AnyPath
from . import registry, store, threshold
from .detector import Detector, check_read, passed, save_named
from .fitting import Fit, Head
from .registry import create
from .threshold import Calibration


class DetectorSet(nn.Module):
    """Detectors that are fitted and scored together; a mapping from their names to them.

        detectors = DetectorSet(["MSP", "NCI", KNN(k=10)]).fit(model, train_loader)
        scores = detectors.score(model, x)  # {"MSP": (n,), "NCI": (n,), "KNN": (n,)}

    A default that the data are too few for (ViM's dim, NECO's, k) is lowered to the largest that fits, with a warning;
    one that was given is refused.

    Args:
        detectors: detectors or their names, which are then called by their class; or a mapping from names of your own.
            One name alone is a set of one.
    """

    def __init__(self, detectors: Iterable[Detector | str] | Mapping[str, Detector | str]) -> None:
        super().__init__()
        if isinstance(detectors, Mapping):
            named = dict(detectors)
        else:
            detectors = [detectors] if isinstance(detectors, str) else detectors
            listed = [create(given) if isinstance(given, str) else given for given in detectors]
            named = {type(detector).__name__: detector for detector in listed}
            if len(named) < len(listed):
                raise ValueError(
                    f"detectors: got {', '.join(type(d).__name__ for d in listed)}, expected different classes; "
                    "give a mapping from names to tell two of one class apart"
                )
        if not named:
            raise ValueError("detectors: got none, expected at least one")
        named = {name: create(given) if isinstance(given, str) else given for name, given in named.items()}
        for name, detector in named.items():
            checks.instance(f"detectors[{name!r}]", detector, Detector, "a Detector or the name of one")
        self.names = tuple(named)
        self.failures: dict[Detector, ValueError] | None = None  # where those of a fit go, in place of being raised
        self.detectors: Any = nn.ModuleList(named.values())  # of `Detector`, which no type says
        nn.Module.register_load_state_dict_post_hook(self, _share_again)
        self.share()

    def __getitem__(self, name: str) -> Detector:
        return dict(self.items())[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def items(self) -> Iterator[tuple[str, Detector]]:
        """The names, each with its detector."""
        return zip(self.names, self.detectors, strict=True)

    def only(self, names: Iterable[str]) -> DetectorSet:
        """The set of these detectors, to be fitted apart from the others."""
        part = DetectorSet({name: self[name] for name in names})
        part.failures = self.failures
        return part

    def save(
        self, path: AnyPath, class_names: Iterable[str] | None = None, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write the fitted detectors to one file, as `Detector.save` does."""
        save_named(dict(self.items()), path, class_names, notes, "set")

    # ---- fitting

    def fit(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        head: str | nn.Linear | None = None,
        group: dist.ProcessGroup | None = None,
        validation: Iterable[Any] | None = None,
    ) -> DetectorSet:
        """Fit every detector; the model runs once over `loader`, and once over `validation` if that is given.

        Args:
            validation: in-distribution data on which the detectors with `fits_on = "validation"` (ReAct, KL matching)
                are fitted, as their papers do; without it they take `loader`.
            model, loader, head, group: as in `Detector.fit`.
        """
        on_train, on_validation = self._by_data(validation is not None)
        Fit(on_train, anew=True, failures=self.failures).run(model, loader, head, group)
        if validation is not None:
            Fit(on_validation, anew=True, failures=self.failures).run(model, validation, head, group)
        return self.share()

    def fit_features(
        self,
        features: Tensor | None,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        head: Head | None = None,
        validation: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    ) -> DetectorSet:
        """As `Detector.fit_features`, for all of them.

        Args:
            validation: features, logits and targets of the in-distribution data on which the detectors with
                `fits_on = "validation"` are fitted; None: on the same as all others.
            features, logits, targets, head: as in `Detector.fit_features`.
        """
        on_train, on_validation = self._by_data(validation is not None)
        Fit(on_train, anew=True, failures=self.failures).run_stored(features, logits, targets, head)
        if validation is not None:
            Fit(on_validation, anew=True, failures=self.failures).run_stored(*validation, head)
        return self.share()

    def _by_data(self, has_validation: bool) -> tuple[list[Detector], list[Detector]]:
        """The detectors that are fitted on training data, and those on validation data, if there is any."""
        on_validation = [d for d in self.detectors if has_validation and d.fits_on == "validation"]
        return [d for d in self.detectors if d not in on_validation], on_validation

    def partial_fit(
        self, features: Tensor | None, logits: Tensor | None = None, targets: Tensor | None = None
    ) -> DetectorSet:
        """As `Detector.partial_fit`, for all of them."""
        Fit(self.detectors).take(features, logits, targets)
        return self

    def finalize(self, head: Head | None = None, group: dist.ProcessGroup | None = None) -> DetectorSet:
        """As `Detector.finalize`, for all of them."""
        Fit(self.detectors, failures=self.failures).finish(head, group)
        return self.share()

    def share(self) -> DetectorSet:
        """Let equal buffers be one tensor: less memory, and detectors that may share a read are known by it."""
        kept: dict[tuple[Any, ...], list[Tensor]] = {}
        for detector in self.detectors:
            for name, buffer in detector.named_buffers(recurse=False):
                seen = kept.setdefault((name, buffer.shape, buffer.dtype, buffer.device), [])
                equal = next((other for other in seen if other is buffer or torch.equal(other, buffer)), None)
                if equal is None:
                    seen.append(buffer)
                elif name != "threshold" and equal is not buffer:  # of a deployed head it is the model's parameter
                    setattr(detector, name, equal)
        return self

    # .to(device), .half(), ... copy each buffer by itself.
    def _apply(self, *args: Any, **keywords: Any) -> DetectorSet:
        super()._apply(*args, **keywords)  # type: ignore[no-untyped-call]  # torch's
        return self.share()

    # ---- scoring

    @torch.no_grad()
    def score(self, model: nn.Module, x: Any, head: str | nn.Linear | None = None) -> dict[str, Tensor]:
        """Scores (n,) of one input batch, or (N,) of all batches of a loader, by every detector; the model runs once.

        Arguments as in `Detector.score`; `score_loader` gives the scores batch by batch.
        """
        with closing(self.score_loader(model, batches_of(x), head)) as batches:
            parts = [scores for _, scores in batches]
        return {name: joined([scores[name] for scores in parts]) for name in self}

    @torch.no_grad()
    def score_loader(
        self, model: nn.Module, loader: Iterable[Any], head: str | nn.Linear | None = None
    ) -> Generator[tuple[Batch, dict[str, Tensor]], None, None]:
        """For each batch of `loader`: what the model made of it, and its scores by every detector.

        The model runs once a batch, and again only for detectors that run it by themselves (ODIN, those of `passes`).
        """
        check_loader(loader)
        n_rows = 0
        with closing(passed(list(self.detectors), model, loader, head, "DetectorSet")) as batches:
            for batch in batches:
                with checks.behind(n_rows):
                    scores = self.score_features(batch.features, batch.logits, skip_models=True)
                    for name, detector in self.items():
                        if detector.needs_model:
                            scores[name] = detector.score_batch(model, batch, head)
                n_rows += len(batch.logits)
                yield batch, {name: scores[name] for name in self}

    def score_features(
        self, features: Tensor | None, logits: Tensor | None = None, *, skip_models: bool = False
    ) -> dict[str, Tensor]:
        """Scores (n,) by every detector from features (n, m) and logits (n, c).

        Those that are functions of row statistics share one read of both. On a CPU they are two dozen passes of plain
        PyTorch over it, which `torch.compile(detectors.score_features)` makes a few of.

        Args:
            skip_models: leave out the detectors that need the model; otherwise they raise.
        """
        scores: dict[str, Tensor] = {}
        shared: dict[str, tuple[Detector, tuple[str, ...]]] = {}
        needs_features = needs_logits = False
        for name, detector in self.items():
            if detector.needs_model and skip_models:
                continue
            statistics = detector.statistics()
            if not statistics or (detector.needs_features and logits is None):
                scores[name] = detector.score_features(features, logits)
                continue
            detector.require_fitted()
            shared[name] = detector, statistics
            needs_features |= detector.needs_features
            needs_logits |= detector.needs_logits
        check_read(features, logits, needs_features, needs_logits)
        for read in _reads(shared, features, logits):
            taken = row_statistics(read.statistics, logits, features, **read.constants)
            combined = {name: detector.combine(taken) for name, detector in read.members.items()}
            # One look at all of them: asking the device for each would take as long as a score.
            if not torch.compiler.is_compiling() and not (torch.cat(list(combined.values())) < math.inf).all():
                for name, detector in read.members.items():
                    detector.check_scores(combined[name], features, logits)
            scores |= combined
        return {name: scores[name] for name in self if name in scores}

    def forward(self, features: Tensor | None, logits: Tensor | None = None) -> dict[str, Tensor]:
        """As `score_features`."""
        return self.score_features(features, logits)


def _share_again(detectors: DetectorSet, _: Any) -> None:
    """After loading a state_dict, which holds each buffer by itself. A function of the module: pickles name it."""
    detectors.share()


class _Read:
    """One read of logits and features, for detectors whose statistics agree in their constants (W, mean, ...)."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}
        self.statistics: set[str] = set()
        self.members: dict[str, Detector] = {}

    def agrees(self, wanted: dict[str, Any]) -> bool:
        """Tensors are compared by identity: the set shares those that are equal."""
        for key, value in wanted.items():
            kept = self.constants.get(key, value)  # one that is not kept yet agrees
            if kept is not value and (isinstance(kept, Tensor) or isinstance(value, Tensor) or kept != value):
                return False
        return True


def _reads(
    shared: dict[str, tuple[Detector, tuple[str, ...]]], features: Tensor | None, logits: Tensor | None
) -> list[_Read]:
    """The reads that give these detectors their statistics; widths are checked."""
    reads: list[_Read] = []
    for name, (detector, statistics) in shared.items():
        detector.check_widths(features, logits)
        wanted = detector.constants()
        for read in reads:
            if read.agrees(wanted):
                break
        else:
            reads.append(read := _Read())
        read.constants.update(wanted)
        read.statistics.update(statistics)
        read.members[name] = detector
    return reads


def load(path: AnyPath, device: torch.device | str = "cpu") -> Detector | DetectorSet:
    """Read what `save` wrote: a detector or a set of them, fitted, with its threshold, on `device`.

    A detector class of your own has to be registered first, see `ood_fast.register`.

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: it is damaged, not of this package, of a newer format, or holds a detector that is not known, or one
            that cannot score.
    """
    content = store.read_file(path)
    read = [tensor for record in content.detectors.values() for tensor in record.buffers.values()]
    moved = {id(tensor): tensor.to(device) for tensor in read}
    detectors = {}
    for name, record in content.detectors.items():
        buffers = {buffer: moved[id(tensor)] for buffer, tensor in record.buffers.items()}
        detectors[name] = _restored(path, record._replace(buffers=buffers))
        detectors[name].class_names = None if content.class_names is None else tuple(content.class_names)
    return DetectorSet(detectors) if content.kind == "set" else next(iter(detectors.values()))


def _restored(path: AnyPath, record: store.Saved) -> Detector:
    method = record.method
    cls = registry.registered(method)
    if cls is None:
        raise ValueError(
            f"{path}: {checks.unknown('detector', method, registry.known())}, or in Python the import of its class "
            'with @ood_fast.register("detector") before it, before its file is read'
        )
    try:
        detector = cls(**record.settings)
        detector.load_state_dict(record.buffers, assign=True)
        detector.calibration = None if record.calibration is None else Calibration(**record.calibration)
        detector.fitted_on, detector.input_range = record.fitted_on, record.input_range
    except Exception as error:  # whatever the class thinks of what the file says
        raise ValueError(f"{path}: the {method} of this ood_fast cannot be made from the file: {error}") from error
    if not detector.fitted:
        raise ValueError(f"{path}: the file holds a {method} without what it was fitted on")
    try:
        if detector.threshold is not None:
            threshold.check(detector.threshold)
        _try(detector)
    except Exception as error:
        raise ValueError(f"{path}: the {method} in the file cannot score: {error}") from error
    return detector


@torch.no_grad()
def _try(detector: Detector) -> None:
    """Score one row of small numbers, which shows buffers and settings that do not fit each other."""
    n_features, n_classes = detector.widths()
    device = next((buffer.device for buffer in detector.buffers()), torch.device("cpu"))
    if detector.needs_model or (detector.needs_features and n_features is None) or device.type == "meta":
        return
    z, f = (torch.linspace(0.5, 1.5, width or 2, device=device)[None] for width in (n_features, n_classes))
    scores = detector.score_features(z, f)
    if scores.shape != (1,) or scores.isnan().any():
        raise ValueError(f"a row scores {scores.tolist()}, expected a number")
