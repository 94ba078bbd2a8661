"""The loss from features and head, for very many classes: loss and gradients for z, W and b.

Rows: `LINEAR_LOSSES` of bench/baselines.py. Each is compared with float64, on 8 samples and all classes, before it is
timed.
"""

from __future__ import annotations

import pytest

from .baselines import LINEAR_LOSSES
from .cases import LINEAR, Inputs
from .conftest import over


@pytest.fixture(**over(LINEAR))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def inputs(case, device):
    return Inputs.of(case, device, with_logits=False)


@pytest.mark.parametrize("row", LINEAR_LOSSES, ids=lambda row: row.name)
def test_linear_loss(row, inputs, measure_row):
    measure_row("head and loss, forward + backward", row, inputs, samples=8)
