"""NAC against its definition by loops, at the head and at layers by autograd; sets, files, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import ood_fast
from ood_fast.detectors import NAC, DetectorSet, load, tune

C = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Conv2d(5, 6, 2), nn.ReLU())
        self.fc = nn.Linear(6, C)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(60, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def marks(number: int) -> list[float]:
    """As the authors space them."""
    left = np.emath.logn(1000, np.linspace(1, np.sqrt(1000), num=number // 2))
    found = np.concatenate([left[:-1], (1 - left)[::-1]])
    found[-1] += 1e-2
    return [*found, 1.2]


def cell(value: float, alpha: float, number: int) -> int:
    state = 1 / (1 + math.exp(-alpha * value))
    edges = marks(number)
    return next(k for k in range(number - 1) if edges[k] - 1e-12 <= state < edges[k + 1] - 1e-12)


def divergence(f):
    """KL(u ‖ softmax(f)) of one row."""
    return sum(math.log(1 / C) / C - value / C for value in f.log_softmax(0))


def at_head(net, image) -> list[float]:
    with torch.no_grad():
        z = net.layer2(net.layer1(image[None])).mean((2, 3))[0]
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(net.fc(z)), z)
    return (z * gradient).tolist()


def at_layers(net, image) -> list[list[float]]:
    first = net.layer1(image[None])
    second = net.layer2(first)
    gradients = torch.autograd.grad(divergence(net.fc(second.mean((2, 3)))[0]), [first, second])
    return [(o.mean((2, 3)) * g.sum((2, 3)))[0].tolist() for o, g in zip((first, second), gradients, strict=True)]


def covered(train: list[list[float]], row: list[float], alpha: float, number: int, full: float) -> float:
    found = []
    for neuron, value in enumerate(row):
        here = cell(value, alpha, number)
        found.append(min(sum(cell(other[neuron], alpha, number) == here for other in train) / full, 1))
    return sum(found) / len(found)


def test_at_the_head(net, x):
    detector = NAC(alpha=30.0, bins=20, full=4).fit(net, [x[:24]])
    train = [at_head(net, image) for image in x[:24]]
    expected = [covered(train, at_head(net, 2 * image), 30.0, 20, 4) for image in x[48:]]
    scores = detector.score(net, 2 * x[48:])
    torch.testing.assert_close(scores, torch.tensor(expected).double())
    assert net.passes == 2
    assert scores.std() > 0.01
    with torch.no_grad():
        z = net.layer2(net.layer1(x)).mean((2, 3))
    assert torch.equal(NAC(alpha=30.0, bins=20, full=4).fit_features(z[:24], head=net.fc).coverage, detector.coverage)


@pytest.mark.parametrize("layers", ["stages", ("layer1", "layer2")])
def test_at_layers(net, x, layers):
    detector = NAC(layers, alpha=(50.0, 20.0), bins=12, full=(3, 5)).fit(net, [x[:15], x[15:24]])
    train = [at_layers(net, image) for image in x[:24]]
    expected = []
    for image in x[48:]:
        rows = at_layers(net, image)
        of_layers = [
            covered([rows[layer] for rows in train], rows[layer], (50.0, 20.0)[layer], 12, (3, 5)[layer])
            for layer in range(2)
        ]
        expected.append(sum(of_layers) / 2)
    torch.testing.assert_close(detector.score(net, [x[48:52], x[52:]]), torch.tensor(expected).double())
    assert detector.layers == ("layer1", "layer2")
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_last_stage_is_the_head(net, x):
    at_stage = NAC(("layer2",)).fit(net, [x]).score(net, x)
    torch.testing.assert_close(at_stage, NAC().fit(net, [x]).score(net, x), atol=0.05, rtol=0)  # a cell's edge


def test_sets_files_and_evaluate(net, x, tmp_path):
    net.train().requires_grad_(False)
    made = {"a": NAC("stages"), "b": NAC("stages", alpha=1.0), "head": NAC(), "Gram": "BlockNorm"}
    together = DetectorSet(made).fit(net, [x])
    assert net.passes == 2  # one for all, and one for both that take gradients
    scores = together.score(net, x)
    assert net.passes == 4
    assert net.training
    together["a"].calibrate(scores["a"])
    together.save(tmp_path / "set")
    back = load(tmp_path / "set")
    assert back["a"].layers == ("layer1", "layer2")
    assert all(torch.equal(found, scores[name]) for name, found in back.score(net, x).items())
    with torch.inference_mode():
        assert torch.equal(together["a"].score(net, x.clone()), scores["a"])
    result = ood_fast.evaluate(net, [x[:30]], {"far": [3 * x]}, fit=[x], detectors={"a": NAC("stages"), "head": NAC()})
    assert {row["detector"] for row in result.rows()} >= {"a", "head"}


def test_a_sample_of_the_training_data_is_counted(net, x):
    detector = NAC(samples=20, full=1).fit(net, [x])
    assert (detector.coverage.sum(0) <= 20).all()
    counts = NAC(samples=20, full=1e6).fit(net, [x]).coverage * 1e6
    torch.testing.assert_close(counts.sum(0), torch.full((6,), 20.0).double())


def test_its_alpha_is_searched(net, x):
    assert 1.0 in NAC.grid["alpha"]
    _, trials = tune(DetectorSet(["NAC"]), net, [x], [x[:9]], {"far": [3 * x]})
    assert len(trials["NAC"]) == 8
    assert net.passes == 3


def test_tokens(x):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=C, depth=2, img_size=32).eval()
    images = torch.randn(12, 3, 32, 32)
    detector = NAC("stages", full=2).fit(vit, [images])
    assert detector.coverage.shape == (49, 2 * 192)
    assert detector.score(vit, images[:3]).isfinite().all()


def test_what_does_not_fit(net, x):
    for settings, message in (
        ({"layers": "layer1"}, "layers: got 'layer1', expected None, 'stages', or names"),
        ({"layers": ()}, r"layers: got \(\), expected"),
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"alpha": (1.0, -1.0)}, "alpha: got -1.0"),
        ({"bins": 7}, "bins: got 7, expected an even number"),
        ({"samples": 0}, "samples: got 0"),
        ({"seed": -1}, "seed: got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            NAC(**settings)
    with pytest.raises(ValueError, match=r"unknown layer of Net 'layer3'; known: fc, layer1, .*'layer2'"):
        NAC(("layer3",)).fit(net, [x])
    with pytest.raises(ValueError, match="alpha: got 3, expected 2, one a layer"):
        NAC("stages", alpha=(1.0, 2.0, 3.0)).fit(net, [x])
    net.unused = nn.Linear(2, 2)
    one = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    with pytest.raises(ValueError, match="one logit a row, expected"):
        NAC(("0",)).fit(one, [torch.randn(9, 6)])
    assert NAC("stages").fit(net, [x]).score(net, x[:0]).shape == (0,)
    with pytest.raises(ValueError, match="'unused' does not run"):
        NAC(("unused",)).fit(net, [x])
    with pytest.raises(RuntimeError, match="reads layers of the model, not features"):
        NAC("stages").score_features(torch.randn(3, 6))
    with pytest.raises(ValueError, match="layers: got None, expected what fit"):
        NAC("stages").fit_features(torch.randn(9, 6), torch.randn(9, C), None, net.fc)
    fitted = NAC("stages").fit(net, [x])
    x[7, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="got NaN in 1 of 4 rows, the first is row 7"):
        fitted.score(net, [x[:5], x[5:9]])
