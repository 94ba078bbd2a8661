"""Detectors of this package as pytorch-ood detectors (pytorch-ood >= 0.4), for its metrics, benchmarks and searches.

    from ood_fast.interop.pytorch_ood import PytorchOOD

    detector = PytorchOOD(ood_fast.detectors.NCI(), model).fit(train_loader)
    CIFAR10_OpenOOD(root, transform).evaluate(detector, loader_kwargs={"batch_size": 128})

The sign is theirs: **higher = out-of-distribution**, the negative of `Detector.score`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, detectors
from ..heads import find_head, given_head, inference_head
from ..models.running import run_model
from ..models.weights import refuse_other

try:
    from pytorch_ood import api
except ImportError as error:
    raise ImportError("this adapter needs pytorch-ood 0.4 or newer: pip install pytorch-ood") from error


class PytorchOOD(api.FeaturesDetector):  # type: ignore[misc]  # of a package that need not be there
    """One of our detectors as one of theirs. Of a subclass named like the detector, as their tables print the class.

    `encoder` maps inputs to features, one for all adapters of a model: their benchmarks and `GridSearch` run it once
    for all detectors and candidates. Without a linear head (a detector of logits alone) or where a detector passes
    inputs of its own through the model (ODIN) it is None, and they run the model for each.

    A detector that takes nothing from the data but the head (ASH, SCALE, boundary distance) needs no `fit`: it follows
    that of the model.

    Args:
        detector: fitted or not.
        model: the classifier; None: only `fit_features` and `predict_features` work.
        head: the layer that makes the logits, or its name; None: the one found. Without a model, an `nn.Linear`.
    """

    info = api.DetectorInfo(tasks={api.Task.CLASSIFICATION})

    def __new__(cls, detector: detectors.Detector, *args: Any, **keywords: Any) -> Any:
        """One of a subclass that is named like the detector."""
        named: Any = type(type(detector).__name__, (cls,), {"__module__": __name__}) if cls is PytorchOOD else cls
        return super().__new__(named)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which know no subclass that was made here."""
        cls = PytorchOOD if type(self).__module__ == __name__ else type(self)
        kept = {name: value for name, value in vars(self).items() if name != "encoder"}  # one for all of a model
        return cls, (self.detector, self.model, self.head), kept

    def __init__(
        self, detector: detectors.Detector, model: nn.Module | None = None, head: str | nn.Linear | None = None
    ) -> None:
        checks.instance("detector", detector, detectors.Detector, "a detector of ood_fast")
        self.detector = detector
        self.model = model
        self.head = _head(detector, model, head)
        self.encoder = None
        if model is not None and self.head is not None and not detector.needs_model:
            self.encoder = _encoder(model, self.head)
        # A fitted one keeps the head that it was fitted with.
        self._follows_head = (
            self.head is not None and detector.needs_head and not (detector.gathers() or detector.fitted)
        )
        self.requires_fit = detector.needs_fit and not self._follows_head
        self.hyperparameter_space = {name: list(values) for name, values in detector.grid.items()}

    def fit(self, data_loader: Iterable[Any]) -> PytorchOOD:
        """Fit on batches (x, y) in one pass of the model; samples with y < 0, their mark of OOD data, are left out.

        Labels are whole numbers of any dtype.
        """
        if self.detector.needs_fit:
            self.detector.fit(self._required_model(), _known(data_loader), self.head)
        return self

    def fit_features(self, x: Tensor, y: Tensor | None = None) -> PytorchOOD:
        """Fit on features (n, m) and class indices (n,); the logits come from the head. y < 0 is left out."""
        if self.detector.needs_fit:
            if y is not None:
                x, y = x[y >= 0], _indices(y[y >= 0])
            head = None if self.head is None else inference_head(self.head)
            self.detector.fit_features(x, self._logits(x), y, head)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores (n,) of a batch of inputs; the model runs once, in eval mode, and its modes are restored."""
        model = self._required_model()
        self._require_fitted()
        return -self.detector.score(model, x, self.head)

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (n,) of features (n, m)."""
        self._require_fitted()
        if self.model is not None:  # whose encoder has made them
            refuse_other(self.model, self.detector.fitted_on, self.detector.label, self.head)
        return -self.detector.score_features(x, self._logits(x))

    def get_hyperparameters(self) -> dict[str, Any]:
        """The parameters of the detector."""
        return {name: value for name, value in self.detector.settings().items() if name in self.hyperparameter_space}

    def set_hyperparameters(self, **hyperparameters: Any) -> PytorchOOD:
        """As theirs. The fit is dropped with the parameters that it was made with: fit again, as `GridSearch` does."""
        for name in hyperparameters:
            if name not in self.hyperparameter_space:
                raise ValueError(checks.unknown("hyperparameter", name, self.hyperparameter_space))
        device = self.device
        self.detector = type(self.detector)(**{**self.detector.settings(), **hyperparameters})
        return self if device is None else self.to(device)

    def _logits(self, features: Tensor) -> Tensor | None:
        return None if self.head is None else F.linear(features, *inference_head(self.head))

    def _required_model(self) -> nn.Module:
        if self.model is None:
            raise api.ModelNotSetException
        return self.model

    def _require_fitted(self) -> None:
        if self._follows_head and self.head is not None:
            weight, bias = inference_head(self.head)
            pairs = zip((self.detector.head_weight, self.detector.head_bias), (weight, bias), strict=True)
            if not all(_same(kept, given) for kept, given in pairs):
                self.detector.finalize((weight, bias))
        if not self.detector.fitted:
            raise api.RequiresFittingException


def _head(detector: detectors.Detector, model: nn.Module | None, head: str | nn.Linear | None) -> nn.Linear | None:
    if model is None:
        if head is not None:
            checks.instance("head", head, nn.Linear, "an nn.Linear where there is no model")
        return head if isinstance(head, nn.Linear) else None
    if head is not None or detector.needs_features or detector.needs_head:
        return given_head(model, head)
    try:
        return find_head(model)
    except ValueError:  # none that can be told; scoring inputs does without
        return None


class _Encoder(nn.Module):
    """x -> what enters the head of `model`, in eval mode and without gradients."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x: Tensor) -> Tensor | None:
        (batch,) = run_model(self.model, [x], self.head)
        return batch.features


_ENCODERS: weakref.WeakValueDictionary[tuple[int, int], _Encoder] = weakref.WeakValueDictionary()


def _encoder(model: nn.Module, head: nn.Linear) -> _Encoder:
    """One for all adapters of a model that are alive: their caches go by the identity of the encoder."""
    encoder = _ENCODERS.get((id(model), id(head)))
    if encoder is None:
        _ENCODERS[id(model), id(head)] = encoder = _Encoder(model, head)
    return encoder


def _known(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader without the samples with y < 0; of a batch that holds no other, nothing."""
    for x, y in loader:
        known = y >= 0
        if known.all():
            yield x, _indices(y)
        elif known.any():
            yield x[known], _indices(y[known])


def _indices(y: Tensor) -> Tensor:
    """Class indices, int64, of labels of any dtype."""
    indices = y.long()
    if y.is_floating_point() and not torch.equal(indices.to(y), y):
        row = int((indices.to(y) != y).int().argmax())
        raise ValueError(f"y: got {float(y[row])} in row {row}, expected class indices")
    return indices


def _same(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    return kept.device == given.device and kept.dtype == given.dtype and torch.equal(kept, given)
