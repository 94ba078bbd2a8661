"""`ood_fast.Monitor`: how often it alarms for nothing, how soon for something, and that it survives what servers do."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import statistics
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ood_fast import Monitor
from ood_fast.detectors import NCI
from ood_fast.monitor import POWERS, STEP


def calibrated(n: int = 200, alpha: float = 0.01, **options) -> Monitor:
    return Monitor(torch.randn(n, dtype=torch.float64), alpha, **options)


@pytest.mark.parametrize("kind", ["scores", "ties", "flags", "few and sorted"])
def test_false_alarms_are_as_rare_as_stated(kind):
    """P(ever an alarm) <= alpha: of 100 streams at alpha = 0.2 more than 32 would alarm with a chance of 0.2 %."""

    def draw(n: int) -> torch.Tensor:
        scores = torch.randn(n)
        if kind == "flags":
            return scores < -1.6
        return (2 * scores).round() / 2 if kind == "ties" else scores

    alarms = 0
    for seed in range(100):
        calibration = draw(25).sort().values if kind == "few and sorted" else draw(100)
        monitor = Monitor(calibration, 0.2, seed=seed)
        alarms += monitor.update(draw(200)).alarm
    assert alarms <= 32, alarms


SOON = {
    "all scores 2 deviations lower": lambda n: torch.randn(n) - 2,
    "all ½ deviation lower": lambda n: torch.randn(n) - 0.5,
    "one in five 6 deviations lower": lambda n: torch.randn(n) - 6 * (torch.rand(n) < 0.2),
    "one in twenty 6 deviations lower": lambda n: torch.randn(n) - 6 * (torch.rand(n) < 0.05),
}


@pytest.mark.parametrize("kind", SOON)
def test_the_page_says_how_soon_it_alarms(kind):
    """Medians of 40 streams, to a tenth; those that did not alarm within 1,500 count as later."""
    page = (Path(__file__).parents[1] / "docs/production.md").read_text(encoding="utf-8")
    stated = re.search(rf"^\| {kind} \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    for n_good, text in zip((0, 2000), stated.groups(), strict=True):
        found = []
        for seed in range(40):
            torch.manual_seed(seed)
            monitor = Monitor(torch.randn(500), alpha=0.01, seed=seed)
            assert not monitor.update(torch.randn(n_good)).alarm
            at = next((r.alarm_at for r in (monitor.update(SOON[kind](10)) for _ in range(150)) if r.alarm), math.inf)
            found.append(at - n_good)
        assert float(text.replace(",", "")) == pytest.approx(statistics.median(found), rel=0.1)


def test_ranks_are_uniform_and_independent():
    """What the bets rest on, also where the calibration is small: as many p-values at most 0.05 as there should be."""
    below = []
    for seed in range(40):
        monitor = Monitor(torch.randn(20), seed=seed)
        before, values = monitor._stakes, []
        for score in torch.randn(50):
            monitor.update(score[None])
            total = 1 / ((n := monitor._n) * (n + 1) * len(monitor._stakes)) * math.exp(-monitor._log_scale)
            factor = monitor._stakes[0] / (before[0] + total)
            values.append((factor / POWERS[0]) ** (1 / (POWERS[0] - 1)))
            before = monitor._stakes
        assert 0 < min(values)
        assert max(values) <= 1 + 1e-9
        below += [value <= STEP for value in values]
    assert 60 < sum(below) < 140  # 100 of 2,000 expected, a deviation of 9.7
    assert sum(one and other for one, other in pairwise(below)) < 20  # 5 expected


def test_alarms_soon():
    shifted = torch.randn(300) - 2
    assert calibrated().update(shifted).alarm_at < 25
    monitor = calibrated(500)
    assert not monitor.update(torch.randn(1500)).alarm
    reading = monitor.update(shifted)
    assert 1500 < reading.alarm_at < 1560
    monitor = calibrated(500)
    mixed = torch.where(torch.rand(600) < 0.2, torch.tensor(-8.0), torch.randn(600))  # every fifth is OOD
    assert monitor.update(mixed).alarm_at < 200
    flags = Monitor(torch.rand(400) < 0.05, 0.01)
    assert not flags.update(torch.rand(300) < 0.05).alarm
    assert flags.update(torch.rand(300) < 0.4).alarm
    assert not calibrated().update(torch.randn(500) + 3).alarm, "scores that get better are no alarm"


def test_evidence_that_no_float_holds():
    reading = calibrated(20_000).update(torch.full((4_000,), -9.0))
    assert math.isfinite(reading.log_evidence)
    assert reading.log_evidence > 800


def test_nan_and_inf():
    monitor = calibrated(threshold=-1.0)
    reading = monitor.update(torch.tensor([math.nan, -math.inf, math.inf, 0.0]))
    assert reading[:3] == (4, 3, 0.75)
    assert calibrated().update(torch.full((40,), math.nan)).alarm


def test_what_it_counts():
    detector = NCI()
    scores = torch.arange(100.0)
    detector.calibrate(scores, alpha=0.05)
    monitor = Monitor(scores, threshold=detector.threshold, window=4)
    assert math.isnan(monitor.reading().flag_rate)
    assert monitor.update(torch.tensor([]))[:2] == (0, 0)
    reading = monitor.update(torch.tensor([0.0, 1, 2, 50, 50, 50]))
    assert (reading.n, reading.n_flagged, reading.flag_rate) == (6, 3, 0.25)
    assert Monitor(scores).threshold == 5.0
    assert reading == monitor.reading()


@pytest.mark.parametrize("flags", [False, True])
def test_it_goes_on_from_a_file_and_however_batches_are_split(flags, tmp_path):
    def kind(scores: torch.Tensor) -> torch.Tensor:
        return scores < -1 if flags else scores

    calibration, stream = kind(torch.randn(100)), kind(torch.randn(90) - 0.5)
    whole = Monitor(calibration, seed=3, window=50)
    expected = whole.update(stream)
    monitor = Monitor(calibration, seed=3, window=50)
    for part in stream.split(17):
        monitor.update(part)
        monitor.save(tmp_path / "monitor.json")
        monitor = Monitor.load(tmp_path / "monitor.json")
    assert monitor.reading() == expected
    assert monitor.state_dict() == whole.state_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["monitor.json"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda monitor: pickle.loads(pickle.dumps(monitor))])
def test_copies_go_on_by_themselves(copied):
    monitor = calibrated()
    monitor.update(torch.randn(30))
    state, twin = monitor.state_dict(), copied(monitor)
    assert twin.state_dict() == state
    later = torch.randn(30)
    moved = twin.update(later)
    assert monitor.state_dict() == state
    assert monitor.update(later) == moved


def test_damaged_files_are_refused(tmp_path):
    monitor = calibrated()
    monitor.update(torch.randn(50))
    monitor.save(tmp_path / "monitor.json")
    text = (tmp_path / "monitor.json").read_text()
    for damaged in (text[:-20], text.replace("alpha", "alphb"), text.replace('"_n": 50', '"_n": 51'), "{}", "[1]", "7"):
        (tmp_path / "damaged.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"damaged\.json"):
            Monitor.load(tmp_path / "damaged.json")
    with pytest.raises(OSError, match="none"):
        Monitor.load(tmp_path / "none.json")


def test_a_forged_state_is_refused():
    """The checksum is right, what it says is not."""
    from ood_fast.intact import CHECKSUM, checksum_of

    state = calibrated().state_dict()
    for key, value in {
        "_n": -1,
        "counts": [1],
        "stakes": [0.0],
        "seed": "x",
        "edges": ["a"],
        "alpha": 2,
        "_n_ranked": 0,
    }.items():
        forged = json.loads(json.dumps(state)) | {key: value}
        forged[CHECKSUM] = checksum_of(forged)
        with pytest.raises(ValueError, match="state: damaged"):
            Monitor.from_state_dict(forged)


def test_threads():
    monitor = calibrated(window=10_000)
    parts = torch.randn(8, 5, 20)

    def watch(part: torch.Tensor) -> None:
        for scores in part:
            monitor.update(scores)

    threads = [threading.Thread(target=watch, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reading = monitor.reading()
    assert reading.n == 800
    assert reading.n_flagged == int((parts < monitor.threshold).sum())
    assert monitor._counts.sum() == monitor._n_ranked == 960


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.1] * 50,), TypeError, "calibration: got list"),
        ((torch.randn(19),), ValueError, "calibration: got 19 scores"),
        ((torch.randn(5, 5),), ValueError, r"calibration: got shape \(5, 5\)"),
        ((torch.full((50,), math.nan),), ValueError, "50 of them NaN"),
        ((torch.arange(50),), TypeError, "calibration: got dtype"),
        ((torch.rand(50) < 0.5, 0.1, 0.3), ValueError, "flags and no threshold"),
        ((torch.randn(50), 0.0), ValueError, "alpha"),
        ((torch.randn(50), 1.0), ValueError, "alpha"),
        ((torch.randn(50), "a"), TypeError, "alpha"),
        ((torch.randn(50), 0.1, math.inf), ValueError, "threshold"),
        ((torch.randn(50), 0.1, torch.zeros(2)), TypeError, "threshold"),
        ((torch.randn(50), 0.1, None, 0), ValueError, "window"),
        ((torch.randn(50), 0.1, None, 5, -1), ValueError, "seed"),
    ],
)
def test_refuses(arguments, error, message):
    calibration, alpha, *rest = (*arguments, 0.01) if len(arguments) == 1 else arguments
    with pytest.raises(error, match=message):
        Monitor(calibration, alpha, **dict(zip(("threshold", "window", "seed"), rest, strict=False)))


def test_refuses_scores():
    monitor = calibrated()
    for bad in (torch.zeros(3, dtype=torch.bool), torch.zeros(2, 2), 0.5, torch.zeros(3, dtype=torch.int64)):
        with pytest.raises((TypeError, ValueError), match="scores: got"):
            monitor.update(bad)
    assert monitor.reading().n == 0
    with pytest.raises(TypeError, match="scores: got no bool tensor"):
        Monitor(torch.rand(30) < 0.5).update(torch.rand(3))
