"""Stored features: what a model made of data, in files that any tool can write.

A file holds, under these names, `features` (n, m) and, as far as there are any, `logits` (n, c), `targets` (n,) of
integers, `paths` (n,) of text, and the head of the model: `W` (c, m), `b` (c,).

    .npz        NumPy, arrays of those names; read without pickle
    .pt, .pth   torch.save of a dict of tensors (and a list of paths); read with weights_only
    .parquet    one row a sample: list columns `features`, `logits`, columns `target` and `path`; needs pyarrow; no head

A folder of such files is read one after the other in the order of their names: of data larger than memory, one file is
in memory at a time.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checks

SUFFIXES = (".npz", ".pt", ".pth", ".parquet")
_NAMES = ("features", "logits", "targets", "paths", "W", "b")


@dataclass(frozen=True)
class Stored:
    """Samples of one file, or a part of them."""

    features: Tensor  # (n, m)
    logits: Tensor | None = None  # (n, c)
    targets: Tensor | None = None  # (n,) int64
    paths: tuple[str, ...] | None = None
    W: Tensor | None = None  # (c, m)
    b: Tensor | None = None  # (c,)

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: slice) -> Stored:
        """These samples, with the head."""

        def cut(values):
            return None if values is None else values[rows]

        return replace(self, **{name: cut(getattr(self, name)) for name in ("features", "logits", "targets", "paths")})

    def with_logits(self, head: tuple[Tensor, Tensor | None] | None) -> Stored:
        """The same with logits: those stored, else those of `head` or of the head stored beside the features."""
        weight, bias = head or (self.W, self.b)
        if self.logits is not None or weight is None:
            return self
        checks.features(self.features, weight)
        dtype = torch.promote_types(self.features.dtype, weight.dtype)
        bias = None if bias is None else bias.to(dtype)
        return replace(self, logits=torch.nn.functional.linear(self.features.to(dtype), weight.to(dtype), bias))


def files(path: str | Path) -> list[Path]:
    """The feature files that `path` means: itself, or those in the folder; UserError if there is none."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix in SUFFIXES)
        if not found:
            raise checks.UserError(f"{path}: holds no feature file, expected {', '.join(SUFFIXES)}")
        return found
    if not path.is_file():
        raise checks.UserError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise checks.UserError(f"{path}: got a file ending in {path.suffix!r}, expected {', '.join(SUFFIXES)}")
    return [path]


def batches(path: str | Path, size: int = 8192) -> Iterator[Stored]:
    """The samples of all files that `path` means, at most `size` at a time."""
    for file in files(path):
        if file.suffix == ".parquet":
            yield from _parquet_batches(file, size)
            continue
        stored = load(file)
        for start in range(0, len(stored), size):
            yield stored.rows(slice(start, start + size))


def load_head(file: str | Path) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) of a feature file, which need not hold features; None if it holds no head."""
    file = Path(file)
    held = {} if file.suffix == ".parquet" else _held(file)
    if not isinstance(held, dict) or "W" not in held:
        return None
    stored = _checked(file, {"features": torch.zeros(0, 1), "W": held["W"], "b": held.get("b")})
    return stored.W, stored.b


def load(file: str | Path) -> Stored:
    """All samples of one file; UserError if it cannot be read or does not hold what it should."""
    file = Path(file)
    if file.suffix == ".parquet":
        parts = list(_parquet_batches(file, 1 << 16))
        if not parts:
            raise checks.UserError(f"{file}: holds no sample")
        joined = {}
        for name in ("features", "logits", "targets"):
            values = [getattr(part, name) for part in parts]
            joined[name] = None if values[0] is None else torch.cat(values)
        paths = None if parts[0].paths is None else tuple(path for part in parts for path in part.paths)
        return Stored(**joined, paths=paths)
    return _checked(file, _held(file))


def _held(file: Path) -> object:
    """What a .npz or .pt file holds by its names; None for an array of a .npz whose name is not known."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] if name in _NAMES else None for name in archive.files}
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise checks.UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise checks.UserError(f"{file}: is damaged, or not a file of {file.suffix} ({reason})") from error


def _checked(file: Path, held: object) -> Stored:
    if not isinstance(held, dict) or "features" not in held:
        found = ", ".join(map(repr, held)) or "nothing" if isinstance(held, dict) else type(held).__name__
        others = ", ".join(f"`{name}`" for name in _NAMES[1:])
        raise checks.UserError(f"{file}: got {found}, expected `features` (n, m), and what there is of {others}")
    tensors: dict = {}
    for name in _NAMES:
        value = held.get(name)
        if value is None:
            continue
        if name == "paths":
            tensors[name] = tuple(map(str, value))
            continue
        if not isinstance(value, Tensor):
            try:
                value = torch.from_numpy(np.asarray(value))
            except TypeError as error:
                raise checks.UserError(f"{file}: {name}: {error}") from error
        tensors[name] = value
    dims = {"features": 2, "logits": 2, "W": 2, "b": 1}
    for name, n_dims in dims.items():
        if name in tensors and (tensors[name].dim() != n_dims or not tensors[name].is_floating_point()):
            got = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
            raise checks.UserError(f"{file}: {name}: got {got}, expected floating-point numbers in {n_dims} dimensions")
    if "targets" in tensors:
        targets = tensors["targets"]
        if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex():
            got = f"{targets.dtype} {tuple(targets.shape)}"
            raise checks.UserError(f"{file}: targets: got {got}, expected integers (n,)")
        tensors["targets"] = targets.long()
    n_rows = len(tensors["features"])
    for name in ("logits", "targets", "paths"):
        if name in tensors and len(tensors[name]) != n_rows:
            raise checks.UserError(f"{file}: got {len(tensors[name])} {name} and {n_rows} features, expected as many")
    return Stored(**tensors)


def _parquet_batches(file: Path, size: int) -> Iterator[Stored]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise checks.UserError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if "features" not in names:
                _checked(file, dict.fromkeys(names))  # raises, and lists them
            columns = [name for name in ("features", "logits", "target", "path") if name in names]
            for batch in opened.iter_batches(size, columns=columns):
                held = {}
                for name in columns:
                    column = batch.column(name)
                    if name == "path":
                        held["paths"] = column.to_pylist()
                    elif name == "target":
                        held["targets"] = column.to_numpy(zero_copy_only=False).copy()
                    else:
                        flat = column.flatten().to_numpy(zero_copy_only=False)
                        if len(batch) and len(flat) % len(batch):
                            raise checks.UserError(f"{file}: {name}: got rows of different lengths")
                        held[name] = flat.reshape(len(batch), -1).copy()
                yield _checked(file, held)
    except OSError as error:
        raise checks.UserError(f"{file}: cannot be read ({error})") from error
    except pyarrow.ArrowException as error:
        raise checks.UserError(f"{file}: is damaged, or not a Parquet file ({str(error).splitlines()[0]})") from error
