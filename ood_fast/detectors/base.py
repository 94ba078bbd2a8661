"""The contract of every detector. Direction of every score, here and everywhere: **higher = more in-distribution**.

A subclass is only mathematics. It says what it reads (`needs_features`, `needs_logits`, `needs_head`), names the
buffers that fitting fills (`state`), and overrides

    gathers() -> {name: Gathered}       what fitting sums up over the training data, see `streaming`
    _finish(**gathered)                 fill the buffers of `state` from it
    _score(features, logits) -> (n,)    the score of each row

or, in place of `_score`, where the score is a function of row statistics that many detectors share (one read of logits
and features then serves them all, see `ood_fast.statistics`),

    statistics() -> names               which of them
    constants() -> {name: tensor}       the W, mean, table, boundaries and gamma that they are taken with
    _combine(statistics) -> (n,)        the score

Parameters are keywords of `__init__`, kept as attributes of the same name. Without `state` and head there is nothing to
fit. Many detectors share one pass over the data in a `DetectorSet`.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..heads import given_head
from ..models import running
from ..statistics import row_statistics
from . import run, store, streaming, threshold
from .run import Head
from .threshold import Calibration


class Detector(nn.Module):
    """Base class of all detectors; see the module docstring for what a subclass supplies."""

    label: ClassVar[str] = ""  # how tables, plots and messages call it; the class name unless given
    needs_features: ClassVar[bool] = False  # to score
    needs_logits: ClassVar[bool] = False  # to score
    needs_head: ClassVar[bool] = False  # keeps a copy of the head as the buffers head_weight (c, m) and head_bias (c,)
    needs_model: ClassVar[bool] = False  # scores inputs, by passes of its own through the model
    state: ClassVar[tuple[str, ...]] = ()  # buffers that fitting fills
    optional_state: ClassVar[tuple[str, ...]] = ()  # those that it may leave None
    fits_on: ClassVar[str] = "train"  # or "validation": the in-distribution data that the paper fits on
    grid: ClassVar[Mapping[str, tuple]] = {}  # parameter -> the candidates of OpenOOD's search

    threshold: Tensor | None  # scores below are OOD, see `predict`; set by `calibrate`
    calibration: Calibration | None  # what `calibrate` set it from
    class_names: tuple[str, ...] | None  # of the classes, kept in files

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "label" not in vars(cls):
            cls.label = cls.__name__

    def __init__(self) -> None:
        super().__init__()
        for name in self.buffer_names():
            self.register_buffer(name, None)
        self.calibration = self.class_names = None
        self._gathered: dict[str, streaming.Gathered] | None = None  # a fit that has begun
        self._is_candidate, self._failure = False, None  # of a search, see `search.Search`

    @classmethod
    def buffer_names(cls) -> tuple[str, ...]:
        head = ("head_weight", "head_bias") if cls.needs_head else ()
        return (*cls.state, *cls.optional_state, *head, "threshold")

    @property
    def needs_fit(self) -> bool:
        return self.needs_head or bool(self.state)

    # ---- fitting

    def fit(
        self,
        model: nn.Module,
        loader: Iterable,
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
        run.fit([self], model, loader, head, group)
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
        run.fit_features([self], features, logits, targets, head)
        return self

    def partial_fit(
        self, features: Tensor | None, logits: Tensor | None = None, targets: Tensor | None = None
    ) -> Detector:
        """Take in one batch of training data. The first call after construction or `finalize` begins a new fit."""
        run.partial_fit([self], features, logits, targets)
        return self

    def finalize(self, head: Head | None = None, group: dist.ProcessGroup | None = None) -> Detector:
        """End a fit: turn what `partial_fit` gathered, here or in all processes of `group`, into the buffers `state`.

        Returns self.
        """
        run.finalize([self], head, group)
        return self

    @property
    def fitted(self) -> bool:
        """Whether the detector can score; always true for one that needs no fitting."""
        # By way of the attributes of a module each name would take half a microsecond.
        for name in (*self.state, "head_weight") if self.needs_head else self.state:
            if self._buffers.get(name) is None:
                return False
        return True

    # ---- scoring

    @torch.no_grad()
    def score(self, model: nn.Module, x: Any, head: str | nn.Linear | None = None) -> Tensor:
        """Scores (n,) of one input batch, or (N,) of all batches of a loader, in their order, on the model's device.

        Args:
            model: as in `fit`; runs once over the inputs.
            x: one batch of inputs, a tensor or a mapping of the model's keyword arguments; or a loader as in `fit`.
            head: as in `fit`. A detector that reads nothing but logits looks for none.
        """
        checks.instance("model", model, nn.Module, "an nn.Module")
        batches = running.batches_of(x)
        self._require_fitted()
        read_from = given_head(model, head) if self.needs_features else None
        with closing(
            running.run_model(model, batches, read_from)
        ) as done:  # also when scoring raises, modes are restored
            return running.joined([self.score_features(batch.features, batch.logits) for batch in done])

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """Scores (n,) from features (n, m) and logits (n, c); what the method does not read may be None.

        Raises ValueError, naming the first such row, for features or logits that hold NaN, or inf that makes NaN of
        the score.
        """
        self._check_scored(features, logits)
        scores = self._score(features, logits)
        self._check_scores(scores, features, logits)
        return scores

    def forward(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """As `score_features`."""
        return self.score_features(features, logits)

    def predict(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """Whether each row is out-of-distribution, (n,) bool: its score is below `threshold`."""
        return self.is_ood(self.score_features(features, logits))

    def is_ood(self, scores: Tensor) -> Tensor:
        """Whether each score, (n,), is below `threshold`."""
        if self.threshold is None:
            raise RuntimeError(
                f"{self.label} has no threshold: call calibrate(scores of in-distribution data) or set threshold"
            )
        return scores < self.threshold

    def calibrate(self, scores: Tensor, tpr: float | None = None, alpha: float | None = None) -> Detector:
        """Set `threshold` from scores (n,) of in-distribution data that took no part in the fit. Returns self.

        Args:
            tpr: keep at least this share of the scores given (0.95 if neither is given), see `tpr_threshold`.
            alpha: flag a new in-distribution input with a chance of at most alpha, see `conformal_threshold`.
        """
        self.threshold, self.calibration = threshold.calibration(scores, tpr, alpha)
        return self

    def save(self, path: str | os.PathLike, class_names: Iterable[str] | None = None) -> None:
        """Write the fitted detector to a safetensors file, see `store`; `ood_fast.detectors.load(path)` reads it."""
        store.save(self, path, class_names)

    def _check_scored(self, features: Tensor | None, logits: Tensor | None) -> None:
        self._require_fitted()
        check_read(features, logits, self.needs_features, self.needs_logits)
        self._check_widths(features, logits)

    def _check_widths(self, features: Tensor | None, logits: Tensor | None) -> None:
        """Of what has passed `check_read`."""
        if self.needs_head:
            fitted = self._buffers["head_weight"]
        elif self.state:
            fitted = self._buffers[self.state[0]]
        else:
            return
        if self.needs_features and features.shape[1] != fitted.shape[-1]:
            raise ValueError(
                f"features: got shape {tuple(features.shape)}, expected (n, {fitted.shape[-1]}), the width that "
                f"this {self.label} was fitted on"
            )
        if self.needs_logits and self.needs_head and logits.shape[1] != fitted.shape[0]:
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, expected (n, {fitted.shape[0]}), the classes of "
                f"the head that this {self.label} was fitted with"
            )

    def _check_scores(self, scores: Tensor, features: Tensor | None, logits: Tensor | None) -> None:
        # A program that is to run without Python cannot raise.
        if torch.compiler.is_compiling() or not scores.isnan().any():
            return
        if self.needs_features:
            run.refuse_nan("features", features, scores)
        if self.needs_logits:
            run.refuse_nan("logits", logits, scores)

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError(
                f"{self.label} is not fitted: call fit(model, loader) or fit_features(features, ...) before scoring"
            )

    # ---- parameters

    def settings(self) -> dict[str, Any]:
        """The parameters of this detector, by the keywords of its class."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def variants(self, grid: Mapping[str, Iterable] | None = None) -> Iterator[Detector]:
        """A new detector for every combination of `grid` (default: the class's), the other parameters as here.

        Each takes part in a fit that has begun here, so that one pass over the data serves them all. What is already
        fitted is not passed on: its buffers may depend on the parameters.
        """
        grid = self.grid if grid is None else grid
        for values in itertools.product(*grid.values()):
            variant = type(self)(**{**self.settings(), **dict(zip(grid, values, strict=True))})
            variant._gathered = self._gathered
            yield variant

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    # ---- what a subclass supplies

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {}

    def _finish(self, **gathered: Any) -> None:
        if self.state:
            raise NotImplementedError

    def statistics(self) -> tuple[str, ...]:
        return ()

    def constants(self) -> dict[str, Any]:
        return {}

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def _score(self, features: Tensor | None, logits: Tensor | None) -> Tensor:
        return self._combine(row_statistics(self.statistics(), logits, features, **self.constants()))

    # A fresh detector has no buffers to copy into: take their shapes from the state_dict.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [name for name in self.buffer_names() if prefix + name in state_dict]
        for name in names:
            setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        if "head_weight" in names and "head_bias" not in names:
            self.head_bias = None
        if names:  # what belongs to an earlier fit must not stay beside what is loaded
            for name in set(self.optional_state).difference(names):
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_read(features: object, logits: object, needs_features: bool, needs_logits: bool) -> None:
    """Features (n, m) and logits (n, c), as far as they are needed."""
    if needs_features:
        checks.float_tensor("features", features, 2, "(n, m)")
    if needs_logits:
        checks.logits(logits)
    if needs_features and needs_logits and features.shape[0] != logits.shape[0]:
        raise ValueError(
            f"features: got {features.shape[0]} rows, expected {logits.shape[0]}, one for each row of logits"
        )
