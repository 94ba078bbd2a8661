"""For `--plugin` in a process of its own: the tiny models, and deaths at a chosen step.

`OOD_FAST_TEST_SIGNAL=SIGKILL:2:3` sends the process of the highest rank that signal in epoch 2 before step 3 (from 1),
`SIGTERM:2:validation` before the validation of epoch 2.
With `OOD_FAST_TEST_WEIGHTS` each rank leaves its weights in the folder of the run. `OOD_FAST_TEST_DOWNLOAD=70:40` is
the network that CIFAR-10 comes from, with so many images, and notes who asked.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from tiny_models import TINY

from ood_fast import models
from ood_fast.training import loop

models.MODELS |= TINY

if "OOD_FAST_TEST_SIGNAL" in os.environ:
    name, epoch, step = os.environ["OOD_FAST_TEST_SIGNAL"].split(":")
    train_step, accuracy = loop.Run._train_step, loop.Run._accuracy

    def die_at(run, here):
        if (run.rank, run.epoch + 1, str(here)) == (run.n_processes - 1, int(epoch), step):
            os.kill(os.getpid(), getattr(signal, name))

    def train_step_or_die(run, x, y):
        die_at(run, run.step + 1)
        train_step(run, x, y)

    def accuracy_or_die(run, dataset):
        die_at(run, "validation")
        return accuracy(run, dataset)

    loop.Run._train_step, loop.Run._accuracy = train_step_or_die, accuracy_or_die

if "OOD_FAST_TEST_WEIGHTS" in os.environ:
    train = loop.Run.train

    def train_and_tell(run):
        train(run)
        torch.save(run.model.state_dict(), run.out / f"weights of rank {run.rank}.pt")

    loop.Run.train = train_and_tell

if "OOD_FAST_TEST_DOWNLOAD" in os.environ:
    import torchvision
    from test_data import write_cifar10

    def download(root, **_):
        write_cifar10(Path(root), *map(int, os.environ["OOD_FAST_TEST_DOWNLOAD"].split(":")))
        with open(Path(root, "asked"), "a") as file:
            file.write(f"rank {os.environ['RANK']}\n")

    torchvision.datasets.CIFAR10 = download
