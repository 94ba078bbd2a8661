"""The latency table: ms an image of each detector from stored features and logits, ours and other libraries'.

A bench test measures one cell:

    x = stored(case, device)
    detector = ood_fast.detectors.NCI().fit_features(x.train_features, x.train_logits, x.train_targets, head=(x.W, x.b))
    step = functools.partial(detector.score_features, x.features, x.logits)
    cell(measure, "NCI", OURS, step, len(x.features), error=relative_error([step()], [truth]), counts=…, prepare=…)

and bench/report.py joins the cells of a case to a row for each detector. Without `error`, the comparison with a truth
in the same run, a cell has its time and no ratio.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case

# What the tables of detectors are of.
LATENCY, ONE_READ, WITH_MODEL = "latency", "scores from row statistics", "model and score"
OURS, PYTORCH_OOD = "ood_fast", "pytorch-ood"
PYTORCH_OOD_VERSION = "0.4.0"
TRAIN_SAMPLES = 20_000


def pytorch_ood_left_out() -> str | None:
    """Why there are no rows of pytorch-ood, or None."""
    if importlib.util.find_spec("pytorch_ood") is None:
        return "pytorch-ood is not installed (pip install -e '.[bench]')"
    version = importlib.metadata.version("pytorch-ood")
    if version != PYTORCH_OOD_VERSION:
        return f"pytorch-ood {version} is installed; the comparison was written for {PYTORCH_OOD_VERSION}"
    return None


@dataclass(frozen=True)
class Stored:
    """What `ood-fast fit` and `score` read: features after a ReLU, logits and targets; and the head that made them."""

    train_features: Tensor
    train_logits: Tensor
    train_targets: Tensor
    features: Tensor
    logits: Tensor
    W: Tensor
    b: Tensor


def stored(case: Case, device: torch.device | str, train_samples: int = TRAIN_SAMPLES) -> Stored:
    """Random features about one mean a class, the head pointing at these means, `case.n_samples` images to score."""
    generator = torch.Generator(device).manual_seed(0)
    c, m = case.n_classes, case.n_features
    centre = torch.randn(c, m, generator=generator, device=device)
    W, b = centre / m**0.5, torch.zeros(c, device=device)

    def images(n: int) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.arange(n, device=device) % c  # every class is there
        z = (centre[y] + torch.randn(n, m, generator=generator, device=device)).relu_()
        return z, F.linear(z, W, b), y

    train, test = images(max(train_samples, 2 * c)), images(case.n_samples)
    return Stored(*train, *test[:2], W, b)


def cell(
    measure: Callable[..., None], detector: str, library: str, step: Callable[[], Tensor], images: int, **more: object
) -> None:
    """Measure one cell of the table: `step()` scores `images` images with `detector` of `library`."""
    measure(LATENCY, step, row=f"{detector}, {library}", detector=detector, library=library, images=images, **more)
