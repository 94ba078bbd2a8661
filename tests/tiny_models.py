"""Models small enough to train in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from ood_fast import models


def without_norms(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    layers = [nn.Conv2d(in_channels, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, n_classes))


def with_dropout(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    layers = [nn.Conv2d(in_channels, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n_classes))


TINY = {
    "tiny": models._Model(without_norms, without_norms),
    "tiny_dropout": models._Model(with_dropout, with_dropout, convolutional=True),
}


@contextmanager
def registered() -> Iterator[None]:
    """For the time of a test: other test modules find the package's own models alone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "MODELS", models.MODELS | TINY)
        yield
