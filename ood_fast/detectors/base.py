"""The contract of every detector. Direction of every score, here and everywhere: **higher = more in-distribution**.

A subclass of `ood_fast.detectors.Detector` is only mathematics. It says what it reads (`needs_features`,
`needs_logits`, `needs_head`), names the buffers that fitting fills (`state`), and overrides

    gathers() -> {name: Gathered}       what fitting sums up over the training data, see `streaming`
    _finish(**gathered)                 fill the buffers of `state` from it
    _score(features, logits) -> (n,)    the score of each row

or, in place of `_score`, where the score is a function of row statistics that many detectors share (one read of logits
and features then serves them all, see `ood_fast.statistics`),

    statistics() -> names               which of them
    constants() -> {name: tensor}       the W, mean, table, boundaries and gamma that they are taken with
    _combine(statistics) -> (n,)        the score

Parameters are keywords of `__init__`, kept as attributes of the same name. Without `state` and head there is nothing to
fit. Many detectors share one pass over the data in a `DetectorSet`. `docs/extending.md` has a whole one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..models.layers import LayerReading
from ..models.running import Batch
from ..statistics import row_statistics
from .own import check_class, is_own
from .streaming import Gathered


class Contract(nn.Module):
    """What a subclass of `Detector` supplies; see the module docstring."""

    label: ClassVar[str] = ""  # how tables, plots and messages call it; the class name unless given
    needs_features: bool = False  # to score
    needs_logits: bool = False  # to score
    needs_head: bool = False  # keeps a copy of the head as the buffers head_weight (c, m) and head_bias (c,)
    needs_model: bool = False  # scores inputs: by passes of its own through the model, or by more layers than the head
    state: ClassVar[tuple[str, ...]] = ()  # buffers that fitting fills
    optional_state: ClassVar[tuple[str, ...]] = ()  # those that it may leave None
    moves_inputs: ClassVar[bool] = False  # by its parameters eps and std, see `gradient.on_images`
    of_classes: ClassVar[bool] = False  # of one sample a class it estimates nothing but does not say so: left out
    of_positive: ClassVar[bool] = False  # made for features >= 0: a fit that sees others tells
    in_all: ClassVar[bool] = True  # whether "all" has it: not what runs the model several times over, see `passes`
    fits_on: str = "train"  # or "validation": the in-distribution data that the paper fits on
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # parameter -> the candidates of OpenOOD's search

    head_weight: Tensor  # None before a fit, as what is in `state`
    head_bias: Tensor | None
    given: frozenset[str]  # parameters that whoever made it named; the others are at their defaults
    lowered: dict[str, int]  # defaults that the data of the last fit were too few for, see `fitting.at_most`

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "label" not in vars(cls):
            cls.label = cls.__name__

    def __new__(cls, *args: Any, **keywords: Any) -> Contract:
        """Remembers which parameters it is given. TypeError for what else a parameter gets that is True or False."""
        if is_own(cls):
            check_class(cls, Contract)
        made = super().__new__(cls)
        given = {**dict(zip(cls.parameters_of(), args, strict=False)), **keywords}
        for name in cls.switches().intersection(given):
            if given[name] not in (True, False):  # "no" would count as yes
                raise TypeError(f"{name}: got {given[name]!r}, expected True or False")
        vars(made).update(given=frozenset(given), lowered={})
        return made

    def __init__(self) -> None:
        super().__init__()
        for name in self.buffer_names():
            self.register_buffer(name, None)

    @classmethod
    def parameters_of(cls) -> list[str]:
        """The keywords of a detector of this class."""
        return list(inspect.signature(cls.__init__).parameters)[1:]  # of cls, Python 3.10 would tell those of __new__

    @classmethod
    def switches(cls) -> set[str]:
        """Those that are True or False, and nothing else by their annotation."""
        known = inspect.signature(cls.__init__).parameters
        alone = (bool, "bool", inspect.Parameter.empty)
        return {name for name, p in known.items() if isinstance(p.default, bool) and p.annotation in alone}

    @classmethod
    def buffer_names(cls) -> tuple[str, ...]:
        """All buffers that a detector of this class may hold."""
        head = ("head_weight", "head_bias") if cls.needs_head else ()
        return (*cls.state, *cls.optional_state, *head, "threshold")

    # ---- fitting

    def gathers(self) -> dict[str, Gathered]:
        """What fitting sums up, by the names that `_finish` takes it by: new, empty ones."""
        return {}

    def _finish(self, **gathered: Any) -> None:
        """Fill the buffers `state`; `head_weight` and `head_bias` are there.

        Raise `fitting.DoesNotFit` for a parameter that the data are too few for.
        """
        if self.state:
            raise NotImplementedError

    def learners(self) -> tuple[Any, ...]:
        """The detectors that a fit of this one fits: itself, or those that it scores by."""
        return (self,)

    # ---- of those that read layers beside the head or run the model by themselves, see `layers` and `passes`

    def prepare(self, model: nn.Module) -> None:
        """Before a fit on `model`: choose the layers; ValueError for a model that it cannot score."""

    def readings(self) -> tuple[LayerReading, ...]:
        """What `run_model` is to read of other layers, in fits and in scoring."""
        return ()

    def see(self, model: nn.Module, batch: Batch, head: nn.Linear | None) -> None:
        """Put into `batch.read` what a fit gathers by passes of its own."""

    # ---- scoring, on what has passed the checks

    def _score(self, features: Tensor | None, logits: Tensor | None) -> Tensor:
        """The score of each row, (n,), of features (n, m) and logits (n, c); what is not needed may be None."""
        return self._combine(row_statistics(self.statistics(), logits, features, **self.constants()))

    def statistics(self) -> tuple[str, ...]:
        """The row statistics that `_combine` needs; none: the score is not made of them."""
        return ()

    def constants(self) -> dict[str, Any]:
        """The keywords of `row_statistics` that they are taken with."""
        return {}

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The score of each row, (n,), from `statistics`, each (n,)."""
        raise NotImplementedError

    def widths(self) -> tuple[int | None, int | None]:
        """m of the features and c of the logits that it was fitted on, None where any will do: rows of other widths are
        refused. Of the head, without one the last size of the first buffer of `state`."""
        if self.needs_head:
            weight = self._buffers["head_weight"]
            return (None, None) if weight is None else (weight.shape[1], weight.shape[0])
        first = self._buffers[self.state[0]] if self.state else None
        return (None if first is None or not first.dim() else first.shape[-1]), None

    # ---- parameters

    def settings(self) -> dict[str, Any]:
        """The parameters of this detector, by the keywords of its class."""
        if missing := [name for name in self.parameters_of() if not hasattr(self, name)]:
            raise TypeError(f"{self.label}: keeps no attribute {missing[0]}, as its parameter of that name is kept")
        return {name: getattr(self, name) for name in self.parameters_of()}

    def extra_repr(self) -> str:
        """As `repr` shows it."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
