"""`ood-fast evaluate`: every detector on every OOD set of a benchmark, for one model or the seeds of some."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Bar, RunError, detector_set, device, import_plugins, listed, machine, processes, refusal, versions

if TYPE_CHECKING:
    from ..data import ImageBenchmark
    from ..evaluation import Trained


def add(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure trained models on a benchmark with every detector",
        description="Run each model once over the images of a benchmark, fit and tune the detectors, and report AUROC, "
        "FPR95 in both conventions, AUPR, accuracy and calibration for near and far OOD sets, with intervals and "
        "beside published numbers. Runs of one recipe are its seeds. What a model makes of the images is kept: a "
        "second evaluation runs no model. Under torchrun, each process takes a part of the images.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a folder of `ood-fast train`, OpenOOD's with s0/best.ckpt, ... in it, a checkpoint, or pretrained:NAME",
    )
    parser.add_argument("--benchmark", metavar="NAME", help="(default: the one that the first run was trained for)")
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", metavar="DIR", help="folder of the data sets")
    data.add_argument("--layout", default="auto", metavar="L", help="auto (default), torchvision, openood")
    data.add_argument("--download", action="store_true", help="fetch what is missing, where torchvision can")
    data.add_argument("--ood", metavar="A,B", help="only these OOD sets")
    data.add_argument(
        "--ood-folder",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a far-OOD set of your own; may be repeated",
    )
    data.add_argument("--synthetic", action="store_true", help="also Gaussian noise and scrambled pixels")
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="of the benchmark folder (default: 224)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint", default="best", metavar="C", help="best (default), final, last, or a file of RUN"
    )
    model.add_argument(
        "--model", metavar="NAME", help="of a checkpoint that does not say: resnet18_32x32, timm:NAME, ..."
    )
    model.add_argument("--recipe", metavar="NAME", help="what such a checkpoint was trained with; says the model too")
    model.add_argument("--head", metavar="LAYER", help="name of the layer that makes the logits, if it is not found")
    scores = parser.add_argument_group("detectors")
    scores.add_argument("--detectors", default="all", metavar="A,B", help="(default: all that can be fitted)")
    scores.add_argument(
        "--set", action="append", default=[], metavar="KNN.k=10", help="a parameter, which is then not searched"
    )
    scores.add_argument(
        "--no-tune",
        action="store_true",
        help="take parameters as they are, instead of the best of OpenOOD's grids on validation images",
    )
    scores.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="import own detectors from it")
    scores.add_argument("--bootstrap", type=int, default=200, metavar="N", help="draws for intervals, 0: none (200)")
    scores.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws and of synthetic images (0)")
    parser.add_argument("--cache", metavar="DIR", help="where features are kept (default: RUN/cache)")
    parser.add_argument("--out", metavar="DIR", help="results folder (default: RUN/eval/BENCHMARK)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="loading processes"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    from .. import evaluation

    _check(options)
    import_plugins(options.plugin)
    chosen = detector_set(options.detectors, options.set, on_features=False)
    paths = [path for given in options.runs for path in evaluation.paths_of(given)]
    benchmark_of = _benchmarks(options, paths[0])
    first = benchmark_of(_seed(paths[0]))
    folder = evaluation.check_folder(_folder(options, paths, first.name))
    where = device(options.device)
    started, start = datetime.now(timezone.utc), time.perf_counter()
    with processes(where) as process:
        options.quiet |= process.rank > 0
        try:
            results = evaluation.evaluate_runs(
                _opened(options, paths, first),
                lambda trained: benchmark_of(trained.seed),
                chosen,
                leave_out=options.detectors == "all",
                tune=not options.no_tune,
                grids=_grids(options.set, chosen),
                cache=options.cache,
                device=where,
                batch_size=options.batch_size,
                workers=options.workers,
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


def _check(options: argparse.Namespace) -> None:
    if options.download and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise refusal("--download: every process would fetch the same files; download in one process first")
    for name, least in (("bootstrap", 0), ("batch_size", 1), ("workers", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise refusal(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least {least}")


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


def _benchmarks(options: argparse.Namespace, path: str) -> Callable[[int | None], ImageBenchmark]:
    """The benchmark, by the seed of a run: that of `digits` draws its classes by it."""
    from ..data import open_benchmark

    name = options.benchmark or _info(path).get("benchmark")
    if name is None:
        raise refusal(f"--benchmark: {path} does not say which; give one")
    folders = {}
    for text in options.ood_folder:
        title, equals, folder = text.partition("=")
        if not (title and equals and folder):
            raise refusal(f"--ood-folder: got {text!r}, expected NAME=DIR")
        folders[title] = folder
    opened: dict[int, ImageBenchmark] = {}

    def of(seed: int | None) -> ImageBenchmark:
        seed = (seed or 0) if name == "digits" else options.seed
        if seed not in opened:
            opened[seed] = open_benchmark(
                name,
                options.data_root,
                download=options.download,
                layout=options.layout,
                ood=None if options.ood is None else listed(options.ood),
                ood_folders=folders,
                synthetic=options.synthetic,
                image_size=options.image_size,
                seed=seed,
            )
        return opened[seed]

    return of


def _info(path: str) -> dict[str, Any]:
    """run.json of a run; nothing if it has none."""
    from ..evaluation.trained import RUN
    from ..training.folder import read_info

    folder = Path(path).expanduser()
    return read_info(folder) if (folder / RUN).is_file() else {}


def _seed(path: str) -> int | None:
    return _info(path).get("seed")


def _folder(options: argparse.Namespace, paths: list[str], benchmark: str) -> Path:
    from ..evaluation.trained import default_folder

    if options.out is not None:
        return Path(options.out)
    if len(options.runs) > 1:
        raise refusal("--out: needed with several runs: the folder of their common results")
    return default_folder(options.runs[0]) / "eval" / benchmark


def _opened(options: argparse.Namespace, paths: list[str], benchmark: ImageBenchmark) -> Iterator[Trained]:
    from .. import evaluation

    for path in paths:
        yield evaluation.open_run(
            path,
            benchmark.n_classes,
            benchmark.image_shape,
            model=options.model,
            recipe=options.recipe,
            checkpoint=options.checkpoint,
            head=options.head,
        )
