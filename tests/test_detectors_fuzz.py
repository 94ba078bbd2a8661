"""Every detector on small data of all kinds: other ways to the same score, and float64; or an error in words."""

from __future__ import annotations

import math
import random
import zlib

import pytest
import torch
from detector_cases import NAMES, sizes

from ood_fast import detectors
from ood_fast.detectors import Detector, DetectorSet

TRIALS = 12
# float32 keeps what float64 does not: fDBD's denominator counts as the machine epsilon, KL matching's d_kj as `tiny`.
# OpenMax's Weibull is of a distance less the least one of the tail: at 1e15 float32 has no digits of the difference.
OF_DTYPE = ("FDBD", "KLMatching", "OpenMax")
KINDS = ("normal", "relu", "constant", "duplicated", "zeros", "rank 1")
SCALES = (1.0, 1.0, 1e-30, 1e-20, 1e-10, 1e5, 1e15, 1e18, 1e25)
pytestmark = pytest.mark.filterwarnings("ignore:.*class [0-9]")


class Data:
    """Training data, head and queries, drawn by a seed."""

    def __init__(self, seed: int) -> None:
        draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.c, self.m = draw.choice([2, 3, 17]), draw.choice([1, 2, 9])
        self.n, n_queries = draw.choice([1, 2, 12, 60]), draw.choice([0, 1, 5])
        self.dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])
        scale, kind = draw.choice(SCALES), draw.choice(KINDS)
        z, q, W = (torch.randn(n, self.m, generator=g, dtype=torch.float64) for n in (self.n, n_queries, self.c))
        z = {
            "normal": z,
            "relu": z.relu(),
            "constant": torch.full_like(z, 0.37),
            "duplicated": z[torch.randint(0, max(1, self.n // 4), (self.n,), generator=g)],
            "zeros": torch.zeros_like(z),
            "rank 1": z[:, :1] * W[:1],
        }[kind]
        if n_queries:
            q[0] = draw.choice([q[0], z[0], 0 * q[0]])
        self.z, self.q, self.W = (t.to(self.dtype) for t in (z * scale, q * draw.choice([scale, 1.0]), W))
        self.b = draw.choice([None, torch.randn(self.c, generator=g, dtype=torch.float64).to(self.dtype)])
        self.f, self.fq = self.logits(self.z), self.logits(self.q)
        if self.c > 2 and draw.random() < 0.2:
            self.f[:, 1] = self.fq[:, 1] = -math.inf
        self.y = draw.choice([self.f.argmax(1), torch.randint(0, self.c, (self.n,), generator=g)])
        self.k, self.dim = draw.choice([1, self.n]), draw.choice([1, max(1, self.m - 1)])
        self.order, self.classes = torch.randperm(self.n, generator=g), torch.randperm(self.c, generator=g)

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        b = None if self.b is None else self.b.double()
        return torch.nn.functional.linear(z.double(), self.W.double(), b).to(self.dtype)

    def make(self, name: str) -> Detector:
        return detectors.create(name, **sizes(self.k, self.dim).get(name, {}))


def assert_near(scores: torch.Tensor, expected: torch.Tensor, why: str) -> None:
    scores, expected = scores.double(), expected.double()
    size = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else torch.tensor(0.0)
    near = (scores == expected) | ((scores - expected).abs() <= 2e-3 * expected.abs() + 1e-4 * size + 1e-6)
    assert near.all(), f"{why}: {scores.tolist()} for {expected.tolist()}"


@pytest.mark.parametrize("name", NAMES)
def test_scores_hold_however_they_are_come_by(name):
    for seed in range(TRIALS):
        data = Data(1000 * zlib.crc32(name.encode()) + seed)  # the same ones as long as it has its name
        try:
            detector = data.make(name).fit_features(data.z, data.f, data.y, (data.W, data.b))
            scores = detector.score_features(data.q, data.fq)
        except (ValueError, TypeError) as error:  # with the argument; what torch raises is no ValueError of ours
            assert ": " in str(error), error  # noqa: PT017
            continue
        why = f"seed {seed}"
        assert scores.shape == (len(data.q),)
        assert not scores.isnan().any(), why
        if len(data.q) > 1:
            each = [detector.score_features(q[None], f[None]) for q, f in zip(data.q, data.fq, strict=True)]
            assert_near(torch.cat(each), scores, f"{why}, one by one")
            strided = torch.stack([data.q, data.q], 2)[:, :, 0], torch.stack([data.fq, data.fq], 1)[:, 0]
            assert_near(detector.score_features(*strided), scores, f"{why}, strided")
        if data.fq.isfinite().all():
            together = DetectorSet({"it": detector, "MSP": "MSP", "GEN": detectors.GEN(M=None), "Energy": "Energy"})
            assert_near(together.score_features(data.q, data.fq)["it"], scores, f"{why}, in a set")
        if detector.needs_fit:
            parts = data.make(name)
            for rows in data.order.split(7):
                parts.partial_fit(data.z[rows], data.f[rows], data.y[rows])
            parts.finalize((data.W, data.b))
            assert_near(parts.score_features(data.q, data.fq), scores, f"{why}, in parts")
        if name not in OF_DTYPE:
            wide = (
                (t.double() for t in (data.z, data.f)),
                (data.W.double(), None if data.b is None else data.b.double()),
            )
            exact = data.make(name).fit_features(*wide[0], data.y, wide[1])
            exact = exact.score_features(data.q.double(), data.fq.double()).to(scores.dtype)
            assert_near(scores, exact, f"{why}, float64")
        if not any(((f == f.amax(1, keepdim=True)).sum(1) > 1).any() for f in (data.f, data.fq)):  # no ties
            p = data.classes
            head = data.W[p], None if data.b is None else data.b[p]
            renamed = data.make(name).fit_features(data.z, data.f[:, p], p.argsort()[data.y], head)
            assert_near(renamed.score_features(data.q, data.fq[:, p]), scores, f"{why}, classes in another order")
