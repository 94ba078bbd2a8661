"""`ood-fast evaluate`: every detector on every OOD set of a benchmark, for one model or the seeds of some."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipes import BENCHMARK_NAMES
from .code import import_known, import_plugins
from .common import RunError, detector_set, device, listed, machine, processes, refusal, versions
from .images import MODEL_HELP, add_preparation
from .model import PREPARATION, allow, is_callable, named, preparation_of, text_of
from .options import at_least, share
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
    data.add_argument("--ood", metavar="A,B", help="only these OOD sets")
    data.add_argument(
        "--ood-folder",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a far-OOD set of your own; may be repeated",
    )
    data.add_argument("--synthetic", action="store_true", help="also Gaussian noise and scrambled pixels")
    more = "leave out images that cannot be read; every image is read once more to find them"
    share(data, "skip-bad", skip_bad={"help": more})
    data.add_argument(
        "--classes",
        metavar="FILE",
        help="of the benchmark folder: its classes in the order of the model's outputs, one a line or JSON",
    )
    preparation = parser.add_argument_group("images, where they differ from the model's own and the benchmark's")
    add_preparation(preparation, "the model's own, else the benchmark's", "exif for own folders, else stored")
    stored = parser.add_argument_group("stored features, in place of RUN and the images of a benchmark")
    stored.add_argument("--features", metavar="PATH", help="of the training data, and the head W, b if there is one")
    share(stored, "head-file")
    stored.add_argument("--test", metavar="PATH", help="of in-distribution test data")
    stored.add_argument(
        "--ood-features",
        action="append",
        default=[],
        metavar="[near/]NAME=PATH",
        help="of an OOD set, far unless near/ stands before its name; may be repeated",
    )
    stored.add_argument("--validation", metavar="PATH", help="of in-distribution data that was not trained on")
    stored.add_argument(
        "--ood-validation",
        action="append",
        default=[],
        metavar="PATH",
        help="of OOD data, by which parameters are chosen; may be repeated",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint", default="best", metavar="C", help="best (default), final, last, or a file of RUN"
    )
    model.add_argument("--model", metavar="NAME", help=f"of a checkpoint that does not say: {MODEL_HELP}")
    model.add_argument("--recipe", metavar="NAME", help="what such a checkpoint was trained with; says the model too")
    share(model, "head")
    scores = parser.add_argument_group("detectors")
    scores.add_argument("--detectors", default="all", metavar="A,B", help="(default: all that can be fitted)")
    scores.add_argument(
        "--set", action="append", default=[], metavar="KNN.k=10", help="a parameter, which is then not searched"
    )
    scores.add_argument(
        "--no-tune",
        action="store_true",
        help="take parameters as they are, instead of the best of OpenOOD's grids on validation data",
    )
    share(scores, "plugin")
    scores.add_argument(
        "--bootstrap", type=at_least(0), default=200, metavar="N", help="draws for intervals, 0: none (200)"
    )
    share(scores, "seed", seed={"help": "of the draws and of synthetic images (0)"})
    parser.add_argument("--cache", metavar="DIR", help="where features are kept (default: RUN/cache)")
    parser.add_argument("--out", metavar="DIR", help="results folder (default: RUN/eval/BENCHMARK)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results of other detectors or settings in that folder; those of the same are replaced without",
    )
    share(parser, "batch-size", "workers", "device", "quiet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    from .. import evaluation

    _check(options)
    import_plugins(options.plugin)
    chosen = detector_set(options.detectors, options.set, on_features=bool(options.features))
    grids = _grids(options.set, chosen)
    request = _request(options, chosen, grids)
    folder, evaluate = (_on_features if options.features else _on_images)(options, chosen)
    folder = evaluation.check_folder(folder, None if options.overwrite else request)
    started, start = datetime.now(timezone.utc), time.perf_counter()
    where = device(options.device)
    with processes(where) as process:
        options.quiet |= process.rank > 0
        if options.features and process.rank > 0:
            return  # the first does it all: there is no model to run
        try:
            results = evaluate(
                leave_out=options.detectors == "all",
                tune=not options.no_tune,
                grids=grids,
                device=where,
                bootstrap=options.bootstrap,
                seed=options.seed,
                progress=lambda what, total: Bar(what, total, options.quiet),
            )
        except OSError as error:
            raise RunError(f"cannot keep the features: {error}") from error
        except (ValueError, RuntimeError) as error:
            if type(error) in (ValueError, RuntimeError):  # NaN in what the model gives; another process; no memory
                raise RunError(str(error)) from error
            raise
    if results is None:
        return
    context = {
        "command": command,
        "request": request,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": versions(),
        "machine": machine(),
    }
    try:
        evaluation.write(folder, results, context)
    except OSError as error:
        raise RunError(f"cannot write the results to {folder}: {error.strerror or error}") from error
    if not options.quiet:
        evaluation.print_tables(results)
        print(f"Evaluated in {context['seconds']:.0f} s. Results: {folder}/, tables in {folder}/results.md")


def _on_images(options: argparse.Namespace, chosen: DetectorSet) -> tuple[str | Path, Callable[..., Results | None]]:
    """The folder for the results, and what gives them."""
    from .. import evaluation

    paths = [path for given in options.runs for path in evaluation.paths_of(given)]
    benchmarks = _Benchmarks(options, paths[0])
    first = benchmarks.open(_info(paths[0]).get("seed"))
    return _folder(options, paths, first.name), functools.partial(
        evaluation.evaluate_runs,
        _opened(options, paths, first),
        benchmarks.of,
        chosen,
        skip_bad=options.skip_bad,
        cache=options.cache,
        batch_size=options.batch_size,
        workers=options.workers,
    )


def _on_features(options: argparse.Namespace, chosen: DetectorSet) -> tuple[str | Path, Callable[..., Results]]:
    """The same of stored features."""
    from .. import evaluation, features

    ood = {}
    for text in options.ood_features:
        title, path = _named_path("--ood-features", text, "[near/]NAME=PATH")
        group, slash, name = title.rpartition("/")
        if slash and group not in ("near", "far"):
            raise refusal(f"--ood-features: got {text!r}, expected near/NAME=PATH, far/NAME=PATH or NAME=PATH")
        if name in ood:
            raise refusal(f"--ood-features: {name} is there twice")
        ood[name] = (group or "far", path)
    head = None
    if options.head_file:
        head = features.load_head(features.files(options.head_file)[0])
        if head is None:
            raise refusal(f"--head-file {options.head_file}: holds no W, expected .npz or .pt with W (c, m) and b (c,)")
    train = Path(options.features).expanduser()
    default = (train if train.is_dir() else train.parent) / "eval"
    return default if options.out is None else options.out, functools.partial(
        evaluation.evaluate_features,
        *(options.features, options.test, ood, chosen),
        validation=options.validation,
        ood_validation=options.ood_validation,
        head=head,
    )


SMALL_IMAGE = 64  # pixels: models of larger images and benchmarks of smaller ones have no preparation in common
ONLY_FEATURES = ("head_file", "test", "ood_features", "validation", "ood_validation")
ONLY_IMAGES = ("benchmark", "data_root", "ood", "ood_folder", "download", "synthetic", "image_size", "classes")
ONLY_IMAGES += ("skip_bad", "model", "recipe", "head", "cache", *PREPARATION)


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


def _grids(settings: list[str], chosen: Any) -> dict[str, dict[str, tuple]]:
    """OpenOOD's grids without the parameters that were set."""
    from ..detectors import find

    fixed: dict[str, set[str]] = {}
    for text in settings:
        name, _, parameter = text.partition("=")[0].strip().partition(".")
        fixed.setdefault(find(name).__name__, set()).add(parameter)
    return {
        name: {parameter: values for parameter, values in chosen[name].grid.items() if parameter not in parameters}
        for name, parameters in fixed.items()
    }


def _request(options: argparse.Namespace, chosen: DetectorSet, grids: dict[str, dict[str, tuple]]) -> dict[str, Any]:
    """What decides the results of a run: those of another request are other results."""
    searched = {name: [] if options.no_tune else list(grids.get(name, chosen[name].grid)) for name in chosen}
    detectors = {
        name: {**detector.settings(), **dict.fromkeys(searched[name], "searched")} for name, detector in chosen.items()
    }
    given = {name: getattr(options, name) for name in (*DECIDING, *ONLY_FEATURES) if getattr(options, name)}
    told = {"detectors": detectors, "options": {f"--{name.replace('_', '-')}": value for name, value in given.items()}}
    return json.loads(json.dumps(told, default=str))  # as it is read again


DECIDING = ("checkpoint", "ood", "ood_folder", "synthetic", "image_size", "classes", "skip_bad", *PREPARATION)


class _Benchmarks:
    """The benchmark by the run: that of `digits` draws its classes by the seed, and images are prepared for the model.

    A run of `ood-fast train` says how its images were prepared and in which order its classes are. Of other models the
    timm, transformers or torchvision model says it, unless the benchmark's images are of another scale.
    """

    def __init__(self, options: argparse.Namespace, path: str) -> None:
        if not path.startswith("pretrained:") and not Path(path).expanduser().exists():
            raise refusal(f"{path}: no such file or folder")
        info = _info(path)
        self.options = options
        self.name = options.benchmark or info.get("benchmark")
        if self.name is None:
            raise refusal(f"--benchmark: {path} does not say which; give one")
        self.trained_on = (info.get("data") or {}) if self.name == info.get("benchmark") else {}
        self.root = options.data_root or self.trained_on.get("root")
        same = self.root == self.trained_on.get("root")
        self.layout = options.layout or (self.trained_on.get("layout") if same else None) or "auto"
        self.folders = dict(_named_path("--ood-folder", text, "NAME=DIR") for text in options.ood_folder)
        for title in self.folders:
            if "/" in title:
                raise refusal(f"--ood-folder: got the name {title!r}, expected one without /")
        self.opened: dict[tuple, ImageBenchmark] = {}
        self.told: dict[str, str] = {}

    def open(
        self, seed: int | None, prepared: Mapping[str, Any] | None = None, classes: Sequence[str] | None = None
    ) -> ImageBenchmark:
        """One for each seed, preparation and order of classes."""
        from ..data import open_benchmark
        from ..data.folders import class_names

        options = self.options
        seed = (seed or 0) if self.name == "digits" else options.seed
        classes = class_names(options.classes) if options.classes is not None else classes
        key = (seed, None if prepared is None else str(prepared), None if classes is None else tuple(classes))
        if key not in self.opened:
            self.opened[key] = open_benchmark(
                self.name,
                self.root,
                download=options.download,
                layout=self.layout,
                ood=None if options.ood is None else listed(options.ood),
                ood_folders=self.folders,
                synthetic=options.synthetic,
                image_size=options.image_size or self.trained_on.get("image_size"),
                classes=classes,
                upright=None if options.orientation is None else options.orientation == "exif",
                truncated=options.truncated == "allow",
                prepared=prepared,
                seed=seed,
            )
        return self.opened[key]

    def of(self, run: Trained) -> ImageBenchmark:
        """The benchmark for a model."""
        plain = self.open(run.seed)
        prepared = None if self.name == "digits" else self._prepared(run, plain)
        if self.name != "folder" or self.options.classes is not None:
            return self.open(run.seed, prepared)
        classes, names = (run.info or {}).get("class_names"), plain.class_names
        if classes is None:
            from .agreement import class_order

            classes = class_order(run.model, self.open(run.seed, prepared).fit, self.options)
        if sorted(classes) != sorted(names) or list(classes) == list(names):
            return self.open(run.seed, prepared)  # what does not fit is told by the evaluation
        return self.open(run.seed, prepared, classes)

    def _prepared(self, run: Trained, plain: ImageBenchmark) -> dict[str, Any] | None:
        from .. import models

        options = self.options
        given = [getattr(options, name) for name in ("size", "resize", "mean", "std", "interpolation")]
        published = run.name.startswith("pretrained:")
        name = run.name.removeprefix("pretrained:") if published else options.model or ""
        own = None if run.info else models.own_preparation(run.model, name, published)
        size = plain.image_shape[-1]
        if own is not None and (own["size"] > SMALL_IMAGE) != (size > SMALL_IMAGE):
            own = None
        if own is None and not any(given):
            return None
        asked = argparse.Namespace(**{**vars(options), "model": name, "pretrained": published})
        spec = plain.prepared or {}
        prepared = preparation_of(asked, run.model, own or spec)
        prepared = {name: prepared[name] for name in ("size", "resize", "mean", "std", "interpolation")}
        if not options.quiet and self.told.get(run.name) is None:
            print(f"{run.name}: images: {text_of(prepared)}", file=sys.stderr, flush=True)
        self.told[run.name] = text_of(prepared)
        return prepared


def _named_path(option: str, text: str, expected: str) -> tuple[str, str]:
    title, equals, path = text.partition("=")
    if not (title and equals and path):
        raise refusal(f"{option}: got {text!r}, expected {expected}")
    return title, path


def _info(path: str) -> dict[str, Any]:
    """run.json of a run; nothing if it has none."""
    from ..evaluation.trained import RUN
    from ..training.folder import read_info

    folder = Path(path).expanduser()
    return read_info(folder) if (folder / RUN).is_file() else {}


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
        info, model = _info(path), options.model
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
