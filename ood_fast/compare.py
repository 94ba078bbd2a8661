"""The comparison: every loss × every seed trained and evaluated, and what the numbers say over the seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev

import numpy as np
import torch

from . import checks, data, detectors, diagnostics, metrics
from .evaluation.in_memory import evaluate
from .evaluation.measure import FIT
from .evaluation.results import ID, RunResult
from .recipes import BASELINE, DETECTORS, LOSSES, Recipe
from .training.in_memory import criterion_for, model_for, train

CONFIDENCE = 0.95
ROC_GRID = np.linspace(0.0, 1.0, 201)


@dataclass(frozen=True)
class Settings:
    """What to compare. `UserError` on construction if a name is unknown or a number makes no sense."""

    data: str = "digits"
    losses: tuple[str, ...] = tuple(LOSSES)
    detectors: tuple[str, ...] = tuple(DETECTORS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    recipe: Recipe = field(default_factory=Recipe)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.data not in data.BENCHMARKS:
            raise checks.UserError(checks.unknown("data set", self.data, data.BENCHMARKS))
        # Names as they are written, whatever the case they came in; a frozen dataclass is set this way.
        for loss in self.losses:
            if loss.lower() not in LOSSES:
                raise checks.UserError(checks.unknown("loss", loss, LOSSES))
        object.__setattr__(self, "losses", tuple(loss.lower() for loss in self.losses))
        object.__setattr__(self, "detectors", tuple(detectors.find(name).__name__ for name in self.detectors))
        for argument in ("losses", "detectors", "seeds"):
            values = getattr(self, argument)
            if not values:
                raise checks.UserError(f"{argument}: got none, expected at least one")
            if len(set(values)) < len(values):
                raise checks.UserError(f"{argument}: got {', '.join(map(str, values))}, expected each only once")
        if any(seed < 0 for seed in self.seeds):
            raise checks.UserError(f"seeds: got {min(self.seeds)}, expected numbers that are not negative")
        if self.recipe.epochs < 1:
            raise checks.UserError(f"epochs: got {self.recipe.epochs}, expected at least 1")

    def as_dict(self) -> dict:
        """For results.json: detectors with their parameters."""
        parameters = {name: DETECTORS.get(name, {}) for name in self.detectors}
        return {**asdict(self), "detectors": parameters}


@dataclass(frozen=True)
class Row:
    """One number of one run. `detector` and `ood_set` are empty where it does not belong to one."""

    loss: str
    seed: int
    detector: str
    ood_set: str
    metric: str
    value: float


@dataclass(frozen=True)
class TrainedLoss:
    """One trained model of a comparison."""

    loss: str
    seed: int
    class_names: tuple[str, ...]
    epoch_losses: list[float]
    seconds: float


@dataclass(frozen=True)
class PairedSummary:
    """One metric over the seeds: mean ± sample standard deviation (ddof 1); None with a single seed.

    `difference` is the mean over seeds of (this loss − baseline, same seed), `low` and `high` its 95 % interval by
    Student's t. None for the baseline itself or without one; `low` and `high` are None with a single seed.
    """

    loss: str
    detector: str
    ood_set: str
    metric: str
    mean: float
    std: float | None
    n_seeds: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Comparison:
    """All numbers of a comparison, and what the plots are drawn from."""

    settings: Settings
    ood_titles: dict[str, str] = field(default_factory=dict)  # OOD set -> what tables call it
    rows: list[Row] = field(default_factory=list)
    runs: list[TrainedLoss] = field(default_factory=list)
    scores: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)  # loss, detector, set; first seed
    roc_curves: dict[tuple[str, str, str], list[np.ndarray]] = field(default_factory=dict)  # one on ROC_GRID a seed
    singular_values: dict[str, list[np.ndarray]] = field(default_factory=dict)  # loss -> one spectrum a seed

    def summaries(self) -> list[PairedSummary]:
        """Every metric over the seeds, in the order in which the numbers came."""
        values: dict[tuple[str, str, str, str], list[float]] = {}
        for row in self.rows:
            values.setdefault((row.loss, row.detector, row.ood_set, row.metric), []).append(row.value)
        summaries = []
        for (loss, *what), measured in values.items():
            baseline = values.get((BASELINE, *what)) if loss != BASELINE else None
            # Both lists are in the order of the seeds: the runs of one seed saw the same images, weights and batches.
            paired = [] if baseline is None else [a - b for a, b in zip(measured, baseline, strict=True)]
            difference = fmean(paired) if paired else None
            low, high = mean_interval(paired) if len(paired) > 1 else (None, None)
            std = stdev(measured) if len(measured) > 1 else None
            summaries.append(PairedSummary(loss, *what, fmean(measured), std, len(measured), difference, low, high))
        return summaries


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of Student's t for the mean of at least two values."""
    from scipy.special import stdtrit

    half_width = stdtrit(len(values) - 1, 0.5 + confidence / 2) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half_width, fmean(values) + half_width


def compare(
    settings: Settings,
    on_start: Callable[[str, int], None] = lambda loss, seed: None,
    on_epoch: Callable[[int, float], None] = lambda epoch, epoch_loss: None,
    on_run: Callable[[TrainedLoss, RunResult], None] = lambda run, evaluation: None,
) -> Comparison:
    """Train and evaluate every loss with every seed. The same settings give the same numbers.

    The runs of one seed share the data, the first weights and the order of the batches, so that losses are compared in
    pairs.

    Args:
        on_start: called before each run with its loss and seed.
        on_epoch: called after each epoch with its number, from 1, and its mean loss.
        on_run: called after each run.

    Raises:
        train.DivergedError: a training loss became NaN or infinite.
    """
    result = Comparison(settings)
    device = torch.device(settings.device)
    with _one_thread():
        for seed in settings.seeds:
            benchmark = data.load(settings.data, seed).to(device)
            result.ood_titles = {
                name: f"{ood_set.group}-OOD: {ood_set.title}" for name, ood_set in benchmark.ood.items()
            }
            for loss in settings.losses:
                on_start(loss, seed)
                start = time.perf_counter()
                model = model_for(loss, benchmark.n_classes, seed).to(device)
                history = train(model, criterion_for(loss, model), benchmark.train, settings.recipe, seed, on_epoch)
                fresh = {name: detectors.create(name, **DETECTORS.get(name, {})) for name in settings.detectors}
                evaluation = evaluate(model, benchmark, fresh)
                run = TrainedLoss(loss, seed, benchmark.class_names, history, time.perf_counter() - start)
                _add(result, run, evaluation)
                on_run(run, evaluation)
    return result


def _add(result: Comparison, run: TrainedLoss, evaluation: RunResult) -> None:
    result.runs.append(run)
    features = evaluation.outputs[FIT].features.double()
    singular_values = diagnostics.singular_values(features)
    result.rows += [Row(run.loss, run.seed, *number) for number in _numbers(evaluation, singular_values)]
    result.singular_values.setdefault(run.loss, []).append(singular_values.cpu().numpy())
    for detector, scores in evaluation.scores.items():
        for ood_set in result.ood_titles:
            curve = _on_grid(*metrics.roc_curve(scores[ID], scores[ood_set]))
            result.roc_curves.setdefault((run.loss, detector, ood_set), []).append(curve)
    if run.seed == result.settings.seeds[0]:
        result.scores[run.loss] = evaluation.scores


def _numbers(evaluation: RunResult, singular_values: torch.Tensor) -> Iterator[tuple[str, str, str, float]]:
    """(detector, set, metric, value): what was measured set by set, of the features, and which α was chosen."""
    for found in evaluation.measurements:
        if found.ood_set in ("", *evaluation.sets):  # not the means over a group
            yield found.detector, found.ood_set, found.metric, found.value
    yield "", "", "effective_rank", diagnostics.effective_rank(singular_values)
    for index, value in enumerate(singular_values.tolist(), start=1):
        yield "", "", f"singular_value_{index:02d}", value
    for name, settings in evaluation.settings.items():
        if issubclass(detectors.find(name), detectors.NCI):
            yield name, "", "alpha", settings["alpha"]
            yield name, "", "alpha_validation_auroc", max(trial["auroc"] for trial in evaluation.trials[name])


def _on_grid(false_positive_rate: torch.Tensor, true_positive_rate: torch.Tensor) -> np.ndarray:
    """The true-positive rate reached at each false-positive rate of `ROC_GRID`."""
    last = np.searchsorted(false_positive_rate.numpy(), ROC_GRID, side="right") - 1
    return true_positive_rate.numpy()[last]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: the number of threads decides the order of sums, so it would decide the last digits. And these
    models are too small to gain from a second one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
