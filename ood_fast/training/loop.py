"""The training loop: one process or many, interrupted and continued without a trace in the weights.

What a step computes depends on the weights, the optimiser, the random state and (seed, epoch, step, rank): the first
three are in a checkpoint, the last is its position. On the CPU, a run that was continued ends in the same bits.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import random
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from .. import checks, models, recipes
from ..data.images import mixed
from ..data.loading import batched
from ..eager.precision import has_float64
from ..processes import Processes
from .build import model_of, objective_of, optimizer_of
from .folder import BEST, COMPLETE, DIAGNOSTICS, EPOCHS, FINAL, LAST, LOG, RunFolder, describe
from .mixing import Mixing
from .objective import StepBatch, n_correct, of_step
from .options import DivergedError, Interrupted, RunOptions, Watcher, status_of
from .order import Batches
from .randomness import convolutions_timed, random_state, random_state_kept, set_random_state
from .schedules import learning_rate
from .signals import Signals, leave_signals_to_the_trainer

if TYPE_CHECKING:
    from ..data import ImageBenchmark

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_EVERY = 50  # steps between looks at the loss on a GPU, each of which waits for it; the CPU looks at every step
NEVER = 2**62  # the step of a loss that was not finite, while all were
DIAGNOSED_IMAGES = 50_000  # of training, at most, evenly over the set: diagnostics run on one process while others wait


class Run:
    """One training run, in a folder of its own; `train()` begins or continues it.

    Under an initialised `torch.distributed`, one of its processes: DistributedDataParallel, `recipe.batch_size` images
    on each. Rank 0 alone reads and writes the folder.

    Args:
        recipe: what to train, see `recipes.TrainingRecipe`; `recipes.find(name)`.
        benchmark: the images, of `data.open_benchmark`.
        out: the folder, see `folder.py` for the files.
        seed: of the first weights, the order of the images, mixing and dropout. Augmentation has that of `benchmark`.
        options: the keywords of `RunOptions`.

    Attributes:
        model: the model without wrappers. epoch, step: how many are complete, the steps of the epoch at hand.
        history: rows of log.csv. best: epoch and validation accuracy of best.ckpt.

    Raises:
        UserError: `out` cannot be used, or holds something else; an option that the device or the model does not have.
    """

    def __init__(
        self,
        recipe: recipes.TrainingRecipe,
        benchmark: ImageBenchmark,
        out: str | os.PathLike[str],
        seed: int = 0,
        **options: Any,
    ) -> None:
        checks.instance("recipe", recipe, recipes.TrainingRecipe, "a TrainingRecipe, as recipes.find(name) gives")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise checks.UserError(f"seed: got {seed!r}, expected a number that is not negative")
        self.options = RunOptions(**options)
        self.recipe, self.benchmark, self.seed = recipe, benchmark, seed
        self.folder, self.device = RunFolder(out), torch.device(self.options.device)
        self.diagnose = None
        if self.options.diagnostics:
            from ..diagnostics import epoch_diagnostics  # here: it brings the detectors along

            self.diagnose = epoch_diagnostics
            _ = benchmark.fit, benchmark.validation_ood  # now: not after an epoch is it told that they are missing
        self.watcher = self.options.watcher or Watcher()
        self.processes = Processes.joined()
        self.rank, self.n_processes = self.processes.rank, self.processes.size
        self.batches = Batches(len(benchmark.train), recipe.batch_size, seed, self.rank, self.n_processes)
        self._loading = torch.zeros((), dtype=torch.bool, device="cpu").share_memory_()  # read by workers
        self.epoch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.diagnosed: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self._unsaved_best: nn.Module | Mapping[str, Any] | None = None
        self.loaders: list[Iterable[Any]] = []  # while it trains

    # ---- from the outside

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.folder.path

    @property
    def steps_an_epoch(self) -> int:
        """Steps of each process."""
        return self.batches.steps_an_epoch

    @property
    def images_a_step(self) -> int:
        """Of all processes."""
        return self.batches.batch_size * self.n_processes

    @property
    def finished(self) -> bool:
        """Whether the folder holds this run, trained to its end."""
        return self.folder.finished(describe(self, "new"))

    def progress(self) -> dict[str, float]:
        """Loss and training accuracy (of this process) and images/s (of all) in the epoch at hand, so far."""
        loss, correct = self._sums.tolist()
        seconds = self._seconds + time.perf_counter() - self._since
        n_images = self.step * self.images_a_step
        return {
            "loss": loss / max(self.step, 1),
            "train_accuracy": correct / max(self.step * self.batches.batch_size, 1),
            "images_per_second": n_images / max(seconds, 1e-9),
        }

    def train(self) -> None:
        """Train to the last epoch.

        SIGTERM and SIGINT are taken at the next step or batch of the validation: the run is saved and `Interrupted`
        raised; a second SIGINT is a KeyboardInterrupt at once.

        Raises:
            UserError: see the class; an image cannot be read.
            DivergedError: the loss is not finite; the checkpoints before it are kept.
            Interrupted. OSError: a file cannot be written; the one before it is kept.
        """
        with ExitStack() as owning, random_state_kept(self.device), convolutions_timed(), Signals() as self._signals:
            state = self._claim(owning)
            self._build(state)
            if self.rank == 0:
                self._write_tables()
                self.watcher.on_start(self)
            self._loading.fill_(True)
            try:
                while self.epoch < self.recipe.epochs:
                    self._train_epoch()
            except BaseException as error:
                with suppress(OSError):  # a full disk must not hide the reason
                    self._write_status(status_of(error))
                    if self.rank == 0:
                        self.folder.write_table(LOG, self.history)  # of the epochs since the last save, too
                raise
            finally:
                self._loading.fill_(False)
                self.loaders = []  # their workers live as long, or until the error that holds them is handled
                self.network = self.model  # without what the objective put around it
            if self.rank == 0:
                self.folder.write_checkpoint(FINAL, self.model)
            self._write_status(COMPLETE)
            self.model.eval()

    # ---- before the first step

    def _claim(self, owning: ExitStack) -> dict[str, Any] | None:
        """The checkpoint to continue from; what rank 0 reads, or its error, reaches every process."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                owning.enter_context(self.folder.alone())  # until the training ends
                answer[0] = self.folder.claim(describe(self, "new"), self.options.resume)
            except checks.UserError as error:
                answer[1] = str(error)
        state: dict[str, Any] | None
        state, refusal = self.processes.first(answer)
        if refusal is not None:
            raise checks.UserError(refusal)
        return state

    def _build(self, state: dict[str, Any] | None) -> None:
        benchmark, recipe = self.benchmark, self.recipe
        torch.manual_seed(self.seed)
        pretrained = None if state is None else False  # weights that would be overwritten need no download
        self.model = model_of(recipe, benchmark.n_classes, benchmark.image_shape, pretrained)
        if state is None and recipe.init:
            models.load_checkpoint(self.model, recipe.init)
        if self.options.sync_bn:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self._format: dict[str, Any] = {"memory_format": torch.channels_last} if self.options.channels_last else {}
        self.model.to(self.device, **self._format)
        self.objective = objective_of(recipe, self.model).to(self.device)
        own = dict.fromkeys([*self.model.parameters(), *self.objective.parameters()])  # each once
        self.optimizer = optimizer_of(recipe, own)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.mixing = Mixing(recipe, benchmark.n_classes, self.seed)
        self.network = self.objective.around(self.model)  # as it is trained; `model` shares its parameters
        if self.n_processes > 1:
            devices = None if self.device.type == "cpu" else [self._index()]
            self.network = nn.parallel.DistributedDataParallel(self.network, device_ids=devices)
        if self.options.compile:
            compiled: Any = torch.compile(self.network)
            self.network = compiled
        self.sets = [(benchmark.train, self.batches)]
        for images in self.objective.images_beside(benchmark):
            size = 0 if self.objective.companion == "views" else recipe.outlier_batch_size
            self.sets.append((images, self.batches.beside(len(images), size or self.batches.batch_size)))
        lives_on = self.options.workers > 0
        self.loaders = [self._loader(images, batch_sampler=b, persistent_workers=lives_on) for images, b in self.sets]
        self._begin_epoch()
        self._saved = time.monotonic()
        if state is None:
            drawn = mixed(self.seed, self.rank, 1)  # no two processes draw the same dropout
            random.seed(drawn)
            np.random.seed(drawn)
            torch.manual_seed(drawn)
        else:
            self._restore(state)

    def _loader(self, dataset: Dataset[Any], **keywords: Any) -> Iterable[Any]:
        """Loads without a trace in the global random state: `generator` is where the seeds of workers come from."""
        return batched(
            dataset,
            num_workers=self.options.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=functools.partial(leave_signals_to_the_trainer, self._loading),
            generator=torch.Generator().manual_seed(mixed(self.seed, self.rank, 2)),
            **keywords,
        )

    # ---- an epoch

    def _begin_epoch(self) -> None:
        dtype = torch.float64 if has_float64(self.device) else torch.float32
        self._sums = torch.zeros(2, dtype=dtype, device=self.device)  # of the losses of steps, of correct images
        self._first_bad = torch.tensor(NEVER, device=self.device)
        self.step, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def _train_epoch(self) -> None:
        for images, batches in self.sets:
            getattr(images, "set_epoch", lambda epoch: None)(self.epoch)
            batches.epoch, batches.first_step = self.epoch, self.step
        self.network.train()
        self._since = time.perf_counter()
        for (x, y), *beside in zip(*self.loaders, strict=True):
            self._train_step(x, y, *(images for images, _ in beside))
            self.step += 1
            if self.rank == 0:
                self.watcher.on_step(self)
            if (self.device.type == "cpu" and self.n_processes == 1) or self.step % CHECK_EVERY == 0:
                self._check_finite()
            self._attend()
        self._check_finite()
        self._end_epoch()

    def _train_step(self, x: Tensor, y: Tensor, *beside: Tensor) -> None:
        x, *others = (images.to(self.device, non_blocking=True, **self._format) for images in (x, *beside))
        y = y.to(self.device, non_blocking=True)
        x, target = self.mixing(x, y, self.epoch, self.step, self.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.optimizer.zero_grad()
        with self._autocast():
            done = (self.epoch + self.step / self.steps_an_epoch) / self.recipe.epochs
            batch = StepBatch(x, target, next(iter(others), None), done)
            loss, logits = of_step(self.recipe.loss, self.objective.step(self.network, batch))
        self.scaler.scale(loss).backward()
        self.objective.average_gradients(self.n_processes)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            seen = loss.detach(), n_correct(logits, target)  # each by itself: in a loss's bfloat16, 257 is 256
            self._sums += torch.stack([value.to(self._sums) for value in seen])
            self._first_bad = torch.where(loss.isfinite(), self._first_bad, self._first_bad.clamp(max=self.step + 1))

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.recipe, self.epoch * self.steps_an_epoch + step, self.steps_an_epoch)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.recipe.amp)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def _end_epoch(self) -> None:
        loss, correct = self.processes.reduced(self._sums).tolist()  # waits for the GPU: the time is that of training
        seconds = self._seconds + time.perf_counter() - self._since
        n_images = self.steps_an_epoch * self.images_a_step
        self._share_buffers()
        row = {
            "epoch": self.epoch + 1,
            "learning_rate": self._learning_rate(self.step - 1),
            "loss": loss / (self.steps_an_epoch * self.n_processes),
            "train_accuracy": correct / n_images,
            "validation_accuracy": self._accuracy(self.benchmark.validation),
            "images_per_second": round(n_images / seconds, 1),
            "seconds": round(self._seconds + time.perf_counter() - self._since, 3),
        }
        self.history.append(row)
        self._diagnose()
        self.epoch += 1
        self._begin_epoch()
        accuracy = row["validation_accuracy"]
        improved = not accuracy < self.best.get("validation_accuracy", -math.inf)  # also without validation images
        soon = time.monotonic() - self._saved < self.options.epoch_seconds and self.n_processes == 1
        due = not soon or self.epoch == self.recipe.epochs
        if improved:
            self.best = {"epoch": self.epoch, "validation_accuracy": accuracy}
            self._unsaved_best = self.model if due else copy.deepcopy(self.model.state_dict())
        if self.rank == 0 and self.options.keep_every and self.epoch % self.options.keep_every == 0:
            self.folder.write_checkpoint(f"{EPOCHS}/{self.epoch:04d}.ckpt", self.model)
        if due:
            self._save()
        if self.rank == 0:
            if due:
                self._write_tables()
            self.watcher.on_epoch(self, row)
            if self.diagnose:
                self.watcher.on_diagnostics(self, self.diagnosed[-1])

    @torch.no_grad()
    def _accuracy(self, dataset: Any) -> float:
        """Of the model in evaluation mode; each process looks at its share. Signals are heard after each batch: where
        one stops the run, the epoch's steps are saved, and it goes on from here."""
        rows = self.processes.share(len(dataset))
        batch_size, done = self.recipe.batch_size, 0
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.eval()
        for done, (x, y) in enumerate(self._loader(Subset(dataset, rows), batch_size=batch_size), 1):  # noqa: B007
            with self._autocast():
                logits = self.model(x.to(self.device, non_blocking=True, **self._format))
            correct += n_correct(logits, y.to(self.device, non_blocking=True))
            self._attend()
        most = math.ceil(math.ceil(len(dataset) / self.n_processes) / batch_size)
        for _ in range(most - done):  # a share may be an image, and so a batch, smaller; all listen as often
            self._attend()
        return self.processes.reduced(correct).item() / len(dataset) if len(dataset) else math.nan

    def _diagnose(self) -> None:
        if not self.diagnose:
            return
        row: dict[str, float] = {}
        if self.rank == 0:
            fit = self.benchmark.fit
            stride = math.ceil(len(fit) / DIAGNOSED_IMAGES)
            sets = (Subset(fit, range(0, len(fit), stride)), self.benchmark.validation, self.benchmark.validation_ood)
            loaders = [self._loader(dataset, batch_size=self.recipe.batch_size) for dataset in sets]
            self.model.eval()
            with random_state_kept(self.device), torch.no_grad():
                row = {"epoch": self.epoch + 1, **self.diagnose(self.model, *loaders)}
        self.diagnosed.append(row)

    # ---- many processes

    def _index(self) -> int:
        device = self.device
        return torch.get_device_module(device).current_device() if device.index is None else device.index

    def _share_buffers(self) -> None:
        """Each process saw its own batches: the running means of rank 0 are the model's, as in the forward pass."""
        if self.n_processes > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def _check_finite(self) -> None:
        """DivergedError in every process if the loss of any was not finite; called at the same steps in each."""
        if (step := self.processes.reduced(self._first_bad, "MIN").item()) < NEVER:
            raise DivergedError(f"the training loss became NaN or infinite in epoch {self.epoch + 1} at step {step}")

    def _attend(self) -> None:
        """Save if it is time; save and stop if a signal has come to any of the processes."""
        due = self.options.save_minutes is not None and time.monotonic() - self._saved > 60 * self.options.save_minutes
        wishes = [self._signals.received, int(due and self.rank == 0)]
        signum, save = self.processes.reduced(torch.tensor(wishes), "MAX").tolist()  # on the host: no GPU waits for it
        if not (signum or save):
            return
        self._check_finite()
        self._save()
        if signum:
            raise Interrupted(signum, self.epoch + 1, self.step)

    # ---- state

    def _save(self) -> None:
        """Write `last.ckpt`; returns in every process when it is on the disk."""
        now = time.perf_counter()
        own: dict[str, Any] = {"random": random_state(self.device), "sums": self._sums.cpu()}
        own["objective"] = {name: value.cpu() for name, value in self.objective.state_dict().items()}
        of_ranks = self.processes.everyone(own)
        if self.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "seconds": self._seconds + (now - self._since if self.step else 0.0),
                "history": self.history,
                "diagnostics": self.diagnosed,
                "best": self.best,
                "ranks": of_ranks,
            }
            # Before `last`: killed in between, the epochs since are trained again, and this one is written again.
            if self._unsaved_best is not None:
                self.folder.write_checkpoint(BEST, self._unsaved_best)
                self._unsaved_best = None
            self.folder.write_checkpoint(LAST, state)
        if self.n_processes > 1:
            dist.barrier()
        self._saved = time.monotonic()

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self._seconds = state["epoch"], state["step"], state["seconds"]
        self.history, self.diagnosed, self.best = state["history"], state["diagnostics"], state["best"]
        own = state["ranks"][self.rank]
        self._sums.copy_(own["sums"])
        self.objective.load_state_dict(own.get("objective", {}))
        set_random_state(own["random"], self.device)

    def _write_tables(self) -> None:
        self._write_status("running")  # first: a folder without run.json is not taken for a run
        self.folder.write_table(LOG, self.history)
        if self.diagnose:
            self.folder.write_table(DIAGNOSTICS, self.diagnosed)

    def _write_status(self, status: str) -> None:
        if self.rank == 0:
            self.folder.write_info(describe(self, status))
