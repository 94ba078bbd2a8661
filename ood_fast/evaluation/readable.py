"""A benchmark without the images that cannot be read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from .. import checks
from ..data import ImageBenchmark
from ..data.images import ImageDataset, Scrambled
from ..data.loading import ErrorsAsItems, alive
from .cache import Progress

PARTS = ("fit", "validation", "validation_ood", "test")
NAMED = 20  # images in a note
BATCH = 64


def readable(
    benchmark: ImageBenchmark, workers: int, progress: Progress, wanted: Iterable[str] = PARTS
) -> tuple[ImageBenchmark, list[str]]:
    """The benchmark without the image files that cannot be read, and a note for each set that lacks some.

    Of `wanted` parts and the OOD sets; the other parts are as they were.

    Every image is read once. Sets that lack none are the same; of the others the fingerprint is another one, so that
    what the cache keeps of the one is never taken for that of the other. Not for training: `train` is as it was.

    Raises:
        UserError: no image of a set can be read.
    """
    notes: list[str] = []
    kept: dict[int, ImageDataset] = {}

    def checked(name: str, dataset: ImageDataset) -> ImageDataset:
        if id(dataset) not in kept:
            kept[id(dataset)] = _without_bad(name, dataset, notes, workers, progress)
        return kept[id(dataset)]

    def opened(name: str, dataset: ImageDataset) -> Callable[[], ImageDataset]:
        if isinstance(dataset.source, Scrambled):  # of the images of another set
            source = Scrambled(checked(name, dataset.source.dataset), dataset.source.seed)
            dataset = ImageDataset(source, dataset.transform, title=dataset.title, group=dataset.group)
        else:
            dataset = checked(name, dataset)
        return lambda: dataset

    parts = {name: opened(name, getattr(benchmark, name)) for name in PARTS if name in wanted}
    tested = {name: opened(name, dataset) for name, dataset in benchmark.tested.items()}
    for name in {"train", *PARTS} - set(wanted):
        parts[name] = functools.partial(getattr, benchmark, name)
    return ImageBenchmark(benchmark.name, benchmark.n_classes, benchmark.image_shape, parts, tested), notes


def _without_bad(name: str, dataset: ImageDataset, notes: list[str], workers: int, progress: Progress) -> ImageDataset:
    if not len(dataset) or dataset.path(0) is None:  # all of it came from one file, and is in memory
        return dataset
    reading = ErrorsAsItems(dataset, dataset.source.image)
    loader = torch.utils.data.DataLoader(reading, BATCH, num_workers=workers, collate_fn=_reasons)
    errors: list[str | None] = []
    with progress(f"reading {name}", len(dataset)) as bar:
        for batch in alive(loader):
            errors += batch
            bar.advance(len(batch))
    bad = [error for error in errors if error is not None]
    if not bad:
        return dataset
    if len(bad) == len(dataset):
        raise checks.UserError(f"{name}: none of its {len(bad)} images can be read; the first: {bad[0]}")
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    notes.append(f"{name}: left out {len(bad)} of {len(dataset)} images: {'; '.join(bad[:NAMED])}{more}")
    rows = np.flatnonzero([error is None for error in errors])
    return ImageDataset(dataset.source.take(rows), dataset.transform, title=dataset.title, group=dataset.group)


def _reasons(items: list[Any]) -> list[str | None]:
    """Why each image cannot be read; None if it can."""
    return [str(item) if isinstance(item, checks.UserError) else None for item in items]
