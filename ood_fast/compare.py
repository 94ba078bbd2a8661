"""The comparison of losses: a run for each loss and seed, trained by `training`, measured by `evaluation`, in pairs.

    comparison = Comparison("runs/mine", recipes_of("digits", ["ce", "elogitnorm"]), (0, 1, 2), benchmark_of)
    results = comparison.run()         # evaluation.Results, whose methods are the losses

What is trained already is taken as it is, what was interrupted is continued; losses and seeds that come later extend
what is there.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checks, files, recipes
from .data import ImageBenchmark
from .detectors import registry
from .evaluation import Results, RunResult, Trained, evaluate_run, open_run, paths_of
from .evaluation.measure import Measuring, by_name, check_sizes, parts_of
from .evaluation.results import FIT, VALIDATION
from .evaluation.trained import PRETRAINED
from .evaluation.write import check_folder, holds
from .heads import given_head
from .recipes import METHODS, OF_THE_LOSS, RECIPES, TrainingRecipe
from .registry import added
from .training import Run, Watcher, model_of
from .training.folder import COMPLETE, IMAGES, RUN, differ, file_key, images_of, loss_code, read_info
from .values import DRAWS

RUNS = "runs"  # below the folder of a comparison: runs/LOSS/sSEED
EPOCH_SECONDS = 10.0  # shorter epochs are saved that often: of short runs, saving would be the most
ALIKE = ("benchmark", *IMAGES)  # of runs with one seed


def recipes_of(
    benchmark: str, losses: Iterable[str], recipe: str | os.PathLike[str] | None = None, changes: Iterable[str] = ()
) -> dict[str, TrainingRecipe]:
    """A recipe for each loss, alike in all but the loss.

    Args:
        losses: names of `recipes.METHODS`, in any case, and losses of your own.
        recipe: whose loss is exchanged, by name or file; None: the recipes of the benchmark, as "cifar10-elogitnorm".
        changes: as in `recipes.override`.

    Raises:
        UserError: an unknown name, a loss twice or none, a benchmark without recipes.
    """
    benchmarks = (*recipes.BENCHMARK_NAMES, *added("benchmark"))
    if benchmark not in benchmarks:
        raise checks.UserError(checks.unknown("benchmark", benchmark, benchmarks))
    methods = {**METHODS, **{name: {"loss": name} for name in added("loss")}}
    losses, found = [loss if loss in methods else loss.lower() for loss in losses], {}
    _check_each("losses", losses)
    for loss in losses:
        if loss not in methods:
            raise checks.UserError(checks.unknown("loss", loss, methods))
        own, base = f"{benchmark}-{loss}", f"{benchmark}-ce" if recipe is None else recipe
        if recipe is None and own in RECIPES:
            made = RECIPES[own]
        elif recipe is None and base not in RECIPES:
            there = [name for name in RECIPES if name.startswith(f"{benchmark}-")] or ["cifar10-ce"]
            raise checks.UserError(f"--recipe: benchmark {benchmark} has none of its own; name one, such as {there[0]}")
        else:
            plain = recipes.find(os.fspath(base))
            default = {name: getattr(TrainingRecipe(), name) for name in OF_THE_LOSS}
            same = ("average", "detach_geometry", "tau", "outlier_queue", "outlier_start")
            kept = {name: getattr(plain, name) for name in same}
            of_loss: dict[str, Any] = {} if loss == loss_of(plain) else {**default, **methods[loss], **kept}
            called = own if recipe is None else f"{plain.name}-{loss}"
            made = replace(plain, **of_loss, name=called, source=f"{plain.name} with {loss}", benchmark=benchmark)
        found[loss] = recipes.override(made, changes)
    return found


def _check_each(argument: str, values: Sequence[object]) -> None:
    if not values:
        raise checks.UserError(f"{argument}: got none, expected at least one")
    if len(set(values)) < len(values):
        raise checks.UserError(f"{argument}: got {', '.join(map(str, values))}, expected each only once")


class ComparisonWatcher(Watcher):
    """What a comparison tells, besides what its runs tell; every method may be left out."""

    def on_run(self, loss: str, seed: int, run: Run | None) -> None:
        """Before a run is trained; None: there is nothing left to train."""

    def on_result(self, result: RunResult) -> None:
        """When it is evaluated."""


@dataclass(frozen=True)
class Comparison:
    """Losses × seeds. `UserError` on construction for seeds that make no sense.

    Attributes:
        folder: of the comparison; its runs are in `runs/LOSS/sSEED`.
        recipes: loss -> recipe, see `recipes_of`.
        benchmark_of: the images, by the seed: that of `digits` draws its classes by it.
        chosen: detectors, as in `evaluate_run`. training: keywords of `RunOptions`. measuring: of `evaluate_run`.
        told: is told of the progress.
        checkpoint: "best" on validation images, or "final"; None: as `measured_at` says.
    """

    folder: str | os.PathLike[str]
    recipes: Mapping[str, TrainingRecipe]
    seeds: Sequence[int]
    benchmark_of: Callable[[int], ImageBenchmark]
    chosen: Any = None
    training: Mapping[str, Any] = field(default_factory=dict)
    measuring: Mapping[str, Any] = field(default_factory=dict)
    told: ComparisonWatcher = field(default_factory=ComparisonWatcher)
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        _check_each("seeds", self.seeds)
        if min(self.seeds) < 0:
            raise checks.UserError(f"seeds: got {min(self.seeds)}, expected numbers that are not negative")

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Loss and seed of every run: those asked for, seed by seed, and those that are there besides."""
        asked = [(loss, seed) for seed in self.seeds for loss in self.recipes]
        return [*asked, *(run for run in self._there() if run not in asked)]

    def place(self, loss: str, seed: int) -> Path:
        """The folder of a run."""
        return Path(self.folder).expanduser() / RUNS / loss / f"s{seed}"

    def run(self) -> Results:
        """Train what is not trained yet, and measure all of it. The same settings give the same numbers.

        The runs of one seed share the images, the first weights and the order of the batches, so that losses are
        compared in pairs.

        Raises:
            UserError: a run that is there was trained otherwise. DivergedError, Interrupted, OSError: as `Run.train`.
        """
        results: list[RunResult] = []
        self.check()
        for loss, seed in self.runs:
            benchmark, place = self.benchmark_of(seed), self.place(loss, seed)
            with one_thread() if benchmark.name == "digits" else nullcontext():
                if loss in self.recipes and seed in self.seeds:
                    given = {"resume": True, "epoch_seconds": EPOCH_SECONDS, "watcher": self.told, **self.training}
                    run = Run(self.recipes[loss], benchmark, place, seed, **given)
                    done = run.finished
                    self.told.on_run(loss, seed, None if done else run)
                    if not done:
                        run.train()
                else:
                    self.told.on_run(loss, seed, None)
                at = self.checkpoint or measured_at(next(iter(self.recipes.values())))
                trained = open_run(place, benchmark.n_classes, benchmark.image_shape, checkpoint=at)
                trained = replace(trained, method=loss)
                result = evaluate_run(trained, benchmark, self.chosen, **self.measuring)
                if result is not None:
                    results.append(result)
                    self.told.on_result(result)
        return self.results(results)

    def results(self, results: list[RunResult]) -> Results:
        """Runs by loss, in the order of the losses."""
        losses = list(dict.fromkeys([*self.recipes, *(result.trained.method for result in results)]))
        results = sorted(results, key=lambda r: (losses.index(r.trained.method), r.trained.seed or 0))
        searched = [(name in run.trials, registry.registered(name)) for run in results for name in run.scores]
        tuned = all(was for was, detector in searched if detector is not None and detector.grid)
        name = self.benchmark_of(self.seeds[0]).name
        return Results(name, results, self.measuring.get("bootstrap", DRAWS), tuned)

    def check(self) -> None:
        """As `check_data`; UserError also for runs that are there but are no seeds of those that are asked for, or
        differ in more than the loss."""
        self.check_data()
        for loss, seed in self._there():
            info = read_info(self.place(loss, seed))
            there = info | recipes.as_dict(recipes.from_dict(info["recipe"]))
            apart = [] if loss in self.recipes else [*OF_THE_LOSS, "loss_code"]
            recipe = self.recipes.get(loss, next(iter(self.recipes.values())))
            images = images_of(self.benchmark_of(seed))
            ours = recipes.as_dict(recipe) | images
            ours |= {"init_weights": file_key(recipe.init), "loss_code": loss_code(recipe)}
            others = [
                f"{name}: {there.get(name)} there, {ours[name]} here"
                for name in ours
                if name not in ("name", "source", "init", *apart) and differ(name, there, ours)
            ]
            if others:
                raise checks.UserError(
                    f"--out: {self.place(loss, seed)} holds a run with other settings ({'; '.join(others)}); pass "
                    "another --out, or --overwrite to train all of it anew"
                )

    def check_data(self) -> None:
        """UserError for data that is missing, or too little for a parameter of a detector."""
        given, benchmark = by_name(self.chosen), self.benchmark_of(self.seeds[0])
        names = [field.name for field in fields(Measuring)]
        how = Measuring(**{name: value for name, value in self.measuring.items() if name in names})
        wanted = parts_of(given, how)
        benchmark.check({"train", VALIDATION, *wanted})
        targets = {part: getattr(benchmark, part).targets for part in (FIT, VALIDATION) if part in wanted}
        recipe = next(iter(self.recipes.values()))
        with torch.random.fork_rng(devices=[]):
            model = model_of(recipe, benchmark.n_classes, benchmark.image_shape, pretrained=False)
        try:
            head = given_head(model, None)
        except ValueError:  # features are not read
            return
        check_sizes(given, how.for_chosen(self.chosen), (head.out_features, head.in_features), targets)

    def _there(self) -> list[tuple[str, int]]:
        """The finished runs in the folder."""
        folder = Path(self.folder).expanduser() / RUNS
        paths = sorted(path for path in folder.glob(f"*/s*/{RUN}") if path.parent.name[1:].isdigit())
        found = [(path.parent.parent.name, int(path.parent.name[1:]), path.parent) for path in paths]
        return [(loss, seed) for loss, seed, path in sorted(found) if read_info(path).get("status") == COMPLETE]


def measured_at(recipe: TrainingRecipe) -> str:
    """Which weights of a run count: the best epoch of one that starts from trained weights may be its first, before the
    loss has done anything."""
    return "final" if recipe.init or recipe.pretrained else "best"


def open_runs(
    paths: Iterable[str | os.PathLike[str]],
    benchmark_of: Callable[[int], ImageBenchmark],
    model: Any = None,
    checkpoint: str | None = None,
) -> list[Trained]:
    """Runs that are trained already, as methods by their loss where that tells them apart; at `checkpoint`, else as
    `measured_at` says of those that are complete.

    Raises:
        UserError: a run of other data or other classes than the first.
    """
    runs: list[Trained] = []
    first: dict[int | None, tuple[str, dict[str, Any]]] = {}
    for path in [one for given in paths for one in paths_of(given)]:
        place = Path(path).expanduser()
        info = read_info(place) if (place / RUN).is_file() else {}
        any_seed = first.setdefault(None, (path, info)) if info else (path, info)
        same_seed = first.setdefault(info["seed"], (path, info)) if info else any_seed
        for what in ALIKE if info else ():  # of digits, the seed chooses the classes
            name, theirs = same_seed if info["benchmark"] == "digits" and what != "benchmark" else any_seed
            if theirs and differ(what, info, theirs):
                raise checks.UserError(
                    f"{path}, {name}: not to be compared, their {what.replace('_', ' ')} differ: {info.get(what)}, "
                    f"{theirs.get(what)}"
                )
        benchmark = benchmark_of(info.get("seed") or 0)
        own = model if not info and not str(path).startswith(PRETRAINED) else None
        if callable(own) and not isinstance(own, nn.Module):
            own = own()
        elif runs:
            own = copy.deepcopy(own)  # the weights of each run go into one of its own
        done = info.get("status") == COMPLETE
        at = checkpoint or (measured_at(recipes.from_dict(info["recipe"])) if done else "best")
        runs.append(open_run(path, benchmark.n_classes, benchmark.image_shape, model=own, checkpoint=at))
    labels = {run.method: loss_of(run.recipe) or run.method for run in runs}
    if len(set(labels.values())) == len(labels):
        runs = [replace(run, method=labels[run.method]) for run in runs]
    return runs


def loss_of(recipe: TrainingRecipe | None) -> str:
    """The name of its loss among `recipes.METHODS`, whatever its numbers are, and those of your own; empty if it has
    none."""
    if recipe is None:
        return ""

    def kind(recipe: TrainingRecipe) -> tuple[Any, ...]:
        return recipe.loss, recipe.head, recipe.head_tau is None, recipe.outliers, recipe.regmixup > 0

    named = (name for name, settings in METHODS.items() if kind(TrainingRecipe(**settings)) == kind(recipe))
    return next(named, recipe.loss if recipe.loss in added("loss") else "")


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: the number of threads decides the order of sums, so it would decide the last digits. And small
    models have nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path` if a comparison can be written there: missing, empty, or of an earlier one; else UserError."""
    try:
        folder = check_folder(path)
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        ours = holds(folder) or (found == [RUNS] and all(map(_is_ours, (folder / RUNS).glob("*/*"))))
        if found and not ours:
            told = f"is not empty and holds no earlier comparison (found {found[0]}); choose another folder"
            raise checks.UserError(f"--out: {folder} {told}")
        with suppress(_TriedError), files.staged(folder):  # permissions do not tell of virtual file systems
            raise _TriedError
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise checks.UserError(f"--out: cannot write to {path}: {reason}") from error
    except RuntimeError as error:  # ~ of an unknown user
        raise checks.UserError(f"--out: got {str(path)!r}: {error}") from error
    return folder


def _is_ours(place: Path) -> bool:
    """Whether a folder is a run of a comparison, LOSS/sSEED, perhaps one that was stopped before anything was written.

    `ood-fast train` keeps its own as RECIPE/sSEED, of a recipe that may be called as a loss is.
    """
    if not (place / RUN).is_file():
        return place.is_dir() and all(entry.name.startswith(".") for entry in place.iterdir())
    info = read_info(place)
    trained_apart = str(info.get("command", "")).startswith("ood-fast train ")
    return not trained_apart and loss_of(recipes.from_dict(info["recipe"])) == place.parent.name


def remove_runs(folder: Path) -> None:
    """Remove what a comparison has trained in its folder, and nothing else."""
    for place in filter(_is_ours, list((folder / RUNS).glob("*/*"))):
        shutil.rmtree(place)


class _TriedError(Exception):
    """Undoes what `files.staged` has made."""
