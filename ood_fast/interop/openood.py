"""Detectors of this package as OpenOOD v1.5 postprocessors, for its evaluators.

    from ood_fast.interop.openood import Postprocessor

    evaluator = openood.evaluation_api.Evaluator(net, id_name="cifar10", postprocessor=Postprocessor(NCI()), ...)
    evaluator.eval_ood()

The sign is theirs and ours: higher = more in-distribution. Any classifier will do as `net`, with or without their
`return_feature`; the data stay on the device of `net`.

OpenOOD is not on the package index. Where it can be imported the class derives from its `BasePostprocessor`, which its
`Evaluator` asks for; without it the class works the same.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks
from ..detectors import Detector, DetectorSet
from ..detectors.gradient import on_images

try:
    from openood.postprocessors import BasePostprocessor
except ImportError:
    BasePostprocessor = object

_Candidates = Mapping[tuple[Any, ...], Detector]


class Postprocessor(BasePostprocessor):  # type: ignore[misc]  # of a package that need not be there
    """One of our detectors as one of theirs.

    With `APS_mode`, their automatic parameter search: `setup` fits the detector for every combination of `args_dict`
    in one pass, and the search runs `net` once over each validation set, where theirs runs it for each combination.
    Candidates that do not fit the data (KNN's k above the number of training images, ViM's dim above the features) are
    taken out of `args_dict`.

    `ODIN()` without `std` takes that of the normalisation of the loaders' images, as OpenOOD does; a warning says where
    none can be found.

    Args:
        detector: fitted or not; `setup` fits a copy for each combination of parameters.
        head: the layer of the net that makes the logits, or its name; None: the one found.
        APS_mode: None: where the detector has parameters to search.
        args_dict: parameter -> candidates; None: the grid of the detector, OpenOOD's own.

    Attributes:
        args_dict: as given; after `setup` those that fit the data.
        args: the parameters in use, by name, as their configurations give them.
        hyperparam_search_done: set by their evaluator after the search.
    """

    def __init__(
        self,
        detector: Detector,
        head: str | nn.Linear | None = None,
        APS_mode: bool | None = None,
        args_dict: Mapping[str, Iterable[Any]] | None = None,
    ) -> None:
        checks.instance("detector", detector, Detector, "a detector of ood_fast")
        self.config = None
        self.detector = detector
        self.head = head
        self._grid = {name: list(values) for name, values in (args_dict or detector.grid).items()}
        self.args_dict = dict(self._grid)
        self.APS_mode = bool(self.args_dict) if APS_mode is None else APS_mode
        self.hyperparam_search_done = False
        self._n_set = 0  # calls of set_hyperparam since setup
        self._candidates: dict[tuple[Any, ...], Detector] = {}
        self._searched: dict[tuple[int, int], tuple[Any, ...]] = {}  # of net and loader -> both, and what the pass gave

    @property
    def args(self) -> SimpleNamespace:
        """What OpenOOD reads of its configuration."""
        return SimpleNamespace(**self.detector.settings())

    def setup(self, net: nn.Module, id_loader_dict: Mapping[str, Iterable[Any]], ood_loader_dict: Any) -> None:
        """Fit on the "train" loader, or the "val" loader where the method says so (ReAct, KL matching).

        The loaders give mappings with "data" and "label"; OOD data are not looked at. A detector that is fitted already
        and has no parameters to search stays as it is.
        """
        self._candidates, self._searched, self._n_set, self.args_dict = {}, {}, 0, dict(self._grid)
        self._take_std(*id_loader_dict.values())
        if self.APS_mode:
            values = itertools.product(*self.args_dict.values())
            self._candidates = dict(zip(values, self.detector.variants(self.args_dict), strict=True))
        if self._candidates or not self.detector.fitted:
            named = _set(self._candidates or {(): self.detector})
            named.failures = {} if self._candidates else None
            validation = _Pairs(id_loader_dict["val"]) if "val" in id_loader_dict else None
            named.fit(net, _Pairs(id_loader_dict["train"]), self.head, validation=validation)
            self._leave_out(named.failures or {})
        current = tuple(self._values())
        self.detector = self._candidates.get(current) or next(iter(self._candidates.values()), self.detector)

    def _take_std(self, *loaders: Iterable[Any]) -> None:
        found = (std for std in map(_std_of, loaders) if std is not None)
        self.detector = on_images(self.detector, next(found, None))
        if self.detector.moves_inputs and self.detector.std is None and self.detector.eps:
            warnings.warn(
                f"{self.detector.label}: no Normalize found in the preprocessing of the loaders, the step is taken as "
                f"if images were not divided by a standard deviation; pass {type(self.detector).__name__}(std=...)",
                stacklevel=3,
            )

    def _leave_out(self, failures: Mapping[Detector, ValueError]) -> None:
        """Take values out of `args_dict` until all combinations fit: their search makes every combination."""
        failed = [values for values, detector in self._candidates.items() if detector in failures]
        if len(failed) == len(self._candidates) and failed:
            first = failures[self._candidates[failed[0]]]
            raise ValueError(f"{self.detector.label}: {first}") from first
        while failed:
            # The value with the largest share of failures: one that never fits goes before those that it is tried with.
            tried = Counter(pair for values in self._candidates for pair in enumerate(values))
            lost = Counter(pair for values in failed for pair in enumerate(values))
            place, value = max(lost, key=lambda pair: lost[pair] / tried[pair])
            self._candidates = {key: kept for key, kept in self._candidates.items() if key[place] != value}
            failed = [key for key in failed if key[place] != value]
            name = list(self.args_dict)[place]
            self.args_dict[name] = [kept for kept in self.args_dict[name] if kept != value]

    def postprocess(self, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """(predicted class (n,), score (n,)) of a batch of inputs."""
        ((predicted, scores, _),) = self._score(net, [{"data": data}], {(): self.detector})
        return predicted, scores[()]

    def inference(self, net: nn.Module, data_loader: Iterable[Any], progress: bool = True) -> tuple[np.ndarray, ...]:
        """(predicted classes, scores, labels) of all data, as NumPy arrays.

        In a search all candidates are scored in one pass and kept, so that the next candidate on the same loader costs
        nothing. A search sets its first parameters, asks for every validation set, and sets the next: a loader that
        comes later, or without parameters set, is scored by the detector in use alone.
        """
        key = (id(net), id(data_loader))
        if not self.hyperparam_search_done and (key in self._searched or (self._candidates and self._n_set == 1)):
            if key not in self._searched:
                result = self._collect(net, data_loader, self._candidates, progress)
                self._searched[key] = (net, data_loader, result)  # keeps both alive, and so their ids
            predicted, scores, labels = self._searched[key][2]
            return predicted, scores[tuple(self._values())], labels
        self._searched.clear()
        predicted, scores, labels = self._collect(net, data_loader, {(): self.detector}, progress)
        return predicted, scores[()], labels

    def set_hyperparam(self, hyperparam: list[Any]) -> None:
        """The parameters in the order of `args_dict`. After `setup` they are among its candidates."""
        values = tuple(hyperparam)
        if self._candidates and values not in self._candidates:
            raise ValueError(f"hyperparam: got {hyperparam}, expected one of {list(map(list, self._candidates))}")
        (new,) = self.detector.variants({name: [value] for name, value in zip(self.args_dict, values, strict=True)})
        self.detector = self._candidates.get(values, new)
        self._n_set += 1

    def get_hyperparam(self) -> Any:
        """The parameter in use, a list of them if they are several."""
        values = self._values()
        return values[0] if len(values) == 1 else values

    def _values(self) -> list[Any]:
        settings = self.detector.settings()
        return [settings[name] for name in self.args_dict]

    @torch.no_grad()
    def _score(
        self, net: nn.Module, loader: Iterable[Any], detectors: _Candidates
    ) -> Iterator[tuple[Tensor, dict[tuple[Any, ...], Tensor], Any]]:
        """For each batch: predicted classes, scores by each detector, labels."""
        for batch, scores in _set(detectors).score_loader(net, _Pairs(loader), self.head):
            yield batch.logits.argmax(dim=1), dict(zip(detectors, scores.values(), strict=True)), batch.targets

    def _collect(
        self, net: nn.Module, loader: Iterable[Any], detectors: _Candidates, progress: bool
    ) -> tuple[Any, ...]:
        from rich.progress import track

        scored = self._score(net, loader, detectors)
        total = len(loader) if isinstance(loader, Sized) else None
        batches = [
            (predicted.cpu(), {key: score.cpu() for key, score in scores.items()}, labels.cpu())
            for predicted, scores, labels in track(scored, "Inference", total, disable=not progress)
        ]
        predicted, parts, labels = zip(*batches, strict=True)
        scores = {key: torch.cat([batch[key] for batch in parts]).numpy() for key in detectors}
        return torch.cat(predicted).numpy(), scores, torch.cat(labels).numpy().astype(int)


def _set(detectors: _Candidates) -> DetectorSet:
    return DetectorSet({str(key): detector for key, detector in detectors.items()})


def _std_of(loader: Iterable[Any]) -> tuple[float, ...] | None:
    """What the images of a loader were divided by: `std` of the Normalize in its data set's preprocessing."""
    waiting, seen = [getattr(loader, "dataset", None)], set()
    while waiting:
        step = waiting.pop()
        if step is None or id(step) in seen:
            continue
        seen.add(id(step))
        if hasattr(step, "mean") and hasattr(step, "std") and not callable(step.std):
            return tuple(map(float, step.std))
        waiting += step if isinstance(step, (list, tuple)) else []
        # In OpenOOD: ImglistDataset, its preprocessor, torchvision's Compose; Subset has a data set inside.
        names = ("dataset", "transforms", "transform", "preprocessor", "transform_image")
        waiting += [getattr(step, name, None) for name in names]
    return None


class _Pairs:
    """Their batches, mappings with "data", "label" and more, as (x, y)."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in self.loader:
            yield batch["data"], batch.get("label")
