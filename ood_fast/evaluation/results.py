"""What an evaluation found: numbers of runs, and over the seeds of a method."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics, published, recipes, registry
from ..data.folders import is_below
from ..data.specs import SPECS
from ..metrics import ECE_BINS
from .cache import Outputs
from .trained import Trained, as_published

FORMAT = "ood_fast evaluate 1"
FIT, VALIDATION, VALIDATION_OOD, TEST = "fit", "validation", "validation_ood", "test"  # parts of a benchmark
ID = "id"  # the in-distribution test set among the score sets
CSID = "csid"  # the group of covariate-shifted ID sets: the same classes, other images
FULL_SPECTRUM = "fsood_"  # before a metric: in-distribution are the ID test images and all covariate-shifted ones
GROUPS = {"near": "nearood", "far": "farood"}  # group -> the name of its mean in files, as in OpenOOD's
TITLES = {mean: f"{group}-OOD" for group, mean in GROUPS.items()}  # what tables call it
DETECTION = registry.TAKEN["metric"]
ECE = ("ece_softmax", "ece_scaled_by_norm", "ece_scaled_by_distance")

# What the numbers are: in results.json, and the captions of tables.
CONVENTIONS = {
    "direction": "higher score = more in-distribution",
    "precision": "scores and metrics in float64, from the model's float32 features and logits",
    "unit": "0 to 1 in CSV and JSON, percent in tables",
    "std": "sample standard deviation over the runs of a method, ddof 1; in openood/ ddof 0, as there",
    "interval": "95 %, percentile bootstrap: test images drawn anew, ID and each OOD set apart; the mean of these runs"
    "; of 0 or 100 % always a point, however few images there are; of ECE, too large in few images, reflected about it",
    "nearood, farood": "unweighted means over the sets of the group",
    "fsood_*": "the same with the covariate-shifted ID sets (group csid) beside the ID test images, as OpenOOD's fsood",
    "fpr95_ood_positive": "share of ID images rejected by the threshold that catches 95 % of the OOD images; OpenOOD's",
    "fpr95_id_positive": "share of OOD images accepted by the threshold that keeps 95 % of the ID images; most papers'",
    "aupr_in": "area under precision-recall with ID positive, trapezoid over recall",
    "aupr_out": "area under precision-recall with OOD positive, trapezoid over recall",
    "ece_softmax": f"expected calibration error of softmax(f) on the ID test images, {ECE_BINS} equal bins (lo, hi]",
    "ece_scaled_by_norm": f"the same of softmax(f / (τ‖f‖)), τ = {recipes.TAU}",
    "ece_scaled_by_distance": "the same of softmax(f / D), D = mean distance to the decision boundaries",
}


@dataclass(frozen=True)
class Measurement:
    """One number of one run, 0 to 1. `detector`, `ood_set` and `group` are empty where it does not belong to one;
    `ood_set` "nearood" and "farood" are the means over the sets of a group. `low`, `high`: its bootstrapped interval.
    """

    metric: str
    value: float
    detector: str = ""
    ood_set: str = ""
    group: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What was measured."""
        return self.metric, self.detector, self.ood_set


Numbers = tuple[str, Sequence[tuple[str, str, str]]]  # a method, and keys of its measurements


@dataclass(frozen=True)
class TestSet:
    """What is tested with. `group` is "id", "csid", "near", "far" or "synthetic"."""

    title: str
    group: str
    n_images: int

    @property
    def is_ood(self) -> bool:
        """Whether it is to be told from the ID test images."""
        return self.group not in (ID, CSID)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of Student's t for the mean of at least two values."""
    from scipy.special import stdtrit

    half_width = stdtrit(len(values) - 1, 0.975) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half_width, fmean(values) + half_width


@dataclass
class RunResult:
    """All that was found of one model.

    Attributes:
        trained: the run, with its model and recipe.
        model_key: see `cache.model_key`.
        sets: by name; `ID` is the in-distribution test set.
        settings: detector -> its parameters, as tuned. trials: detector -> [{**parameters, "auroc": on validation}].
        notes: what was left out, and why.
        standard: the detectors with default parameters, or searched over the default grids, as those of the papers.
        scores: detector -> set -> (n,) float64.
        outputs: what the model makes of "fit", "validation", "validation_ood", "test" and each OOD set.
        head: W (c, m), b (c,) or None, float64; None if it is not known.
        draws: (metric, detector, ood_set) -> (B,), the bootstrap.
    """

    trained: Trained
    model_key: str
    sets: dict[str, TestSet]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    standard: frozenset[str] = frozenset()
    measurements: list[Measurement] = field(default_factory=list)
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    outputs: dict[str, Outputs] = field(default_factory=dict)
    head: tuple[Tensor, Tensor | None] | None = None
    draws: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)

    @property
    def csid(self) -> list[str]:
        """The covariate-shifted ID sets."""
        return [name for name, part in self.sets.items() if part.group == CSID]

    def add(
        self,
        metric: str,
        value: float,
        draws: Tensor | None = None,
        *,
        detector: str = "",
        ood_set: str = "",
        group: str = "",
    ) -> None:
        """Add a number, with the interval of its draws (B,)."""
        low, high = (None, None) if draws is None else metrics.percentile_interval(draws)
        self.measurements.append(Measurement(metric, value, detector, ood_set, group, low, high))
        if draws is not None:
            self.draws[metric, detector, ood_set] = draws

    def holds(self, keys: Iterable[tuple[str, str, str]]) -> bool:
        """Whether all of these were measured."""
        return {*keys} <= {found.key for found in self.measurements}

    def value(self, metric: str, detector: str = "", ood_set: str = "") -> float:
        """One number; KeyError if it was not measured."""
        for found in self.measurements:
            if found.key == (metric, detector, ood_set):
                return found.value
        raise KeyError((metric, detector, ood_set))


@dataclass(frozen=True)
class Summary:
    """One metric over the runs of a method: mean ± sample standard deviation (ddof 1; None for one run).

    `low`, `high`: the bootstrapped 95 % interval of the mean over these runs, from drawing the test images anew; it
    says nothing of other seeds. `published`, if someone has and the setting is the same: the number for this recipe,
    benchmark, detector and group of sets, and its `source`; `difference` = mean − published. `gain`: what it is above
    the baseline, with its interval, as `Results.gain` has it.
    """

    method: str
    metric: str
    detector: str
    ood_set: str
    group: str
    mean: float
    std: float | None
    n_runs: int
    low: float | None = None
    high: float | None = None
    published: float | None = None
    source: str = ""
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None

    @property
    def difference(self) -> float | None:
        """Mean less the published number."""
        return None if self.published is None else self.mean - self.published

    def as_row(self) -> dict[str, Any]:
        """As summary.csv and results.json have it."""
        return {**asdict(self), "difference": self.difference}


@dataclass
class Results:
    """The evaluation of some runs on one benchmark. `kept`: the summaries, if they were read and not counted here."""

    benchmark: str
    runs: list[RunResult]
    n_bootstrap: int
    tuned: bool
    kept: tuple[Summary, ...] | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """What results.json holds, without models, outputs, draws and scores; of these the names of the detectors.

        ValueError if something in it is missing, or is not what `write` writes.
        """
        try:
            _check_kinds(content, {"benchmark": str, "bootstrap": int, "tuned": bool})
            sets = {name: _typed(TestSet, part) for name, part in content["sets"].items()}
            runs = [_read_run(run, sets) for run in content["runs"]]
            kept = tuple(_typed(Summary, row) for row in content["summary"])
            if strange := {summary.method for summary in kept} - {run.trained.method for run in runs}:
                raise ValueError(f"summary: {sorted(strange)[0]!r} is the method of no run")
            return cls(content["benchmark"], runs, content["bootstrap"], content["tuned"], kept)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not as an evaluation is written ({type(error).__name__}: {error})") from error

    def to_json(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """What results.json holds. `context` says how it came about (command, versions, machine, times)."""
        return {
            "format": FORMAT,
            **context,
            "benchmark": self.benchmark,
            "tuned": self.tuned,
            "bootstrap": self.n_bootstrap,
            "conventions": CONVENTIONS,
            "sets": {name: asdict(part) for name, part in self.sets.items()},
            "runs": [_run_dict(run, name) for run, name in zip(self.runs, run_names(self), strict=True)],
            "summary": [summary.as_row() for summary in self.summaries()],
        }

    @property
    def methods(self) -> dict[str, list[RunResult]]:
        """The runs of each method, its seeds, in the order in which they were given."""
        found: dict[str, list[RunResult]] = {}
        for run in self.runs:
            found.setdefault(run.trained.method, []).append(run)
        return found

    @property
    def one_each(self) -> bool:
        """Whether there is one run of each method, so that intervals are over the test images."""
        return len(self.runs) == len(self.methods)

    @property
    def sets(self) -> dict[str, TestSet]:
        """What was tested with; the same for all runs."""
        return self.runs[0].sets

    @property
    def ood(self) -> list[str]:
        """The OOD sets."""
        return [name for name, part in self.sets.items() if part.is_ood]

    @property
    def csid(self) -> list[str]:
        """The covariate-shifted ID sets."""
        return self.runs[0].csid

    @property
    def detectors(self) -> list[str]:
        """Those that scored at least one run."""
        return list(dict.fromkeys(name for run in self.runs for name in run.scores))

    @property
    def baseline(self) -> str | None:
        """The method that the others are compared with: plain cross-entropy, if there are others."""
        plain = [
            method
            for method, runs in self.methods.items()
            if (recipe := runs[0].trained.recipe) is not None and (recipe.loss, recipe.head) == ("ce", "linear")
        ]
        return plain[0] if plain and len(self.methods) > 1 else None

    def gain(self, of: Numbers, over: Numbers) -> tuple[float, float, float] | tuple[float, None, None] | None:
        """What a method has more than another: the mean over the seeds that both have, and its 95 % interval.

        Each of the two is (method, [(metric, detector, ood_set), ...]), whose numbers are averaged in each run. Runs
        of one seed saw the same images, first weights and batches, and are taken in pairs. The interval is Student's t
        over the seeds; where each method has but one run, the bootstrapped one over the test images, if there is one.
        None without a pair.
        """
        pairs = self.pairs(of, over)
        found = [fmean(a.value(*key) for key in of[1]) - fmean(b.value(*key) for key in over[1]) for a, b in pairs]
        if not found:
            return None
        if len(found) > 1:
            return fmean(found), *mean_interval(found)
        a, b = pairs[0]
        drawn_all = all(key in run.draws for run, keys in ((a, of[1]), (b, over[1])) for key in keys)
        if not (self.one_each and drawn_all):
            return found[0], None, None
        drawn = [torch.stack([run.draws[key] for key in keys]).mean(dim=0) for run, keys in ((a, of[1]), (b, over[1]))]
        return found[0], *metrics.percentile_interval(drawn[0] - drawn[1])

    def pairs(self, of: Numbers, over: Numbers) -> list[tuple[RunResult, RunResult]]:
        """The runs of two methods by their seeds; those without a partner, or without these numbers, are left out."""
        ours, theirs = ([run for run in self.methods[method] if run.holds(keys)] for method, keys in (of, over))
        runs = [*self.methods[of[0]], *self.methods[over[0]]]
        if self.one_each and len({run.trained.seed for run in runs} - {None}) < 2:
            return list(zip(ours, theirs, strict=False))
        of_seed = {run.trained.seed: run for run in theirs if run.trained.seed is not None}
        return [(run, of_seed[run.trained.seed]) for run in ours if run.trained.seed in of_seed]

    def summaries(self) -> Iterator[Summary]:
        """Every metric over the runs of each method, in the order in which the numbers came."""
        if self.kept is not None:
            yield from self.kept
            return
        for method, runs in self.methods.items():
            found: dict[tuple[str, str, str], list[tuple[RunResult, Measurement]]] = {}
            for run in runs:
                for number in run.measurements:
                    found.setdefault(number.key, []).append((run, number))
            known = self._published(runs)
            baseline = self.baseline
            theirs = {n.key for run in self.methods[baseline] for n in run.measurements} if baseline else set()
            for (metric, detector, ood_set), pairs in found.items():
                values = [number.value for _, number in pairs]
                draws = [run.draws[number.key] for run, number in pairs if number.key in run.draws]
                std = stdev(values) if len(values) > 1 else None
                low, high = None, None
                if len(draws) == len(pairs):
                    low, high = metrics.percentile_interval(torch.stack(draws).mean(dim=0))
                elsewhere, key = known.get((metric, detector, ood_set)), [(metric, detector, ood_set)]
                compared = method != baseline and key[0] in theirs
                gain = self.gain((method, key), (baseline, key)) if baseline and compared else None
                gained, gained_low, gained_high = gain or (None, None, None)
                yield Summary(
                    *(method, metric, detector, ood_set, pairs[0][1].group),
                    *(fmean(values), std, len(values), low, high),
                    published=None if elsewhere is None else elsewhere.value / 100,
                    source="" if elsewhere is None else elsewhere.source,
                    gain=gained,
                    gain_low=gained_low,
                    gain_high=gained_high,
                )

    def _published(self, runs: list[RunResult]) -> Mapping[tuple[str, str, str], published.Published]:
        """What is published of a method, where the setting is the same: training, parameters, the sets of a group."""
        if not all(as_published(run.trained) for run in runs):
            return {}
        trained = runs[0].trained
        name = trained.method if trained.recipe is None else trained.recipe.name
        standard = frozenset.intersection(*(run.standard for run in runs)) | {""}
        spec = SPECS.get(self.benchmark)
        others = {  # the means over other sets than the benchmark's
            mean_name
            for group, mean_name in GROUPS.items()
            if {name for name, part in self.sets.items() if part.group == group} != set(getattr(spec, group, ()))
        }
        return {
            (metric, detector, ood_set): number
            for (metric, detector, ood_set), number in published.of(self.benchmark, name).items()
            if detector in standard and ood_set not in others
        }


# ---- results.json


def run_names(results: Results) -> list[str]:
    """A name for the scores of each run: the last part of its path, with a number where that is not enough."""
    places = [Path(os.path.abspath(run.trained.name)) for run in results.runs]  # "..", too, is a path of a run
    names = [place.name.replace(":", "-") or "run" for place in places]
    return [name if names.count(name) == 1 else f"{index}-{name}" for index, name in enumerate(names)]


def _run_dict(run: RunResult, name: str) -> dict[str, Any]:
    trained = run.trained
    return {
        "run": trained.name,
        "id": (trained.info or {}).get("id"),
        "folder": str(trained.folder.resolve()),
        "scores": f"scores/{name}",
        "method": trained.method,
        "seed": trained.seed,
        "epochs": (trained.info or {}).get("epochs"),
        "checkpoint": trained.checkpoint,
        "model": run.model_key,
        "recipe": None if trained.recipe is None else recipes.as_dict(trained.recipe),
        "images_per_second": run.images_per_second,
        "outputs": {name: str(held.path.resolve()) for name, held in run.outputs.items() if held.path is not None},
        "detectors": run.settings,
        "trials": run.trials,
        "notes": run.notes,
        "measurements": [asdict(number) for number in run.measurements],
    }


_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "float | None": (int, float, type(None))}
_RUN: dict[str, Any] = {"run": str, "folder": str, "scores": str, "method": str, "checkpoint": str, "model": str}
_RUN |= {"detectors": dict, "trials": dict, "notes": list, "outputs": dict, "measurements": list}
_RUN |= {name: (int, type(None)) for name in ("seed", "epochs")}


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name}: got {str(values[name])[:60]!r}")


def _typed(record: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of plain values, each of its type; what older files lack has its default."""
    kinds = {p.name: _KINDS[str(p.type)] for p in fields(record) if p.name in values or p.default is MISSING}
    _check_kinds(values, kinds)
    return record(**{name: values[name] for name in kinds})


def _read_run(run: Mapping[str, Any], sets: dict[str, TestSet]) -> RunResult:
    _check_kinds(run, _RUN)
    notes = {str(index): note for index, note in enumerate(run["notes"])}
    for part, kind in ((run["outputs"], str), (run["detectors"], dict), (notes, str)):
        _check_kinds(part, dict.fromkeys(part, kind))
    for name in (run["scores"], *run["detectors"]):
        if not is_below(name):
            raise ValueError(f"{name!r} leads out of the folder of the results")
    recipe = None if run["recipe"] is None else recipes.from_dict(run["recipe"])
    info = {"epochs": run["epochs"], "id": run.get("id")}
    place = Path(run["folder"]), run["checkpoint"]
    trained = Trained(run["run"], None, run["method"], *place, None, recipe, run["seed"], info)
    found = RunResult(trained, run["model"], sets, run["detectors"], run["trials"], run["notes"])
    found.measurements = [_typed(Measurement, number) for number in run["measurements"]]
    found.scores = {name: {} for name in run["detectors"]}
    return found
