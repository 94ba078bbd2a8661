"""What the commands share: errors, devices, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util

from .. import __version__

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib", "rich")


class RunError(Exception):
    """The request was fine, but it could not be carried through: exit code 1."""


def refusal(message: str) -> Exception:
    """The request cannot be met as it was asked: exit code 2."""
    from ..checks import UserError

    return UserError(message)


def device(name: str) -> str:
    import torch

    from .. import ops

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(2, device=name).sum().item()  # a device without numbers (meta) fails here
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises each of them for some device
        raise refusal(f"--device: cannot use {name!r}, {_why_not(name)}; use --device cpu") from error
    try:
        ops.backend_name(torch.device(name))
    except RuntimeError as error:
        raise refusal(str(error)) from error
    return name


def _why_not(device: str) -> str:
    """In a few words; what torch says names drivers and every kind of device it knows."""
    import torch

    if device.partition(":")[0] == "cuda":
        n_devices = torch.cuda.device_count()
        return f"PyTorch finds {n_devices} such devices" if n_devices else "PyTorch finds no such GPU"
    try:
        torch.device(device)
    except RuntimeError:
        return "PyTorch knows no such device"
    return "PyTorch cannot compute on it here"


def require(package: str, module: str, command: str = "compare") -> None:
    if util.find_spec(module) is None:
        raise refusal(f"{command} needs {package}, which is not installed: pip install {package}")


def versions() -> dict[str, str]:
    found = {"ood_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str]:
    return {"system": f"{platform.system()} {platform.machine()}", "cpus": f"{os.cpu_count()} CPUs"}
