"""A model and image files, as the options of `fit` and `score` name them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import RunError, refusal

if TYPE_CHECKING:
    pass


def add_options(parser: argparse.ArgumentParser, remembered: bool = False) -> None:
    """What says which model looks at which images, and how they are prepared; `remembered`: by the detectors' file."""
    group = parser.add_argument_group(
        "model and images",
        "Needed only where it differs from what --detectors remembers of `ood-fast fit`." if remembered else None,
    )
    own = "as fitted" if remembered else "the model's own"
    resize = f"{own}, size · 8/7 if --size is given"
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a model of ood_fast (resnet18_32x32, resnet50, ...), timm:NAME, or MODULE:CALLABLE",
    )
    group.add_argument("--checkpoint", metavar="FILE", help="its weights: a state_dict or safetensors")
    group.add_argument("--pretrained", action="store_true", help="its weights: those that were published with it")
    group.add_argument("--head", metavar="LAYER", help="name of the layer that makes the logits, if it is not found")
    group.add_argument(
        "--n-classes", type=int, metavar="N", help="number of classes (default: of the checkpoint's head)"
    )
    group.add_argument("--size", type=int, metavar="PIXELS", help=f"images are cropped to this square (default: {own})")
    group.add_argument(
        "--resize", type=int, metavar="PIXELS", help=f"after their short side got this length (default: {resize})"
    )
    group.add_argument(
        "--mean", metavar="A,B,C", help=f"of the normalisation, a number for each channel (default: {own})"
    )
    group.add_argument(
        "--std", metavar="A,B,C", help=f"of the normalisation, a number for each channel (default: {own})"
    )
    group.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic", "nearest", "lanczos"),
        help=f"of the resizing (default: {own})",
    )
    group.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="loading processes"
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")


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

        names = ("resize", "size", "mean", "std", "interpolation")
        transform = preparation(*(prepared[name] for name in names))
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
