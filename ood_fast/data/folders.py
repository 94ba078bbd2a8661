"""Readers of image files that lie in folders: a folder for each class, any folder, a list of names.

What is missing is a `UserError` that names the files and where to get them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import checks
from .images import NO_CLASS, Files

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision
N_NAMED = 5  # files that a message names before it counts the others


def require_files(title: str, root: Path, names: Iterable[str], where: str) -> None:
    """UserError that names the files missing below `root`. Each folder is listed once, no file is touched."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        wanted.setdefault(folder, []).append(file)
    missing = []
    for folder, files in wanted.items():
        try:
            present = set(os.listdir(root / folder))
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        missing += [f"{folder}/{file}" if folder else file for file in files if file not in present]
    if missing:
        named = ", ".join(missing[:N_NAMED])
        more = f" and {len(missing) - N_NAMED} more" if len(missing) > N_NAMED else ""
        raise checks.UserError(f"{title}: missing in {root}: {named}{more}; {where}")


def read_image_folder(
    folder: Path, title: str, where: str, classes: Sequence[str] | None = None, *, all_of_them: bool = True
) -> Files:
    """`folder/<class>/**`: the classes in the order of their names, as torchvision's ImageFolder, or those given.

    Every class needs images; with `all_of_them` False (a test set), those given may lack some.
    """
    if not folder.is_dir():
        raise checks.UserError(f"{title}: no folder {folder}; expected one folder of images for each class; {where}")
    present = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    classes = present if classes is None else list(classes)
    strange = sorted(set(present) - set(classes))
    if strange:
        raise checks.UserError(f"{title}: {folder / strange[0]} is none of the {len(classes)} classes of the training")
    names, labels = [], []
    for label, name in enumerate(classes):
        found = [f"{name}/{file}" for file in image_files(folder / name)]
        if not found and all_of_them:
            raise checks.UserError(f"{title}: no images in {folder / name} ({', '.join(IMAGE_SUFFIXES)}); {where}")
        names += found
        labels += [label] * len(found)
    if not names:
        raise checks.UserError(f"{title}: no images in the folders of {folder} ({', '.join(IMAGE_SUFFIXES)}); {where}")
    return Files(folder, names, labels, classes)


def read_flat_folder(folder: Path, title: str, where: str) -> Files:
    """All images below a folder, whatever its folders are called; without classes."""
    names = list(image_files(folder))
    if not names:
        raise checks.UserError(f"{title}: no images in {folder} ({', '.join(IMAGE_SUFFIXES)}); {where}")
    return Files(folder, names, [NO_CLASS] * len(names))


def image_files(folder: Path) -> Iterable[str]:
    """The image files below a folder, relative to it, sorted; links are followed, hidden files left out."""
    for path, _, files in sorted(os.walk(folder, followlinks=True)):
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                yield os.path.relpath(os.path.join(path, file), folder).replace(os.sep, "/")


def read_image_list(path: Path, images: Path, title: str, where: str, n_classes: int | None) -> Files:
    """OpenOOD's lists: `relative/path label` a line, split at the first space; CRLF and LF.

    `n_classes` None: an OOD set, whatever its labels say.
    """
    if not path.is_file():
        raise checks.UserError(f"{title}: missing: {path}; {where}")
    names, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        name, _, label = line.strip().partition(" ")
        if not name:
            continue
        try:
            labels.append(int(label))
        except ValueError:
            raise checks.UserError(f"{path}, line {number}: got {line.strip()!r}, expected 'path label'") from None
        if name.startswith("/") or ".." in name.split("/"):
            raise checks.UserError(f"{path}, line {number}: {name} is not below the folder of the images")
        if n_classes is not None and not 0 <= labels[-1] < n_classes:
            raise checks.UserError(f"{path}, line {number}: label {label}, expected one in [0, {n_classes})")
        names.append(name)
    if not names:
        raise checks.UserError(f"{path}: no images in it")
    require_files(title, images, names, where)
    if n_classes is None:
        return Files(images, names, [NO_CLASS] * len(names))
    return Files(images, names, labels, _folder_names(names, labels, n_classes))


def _folder_names(names: Sequence[str], labels: Sequence[int], n_classes: int) -> list[str] | None:
    """What the folders of the classes are called, if each class lies in one folder of its own."""
    found: dict[int, str] = {}
    for name, label in zip(names, labels, strict=True):
        folder = name.rpartition("/")[0].rpartition("/")[2]
        if found.setdefault(label, folder) != folder:
            return None
    if len(set(found.values())) != n_classes:
        return None
    return [found[label] for label in range(n_classes)]
