"""What an evaluation says: which method is best with which detector, by how much, and whether so many seeds show it.

AUROC decides, the mean of near- and far-OOD; differences are paired, see `Results.gain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..detectors.registry import label_of
from ..report.tables import and_list
from .results import GROUPS, TITLES, Numbers, Results

Key = tuple[str, str, str]
ACCURACY = [("accuracy", "", "")]


@dataclass(frozen=True)
class Ranked:
    """What one method has with one detector: AUROC in each group, over the runs that it scored."""

    method: str
    detector: str
    values: dict[str, float]
    n_runs: int

    @property
    def score(self) -> float:
        """The mean over the groups."""
        return fmean(self.values.values())

    def told(self) -> str:
        """In percent, group by group."""
        return and_list([f"{title(name)} {100 * value:.1f}" for name, value in self.values.items()])


def title(ood_set: str) -> str:
    """What tables call a set or the mean of a group."""
    return TITLES.get(ood_set, ood_set)


def means_of(results: Results) -> list[str]:
    """What detectors are ranked by: the means of the groups; each set where there is no group."""
    groups = [mean for group, mean in GROUPS.items() if any(part.group == group for part in results.sets.values())]
    return groups or results.ood


def ranking(results: Results) -> list[Ranked]:
    """Methods with detectors, the best first; those that lack a number are left out."""
    found = []
    for method, runs in results.methods.items():
        for detector in dict.fromkeys(name for run in runs for name in run.scores):
            keys = [("auroc", detector, name) for name in means_of(results)]
            scored = [run for run in runs if detector in run.scores and run.holds(keys)]
            if scored and keys:
                means = {key[2]: fmean(run.value(*key) for run in scored) for key in keys}
                found.append(Ranked(method, detector, means, len(scored)))
    return sorted(found, key=lambda ranked: -ranked.score)


def verdict(results: Results) -> list[str]:
    """The sentences; empty where nothing was detected. The first says what is best."""
    ranked = ranking(results)
    if not ranked:
        return []
    best = ranked[0]
    over = f", mean of {best.n_runs} seeds" if best.n_runs > 1 else ", one run"
    several = len(results.methods) > 1
    name = f"{best.method} with {label_of(best.detector)}" if several else label_of(best.detector)
    sentences = [f"Best by AUROC (%): {name}, {best.told()}{over}."]
    baseline = results.baseline
    others = [r for r in ranked[1:] if r.method != best.method] if several else ranked[1:]
    if baseline is not None:
        first = next((r for r in ranked if r.method != baseline), None)
        against = next((r for r in ranked if r.method == baseline), None)
        if first is not None and against is not None:
            sentences.append(_against(results, first, against))
        sentences += _overall(results)
    elif others:
        sentences.append(_against(results, best, others[0]))
    return [*sentences, _reservation(results)]


def _against(results: Results, one: Ranked, other: Ranked) -> str:
    """The best of one method against the best of another: the groups by what their gains mean."""
    told: dict[str, list[str]] = {}
    for name in one.values:
        both = [(ranked.method, [("auroc", ranked.detector, name)]) for ranked in (one, other)]
        gain = results.gain(*both)
        gained = f"{title(name)} {'–' if gain is None else points(*gain)}"
        told.setdefault(meaning(results, *both), []).append(gained)
    apart = one.method != other.method
    names = [f"{ranked.method} with " * apart + label_of(ranked.detector) for ranked in (one, other)]
    parts = [", ".join([*gained, *[means] * bool(means)]) for means, gained in told.items()]
    return f"{' against '.join(names)}, each at its best: {'; '.join(parts)}."


def overall(results: Results) -> dict[str, dict[str, tuple[Numbers, Numbers]]]:
    """Every other method against the baseline: AUROC of each group over the detectors that both have, and accuracy."""
    baseline = results.baseline or ""
    found: dict[str, dict[str, tuple[Numbers, Numbers]]] = {}
    scored = {method: {name for run in runs for name in run.scores} for method, runs in results.methods.items()}
    for method in results.methods if baseline else ():
        both = [name for name in results.detectors if name in scored[method] & scored[baseline]]
        of = {name: [("auroc", detector, name) for detector in both] for name in means_of(results) if both}
        of["accuracy"] = ACCURACY
        if method != baseline:
            found[method] = {head: ((method, keys), (baseline, keys)) for head, keys in of.items()}
    return found


def over_detectors(results: Results) -> str:
    """Over what the means of `overall` are taken."""
    groups = (of for pairs in overall(results).values() for (of, _) in pairs.values())
    numbers = {len(keys) for _, keys in groups if keys != ACCURACY}
    if numbers == {1}:
        return "with the same detector"
    return f"mean over {numbers.pop() if len(numbers) == 1 else 'the'} detectors"


def _overall(results: Results) -> list[str]:
    """What `overall` means, in one sentence; methods of which the same is said together. None without intervals."""
    told: dict[str, list[str]] = {}
    for method, pairs in overall(results).items():
        held = {name: both for name, both in pairs.items() if name != "accuracy" or results.gain(*both) is not None}
        means = {name: meaning(results, *both) for name, both in held.items()}
        shown = [(how, [title(name) for name, said in means.items() if said == how]) for how in ("better", "worse")]
        parts = [f"{how} in {and_list(names)}" for how, names in shown if names]
        if text := " and ".join(parts) or next(iter(means.values()), ""):
            told.setdefault(text, []).append(method)
    parts = [f"{and_list(methods)} {text}" for text, methods in told.items()]
    return [f"Against {results.baseline}, {over_detectors(results)}: {'; '.join(parts)}."] if parts else []


def meaning(results: Results, of: Numbers, over: Numbers) -> str:
    """What a gain says; empty where it has no interval because there is one run of each."""
    gain = results.gain(of, over)
    if gain is None:
        return "not comparable, no seed in common"
    if gain[1] is None:
        return "" if results.one_each else "one seed in common"
    if shown := shows(*gain):
        return "better" if shown > 0 else "worse"
    n = len(results.pairs(of, over))
    return f"no difference that {f'{n} seeds' if n > 1 else 'these test images'} can show"


def points(mean: float, low: float | None, high: float | None) -> str:
    """As "+1.2 [+0.3, +2.1]", in percentage points; a bound of "+0.0" is above 0, so that the interval excludes it."""
    told = ["0.0" if round(100 * mean, 1) == 0 else f"{100 * mean:+.1f}"]
    if low is not None and high is not None:
        told.append(f"[{', '.join(f'{100 * bound:+.1f}' if bound else '0.0' for bound in (low, high))}]")
    return " ".join(told).replace("-", "−")


def shows(mean: float, low: float | None, high: float | None) -> int:
    """1 or −1 where the interval is above or below 0 and the mean does not round to it, else 0."""
    if low is None or high is None or abs(mean) < 0.0005:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def sign(results: Results, of: tuple[str, Sequence[Key]], over: tuple[str, Sequence[Key]]) -> int:
    """`shows` of what a method has more than another."""
    gain = results.gain(of, over)
    return 0 if gain is None else shows(*gain)


def _reservation(results: Results) -> str:
    if results.one_each:
        what = "intervals are over test images and" if results.n_bootstrap else "there are no intervals; these numbers"
        return f"One run each: {what} say nothing of other seeds."
    names = list(results.methods)
    several = [(a, b) for a in names for b in names if a != b or len(names) == 1]
    if not any(len(results.pairs((a, ()), (b, ()))) > 1 for a, b in several):
        return "There are no intervals: no two methods have two seeds in common."
    return "Intervals: 95 %, Student's t over the seeds, in pairs; not corrected for how many differences there are."
