"""`ood-fast export`: a model with its detectors as one ONNX file, and a JSON that says how to use it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import images
from .code import import_plugins
from .common import RunError, refusal
from .model import cannot_take, fitted, text_of
from .options import share

if TYPE_CHECKING:
    from torch import Tensor

N_CHECKED = 16  # images


def add(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "export",
        help="write a model with its detectors as one ONNX file",
        description="Write a model and the detectors that were fitted on it as one ONNX file, which runs without this "
        "package: images in [0, 1] in; logits, score and is_ood out. The normalisation is inside, the threshold an "
        "input that may be left out. A JSON beside the file says the size and range of images, classes, detectors and "
        "thresholds. Both are written after onnxruntime gave the same numbers as PyTorch.",
        examples=(
            "ood-fast export detectors.safetensors --detectors NCI --data photos/ --out model.onnx",
            "ood-fast export detectors.safetensors --model resnet50 --pretrained --out model.onnx",
        ),
    )
    parser.add_argument("file", metavar="DETECTORS", help="what `ood-fast fit` wrote, with thresholds (--validation)")
    parser.add_argument("--out", required=True, metavar="FILE", help="what to write, as in model.onnx")
    parser.add_argument("--detectors", metavar="A,B", help="only these of the file (default: all)")
    parser.add_argument(
        "--data", metavar="PATH", help=f"images of which {N_CHECKED} are compared (default: noise, where any will do)"
    )
    share(parser, "overwrite", "other-model", overwrite="replace --out and its JSON")
    group = parser.add_argument_group("model and images", "Needed only where it differs from what DETECTORS remembers.")
    images.add_model(group, remembered=True)
    share(parser, "plugin", "quiet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    from .. import onnx_export
    from ..checks import UserError
    from ..deployment import deploy

    onnx_export.require_onnx()
    out = _checked_out(options)
    import_plugins(options.plugin)
    model, detectors, prepared = fitted(options)
    try:
        each = [detector for _, detector in detectors.items()]
        deployed = deploy(model, detectors if len(each) > 1 else each[0], options.head)
        described = {
            "model": options.model,
            "preparation": prepared | {"where": "before the file, then divided by 255"},
        }
        described["command"] = command
        rows = _rows(options, prepared)
        said = onnx_export.write(deployed, out, rows, prepared["mean"], prepared["std"], described)
    except UserError:
        raise
    except onnx_export.ExportError as error:
        raise RunError(str(error)) from error
    except RuntimeError as error:  # what the model says of the images
        raise RunError(cannot_take(prepared, error)) from error
    except ValueError as error:
        raise refusal(str(error)) from error
    if not options.quiet:
        thresholds = ", ".join(f"{name} {each['threshold']:.6g}" for name, each in said["detectors"].items())
        print(f"{out}: images {tuple(rows.shape[1:])} in [0, 1], prepared before: {text_of(prepared)}")
        print(f"  thresholds: {thresholds}; onnxruntime agrees with PyTorch on {len(rows)} images")
        print(f"  {out.with_suffix('.json')} says the rest")


def _checked_out(options: argparse.Namespace) -> Path:
    from .. import checks

    out = Path(options.out).expanduser()
    if out.suffix != ".onnx":
        raise refusal(f"--out: got {out}, expected a name ending in .onnx")
    checks.writable_folder("--out", out.parent)
    for file in (out, out.with_suffix(".json")):
        if file.is_dir() or (file.exists() and not options.overwrite):
            raise refusal(f"--out: {file} exists; pass --overwrite to replace it")
    return out


def _rows(options: argparse.Namespace, prepared: dict[str, Any]) -> Tensor:
    """Images in [0, 1], (n, channels, size, size), as they are before the normalisation."""
    import torch

    n_channels = len(prepared["mean"])
    if options.data is None:
        shape = (N_CHECKED, n_channels, prepared["size"], prepared["size"])
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))
    plain = prepared | {"mean": (0.0,) * n_channels, "std": (1.0,) * n_channels}
    dataset = images.dataset_of(images.read_images(options.data), plain)
    if len(dataset) < 2:
        raise refusal(f"--data {options.data}: got {len(dataset)} image, expected at least 2")
    return torch.stack([dataset[i][0] for i in range(0, len(dataset), -(-len(dataset) // N_CHECKED))])
