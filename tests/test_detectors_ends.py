"""Detectors on numbers at the ends of float32, on features that do not vary, and on logits far from 0."""

from __future__ import annotations

import pytest
import torch
from detector_cases import NAMES, C, M, make

from ood_fast import detectors, metrics
from ood_fast.detectors import NECO, Detector, DetectorSet, Mahalanobis, load


def data(n: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    z, W = torch.randn(n, M).relu() + 0.1, torch.randn(C, M)
    return z, z @ W.T, torch.arange(n) % C, W


def fitted(name: str) -> tuple[Detector, torch.Tensor]:
    z, f, y, W = data()
    return make(name).fit_features(z, f, y, (W, None)), W


@pytest.mark.parametrize("size", [1.9e19, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("name", NAMES)
def test_rows_too_long_for_float32_are_right_or_refused(name, size):
    """Of the order of float64's score, or a ValueError that names the row; -inf for what is further than float32."""
    detector, W = fitted(name)
    z = torch.randn(5, M)
    z[3] = size * torch.rand(M)
    f = (z.double() @ W.double().T).float()
    try:
        scores = detector.score_features(z, f)
    except ValueError as error:
        assert "the first is row 3" in str(error)  # noqa: PT017
        return
    exact = detector.double().score_features(z.double(), f.double())
    within = exact[3].abs() < torch.finfo(torch.float32).max
    torch.testing.assert_close(
        scores[3].double(), exact[3] if within else exact[3].sign() * torch.inf, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).gathers() and make(name).needs_features])
def test_training_rows_too_long_are_refused(name):
    z, f, y, W = data()
    z[7] = 1e20
    with pytest.raises(ValueError, match=r"features: got numbers beyond 2.0e\+17 in 1 of 60 rows, the first is row 7"):
        make(name).fit_features(z, f, y, (W, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs_head])
def test_a_head_that_is_no_numbers_is_refused(name, bad):
    z, f, y, W = data()
    W[2, 1] = bad
    with pytest.raises(ValueError, match=r"head: W: got (NaN|inf) in 1 of 5 rows, the first is row 2"):
        make(name).fit_features(z, f, y, (W, None))
    with pytest.raises(ValueError, match="head: b: got NaN or inf"):
        make(name).fit_features(z, f, y, (W.nan_to_num(0.0, 0.0), torch.tensor([0.0, bad, 0.0, 0.0, 0.0])))


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("dead", ["zero", "constant", "repeated"])
def test_neco_takes_no_directions_that_rounding_left(rank, scale, dead):
    z = torch.randn(80, M) * scale
    z[:, rank:] = {"zero": 0.0, "constant": 0.1 * scale, "repeated": z[:, :1] if rank else 0.3}[dead]
    with pytest.raises(ValueError, match=rf"NECO: dim: got {rank + 1}, but the training features vary in {rank} "):
        NECO(dim=rank + 1).fit_features(z)
    if rank:
        whole, parts = NECO(dim=rank).fit_features(z), NECO(dim=rank)
        for rows in torch.randperm(80).split(7):
            parts.partial_fit(z[rows])
        queries, logits = torch.randn(9, M) * scale, torch.rand(9, 4)
        parts.finalize()
        torch.testing.assert_close(
            whole.score_features(queries, logits), parts.score_features(queries, logits), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-3, 1234.567])
@pytest.mark.parametrize("name", ["Mahalanobis", "RMDS"])
def test_constant_features_give_no_direction(name, value):
    scores = (
        make(name)
        .fit_features(torch.full((97, M), value), None, torch.arange(97) % C)
        .score_features(torch.randn(5, M))
    )
    assert (scores == 0).all()


def test_a_feature_that_varies_little_still_counts():
    z = 1 + 1e-5 * torch.randn(200, M)
    scores = Mahalanobis().fit_features(z, None, torch.arange(200) % C).score_features(z)
    assert -3 * M < scores.mean() < -M / 3


def test_one_direction_is_the_same_bits_from_a_file(tmp_path):
    z, f, *_ = data()
    detector = NECO(dim=1).fit_features(z, f)
    detector.save(tmp_path / "it")
    assert torch.equal(load(tmp_path / "it").score_features(z, f), detector.score_features(z, f))


SHIFTED = tuple(name for name in NAMES if make(name).needs_logits and not make(name).needs_features)


def rates(scores: torch.Tensor, n: int) -> tuple[float, float]:
    found = metrics.detection(scores[:n], scores[n:])
    return found["auroc"], found["fpr95_id_positive"]


@pytest.mark.parametrize("top", [20.0, 300.0, 1e3])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", [name for name in SHIFTED if name not in ("MaxLogit", "Energy")])
def test_scores_of_gaps_keep_their_digits_far_from_0(name, top, together):
    """Two logits whose gap decides: as with the top at 0, to what rounding the logits themselves costs."""
    n = 4000
    generator = torch.Generator().manual_seed(0)
    gaps = 2.5 * torch.randn(2 * n, generator=generator) + torch.tensor([9.0, 7.5]).repeat_interleave(n)
    gaps = (gaps.clamp(min=0) * 1024).round() / 1024  # exact beside 1e3 in float32
    near = torch.stack([torch.zeros_like(gaps), -gaps], 1)
    near[::3] = near[::3].flip(1)
    detector = detectors.create(name).fit_features(None, near, None, (torch.eye(2), None))

    def scored(logits: torch.Tensor) -> torch.Tensor:
        if together:
            return DetectorSet([detector, "MaxLogit" if name != "MaxLogit" else "MSP"]).score_features(None, logits)[
                name
            ]
        return detector.score_features(None, logits)

    assert rates(scored(near + top), n) == pytest.approx(rates(scored(near), n), abs=1e-3)


def test_nan_is_out():
    detector = detectors.MSP().calibrate(torch.rand(100))
    assert detector.is_ood(torch.tensor([float("nan"), float("inf"), -float("inf")])).tolist() == [True, False, True]
