"""Norms and NCI against scalar transcriptions of their formulas, and against pytorch-ood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ood_fast.detectors import NCI, DetectorSet, FeatureNorm

C, M = 5, 9


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(M, C).double().requires_grad_(False)


@pytest.fixture
def train_features() -> torch.Tensor:
    return torch.randn(50, M, dtype=torch.float64).relu() + 0.2


def norm(values, p):
    values = [abs(value) for value in values if value != -math.inf]
    return max(values, default=0.0) if p == math.inf else sum(value**p for value in values) ** (1 / p)


@pytest.mark.parametrize("of", ["features", "logits"])
@pytest.mark.parametrize("p", [1, 2, 1.5, 3, math.inf])
def test_norms(p, of):
    rows = torch.randn(20, 6, dtype=torch.float64)
    rows[3] = 0
    if of == "logits":
        rows[4, :3] = -math.inf  # masked classes count as 0
    detector = FeatureNorm(p=p, of=of)
    scores = detector.score_features(rows) if of == "features" else detector.score_features(None, rows)
    torch.testing.assert_close(scores, torch.tensor([norm(row, p) for row in rows.tolist()], dtype=torch.float64))


def test_norms_need_only_what_they_are_of():
    with pytest.raises(TypeError, match="logits: got NoneType"):
        FeatureNorm(of="logits").score_features(torch.randn(2, 3))
    with pytest.raises(TypeError, match="features: got NoneType"):
        FeatureNorm().score_features(None, torch.randn(2, 3))


def test_the_norm_of_the_logits_of_a_model():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(6, 4)  # no head to capture features at
    scores = FeatureNorm(of="logits").score(model, x)
    torch.testing.assert_close(scores, model(x).detach().norm(dim=1))


# ---- NCI


def nci(z, f, weights, mean, alpha=1e-4, p=1, proximity=True):
    score = alpha * norm(z, p)
    centred = [value - m for value, m in zip(z, mean, strict=True)]
    length = math.sqrt(sum(value**2 for value in centred))
    if proximity and length > 0:
        weight = weights[f.index(max(f))]
        score += sum(w * d for w, d in zip(weight, centred, strict=True)) / length
    return score


FORMS = [
    {},
    {"alpha": 0},
    {"alpha": 0.1},
    {"alpha": 0.1, "p": 2},
    {"alpha": 1.0, "proximity": False},
    {"alpha": 1.0, "p": 2, "proximity": False},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("with_logits", [True, False])
def test_nci_is_the_formula(form, with_logits, head, train_features):
    detector = NCI(**form).fit_features(train_features, head=head)
    z = torch.randn(25, M, dtype=torch.float64).relu()
    z[0], z[1] = 0, detector.mean
    logits = head(z)
    mean = [sum(column) / len(train_features) for column in zip(*train_features.tolist(), strict=True)]
    torch.testing.assert_close(detector.mean, torch.tensor(mean, dtype=torch.float64))
    mean = detector.mean.tolist()  # to the bit: z[1] is at the mean, not near it
    expected = [
        nci(row, f, head.weight.tolist(), mean, **form) for row, f in zip(z.tolist(), logits.tolist(), strict=True)
    ]
    scores = detector.score_features(z, logits if with_logits else None)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_nci_takes_the_first_of_tied_classes(train_features):
    weight = torch.randn(C, M, dtype=torch.float64)
    detector = NCI().fit_features(train_features, head=(weight, None))
    z = torch.randn(4, M, dtype=torch.float64)
    logits = torch.zeros(4, C, dtype=torch.float64)
    logits[:2, 3] = logits[:2, 1] = 2.0
    logits[2] = -math.inf
    logits[2, 4] = 0.0
    expected = [
        nci(row, f, weight.tolist(), detector.mean.tolist()) for row, f in zip(z.tolist(), logits.tolist(), strict=True)
    ]
    torch.testing.assert_close(detector.score_features(z, logits), torch.tensor(expected, dtype=torch.float64))


def test_the_forms_of_the_ablation_share_one_read(head, train_features):
    forms = {str(form): NCI(**form) for form in FORMS}
    together = DetectorSet(forms).fit_features(train_features, head=head)
    z = torch.randn(10, M, dtype=torch.float64)
    for name, scores in together.score_features(z, head(z)).items():
        torch.testing.assert_close(scores, together[name].score_features(z, head(z)), rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_nci_is_that_of_pytorch_ood(alpha, head, train_features):
    peer = pytest.importorskip("pytorch_ood").detector
    head, train_features = head.float(), train_features.float()
    z = torch.randn(20, M).relu()
    expected = -peer.NCI(None, head, alpha=alpha).fit_features(train_features).predict_features(z)
    scores = NCI(alpha=alpha).fit_features(train_features, head=head).score_features(z, head(z))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: FeatureNorm(of="inputs"),
        lambda: FeatureNorm(p=0.5),
        lambda: NCI(p=3),
        lambda: NCI(proximity="no"),
        lambda: NCI(alpha=-1.0),
        lambda: NCI(alpha="auto"),
    ],
)
def test_bad_parameters(call):
    with pytest.raises((ValueError, TypeError), match="got"):
        call()
