"""The commands of `ood-fast`, a module each with `run(options, command)`, which does the work; `parsers.py` says what
they take, and imports no torch: `ood-fast --help` answers at once."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class RunError(Exception):
    """The request was fine, but it could not be carried through: exit code 1."""


@contextmanager
def carried_through() -> Iterator[None]:
    """What is wrong with what models give, as NaN, or with another process, is a `RunError`; other kinds stay."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = frame.f_globals.get("__name__", "").partition(".")[0] == __package__.partition(".")[0]
        if ours and type(error) in (ValueError, RuntimeError):
            raise RunError(str(error)) from error
        raise  # of code of the user, with the line where it fails
