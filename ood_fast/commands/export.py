"""`ood-fast export`: a model with its detectors as one ONNX file, and a JSON that says how to use it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks, onnx_export
from ..checks import UserError
from ..deployment import deploy
from . import RunError, images
from .code import import_plugins
from .model import cannot_take, fitted, text_of
from .parsers import N_EXPORTED


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    onnx_export.require_onnx()
    out = _checked_out(options)
    import_plugins(options)
    model, detectors, prepared = fitted(options)
    try:
        each = [detector for _, detector in detectors.items()]
        deployed = deploy(model, detectors if len(each) > 1 else each[0], options.head)
        told = prepared | {"where": "before the file, then divided by 255"}
        described = {"model": options.model, "preparation": told, "command": command}
        rows = _rows(options, prepared)
        said = onnx_export.write(deployed, out, rows, prepared["mean"], prepared["std"], described)
    except UserError:
        raise
    except onnx_export.ExportError as error:
        raise RunError(str(error)) from error
    except RuntimeError as error:  # what the model says of the images
        raise RunError(cannot_take(prepared, error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if not options.quiet:
        thresholds = ", ".join(f"{name} {each['threshold']:.6g}" for name, each in said["detectors"].items())
        print(f"{out}: images {tuple(rows.shape[1:])} in [0, 1], prepared before: {text_of(prepared)}")
        print(f"  thresholds: {thresholds}; onnxruntime agrees with PyTorch on {len(rows)} images")
        print(f"  {out.with_suffix('.json')} says the rest")


def _checked_out(options: argparse.Namespace) -> Path:
    out = Path(options.out).expanduser()
    if out.suffix != ".onnx":
        raise UserError(f"--out: got {out}, expected a name ending in .onnx")
    checks.writable_folder("--out", out.parent)
    for file in (out, out.with_suffix(".json")):
        if file.is_dir() or (file.exists() and not options.overwrite):
            raise UserError(f"--out: {file} exists; pass --overwrite to replace it")
    return out


def _rows(options: argparse.Namespace, prepared: dict[str, Any]) -> Tensor:
    """Images in [0, 1], (n, channels, size, size), as they are before the normalisation."""
    n_channels = len(prepared["mean"])
    if options.data is None:
        shape = (N_EXPORTED, n_channels, prepared["size"], prepared["size"])
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))
    plain = prepared | {"mean": (0.0,) * n_channels, "std": (1.0,) * n_channels}
    dataset = images.dataset_of(images.read_images(options.data), plain)
    if len(dataset) < 2:
        raise UserError(f"--data {options.data}: got {len(dataset)} image, expected at least 2")
    return torch.stack([dataset[i][0] for i in range(0, len(dataset), -(-len(dataset) // N_EXPORTED))])
