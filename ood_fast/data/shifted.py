"""Covariate-shifted in-distribution sets: the classes of a benchmark in other images, from where one's own lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import checks
from .folders import folders_in, read_image_folder
from .images import Pixels, Source

EXPECTED = (
    "expected a folder for each class, called as it or by its number, or a .npy of CIFAR-10-C's beside labels.npy"
)


def read_shifted(path: str | Path, title: str, classes: Sequence[str]) -> Source:
    """`path/<class>/**`, each class called by its name or its number, some perhaps missing; or a .npy, uint8
    (n, height, width, 3), beside the `labels.npy` (n,) of its folder, as CIFAR-10-C comes.

    UserError for what cannot be read, and for a class that is none of `classes`.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npy":
        pixels, labels = (_array(file, title) for file in (path, path.with_name("labels.npy")))
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise checks.UserError(f"{title}: {path} holds {pixels.dtype} of shape {pixels.shape}; {EXPECTED}")
        if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
            told = f"{labels.dtype} of shape {labels.shape}"
            raise checks.UserError(f"{title}: {len(pixels)} images in {path}, but labels.npy beside it holds {told}")
        if len(outside := labels[(labels < 0) | (labels >= len(classes))]):
            raise checks.UserError(f"{title}: label {outside[0]}, expected one in [0, {len(classes)})")
        return Pixels(pixels, np.array(labels), classes)
    present = folders_in(path)
    numbers = list(map(str, range(len(classes))))
    numbered = not set(present) <= set(classes) and set(present) <= set(numbers)
    return read_image_folder(path, title, EXPECTED, numbers if numbered else classes, all_of_them=False)


def _array(path: Path, title: str) -> np.ndarray:
    try:
        held: np.ndarray = np.load(path, mmap_mode="r")
        return held
    except (OSError, ValueError, EOFError) as error:
        raise checks.UserError(f"{title}: cannot read {path} ({error}); {EXPECTED}") from error
