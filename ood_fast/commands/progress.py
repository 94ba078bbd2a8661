"""How far a command is, on stderr: the one bar of all commands."""

from __future__ import annotations

import sys
import time
from importlib import util
from typing import Any


class Bar:
    """A bar with a count, some words and the time left on a terminal; elsewhere only the lines that are told.

    Args:
        what: what is done. total: how much of it; None if that is not known.
        quiet: nothing is shown.
        unit: what is counted. tell: when it is done, a line says how many in which time.
    """

    def __init__(self, what: str, total: int | None, quiet: bool, unit: str = "", tell: bool = True) -> None:
        self.what, self.quiet, self.unit, self.tell = what, quiet, unit, tell
        self.done, self.start, self.bar = 0, time.perf_counter(), None
        if quiet or not sys.stderr.isatty() or util.find_spec("rich") is None:
            return
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        # What a narrow terminal has no room for is left out: words and time below 80 columns, the bar below 60.
        console = Console(stderr=True)
        whole: dict[str, Any] = {"table_column": Column(no_wrap=True)}
        columns: list[Any] = [progress.TextColumn("{task.description}", **whole)]
        columns += [progress.BarColumn()] * (console.width >= 60)
        columns.append(progress.MofNCompleteColumn(**whole))
        if console.width >= 80:
            columns.append(progress.TextColumn("{task.fields[words]}", **whole))
            columns.append(progress.TimeRemainingColumn(elapsed_when_finished=True))
        self.bar = progress.Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task(what, total=total, words=unit)

    def __enter__(self) -> Bar:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        if self.tell and error is None:
            seconds = time.perf_counter() - self.start
            self.line(f"{self.what}: {self.done} in {seconds:.1f} s ({self.rate():,.0f}/s)")

    def expect(self, total: int) -> None:
        """How much there is to do, where that is known only now."""
        if self.bar:
            self.bar.update(self.task, total=total)

    def advance(self, n: int) -> None:
        """`n` more are done."""
        self.at(self.done + n, words=None if self.unit else f"{self.rate():,.0f}/s")

    def at(self, done: int, what: str | None = None, words: str | None = None) -> None:
        """So many are done; `what` is done now, and some words about it. None: as before."""
        self.done = done
        if self.bar:
            told: dict[str, Any] = {} if words is None else {"words": words}
            self.bar.update(self.task, completed=done, description=what, **told)

    def line(self, text: str, only_plain: bool = False) -> None:
        """A line that stays, above the bar; with `only_plain` where there is no bar."""
        if self.bar and self.bar.live.is_started:
            if not only_plain:
                self.bar.console.print(text, highlight=False, markup=False)
        elif not self.quiet and not (self.bar and only_plain):
            print(text, file=sys.stderr, flush=True)

    def rate(self) -> float:
        """How many a second."""
        return self.done / max(time.perf_counter() - self.start, 1e-9)
