"""What a run is told and what it tells: options, watcher, how it can end."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import checks
from ..values import SAVE_MINUTES

if TYPE_CHECKING:
    from .loop import Run


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


class Interrupted(Exception):
    """Training was stopped by the signal `signum`, and `last.ckpt` written."""

    def __init__(self, signum: int, epoch: int, step: int) -> None:
        self.signum, self.epoch, self.step = signum, epoch, step
        super().__init__(f"stopped by {signal.Signals(signum).name} in epoch {epoch}, after step {step}")


class Watcher:
    """What a run tells while it runs; every method may be left out. Called in the process of rank 0 only."""

    def on_start(self, run: Run) -> None:
        """Before the first step, at the position `run.epoch`, `run.step`."""

    def on_step(self, run: Run) -> None:
        """After each step; `run.progress()` has the numbers, and waits for a GPU."""

    def on_epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """After each epoch, with its row of log.csv."""

    def on_diagnostics(self, run: Run, row: Mapping[str, float]) -> None:
        """After each epoch, with its row of diagnostics.csv."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it decides what is trained.

    Attributes:
        device: "cpu", "cuda", ...
        resume: continue what is in the folder, if anything is.
        workers: processes that load images; 0 loads in this one.
        compile: `torch.compile` the model. channels_last: memory format. sync_bn: SyncBatchNorm (GPUs only).
        diagnostics: write `diagnostics.epoch_diagnostics` after each epoch to diagnostics.csv.
        keep_every: keep the weights of each so many epochs in `epochs/`.
        save_minutes: write `last.ckpt` as often within an epoch too; None: after epochs only.
        epoch_seconds: an epoch that ends sooner after the last save is saved with a later one; 0: each is.
        context: more for run.json: the command, where the data is, versions.
        watcher: is told of the progress.
    """

    device: str | torch.device = "cpu"
    resume: bool = False
    workers: int = 0
    compile: bool = False
    channels_last: bool = False
    sync_bn: bool = False
    diagnostics: bool = False
    keep_every: int | None = None
    save_minutes: float | None = SAVE_MINUTES
    epoch_seconds: float = 0.0
    context: Mapping[str, Any] | None = None
    watcher: Watcher | None = None

    def __post_init__(self) -> None:
        if self.keep_every is not None:
            checks.positive_int("keep_every", self.keep_every, " or None")
        for name in ("workers", "epoch_seconds", "save_minutes"):
            checks.real(name, getattr(self, name) or 0, 0, infinite=True)
        if self.sync_bn and torch.device(self.device).type == "cpu":
            raise checks.UserError("sync_bn: PyTorch's SyncBatchNorm runs on GPUs, not on the CPU")


def status_of(error: BaseException) -> str:
    """What run.json says of a run that ended with this error."""
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return "interrupted"
    return "diverged" if isinstance(error, DivergedError) else "failed"
