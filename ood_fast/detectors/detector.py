"""What every detector does with the mathematics that its class supplies by the contract in `base`: it is fitted,
scores, has a threshold, and is saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..eager.precision import is_exporting
from ..heads import given_head
from ..models.inputs import Range, warn_other_range
from ..models.outputs import refuse_probabilities
from ..models.running import Batch, batches_of, joined, refuse_meta, run_model
from ..models.weights import Weights, identity_of_head, refuse_other, refuse_other_head
from ..values import AnyPath, Grid
from . import registry, store, streaming, threshold
from .base import Contract
from .fitting import Fit, Head, readings_of
from .numbers import check_features, refuse_one_logit, refuse_rows
from .own import check_shape, in_dtype_of_state, is_own
from .threshold import Calibration


class Detector(Contract):
    """Base class of all detectors; `base` says what a subclass supplies."""

    threshold: Tensor | None  # scores below are OOD, see `predict`; set by `calibrate`
    calibration: Calibration | None  # what `calibrate` set it from
    class_names: tuple[str, ...] | None  # of the classes, kept in files
    # The weights of the model that it was fitted on, by `fit`, or of the head that came with features: other ones are
    # refused. None: any model will do.
    fitted_on: Weights | None = None
    input_range: Range | None = None  # the smallest and the largest number of the images that it was fitted on
    gathered: dict[str, streaming.Gathered] | None  # of a fit that has begun, see `Fit`

    def __init__(self) -> None:
        super().__init__()
        self.calibration = self.class_names = self.gathered = None

    def __setattr__(self, name: str, value: Any) -> None:
        """A parameter that is set by hand is as if the detector had been made with it: it is checked, and threshold and
        calibration are dropped. ValueError once anything is fitted with the old one."""
        if name not in vars(self) or name not in self.parameters_of():  # the first time, in `__init__`
            super().__setattr__(name, value)
            return
        keeps = self.needs_fit and self.fitted and (bool(self.state) or not self.needs_head)
        if keeps or self.gathered is not None:
            raise ValueError(
                f"{self.label}: {name}: got {value!r} after a fit with {getattr(self, name)!r}, to which what it keeps "
                f"belongs; make another one, changed({name}={value!r}), and fit that"
            )
        head = {kept: buffer for kept, buffer in self._buffers.items() if kept.startswith("head_")}
        mine = {"given": self.given | {name}, "training": self.training, "class_names": self.class_names}
        vars(self).update({**vars(self.changed(**{name: value})), **mine})
        self._buffers.update(head)

    @property
    def needs_fit(self) -> bool:
        """Whether it keeps anything of the data or the head."""
        return self.needs_head or bool(self.state)

    @property
    def fitted(self) -> bool:
        """Whether the detector can score; always true for one that needs no fitting."""
        # By way of the attributes of a module each name would take half a microsecond.
        for name in (*self.state, "head_weight") if self.needs_head else self.state:
            if self._buffers.get(name) is None:
                return False
        return True

    def require_fitted(self) -> None:
        """RuntimeError unless it can score."""
        if not self.fitted:
            raise RuntimeError(
                f"{self.label} is not fitted: call fit(model, loader) or fit_features(features, ...) before scoring"
            )

    # ---- fitting

    def fit(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        head: str | nn.Linear | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Detector:
        """Run `model` once over `loader` and fit on what enters its head. Returns self.

        Args:
            model: a classifier; runs in eval mode without gradients, and its modes are restored.
            loader: batches x, or (x, y, ...), or mappings; moved to the device of the model.
            head: the layer that makes the logits, or its name; None: the one that `ood_fast.heads.find_head` finds.
            group: the processes of torch.distributed that each fit on their part of the data; all get the same result.
        """
        Fit([self], anew=True).run(model, loader, head, group)
        return self

    def fit_features(
        self,
        features: Tensor | None,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        head: Head | None = None,
    ) -> Detector:
        """Fit on stored features (n, m), logits (n, c), class indices (n,) and head, as far as the method needs them.

        `head` is an `nn.Linear` or `(W, b)` with W (c, m), b (c,) or None; it is copied. Returns self.
        """
        Fit([self], anew=True).run_stored(features, logits, targets, head)
        return self

    def partial_fit(
        self, features: Tensor | None, logits: Tensor | None = None, targets: Tensor | None = None
    ) -> Detector:
        """Take in one batch of training data. The first call after construction or `finalize` begins a new fit."""
        Fit([self]).take(features, logits, targets)
        return self

    def finalize(self, head: Head | None = None, group: dist.ProcessGroup | None = None) -> Detector:
        """End a fit: turn what `partial_fit` gathered, here or in all processes of `group`, into the buffers `state`.

        Returns self.
        """
        Fit([self]).finish(head, group)
        return self

    def finish(self, gathered: Mapping[str, streaming.Gathered]) -> None:
        """Fill the buffers from what was gathered, by the class's `_finish`."""
        self._finish(**gathered)

    def forget(self) -> None:
        """Drop model, threshold and calibration of the fit before: they say nothing of another one."""
        self.fitted_on = self.input_range = self.threshold = self.calibration = None

    # ---- scoring

    @torch.no_grad()
    def score(self, model: nn.Module, x: Any, head: str | nn.Linear | None = None) -> Tensor:
        """Scores (n,) of one input batch, or (N,) of all batches of a loader, in their order, on the model's device.

        Args:
            model: that of `fit`, in any dtype, compiled or wrapped; runs once over the inputs. ValueError if it has
                other weights, unless `fitted_on` is set to None.
            x: one batch of inputs, a tensor or a mapping of the model's keyword arguments; or a loader as in `fit`.
            head: as in `fit`. A detector that reads nothing but logits looks for none.
        """
        scores: list[Tensor] = []
        n_rows = 0
        with closing(self.passed(model, x, head)) as batches:
            for batch in batches:
                with checks.behind(n_rows):
                    scores.append(self.score_batch(model, batch, head))
                n_rows += len(batch.logits)
        return joined(scores)

    def passed(self, model: nn.Module, x: Any, head: str | nn.Linear | None) -> Generator[Batch, None, None]:
        """What `score` reads of the model."""
        return passed([self], model, batches_of(x), head, self.label)

    def score_batch(self, model: nn.Module, batch: Batch, head: str | nn.Linear | None = None) -> Tensor:
        """Scores (n,) of a batch of `run_model` with `readings`. What needs the model overrides this or `score`."""
        if self.needs_model:
            return self.score(model, batch.inputs, head)
        return self.score_features(batch.features, batch.logits)

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """Scores (n,) from features (n, m) and logits (n, c); what the method does not read may be None.

        Raises ValueError, naming the first such row, for features or logits that hold NaN, or inf that makes NaN of
        the score.
        """
        self.require_fitted()
        check_read(features, logits, self.needs_features, self.needs_logits)
        self.check_widths(features, logits)
        if not is_own(type(self)):
            scores = self._score(features, logits)
        else:
            features, logits = in_dtype_of_state(self, features), in_dtype_of_state(self, logits)
            scores = self._score(features, logits)
            check_shape(self, scores, features if logits is None else logits)
        if is_exporting() and not self.statistics():  # a maximum of ONNX may drop NaN; row statistics know that
            for values in (features if self.needs_features else None, logits if self.needs_logits else None):
                scores = scores if values is None else scores.masked_fill(values.isnan().any(dim=1), math.nan)
        self.check_scores(scores, features, logits)
        return scores

    def forward(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """As `score_features`."""
        return self.score_features(features, logits)

    def combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Scores (n,) from the row statistics that the class asks for, by its `_combine`; nothing is checked."""
        return self._combine(statistics)

    def check_widths(self, features: Tensor | None, logits: Tensor | None) -> None:
        """ValueError unless what passed `check_read` is as wide as what the detector was fitted on."""
        n_features, n_classes = self.widths()
        if self.needs_features and not (n_features is None or features is None or features.shape[1] == n_features):
            raise ValueError(
                f"features: got shape {tuple(features.shape)}, expected (n, {n_features}), the width that this "
                f"{self.label} was fitted on"
            )
        if self.needs_logits and not (n_classes is None or logits is None or logits.shape[1] == n_classes):
            of = "of the head that this {} was fitted with" if self.needs_head else "that this {} was fitted on"
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, expected (n, {n_classes}), the classes "
                f"{of.format(self.label)}"
            )

    def check_scores(self, scores: Tensor, features: Tensor | None, logits: Tensor | None) -> None:
        """ValueError that names the first row whose NaN or inf made NaN or inf of its score."""
        # A program that is to run without Python cannot raise.
        if torch.compiler.is_compiling() or not (beyond := ~(scores < math.inf)).any():
            return
        scores = scores.masked_fill(beyond, math.nan)  # inf would be the most in-distribution of all
        if features is not None and self.needs_features:
            refuse_rows("features", features, scores)
        if logits is not None and self.needs_logits:
            refuse_rows("logits", logits, scores)
        rows = scores.isnan().nonzero()
        far = f", is further from what this {self.label} was fitted on than its numbers reach: its score is NaN"
        told = f"{far}; fit on features of a like size" if self.needs_fit else f", scores NaN by this {self.label}"
        name = "features" if self.needs_features else "logits"
        raise checks.RowError(f"{name}: {checks.ROW}, of {len(rows)} such{told}", int(rows[0]))

    # ---- thresholds

    def predict(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """Whether each row is out-of-distribution, (n,) bool: its score is below `threshold`."""
        return self.is_ood(self.score_features(features, logits))

    def is_ood(self, scores: Tensor) -> Tensor:
        """Whether each score, (n,), is not at or above `threshold`: below it, NaN, or inf, which no row scores. All, if
        the threshold is no number."""
        if self.threshold is None:
            raise RuntimeError(
                f"{self.label} has no threshold: call calibrate(scores of in-distribution data) or set threshold; a "
                "new fit drops that of the one before"
            )
        if self.threshold.numel() != 1:  # it would be taken for one a score
            raise ValueError(f"threshold: got shape {tuple(self.threshold.shape)}, expected one number")
        # NaN compares as False: what is unknown is flagged; inf is what ran over in a program, which cannot raise.
        kept = (scores >= self.threshold.reshape(())) & (scores < math.inf)
        # Set by hand it may be -inf, which would flag nothing; `deploy` has looked.
        return ~kept if is_exporting() else ~(kept & self.threshold.isfinite())

    def calibrate(self, scores: Tensor, tpr: float | None = None, alpha: float | None = None) -> Detector:
        """Set `threshold` from scores (n,) of in-distribution data that took no part in the fit. Returns self.

        Args:
            tpr: keep at least this share of the scores given (0.95 if neither is given), see `tpr_threshold`.
            alpha: flag a new in-distribution input with a chance of at most alpha, see `conformal_threshold`.
        """
        try:
            self.threshold, self.calibration = threshold.calibration(scores, tpr, alpha)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from error
        return self

    # A threshold or temperature in half precision is another one: .half() of a whole model leaves single numbers.
    def _apply(self, *args: Any, **keywords: Any) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and buffer.numel() == 1}
        super()._apply(*args, **keywords)  # type: ignore[no-untyped-call]  # torch's
        for name, number in before.items():
            after: Any = self._buffers[name]
            if after.dtype.itemsize < min(4, number.dtype.itemsize):
                self._buffers[name] = number.to(after.device)
        return self

    # ---- parameters

    def changed(self, **settings: Any) -> Detector:
        """A new one with other parameters, of which it counts none as named by its user; what a fit lowered is back."""
        made = type(self)(**{**self.settings(), **self.lowered, **settings})
        made.given = self.given
        member = getattr(self, "member", None)  # of `passes`: its defaults stay defaults, which a fit may lower
        if isinstance(member, Detector) and not {"of", "options"} & {*settings}:
            made.member = member.changed()
        return made

    def variants(self, grid: Grid | None = None) -> Iterator[Detector]:
        """A new detector for every combination of `grid` (default: the class's), the other parameters as here.

        Each takes part in a fit that has begun here, so that one pass over the data serves them all; ValueError for one
        that gathers something else. What is already fitted is not passed on: its buffers may depend on the parameters.
        """
        grid = self.grid if grid is None else {name: tuple(values) for name, values in grid.items()}
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            variant = self.changed(**chosen)
            # Of the class's own candidates the smallest stands for a default: it may be lowered to what fits.
            lowest = {name for name in chosen if grid is self.grid and chosen[name] == grid[name][0]}
            variant.given = (self.given | set(chosen)) - lowest
            if self.gathered is not None:
                begun, own = ({n: part.key() for n, part in g.items()} for g in (self.gathered, variant.gathers()))
                if begun != own:
                    raise ValueError(f"grid: got {chosen}, expected what the fit that has begun gathers for")
            variant.gathered = self.gathered
            yield variant

    # ---- files

    def save(
        self, path: AnyPath, class_names: Iterable[str] | None = None, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write the fitted detector to a safetensors file; `ood_fast.detectors.load(path)` reads it.

        The file appears under its name once it is complete, or not at all; an older one is replaced.

        Args:
            path: the suffix .safetensors is usual.
            class_names: one a class, in the order of the logits; None: the attribute `class_names`.
            notes: numbers, strings, lists and mappings of your own, which `store.notes` reads back.

        Raises:
            OSError: the path is a folder, or its folder does not exist or cannot be written to.
            RuntimeError: the detector is not fitted.
            ValueError: a class that is not registered, or class names that do not fit the head.
            TypeError: a setting that is no number, string, dtype, nor a tuple, list or mapping of those.
        """
        save_named({type(self).__name__: self}, path, class_names, notes)

    def record(self) -> store.Saved:
        """What a file holds of it."""
        method = type(self).__name__
        if registry.registered(method) is not type(self):
            raise ValueError(
                f'{method}: is not registered, so that no file of it could be read; put @ood_fast.register("detector") '
                "before the class"
            )
        self.require_fitted()
        if self.threshold is not None:
            threshold.check(self.threshold)
        calibration = self.calibration
        if self.threshold is None or (calibration and calibration.threshold != float(self.threshold)):
            calibration = None  # the threshold was set by other means since
        calibrated = None if calibration is None else calibration._asdict()
        return store.Saved(
            method, self.settings(), calibrated, dict(self.state_dict()), self.fitted_on, self.input_range
        )

    # What it keeps belongs to its parameters: beside the buffers, where torch keeps the version of a module.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if about := getattr(destination, "_metadata", {}).get(prefix[:-1]):
            simple = (type(None), bool, int, float, str, tuple, list, dict, torch.dtype)
            plain = {name: value for name, value in self.settings().items() if isinstance(value, simple)}
            about.update(settings=plain, lowered=dict(self.lowered))

    # A fresh detector has no buffers to copy into: take their shapes from the state_dict.
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        names = [name for name in self.buffer_names() if prefix + name in state_dict]
        theirs, lowered = (local_metadata.get(kept, {}) for kept in ("settings", "lowered"))
        mine = {name: self.lowered.get(name, value) for name, value in self.settings().items()}
        asked = {**theirs, **lowered}
        others = [name for name in asked if name in mine and mine[name] not in (asked[name], theirs.get(name))]
        of_head = {prefix + "head_weight", prefix + "head_bias"}
        if others and any(key.startswith(prefix) and key not in of_head for key in state_dict):
            was, has = (", ".join(f"{name}={of[name]!r}" for name in others) for of in (asked, mine))
            args[-1].append(
                f"{prefix[:-1] or self.label}: was fitted or calibrated with {was}, this {self.label} has {has}: "
                f"make it with {was}"
            )
            return
        if names and theirs:  # a default is as it was, or was lowered, for what is loaded
            vars(self).update({name: theirs[name] for name in {*self.lowered, *lowered}}, lowered=dict(lowered))
        self.fitted_on = self.input_range = None  # a state_dict says nothing of the model but its head
        for name in names:
            setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        if "head_weight" in names and "head_bias" not in names:
            self.head_bias = None
        if names:  # what belongs to an earlier fit must not stay beside what is loaded
            for name in set(self.optional_state).difference(names):
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if "head_weight" in names and not self.head_weight.is_meta:
            self.fitted_on = identity_of_head(self.head_weight, self.head_bias)


def passed(
    detectors: Sequence[Detector], model: nn.Module, loader: Iterable[Any], head: str | nn.Linear | None, called: str
) -> Generator[Batch, None, None]:
    """The batches with what detectors read of a model, once it is known to be that of their fit."""
    refuse_meta(model)
    for detector in detectors:
        detector.require_fitted()
        refuse_other(model, detector.fitted_on, detector.label, head)
    layer = given_head(model, head) if any(d.needs_features for d in detectors) else None
    looks = any(d.fitted_on is not None and d.fitted_on.made_by for d in detectors)
    n_rows = 0
    # also when scoring raises, modes are restored
    with closing(run_model(model, loader, layer, readings_of(detectors), find_maker=looks)) as batches:
        for batch in batches:
            if not n_rows:
                known = next((d.input_range for d in detectors if d.input_range is not None), None)
                warn_other_range(batch.inputs, known, called)
                for detector in detectors:
                    refuse_other_head(batch.maker, detector.fitted_on, detector.label)
            n_rows += len(batch.logits)
            yield batch


def save_named(
    named: Mapping[str, Detector],
    path: AnyPath,
    class_names: Iterable[str] | None,
    notes: Mapping[str, Any] | None,
    kind: str = "detector",
) -> None:
    """As `Detector.save`, for one detector or the set of them."""
    if class_names is None:
        class_names = next((d.class_names for d in named.values() if d.class_names is not None), None)
    if isinstance(class_names, str):
        raise TypeError(f"class_names: got the string {class_names!r}, expected one string a class")
    listed = None if class_names is None else list(class_names)
    for name in listed or ():
        checks.instance("class_names", name, str, "one string a class")
    records = {name: detector.record() for name, detector in named.items()}
    for detector in named.values():
        if listed is not None and detector.needs_head and len(listed) != len(detector.head_weight):
            raise ValueError(
                f"class_names: got {len(listed)}, expected {len(detector.head_weight)}, the classes of the head that "
                f"{detector.label} was fitted with"
            )
    store.write(path, store.Content(kind, records, listed, dict(notes or {})))


def check_read(features: Any, logits: Any, needs_features: bool, needs_logits: bool) -> None:
    """Features (n, m) and logits (n, c) of two classes or more, as far as they are needed."""
    if needs_features:
        check_features(features)
    if needs_logits:
        checks.logits(logits)
        refuse_one_logit(logits)
        refuse_probabilities(logits)
    if needs_features and needs_logits and features.shape[0] != logits.shape[0]:
        raise ValueError(
            f"features: got {features.shape[0]} rows, expected {logits.shape[0]}, one for each row of logits"
        )
