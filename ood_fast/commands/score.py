"""`ood-fast score`: score images or stored features with fitted detectors, into a table."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checks, features
from ..checks import UserError
from ..data.folders import class_names
from ..data.images import Files
from ..detectors import DetectorSet
from ..detectors.numbers import widened
from ..evaluation.cache import model_key
from . import RunError, gallery, images
from .code import import_plugins
from .common import device, processes, read_detectors, refuse_given, warn
from .model import OF_IMAGES, cannot_take, fitted_on, named_head
from .progress import Bar
from .table import FORMATS, ScoreTable


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    out, page = _check(options)
    import_plugins(options)
    where = device(options.device)
    detectors, notes = _load(options, where)
    with processes(where, options) as process:
        source = None if options.features else images.read_images(options.data)
        if options.classes is not None:
            _name_classes(detectors, options.classes)
        ready = None if source is None else (source, *fitted_on(options, detectors, notes, where))
        with ScoreTable(out, detectors, _identity(options, ready), process, options.overwrite) as table:
            what = f"scoring {' '.join(options.data[:2]) if options.data else options.features}"
            with Bar(what, None, options.quiet) as bar, _told(notes):
                if ready is None:
                    _score_features(table, options, bar)
                else:
                    _score_images(table, options, bar, notes, *ready)
            counts = table.finish()
    if counts is None:
        return
    if page is not None:
        gallery.write(page, out, source, command)
    if not options.quiet:
        n_rows, n_ood, n_bad = counts
        print(f"{n_rows} rows in {out}" + (f", sorted in {page}" if page else ""))
        for name, count in n_ood.items():
            print(f"  {name}: {count} ({100 * count / max(1, n_rows):.1f} %) are out-of-distribution")
        if n_bad:
            print(f"  {n_bad} images could not be read and were skipped")


def _check(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The table and the page to write, before anything is done."""
    if bool(options.data) == bool(options.features):
        raise UserError("--data, --features: expected one of them, images or stored features")
    if options.features:
        refuse_given(options, "not used with --features", *OF_IMAGES, "other_model")
    out = Path(options.out).expanduser()
    page = None if options.html is None else Path(options.html).expanduser()
    if out.suffix not in FORMATS:
        raise UserError(f"--out: got {out}, expected a name ending in {' or '.join(FORMATS)}")
    if page is not None and (page.is_dir() or page.suffix not in (".html", ".htm")):
        raise UserError(f"--html: got {page}, expected the name of a file ending in .html")
    if package := FORMATS[out.suffix].needs:
        checks.optional_import(f"--out: writing {out.suffix}", package)
    for name, file in (("--out", out), ("--html", page)):
        if file is not None:
            checks.writable_folder(name, file.parent)
            if file.exists() and not options.overwrite:
                raise UserError(f"{name}: {file} exists; pass --overwrite to replace it")
    return out, page


def _load(options: argparse.Namespace, where: str) -> tuple[DetectorSet, dict[str, Any]]:
    """The detectors of the file, and what it says of their fit."""
    detectors, notes = read_detectors(options.detectors, where)
    seeing = [d.label for d in detectors.detectors if d.needs_model]
    if options.features and seeing:
        raise UserError(f"--features: {', '.join(seeing)} passes images through the model, features do not suffice")
    return detectors, notes


@contextmanager
def _told(notes: dict[str, Any]) -> Iterator[None]:
    """What model and detectors say of the data, as an error of this command."""
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:  # what the model says of the images
        raise RunError(cannot_take(notes, error)) from error
    except ValueError as error:  # what the detectors say of the data: NaN, features of another width
        raise RunError(f"{error}; what was scored before is kept") from error


def _name_classes(detectors: DetectorSet, file: str) -> None:
    """Call the classes as `--classes` does."""
    names = tuple(class_names(file))
    for detector in detectors.detectors:
        c = len(detector.class_names or ()) or (len(detector.head_weight) if detector.needs_head else len(names))
        if c != len(names):
            raise UserError(f"--classes {file}: {len(names)} names, but the detectors were fitted on {c} classes")
        detector.class_names = names


def _identity(options: argparse.Namespace, ready: tuple[Files, nn.Module, dict[str, Any]] | None) -> str:
    """A key of all that decides the rows: an interrupted run with another one is not continued."""
    digest = hashlib.sha256(Path(options.detectors).read_bytes())
    chosen: list[Any] = [os.path.realpath(path) for path in options.data or ()]
    files = [] if options.classes is None else [Path(options.classes).expanduser()]
    if ready is None:
        files += features.files(options.features)
    else:
        source, model, prepared = ready
        chosen += [model_key(model, named_head(model, options.head)), prepared]
        source.update(digest)
    chosen += [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest.update(json.dumps(chosen).encode())
    return digest.hexdigest()


def _score_features(table: ScoreTable, options: argparse.Namespace, bar: Bar) -> None:
    detectors, end = table.detectors, 0
    exact = _exact_of(detectors)
    head = next(((d.head_weight, d.head_bias) for d in detectors.detectors if d.needs_head), None)
    for index, stored in enumerate(features.batches(options.features)):
        first, end = end, end + len(stored)
        if index % table.process.size != table.process.rank:
            continue
        bar.advance(len(stored))
        if end <= table.start:
            continue
        stored = stored.rows(slice(max(0, table.start - first), None))
        first = max(first, table.start)
        if head and stored.logits is not None:
            stored.checked(*head)
        stored = stored.with_logits(None if stored.W is not None else head)
        if stored.logits is None and any(d.needs_logits for d in detectors.detectors):
            raise UserError(f"--features {options.features}: holds no logits and no head W, b to make them with")
        positions = range(first, end)
        paths = stored.paths or [str(row) for row in positions]
        predicted = None if stored.logits is None else _predicted(table, stored.logits)
        with stored.named():
            scores = detectors.score_features(stored.features, stored.logits)
            table.write(positions, paths, predicted, scores, exact(stored.logits))


def _score_images(
    table: ScoreTable,
    options: argparse.Namespace,
    bar: Bar,
    notes: dict[str, Any],
    source: Files,
    model: nn.Module,
    prepared: dict[str, Any],
) -> None:
    if not options.quiet:
        _warn_of_other_settings({"model": options.model, **prepared, "truncated": None}, notes)
    rows = table.process.share(len(source))
    bar.expect(len(rows))
    rest = range(max(rows.start, table.start), rows.stop)
    bar.advance(len(rows) - len(rest))
    batches = images.Images(source, prepared, rest, options, bar.advance, table.write_bad)
    exact = _exact_of(table.detectors)
    with batches.named():
        for batch, scores in table.detectors.score_loader(model, batches, options.head):
            positions, paths = batch.given[2:]
            table.write(positions, paths, _predicted(table, batch.logits), scores, exact(batch.logits))


def _exact_of(detectors: DetectorSet) -> Callable[[Tensor | None], Mapping[str, Tensor]]:
    """Gives the scores of logits alone in float64: in float32 the most confident images tie at 1. They are what is
    written; flags stay those of a deployed detector."""
    names = [
        name
        for name, d in detectors.items()
        if d.needs_logits and not (d.needs_features or d.needs_head or d.needs_model or d.gathers())
    ]
    chosen = detectors.only(names) if names else None
    return lambda logits: {} if chosen is None or logits is None else chosen.score_features(None, widened(logits))


def _predicted(table: ScoreTable, logits: Tensor) -> Tensor:
    """The classes (n,); UserError where the names are those of other classes."""
    if table.class_names is not None and len(table.class_names) != logits.shape[1]:
        raise UserError(f"--classes: {len(table.class_names)} names, but there are {logits.shape[1]} logits")
    return logits.max(dim=1).indices


def _warn_of_other_settings(given: dict[str, Any], notes: dict[str, Any]) -> None:
    """Thresholds and statistics hold for the model and the images that the detectors were fitted on."""
    different = [
        f"--{name} {_written(value)} (fitted with {_written(notes[name])})"
        for name, value in given.items()
        if value is not None and notes.get(name) is not None and _written(value) != _written(notes[name])
    ]
    if different:
        warn(f"{', '.join(different)}: not what the detectors were fitted on, scores and thresholds need not hold")


def _written(value: Any) -> str:
    """As on the command line."""
    return ",".join(f"{float(number):g}" for number in value) if isinstance(value, (list, tuple)) else str(value)
