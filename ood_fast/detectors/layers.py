"""Detectors that read layers of the model beside the one that makes the logits, in the same pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..capturing import capture_features
from ..heads import unwrapped
from ..models.layers import Key, LayerReading, layer_of, stages, watched
from ..models.running import Batch, evaluating, run_model
from . import streaming
from .detector import Detector
from .gaussian import Mahalanobis
from .gradient import by_std, check_movable, check_std, input_gradient
from .numbers import refuse_rows
from .registry import register


class EachLayer(streaming.Gathered):
    """What the detectors of several layers gather, each of the rows read of its own; takes them as `features`."""

    def __init__(self, layers: Iterable[Key], members: Iterable[Detector]) -> None:
        self.layers = tuple(layers)
        self.parts: list[dict[str, Any]] = [member.gathers() for member in members]

    @property
    def reads(self) -> tuple[str, ...]:
        """What a batch must hold."""
        others = {name for parts in self.parts for part in parts.values() for name in part.reads} - {"features"}
        return ("layers", *sorted(others))

    @property
    def like(self) -> Tensor:
        """Where the rows are."""
        like: Tensor = next(part.like for parts in self.parts for part in parts.values())
        return like

    def key(self) -> tuple[Any, ...]:
        return (type(self), self.layers, *(part.key() for parts in self.parts for part in parts.values()))

    def update(self, features: Mapping[Key, Tensor], logits: Tensor, targets: Tensor) -> None:
        for key, parts in zip(self.layers, self.parts, strict=True):
            rows = features[key]
            refuse_rows(f"layer {key[0]}", rows)
            for part in parts.values():
                part.take(rows, logits, targets)

    def merge(self, other: EachLayer) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            for name, part in mine.items():
                part.join(theirs[name])


@dataclass
class Passed(streaming.Bank):
    """A random sample of the rows that a detector read by passes of its own, see `Contract.see`."""

    key_read: Key = ("", "")
    reads = ("layers",)

    def update(self, features: Mapping[Key, Tensor], logits: Tensor | None, targets: Tensor | None) -> None:
        rows = features[self.key_read]
        refuse_rows(f"layer {self.key_read[0]}", rows)
        super().update(rows, None, None)


class LayerDetector(Detector):
    """Base class: a detector of the rows of each layer, `member`, whose scores are summed or combined.

    A subclass says what it reads of a layer, `kind` and `read`, overrides `member`, and calls `make_members` at the end
    of its `__init__`. Layers are named as `model.get_submodule` takes them; None: those that `models.layers.stages`
    finds when it is fitted, of which it keeps the names.
    """

    needs_logits = True
    needs_model = True
    only_last: ClassVar[bool] = False  # of the stages
    kind: str = "mean"
    members: Any  # an nn.ModuleList of detectors, one a layer

    def __init__(self, layers: Sequence[str] | None) -> None:
        super().__init__()
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"layers: got {layers!r}, expected the names of one layer or more, as in ('layer4',)")
        for name in layers or ():
            checks.instance("layers", name, str, "names of layers")
        self.layers = None if layers is None else tuple(layers)

    def make_members(self) -> None:
        """A detector for each layer."""
        self.members = nn.ModuleList(self.member() for _ in self.layers or ())

    def read(self, maps: Tensor) -> Tensor:
        """What is read of maps (n, channels, positions): rows (n, d)."""
        return maps.mean(dim=2)

    def member(self) -> Detector:
        """The detector of one layer; by default the first number of a row is its score."""
        return _First()

    def combine_layers(self, scores: Tensor) -> Tensor:
        """The score (n,) of those of the layers (n, L)."""
        return scores.sum(dim=1)

    def finish_layers(self, layers: EachLayer) -> None:
        """After the members have finished."""

    # ---- the contract

    @property
    def needs_fit(self) -> bool:
        """Whether it keeps anything of the data or the head, or of the model the names of its layers."""
        return super().needs_fit or self.member().needs_fit or self.layers is None or "layers" not in self.given

    @property
    def fitted(self) -> bool:
        return self.layers is not None and super().fitted and all(member.fitted for member in self.members)

    def prepare(self, model: nn.Module) -> None:
        """Choose the layers, or look whether the model has those that were named."""
        if self.layers is None or "layers" not in self.given:
            found = stages(model)
            vars(self)["layers"] = found[-1:] if self.only_last else found  # by hand a fitted one takes none
        for name in self.layers or ():
            layer_of(model, name)
        self.make_members()

    def readings(self) -> tuple[LayerReading, ...]:
        return tuple(LayerReading(name, self.kind, self.read) for name in self.layers or ())

    def gathers(self) -> dict[str, streaming.Gathered]:
        if not self.member().gathers():
            return {}
        members = self.members or [self.member()]  # which layers, is not known before `prepare`
        return {"layers": EachLayer([reading.key for reading in self.readings()], members)}

    def _finish(self, layers: EachLayer | None = None) -> None:
        if layers is not None:
            for name, member, parts in zip(self.layers or (), self.members, layers.parts, strict=True):
                try:
                    member.finish(parts)
                except ValueError as error:
                    raise ValueError(f"layer {name}: {error}") from error
            self.finish_layers(layers)

    # ---- scoring

    def score_batch(self, model: nn.Module, batch: Batch, head: str | nn.Linear | None = None) -> Tensor:
        self.require_fitted()
        rows = [batch.read[reading.key] for reading in self.readings()]
        for reading, z in zip(self.readings(), rows, strict=True):
            refuse_rows(f"layer {reading.layer}", z)
        scores = self.score_rows(rows, batch.logits)
        refuse_rows("logits", batch.logits, scores)
        return scores

    def score_rows(self, rows: list[Tensor], logits: Tensor) -> Tensor:
        """The scores (n,) of what was read of the layers, each (n, d)."""
        scores = [member.score_features(z, logits) for member, z in zip(self.members, rows, strict=True)]
        return self.combine_layers(torch.stack(scores, dim=1))

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """RuntimeError: the score is a function of layers of the model, not of what enters its head."""
        raise RuntimeError(f"{self.label} reads layers of the model, not features: call score(model, x)")


class _First(Detector):
    """The first number of each row."""

    needs_features = True

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        return features[:, 0]


@register
class LayerMahalanobis(LayerDetector):
    """Mahalanobis distances at several layers, each of the mean over positions, weighted:

        Σ_l α_l max_c −(z_l − μ_lc)ᵀ P_l (z_l − μ_lc)

    μ, P and keywords as in `Mahalanobis`. Lee et al. fit α by logistic regression on OOD data; without, α_l is one over
    the mean distance of the training samples from their own class, so that each layer counts alike; 0 for one where
    that is 0. With eps > 0 each layer is read of inputs of its own, moved to where it is nearer to a class, by two more
    passes and one backward,

        x̂_l = x + ε · sign(∂/∂x max_c −(z_l − μ_lc)ᵀ P_l (z_l − μ_lc)) / std

    Fitted on layers and targets, as they are.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    NeurIPS 2018, arXiv:1807.03888.

    Args:
        layers: names; None: each stage.
        weights: α, one a layer; None: see above.
        ridge, rtol, normalize: as in `Mahalanobis`.
        eps: ε >= 0, and std as in `ODIN`. The authors choose from 0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01.
    """

    label = "Mahalanobis over layers"
    moves_inputs = True
    state = ("scales",)  # (L,): α

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        *,
        weights: Sequence[float] | None = None,
        ridge: float = 0.0,
        rtol: float | None = None,
        normalize: bool = False,
        eps: float = 0.0,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(layers)
        checks.real("eps", eps, 0.0)
        self.eps, self.std = eps, check_std(std)
        for weight in weights or ():
            checks.real("weights", weight, -torch.inf, infinite=False)
        if weights is not None and layers is not None and len(weights) != len(layers):
            raise ValueError(f"weights: got {len(weights)}, expected {len(layers)}, one a layer")
        self.weights = None if weights is None else tuple(weights)
        self.ridge, self.rtol, self.normalize = ridge, rtol, normalize
        self.member()  # checks the rest
        self.make_members()

    def member(self) -> Detector:
        return Mahalanobis(ridge=self.ridge, rtol=self.rtol, normalize=self.normalize)

    def finish_layers(self, layers: EachLayer) -> None:
        """After the members have finished: the weights."""
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"weights: got {len(self.weights)}, expected {len(self.members)}, one a layer")
        means = [
            (member.root.double() @ member.root.double() * parts["means"].within(parts["scatter"])).sum()
            / parts["scatter"].rows
            for member, parts in zip(self.members, layers.parts, strict=True)
        ]
        own = torch.stack(means)
        if self.weights is None and not (own > 0).any():
            raise ValueError("layers: got the same for all samples of a class, expected some that differ")
        scales = (
            torch.where(own > 0, own, torch.inf).reciprocal() if self.weights is None else own.new_tensor(self.weights)
        )
        self.scales = scales.to(self.members[0].root)

    def combine_layers(self, scores: Tensor) -> Tensor:
        return scores.to(self.scales) @ self.scales

    def score_batch(self, model: nn.Module, batch: Batch, head: str | nn.Linear | None = None) -> Tensor:
        if self.eps:
            self.require_fitted()
            check_movable(batch.inputs, self.label, self.std)
            of_layers = zip(self.readings(), self.members, strict=True)
            batch = batch._replace(read={r.key: self._of_moved(model, batch.inputs, r, m) for r, m in of_layers})
        return super().score_batch(model, batch, head)

    def _of_moved(self, model: nn.Module, x: Tensor, reading: LayerReading, member: Detector) -> Tensor:
        """What is read of one layer, of the inputs moved for it."""
        with evaluating(model), capture_features(None, others=watched(model, [reading])) as captured:
            gradient = input_gradient(
                unwrapped(model), x, lambda _: member.score_features(captured.read[reading.key]).sum(), self.label
            )
        moved = x + self.eps * by_std(gradient.sign(), self.std)
        return next(run_model(model, [moved], None, [reading])).read[reading.key]
