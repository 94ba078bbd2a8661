"""What the tests of the detectors share: a small model, and every registered detector made for small data."""

from __future__ import annotations

import torch
from torch import nn

from ood_fast import detectors
from ood_fast.detectors import Detector

N, C, M = 40, 5, 12
# What the small data of these tests asks for; every other detector is made with its defaults.
SETTINGS = {
    "KNN": {"k": 7},
    "NNGuide": {"k": 7, "fraction": 1.0},
    "ViM": {"dim": 4},
    "NECO": {"dim": 4},
}


def make(name: str) -> Detector:
    return detectors.create(name, **SETTINGS.get(name, {}))


# Every detector that scores features and logits; the one that scores inputs (ODIN) has a file of its own.
NAMES = tuple(name for name in detectors.known() if not detectors.find(name).needs_model)
FITTED = tuple(name for name in NAMES if make(name).needs_fit)
HEADED = tuple(name for name in FITTED if detectors.find(name).needs_head)
GATHERING = tuple(name for name in FITTED if make(name).gathers())


def classes_of(logits: torch.Tensor) -> torch.Tensor:
    """Targets with every class among them, three quarters predicted right."""
    targets = logits.argmax(dim=1)
    targets[::4] = torch.arange(len(targets[::4])) % C
    return targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, M), nn.BatchNorm1d(M), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(M, C)

    def forward(self, x):
        return self.fc(self.backbone(x))
