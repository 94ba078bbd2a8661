"""Batches of a data set: rows of tensors where it lies in memory, else loaded by processes, errors as raised there.

A worker that raises sends its traceback in place of the message, and ends the loader. So an image that cannot be read
travels as its UserError, an item like the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from .. import checks


def batched(dataset: Dataset[Any], **keywords: Any) -> Iterable[Any]:
    """(x, y) of a data set, batch by batch; the keywords are those of `DataLoader`, with `batch_size` or a
    `batch_sampler`. Images that lie in memory are taken from there: no workers, no image by itself."""
    held = held_in_memory(dataset)
    if held is None:
        return Loader(dataset, **keywords)
    size = keywords.get("batch_size") or 1
    batches = keywords.get("batch_sampler")
    return _Held(*held, [slice(i, i + size) for i in range(0, len(held[0]), size)] if batches is None else batches)


def held_in_memory(dataset: Dataset[Any]) -> tuple[Tensor, Tensor] | None:
    """All x and all y of a data set as tensors, or None; of a `Subset` whose rows are a range too."""
    if isinstance(dataset, Subset):
        rows = dataset.indices
        held = held_in_memory(dataset.dataset) if isinstance(rows, range) else None
        if held is None or not isinstance(rows, range):
            return None
        own = slice(rows.start, rows.stop, rows.step)
        return held[0][own], held[1][own]
    return dataset.held() if hasattr(dataset, "held") else None


class _Held:
    """Rows of the images and classes, for each batch of rows; in this process."""

    def __init__(self, images: Tensor, targets: Tensor, batches: Iterable[Sequence[int] | slice]) -> None:
        self.images, self.targets, self.batches = images, targets, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.images[rows], self.targets[rows]) for rows in self.batches)


class ErrorsAsItems(Dataset[Any]):
    """A data set that gives the UserError of an item in its place. `read(index)` gives an item, default itself."""

    def __init__(self, dataset: Any, read: Any = None) -> None:
        self.dataset, self.read = dataset, dataset.__getitem__ if read is None else read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(index)
        except checks.UserError as error:
            return error


class Loader(DataLoader[Any]):
    """A DataLoader of (x, y) that raises the UserError of an image that cannot be read as it is."""

    def __init__(self, dataset: Dataset[Any], **keywords: Any) -> None:
        super().__init__(ErrorsAsItems(dataset), collate_fn=_joined, **keywords)

    def __iter__(self) -> Iterator[Any]:
        for batch in alive(super().__iter__()):
            if isinstance(batch, checks.UserError):
                raise batch
            yield batch


def tolerant(dataset: Any, batch_size: int, workers: int) -> Iterator[tuple[Any, list[int], list[tuple[int, str]]]]:
    """Batches of what can be read, and what cannot, see `split`."""
    return alive(DataLoader(ErrorsAsItems(dataset), batch_size, num_workers=workers, collate_fn=split))


def alive(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a DataLoader; ChildProcessError, an OSError, where torch has only a RuntimeError with a number."""
    try:
        yield from batches
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        told = str(error.__cause__ or error).strip().splitlines()[0]
        raise ChildProcessError(
            f"a process that loads images has died, of too little (shared) memory perhaps ({told.rstrip('. ')}); try "
            "fewer of them, --workers 0 has none"
        ) from error


def _joined(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, checks.UserError)), None) or default_collate(items)


def split(items: list[Any]) -> tuple[Any, list[int], list[tuple[int, str]]]:
    """A `collate_fn`: the batch of the good items (None without any), their places, (place, reason) of the others."""
    bad = [(place, str(item)) for place, item in enumerate(items) if isinstance(item, checks.UserError)]
    good = [place for place, item in enumerate(items) if not isinstance(item, checks.UserError)]
    return default_collate([items[place] for place in good]) if good else None, good, bad
