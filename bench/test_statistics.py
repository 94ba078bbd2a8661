"""Row statistics of a batch: those of one detector, of all together, and what softmax takes.

Ratios of one run matter here: NCI reads three times the bytes of MSP; all together should cost little more than their
parts, as logits and features are read once; and MSP should not be slower than `softmax(1).max(1)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ood_fast.statistics import STATISTICS, distance_table, row_statistics

from .cases import CIFAR100, IMAGENET, Case, Inputs
from .conftest import over, relative_error
from .measure import input_sets

# The rows, by their names in bench/counts.py.
DETECTORS = {
    "MSP": ("confidence",),
    "GEN": ("gen",),
    "entropy": ("entropy",),
    "fDBD": ("distance", "centred_norm"),
    "NCI": ("predicted", "norm1", "centred_norm", "projection"),
    "all": STATISTICS,
}


@pytest.fixture(**over((CIFAR100, IMAGENET, Case("ImageNet-1K scores", 4096, 1000, 2048))))
def case(request):
    return request.param


@torch.no_grad()
def statistics(detector: str, table: Tensor, x: Inputs) -> dict[str, Tensor]:
    return row_statistics(DETECTORS[detector], x.logits, x.z, W=x.W, mean=x.mean, table=table)


@torch.no_grad()
def softmax_maximum(x: Inputs) -> Tensor:
    return x.logits.softmax(1).max(1).values


def prepare(detector: str | None, case: Case, device: torch.device) -> Callable[[], object]:
    """The step of a row, None for softmax's; it has run once."""
    x = Inputs.of(case, device)
    of = softmax_maximum if detector is None else functools.partial(statistics, detector, distance_table(x.W.detach()))
    step = functools.partial(of, x)
    step()
    return step


@pytest.mark.parametrize("detector", DETECTORS)
def test_statistics(detector, inputs, case, measure, device):
    """Compared with float64, where that is an error and not an index, before they are timed."""
    table = distance_table(inputs.W.detach())
    found, truth = statistics(detector, table, inputs), statistics(detector, table.double(), inputs.double())
    floats = [name for name in found if name != "predicted"]
    row = f"row_statistics, {detector}"
    measure(
        "row statistics",
        [functools.partial(statistics, detector, table, x) for x in input_sets(inputs, device)],
        row=row,
        counts=row,
        prepare=functools.partial(prepare, detector, case, device),
        error=relative_error([found[name] for name in floats], [truth[name] for name in floats]),
        distinct=inputs.distinct_predictions,
    )


def test_softmax_maximum(inputs, case, measure, device):
    measure(
        "row statistics",
        [functools.partial(softmax_maximum, x) for x in input_sets(inputs, device)],
        row="softmax(1).max(1)",
        counts="row_statistics, MSP",
        prepare=functools.partial(prepare, None, case, device),
        error=relative_error([softmax_maximum(inputs)], [softmax_maximum(inputs.double())]),
    )
