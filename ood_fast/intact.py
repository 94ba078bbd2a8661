"""Files as they were written: checksums, and archives that are looked at before anything in them is unpacked.

Damage is an error that names the file. No pickle is read here, and no size that a header claims is believed before the
bytes are there and memory would hold them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zipfile
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from .checks import UserError

CHECKSUM = "crc32"
END = b"crc32="  # and 8 hexadecimal digits: what `seal` puts behind the content
BLOCK = 1 << 20


def memory() -> float:
    """Bytes of memory of this machine; infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it is not there, is no regular file, or cannot be read.
        UserError: it is no JSON, with the path.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({error})") from error


# ---- own files


def checksum_of(content: Mapping[str, Any]) -> str:
    """Of plain values under names, without the checksum among them."""
    text = json.dumps({name: value for name, value in content.items() if name != CHECKSUM}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def seal(path: str | os.PathLike[str]) -> None:
    """Put a checksum behind the content of a file whose readers, as those of .npy, do not look there."""
    with open(path, "r+b") as file:
        ending = END + b"%08x" % _crc(file, os.path.getsize(path))
        file.seek(0, os.SEEK_END)
        file.write(ending)


def check_seal(path: str | os.PathLike[str]) -> None:
    """ValueError unless the file is as `seal` left it. Reads all of it."""
    n_bytes = os.path.getsize(path) - len(END) - 8
    with open(path, "rb") as file:
        if n_bytes < 0 or END + b"%08x" % _crc(file, n_bytes) != file.read():
            raise ValueError(f"{Path(path).name} does not agree with its checksum")


def _crc(file: Any, n_bytes: int) -> int:
    found = 0
    for start in range(0, n_bytes, BLOCK):
        found = zlib.crc32(file.read(min(BLOCK, n_bytes - start)), found)
    return found


# ---- zip archives, as .npz and torch's files


def check_zip(path: str | os.PathLike[str]) -> None:
    """ValueError if a file that is a zip archive, as torch's are, has parts that do not agree with their checksums.

    torch.load does not look at them: a flipped bit would be a weight. Other damage raises what zipfile raises.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed = sum(info.file_size for info in archive.infolist())
        if claimed > memory():
            raise ValueError(f"unpacks to {claimed / 2**30:,.0f} GiB, more than this machine has")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"is damaged: {damaged} does not agree with its checksum")


def write_npz(file: str | os.PathLike[str] | IO[bytes], arrays: Mapping[str, np.ndarray], packed: bool = False) -> None:
    """The arrays by name in a .npz file, as `np.savez`, which has names of its own ("file", "allow_pickle")."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read_npz(path: str | os.PathLike[str], names: Container[str] | None = None) -> dict[str, np.ndarray | None]:
    """The arrays of a .npz file; None in the place of those that are not among `names`.

    Raises:
        UserError: it cannot be read or is damaged; an array holds objects, or would not fit into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for info in members.values():
                archive.open(info).close()  # its name stands in two places, which agree
            wanted = {name: info for name, info in members.items() if names is None or name in names}
            total = 0
            for name, info in wanted.items():
                total += _size(path, name, archive, info)
                if total > memory():
                    raise UserError(f"{path}: {name}: takes {total / 2**30:,.0f} GiB, more than this machine has")
            return {name: _array(archive, info) if name in wanted else None for name, info in members.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged file fails in every way: zlib.error, MemoryError, NotImplementedError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: is damaged, or not a file of .npz ({reason})") from error


def _size(path: str | os.PathLike[str], name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """What the header promises, in bytes; UserError unless the archive holds as many."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        promised = math.prod(shape) * dtype.itemsize
        held = info.file_size - member.tell()
    if dtype.hasobject:
        raise UserError(f"{path}: {name}: holds Python objects, expected numbers or text")
    if promised != held or min(shape, default=0) < 0:
        raise UserError(f"{path}: {name}: {shape} of {dtype} takes {promised} bytes, the file holds {held}")
    return promised


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        values = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)  # the end: there the checksum is looked at
    return values
