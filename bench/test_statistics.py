"""Row statistics of a batch: those of one detector, of all together, and what softmax takes.

Ratios of one run matter here: NCI reads three times the bytes of MSP; all together should cost little more than their
parts, as logits and features are read once; and MSP should not be slower than `softmax(1).max(1)`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from ood_fast.statistics import STATISTICS, distance_table, row_statistics

from .cases import CIFAR100, IMAGENET, Case
from .conftest import over, relative_error
from .measure import input_sets

# The rows, by their names in bench/counts.py.
DETECTORS = {
    "MSP": ("max", "logsumexp"),
    "GEN": ("gen",),
    "entropy": ("entropy",),
    "fDBD": ("distance", "centred_norm"),
    "NCI": ("predicted", "norm1", "centred_norm", "projection"),
    "all": STATISTICS,
}


@pytest.fixture(**over((CIFAR100, IMAGENET, Case("ImageNet-1K scores", 4096, 1000, 2048))))
def case(request):
    return request.param


@pytest.mark.parametrize("detector", DETECTORS)
@torch.no_grad()
def test_statistics(detector, inputs, measure, device):
    """Compared with float64, where that is an error and not an index, before they are timed."""

    def of(x, table):
        return row_statistics(DETECTORS[detector], x.logits, x.z, W=x.W, mean=x.mean, table=table)

    table = distance_table(inputs.W)
    found, truth = of(inputs, table), of(inputs.double(), table.double())
    floats = [name for name in found if name != "predicted"]
    row = f"row_statistics, {detector}"
    measure(
        "row statistics",
        [functools.partial(of, x, table) for x in input_sets(inputs, device)],
        row=row,
        counts=row,
        error=relative_error([found[name] for name in floats], [truth[name] for name in floats]),
        distinct=inputs.distinct_predictions,
    )


@torch.no_grad()
def test_softmax_maximum(inputs, measure, device):
    def of(x):
        return x.logits.softmax(1).max(1).values

    measure(
        "row statistics",
        [functools.partial(of, x) for x in input_sets(inputs, device)],
        row="softmax(1).max(1)",
        counts="softmax maximum",
        error=relative_error([of(inputs)], [of(inputs.double())]),
    )
