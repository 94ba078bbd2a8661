"""The command line. Each command is a module of `ood_fast.commands`, with its parser and what it runs.

Exit codes: 0 done; 1 a run failed; 2 the request cannot be met as it was asked (nothing is written); 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .commands import COMMANDS
from .commands.common import RunError, refusal


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


def _told(message: Warning | str, *_: object, **__: object) -> str:
    """A warning in a line, as errors are."""
    return f"ood-fast: warning: {message}\n"


def _main(arguments: list[str]) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    if not arguments[0].startswith("-") and arguments[0] not in names:
        near = difflib.get_close_matches(arguments[0], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"unknown command {arguments[0]!r}; {hint}known: {', '.join(names)}")
    options = parser.parse_args(arguments)
    from .checks import UserError  # imports torch: not for --help and --version

    before, warnings.formatwarning = warnings.formatwarning, _told
    try:
        _check_backend()
        options.run(options, shlex.join(["ood-fast", *arguments]))
        sys.stdout.flush()
    except UserError as error:
        print(f"ood-fast: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (RunError, OSError) as error:  # OSError: a disk or a process failed where no command has words for it
        named = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        print(f"ood-fast: failed: {named}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = before
    return 0


def _check_backend() -> None:
    """`ops` reads OOD_FAST_BACKEND when it is imported."""
    try:
        from . import ops  # noqa: F401
    except ValueError as error:
        raise refusal(str(error)) from error


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

    for command in COMMANDS:
        command.add(commands)
    return parser
