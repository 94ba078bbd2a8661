"""`ood-fast compare`: losses × detectors on one data set."""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipes import DETECTORS, LOSSES, Recipe
from .common import RunError, device, machine, refusal, require_package, versions
from .options import share
from .progress import Bar

if TYPE_CHECKING:
    from ..compare import TrainedLoss
    from ..evaluation import RunResult


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
    share(parser, "device", "quiet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    require_package("scikit-learn", "sklearn")
    require_package("rich", "rich")
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
    folder = report.free_folder(Path("runs") / f"compare-{settings.data}" if options.out is None else options.out)
    started, start = datetime.now(timezone.utc), time.perf_counter()
    with ComparisonBar(settings, options.quiet) as progress:
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
        progress.at(progress.done, "drawing the plots")
        try:
            report.write(folder, comparison, context)
        except OSError as error:
            raise RunError(str(error)) from error
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


class ComparisonBar(Bar):
    """A bar over all epochs on a terminal, otherwise a line for each finished run."""

    def __init__(self, settings: Any, quiet: bool) -> None:
        self.n_runs, self.n_done = len(settings.seeds) * len(settings.losses), 0
        super().__init__("loading", self.n_runs * settings.recipe.epochs, quiet, unit="epochs", tell=False)

    def on_start(self, loss: str, seed: int) -> None:
        """Before a run."""
        self.at(self.done, f"run {self.n_done + 1}/{self.n_runs}  seed {seed}  {loss:<10}")

    def on_epoch(self, epoch: int, epoch_loss: float) -> None:
        """After an epoch."""
        self.advance(1)

    def on_run(self, run: TrainedLoss, evaluation: RunResult) -> None:
        """After a run."""
        self.n_done += 1
        what = f"seed {run.seed} {run.loss}: accuracy {100 * evaluation.value('accuracy'):.1f} %, {run.seconds:.1f} s"
        self.line(f"[{self.n_done}/{self.n_runs}] {what}", only_plain=True)
