"""`ood-fast train`: train a recipe, in a folder that the run can be continued from."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checks, models
from ..checks import UserError
from ..data import ImageBenchmark, open_benchmark
from ..data.folders import class_names
from ..processes import Processes
from ..recipes import RECIPES, TrainingRecipe, as_dict, find, override
from ..train import DivergedError, Interrupted, Run
from ..training import model_of
from ..training.folder import LAST
from . import RunError
from .agreement import check_sample
from .code import import_plugins
from .common import data_of, device, given, machine, processes, said, training_settings, versions, whole_path
from .model import allow
from .progress import Bar


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    if options.recipe == "list":
        width = max(map(len, RECIPES))
        print("\n".join(f"{name:<{width}}  {recipe.source}" for name, recipe in RECIPES.items()))
        return
    import_plugins(options)
    original = find(options.recipe)
    settings = training_settings(options)
    recipe = override(original, settings)
    if options.show:
        print(json.dumps(as_dict(recipe), indent=2, ensure_ascii=False))
        return
    _check(options)
    allow(recipe.model, said(settings), options.recipe)

    out = Path(options.out if options.out is not None else Path("runs") / recipe.name / f"s{options.seed}")
    where = device(options.device)
    with processes(where, options) as process:
        benchmark = open_benchmark(
            recipe.benchmark,
            options.data_root,
            classes=None if options.classes is None else class_names(options.classes),
            truncated=options.truncated == "allow",
            **given(options, "download", "layout", "image_size", "outliers", "seed"),
        )
        if options.download:
            _download(benchmark, options.diagnostics, process)
        _check_order(recipe, benchmark, options)
        progress = Told(options)
        training = Run(
            recipe,
            benchmark,
            out,
            options.seed,
            device=where,
            save_minutes=options.save_minutes or None,
            context=_context(options, command),
            watcher=progress,
            **given(options, "resume", "workers", "compile", "channels_last", "sync_bn", "diagnostics", "keep_every"),
        )
        if not options.quiet:
            _note_batch(original, recipe, process.size)
        try:
            with progress:
                training.train()
        except Interrupted as stop:
            if process.rank == 0:
                again = command if options.resume else f"{command} --resume"
                if process.size > 1:
                    again = f"torchrun as before, with --resume ({again})"
                print(f"ood-fast: {stop}; saved. To continue: {again}", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None
        except (DivergedError, OSError) as error:
            raise RunError(f"{error}; {_kept(training)}") from error
    if not options.quiet:
        best = training.best
        trained = f"Trained {recipe.epochs} epoch{'s' * (recipe.epochs != 1)}"
        accuracy = f"validation accuracy {100 * best['validation_accuracy']:.2f} % at best (epoch {best['epoch']})"
        print(f"{trained}: {accuracy}. The run is in {out}")


def _check(options: argparse.Namespace) -> None:
    if options.out is not None and not options.out.strip():
        raise UserError(f"--out: got {options.out!r}, expected a folder")
    if options.tensorboard:
        checks.optional_import("--tensorboard", "tensorboard")


def _check_order(recipe: TrainingRecipe, benchmark: ImageBenchmark, options: argparse.Namespace) -> None:
    """UserError where the weights that training starts from, head included, have the classes in another order."""
    if options.resume or not (recipe.pretrained or recipe.init):
        return
    if recipe.pretrained is True and models.n_published(recipe.model) != benchmark.n_classes:
        return  # the head is new

    model = model_of(recipe, benchmark.n_classes, benchmark.image_shape).eval()
    if recipe.init:
        models.load_checkpoint(model, recipe.init)
    check_sample(model, benchmark.fit, benchmark.class_names, options.data_root or benchmark.name)


def _download(benchmark: ImageBenchmark, diagnostics: bool, process: Processes) -> None:
    """What training reads is fetched by one process, while the others wait; its error reaches all of them."""
    error = None
    if process.rank == 0:
        try:
            _ = benchmark.train, benchmark.validation, diagnostics and benchmark.validation_ood
        except checks.UserError as missing:
            error = str(missing)
    if (error := process.first(error)) is not None:
        raise UserError(error)


def _context(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """For run.json; what `data.open_benchmark` was called with, so that the evaluation can do the same."""
    data = data_of(options)
    if options.outliers is not None:
        data["outliers"] = whole_path(options.outliers)
    return {"command": command, "data": data, "plugins": options.plugin, "versions": versions(), "machine": machine()}


def _note_batch(original: TrainingRecipe, recipe: TrainingRecipe, n_processes: int) -> None:
    there, here = original.n_processes * original.batch_size, n_processes * recipe.batch_size
    if there != here and recipe.learning_rate == original.learning_rate:
        print(
            f"note: the learning rate {recipe.learning_rate:g} was made for {there} images a step, here are {here}: "
            f"{recipe.batch_size} on each process (--set batch_size=..., --set lr=...)",
            file=sys.stderr,
        )


def _kept(training: Run) -> str:
    if (training.out / LAST).is_file():
        return f"the checkpoints before it are kept in {training.out}"
    return f"there is no checkpoint yet in {training.out}"


class Told:
    """A `train.Watcher`: a bar over the images of all epochs on a terminal, a line for each epoch, TensorBoard."""

    REFRESH = 0.5  # seconds: each look at the loss waits for the GPU

    def __init__(self, options: argparse.Namespace) -> None:
        self.quiet, self.tensorboard = options.quiet, options.tensorboard
        self.bar: Any = None
        self.writer: Any = None
        self.next_look = 0.0

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.__exit__(*error)
        if self.writer:
            self.writer.close()

    def on_start(self, run: Run) -> None:
        """Before the first step."""
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run.out / "tensorboard"), purge_step=run.epoch + 1)
        self.images_an_epoch = run.steps_an_epoch * run.images_a_step
        self.bar = Bar("", run.recipe.epochs * self.images_an_epoch, self.quiet, unit="images", tell=False).__enter__()
        self.bar.at(self._done(run))
        if 0 < run.epoch + run.step and run.epoch < run.recipe.epochs:
            self.bar.line(f"continuing in epoch {run.epoch + 1} after step {run.step}", only_plain=True)

    def _done(self, run: Run) -> int:
        return run.epoch * self.images_an_epoch + run.step * run.images_a_step

    def on_step(self, run: Run) -> None:
        """After each step."""
        if self.bar.bar is None or time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + self.REFRESH
        now = run.progress()
        words = f"loss {now['loss']:.4f}  accuracy {100 * now['train_accuracy']:.1f} %"
        words += f"  {now['images_per_second']:,.0f} images/s"
        self.bar.at(self._done(run), f"epoch {run.epoch + 1}/{run.recipe.epochs}", words)

    def on_epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """After each epoch."""
        self._log(run.epoch, row)
        self.bar.line(
            f"epoch {run.epoch}/{run.recipe.epochs}: loss {row['loss']:.4f}, accuracy {100 * row['train_accuracy']:.2f}"
            f" %, validation {100 * row['validation_accuracy']:.2f} %, {row['images_per_second']:,.0f} images/s, "
            f"{row['seconds']:.1f} s"
        )

    def on_diagnostics(self, run: Run, row: Mapping[str, float]) -> None:
        """After each epoch, if asked for."""
        self._log(run.epoch, {f"diagnostics/{name}": value for name, value in row.items() if name != "epoch"})

    def _log(self, epoch: int, row: Mapping[str, float]) -> None:
        if self.writer:
            for name, value in row.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, epoch)
