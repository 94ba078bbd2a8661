"""The benchmark of `ood-fast evaluate` and `compare`, prepared for each model that they measure."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import models
from ..checks import UserError
from ..data import ImageBenchmark, open_benchmark
from ..data.folders import class_names
from ..data.own import SMALL_IMAGE
from ..evaluation import Trained
from ..training.folder import RUN, read_info
from .agreement import class_order
from .common import given, listed, say
from .model import preparation_of, text_of


class Benchmarks:
    """The benchmark by the run: that of `digits` draws its classes by the seed, and images are prepared for the model.

    A run of `ood-fast train` says how its images were prepared and in which order its classes are. Of other models the
    timm, transformers or torchvision model says it, unless the benchmark's images are of another scale.

    Args:
        path: of the first run, which says what the command line leaves open; None: nothing is trained yet.
    """

    def __init__(self, options: argparse.Namespace, path: str | None) -> None:
        if path is not None and not path.startswith("pretrained:") and not Path(path).expanduser().exists():
            raise UserError(f"{path}: no such file or folder")
        info = {} if path is None else run_info(path)
        self.options = options
        self.name = options.benchmark or info.get("benchmark")
        if self.name is None:
            raise UserError(f"--benchmark: {path} does not say which; give one")
        self.trained_on = (info.get("data") or {}) if self.name == info.get("benchmark") else {}
        self.root = options.data_root or self.trained_on.get("root")
        same = self.root == self.trained_on.get("root")
        self.layout = options.layout or (self.trained_on.get("layout") if same else None) or "auto"
        self.folders = _folders("--ood-folder", options.ood_folder)
        self.csid_folders = _folders("--csid-folder", options.csid_folder)
        self.opened: dict[tuple[Any, ...], ImageBenchmark] = {}
        self.told: set[str] = set()

    def open(
        self, seed: int | None, prepared: Mapping[str, Any] | None = None, classes: Sequence[str] | None = None
    ) -> ImageBenchmark:
        """One for each seed, preparation and order of classes."""
        options = self.options
        seed = (seed or 0) if self.name == "digits" or options.seed is None else options.seed
        classes = class_names(options.classes) if options.classes is not None else classes
        key = (seed, None if prepared is None else str(prepared), None if classes is None else tuple(classes))
        if key not in self.opened:
            self.opened[key] = open_benchmark(
                self.name,
                self.root,
                layout=self.layout,
                ood=None if options.ood is None else listed(options.ood),
                ood_folders=self.folders,
                csid=None if options.csid is None else listed(options.csid),
                csid_folders=self.csid_folders,
                image_size=options.image_size or self.trained_on.get("image_size"),
                classes=classes,
                upright=None if options.orientation is None else options.orientation == "exif",
                truncated=options.truncated == "allow",
                prepared=prepared,
                outliers=getattr(options, "outliers", None),
                seed=seed,
                **given(options, "download", "synthetic"),
            )
        return self.opened[key]

    def of(self, run: Trained) -> ImageBenchmark:
        """The benchmark for a model."""
        assert run.model is not None  # it was opened from a checkpoint
        plain = self.open(run.seed)
        prepared = None if self.name == "digits" else self._prepared(run, plain)
        if self.name != "folder" or self.options.classes is not None:
            return self.open(run.seed, prepared)
        classes, names = (run.info or {}).get("class_names"), plain.class_names
        if classes is None:
            classes = class_order(run.model, self.open(run.seed, prepared).fit, self.options)
        if sorted(classes) != sorted(names) or list(classes) == list(names):
            return self.open(run.seed, prepared)  # what does not fit is told by the evaluation
        return self.open(run.seed, prepared, classes)

    def _prepared(self, run: Trained, plain: ImageBenchmark) -> dict[str, Any] | None:
        assert run.model is not None
        options = self.options
        given = [getattr(options, name) for name in ("size", "resize", "mean", "std", "interpolation")]
        published = run.name.startswith("pretrained:")
        name = run.name.removeprefix("pretrained:") if published else options.model or ""
        own = None if run.info else models.own_preparation(run.model, name, published)
        spec = plain.prepared or {}
        # timm's models say how they were trained at first, perhaps not these weights; a processor lies beside its own.
        guessed = own is not None and not published and not hasattr(run.model, "preparation")
        # models of larger images and benchmarks of smaller ones have no preparation in common
        if own is not None and guessed and (own["size"] > SMALL_IMAGE) != (spec["size"] > SMALL_IMAGE):
            own = None
        asked = argparse.Namespace(**{**vars(options), "model": name, "pretrained": published})
        prepared = preparation_of(asked, run.model, own or spec) if own is not None or any(given) else spec
        prepared = {name: prepared[name] for name in spec}
        if prepared == spec:
            return None
        if run.name not in self.told:
            say(options, f"{run.name}: images: {text_of(prepared)}")
        self.told.add(run.name)
        return prepared


def _folders(option: str, given: list[str]) -> dict[str, str]:
    """Those of an option NAME=DIR; a name twice, or with /, is refused."""
    named = [named_path(option, text, "NAME=DIR") for text in given]
    folders = dict(named)
    for name in folders:
        if "/" in name:
            raise UserError(f"{option}: got the name {name!r}, expected one without /")
    if len(folders) < len(named):
        raise UserError(f"{option}: got {', '.join(name for name, _ in named)}, expected each name only once")
    return folders


def named_path(option: str, text: str, expected: str) -> tuple[str, str]:
    """(NAME, PATH) of NAME=PATH."""
    title, equals, path = text.partition("=")
    if not (title and equals and path):
        raise UserError(f"{option}: got {text!r}, expected {expected}")
    return title, path


def run_info(path: str) -> dict[str, Any]:
    """run.json of a run; nothing if it has none."""
    folder = Path(path).expanduser()
    return read_info(folder) if (folder / RUN).is_file() else {}
