"""Distances to decision boundaries against scalar transcriptions of their formulas, and against pytorch-ood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ood_fast
from ood_fast.detectors import FDBD, MSP, BoundaryDistance, DetectorSet, TemperedMSP, boundary

C, M = 6, 9
EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(M, C).double().requires_grad_(False)


@pytest.fixture
def train_features() -> torch.Tensor:
    return torch.randn(50, M, dtype=torch.float64).relu() + 0.2


def distance(f, weights, average="boundaries"):
    p = f.index(max(f))
    lengths = [math.dist(weights[p], weight) for weight in weights]
    steps = [(f[p] - f[j]) / lengths[j] for j in range(len(f)) if j != p and lengths[j] > 0 and f[j] != -math.inf]
    n_counted = len(steps) + (average == "classes")
    return sum(steps) / n_counted if steps else 0.0


def fdbd(z, f, weights, mean, reduction="sum", denominator="centred"):
    origin = mean if denominator == "centred" else [0.0] * len(z)
    total = distance(f, weights) * (len(f) - 1 if reduction == "sum" else 1)
    return total / max(math.dist(z, origin), EPS)


def confidence(f, temperature):
    top = max(f)
    return 1 / sum(math.exp((value - top) / temperature) for value in f)


def tempered_msp(f, weights, bias, temperature="distance", tau=0.04, of="logits", eps=1e-6):
    if temperature == "distance":
        temperature = distance(f, weights)
        temperature = 1.0 if temperature <= eps else temperature
    elif temperature == "norm":
        temperature = tau * (math.sqrt(sum(value**2 for value in f if value != -math.inf)) + 1e-7)
    if of == "features":
        f = [(value - b) / temperature + b for value, b in zip(f, bias, strict=True)]
        temperature = 1.0
    return confidence(f, temperature)


FORMS = [
    *({"reduction": reduction, "denominator": of} for reduction in ("sum", "mean") for of in ("centred", "norm")),
    {"average": "boundaries"},
    {"average": "classes"},
    {"temperature": "distance"},
    {"temperature": "distance", "of": "features"},
    {"temperature": "distance", "eps": 0.3},
    {"temperature": "norm"},
    {"temperature": "norm", "tau": 0.5, "of": "features"},
    {"temperature": 2.5},
    {"temperature": 10, "of": "features"},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def make(form):
    return (FDBD if "reduction" in form else BoundaryDistance if "average" in form else TemperedMSP)(**form)


def expected_scores(form, z, logits, weight, bias, mean):
    weights, bias = weight.tolist(), [0.0] * len(weight) if bias is None else bias.tolist()
    scores = []
    for row, f in zip(z.tolist(), logits.tolist(), strict=True):
        if "reduction" in form:
            scores.append(fdbd(row, f, weights, mean, **form))
        elif "average" in form:
            scores.append(distance(f, weights, **form))
        else:
            scores.append(tempered_msp(f, weights, bias, **form))
    return torch.tensor(scores, dtype=torch.float64)


def compare(form, train_features, head, z, logits):
    detector = make(form).fit_features(train_features, head=head)
    weight, bias = head
    mean = (detector.mean if isinstance(detector, FDBD) else train_features.mean(dim=0)).tolist()
    scores = detector.score_features(z, logits)
    expected = expected_scores(form, z, logits, weight, bias, mean)
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-12)


@forms
@pytest.mark.parametrize("table_bytes", [boundary.TABLE_BYTES, 0])
def test_scores_are_those_of_the_formula(form, table_bytes, head, train_features, monkeypatch):
    monkeypatch.setattr(boundary, "TABLE_BYTES", table_bytes)
    z = torch.randn(30, M, dtype=torch.float64)
    compare(form, train_features, (head.weight, head.bias), z, head(z))


@forms
@pytest.mark.parametrize("table_bytes", [boundary.TABLE_BYTES, 0])
def test_corners(form, table_bytes, head, train_features, monkeypatch):
    monkeypatch.setattr(boundary, "TABLE_BYTES", table_bytes)
    weight, inf = head.weight.clone(), math.inf
    weight[4] = weight[1]  # coincident rows
    z = torch.randn(7, M, dtype=torch.float64)
    z[0] = 0
    z[1] = make({"reduction": "sum"}).fit_features(train_features, head=head).mean
    logits = torch.nn.functional.linear(z, weight, head.bias)
    logits[2] = 1.5  # all tied: D = 0
    logits[3, [1, 4]] = 9.0  # coincident rows tied at the top
    logits[4] = torch.tensor([-inf, 1.0, -inf, 0.5, 0.0, -inf])
    logits[5] = torch.tensor([-inf, 1.0, -inf, -inf, 0.0, -inf])  # the only live neighbour coincides
    logits[6] = torch.tensor([0.0] * C)  # ‖f‖ = 0
    compare(form, train_features, (weight, head.bias), z, logits)


@forms
def test_a_head_without_boundaries(form, train_features):
    z = torch.randn(4, M, dtype=torch.float64)
    weight = torch.zeros(3, M, dtype=torch.float64)
    compare(form, train_features, (weight, None), z, torch.nn.functional.linear(z, weight))
    weight = torch.randn(1, M, dtype=torch.float64)
    with pytest.raises(ValueError, match="one logit a row"):
        compare(form, train_features, (weight, None), z, torch.nn.functional.linear(z, weight))


@forms
def test_half_precision_inputs_are_scored_in_float32_at_least(form, head, train_features):
    head = head.float()
    z = torch.randn(20, M).bfloat16()
    logits = head(z.float()).bfloat16()
    detector = make(form).fit_features(train_features.bfloat16(), head=head)
    scores = detector.score_features(z, logits)
    assert scores.dtype == (torch.float64 if isinstance(detector, TemperedMSP) else torch.float32)
    torch.testing.assert_close(scores, detector.score_features(z.float(), logits.float()), rtol=1e-5, atol=1e-6)


def test_the_table_is_kept_up_to_its_size(head, train_features, monkeypatch):
    for detector in (FDBD(), BoundaryDistance(), TemperedMSP()):
        table = detector.fit_features(train_features, head=head).table
        lengths = torch.cdist(head.weight, head.weight, compute_mode="donot_use_mm_for_euclid_dist")
        expected = lengths.reciprocal().fill_diagonal_(0.0)
        torch.testing.assert_close(table, expected)
    monkeypatch.setattr(boundary, "TABLE_BYTES", 8 * C * C - 1)
    assert FDBD().fit_features(train_features, head=head).table is None
    monkeypatch.setattr(boundary, "TABLE_BYTES", 8 * C * C)
    assert FDBD().fit_features(train_features, head=head).table is not None
    assert TemperedMSP(temperature=2.0).table is None


def test_a_fit_that_only_needs_the_head_reads_no_data():
    def poisoned():
        raise AssertionError("the data was read")
        yield

    model = nn.Sequential(nn.Linear(4, M), nn.ReLU(), nn.Linear(M, C))
    x = torch.randn(5, 4)
    for detector in (BoundaryDistance(), TemperedMSP(), TemperedMSP(temperature=2.0, of="features")):
        scores = detector.fit(model, poisoned()).score(model, x)
        with torch.no_grad():
            expected = type(detector)(**detector.settings()).fit_features(None, head=model[2])
            torch.testing.assert_close(scores, expected.score_features(None, model(x)))


@pytest.mark.parametrize("temperature", ["norm", 0.5])
def test_a_temperature_from_the_logits_needs_no_fit(temperature):
    detector = TemperedMSP(temperature=temperature)
    assert detector.fitted
    assert not detector.needs_fit
    assert detector.score(nn.Flatten(), torch.randn(3, 4)).shape == (3,)
    assert list(detector.state_dict()) == []


def test_the_confidence_is_that_of_the_losses(head):
    """The likelihood of the predicted class is what the losses maximise."""
    z = torch.randn(20, M, dtype=torch.float64)
    logits, predicted = head(z), head(z).argmax(dim=1)
    elogitnorm = ood_fast.elogitnorm(logits, z, head.weight, head.bias, predicted, reduction="none")
    scores = TemperedMSP().fit_features(None, head=head).score_features(None, logits)
    torch.testing.assert_close(scores, (-elogitnorm).exp())
    logitnorm = ood_fast.logitnorm(logits, predicted, reduction="none")
    torch.testing.assert_close(TemperedMSP("norm").score_features(None, logits), (-logitnorm).exp())


def test_scaled_softmax_is_that_of_scaled_features(head):
    """T2FNorm (T = τ) and the scaled softmax of Haas et al.: the features are divided, the bias is not."""
    z = torch.randn(20, M, dtype=torch.float64)
    for T in (0.1, 30.0):
        scores = TemperedMSP(temperature=T, of="features").fit_features(None, head=head).score_features(None, head(z))
        torch.testing.assert_close(scores, MSP().score_features(None, head(z / T)))


def test_a_set_shares_table_and_read(head, train_features):
    together = DetectorSet([FDBD(), BoundaryDistance(), TemperedMSP()]).fit_features(train_features, head=head)
    assert together["FDBD"].table is together["BoundaryDistance"].table is together["TemperedMSP"].table
    z = torch.randn(8, M, dtype=torch.float64)
    for name, scores in together.score_features(z, head(z)).items():
        torch.testing.assert_close(scores, together[name].score_features(z, head(z)))


def test_fdbd_is_that_of_pytorch_ood(head, train_features):
    peer = pytest.importorskip("pytorch_ood").detector
    head, train_features, z = head.float(), train_features.float(), torch.randn(20, M)
    expected = -peer.fDBD(None, head).fit_features(train_features).predict_features(z)
    detector = FDBD(reduction="mean").fit_features(train_features, head=head)
    torch.testing.assert_close(detector.score_features(z, head(z)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: FDBD(reduction="max"), ValueError),
        (lambda: FDBD(denominator="mean"), ValueError),
        (lambda: BoundaryDistance(average="none"), ValueError),
        (lambda: TemperedMSP("D"), ValueError),
        (lambda: TemperedMSP(0.0), ValueError),
        (lambda: TemperedMSP(None), TypeError),
        (lambda: TemperedMSP(tau=0), ValueError),
        (lambda: TemperedMSP(of="inputs"), ValueError),
        (lambda: TemperedMSP(eps=-1.0), ValueError),
    ],
)
def test_bad_parameters(call, error):
    with pytest.raises(error):
        call()
