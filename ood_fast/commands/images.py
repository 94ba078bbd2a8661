"""A model and image files, as the options of `fit` and `score` name them."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checks import ROW, RowError, UserError
from ..data import decoding, folders
from ..data.images import NO_CLASS, Files, ImageDataset, prepared_as
from ..data.loading import tolerant
from . import RunError
from .common import say


def dataset_of(source: Files, prepared: dict[str, Any]) -> ImageDataset:
    """The images of `source`, prepared as `preparation_of` says."""
    source.upright = prepared.get("orientation", "exif") == "exif"
    source.truncated = prepared.get("truncated") == "allow"
    return ImageDataset(source, prepared_as(prepared))


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
        on_bad: Callable[[int, Any], None] = lambda index, path: None,
    ) -> None:
        self.dataset = dataset_of(source, prepared)
        if source.left_out:
            say(options, f"ood-fast: {source.left_out}")
        self.rows, self.options, self.on_batch, self.on_bad = rows, options, on_batch, on_bad
        self.paths: list[str | None] = []  # of the last batch

    @contextmanager
    def named(self) -> Iterator[None]:
        """What is wrong with a row of the last batch names the image."""
        try:
            yield
        except RowError as error:
            raise ValueError(f"image {self.paths[error.in_batch]}: {error.text.replace(ROW, 'this one')}") from error

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        rows = torch.utils.data.Subset(self.dataset, self.rows)
        has_classes = self.dataset.source.classes is not None
        first = self.rows.start
        for batch, good, bad in tolerant(rows, self.options.batch_size, self.options.workers):
            for place, reason in bad:
                if not self.options.skip_bad:
                    raise RunError(f"{reason}; pass --skip-bad to leave such images out")
                print(f"ood-fast: skipped {reason}", file=sys.stderr, flush=True)
                self.on_bad(first + place, self.dataset.path(first + place))
            if good:
                indices = [first + place for place in good]
                self.paths = [self.dataset.path(i) for i in indices]
                yield batch[0], batch[1] if has_classes else None, indices, self.paths
            first += len(good) + len(bad)
            self.on_batch(len(good) + len(bad))


def read_images(data: str | Sequence[str], with_classes: bool = False, classes: Sequence[str] | None = None) -> Files:
    """The image files that `data` names.

    One folder: those below it, with a class for each of its folders if there are any and `with_classes` asks; `classes`
    is their order. Else files, folders, patterns and "-", a list on stdin, in this order and without classes.
    """

    data = [data] if isinstance(data, str) else data
    if "" in data:  # of a shell variable that is not set; it would mean the current folder
        raise UserError("--data: got an empty path, expected a folder or images")
    folder = Path(data[0]).expanduser()
    if len(data) == 1 and folder.is_dir():
        if with_classes and folders.folders_in(folder):
            expected = "a folder of images for each class"
            return folders.read_image_folder(folder, str(folder), expected, classes, all_of_them=classes is None)
        return folders.read_flat_folder(folder, str(folder), "expected images")
    if with_classes:
        raise UserError(f"no folder {' '.join(data)}")
    names: list[str] = []
    left_out: list[str] = []
    for item in data:
        for path in _on_stdin() if item == "-" else [os.path.expanduser(item)]:
            _add(path, names, left_out)
    if not names:
        raise UserError(f"--data {' '.join(data)}: no images there{'; ' if left_out else ''}{'; '.join(left_out)}")
    return Files(Path(), names, [NO_CLASS] * len(names), left_out="; ".join(left_out))


def _add(path: str, names: list[str], left_out: list[str]) -> None:
    """The images of one file, folder or pattern. A file that is named is taken whatever it is called."""
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
            raise UserError(f"--data {path}: no image matches the pattern")
        names += images
        if others := sorted(set(matching) - set(images)):
            left_out.append(f"{len(others)} that match {path} left out ({others[0]}{', ...' if others[1:] else ''})")
    else:
        raise UserError(f"--data {path}: no such file or folder")


def _on_stdin() -> list[str]:
    """The paths on stdin, one a line, or ended by NUL as `find -print0` does."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--data -: the processes of torchrun do not share stdin; write the list's images into a folder")
    content = sys.stdin.buffer.read()
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise UserError("--data -: got no path on stdin")
    for number, path in enumerate(paths, start=1):
        if not os.path.lexists(path):
            raise UserError(f"--data -, path {number}: {path}: no such file")
    return paths
