"""What a person asked for and cannot have. Imports no torch: recipes and `--help` answer at once."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Sequence

from .registry import KINDS

SHORT_LIST = 10  # names


class UserError(ValueError):
    """A request that cannot be met as it was asked; the command line prints its message and exits with code 2."""


def warn_caller(text: str) -> None:
    """A UserWarning at the line that called this package."""
    frame, level, outermost = inspect.currentframe(), 0, 0
    while frame is not None:
        level += 1
        top = frame.f_globals.get("__name__", "").partition(".")[0]
        if top == __package__ or (top == "torch" and outermost == level - 1):  # a decorator, as torch.no_grad()
            outermost = level
        frame = frame.f_back
    warnings.warn(text, stacklevel=outermost + 1)


def shortened(names: Sequence[str], most: int = SHORT_LIST) -> str:
    """The first names, and how many more there are: "a, b and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not among the known ones: suggests the nearest, and lists them.

    The suggestion stands behind a short list, and before one in which it would be overlooked. Of what users may add by
    a name, the message also says how.
    """
    names = sorted(known)
    by_lower = {known_name.lower(): known_name for known_name in reversed(names)}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    own = "; one of your own needs --plugin MODULE" * (what in KINDS)
    message, listed = f"unknown {what} {name!r}", f"known: {', '.join(names)}{own}"
    if not nearest:
        return f"{message}; {listed}"
    hint = f"did you mean {by_lower[nearest[0]]!r}?"
    return f"{message}; {hint} {listed}" if len(names) > SHORT_LIST else f"{message}; {listed}; {hint}"
