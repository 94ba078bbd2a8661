"""Stored features: what a model made of data, in files that any tool can write.

A file holds, under these names, `features` (n, m) and, as far as there are any, `logits` (n, c), `targets` (n,) of
integers, `paths` (n,) of text, and the head of the model: `W` (c, m), `b` (c,).

    .npz        NumPy, arrays of those names; read without pickle
    .pt, .pth   torch.save of a dict of tensors (and a list of paths); read with weights_only
    .parquet    one row a sample: list columns `features`, `logits`, columns `targets`, `paths`; needs pyarrow; no head

`targets` may be called as in batches, `labels` or `y`, and `paths` `path`. A folder of such files is read one after the
other in the order of their names, hidden ones left out: of data larger than memory, one file is in memory at a time.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .intact import check_zip, memory, read_npz
from .models.outputs import other_logits
from .models.running import TARGETS

SUFFIXES = (".npz", ".pt", ".pth", ".parquet")
_NAMES = ("features", "logits", "targets", "paths", "W", "b")
_OTHER_NAMES = dict.fromkeys(TARGETS, "targets") | {"path": "paths"}


@dataclass(frozen=True)
class Stored:
    """Samples of one file, or a part of them."""

    features: Tensor  # (n, m)
    logits: Tensor | None = None  # (n, c)
    targets: Tensor | None = None  # (n,) int64
    paths: tuple[str, ...] | None = None
    W: Tensor | None = None  # (c, m)
    b: Tensor | None = None  # (c,)
    file: Path | None = None  # where they are
    first: int = 0  # the row of that file where they begin

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: slice) -> Stored:
        """These samples, with the head."""

        def cut(values: Any) -> Any:
            return None if values is None else values[rows]

        values = {name: cut(getattr(self, name)) for name in ("features", "logits", "targets", "paths")}
        return replace(self, **values, first=self.first + (rows.start or 0))

    @contextmanager
    def named(self) -> Iterator[None]:
        """What is wrong with a row inside names the row of the file and its path: UserError."""
        try:
            yield
        except checks.RowError as error:
            where = f"row {self.first + error.in_batch} of the file"
            where += f" ({self.paths[error.in_batch]})" if self.paths else ""
            raise checks.UserError(f"{self.file}: {error.text.replace(checks.ROW, where)}") from error

    def with_logits(self, head: tuple[Tensor, Tensor | None] | None) -> Stored:
        """The same with logits: those stored, `checked`, else those of `head` or of the head stored beside them."""
        weight, bias = head or (self.W, self.b)
        if self.logits is not None or weight is None:
            return self if weight is None else self.checked(weight, bias)
        checks.features(self.features, weight)
        dtype = torch.promote_types(self.features.dtype, weight.dtype)
        bias = None if bias is None else bias.to(dtype)
        return replace(self, logits=torch.nn.functional.linear(self.features.to(dtype), weight.to(dtype), bias))

    def checked(self, weight: Tensor, bias: Tensor | None) -> Stored:
        """The same; UserError where the head does not make the logits of the first rows, to the digits of bfloat16."""
        if self.logits is None:
            return self
        if (difference := other_logits(self.features, self.logits, weight, bias)) is not None:
            raise checks.UserError(
                f"{self.file}: the logits are not F.linear(features, W, b), they differ by up to {difference:.3g}: "
                "rows in another order, or of another model or head; store features, logits, W and b of one pass, or "
                "leave out the logits, which are then made of the others"
            )
        return self


def files(path: str | os.PathLike[str]) -> list[Path]:
    """The feature files that `path` means: itself, or those in the folder; UserError if there is none."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(e for e in path.iterdir() if e.suffix in SUFFIXES and not e.name.startswith("."))
        if not found:
            raise checks.UserError(f"{path}: holds no feature file, expected {', '.join(SUFFIXES)}")
        if strange := [entry for entry in found if not entry.is_file()]:  # reading a pipe would wait for ever
            raise checks.UserError(f"{strange[0]}: is no regular file, or a dangling link")
        return found
    if not path.is_file():
        raise checks.UserError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise checks.UserError(f"{path}: got a file ending in {path.suffix!r}, expected {', '.join(SUFFIXES)}")
    return [path]


def batches(path: str | Path, size: int = 8192, *, nan: bool = False) -> Iterator[Stored]:
    """The samples of all files that `path` means, at most `size` at a time; UserError for NaN unless `nan`."""
    width = None
    for file in files(path):
        first = 0
        for stored in _batches_of(file, size):
            m = stored.features.shape[1]
            if width is not None and m != width:
                raise checks.UserError(f"{file}: features: got {m} a row, expected {width} as in the files before it")
            width = m
            stored = replace(stored, file=file, first=first)
            if not nan:
                _refuse_nan(stored)
            first += len(stored)
            yield stored


def _batches_of(file: Path, size: int) -> Iterator[Stored]:
    if file.suffix == ".parquet":
        yield from _parquet_batches(file, size)
        return
    stored = load(file)
    for start in range(0, len(stored), size):
        yield stored.rows(slice(start, start + size))


def _refuse_nan(stored: Stored) -> None:
    """UserError that names the row of the file and its path."""
    for name, values in (("features", stored.features), ("logits", stored.logits)):
        if values is None or not bool(values.isnan().any()):
            continue
        rows = values.isnan().any(dim=1).nonzero().flatten()
        with stored.named():
            raise checks.RowError(
                f"{name}: got NaN in {len(rows)} of {len(values)} rows, the first is {checks.ROW}; expected numbers, "
                "look at that input, and at the model in reduced precision",
                int(rows[0]),
            )


def load_head(file: str | Path) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) of a feature file, which need not hold features; None if it holds no head."""
    file = Path(file)
    held = {} if file.suffix == ".parquet" else _held(file)
    if not isinstance(held, dict) or "W" not in held:
        return None
    stored = _checked(file, {"features": torch.zeros(0, 1), "W": held["W"], "b": held.get("b")})
    return None if stored.W is None else (stored.W, stored.b)


def load(file: str | Path) -> Stored:
    """All samples of a file that is no Parquet; UserError if it cannot be read or does not hold what it should."""
    return _checked(Path(file), _held(Path(file)))


def _held(file: Path) -> object:
    """What a .npz or .pt file holds by its names; None for an array of a .npz whose name is not known."""
    try:
        if file.suffix == ".npz":
            return read_npz(file, {*_NAMES, *_OTHER_NAMES})
        check_zip(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except checks.UserError:
        raise
    except OSError as error:
        raise checks.UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged file fails in every way: zlib.error, MemoryError, UnpicklingError, ...
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(file):
            raise checks.UserError(f"{file}: {checks.why_not_read(file, error)}") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise checks.UserError(f"{file}: is damaged, or not a file of {file.suffix} ({reason})") from error


def _checked(file: Path, held: object) -> Stored:
    """What is held, as tensors of the dtypes and shapes that it should have; UserError if it is not."""
    if not isinstance(held, dict) or "features" not in held:
        got = ", ".join(map(repr, held)) or "nothing" if isinstance(held, dict) else type(held).__name__
        others = ", ".join(f"`{name}`" for name in _NAMES[1:])
        raise checks.UserError(f"{file}: got {got}, expected `features` (n, m), and what there is of {others}")
    found = {name: held[given] for given, name in _known(file, held).items() if held[given] is not None}
    tensors: dict[str, Any] = {name: _tensor(file, name, value) for name, value in found.items() if name != "paths"}
    for name, n_dims in {"features": 2, "logits": 2, "W": 2, "b": 1}.items():
        value = tensors.get(name)
        if value is not None and (value.dim() != n_dims or not value.is_floating_point() or 0 in value.shape[1:]):
            got = f"{value.dtype} {tuple(value.shape)}"
            raise checks.UserError(f"{file}: {name}: got {got}, expected floating-point numbers in {n_dims} dimensions")
    targets = tensors.get("targets")
    if targets is not None:
        if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex():
            got = f"{targets.dtype} {tuple(targets.shape)}"
            raise checks.UserError(f"{file}: targets: got {got}, expected integers (n,)")
        tensors["targets"] = targets.long()
    if "paths" in found:
        tensors["paths"] = _paths(file, found["paths"])
    n_bytes = sum(value.numel() * value.element_size() for name, value in tensors.items() if name != "paths")
    if n_bytes > memory():  # of few bytes, each in many places
        raise checks.UserError(f"{file}: takes {n_bytes / 2**30:,.0f} GiB, more than this machine has")
    n_rows = len(tensors["features"])
    for name in ("logits", "targets", "paths"):
        if name in tensors and len(tensors[name]) != n_rows:
            raise checks.UserError(f"{file}: got {len(tensors[name])} {name} and {n_rows} features, expected as many")
    return Stored(**tensors)


def _known(file: Path, given: Iterable[str]) -> dict[str, str]:
    """The names that mean something, and what they mean; UserError where two mean the same."""
    known = {name: _OTHER_NAMES.get(name, name) for name in given if name in _NAMES or name in _OTHER_NAMES}
    if twice := next((name for name in _NAMES if list(known.values()).count(name) > 1), None):
        both = " and ".join(f"`{name}`" for name, meant in known.items() if meant == twice)
        raise checks.UserError(f"{file}: holds {both}, expected one of them")
    return known


def _tensor(file: Path, name: str, value: object) -> Tensor:
    """Dense, of a dtype that PyTorch computes with."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise checks.UserError(
                f"{file}: {name}: got a tensor in {value.layout}, {value.dtype}, expected a dense one"
            )
        if value.is_floating_point() and value.element_size() < 2:
            raise checks.UserError(f"{file}: {name}: got {value.dtype}, expected float16, bfloat16, float32 or float64")
        return value
    try:
        if not (array := np.asarray(value)).dtype.isnative:
            raise ValueError(f"got {array.dtype} of another byte order; save array.astype({array.dtype.name!r})")
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise checks.UserError(f"{file}: {name}: {error}") from error


def _paths(file: Path, value: object) -> tuple[str, ...]:
    """Text, of what a file holds as text, as bytes, or as numbers; no path is missing."""
    if isinstance(value, (np.ndarray, Tensor)):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise checks.UserError(f"{file}: paths: got {type(value).__name__}, expected one text a row")
    for row, path in enumerate(value):
        if not isinstance(path, (str, bytes, int)):
            got = "null" if path is None else type(path).__name__
            raise checks.UserError(f"{file}: paths, row {row}: got {got}, expected text")
    return tuple(os.fsdecode(path) if isinstance(path, bytes) else str(path) for path in value)


# ---- Parquet


def _parquet_batches(file: Path, size: int) -> Iterator[Stored]:
    pyarrow = checks.optional_import(f"{file}: reading Parquet", "pyarrow")
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            names = opened.schema_arrow.names
            if "features" not in names:
                _checked(file, dict.fromkeys(names))  # raises, and lists them
            columns = {name: meant for name, meant in _known(file, names).items() if meant in _NAMES[:4]}
            if twice := [name for name in columns if names.count(name) > 1]:
                raise checks.UserError(f"{file}: has more than one column {twice[0]!r}")
            first, widths = 0, dict[str, int]()
            for batch in opened.iter_batches(size, columns=[*columns]):
                held = {
                    meant: _column(file, name, batch.column(name), first, widths) for name, meant in columns.items()
                }
                first += len(batch)
                yield _checked(file, held)
    except UnicodeDecodeError as error:  # also a ValueError, as what `_checked` raises
        raise checks.UserError(f"{file}: is damaged, a text is not in UTF-8 ({error})") from error
    except OSError as error:
        raise checks.UserError(f"{file}: cannot be read ({str(error).strip().splitlines()[0]})") from error
    except pyarrow.ArrowException as error:
        raise checks.UserError(f"{file}: is damaged, or not a Parquet file ({str(error).splitlines()[0]})") from error


def _column(file: Path, name: str, column: Any, first: int, widths: dict[str, int]) -> Any:
    """The values of one column of a batch that begins at row `first`; `widths`: of the rows of lists before it."""
    import pyarrow.compute
    from pyarrow import types

    def refuse(row: int, got: str, expected: str) -> Exception:
        return checks.UserError(f"{file}: row {first + row}, column {name!r}: got {got}, expected {expected}")

    column = _plain(column)
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise refuse(row, "null", "a value in every row")
    if _OTHER_NAMES.get(name, name) == "paths":
        return column.to_pylist()
    if name in TARGETS:
        if not types.is_integer(column.type):
            raise refuse(0, str(column.type), "integers")
        return column.to_numpy(zero_copy_only=False).astype(np.int64)
    is_list = types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type)
    if not is_list:
        raise refuse(0, str(column.type), "lists of floating-point numbers")
    lengths = np.asarray(pyarrow.compute.list_value_length(column))
    width = widths.setdefault(name, int(lengths[0]) if len(lengths) else 1)
    other = np.flatnonzero(lengths != (width or -1))
    if len(other):
        raise refuse(int(other[0]), f"{lengths[other[0]]} values", f"{width or 'some'} as in the rows before it")
    flat = _plain(column.flatten())
    if not types.is_floating(flat.type):
        raise refuse(0, str(column.type), "lists of floating-point numbers")
    if flat.null_count:
        row, place = divmod(flat.is_null().to_pylist().index(True), width)
        raise refuse(row, f"null at place {place}", f"{width} numbers")
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), width).copy()


def _plain(column: Any) -> Any:
    """Without the dictionary and the extension type that it may be stored in."""
    column = getattr(column, "storage", column)
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
