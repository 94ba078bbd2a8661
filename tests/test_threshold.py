"""Thresholds from in-distribution scores: a share kept, and the conformal guarantee."""

from __future__ import annotations

import math

import pytest
import torch

from ood_fast.detectors import MSP
from ood_fast.detectors.threshold import conformal_pvalue, conformal_threshold, tpr_threshold


@pytest.mark.parametrize(("tpr", "kept"), [(0.95, 19), (0.951, 20), (1.0, 20), (0.05, 1), (0.5, 10), (1e-12, 1)])
def test_tpr_threshold_keeps_the_share_and_not_more(tpr, kept):
    scores = torch.randperm(20).float()
    threshold = tpr_threshold(scores, tpr)
    assert (scores >= threshold).sum() == kept
    assert threshold in scores


def test_conformal_threshold_is_its_order_statistic():
    scores = 10 * torch.arange(1.0, 100.0)[torch.randperm(99)]
    for k in range(1, 100):  # alpha (n + 1) = k: rounding must not lose one, as 0.29 * 100 does
        assert conformal_threshold(scores, k / 100) == 10 * k
    assert conformal_threshold(scores, 0.0199) == 10


def test_conformal_threshold_with_too_few_scores():
    scores = torch.arange(18.0)
    with pytest.raises(ValueError, match=r"scores: got 18, expected at least 19 for alpha=0\.05"):
        conformal_threshold(scores, 0.05)
    assert conformal_threshold(torch.arange(19.0), 0.05) == 0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (50, 0.05), (199, 0.1), (30, 0.3)])
def test_conformal_coverage(n, alpha, ties):
    """Over many draws of calibration data and one new input each: P(flagged) is k / (n + 1) <= alpha, less with ties.

    40,000 draws: five standard errors of a share below 0.3 are 0.0115 at most.
    """
    draws = 40_000
    scores = torch.empty(draws, n + 1).exponential_(generator=torch.Generator().manual_seed(n))
    if ties:
        scores = (3 * scores).floor()
    k = math.floor(alpha * (n + 1) + 1e-9)
    known, new = scores[:, :n], scores[:, n]
    threshold = torch.stack([conformal_threshold(row, alpha) for row in known[:2000]])
    assert torch.equal(threshold, known[:2000].kthvalue(k, dim=1).values)  # so that the rest can go in one call
    flagged = (new < known.kthvalue(k, dim=1).values).double().mean().item()
    error = 5 * math.sqrt(alpha * (1 - alpha) / draws)
    assert flagged <= k / (n + 1) + error <= alpha + error
    if not ties:
        assert flagged >= k / (n + 1) - error


@pytest.mark.parametrize(("n", "low", "high"), [(200, 0.024, 0.084), (1000, 0.037, 0.064), (5000, 0.044, 0.056)])
def test_what_one_threshold_flags_in_the_long_run_is_as_the_documentation_says(n, low, high):
    """Of uniform scores a threshold flags the share that it is. Five standard errors of 95 % of 4,000 are 0.017."""
    scores = torch.rand(4000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    flagged = torch.stack([conformal_threshold(row, 0.05) for row in scores])
    assert abs(((flagged >= low) & (flagged <= high)).double().mean().item() - 0.95) < 0.017 + 0.01  # rounded bounds


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.29])
def test_pvalue_is_its_definition_and_agrees_with_the_threshold(alpha):
    known, new = torch.randint(0, 40, (99,)).float(), torch.randint(-5, 45, (500,)).float()
    p = conformal_pvalue(new, known)
    literal = [(1 + sum(k <= s for k in known.tolist())) / 100 for s in new.tolist()]
    torch.testing.assert_close(p, torch.tensor(literal))
    assert torch.equal(p <= alpha, new < conformal_threshold(known, alpha))


def test_pvalue_of_mixed_dtypes():
    known = torch.randn(30, dtype=torch.float64)
    assert conformal_pvalue(known.float()[:3], known).dtype == torch.float32
    assert torch.equal(conformal_pvalue(known[:3], known), conformal_pvalue(known, known)[:3])


def test_calibrate():
    scores = torch.randn(200)
    detector = MSP()
    with pytest.raises(RuntimeError, match="MSP has no threshold: call calibrate"):
        detector.is_ood(scores)
    assert detector.calibrate(scores) is detector
    assert detector.threshold == tpr_threshold(scores, 0.95)
    assert detector.calibration == ("tpr", 0.95, 200, float(detector.threshold))
    detector.calibrate(scores, alpha=0.1)
    assert detector.threshold == conformal_threshold(scores, 0.1)
    assert detector.calibration == ("alpha", 0.1, 200, float(detector.threshold))
    assert detector.is_ood(scores).sum() == 19  # the k-th lowest itself is kept
    with pytest.raises(ValueError, match=r"tpr, alpha: got 0\.9 and 0\.1, expected one of them"):
        detector.calibrate(scores, tpr=0.9, alpha=0.1)


def test_calibrate_keeps_no_graph():
    scores = torch.randn(50, requires_grad=True)
    assert not MSP().calibrate(scores).threshold.requires_grad
    assert not MSP().calibrate(scores, alpha=0.1).threshold.requires_grad


@pytest.mark.parametrize(
    "threshold", [tpr_threshold, conformal_threshold, lambda scores: conformal_pvalue(torch.zeros(2), scores)]
)
def test_refuses(threshold):
    with pytest.raises(ValueError, match="got none"):
        threshold(torch.empty(0))
    with pytest.raises(ValueError, match="got NaN"):
        threshold(torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="got shape"):
        threshold(torch.randn(3, 3))
    with pytest.raises(TypeError):
        threshold([0.0])


@pytest.mark.parametrize("level", [0.0, 1.5, -0.1])
def test_refuses_levels(level):
    for threshold in (tpr_threshold, conformal_threshold):
        with pytest.raises(ValueError, match=f"got {level}"):
            threshold(torch.randn(100), level)
    with pytest.raises(ValueError, match="alpha: got 1"):
        conformal_threshold(torch.randn(100), 1)
