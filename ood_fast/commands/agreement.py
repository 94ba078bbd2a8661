"""Whether a model and class folders speak of the same classes in the same order: counted on the way, or on a sample."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..agreement import LISTED, confusion, refuse_disagreement
from ..checks import UserError
from ..data import folders
from ..data.images import ImageDataset
from ..detectors import Detector
from ..detectors.fitting import Confusion
from ..detectors.streaming import Gathered
from ..models.outputs import logits_of
from .common import say

SAMPLED = 256  # images that decide between two orders of the classes
BATCH = 32


class Agreement(Detector):
    """Fitted beside detectors, in the same pass: counts predictions. Never saved."""

    state = ("counts",)

    def gathers(self) -> dict[str, Gathered]:
        return {"confusion": Confusion()}

    def _finish(self, confusion: Confusion) -> None:
        self.counts = confusion.counts


def check_sample(
    model: nn.Module, dataset: ImageDataset, names: Sequence[str], path: str, any_accuracy: bool = True
) -> None:
    """UserError where some predictions of a model say that the classes have another order, or are at chance level."""
    logits, labels = _sampled(model, dataset)
    if len(labels):
        refuse_disagreement(confusion(logits, labels), names, path, any_accuracy)


def class_order(model: nn.Module, dataset: ImageDataset, options: argparse.Namespace) -> list[str]:
    """The names of the class folders of `dataset` in the order of the model's outputs.

    Those of `--classes`; else the labels that the model itself names, if the folders are called alike; else the order
    of the names, or the natural one (2 before 10, apple before Zebra) where the predictions of some images say that the
    model was trained with it.
    """

    if options.classes is not None:
        return folders.class_names(options.classes)
    names, own = list(dataset.source.classes or ()), own_labels(model)
    if own is not None and set(names) <= set(own):
        return own
    natural = sorted(names, key=folders.natural)
    if natural == names:
        return names
    logits, labels = _sampled(model, dataset)
    if not len(labels):
        return names
    guesses, in_nature = logits.argmax(dim=1), torch.tensor([natural.index(name) for name in names])
    by_name, by_nature = int((guesses == labels).sum()), int((guesses == in_nature[labels]).sum())
    if not by_name < len(labels) / 2 < by_nature:
        return names
    more = ", ..." if len(names) > LISTED else ""
    say(
        options,
        f"ood-fast: classes in their natural order, {', '.join(natural[:LISTED])}{more}: {by_nature} of {len(labels)} "
        f"images are predicted as their folder says, {by_name} in the order {', '.join(names[:LISTED])}{more}; "
        "--classes FILE sets another",
    )
    return natural


def own_labels(model: nn.Module) -> list[str] | None:
    """What the configuration of a Hugging Face or timm model calls its outputs, if it does."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, dict) and set(named) == set(range(len(named))):
        told = [named[index] for index in range(len(named))]
        if told != [f"LABEL_{index}" for index in range(len(named))]:
            return told
    config = getattr(model, "pretrained_cfg", None)
    labels = config.get("label_names") if isinstance(config, dict) else None
    return None if labels is None else list(labels)


def _sampled(model: nn.Module, dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """Logits and labels of at most `SAMPLED` images from all over the data that can be read."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images, labels = [], []
    for index in range(0, len(dataset), max(1, -(-len(dataset) // SAMPLED))):
        try:
            x, label = dataset[index]
        except UserError:  # the pass over the data tells it
            continue
        images.append(x)
        labels.append(label)
    nothing = torch.empty(0, 1), torch.empty(0, dtype=torch.int64)
    if not images:
        return nothing
    try:
        with torch.no_grad():
            batches = [torch.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
            parts = [logits_of(model(batch.to(device))) for batch in batches]
    except (RuntimeError, ValueError):  # what the model cannot take is told by the pass, too
        return nothing
    return torch.cat(parts).cpu(), torch.tensor(labels)
