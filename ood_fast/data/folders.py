"""Readers of image files that lie in folders: a folder for each class, any folder, a list of names.

Taken is what `decoding` can read, by its suffix or, without one, by how it begins. Hidden files and folders are left
out at every depth, links to folders are followed once, and what else is left out is counted and named in
`Files.left_out`. What is missing is a `UserError` that names the files and where to get them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import checks
from . import decoding
from .images import NO_CLASS, Files

FORMATS = ".jpg, .png, .gif, .webp, .tiff and what else Pillow decodes"
N_NAMED = 5  # files that a message names before it counts the others
LIST_ENCODING = "save the list in UTF-8"


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 with LF or CRLF; UserError with the line that is in another encoding."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise checks.UserError(f"{path}: is no regular file, expected a list")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        line = content.split(b"\n")[number - 1].strip().decode("latin-1")
        raise checks.UserError(f"{path}, line {number}: got {line!r}, not in UTF-8; {LIST_ENCODING}") from error
    return [line.rstrip("\r") for line in text.split("\n")]


def is_below(name: str) -> bool:
    """Whether a name of a list stays in the folder that it is relative to."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and parts[0] != "" and not re.match("[A-Za-z]:", name) and ".." not in parts and "\0" not in name


def require_files(title: str, root: Path, names: Iterable[str], where: str) -> None:
    """UserError that names the files missing below `root`, or a name that leads out of it.

    Each folder is listed once, no file is touched.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        if not is_below(name):
            raise checks.UserError(f"{title}: {name!r} is not below the folder of the images, {root}")
        folder, _, file = name.rpartition("/")
        wanted.setdefault(folder, []).append(file)
    missing = []
    for folder, files in wanted.items():
        try:
            present = set(os.listdir(root / folder))
        except OSError:  # also a name that is too long
            present = set()
        missing += [f"{folder}/{file}" if folder else file for file in files if file not in present]
    if missing:
        raise checks.UserError(f"{title}: missing in {root}: {checks.shortened(missing, N_NAMED)}; {where}")


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


# ---- what lies in a folder


class Listing:
    """The image files below a folder: `names` relative to it, sorted by folder and name, and what is left out, by why.

    Folders are read before links to folders. A link to one that was read, or to one that holds `folder`, is left out:
    so loops end and no image comes twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, list[str]()
        self.left_out: dict[str, list[str]] = {}
        try:
            real = folder.resolve(strict=True)
        except (OSError, RuntimeError):  # not there, a dangling link, a link to itself
            return
        self._read = {_identity(path) for path in real.parents}  # links to these are loops
        waiting, links = [""], list[str]()
        found: list[tuple[str, str]] = []
        while waiting or links:
            below = waiting.pop() if waiting else links.pop(0)
            self._visit(below, found, waiting, links)
            if not waiting:
                links.sort()
        self.names = [f"{below}/{file}" if below else file for below, file in sorted(found)]

    def _visit(self, below: str, found: list[tuple[str, str]], waiting: list[str], links: list[str]) -> None:
        try:
            identity = _identity(self.folder / below)
            if identity in self._read:
                return self._leave_out("a link to a folder that was read or that holds this one", below)
            with os.scandir(self.folder / below) as entries:
                self._read.add(identity)
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            return self._leave_out(f"a folder that cannot be listed: {error.strerror}", below)
        for entry in listed:
            name = f"{below}/{entry.name}" if below else entry.name
            kind = _kind(entry)
            if kind == "folder":
                (links if entry.is_symlink() else waiting).append(name)
            elif kind != "file":
                self._leave_out(kind, name)
            else:
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in decoding.suffixes() if suffix else decoding.has_signature(entry.path):
                    found.append((below, entry.name))
                else:
                    self._leave_out(suffix or "no suffix", name)
        return None

    def _leave_out(self, why: str, name: str) -> None:
        self.left_out.setdefault(why, []).append(name)


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "file", or what else it is."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        return "a dangling link"
    return "a dangling link" if entry.is_symlink() and not os.path.exists(entry.path) else "no regular file"


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _told(folder: Path, left_out: dict[str, list[str]]) -> str:
    """ "3 entries of photos are left out: 2 .txt (a.txt, b.txt), 1 a dangling link (x.png)"; "" if there are none."""
    if not left_out:
        return ""
    n_left_out = sum(map(len, left_out.values()))
    parts = [f"{len(names)} × {why} ({_some(sorted(names), 2)})" for why, names in sorted(left_out.items())]
    cure = "; pip install pillow-heif reads HEIC" if {".heic", ".heif"} & set(left_out) else ""
    return f"{n_left_out} below {folder} left out: {', '.join(parts)}{cure}"


# ---- readers


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts cls2 before cls10 and apple before Zebra, as timm does."""
    parts = re.split(r"(\d+)", name.lower())
    return [(1, part) if odd % 2 == 0 else (0, int(part)) for odd, part in enumerate(parts)]


def class_names(file: str | Path) -> list[str]:
    """The names of the classes in the order of the logits: one a line, or JSON, a list or {name: index}, {index: name}.

    UserError for names that repeat, or indices that are not 0 ... n - 1.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise checks.UserError(f"--classes {path}: no such file")
    lines = read_lines(path)
    if path.suffix.lower() != ".json":
        names = [line.strip() for line in lines if line.strip()]
    else:
        try:
            content = json.loads("\n".join(lines))
            if isinstance(content, dict):
                if all(isinstance(value, int) for value in content.values()):
                    content = {index: name for name, index in content.items()}
                indices = {int(index): name for index, name in content.items()}
                if absent := [index for index in range(len(content)) if index not in indices]:
                    raise ValueError(f"no name for {absent[0]}")
                content = [indices[index] for index in range(len(content))]
            names = [name for name in content if isinstance(name, str)]
            if len(names) != len(content):
                raise ValueError("a name that is no text")
        except (ValueError, TypeError, RecursionError) as error:
            expected = "expected a list of names, or names and the indices 0 ... n - 1"
            raise checks.UserError(f"--classes {path}: {error}; {expected}") from error
    if not names:
        raise checks.UserError(f"--classes {path}: holds no name")
    if twice := repeated(names):
        raise checks.UserError(f"--classes {path}: {twice[0]!r} stands there twice")
    return names


def folders_in(folder: Path) -> tuple[str, ...]:
    """The names of its folders that are not hidden, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def repeated(names: Iterable[str]) -> list[str]:
    """Those that stand there more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def read_image_folder(
    folder: Path, title: str, where: str, classes: Sequence[str] | None = None, *, all_of_them: bool = True
) -> Files:
    """`folder/<class>/**`: the classes in the order of their names, as torchvision's ImageFolder, or those given.

    Every class needs images; with `all_of_them` False (a test set), those given may lack some.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise checks.UserError(f"{title}: no folder {folder}; expected one folder of images for each class; {where}")
    left_out: dict[str, list[str]] = {}
    present = _class_folders(folder, title, left_out)
    classes = present if classes is None else list(classes)
    if twice := set(repeated(classes)) & set(present):  # as "crane", the bird and the machine, in labels of ImageNet
        told = f"{folder / min(twice)} may be more than one of the {len(classes)} classes"
        raise checks.UserError(f"{title}: {told}; rename it, and pass the names in their order as --classes FILE")
    strange = sorted(set(present) - set(classes))
    if strange:
        told = f"{len(classes)} classes of the training ({_some(classes, N_NAMED)})"
        raise checks.UserError(f"{title}: {folder / strange[0]} is none of the {told}")
    names, labels = [], []
    for label, name in enumerate(classes):
        listing = Listing(folder / name)
        if not listing.names and all_of_them:
            raise checks.UserError(f"{title}: no images in {folder / name} ({FORMATS}); {where}")
        names += [f"{name}/{file}" for file in listing.names]
        labels += [label] * len(listing.names)
        for why, files in listing.left_out.items():
            left_out.setdefault(why, []).extend(f"{name}/{file}".rstrip("/") for file in files)
    if not names:
        raise checks.UserError(f"{title}: no images in the folders of {folder} ({FORMATS}); {where}")
    return Files(folder, names, labels, classes, left_out=_told(folder, left_out))


def _class_folders(folder: Path, title: str, left_out: dict[str, list[str]]) -> list[str]:
    """The folders in `folder`, each the images of a class; two names of one folder are refused."""
    real = folder.resolve()
    holding = {_identity(path) for path in (real, *real.parents)}
    seen: dict[tuple[int, int], str] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if _kind(entry) != "folder":
            left_out.setdefault("beside the class folders", []).append(entry.name)
            continue
        identity = _identity(folder / entry.name)
        if identity in holding:
            left_out.setdefault("a link to a folder that holds this one", []).append(entry.name)
        elif identity in seen:
            raise checks.UserError(f"{title}: the classes {seen[identity]} and {entry.name} of {folder} are one folder")
        else:
            seen[identity] = entry.name
    return sorted(seen.values())


def read_flat_folder(folder: Path, title: str, where: str) -> Files:
    """All images below a folder, whatever its folders are called; without classes."""
    listing = Listing(Path(folder))
    told = _told(folder, listing.left_out)
    if not listing.names:
        raise checks.UserError(f"{title}: no images in {folder} ({FORMATS}); {told + '; ' if told else ''}{where}")
    return Files(folder, listing.names, [NO_CLASS] * len(listing.names), left_out=told)


def read_image_list(path: Path, images: Path, title: str, where: str, n_classes: int | None) -> Files:
    """OpenOOD's lists: `relative/path label` a line, split at the first space; UTF-8, CRLF and LF.

    `n_classes` None: an OOD set, whatever its labels say.
    """
    if not path.is_file():
        raise checks.UserError(f"{title}: missing: {path}; {where}")
    names, labels = [], []
    for number, line in enumerate(read_lines(path), start=1):
        name, _, label = line.strip().partition(" ")
        if not name:
            continue
        try:
            labels.append(int(label))
        except ValueError:
            raise checks.UserError(f"{path}, line {number}: got {line.strip()!r}, expected 'path label'") from None
        if not is_below(name):
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
