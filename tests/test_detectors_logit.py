"""Detectors of logits against scalar transcriptions of their formulas, and against pytorch-ood where both agree."""

from __future__ import annotations

import math

import pytest
import torch

from ood_fast import L2NormLinear
from ood_fast.detectors import GEN, MSP, DetectorSet, Energy, Entropy, KLMatching, MaxLogit, TemperedMSP

INF = math.inf


def softmax(f, temperature=1.0):
    top = max(f)
    exponentials = [math.exp((value - top) / temperature) for value in f]
    return [value / sum(exponentials) for value in exponentials]


def msp(f, temperature=1.0):
    return max(softmax(f, temperature))


def energy(f, temperature=1.0):
    top = max(f)
    return top + temperature * math.log(sum(math.exp((value - top) / temperature) for value in f))


def entropy(f):
    return sum(p * math.log(p) for p in softmax(f) if p > 0)


def gen(f, gamma=0.1, M=None, mean=False, clamp=0.0):
    largest = sorted(softmax(f), reverse=True)[:M]
    largest = [min(max(p, clamp), 1 - clamp) for p in largest]
    return -sum(p**gamma * (1 - p) ** gamma for p in largest) / (len(largest) if mean else 1)


def kl_matching(f, validation):
    """d_k from the rows of `validation`, then the definition."""
    rows = {}
    for logits in validation:
        rows.setdefault(logits.index(max(logits)), []).append(softmax(logits))
    tiny = 2.2250738585072014e-308
    typical = [
        [max(sum(column) / len(of_class), tiny) for column in zip(*of_class, strict=True)] for of_class in rows.values()
    ]
    p = softmax(f)
    return -min(sum(a * math.log(a / b) for a, b in zip(p, d, strict=True) if a > 0) for d in typical)


CASES = {
    "MSP": (MSP(), msp),
    "MSP, T = 4": (MSP(temperature=4), lambda f: msp(f, 4)),
    "MaxLogit": (MaxLogit(), max),
    "Energy": (Energy(), energy),
    "Energy, T = 2": (Energy(temperature=2.0), lambda f: energy(f, 2)),
    "Entropy": (Entropy(), entropy),
    "GEN": (GEN(), gen),
    "GEN, all": (GEN(M=None), gen),
    "GEN, one": (GEN(M=1), lambda f: gen(f, M=1)),
    "GEN, M = c": (GEN(gamma=2, M=6), lambda f: gen(f, gamma=2)),
    "GEN, M = 3": (GEN(gamma=0.5, M=3), lambda f: gen(f, gamma=0.5, M=3)),
    "GEN, mean": (GEN(M=4, reduction="mean"), lambda f: gen(f, M=4, mean=True)),
    "GEN, mean of all": (GEN(M=None, reduction="mean"), lambda f: gen(f, mean=True)),
    "GEN, pytorch-ood": (GEN(M=None, reduction="mean", clamp=1e-7), lambda f: gen(f, mean=True, clamp=1e-7)),
}
case = pytest.mark.parametrize(("detector", "formula"), CASES.values(), ids=CASES)


def assert_formula(detector, formula, rows, rtol=1e-9):
    logits = torch.tensor(rows, dtype=torch.float64)
    expected = torch.tensor([formula(row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(detector.score_features(None, logits), expected, rtol=rtol, atol=1e-12)


@case
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_scores_are_those_of_the_formula(detector, formula, scale):
    assert_formula(detector, formula, (scale * torch.randn(30, 6, dtype=torch.float64)).tolist())


@case
@pytest.mark.parametrize(
    "row",
    [
        pytest.param([0.7], id="one class"),
        pytest.param([2.0] * 5, id="all tied"),
        pytest.param([1.0, 3.0, 3.0, -1.0, 3.0, 0.0], id="tied at the top"),
        pytest.param([4.0, 1.0, 1.0, 1.0, 1.0, 1.0], id="tied behind the top"),
        pytest.param([1.0, -INF, 0.0, -INF, 2.0], id="masked"),
        pytest.param([-INF, 3.0, -INF], id="all but one masked"),
        pytest.param([900.0, 890.0, -900.0], id="large"),
    ],
)
def test_corners(detector, formula, row):
    if len(row) == 1:
        with pytest.raises(ValueError, match=r"logits: got shape \(1, 1\), one logit a row, .* give two, \[0, f\]"):
            detector.score_features(None, torch.tensor([row]))
        return
    assert_formula(detector, formula, [row], rtol=1e-7)


@case
def test_half_precision_logits_are_scored_in_float32_at_least(detector, formula):
    logits = torch.randn(20, 6).bfloat16()
    scores = detector.score_features(None, logits)
    wide = getattr(detector, "temperature", 1) != 1 and not isinstance(detector, Energy)
    wide = wide or getattr(detector, "gamma", 1) > 1
    assert scores.dtype == (torch.float64 if wide else torch.float32)
    expected = torch.tensor([formula(row) for row in logits.tolist()], dtype=scores.dtype)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "detector", [MSP(0.2), TemperedMSP(0.2), GEN(gamma=10), GEN(gamma=10, M=2), GEN(5.0, M=None)], ids=str
)
def test_certain_predictions_in_float32_do_not_tie(detector):
    """Their scores round to one number in float32: of a loss with a temperature, nearly all of them."""
    logits = torch.cat([torch.linspace(3.5, 6, 50).unsqueeze(1), torch.zeros(50, 1), torch.full((50, 1), -1.0)], dim=1)
    if isinstance(detector, GEN):
        logits = 3 * logits
    for scores in (
        detector.score_features(None, logits),
        DetectorSet({"it": detector}).score_features(None, logits)["it"],
    ):
        assert len(scores.unique()) == 50
        torch.testing.assert_close(scores, detector.score_features(None, logits.double()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("M", [2, 5])
def test_gen_tells_certain_predictions_apart(M):
    # 1 − P of the prediction is 1e-10 and less: in float32, 1 − softmax would be 0 for all of them.
    logits = torch.tensor([[23.0, 0, -9, -9, -9], [40.0, 0, -9, -9, -9], [60.0, 0, -9, -9, -9], [80.0, 0, -9, -9, -9]])
    scores = GEN(M=M).score_features(None, logits)

    def exact(f):  # 1 − P_p as the sum of the others
        e = sorted((math.exp(value - max(f)) for value in f), reverse=True)
        total = math.fsum(e)
        terms = [e[j] / total * (math.fsum(e[:j] + e[j + 1 :]) / total) for j in range(M)]
        return -sum(term**0.1 for term in terms)

    expected = torch.tensor([exact(row) for row in logits.tolist()])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)
    assert scores.diff().gt(0).all()


def test_gen_with_more_classes_than_there_are_is_gen_with_all():
    logits = torch.randn(9, 7)
    expected = GEN(M=None).score_features(None, logits)
    for M in (7, 100):
        torch.testing.assert_close(GEN(M=M).score_features(None, logits), expected, rtol=0, atol=0)


# ---- KL matching


def fitted(validation):
    return KLMatching().fit_features(None, torch.as_tensor(validation, dtype=torch.float64))


def test_kl_matching_is_the_formula():
    validation, logits = 2 * torch.randn(60, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    rows = validation.tolist()
    assert_formula(fitted(validation), lambda f: kl_matching(f, rows), logits.tolist())


def test_kl_matching_leaves_out_classes_that_were_never_predicted():
    validation = [[3.0, 1.0, 0.0], [2.0, 0.0, -1.0], [0.0, 0.5, 4.0]]  # none is predicted as 1
    detector = fitted(validation)
    assert detector.log_typical.shape == (2, 3)
    assert_formula(detector, lambda f: kl_matching(f, validation), [[0.0, 9.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("validation", "row"),
    [
        pytest.param([[1.0, 1.0, 1.0]], [0.0, 0.0, 0.0], id="all tied"),
        pytest.param([[1.0, 0.0, -INF], [0.0, 1.0, -INF]], [2.0, 1.0, -INF], id="masked in both"),
        pytest.param([[1.0, 0.0, 2.0], [0.0, 1.0, 0.5]], [2.0, -INF, 1.0], id="masked in scoring"),
        pytest.param([[1.0, 0.0, -INF], [0.0, 1.0, -INF]], [2.0, 1.0, 0.5], id="masked in fitting"),
    ],
)
def test_kl_matching_corners(validation, row):
    detector = fitted(validation)
    assert_formula(detector, lambda f: kl_matching(f, validation), [row])
    assert detector.score_features(None, torch.tensor([row])).isfinite().all()


def test_kl_matching_of_certain_predictions_keeps_the_digits_of_float32():
    validation = torch.tensor([[12.0, 0.0, 0.0], [0.0, 12.0, 0.0]])
    logits = torch.tensor([[12.5, 0.0, 0.0], [14.0, 0.0, 0.0]])  # divergences of 1e-6 and 1e-5
    scores = KLMatching().fit_features(None, validation).score_features(None, logits)
    expected = torch.tensor([kl_matching(row, validation.tolist()) for row in logits.tolist()])
    torch.testing.assert_close(scores, expected, rtol=0, atol=2 * torch.finfo(torch.float32).eps)


def test_kl_matching_refuses_other_classes():
    with pytest.raises(ValueError, match=r"logits: got shape \(2, 4\), expected \(n, 3\)"):
        fitted([[1.0, 2.0, 3.0]]).score_features(None, torch.zeros(2, 4))


def test_kl_matching_needs_logits_to_fit_on():
    with pytest.raises(ValueError, match="KL matching: logits: got None"):
        KLMatching().fit_features(torch.randn(4, 3))


# ---- T2FNorm: no detector of its own, the head does it


def test_t2fnorm_is_any_logit_detector_on_its_head():
    head = L2NormLinear(8, 5, tau=0.1).double().eval().requires_grad_(False)
    z = torch.randn(12, 8, dtype=torch.float64)
    head_rows = list(zip(head.weight.tolist(), head.bias.tolist(), strict=True))
    rows = [[sum(map(float.__mul__, weight, row)) / 0.1 + b for weight, b in head_rows] for row in z.tolist()]
    for detector, formula in CASES.values():
        expected = torch.tensor([formula(row) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(detector.score_features(None, head(z)), expected, rtol=1e-7, atol=1e-12)


# ---- the other library


@pytest.mark.parametrize("n_classes", [4, 120])
def test_scores_are_those_of_pytorch_ood(n_classes):
    peer = pytest.importorskip("pytorch_ood").detector
    logits = 3 * torch.randn(40, n_classes)
    pairs = [
        (MSP(), peer.MaxSoftmax.score(logits)),
        (MSP(temperature=2.5), peer.MaxSoftmax.score(logits, 2.5)),
        (MaxLogit(), peer.MaxLogit.score(logits)),
        (Energy(), peer.EnergyBased.score(logits)),
        (Energy(temperature=3.0), peer.EnergyBased.score(logits, 3.0)),
        (Entropy(), peer.Entropy.score(logits)),
        (GEN(M=None, reduction="mean", clamp=1e-7), peer.GEN.score(logits)),
        (GEN(gamma=0.5, M=10, reduction="mean", clamp=1e-7), peer.GEN.score(logits, 0.5, 10)),
    ]
    for detector, outlier_score in pairs:  # its sign is the other one; its entropy counts probabilities from 1e-7 up
        scores = detector.score_features(None, logits).float()
        torch.testing.assert_close(scores, -outlier_score, rtol=1e-4, atol=1e-4)


def test_kl_matching_is_that_of_pytorch_ood():
    peer = pytest.importorskip("pytorch_ood").detector
    validation, logits = 2 * torch.randn(80, 5), 2 * torch.randn(30, 5)
    validation[:, 3] = -5.0  # a class that is never predicted
    expected = -peer.KLMatching(None).fit_logits(validation).predict_logits(logits)
    actual = KLMatching().fit_features(None, validation).score_features(None, logits)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: MSP(temperature=0), ValueError),
        (lambda: MSP(temperature="norm"), TypeError),
        (lambda: GEN(gamma=0.0), ValueError),
        (lambda: GEN(M=0), ValueError),
        (lambda: GEN(M=2.0), ValueError),
        (lambda: GEN(reduction="max"), ValueError),
        (lambda: GEN(clamp=0.6), ValueError),
    ],
)
def test_bad_parameters(call, error):
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_the_k_smallest_are_those_of_topk(k, dtype):
    from ood_fast.detectors.numbers import k_smallest

    values = torch.randint(0, 4, (20, 14), dtype=dtype)[:, ::2]  # ties; not contiguous
    expected = values.sort(dim=1).values[:, :k]
    torch.testing.assert_close(k_smallest(values, k).sort(dim=1).values, expected)
