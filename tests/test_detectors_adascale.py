"""AdaSCALE against its definition by loops; one fit for all of its parameters; sets, files, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ood_fast
from ood_fast.detectors import AdaSCALE, DetectorSet, load, tune

M, C = 20, 4


class Net(nn.Module):
    """Smooth, so that no gradient ties; features of both signs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, M, 3)
        self.fc = nn.Linear(M, C)
        self.passes = 0

    def features(self, x):
        return torch.tanh(self.conv(x)).mean((2, 3)) + 0.05

    def forward(self, x):
        self.passes += 1
        return self.fc(self.features(x))


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(24, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shift(net, image, k1=1, k2=2, share=0.1, eps=0.3, weight=7.0) -> float:
    """Q' of one image; k1 and k2 are numbers of features."""
    image = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(image[None])[0].max(), image)
    flat, g = image.detach().flatten().tolist(), gradient.flatten().tolist()
    for place in sorted(range(len(g)), key=lambda i: abs(g[i]))[: int(share * len(g))]:
        flat[place] += eps * math.copysign(1, g[place])
    with torch.no_grad():
        z = net.features(image[None])[0].tolist()
        moved = net.features(torch.tensor(flat, dtype=torch.float64).view(1, 2, 5, 5))[0].tolist()
    order = sorted(range(M), key=lambda i: -z[i])
    return weight * sum(abs(moved[i] - z[i]) for i in order[:k1]) + sum(max(moved[i], 0) for i in order[:k2])


def literal(net, image, variant, shifts) -> float:
    q = shift(net, image)
    percent = 60 + (1 - sum(other <= q + 1e-12 for other in shifts) / len(shifts)) * 30
    with torch.no_grad():
        z = net.features(image[None])[0].tolist()
        f = net.fc(torch.tensor(z).double()).tolist()
    positive = sorted((max(value, 0) for value in z), reverse=True)
    r = sum(positive) / sum(positive[: M - round(M * percent / 100)])
    if variant == "l":
        return math.log(sum(math.exp(value * r**2) for value in f))
    with torch.no_grad():
        return math.log(sum(math.exp(v) for v in net.fc(torch.tensor(z).double() * math.exp(r)).tolist()))


SETTINGS = {"p": (60.0, 90.0), "k1": 5.0, "k2": 10.0, "weight": 7.0, "share": 0.1, "eps": 0.3}


@pytest.mark.parametrize("variant", ["a", "l"])
def test_scores_are_those_of_the_formula(net, x, variant):
    train, test = x[:16], torch.cat([x[16:] * 2, x[:2]])
    detector = AdaSCALE(variant, **SETTINGS).fit(net, [train[:10], train[10:]])
    shifts = [shift(net, image) for image in train]
    torch.testing.assert_close(detector.shifts, torch.tensor(sorted(shifts)).double())
    expected = torch.tensor([literal(net, image, variant, shifts) for image in test]).double()
    torch.testing.assert_close(detector.score(net, test), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(detector.score(net, [test[:3], test[3:]]), expected, rtol=1e-6, atol=1e-6)
    assert expected.std() > 1e-3


def test_one_fit_and_two_more_passes_for_all_parameters(net, x, tmp_path):
    net.train()
    grid = {"p": ((60.0, 70.0), (60.0, 99.0))}
    variants = {str(index): one for index, one in enumerate(AdaSCALE(**SETTINGS).variants(grid))}
    together = DetectorSet({**variants, "l": AdaSCALE("l", **SETTINGS), "MSP": "MSP", "LayerMahalanobis": "BlockNorm"})
    together.fit(net, [x])
    assert net.passes == 3
    scores = together.score(net, x)
    assert net.passes == 6
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    alone = AdaSCALE("l", **SETTINGS).fit(net, [x])
    torch.testing.assert_close(scores["l"], alone.score(net, x))
    alone.calibrate(scores["l"]).save(tmp_path / "it")
    back = load(tmp_path / "it")
    assert back.p == (60.0, 90.0)
    assert torch.equal(back.score(net, x), alone.score(net, x))
    result = ood_fast.evaluate(net, [x[:8]], {"far": [3 * x]}, fit=[x], detectors={"AdaSCALE": AdaSCALE()})
    assert {row["detector"] for row in result.rows()} >= {"AdaSCALE"}
    with torch.inference_mode():
        torch.testing.assert_close(alone.score(net, x.clone()), scores["l"])


def test_a_search_runs_the_model_no_more_often(net, x):
    tuned, trials = tune(DetectorSet(["AdaSCALE"]), net, [x], [x[:9]], {"far": [3 * x]})
    assert net.passes == 3 * 3
    assert len(trials["AdaSCALE"]) == 36
    assert tuned["AdaSCALE"].p in AdaSCALE.grid["p"]


def test_features_that_are_nowhere_above_zero_are_not_scaled(net, x):
    with torch.no_grad():
        net.features = lambda x: -torch.relu(net.conv(x)).mean((2, 3))
        for variant in ("a", "l"):
            found = AdaSCALE(variant).fit(net, [x]).score(net, x)
            torch.testing.assert_close(found, net(x).logsumexp(1))


def test_nan_that_the_step_makes_is_refused(net, x):
    detector = AdaSCALE(eps=0.5, share=1.0).fit(net, [x])
    net.features = lambda x: torch.relu(net.conv(x)).mean((2, 3)) + 0 * (x.amax((1, 2, 3)) < 3.2).float().log()[:, None]
    with pytest.raises(ValueError, match="features of the moved inputs: got NaN in 1 of 2 rows, the first is row 1"):
        detector.score(net, torch.stack([torch.zeros_like(x[0]), torch.full_like(x[0], 3.0)]))


def test_what_does_not_fit(net, x):
    for settings, message in (
        ({"variant": "b"}, "variant: got 'b'"),
        ({"p": 80}, r"p: got 80, expected two numbers"),
        ({"p": (90, 80)}, r"p: got \(90, 80\), expected p_low <= p_high"),
        ({"p": (90, 101)}, "p: got 101"),
        ({"k1": 0.0}, "k1: got 0.0"),
        ({"share": 1.5}, "share: got 1.5"),
        ({"eps": -1.0}, "eps: got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaSCALE(**settings)
    with pytest.raises(RuntimeError, match="scores inputs, not features"):
        AdaSCALE().score_features(torch.randn(3, M))
    with pytest.raises(ValueError, match="layers: got None, expected what fit"):
        AdaSCALE().fit_features(torch.randn(9, M), torch.randn(9, C), None, net.fc)
    fitted = AdaSCALE().fit(net, [x])
    x[7, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="features: got NaN in 1 of 4 rows, the first is row 7"):
        fitted.score(net, [x[:5], x[5:9]])
    tokens = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(18, C))
    with pytest.raises(TypeError, match=r"x: got dtype torch.int64, expected floating point: AdaSCALE moves inputs"):
        AdaSCALE().fit(tokens, [torch.randint(9, (5, 3))])
