"""Batches of a data set, loaded by processes, with the errors of a data set as it raised them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from .. import checks


class Loader(DataLoader):
    """A DataLoader of (x, y) that raises the UserError of an image that cannot be read as it is.

    A worker that raises sends its traceback in place of the message. So the error travels as an item of the batch, and
    is raised where the batch arrives.
    """

    def __init__(self, dataset: Dataset, **keywords: Any) -> None:
        super().__init__(_ErrorsAsItems(dataset), collate_fn=_joined, **keywords)

    def __iter__(self) -> Iterator[Any]:
        return map(_checked, super().__iter__())


class _ErrorsAsItems(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except checks.UserError as error:
            return error


def _joined(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, checks.UserError)), None) or default_collate(items)


def _checked(batch: Any) -> Any:
    if isinstance(batch, checks.UserError):
        raise batch
    return batch
