"""The benchmark `digits`: real images that scikit-learn brings along, nothing to download.

In-distribution are six of the ten classes of the 8×8 digits (another random six for each seed). To be told from them:

- `near`: the images of the other four classes,
- `photographs`: grey 8×8 crops of scikit-learn's two sample photographs,
- `noise`: uniform noise.

Covariate-shifted, on demand: `moved`, the test images moved by a pixel in a random direction, and `blurred`, the mean
of each pixel with its neighbours.

Every set has pixels in [0, 1] (digits / 16, photographs / 255) and is then normalised with the mean and standard
deviation of the training images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import NO_CLASS, ImageDataset, Scrambled, Tensors

N_ID_CLASSES = 6
VALIDATION_SHARE, TEST_SHARE = 0.15, 0.25
N_FAR = 600
SIDE = 8
# A crop covers a square of this many pixels and is averaged down to 8×8. In smaller squares the photographs are nearly
# flat: an 8-pixel square of the originals holds no edge most of the time, and would be told by its lack of contrast
# alone.
CROP_SIDES = (32, 64, 96, 128)
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL's "L"


def drawn(seed: int) -> tuple[dict[str, ImageDataset], dict[str, ImageDataset]]:
    """Splits and OOD sets for `seed`: its classes, its stratified train / validation / test split (60 / 15 / 25 %), its
    crops and noise."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    # One generator a purpose: a change to one of the sets leaves the others as they are.
    generators = (np.random.default_rng([seed, purpose]) for purpose in range(5))
    classes_rng, split_rng, crop_rng, noise_rng, move_rng = generators
    classes = np.sort(classes_rng.permutation(10)[:N_ID_CLASSES])
    names = tuple(map(str, classes))
    train, validation, test = _stratified_split(digits.target, classes, split_rng)

    mean, std = images[train].mean(), images[train].std()

    def normalised(values: np.ndarray) -> Tensor:
        return torch.from_numpy((values.astype(np.float32) - mean) / std).unsqueeze(1)

    def inside(rows: np.ndarray) -> ImageDataset:
        labels = np.searchsorted(classes, digits.target[rows])
        return ImageDataset(Tensors(normalised(images[rows]), labels, names), title="digits")

    def outside(title: str, group: str, values: np.ndarray) -> ImageDataset:
        return ImageDataset(Tensors(normalised(values), np.full(len(values), NO_CLASS)), title=title, group=group)

    def shifted(title: str, values: np.ndarray) -> ImageDataset:
        labels = np.searchsorted(classes, digits.target[test])
        return ImageDataset(Tensors(normalised(values), labels, names), title=title, group="csid")

    held_out = inside(validation)
    splits = {"train": inside(train), "fit": inside(train), "validation": held_out, "test": inside(test)}
    splits["validation_ood"] = ImageDataset(Scrambled(held_out, seed), title="scrambled pixels", group="validation")
    return splits, {
        "near": outside("other digits", "near", images[~np.isin(digits.target, classes)]),
        "photographs": outside("photographs", "far", _photograph_crops(N_FAR, crop_rng)),
        "noise": outside("uniform noise", "far", noise_rng.random((N_FAR, SIDE, SIDE))),
        "moved": shifted("moved digits", _moved(images[test], move_rng)),
        "blurred": shifted("blurred digits", _padded_windows(images[test]).mean(axis=(3, 4))),
    }


def _stratified_split(
    labels: np.ndarray, classes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of the train, validation and test images, the same shares of every class."""
    parts: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for label in classes:
        rows = rng.permutation(np.flatnonzero(labels == label))
        n_test, n_validation = round(TEST_SHARE * len(rows)), round(VALIDATION_SHARE * len(rows))
        cuts = [len(rows) - n_test - n_validation, len(rows) - n_test]
        for part, chosen in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chosen)
    train, validation, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, validation, test


def _padded_windows(images: np.ndarray) -> np.ndarray:
    """The 3×3 pixels around each of (n, 8, 8), black beyond the edge: (n, 8, 8, 3, 3)."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))


def _moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by one pixel up, down, left or right."""
    places = np.array([(0, 1), (2, 1), (1, 0), (1, 2)])[rng.integers(4, size=len(images))]
    return _padded_windows(images)[np.arange(len(images)), :, :, places[:, 0], places[:, 1]]


def _photograph_crops(n_crops: int, rng: np.random.Generator) -> np.ndarray:
    """Grey crops (n_crops, 8, 8) in [0, 1], from both photographs alike, each square somewhere and of one of
    `CROP_SIDES`."""
    from sklearn.datasets import load_sample_images

    photographs = [image @ LUMA / 255.0 for image in load_sample_images().images]
    crops = np.empty((n_crops, SIDE, SIDE))
    for index in range(n_crops):
        photograph = photographs[index % len(photographs)]
        side = rng.choice(CROP_SIDES)
        top, left = (rng.integers(0, extent - side + 1) for extent in photograph.shape)
        square = photograph[top : top + side, left : left + side]
        crops[index] = square.reshape(SIDE, side // SIDE, SIDE, side // SIDE).mean(axis=(1, 3))
    return crops
