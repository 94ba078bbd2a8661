"""Whether fitted detectors work: validation images against scrambled copies of them and noise."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import Files, ImageDataset, Noise, Scrambled
from ..data.loading import tolerant
from ..detectors import DetectorSet
from ..metrics import auroc
from .images import dataset_of

SAMPLED = 1000  # validation images, and as many of the others
LEAST = 0.60  # AUROC, below which a detector is not to be used


def told(
    detectors: DetectorSet, model: nn.Module, source: Files, prepared: dict[str, Any], options: argparse.Namespace
) -> list[str]:
    """A line on the accuracy, where there are classes, and one for each detector: AUROC, flagged share, verdict."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLED)).astype(int))
    plain = dataset_of(source.take(rows), prepared)
    shape = (len(prepared["mean"]), prepared["size"], prepared["size"])
    noise = Noise(len(rows), shape, prepared["mean"], prepared["std"], 0)
    scores, right = _scores(detectors, model, plain, options)
    made = {"scrambled": ImageDataset(Scrambled(plain, 0)), "noise": ImageDataset(noise)}
    others = {name: _scores(detectors, model, dataset, options)[0] for name, dataset in made.items()}
    accuracy = "" if right is None else f", accuracy {100 * right:.1f} %"
    lines = [f"check on {len(rows)} validation images, scrambled copies of them and noise{accuracy}"]
    for name, detector in detectors.items():
        aurocs = {kind: auroc(scores[name], of_kind[name]) for kind, of_kind in others.items()}
        line = f"{name}: AUROC " + ", ".join(f"{100 * value:.1f} ({kind})" for kind, value in aurocs.items())
        if detector.threshold is not None:
            line += "; flagged: " + ", ".join(
                f"{100 * float((~(given[name] >= detector.threshold.cpu())).float().mean()):.1f} % of {kind}"
                for kind, given in {"validation": scores, **others}.items()
            )
        lines.append(line + not_to_use(min(aurocs.values())))
    return lines


def not_to_use(auroc_: float) -> str:
    """What is to be said behind the least AUROC of a detector."""
    return f"; do not use, an AUROC is below {100 * LEAST:.0f}" * (auroc_ < LEAST)


def _scores(
    detectors: DetectorSet, model: nn.Module, dataset: ImageDataset, options: argparse.Namespace
) -> tuple[dict[str, Tensor], float | None]:
    """The scores of the images that can be read, and the accuracy, None without classes."""
    loader = tolerant(dataset, options.batch_size, options.workers)
    scores: list[dict[str, Tensor]] = []
    right: list[Tensor] = []
    for batch, found in detectors.score_loader(model, (batch for batch, good, _ in loader if good), options.head):
        scores.append({name: values.cpu() for name, values in found.items()})
        if dataset.source.classes is not None and batch.targets is not None:
            right.append(batch.logits.argmax(dim=1).eq(batch.targets).float().cpu())
    joined = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
    return joined, torch.cat(right).mean().item() if right else None
