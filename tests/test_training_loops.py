"""The loss inside other people's training code: a small real model trained a few steps, beside the plain path.

The plain path is the same loop with `reference.elogitnorm`, the literal definition under autograd, unless a test says
which other path it compares with. What needs several processes is in `test_distributed.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import Batch
from torch import nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import ood_fast
from ood_fast import ops, reference
from ood_fast.eager import boundary

N_SAMPLES, N_PIXELS, N_CLASSES = 12, 8, 5


class Classifier(nn.Module):
    """A convolution, a hidden layer and a head."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, stride=2)
        self.body = nn.Linear(27, 6)
        self.fc = nn.Linear(6, N_CLASSES, bias=bias)

    def features(self, x):
        return torch.relu(self.body(torch.relu(self.stem(x)).flatten(1)))

    def forward(self, x):
        return self.fc(self.features(x))


@pytest.fixture
def model() -> Classifier:
    return Classifier()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.randn(N_SAMPLES, 1, N_PIXELS, N_PIXELS), torch.randint(0, N_CLASSES, (N_SAMPLES,))) for _ in range(4)
    ]


@pytest.fixture(autouse=True)
def eager_backend():
    with ops.use_backend("eager"):
        yield


def plain_loss(model: nn.Module, x, y, head: nn.Module | None = None, **keywords):
    head = model.fc if head is None else head
    return reference.elogitnorm(model(x), None, head.weight, None, y, **keywords)


def train(model: nn.Module, batches, loss_of, lr: float = 0.1) -> list[float]:
    """The losses of a plain loop; `loss_of` is (model, x, y) -> loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def criterion_loss(model, x, y):
    return ood_fast.ELogitNormLoss(model, "fc")(model(x), y)


def assert_same_training(ours: nn.Module, plain: nn.Module, losses, plain_losses, rtol=1e-4, atol=1e-5) -> None:
    torch.testing.assert_close(losses, plain_losses, rtol=rtol, atol=atol)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def train_both(model, batches, loss_of=criterion_loss, plain_of=plain_loss, **tolerance) -> None:
    """Train copies of `model` with both losses; the same losses, the same parameters."""
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    assert_same_training(ours, plain, train(ours, batches, loss_of), train(plain, batches, plain_of), **tolerance)


def test_plain_loop(model, batches):
    train_both(model, batches)


# ----------------------------------------------------------------------------------------------------------------------
# Precision
# ----------------------------------------------------------------------------------------------------------------------


def test_autocast_bfloat16(model, batches):
    """Model and loss inside autocast: the plain path takes the same bf16 logits, and its arithmetic in float32."""

    def inside(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
            assert logits.dtype == torch.bfloat16
            loss = ood_fast.ELogitNormLoss(model.fc)(logits, y)
        assert loss.dtype == torch.float32
        return loss

    def plain(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        return reference.elogitnorm(logits.float(), None, model.fc.weight, None, y)

    train_both(model, batches, inside, plain)


@pytest.mark.gpu
def test_autocast_float16_and_grad_scaler(model, batches):
    def run(loss_of):
        trained = copy.deepcopy(model).cuda()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = loss_of(trained, x.cuda(), y.cuda())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() == 2.0**10, "a gradient was not finite"
        return trained, losses

    def plain(model, x, y):
        logits = model(x)
        with torch.autocast("cuda", enabled=False):
            return reference.elogitnorm(logits.float(), None, model.fc.weight, None, y)

    with ops.use_backend("auto"):
        ours, losses = run(criterion_loss)
    plain_model, plain_losses = run(plain)
    assert_same_training(ours, plain_model, losses, plain_losses, rtol=2e-3, atol=2e-3)


def test_float32_master_weights(model, batches):
    """Forward and backward in bf16 copies, the step in float32: as by hand with the plain loss on the same copies."""

    def run(loss_function):
        master, working = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
        optimizer = torch.optim.SGD(master.parameters(), lr=0.1)
        losses = []
        for x, y in batches:
            with torch.no_grad():
                for low, high in zip(working.parameters(), master.parameters(), strict=True):
                    low.copy_(high)
                    low.grad = None
            loss = loss_function(working, x.bfloat16(), y)
            loss.backward()
            for low, high in zip(working.parameters(), master.parameters(), strict=True):
                high.grad = low.grad.float()
            optimizer.step()
            losses.append(loss.item())
        return master, losses

    ours, losses = run(criterion_loss)
    plain, plain_losses = run(
        lambda model, x, y: reference.elogitnorm(model(x).float(), None, model.fc.weight.float(), None, y)
    )
    # Between the two a bf16 gradient may round to the other neighbour: 2^-8 of it, times the learning rate.
    assert_same_training(ours, plain, losses, plain_losses, rtol=1e-3, atol=5e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients in pieces
# ----------------------------------------------------------------------------------------------------------------------


def test_gradient_accumulation_equals_the_joined_batch(model, batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    joined, pieces = copy.deepcopy(model), copy.deepcopy(model)
    criterion_loss(joined, x, y).backward()
    for part_x, part_y in batches:
        (criterion_loss(pieces, part_x, part_y) / len(batches)).backward()
    for a, b in zip(pieces.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(model, batches, use_reentrant):
    """The body recomputed, and the loss with the head inside a checkpoint too: the very numbers of the loop without."""

    def tail(model, z, y):
        return ood_fast.ELogitNormLoss(model.fc)(model.fc(z), y)

    def checkpointed(model, x, y):
        z = checkpoint(model.features, x.requires_grad_(), use_reentrant=use_reentrant)
        return checkpoint(tail, model, z, y, use_reentrant=use_reentrant)

    train_both(model, batches, checkpointed, criterion_loss, rtol=0, atol=0)


def test_double_backward_is_a_clear_error(model, batches):
    """A gradient penalty: the error names the function and what to use instead, which then works."""
    x, y = batches[0]

    def penalty(loss):
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + sum(g.square().sum() for g in grads)

    objective = penalty(criterion_loss(model, x, y))
    with pytest.raises(RuntimeError, match=r"ood_fast\.elogitnorm: second derivatives .*ood_fast\.reference"):
        objective.backward()
    penalty(plain_loss(model, x, y)).backward()


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile, CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_model_loss_and_backward(model, batches, compiler):
    torch.compiler.reset()
    criteria = {}

    def compiled(model, x, y):
        if "step" not in criteria:
            criterion = ood_fast.ELogitNormLoss(model, "fc")
            step = lambda x, y: criterion(model(x), y)  # noqa: E731
            criteria["step"] = torch.compile(step, fullgraph=True, backend=compiler)
        return criteria["step"](x, y)

    train_both(model, batches, compiled)


@pytest.mark.gpu
def test_cuda_graph_capture(model, batches):
    """Forward, loss, backward and step replayed from one graph: the training of the loop that launches them."""
    device_batches = [(x.cuda(), y.cuda()) for x, y in batches]

    def capturable_step(trained, criterion, optimizer, x, y):
        loss = criterion(trained(x), y)
        loss.backward()
        optimizer.step()
        return loss

    def build():
        trained = copy.deepcopy(model).cuda()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)  # a tensor as lr would be read by the host
        return trained, ood_fast.ELogitNormLoss(trained.fc), optimizer

    with ops.use_backend("auto"):
        plain = build()
        plain_losses = []
        for x, y in device_batches:
            plain[2].zero_grad()
            plain_losses.append(capturable_step(*plain, x, y).item())

        captured = build()
        start = copy.deepcopy(captured[0].state_dict())
        static_x, static_y = (t.clone() for t in device_batches[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: kernels compile and gradients get their memory outside the capture
            for _ in range(3):
                captured[2].zero_grad(set_to_none=True)
                capturable_step(*captured, static_x, static_y)
        torch.cuda.current_stream().wait_stream(stream)
        captured[0].load_state_dict(start)
        captured[2].zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # a host sync in here is an error
            captured[2].zero_grad(set_to_none=True)
            static_loss = capturable_step(*captured, static_x, static_y)
        captured[0].load_state_dict(start)
        losses = []
        for x, y in device_batches:
            static_x.copy_(x)
            static_y.copy_(y)
            graph.replay()
            losses.append(static_loss.item())
    assert_same_training(captured[0], plain[0], losses, plain_losses)


# ----------------------------------------------------------------------------------------------------------------------
# torch.func
# ----------------------------------------------------------------------------------------------------------------------


def functional_loss(function=ood_fast.elogitnorm, **keywords):
    """(parameters, x, y) -> loss of `Classifier`, as torch.func wants it."""
    model = Classifier()

    def loss(parameters, x, y):
        return function(functional_call(model, parameters, x), None, parameters["fc.weight"], None, y, **keywords)

    return loss, {name: p.detach() for name, p in model.named_parameters()}


def assert_same_tree(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def test_func_grad_trains(batches):
    loss, parameters = functional_loss()
    plain, plain_parameters = functional_loss(reference.elogitnorm)
    plain_parameters = dict(parameters)
    for x, y in batches:
        gradients = grad(loss)(parameters, x, y)
        parameters = {name: p - 0.1 * gradients[name] for name, p in parameters.items()}
        expected = {name: p.clone().requires_grad_() for name, p in plain_parameters.items()}
        gradients = torch.autograd.grad(plain(expected, x, y), list(expected.values()))
        plain_parameters = {name: p - 0.1 * g for (name, p), g in zip(plain_parameters.items(), gradients, strict=True)}
    assert_same_tree(parameters, plain_parameters)


def test_func_gradients_of_each_sample(batches):
    """vmap(grad), as differential privacy and influence functions use it: a loop over the samples gives the same."""
    x, y = batches[0]
    loss, parameters = functional_loss()
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x[:, None], y[:, None])
    expected = [grad(loss)(parameters, x[i : i + 1], y[i : i + 1]) for i in range(N_SAMPLES)]
    assert_same_tree(each, {name: torch.stack([g[name] for g in expected]) for name in parameters})


def test_func_ensemble(batches):
    """vmap over the parameters of several models, differentiated from outside."""
    x, y = batches[0]
    loss, parameters = functional_loss()
    stacked = {name: torch.stack([p, 1.5 * p]) for name, p in parameters.items()}
    ours = grad(lambda stacked: vmap(loss, in_dims=(0, None, None))(stacked, x, y).sum())(stacked)
    expected = [grad(loss)({name: p[i] for name, p in stacked.items()}, x, y) for i in range(2)]
    assert_same_tree(ours, {name: torch.stack([g[name] for g in expected]) for name in stacked})


@pytest.mark.parametrize("name", ["elogitnorm", "linear_elogitnorm", "logitnorm", "boundary_distance", "nci_score"])
def test_func_vjp_and_jacrev_of_every_function(name, backend):
    batch = Batch.of(6, 5, 4, device=backend.device)
    mean = torch.zeros(4, device=backend.device)
    own = {
        "elogitnorm": lambda module, f, W, z: module.elogitnorm(f, None, W, None, batch.y, reduction="none"),
        "linear_elogitnorm": lambda module, f, W, z: (
            (
                ood_fast.linear_elogitnorm(z, W, batch.b, batch.y, reduction="none")
                if module is ood_fast
                else reference.elogitnorm(F.linear(z, W, batch.b), z, W, batch.b, batch.y, reduction="none")
            )
            + 0 * f.sum()
        ),
        "logitnorm": lambda module, f, W, z: module.logitnorm(f, batch.y, reduction="none") + 0 * W.sum(),
        "boundary_distance": lambda module, f, W, z: module.boundary_distance(f, W),
        "nci_score": lambda module, f, W, z: module.nci_score(z, W, None, mean) + 0 * f.sum(),
    }[name]
    args = batch.logits, batch.W, batch.z
    plain = torch.autograd.functional.jacobian(lambda *args: own(reference, *args), args)
    for ours, expected in zip(jacrev(lambda *a: own(ood_fast, *a), argnums=(0, 1, 2))(*args), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(6, device=backend.device)
    _, pull = vjp(lambda *args: own(ood_fast, *args), *args)
    for ours, jacobian in zip(pull(upstream), plain, strict=True):
        torch.testing.assert_close(ours, torch.tensordot(upstream, jacobian, 1), rtol=1e-4, atol=1e-5)


def forward_mode(loss, f):
    with torch.autograd.forward_ad.dual_level():
        return loss(torch.autograd.forward_ad.make_dual(f, f))


NOT_IMPLEMENTED = {
    "jvp": (lambda loss, f: torch.func.jvp(loss, (f,), (f,)), "forward-mode derivatives .*use reverse mode"),
    "batch": (
        lambda loss, f: torch.autograd.functional.jacobian(loss, f, vectorize=True),
        "batches of upstream gradients .*use torch.func.jacrev",
    ),
    "hessian": (lambda loss, f: torch.func.hessian(loss)(f), "forward-mode derivatives .*use reverse mode"),
    "dual numbers": (forward_mode, "forward-mode derivatives .*use reverse mode"),
    "grad of grad": (
        lambda loss, f: grad(lambda f: grad(loss)(f).square().sum())(f),
        "second derivatives .*ood_fast.reference",
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp's own
@pytest.mark.parametrize("transform", NOT_IMPLEMENTED)
def test_func_what_is_not_implemented_says_so(transform):
    batch = Batch.of(6, 5, 4)
    run, message = NOT_IMPLEMENTED[transform]
    with pytest.raises(RuntimeError, match=rf"ood_fast\.elogitnorm: {message}"):
        run(lambda f: ood_fast.elogitnorm(f, None, batch.W, None, batch.y), batch.logits)


HOOKED = {
    "elogitnorm": lambda b: ood_fast.elogitnorm(b.logits, None, b.W, None, b.y),
    "elogitnorm, none": lambda b: ood_fast.elogitnorm(b.logits, None, b.W, None, b.y, reduction="none"),
    "linear_elogitnorm": lambda b: ood_fast.linear_elogitnorm(b.z, b.W, b.b, b.y, reduction="none"),
    "logitnorm": lambda b: ood_fast.logitnorm(b.logits, b.y),
    "boundary_distance": lambda b: ood_fast.boundary_distance(b.logits, b.W),
    "nci_score": lambda b: ood_fast.nci_score(b.z, b.W, b.b, b.z[0].detach()),
}


@pytest.mark.parametrize("shape", [(6, 4, 5), (3, 9, 5)], ids=["n>=c", "n<c"])
@pytest.mark.parametrize("name", HOOKED)
def test_saved_tensors_that_come_back_with_other_strides(name, shape, backend):
    """Kernels read them as they lie, and nothing would tell."""
    results = []
    for unpack in (
        torch.clone,
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        torch.manual_seed(0)
        batch = Batch.of(*shape, device=backend.device)
        inputs = [t.requires_grad_() for t in (batch.logits, batch.z, batch.W, batch.b)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            out = HOOKED[name](batch)
        results.append(torch.autograd.grad(out.sum(), inputs, materialize_grads=True))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


# ----------------------------------------------------------------------------------------------------------------------
# Heads of every kind
# ----------------------------------------------------------------------------------------------------------------------


def test_head_without_bias(batches):
    train_both(Classifier(bias=False), batches)


class TiedModel(nn.Module):
    """A language model in small: the table that embeds the tokens also makes the logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(N_CLASSES, 6)
        self.body = nn.Linear(6, 6)
        self.fc = nn.Linear(6, N_CLASSES)
        self.fc.weight = self.embedding.weight

    def forward(self, tokens):
        return self.fc(torch.tanh(self.body(self.embedding(tokens).mean(1))))


def test_tied_head():
    """The gradient of embedding, logits and distances meets in one tensor."""
    batches = [(torch.randint(0, N_CLASSES, (12, 3)), torch.randint(0, N_CLASSES, (12,))) for _ in range(4)]
    model = TiedModel()
    assert model.fc.weight is model.embedding.weight
    train_both(model, batches)


@pytest.mark.parametrize("n_samples", [12, 3], ids=["n>=c", "n<c"])
def test_frozen_head_computes_no_weight_gradient(model, batches, n_samples, monkeypatch):
    """Not the product, and not the sums over samples that feed it; the layers below train as in the plain loop."""
    products = []
    monkeypatch.setattr(boundary, "weight_gradient", lambda *args: products.append(args))
    model.fc.requires_grad_(False)
    train_both(model, [(x[:n_samples], y[:n_samples]) for x, y in batches])
    assert not products
    monkeypatch.undo()
    # The matrix products of forward and backward: without a weight gradient, those of the distances alone.
    x, y = (t[:n_samples] for t in batches[0])
    logits = model(x).detach().requires_grad_()
    n_products = {}
    for frozen, detach_geometry in ((True, False), (False, True), (False, False)):
        model.fc.requires_grad_(not frozen)
        criterion = ood_fast.ELogitNormLoss(model.fc, detach_geometry=detach_geometry)
        n_products[frozen, detach_geometry] = count_products(lambda c=criterion: c(logits, y).backward())
    assert n_products[True, False] == n_products[False, True] < n_products[False, False]


def count_products(step) -> int:
    """How many matrix products ATen runs in `step`; pdist's gradient is one for few classes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_pdist_backward")
    return sum(event.count for event in profile.key_averages() if event.key in names)


def test_frozen_body(model, batches):
    """Only the head is trained, as in the last stage of fine-tuning: then no gradient is asked of the features."""
    for part in (model.stem, model.body):
        part.requires_grad_(False)
    train_both(model, batches)


def test_weight_norm_head(model, batches):
    model.fc = parametrizations.weight_norm(model.fc)
    names = {name for name, _ in model.fc.named_parameters()}
    assert names == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}
    train_both(model, batches)


class RowsOfUnitLength(nn.Module):
    def forward(self, weight):
        return F.normalize(weight, dim=1)


@pytest.mark.parametrize("cached", [False, True], ids=["recomputed", "parametrize.cached"])
def test_parametrized_head(model, batches, cached):
    parametrize.register_parametrization(model.fc, "weight", RowsOfUnitLength())

    def loss_of(model, x, y):
        with parametrize.cached():
            return criterion_loss(model, x, y)

    train_both(model, batches, loss_of if cached else criterion_loss)


def test_l2_normalised_head(model, batches):
    model.fc = ood_fast.L2NormLinear(6, N_CLASSES, tau=0.5)

    def plain(model, x, y):
        return reference.elogitnorm(model(x), None, model.fc.weight / model.fc.tau, None, y)

    train_both(model, batches, plain_of=plain)


def test_criterion_adds_no_parameters(model, batches):
    """state_dict, parameters and an optimiser's lists are those of the model alone, wherever the criterion lives."""
    before = list(model.state_dict())
    n_parameters = len(list(model.parameters()))
    by_layer, by_name = ood_fast.ELogitNormLoss(model.fc), ood_fast.ELogitNormLoss(model, "fc")
    for criterion in (by_layer, by_name):
        assert list(criterion.state_dict()) == list(criterion.parameters()) == list(criterion.buffers()) == []
    model.criterion = by_layer
    model.other = by_name
    assert list(model.state_dict()) == before
    assert len(list(model.parameters())) == n_parameters
    optimizer = torch.optim.AdamW([*model.parameters(), *by_layer.parameters(), *by_name.parameters()])
    assert [len(group["params"]) for group in optimizer.param_groups] == [n_parameters]
    x, y = batches[0]
    by_layer(model(x), y).backward()
    optimizer.step()
    reloaded = Classifier()
    reloaded.load_state_dict(model.state_dict())
    assert torch.equal(criterion_loss(reloaded, x, y), by_layer(model(x), y))


def test_heads_are_followed_in_mid_training(model, batches):
    """Casts and moves, `to_empty`, a loaded checkpoint, `parametrize`, a new layer: each call reads what is there."""
    by_layer, by_name = ood_fast.ELogitNormLoss(model.fc), ood_fast.ELogitNormLoss(model, "fc")
    x, y = batches[0]

    def check(criteria=(by_layer, by_name)):
        for criterion in criteria:
            torch.testing.assert_close(
                criterion(model(x), y), plain_loss(model, x, y).to(criterion(model(x), y).dtype), rtol=1e-4, atol=1e-5
            )

    check()
    model.double()
    x = x.double()
    assert by_layer(model(x), y).dtype == torch.float64
    check()
    model.float()
    x = x.float()
    model.to("meta").to_empty(device="cpu").load_state_dict(Classifier().state_dict())
    check()
    model.load_state_dict(Classifier().state_dict(), assign=True)
    check()
    parametrizations.weight_norm(model.fc)
    check()
    model.fc = nn.Linear(6, 7)
    check((by_name,))
    assert by_name.head is model.fc


# ----------------------------------------------------------------------------------------------------------------------
# Dense prediction
# ----------------------------------------------------------------------------------------------------------------------

PLACES = [(7,), (3, 4), (2, 3, 2)]


class Segmenter(nn.Module):
    """The head is a convolution of one place: its weight (c, m, 1, 1) is the W (c, m) of every place."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 6, 3, padding=1)
        self.fc = nn.Conv2d(6, N_CLASSES, 1)

    def forward(self, x):
        return self.fc(torch.relu(self.body(x)))


def as_rows(dense):
    """(n, c, d1, ...) -> (n', c), or (n, d1, ...) -> (n',): by permute, not by what the package does."""
    if dense.is_floating_point() and dense.dim() > 1:
        return dense.flatten(2).permute(0, 2, 1).flatten(0, 1)
    return dense.flatten()


def test_segmentation_model(batches):
    """Trained on maps of (n, c, h, w), and beside it the plain path on rows."""
    model = Segmenter()
    maps = [(x, torch.randint(0, N_CLASSES, x[:, 0].shape)) for x, _ in batches]
    for _, y in maps:
        y[:, 0] = -100

    def plain(model, x, y):
        return reference.elogitnorm(as_rows(model(x)), None, model.fc.weight[:, :, 0, 0], None, as_rows(y))

    train_both(model, maps, plain_of=plain)


def test_convolutions_that_are_no_linear_head():
    for head in (nn.Conv2d(6, 5, 3), nn.Conv2d(6, 4, 1, groups=2)):
        with pytest.raises(TypeError, match=r"head: Conv2d has no 2-D weight .*expected a linear layer"):
            ood_fast.ELogitNormLoss(head)


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_dense_prediction_is_a_sample_a_place(places, reduction, target):
    n_places = torch.Size(places).numel()
    rows = Batch.of(4 * n_places, N_CLASSES, 6)
    y = rows.y if target == "indices" else torch.rand_like(rows.logits).softmax(1)
    keywords = {"reduction": reduction, "weight": torch.rand(N_CLASSES) + 0.1, "label_smoothing": 0.1}

    def dense(t):
        return t.view(4, *places, *t.shape[1:]).movedim(-1, 1).contiguous() if t.dim() == 2 else t.view(4, *places)

    flat, maps = rows.logits.clone().requires_grad_(), dense(rows.logits).requires_grad_()
    expected, expected_distance = ood_fast.elogitnorm(flat, rows.z, rows.W, rows.b, y, return_distance=True, **keywords)
    before = maps.detach().clone()
    loss, distance = ood_fast.elogitnorm(
        maps, dense(rows.z), rows.W, rows.b, dense(y), return_distance=True, **keywords
    )
    assert loss.shape == F.cross_entropy(maps, dense(y), **keywords).shape
    torch.testing.assert_close(loss, expected.view_as(loss))
    assert torch.equal(distance, expected_distance.view(4, *places))
    assert torch.equal(ood_fast.boundary_distance(maps, rows.W), distance)
    loss.sum().backward()
    expected.sum().backward()
    assert torch.equal(maps.grad, dense(flat.grad))
    assert torch.equal(maps, before)
    assert torch.equal(
        ood_fast.logitnorm(maps, dense(y), **keywords), ood_fast.logitnorm(flat, y, **keywords).view_as(loss)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0)], ids=str)
def test_dense_prediction_of_nothing(shape, reduction):
    maps, W = torch.randn(shape), torch.randn(5, 6)
    y = torch.zeros(shape[0], shape[2], dtype=torch.int64)
    loss, distance = ood_fast.elogitnorm(maps, None, W, None, y, reduction=reduction, return_distance=True)
    assert distance.shape == y.shape
    torch.testing.assert_close(loss, F.cross_entropy(maps, y, reduction=reduction), equal_nan=True)


BAD_DENSE = {
    "y without the places": (
        {"y": torch.zeros(2).long()},
        r"y: got torch.int64 of shape \(2,\), expected int64 class ",
    ),
    "y with other places": (
        {"y": torch.zeros(2, 4, 3).long()},
        r"expected int64 class indices of shape \(2, 3, 4\) or float class probabilities of shape \(2, 5, 3, 4\)",
    ),
    "classes last": (
        {"logits": torch.randn(2, 3, 4, 5)},
        r"W: got shape \(5, 6\), expected \(3, m\), one row for each of the 3 classes of logits \(2, 3, 4, 5\)",
    ),
    "z without the places": (
        {"z": torch.randn(2, 6)},
        r"z: got shape \(2, 6\), expected 4 dimensions \(n, m, d1, ...\)",
    ),
    "z with other places": (
        {"z": torch.randn(2, 6, 4, 3)},
        r"z: got shape \(2, 6, 4, 3\), expected \(2, 6, 3, 4\) to fit logits \(2, 5, 3, 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD_DENSE)
def test_bad_dense_input(case):
    changes, message = BAD_DENSE[case]
    arguments = {
        "logits": torch.randn(2, 5, 3, 4),
        "z": None,
        "W": torch.randn(5, 6),
        "b": None,
        "y": torch.zeros(2, 3, 4, dtype=torch.int64),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        ood_fast.elogitnorm(**arguments)
    with pytest.raises(ValueError, match=r"logits: got shape \(5,\), expected 2 dimensions \(n, c\)"):
        ood_fast.boundary_distance(torch.randn(5), arguments["W"])
