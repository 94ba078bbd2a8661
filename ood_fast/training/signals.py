"""SIGTERM and Ctrl-C while a run trains: noted, and acted upon between two steps."""

from __future__ import annotations

import os
import signal
import threading

from torch import Tensor


class Signals:
    """While this context is open, the first SIGTERM or SIGINT is noted in `received` (0: none), not acted upon."""

    HANDLED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in self.HANDLED}
        return self

    def _note(self, signum: int, _: object) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def leave_signals_to_the_trainer(loading: Tensor, _: int) -> None:
    """In a worker: a terminal's Ctrl-C and a cluster's SIGTERM reach the workers too, whose images are still needed.

    When `loading` is over, SIGTERM ends it: at its exit Python terminates workers that are left, and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if loading else os._exit(0))
