"""The search for the parameters of detectors, on validation data, without a second pass of the model.

Every candidate of every detector is fitted and scored together, as any `DetectorSet` is: candidates share what fitting
gathers and what scoring reads, so a search costs arithmetic on features and logits only (ODIN excepted, which passes
inputs of its own through the model).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, metrics
from ..models.running import Batch
from ..values import Grids
from .detector import Detector
from .fitting import DoesNotFit, Note
from .sets import DetectorSet


@dataclass(frozen=True)
class Trial:
    """One candidate: the parameters that were tried, and the mean AUROC (0 to 1) over the OOD validation sets."""

    settings: dict[str, Any]
    auroc: float


class Search(DetectorSet):
    """Every candidate of the detectors of a set: fit and score it like any other, then `choose`.

    Candidates that do not fit the data (KNN's k above the number of training features, ViM's dim above m) take no part,
    but for the smallest of the class's own grid, which is lowered to what fits; `left_out` tells of both, and why. They
    are also left out of a fit in parts, of `only` some candidates.

    Args:
        detectors: what to tune. One whose grid is empty is its own only candidate.
        grids: name -> grid (parameter -> candidates), in place of the grid of the class, OpenOOD's.
        optional: a detector without a candidate that fits is left out too, instead of the ValueError of its first.
    """

    def __init__(self, detectors: DetectorSet, grids: Grids | None = None, optional: bool = False) -> None:
        grids = {} if grids is None else grids
        for name in grids:
            if name not in detectors.names:
                raise checks.UserError(f"grids: {checks.unknown('detector of the set', name, detectors.names)}")
        candidates: dict[tuple[str, int], Detector] = {}
        for name, detector in detectors.items():
            for index, variant in enumerate(detector.variants(grids.get(name))):
                candidates[name, index] = variant
        super().__init__({f"{name} {index}": variant for (name, index), variant in candidates.items()})
        self.failures = {}
        self.tuned = {name: [f"{name} {i}" for of, i in candidates if of == name] for name in detectors}
        self.grids = {name: tuple(grids.get(name, detector.grid)) for name, detector in detectors.items()}
        self.optional = optional
        self.left_out: list[Note] = []

    def score_features(self, *args: Any, **keywords: Any) -> dict[str, Tensor]:
        """As the set's, of the candidates that fit."""
        self.leave_out()
        return super().score_features(*args, **keywords)

    def score_loader(self, *args: Any, **keywords: Any) -> Generator[tuple[Batch, dict[str, Tensor]], None, None]:
        """As the set's, of the candidates that fit."""
        self.leave_out()
        return super().score_loader(*args, **keywords)

    def leave_out(self) -> None:
        """After fitting: drop the candidates that do not fit the data. Scoring and `choose` begin with it.

        ValueError, the first candidate's, for a detector that has none left and is not `optional`.
        """
        for name, candidates in self.tuned.items():
            for detector in map(self.__getitem__, candidates):
                told = [Note.lowered(name, detector, *pair) for pair in detector.lowered.items()]
                self.left_out += [note for note in told if note not in self.left_out]
        failures = self.failures or {}
        reasons = {name: failures[detector] for name, detector in self.items() if detector in failures}
        if not reasons:
            return
        for name, candidates in list(self.tuned.items()):
            failed = [candidate for candidate in candidates if candidate in reasons]
            if failed and len(failed) == len(candidates):
                if not self.optional:
                    first = reasons[failed[0]]
                    raise first.of(name) if isinstance(first, DoesNotFit) else ValueError(f"{name}: {first}") from first
                self.left_out.append(Note.left_out(name, reasons[failed[0]]))
                del self.tuned[name]
                continue
            for candidate in failed:
                tried = ", ".join(f"{key}={value}" for key, value in self._settings(name, candidate).items())
                self.left_out.append(Note.left_out(name, reasons[candidate], tried))
            self.tuned[name] = [candidate for candidate in candidates if candidate not in reasons]
        kept = {name: detector for name, detector in self.items() if name not in reasons}
        self.names, self.detectors = tuple(kept), nn.ModuleList(kept.values())

    def put(self, fitted: Mapping[str, Detector]) -> None:
        """Take these, fitted elsewhere, in the place of the candidates of their names."""
        self.detectors = nn.ModuleList(fitted.get(name, detector) for name, detector in self.items())

    def _settings(self, name: str, candidate: str) -> dict[str, Any]:
        """The parameters that are searched, as this candidate of detector `name` has them."""
        return {parameter: getattr(self[candidate], parameter) for parameter in self.grids[name]}

    def choose(
        self, inside: Mapping[str, Tensor], outside: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[DetectorSet, dict[str, list[Trial]]]:
        """The best candidate of each detector; and where there was a choice, all that were tried, in order.

        Best is the largest mean AUROC over the sets of `outside`, the first of equals.

        Args:
            inside: scores of in-distribution validation data, as `score_features` gives them: candidate -> (n,).
            outside: the same for each OOD validation set: set -> candidate -> (n,).
        """
        if not outside:
            raise ValueError("outside: got no OOD validation set, expected at least one")
        self.leave_out()
        winners: dict[str, Detector] = {}
        trials: dict[str, list[Trial]] = {}
        for name, candidates in self.tuned.items():
            for candidate in candidates:  # a winner is fitted again with what was chosen, or refused
                self[candidate].given |= set(self.grids[name])
                self[candidate].lowered = {}
            if len(candidates) == 1:  # nothing to choose: its scores need not be there
                winners[name], trials[name] = self[candidates[0]], []
                continue
            aurocs = [
                fmean(metrics.auroc(inside[candidate], scores[candidate]) for scores in outside.values())
                for candidate in candidates
            ]
            best = max(range(len(aurocs)), key=aurocs.__getitem__)  # the first of equals
            winners[name] = self[candidates[best]]
            settings = [self._settings(name, candidate) for candidate in candidates]
            trials[name] = [Trial(*pair) for pair in zip(settings, aurocs, strict=True)]
        return DetectorSet(winners), trials


def tune(
    detectors: DetectorSet,
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    ood_validation: Mapping[str, Iterable[Any]],
    head: str | nn.Linear | None = None,
    grids: Grids | None = None,
) -> tuple[DetectorSet, dict[str, list[Trial]]]:
    """Fit detectors and choose their parameters: one pass of the model over each loader, whatever is searched.

    The parameters are those with the best AUROC of `validation` against the OOD validation sets, as in OpenOOD's
    search. Tables are only honest when no test image takes part in it.

    The candidates of the grid replace what a detector was given: `KNN(k=10)` gets the best of OpenOOD's 50 to 1000.
    ``grids={"KNN": {}}`` keeps it as it is, ``grids={"KNN": {"k": (5, 10, 20)}}`` searches others. Parameters that are
    not in the grid stay.

    Args:
        detectors: what to tune; not changed.
        model, head: as in `Detector.fit`.
        train: what the detectors are fitted on.
        validation: in-distribution images that were not trained on; detectors with `fits_on = "validation"` are fitted
            on it.
        ood_validation: name -> loader of OOD images that are not tested with, near and far ones.
        grids: as in `Search`.

    Returns:
        (the fitted winners under the same names, name -> every `Trial`, none where there was no choice).
    """
    if not ood_validation:
        raise ValueError("ood_validation: got no set, expected at least one")
    search = Search(detectors, grids)
    search.fit(model, train, head, validation=validation)

    def scores_of(loader: Iterable[Any]) -> dict[str, Tensor]:
        batches = [scores for _, scores in search.score_loader(model, loader, head)]
        if not batches:
            raise ValueError("loader: got no batch, expected images to tune on")
        return {name: torch.cat([scores[name] for scores in batches]) for name in search}

    return search.choose(scores_of(validation), {name: scores_of(loader) for name, loader in ood_validation.items()})
