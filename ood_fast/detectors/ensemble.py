"""Several models behind one score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..heads import unwrapped
from ..models.outputs import logits_of
from ..models.running import refuse_meta
from ..models.weights import identity_of
from .detector import Detector
from .passes import SeveralPasses, look
from .registry import register


class ModelEnsemble(nn.ModuleList):
    """Several classifiers as one, whose logits are the mean of theirs: what a set with an `Ensemble` in it is fitted
    on and scores with; the other detectors of the set see the mean logits."""

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        """The mean logits (n, c)."""
        return _stacked([logits_of(model(*args, **keywords)) for model in self]).mean(dim=0)


def _stacked(found: list[Tensor]) -> Tensor:
    """What each model gave, one after the other; ValueError for none, or models of other classes."""
    if len(shapes := {tuple(one.shape) for one in found}) != 1:
        raise ValueError(f"model: got logits of shapes {sorted(shapes)}, expected models of the same classes")
    return torch.stack([one.to(found[0].device) for one in found])


@register
class Ensemble(SeveralPasses):
    """Passes of several models, each with a detector of its own:

        Ensemble("KNN").fit([model_a, model_b, model_c], loader).score([model_a, model_b, model_c], x)

    The models are a list, an `nn.ModuleList` or a `ModelEnsemble`. Each runs once over the loader of a fit.

    Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles", NeurIPS 2017, arXiv:1612.01474; the disagreement: Tifrea, Stavarache and Yang, "Semi-supervised novelty
    detection using ensembles with regularized disagreement", UAI 2022, arXiv:2012.05825, whose training is not here.

    Args:
        of, options: see `SeveralPasses`; of a detector the settings are taken, not what it was fitted on. A list of
            options, one a model, is what files hold where a fit made them differ, as the names of layers may.
        size: how many models; None: as many as it is fitted on.
    """

    label = "Deep ensemble"
    several_models = True

    def __init__(self, of: str | Detector = "mean_logits", options: Any = None, *, size: int | None = None) -> None:
        each = list(options) if isinstance(options, (list, tuple)) else [options or {}] * (size or 0)
        if isinstance(options, (list, tuple)) and len(each) != size:
            raise ValueError(f"options: got {len(each)}, expected a mapping, or one for each of size={size} models")
        super().__init__(of.changed() if isinstance(of, Detector) else of, each[0] if each else options)
        if size is not None:
            checks.positive_int("size", size)
        self.size = size
        self.members = nn.ModuleList(m.changed(**own) for m, own in zip(self._anew(size or 0), each, strict=False))

    @property
    def options(self) -> Any:
        """The parameters of the detectors: of all, or a list where they differ."""
        members: list[Any] = list(self.members)
        each = [member.settings() for member in members]
        return super().options if not each else each[0] if all(one == each[0] for one in each) else each

    def _anew(self, size: int) -> list[Detector]:
        return [] if self.member is None else [self.member.changed() for _ in range(size)]

    @property
    def fitted(self) -> bool:
        """Whether every model has its detector."""
        return not self.needs_fit or (bool(self.members) and all(member.fitted for member in self.members))

    def learners(self) -> tuple[Any, ...]:
        """None: each is fitted on a model of its own."""
        return ()

    def models(self, model: Any) -> Sequence[nn.Module]:
        """The models, as many as there are detectors."""
        model = unwrapped(model) if isinstance(model, nn.Module) else model
        if not isinstance(model, (list, tuple, nn.ModuleList)) or len(model) < 2:
            got = f"{len(model)} models" if isinstance(model, (list, tuple, nn.ModuleList)) else type(model).__name__
            raise ValueError(
                f"model: got {got}, expected two or more for {self.label}: a list, an nn.ModuleList or a ModelEnsemble"
            )
        for one in model:
            refuse_meta(one)
        if self.size not in (None, len(model)):
            raise ValueError(f"model: got {len(model)} models, expected {self.size}, as in the fit or in size")
        return list(model)

    def prepare(self, model: Any) -> None:
        """ValueError for what are not several models."""
        self.models(model)

    def fit(
        self, model: Any, loader: Any, head: str | nn.Linear | None = None, group: dist.ProcessGroup | None = None
    ) -> Detector:
        """As `Detector.fit`, each detector on its model; `loader` is read once for each. Returns self."""
        models = self.models(model)
        if isinstance(loader, Iterator) and self.needs_fit:
            got = f"a {type(loader).__name__}, which can be read once, expected a DataLoader or a list of batches"
            raise ValueError(f"loader: got {got}, which each model reads")
        if len({id(unwrapped(one)) for one in models}) < len(models):
            raise ValueError(f"model: got one model several times, expected {len(models)} that were trained apart")
        self.forget()
        members = self._anew(len(models))
        for member, one in zip(members, models, strict=False):  # none for a function of logits
            member.fit(one, loader, head, group)
        self.members, self.fitted_on = nn.ModuleList(members), identity_of(models)
        vars(self)["size"] = len(models)  # by hand a fitted one takes none
        return self

    def fit_features(self, *_given: Any, **_keywords: Any) -> Detector:
        """RuntimeError: features are those of one model."""
        raise RuntimeError(f"{self.label} is fitted on several models: call fit(models, loader)")

    partial_fit = fit_features

    def looks(self, model: Any, x: Any, head: str | nn.Linear | None) -> Iterator[Tensor]:
        """One pass of each model."""
        models = self.models(model)
        members: Sequence[Any] = list(self.members) if self.needs_fit else [self.member] * len(models)
        found = [look(member, one, x, head) for member, one in zip(members, models, strict=True)]
        return iter(_stacked(found))
