"""What the tests of the detectors share: a small model, and every registered detector made for small data."""

from __future__ import annotations

import torch
from torch import nn

from ood_fast import detectors
from ood_fast.detectors import Detector

N, C, M = 40, 5, 12


def sizes(k: int, dim: int, fraction: float = 1.0) -> dict[str, dict]:
    """Settings of the detectors whose defaults are too large for small data, by name."""
    return {
        "KNN": {"k": k},
        "CombOOD": {"k": k},
        "NNGuide": {"k": k, "fraction": fraction},
        **{name: {"dim": dim} for name in ("ViM", "Residual", "NECO")},
    }


# Of these tests; every other detector is made with its defaults. Classes along five axes leave no residual in five
# dimensions, and a twentieth of twelve features is one, and a
# class has few samples beside its tail; NAC's alpha goes with the size of features and weights.
SETTINGS = {
    **sizes(k=7, dim=4),
    "Residual": {"dim": 5},
    "LTS": {"p": 65.0},
    "OpenMax": {"tail": 3},
    "NAC": {"alpha": 10.0},
}


def make(name: str) -> Detector:
    return detectors.create(name, **SETTINGS.get(name, {}))


# Every detector that scores features and logits; the one that scores inputs (ODIN) has a file of its own.
NAMES = tuple(name for name in detectors.known() if not detectors.find(name).needs_model)
FITTED = tuple(name for name in NAMES if make(name).needs_fit)
HEADED = tuple(name for name in FITTED if detectors.find(name).needs_head)
IN_FLOAT64 = ("MCM", "TemperatureScaling", "TemperedMSP")  # whose scores would tie in float32
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
