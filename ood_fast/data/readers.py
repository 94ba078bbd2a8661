"""Readers of the files that data sets come in, in torchvision's layouts.

A reader takes the folder and a split, "train" or "test", and gives a `Source`. What is missing is a `UserError` that
names the files and where to get them. `DATA_SETS` is the table of all of them. Nothing here runs code that a file
brings along.
"""

from __future__ import annotations

import csv
import gzip
import math
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks
from .folders import read_flat_folder, read_image_folder, read_lines, require_files
from .images import Files, Pixels, Source, torchvision


def _first_folder(root: Path, *candidates: str, holds: str) -> Path:
    """The first of the candidate folders below `root` that holds a file; the first of all if none does."""
    return next((root / name for name in candidates if (root / name / holds).exists()), root / candidates[0])


# ---- CIFAR: pickles of Python 2


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays among plain lists, dicts, strings and numbers, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        # NumPy 2 moved numpy.core to numpy._core; `_reconstruct` makes an empty array that is filled afterwards.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for protocol 2
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, expected only NumPy arrays")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}, expected latin1")
    return text.encode("latin1")


def safe_unpickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle of arrays, lists, strings and numbers; UserError for anything else."""
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle can raise anything: IndexError, UnicodeDecodeError, MemoryError, ...
        if isinstance(error, OSError):
            raise
        raise checks.UserError(f"{path}: cannot be read as a pickle of arrays ({error})") from error
    if not isinstance(content, dict):
        raise checks.UserError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


@dataclass(frozen=True)
class _Cifar:
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    n_classes: int
    meta: tuple[str, str]  # file and key of the class names


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR10 = _Cifar("cifar-10-batches-py", _BATCHES, ("test_batch",), "labels", 10, ("batches.meta", "label_names"))
_CIFAR100 = _Cifar("cifar-100-python", ("train",), ("test",), "fine_labels", 100, ("meta", "fine_label_names"))


def read_cifar(layout: _Cifar, root: Path, split: str, title: str, where: str) -> Source:
    """CIFAR-10 or -100 "python version", as torchvision unpacks it: data uint8 (n, 3·32·32), planes R, G, B."""
    files = getattr(layout, split)
    require_files(title, root, [f"{layout.folder}/{file}" for file in (*files, layout.meta[0])], where)
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        path = root / layout.folder / file
        batch = safe_unpickle(path)
        data, targets = batch.get("data"), batch.get(layout.labels)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise checks.UserError(f"{path}: expected 'data' to be uint8 of shape (n, 3072)")
        _check_labels(path, targets, len(data), layout.n_classes)
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += targets or ()
    meta = root / layout.folder / layout.meta[0]
    names = safe_unpickle(meta).get(layout.meta[1])
    if not isinstance(names, list) or len(names) != layout.n_classes or not all(isinstance(n, str) for n in names):
        raise checks.UserError(f"{meta}: expected {layout.meta[1]!r} to be the names of {layout.n_classes} classes")
    return Pixels(np.concatenate(pixels), labels, names)


def _check_labels(path: Path, labels: Any, n_images: int, n_classes: int) -> None:
    if not isinstance(labels, (list, np.ndarray)) or len(labels) != n_images:
        n_labels = len(labels) if isinstance(labels, (list, np.ndarray)) else "no"
        raise checks.UserError(f"{path}: {n_labels} labels for {n_images} images")
    outside = [y for y in labels if not (isinstance(y, (int, np.integer)) and 0 <= y < n_classes)]
    if outside:
        raise checks.UserError(f"{path}: label {outside[0]}, expected one in [0, {n_classes})")


# ---- MNIST, SVHN


def read_idx(path: Path, *row: int) -> np.ndarray:
    """An idx file of unsigned bytes, also gzipped: 0 0 8 n_dims, each extent as a big-endian int32, the values.

    UserError unless its shape is (n, *row) and it holds as many values; no more than those is unpacked.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if file.read(4) != bytes([0, 0, 8, 1 + len(row)]):
                raise checks.UserError(f"{path}: does not begin as an idx file of {1 + len(row)} dimensions of bytes")
            extents = [file.read(4) for _ in range(1 + len(row))]
            if len(extents[-1]) < 4:
                raise checks.UserError(f"{path}: 0 values for shape (?); the file is not complete")
            shape = tuple(int.from_bytes(extent, "big") for extent in extents)
            if shape[1:] != row:
                raise checks.UserError(f"{path}: got values of shape {shape}, expected {('n', *row)}")
            n_values = math.prod(shape)
            values, left = bytearray(), n_values + 1
            while left and (part := file.read(min(left, 1 << 20))):  # a header may promise more than there is memory
                values += part
                left -= len(part)
    except (OSError, EOFError, zlib.error) as error:
        raise checks.UserError(f"{path}: cannot be read ({error})") from error
    if len(values) != n_values:
        told = f"more than {n_values}" if len(values) > n_values else str(len(values))
        raise checks.UserError(f"{path}: {told} values for shape {shape}; the file is not complete")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_mnist(root: Path, split: str, title: str, where: str) -> Source:
    """`MNIST/raw` as torchvision leaves it. The test split is all 70,000 images, as in OpenOOD."""
    folder = _first_folder(root, "MNIST/raw", "mnist", holds="t10k-images-idx3-ubyte")
    parts = ("train",) if split == "train" else ("train", "t10k")
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    zipped = not folder.joinpath(f"{parts[0]}-{kinds[0]}").exists() and any(folder.glob("*-ubyte.gz"))
    names = [[f"{part}-{kind}{'.gz' if zipped else ''}" for part in parts] for kind in kinds]
    require_files(title, folder, [*names[0], *names[1]], where)
    images, labels = (
        np.concatenate([read_idx(folder / name, *row) for name in group])
        for group, row in zip(names, ((28, 28), ()), strict=True)
    )
    _check_labels(folder / names[1][0], labels, len(images), 10)
    return Pixels(images, labels, map(str, range(10)))


def read_svhn(root: Path, split: str, title: str, where: str) -> Source:
    """`test_32x32.mat` (MATLAB): X uint8 (32, 32, 3, n), y in 1 … 10, where 10 is the digit 0."""
    from scipy.io import loadmat

    name = f"{split}_32x32.mat"
    folder = _first_folder(root, "svhn", ".", holds=name)
    require_files(title, folder, [name], where)
    path = folder / name
    try:
        content = loadmat(path, variable_names=("X", "y"))
        pixels, digits = content["X"], np.asarray(content["y"]).ravel()
        fits = pixels.dtype == np.uint8 and pixels.shape[:3] == (32, 32, 3) and pixels.ndim == 4
    except Exception as error:  # scipy's reader fails in many ways on a file that was cut off
        raise checks.UserError(f"{path}: cannot be read as a MATLAB file with X and y ({error})") from error
    if not fits or digits.dtype.kind not in "iuf" or not ((digits >= 0) & (digits <= 10)).all():
        raise checks.UserError(f"{path}: expected X, uint8 of shape (32, 32, 3, n), and digits y of 1 to 10")
    labels = digits.astype(np.int64) % 10
    _check_labels(path, labels, pixels.shape[3], 10)
    return Pixels(pixels.transpose(3, 0, 1, 2), labels, map(str, range(10)))


# ---- files beside a list


def read_gtsrb(root: Path, split: str, title: str, where: str) -> Source:
    """German traffic signs as torchvision unpacks them: `Training/000xx/*.ppm`; a table for the test images."""
    folder = root / "gtsrb"
    classes = [f"{label:05d}" for label in range(43)]
    if split == "train":
        return read_image_folder(folder / "GTSRB" / "Training", title, where, classes)
    table, images = "GT-final_test.csv", "GTSRB/Final_Test/Images"
    require_files(title, folder, [table], where)
    try:
        rows = list(csv.DictReader(read_lines(folder / table), delimiter=";"))
        names, labels = [f"{images}/{row['Filename']}" for row in rows], [int(row["ClassId"]) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        if isinstance(error, checks.UserError):
            raise
        raise checks.UserError(f"{folder / table}: expected columns Filename and ClassId, separated by ';'") from error
    _check_labels(folder / table, labels, len(names), 43)
    require_files(title, folder, names, where)
    return Files(folder, names, labels, classes)


def read_dtd(root: Path, split: str, title: str, where: str) -> Source:
    """Describable textures as torchvision unpacks them. The test split is all 5,640 images, as in OpenOOD."""
    folder = _first_folder(root, "dtd/dtd", "dtd", holds="labels")
    lists = [f"labels/{part}1.txt" for part in (("train",) if split == "train" else ("train", "val", "test"))]
    require_files(title, folder, lists, where)
    names = [f"images/{line.strip()}" for name in lists for line in read_lines(folder / name) if line.strip()]
    require_files(title, folder, names, where)
    classes = sorted({name.split("/")[1] for name in names})
    return Files(folder, names, [classes.index(name.split("/")[1]) for name in names], classes)


def read_places365(root: Path, split: str, title: str, where: str) -> Source:
    """Validation images of Places365 as torchvision unpacks them, in 256×256 or full size; there is no other split."""
    table = "places365_val.txt"
    folder = _first_folder(root, "places365", ".", holds=table)
    require_files(title, folder, [table], where)
    images = "val_256" if (folder / "val_256").is_dir() else "val_large"
    names, labels = [], []
    for number, line in enumerate(read_lines(folder / table), start=1):
        name, _, label = line.strip().partition(" ")
        if name and not (label.strip().isdecimal() and len(label) < 10 and int(label) < 365):
            raise checks.UserError(f"{folder / table}, line {number}: got {line[:80]!r}, expected 'path label'")
        if name:
            names.append(f"{images}/{name.lstrip('/')}")
            labels.append(int(label))
    require_files(title, folder, names, where)
    return Files(folder, names, labels)


def read_tiny_imagenet(root: Path, split: str, title: str, where: str) -> Source:
    """`tiny-imagenet-200/` as it is unpacked: `train/<class>/images`, and a table for the `val` images (our test)."""
    folder = root / "tiny-imagenet-200"
    require_files(title, folder, ["wnids.txt"], where)
    classes = sorted(line.strip() for line in read_lines(folder / "wnids.txt") if line.strip())
    if split == "train":
        return read_image_folder(folder / "train", title, where, classes)
    require_files(title, folder, ["val/val_annotations.txt"], where)
    lines = read_lines(folder / "val/val_annotations.txt")
    rows = [line.split("\t") for line in lines if line.strip()]
    names = [f"val/images/{row[0]}" for row in rows]
    require_files(title, folder, names, where)
    number = {name: label for label, name in enumerate(classes)}
    labels = [number.get(row[1], -1) if len(row) > 1 else -1 for row in rows]
    _check_labels(folder / "val/val_annotations.txt", labels, len(names), len(classes))
    return Files(folder, names, labels, classes)


# ---- the table


@dataclass(frozen=True)
class DataSet:
    """`read(root, split, title, where)` gives the images; `download(root, split)` fetches them, if anything can.

    `n_held_out` images of the test split make the split "val"; "test" is the rest. The sizes are OpenOOD's (that of
    GTSRB, which it does not have, is ours); which images its lists hold only the lists know.
    """

    title: str
    read: Callable[[Path, str, str, str], Source]
    where: str
    n_held_out: int = 0
    download: Callable[[Path, str], object] | None = None

    @property
    def how(self) -> str:
        """How to get the files, for messages."""
        return f"get it from {self.where}" + (", or ask for the download (--download)" if self.download else "")


def _fetch(name: str, folder: str = ".", **keywords: Any) -> Callable[[Path, str], object]:
    """A download by the data set of that name in torchvision, which checks what arrives."""

    def download(root: Path, split: str) -> object:
        splits = {"train": split == "train"} if name in ("CIFAR10", "CIFAR100", "MNIST") else {"split": split}
        (root / folder).mkdir(parents=True, exist_ok=True)
        return getattr(torchvision().datasets, name)(str(root / folder), download=True, **(keywords or splits))

    return download


def _download_tiny_imagenet(root: Path, split: str) -> None:
    torchvision().datasets.utils.download_and_extract_archive(TINY_IMAGENET, str(root), md5=TINY_IMAGENET_MD5)


def _folder(name: str) -> Callable[[Path, str, str, str], Source]:
    return lambda root, split, title, where: read_flat_folder(root / name, title, where)


def _class_folders(name: str, n_classes: int) -> Callable[[Path, str, str, str], Source]:
    def read(root: Path, split: str, title: str, where: str) -> Source:
        source = read_image_folder(root / name / ("train" if split == "train" else "val"), title, where)
        if (found := len(source.classes or ())) != n_classes:
            raise checks.UserError(f"{title}: {found} folders in {source.root}, expected {n_classes}; {where}")
        return source

    return read


def _only_listed(root: Path, split: str, title: str, where: str) -> Source:
    told = "is read by OpenOOD's lists; from folders of the classes: --csid-folder NAME=DIR"
    raise checks.UserError(f"{title}: {told}; {where}")


SHIFTED = {"cifar10c": "CIFAR-10-C", "imagenet_v2": "ImageNet-V2", "imagenet_c": "ImageNet-C"}
SHIFTED |= {"imagenet_r": "ImageNet-R", "imagenet_es": "ImageNet-ES"}
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
OPENOOD = "https://github.com/Jingkang50/OpenOOD (scripts/download)"
_TEXTURES = DataSet("Textures", read_dtd, "https://www.robots.ox.ac.uk/~vgg/data/dtd", download=_fetch("DTD"))
KRIZ = "https://www.cs.toronto.edu/~kriz"
PLACES = "http://places2.csail.mit.edu (val_256.tar and the list places365_val.txt)"
_FETCH_PLACES = _fetch("Places365", "places365", split="val", small=True)

DATA_SETS = {
    "cifar10": DataSet(
        "CIFAR-10", partial(read_cifar, _CIFAR10), f"{KRIZ}/cifar-10-python.tar.gz", 1000, _fetch("CIFAR10")
    ),
    "cifar100": DataSet(
        "CIFAR-100", partial(read_cifar, _CIFAR100), f"{KRIZ}/cifar-100-python.tar.gz", 1000, _fetch("CIFAR100")
    ),
    "tin": DataSet("Tiny ImageNet", read_tiny_imagenet, TINY_IMAGENET, 1000, _download_tiny_imagenet),
    "mnist": DataSet("MNIST", read_mnist, "https://ossci-datasets.s3.amazonaws.com/mnist/", download=_fetch("MNIST")),
    "svhn": DataSet("SVHN", read_svhn, "http://ufldl.stanford.edu/housenumbers", download=_fetch("SVHN", "svhn")),
    "gtsrb": DataSet("GTSRB", read_gtsrb, "https://benchmark.ini.rub.de", 1000, _fetch("GTSRB")),
    "texture": _TEXTURES,
    "textures": _TEXTURES,
    "places365": DataSet("Places365", read_places365, PLACES, download=_FETCH_PLACES),
    "imagenet": DataSet(
        "ImageNet-1K", _class_folders("imagenet", 1000), "https://image-net.org (imagenet/train, imagenet/val)", 5000
    ),
    "imagenet200": DataSet(
        "ImageNet-200", _class_folders("imagenet200", 200), "https://image-net.org (classes of ImageNet-R)", 1000
    ),
    **{name: DataSet(title, _only_listed, OPENOOD) for name, title in SHIFTED.items()},
    "ssb_hard": DataSet("SSB-hard", _folder("ssb_hard"), OPENOOD),
    "ninco": DataSet("NINCO", _folder("ninco"), OPENOOD),
    "inaturalist": DataSet("iNaturalist", _folder("inaturalist"), OPENOOD),
    "openimage_o": DataSet("OpenImage-O", _folder("openimage_o"), OPENOOD, 1763),
}
