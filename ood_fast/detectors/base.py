"""The contract of every detector.

Direction of every score, here and everywhere: **higher = more in-distribution**.

A subclass is mathematics only. It names the buffers that fitting fills (`state`), says what it reads
(`needs_features`, `needs_logits`, `needs_head`) and overrides

    _start()                                    begin an empty fit
    _update(features, logits, targets)          take in one batch of training data
    _finish()                                   fill the buffers of `state`
    _score(features, logits) -> (n,)            the score of each row

The three ways to fit are one: `fit` runs a model over a loader, `fit_features` cuts stored features into batches, and
both call `partial_fit` for each batch and `finalize` at the end. A detector without `state` needs no fitting; fitting
it does nothing. Statistics are summed in float64 as the data passes; only detectors that say so keep features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .. import checks
from ..heads import capture_features, given_head, inference_head

FIT_CHUNK = 65536  # rows of stored features per partial_fit: bounds the float64 copy that the sums make

_REGISTRY: dict[str, type[Detector]] = {}
D = TypeVar("D", bound="type[Detector]")


class Detector(nn.Module):
    """Base class of all detectors; see the module docstring for what a subclass supplies."""

    label: ClassVar[str] = ""  # how tables, plots and messages call it; the class name unless given
    needs_features: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False  # keeps a copy of the head as the buffers head_weight (c, m) and head_bias (c,)
    state: ClassVar[tuple[str, ...]] = ()  # buffers that fitting fills; the last dimension of the first is m

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "label" not in vars(cls):
            cls.label = cls.__name__

    def __init__(self) -> None:
        super().__init__()
        for name in self.buffer_names():
            self.register_buffer(name, None)
        self._fitting = False

    @classmethod
    def buffer_names(cls) -> tuple[str, ...]:
        return cls.state + (("head_weight", "head_bias") if cls.needs_head else ())

    # ---- fitting

    def fit(self, model: nn.Module, loader: Iterable, head: str | nn.Linear | None = None) -> Detector:
        """Run `model` once over `loader` (batches x, or (x, y, ...)) in eval mode and fit on what enters its head.

        `head` is the layer that makes the logits, or its name; without it, the one that `heads.find_head` finds.
        Batches are moved to the device of the model. The mode of the model is restored. Returns self.
        """
        checks.instance("model", model, nn.Module, "an nn.Module")
        _check_loader(loader)
        if not self.state:
            return self
        head = given_head(model, head)
        self._fitting = False
        with closing(run_model(model, loader, head)) as batches:  # also when partial_fit raises, the model is set back
            for features, logits, targets in batches:
                self.partial_fit(features, logits, targets)
        return self.finalize(head)

    def fit_features(
        self,
        features: Tensor,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        head: nn.Linear | tuple[Tensor, Tensor | None] | None = None,
    ) -> Detector:
        """Fit on stored features (n, m), with their logits (n, c), class indices (n,) and head, as far as the method
        needs them.

        `head` is an `nn.Linear` or `(W, b)` with W (c, m), b (c,) or None; it is copied. Returns self.
        """
        if not self.state:
            return self
        self._fitting = False
        for start in range(0, len(features), FIT_CHUNK):
            rows = slice(start, start + FIT_CHUNK)
            self.partial_fit(
                features[rows], None if logits is None else logits[rows], None if targets is None else targets[rows]
            )
        return self.finalize(head)

    @torch.no_grad()
    def partial_fit(self, features: Tensor, logits: Tensor | None = None, targets: Tensor | None = None) -> Detector:
        """Take in one batch of training data. The first call after construction or `finalize` begins a new fit."""
        if not self.state:
            return self
        checks.float_tensor("features", features, 2, "(n, m)")
        if not self._fitting:
            self._start()
            self._fitting = True
        self._update(features, logits, targets)
        return self

    @torch.no_grad()
    def finalize(self, head: nn.Linear | tuple[Tensor, Tensor | None] | None = None) -> Detector:
        """End a fit: turn what `partial_fit` gathered into the buffers that scoring reads. Returns self."""
        if not self.state:
            return self
        if not self._fitting:
            raise ValueError(f"{self.label}: no data to fit on; the loader or the feature tensor was empty")
        if self.needs_head:
            if head is None:
                raise ValueError(
                    f"{self.label}: head: got None, expected the nn.Linear that made the logits, or (W, b)"
                )
            weight, bias = head if isinstance(head, tuple) else inference_head(head)
            self.head_weight = weight.detach().clone()
            self.head_bias = None if bias is None else bias.detach().clone()
        self._finish()
        self._fitting = False
        return self

    @property
    def fitted(self) -> bool:
        """Whether the detector can score; always true for one that needs no fitting."""
        return not self.state or getattr(self, self.state[0]) is not None

    # ---- scoring

    @torch.no_grad()
    def score(self, model: nn.Module, x: Tensor, head: str | nn.Linear | None = None) -> Tensor:
        """Scores (n,) of one input batch; the model runs once, in eval mode, and its mode is restored.

        `head` as in `fit`. A detector that reads nothing but logits looks for none.
        """
        checks.instance("model", model, nn.Module, "an nn.Module")
        checks.instance("x", x, Tensor, "a tensor, one batch of inputs")
        self._require_fitted()
        read_from = given_head(model, head) if self.needs_features else None
        ((features, logits, _),) = run_model(model, [x], read_from)
        return self.score_features(features, logits)

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """Scores (n,) from features (n, m) and logits (n, c); what the method does not read may be None."""
        self._require_fitted()
        if self.needs_features:
            checks.float_tensor("features", features, 2, "(n, m)")
            if self.state and features.shape[1] != (width := getattr(self, self.state[0]).shape[-1]):
                raise ValueError(
                    f"features: got shape {tuple(features.shape)}, expected (n, {width}), the width that this "
                    f"{self.label} was fitted on"
                )
        if self.needs_logits:
            checks.logits(logits)
        return self._score(features, logits)

    def forward(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """As `score_features`."""
        return self.score_features(features, logits)

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError(
                f"{self.label} is not fitted: call fit(model, loader) or fit_features(features, ...) before scoring"
            )

    # ---- what a subclass supplies

    def _start(self) -> None:
        raise NotImplementedError

    def _update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError

    def _score(self, features: Tensor | None, logits: Tensor | None) -> Tensor:
        raise NotImplementedError

    # A fresh detector has no buffers to copy into: take their shapes from the state_dict.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.buffer_names():
            loaded = state_dict.get(prefix + name)
            setattr(self, name, None if loaded is None else torch.empty_like(loaded))
        super()._load_from_state_dict(state_dict, prefix, *args)


class CentredDetector(Detector):
    """A detector that measures from the mean of the training features, and knows the head: fits `mean` (m,)."""

    needs_features = True
    needs_head = True
    state = ("mean",)

    def _start(self) -> None:
        self._running = RunningMean()

    def _update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        self._running.update(features)

    def _finish(self) -> None:
        self.mean = self._running.mean()
        del self._running


class RunningMean:
    """Mean over rows, streamed: float64 sums, so that ten million rows cost no digits and no memory."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def update(self, rows: Tensor) -> None:
        self.like = at_least_float32(rows[:0])
        if rows.device.type == "mps":  # no float64 there
            rows = rows.cpu()
        total = rows.sum(dim=0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.count += len(rows)

    def mean(self) -> Tensor:
        """The mean of all rows, in the dtype of the rows (float32 at least) and where they were."""
        if self.count == 0:
            raise ValueError("features: got no rows to fit on, expected at least one")
        return (self.total / self.count).to(self.like)


@torch.no_grad()
def run_model(
    model: nn.Module, loader: Iterable, head: nn.Linear | None
) -> Iterator[tuple[Tensor | None, Tensor, Tensor | None]]:
    """For each batch of `loader` (x, or (x, y, ...)): what enters `head` (n, m), the logits (n, c), and y or None.

    One forward pass a batch, in eval mode, without gradients; the mode of the model is restored, also when it raises.
    Without a head the features are None.
    """
    parameter = next((model if head is None else head).parameters(), None)
    device = None if parameter is None else parameter.device  # None: everything stays where it is
    modes = [(module, module.training) for module in model.modules()]  # frozen layers may differ from the model
    model.eval()
    try:
        with nullcontext() if head is None else capture_features(head) as captured:
            for batch in loader:
                x, targets = _inputs_and_targets(batch)
                logits = model(x.to(device))
                if head is not None:
                    _check_head(head, logits)
                features = None if head is None else captured.features
                yield features, logits, None if targets is None else targets.to(device)
    finally:
        for module, training in modes:
            module.training = training


def _inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor | None]:
    """x and y of a batch x or (x, y, ...); what is no tensor, such as file names, is no y."""
    x, targets = batch, None
    if isinstance(batch, (tuple, list)) and batch:
        x, targets = batch[0], batch[1] if len(batch) > 1 else None
    checks.instance("loader: x of a batch", x, Tensor, "a tensor; batches are x or (x, y, ...)")
    return x, targets if isinstance(targets, Tensor) else None


def _check_loader(loader: object) -> None:
    """TypeError for what looks like a loader and gives single samples: a tensor, or a data set without a DataLoader."""
    single = isinstance(loader, Tensor) or (isinstance(loader, Dataset) and not isinstance(loader, IterableDataset))
    if single or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader: got {type(loader).__name__}, expected an iterable of batches x or (x, y, ...), such as a "
            "DataLoader or [x]"
        )


def _check_head(head: nn.Linear, logits: object) -> None:
    """ValueError for a layer that cannot have made the logits: the features would be those of a hidden layer."""
    if isinstance(logits, Tensor) and logits.dim() > 1 and logits.shape[1] != head.out_features:
        raise ValueError(
            f"head: got a layer {head.in_features} → {head.out_features}, but the logits have shape "
            f"{tuple(logits.shape)}; pass head=..., the nn.Linear that makes them or its name; with a head of "
            "another kind, use fit_features and score_features"
        )


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values as float32: scores are computed in float32 or better."""
    return values.float() if values.dtype.itemsize < 4 else values


# ---- the registry


def register(cls: D) -> D:
    """Class decorator: makes the detector known by its class name and its label to `create` and `compare`."""
    _REGISTRY[_key(cls.__name__)] = cls
    return cls


def known() -> list[str]:
    """Names of all registered detectors, in the order of their definition."""
    return [cls.__name__ for cls in _REGISTRY.values()]


def create(name: str, **parameters: Any) -> Detector:
    """A new detector by name, see `find`; ValueError with the known names and the nearest one otherwise."""
    return find(name)(**parameters)


def find(name: str) -> type[Detector]:
    """The detector class of that name, or with that label, in any case and with or without spaces."""
    key = _key(name)
    if key in _REGISTRY:
        return _REGISTRY[key]
    for cls in _REGISTRY.values():
        if _key(cls.label) == key:
            return cls
    raise checks.UserError(checks.unknown("detector", name, known()))


def _key(name: str) -> str:
    return "".join(name.lower().split())
