"""ODIN against its definition by finite differences, and against pytorch-ood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ood_fast.detectors import MSP, ODIN, DetectorSet

STD = (0.5, 0.2, 0.25)


class Net(nn.Module):
    """Smooth, with layers whose mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.dropout(torch.tanh(self.norm(self.conv(x))).mean(dim=(2, 3))))


@pytest.fixture
def net() -> Net:
    return Net().double().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 3, 5, 5, dtype=torch.float64)


def softmax(f, temperature):
    exponentials = [math.exp((value - max(f)) / temperature) for value in f]
    return [value / sum(exponentials) for value in exponentials]


def odin(net, image, temperature, eps, std):
    """One image (3, 5, 5) as nested lists; the sign of each partial derivative from a central difference."""

    def logits(image):
        with torch.no_grad():
            return net(torch.tensor([image], dtype=torch.float64))[0].tolist()

    f = logits(image)
    p = f.index(max(f))
    moved = [[list(row) for row in channel] for channel in image]
    for c, channel in enumerate(image):
        for i, row in enumerate(channel):
            for j, value in enumerate(row):
                losses = []
                for step in (1e-5, -1e-5):
                    nudged = [[list(r) for r in ch] for ch in image]
                    nudged[c][i][j] = value + step
                    losses.append(-math.log(softmax(logits(nudged), temperature)[p]))
                moved[c][i][j] = value - eps * math.copysign(1, losses[0] - losses[1]) / std[c]
    return max(softmax(logits(moved), temperature))


@pytest.mark.parametrize(("temperature", "eps"), [(1000.0, 0.0014), (1, 0.1)])
@pytest.mark.parametrize("std", [None, STD])
def test_scores_are_those_of_the_formula(net, x, temperature, eps, std):
    scores = ODIN(temperature, eps, std).score(net, x)
    expected = [odin(net, image, temperature, eps, std or (1, 1, 1)) for image in x.tolist()]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_no_step_is_msp_at_that_temperature(net, x):
    torch.testing.assert_close(ODIN(50.0, eps=0.0).score(net, x), MSP(50.0).score(net, x))


@pytest.mark.parametrize("sign_of_zero", [0, 1])
def test_where_the_gradient_is_zero(sign_of_zero):
    class Logits(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0].square(), 0 * x[:, 1] + 1], dim=1)

    x = torch.zeros(1, 2)  # at 0 the gradient of both inputs is 0, and the prediction is class 1
    score = ODIN(1.0, eps=0.5, sign_of_zero=sign_of_zero).score(Logits(), x)
    assert score.item() == pytest.approx(max(softmax([(0.5 * sign_of_zero) ** 2, 1.0], 1.0)))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_in_the_model(net, x, context):
    net.train()
    net.norm.eval()  # frozen inside a training model
    net.conv.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    expected = ODIN().score(net.eval(), x)
    net.train()
    net.norm.eval()
    with context():
        scores = ODIN().score(net, x.clone())
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [parameter.requires_grad for parameter in net.conv.parameters()] == [False, False]
    assert all(parameter.requires_grad for parameter in net.fc.parameters())
    assert [module.training for module in net.children()] == [True, False, True, True]
    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_input_is_left_as_it_was(net, x):
    before = x.clone().requires_grad_()
    ODIN(eps=0.5).score(net, before)
    assert torch.equal(before, x)
    assert before.grad is None
    assert before.requires_grad


def test_modes_are_restored_when_the_model_raises(net):
    net.train()
    with pytest.raises(RuntimeError, match="channels"):
        ODIN().score(net, torch.randn(2, 1, 5, 5, dtype=torch.float64))
    assert net.training
    assert net.dropout.training


def test_a_batch_scores_as_its_images(net, x):
    whole = ODIN(1.0).score(net, x)
    torch.testing.assert_close(whole, torch.cat([ODIN(1.0).score(net, image) for image in x.split(1)]))


def test_half_precision_gradients_do_not_vanish(net, x):
    """A gradient of 1e-5, divided by T = 1000, is below the smallest float16."""
    net.fc.weight.data.mul_(1e-2)
    direction = ODIN()._direction(net, x)
    in_half = ODIN()._direction(net.half(), x.half())
    assert (in_half == direction).double().mean() > 0.9
    assert ODIN().score(net, x.half()).dtype == torch.float64


def test_in_a_set_beside_others(net, x):
    together = DetectorSet([MSP(), ODIN()])
    scores = together.score(net, x)
    torch.testing.assert_close(scores["ODIN"], ODIN().score(net, x))
    torch.testing.assert_close(scores["MSP"], MSP().score(net, x))


def test_features_are_refused():
    for call in (ODIN().score_features, ODIN(), ODIN().predict):
        with pytest.raises(RuntimeError, match=r"ODIN scores inputs, not features or logits: call score\(model, x\)"):
            call(torch.randn(2, 3), torch.randn(2, 3))


def test_nan_is_refused_and_named(net, x):
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="logits: got NaN in 1 of 3 rows, the first is row 1"):
        ODIN().score(net, x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ({"pixel_values": torch.randn(2, 3, 5, 5)}, TypeError, "x: got dict, expected a tensor"),
        (torch.zeros(2, 3, 5, 5, dtype=torch.uint8), TypeError, r"x: got dtype torch\.uint8, expected floating point"),
        (torch.randn(2, 4, 5, 5), ValueError, r"x: got shape \(2, 4, 5, 5\), expected \(n, 3, \.\.\.\)"),
    ],
)
def test_inputs_that_cannot_be_moved(net, x, error, message):
    with pytest.raises(error, match=message):
        ODIN(std=STD).score(net, x)


def test_a_loader_is_scored_as_its_batches_are(net, x):
    expected = ODIN(eps=0.5).score(net, x)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(len(x))), batch_size=2)
    torch.testing.assert_close(ODIN(eps=0.5).score(net, loader), expected)
    torch.testing.assert_close(DetectorSet([ODIN(eps=0.5)]).score(net, loader)["ODIN"], expected)
    with pytest.raises(ValueError, match="x: got a loader without a batch"):
        ODIN().score(net, [])


def test_what_is_no_model(x):
    with pytest.raises(TypeError, match="model: got NoneType"):
        ODIN().score(None, x)


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"temperature": 0}, ValueError),
        ({"eps": -0.1}, ValueError),
        ({"std": (0.5, 0.0)}, ValueError),
        ({"std": ("a",)}, TypeError),
        ({"sign_of_zero": -1}, ValueError),
    ],
)
def test_bad_parameters(keywords, error):
    with pytest.raises(error):
        ODIN(**keywords)


def test_a_state_dict_of_nothing():
    assert ODIN().fitted
    assert list(ODIN().state_dict()) == []


@pytest.mark.parametrize("std", [None, STD])
def test_scores_are_those_of_pytorch_ood(net, x, std):
    peer = pytest.importorskip("pytorch_ood").detector
    other = peer.ODIN(net, norm_std=None if std is None else list(std))
    torch.testing.assert_close(ODIN(std=std).score(net, x), -other.predict(x), rtol=1e-12, atol=0)
