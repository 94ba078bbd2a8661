"""A model and image files, as the options of `fit` and `score` name them."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import RunError, refusal

if TYPE_CHECKING:
    from torch import nn

    from ..data.images import Files, ImageDataset

SAMPLED = 256  # images that decide between two orders of the classes
LISTED = 12  # classes in a message


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
    group.add_argument(
        "--orientation",
        choices=("exif", "stored"),
        help="turn images as their EXIF data says, or take them as stored, as torchvision does (default: "
        + ("as fitted)" if remembered else "exif)"),
    )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes in the order of the model's outputs: one a line, or JSON",
    )
    group.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="loading processes"
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")


def dataset_of(source: Files, prepared: dict[str, Any]) -> ImageDataset:
    """The images of `source`, prepared as `preparation_of` says."""
    from ..data.images import ImageDataset, preparation

    source.upright = prepared.get("orientation", "exif") == "exif"
    names = ("resize", "size", "mean", "std", "interpolation")
    return ImageDataset(source, preparation(*(prepared[name] for name in names)))


class Images:
    """Batches (x, y, positions, paths) of image files, in their order; y is None for images without classes.

    A file that is no image is reported with its path. It ends the run, or is left out and counted with `skip_bad`.
    """

    def __init__(
        self,
        source: Files,
        prepared: dict[str, Any],
        rows: range,
        options: argparse.Namespace,
        on_batch: Callable[[int], None] = lambda n: None,
        on_bad: Callable[[int, str], None] = lambda index, path: None,
    ) -> None:
        self.dataset = dataset_of(source, prepared)
        if source.left_out and not options.quiet:
            print(f"ood-fast: {source.left_out}", file=sys.stderr, flush=True)
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


def read_images(data: str | Sequence[str], with_classes: bool = False, classes: Sequence[str] | None = None) -> Files:
    """The image files that `data` names.

    One folder: those below it, with a class for each of its folders if there are any and `with_classes` asks; `classes`
    is their order. Else files, folders, patterns and "-", a list on stdin, in this order and without classes.
    """
    from ..data import folders
    from ..data.images import NO_CLASS, Files

    data = [data] if isinstance(data, str) else data
    folder = Path(data[0]).expanduser()
    if len(data) == 1 and folder.is_dir():
        if with_classes and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
            expected = "a folder of images for each class"
            return folders.read_image_folder(folder, str(folder), expected, classes, all_of_them=classes is None)
        return folders.read_flat_folder(folder, str(folder), "expected images")
    if with_classes:
        raise refusal(f"no folder {' '.join(data)}")
    names: list[str] = []
    left_out: list[str] = []
    for item in data:
        for path in _on_stdin() if item == "-" else [os.path.expanduser(item)]:
            _add(path, names, left_out)
    if not names:
        raise refusal(f"--data {' '.join(data)}: no images there{'; ' if left_out else ''}{'; '.join(left_out)}")
    return Files(Path(), names, [NO_CLASS] * len(names), left_out="; ".join(left_out))


def _add(path: str, names: list[str], left_out: list[str]) -> None:
    """The images of one file, folder or pattern. A file that is named is taken whatever it is called."""
    from ..data import decoding, folders

    if os.path.isdir(path):
        found = folders.read_flat_folder(Path(path), path, "expected images")
        names += [found.path(index) for index in range(len(found))]
        left_out += [found.left_out] if found.left_out else []
    elif os.path.lexists(path):
        names.append(path)
    elif glob.has_magic(path):
        matching = [file for file in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(file)]
        known = decoding.suffixes()
        images = [file for file in matching if os.path.isfile(file) and os.path.splitext(file)[1].lower() in known]
        if not images:
            raise refusal(f"--data {path}: no image matches the pattern")
        names += images
        if others := sorted(set(matching) - set(images)):
            left_out.append(f"{len(others)} that match {path} left out ({others[0]}{', ...' if others[1:] else ''})")
    else:
        raise refusal(f"--data {path}: no such file or folder")


def _on_stdin() -> list[str]:
    """The paths on stdin, one a line, or ended by NUL as `find -print0` does."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise refusal("--data -: the processes of torchrun do not share stdin; write the list's images into a folder")
    content = sys.stdin.buffer.read()
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise refusal("--data -: got no path on stdin")
    for number, path in enumerate(paths, start=1):
        if not os.path.lexists(path):
            raise refusal(f"--data -, path {number}: {path}: no such file")
    return paths


# ---- the order of the classes


def class_order(model: nn.Module, source: Files, prepared: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """The names of the class folders in the order of the model's outputs.

    Those of `--classes`; else the labels that the model itself names, if the folders are called alike; else the order
    of the names, or the natural one (2 before 10, apple before Zebra) where the predictions of some images say that the
    model was trained with it.
    """
    from ..data import folders

    if options.classes is not None:
        return folders.class_names(options.classes)
    names, own = list(source.classes), _own_labels(model)
    if own is not None and set(names) <= set(own):
        return own
    natural = sorted(names, key=folders.natural)
    if natural == names:
        return names
    predicted, labels = _some_predictions(model, source, prepared)
    pairs = [(guess, names[label], label) for guess, label in zip(predicted, labels, strict=True)]
    by_name = sum(guess == label for guess, _, label in pairs)
    by_nature = sum(guess < len(names) and natural[guess] == name for guess, name, _ in pairs)
    if not by_name < len(pairs) / 2 < by_nature:
        return names
    if not options.quiet:
        more = ", ..." if len(names) > LISTED else ""
        print(
            f"ood-fast: classes in their natural order, {', '.join(natural[:LISTED])}{more}: {by_nature} of "
            f"{len(pairs)} images are predicted as their folder says, {by_name} in the order "
            f"{', '.join(names[:LISTED])}{more}; --classes FILE sets another",
            file=sys.stderr,
        )
    return natural


def _own_labels(model: nn.Module) -> list[str] | None:
    """What the configuration of a Hugging Face or timm model calls its outputs, if it does."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, dict) and set(named) == set(range(len(named))):
        labels = [named[index] for index in range(len(named))]
        if labels != [f"LABEL_{index}" for index in range(len(named))]:
            return labels
    config = getattr(model, "pretrained_cfg", None)
    labels = config.get("label_names") if isinstance(config, dict) else None
    return None if labels is None else list(labels)


def _some_predictions(model: nn.Module, source: Files, prepared: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(predicted, labels) of at most `SAMPLED` images from all over the data that can be read."""
    import torch

    from ..checks import UserError

    dataset = dataset_of(source, prepared)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    predicted, labels = [], []
    for index in range(0, len(dataset), max(1, -(-len(dataset) // SAMPLED))):
        try:
            x, label = dataset[index]
            with torch.no_grad():
                logits = model(x[None].to(device))
        except (UserError, RuntimeError):  # the pass over the data tells it
            continue
        if isinstance(logits, torch.Tensor) and logits.dim() == 2:
            predicted.append(int(logits.argmax()))
            labels.append(label)
    return predicted, labels
