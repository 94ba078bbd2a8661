"""Scores of a batch: NCI from features and logits and from features alone, and the distance to the boundaries, whose
table is made anew for each batch.

Rows: `SCORES` of bench/baselines.py: ours; the reference, which is all that plain PyTorch offers; and, where the logits
are at hand, the maximal softmax probability that these scores replace. Each is compared with float64 before
it is timed.
"""

from __future__ import annotations

import pytest

from .baselines import SCORES
from .cases import CIFAR10, CIFAR100, IMAGENET, IMAGENET21K, IMAGENET_VIT
from .conftest import over


@pytest.fixture(**over((CIFAR10, CIFAR100, IMAGENET_VIT, IMAGENET, IMAGENET21K)))
def case(request):
    return request.param


@pytest.mark.parametrize(
    ("what", "row"),
    [pytest.param(what, row, id=f"{what}-{row.name}") for what, rows in SCORES.items() for row in rows],
)
def test_score(what, row, inputs, measure_row):
    measure_row(what, row, inputs)
