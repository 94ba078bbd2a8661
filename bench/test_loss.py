"""A training step beyond the backbone, for given logits: loss and gradients for the logits, and for W where
the loss has one; and the forward pass alone.

Rows: `LOSSES` of bench/baselines.py. Each is compared with float64 before it is timed.
"""

from __future__ import annotations

import pytest

from .baselines import LOSSES
from .cases import DENSE
from .conftest import over


@pytest.fixture(**over(DENSE))
def case(request):
    return request.param


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_loss(row, inputs, measure_row):
    measure_row("loss forward + backward", row, inputs)


@pytest.mark.parametrize("row", [row for row in LOSSES if row.forward_only], ids=lambda row: row.name)
def test_forward(row, inputs, measure_row):
    """No gradients wanted, so nothing is computed or kept for them."""
    measure_row("loss forward", row, inputs, forward=True)
