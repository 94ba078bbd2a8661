"""The evaluation of trained models: one pass of the model over each data set, then `measure`.

Memory: features and logits are maps of files, and are worked on in chunks (`cache.CHUNK_VALUES`); what grows with the
data is the labels, a score (float64) for each detector and test image, and the banks of KNN (all training features in
float32 unless it has a budget) and of NNGuide (1 % of them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import agreement, checks
from ..data import ImageBenchmark
from ..data.specs import SPECS
from ..detectors import Detector, DetectorSet
from ..detectors.fitting import Note
from ..detectors.gradient import on_images
from ..detectors.search import Search, Trial
from ..heads import given_head, inference_head
from ..models.outputs import CHECKED
from ..models.running import run_model
from ..processes import Processes
from ..training.folder import differ
from ..values import Grid
from .cache import FeatureCache, Outputs
from .loaders import reads_features
from .measure import Chosen, Measuring, Named, by_name, check_names, kept_scores, measure, parts_of, separate
from .readable import readable
from .results import FIT, ID, TEST, VALIDATION, VALIDATION_OOD, Results, RunResult, TestSet
from .trained import Trained, same_training


@dataclass(frozen=True)
class Loading:
    """How a model is run over images.

    Attributes:
        cache: see `FeatureCache`; default `<run>/cache`.
        batch_size, workers: of the data loader.
        check: read all data sets first, and name all that is missing.
        any_accuracy: False: UserError for a model whose training is not known and that is no better than chance on the
            test images; True: a note.
    """

    cache: str | os.PathLike[str] | None = None
    batch_size: int = 256
    workers: int = 0
    check: bool = True
    any_accuracy: bool = True


def evaluate_runs(
    runs: Iterable[Trained],
    benchmark: ImageBenchmark | Callable[[Trained], ImageBenchmark],
    chosen: Named = None,
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
    how, loading = separate(options, Loading)
    for run in runs:
        opened = benchmark(run) if callable(benchmark) else benchmark
        if id(opened) not in checked:
            parts = parts_of(by_name(chosen), how.for_chosen(chosen))
            opened.check(parts)
            checked[id(opened)] = readable(opened, loading.workers, how.progress, parts) if skip_bad else (opened, [])
        opened, notes = checked[id(opened)]
        result = evaluate_run(run, opened, chosen, **{**options, "check": False})
        if result is None:
            continue
        result.notes = [*notes, *result.notes]
        _check_seeds(result, results)
        results.append(result)
    return Results(opened.name, results, how.bootstrap, how.tune) if results else None


def _check_seeds(result: RunResult, others: Iterable[RunResult]) -> None:
    """UserError for weights that are there already, and for runs of one name that are no seeds of each other."""
    run = result.trained
    for other in others:
        if other.model_key == result.model_key:
            raise checks.UserError(f"{run.name}: has the same weights as {other.trained.name}")
        if other.trained.method == run.method and not _seeds_of_each_other(other.trained, run):
            raise checks.UserError(
                f"{run.name}, {other.trained.name}: both are called {run.method}, but are no seeds of each other: "
                "their recipes or folders differ"
            )


def _seeds_of_each_other(one: Trained, other: Trained) -> bool:
    if one.recipe is None or other.recipe is None:
        return one.recipe is other.recipe and one.family == other.family
    return same_training(one.recipe, other.recipe)


def evaluate_run(run: Trained, benchmark: ImageBenchmark, chosen: Named = None, **options: Any) -> RunResult | None:
    """Fit detectors on the training images, tune them on validation images, measure them on every OOD set.

    Args:
        run: see `open_run`.
        benchmark: see `data.open_benchmark`. Parameters are chosen by its `validation` and `validation_ood`.
        chosen: detectors by name, or names; None: all that are registered.
        options: the keywords of `Measuring` and of `Loading`.

    Returns:
        The result in the first process, None in the others that `torchrun` started: they run the model on their share
        of the images.

    Raises:
        UserError: files are missing; model and benchmark do not fit; a detector asked for by name cannot be fitted.
        ValueError: NaN in features or logits.
    """
    how, loading = separate(options, Loading)
    how = how.for_chosen(chosen)
    if loading.check:
        benchmark.check(parts_of(by_name(chosen), how))
    check_names(benchmark.tested)
    given = by_name(chosen)
    if run.model is None:
        raise checks.UserError(f"{run.name}: got a run without its model, expected what open_run gives")
    run.model.to(how.device)
    prepared = {name: _prepared(detector, benchmark) for name, detector in given.items()}
    model, folder = run.model, run.folder / "cache" if loading.cache is None else loading.cache

    def seen(n_outputs: int | None) -> tuple[FeatureCache, dict[str, Outputs], Chosen]:
        of_loader: dict[str, Any] = {"batch_size": loading.batch_size, "workers": loading.workers}
        cached = FeatureCache(folder, model, run.head, n_outputs=n_outputs, progress=how.progress, **of_loader)
        _check_fit(run, benchmark, cached.widths[1])
        return cached, *_outputs(cached, benchmark, prepared, how)

    try:
        cached, outputs, before = seen(None)
    except (ValueError, RuntimeError):
        n_outputs = None if run.head is not None else _without_head(model, benchmark, given)
        if n_outputs is None:
            raise
        cached, outputs, before = seen(n_outputs)
    run.model.to("cpu")  # the next one may need the room
    if Processes.joined().rank > 0:
        return None

    tested = {ID: benchmark.test, **benchmark.tested}
    sets = {name: TestSet(part.title, part.group, len(part)) for name, part in tested.items()}
    result = RunResult(run, cached.key, sets, outputs=outputs, images_per_second=cached.images_per_second)
    result.notes += _disagreement(outputs[TEST], benchmark, loading.any_accuracy, trained_here=run.info is not None)
    if FIT in outputs:
        result.notes += _other_images(run.info or {}, benchmark)
    if unfinished := run.unfinished:
        result.notes.append(unfinished)
    if not benchmark.ood:
        result.notes.append("no OOD set is measured: the data has none, or --ood names none; see --ood-folder")
    if cached.head is not None:
        weight, bias = inference_head(cached.head)
        result.head = (weight.detach().cpu().double(), None if bias is None else bias.detach().cpu().double())
    grids = how.grids_of(given)
    result.standard = frozenset(name for name, detector in given.items() if _is_standard(detector, grids.get(name)))
    measure(result, prepared, [VALIDATION_OOD], how, before)
    return result


def _without_head(model: nn.Module, benchmark: ImageBenchmark, given: Mapping[str, Detector]) -> int | None:
    """How many logits a model gives whose head cannot be found or did not make them, where no detector reads it; None
    for others, whose failure is another one."""
    if any(map(reads_features, given.values())):
        return None
    few = [torch.stack([benchmark.test[index][0] for index in range(min(CHECKED[1], len(benchmark.test)))])]
    try:
        next(run_model(model, [few], given_head(model, None)))
    except (ValueError, RuntimeError):
        return next(run_model(model, [few], None)).logits.shape[1]  # raises what is wrong besides
    return None


def _disagreement(test: Outputs, benchmark: ImageBenchmark, any_accuracy: bool, trained_here: bool) -> list[str]:
    """A note at chance level; of a model whose training is not known UserError, also where the classes have another
    order."""
    counts = torch.stack([agreement.confusion(logits, targets) for _, logits, targets in test.chunks()]).sum(dim=0)
    if trained_here:
        told = agreement.at_chance(counts, agreement.UNTRAINED)
        return [told] if told else []
    cure = agreement.CURE if benchmark.name == "folder" else f"the classes of {benchmark.name} have an order of its own"
    names = benchmark.test.source.classes or list(map(str, range(benchmark.n_classes)))  # no need of training images
    return agreement.refuse_disagreement(counts, names, test.title, any_accuracy, cure)


def _outputs(
    cached: FeatureCache, benchmark: ImageBenchmark, prepared: Mapping[str, Detector], how: Measuring
) -> tuple[dict[str, Outputs], Chosen]:
    """What the model makes of all data sets. The detectors that need the model are tuned before the test images are
    seen."""
    seeing = {name: detector for name, detector in prepared.items() if detector.needs_model}
    grids, parts = how.grids_of(seeing), parts_of(prepared, how)
    tuned = {name: detector for name, detector in seeing.items() if grids.get(name, detector.grid)}
    plain = {name: detector for name, detector in seeing.items() if name not in tuned}
    failures: dict[Detector, ValueError] | None = {} if how.leave_out else None
    winners = _fitted(cached, benchmark, plain, parts, failures)
    notes = [Note.left_out(n, failures[d]) for n, d in plain.items() if failures and d in failures]
    trials: Mapping[str, list[Trial]] = {}
    candidates: list[Detector] = []
    search = Search(DetectorSet(tuned), grids, bool(how.leave_out)) if tuned else None
    if search is not None:
        search.put(_fitted(cached, benchmark, dict(search.items()), parts, search.failures))
        try:
            search.leave_out()
        except ValueError as error:
            raise checks.UserError(str(error)) from error
        candidates = [search[name] for names in search.tuned.values() if len(names) > 1 for name in names]
    outputs = {
        part: cached.outputs(part, getattr(benchmark, part), [] if part == FIT else candidates)
        for part in (FIT, VALIDATION, VALIDATION_OOD)
        if part in parts
    }
    if search is not None and search.names:
        kept = {part: kept_scores(search, outputs[part]) for part in (VALIDATION, VALIDATION_OOD) if part in parts}
        chosen, trials = search.choose(kept.get(VALIDATION, {}), {VALIDATION_OOD: kept.get(VALIDATION_OOD, {})})
        winners |= dict(chosen.items())
    if search is not None:
        notes += search.left_out
    before = Chosen(winners, trials, tuple(notes))
    tested = {TEST: benchmark.test, **benchmark.tested}
    return outputs | {
        name: cached.outputs(name, part, list(before.winners.values())) for name, part in tested.items()
    }, before


def _fitted(
    cached: FeatureCache,
    benchmark: ImageBenchmark,
    named: Mapping[str, Detector],
    parts: Iterable[str],
    failures: dict[Detector, ValueError] | None,
) -> dict[str, Detector]:
    """These detectors, fitted where they are to be, without those of `failures`."""
    found = {name: detector for name, detector in named.items() if not detector.needs_fit}
    later = {n for n, d in named.items() if d.fits_on == "validation" and VALIDATION in parts}
    for part in (FIT, VALIDATION):
        of_part = {n: d for n, d in named.items() if n not in found and (n in later) == (part == VALIDATION)}
        if of_part:
            found |= cached.fitted(of_part, getattr(benchmark, part), failures)
    return {name: found[name] for name in named if name in found}


def _prepared(detector: Detector, benchmark: ImageBenchmark) -> Detector:
    """For these images; banks are kept in float32, which the features came in."""
    steps = getattr(benchmark.test.transform, "transforms", ())
    detector = on_images(detector, next((step.std for step in steps if hasattr(step, "std")), None))
    return detector.changed(dtype=torch.float32) if detector.settings().get("dtype", ...) is None else detector


def _is_standard(detector: Detector, grid: Grid | None) -> bool:
    """Whether its parameters are those of its class, apart from what is searched over OpenOOD's grid."""
    if grid is not None and dict(grid) != dict(detector.grid):
        return False
    default = type(detector)().settings()
    return all(value == default[name] for name, value in detector.settings().items() if name not in detector.grid)


def _other_images(info: Mapping[str, Any], benchmark: ImageBenchmark) -> list[str]:
    """A note where detectors are fitted on other images than the model was trained on. Of a benchmark that has several
    layouts the content is not compared: names of files and classes differ between these."""
    now = {"training_images": len(benchmark.fit), "training_content": getattr(benchmark.fit, "content", None)}
    names = list(now)[: 1 if benchmark.name in SPECS else 2]
    if info.get("benchmark") != benchmark.name or not any(name in info and differ(name, info, now) for name in names):
        return []
    then = info["training_images"]
    return [
        f"the training images, {now[names[0]]}, are not the {then} that the model was trained on: they were changed"
    ]


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
    # Of the others the names differ between layouts, but not the classes.
    if benchmark.name == info.get("benchmark") and benchmark.name not in SPECS:
        names = benchmark.class_names
        for index, (theirs, ours) in enumerate(zip(info.get("class_names", names), names, strict=True)):
            if theirs != ours:
                raise checks.UserError(
                    f"{run.name}: class {index} was {theirs!r} in training, but is {ours!r} in these images"
                )
