"""More passes behind one score: thinned nets, views of an input; several models are in `ensemble`.

Each is a detector whose score is the mean over the passes of the scores of another detector, or a function of the
logits of all passes (`LOOKS`). They run the model by themselves, also in a set, so that "all" leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import checks
from ..capturing import capture_features
from ..heads import unwrapped
from ..models.inputs import warn_other_range
from ..models.running import batches_of, inputs_and_targets, joined, refuse_meta, run_model
from ..models.weights import refuse_other
from .detector import Detector
from .logit import confidence
from .numbers import refuse_one_logit, refuse_rows, widened
from .registry import known, register, registered


def _entropy(p: Tensor) -> Tensor:
    return torch.sum(torch.special.entr(p), dim=-1)


def _disagreement(p: Tensor) -> Tensor:
    # Of sorted numbers Σ_{s<t} |p_s − p_t| = Σ_k (2k − T − 1) p_(k).
    weights = torch.arange(1 - len(p), len(p), 2, device=p.device, dtype=p.dtype)
    return -(p.sort(dim=0).values * weights.view(-1, 1, 1)).sum(dim=(0, 2)) / (len(p) * (len(p) - 1))


# The scores (n,) of the logits f (T, n, c) of T passes.
LOOKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean_logits": lambda f: confidence(f.mean(dim=0), 1.0),
    "mean_softmax": lambda f: f.softmax(dim=2).mean(dim=0).amax(dim=1),
    "predictive_entropy": lambda f: -_entropy(f.softmax(dim=2).mean(dim=0)),
    "mutual_information": lambda f: _entropy(f.softmax(dim=2)).mean(dim=0) - _entropy(f.softmax(dim=2).mean(dim=0)),
    "variance": lambda f: -f.softmax(dim=2).var(dim=0).mean(dim=1),
    "disagreement": lambda f: _disagreement(f.softmax(dim=2)),
}
_OF_SEVERAL = ("mutual_information", "variance", "disagreement")


class SeveralPasses(Detector):
    """Base class. With p_t the softmax of pass t = 1 … T, p̄ their mean, H the entropy and s_t the score of a detector

        of=a detector            (1/T) Σ_t s_t
        of="mean_logits"         max_j softmax((1/T) Σ_t f_t)_j, as OpenOOD has it
        of="mean_softmax"        max_j p̄_j
        of="predictive_entropy"  −H(p̄)
        of="mutual_information"  −(H(p̄) − (1/T) Σ_t H(p_t))
        of="variance"            −(1/c) Σ_j Σ_t (p_tj − p̄_j)² / (T − 1)
        of="disagreement"        −2 / (T (T − 1)) Σ_{s<t} ½ ‖p_s − p_t‖₁

    A subclass supplies `looks`. The detector is fitted on plain passes, with all others of a set. Scores are float64.

    Args:
        of: one of these names, the name of a detector, or a detector; one that is fitted scores as it is.
        options: keywords of the detector that is named.
    """

    needs_model = True
    in_all = False
    several_models: ClassVar[bool] = False  # each with a detector of its own
    member: Detector | None

    def __init__(self, of: str | Detector, options: Mapping[str, Any] | None) -> None:
        super().__init__()
        checks.instance("of", of, (str, Detector), "a detector, or one of " + ", ".join([*LOOKS, *known()]))
        if isinstance(of, Detector):
            if options:
                raise ValueError(f"options: got {options!r} beside a {of.label}, which has its own")
            self.member, self.of = of, type(of).__name__
        elif cls := None if of in LOOKS else registered(of):
            self.member, self.of = cls(**options or {}), cls.__name__
        elif of not in LOOKS:
            raise checks.UserError("of: " + checks.unknown("score", of, [*LOOKS, *known()]))
        elif options:
            raise ValueError(f"options: got {options!r}, but {of} is no detector and has none")
        else:
            self.member, self.of = None, of
        self.fits_on = "train" if self.member is None else self.member.fits_on
        if isinstance(self.member, SeveralPasses) and self.member.several_models:
            raise ValueError(
                f"of: got a {self.member.label}, which stands outside: Ensemble({type(self).__name__}(...))"
            )

    @property
    def options(self) -> dict[str, Any]:
        """The parameters of the detector; none where it is a function of logits."""
        return {} if self.member is None else self.member.settings()

    @property
    def needs_fit(self) -> bool:
        return self.member is not None and self.member.needs_fit

    @property
    def fitted(self) -> bool:
        return self.member is None or self.member.fitted

    def learners(self) -> tuple[Any, ...]:
        return () if self.member is None else self.member.learners()

    def gathers(self) -> dict[str, Any]:
        return {} if self.member is None else self.member.gathers()

    def looks(self, model: nn.Module, x: Any, head: str | nn.Linear | None) -> Iterator[Tensor]:
        """What `look` gives of each pass over one batch of inputs."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, model: nn.Module, x: Any, head: str | nn.Linear | None = None) -> Tensor:
        """Scores of a batch of inputs or of a loader; arguments as in `Detector.score`."""
        self.require_fitted()
        self.prepare(model)
        refuse_other(model, self.fitted_on, self.label, head)
        scores: list[Tensor] = []
        for batch in batches_of(x):
            with checks.behind(sum(map(len, scores))):
                inputs = inputs_and_targets(batch, next(iter(self.models(model))))[0]
                if not scores:
                    warn_other_range(inputs, self.input_range, self.label)
                found = torch.stack([*self.looks(model, inputs, head)])
                scores.append(LOOKS[self.of](found) if self.member is None else found.mean(dim=0))
        return joined(scores)

    def models(self, model: Any) -> Sequence[nn.Module]:
        """The models that it runs."""
        refuse_meta(model)
        return [model]

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """RuntimeError: the score is made of passes of the model over inputs."""
        raise RuntimeError(f"{self.label} scores inputs, not features or logits: call score(model, x)")


@torch.no_grad()
def look(member: Detector | None, model: nn.Module, x: Any, head: str | nn.Linear | None) -> Tensor:
    """The scores (n,) of one pass, without a detector its logits (n, c); in float64 where the device has it."""
    if member is not None and member.needs_model:
        return member.score(model, x, head)
    if member is not None:
        (batch,) = member.passed(model, x, head)
        features = None if batch.features is None else widened(batch.features)
        return member.score_features(features, widened(batch.logits))
    (batch,) = run_model(model, [x], None)
    refuse_one_logit(batch.logits)
    refuse_rows("logits", batch.logits, 0 * batch.logits.amax(dim=1))
    return widened(batch.logits)


# ---- thinned nets

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_WHOLE_CHANNELS = (F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout)
_ALPHA = (F.alpha_dropout, F.feature_alpha_dropout)
_LOWEST = -1.7580993408473766  # of SELU: −λα


class _Thinning(TorchFunctionMode):
    """While it is entered, dropout of this thread drops: by masks of a generator, the same for all rows of a batch.

    No mode of any module is switched, which other threads would see.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.dropped = 0  # calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch calls it for every function of a tensor."""
        kwargs = kwargs or {}
        if func in (F.dropout, *_WHOLE_CHANNELS, *_ALPHA):
            return self._drop(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _drop(self, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if p <= 0:
            return input
        self.dropped += 1
        size = (1, *input.shape[1:])
        if func in _WHOLE_CHANNELS:
            size = (*size[:2], *[1] * (input.dim() - 2))
        kept = (torch.rand(size, generator=self.generator, device="cpu") >= p).to(input)
        if func not in _ALPHA:
            return input * (kept / (1 - p) if p < 1 else kept)
        scale = ((1 - p) * (1 + p * _LOWEST**2)) ** -0.5 if p < 1 else 0.0  # mean and variance stay
        return scale * (input * kept + _LOWEST * (1 - kept) - _LOWEST * p)


@register
class MCDropout(SeveralPasses):
    """Passes of nets thinned by dropout: every dropout layer drops, all else is in eval mode.

    A pass is one net, one draw of all masks, for every input: the score of an input does not depend on those beside
    it, and is the same in every call. Other threads may run the model meanwhile. For models with dropout layers
    (`nn.Dropout` and its like, p > 0); attention whose dropout is a number stays whole.

    Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016, arXiv:1506.02142.

    Args:
        of, options: see `SeveralPasses`. pytorch-ood has "variance" and "mean_softmax".
        passes: T >= 2; 5 as in OpenOOD, 30 in pytorch-ood.
        seed: of the masks.
    """

    label = "MC dropout"

    def __init__(
        self,
        of: str | Detector = "mean_logits",
        options: Mapping[str, Any] | None = None,
        *,
        passes: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__(of, options)
        checks.positive_int("passes", passes)
        if passes < 2:
            raise ValueError(f"passes: got {passes}, expected 2 or more")
        checks.seed(seed)
        self.passes, self.seed = passes, seed

    def prepare(self, model: nn.Module) -> None:
        """ValueError for a model without dropout layers."""
        refuse_meta(model)
        if not any(isinstance(m, _DROPOUTS) and m.p > 0 for m in unwrapped(model).modules()):
            self._refuse(model, "has no dropout layer (nn.Dropout, ..., p > 0)")

    def _refuse(self, model: nn.Module, what: str) -> None:
        raise ValueError(
            f"model: {type(unwrapped(model)).__name__} {what}, so that all passes of {self.label} would be the same; "
            "take a model that was trained with nn.Dropout layers, or TestTimeAugmentation or Ensemble"
        )

    def looks(self, model: nn.Module, x: Any, head: str | nn.Linear | None) -> Iterator[Tensor]:
        """One pass after the other through nets of other masks."""
        with capture_features(None), _Thinning(self.seed) as thinning:  # the first: nothing runs compiled
            found = [look(self.member, unwrapped(model), x, head) for _ in range(self.passes)]
        if not thinning.dropped:
            self._refuse(model, "runs none of its dropout layers")
        return iter(found)


# ---- views of an input


def _crop(x: Tensor, down: float, right: float) -> Tensor:
    """Seven eighths of each side, at that place between 0 and 1, as large as the whole."""
    h, w = x.shape[2:]
    height, width = max(1, round(h * 7 / 8)), max(1, round(w * 7 / 8))
    top, left = round(down * (h - height)), round(right * (w - width))
    return F.interpolate(x[:, :, top : top + height, left : left + width], (h, w), mode="bilinear")


def _of_each(view: Callable[[Tensor], Tensor], x: Any) -> Any:
    """The view of a batch of images, or of those in a mapping."""
    if isinstance(x, Tensor):
        return view(x)
    return {name: view(value) if value.dim() == 4 else value for name, value in x.items()}


View = Callable[[Any], Any]
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))
_VIEWS: Mapping[str, tuple[View, ...]] = {
    "flip": (lambda x: x.flip(-1),),
    "crops": tuple(partial(_crop, down=down, right=right) for down, right in _CORNERS),
}


@register
class TestTimeAugmentation(SeveralPasses):
    """Passes over views of an input.

    Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NeurIPS 2012,
    average the softmax over the crops of the corners and the centre and their mirror images.

    Args:
        of, options: see `SeveralPasses`.
        views: "flip": images (n, channels, h, w) and their mirror images. "crops": the images, and the four corners and
            the centre of 7/8 of each side, resized. A function of a batch of inputs that gives as many. Or several of
            these. With functions of your own no file can be written.
    """

    __test__ = False  # of pytest, which takes classes called Test... for tests
    label = "Test-time augmentation"

    def __init__(
        self,
        of: str | Detector = "mean_softmax",
        options: Mapping[str, Any] | None = None,
        *,
        views: str | View | Sequence[str | View] = "flip",
    ) -> None:
        super().__init__(of, options)
        self.views = views if isinstance(views, str) or callable(views) else tuple(views)
        named = [view for view in self._listed() if not callable(view)]
        for view in named:
            checks.one_of("views", view, tuple(_VIEWS))
        if not self._listed():
            raise ValueError("views: got none, expected one or more")
        self._of_images = bool(named)
        if len(self._listed()) == 1 and not named and self.of in _OF_SEVERAL:
            raise ValueError(f"views: got one, expected two or more, whose {self.of} is taken")

    def _listed(self) -> tuple[str | View, ...]:
        return self.views if isinstance(self.views, tuple) else (self.views,)

    def looks(self, model: nn.Module, x: Any, head: str | nn.Linear | None) -> Iterator[Tensor]:
        """One pass for each view."""
        views: list[View] = []
        if self._of_images:
            if isinstance(x, Tensor) or not any(value.dim() == 4 for value in x.values()):
                checks.float_tensor("x", x, 4, "(n, channels, h, w), images")
            views.append(lambda x: x)
        for view in self._listed():
            views += [partial(_of_each, one) for one in _VIEWS[view]] if isinstance(view, str) else [view]
        n_rows = len(x if isinstance(x, Tensor) else next(iter(x.values())))
        for view in views:
            found = look(self.member, model, view(x), head)
            if len(found) != n_rows:
                raise ValueError(f"views: {view} gives {len(found)} rows for {n_rows} inputs, expected one an input")
            yield found
