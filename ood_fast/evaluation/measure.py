"""Arithmetic on what a model made of data sets: detectors fitted, tuned and measured, in float64.

Float64, from the model's float32 features and logits: in float32 the softmax of a confident model is exactly 1 for most
images, and the ties would decide the metrics.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .. import checks, detectors, metrics
from ..detectors import Detector, DetectorSet
from ..detectors.fitting import DoesNotFit, Note
from ..detectors.search import Search, Trial
from ..eager.precision import has_float64
from ..functional import boundary_distance, temperature_of
from ..recipes import TAU
from ..registry import added
from ..values import DRAWS, Grid, Grids
from .cache import CHUNK_VALUES, Outputs, Progress, no_progress, score_key
from .overlap import shared_images
from .results import CSID, FIT, FULL_SPECTRUM, GROUPS, ID, TEST, VALIDATION, VALIDATION_OOD, RunResult

T = TypeVar("T")
RESERVED = (ID, FIT, VALIDATION, VALIDATION_OOD, TEST, *GROUPS.values())  # what no set can be called
NO_CLASSES = "is fitted on each class, but no class has two training samples"
COSTS = 0.01  # of AUROC, from where on a choice is said to cost


@dataclass(frozen=True)
class Measuring:
    """How detectors are chosen and measured.

    Attributes:
        tune: take the parameters of the grids that best tell validation from OOD validation data by AUROC, as
            OpenOOD's search does; False: as they are.
        grids: detector -> as in `Search`, in place of OpenOOD's.
        leave_out: a detector that cannot be fitted on this data (KNN with k above the number of training images) is
            left out, with a note, instead of an error; None: where no detectors are named. Candidates of a search
            always are.
        device: where the model runs and scores are computed (scores on the CPU where there is no float64).
        bootstrap: how many draws for intervals; 0 for none. seed: of the draws.
        progress: `progress(what, total)` gives a context with `advance(n)`.
    """

    tune: bool = True
    grids: Grids | None = None
    leave_out: bool | None = None
    device: torch.device | str = "cpu"
    bootstrap: int = DRAWS
    seed: int = 0
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if isinstance(self.bootstrap, bool) or not isinstance(self.bootstrap, int) or self.bootstrap < 0:
            raise ValueError(f"bootstrap: got {self.bootstrap!r}, expected a number of draws, 0 for none")

    @property
    def exact_device(self) -> torch.device | str:
        """Where scores are computed: in float64, which MPS has not."""
        return self.device if has_float64(self.device) else "cpu"

    def for_chosen(self, chosen: object | None) -> Measuring:
        """With `leave_out` decided: where no detectors were named, those that do not fit are left out."""
        return self if self.leave_out is not None else replace(self, leave_out=chosen is None)

    def grids_of(self, names: Iterable[str]) -> dict[str, Grid]:
        """What is searched in place of OpenOOD's grids."""
        if not self.tune:
            return {name: {} for name in names}
        grids = self.grids or {}
        return {name: grids[name] for name in names if name in grids}


def separate(options: Mapping[str, Any], kind: type[T]) -> tuple[Measuring, T]:
    """Keywords as those of `Measuring`, and of `kind`, a dataclass; TypeError for others."""
    names = {field.name for field in fields(cast(Any, kind))}
    of_kind = {name: value for name, value in options.items() if name in names}
    return Measuring(**{name: value for name, value in options.items() if name not in names}), kind(**of_kind)


Named = Mapping[str, Detector] | Iterable[str] | None  # detectors by name, or names; None: all that are registered


class Chosen(NamedTuple):
    """Detectors whose parameters are chosen already: those that need the model, whose scores the cache keeps."""

    winners: Mapping[str, Detector] = MappingProxyType({})
    trials: Mapping[str, list[Trial]] = MappingProxyType({})
    notes: tuple[Note, ...] = ()  # of those that could not be fitted


UNCHOSEN = Chosen()


def measure(
    result: RunResult, given: Mapping[str, Detector], against: Iterable[str], how: Measuring, before: Chosen = UNCHOSEN
) -> None:
    """Fit, tune and measure the detectors `given` on `result.outputs`, in float64; fills in `result`.

    Args:
        against: the sets among the outputs by which parameters are chosen.
        how: its `leave_out` decides; None is False.
    """
    tuned, trials = dict(before.winners), dict(before.trials)
    result.notes += [*before.notes, *shared_images(result.outputs)]
    blind = {name: detector for name, detector in given.items() if not detector.needs_model}
    if blind:
        search = Search(DetectorSet(blind), how.grids_of(blind), bool(how.leave_out))
        _fit(search, result.outputs, result.head, how.exact_device)
        try:
            search.leave_out()
        except ValueError as error:
            raise checks.UserError(str(error)) from error
        result.notes += search.left_out
        inside: dict[str, Tensor] = {}  # where there is nothing to choose, no scores are needed
        outside: dict[str, dict[str, Tensor]] = {"": {}}
        if any(len(candidates) > 1 for candidates in search.tuned.values()):
            inside = _scores(search, result.outputs[VALIDATION], how.progress)
            outside = {name: _scores(search, result.outputs[name], how.progress) for name in against}
        if search.names:
            chosen, more_trials = search.choose(inside, outside)
            tuned, trials = {**tuned, **dict(chosen.items())}, {**trials, **more_trials}
    tuned = {name: tuned[name] for name in given if name in tuned}
    if not tuned:
        raise checks.UserError("no detector could be fitted: " + "; ".join(map(str, result.notes)))
    result.settings = {name: _plain(detector.settings()) for name, detector in tuned.items()}
    result.trials = {
        name: [{**_plain(trial.settings), "auroc": trial.auroc} for trial in trials[name]]
        for name in tuned
        if trials.get(name)
    }
    chosen = DetectorSet(tuned)
    for name in result.sets:
        of_set = _scores(chosen, result.outputs[TEST if name == ID else name], how.progress)
        for detector in tuned:
            result.scores.setdefault(detector, {})[name] = of_set[detector].numpy()
    draws = metrics.Bootstrap(how.bootstrap, how.seed) if how.bootstrap else None
    _classification(result, draws)
    _detection(result, draws, how.progress)
    if blind and result.trials:
        _costs(result, given, search, how)


def _costs(result: RunResult, given: Mapping[str, Detector], search: Search, how: Measuring) -> None:
    """A note where a parameter that validation data chose is worse on a group of test sets than what was given."""
    before = {
        name: candidate
        for name in result.trials
        for candidate in (search[held] for held in search.tuned.get(name, ()))
        if candidate.settings() == given[name].settings() and result.settings[name] != _plain(candidate.settings())
    }
    scores = {
        name: _scores(DetectorSet(before), result.outputs[TEST if name == ID else name], no_progress)
        for name in (result.sets if before else ())
    }
    for name, (group, mean_name) in itertools.product(before, GROUPS.items()):
        members = [part for part, of in result.sets.items() if of.group == group]
        was = [metrics.auroc(scores[ID][name], scores[part][name]) for part in members]
        if was and (lost := fmean(was) - result.value("auroc", name, mean_name)) >= COSTS:
            told = ", ".join(f"{key}={result.settings[name][key]}" for key in search.grids[name])
            default = _plain(given[name].settings())
            kept = " ".join(f"--set {name}.{key}={default[key]}" for key in search.grids[name])
            result.notes.append(
                f"{name}: {told}, chosen on validation data, costs {100 * lost:.1f} AUROC on {group}-OOD test sets "
                f"beside the default, which {kept} keeps"
            )


def parts_of(given: Mapping[str, Detector], how: Measuring) -> set[str]:
    """The parts of a benchmark that these detectors need: training images where one is fitted on them, validation
    images, OOD ones too, where parameters are chosen."""
    grids = how.grids_of(given)
    variants = [variant for name, d in given.items() for variant in d.variants(grids.get(name))]
    fitted = {VALIDATION if d.fits_on == "validation" else FIT for d in variants if d.gathers()}
    return {TEST, *fitted, *((VALIDATION, VALIDATION_OOD) if len(variants) > len(given) else ())}


def check_names(names: Iterable[str]) -> None:
    """UserError for a set that is called what tables call something else."""
    for name in names:
        if name in RESERVED:
            raise checks.UserError(f"OOD set {name!r}: tables call something else by this name; choose another")


def by_name(chosen: Mapping[str, Detector] | DetectorSet | Iterable[str] | None) -> dict[str, Detector]:
    """The detectors by name; all, see `in_all`, if None."""
    if isinstance(chosen, (Mapping, DetectorSet)):
        return dict(chosen.items())
    return dict(DetectorSet(detectors.in_all() if chosen is None else chosen).items())


@dataclass(frozen=True)
class _Made:
    """In place of the outputs of a model that is not trained: random numbers, by the targets and a weight (c, m)."""

    targets: Tensor
    weight: Tensor

    def chunks(self, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        random = torch.Generator().manual_seed(0)
        for targets in self.targets.split(max(1, CHUNK_VALUES // sum(self.weight.shape))):
            features = self.weight[targets] + torch.rand(len(targets), self.weight.shape[1], generator=random)
            yield features.to(device), (features @ self.weight.T).to(device), targets.to(device)


def check_sizes(
    given: Mapping[str, Detector], how: Measuring, head: tuple[int, int], targets: Mapping[str, Tensor]
) -> None:
    """UserError for a parameter that so much data do not allow, whatever they are: before a model is trained for hours.

    Args:
        given: those are looked at of which something is set or searched; defaults that are too large are lowered.
        head: (c, m). targets: (n,) of the part that is fitted on, and of the validation images if they are read.
    """
    grids = how.grids_of(given)
    asked = {name: d for name, d in given.items() if not d.needs_model and (d.given or grids.get(name))}
    if how.leave_out or not asked:
        return
    weight = torch.rand(head, generator=torch.Generator().manual_seed(1))
    search = Search(DetectorSet(asked), {name: grid for name, grid in grids.items() if name in asked})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _fit(search, {part: _Made(classes, weight) for part, classes in targets.items()}, (weight, None), "cpu")
            search.leave_out()
    except DoesNotFit as error:
        raise checks.UserError(str(error)) from error
    except ValueError:  # of numbers that no model made
        pass


def _fit(
    search: Search,
    outputs: Mapping[str, Outputs | _Made],
    head: tuple[Tensor, Tensor | None] | None,
    device: torch.device | str,
) -> None:
    """Fit all candidates, in float64 on `device`: those with `fits_on = "validation"` there, if there is any."""
    if head is not None:
        head = head[0].to(device), None if head[1] is None else head[1].to(device)
    on_validation = [n for n, d in search.items() if d.fits_on == "validation" and VALIDATION in outputs]
    for part, names in ((FIT, [name for name in search if name not in on_validation]), (VALIDATION, on_validation)):
        if not names:
            continue
        fitting, counts = search.only(names), Counter[int]()
        if any(detector.gathers() for detector in fitting.detectors):
            n_rows = 0
            for features, logits, targets in outputs[part].chunks(device):
                with checks.behind(n_rows):
                    fitting.partial_fit(features if features.shape[1] else None, logits, targets)
                n_rows += len(features)
                counts.update([] if targets is None else targets.tolist())
        fitting.finalize(head)
        if counts and max(counts.values()) < 2:
            by_class = (d for d in fitting.detectors if d.of_classes)
            search.failures = {**(search.failures or {}), **dict.fromkeys(by_class, ValueError(NO_CLASSES))}


def kept_scores(search: DetectorSet, outputs: Outputs) -> dict[str, Tensor]:
    """The scores of the candidates that need the model, as the cache keeps them."""
    keys = {name: score_key(detector) for name, detector in search.items()}
    return {name: outputs.scores[key] for name, key in keys.items() if key in outputs.scores}


def _scores(chosen: DetectorSet, outputs: Outputs, progress: Progress) -> dict[str, Tensor]:
    """The scores (n,) of a set by every detector, float64 on the CPU."""
    scores = kept_scores(chosen, outputs)
    names = [name for name in chosen if name not in scores]
    if not names:
        return scores
    device = next((buffer.device for buffer in chosen.buffers()), "cpu")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    with progress(f"scoring {outputs.name}", len(outputs)) as bar:
        for features, logits, _ in outputs.chunks(device):
            with checks.behind(sum(map(len, parts[names[0]]))):
                found = chosen.score_features(features, logits, skip_models=True)
            for name, values in found.items():
                parts[name].append(values.cpu().double())
            bar.advance(len(features))
    return scores | {name: torch.cat(values) for name, values in parts.items()}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values for JSON, which has no infinity."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        known = isinstance(value, (int, str, type(None))) or (isinstance(value, float) and math.isfinite(value))
        return value if known else str(value)

    return {name: plain(value) for name, value in settings.items()}


@torch.no_grad()
def temperatures(logits: Tensor, head_weight: Tensor) -> dict[str, Tensor]:
    """The three temperatures (n,) of the calibration table, by the name of their ECE: 1, τ‖f‖, and D as the loss takes
    it."""
    distance = boundary_distance(logits, head_weight)
    return {
        "ece_softmax": torch.ones_like(distance),
        "ece_scaled_by_norm": TAU * (torch.linalg.vector_norm(logits, dim=1) + 1e-7),
        "ece_scaled_by_distance": temperature_of(distance),
    }


def _classification(result: RunResult, draws: metrics.Bootstrap | None) -> None:
    """Accuracy, and the calibration error of the softmax of f, f/(τ‖f‖) and f/D, from the test images; the accuracy on
    each covariate-shifted set, and on all these images together."""
    right: dict[str, Tensor] = {}
    inside = [ID, *result.csid]
    for name in inside:
        outputs = result.outputs[TEST if name == ID else name]
        correct, confidence = _answers(outputs, result.head if name == ID else None)
        if correct is None:
            named = sum(int((targets >= 0).sum()) for *_, targets in outputs.chunks() if targets is not None)
            if named:
                result.notes.append(f"{name}: no accuracy, as {named} of {len(outputs)} images have a class")
            continue
        right[name] = correct
        about = {} if name == ID else {"ood_set": name, "group": CSID}
        drawn = None if draws is None else draws.mean(correct, name)
        result.add("accuracy", correct.double().mean().item(), drawn, **about)
        for metric, values in confidence.items() if name == ID else ():
            drawn = None if draws is None else draws.calibration_error(values, correct, ID)
            result.add(metric, metrics.calibration_error(values, correct), drawn)
    if 1 < len(right) == len(inside):
        images = torch.cat([*right.values()]).double()
        drawn = None
        if draws is not None:
            shares = [len(each) / len(images) * draws.mean(each, name) for name, each in right.items()]
            drawn = torch.stack(shares).sum(dim=0)
        result.add(f"{FULL_SPECTRUM}accuracy", images.mean().item(), drawn)


def _answers(outputs: Outputs, head: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Which images (n,) are classified right, and by the name of each ECE its confidence (n,); None without targets."""
    correct: list[Tensor] = []
    confidence: dict[str, list[Tensor]] = {}
    for _, logits, targets in outputs.chunks():
        if logits is None or targets is None or bool((targets < 0).any()):  # nobody said what the images are
            return None, {}
        correct.append(logits.max(dim=1).indices == targets)
        # without the head, D is not known
        scales = temperatures(logits, head[0]) if head else {"ece_softmax": torch.ones(len(logits))}
        for name, temperature in scales.items():
            probabilities = torch.softmax(logits / temperature.unsqueeze(1), dim=1)
            confidence.setdefault(name, []).append(probabilities.amax(dim=1))
    return torch.cat(correct), {name: torch.cat(parts) for name, parts in confidence.items()}


def _detection(result: RunResult, draws: metrics.Bootstrap | None, progress: Progress) -> None:
    """Every detector on every OOD set, and the mean over the sets of a group: against the ID test images and, where
    there are covariate-shifted ones, against both together, as OpenOOD's `fsood`."""
    inside = {"": [ID], **({FULL_SPECTRUM: [ID, *result.csid]} if result.csid else {})}
    with progress("measuring", len(result.scores)) as bar:
        for detector in result.scores:
            for prefix, names in inside.items():
                _detect(result, detector, names, prefix, draws)
            bar.advance(1)


def _detect(result: RunResult, detector: str, inside: list[str], prefix: str, draws: metrics.Bootstrap | None) -> None:
    """One detector; in-distribution are all images of the sets `inside`."""
    groups, scores = {name: part.group for name, part in result.sets.items() if part.is_ood}, result.scores[detector]
    of_id = np.concatenate([scores[name] for name in inside])
    found = {name: metrics.detection(of_id, scores[name]) for name in groups}
    for metric, function in added("metric").items():
        for name in groups:
            found[name][metric] = _own(metric, function, of_id, scores[name])
    drawn: dict[str, dict[str, Tensor]] = {}
    if draws is not None:
        below = draws.below(scores[ID], ID, *((scores[name], name) for name in inside[1:]))
        drawn = {name: draws.detection(below, draws.below(scores[name], name)) for name in groups}
    for name, group in groups.items():
        for metric in found[name]:
            of_draws = drawn[name].get(metric) if drawn else None
            result.add(prefix + metric, found[name][metric], of_draws, detector=detector, ood_set=name, group=group)
    for group, mean_name in GROUPS.items():
        members = [name for name in groups if groups[name] == group]
        for metric in found[members[0]] if members else ():
            known = drawn and metric in drawn[members[0]]
            of_draws = torch.stack([drawn[name][metric] for name in members]).mean(dim=0) if known else None
            mean = fmean(found[name][metric] for name in members)
            result.add(prefix + metric, mean, of_draws, detector=detector, ood_set=mean_name, group=group)


def _own(metric: str, function: Callable[[Tensor, Tensor], float], of_id: np.ndarray, of_ood: np.ndarray) -> float:
    """A metric of the user's; UserError that names it where it fails."""
    try:
        value = float(function(torch.as_tensor(of_id), torch.as_tensor(of_ood)))
        if not math.isfinite(value):  # no mean of a group would have it, and no JSON
            raise ValueError(f"got {value}")
        return value
    except Exception as error:  # whatever it raises
        raise checks.UserError(
            f"metric {metric!r}: {type(error).__name__}: {error}; expected a number of scores (n,) of the "
            f"in-distribution, here {len(of_id)}, and (k,) of an OOD set, here {len(of_ood)}, float64"
        ) from error
