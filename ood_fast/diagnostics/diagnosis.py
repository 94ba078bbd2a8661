"""All diagnostics of one model: a number for each, and what the plots are drawn from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, metrics
from ..files import replacing
from ..heads import find_head, inference_head
from ..intact import read_npz, write_npz
from ..metrics import ECE_BINS
from ..models.running import run_model
from .collapse import Chunk, Moments, NeuralCollapse, neural_collapse
from .plane import plane_of
from .samples import Samples, accuracy_by_norm, coefficient_of_variation, correlation, reliability, samples
from .spectrum import effective_rank, spectrum

T = TypeVar("T")
FORMAT = "ood_fast diagnosis 1"
ID = "test"

# name: (title, what it is). Those of OOD sets are given for each set, as "pscore_auroc/svhn".
NUMBERS = {
    "effective_rank": ("effective rank", "exp of the entropy of the singular values; Roy and Vetterli 2007"),
    "nc1": ("NC1", "tr(Σ_W Σ_B⁺)/C of the training features, 0 in collapse; Haas et al. eq. 2"),
    "equinormality": ("EN", "std/mean of the class means' norms ‖μ_c − μ_G‖, 0 in collapse; Haas et al. eq. 3"),
    "equiangularity": ("EA", "mean |cos(μ_c − μ_G, μ_c' − μ_G) + 1/(C − 1)|, 0 in collapse; Haas et al. eq. 4"),
    "nc3": ("NC3", "‖W/‖W‖ − M/‖M‖‖², weights against centred class means; Papyan et al. 2020"),
    "nc4": ("NC4", "share of ID samples classified as the nearest class mean; Papyan et al. 2020"),
    "norm_mean": ("mean ‖z‖", "mean norm of the training features"),
    "norm_cv": ("CV of ‖z‖", "std/mean of the training features' norms; Haas et al. fig. 3"),
    "distance_norm_correlation": ("r(D, ‖z‖), ID", "Pearson's r of D(z) and ‖z‖ of ID samples; Ding et al. fig. 2"),
    "accuracy_norm_correlation": ("ρ(accuracy, ‖z‖)", "Spearman's ρ over bins of ‖z‖; Haas et al. fig. 7"),
    "ece": ("ECE of f", f"expected calibration error of softmax(f), {ECE_BINS} bins"),
    "ece_by_distance": ("ECE of f/D", f"expected calibration error of softmax(f/D), {ECE_BINS} bins; Ding et al. 2026"),
    "distance_norm_correlation_ood": ("r(D, ‖z‖), OOD", "Pearson's r of D(z) and ‖z‖ of OOD samples"),
    "pscore_auroc": ("AUROC of pScore", "w_p·(z − μ)/‖z − μ‖; Liu and Qin, CVPR 2025"),
    "norm_auroc": ("AUROC of ‖z‖", "the score of Haas et al. 2024"),
    "distance_auroc": ("AUROC of D", "the mean distance to the boundaries as a score"),
}


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        numbers: by the names of `NUMBERS`; those of an OOD set end in "/SET".
        singular_values: of the training features, (m,).
        collapse: see `NeuralCollapse`.
        plane_weight, plane_bias: the head on the plane of the plot, (c, 2) and (c,).
        plane_share, plane_direct: see `Plane`.
        plane_means: the class means there, (C, 2).
        sets: the samples of the ID test set ("test") and of the OOD sets.
        about: what the caller wants to be kept with it, for JSON.
    """

    numbers: dict[str, float]
    singular_values: Tensor
    collapse: NeuralCollapse
    plane_weight: Tensor
    plane_bias: Tensor
    plane_share: float
    plane_direct: bool
    plane_means: Tensor
    sets: dict[str, Samples]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write to a .npz, which appears when all of it is written."""
        arrays: dict[str, Tensor] = {}
        plain: dict[str, Any] = {"format": FORMAT, "sets": list(self.sets)}
        for owner, prefix in ((self, ""), (self.collapse, "collapse/")):
            for entry in fields(owner):
                value = getattr(owner, entry.name)
                if isinstance(value, Tensor):
                    arrays[prefix + entry.name] = value
                elif entry.name not in ("collapse", "sets"):
                    plain[prefix + entry.name] = value
        for name, of_set in self.sets.items():
            arrays |= {f"sets/{name}/{entry.name}": getattr(of_set, entry.name) for entry in fields(Samples)}
        with replacing(file) as part, open(part, "wb") as stream:
            held = {"json": np.array(json.dumps(plain)), **{k: v.numpy() for k, v in arrays.items()}}
            write_npz(stream, held, packed=True)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Diagnosis:
        """Read what `save` wrote; UserError if it is something else, or damaged."""
        held = read_npz(file)
        try:
            plain = json.loads(str(held.pop("json")))
            if plain.pop("format") != FORMAT:
                raise checks.UserError(f"{file}: is of another version, expected {FORMAT!r}")
            everything = {**plain, **{name: torch.from_numpy(array) for name, array in held.items()}}

            def part(kind: type[T], prefix: str) -> T:
                return kind(**{entry.name: everything[prefix + entry.name] for entry in fields(cast(Any, kind))})

            everything["collapse"] = part(NeuralCollapse, "collapse/")
            everything["sets"] = {name: part(Samples, f"sets/{name}/") for name in plain["sets"]}
            return part(cls, "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, checks.UserError):
                raise
            raise checks.UserError(f"{file}: cannot be read as a diagnosis ({error})") from error


def diagnose(
    train: Iterable[Chunk],
    test: Iterable[Chunk],
    ood: Mapping[str, Iterable[Chunk]],
    head: tuple[Tensor, Tensor | None],
    about: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """All diagnostics from one pass over the chunks (features, logits, targets) of each set; see the package.

    Args:
        train: with targets; not augmented.
        test: ID samples with targets.
        ood: by name; targets are not read. Numbers of a set without samples are NaN.
        head: (W, b), as `heads.inference_head` gives it.

    Raises:
        ValueError: `train` is empty, or its targets are missing or out of range.
        FloatingPointError: a training feature is NaN or infinite.
    """
    geometry = Moments.of(train)
    weight = head[0].detach().cpu().double()
    bias = None if head[1] is None else head[1].detach().cpu().double()
    plane = plane_of(geometry)
    values = spectrum(geometry.covariance)[: max(1, min(len(geometry.norms), len(geometry.mean)))]
    collapse = neural_collapse(geometry, weight)
    of_test = samples(test, (weight, bias), geometry, plane)
    sets = {ID: of_test, **{name: samples(chunks, (weight, bias), geometry, plane) for name, chunks in ood.items()}}
    numbers = {
        "effective_rank": effective_rank(values),
        **{name: getattr(collapse, name) for name in ("nc1", "equinormality", "equiangularity", "nc3")},
        "nc4": of_test.nearest_mean_agreement(),
        "norm_mean": geometry.norms.mean().item(),
        "norm_cv": coefficient_of_variation(geometry.norms),
        "distance_norm_correlation": correlation(of_test.distance, of_test.norm),
        "accuracy_norm_correlation": accuracy_by_norm(of_test.norm, of_test.correct).rank_correlation,
        "ece": reliability(of_test.confidence, of_test.correct).ece,
        "ece_by_distance": reliability(of_test.confidence_by_distance, of_test.correct).ece,
    }
    for name, of_set in sets.items():
        if name != ID:
            numbers[f"distance_norm_correlation_ood/{name}"] = correlation(of_set.distance, of_set.norm)
            for number, score in (("pscore_auroc", "p_score"), ("norm_auroc", "norm"), ("distance_auroc", "distance")):
                numbers[f"{number}/{name}"] = _auroc(getattr(of_test, score), getattr(of_set, score))
    plane_weight, plane_bias = plane.head(weight, bias)
    means = plane.project(geometry.class_mean[collapse.classes])
    return Diagnosis(
        numbers, values, collapse, plane_weight, plane_bias, plane.share, plane.direct, means, sets, dict(about or {})
    )


def _auroc(id_scores: Tensor, ood_scores: Tensor) -> float:
    scored = len(id_scores) and len(ood_scores) and not (id_scores.isnan().any() or ood_scores.isnan().any())
    return metrics.auroc(id_scores, ood_scores) if scored else math.nan


def diagnose_model(
    model: nn.Module,
    train: Iterable[Any],
    test: Iterable[Any],
    ood: Mapping[str, Iterable[Any]],
    head: str | nn.Linear | None = None,
    about: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """`diagnose` of what `model` makes of loaders of (x, y, ...)."""
    layer = find_head(model, head) if head is None or isinstance(head, str) else head

    def chunks(loader: Iterable[Any]) -> Iterator[Chunk]:
        for batch in run_model(model, loader, layer):
            assert batch.features is not None  # there is a head
            yield batch.features, batch.logits, batch.targets

    ood_chunks = {name: chunks(loader) for name, loader in ood.items()}
    return diagnose(chunks(train), chunks(test), ood_chunks, inference_head(layer), about)


def epoch_diagnostics(
    model: nn.Module,
    train_loader: Iterable[Any],
    validation_loader: Iterable[Any],
    validation_ood_loader: Iterable[Any],
) -> dict[str, float]:
    """The numbers of `NUMBERS` after an epoch: one pass over each loader, without gradients, in evaluation mode.

    Class means and spectrum are of the training images; what needs samples beside them is of the validation images.
    All are NaN where a feature is not finite: a run that diverges is not stopped by this.
    """
    try:
        found = diagnose_model(model, train_loader, validation_loader, {"validation": validation_ood_loader})
    except FloatingPointError:
        return dict.fromkeys(NUMBERS, math.nan)
    numbers = {name.partition("/")[0]: value for name, value in found.numbers.items()}
    return {name: numbers[name] for name in NUMBERS}
