"""What an evaluation says: which method is best with which detector, by how much, and whether so many seeds show it.

AUROC decides, the mean of near- and far-OOD; differences are paired, see `Results.gain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..detectors.registry import label_of
from ..report.tables import and_list
from .results import GROUPS, TITLES, Results

Key = tuple[str, str, str]


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
        compared_with = [method for method in results.methods if method != baseline]
        sentences += [sentence for method in compared_with for sentence in _overall(results, method, baseline)]
    elif others:
        sentences.append(_against(results, best, others[0]))
    return [*sentences, _reservation(results)]


def _against(results: Results, one: Ranked, other: Ranked) -> str:
    """The best of one method against the best of another, group by group."""
    told = []
    for name in one.values:
        keys = [(ranked.method, [("auroc", ranked.detector, name)]) for ranked in (one, other)]
        told.append(f"{title(name)} {difference(results, *keys)}")
    apart = one.method != other.method
    names = [f"{ranked.method} with " * apart + label_of(ranked.detector) for ranked in (one, other)]
    return f"{' against '.join(names)}, each at its best: {'; '.join(told)}."


def _overall(results: Results, method: str, baseline: str) -> list[str]:
    """A method against the baseline over all detectors that both have, and in accuracy."""
    of, over = ({name for run in results.methods[m] for name in run.scores} for m in (method, baseline))
    both = [name for name in results.detectors if name in of & over]
    told = []
    for name in means_of(results) if both else ():
        keys = [("auroc", detector, name) for detector in both]
        signs = [sign(results, (method, [key]), (baseline, [key])) for key in keys]
        gain = results.gain((method, keys), (baseline, keys))
        counts = f" (better with {signs.count(1)} of {len(both)}, worse with {signs.count(-1)})"
        shown = counts if gain is not None and gain[1] is not None else ""
        told.append(f"{title(name)} {difference(results, (method, keys), (baseline, keys))}{shown}")
    accuracy = [(m, [("accuracy", "", "")]) for m in (method, baseline)]
    if results.gain(*accuracy) is not None:
        told.append(f"accuracy {difference(results, *accuracy)}")
    how = f"mean over {len(both)} detectors" if len(both) > 1 else "with the same detector"
    return [f"{method} against {baseline}, {how}: {'; '.join(told)}."] if told else []


def difference(results: Results, of: tuple[str, Sequence[Key]], over: tuple[str, Sequence[Key]]) -> str:
    """A gain in percentage points with its interval, and what that means."""
    gain = results.gain(of, over)
    if gain is None:
        return "not comparable, no seed in common"
    text = points(*gain)
    if gain[1] is None:
        return text if results.one_each else f"{text}, one seed in common"
    if shown := shows(*gain):
        return f"{text}, {'better' if shown > 0 else 'worse'}"
    n = len(results.pairs(of, over))
    return f"{text}, no difference that {f'{n} seeds' if n > 1 else 'these test images'} can show"


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
