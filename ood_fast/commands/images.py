"""A model and image files, as the options of `fit` and `score` name them."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import RunError, refusal

if TYPE_CHECKING:
    from torch import nn

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def add_options(parser: argparse.ArgumentParser, remembered: bool = False) -> None:
    """What says which model looks at which images, and how they are prepared; `remembered`: by the detectors' file."""
    group = parser.add_argument_group(
        "model and images",
        "Needed only where it differs from what --detectors remembers of `ood-fast fit`." if remembered else None,
    )
    size, norm = ("as fitted",) * 2 if remembered else ("224", "ImageNet's")
    resize = "as fitted, size · 8/7 if --size is given" if remembered else "size · 8/7"
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a model of ood_fast (resnet18_32x32, resnet50, ...), timm:NAME, or MODULE:CALLABLE",
    )
    group.add_argument("--checkpoint", metavar="FILE", help="its weights: a state_dict or safetensors")
    group.add_argument("--head", metavar="LAYER", help="name of the layer that makes the logits, if it is not found")
    group.add_argument(
        "--n-classes", type=int, metavar="N", help="number of classes (default: of the checkpoint's head)"
    )
    group.add_argument(
        "--size", type=int, metavar="PIXELS", help=f"images are cropped to this square (default: {size})"
    )
    group.add_argument(
        "--resize", type=int, metavar="PIXELS", help=f"after their short side got this length (default: {resize})"
    )
    group.add_argument("--mean", metavar="R,G,B", help=f"of the normalisation (default: {norm})")
    group.add_argument("--std", metavar="R,G,B", help=f"of the normalisation (default: {norm})")
    group.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="loading processes"
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")


def preparation_of(options: argparse.Namespace, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """size, resize, mean, std: as given, else as `kept` with the detectors, else ImageNet's."""
    kept = kept or {}
    size = options.size or kept.get("size", 224)
    resize = options.resize or (size * 8 // 7 if options.size else kept.get("resize", size * 8 // 7))
    if size < 1 or resize < size:
        raise refusal(f"--size, --resize: got {size} and {resize}, expected 1 <= size <= resize")
    numbers = {name: _three(name, getattr(options, name)) or tuple(kept.get(name, IMAGENET[name])) for name in IMAGENET}
    return {"size": size, "resize": resize, **numbers}


def _three(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise refusal(f"--{name}: got {text!r}, expected three numbers as in 0.485,0.456,0.406")
    return numbers


def load_model(options: argparse.Namespace, n_classes: int | None, device: str) -> nn.Module:
    """The model of `--model` with the weights of `--checkpoint`, in eval mode on `device`."""
    import torch
    from torch import nn

    from .. import models
    from ..models import checkpoints

    if options.model is None:
        raise refusal("--model: got none, expected the model whose features the detectors read; or pass --features")
    of_checkpoint = None if options.checkpoint is None else checkpoints.n_classes_of(options.checkpoint)
    n_classes = options.n_classes or of_checkpoint or n_classes
    if ":" in options.model and not options.model.startswith(models.TIMM):
        model = _call(options.model)
        if not isinstance(model, nn.Module):
            raise refusal(f"--model {options.model}: gave a {type(model).__name__}, expected an nn.Module")
    else:
        if n_classes is None:
            raise refusal("--n-classes: give the number of classes, it follows from nothing else here")
        pretrained = options.checkpoint is None and n_classes == 1000
        model = models.create(options.model, n_classes, pretrained=pretrained)
    if options.checkpoint is not None:
        models.load_checkpoint(model, options.checkpoint)
    elif n_classes != 1000 and ":" not in options.model:
        raise refusal(f"--checkpoint: needed, there are no trained weights of {options.model} for {n_classes} classes")
    return model.to(torch.device(device)).eval()


def _call(path: str) -> Any:
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise refusal(f"--model {path}: {error}; expected MODULE:CALLABLE, as in mymodels:build") from error
    return found()


class Images:
    """Batches (x, y, positions, paths) of image files, in their order; y is None for images without classes.

    A file that is no image is reported with its path. It ends the run, or is left out and counted with `skip_bad`.
    """

    def __init__(
        self,
        source: Any,
        prepared: dict[str, Any],
        rows: range,
        options: argparse.Namespace,
        on_batch: Callable[[int], None] = lambda n: None,
        on_bad: Callable[[int, str], None] = lambda index, path: None,
    ) -> None:
        from ..data.images import ImageDataset, preparation

        transform = preparation(prepared["resize"], prepared["size"], prepared["mean"], prepared["std"])
        self.dataset = ImageDataset(source, transform)
        self.rows, self.options, self.on_batch, self.on_bad = rows, options, on_batch, on_bad

    def __iter__(self) -> Iterator[tuple]:
        import torch

        loader = torch.utils.data.DataLoader(
            _Tolerant(self.dataset, self.rows),
            batch_size=self.options.batch_size,
            num_workers=self.options.workers,
            collate_fn=_joined,
        )
        has_classes = self.dataset.source.classes is not None
        for x, y, indices, bad in loader:
            for index, reason in bad:
                self._report(index, reason)
            if indices:
                yield x, y if has_classes else None, indices, [self.dataset.path(index) for index in indices]
            self.on_batch(len(indices) + len(bad))

    def _report(self, index: int, reason: str) -> None:
        if not self.options.skip_bad:
            raise RunError(f"{reason}; pass --skip-bad to leave such images out")
        print(f"ood-fast: skipped {reason}", file=sys.stderr, flush=True)
        self.on_bad(index, self.dataset.path(index))


class _Tolerant:
    """A data set whose unreadable images are items too: a worker that raises would end the whole loader."""

    def __init__(self, dataset: Any, rows: range) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple:
        from ..checks import UserError

        if position >= len(self.rows):
            raise IndexError(position)
        index = self.rows[position]
        try:
            return (*self.dataset[index], index, None)
        except UserError as error:
            return None, None, index, str(error)


def _joined(items: list[tuple]) -> tuple:
    import torch

    good = [item for item in items if item[3] is None]
    bad = [(index, reason) for _, _, index, reason in items if reason is not None]
    x = torch.stack([item[0] for item in good]) if good else torch.empty(0)
    y = torch.tensor([item[1] for item in good], dtype=torch.int64)
    return x, y, [item[2] for item in good], bad


def read_folder(path: str, with_classes: bool) -> Any:
    """The image files below a folder; with a class for each of its folders if there are any and they are asked for."""
    from ..data import readers

    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise refusal(f"no folder {folder}")
    if with_classes and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        return readers.read_image_folder(folder, str(folder), "a folder of images for each class")
    return readers.read_flat_folder(folder, str(folder), "expected images")
