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
from ..data.benchmarks import SPECS
from ..detectors import ODIN, Detector, DetectorSet
from ..detectors.search import Search, Trial
from ..evaluate import temperatures
from ..heads import inference_head
from .cache import FeatureCache, Outputs, _rank, score_key
from .readable import readable
from .results import DETECTION, GROUPS, ID, Results, RunResult, TestSet
from .trained import Trained, same_training

FIT, VALIDATION, VALIDATION_OOD, TEST = "fit", "validation", "validation_ood", "test"
RESERVED = (ID, FIT, VALIDATION, VALIDATION_OOD, TEST, *GROUPS.values())  # what no OOD set can be called
Progress = Callable[[str, int], Any]


def no_progress(what: str, total: int) -> Any:
    return nullcontext()


def evaluate_runs(
    runs: Iterable[Trained],
    benchmark: ImageBenchmark | Callable[[Trained], ImageBenchmark],
    chosen: Mapping[str, Detector] | Iterable[str] | None = None,
    *,
    skip_bad: bool = False,
    **options: Any,
) -> Results | None:
    """`evaluate_run` for several: runs of one method are its seeds. None in all processes but the first.

    Args:
        runs: may be a generator that opens one at a time; the models are kept.
        benchmark: for all, or a function of the run.
        skip_bad: leave out images that cannot be read; the notes name them. To find them, every image is read first.
        chosen, options: as in `evaluate_run`.

    Raises:
        UserError: also two runs with the same weights, or two recipes of one name.
    """
    results: list[RunResult] = []
    checked: dict[int, tuple[ImageBenchmark, list[str]]] = {}
    for run in runs:
        opened = benchmark(run) if callable(benchmark) else benchmark
        if id(opened) not in checked:
            opened.check()
            progress, workers = options.get("progress", no_progress), options.get("workers", 0)
            checked[id(opened)] = readable(opened, workers, progress) if skip_bad else (opened, [])
        opened, notes = checked[id(opened)]
        result = evaluate_run(run, opened, chosen, check=False, **options)
        if result is None:
            continue
        result.notes = [*notes, *result.notes]
        for other in results:
            if other.model_key == result.model_key:
                raise checks.UserError(f"{run.name}: has the same weights as {other.trained.name}")
            if other.trained.method == run.method and not _seeds_of_each_other(other.trained, run):
                raise checks.UserError(
                    f"{run.name}, {other.trained.name}: both are called {run.method}, but are no seeds of each other: "
                    "their recipes or folders differ"
                )
        results.append(result)
    if not results:
        return None
    return Results(opened.name, results, options.get("bootstrap", 200), options.get("tune", True))


def _seeds_of_each_other(one: Trained, other: Trained) -> bool:
    if one.recipe is None or other.recipe is None:
        return one.recipe is other.recipe and one.family == other.family
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
    progress: Progress = no_progress,
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
    for name in benchmark.ood:
        if name in RESERVED:
            raise checks.UserError(f"OOD set {name!r}: tables call something else by this name; choose another")
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
    grids = _grids(given, tune, grids)
    prepared = {name: _prepared(detector, benchmark) for name, detector in given.items()}

    # The detectors that need the model are tuned before the test images are seen.
    seeing = {name: detector for name, detector in prepared.items() if detector.needs_model}
    search = Search(DetectorSet(seeing), _of(grids, seeing)) if seeing else None
    candidates = list(search.detectors) if search is not None and tune else []
    outputs = {
        FIT: cached.outputs(FIT, benchmark.fit),
        VALIDATION: cached.outputs(VALIDATION, benchmark.validation, candidates),
        VALIDATION_OOD: cached.outputs(VALIDATION_OOD, benchmark.validation_ood, candidates),
    }
    winners, trials = {}, {}
    if search is not None:
        inside, outside = (_kept_scores(search, outputs[part]) for part in (VALIDATION, VALIDATION_OOD))
        chosen_set, trials = search.choose(inside, {VALIDATION_OOD: outside})
        winners = dict(chosen_set.items())
    outputs |= {
        name: cached.outputs(name, part, list(winners.values()))
        for name, part in {TEST: benchmark.test, **benchmark.ood}.items()
    }
    run.model.to("cpu")  # the next one may need the room
    if _rank() > 0:
        return None

    sets = {
        name: TestSet(part.title, part.group, len(part)) for name, part in {ID: benchmark.test, **benchmark.ood}.items()
    }
    result = RunResult(run, cached.key, sets, outputs=outputs, images_per_second=cached.images_per_second)
    if unfinished := run.unfinished:
        result.notes.append(unfinished)
    weight, bias = inference_head(cached.head)
    result.head = (weight.detach().cpu().double(), None if bias is None else bias.detach().cpu().double())
    result.standard = frozenset(name for name, detector in given.items() if _is_standard(detector, grids.get(name)))
    measure(
        result,
        prepared,
        [VALIDATION_OOD],
        grids=grids,
        winners=winners,
        trials=trials,
        optional=optional,
        device="cpu" if torch.device(device).type == "mps" else device,
        bootstrap=bootstrap,
        seed=seed,
        progress=progress,
    )
    return result


# ---- arithmetic on what the model made


def measure(
    result: RunResult,
    given: Mapping[str, Detector],
    validation_ood: Iterable[str],
    *,
    grids: Mapping[str, Mapping[str, Iterable]],
    winners: Mapping[str, Detector] | None = None,
    trials: Mapping[str, list[Trial]] | None = None,
    optional: bool,
    device: torch.device | str,
    bootstrap: int,
    seed: int,
    progress: Progress,
) -> None:
    """Fit, tune and measure the detectors `given` on `result.outputs`, in float64 on `device`; fills in `result`.

    Args:
        validation_ood: the sets among the outputs by which parameters are chosen.
        winners, trials: of the detectors that need the model: chosen already.
        grids, optional, bootstrap, seed, progress: as in `evaluate_run`; `optional` is its `leave_out`.
    """
    tuned, trials = dict(winners or {}), dict(trials or {})
    blind = {name: detector for name, detector in given.items() if not detector.needs_model}
    if blind:
        search = Search(DetectorSet(blind), _of(grids, blind), optional)
        _fit(search, result, device)
        try:
            search.leave_out()
        except ValueError as error:
            raise checks.UserError(str(error)) from error
        result.notes += search.left_out
        inside, outside = {}, {"": {}}  # where there is nothing to choose, no scores are needed
        if any(len(candidates) > 1 for candidates in search.tuned.values()):
            inside = _scores(search, result.outputs[VALIDATION], progress)
            outside = {name: _scores(search, result.outputs[name], progress) for name in validation_ood}
        if search.names:
            chosen, more_trials = search.choose(inside, outside)
            tuned, trials = {**tuned, **dict(chosen.items())}, {**trials, **more_trials}
    tuned = {name: tuned[name] for name in given if name in tuned}
    if not tuned:
        raise checks.UserError("no detector could be fitted: " + "; ".join(result.notes))
    result.settings = {name: _plain(detector.settings()) for name, detector in tuned.items()}
    result.trials = {
        name: [{**trial.settings, "auroc": trial.auroc} for trial in trials[name]] for name in tuned if trials.get(name)
    }
    chosen = DetectorSet(tuned)
    for name in result.sets:
        of_set = _scores(chosen, result.outputs[TEST if name == ID else name], progress)
        for detector in tuned:
            result.scores.setdefault(detector, {})[name] = of_set[detector].numpy()
    draws = metrics.Bootstrap(bootstrap, seed) if bootstrap else None
    _classification(result, result.outputs[TEST], draws)
    _detection(result, draws, progress)


def _fit(search: Search, result: RunResult, device: torch.device | str) -> None:
    """Fit all candidates, in float64 on `device`: those with `fits_on = "validation"` there, if there is any."""
    head = result.head and tuple(None if tensor is None else tensor.to(device) for tensor in result.head)
    on_validation = [n for n, d in search.items() if d.fits_on == "validation" and VALIDATION in result.outputs]
    for part, names in ((FIT, [name for name in search if name not in on_validation]), (VALIDATION, on_validation)):
        if not names:
            continue
        fitting = DetectorSet({name: search[name] for name in names})
        if any(detector.gathers() for detector in fitting.detectors):
            for features, logits, targets in result.outputs[part].chunks(device):
                fitting.partial_fit(features, logits, targets)
        fitting.finalize(head)


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


def _grids(given: Iterable[str], tune: bool, grids: Mapping[str, Mapping] | None) -> dict[str, Mapping[str, Iterable]]:
    """What is searched in place of OpenOOD's grids."""
    return {name: {} for name in given} if not tune else _of(grids or {}, given)


def _of(grids: Mapping[str, Mapping], names: Iterable[str]) -> dict[str, Mapping[str, Iterable]]:
    return {name: grids[name] for name in names if name in grids}


def _is_standard(detector: Detector, grid: Mapping[str, Iterable] | None) -> bool:
    """Whether its parameters are those of its class, apart from what is searched over OpenOOD's grid."""
    if grid is not None and dict(grid) != dict(detector.grid):
        return False
    default = type(detector)().settings()
    return all(value == default[name] for name, value in detector.settings().items() if name not in detector.grid)


def _kept_scores(search: Search, outputs: Outputs) -> dict[str, Tensor]:
    """The scores of the candidates that need the model, as the cache keeps them."""
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
    info = run.info or {}
    classes = info.get("class_names", benchmark.class_names)
    # Of the others the names differ between layouts, but not the classes.
    if benchmark.name == info.get("benchmark") and benchmark.name not in SPECS:
        for index, (theirs, ours) in enumerate(zip(classes, benchmark.class_names, strict=True)):
            if theirs != ours:
                raise checks.UserError(
                    f"{run.name}: class {index} was {theirs!r} in training, but is {ours!r} in these images"
                )


def _classification(result: RunResult, test: Outputs, draws: metrics.Bootstrap | None) -> None:
    """Accuracy, and the calibration error of the softmax of f, f/(τ‖f‖) and f/D, from the test images."""
    correct: list[Tensor] = []
    confidence: dict[str, list[Tensor]] = {}
    for _, logits, targets in test.chunks():
        if logits is None or targets is None:
            return
        correct.append(logits.max(dim=1).indices == targets)
        # without the head, D is not known
        scales = temperatures(logits, result.head[0]) if result.head else {"ece_softmax": torch.ones(len(logits))}
        for name, temperature in scales.items():
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
