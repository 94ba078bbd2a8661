"""The evaluation of a model on images that fit in memory: `ood-fast compare` on digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Benchmark, OODSet, Split
from ..detectors import NCI, Detector
from ..heads import find_head, inference_head
from ..models.running import run_model
from .cache import Outputs, score_key
from .measure import FIT, TEST, VALIDATION, VALIDATION_OOD, Chosen, Measuring, measure
from .results import ID, RunResult, TestSet
from .trained import Trained

BATCH = 1024


def evaluate(model: nn.Module, benchmark: Benchmark, detectors: Mapping[str, Detector]) -> RunResult:
    """Fit `detectors` on the training images and measure them on every OOD set; the model runs once over each image.

    An NCI among the detectors gets the α of its grid that best tells the validation images from scrambled copies of
    themselves: no OOD image takes part in the choice. The others are as they are.
    """
    seeing = {name: detector for name, detector in detectors.items() if detector.needs_model}
    tested = {ID: OODSet("test", "id", benchmark.test.images), **benchmark.ood}
    parts = {
        FIT: outputs(model, FIT, benchmark.train),
        VALIDATION: outputs(model, VALIDATION, benchmark.validation),
        VALIDATION_OOD: outputs(model, VALIDATION_OOD, scramble_pixels(benchmark.validation.images, benchmark.seed)),
        TEST: outputs(model, TEST, benchmark.test, seeing),
        **{name: outputs(model, name, ood_set.images, seeing) for name, ood_set in benchmark.ood.items()},
    }
    sets = {name: TestSet(part.title, part.group, len(part.images)) for name, part in tested.items()}
    result = RunResult(Trained(benchmark.name, model, benchmark.name, Path(), ""), "", sets, outputs=parts)
    weight, bias = inference_head(find_head(model))
    result.head = (weight.detach().cpu().double(), None if bias is None else bias.detach().cpu().double())
    as_they_are = {name: {} for name, detector in detectors.items() if not isinstance(detector, NCI)}
    how = Measuring(grids=as_they_are, leave_out=False, bootstrap=0)
    measure(result, detectors, [VALIDATION_OOD], how, Chosen(seeing))
    return result


@torch.no_grad()
def outputs(
    model: nn.Module, name: str, images: Split | Tensor, seeing: Mapping[str, Detector] | None = None
) -> Outputs:
    """What the model makes of all images in eval mode, on the CPU, and the scores of the detectors that need it."""
    x, targets = (images.images, images.targets) if isinstance(images, Split) else (images, None)
    batches = [(batch.features, batch.logits) for batch in run_model(model, x.split(BATCH), find_head(model))]
    features, logits = (torch.cat(part).cpu() for part in zip(*batches, strict=True))
    scores = {
        score_key(detector): torch.cat([detector.score(model, batch).cpu().double() for batch in x.split(BATCH)])
        for detector in (seeing or {}).values()
    }
    targets = torch.full((len(x),), -1) if targets is None else targets.cpu()
    return Outputs(name, name, "id" if isinstance(images, Split) else "ood", features, logits, targets, scores)


def scramble_pixels(images: Tensor, seed: int) -> Tensor:
    """A copy of `images` (n, channels, height, width) with the pixels of each image in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    n_images, n_channels, height, width = images.shape
    order = torch.rand(n_images, height * width, generator=generator).argsort(dim=1).to(images.device)
    return images.flatten(2).gather(2, order.unsqueeze(1).expand(-1, n_channels, -1)).view_as(images)
