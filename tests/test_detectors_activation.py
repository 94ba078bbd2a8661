"""ReAct, ASH and SCALE against scalar transcriptions of their formulas, and against pytorch-ood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ood_fast.detectors import ASH, SCALE, DetectorSet, ReAct

C, M = 4, 20


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(M, C).double().requires_grad_(False)


@pytest.fixture
def train_features() -> torch.Tensor:
    return torch.randn(50, M, dtype=torch.float64).relu()


def energy(z, head):
    weights, bias = head.weight.tolist(), head.bias.tolist()
    f = [sum(w * x for w, x in zip(weight, z, strict=True)) + b for weight, b in zip(weights, bias, strict=True)]
    return max(f) + math.log(sum(math.exp(value - max(f)) for value in f))


def percentile(values, p):
    """Linear interpolation between order statistics."""
    values = sorted(values)
    rank = p / 100 * (len(values) - 1)
    low = math.floor(rank)
    return values[low] + (rank - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def kept(z, p):
    """The indices that stay: the largest, of equal ones the first."""
    k = max(1, len(z) - round(len(z) * p / 100))
    return sorted(range(len(z)), key=lambda j: (-z[j], j))[:k]


def factor(z, largest):
    return 1.0 if sum(largest) == 0 else math.exp(min(sum(z) / sum(largest), 50))


def react(z, train, p=90):
    clip = percentile([value for row in train for value in row], p)
    return [min(value, clip) for value in z]


def ash(z, train, variant="b", p=90):
    indices = kept(z, p)
    fill = {j: sum(z) / len(indices) if variant == "b" else z[j] for j in indices}
    scale = factor(z, [z[j] for j in indices]) if variant == "s" else 1.0
    return [scale * fill.get(j, 0.0) for j in range(len(z))]


def scale(z, train, p=85):
    return [value * factor(z, [z[j] for j in kept(z, p)]) for value in z]


FORMS = [
    (ReAct, react, {}),
    (ReAct, react, {"p": 0}),
    (ReAct, react, {"p": 37.5}),
    (ReAct, react, {"p": 100}),
    *((ASH, ash, {"variant": variant, "p": p}) for variant in "bsp" for p in (0, 65, 90, 100)),
    (ASH, ash, {}),
    (SCALE, scale, {}),
    *((SCALE, scale, {"p": p}) for p in (0, 65, 100)),
]
forms = pytest.mark.parametrize(
    ("make", "reshape", "form"), FORMS, ids=[f"{make.__name__} {form}" for make, _, form in FORMS]
)


def compare(detector, reshape, form, head, train, z):
    scores = detector.score_features(z)
    expected = [energy(reshape(row, train, **form), head) for row in z.tolist()]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)


@forms
def test_scores_are_those_of_the_formula(make, reshape, form, head, train_features):
    detector = make(**form).fit_features(train_features, head=head)
    compare(detector, reshape, form, head, train_features.tolist(), torch.randn(30, M, dtype=torch.float64).relu())


@forms
def test_ties_zeros_and_negative_features(make, reshape, form, head, train_features):
    detector = make(**form).fit_features(train_features, head=head)
    z = torch.randn(12, M, dtype=torch.float64)
    z[0] = 0
    z[1] = -z[1].abs()  # all negative
    z[2] = 3.0  # all tied
    z[3] = 0
    z[3, [2, 5, 11]] = 1.0  # fewer than k above 0: the first zeros are among the largest
    z[4] = z[4].round()  # ties in the middle
    z[5] = torch.tensor([0.0, -1.0] * (M // 2))  # the largest sum to 0, all of them do not
    z[6, :2] = torch.tensor([9.0, -9.0])
    z[7] = torch.tensor([-1e-9] * 2 + [-1.0] * (M - 2))  # s1/s2 is huge
    compare(detector, reshape, form, head, train_features.tolist(), z)
    assert detector.score_features(z).isfinite().all()
    assert detector.float().score_features(z.float()).isfinite().all()
    zero = detector.double().score_features(torch.zeros(1, M, dtype=torch.float64))
    if make is not ReAct:
        torch.testing.assert_close(zero.item(), energy([0.0] * M, head))


@forms
def test_one_feature(make, reshape, form):
    head = nn.Linear(1, 2).double().requires_grad_(False)
    train, z = torch.rand(9, 1, dtype=torch.float64), torch.tensor([[0.0], [0.3], [5.0], [-2.0]], dtype=torch.float64)
    compare(make(**form).fit_features(train, head=head), reshape, form, head, train.tolist(), z)


@forms
def test_half_precision_features_are_scored_in_float32(make, reshape, form, head, train_features):
    detector = make(**form).fit_features(train_features.bfloat16(), head=head.float())
    z = torch.randn(10, M).relu().bfloat16()
    scores = detector.score_features(z)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, detector.score_features(z.float()))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(detector.score_features(z), scores)


@forms
def test_scores_have_gradients(make, reshape, form, head, train_features):
    """The score of an adversarial or a synthetic feature, say."""
    head, train_features = head.float(), train_features.float()
    detector = make(**form).fit_features(train_features, head=head)
    z = torch.rand(6, M, requires_grad=True)
    (gradient,) = torch.autograd.grad(detector.score_features(z).sum(), z)
    detector, leaf = detector.double(), z.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(detector.score_features(leaf).sum(), leaf)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4)


def test_react_is_fitted_on_validation_data_where_there_is_some():
    model = nn.Sequential(nn.Linear(5, M), nn.ReLU(), nn.Linear(M, C)).requires_grad_(False)
    train, validation = torch.randn(40, 5), 3 * torch.randn(30, 5)
    detector = DetectorSet([ReAct()]).fit(model, [train], validation=[validation])["ReAct"]
    values = model[1](model[0](validation)).flatten().tolist()
    assert detector.clip.item() == pytest.approx(percentile(values, 90))


def test_only_react_needs_data(head):
    for detector in (ASH(), SCALE()):
        detector.fit_features(None, head=head)
        assert detector.fitted
        assert set(detector.state_dict()) == {"head_weight", "head_bias"}
    with pytest.raises(ValueError, match="ReAct: no data to fit on"):
        ReAct().fit_features(None, head=head)


@pytest.mark.parametrize("p", [65, 85, 90])
def test_scores_are_those_of_pytorch_ood(p, head, train_features):
    peer = pytest.importorskip("pytorch_ood").detector
    head, train_features, z = head.float(), train_features.float(), torch.rand(30, M) - 0.1

    def maps(features):
        return features[:, :, None, None]

    def flat_head(z):
        return head(z.flatten(1))

    pairs = [
        (ASH(variant=variant, p=p), peer.ASH(None, flat_head, variant=f"ash-{variant}", percentile=p / 100))
        for variant in "bsp"
    ]
    pairs.append((SCALE(p=p), peer.SCALE(None, flat_head, percentile=p / 100)))
    react = peer.ReAct(None, flat_head, percentile=p / 100)
    react.fit_feature_maps(maps(train_features), torch.zeros(len(train_features), dtype=torch.int64))
    pairs.append((ReAct(p=p), react))
    for detector, other in pairs:
        scores = detector.fit_features(train_features, head=head).score_features(z)
        torch.testing.assert_close(scores, -other.predict_feature_maps(maps(z)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [lambda: ReAct(p=101), lambda: ASH(p=-1), lambda: ASH(variant="ash-b"), lambda: SCALE(p=101)],
)
def test_bad_parameters(call):
    with pytest.raises(ValueError, match="got"):
        call()
