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
from typing import TYPE_CHECKING, Any

from ..recipes import BENCHMARK_NAMES
from .benchmarks import Benchmarks, named_path, run_info
from .code import import_known, import_plugins
from .common import RunError, context_of, detector_set, device, processes, read_head_file, refusal, say, searched
from .images import add_preparation
from .model import PREPARATION, allow, is_callable, named
from .options import MODEL_HELP, at_least, share
from .progress import Bar

if TYPE_CHECKING:
    from ..data import ImageBenchmark
    from ..detectors import DetectorSet
    from ..evaluation import Results, Trained


def add(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure trained models on a benchmark with every detector",
        description="Run each model once over the images of a benchmark, fit and tune the detectors, and report AUROC, "
        "FPR95 in both conventions, AUPR, accuracy and calibration for near and far OOD sets, with intervals and "
        "beside published numbers. Runs of one recipe are its seeds. What a model makes of the images is kept: a "
        "second evaluation runs no model. Under torchrun, each process takes a part of the images. With --features, "
        "the same from stored features (.npz, .pt, .parquet, or folders of them) in place of runs and images.",
        examples=(
            "ood-fast evaluate runs/cifar10-elogitnorm --data-root ~/data --detectors NCI,KNN,MSP",
            "ood-fast evaluate --features train.npz --test test.npz --ood-features near/dogs=dogs.npz",
        ),
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a folder of `ood-fast train`, OpenOOD's with s0/best.ckpt, ... in it, a checkpoint, or pretrained:NAME",
    )
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        help=f"{', '.join(BENCHMARK_NAMES)} (default: the one that the first run was trained for)",
    )
    data = parser.add_argument_group("data")
    share(data, "data-root", "layout", "download", "image-size")
    share(data, "ood", "ood-folder", "csid", "csid-folder")
    data.add_argument("--synthetic", action="store_true", help="also Gaussian noise and scrambled pixels")
    told = "leave out images that cannot be read; every image is read once more to find them"
    share(data, "any-accuracy", "skip-bad", skip_bad=told)
    told = "of the benchmark folder: its classes in the order of the model's outputs, one a line or JSON"
    share(data, "classes", classes=told)
    preparation = parser.add_argument_group("images, where they differ from the model's own and the benchmark's")
    add_preparation(preparation, "the model's own, else the benchmark's", "exif for own folders, else stored")
    stored = parser.add_argument_group("stored features, in place of RUN and the images of a benchmark")
    told = "of the training data, and the head W, b if there is one"
    share(stored, "features", "head-file", "validation", "ood-validation", features=told)
    stored.add_argument("--test", metavar="PATH", help="of in-distribution test data")
    stored.add_argument(
        "--ood-features",
        action="append",
        default=[],
        metavar="[near/]NAME=PATH",
        help="of an OOD set, far unless near/ stands before its name; csid/NAME: a covariate-shifted in-distribution "
        "set; may be repeated",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint", default="best", metavar="C", help="best (default), final, last, or a file of RUN"
    )
    share(model, "model", model=f"of a checkpoint that does not say: {MODEL_HELP}")
    model.add_argument("--recipe", metavar="NAME", help="what such a checkpoint was trained with; says the model too")
    share(model, "head")
    scores = parser.add_argument_group("detectors")
    scores.add_argument(
        "--detectors", metavar="A,B", help="or all (default: all that fit, and pass no image through the model)"
    )
    share(scores, "set", set="a parameter of a detector, which is then not searched")
    scores.add_argument(
        "--no-tune",
        action="store_true",
        help="take parameters as they are, instead of the best of OpenOOD's grids on validation data",
    )
    share(scores, "plugin")
    scores.add_argument(
        "--bootstrap", type=at_least(0), default=200, metavar="N", help="draws for intervals, 0: none (200)"
    )
    share(scores, "seed", seed="of the draws and of synthetic images (0)")
    parser.add_argument("--cache", metavar="DIR", help="where features are kept (default: RUN/cache)")
    parser.add_argument("--out", metavar="DIR", help="results folder (default: RUN/eval/BENCHMARK)")
    told = "replace results of other detectors or settings in that folder; those of the same are replaced without"
    share(parser, "overwrite", overwrite=told)
    share(parser, "batch-size", "workers", "device", "quiet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    from .. import evaluation

    _check(options)
    import_plugins(options.plugin)
    chosen = _chosen(options)
    grids = searched(options.set, chosen)
    request = _request(options, chosen, grids)
    folder, evaluate = (_on_features if options.features else _on_images)(options, chosen)
    folder = evaluation.check_folder(folder, None if options.overwrite else request)
    context, start = context_of(command) | {"request": request}, time.perf_counter()
    where = device(options.device)
    with processes(where) as process:
        options.quiet |= process.rank > 0
        if options.features and process.rank > 0:
            return  # the first does it all: there is no model to run
        try:
            results = evaluate(
                leave_out=options.detectors in (None, "all"),
                tune=not options.no_tune,
                grids=grids,
                device=where,
                bootstrap=options.bootstrap,
                seed=options.seed,
                progress=lambda what, total: Bar(what, total, options.quiet),
            )
        except OSError as error:
            raise RunError(str(error)) from error
        except (ValueError, RuntimeError) as error:
            if type(error) in (ValueError, RuntimeError):  # NaN in what the model gives; another process; no memory
                raise RunError(str(error)) from error
            raise
    if results is None:
        return
    context["seconds"] = round(time.perf_counter() - start, 2)
    try:
        evaluation.write(folder, results, context)
    except OSError as error:
        raise RunError(f"cannot write the results to {folder}: {error.strerror or error}") from error
    if not options.quiet:
        evaluation.print_tables(results)
        _print_choices(results)
        print(f"Evaluated in {context['seconds']:.0f} s. Results: {folder}/, tables in {folder}/results.md")


def _chosen(options: argparse.Namespace) -> DetectorSet:
    """The detectors. By default without those that pass images through the model several times; a line says so."""
    from ..detectors import LayerDetector, find, known

    names, told = options.detectors, ""
    if names is None:
        asked = {find(text.partition(".")[0].strip()).__name__ for text in options.set}
        slow = [name for name in known() if find(name).needs_model and name not in asked]
        names = ",".join(name for name in known() if name not in slow)
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
            text = f"{name}: {found} ({100 * best['auroc']:.2f}, best of {len(tried)})"
            told.setdefault(run.trained.name, []).append(text)
    for name, texts in told.items():
        print(f"Chosen for {name} (AUROC on validation data): {'; '.join(texts)}")


def _on_images(options: argparse.Namespace, chosen: DetectorSet) -> tuple[str | Path, Callable[..., Results | None]]:
    """The folder for the results, and what gives them."""
    from .. import evaluation

    paths = [path for given in options.runs for path in evaluation.paths_of(given)]
    benchmarks = Benchmarks(options, paths[0])
    first = benchmarks.open(run_info(paths[0]).get("seed"))
    return _folder(options, paths, first.name), functools.partial(
        evaluation.evaluate_runs,
        _opened(options, paths, first),
        benchmarks.of,
        chosen,
        skip_bad=options.skip_bad,
        any_accuracy=options.any_accuracy,
        cache=options.cache,
        batch_size=options.batch_size,
        workers=options.workers,
    )


def _on_features(options: argparse.Namespace, chosen: DetectorSet) -> tuple[str | Path, Callable[..., Results]]:
    """The same of stored features."""
    from .. import evaluation

    ood = {}
    for text in options.ood_features:
        title, path = named_path("--ood-features", text, "[near/]NAME=PATH")
        group, slash, name = title.rpartition("/")
        if slash and group not in ("near", "far", "csid"):
            told = "expected near/NAME=PATH, far/NAME=PATH or NAME=PATH, csid/NAME=PATH"
            raise refusal(f"--ood-features: got {text!r}, {told}")
        if name in ood:
            raise refusal(f"--ood-features: {name} is there twice")
        ood[name] = (group or "far", path)
    train = Path(options.features).expanduser()
    default = (train if train.is_dir() else train.parent) / "eval"
    return default if options.out is None else options.out, functools.partial(
        evaluation.evaluate_features,
        *(options.features, options.test, ood, chosen),
        validation=options.validation,
        ood_validation=options.ood_validation,
        head=read_head_file(options.head_file) if options.head_file else None,
    )


ONLY_FEATURES = ("head_file", "test", "ood_features", "validation", "ood_validation")
ONLY_IMAGES = ("benchmark", "data_root", "ood", "ood_folder", "download", "synthetic", "image_size", "classes")
ONLY_IMAGES += ("csid", "csid_folder")
ONLY_IMAGES += ("any_accuracy", "skip_bad", "model", "recipe", "head", "cache", *PREPARATION)


def _check(options: argparse.Namespace) -> None:
    if bool(options.runs) == bool(options.features):
        raise refusal("RUN, --features: expected one of them, trained models or stored features")
    for name in ONLY_IMAGES if options.features else ONLY_FEATURES:
        if getattr(options, name):
            other = "not used with --features" if options.features else "only used with --features"
            raise refusal(f"--{name.replace('_', '-')}: {other}")
    if options.features and not (options.test and options.ood_features):
        raise refusal("--features: needs --test and --ood-features")
    if options.ood_validation and not options.validation:
        raise refusal("--ood-validation: needs --validation")
    if options.download and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise refusal("--download: every process would fetch the same files; download in one process first")


def _request(options: argparse.Namespace, chosen: DetectorSet, grids: dict[str, dict[str, tuple]]) -> dict[str, Any]:
    """What decides the results of a run: those of another request are other results."""
    detectors = {
        name: {
            **detector.settings(),
            **dict.fromkeys(() if options.no_tune else grids.get(name, detector.grid), "searched"),
        }
        for name, detector in chosen.items()
    }
    given = {name: getattr(options, name) for name in (*DECIDING, *ONLY_FEATURES) if getattr(options, name)}
    told = {"detectors": detectors, "options": {f"--{name.replace('_', '-')}": value for name, value in given.items()}}
    return json.loads(json.dumps(told, default=str))  # as it is read again


DECIDING = (
    "checkpoint",
    "ood",
    "ood_folder",
    "csid",
    "csid_folder",
    "synthetic",
    "image_size",
    "classes",
    "skip_bad",
    *PREPARATION,
)


def _folder(options: argparse.Namespace, paths: list[str], benchmark: str) -> str | Path:
    from ..evaluation.trained import default_folder

    if options.out is not None:
        return options.out
    if len(options.runs) > 1:
        example = f"ood-fast evaluate {shlex.join(options.runs)} --out runs/both"
        raise refusal(f"--out: needed with several runs: the folder of their common results, as in: {example}")
    return default_folder(options.runs[0]) / "eval" / benchmark


def _opened(options: argparse.Namespace, paths: list[str], benchmark: ImageBenchmark) -> Iterator[Trained]:
    from .. import evaluation
    from ..checks import UserError

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
                path,
                benchmark.n_classes,
                shape,
                model=model,
                recipe=options.recipe,
                checkpoint=options.checkpoint,
                head=options.head,
            )
        except UserError as error:
            missing = f"; it was trained with --plugin {', '.join(unknown)}, pass it if it is yours" if unknown else ""
            raise refusal(f"{error}{missing}") from error
