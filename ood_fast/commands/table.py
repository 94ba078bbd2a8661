"""The table that `ood-fast score` writes: complete under its name or not there, and continued after an interruption.

While scoring, each process appends its rows to `.NAME.part<rank>`, one JSON array a line: what was written before an
interruption stays, and a line that was cut off is dropped. At the end the parts are merged in the order of the samples.
"""

from __future__ import annotations

import glob
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from .. import spreadsheet
from ..checks import UserError
from ..detectors import DetectorSet
from ..files import BusyError, locked, replacing
from ..processes import Processes
from . import RunError

Read = tuple[list[str], list[list[Any]]]  # columns and rows
GROUP_ROWS = 65536  # rows of one group of a Parquet file


class ScoreTable:
    """Rows of samples by their position in the data, which only grows.

    Attributes:
        start: the first position that is not in the table yet.
    """

    def __init__(self, out: Path, detectors: DetectorSet, identity: str, process: Processes, overwrite: bool) -> None:
        self.out, self.detectors, self.process = out, detectors, process
        self.header = json.dumps({"identity": identity, "processes": process.size})
        self.class_names = next((d.class_names for d in detectors.detectors if d.class_names), None)
        self.bad: list[tuple[int, str]] = []  # not in the part yet
        part = self._part(process.rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        self.start = 0
        self.alone = ExitStack()
        try:
            part.touch()
            self.alone.enter_context(locked(part))  # waits for what a killed one has left running
            if not part.exists() or (out.exists() and not overwrite):  # another one was done meanwhile
                raise BusyError
        except BusyError as error:
            self.alone.close()
            raise UserError(f"--out: another ood-fast score is at work on {out}") from error
        except OSError as error:
            raise RunError(f"cannot write {part}: {error.strerror or error}") from error
        try:
            if part.exists() and not overwrite:
                self.start = self._resumed(part)
                self.file = open(part, "a", encoding="utf-8")  # noqa: SIM115 (closed by `finish`)
            else:
                self.file = open(part, "w", encoding="utf-8")  # noqa: SIM115
                self.file.write(self.header + "\n")
        except OSError as error:
            if not part.stat().st_size:
                part.unlink()
            raise RunError(f"cannot write {part}: {error.strerror or error}") from error
        self.has_rows = self.start > 0

    def __enter__(self) -> ScoreTable:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError):  # a full disk, which was told
            self.file.close()
        if error is not None and not self.has_rows:  # nothing to continue from
            self._part(self.process.rank).unlink(missing_ok=True)
        self.alone.close()

    def _part(self, rank: int) -> Path:
        return self.out.with_name(f".{self.out.name}.part{rank}")

    def _resumed(self, part: Path) -> int:
        """Cut off a line that is not complete; the position after the last one that is."""
        with open(part, "rb+") as file:
            content_end, start = 0, 0
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                content_end += len(line)
                if number == 0 and line != self.header.encode() + b"\n":
                    raise UserError(
                        f"--out: {part} is what an interrupted run with other options or data left; pass --overwrite "
                        "to begin anew"
                    )
                if number > 0:
                    start = self._position(part, number, line, start) + 1
            file.truncate(content_end)
            if content_end == 0:
                file.write(self.header.encode() + b"\n")
        return start

    def _position(self, part: Path, number: int, line: bytes, least: int) -> int:
        """Of the sample in a line; refused if the line is no row."""
        try:
            row = json.loads(line)
            position, _, *rest = row
            n_cells = [len(cells) for cells in rest[1:]]
            if isinstance(position, int) and position >= least and n_cells in ([], [len(self.detectors)] * 2):
                return position
        except (ValueError, TypeError, IndexError, RecursionError):
            pass
        raise UserError(f"--out: {part}, line {number + 1}: is damaged; pass --overwrite to begin anew")

    def write(
        self,
        positions: Sequence[int],
        paths: Sequence[str],
        predicted: Tensor | None,
        scores: Mapping[str, Tensor],
        exact: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Add the rows of one batch. `exact`: of some scores what is written in place of what decides the flags."""
        predictions = [None] * len(paths) if predicted is None else predicted.tolist()
        columns = [exact.get(name, scores[name]).tolist() for name in self.detectors]
        none = [None] * len(paths)
        flags = [none if d.threshold is None else d.is_ood(scores[n]).tolist() for n, d in self.detectors.items()]
        both = zip(*columns, strict=True), zip(*flags, strict=True)
        self._append(zip(positions, paths, predictions, *both, strict=True))

    def write_bad(self, position: int, path: str) -> None:
        """Remember an image that cannot be read, to be counted at the end.

        It is written with the rows of its batch: an interrupted run goes on behind the last position in the part, so
        that no position may come before a smaller one.
        """
        self.bad.append((position, path))

    def _append(self, rows: Iterable[tuple[Any, ...]]) -> None:
        lines = [json.dumps(row) for row in sorted((*self.bad, *rows), key=lambda row: row[0])]
        self.bad = []
        try:
            self.file.writelines(line + "\n" for line in lines)
            self.file.flush()
            self.has_rows |= bool(lines)
        except OSError as error:
            raise RunError(f"cannot write {self._part(self.process.rank)}: {error.strerror or error}") from error

    def finish(self) -> tuple[int, dict[str, int], int] | None:
        """Close the parts, and make the table of them in the first process.

        Returns there (rows, detector with a threshold -> rows that are OOD, images that could not be read).
        """
        self._append(())  # a batch of bad images only comes without rows
        self.file.close()
        self.process.everyone(None)  # all parts are there
        try:
            return self._merged() if self.process.rank == 0 else None
        finally:
            self.process.everyone(None)  # no other score takes a part, which each process holds, before it is merged

    def _merged(self) -> tuple[int, dict[str, int], int]:
        self.n_bad, self.n_rows = 0, 0
        self.n_ood = {name: 0 for name, d in self.detectors.items() if d.threshold is not None}
        try:
            with replacing(self.out) as part:
                FORMATS[self.out.suffix].write(self, part)
        except OSError as error:
            raise RunError(f"{error}; run the same command again") from error
        for part in self.out.parent.glob(f"{glob.escape(self._part(0).name[:-1])}*"):  # also of more processes
            if part.name[len(self._part(0).name) - 1 :].isdecimal():
                part.unlink(missing_ok=True)
        return self.n_rows, self.n_ood, self.n_bad

    def columns(self) -> list[str]:
        """path, prediction, score, is_ood; with several detectors NAME and NAME_is_ood for each."""
        names = list(self.detectors)
        pairs = [("score", "is_ood")] if len(names) == 1 else [(name, f"{name}_is_ood") for name in names]
        return ["path", "prediction", *(column for pair in pairs for column in pair)]

    def rows(self) -> Iterator[list[Any]]:
        """All parts merged, without the images that could not be read."""
        for row in heapq.merge(*(self._lines(rank) for rank in range(self.process.size)), key=lambda row: row[0]):
            if len(row) == 2:
                self.n_bad += 1
                continue
            _, path, prediction, scores, flags = row
            cells: list[Any] = []
            for name, score, is_ood in zip(self.detectors, scores, flags, strict=True):
                cells += [score, is_ood]
                if is_ood:
                    self.n_ood[name] += 1
            if prediction is not None and self.class_names is not None:
                prediction = self.class_names[prediction]
            self.n_rows += 1
            yield [path, prediction, *cells]

    def _lines(self, rank: int) -> Iterator[list[Any]]:
        with open(self._part(rank), encoding="utf-8") as file:
            next(file)
            for line in file:
                yield json.loads(line)


# ---- the kinds of files


def _write_csv(table: ScoreTable, path: Path) -> None:
    # Names of files need not be UTF-8 on Linux: their bytes come out as they are.
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        spreadsheet.write_rows(file, itertools.chain([table.columns()], table.rows()), "\r\n")


def _read_csv(path: Path) -> Read:
    columns, *rows = spreadsheet.read_rows(path, errors="surrogateescape")
    return columns, [[*row[:2], *(float(x) if i % 2 == 0 else x for i, x in enumerate(row[2:]))] for row in rows]


def _write_parquet(table: ScoreTable, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns, text, flag, score = table.columns(), pyarrow.string(), pyarrow.bool_(), pyarrow.float64()
    kinds = {"path": text, "prediction": text if table.class_names else pyarrow.int64()}
    schema = pyarrow.schema([(c, kinds.get(c, flag if c.endswith("is_ood") else score)) for c in columns])
    with parquet.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        rows = (list(map(_utf8, row)) for row in table.rows())
        full = True
        while full:
            group = list(itertools.islice(rows, GROUP_ROWS))
            values = [list(column) for column in zip(*group, strict=True)] or [[] for _ in columns]
            writer.write_table(pyarrow.table(values, schema=schema))
            full = len(group) == GROUP_ROWS


def _read_parquet(path: Path) -> Read:
    from pyarrow import parquet

    held = parquet.read_table(path)
    return held.column_names, [list(row.values()) for row in held.to_pylist()]


def _utf8(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    # In a locale that is not UTF-8 all bytes beyond ASCII are escaped, also those that are UTF-8.
    named = cell.encode(errors="surrogateescape").decode(errors="surrogateescape")
    return named.encode(errors="backslashreplace").decode()


class Format(NamedTuple):
    """How a table is written to a file and read from it; `needs`: the package for it."""

    write: Callable[[ScoreTable, Path], None]
    read: Callable[[Path], Read]
    needs: str | None = None


FORMATS = {".csv": Format(_write_csv, _read_csv), ".parquet": Format(_write_parquet, _read_parquet, "pyarrow")}
