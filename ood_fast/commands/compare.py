"""`ood-fast compare`: losses × detectors on one data set."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..recipes import DETECTORS, LOSSES, Recipe
from .common import RunError, device, machine, refusal, require, versions


def add(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "compare",
        help="train with each loss, score with each detector, report tables, plots and a page",
        description="Train a classifier with each loss and seed, score near- and far-OOD images with each detector, "
        "and report AUROC, FPR95, accuracy and calibration with the differences to cross-entropy.",
        epilog="losses: " + "; ".join(f"{name} = {what}" for name, what in LOSSES.items()),
    )
    parser.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help="data set: digits (scikit-learn's, nothing to download; default)",
    )
    default = "(default: %(default)s)"
    parser.add_argument("--losses", default=",".join(LOSSES), metavar="A,B", help=f"losses to train with {default}")
    parser.add_argument(
        "--detectors", default=",".join(DETECTORS), metavar="A,B", help=f"detectors to score with {default}"
    )
    parser.add_argument(
        "--seeds", default="5", metavar="N", help=f"number of seeds (5: seeds 0 to 4), or a list as 0,3,7 {default}"
    )
    parser.add_argument("--epochs", default=str(Recipe.epochs), metavar="N", help=f"training epochs {default}")
    parser.add_argument("--out", metavar="DIR", help="results folder (default: runs/compare-DATA)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    require("scikit-learn", "sklearn")
    require("matplotlib", "matplotlib")
    require("rich", "rich")
    from ..compare import Settings, compare
    from ..report import comparison as report
    from ..report import tables
    from ..train import DivergedError

    settings = Settings(
        data=options.data,
        losses=_names(options.losses),
        detectors=_names(options.detectors),
        seeds=_seeds(options.seeds),
        recipe=Recipe(epochs=_epochs(options.epochs)),
        device=device(options.device),
    )
    folder = report.check_folder(Path("runs") / f"compare-{settings.data}" if options.out is None else options.out)
    started, start = datetime.now(timezone.utc), time.perf_counter()
    with Progress(settings, options.quiet) as progress:
        try:
            comparison = compare(settings, progress.on_start, progress.on_epoch, progress.on_run)
        except DivergedError as error:
            raise RunError(f"{error}; nothing written") from error
        context = {
            "command": command,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 2),  # the only time that is told: here and in the report
            "versions": versions(),
            "machine": machine(),
        }
        progress.on_drawing()
        try:
            report.write(folder, comparison, context)
        except OSError as error:
            raise RunError(f"cannot write the results to {folder}: {error.strerror}") from error
    if not options.quiet:
        tables.show(report.tables_of(comparison))
        print(
            f"Trained and scored in {context['seconds']:.0f} s. Results: {folder}/, to be read in {folder}/report.html"
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str) -> tuple[int, ...]:
    """ "5" -> (0, 1, 2, 3, 4); "0,3,7" and "3," are lists."""
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise refusal(f"--seeds: got {text!r}, expected a number of seeds or a list as 0,3,7") from None
    if "," in text:
        return tuple(numbers)
    if numbers[:1] < [1]:
        raise refusal(f"--seeds: got {text!r}, expected at least 1")
    return tuple(range(numbers[0]))


def _epochs(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise refusal(f"--epochs: got {text!r}, expected a number of epochs") from None


class Progress:
    """Progress on stderr: a bar over all epochs on a terminal, otherwise a line for each finished run."""

    def __init__(self, settings: Any, quiet: bool) -> None:
        self.settings = settings
        self.n_runs = len(settings.seeds) * len(settings.losses)
        self.n_done = 0
        self.plain = self.bar = None
        if quiet:
            return
        if not sys.stderr.isatty():
            self.plain = sys.stderr
            return
        from rich import progress as bars
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console(stderr=True)
        # What a narrow terminal has no room for is left out: the words below 80 columns, the bar below 54.
        columns = [TextColumn("{task.description}", table_column=Column(no_wrap=True)), MofNCompleteColumn()]
        if console.width >= 54:
            columns.insert(1, BarColumn())
        if console.width >= 80:
            columns += [TextColumn("epochs"), TimeRemainingColumn(), TextColumn("left")]
        self.bar = bars.Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("loading", total=self.n_runs * self.settings.recipe.epochs)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def on_start(self, loss: str, seed: int) -> None:
        if self.bar:
            self.bar.update(self.task, description=f"run {self.n_done + 1}/{self.n_runs}  seed {seed}  {loss:<10}")

    def on_epoch(self, epoch: int, epoch_loss: float) -> None:
        if self.bar:
            self.bar.advance(self.task)

    def on_drawing(self) -> None:
        if self.bar:
            self.bar.update(self.task, description="drawing the plots")

    def on_run(self, run: Any, evaluation: Any) -> None:
        self.n_done += 1
        if self.plain:
            accuracy = next(measured.value for measured in evaluation.measurements if measured.metric == "accuracy")
            what = f"seed {run.seed} {run.loss}: accuracy {100 * accuracy:.1f} %, {run.seconds:.1f} s"
            print(f"[{self.n_done}/{self.n_runs}] {what}", file=self.plain, flush=True)
