"""Dense prediction: every pixel is a row; metrics over pixels from bins, and the bounds of what bins hide."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import nn

import ood_fast
from ood_fast import dense, detectors, metrics, reference
from ood_fast.detectors import DetectorSet

N, C, M, H, W = 2, 4, 5, 3, 6
NAMES = ["MSP", "Energy", "GEN", "FDBD", "BoundaryDistance", "NCI", "FeatureNorm", "ReAct", "SML"]


@pytest.fixture
def layer() -> nn.Conv2d:
    return nn.Conv2d(M, C, 1)


def maps(layer: nn.Conv2d, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(n, M, H, W).relu()
    return z, layer(z).detach()


def rows(values: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel."""
    return torch.stack([values[i, :, y, x] for i in range(len(values)) for y in range(H) for x in range(W)])


def fitted(layer: nn.Conv2d, names=NAMES) -> tuple[DetectorSet, DetectorSet]:
    """By maps, a pixel in five ignored, and by the rows that are left."""
    by_maps, by_rows = DetectorSet(list(names)), DetectorSet(list(names))
    kept = []
    for _ in range(2):
        z, logits = maps(layer, 4)
        y = logits.argmax(1)
        y.view(-1)[::5] = 255
        dense.partial_fit(by_maps, z, logits, y)
        known = y.flatten() != 255
        kept.append([part[known] for part in (rows(z), rows(logits), y.flatten())])
    W, b = dense.head_of(layer)
    by_maps.finalize((W, b))
    by_rows.fit_features(*(torch.cat(parts) for parts in zip(*kept, strict=True)), head=(W, b))
    return by_maps, by_rows


@pytest.mark.parametrize("values", [dense.VALUES, 40], ids=["whole", "in parts"])
def test_every_pixel_is_a_row(layer, values, monkeypatch):
    monkeypatch.setattr(dense, "VALUES", values)
    by_maps, by_rows = fitted(layer)
    z, logits = maps(layer)
    found, expected = dense.score_set(by_maps, z, logits), by_rows.score_features(rows(z), rows(logits))
    assert list(found) == NAMES
    for name in NAMES:
        assert found[name].shape == (N, H, W)
        torch.testing.assert_close(found[name].flatten(), expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dense.score(by_maps[name], z, logits), found[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense.score(detectors.create("MSP"), None, logits), found["MSP"])
    one = z[:, :, :, :1].expand(-1, -1, -1, 2).movedim(1, -1).contiguous().movedim(-1, 1)  # channels_last
    assert dense.score(by_maps["FeatureNorm"], one).shape == (N, H, 2)


def test_d_and_nci_of_a_convolution(layer):
    z, logits = maps(layer)
    weight, bias = dense.head_of(layer)
    distance = dense.per_pixel(lambda f: ood_fast.boundary_distance(f, weight), logits)
    torch.testing.assert_close(distance.flatten(), reference.boundary_distance(rows(logits), weight))
    mean = torch.rand(M)
    nci = dense.per_pixel(lambda z, f: ood_fast.nci_score(z, weight, bias, mean, f), z, logits)
    torch.testing.assert_close(nci.flatten(), reference.nci_score(rows(z), weight, bias, mean, rows(logits)))
    distance.sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    criterion = ood_fast.ELogitNormLoss(layer)
    assert criterion(logits, logits.argmax(1)).isfinite()


def test_a_temperature_is_part_of_the_weight():
    head = ood_fast.L2NormLinear(M, 3, tau=0.1)
    assert torch.equal(dense.head_of(head)[0], head.weight / 0.1)


def refusals(layer):
    z, logits = maps(layer)
    msp, y = detectors.create("MSP"), torch.zeros(N, H, W, dtype=torch.int64)
    yield lambda: dense.head_of(nn.ReLU()), TypeError, "layer: got ReLU"
    for bad in (
        nn.Conv2d(M, C, 3),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(M, C, 1, stride=2),
        nn.Conv2d(M, C, 1, padding=1),
    ):
        yield lambda bad=bad: dense.head_of(bad), ValueError, "expected a linear layer at every place"
    yield lambda: dense.score(detectors.create("NCI"), z, logits[..., :2]), ValueError, "logits: got shape (2, 4, 3, 2)"
    yield lambda: dense.score(msp, None, logits[:0]), ValueError, "logits: got shape (0, 4, 3, 6)"
    yield lambda: dense.score(msp, None, None), ValueError, "got None, expected maps"
    yield lambda: dense.score(msp, None, rows(logits)), ValueError, "logits: got shape (36, 4), expected maps"
    yield lambda: dense.score(msp, None, logits.long()), TypeError, "logits: got dtype torch.int64"
    nan = logits.clone()
    nan[1, 0, 0, 2] = torch.nan
    yield lambda: dense.score(msp, None, nan), ValueError, f"row {H * W + 2}"
    yield lambda: dense.partial_fit(msp, z, logits, y[:, :2]), ValueError, "target: got torch.int64 of shape (2, 2, 6)"
    yield lambda: dense.partial_fit(msp, z, logits, y.float()), ValueError, "target: got torch.float32"
    scores = torch.rand(N, H, W)
    wrong = scores.clone()
    wrong[1, 2, 3] = torch.nan
    pixels = dense.PixelMetrics
    yield lambda: pixels().update(scores, y + 2), ValueError, "ood: got 2, expected 0, 1 or ignore_index=255"
    yield lambda: pixels().update(scores, y[:1]), ValueError, "ood: got torch.int64 of shape (1, 3, 6)"
    yield lambda: pixels().update(wrong, y), ValueError, "scores: 1 are NaN, the first at (1, 2, 3)"
    yield lambda: pixels(n_bins=1), ValueError, "n_bins: got 1"
    yield lambda: pixels(edges=torch.tensor([1.0, 1.0])), ValueError, "edges: expected"
    yield lambda: pixels().compute(), ValueError, "no pixel was counted"
    alone = pixels()
    alone.update(scores, y)
    yield alone.compute, ValueError, "ood_counts: got shape"
    yield lambda: metrics.binned(torch.ones(2), torch.ones(3)), ValueError, "ood_counts: got shape (3,)"


def test_what_is_refused(layer):
    for call, kind, said in refusals(layer):
        with pytest.raises(kind, match=re.escape(said)):
            call()


def test_a_batch_that_is_refused_leaves_nothing(layer):
    z, logits = maps(layer)
    y = logits.argmax(dim=1)
    wrong, bad = y.clone(), z.clone()
    wrong[-1, 0, 0], bad[-1, 0, 0, 0] = logits.shape[1], math.nan
    once, again = DetectorSet(["Mahalanobis"]), DetectorSet(["Mahalanobis"])
    for features, target in ((z, wrong), (bad, y), (z, y.bool())):
        with pytest.raises((ValueError, TypeError), match=r"target|features: got NaN"):
            dense.partial_fit(again, features, logits, target)
    for one in (once, again):
        dense.partial_fit(one, z, logits, y)
        one.finalize(dense.head_of(layer))
    scores = [dense.score_set(one, z, logits)["Mahalanobis"] for one in (once, again)]
    assert torch.equal(*scores)
    with pytest.raises(TypeError, match="detector: got DetectorSet, expected a Detector; score_set"):
        dense.score(once, z, logits)


# ---- metrics over pixels


def exact(scores: torch.Tensor, ood: torch.Tensor) -> dict[str, float]:
    """Of all scores, by scikit-learn and by `metrics`."""
    found = metrics.detection(scores[ood == 0], scores[ood == 1])
    corner = metrics.fpr_at_tpr(scores[ood == 0], scores[ood == 1])
    counted = ood < 2
    ap = average_precision_score(ood[counted].numpy(), -scores[counted].double().numpy())
    about = {name: found[name] for name in ("auroc", "fpr95_id_positive")}
    return about | {"fpr95_ood_positive": corner, "ap_ood_positive": ap}


def test_bins_of_one_score_each_give_the_metrics():
    scores = torch.randint(0, 12, (3, 8, 9)).double() / 7
    ood = torch.randint(0, 2, scores.shape)
    ood[0, :3] = 255
    counted = dense.PixelMetrics(edges=(torch.arange(11).double() + 0.5) / 7)
    for image in range(3):
        counted.update(scores[image], ood[image])
    found = counted.compute()
    assert {name: of.value for name, of in found.items()} == pytest.approx(exact(scores, ood), abs=1e-12)
    assert int(counted.counts.sum()) == int((ood != 255).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from(["normal", "ties", "confident"]))
def test_the_bounds_hold_whatever_the_bins_are(seed, n_bins, kind):
    generator = torch.Generator().manual_seed(seed)
    ood = (torch.rand(60, generator=generator) < 0.3).long()
    ood[0], ood[1] = 0, 1
    scores = torch.randn(60, generator=generator) - ood
    if kind == "ties":
        scores = scores.round()
    if kind == "confident":
        scores = (4 * scores).sigmoid()
    counted = dense.PixelMetrics(n_bins)
    counted.update(scores[:20], ood[:20])
    counted.update(scores[20:], ood[20:].bool())
    found = counted.compute()
    for name, value in exact(scores, ood).items():
        assert found[name].low - 1e-12 <= value <= found[name].high + 1e-12, name
        assert abs(value - found[name].value) <= found[name].error + 1e-12


def test_many_bins_are_near_and_infinite_scores_count():
    ood = torch.rand(4, 50, 50) < 0.1
    scores = (6 * torch.randn(4, 50, 50) + 5 * ~ood).sigmoid()
    scores[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.inf])
    counted = dense.PixelMetrics()
    for image in range(4):
        counted.update(scores[image : image + 1], ood[image : image + 1])
    finite = scores.nan_to_num(posinf=2.0, neginf=-1.0)
    for name, value in exact(finite, ood.long()).items():
        assert counted.compute()[name].value == pytest.approx(value, abs=2e-3)
        assert counted.compute()[name].error < 0.02
    before = counted.counts.clone()
    counted.update(torch.full((1, 2, 2), torch.nan), torch.full((1, 2, 2), 255))
    assert torch.equal(counted.counts, before)
    np.testing.assert_array_equal(counted.counts.sum(1), [int((~ood).sum()), int(ood.sum())])


def test_scores_as_large_as_float32_has_them():
    metrics = dense.PixelMetrics()
    scores = 1e37 * torch.arange(-29.5, 30).view(1, 6, 10)
    metrics.update(scores, scores < 0)
    assert metrics.compute()["auroc"].value == 1
