"""`ood-fast evaluate`: every detector on every OOD set of a benchmark, for one model or the seeds of some."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import evaluation
from ..checks import UserError
from ..data import ImageBenchmark
from ..detectors import DetectorSet, LayerDetector, find, in_all
from ..evaluation import Results, Trained
from ..evaluation.trained import PRETRAINED, default_folder
from ..values import Grids
from . import carried_through
from .benchmarks import Benchmarks, named_path, run_info
from .code import import_known, import_plugins
from .common import context_of, detector_set, device, given, processes, read_head_file, refuse_given, say, searched
from .model import PREPARATION, allow, is_callable, named
from .progress import Bar
from .quality import not_to_use


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    _check(options)
    import_plugins(options)
    chosen = _chosen(options)
    grids = searched(options.set, chosen)
    folder, evaluate = (_on_features if options.features else _on_images)(options, chosen)
    request = _request(options, chosen, grids, folder)
    folder = evaluation.check_folder(folder, None if options.overwrite else request)
    context, start = context_of(command) | {"request": request}, time.perf_counter()
    where = device(options.device)
    with processes(where, options) as process:
        if options.features and process.rank > 0:
            return  # the first does it all: there is no model to run
        with carried_through():
            results = evaluate(
                leave_out=options.detectors in (None, "all"),
                tune=not options.no_tune,
                grids=grids,
                device=where,
                progress=lambda what, total: Bar(what, total, options.quiet),
                **given(options, "bootstrap", "seed"),
            )
    if results is None:
        return
    context["seconds"] = round(time.perf_counter() - start, 2)
    evaluation.write(folder, results, context)
    if not options.quiet:
        evaluation.print_tables(results)
        _print_choices(results)
        print(f"Evaluated in {context['seconds']:.0f} s. Results: {folder}/, tables in {folder}/results.md")


def _chosen(options: argparse.Namespace) -> DetectorSet:
    """The detectors. By default without those that pass images through the model several times; a line says so."""
    names, told = options.detectors, ""
    if names is None:
        asked = {find(text.partition(".")[0].strip()).__name__ for text in options.set}
        slow = [name for name in in_all() if find(name).needs_model and name not in asked]
        names = ",".join(name for name in [*in_all(), *sorted(asked.difference(in_all()))] if name not in slow)
        told = f"left out, as it takes long: {', '.join(slow)}; --detectors all has it" * (not options.features)
    chosen = detector_set(names, options.set, bool(options.features))
    if running := [name for name, d in chosen.items() if d.needs_model and not isinstance(d, LayerDetector)]:
        told = f"{', '.join(running)} runs the model forth and back for each image and setting: this takes long"
    if told:
        say(options, f"ood-fast: {told}")
    return chosen


def _print_choices(results: Results) -> None:
    """The parameters that validation data chose, each with its AUROC there."""
    told: dict[str, list[str]] = {}
    for run in results.runs:
        for name, tried in run.trials.items():
            best = max(tried, key=lambda trial: trial["auroc"])
            found = ", ".join(f"{key}={value}" for key, value in best.items() if key != "auroc")
            text = f"{name}: {found} ({100 * best['auroc']:.2f}, best of {len(tried)}){not_to_use(best['auroc'])}"
            told.setdefault(run.trained.name, []).append(text)
    for name, texts in told.items():
        print(f"Chosen for {name} (AUROC on validation data):", *texts, sep="\n  ")


def _on_images(options: argparse.Namespace, chosen: DetectorSet) -> tuple[str | Path, Callable[..., Results | None]]:
    """The folder for the results, and what gives them."""
    paths = [path for given in options.runs for path in evaluation.paths_of(given)]
    benchmarks = Benchmarks(options, paths[0])
    first = benchmarks.open(run_info(paths[0]).get("seed"))
    options.benchmark = first.name  # also where the run says it
    return _folder(options, paths, first.name), functools.partial(
        evaluation.evaluate_runs,
        _opened(options, paths, first),
        benchmarks.of,
        chosen,
        **given(options, "skip_bad", "any_accuracy", "cache", "batch_size", "workers"),
    )


def _on_features(options: argparse.Namespace, chosen: DetectorSet) -> tuple[str | Path, Callable[..., Results]]:
    """The same of stored features."""
    ood = {}
    for text in options.ood_features:
        title, path = named_path("--ood-features", text, "[near/]NAME=PATH")
        group, slash, name = title.rpartition("/")
        if slash and group not in ("near", "far", "csid"):
            told = "expected near/NAME=PATH, far/NAME=PATH or NAME=PATH, csid/NAME=PATH"
            raise UserError(f"--ood-features: got {text!r}, {told}")
        if name in ood:
            raise UserError(f"--ood-features: {name} is there twice")
        ood[name] = (group or "far", path)
    train = Path(options.features).expanduser()
    default = (train if train.is_dir() else train.parent) / "eval"
    return default if options.out is None else options.out, functools.partial(
        evaluation.evaluate_features,
        *(options.features, options.test, ood, chosen),
        head=read_head_file(options.head_file) if options.head_file else None,
        **given(options, "validation", "ood_validation"),
    )


ONLY_FEATURES = ("head_file", "test", "ood_features", "validation", "ood_validation")
ONLY_IMAGES: tuple[str, ...] = ("benchmark", "data_root", "ood", "ood_folder", "download", "synthetic", "image_size")
ONLY_IMAGES += ("classes", "csid", "csid_folder")
ONLY_IMAGES += ("any_accuracy", "skip_bad", "model", "recipe", "head", "cache", *PREPARATION)


def _check(options: argparse.Namespace) -> None:
    if bool(options.runs) == bool(options.features):
        raise UserError("RUN, --features: expected one of them, trained models or stored features")
    told = "not used with --features" if options.features else "only used with --features"
    refuse_given(options, told, *(ONLY_IMAGES if options.features else ONLY_FEATURES))
    if options.features and not (options.test and options.ood_features):
        raise UserError("--features: needs --test and --ood-features")
    if options.ood_validation and not options.validation:
        raise UserError("--ood-validation: needs --validation")
    if options.download and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--download: every process would fetch the same files; download in one process first")


def _request(
    options: argparse.Namespace, chosen: DetectorSet, grids: Grids, folder: str | os.PathLike[str]
) -> dict[str, Any]:
    """What decides the results of a run: those of another request are other results."""
    detectors = {
        name: {
            **detector.settings(),
            **dict.fromkeys(() if options.no_tune else grids.get(name, detector.grid), "searched"),
        }
        for name, detector in chosen.items()
    }
    deciding = {name: value for name, value in given(options, *DECIDING, *ONLY_FEATURES).items() if value}
    told = {"detectors": detectors, "options": {f"--{n.replace('_', '-')}": value for n, value in deciding.items()}}
    told["options"]["--features" if options.features else "RUN"] = [
        place if place.startswith(PRETRAINED) else _from(folder, place) for place in options.runs or [options.features]
    ]
    read: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return read  # as it is read again


def _from(folder: str | os.PathLike[str], place: str) -> str:
    """A path as it is seen from the results, which may be moved together."""
    path, start = (Path(each).expanduser().resolve() for each in (place, folder))
    try:
        return os.path.relpath(path, start)
    except ValueError:  # on another drive of Windows
        return str(path)


DECIDING: tuple[str, ...] = ("benchmark", "checkpoint", "ood", "ood_folder", "csid", "csid_folder", "synthetic")
DECIDING += ("image_size", "classes", "skip_bad", *PREPARATION)


def _folder(options: argparse.Namespace, paths: list[str], benchmark: str) -> str | Path:
    if options.out is not None:
        return str(options.out)
    if len(options.runs) > 1:
        example = f"ood-fast evaluate {shlex.join(options.runs)} --out runs/both"
        raise UserError(f"--out: needed with several runs: the folder of their common results, as in: {example}")
    return default_folder(options.runs[0]) / "eval" / benchmark


def _opened(options: argparse.Namespace, paths: list[str], benchmark: ImageBenchmark) -> Iterator[Trained]:
    shape = benchmark.image_shape
    if options.size:
        shape = (shape[0], options.size, options.size)
    for path in paths:
        info, model = run_info(path), options.model
        unknown = import_known(info.get("plugins") or [])
        if info:
            allow(info["recipe"]["model"], options.model, path)
            model = None if options.model == info["recipe"]["model"] else model
        elif model is not None and is_callable(model):
            model = named(model)
        try:
            yield evaluation.open_run(
                path, benchmark.n_classes, shape, model=model, **given(options, "recipe", "checkpoint", "head")
            )
        except UserError as error:
            missing = f"; it was trained with --plugin {', '.join(unknown)}, pass it if it is yours" if unknown else ""
            raise UserError(f"{error}{missing}") from error
