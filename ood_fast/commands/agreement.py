"""Whether a model and the class folders that detectors are fitted on speak of the same classes, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors import Detector
from ..detectors.streaming import Gathered
from .common import refusal

LEAST_IMAGES = 20  # of fewer, nothing is said
MOST_PAIRS = 1 << 24  # of classes, that are counted: 128 MiB
LISTED = 12  # classes in a message


@dataclass
class Confusion(Gathered):
    """How often class j was predicted for images of class i, (c, c) int64."""

    reads = ("logits", "targets")

    def update(self, features: Tensor | None, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        c = logits.shape[1]
        pairs = targets.to(logits.device).clamp(max=c) * c + logits.argmax(dim=1)  # a class too many is row c
        counted = torch.bincount(pairs, minlength=(c + 1) * c).view(c + 1, c).cpu()
        self.like = logits[:0]
        self.counts = counted if self.rows == 0 else self.counts + counted

    def merge(self, other: Confusion) -> None:
        """Add the counts of another process."""
        self.counts = self.counts + other.counts


class Agreement(Detector):
    """Fitted beside detectors, in the same pass: counts predictions. Never saved."""

    state = ("counts",)

    def gathers(self) -> dict[str, Gathered]:
        """The confusion matrix."""
        return {"confusion": Confusion()}

    def _finish(self, confusion: Confusion) -> None:
        self.counts = confusion.counts

    def accuracy(self) -> float:
        """Of the images of all class folders."""
        return (self.counts.diagonal().sum() / self.counts.sum()).item()

    def check(self, names: Sequence[str], path: str) -> None:
        """UserError where the folders are other classes than the model's, or the same in another order."""
        counts, n_classes = self.counts, self.counts.shape[1]
        n_images, right = int(counts.sum()), int(counts.diagonal().sum())
        if n_images < LEAST_IMAGES or n_classes < 2:
            return
        meant = counts.argmax(dim=1)[: len(names)]
        by_meaning = int(counts[: len(meant)].amax(dim=1).sum())
        if right < n_images / 2 <= by_meaning and len(set(meant.tolist())) == len(meant):
            order = [f"{name} -> {int(index)}" for name, index in zip(names[:LISTED], meant, strict=False)]
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            raise refusal(
                f"{path}: the folders are not in the order of the model's classes: {100 * right / n_images:.1f} % of "
                f"the images are predicted as their folder says, {100 * by_meaning / n_images:.1f} % if folders and "
                f"classes are matched; folders by name: {', '.join(names[:LISTED])}{more}; as the model predicts them: "
                f"{', '.join(order)}{more}; pass the model's order as --classes FILE"
            )
        chance = 1 / n_classes
        if right <= n_images * chance + 2 * (n_images * chance * (1 - chance)) ** 0.5:
            raise refusal(
                f"{path}: accuracy {100 * right / n_images:.1f} %, no better than chance ({100 * chance:.1f} %); usual "
                "causes: another --mean, --std or --size than in training, weights that are not this model's, folders "
                "of other classes"
            )
