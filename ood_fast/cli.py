"""The command line: `ood-fast compare` and `ood-fast info`.

Exit codes: 0 done; 1 a run failed; 2 the request cannot be met as it was asked (nothing is written); 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from typing import Any

from . import __version__
from .checks import UserError
from .recipes import DETECTORS, LOSSES, Recipe

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal without ± or ‖ shows a question mark, not a UnicodeEncodeError
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as exit_:  # argparse has printed its message (2), or the help or version (0)
        return int(exit_.code or 0)
    try:
        options.run(options, shlex.join(["ood-fast", *arguments]))
        sys.stdout.flush()
    except UserError as error:
        print(f"ood-fast: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"ood-fast: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ood-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) is gone; what was to be written is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class RunError(Exception):
    """The request was fine, but it could not be carried through."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ood-fast",
        description="Out-of-distribution detection for image classifiers: ELogitNorm, NCI and what they compare with.",
    )
    parser.add_argument("--version", action="version", version=f"ood_fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    compare = commands.add_parser(
        "compare",
        help="train with each loss, score with each detector, report tables, plots and a page",
        description="Train a classifier with each loss and seed, score near- and far-OOD images with each detector, "
        "and report AUROC, FPR95, accuracy and calibration with the differences to cross-entropy.",
        epilog="losses: " + "; ".join(f"{name} = {what}" for name, what in LOSSES.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.add_argument(
        "--data", default="digits", metavar="NAME", help="data set: digits (scikit-learn's, nothing to download)"
    )
    compare.add_argument("--losses", default=",".join(LOSSES), metavar="A,B", help="losses to train with")
    compare.add_argument("--detectors", default=",".join(DETECTORS), metavar="A,B", help="detectors to score with")
    compare.add_argument(
        "--seeds", default="5", metavar="N", help="number of seeds (5: seeds 0 to 4), or a list as 0,3,7"
    )
    compare.add_argument("--epochs", type=int, default=Recipe.epochs, metavar="N", help="training epochs")
    compare.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: runs/compare-DATA)")
    compare.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    compare.add_argument("--quiet", action="store_true", help="no progress and no tables")
    compare.set_defaults(run=_compare)

    info = commands.add_parser(
        "info",
        help="versions, devices and what is available",
        description="Versions, devices, and the known losses and detectors.",
    )
    info.set_defaults(run=_info)
    return parser


# ---- compare


def _compare(options: argparse.Namespace, command: str) -> None:
    _require("scikit-learn", "sklearn")
    _require("matplotlib", "matplotlib")
    _require("rich", "rich")
    from . import report, tables
    from .compare import Settings, compare
    from .train import DivergedError

    settings = Settings(
        data=options.data,
        losses=_names(options.losses),
        detectors=_names(options.detectors),
        seeds=_seeds(options.seeds),
        recipe=Recipe(epochs=options.epochs),
        device=_device(options.device),
    )
    folder = report.check_folder(options.out or Path("runs") / f"compare-{settings.data}")
    started, start = datetime.now(timezone.utc), time.perf_counter()
    with _Progress(settings, options.quiet) as progress:
        try:
            comparison = compare(settings, progress.on_start, progress.on_epoch, progress.on_run)
        except DivergedError as error:
            raise RunError(f"{error}; nothing written") from error
    context = {
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": _versions(),
        "machine": _machine(),
    }
    try:
        report.write(folder, comparison, context)
    except OSError as error:
        raise RunError(f"cannot write the results to {folder}: {error.strerror}") from error
    if not options.quiet:
        tables.print_tables(comparison)
    print(f"{time.perf_counter() - start:.0f} s; results in {folder}/, to be read in {folder / 'report.html'}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


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


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them for some device
        raise UserError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return name


def _require(package: str, module: str) -> None:
    if util.find_spec(module) is None:
        raise UserError(f"compare needs {package}, which is not installed: pip install {package}")


class _Progress:
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
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> _Progress:
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

    def on_run(self, run: Any, evaluation: Any) -> None:
        self.n_done += 1
        if self.plain:
            accuracy = next(measured.value for measured in evaluation.measurements if measured.metric == "accuracy")
            what = f"seed {run.seed} {run.loss}: accuracy {100 * accuracy:.1f} %, {run.seconds:.1f} s"
            print(f"[{self.n_done}/{self.n_runs}] {what}", file=self.plain, flush=True)


# ---- info


def _info(options: argparse.Namespace, command: str) -> None:
    import torch

    from . import detectors, ops

    devices = ["cpu"]
    devices += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    backends = [f"{device.split()[0]}: {ops.backend_name(device.split()[0])}" for device in devices]
    lines = {
        **_versions(),
        "location": str(Path(__file__).parent),
        "machine": ", ".join(f"{key} {value}" for key, value in _machine().items()),
        "devices": ", ".join(devices),
        "backend": ", ".join(backends),
        "losses": ", ".join(LOSSES),
        "detectors": ", ".join(detectors.known()),
    }
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:<{width}}  {value}")


def _versions() -> dict[str, str]:
    versions = {"ood_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _machine() -> dict[str, str]:
    return {"system": f"{platform.system()} {platform.machine()}", "cpus": str(os.cpu_count())}
