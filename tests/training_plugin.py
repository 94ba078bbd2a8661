"""For `--plugin` and for tests: models small enough to train in milliseconds, and deaths at a chosen step.

`OOD_FAST_TEST_SIGNAL=SIGKILL:2:3` sends this process that signal in epoch 2 before step 3 (from 1).
"""

from __future__ import annotations

import os
import signal

from torch import nn

from ood_fast import models
from ood_fast.training import loop


def without_norms(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    layers = [nn.Conv2d(in_channels, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, n_classes))


def with_dropout(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    layers = [nn.Conv2d(in_channels, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n_classes))


models.MODELS |= {
    "tiny": models._Model(without_norms, without_norms),
    "tiny_dropout": models._Model(with_dropout, with_dropout, convolutional=True),
}

if "OOD_FAST_TEST_SIGNAL" in os.environ:
    name, epoch, step = os.environ["OOD_FAST_TEST_SIGNAL"].split(":")
    train_step = loop.Run._train_step

    def train_step_or_die(run, x, y):
        if (run.epoch + 1, run.step + 1) == (int(epoch), int(step)):
            os.kill(os.getpid(), getattr(signal, name))
        train_step(run, x, y)

    loop.Run._train_step = train_step_or_die
