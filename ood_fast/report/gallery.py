"""The images that scores and predictions are worst on: which ID images look most out-of-distribution to the best
detector, which OOD images least, and which errors the classifier is surest of. No model is run."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from .. import checks
from ..data import ImageBenchmark
from ..data.images import ImageDataset
from ..detectors.registry import label_of
from ..evaluation.results import ID, TEST
from ..evaluation.verdict import ranking
from . import evaluations, pages
from .diagnoses import opened
from .record import Evaluated, Record

SHOWN = 8  # images of a kind


def add(
    records: Sequence[Record],
    data_root: str | os.PathLike[str] | None = None,
    at_hand: Iterable[ImageBenchmark] = (),
) -> None:
    """Fill in `Evaluated.images` of the best run on each benchmark; where they cannot be shown, `missing` says why.
    The images are those `at_hand`, else below `data_root`, else where the run was trained from."""
    for benchmark in dict.fromkeys(name for record in records for name in record.evaluated):
        found = [(r, r.evaluated[benchmark]) for r in records if benchmark in r.evaluated]
        ranked = ranking(evaluations.stored(found))
        of_best = [pair for pair in found if ranked and pair[1].run.trained.method == ranked[0].method]
        for record, evaluated in of_best[:1]:
            try:
                images = _images_of(record, evaluated, data_root, at_hand)
                evaluated.images = _gallery(record, evaluated, ranked[0].detector, images)
            except (checks.UserError, OSError, ValueError) as error:
                record.missing.append(f"images of {benchmark}: {error}; say where they are with --data-root")


def _images_of(
    record: Record, evaluated: Evaluated, data_root: str | os.PathLike[str] | None, at_hand: Iterable[ImageBenchmark]
) -> ImageBenchmark:
    for benchmark in at_hand:
        with suppress(checks.UserError):
            _checked(evaluated, TEST, benchmark.test)
            return benchmark
    return opened(record, data_root, evaluated.results.sets)


def _gallery(record: Record, evaluated: Evaluated, detector: str, benchmark: ImageBenchmark) -> str:
    """Rows of images, each with what is to be said of it."""
    label = label_of(detector)
    if benchmark.name != evaluated.results.benchmark:
        raise checks.UserError(f"{record.name} was trained on {benchmark.name}")
    scores = evaluated.scores()[detector]
    classes = benchmark.class_names

    def row(title: str, shown: Iterable[tuple[ImageDataset, int, str]]) -> str:
        figures = (f"<figure>{_image(of, i)}<p class=caption>{html.escape(text)}</p></figure>" for of, i, text in shown)
        return f"<h3>{html.escape(title)}</h3><div class=gallery>{''.join(figures)}</div>"

    test = _checked(evaluated, TEST, benchmark.test)
    inside = [(test, i, f"{classes[test.targets[i]]}, {scores[ID][i]:.4g}") for i in _first(scores[ID])]
    parts = [row(f"ID images with the lowest scores by {label}, with their class", inside)]
    outside: list[tuple[float, ImageDataset, int, str]] = []
    for name in [name for name in evaluated.results.sets if name in scores and name in benchmark.ood]:
        dataset, told = _checked(evaluated, name, benchmark.ood[name]), evaluated.results.sets[name].title
        outside += [(scores[name][i], dataset, i, f"{told}, {scores[name][i]:.4g}") for i in _first(-scores[name])]
    outside.sort(key=lambda each: -each[0])
    parts.append(row(f"OOD images with the highest scores by {label}", (each[1:] for each in outside[:SHOWN])))
    if evaluated.diagnosis is not None:
        samples = evaluated.diagnosis.sets[TEST]
        wrong = torch.where(samples.correct, -torch.inf, samples.confidence).numpy()
        sure = [(i, classes[samples.target[i]], classes[samples.predicted[i]]) for i in _first(-wrong) if wrong[i] > 0]
        taken = [(test, i, f"{y}, taken for {predicted} ({100 * wrong[i]:.1f} %)") for i, y, predicted in sure]
        parts.append(row("Wrong with the most confidence", taken))
    return "".join(parts)


def _first(values: np.ndarray) -> list[int]:
    """Where the lowest are; NaN comes last."""
    return list(map(int, np.argsort(values, kind="stable")[:SHOWN]))


def _checked(evaluated: Evaluated, name: str, dataset: ImageDataset) -> ImageDataset:
    """The images, if they are those that were evaluated: the cache calls its folders by their fingerprints."""
    outputs = evaluated.outputs
    if name in outputs and not Path(outputs[name]).name.endswith(f"-{dataset.fingerprint()[:16]}"):
        raise checks.UserError(f"the images of {name} are not those that were evaluated")
    return dataset


def _image(dataset: ImageDataset, index: int) -> str:
    """A small image; of one that is prepared already, its grey or colour values stretched."""
    found = dataset.source.image(index)
    if isinstance(found, torch.Tensor):
        from PIL import Image

        scaled = (found - found.min()) / (found.max() - found.min()).clamp(min=1e-12)
        levels = (255 * scaled).byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
        found = Image.fromarray(levels)
    return pages.thumbnail(found)
