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
from typing import Any, NoReturn

from . import __version__
from .recipes import DETECTORS, LOSSES, Recipe

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal without ± or ‖ shows a question mark, not a UnicodeEncodeError
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _main(arguments)
    except SystemExit as exit_:  # argparse has printed its message (2), or the help or version (0)
        return int(exit_.code or 0)
    except KeyboardInterrupt:  # also while torch is being imported, which takes seconds
        print("ood-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) is gone; what was to be written is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class RunError(Exception):
    """The request was fine, but it could not be carried through."""


def _main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    from .checks import UserError  # imports torch: not for --help and --version

    try:
        _check_backend()
        options.run(options, shlex.join(["ood-fast", *arguments]))
        sys.stdout.flush()
    except UserError as error:
        print(f"ood-fast: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"ood-fast: failed: {error}", file=sys.stderr)
        return 1
    return 0


def _refusal(message: str) -> Exception:
    from .checks import UserError

    return UserError(message)


def _check_backend() -> None:
    """`ops` reads OOD_FAST_BACKEND when it is imported."""
    try:
        from . import ops  # noqa: F401
    except ValueError as error:
        raise _refusal(str(error)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        self.exit(2, f"ood-fast: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    )
    compare.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help="data set: digits (scikit-learn's, nothing to download; default)",
    )
    default = "(default: %(default)s)"
    compare.add_argument("--losses", default=",".join(LOSSES), metavar="A,B", help=f"losses to train with {default}")
    compare.add_argument(
        "--detectors", default=",".join(DETECTORS), metavar="A,B", help=f"detectors to score with {default}"
    )
    compare.add_argument(
        "--seeds", default="5", metavar="N", help=f"number of seeds (5: seeds 0 to 4), or a list as 0,3,7 {default}"
    )
    compare.add_argument("--epochs", default=str(Recipe.epochs), metavar="N", help=f"training epochs {default}")
    compare.add_argument("--out", metavar="DIR", help="results folder (default: runs/compare-DATA)")
    compare.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    compare.add_argument("--quiet", action="store_true", help="print nothing but errors")
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
        recipe=Recipe(epochs=_epochs(options.epochs)),
        device=_device(options.device),
    )
    folder = report.check_folder(Path("runs") / f"compare-{settings.data}" if options.out is None else options.out)
    started, start = datetime.now(timezone.utc), time.perf_counter()
    with _Progress(settings, options.quiet) as progress:
        try:
            comparison = compare(settings, progress.on_start, progress.on_epoch, progress.on_run)
        except DivergedError as error:
            raise RunError(f"{error}; nothing written") from error
        context = {
            "command": command,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 2),  # the only time that is told: here and in the report
            "versions": _versions(),
            "machine": _machine(),
        }
        progress.on_drawing()
        try:
            report.write(folder, comparison, context)
        except OSError as error:
            raise RunError(f"cannot write the results to {folder}: {error.strerror}") from error
    if not options.quiet:
        tables.print_tables(comparison)
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
        raise _refusal(f"--seeds: got {text!r}, expected a number of seeds or a list as 0,3,7") from None
    if "," in text:
        return tuple(numbers)
    if numbers[:1] < [1]:
        raise _refusal(f"--seeds: got {text!r}, expected at least 1")
    return tuple(range(numbers[0]))


def _epochs(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _refusal(f"--epochs: got {text!r}, expected a number of epochs") from None


def _device(name: str) -> str:
    import torch

    from . import ops

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(2, device=name).sum().item()  # a device without numbers (meta) fails here
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises each of them for some device
        raise _refusal(f"--device: cannot use {name!r}, {_why_not(name)}; use --device cpu") from error
    try:
        ops.backend_name(torch.device(name))
    except RuntimeError as error:
        raise _refusal(str(error)) from error
    return name


def _why_not(device: str) -> str:
    """In a few words; what torch says names drivers and every kind of device it knows."""
    import torch

    if device.partition(":")[0] == "cuda":
        n_devices = torch.cuda.device_count()
        return f"PyTorch finds {n_devices} such devices" if n_devices else "PyTorch finds no such GPU"
    try:
        torch.device(device)
    except RuntimeError:
        return "PyTorch knows no such device"
    return "PyTorch cannot compute on it here"


def _require(package: str, module: str) -> None:
    if util.find_spec(module) is None:
        raise _refusal(f"compare needs {package}, which is not installed: pip install {package}")


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
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console(stderr=True)
        # What a narrow terminal has no room for is left out: the words below 80 columns, the bar below 54.
        columns = [TextColumn("{task.description}", table_column=Column(no_wrap=True)), MofNCompleteColumn()]
        if console.width >= 54:
            columns.insert(1, BarColumn())
        if console.width >= 80:
            columns += [TextColumn("epochs"), TimeRemainingColumn(), TextColumn("left")]
        self.bar = Progress(*columns, console=console, transient=True)

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

    def on_drawing(self) -> None:
        if self.bar:
            self.bar.update(self.task, description="drawing the plots")

    def on_run(self, run: Any, evaluation: Any) -> None:
        self.n_done += 1
        if self.plain:
            accuracy = next(measured.value for measured in evaluation.measurements if measured.metric == "accuracy")
            what = f"seed {run.seed} {run.loss}: accuracy {100 * accuracy:.1f} %, {run.seconds:.1f} s"
            print(f"[{self.n_done}/{self.n_runs}] {what}", file=self.plain, flush=True)


# ---- info


def _info(options: argparse.Namespace, command: str) -> None:
    import torch

    from . import detectors

    devices = ["cpu"]
    devices += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    names = [*DETECTORS, *(name for name in detectors.known() if name not in DETECTORS)]
    lines = {
        **_versions(),
        "location": str(Path(__file__).parent),
        "machine": ", ".join(_machine().values()),
        "devices": ", ".join(devices),
        "backend": ", ".join(_backend(device.split()[0]) for device in devices),
        "losses": ", ".join(LOSSES),
        "detectors": ", ".join(names),
    }
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:<{width}}  {value}")


def _backend(device: str) -> str:
    from . import ops

    try:
        return f"{device}: {ops.backend_name(device)}"
    except RuntimeError as error:  # the backend that was asked for does not run there
        return f"{device}: none ({error})"


def _versions() -> dict[str, str]:
    versions = {"ood_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _machine() -> dict[str, str]:
    return {"system": f"{platform.system()} {platform.machine()}", "cpus": f"{os.cpu_count()} CPUs"}
