"""The loss modules, and what bad input says."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import Batch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ood_fast
from ood_fast.heads import L2NormLinear


class Classifier(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.fc = nn.Linear(6, n_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.body(x)))


def expected_loss(model, x, y, **keywords):
    return ood_fast.elogitnorm(model(x), None, model.fc.weight, None, y, **keywords)


@pytest.fixture
def data():
    return torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])


def test_one_line_changed_in_a_training_loop(data):
    x, y = data
    model = Classifier()
    criterion = ood_fast.ELogitNormLoss(model.fc)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_criterion_equals_the_function(data):
    x, y = data
    model = Classifier()
    weight = torch.tensor([1.0, 2.0, 0.5])
    keywords = {"label_smoothing": 0.1, "average": "classes", "reduction": "sum", "eps": 1e-3, "ignore_index": 1}
    criterion = ood_fast.ELogitNormLoss(model.fc, weight=weight, **keywords)
    assert torch.equal(criterion(model(x), y), expected_loss(model, x, y, weight=weight, **keywords))
    loss, distance = ood_fast.ELogitNormLoss(model.fc, return_distance=True, detach_geometry=True)(model(x), y)
    assert torch.equal(distance, ood_fast.boundary_distance(model(x), model.fc.weight).detach())
    assert torch.equal(loss, expected_loss(model, x, y))
    criterion = ood_fast.LogitNormLoss(tau=0.1, label_smoothing=0.1)
    assert torch.equal(criterion(model(x), y), ood_fast.logitnorm(model(x), y, tau=0.1, label_smoothing=0.1))


def test_criterion_owns_no_parameters_and_follows_the_head(data):
    x, y = data
    model = Classifier()
    by_layer = ood_fast.ELogitNormLoss(model.fc, weight=torch.ones(3))
    by_name = ood_fast.ELogitNormLoss(model, "fc")
    assert not list(by_layer.parameters())
    assert not list(by_name.modules())[1:]
    model.double()
    by_layer.double()
    assert by_layer(model(x.double()), y).dtype == torch.float64
    model.fc = nn.Linear(6, 5).double()
    assert torch.equal(by_name(model(x.double()), y), expected_loss(model, x.double(), y))


def test_copies_keep_their_own_head(data):
    x, y = data
    model = Classifier()
    model.criterion = ood_fast.ELogitNormLoss(model.fc)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert torch.equal(clone.criterion(clone(x), y), expected_loss(clone, x, y))
    assert clone.criterion.head is clone.fc


def test_criterion_finds_the_head_inside_wrappers():
    model = Classifier()
    wrapped = nn.DataParallel(model)
    assert ood_fast.ELogitNormLoss(wrapped, "fc").head is model.fc
    compiled = torch.compile(model, backend="eager")
    assert ood_fast.ELogitNormLoss(compiled, "fc").head is model.fc


def test_criterion_repr_names_what_matters():
    text = repr(ood_fast.ELogitNormLoss(Classifier(), "fc", eps=1e-3))
    assert "name='fc'" in text
    assert "eps=0.001" in text
    assert "tau=0.1" in repr(ood_fast.LogitNormLoss(0.1))


def test_bad_heads():
    with pytest.raises(TypeError, match=r"head: got Tensor, expected the last linear layer"):
        ood_fast.ELogitNormLoss(torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"head: Classifier has no 2-D weight.*ELogitNormLoss\(model, 'fc'\)"):
        ood_fast.ELogitNormLoss(Classifier())
    with pytest.raises(ValueError, match=r"unknown layer of Classifier 'fcc'; known: body, fc; did you mean 'fc'"):
        ood_fast.ELogitNormLoss(Classifier(), "fcc")


def test_an_output_that_holds_logits_is_told_so():
    output, y = SimpleNamespace(logits=torch.randn(2, 3)), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"logits: got SimpleNamespace, expected .*; pass its \.logits$"):
        ood_fast.ELogitNormLoss(nn.Linear(4, 3))(output, y)


def test_a_replaced_head_of_another_size_is_suspected(data):
    x, y = data
    model = Classifier()
    by_layer, by_name = ood_fast.ELogitNormLoss(model.fc), ood_fast.ELogitNormLoss(model, "fc")
    compiled = torch.compile(by_layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(model(x), y), by_layer(model(x), y))
    model.fc = nn.Linear(6, 4)
    suspicion = r"was the head replaced\? ELogitNormLoss\(model, 'fc'\) follows it$"
    with pytest.raises(ValueError, match=rf"W: got shape \(3, 6\), expected \(4, m\).*{suspicion}"):
        by_layer(model(x), y)
    assert torch.equal(by_name(model(x), y), expected_loss(model, x, y))
    for call in (
        lambda: by_name(torch.randn(5, 3), y),  # follows the head: the logits are wrong
        lambda: by_layer(torch.randn(5), y),
        lambda: ood_fast.elogitnorm(model(x), None, torch.randn(3, 6), None, y),
    ):
        with pytest.raises(ValueError, match="got shape") as caught:
            call()
        assert "replaced" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: the argument, what came, what was expected
# ----------------------------------------------------------------------------------------------------------------------


def elogitnorm(**changes):
    batch = Batch.of(5, 4, 3)
    arguments = {"logits": batch.logits, "z": batch.z, "W": batch.W, "b": batch.b, "y": batch.y, **changes}
    return ood_fast.elogitnorm(**arguments)


BAD = {
    "rank of logits": (
        {"logits": torch.randn(5)},
        ValueError,
        r"logits: got shape \(5,\), expected 2 dimensions \(n, c\)",
    ),
    "integer logits": (
        {"logits": torch.ones(5, 4).long()},
        TypeError,
        r"logits: got dtype torch.int64, expected a floating",
    ),
    "logits of lists": ({"logits": [[1.0]]}, TypeError, r"logits: got list, expected a tensor"),
    "no class": ({"logits": torch.empty(5, 0)}, ValueError, r"logits: got shape \(5, 0\), expected at least one class"),
    "c of W": ({"W": torch.randn(6, 3)}, ValueError, r"W: got shape \(6, 3\), expected \(4, m\), one row for each"),
    "rank of W": ({"W": torch.randn(4)}, ValueError, r"W: got shape \(4,\)"),
    "c of b": ({"b": torch.randn(5)}, ValueError, r"b: got shape \(5,\), expected \(4,\)"),
    "m of z": ({"z": torch.randn(5, 7)}, ValueError, r"z: got shape \(5, 7\), expected \(n, 3\) to fit W"),
    "n of z": ({"z": torch.randn(6, 3)}, ValueError, r"z: got 6 rows, expected 5"),
    "n of y": (
        {"y": torch.zeros(6).long()},
        ValueError,
        r"y: got torch.int64 of shape \(6,\), expected int64 class indices",
    ),
    "dtype of y": ({"y": torch.zeros(5).int()}, TypeError, r"y: got dtype torch.int32, expected int64"),
    "float indices": (
        {"y": torch.zeros(5)},
        ValueError,
        r"y: got torch.float32 of shape \(5,\), expected int64 class indices",
    ),
    "y out of range": ({"y": torch.tensor([0, 1, 4, 0, 0])}, IndexError, r"y: target 4 at position 2 is out of bounds"),
    "negative y": ({"y": torch.tensor([0, -1, 2, 0, 0])}, IndexError, r"y: target -1 at position 1 is out of bounds"),
    "y wants a gradient": ({"y": torch.rand(5, 4, requires_grad=True)}, ValueError, r"y: requires grad"),
    "c of weight": ({"weight": torch.ones(3)}, ValueError, r"weight: got shape \(3,\), expected \(4,\)"),
    "reduction": ({"reduction": "avg"}, ValueError, r"reduction: got 'avg', expected one of 'mean', 'sum', 'none'"),
    "average": ({"average": "class"}, ValueError, r"average: got 'class', expected one of 'boundaries', 'classes'"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: got 1.5, expected a number in \[0.0, 1.0\]"),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, r"ignore_index: got float 1.0, expected an int"),
    "eps": ({"eps": -1.0}, ValueError, r"eps: got -1.0"),
    "eps as text": ({"eps": "small"}, TypeError, r"eps: got str 'small', expected a number"),
    "device of W": (
        {"W": torch.randn(4, 3, device="meta")},
        ValueError,
        r"W: is on meta, expected cpu, where logits is",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        elogitnorm(**changes)


def test_bad_index_raises_through_the_kernels_too(backend):
    if backend.device.type != "cpu":
        pytest.skip("on a GPU the loss is NaN instead")
    with pytest.raises(IndexError, match="target 9 at position 0"):
        elogitnorm(y=torch.tensor([9, 0, 0, 0, 0]))
    with pytest.raises(IndexError, match="target 9 at position 0"):
        ood_fast.logitnorm(torch.randn(2, 3), torch.tensor([9, 0]))


@pytest.mark.gpu
def test_bad_index_is_nan_on_a_gpu():
    batch = Batch.of(4, 3, 2, device="cuda")
    batch.y[1] = 77
    logits = batch.logits.requires_grad_()
    loss = ood_fast.elogitnorm(logits, None, batch.W, None, batch.y, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    loss.nansum().backward()
    torch.cuda.synchronize()


def test_bad_input_of_the_others():
    batch = Batch.of(5, 4, 3)
    mean = torch.zeros(3)
    with pytest.raises(ValueError, match=r"tau: got 0, expected a number in \(0.0, inf\]"):
        ood_fast.logitnorm(batch.logits, batch.y, tau=0)
    with pytest.raises(ValueError, match=r"mean: got shape \(4,\), expected \(3,\)"):
        ood_fast.nci_score(batch.z, batch.W, batch.b, torch.zeros(4))
    with pytest.raises(ValueError, match=r"z: got 5 rows, expected 6"):
        ood_fast.nci_score(batch.z, batch.W, batch.b, mean, logits=torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"W: got shape \(4, 3\), expected \(5, m\)"):
        ood_fast.boundary_distance(torch.randn(5, 5), batch.W)
    with pytest.raises(TypeError, match=r"z: got torch.int64, expected a floating-point tensor"):
        ood_fast.l2_normalize(torch.ones(3).long())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ood_fast.LogitNormLoss()(batch.logits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_refused_as_integers_are(dtype):
    """SHE gave -inf for every one."""
    batch = Batch.of(5, 4, 3)
    she = ood_fast.detectors.SHE().fit_features(batch.z, batch.logits, batch.logits.argmax(1))
    for call in (
        lambda small: ood_fast.elogitnorm(small, batch.z, batch.W, batch.b, batch.y),
        lambda small: ood_fast.l2_normalize(small),
        lambda small: she.score_features(batch.z.to(dtype), batch.logits),
    ):
        with pytest.raises(TypeError, match=f"got (dtype )?{dtype}, expected a floating-point tensor"):
            call(batch.logits.to(dtype))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_copy_follows_the_copied_model_or_refuses(data, by_name):
    x, y = data
    model = Classifier()
    criterion = ood_fast.ELogitNormLoss(model, "fc") if by_name else ood_fast.ELogitNormLoss(model.fc)
    for first in (True, False):  # in either order
        pair = copy.deepcopy((model, criterion) if first else (criterion, model))
        twin, follower = pair if first else pair[::-1]
        with torch.no_grad():
            twin.fc.weight.mul_(3)
        assert follower.head is twin.fc
        assert torch.equal(follower(twin(x), y), expected_loss(twin, x, y))
        again, second = copy.deepcopy([twin, follower])
        assert second.head is again.fc
    for alone in (copy.deepcopy(criterion), copy.deepcopy([criterion])[0]):
        with pytest.raises(RuntimeError, match="copied without the model; copy both in one call"):
            alone(model(x), y)
    assert copy.copy(criterion).head is model.fc


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale_at_test", [True, False])
def test_the_temperature_of_the_head_is_part_of_its_weight(training, scale_at_test):
    torch.manual_seed(0)
    head = L2NormLinear(6, 4, tau=0.1, scale_at_test=scale_at_test).train(training)
    z, y = torch.randn(9, 6), torch.arange(9) % 4
    logits = head(z)
    _, distance = ood_fast.ELogitNormLoss(head, return_distance=True)(logits, y)
    tau = 0.1 if training or scale_at_test else 1.0
    torch.testing.assert_close(distance, ood_fast.boundary_distance(logits, head.weight / tau))


@pytest.mark.parametrize("dense", [(), (3,)])
def test_one_logit_is_refused_with_the_cure(dense):
    """Softmax over one class is 1: a binary classifier has two logits here."""
    head, y = nn.Linear(6, 1), torch.zeros(4, *dense, dtype=torch.long)
    logits, z = torch.randn(4, 1, *dense), torch.randn(4, 6)
    for loss in (
        lambda: ood_fast.ELogitNormLoss(head)(logits, y),
        lambda: ood_fast.LogitNormLoss()(logits, y),
        lambda: ood_fast.elogitnorm(logits, None, head.weight, None, y),
        lambda: ood_fast.logitnorm(logits, y),
        lambda: ood_fast.linear_elogitnorm(z, head.weight, None, y[:, 0] if dense else y),
    ):
        with pytest.raises(ValueError, match=r"got one class.*two outputs, nn\.Linear\(m, 2\)"):
            loss()


class LoRAByHand(nn.Linear):
    def __init__(self, m, c):
        super().__init__(m, c)
        self.A, self.B = nn.Parameter(torch.randn(2, m)), nn.Parameter(torch.zeros(c, 2))

    def forward(self, z):
        return super().forward(z) + z @ self.A.T @ self.B.T


class Cosine(nn.Linear):
    def forward(self, z):
        return 16 * F.linear(F.normalize(z), F.normalize(self.weight))


class Scaled(nn.Linear):
    def forward(self, z):
        return super().forward(z) / 0.1


class Margin(nn.Linear):
    def forward(self, z, y):
        return super().forward(z) - F.one_hot(y, self.out_features)


class Dropped(nn.Linear):
    def forward(self, z):
        return F.linear(F.dropout(z, 0.5, self.training), self.weight, self.bias)


@pytest.mark.parametrize("kind", [LoRAByHand, Cosine, Scaled, Margin])
def test_heads_that_work_with_another_weight_are_refused(kind):
    for given in ((kind(8, 4),), (nn.Sequential(nn.ReLU(), kind(8, 4)), "1")):
        with pytest.raises(ValueError, match=rf"head: a {kind.__name__} makes its logits otherwise than F\.linear"):
            ood_fast.ELogitNormLoss(*given)
    model = nn.Sequential(nn.ReLU(), nn.Linear(8, 4))
    criterion = ood_fast.ELogitNormLoss(model, "1")
    model[1] = kind(8, 4)
    with pytest.raises(ValueError, match=r"otherwise than F.linear"):
        criterion(torch.randn(6, 4), torch.arange(6) % 4)


def test_heads_with_a_forward_of_their_own_that_is_linear_are_taken():
    head, z, y = Dropped(8, 4), torch.randn(6, 8), torch.arange(6) % 4
    plain = nn.Linear(8, 4)
    plain.load_state_dict(head.state_dict())
    logits = head(z)
    expected = ood_fast.ELogitNormLoss(plain)(logits.detach(), y)  # of logits with a graph it knows that head made them
    assert torch.equal(ood_fast.ELogitNormLoss(head)(logits, y), expected)
    assert head.training


def test_logits_of_another_weight_are_refused(data):
    x, y = data
    model = Classifier()
    criterion, twin, wider = ood_fast.ELogitNormLoss(model.fc), copy.deepcopy(model), nn.Linear(9, 3)
    parameters = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    by_call = torch.func.functional_call(model, parameters, (x,))
    for logits in (twin(x), wider(torch.randn(len(x), 9)), by_call):
        with pytest.raises(ValueError, match=r"logits: were made by another weight \(3, \d\) .*by name"):
            criterion(logits, y)
    for made, told in ((model(x).softmax(1), "softmax"), (model(x).sigmoid(), "sigmoid")):
        with pytest.raises(ValueError, match=f"logits: got the output of a {told}, expected what the head makes"):
            criterion(made, y)
    for scaled in (model(x).log_softmax(1), 3 * model(x)):  # the same loss
        torch.testing.assert_close(criterion(scaled, y), criterion(model(x), y))
    with pytest.raises(ValueError, match="functional_call"), torch.autocast("cpu", torch.bfloat16):
        criterion(twin(x), y)
    with pytest.raises(ValueError, match="functional_call"):
        torch.func.grad(lambda p: criterion(torch.func.functional_call(model, p, (x,)), y))(parameters)
    # A transposed product, a convolution, and a head within functional_call are what they were.
    expected = ood_fast.elogitnorm(by_call, None, parameters["fc.weight"], None, y)
    both = nn.ModuleDict({"model": model, "criterion": criterion})
    both.forward = lambda x, y: criterion(model(x), y)
    assert torch.equal(
        torch.func.functional_call(both, {f"model.{n}": p for n, p in parameters.items()}, (x, y)), expected
    )
    place = nn.Conv2d(6, 3, 1)
    ood_fast.ELogitNormLoss(place)(place(torch.randn(len(x), 6, 1, 1)), y[:, None, None]).backward()
    assert place.weight.grad is not None


LOSSES_OF_Z = {
    "elogitnorm": lambda z, W, b, y: ood_fast.elogitnorm(F.linear(z, W, b), z, W, b, y),
    "linear_elogitnorm": ood_fast.linear_elogitnorm,
    "logitnorm": lambda z, W, b, y: ood_fast.logitnorm(F.linear(z, W, b), y),
    "boundary_distance": lambda z, W, b, y: ood_fast.boundary_distance(F.linear(z, W, b), W).mean(),
    "nci_score": lambda z, W, b, y: ood_fast.nci_score(z, W, b, z.mean(0).detach()).mean(),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES_OF_Z)
def test_inside_a_checkpoint(name, reentrant):
    z, W, b = (torch.randn(size, requires_grad=True) for size in ((6, 8), (4, 8), (4,)))
    inputs, y = (z, W, b), torch.arange(6) % 4
    used = inputs[:2] if name == "nci_score" else inputs
    expected = torch.autograd.grad(LOSSES_OF_Z[name](*inputs, y), used)
    checkpoint(LOSSES_OF_Z[name], *inputs, y, use_reentrant=reentrant).backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(used, expected, strict=True))


@pytest.mark.parametrize("weight", [torch.inf, -torch.inf, torch.nan])
def test_class_weights_that_are_no_numbers(backend, weight):
    """As 1 / count of a class without samples: finite where `F.cross_entropy` is."""
    f, W = torch.randn(3, 3, device=backend.device), torch.randn(3, 4, device=backend.device)
    weights = torch.tensor([weight, 1.0, 2.0], device=backend.device)
    shares = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]], device=backend.device)
    for y, smoothing in itertools.product((shares.argmax(1), shares[1:].argmax(1), shares), (0.0, 0.1)):
        keywords = {"weight": weights, "label_smoothing": smoothing, "reduction": "none"}
        expected = F.cross_entropy(f[: len(y)], y, **keywords).isfinite()
        assert torch.equal(ood_fast.elogitnorm(f[: len(y)], None, W, None, y, **keywords).isfinite(), expected)
        assert torch.equal(ood_fast.logitnorm(f[: len(y)], y, **keywords).isfinite(), expected)
