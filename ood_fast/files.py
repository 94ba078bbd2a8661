"""Files and folders that are there whole or not at all, whatever ends the process that writes them.

    with replacing("results.csv") as part:      # a file in the same folder; takes the name when it is whole
        part.write_text(text)
    with staged("results") as staging:          # a folder; what is in it takes its place when all of it is whole
        ...

Whoever reads the name sees the old content or the new. What a killed process left is removed by the next writer.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import platform
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST_NAME = 255  # bytes, of most file systems
ABANDONED = 24 * 3600  # seconds: what another machine wrote last so long ago, nobody is writing
WAIT = 10.0  # seconds for a lock: data-loading processes outlive a killed owner for about five
_numbers = itertools.count()
_in_use: set[str] = set()  # parts of this process


def _host() -> str:
    """Of the machine and, in a container, of what it numbers its processes in."""
    name = platform.node()
    with suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


_HOST = _host()


class BusyError(OSError):
    """Another process is at work on the same file or folder."""


def sha256(path: str | os.PathLike[str]) -> str:
    """Of the bytes of a file, in hexadecimal digits; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty file beside `path`, to be written; it replaces `path` when the context ends without an error.

    It is on the disk then. Permissions are those of the file that was there; of a link, the file that it names is
    replaced. Of several writers the last wins, whole. A device or a pipe (`/dev/stdout`) is written as it is.

    Raises:
        OSError: `path` is a folder or cannot be written, with its name; nothing but the old file remains.
    """
    given = Path(path)
    with _named(given):
        before = _status(given)
        if before is not None and stat.S_ISDIR(before.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target = Path(os.path.realpath(given))
    if before is not None and not stat.S_ISREG(before.st_mode):
        with _named(given):
            yield given
        return
    remove_left_behind(target)
    part = _part_of(target)
    with _named(given, part), _used(part):
        try:
            part.touch(exist_ok=False)
            mode = stat.S_IMODE((before or part.stat()).st_mode)
            yield part
            _sync(part)
            if before is not None:
                with suppress(OSError, AttributeError):  # only root may give files away
                    os.chown(part, before.st_uid, before.st_gid)
            part.chmod(mode)  # some writers make a private file of their own
            _take_place(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    _sync(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 by `replacing`; names of files that are none as JSON has them, \\udcff for the byte ff."""
    with replacing(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(text)


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to be filled; when the context ends without an error, what is in it takes its place in `folder`.

    Files and folders of the same names are replaced, others stay. Replacing several is not one step for the system: a
    process that is killed in the middle of it leaves the rest ready, and `settle`, which every reader calls, or the
    next `staged` completes it. After an error nothing has changed.

    Raises:
        OSError: it cannot be written, with the name of the folder.
    """
    folder = Path(folder)
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    staging = _part_of(folder / "staged")
    with _named(folder, staging), _used(staging):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_left_behind(folder / "staged")
            staging.mkdir()
            yield staging
            for entry in staging.rglob("*"):
                _sync(entry)
            _sync(staging)
            with locked(folder, wait=None):
                _settle(folder)  # what was whole earlier comes first
                whole = staging.with_suffix(".whole")
                os.replace(staging, whole)
                _sync(folder)
                _move_in(whole, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):  # not empty: the work is done, or somebody else is there
                    parent.rmdir()
            raise


def settle(folder: str | os.PathLike[str]) -> None:
    """Complete what a killed `staged` had begun to put in place; for readers of the folder."""
    folder = Path(folder)
    if any(folder.glob(".staged.*.whole")):
        with locked(folder, wait=None):
            _settle(folder)


def _settle(folder: Path) -> None:
    for whole in sorted(folder.glob(".staged.*.whole"), key=lambda entry: entry.stat().st_mtime_ns):
        _move_in(whole, folder)


def _move_in(whole: Path, folder: Path) -> None:
    """Repeatable: after an interruption at any point, a second call does what is left."""

    def move() -> None:
        entries = [entry for entry in whole.iterdir() if not entry.name.startswith(".old.")]
        for entry in sorted(entries, key=lambda entry: (not entry.is_dir(), entry.stat().st_mtime_ns)):
            target = folder / entry.name
            if target.is_dir() or (entry.is_dir() and target.exists()):  # only a file can be replaced in one step
                os.replace(target, whole / f".old.{entry.name}.{next(_numbers)}")
            _take_place(entry, target)
        _sync(folder)
        shutil.rmtree(whole)

    try:
        move()
    except KeyboardInterrupt:  # a few renames: first finish
        move()
        raise


@contextmanager
def locked(path: str | os.PathLike[str], wait: float | None = WAIT) -> Iterator[None]:
    """Until this context ends, no other process is inside it for the same file or folder, which exists.

    Systems and network disks without such locks (Windows, some NFS) let everyone in.

    Args:
        wait: seconds; None: until it is free.

    Raises:
        BusyError: another process did not leave it within `wait` seconds.
    """
    handle = None
    with suppress(ImportError):
        import fcntl

        handle = os.open(path, os.O_RDONLY)
        try:
            _lock(handle, fcntl.LOCK_EX, wait)
        except BusyError:
            os.close(handle)
            raise BusyError(f"{path}: another process is at work on it") from None
        except OSError:  # no locks here
            pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, exclusive: int, wait: float | None) -> None:
    import fcntl

    if wait is None:
        fcntl.flock(handle, exclusive)
        return
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, exclusive | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise BusyError(errno.EAGAIN, "busy") from None
        time.sleep(0.05)


# ---- parts: ".NAME.HOST-PID-NUMBER.part"


def _part_of(path: Path) -> Path:
    ending = f".{_HOST}-{os.getpid()}-{next(_numbers)}.part"
    return path.with_name(_beginning(path, len(ending)) + ending)


def _beginning(path: Path, n_more: int = 64) -> str:
    """The name as it begins that of its parts; of one that is too long, a part and a hash."""
    name = f".{path.name}"
    encoded = os.fsencode(name)
    if len(encoded) + max(n_more, 64) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    return os.fsencode(name)[:150].decode(errors="ignore") + "." + digest


def remove_left_behind(path: str | os.PathLike[str]) -> None:
    """Remove the parts of `path` whose writers are no longer there."""
    path = Path(path)
    beginning = _beginning(path) + "."
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(beginning) and entry.name.endswith(".part"):
                owner = entry.name[len(beginning) : -len(".part")].split("-")
                if len(owner) == 3 and entry.name not in _in_use and _abandoned(entry, owner[0], owner[1]):
                    with suppress(OSError):
                        shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def _abandoned(entry: os.DirEntry[str], host: str, pid: str) -> bool:
    if host != _HOST or not pid.isdigit() or os.name == "nt":  # os.kill ends a process on Windows
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED
    return int(pid) == os.getpid() or not _alive(int(pid))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # not ours
        return True
    return True


@contextmanager
def _used(part: Path) -> Iterator[None]:
    _in_use.add(part.name)
    try:
        yield
    finally:
        _in_use.discard(part.name)


# ---- the system


@contextmanager
def _named(path: Path, part: Path | None = None) -> Iterator[None]:
    """A failed write says of which file; the system's error knows its number, or the name of the part."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or (part is not None and str(error.filename).startswith(str(part)))
        if error.errno is None or isinstance(error, BusyError) or not (ours or error.filename == str(path)):
            raise  # it is told in words, or about another file
        named = type(error)(f"cannot write {path}: {error.strerror or os.strerror(error.errno)}")
        named.errno = error.errno
        raise named from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _take_place(part: Path, target: Path) -> None:
    """`os.replace`; on Windows a reader, or a virus scanner, may hold the old file for a moment."""
    for seconds in (0.05, 0.2, 0.8):
        try:
            os.replace(part, target)
            return
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(seconds)
    os.replace(part, target)


def _sync(path: Path) -> None:
    """What is written, and in a folder the names, are on the disk after this; not every system can open a folder."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs only what could be written
    except OSError:
        if folder:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno == errno.ENOSPC:
            raise
    finally:
        os.close(handle)
