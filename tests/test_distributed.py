"""Two gloo processes that train as one: DistributedDataParallel and FSDP2 (`fully_shard`), on the CPU.

The processes are started once and run every scenario, each in a fresh model; a test reads what its scenario brought
back. The truth is one process with the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from gloo import run_scenarios
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ood_fast
from ood_fast.training import objective as objective_module
from ood_fast.training.contrastive import CIDERLoss
from ood_fast.training.outliers import VOSLoss
from ood_fast.training.palm import PALMLoss
from ood_fast.training.synthesis import NPOSLoss

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

N_PROCESSES = 2
N_STEPS, N_SAMPLES, N_CLASSES = 3, 12, 5


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.fc = nn.Linear(8, N_CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.body(x)))


def joined_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(N_SAMPLES, 4, generator=generator), torch.randint(0, N_CLASSES, (N_SAMPLES,), generator=generator))
        for _ in range(N_STEPS)
    ]


def new_model() -> Classifier:
    torch.manual_seed(1)
    return Classifier()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor or of all shards of a DTensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(model: nn.Module, loss_of: Callable, batches) -> list[torch.Tensor]:
    """The gradients of every step and the parameters after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        kept += [whole(p.grad) for p in model.parameters()]
        optimizer.step()
    return kept + [whole(p) for p in model.parameters()]


def own_part(rank: int):
    return [(x.chunk(N_PROCESSES)[rank], y.chunk(N_PROCESSES)[rank]) for x, y in joined_batches()]


def by_name(model, x, y):
    return ood_fast.ELogitNormLoss(model, "fc")(model(x), y)


def by_layer(model, x, y):
    return ood_fast.ELogitNormLoss(model.fc)(model(x), y)


# ----------------------------------------------------------------------------------------------------------------------
# Scenarios: rank -> what a test compares with one process
# ----------------------------------------------------------------------------------------------------------------------


def ddp(rank: int, **keywords):
    return train(DistributedDataParallel(new_model(), **keywords), by_name, own_part(rank))


def ddp_with_an_objective(rank: int, make: Callable):
    """Its own parameters are averaged, while each process has buffers of its own."""
    torch.manual_seed(2)
    model = new_model()
    objective = make(model.fc)
    parameter = next(objective.parameters())
    objective.average_gradients(N_PROCESSES)
    assert parameter.grad is None, "without a gradient anywhere, decay and momentum pass it by"
    parameter.grad = torch.ones_like(parameter) if rank else None
    objective.average_gradients(N_PROCESSES)
    assert torch.equal(parameter.grad, torch.full_like(parameter, 1 / N_PROCESSES))
    network = DistributedDataParallel(objective.around(model))
    optimizer = torch.optim.SGD([*network.parameters(), *objective.parameters()], lr=0.1)
    for x, y in own_part(rank) * 2:
        optimizer.zero_grad()
        objective.step(network, objective_module.StepBatch(x, y, x + 0.1))[0].backward()
        objective.average_gradients(N_PROCESSES)
        optimizer.step()
    return [whole(tensor) for tensor in (*network.parameters(), *objective.parameters(), *objective.buffers())]


def ddp_frozen_body(rank: int):
    model = new_model()
    model.body.requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    for x, y in own_part(rank):
        by_name(wrapped, x, y).backward()
    return [model.fc.weight.grad, model.fc.bias.grad]


def ddp_accumulated(rank: int):
    """Two half batches a step; the processes talk once."""
    wrapped = DistributedDataParallel(new_model())

    def loss_of(model, x, y):
        with model.no_sync():
            (by_name(model, x[: len(x) // 2], y[: len(x) // 2]) / 2).backward()
        return by_name(model, x[len(x) // 2 :], y[len(x) // 2 :]) / 2

    return train(wrapped, loss_of, own_part(rank))


def fsdp(rank: int, loss_of: Callable = by_name, head_alone: bool = True, reshard: bool | None = True):
    return train(sharded_model(head_alone, reshard), loss_of, own_part(rank))


def sharded_model(head_alone: bool = True, reshard: bool | None = True) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (N_PROCESSES,))
    model = new_model()
    if head_alone:
        fully_shard(model.fc, mesh=mesh, reshard_after_forward=reshard)
        return fully_shard(model, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def fsdp_accumulated(rank: int):
    def loss_of(model, x, y):
        model.set_requires_gradient_sync(False)
        (by_name(model, x[: len(x) // 2], y[: len(x) // 2]) / 2).backward()
        model.set_requires_gradient_sync(True)
        return by_name(model, x[len(x) // 2 :], y[len(x) // 2 :]) / 2

    return train(sharded_model(), loss_of, own_part(rank))


def fsdp_unsharded_by_hand(rank: int):
    """The function instead of the criterion, as the error tells its reader."""

    def loss_of(model, x, y):
        logits = model(x)
        model.fc.unshard()
        return ood_fast.elogitnorm(logits, None, model.fc.weight, None, y)

    return train(sharded_model(), loss_of, own_part(rank))


def fsdp_evaluation(rank: int):
    """Without a backward pass to come the head is sharded again at once."""
    model = sharded_model()
    (x, y), *_ = own_part(rank)
    with torch.no_grad():
        loss = by_layer(model, x, y)
    assert hasattr(model.fc.weight, "full_tensor"), "the head was left gathered"
    dist.all_reduce(loss)
    return [loss / N_PROCESSES]


def fsdp_errors(rank: int):
    """What a sharded weight that nobody can gather says to a function, and to a criterion that has the layer only."""
    model = sharded_model(head_alone=False, reshard=True)
    (x, y), *_ = own_part(rank)
    messages = []
    for call in (
        lambda: by_layer(model, x, y),
        lambda: ood_fast.elogitnorm(model(x), None, model.fc.weight, None, y),
        lambda: ood_fast.boundary_distance(model(x), model.fc.weight),
        lambda: ood_fast.linear_elogitnorm(model(x).new_zeros(len(x), 8), model.fc.weight, None, y),
    ):
        try:
            call()
            messages.append("no error")
        except TypeError as error:
            messages.append(str(error))
    return messages


SCENARIOS: dict[str, Callable] = {
    "ddp": ddp,
    "ddp, find_unused_parameters": lambda rank: ddp(rank, find_unused_parameters=True),
    "ddp, static_graph": lambda rank: ddp(rank, static_graph=True),
    "ddp, accumulated": ddp_accumulated,
    "ddp, frozen body": ddp_frozen_body,
    "ddp, VOS": lambda rank: ddp_with_an_objective(rank, lambda head: VOSLoss(head, queue=1, candidates=4)),
    "ddp, CIDER": lambda rank: ddp_with_an_objective(rank, lambda head: CIDERLoss(head, projection=3)),
    "ddp, NPOS": lambda rank: ddp_with_an_objective(rank, lambda head: NPOSLoss(head, queue=1)),
    "ddp, PALM": lambda rank: ddp_with_an_objective(rank, lambda head: PALMLoss(head, projection=3, prototypes=2)),
    "fsdp, head alone": fsdp,
    "fsdp, head alone, criterion knows the layer": lambda rank: fsdp(rank, by_layer),
    "fsdp, head alone, not resharded": lambda rank: fsdp(rank, by_layer, reshard=False),
    "fsdp, head in the root": lambda rank: fsdp(rank, by_layer, head_alone=False, reshard=None),
    "fsdp, head in a root that reshards": lambda rank: fsdp(rank, by_name, head_alone=False),
    "fsdp, accumulated": fsdp_accumulated,
    "fsdp, unsharded by hand": fsdp_unsharded_by_hand,
    "fsdp, evaluation": fsdp_evaluation,
    "fsdp, errors": fsdp_errors,
}

OTHERWISE = (
    "ddp, frozen body",
    "ddp, VOS",
    "ddp, CIDER",
    "ddp, NPOS",
    "ddp, PALM",
    "fsdp, evaluation",
    "fsdp, errors",
)  # with tests of their own


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each process brought back."""
    return run_scenarios(__name__, str(tmp_path_factory.mktemp("gloo")), N_PROCESSES)


def of_scenario(results: list[dict], name: str) -> list:
    for rank, result in enumerate(results):
        assert not isinstance(result[name], str), f"process {rank}: {result[name]}"
    return [result[name] for result in results]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in OTHERWISE])
def test_training_equals_one_process_on_the_joined_batch(name, results):
    """The gradient of every parameter in every step, and the parameters at the end."""
    expected = train(new_model(), by_name, joined_batches())
    for rank, kept in enumerate(of_scenario(results, name)):
        assert len(kept) == len(expected)
        for a, b in zip(kept, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-6, msg=lambda text, rank=rank: f"process {rank}: {text}"
            )


@pytest.mark.parametrize(("name", "n_own"), [("ddp, VOS", 3), ("ddp, CIDER", 4), ("ddp, NPOS", 4), ("ddp, PALM", 4)])
def test_ddp_with_an_objective(name, n_own, results):
    first, second = of_scenario(results, name)
    trained = 4 + n_own  # of the model and of the objective
    assert all(torch.equal(a, b) for a, b in zip(first[:trained], second[:trained], strict=True))
    assert not torch.equal(first[trained], second[trained])


def test_ddp_with_a_frozen_body(results):
    model = new_model()
    model.body.requires_grad_(False)
    for x, y in joined_batches():
        by_name(model, x, y).backward()
    for grads in of_scenario(results, "ddp, frozen body"):
        for a, b in zip(grads, (model.fc.weight.grad, model.fc.bias.grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fsdp_evaluation(results):
    x, y = joined_batches()[0]
    for (loss,) in of_scenario(results, "fsdp, evaluation"):
        torch.testing.assert_close(loss, by_name(new_model(), x, y).detach())


def test_fsdp_errors_say_what_to_do(results):
    for messages in of_scenario(results, "fsdp, errors"):
        for message in messages:
            assert "W: got a DTensor" in message
            assert "ELogitNormLoss(model, 'fc')" in message
            assert "unshard()" in message
