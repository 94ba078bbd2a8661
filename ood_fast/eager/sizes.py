"""How much is worked at a time: chunks of rows and tiles of W that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Parts = TypeVar("Parts", bound=tuple[Tensor, ...])

# Elements of a chunk of rows: three float32 temporaries of this size (3 MiB) stay in the caches of one core pair.
ROW_CHUNK_ELEMENTS = 1 << 18
# Elements of a tile of the distance table: bounds the two temporaries of the Gram form at 8 MiB in float32 each.
TABLE_TILE_ELEMENTS = 1 << 21
# Elements of a tile of centred rows of W where only some rows of the table are wanted: W itself is never copied whole.
WEIGHT_TILE_ELEMENTS = 1 << 19
# Elements of the buffer in which the form without logits works: 64 MiB in float32, so that with the tiles it stays
# below 100 MB. Fewer rows than MIN_LINEAR_ROWS would stream W from memory for too little arithmetic.
LINEAR_BUFFER_ELEMENTS = 1 << 24
MIN_LINEAR_ROWS = 16
# Classes of a tile in which a prediction is looked for, at least: fewer make thin products.
PREDICTION_CLASSES = 256
# Elements gathered at a time for direct differences.
DIFFERENCE_ELEMENTS = 1 << 18


def slices(length: int, step: int) -> Iterator[slice]:
    """[0, length) in steps."""
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def parts(length: int, step: int) -> Iterator[slice | None]:
    """`slices`; None, which `take` reads as all, where one holds the whole length.

    A small batch costs its calls, not its arithmetic: there each slice saved is a microsecond of a hundred.
    """
    return iter((None,)) if step >= length else slices(length, step)


def row_chunks(n_samples: int, width: int) -> Iterator[slice | None]:
    """`parts` of the rows that stay in cache."""
    return parts(n_samples, ROW_CHUNK_ELEMENTS // max(1, width))


def take(tensor: Tensor, rows: slice | None) -> Tensor:
    """tensor[rows], or all of it."""
    return tensor if rows is None else tensor[rows]


def join(chunks: Sequence[Parts]) -> Parts:
    """The n-vectors (or (n, .) buffers) of all chunks, in order."""
    # as many as went in, which no type can say
    return chunks[0] if len(chunks) == 1 else tuple(map(torch.cat, zip(*chunks, strict=True)))  # type: ignore[return-value]
