"""Watching a stream of scores: is what comes in still what the detector was calibrated on?

    monitor = ood_fast.Monitor(val_scores, alpha=0.001, threshold=detector.threshold)
    reading = monitor.update(detector.score(model, x))    # of each batch: reading.alarm, reading.flag_rate, ...

Scores are ranked, and nothing is assumed but that, as long as all is well, those of the stream are exchangeable with
those of the calibration, as independent images of one source are (neighbouring frames of a video are not). With U_t
uniform on (0, 1], and s_1 ... s_(t−1) the calibration and *all of the stream so far*, the conformal p-values

    p_t = (#{j < t: s_j < s_t} + U_t (1 + #{j < t: s_j = s_t})) / t

are then independent and uniform, exactly (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005).
Ranks among the calibration alone are not independent: such a test alarms for sure on a stream that is long enough.

Against uniform p-values a bet with a density f is fair: it multiplies its stake by f(p_t). These pay for low scores:

    f(p) = ε p^(ε − 1), ε = 3/4, 1/2, 1/4;   f(p) = 1 − δ + δ 1[p <= θ] / θ, θ = 1/20, δ = 1/20, 1/5, 1/2

Of a capital of 1 the part 1 / (t (t + 1)) is staked on observation t, shared by the bets, which then run on: a change
that comes late finds stakes that are not lost yet. The whole, M_t, is a martingale, and Ville's inequality gives
P(M_t >= 1 / alpha for any t) <= alpha (Vovk, "Testing Randomness Online", Statistical Science 2021).

Scores are counted between at most 255 edges, which are scores of the calibration drawn at random and not counted:
memory does not grow, and this only makes ties, so that all stays exact.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks, files, intact
from .detectors.threshold import tpr_threshold

FORMAT = "ood_fast monitor 1"
N_EDGES = 255
LEAST = 20  # scores of a calibration
POWERS = (0.75, 0.5, 0.25)  # ε
STEP, PARTS = 0.05, (0.05, 0.2, 0.5)  # θ, δ
PLAIN = ["alpha", "threshold", "window", "seed", "flags", "_n", "_n_flagged", "_n_ranked", "_log_scale", "_alarm_at"]
N_BETS = len(POWERS) + len(PARTS)


class Reading(NamedTuple):
    """What a `Monitor` says."""

    n: int  # observations so far
    n_flagged: int
    flag_rate: float  # the share of flagged ones among the last `window`; NaN before the first
    log_evidence: float  # ln M_t; the alarm is at ln(1 / alpha)
    alarm: bool  # whether M_t has ever reached 1 / alpha
    alarm_at: int | None  # the observation, counted from 1, at which it first did


class Monitor:
    """A stream of scores or flags in, flag rate and alarm out; the module's docstring has the mathematics.

    **False alarms**: while the stream is exchangeable with the calibration, the chance that there is *ever* an alarm,
    over a stream of any length looked at as often as one likes, is at most `alpha`. The alarm stays on; when it has
    been looked into, a new `Monitor` begins with an alpha of its own. It alarms when scores get *lower*, be it all of
    them or a share. NaN is flagged and lowest of all; inf is flagged. Threads may share one; batches may be
    split in any way.

    Args:
        calibration: (n,) scores of in-distribution data that took no part in the fit, n >= 20, such as those of
            `Detector.calibrate`. Or bool: whether each was flagged; then `update` takes flags, and their rate alarms.
        alpha: in (0, 1), the chance of a false alarm.
        threshold: scores not at or above it are flagged, as by `Detector.is_ood`; None: that of
            `tpr_threshold(calibration)`. It has no part in the alarm.
        window: observations that `Reading.flag_rate` is taken over.
        seed: of what breaks ties and draws the edges.
    """

    def __init__(
        self,
        calibration: Tensor,
        alpha: float = 0.001,
        *,
        threshold: float | Tensor | None = None,
        window: int = 1000,
        seed: int = 0,
    ) -> None:
        checks.real("alpha", alpha, 0.0, 1.0, open_low=True)
        checks.positive_int("window", window)
        if alpha == 1 or isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"alpha, seed: got {alpha} and {seed!r}, expected a number in (0, 1) and an int >= 0")
        self.flags = isinstance(calibration, Tensor) and calibration.dtype == torch.bool
        scores = self._values("calibration", calibration)
        if len(scores) < LEAST or np.isnan(scores).any() or (self.flags and threshold is not None):
            got = f"{len(scores)} scores, {np.isnan(scores).sum()} of them NaN, threshold {threshold}"
            raise ValueError(f"calibration: got {got}, expected at least {LEAST} numbers; or flags and no threshold")
        if threshold is None:
            threshold = 0.5 if self.flags else tpr_threshold(torch.from_numpy(scores))
        self.threshold = threshold.item() if isinstance(threshold, Tensor) and threshold.numel() == 1 else threshold
        checks.real("threshold", self.threshold, -sys.float_info.max, sys.float_info.max)
        self.alpha, self.window, self.seed = float(alpha), window, seed
        n_edges = 0 if self.flags else min(N_EDGES, len(scores) // 5)
        scores = np.random.default_rng((seed, 1)).permutation(scores)
        self._edges = np.array([0.5]) if self.flags else np.unique(scores[:n_edges])
        self._counts = np.bincount(self._bins(scores[n_edges:]), minlength=len(self._edges) + 1)
        self._n, self._n_flagged, self._n_ranked = 0, 0, len(scores) - n_edges  # the last with the calibration
        self._log_scale, self._stakes = 0.0, [0.0] * N_BETS  # what each bet has, over e^log_scale
        self._alarm_at: int | None = None
        self._recent: deque[bool] = deque(maxlen=window)
        self._bits = np.random.PCG64(seed)  # a number for each observation
        self._random, self._lock = np.random.Generator(self._bits).random, threading.RLock()

    # ---- watching

    def update(self, scores: Tensor) -> Reading:
        """Take in scores (k,), or flags (k,) bool, in the order in which they came; k may be 0."""
        values = self._values("scores", scores)
        with self._lock:
            flags = ~(values >= self.threshold) | (values == math.inf)
            for index, flagged in zip(self._bins(values), flags, strict=True):
                self._observe(int(index))
                self._recent.append(bool(flagged))
                self._n_flagged += bool(flagged)
            return self.reading()

    def reading(self) -> Reading:
        """As it stands."""
        with self._lock:
            rate, at = sum(self._recent) / len(self._recent) if self._recent else math.nan, self._alarm_at
            return Reading(self._n, self._n_flagged, rate, self._log_evidence(), at is not None, at)

    def _observe(self, index: int) -> None:
        self._n += 1
        below, same = int(self._counts[:index].sum()), 1 + int(self._counts[index])
        self._counts[index] += 1
        self._n_ranked += 1
        p = (below + (1 - self._random()) * same) / self._n_ranked
        won = [power * p ** (power - 1) for power in POWERS] + [1 - d + d * (p <= STEP) / STEP for d in PARTS]
        new = math.exp(-self._log_scale) / (self._n * (self._n + 1) * N_BETS)
        self._stakes = [(stake + new) * factor for stake, factor in zip(self._stakes, won, strict=True)]
        total = sum(self._stakes)
        if not 1e-50 < total < 1e50:
            self._stakes = [stake / total for stake in self._stakes]
            self._log_scale += math.log(total)
        if self._alarm_at is None and self._log_evidence() >= -math.log(self.alpha):
            self._alarm_at = self._n

    def _log_evidence(self) -> float:
        """ln M_t: what the bets have, and 1 / (t + 1) that is not staked yet."""
        return float(np.logaddexp(math.log(sum(self._stakes) or 1e-300) + self._log_scale, -math.log(self._n + 1)))

    def _values(self, argument: str, scores: Tensor) -> np.ndarray:
        """As float64, (k,): of flags 0 where flagged, else 1."""
        if self.flags:
            if not isinstance(scores, Tensor) or scores.dtype != torch.bool:
                raise TypeError(f"{argument}: got no bool tensor, expected flags (k,) as the calibration was")
            scores = 1.0 - scores.cpu().double()
        checks.float_tensor(argument, scores, 1, "(k,)")
        return scores.detach().cpu().double().numpy()

    def _bins(self, values: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._edges, np.where(np.isnan(values), -np.inf, values), side="right")

    # ---- files

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are monitors of their own, with a lock of their own."""
        return type(self).from_state_dict, (self.state_dict(),)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain numbers and text, which JSON holds; no score of the stream is among them."""
        with self._lock:
            state = {name: getattr(self, name) for name in PLAIN} | {"format": FORMAT, "stakes": self._stakes}
            state |= {"edges": self._edges.tolist(), "counts": self._counts.tolist()}
            state["recent"] = "".join("01"[flagged] for flagged in self._recent)
            return state | {intact.CHECKSUM: intact.checksum_of(state)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], name: str = "state") -> Monitor:
        """The monitor of `state_dict`, which goes on as if it had never stopped; ValueError if damaged or another."""
        try:
            if state["format"] != FORMAT or state[intact.CHECKSUM] != intact.checksum_of(state):
                raise ValueError("its format or its checksum is another")
            made = cls(torch.linspace(0, 1, LEAST), state["alpha"], window=state["window"], seed=state["seed"])
            for plain in PLAIN:
                setattr(made, plain, state[plain])
            made._edges, made._counts = np.array(state["edges"], float), np.array(state["counts"], np.int64)
            made._stakes = [float(stake) for stake in state["stakes"]]
            made._recent.extend(flag == "1" for flag in state["recent"])
            made._bits.advance(made._n)
            whole = (np.diff(made._edges) > 0).all() and made._counts.sum() == made._n_ranked >= made._n >= 0
            if not whole or made._counts.shape != (len(made._edges) + 1,) or len(made._stakes) != N_BETS:
                raise ValueError("its numbers do not fit together")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name}: damaged, or no state of a Monitor ({error})") from error
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` as JSON, whole or not at all; OSError where it cannot be."""
        files.write_text(path, json.dumps(self.state_dict()) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Monitor:
        """What `save` wrote. OSError where it cannot be read, ValueError, with the path, where it is damaged."""
        return cls.from_state_dict(intact.read_json(path), str(path))
