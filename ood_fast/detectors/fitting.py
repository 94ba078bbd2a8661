"""The fit of any number of detectors on the same data, in one pass. `Detector` and `DetectorSet` are the interface."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import agreement, checks
from ..heads import given_head, inference_head
from ..models.inputs import SeenImages, joined_range
from ..models.layers import Key, LayerReading
from ..models.outputs import other_logits, refuse_probabilities
from ..models.running import Batch, check_loader, refuse_meta, run_model
from ..models.weights import identity_of, identity_of_head, identity_of_layer
from . import streaming
from .numbers import at_least_float32, check_features, check_targets, refuse_one_logit, refuse_rows, refuse_short
from .own import check_finished, is_own

if TYPE_CHECKING:
    from .detector import Detector

FIT_CHUNK = 65536  # rows of stored features that are taken in at a time: bounds the float64 copy that the sums make
MOST_COUNTED = 4096  # classes whose confusion matrix is counted: 134 MB
BELOW_0 = "features: got some below 0, expected those after a ReLU, for which it is made"
Head = nn.Linear | tuple[Tensor, Tensor | None]

_EXPECTED = {
    "features": "the features (n, m) of the training data",
    "logits": "their logits (n, c)",
    "targets": "their class indices (n,), int64",
    "layers": "what fit(model, loader) reads of the layers of the model",
}


class DoesNotFit(ValueError):
    """A parameter that the training data are too few for: its name, and a value to try, None if there is none."""

    detector = ""  # its name, once it is known

    def __init__(self, text: str, parameter: str, advice: int | None = None) -> None:
        super().__init__(text)
        self.parameter, self.advice = parameter, advice

    def of(self, detector: str) -> DoesNotFit:
        """The same, that says of which detector."""
        named = type(self)(f"{detector}: {self}", self.parameter, self.advice)
        named.detector = detector
        return named


class Limit(NamedTuple):
    """What the data allow a parameter to be."""

    most: int
    why: str
    cure: str
    advice: int | None


def at_most(detector: Detector, parameter: str, *limits: Limit) -> None:
    """Hold a parameter to what the data allow: a default is lowered to it, with a warning, and is back for the next
    fit; of one that was given, DoesNotFit."""
    value = detector.lowered.pop(parameter, getattr(detector, parameter))
    vars(detector)[parameter] = value  # by hand it could not be set during a fit
    is_default = parameter not in detector.given
    broken = [limit for limit in limits if value > limit.most]
    if not broken:
        return
    limit = min(broken, key=lambda limit: limit.most) if is_default else broken[0]
    if not is_default or limit.most < 1:
        raise DoesNotFit(f"{parameter}: got {value}, {limit.why}; {limit.cure}", parameter, limit.advice)
    detector.lowered[parameter], vars(detector)[parameter] = value, limit.most
    tell(detector, f"{parameter}: the default of {value} does not fit, {limit.why}: takes {limit.most}, the largest "
         f"that does; give {parameter} to choose")  # fmt: skip


def tell_missing(detector: Detector, classes: list[int], text: str) -> None:
    """Warn of classes that per-class state has nothing of; `text` has a place for them."""
    if classes:
        names = detector.class_names or ()
        named = checks.shortened([repr(names[k]) if k < len(names) else str(k) for k in classes])
        tell(detector, text.format(f"class {named}") + "; fit on data of all classes")


def tell(detector: Detector, text: str) -> None:
    """Warn of what a fit makes of the data."""
    checks.warn_caller(f"{detector.label}: {text}")


@dataclass
class Confusion(streaming.Gathered):
    """How often class j was predicted for samples of class i, (c + 1, c) int64; None of more than `most` classes."""

    most: float = math.inf
    reads = ("logits", "targets")

    def __post_init__(self) -> None:
        self.counts: Tensor | None = None

    def update(self, features: Tensor | None, logits: Tensor, targets: Tensor) -> None:
        self.like = logits[:0]
        if logits.shape[1] <= self.most:
            counted = agreement.confusion(logits, targets)
            self.counts = counted if self.counts is None else self.counts + counted

    def merge(self, other: Confusion) -> None:
        if self.counts is not None and other.counts is not None:
            self.counts = self.counts + other.counts


class Note(str):
    """What a person is to be told about a detector: a sentence that knows what it is about.

    Attributes:
        detector: its name.
        kind: "left out" or "lowered".
        parameter, advice: of a `DoesNotFit`, None of other reasons.
    """

    detector: str
    kind: str
    parameter: str | None
    advice: int | None

    def __new__(cls, text: str, **about: Any) -> Note:
        """The sentence `text`, and the attributes."""
        note = super().__new__(cls, text)
        vars(note).update({"detector": "", "kind": "", "parameter": None, "advice": None, **about})
        return note

    @classmethod
    def lowered(cls, name: str, detector: Detector, parameter: str, default: int) -> Note:
        """That `at_most` lowered a default."""
        taken = getattr(detector, parameter)
        text = f"{name}: {parameter}={default} does not fit the data: {taken} is taken, the largest that does"
        return cls(text, detector=name, kind="lowered", parameter=parameter)

    @classmethod
    def left_out(cls, detector: str, reason: Exception, tried: str = "") -> Note:
        """That a detector takes no part, or those of its candidates that have the parameters `tried`."""
        about = {name: getattr(reason, name, None) for name in ("parameter", "advice")} if not tried else {}
        text = f"{detector}: {tried}{' ' if tried else ''}left out: {reason}"
        return cls(text, detector=detector, kind="left out", **about)


def readings_of(detectors: Iterable[Detector]) -> list[LayerReading]:
    """What they read of the layers of a model, each once."""
    return list({reading.key: reading for detector in detectors for reading in detector.readings()}.values())


class Fit:
    """A fit of `detectors`: it owns what they gather, each thing once whatever the number that want it.

    Each detector holds its part as `gathered` until the end, so that one fit may go on in several calls and sets.

    Args:
        anew: drop what a fit that was begun has gathered.
        failures: where the `ValueError` of a detector that does not fit the data goes, in place of being raised.
    """

    def __init__(
        self,
        detectors: Iterable[Detector],
        *,
        anew: bool = False,
        failures: dict[Detector, ValueError] | None = None,
    ) -> None:
        self.given = list(detectors)
        self.of = {learner: given for given in self.given if given.needs_fit for learner in given.learners()}
        self.detectors: list[Detector] = list(self.of)
        self.failures, self.anew = failures, anew
        self.order: Confusion | None = None

    @functools.cached_property
    def parts(self) -> list[streaming.Gathered]:
        """What they gather, from the first look on."""
        pool: dict[tuple[Any, ...], streaming.Gathered] = {}
        for detector in self.detectors:
            if self.anew or detector.gathered is None:
                gathered = detector.gathers().items()
                detector.gathered = {name: pool.setdefault(part.key(), part) for name, part in gathered}
        parts = [part for detector in self.detectors for part in (detector.gathered or {}).values()]
        return list({id(part): part for part in parts}.values())

    def _count(self) -> None:
        """Count whether targets are in the order of the logits, where they are read and no detector counts it."""
        if any("targets" in part.reads for part in self.parts) and not any(type(p) is Confusion for p in self.parts):
            self.order = Confusion(most=MOST_COUNTED)
            self.parts.append(self.order)

    def prepare(self, model: nn.Module) -> list[LayerReading]:
        """Let them choose their layers; what is to be read of these while `model` runs."""
        for detector in dict.fromkeys((*self.given, *self.detectors)):
            detector.prepare(model)
        return readings_of(self.detectors)

    def run(
        self, model: nn.Module, loader: Iterable[Any], head: str | nn.Linear | None, group: dist.ProcessGroup | None
    ) -> None:
        """All of it, on one pass of `model` over `loader`."""
        refuse_meta(model)
        check_loader(loader)
        readings = self.prepare(model)
        self._count()
        reads_features = any("features" in part.reads for part in self.parts)
        needs_head = reads_features or any(detector.needs_head for detector in self.detectors)
        layer = given_head(model, head) if needs_head else None
        maker: nn.Linear | bool | None = layer
        seen = SeenImages(model if layer is not None else None)
        try:
            if self.parts:
                # Whatever is raised, the model is set back.
                with closing(run_model(model, loader, layer, [*readings, *seen.readings], find_maker=True)) as batches:
                    n_rows = 0
                    for batch in batches:
                        maker = maker or batch.maker
                        seen.take(batch)
                        with checks.behind(n_rows):
                            self.see(model, batch, layer)
                        n_rows += len(batch.logits)
            self.finish(layer, group)
            seen.tell("fit")
            reached = [] if seen.range is None else [seen.range]
            if group is not None:
                everyone: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(everyone, reached, group)
                reached = [each for of_rank in everyone for each in of_rank]
            for detector in self.given:
                if detector.needs_fit and not detector.learners():  # of several models
                    detector.fit(model, loader, head, group)
                else:  # also one that keeps nothing: its threshold holds for this model
                    weights = identity_of(model)
                    made_by = identity_of_layer(maker) if weights and isinstance(maker, nn.Linear) else None
                    weights = weights._replace(made_by=made_by.waves) if weights and made_by else weights
                    if detector.fitted_on not in (None, weights):  # of one that keeps nothing, too
                        detector.forget()
                    detector.fitted_on, detector.input_range = weights, joined_range(reached)
        finally:
            self._end()

    def run_stored(
        self, features: Tensor | None, logits: Tensor | None, targets: Tensor | None, head: Head | None
    ) -> None:
        """All of it, on stored features, cut into batches."""
        if features is not None:
            check_features(features)
        if logits is not None:
            checks.logits(logits)
            self._count()
        n_rows = next((len(given) for given in (features, logits, targets) if given is not None), 0)
        try:
            for start in range(0, n_rows if self.detectors else 0, FIT_CHUNK):
                rows = slice(start, start + FIT_CHUNK)
                with checks.behind(start):
                    z, f, y = (None if given is None else given[rows] for given in (features, logits, targets))
                    self.take(z, f, y)
            self.finish(head)
            self._look_at_logits(features, logits)
        finally:
            self._end()

    def _look_at_logits(self, features: Tensor | None, logits: Tensor | None) -> None:
        """Warn where the head does not make the logits that came with it: those who score by both mix two models."""
        reading = next((detector for detector in self.detectors if detector.needs_head), None)
        if reading is None or reading.head_weight is None or features is None or logits is None:
            return
        if (difference := other_logits(features, logits, reading.head_weight, reading.head_bias)) is not None:
            tell(
                reading,
                f"logits: they are not F.linear(features, W, b) of the head, they differ by up to {difference:.3g}: "
                "rows in another order, or of another model or head; detectors that read both mix the two",
            )

    def see(self, model: nn.Module, batch: Batch, head: nn.Linear | None) -> None:
        """Take in one batch that `run_model` gave."""
        for detector in self.detectors:
            detector.see(model, batch, head)
        self.take(batch.features, batch.logits, batch.targets, batch.read)

    @torch.no_grad()
    def take(
        self,
        features: Tensor | None,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        layers: Mapping[Key, Tensor] | None = None,
    ) -> None:
        """Take in one batch."""
        if not self.parts:
            return
        given: dict[str, Any] = {"features": features, "logits": logits, "targets": targets, "layers": layers}
        for detector in self.detectors:
            for name in sorted({name for part in (detector.gathered or {}).values() for name in part.reads}):
                if given[name] is None:
                    raise ValueError(
                        f"{detector.label}: {name}: got None, expected {_EXPECTED[name]}, which it is fitted on"
                        + "; a batch that is a mapping has them as labels, targets or y" * (name == "targets")
                    )
        extent = check_batch(features, logits, targets)
        if logits is not None and any(detector.needs_logits or detector.needs_head for detector in self.detectors):
            refuse_one_logit(logits)
        for part in self.parts:
            for name, width in part.widths.items():
                if given[name].shape[1] != width:
                    got = tuple(given[name].shape)
                    raise ValueError(f"{name}: got shape {got}, expected (n, {width}) as in the batches before")
        if any("targets" in part.reads for part in self.parts):  # now: what is refused leaves nothing in any part
            # Of a binary classifier with one logit the targets are two classes.
            check_targets(given["targets"], None if logits is None or logits.shape[1] == 1 else logits.shape[1])
        for part in self.parts:
            part.take(layers if "layers" in part.reads else features, logits, targets)
            if "features" in part.reads:
                part.reach(extent)

    @torch.no_grad()
    def finish(self, head: Head | None, group: dist.ProcessGroup | None = None) -> None:
        """Fill the buffers of all from what was gathered, in this process or in all processes of `group`.

        With a head that does not fit nothing is lost: what was gathered stays for the right one.
        """
        if head is not None:
            head = self._copied(head)
        if group is not None:
            streaming.gather(self.parts, group)
        try:
            if self.order is not None and self.order.counts is not None:
                agreement.refuse_order(self.order.counts, "targets", self.detectors[0].class_names)
            for detector in {*self.detectors, *(given for given in self.given if given.needs_fit)}:
                detector.forget()
            known = None if head is None else identity_of_head(*head)
            extents = [part.extent for part in self.parts if part.extent is not None]
            has_negative = any(extent[2] > 0 for extent in extents)
            for detector in self.detectors:
                self._finish(detector, head)
                if has_negative and detector.of_positive:
                    tell(detector, BELOW_0)
                    vars(detector)["looked"] = True
                detector.fitted_on = known
        finally:
            self._end()

    def _finish(self, detector: Detector, head: tuple[Tensor, Tensor | None] | None) -> None:
        gathered = detector.gathered or {}
        if not all(part.rows for part in gathered.values()):
            raise ValueError(f"{detector.label}: no data to fit on; the loader or the feature tensor was empty")
        for part in gathered.values():
            if part.extent is not None:
                refuse_short(part.extent)
        if detector.needs_head:
            if head is None:
                raise ValueError(
                    f"{detector.label}: head: got None, expected the nn.Linear that made the logits, or (W, b)"
                )
            detector.head_weight, detector.head_bias = head
        try:
            detector.finish(gathered)
            if is_own(type(detector)):
                check_finished(detector)
        except ValueError as error:  # k or dim does not fit the data
            if self.failures is None:
                if isinstance(error, DoesNotFit):
                    raise error.of(detector.label) from error
                raise ValueError(f"{detector.label}: {error}") from error
            self.failures[self.of[detector]] = error
        else:
            if self.failures is not None:
                self.failures.pop(self.of[detector], None)  # of an earlier fit

    def _end(self) -> None:
        for detector in self.detectors:
            detector.gathered = None

    def _copied(self, head: Head) -> tuple[Tensor, Tensor | None]:
        """(W, b), one copy for all, of an `nn.Linear` or (W, b) that fits the features and logits gathered."""
        if not isinstance(head, nn.Linear) and not (isinstance(head, tuple) and len(head) == 2):
            raise TypeError(f"head: got {type(head).__name__}, expected an nn.Linear or (W, b)")
        weight, bias = head if isinstance(head, tuple) else (head.weight, head.bias)
        checks.float_tensor("head: W", weight, 2, "(c, m)")
        if len(weight) == 1 and any(detector.needs_head for detector in self.detectors):
            refuse_one_logit(weight.new_empty(0, 1))
        checks.head_bias(bias, weight)
        refuse_rows("head: W", weight)
        if bias is not None and (bias.isnan() | (bias == torch.inf)).any():
            raise ValueError("head: b: got NaN or inf, expected numbers; look at the training of the model")
        for part in self.parts:
            expected = tuple(
                part.widths.get(name, n) for name, n in zip(("logits", "features"), weight.shape, strict=True)
            )
            if weight.shape != expected:
                raise ValueError(
                    f"head: got W of shape {tuple(weight.shape)}, expected {expected} to fit the features and logits "
                    "given"
                )
        if isinstance(head, nn.Linear):
            weight, bias = inference_head(head)
        return weight.detach().clone(), None if bias is None else bias.detach().clone()


def check_batch(features: Tensor | None, logits: Tensor | None, targets: Tensor | None) -> Tensor | None:
    """The extent of the features; ValueError or TypeError for a batch whose numbers, dtypes or lengths no fit takes."""
    extent = None
    if features is not None:
        check_features(features)
        z = at_least_float32(features)
        lengths = torch.linalg.vector_norm(z, dim=1)
        refuse_rows("features", features, 0 * lengths)  # NaN where a row holds NaN or inf, or is too long
        if len(features):
            low, high = z.aminmax()
            extent = torch.stack([lengths.amax(), torch.maximum(high, -low), -low])
    if logits is not None:
        checks.logits(logits)
        refuse_probabilities(logits)
        refuse_rows("logits", logits, 0 * logits.amax(dim=1))
    if targets is not None:
        checks.instance("targets", targets, Tensor, _EXPECTED["targets"])
        if targets.dtype != torch.int64 or targets.dim() != 1:
            raise TypeError(f"targets: got {targets.dtype} {tuple(targets.shape)}, expected {_EXPECTED['targets']}")
    given = {"features": features, "logits": logits, "targets": targets}
    lengths = {name: len(value) for name, value in given.items() if value is not None}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"features, logits, targets: got {got}, expected as many of each")
    return extent
