"""Whether a model and the images speak of the same classes, in the same order: said by the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import UserError, shortened, warn_caller

LEAST_IMAGES = 20  # of fewer, nothing is said
LISTED = 12  # classes in a message


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """How often class j was predicted for images of class i: (c + 1, c) int64 on the CPU; row c: of other classes."""
    c = logits.shape[1]
    targets = targets.to(logits.device)
    pairs = targets.where((targets >= 0) & (targets < c), c) * c + logits.argmax(dim=1)
    return torch.bincount(pairs, minlength=(c + 1) * c).view(c + 1, c).cpu()


ORDER = "number the targets as the logits are"
ROWS = "targets of other rows or of other classes, logits or a head of another model"
CURE = "pass the model's order as --classes FILE"
CAUSES = (
    "another --mean, --std or --size than in training, weights that are not this model's, folders of other classes, "
    "too short a training"
)
UNTRAINED = "too few epochs, a learning rate that is too high or too low"


def other_order(counts: Tensor, names: Sequence[str], cure: str = CURE, of: str = "folder") -> str:
    """Both orders, where the classes `names` are those of the model in another one; else nothing. `of`: what labels.

    That is where fewer than half of the images are predicted as they are labelled, but half or more, and more than
    chance explains, if each class is matched with a prediction of its own.
    """
    n_images, right = int(counts.sum()), int(counts.diagonal().sum())
    meant = counts.argmax(dim=1)[: len(names)]
    by_meaning = int(counts[: len(meant)].amax(dim=1).sum())
    enough = n_images >= LEAST_IMAGES and by_meaning > _chance(counts, 4)
    if not enough or not right < n_images / 2 <= by_meaning or len(set(meant.tolist())) < len(meant):
        return ""
    order = [f"{name} -> {int(index)}" for name, index in zip(names, meant, strict=False)]
    return (
        f"the {of}s are not in the order of the model's classes: {100 * right / n_images:.1f} % of the images are "
        f"predicted as their {of} says, {100 * by_meaning / n_images:.1f} % if {of}s and classes are matched; "
        f"{of}s by name: {shortened(names, LISTED)}; as the model predicts them: {shortened(order, LISTED)}; {cure}"
    )


def at_chance(counts: Tensor, causes: str = CAUSES) -> str:
    """What may be wrong, where the accuracy is no better than chance; else nothing."""
    n_images, n_classes = int(counts.sum()), counts.shape[1]
    right = int(counts.diagonal().sum())
    if n_images < LEAST_IMAGES or n_classes < 2 or right > _chance(counts, 2):
        return ""
    told = f"accuracy {100 * right / n_images:.1f} %, no better than chance ({100 / n_classes:.1f} %)"
    return f"{told}; usual causes: {causes}"


def refuse_disagreement(
    counts: Tensor,
    names: Sequence[str],
    where: str,
    any_accuracy: bool = False,
    cure: str = CURE,
    of: str = "folder",
    causes: str = CAUSES,
) -> list[str]:
    """UserError where labels and model speak of the same classes in another order, or at chance level; that as a note
    with `any_accuracy`."""
    if wrong := other_order(counts, names, cure, of):
        raise UserError(f"{where}: {wrong}")
    wrong = at_chance(counts, causes)
    if wrong and not any_accuracy:
        raise UserError(f"{where}: {wrong}; --any-accuracy goes on")
    return [wrong] if wrong else []


def refuse_order(counts: Tensor, where: str, names: Sequence[str] | None = None, told: bool = False) -> bool:
    """UserError where targets are in another order than the logits, a warning where the accuracy is at chance level,
    unless it was `told`; gives whether it is. `names` of the classes, else their numbers."""
    listed = [str(k) for k in range(counts.shape[1])] if names is None or len(names) != counts.shape[1] else names
    if wrong := other_order(counts, listed, ORDER, "target"):
        raise UserError(f"{where}: {wrong}")
    wrong = at_chance(counts, ROWS)
    if wrong and not told:
        warn_caller(f"{where}: {wrong}")
    return told or bool(wrong)


def told_accuracy(counts: Tensor) -> str:
    """As it is printed."""
    return f"{100 * (counts.diagonal().sum() / counts.sum()).item():.1f} %"


def _chance(counts: Tensor, deviations: float) -> float:
    """How many images a guess may get right: the expectation and some standard deviations."""
    n_images, share = int(counts.sum()), 1 / int(counts.shape[1])
    return n_images * share + deviations * math.sqrt(n_images * share * (1 - share))
