"""The command line. `commands.parsers` has what each command takes, a module of `commands` what it does.

Exit codes: 0 done; 1 a run failed; 2 the request cannot be met as it was asked (nothing is written); 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from . import __version__
from .commands import RunError
from .commands.parsers import add_all
from .errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal without ± or ‖ shows a question mark, not a UnicodeEncodeError
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _main(arguments)
    except SystemExit as exit_:  # argparse has printed its message (2), or the help or version (0)
        return 0 if isinstance(exit_.__context__, BrokenPipeError) else int(exit_.code or 0)  # rich's, see below
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
    parser, commands = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if arguments[0] in commands:
        commands[arguments[0]].refuse_unknown(arguments[1:])
    elif not arguments[0].startswith("-"):
        parser.error(f"unknown command {arguments[0]!r}; {_hint(arguments[0], commands)}known: {', '.join(commands)}")
    else:
        parser.refuse_unknown(arguments)
    options = parser.parse_args(arguments)
    try:
        command = importlib.import_module(f".commands.{options.command}", __package__)
    except ValueError as error:  # `ops` reads OOD_FAST_BACKEND
        print(f"ood-fast: error: {error}", file=sys.stderr)
        return 2
    before, warnings.formatwarning = warnings.formatwarning, _told
    try:
        command.run(options, shlex.join(["ood-fast", *arguments]))
        sys.stdout.flush()
    except UserError as error:
        print(f"ood-fast: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (RunError, OSError) as error:  # OSError: a disk or a process failed where no command has words for it
        named = str(error)
        if isinstance(error, OSError) and error.filename:
            named = f"{error.filename}: {error.strerror}"
        print(f"ood-fast: failed: {named}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = before
    return 0


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


class _Parser(argparse.ArgumentParser):
    """With examples at the end of its help."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = tuple(examples)

    def format_help(self) -> str:
        """The help, and the examples as they are to be typed."""
        lines = [f"  {example}" for example in self.examples]
        return super().format_help() + "\n".join(["", "examples:", *lines, ""] if lines else [])

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Exit with the nearest one for the first option that it does not know; argparse tells it last, and not so."""
        known = list(self._option_string_actions)
        for given in itertools.takewhile(lambda argument: argument != "--", arguments):
            name = given.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                self.error(f"unknown option {name}; {_hint(name, known)}".rstrip("; "))

    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        self.exit(2, f"ood-fast: error: {message}; see {self.prog} --help\n")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """Of the command line, and of each command by its name."""
    parser = _Parser(
        prog="ood-fast",
        description="Out-of-distribution detection for image classifiers: ELogitNorm, NCI and what they compare with.",
        examples=("ood-fast compare", "ood-fast fit --help"),
    )
    parser.add_argument("--version", action="version", version=f"ood_fast {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    add_all(commands)
    return parser, dict(commands.choices)
