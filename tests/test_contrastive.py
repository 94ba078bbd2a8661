"""Contrastive losses: the papers' equations sample by sample, gradients, state, what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ood_fast
from ood_fast import checks, recipes
from ood_fast.training import build
from ood_fast.training.contrastive import CIDERLoss, SupConLoss
from ood_fast.training.objective import StepBatch
from ood_fast.training.palm import PALMLoss

N, C, M, D = 9, 3, 4, 5


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(M, C)


def test_supcon_is_the_papers_equation(head):
    """Anchor by anchor; the one sample of class 2 has no positive and takes part as a negative alone."""
    criterion = SupConLoss(head, projection=D, temperature=0.5, base_temperature=0.25)
    z, y = torch.randn(N, M), torch.tensor([0, 0, 1, 1, 1, 0, 2, 1, 0])
    u = F.normalize(criterion.projection(z), dim=1).tolist()
    dot = lambda i, j: sum(a * b for a, b in zip(u[i], u[j], strict=True)) / 0.5  # noqa: E731
    anchors = []
    for i in range(N):
        positives = [j for j in range(N) if j != i and y[j] == y[i]]
        total = sum(math.exp(dot(i, j)) for j in range(N) if j != i)
        if positives:
            anchors.append(-sum(math.log(math.exp(dot(i, j)) / total) for j in positives) / len(positives))
    assert len(anchors) == N - 1
    expected = 2 * sum(anchors) / len(anchors) + F.cross_entropy(head(z), y).item()
    assert criterion(z, y).item() == pytest.approx(expected, rel=1e-5)


def literal_cider(u: torch.Tensor, y: torch.Tensor, prototypes: torch.Tensor, temperature: float):
    """C, D and the prototypes, with OpenOOD's loop over the samples."""
    moved = list(prototypes)
    for row, label in zip(u, y.tolist(), strict=True):
        moved[label] = F.normalize(0.95 * moved[label] + 0.05 * row, dim=0)
    near, far = [], []
    for row, label in zip(u, y.tolist(), strict=True):
        exponentials = [(row @ p.detach() / temperature).exp() for p in moved]
        near.append(-(exponentials[label] / sum(exponentials)).log())
    for k in range(C):
        others = [(moved[k] @ moved[j] / temperature).exp() for j in range(C) if j != k]
        far.append((sum(others) / (C - 1)).log())
    return sum(near) / len(near), sum(far) / C, torch.stack(moved).detach()


def test_cider_is_the_papers_equation_with_its_gradient(head):
    criterion = CIDERLoss(head, projection=D, temperature=0.2, base_temperature=None)
    for n in (N, 5):  # from zero prototypes, then from those of the first batch
        z, y = torch.randn(n, M), torch.randint(0, C, (n,))
        y[: min(n, C)] = torch.arange(C)[:n]
        before = criterion.prototypes
        near, far, after = literal_cider(F.normalize(criterion.projection(z), dim=1), y, before, 0.2)
        expected = 2 * near + far + F.cross_entropy(head(z), y)
        literal = torch.autograd.grad(expected, list(criterion.projection.parameters()))
        loss = criterion(z, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(criterion.prototypes, after)
        for ours, theirs in zip(
            torch.autograd.grad(loss, list(criterion.projection.parameters())), literal, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not criterion.prototypes.requires_grad
    assert "prototypes" in criterion.state_dict()


def literal_palm(u: torch.Tensor, y: torch.Tensor, prototypes: torch.Tensor, settings: tuple):
    """The loss and the prototypes, as the authors' code computes them, sample by sample."""
    nearest, momentum, pull = settings
    n, k = len(u), len(prototypes)
    of = [j % C for j in range(k)]

    def assigned(protos):
        q = [[math.exp(float(u[i].detach() @ protos[j].detach()) / 0.05) for j in range(k)] for i in range(n)]
        for _ in range(3):
            totals = [sum(q[i][j] for i in range(n)) for j in range(k)]
            q = [[q[i][j] / totals[j] / k for j in range(k)] for i in range(n)]
            q = [[value / sum(row) / n for value in row] for row in q]
        return [[n * value for value in row] for row in q]

    def own(i, row):  # of the prototypes of its class those with the most weight
        mine = sorted((j for j in range(k) if of[j] == y[i]), key=lambda j: -row[j])[:nearest]
        return {j: row[j] / sum(row[j] for j in mine) for j in mine}

    taken = [own(i, row) for i, row in enumerate(assigned(prototypes))]
    moved = []
    for j in range(k):
        total = sum(taken[i].get(j, 0.0) for i in range(n))
        mean = sum((taken[i].get(j, 0.0) / total * u[i] for i in range(n)), torch.zeros(u.shape[1])) if total else 0.0
        moved.append(F.normalize(momentum * prototypes[j] + (1 - momentum) * mean, dim=0))
    near = []
    for i, row in enumerate(assigned(moved)):
        weights = {j: row[j] for j in taken[i]}
        logits = [u[i] @ p.detach() / 0.1 for p in moved]
        share = sum(value / sum(weights.values()) * logits[j] for j, value in weights.items())
        near.append(share - sum(f.exp() for f in logits).log())
    apart = []
    for j in range(k):
        logits = {s: moved[j] @ moved[s] / 0.5 for s in range(k) if s != j}
        same = [f for s, f in logits.items() if of[s] == of[j]]
        apart.append(sum(same) / len(same) - sum(f.exp() for f in logits.values()).log())
    return -sum(near) / n - pull * sum(apart) / k, torch.stack(moved).detach()


@pytest.mark.parametrize(("nearest", "pull"), [(5, 1.0), (2, 0.3), (1, 0.0)])
def test_palm_is_the_authors_code_with_its_gradient(head, nearest, pull):
    criterion = PALMLoss(head, projection=D, prototypes=3, nearest=nearest, momentum=0.8, pull=pull)
    assert criterion.prototypes.shape == (3 * C, D)
    for n in (N, 5):  # the second batch lacks a class
        z, y = torch.randn(n, M), torch.arange(n) % (C if n == N else C - 1)
        before, weights = criterion.prototypes, list(criterion.projection.parameters())
        u = F.normalize(criterion.projection(z), dim=1)
        expected, after = literal_palm(u, y, before, (min(nearest, 3), 0.8, pull))
        expected = expected + F.cross_entropy(head(z), y)
        loss = criterion(z, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(criterion.prototypes, after)
        for ours, theirs in zip(
            torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert not criterion.prototypes.requires_grad
    assert "prototypes" in criterion.state_dict()


@pytest.mark.parametrize("kind", [SupConLoss, CIDERLoss, PALMLoss])
def test_the_head_is_trained_beside_features_that_it_leaves_alone(kind, head):
    body = nn.Linear(M, M)
    criterion = kind(head, ood_fast.ELogitNormLoss(head), projection=D)
    begin = dict(criterion.named_buffers())
    x, y = torch.randn(N, M), torch.arange(N) % C
    network = lambda images: (head(body(images)), body(images))  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = criterion.step(network, StepBatch(x, y, x + 0.1))
    loss.backward()
    torch.testing.assert_close(logits.float(), head(body(x)), rtol=0.05, atol=0.05)
    of_body = body.weight.grad.clone()
    body.zero_grad()
    again = kind(
        head,
        lambda logits, y: logits.sum() * 0,
        projection=criterion.projection,
        **({"width": D} if kind is CIDERLoss else {}),
    )
    for name, value in begin.items():
        setattr(again, name, value)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = again.step(network, StepBatch(x, y, x + 0.1))
    loss.backward()
    torch.testing.assert_close(body.weight.grad, of_body)
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [CIDERLoss, PALMLoss])
def test_prototypes_stay_in_eval_mode_and_are_no_nan_after_an_overflow(kind, head):
    criterion, z, y = kind(head, projection=D), torch.randn(N, M), torch.arange(N) % C
    criterion(z, y)
    before = criterion.prototypes.clone()
    criterion.eval()(z + 3, y)
    torch.testing.assert_close(criterion.prototypes, before)
    criterion.train()(z.masked_fill(torch.arange(N)[:, None] == 4, torch.nan), y)
    assert criterion.prototypes.isfinite().all()
    assert criterion(z, y).isfinite()


def test_processes_that_talk_on_their_gpus_alone(head, monkeypatch):
    """What `init_process_group("nccl")` makes cannot reduce a tensor on the host."""
    talked = []
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "meta:nccl")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *_: talked.append(tensor.device.type))
    criterion = SupConLoss(head, projection=D).to("meta")  # in place of a GPU; its numbers cannot be read
    with pytest.raises(NotImplementedError):
        criterion.average_gradients(2)
    assert talked == ["meta"]


def test_ignored_samples_take_no_part_in_the_contrast(head):
    z, y = torch.randn(N, M), torch.arange(N) % C
    criterion = SupConLoss(head, lambda logits, y: logits.sum() * 0, projection=D)
    ignored = torch.cat([y, torch.tensor([-100, 255])])
    torch.testing.assert_close(criterion(torch.cat([z, torch.randn(2, M)]), ignored), criterion(z, y))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda head: SupConLoss(head, temperature=0.0), "temperature: got 0"),
        (lambda head: SupConLoss(head, projection=0), "projection: got 0, expected an int >= 1 or a module"),
        (lambda head: CIDERLoss(head, momentum=1.0), "momentum: got 1"),
        (lambda head: CIDERLoss(head, projection=nn.Identity()), "width: got none"),
        (lambda head: PALMLoss(head, momentum=1.0), "momentum: got 1"),
        (lambda head: PALMLoss(head, prototypes=0), "prototypes: got 0"),
        (lambda head: PALMLoss(head, nearest=0), "nearest: got 0"),
        (lambda head: PALMLoss(head, pull=-1.0), "pull: got -1"),
        (lambda head: SupConLoss(nn.Linear(M, 1)), "head: got one class"),
        (lambda head: SupConLoss(head)(torch.randn(C, M), torch.arange(C)), "y: got no two samples of a class"),
        (
            lambda head: SupConLoss(head).step(nn.Identity(), StepBatch(torch.randn(C, M), torch.arange(C))),
            "views: got none",
        ),
    ],
)
def test_what_is_refused(make, said, head):
    with pytest.raises(ValueError, match=re.escape(said)):
        make(head)


def test_recipes_say_what_is_built():
    model = nn.Sequential(nn.Flatten(), nn.Linear(M, C))
    cider = recipes.find("cifar10-cider")
    assert (cider.batch_size, cider.learning_rate, cider.weight_decay, cider.warmup_epochs) == (512, 0.5, 1e-4, 10)
    made = build.objective_of(recipes.override(cider, ["label_smoothing=0.1"]), model)
    assert isinstance(made, CIDERLoss)
    assert made.criterion.label_smoothing == 0.1
    assert type(build.objective_of(recipes.find("cifar100-supcon"), model)) is SupConLoss
    assert "imagenet200-cider" not in recipes.RECIPES
    momenta = [build.objective_of(recipes.find(f"{name}-cider"), model).momentum for name in ("cifar10", "cifar100")]
    assert momenta == [0.95, 0.5]  # OpenOOD's scripts
    palm = recipes.find("cifar10-palm")
    assert (palm.batch_size, palm.learning_rate, palm.weight_decay, palm.warmup_epochs) == (16, 0.1, 1e-4, 10)
    made = build.objective_of(palm, model)
    assert isinstance(made, PALMLoss)
    assert (made.momentum, len(made.prototypes), made.nearest, made.pull) == (0.9, 6 * C, 5, 1)
    larger = recipes.find("cifar100-palm")
    assert (larger.batch_size, larger.learning_rate, build.objective_of(larger, model).momentum) == (512, 0.5, 0.999)
    with pytest.raises(checks.UserError, match="prototype_momentum: expected none with loss=supcon"):
        recipes.override(palm, ["loss=supcon"])
    for setting in ("mixup=0.1", "outliers=vos", "regmixup=20"):
        with pytest.raises(checks.UserError, match="expected none with loss=cider"):
            recipes.override(cider, [setting])
