"""Batches of a data set, loaded by processes, with the errors of a data set as it raised them.

A worker that raises sends its traceback in place of the message, and ends the loader. So an image that cannot be read
travels as its UserError, an item like the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from .. import checks


class ErrorsAsItems(Dataset):
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


class Loader(DataLoader):
    """A DataLoader of (x, y) that raises the UserError of an image that cannot be read as it is."""

    def __init__(self, dataset: Dataset, **keywords: Any) -> None:
        super().__init__(ErrorsAsItems(dataset), collate_fn=_joined, **keywords)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, checks.UserError):
                raise batch
            yield batch


def _joined(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, checks.UserError)), None) or default_collate(items)


def split(items: list[Any]) -> tuple[Any, list[int], list[tuple[int, str]]]:
    """A `collate_fn`: the batch of the good items (None without any), their places, (place, reason) of the others."""
    bad = [(place, str(item)) for place, item in enumerate(items) if isinstance(item, checks.UserError)]
    good = [place for place, item in enumerate(items) if not isinstance(item, checks.UserError)]
    return default_collate([items[place] for place in good]) if good else None, good, bad
