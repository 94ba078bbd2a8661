"""The evaluation of trained models: one pass of the model over each data set, then arithmetic on what it made.

Memory: features and logits are maps of files, and are worked on in chunks (`cache.CHUNK_VALUES`); what grows with the
data is the labels, a score (float64) for each detector and test image, and the banks of KNN (all training features in
float32 unless it has a budget) and of NNGuide (1 % of them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .. import checks, detectors, metrics
from ..data import ImageBenchmark
from ..detectors import ODIN, Detector, DetectorSet
from ..detectors import run as fitting
from ..detectors.search import Search
from ..evaluate import temperatures
from ..heads import inference_head
from .cache import FeatureCache, Outputs, _rank
from .results import DETECTION, GROUPS, ID, Results, RunResult, TestSet
from .trained import Trained, same_training

FIT, VALIDATION, VALIDATION_OOD, TEST = "fit", "validation", "validation_ood", "test"
Progress = Callable[[str, int], Any]


def evaluate_runs(
    runs: Iterable[Trained],
    benchmark: ImageBenchmark | Callable[[Trained], ImageBenchmark],
    chosen: Mapping[str, Detector] | Iterable[str] | None = None,
    **options: Any,
) -> Results | None:
    """`evaluate_run` for several: runs of one method are its seeds. None in all processes but the first.

    Args:
        runs: may be a generator that opens one at a time; the models are kept.
        benchmark: for all, or a function of the run.
        chosen, options: as in `evaluate_run`.

    Raises:
        UserError: also two runs with the same weights, or two recipes of one name.
    """
    results: list[RunResult] = []
    checked: set[int] = set()
    for run in runs:
        opened = benchmark(run) if callable(benchmark) else benchmark
        if id(opened) not in checked:
            opened.check()
            checked.add(id(opened))
        result = evaluate_run(run, opened, chosen, check=False, **options)
        if result is None:
            continue
        for other in results:
            if other.model_key == result.model_key:
                raise checks.UserError(f"{run.name}: has the same weights as {other.trained.name}")
            if other.trained.method == run.method and not _seeds_of_each_other(other.trained, run):
                raise checks.UserError(
                    f"{run.name}: its recipe has the name of that of {other.trained.name}, {run.method}, and other "
                    "settings"
                )
        results.append(result)
    if not results:
        return None
    return Results(opened.name, results, options.get("bootstrap", 200), options.get("tune", True))


def _seeds_of_each_other(one: Trained, other: Trained) -> bool:
    if one.recipe is None or other.recipe is None:
        return one.recipe is other.recipe
    return same_training(one.recipe, other.recipe)


def evaluate_run(
    run: Trained,
    benchmark: ImageBenchmark,
    chosen: Mapping[str, Detector] | Iterable[str] | None = None,
    *,
    tune: bool = True,
    grids: Mapping[str, Mapping[str, Iterable]] | None = None,
    cache: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 0,
    bootstrap: int = 200,
    seed: int = 0,
    leave_out: bool | None = None,
    check: bool = True,
    progress: Progress = lambda what, total: nullcontext(),
) -> RunResult | None:
    """Fit detectors on the training images, tune them on validation images, measure them on every OOD set.

    Scores are computed in float64 from the model's float32 features and logits, as in `ood_fast.evaluate`: in float32
    the softmax of a confident model is exactly 1 for most images, and the ties would decide the metrics.

    Args:
        run: see `open_run`.
        benchmark: see `data.open_benchmark`.
        chosen: detectors by name, or names; None: all that are registered.
        leave_out: a detector that cannot be fitted on this data (KNN with k above the number of training images) is
            left out, with a note, instead of an error; None: where `chosen` is None. Candidates of a search always are.
        tune: take the parameters of OpenOOD's grids that best tell `benchmark.validation` from
            `benchmark.validation_ood`, by AUROC, as OpenOOD's search does; False: as they are.
        grids: as in `Search`, in place of OpenOOD's.
        cache: see `FeatureCache`; default `<run>/cache`.
        device: where the model runs and scores are computed (scores on the CPU where there is no float64).
        bootstrap: how many draws for intervals; 0 for none. seed: of the draws.
        check: read all data sets first, and name all that is missing.
        progress: `progress(what, total)` gives a context with `advance(n)`.

    Returns:
        The result in the first process, None in the others that `torchrun` started: they run the model on their share
        of the images.

    Raises:
        UserError: files are missing; model and benchmark do not fit; a detector asked for by name cannot be fitted.
        ValueError: NaN in features or logits.
    """
    if check:
        benchmark.check()
    given, optional = _given(chosen), chosen is None if leave_out is None else leave_out
    run.model.to(device)
    cached = FeatureCache(
        run.folder / "cache" if cache is None else cache,
        run.model,
        run.head,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    _check_fit(run, benchmark, cached.head.out_features)
    grids = {name: {} for name in given} if not tune else {n: g for n, g in (grids or {}).items() if n in given}
    given = {name: _prepared(detector, benchmark) for name, detector in given.items()}

    # ---- the model's part; the detectors that need it are tuned before the test images are seen
    seeing = {name: detector for name, detector in given.items() if detector.needs_model}
    search = Search(DetectorSet(seeing), {n: g for n, g in grids.items() if n in seeing}) if seeing else None
    candidates = list(search.detectors) if search is not None and tune else []
    outputs = {
        FIT: cached.outputs(FIT, benchmark.fit),
        VALIDATION: cached.outputs(VALIDATION, benchmark.validation, candidates),
        VALIDATION_OOD: cached.outputs(VALIDATION_OOD, benchmark.validation_ood, candidates),
    }
    tuned, trials = {}, {}
    if search is not None:
        inside, outside = (_kept_scores(search, outputs[part]) for part in (VALIDATION, VALIDATION_OOD))
        winners, trials = search.choose(inside, {VALIDATION_OOD: outside})
        tuned = dict(winners.items())
    outputs |= {
        name: cached.outputs(name, part, list(tuned.values()))
        for name, part in {TEST: benchmark.test, **benchmark.ood}.items()
    }
    run.model.to("cpu")  # the next one may need the room
    if _rank() > 0:
        return None

    # ---- arithmetic
    where = "cpu" if torch.device(device).type == "mps" else device
    result = RunResult(run, cached.key, _sets(benchmark), outputs=outputs, images_per_second=cached.images_per_second)
    weight, bias = inference_head(cached.head)
    result.head = (weight.detach().cpu().double(), None if bias is None else bias.detach().cpu().double())
    blind = {name: detector for name, detector in given.items() if not detector.needs_model}
    if blind:
        of_features = FittedSearch(DetectorSet(blind), {n: g for n, g in grids.items() if n in blind})
        result.notes += of_features.fit_outputs(outputs[FIT], outputs[VALIDATION], result.head, where, optional)
        inside, outside = {}, {}
        if any(len(names) > 1 for names in of_features.tuned.values()):
            inside, outside = (_scores(of_features, outputs[part], progress) for part in (VALIDATION, VALIDATION_OOD))
        if of_features.names:
            winners, more_trials = of_features.choose(inside, {VALIDATION_OOD: outside})
            tuned, trials = {**tuned, **dict(winners.items())}, {**trials, **more_trials}
    tuned = {name: tuned[name] for name in given if name in tuned}
    if not tuned:
        raise checks.UserError("no detector could be fitted: " + "; ".join(result.notes))
    result.settings = {name: _plain(detector.settings()) for name, detector in tuned.items()}
    result.trials = {
        name: [{**trial.settings, "auroc": trial.auroc} for trial in trials[name]] for name in tuned if trials.get(name)
    }
    winners = DetectorSet(tuned)
    for name in (TEST, *benchmark.ood):
        of_set = _scores(winners, outputs[name], progress)
        for detector in tuned:
            result.scores.setdefault(detector, {})[ID if name == TEST else name] = of_set[detector].numpy()
    draws = metrics.Bootstrap(bootstrap, seed) if bootstrap else None
    _classification(result, outputs[TEST], draws)
    _detection(result, draws, progress)
    return result


# ---- detectors


def _given(chosen: Mapping[str, Detector] | DetectorSet | Iterable[str] | None) -> dict[str, Detector]:
    if isinstance(chosen, (Mapping, DetectorSet)):
        return dict(chosen.items())
    return dict(DetectorSet(detectors.known() if chosen is None else list(chosen)).items())


def _prepared(detector: Detector, benchmark: ImageBenchmark) -> Detector:
    """ODIN steps by the deviation that the images were divided by, as in OpenOOD; banks are kept in float32, which the
    features came in."""
    settings = detector.settings()
    if isinstance(detector, ODIN) and detector.std is None:
        steps = getattr(benchmark.test.transform, "transforms", ())
        std = next((step.std for step in steps if hasattr(step, "std")), None)
        return detector if std is None else type(detector)(**{**settings, "std": tuple(map(float, std))})
    if settings.get("dtype", ...) is None:
        return type(detector)(**{**settings, "dtype": torch.float32})
    return detector


class FittedSearch(Search):
    """A search whose candidates that cannot be fitted on the data are left out."""

    def fit_outputs(
        self, train: Outputs, validation: Outputs, head: tuple[Tensor, Tensor | None], device: Any, optional: bool
    ) -> list[str]:
        """Fit all candidates on what the model made of training and validation images, in float64 on `device`.

        Returns what was left out and why. UserError for a detector without a candidate left, unless `optional`.
        """
        on_train, on_validation = self._by_data(True)
        for part, members in ((train, on_train), (validation, on_validation)):
            for features, logits, targets in part.chunks(device) if any(d.needs_fit for d in members) else ():
                fitting.partial_fit(members, features, logits, targets)
        weight, bias = (None if tensor is None else tensor.to(device) for tensor in head)
        reasons: dict[str, str] = {}
        for name, detector in self.items():
            try:
                fitting.finalize([detector], (weight, bias), None)
                if detector.needs_head:  # one copy for all
                    detector.head_weight, detector.head_bias = weight, bias
            except ValueError as error:
                reasons[name] = str(error)
        notes = []
        for name, candidates in self.tuned.items():
            failed = [candidate for candidate in candidates if candidate in reasons]
            if len(failed) == len(candidates):
                note = f"{name}: left out: {reasons[failed[0]]}"
                if not optional:
                    raise checks.UserError(note)
                notes.append(note)
            else:
                settings = {c: {p: getattr(self[c], p) for p in self.grids[name]} for c in failed}
                notes += [f"{name}: candidate {settings[c]} left out: {reasons[c]}" for c in failed]
        kept = {name: detector for name, detector in self.items() if name not in reasons}
        self.tuned = {
            name: left
            for name, of in self.tuned.items()
            if (left := [candidate for candidate in of if candidate in kept])
        }
        self.names, self.detectors = tuple(kept), torch.nn.ModuleList(kept.values())
        self._share()
        return notes


def _kept_scores(search: Search, outputs: Outputs) -> dict[str, Tensor]:
    """The scores of the candidates that need the model, as the cache keeps them."""
    from .cache import score_key

    keys = {name: score_key(detector) for name, detector in search.items()}
    return {name: outputs.scores[key] for name, key in keys.items() if key in outputs.scores}


def _scores(chosen: DetectorSet, outputs: Outputs, progress: Progress) -> dict[str, Tensor]:
    """The scores (n,) of a set by every detector, float64 on the CPU."""
    scores = _kept_scores(chosen, outputs)
    names = [name for name in chosen if name not in scores]
    if not names:
        return scores
    device = next((buffer.device for buffer in chosen.buffers()), "cpu")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    with progress(f"scoring {outputs.name}", len(outputs)) as bar:
        for features, logits, _ in outputs.chunks(device):
            for name, values in chosen.score_features(features, logits, skip_models=True).items():
                parts[name].append(values.double().cpu())
            if bar is not None:
                bar.advance(len(features))
    return scores | {name: torch.cat(values) for name, values in parts.items()}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values for JSON."""
    return {
        name: value
        if isinstance(value, (int, float, str, bool, type(None)))
        else list(value)
        if isinstance(value, tuple)
        else str(value)
        for name, value in settings.items()
    }


# ---- what is measured


def _sets(benchmark: ImageBenchmark) -> dict[str, TestSet]:
    parts = {ID: benchmark.test, **benchmark.ood}
    return {name: TestSet(part.title, part.group, len(part)) for name, part in parts.items()}


def _check_fit(run: Trained, benchmark: ImageBenchmark, n_outputs: int) -> None:
    if n_outputs != benchmark.n_classes:
        raise checks.UserError(
            f"{run.name}: a model of {n_outputs} classes, but benchmark {benchmark.name} has {benchmark.n_classes}"
        )
    shape = tuple((run.info or {}).get("image_shape", benchmark.image_shape))
    if shape != tuple(benchmark.image_shape):
        raise checks.UserError(
            f"{run.name}: trained on images of {shape}, but benchmark {benchmark.name} has {benchmark.image_shape}"
        )


def _classification(result: RunResult, test: Outputs, draws: metrics.Bootstrap | None) -> None:
    """Accuracy, and the calibration error of the softmax of f, f/(τ‖f‖) and f/D, from the test images."""
    weight = result.head[0]
    correct: list[Tensor] = []
    confidence: dict[str, list[Tensor]] = {}
    for _, logits, targets in test.chunks():
        correct.append(logits.max(dim=1).indices == targets)
        for name, temperature in temperatures(logits, weight).items():
            probabilities = torch.softmax(logits / temperature.unsqueeze(1), dim=1)
            confidence.setdefault(name, []).append(probabilities.amax(dim=1))
    right = torch.cat(correct)
    result.add("accuracy", right.double().mean().item(), draws and draws.mean(right, ID))
    for name, parts in confidence.items():
        values = torch.cat(parts)
        drawn = draws and draws.calibration_error(values, right, ID)
        result.add(name, metrics.calibration_error(values, right), drawn)


def _detection(result: RunResult, draws: metrics.Bootstrap | None, progress: Progress) -> None:
    """Every detector on every OOD set, and the mean over the sets of a group."""
    groups = {name: part.group for name, part in result.sets.items() if name != ID}
    with progress("measuring", len(result.scores)) as bar:
        for detector, scores in result.scores.items():
            found = {name: metrics.detection(scores[ID], scores[name]) for name in groups}
            drawn: dict[str, dict[str, Tensor]] = {}
            if draws is not None:
                below = draws.below(scores[ID], ID)
                drawn = {name: draws.detection(below, draws.below(scores[name], name)) for name in groups}
            for name, group in groups.items():
                for metric in DETECTION:
                    of_draws = drawn[name][metric] if drawn else None
                    result.add(metric, found[name][metric], of_draws, detector=detector, ood_set=name, group=group)
            for group, mean_name in GROUPS.items():
                members = [name for name in groups if groups[name] == group]
                for metric in DETECTION if members else ():
                    of_draws = torch.stack([drawn[name][metric] for name in members]).mean(dim=0) if drawn else None
                    mean = fmean(found[name][metric] for name in members)
                    result.add(metric, mean, of_draws, detector=detector, ood_set=mean_name, group=group)
            if bar is not None:
                bar.advance(1)
