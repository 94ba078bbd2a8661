"""What a trained classifier is worth on a benchmark: every detector on every OOD set, accuracy, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import diagnostics, metrics
from .data import Benchmark
from .detectors import NCI, Detector, DetectorSet
from .detectors.run import run_model
from .detectors.search import Search
from .functional import boundary_distance
from .heads import find_head
from .recipes import TAU

BATCH = 1024
ID = "id"  # the name of the in-distribution test set among the score sets

# Metrics of a detector on an OOD set. The names carry the convention where there is more than one.
DETECTION_METRICS = {
    "auroc": metrics.auroc,
    "fpr95_ood_positive": lambda id_scores, ood_scores: metrics.fpr_at_tpr(id_scores, ood_scores, positive="ood"),
    "fpr95_id_positive": lambda id_scores, ood_scores: metrics.fpr_at_tpr(id_scores, ood_scores, positive="id"),
    "aupr_in": lambda id_scores, ood_scores: metrics.aupr(id_scores, ood_scores, positive="id"),
    "aupr_out": lambda id_scores, ood_scores: metrics.aupr(id_scores, ood_scores, positive="ood"),
}


@dataclass(frozen=True)
class Measurement:
    """One number. `detector` and `ood_set` are empty where it does not belong to one."""

    metric: str
    value: float
    detector: str = ""
    ood_set: str = ""


@dataclass
class Evaluation:
    """All numbers of one model, and what the plots are drawn from."""

    measurements: list[Measurement] = field(default_factory=list)
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # detector -> set (ID or an OOD set) -> (n,)
    singular_values: Tensor | None = None

    def add(self, metric: str, value: float, detector: str = "", ood_set: str = "") -> None:
        self.measurements.append(Measurement(metric, value, detector, ood_set))


@dataclass(frozen=True)
class Outputs:
    """What a model makes of a set of images: features (n, m) and logits (n, c), in float64 on the CPU."""

    features: Tensor
    logits: Tensor


def evaluate(model: nn.Module, benchmark: Benchmark, detectors: Mapping[str, Detector]) -> Evaluation:
    """Fit `detectors` on the training images and measure them on every OOD set; the model runs once over each image.

    Scores are computed in float64 from what the model gives, on the CPU: in float32 the softmax of a confident model is
    exactly 1 for most images (LogitNorm's logits are large), and the ties would decide the metrics.

    An NCI among the detectors gets the α of its grid that best tells the validation images from scrambled copies of
    themselves: no OOD image takes part in the choice.
    """
    weight, bias = (_in_float64(parameter) for parameter in (find_head(model).weight, find_head(model).bias))
    train = outputs(model, benchmark.train.images)
    test = outputs(model, benchmark.test.images)
    ood = {name: outputs(model, ood_set.images) for name, ood_set in benchmark.ood.items()}
    train_targets, test_targets = benchmark.train.targets.cpu(), benchmark.test.targets.cpu()
    result = Evaluation()

    result.add("accuracy", metrics.accuracy(test.logits, test_targets))
    for metric, temperature in temperatures(test.logits, weight).items():
        probabilities = torch.softmax(test.logits / temperature.unsqueeze(1), dim=1)
        result.add(metric, metrics.expected_calibration_error(probabilities, test_targets))

    result.singular_values = diagnostics.singular_values(train.features)
    result.add("effective_rank", diagnostics.effective_rank(result.singular_values))
    for index, value in enumerate(result.singular_values.tolist(), start=1):
        result.add(f"singular_value_{index:02d}", value)

    validation = outputs(model, benchmark.validation.images)
    scrambled = outputs(model, scramble_pixels(benchmark.validation.images, benchmark.seed))
    targets = benchmark.validation.targets.cpu()
    chosen = DetectorSet(detectors)
    search = Search(chosen, {name: {} for name, detector in chosen.items() if not isinstance(detector, NCI)})
    search.fit_features(
        *(train.features, train.logits, train_targets, (weight, bias)),
        validation=(validation.features, validation.logits, targets),
    )
    fitted, trials = search.choose(
        search.score_features(validation.features, validation.logits),
        {"scrambled": search.score_features(scrambled.features, scrambled.logits)},
    )
    for name, detector in fitted.items():
        if isinstance(detector, NCI):
            result.add("alpha", detector.alpha, name)
            result.add("alpha_validation_auroc", max(trial.auroc for trial in trials[name]), name)
    images = {ID: benchmark.test.images, **{name: ood_set.images for name, ood_set in benchmark.ood.items()}}
    scores = {
        ood_set: fitted.score_features(out.features, out.logits, skip_models=True)
        for ood_set, out in {ID: test, **ood}.items()
    }
    for name, detector in fitted.items():
        if detector.needs_model:
            for ood_set, of_set in scores.items():
                of_set[name] = torch.cat([detector.score(model, x).cpu() for x in images[ood_set].split(BATCH)])
        result.scores[name] = {ood_set: of_set[name] for ood_set, of_set in scores.items()}
        for ood_set in ood:
            for metric, function in DETECTION_METRICS.items():
                result.add(metric, function(scores[ID][name], scores[ood_set][name]), name, ood_set)
    return result


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Outputs:
    """Features and logits of all `images`, in eval mode."""
    batches = [(batch.features, batch.logits) for batch in run_model(model, images.split(BATCH), find_head(model))]
    features, logits = zip(*batches, strict=True)
    return Outputs(_in_float64(torch.cat(features)), _in_float64(torch.cat(logits)))


def _in_float64(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().cpu().double()


@torch.no_grad()
def temperatures(logits: Tensor, head_weight: Tensor) -> dict[str, Tensor]:
    """The three temperatures (n,) of the calibration table, by the name of their ECE: 1, τ‖f‖ and D.

    As in the loss, D = 0 (no boundary, or all logits tied) leaves the logits as they are.
    """
    distance = boundary_distance(logits, head_weight)
    return {
        "ece_softmax": torch.ones_like(distance),
        "ece_scaled_by_norm": TAU * (torch.linalg.vector_norm(logits, dim=1) + 1e-7),
        "ece_scaled_by_distance": torch.where(distance > 1e-6, distance, 1.0),
    }


def scramble_pixels(images: Tensor, seed: int) -> Tensor:
    """A copy of `images` (n, channels, height, width) with the pixels of each image in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    n_images, n_channels, height, width = images.shape
    order = torch.rand(n_images, height * width, generator=generator).argsort(dim=1).to(images.device)
    return images.flatten(2).gather(2, order.unsqueeze(1).expand(-1, n_channels, -1)).view_as(images)
