"""What each process of `test_class_parallel.py` runs: scenarios that compare the shards of a rank with one process.

Every rank draws the same whole problem, takes its slice of the classes, and holds what it gets against the function of
one process on the whole. A scenario that fails brings its traceback back to the test.
"""

from __future__ import annotations

import itertools
import os
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from support import Batch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ood_fast
from ood_fast import distributed, ops
from ood_fast.distributed import communication_bytes
from ood_fast.distributed import rows as distributed_rows
from ood_fast.eager import sizes as eager_sizes

# Uneven, a rank with one class, and ranks without any.
SHARDS = {2: [(6, 3), (9, 0)], 4: [(3, 1, 4, 1), (0, 5, 0, 4)]}
N_CLASSES = 9
TIMEOUT = 30  # seconds, of a collective
LOST_TIMEOUT = 3
FOLDER = ""  # where the processes of one test run leave their files

SCENARIOS: dict[str, Callable] = {}


def scenario(function: Callable) -> Callable:
    SCENARIOS[function.__name__] = function
    return function


def rank_and_size() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def own_slice(counts) -> slice:
    rank = dist.get_rank()
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def batch_of(n: int = 7, c: int = N_CLASSES, m: int = 5, dtype=torch.float32, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    return Batch.of(n, c, m).to(dtype)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def close(actual, expected, what: str = "", rtol=2e-5, atol=2e-6) -> None:
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def keyword_sets(batch: Batch) -> dict[str, dict]:
    torch.manual_seed(5)
    n, c = batch.logits.shape
    weight = torch.rand(c) + 0.5
    ignored = batch.y.clone()
    ignored[1::3] = -100
    probabilities = torch.softmax(torch.randn(n, c), 1)
    return {
        "plain": {},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
        "weight": {"weight": weight},
        "ignored": {"y": ignored},
        "ignored, weight, none": {"y": ignored, "weight": weight, "reduction": "none"},
        "all ignored": {"y": torch.full_like(batch.y, -100)},
        "smoothing": {"label_smoothing": 0.1},
        "smoothing, weight, ignored": {"label_smoothing": 0.1, "weight": weight, "y": ignored},
        "classes": {"average": "classes"},
        "detached": {"detach_geometry": True},
        "large eps": {"eps": 1.0},
        "probabilities": {"y": probabilities},
        "probabilities, weight, smoothing": {"y": probabilities, "weight": weight, "label_smoothing": 0.2},
        "ignore a class": {"ignore_index": 2},
    }


def sharded(value, own: slice):
    """A keyword's part for this rank: the columns of probabilities."""
    return value[:, own] if torch.is_tensor(value) and value.dim() == 2 else value


def compare(batch: Batch, counts, what: str, tolerance: dict | None = None, backend: str = "auto", **keywords) -> None:
    """Loss, D, and the gradients for logits and W, of the shard of this rank against those of one process."""
    own = own_slice(counts)
    y = keywords.pop("y", batch.y)
    logits, W = leaf(batch.logits), leaf(batch.W)
    expected, distance = ood_fast.elogitnorm(logits, None, W, None, y, return_distance=True, **keywords)
    upstream = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected) + 0.5
    expected.backward(upstream)
    own_logits, own_W = leaf(batch.logits[:, own]), leaf(batch.W[own])
    with ops.use_backend(backend):
        loss, own_distance = distributed.elogitnorm(
            own_logits, own_W, sharded(y, own), return_distance=True, **keywords
        )
        assert loss.dtype == expected.dtype
        loss.backward(upstream)
    tolerance = tolerance or {}
    close(loss, expected, f"{what}: loss", **tolerance)
    close(own_distance, distance, f"{what}: D", **tolerance)
    close(own_logits.grad, logits.grad[:, own], f"{what}: gradient of the logits", **tolerance)
    grad_W = torch.zeros_like(W) if W.grad is None else W.grad
    own_grad = torch.zeros_like(own_W) if own_W.grad is None else own_W.grad
    close(own_grad, grad_W[own], f"{what}: gradient of W", **tolerance)


def every_shard():
    return SHARDS[dist.get_world_size()]


# ----------------------------------------------------------------------------------------------------------------------
# The loss from the logits
# ----------------------------------------------------------------------------------------------------------------------


@scenario
def keywords():
    batch = batch_of()
    for counts in every_shard():
        for name, chosen in keyword_sets(batch).items():
            compare(batch, counts, f"{name}, {counts}", **chosen)


@scenario
def many_samples():
    """n > c, and several chunks of rows."""
    saved, eager_sizes.ROW_CHUNK_ELEMENTS, eager_sizes.TABLE_TILE_ELEMENTS = (eager_sizes.ROW_CHUNK_ELEMENTS, 7, 5)
    try:
        batch = batch_of(n=40)
        for counts in every_shard():
            compare(batch, counts, str(counts))
            compare(batch, counts, str(counts), **keyword_sets(batch)["smoothing, weight, ignored"])
    finally:
        eager_sizes.ROW_CHUNK_ELEMENTS, eager_sizes.TABLE_TILE_ELEMENTS = saved, 1 << 21


@scenario
def double():
    batch = batch_of(dtype=torch.float64)
    for counts in every_shard():
        compare(batch, counts, str(counts), {"rtol": 1e-11, "atol": 1e-12}, weight=torch.rand(9).double() + 0.5)


@scenario
def half_logits():
    """Logits in bfloat16, as autocast makes them, and W in float32."""
    batch = batch_of()
    batch.logits = batch.logits.bfloat16()
    for counts in every_shard():
        compare(batch, counts, str(counts))


@scenario
def corners():
    for counts in every_shard():
        compare_corners(counts, torch.float64)


@scenario
def kernels():
    """Losses and the distance by the Triton kernels, through their interpreter, where they are installed."""
    if not ops.has_triton():
        return
    from ood_fast.kernels import launches, segments

    counts = every_shard()[-1]
    compare_corners(counts, torch.float32, backend="triton")
    batch = batch_of(n=4)
    batch.logits = batch.logits.half()
    for name in ("probabilities, weight, smoothing", "smoothing, weight, ignored"):
        compare(batch, counts, name, {"rtol": 1e-3, "atol": 1e-5}, backend="triton", **keyword_sets(batch)[name])
    # Segments in pieces; the logits alone; bf16 rows, which no origin is taken from.
    saved, segments.SCAN_SAMPLES, segments.PIECE = (segments.SCAN_SAMPLES, segments.PIECE), 4, 2
    try:
        compare(batch_of(n=11), counts, "pieces", backend="triton")
    finally:
        segments.SCAN_SAMPLES, segments.PIECE = saved
    compare(batch_of(), counts, "detached", backend="triton", detach_geometry=True)
    batch = batch_of().to(torch.bfloat16)
    compare(batch, counts, "bf16", {"rtol": 2e-2, "atol": 1e-3}, backend="triton")
    with small_chunks():
        for name in ("plain", "none", "smoothing, weight, ignored"):
            compare_linear(batch_of(), counts, f"{name}, linear", backend="triton", **keyword_sets(batch_of())[name])
    # What is saved comes back with other strides.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0]):
        compare(batch_of(n=4), counts, "strides", backend="triton")
        compare_distance(counts, torch.float32, "triton")
    for name in ("boundary_sums", "softmax_sums", "tempered_backward", "distance_gram", "segment_piece", "segment_sum"):
        assert launches[f"{name}_kernel"], name
    for name in ("weight_gradient_own", "weight_gradient_all", "boundary_distance_backward"):
        assert launches[f"{name}_kernel"], name


def compare_corners(counts, dtype: torch.dtype, **how) -> None:
    """Ties, coincident rows, masked classes, rows that hold NaN or +inf or nothing, ignored or masked targets."""
    batch = batch_of(n=8, dtype=dtype)
    batch.W[3] = batch.W[7]  # coincident, on two ranks
    batch.W[4] = batch.W[5]
    batch.logits[0, 1] = batch.logits[0, 8] = 9.0  # a tie: the first index wins
    batch.logits[1] = 0.0  # tied throughout
    batch.logits[1, 2] = -0.0
    batch.logits[2, [0, 5]] = -torch.inf
    batch.logits[3] = -torch.inf
    batch.logits[4, 6] = torch.nan
    batch.logits[5, 2] = torch.inf
    batch.y[2] = 4
    y = batch.y.clone()
    for chosen in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(9).to(dtype)}):
        compare(batch, counts, f"corners {counts} {list(chosen)}", y=y, reduction="none", **chosen, **how)
    batch.logits[2, batch.y[2]] = -torch.inf  # a masked target
    compare(batch, counts, "masked target", reduction="none", **how)
    y[3:6] = -100  # the broken rows ignored: the rest must not notice
    y[2] = 1
    compare(batch, counts, "broken rows ignored", y=y, **how)
    batch.W[:] = 0.25
    compare(batch, counts, "no boundary at all", y=y, **how)


@scenario
def predictions():
    """The arg-max on every rank, whatever is tied or NaN."""
    values = torch.tensor([[0.0, -0.0, -1.0], [-torch.inf, -torch.inf, -torch.inf], [1.0, torch.nan, torch.inf]])
    values = torch.cat([values, torch.tensor([[-3.0, -2.0, -2.0], [-0.0, 0.0, -5e-324], [2.0, 2.0, 3.0]])])
    values = values.repeat(1, 3).double()
    for counts in every_shard():
        own = values[:, own_slice(counts)]
        own = own if own.shape[1] else own.new_full((len(values), 1), -torch.inf)
        top, predicted = distributed_rows.predict(own, distributed.Shards(None, counts), torch.float64)
        expected, index = values.max(1)
        close(top, expected)
        assert torch.equal(predicted, index), (predicted, index)


@scenario
def close_rows():
    """Rows of W 1e-3 apart, and a pair 1e-4 apart, on different ranks: as accurate as one process."""
    for backend in ("auto", "triton") if ops.has_triton() else ("auto",):
        compare_close_rows(backend)


def compare_close_rows(backend: str) -> None:
    torch.manual_seed(0)
    batch = batch_of(n=6, m=64)
    batch.W = (torch.randn(1, 64) + 1e-3 * torch.randn(9, 64)).float()
    batch.W[8] = batch.W[0] + 1e-4 * torch.randn(64)
    batch.logits = batch.z @ batch.W.T + batch.b
    truth = batch.to(torch.float64)
    W, logits = leaf(truth.W), leaf(truth.logits)
    expected, distance = ood_fast.elogitnorm(logits, None, W, None, batch.y, return_distance=True)
    expected.backward()
    for counts in every_shard():
        own = own_slice(counts)
        own_W = leaf(batch.W[own])
        with ops.use_backend(backend):
            loss, D = distributed.elogitnorm(batch.logits[:, own], own_W, batch.y, return_distance=True)
            loss.backward()
        close(D.double(), distance, "D", rtol=1e-4, atol=0)
        scale = W.grad.abs().max().item()
        close(own_W.grad.double(), W.grad[own], "dW", rtol=1e-3, atol=1e-3 * scale)


@scenario
def sizes():
    """One class in all; no samples; dense prediction."""
    size = dist.get_world_size()
    one = (0,) * (size - 1) + (1,)
    batch, own = batch_of(n=3, c=1), own_slice(one)
    for loss in (
        lambda: distributed.elogitnorm(batch.logits[:, own], batch.W[own], batch.y),
        lambda: distributed.linear_elogitnorm(batch.z, batch.W[own], None, batch.y),
    ):
        try:
            loss()
        except ValueError as error:
            assert "got one class" in str(error)  # noqa: PT017 - a worker has no pytest
        else:
            raise AssertionError("one class was taken")
    counts = every_shard()[0]
    for reduction in ("mean", "sum", "none"):
        batch = batch_of(n=0)
        batch.y = batch.y.long()
        compare(batch, counts, f"n = 0, {reduction}", reduction=reduction)
    batch = batch_of(n=24)
    places = batch.logits.view(2, 3, 4, N_CLASSES).movedim(3, 1)
    y = batch.y.view(2, 3, 4)
    weight = torch.rand(N_CLASSES)
    for counts, reduction in itertools.product(every_shard(), ("mean", "none")):
        own = own_slice(counts)
        chosen = {"reduction": reduction, "weight": weight, "return_distance": True}
        expected = ood_fast.elogitnorm(places, None, batch.W, None, y, **chosen)
        got = distributed.elogitnorm(places[:, own], batch.W[own], y, **chosen)
        for a, b in zip(got, expected, strict=True):
            close(a, b, "dense")


@scenario
def weight_of_the_shard():
    batch = batch_of()
    weight = torch.rand(N_CLASSES)
    for counts in every_shard():
        own = own_slice(counts)
        got = distributed.elogitnorm(batch.logits[:, own], batch.W[own], batch.y, weight=weight[own])
        close(got, ood_fast.elogitnorm(batch.logits, None, batch.W, None, batch.y, weight=weight))


@scenario
def each_input_alone():
    batch = batch_of()
    for counts in every_shard():
        own = own_slice(counts)
        logits, W = leaf(batch.logits), leaf(batch.W)
        ood_fast.elogitnorm(logits, None, W, None, batch.y).backward()
        own_logits, own_W = leaf(batch.logits[:, own]), leaf(batch.W[own])
        distributed.elogitnorm(own_logits, own_W.detach(), batch.y).backward()
        distributed.elogitnorm(own_logits.detach(), own_W, batch.y).backward()
        close(own_logits.grad, logits.grad[:, own])
        close(own_W.grad, W.grad[own])
        with torch.no_grad():
            assert distributed.elogitnorm(own_logits, own_W, batch.y).grad_fn is None


@scenario
def same_bits():
    """In two runs, and on every rank."""
    batch = batch_of(n=30)
    own = own_slice(every_shard()[0])
    runs = []
    for _ in range(2):
        logits, W = leaf(batch.logits[:, own]), leaf(batch.W[own])
        z, b = leaf(batch.z), leaf(batch.b[own])
        loss = distributed.elogitnorm(logits, W, batch.y) + distributed.linear_elogitnorm(z, W, b, batch.y)
        loss.backward()
        runs.append([loss.detach(), logits.grad, W.grad, z.grad, b.grad])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    for same in (runs[0][0], runs[0][3]):
        every = [torch.empty_like(same) for _ in range(dist.get_world_size())]
        dist.all_gather(every, same)
        assert all(torch.equal(part, every[0]) for part in every)


@scenario
def second_derivative():
    batch = batch_of()
    own = own_slice(every_shard()[0])
    logits = leaf(batch.logits[:, own])
    (grad,) = torch.autograd.grad(distributed.elogitnorm(logits, batch.W[own], batch.y), logits, create_graph=True)
    assert "distributed.elogitnorm: second derivatives are not implemented" in error_of(grad.sum().backward)


@scenario
def unchecked():
    """check=False: no all-gather, and y is held to the shards on the CPU all the same."""
    batch = batch_of()
    for counts in every_shard():
        own = own_slice(counts)
        known = {"shards": counts, "check": False}
        got = distributed.elogitnorm(batch.logits[:, own], batch.W[own], batch.y, **known)
        close(got, ood_fast.elogitnorm(batch.logits, None, batch.W, None, batch.y))
        for wrong, kind in (({"check": False}, ValueError), ({**known, "shards": counts[::-1]}, ValueError)):
            assert kind.__name__ in error_of(
                lambda wrong=wrong, own=own: distributed.elogitnorm(
                    batch.logits[:, own], batch.W[own], batch.y, **wrong
                )
            )
        assert "IndexError" in error_of(
            lambda own=own, known=known: distributed.elogitnorm(
                batch.logits[:, own], batch.W[own], batch.y + 9, **known
            )
        )


@scenario
def subgroup():
    """A group that is not the world, and a mesh."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    batch = batch_of(seed=mesh.get_local_rank("dp"))  # each replica its own problem
    counts = (4, 5)
    mine = mesh.get_local_rank("tp")
    own = slice(0, 4) if mine == 0 else slice(4, 9)
    expected = ood_fast.elogitnorm(batch.logits, None, batch.W, None, batch.y)
    for group in (mesh["tp"], mesh.get_group("tp")):
        close(distributed.elogitnorm(batch.logits[:, own], batch.W[own], batch.y, group=group, shards=counts), expected)
    assert "expected one: mesh['tp']" in error_of(
        lambda: distributed.elogitnorm(batch.logits[:, own], batch.W[own], batch.y, group=mesh)
    )


def error_of(call: Callable) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ----------------------------------------------------------------------------------------------------------------------
# Without logits
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def small_chunks():
    """Chunks of two rows, tiles of a few classes."""
    saved = {
        name: getattr(eager_sizes, name)
        for name in ("LINEAR_BUFFER_ELEMENTS", "MIN_LINEAR_ROWS", "WEIGHT_TILE_ELEMENTS")
    }
    eager_sizes.LINEAR_BUFFER_ELEMENTS, eager_sizes.MIN_LINEAR_ROWS, eager_sizes.WEIGHT_TILE_ELEMENTS = 1, 2, 12
    try:
        yield
    finally:
        vars(eager_sizes).update(saved)


def compare_linear(
    batch: Batch, counts, what: str, samples=None, with_bias: bool = True, backend: str = "auto", **keywords
) -> None:
    """Loss, D, and the gradients for z, W and b. `samples`: how many each rank brings; None: all bring all."""
    own = own_slice(counts)
    rows = slice(None) if samples is None else own_slice(samples)
    y = keywords.pop("y", batch.y)
    z, W, b = leaf(batch.z), leaf(batch.W), leaf(batch.b) if with_bias else None
    expected, distance = ood_fast.linear_elogitnorm(z, W, b, y, return_distance=True, **keywords)
    upstream = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected) + 0.5
    expected.backward(upstream)
    own_z, own_W, own_b = leaf(batch.z[rows]), leaf(batch.W[own]), leaf(batch.b[own]) if with_bias else None
    own_y = sharded(y, own) if samples is None else y[rows]
    how = {} if samples is None else {"samples": "sharded", "feature_grad_scale": 3.0}
    with ops.use_backend(backend):
        loss, own_distance = distributed.linear_elogitnorm(
            own_z, own_W, own_b, own_y, return_distance=True, **how, **keywords
        )
    part = rows if loss.dim() else ...
    for again in (False, True):  # the second backward has to compute everything anew
        own_z.grad = own_W.grad = None
        if with_bias:
            own_b.grad = None
        with ops.use_backend(backend):
            loss.backward(upstream[part], retain_graph=not again)
        close(loss, expected[part], f"{what}: loss")
        close(own_distance, distance[rows], f"{what}: D")
        close(own_z.grad, z.grad[rows] * (1 if samples is None else 3), f"{what}: gradient of z")
        close(own_W.grad, W.grad[own], f"{what}: gradient of W")
        if with_bias:
            close(own_b.grad, b.grad[own], f"{what}: gradient of b")


def every_sample_split(n: int):
    size = dist.get_world_size()
    even = [n // size] * size
    even[-1] += n - sum(even)
    uneven = [0] * size
    uneven[0], uneven[-1] = n - 1, 1
    return even, uneven


@scenario
def linear():
    batch = batch_of()
    for counts in every_shard():
        compare_linear(batch, counts, f"plain {counts}")
        compare_linear(batch, counts, f"no bias {counts}", with_bias=False)
    with small_chunks():
        for name, chosen in keyword_sets(batch).items():
            compare_linear(batch, counts, f"{name}, {counts}", **chosen)


@scenario
def linear_sharded_samples():
    batch = batch_of()
    counts = every_shard()[0]
    even, uneven = every_sample_split(7)
    compare_linear(batch, counts, f"{even}", even)
    with small_chunks():
        for name in ("plain", "none", "ignored", "ignored, weight, none", "all ignored", "smoothing, weight, ignored"):
            compare_linear(batch, counts, f"{name}, {uneven}", uneven, **keyword_sets(batch)[name])
    own_z = batch_of(n=0).z
    loss = distributed.linear_elogitnorm(own_z, batch.W[own_slice(counts)], None, batch.y[:0], samples="sharded")
    assert loss.isnan()


@scenario
def linear_corners():
    for counts in every_shard():
        batch = batch_of(dtype=torch.float64)
        batch.W[3], batch.b[3] = batch.W[7], batch.b[7]
        batch.b[2] = -torch.inf
        y = batch.y.clone()
        y[y == 2] = 0
        y[0] = -100
        batch.z[4, 0] = torch.nan
        y[4] = -100  # its features may hold anything: without logits 0 * NaN reaches dW, in one process as well
        compare_linear(batch_of(dtype=torch.float64), counts, "double")
        batch.z[4, 0] = 0.0
        with small_chunks():
            compare_linear(batch, counts, f"corners {counts}", y=y, reduction="none")
        batch.W[:] = 0.0
        batch.b[:] = 0.0
        compare_linear(batch, counts, f"a head of zeros {counts}", y=y)


@scenario
def logits_are_never_stored():
    """No tensor of n x c_r elements; beside W and its gradient the largest is a chunk."""
    size = dist.get_world_size()
    n, c, m = 256, 2000 * size, 8
    torch.manual_seed(0)
    z, y = torch.randn(n, m, requires_grad=True), torch.randint(0, c, (n,))
    W = torch.randn(2000, m, requires_grad=True)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    saved, eager_sizes.LINEAR_BUFFER_ELEMENTS = eager_sizes.LINEAR_BUFFER_ELEMENTS, 1 << 17
    try:
        with Watch():
            distributed.linear_elogitnorm(z, W, None, y).backward()
    finally:
        eager_sizes.LINEAR_BUFFER_ELEMENTS = saved
    assert largest <= 1 << 16 < n * 2000 / 4, largest
    assert z.grad.isfinite().all()
    assert W.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------


@scenario
def distance():
    for counts in every_shard():
        compare_distance(counts, torch.float64)


def compare_distance(counts, dtype: torch.dtype, backend: str = "auto") -> None:
    for average, broken in (("boundaries", False), ("classes", True)):
        batch = batch_of(n=8, dtype=dtype)
        batch.W[3] = batch.W[7]
        batch.logits[2, 4] = -torch.inf
        batch.logits[5] = -torch.inf
        if broken:
            batch.logits[5, 2] = torch.nan
        own = own_slice(counts)
        logits, W = leaf(batch.logits), leaf(batch.W)
        expected = ood_fast.boundary_distance(logits, W, average=average)
        upstream = torch.linspace(0.5, 1.5, 8).to(dtype)
        upstream[5] *= not broken  # dW is NaN even so
        expected.backward(upstream)
        own_logits, own_W = leaf(batch.logits[:, own]), leaf(batch.W[own])
        with ops.use_backend(backend):
            got = distributed.boundary_distance(own_logits, own_W, average=average)
            got.backward(upstream)
        close(got, expected)
        close(own_logits.grad, logits.grad[:, own])
        close(own_W.grad, W.grad[own])
    assert distributed.boundary_distance(own_logits[:0], own_W).shape == (0,)


@scenario
def nci():
    for counts in every_shard():
        own = own_slice(counts)
        batch = batch_of(n=8)
        mean = batch.z.mean(0)
        batch.z[3] = mean
        for with_logits in (False, True):
            inputs = [leaf(t) for t in (batch.z, batch.W, mean)]
            z, W, mu = inputs
            expected = ood_fast.nci_score(z, W, batch.b, mu, batch.logits if with_logits else None, 0.01)
            upstream = torch.linspace(0.5, 1.5, 8)
            expected.backward(upstream)
            own_z, own_W, own_mu = leaf(batch.z), leaf(batch.W[own]), leaf(mean)
            got = distributed.nci_score(
                own_z, own_W, batch.b[own], own_mu, batch.logits[:, own] if with_logits else None, 0.01
            )
            got.backward(upstream)
            close(got, expected, "score")
            close(own_z.grad, z.grad, "dz")
            close(own_W.grad, W.grad[own], "dW")
            close(own_mu.grad, mu.grad, "dmean")
        batch.logits[1, 3] = torch.nan
        got = distributed.nci_score(batch.z, batch.W[own], None, mean, batch.logits[:, own])
        close(got, ood_fast.nci_score(batch.z, batch.W, None, mean, batch.logits))
        assert distributed.nci_score(batch.z[:0], batch.W[own], None, mean).shape == (0,)


@scenario
def row_statistics():
    names = ood_fast.statistics.STATISTICS
    for counts in every_shard():
        own = own_slice(counts)
        for dtype in (torch.float32, torch.float64):
            batch = batch_of(n=9, dtype=dtype)
            f = batch.logits * 3
            f[0, 8] = 60.0  # certain: 1 - P_p and the entropy are tiny
            f[1] *= 40  # e_j underflows, its power does not
            f[2, [0, 5]] = -torch.inf
            f[4, 6] = torch.nan
            f[5, 2] = torch.inf
            f[6] = -torch.inf
            f[7, 1:] = -torch.inf
            expected = ood_fast.statistics.row_statistics(names, f, batch.z, W=batch.W, mean=batch.b[:5], gamma=0.3)
            shard = {"W_shard": batch.W[own], "mean": batch.b[:5], "gamma": 0.3}
            got = distributed.row_statistics(names, f[:, own], batch.z, **shard)
            assert list(got) == list(expected)
            usable = torch.tensor([0, 1, 2, 3, 5, 7, 8])  # of a row without a number in it "predicted" is some class
            assert torch.equal(got["predicted"][usable], expected["predicted"][usable])
            for name in names:
                if name == "projection":
                    close(got[name][usable], expected[name][usable], name)
                elif name != "predicted":
                    close(got[name], expected[name], f"{name} {counts}", atol=0 if name in ("gen", "entropy") else 2e-6)
            few = distributed.row_statistics(["entropy", "max"], f[:, own])
            assert list(few) == ["max", "entropy"]
            close(few["entropy"], expected["entropy"])
        nothing = distributed.row_statistics(names, f[:0, own], batch.z[:0], **shard)
        assert {tuple(t.shape) for t in nothing.values()} == {(0,)}


# ----------------------------------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------------------------------


GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


class Counted:
    """Sums what the collectives of torch.distributed would send by ring algorithms, all ranks together."""

    def __enter__(self):
        self.total, self._saved = 0, {}
        size = dist.get_world_size()
        factors = {
            "all_reduce": lambda tensor, *rest: 2 * (size - 1) * tensor.nbytes,
            GATHER: lambda out, tensor: size * (size - 1) * tensor.nbytes,
            REDUCE_SCATTER: lambda out, tensor: (size - 1) * tensor.nbytes,
        }
        for name, bytes_of in factors.items():
            original = self._saved[name] = getattr(dist, name)

            def counted(*args, original=original, bytes_of=bytes_of, **keywords):
                self.total += bytes_of(*args)
                return original(*args, **keywords)

            setattr(dist, name, counted)
        for name in (
            "all_gather",
            "broadcast",
            "all_to_all",
            "reduce",
            "send",
            "all_gather_object",
            "gather",
            "scatter",
        ):
            self._saved[name] = getattr(dist, name)
            setattr(dist, name, None)  # a call of it would be traffic that nobody counts: an error
        return self

    def __exit__(self, *rest):
        for name, original in self._saved.items():
            setattr(dist, name, original)


@scenario
def bytes_on_the_wire():
    """What the formulas say is what was handed to the collectives, to the byte."""
    size = dist.get_world_size()
    n, m = 12, 5
    for dtype, weight, chosen in (
        (torch.float32, None, {}),
        (torch.float64, None, {"check": False}),
        (torch.float32, torch.rand(9), {}),
        (torch.float32, None, {"detach_geometry": True}),
    ):
        batch, counts = batch_of(n=n, m=m, dtype=dtype), every_shard()[0]
        own = own_slice(counts)
        u = int(batch.logits.argmax(1).unique().numel())
        known = {"n_predicted": u, "itemsize": dtype.itemsize, "weighted_mean": weight is not None, **chosen}
        arguments = {"weight": weight, "shards": counts, **chosen}
        logits, W = leaf(batch.logits[:, own]), leaf(batch.W[own])
        with Counted() as counter:
            loss = distributed.elogitnorm(logits, W, batch.y, **arguments)
        expected = communication_bytes(n, m, size, backward=False, **known)
        assert counter.total == expected.total, (counter.total, expected)
        with Counted() as more:
            loss.backward()
        expected = communication_bytes(n, m, size, **known)
        assert counter.total + more.total == expected.total
        assert expected.per_rank == expected.total / size
        for samples in ("replicated", "sharded"):
            part = slice(None) if samples == "replicated" else own_slice([n // size] * size)
            z, W, b = leaf(batch.z[part]), leaf(batch.W[own]), leaf(batch.b[own])
            with Counted() as counter:
                distributed.linear_elogitnorm(z, W, b, batch.y[part], samples=samples, **arguments).backward()
            u = int((batch.z @ batch.W.T + batch.b).argmax(1).unique().numel())
            known.update(without_logits=True, samples=samples, feature_itemsize=dtype.itemsize, n_predicted=u)
            assert counter.total == communication_bytes(n, m, size, **known).total, (samples, known)


# ----------------------------------------------------------------------------------------------------------------------
# torch's own tensor parallelism, alone and with DDP or FSDP over the samples
# ----------------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(4, 8)
        self.fc = nn.Linear(8, N_CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.body(x)))


def shard_head(model: nn.Module, mesh, local_output: bool = True) -> nn.Module:
    style = ColwiseParallel(output_layouts=Shard(-1), use_local_output=local_output)
    return parallelize_module(model, mesh, {"fc": style})


def joined_batches(n: int = 12):
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        y = torch.randint(0, N_CLASSES, (n,), generator=generator)
        yield torch.randn(n, 4, generator=generator), y


def train(model: nn.Module, criterion: Callable, inner: nn.Module, replica: int = 0, n_replicas: int = 1):
    """The parameters after three steps, whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, y in joined_batches():
        optimizer.zero_grad()
        criterion(model(x.chunk(n_replicas)[replica]), y.chunk(n_replicas)[replica]).backward()
        optimizer.step()
    tensors = inner.body.weight, inner.body.bias, inner.fc.weight, inner.fc.bias
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach() for t in tensors]


WEIGHT = torch.linspace(0.5, 1.5, N_CLASSES)


def train_alone():
    model = Classifier()
    return train(model, ood_fast.ELogitNormLoss(model.fc, label_smoothing=0.1), model)


def compare_training(parameters) -> None:
    for got, expected in zip(parameters, train_alone(), strict=True):
        close(got, expected, rtol=1e-4, atol=1e-6)


@scenario
def tensor_parallel():
    """The head over all ranks (of 4, the last holds none of the 9 classes' 3 + 3 + 3)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for local_output in (True, False):
        model = shard_head(Classifier(), mesh, local_output)
        compare_training(train(model, ood_fast.ELogitNormLoss(model, "fc", label_smoothing=0.1), model))
    model, alone = shard_head(Classifier(), mesh), Classifier()
    x, y = next(joined_batches())
    chosen = {"weight": WEIGHT, "reduction": "none", "return_distance": True}
    expected = ood_fast.ELogitNormLoss(alone.fc, **chosen)(alone(x), y)
    for a, b in zip(ood_fast.ELogitNormLoss(model.fc, **chosen)(model(x), y), expected, strict=True):
        close(a, b)
    # Logits and targets that are DTensors of other placements come to the same.
    logits = distribute_tensor(alone(x).detach(), mesh, [Replicate()])
    target = distribute_tensor(torch.softmax(alone(x).detach(), 1), mesh, [Replicate()])
    expected = ood_fast.ELogitNormLoss(alone.fc)(alone(x), target.full_tensor())
    close(ood_fast.ELogitNormLoss(model.fc)(logits, target), expected)


@scenario
def two_dimensions():
    """Classes over one dimension of a 2 x 2 mesh, samples over the other."""
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh.get_local_rank("dp")
    for local_output in (True, False):
        for around in ("DDP", "FSDP, head alone", "FSDP, head in the root"):
            inner = shard_head(Classifier(), mesh["tp"], local_output)
            if around == "DDP":
                model = DistributedDataParallel(inner, device_mesh=mesh["dp"])
            else:
                if around == "FSDP, head alone":
                    fully_shard(inner.fc, mesh=mesh["dp"])
                model = fully_shard(inner, mesh=mesh["dp"])
            criterion = ood_fast.ELogitNormLoss(model, "fc", label_smoothing=0.1)
            compare_training(train(model, criterion, inner, replica, 2))
            with torch.no_grad():
                x, y = next(joined_batches())
                loss = criterion(model(x), y)
            assert loss.isfinite()


@scenario
def checkpoint():
    """Saved by four processes, loaded by two, whose head goes on as if nothing had been between."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    model = shard_head(Classifier(), mesh)
    folder = f"{FOLDER}/checkpoint"
    if size == 4:
        train(model, ood_fast.ELogitNormLoss(model, "fc", label_smoothing=0.1), model)
        torch.distributed.checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
        return
    state = {"model": get_model_state_dict(model)}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    alone = Classifier()
    train(alone, ood_fast.ELogitNormLoss(alone.fc, label_smoothing=0.1), alone)
    assert model.fc.weight.to_local().shape == (5 - dist.get_rank(), 8)
    close(model.fc.weight.full_tensor(), alone.fc.weight, rtol=1e-4, atol=1e-6)
    x, y = next(joined_batches())
    expected = ood_fast.ELogitNormLoss(alone.fc)(alone(x), y)
    close(ood_fast.ELogitNormLoss(model, "fc")(model(x), y), expected, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: every rank the same error, and the next call works
# ----------------------------------------------------------------------------------------------------------------------


class OutOfBounds:
    """Raises a subclass of what the functions raise, whatever is asked of it."""

    class Error(IndexError):
        pass

    def __getattribute__(self, name):
        raise OutOfBounds.Error("beyond")


def same_error(call: Callable, *parts: str) -> None:
    began = time.monotonic()
    text = error_of(call)
    assert time.monotonic() - began < TIMEOUT / 2
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, text)
    assert set(every) == {text}, every
    for part in parts:
        assert part in text, text


@scenario
def bad_input():
    rank, size = rank_and_size()
    counts = every_shard()[0]
    own = own_slice(counts)
    batch = batch_of()
    f, W, y, z, b = batch.logits[:, own], batch.W[own], batch.y, batch.z, batch.b[own]
    last = rank == size - 1

    def loss(f=f, W=W, y=y, **keywords):
        return lambda: distributed.elogitnorm(f, W, y, **keywords)

    def linear(z=z, W=W, b=b, y=y, **keywords):
        return lambda: distributed.linear_elogitnorm(z, W, b, y, **keywords)

    same_error(loss(W=torch.cat([W, W]) if last else W), "ValueError", f"rank {size - 1}: W: got shape")
    same_error(loss(weight=torch.ones(8)), "ValueError", "weight: got shape (8,)", "(9,), one factor for each class")
    same_error(loss(weight=torch.ones(9) if last else None), "ValueError", "weight: got None on rank", "shape (9,)")
    same_error(loss(shards=(4,) * size), "ValueError", "shards: got (4,", f"but the ranks hold {counts}")
    same_error(loss(shards=counts if last else None), "ValueError", "shards: got None on rank")
    rows = slice(0, 6) if last else slice(None)
    same_error(loss(f[rows], W, y[rows]), "ValueError", "logits_shard: got shape (7, 'c_r') on rank", "shape (6,")
    same_error(loss(W=W[:, :4] if last else W), "ValueError", "W_shard: got 5 columns", "4 columns")
    same_error(loss(y=y.where(torch.arange(7) != 3, 9)), "IndexError", "target 9 at position 3", "[0, 9)")
    same_error(loss(y=y.flip(0) if last else y), "ValueError", "y: got ", "expected the same on every rank")
    same_error(loss(y=y.int() if rank == 0 else y), "TypeError", "rank 0: y: got dtype torch.int32")
    same_error(loss(f=f.long() if last else f), "TypeError", f"rank {size - 1}: logits_shard")
    same_error(loss(f="logits"), "TypeError", "rank 0: logits_shard: got str 'logits'")
    same_error(loss(f=f.double() if last else f), "ValueError", "dtypes: got ")
    same_error(loss(W=leaf(W) if last else W), "ValueError", "requires_grad: got (False, False) on rank")
    same_error(loss(weight=torch.ones(9, requires_grad=last)), "ValueError", f"rank {size - 1}: weight: requires grad")
    for name, other in {
        "label_smoothing": 0.1,
        "reduction": "sum",
        "ignore_index": 3,
        "eps": 1e-3,
        "average": "classes",
        "detach_geometry": True,
        "return_distance": True,
    }.items():
        same_error(
            loss(**{name: other} if last else {}), "ValueError", f"{name}: got ", "expected the same on every rank"
        )
    same_error(loss(reduction="max"), "ValueError", "rank 0: reduction: got 'max'")
    same_error(linear() if last else loss(), "ValueError", "function: got elogitnorm on rank")
    same_error(linear(b=None if last else b), "ValueError", "b_shard: got ")
    same_error(linear(samples="sharded" if last else "replicated"), "ValueError", "samples: got 'replicated' on rank")
    same_error(linear(samples="some"), "ValueError", "samples: got 'some'")
    same_error(linear(y=torch.ones_like(f), samples="sharded"), "ValueError", "y: got class probabilities")
    same_error(linear(z=z[:, :3] if last else z), "ValueError", f"rank {size - 1}: z: got shape (7, 3)")
    same_error(linear(z=z[:6], y=y[:6]) if last else linear(), "ValueError", "z: got 7 rows on rank")
    wrong = y.clone()
    wrong[0] = 99
    same_error(
        linear(y=wrong if last else y, samples="sharded"), "IndexError", f"target 99 at position {7 * (size - 1)}"
    )
    nothing = W[:0], f[:, :0]
    same_error(loss(nothing[1], nothing[0]), "ValueError", "no rank holds a class")
    same_error(
        lambda: distributed.boundary_distance(f, W, average="all" if last else "classes"), "ValueError", "average"
    )
    same_error(lambda: distributed.nci_score(z, W, b, z[0], alpha=0.1 * rank), "ValueError", "alpha: got 0.0 on rank 0")
    same_error(lambda: distributed.row_statistics(["gen"], f, gamma=0 if last else 1), "ValueError", "gamma: got 0")
    same_error(lambda: distributed.row_statistics(["gen", "max"][: rank + 1], f), "ValueError", "names: got ['gen'] on")
    same_error(lambda: distributed.row_statistics(["distance"], f), "ValueError", "W: got None, but 'distance' needs")
    narrow = W[:, :3] if last else W
    same_error(lambda: distributed.row_statistics(["distance"], f, W_shard=narrow), "ValueError", "5 columns", "3 col")
    same_error(lambda: distributed.nci_score(z, W, None if last else b, z[0]), "ValueError", "b_shard: got torch.float")
    # What no check foresees is told to the ranks that wait, too.
    same_error(
        loss(detach_geometry=torch.ones(2) if last else False), "RuntimeError", f"rank {size - 1}: Boolean value"
    )
    same_error(loss(weight=OutOfBounds() if last else None), "IndexError", f"rank {size - 1}: beyond")
    assert "group: got 3, expected a process group" in error_of(loss(group=3))
    close(loss()(), ood_fast.elogitnorm(batch.logits, None, batch.W, None, y))  # nobody lags behind


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


def without_one(lost: Callable[[], None]) -> tuple[str, float] | None:
    """(the error, the seconds it took) of a rank whose last neighbour is lost in the middle of training."""
    batch = batch_of()
    counts = every_shard()[0]
    own = own_slice(counts)
    group = dist.new_group(timeout=timedelta(seconds=LOST_TIMEOUT))
    W = leaf(batch.W[own])
    distributed.elogitnorm(batch.logits[:, own], W, batch.y, group=group).backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        lost()
        return None
    began = time.monotonic()
    text = error_of(lambda: distributed.elogitnorm(batch.logits[:, own], W, batch.y, group=group))
    return text, time.monotonic() - began


def process(rank: int, size: int, folder: str) -> None:
    """All scenarios; the last process is lost at the end: of 2 it hangs, of 4 it dies."""
    global FOLDER
    FOLDER = folder
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "`torch.distributed", FutureWarning)  # a name that torch gives up
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-{size}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    results = {}
    for name, run in SCENARIOS.items():
        try:
            results[name] = run()
        except Exception:
            results[name] = traceback.format_exc()

    def save() -> None:
        torch.save(results, f"{folder}/{size}-{rank}.pt")

    def die() -> None:
        save()
        os._exit(0)

    results["lost"] = without_one(die if size == 4 else lambda: time.sleep(2 * LOST_TIMEOUT))
    save()
    os._exit(0)  # leaving the group properly would wait for the one that is gone
