"""The commands of `ood-fast`, a module each with `run(options, command)`, which does the work; `parsers.py` says what
they take, and imports no torch: `ood-fast --help` answers at once."""


class RunError(Exception):
    """The request was fine, but it could not be carried through: exit code 1."""
