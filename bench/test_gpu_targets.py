"""GPU only. Small batches, where launches are the cost: by wall clock, and inside a CUDA graph, where they are not.

The large batches are those of test_loss.py; the kernels one by one are in bench/kernel_times.py.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch

from .baselines import LOSSES
from .cases import CIFAR10, CIFAR100, Inputs
from .conftest import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU, and there is none")
ROWS = [row for row in LOSSES if row.name in ("elogitnorm", "elogitnorm, detached", "F.cross_entropy")]


@pytest.fixture(scope="module", params=[CIFAR10, CIFAR100], ids=lambda case: case.name)
def case(request):
    return request.param  # 128 samples, as on a CPU


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_wall_clock(row, case, device, inputs, measure):
    """From the call to the end of the work, as a training loop that waits for each step sees it."""

    def step():
        row.step(inputs)
        torch.cuda.synchronize()

    measure(
        "loss forward + backward by wall clock",
        step,
        row=row.name,
        counts=row.counts,
        prepare=functools.partial(row.prepare, case, device),
        error=_error(row, inputs, row.step(inputs)),
        distinct=inputs.distinct_predictions,
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_cuda_graph(row, inputs, measure):
    """The replay of a captured step: no launch waits for Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            row.step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = row.step(inputs)
    graph.replay()
    measure(
        "loss forward + backward in a CUDA graph",
        graph.replay,
        row=row.name,
        counts=row.counts,
        prepare="a replay allocates nothing: the graph has held what the step takes since it was captured",
        error=_error(row, inputs, outputs),
        distinct=inputs.distinct_predictions,
    )


def _error(row, inputs: Inputs, outputs) -> float:
    return relative_error(outputs, row.true_step(inputs.double()))
