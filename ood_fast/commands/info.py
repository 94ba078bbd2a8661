"""`ood-fast info`: versions, devices, and what is available."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import detectors, ops
from ..recipes import DETECTORS, METHODS
from .common import machine, versions


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    devices = ["cpu"]
    devices += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    names = [*DETECTORS, *(name for name in detectors.known() if name not in DETECTORS)]
    lines = {
        **versions(),
        "location": str(Path(__file__).parents[1]),
        "machine": ", ".join(machine().values()),
        "devices": ", ".join(devices),
        "backend": ", ".join(_backend(device.split()[0]) for device in devices),
        "losses": ", ".join(METHODS),
        "detectors": ", ".join(names),
    }
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:<{width}}  {value}")


def _backend(device: str) -> str:
    try:
        return f"{device}: {ops.backend_name(device)}"
    except RuntimeError as error:  # the backend that was asked for does not run there
        return f"{device}: none ({error})"
