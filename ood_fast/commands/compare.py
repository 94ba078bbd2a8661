"""`ood-fast compare`: losses × detectors on one benchmark, trained here or taken as they are, and which is best."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import checks, evaluation, files
from ..checks import UserError
from ..compare import Comparison, ComparisonWatcher, free_folder, open_runs, recipes_of, remove_runs
from ..detectors import DetectorSet, find
from ..evaluation import Results, RunResult, paths_of
from ..recipes import DETECTORS, LOSSES
from ..report import charts, figures, gallery, page
from ..report.diagnoses import diagnose_runs
from ..report.record import first_of_each
from ..report.runs import open_records
from ..train import DivergedError, Interrupted, Run
from ..values import DRAWS, Grids
from . import RunError, carried_through
from .benchmarks import Benchmarks, run_info
from .code import import_known, import_plugins
from .common import (
    context_of,
    data_of,
    detector_set,
    device,
    given,
    listed,
    refuse_given,
    said,
    searched,
    training_settings,
)
from .model import allow, is_callable, named
from .progress import Bar

Given = tuple[Path, Benchmarks, DetectorSet]

PICTURE = "verdict.svg"  # the page's first, as a file of its own
SPEED = ("amp", "compile", "channels_last")  # of training alone
SEARCHED = ("NCI",)  # whose parameters are chosen on validation images without --tune


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    checks.optional_import("compare", "rich")
    import_plugins(options)

    info = _info(options.runs[0]) if options.runs else {"benchmark": "digits"}
    options.benchmark = options.benchmark or info.get("benchmark")
    if options.benchmark is None:
        raise UserError(f"--benchmark: {options.runs[0]} does not say which; give one")
    if options.benchmark == "digits":
        checks.optional_import("compare", "sklearn")
    benchmarks = Benchmarks(options, paths_of(options.runs[0])[0] if options.runs else None)
    chosen, grids = _detectors(options)
    measuring = {"leave_out": options.detectors == "all", "grids": grids, "workers": options.workers}
    measuring["device"] = device(options.device)
    default = Path("runs") / ("compare" if options.runs else f"compare-{options.benchmark}")
    folder = free_folder(default if options.out is None else options.out)
    context = context_of(command)
    start = time.perf_counter()
    compared = (_taken if options.runs else _trained)(options, context, (folder, benchmarks, chosen), measuring)
    try:
        with carried_through():
            results = compared()
        if results is None:  # of the processes of torchrun the first writes
            return
        context["seconds"] = round(time.perf_counter() - start, 2)
        evaluation.write(folder, results, context)
        if pictures := figures.dots(results):
            files.write_text(folder / PICTURE, charts.as_file(pictures))
        shown = _page(folder, context, benchmarks)
    except Interrupted as stop:
        print(f"ood-fast: {stop}; saved. To continue: {command.replace(' --overwrite', '')}", file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None
    except DivergedError as error:
        raise RunError(f"{error}; what was trained is kept in {folder}") from error
    if not options.quiet:
        evaluation.print_tables(results)
        print(f"Compared in {time.perf_counter() - start:.0f} s. Results: {folder}/, to be read in {shown}")


def _page(folder: Path, context: Mapping[str, Any], benchmarks: Benchmarks) -> Path:
    """The report about the first seed of each loss, beside the results."""
    records = first_of_each(open_records([folder]))
    diagnose_runs(records)
    gallery.add(records, at_hand=list(benchmarks.opened.values()))
    page.write(folder / page.NAME, records, context)
    return folder / page.NAME


def _trained(
    options: argparse.Namespace, context: dict[str, Any], opened: Given, measuring: dict[str, Any]
) -> Callable[[], Results]:
    """What trains and measures a run for each loss and seed."""
    folder, benchmarks, chosen = opened
    settings = training_settings(options)
    changes = [text for text in settings if "." not in text.partition("=")[0]]
    losses = LOSSES if options.losses is None else listed(options.losses)
    recipes = recipes_of(options.benchmark, losses, options.recipe, changes)
    for recipe in recipes.values():
        allow(recipe.model, said(settings), options.recipe)
    seeds = _seeds("5" if options.seeds is None else options.seeds)
    told = {**context, "data": data_of(options), "plugins": options.plugin}
    training = {"device": measuring["device"], "context": told, **given(options, "workers", *SPEED[1:])}
    bar = ComparisonBar(options.quiet)
    of_run = training, measuring, bar, options.checkpoint
    comparison = Comparison(folder, recipes, seeds, benchmarks.open, chosen, *of_run)
    comparison.check_data()
    if options.overwrite:
        remove_runs(folder)
    comparison.check()
    measuring["bootstrap"] = _draws([loss for loss, _ in comparison.runs])
    bar.runs, bar.n_epochs = comparison.runs, next(iter(recipes.values())).epochs

    def compared() -> Results:
        with bar:
            return comparison.run()

    return compared


def _taken(
    options: argparse.Namespace, context: dict[str, Any], opened: Given, measuring: dict[str, Any]
) -> Callable[[], Results | None]:
    """What measures runs that are trained."""
    settings = [text for text in options.set if "." not in text.partition("=")[0]]
    of_training = ("recipe", "init", "pretrained", "epochs", "overwrite", "losses", "seeds")
    unused = (*of_training, *SPEED, *(["set"] if settings else []))
    refuse_given(options, "not used with RUN: what is trained is taken as it is", *unused)
    for path in options.runs:
        info = _info(path)
        import_known(info.get("plugins") or [])
        allow(info["recipe"]["model"] if info else "", options.model, path)
    _, benchmarks, chosen = opened
    made_by = options.model and is_callable(options.model)
    model = functools.partial(named, options.model) if made_by else options.model
    runs = open_runs(options.runs, benchmarks.open, model, options.checkpoint)
    measuring["bootstrap"] = _draws([run.method for run in runs])
    measuring["progress"] = lambda what, total: Bar(what, total, options.quiet)
    return lambda: evaluation.evaluate_runs(runs, benchmarks.of, chosen, **measuring)


def _draws(methods: Sequence[str]) -> int:
    """Intervals are over the test images where each method has one run, else over the seeds."""
    return DRAWS if len(set(methods)) == len(methods) else 0


def _info(path: str) -> dict[str, Any]:
    """run.json of the first run that a path means; nothing if it has none."""
    first = paths_of(path)[0]
    if not Path(first).expanduser().exists() and not path.startswith("pretrained:"):
        raise UserError(f"{path}: no such file or folder")
    return run_info(first)


def _detectors(options: argparse.Namespace) -> tuple[DetectorSet, Grids]:
    """The detectors with what was set of them, and what is searched of each."""
    names = [find(name).__name__ for name in listed(options.detectors)] if options.detectors != "all" else []
    if len(set(names)) < len(names):
        raise UserError(f"detectors: got {', '.join(names)}, expected each only once")
    settings = [text for text in options.set if "." in text.partition("=")[0]]
    if options.benchmark == "digits":  # few images a class; what was set comes after it
        usual = [(name, *item) for name, its in DETECTORS.items() for item in its.items()]
        settings[:0] = [f"{name}.{key}={value}" for name, key, value in usual if name in (names or [name])]
    chosen = detector_set(options.detectors, settings, on_features=False)
    grids = searched(settings, chosen)
    return chosen, {
        name: grids.get(name, detector.grid) if options.tune or name in SEARCHED else {}
        for name, detector in chosen.items()
    }


def _seeds(text: str) -> tuple[int, ...]:
    """ "5" -> (0, 1, 2, 3, 4); "0,3,7" and "3," are lists."""
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise UserError(f"--seeds: got {text!r}, expected a number of seeds or a list as 0,3,7") from None
    if "," in text:
        return tuple(numbers)
    if numbers[:1] < [1]:
        raise UserError(f"--seeds: got {text!r}, expected at least 1")
    return tuple(range(numbers[0]))


class ComparisonBar(Bar, ComparisonWatcher):
    """A bar over the epochs of all runs on a terminal, else a line for each finished run; a `ComparisonWatcher`."""

    def __init__(self, quiet: bool) -> None:
        super().__init__("loading", None, quiet, unit="epochs", tell=False)
        self.runs: list[tuple[str, int]] = []
        self.n_epochs = self.n_begun = 0

    def __enter__(self) -> ComparisonBar:
        super().__enter__()
        self.expect(len(self.runs) * self.n_epochs)
        return self

    def on_run(self, loss: str, seed: int, run: Run | None) -> None:
        self.since = time.perf_counter()
        what = f"run {self.n_begun + 1}/{len(self.runs)}  seed {seed}  {loss:<10}"
        self.at(self.n_begun * self.n_epochs, what)
        self.n_begun += 1

    def on_start(self, run: Run) -> None:
        self.at((self.n_begun - 1) * self.n_epochs + run.epoch)

    def on_epoch(self, run: Run, row: Mapping[str, float]) -> None:
        self.advance(1)

    def on_result(self, result: RunResult) -> None:
        trained, seconds = result.trained, time.perf_counter() - self.since
        what = f"seed {trained.seed} {trained.method}: accuracy {100 * result.value('accuracy'):.1f} %, {seconds:.1f} s"
        self.line(f"[{self.n_begun}/{len(self.runs)}] {what}", only_plain=True)
