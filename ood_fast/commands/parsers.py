"""What the command line takes: the options, and the parser of each command.

Imports no torch: `--help` answers at once. The module of a command is imported when it runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from ..recipes import BENCHMARK_NAMES, DETECTORS, LOSSES, MORE_LOSSES
from ..values import DRAWS, IMAGE_SIZE, SAVE_MINUTES, TPR

N_EXPORTED = 16  # images that `export` compares


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """A `type=`: a number of that kind which is not below `least`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:  # also NaN
            what = "a whole number of " if kind is int and value is None else ""
            raise argparse.ArgumentTypeError(f"got {text}, expected {what}at least {least:g}")
        return value

    return number


def _flag(told: str = "") -> dict[str, Any]:
    return {"action": "store_true", "help": told}


def _value(metavar: str, told: str, **more: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": told, **more}


def _many(metavar: str, told: str) -> dict[str, Any]:
    return _value(metavar, told, action="append", default=[])


def _number(metavar: str, told: str, least: float, default: float | None = None, kind: type = int) -> dict[str, Any]:
    return _value(metavar, told, type=at_least(least, kind), default=default)


def _choice(told: str, *choices: str) -> dict[str, Any]:
    return {"choices": choices, "help": told}


DEFAULT = "(default: %(default)s)"
MODEL_HELP = (
    "one of torchvision's classifiers, resnet18_32x32, timm:NAME, hf:NAME_OR_FOLDER, MODULE:CALLABLE, or NAME of "
    "--plugin"
)
OPTIONS: dict[str, dict[str, Any]] = {
    # models and their weights
    "model": _value("NAME", MODEL_HELP),
    "checkpoint": _value("FILE", "its weights: a state_dict or safetensors"),
    "pretrained": _flag("its weights: those that were published with it"),
    "head": _value("LAYER", "name of the layer that makes the logits, if it is not found"),
    "n-classes": _number("N", "number of classes (default: of the checkpoint's head)", 1),
    "other-model": _flag("also with weights that the detectors were not fitted on"),
    # detectors
    "detectors": _value("A,B", "only these of the file (default: all)"),
    "set": _many("KNN.k=10", "a parameter of a detector"),
    "tune": _flag("choose parameters, also those that --set gives, by AUROC on --validation and --ood-validation"),
    "no-tune": _flag("take parameters as they are, instead of the best of OpenOOD's grids on validation data"),
    "tpr": _value("P", f"thresholds that keep P of --validation (default {TPR})", type=float),
    "alpha": _value("A", "thresholds that flag new ID data with chance <= A", type=float),
    "bootstrap": _number("N", "draws for intervals, 0: none (%(default)s)", 0, DRAWS),
    # data of benchmarks
    "data-root": _value("DIR", "folder of the data sets (default: where it was trained from)"),
    "layout": _value("L", "auto (default), torchvision, openood"),
    "download": _flag("fetch what is missing, where torchvision can"),
    "image-size": _number("PIXELS", f"of the benchmark folder (default: {IMAGE_SIZE})", 1),
    "ood": _value("A,B", "only these OOD sets"),
    "ood-folder": _many("NAME=DIR", "a far-OOD set of your own; may be repeated"),
    "csid": _value("A,B", "covariate-shifted in-distribution sets, or all: full-spectrum metrics beside"),
    "csid-folder": _many("NAME=DIR", "one of your own, DIR/<class>/ or .npy; may be repeated"),
    "synthetic": _flag("also Gaussian noise and scrambled pixels"),
    "outliers": _value("DIR", "images to train against, any depth, for losses as oe and mixoe"),
    # data of one's own
    "features": _value("PATH", "stored features: .npz, .pt, .parquet, or a folder of them"),
    "head-file": _value("FILE", "feature file with the head W, b, if --features has none"),
    "validation": _value("PATH", "in-distribution data that was not trained on"),
    "ood-validation": _many("PATH", "OOD data, by which parameters are chosen; may be repeated"),
    "test": _value("PATH", "of in-distribution test data"),
    "ood-features": _many(
        "[near/]NAME=PATH",
        "of an OOD set, far unless near/ stands before its name; csid/NAME: a covariate-shifted in-distribution set; "
        "may be repeated",
    ),
    "classes": _value("FILE", "names of the classes in the order of the model's outputs: one a line, or JSON"),
    "any-accuracy": _flag(
        "go on where the accuracy is no better than chance, which is an error (wrong images, weights, classes)"
    ),
    "skip-bad": _flag("leave out images that cannot be read"),
    "truncated": _choice(
        "image files that end too early: an error (default), or what is there, as OpenOOD takes them", "refuse", "allow"
    ),
    # how it is run
    "batch-size": _number("N", DEFAULT, 1, 256),
    "workers": _number("N", "loading processes, of each process", 0, min(4, os.cpu_count() or 1)),
    "device": {"default": "auto", "help": "auto (default), cpu, cuda, cuda:1, mps, ..."},
    "seed": _number("N", DEFAULT, 0, 0),
    "amp": _choice("autocast (default: as the recipe says)", "none", "bf16", "fp16"),
    "compile": _flag("torch.compile the model"),
    "channels-last": _flag("memory format of images and weights"),
    "sync-bn": _flag("batch statistics over all processes (GPUs)"),
    "plugin": _many("MODULE", "own detectors, losses, models, benchmarks, metrics; may be repeated"),
    "quiet": _flag("print nothing but errors"),
    # what is kept
    "overwrite": _flag(),
    "show": _flag("print the recipe with its changes, as a FILE.json is written, and stop"),
    "resume": _flag("continue what is in RUN, if anything is"),
    "diagnostics": _flag("write diagnostics.csv: what the features look like"),
    "tensorboard": _flag("also log for TensorBoard, in RUN/tensorboard"),
    "keep-every": _number("N", "keep the weights of each N-th epoch, in RUN/epochs", 1),
    "save-minutes": _number("M", "save within epochs too (default: %(default)g)", 0, SAVE_MINUTES, float),
    "cache": _value("DIR", "where features are kept (default: RUN/cache)"),
    "html": _value("PAGE", "also a page: images sorted by score, the most OOD ones first"),
    "feature-change": _flag(
        "run the model of each checkpoint in RUN/epochs (train --keep-every) over the ID test images; kept for later "
        "reports"
    ),
}


def share(group: Any, *names: str, **changes: str | dict[str, Any]) -> None:
    """Add options of `OPTIONS` to a parser or group; `changes` of some by their names, or their help."""
    for name in names:
        change = changes.get(name.replace("-", "_"), {})
        group.add_argument(f"--{name}", **OPTIONS[name] | ({"help": change} if isinstance(change, str) else change))


# ---- options of several commands


def _images(parser: Any, remembered: bool = False) -> None:
    """What says which model looks at which images, and how they are prepared; `remembered`: by the detectors' file."""
    told = "Needed only where it differs from what --detectors remembers of `ood-fast fit`."
    group = parser.add_argument_group("model and images", told if remembered else None)
    _model(group, remembered)
    share(group, "classes", "batch-size", "workers", "device", batch_size={"default": 128})


def _start(group: Any, *names: str) -> None:
    """Settings of a recipe that have an option of their own: `common.training_settings`."""
    share(group, "model", model=f"in place of the recipe's: {MODEL_HELP}")
    group.add_argument(*names, dest="init", metavar="FILE", help="weights to start from, head included: fine-tuning")
    share(group, "pretrained", pretrained="start from published weights")
    group.add_argument("--epochs", metavar="N", help="training epochs (default: as the recipe says)")


def _model(group: Any, remembered: bool) -> None:
    """What says which model it is, and how its images are prepared."""
    share(
        group, "model", "checkpoint", "pretrained", "head", "n-classes", model=f"{MODEL_HELP}, or the folder of a run"
    )
    _preparation(group, "as fitted" if remembered else "the model's own", "as fitted" if remembered else "exif")


def _preparation(group: Any, own: str, orientation: str) -> None:
    """How images are prepared; `own` and `orientation` say what holds by default."""
    told = (
        f"after their short side got this length (default: {own}, in proportion to --size; where nobody says, 8/7 of "
    )
    told += "--size, up to 64 as it is)"
    normalised = _value("A,B,C", f"of the normalisation, a number for each channel (default: {own})")
    turned = "turn images as their EXIF data says, or take them as stored, as torchvision does"
    group.add_argument("--size", **_number("PIXELS", f"images are cropped to this square (default: {own})", 1))
    group.add_argument("--resize", **_number("PIXELS", told, 1))
    group.add_argument("--mean", **normalised)
    group.add_argument("--std", **normalised)
    told = f"of the resizing (default: {own})"
    group.add_argument("--interpolation", **_choice(told, "bilinear", "bicubic", "nearest", "lanczos"))
    group.add_argument("--orientation", **_choice(f"{turned} (default: {orientation})", "exif", "stored"))
    share(group, "truncated")


# ---- the commands


def _compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="train with each loss, score with each detector, say which is best",
        description="Train a classifier with each loss and seed, or take runs that are trained, measure them on near- "
        "and far-OOD images with each detector, and say which is best and by how much. What is trained is kept in "
        "DIR/runs: the same command continues it, other losses and seeds extend it.",
        examples=(
            "ood-fast compare",
            "ood-fast compare --benchmark cifar10 --losses ce,elogitnorm --seeds 3 --data-root ~/data",
        ),
        epilog="losses: " + "; ".join(f"{name} = {what}" for name, what in {**LOSSES, **MORE_LOSSES}.items()),
    )
    told = "runs that are trained, as `ood-fast evaluate` takes; none is trained"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=told)
    told = f"{', '.join(BENCHMARK_NAMES)} (digits)"
    parser.add_argument("--benchmark", "--data", dest="benchmark", metavar="NAME", help=told)
    parser.add_argument("--losses", metavar="A,B", help=f"losses to train with ({','.join(LOSSES)})")
    chosen = {"default": ",".join(DETECTORS), "help": f"detectors to score with, or all {DEFAULT}"}
    share(parser, "detectors", detectors=chosen)
    told = "number of seeds (5: seeds 0 to 4), or a list as 0,3,7 (default: 5)"
    parser.add_argument("--seeds", metavar="N", help=told)
    training = parser.add_argument_group("training")
    training.add_argument("--recipe", metavar="NAME", help="its loss is exchanged (default: BENCHMARK-LOSS)")
    _start(training, "--init")
    told = (
        "which weights of a run are measured: best on validation images (default), or final (default for trained "
        "weights, whose best epoch may be the first, before the loss has done anything)"
    )
    training.add_argument("--checkpoint", **_choice(told, "best", "final"))
    told = "a setting of the recipe, or of a detector as KNN.k=10; may be repeated"
    share(training, "set", set={"metavar": "lr=0.05", "help": told})
    data = parser.add_argument_group("data")
    share(data, "data-root", "layout", "download", "image-size", "workers", layout={"default": "auto"})
    share(data, "ood", "ood-folder", "csid", "csid-folder", "outliers")
    told = "choose all parameters from OpenOOD's grids on validation images, not that of NCI alone"
    share(parser.add_argument_group("measuring"), "tune", tune=told)
    parser.add_argument("--out", metavar="DIR", help="results folder (default: runs/compare-BENCHMARK)")
    share(parser, "overwrite", overwrite="remove what was trained in DIR, and begin anew")
    share(parser.add_argument_group("speed"), "device", "amp", "compile", "channels-last")
    # of `evaluate`, whose benchmark this is: the seed is that of each run
    unasked = ("seed", "classes", "orientation", "truncated", "size", "resize", "mean", "std", "interpolation")
    parser.set_defaults(synthetic=False, **dict.fromkeys(unasked))


def _train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a classifier by a recipe, to be left alone and continued",
        description="Train a classifier by a recipe. Checkpoints are written after each epoch, every --save-minutes, "
        "and on SIGTERM and Ctrl-C; --resume continues. Under torchrun, processes train together "
        "(DistributedDataParallel), each with the recipe's batch size. Images of your own: --recipe folder-elogitnorm, "
        "and docs/own-data.md.",
        examples=(
            "ood-fast train --recipe cifar10-elogitnorm --data-root ~/data --epochs 10",
            "ood-fast train --recipe list",
        ),
        epilog="Exit codes: 130 and 143 after Ctrl-C and SIGTERM, when the run has been saved; 1 if the loss diverges "
        "or a file cannot be written.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="a recipe, FILE.json, or list: print them")
    told = f"a setting of the recipe; may be repeated. benchmark is one of {', '.join(BENCHMARK_NAMES)}"
    share(parser, "set", "show", "seed", set={"metavar": "lr=0.05", "help": told})
    parser.add_argument("--out", metavar="RUN", help="the folder of the run (default: runs/RECIPE/sSEED)")
    share(parser, "resume")
    _start(parser, "--init", "--checkpoint")
    data = parser.add_argument_group("data")
    share(data, "data-root", "download", "layout", "image-size", "truncated", "workers", layout={"default": "auto"})
    told = "of benchmark=folder: its classes in this order, one a line or JSON"
    share(data, "outliers", "classes", classes=told)
    share(parser.add_argument_group("speed"), "device", "amp", "compile", "channels-last", "sync-bn")
    kept = ("diagnostics", "tensorboard", "keep-every", "save-minutes")
    share(parser.add_argument_group("what is kept"), *kept)


def _fit(commands: Any) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit detectors on images or stored features, and save them",
        description="Fit any number of detectors in one pass over images (--model, --data) or stored features "
        "(--features), choose their parameters (--tune) and thresholds on validation data, and save them as one "
        "safetensors file. Under torchrun, each process takes a part of the data.",
        examples=(
            "ood-fast fit --model resnet50 --pretrained --data train/ --validation val/ --out detectors.safetensors",
            "ood-fast fit --features train.npz --detectors NCI,KNN --set KNN.k=10 --out detectors.safetensors",
        ),
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="what to write, as in detectors.safetensors")
    chosen = {"default": "MSP,Energy,KNN,NCI,FDBD", "help": f"or all {DEFAULT}"}
    share(parser, "detectors", "set", detectors=chosen)
    data = parser.add_argument_group("data: folders of images, or feature files with --features")
    data.add_argument("--data", metavar="PATH", help="training images, a folder for each class")
    share(data, "features", "head-file", "validation", "ood-validation")
    share(parser, "tune")
    share(parser.add_mutually_exclusive_group(), "tpr", "alpha")
    _images(parser)
    share(parser, "any-accuracy", "skip-bad")


def _score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="score images or stored features with fitted detectors",
        description="Score every image below a folder (--data) or stored features (--features), and write path, "
        "prediction, score and is_ood of each to a CSV or Parquet file. --detectors remembers the model and the image "
        "settings of `ood-fast fit`: neither need be given again. "
        "An interrupted run goes on where it stopped. Under torchrun, each process takes a part of the data.",
        examples=(
            "ood-fast score --detectors detectors.safetensors --data photos/ --out scores.csv --html scores.html",
            "find . -name '*.png' | ood-fast score --detectors detectors.safetensors --data - --out scores.parquet",
        ),
    )
    parser.add_argument("--detectors", required=True, metavar="FILE", help="what `ood-fast fit` wrote")
    parser.add_argument("--out", required=True, metavar="FILE", help="the table: .csv or .parquet")
    told = "folder of images, at any depth; images; a pattern; - for a list on stdin"
    parser.add_argument("--data", nargs="+", metavar="PATH", help=told)
    told = "replace --out, and begin an interrupted run anew"
    share(parser, "features", "html", "overwrite", "other-model", overwrite=told)
    _images(parser, remembered=True)
    share(parser, "skip-bad")


def _export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model with its detectors as one ONNX file",
        description="Write a model and the detectors that were fitted on it as one ONNX file, which runs without this "
        "package: images in [0, 1] in; logits, score and is_ood out. The normalisation is inside, the threshold an "
        "input that may be left out. A JSON beside the file says the size and range of images, classes, detectors and "
        "thresholds. Both are written after onnxruntime gave the same numbers as PyTorch.",
        examples=(
            "ood-fast export detectors.safetensors --detectors NCI --data photos/ --out model.onnx",
            "ood-fast export detectors.safetensors --model resnet50 --pretrained --out model.onnx",
        ),
    )
    parser.add_argument("file", metavar="DETECTORS", help="what `ood-fast fit` wrote, with thresholds (--validation)")
    parser.add_argument("--out", required=True, metavar="FILE", help="what to write, as in model.onnx")
    share(parser, "detectors")
    told = f"images of which {N_EXPORTED} are compared (default: noise, where any will do)"
    parser.add_argument("--data", metavar="PATH", help=told)
    share(parser, "overwrite", "other-model", overwrite="replace --out and its JSON")
    group = parser.add_argument_group("model and images", "Needed only where it differs from what DETECTORS remembers.")
    _model(group, remembered=True)


def _demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="a page to drop an image on: its class, and what each detector says",
        description="Serve a page, by default to this machine alone: drop an image on it and see its class, the score "
        "of each detector and whether it is out-of-distribution. The same by POST /score, as JSON.",
        examples=("ood-fast demo detectors.safetensors", "ood-fast demo bundle/ --port 9000"),
    )
    told = "what `ood-fast fit --validation` wrote, or a folder of save_bundle"
    parser.add_argument("file", metavar="FITTED", help=told)
    share(parser, "detectors")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: %(default)s, this machine)")
    parser.add_argument("--port", type=at_least(0), default=8000, metavar="N", help="(default: %(default)s; 0: any)")
    share(parser, "other-model")
    group = parser.add_argument_group("model and images", "Needed only where it differs from what FITTED remembers.")
    _model(group, remembered=True)


def _evaluate(commands: Any) -> None:
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
    told = "a folder of `ood-fast train`, OpenOOD's with s0/best.ckpt, ... in it, a checkpoint, or pretrained:NAME"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=told)
    told = f"{', '.join(BENCHMARK_NAMES)} (default: the one that the first run was trained for)"
    parser.add_argument("--benchmark", metavar="NAME", help=told)
    data = parser.add_argument_group("data")
    share(data, "data-root", "layout", "download", "image-size")
    share(data, "ood", "ood-folder", "csid", "csid-folder", "synthetic")
    told = "leave out images that cannot be read; every image is read once more to find them"
    share(data, "any-accuracy", "skip-bad", skip_bad=told)
    told = "of the benchmark folder: its classes in the order of the model's outputs, one a line or JSON"
    share(data, "classes", classes=told)
    preparation = parser.add_argument_group("images, where they differ from the model's own and the benchmark's")
    _preparation(preparation, "the model's own, else the benchmark's", "exif for own folders, else stored")
    stored = parser.add_argument_group("stored features, in place of RUN and the images of a benchmark")
    told = "of the training data, and the head W, b if there is one"
    share(stored, "features", "head-file", "validation", "ood-validation", "test", "ood-features", features=told)
    model = parser.add_argument_group("model")
    told = "best (default), final, last, or a file of RUN"
    share(model, "checkpoint", checkpoint=_value("C", told, default="best"))
    share(model, "model", model=f"of a checkpoint that does not say: {MODEL_HELP}")
    model.add_argument("--recipe", metavar="NAME", help="what such a checkpoint was trained with; says the model too")
    share(model, "head")
    scores = parser.add_argument_group("detectors")
    share(scores, "detectors", detectors="or all (default: all that fit, and pass no image through the model)")
    share(scores, "set", set="a parameter of a detector, which is then not searched")
    share(scores, "no-tune", "bootstrap", "seed", seed="of the draws and of synthetic images (0)")
    share(parser, "cache")
    parser.add_argument("--out", metavar="DIR", help="results folder (default: RUN/eval/BENCHMARK)")
    told = "replace results of other runs, detectors or settings in that folder; those of the same are replaced without"
    share(parser, "overwrite", "batch-size", "workers", "device", overwrite=told)


def _report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="one page about trained runs: training, evaluation, diagnostics of the features",
        description="Write a page, one HTML file, about runs of `ood-fast train`, side by side: settings, training "
        "curves, what `ood-fast evaluate` found, and diagnostics of the features that it keeps. No model is run, but "
        "with --feature-change.",
        examples=(
            "ood-fast report runs/cifar10-ce runs/cifar10-elogitnorm",
            "ood-fast report runs/cifar10-elogitnorm/s0 --out page.html",
        ),
    )
    told = "a folder of `ood-fast train`, one with such runs as s0, s1, ..., or a results folder of `ood-fast evaluate`"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{told}, for the runs in it")
    parser.add_argument("--out", metavar="FILE", help="(default: RUN/report.html; with several RUNs report.html here)")
    change = parser.add_argument_group("change of the features by norm (Haas et al., eq. 8)")
    share(change, "feature-change", "data-root", "device", "batch-size", "workers")


def _info(commands: Any) -> None:
    commands.add_parser(
        "info",
        help="versions, devices and what is available",
        description="Versions, devices, and the known losses and detectors.",
        examples=("ood-fast info", "ood-fast info > versions.txt"),
    )


EVERYWHERE = ("plugin", "quiet")  # options of every command that does something


def add_all(commands: Any) -> None:
    """Add the parser of each command."""
    for add in (_compare, _train, _fit, _score, _export, _demo, _evaluate, _report):
        add(commands)
    for parser in commands.choices.values():
        share(parser, *EVERYWHERE)
    _info(commands)
