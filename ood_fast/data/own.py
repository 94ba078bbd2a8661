"""The benchmark `folder`: a task of one's own, by where its images lie; and how validation images are held out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .. import checks
from . import folders, shifted
from .images import Source
from .specs import IMAGENET, Spec

Read = Callable[[str, str], Source]  # of a set and a split

SPLIT_SEED = 0  # of what is held out: the same for every run, so that test sets do not change with a run's seed
SMALL_IMAGE = 64  # own folders: up to this size images are cropped as CIFAR's, above as ImageNet's


def hold_out(source: Source, n_held_out: int) -> tuple[Source, Source]:
    """(held out, rest), drawn by `SPLIT_SEED`, in equal parts of the classes; both in the order of the source.

    At most a tenth of a source is held out.
    """
    n_held_out = min(n_held_out, len(source) // 10)
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(source))
    by_class = shuffled[np.argsort(source.labels[shuffled], kind="stable")]
    labels = source.labels[by_class]
    first_of_class = np.searchsorted(labels, labels)
    rank = np.arange(len(labels)) - first_of_class  # within its class: one of each class comes before a second of any
    chosen = by_class[np.argsort(rank, kind="stable")]
    return source.take(np.sort(chosen[:n_held_out])), source.take(np.sort(chosen[n_held_out:]))


def own_folders(root: Path, size: int, order: Sequence[str] | None) -> tuple[Spec, Read]:
    """The benchmark in `root`: train, test and val with a folder for each class; near and ood with one for each set."""
    where = f"expected {root}/train/<class>/, {root}/test/<class>/, {root}/ood/<name>/"
    if not root.is_dir():
        raise checks.UserError(f"benchmark folder: no folder {root} (--data-root); {where}")

    @functools.cache
    def training() -> Source:
        return folders.read_image_folder(root / "train", "benchmark folder", where, order)

    classes = training().classes or ()
    if len(classes) < 2:
        raise checks.UserError(
            f"benchmark folder: one class in {root / 'train'} ({classes[0]}), expected at least two: a classifier is "
            "trained to tell them apart"
        )

    def inside(folder: str) -> Source:
        return folders.read_image_folder(root / folder, "benchmark folder", where, classes, all_of_them=False)

    @functools.cache
    def read(set_name: str, split: str) -> Source:
        if set_name in csid:
            return shifted.read_shifted(root / "csid" / set_name, set_name, classes)
        if set_name in near or set_name in far:
            folder = root / ("near" if set_name in near else "ood") / set_name
            return folders.read_flat_folder(folder, set_name, where)
        if split == "test":
            return inside("test")
        if (root / "val").is_dir():
            return training() if split == "train" else inside("val")
        held_out, rest = hold_out(training(), len(training()))
        if split == "val" and not len(held_out):
            too_few = f"{len(rest)} images in {root / 'train'}, too few to hold a tenth out"
            raise checks.UserError(f"benchmark folder: {too_few}; expected {root}/val/<class>/")
        return held_out if split == "val" else rest

    near, far, csid = (folders.folders_in(root / folder) for folder in ("near", "ood", "csid"))
    if twice := sorted(set(near) & set(far)):
        raise checks.UserError(f"benchmark folder: {twice[0]} is below both {root / 'near'} and {root / 'ood'}")
    resize, augment = (size, "pad_crop") if size <= SMALL_IMAGE else (round(size * 256 / 224), "resized_crop")
    sizes = {"resize": resize, "crop": size, "augment": augment, "mean": IMAGENET["mean"], "std": IMAGENET["std"]}
    return Spec(root.resolve().name, "", len(classes), near, far, "", csid=csid, **sizes), read
