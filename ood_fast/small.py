"""ELogitNorm for small heads on the CPU: the formulas of `eager.py` in half the calls.

At 128 x 10 the arithmetic takes microseconds and the calls are the cost. So here torch's own operators do all they can:
`pdist` gives every distance between rows of W by direct differences, `log_softmax` and `nll_loss` the loss with class
weights, ignored samples and reduction. A batch that is not plain (a masked class, coincident rows, D <= eps, NaN) is
refused with `NotPlainError`, and takes the general path.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import checks, eager

MAX_CLASSES = 128  # pdist's order is undone through a cached table of c^2 positions: 128 KiB here
MAX_ELEMENTS = 1 << 18  # of the logits: above, `eager.py` works in chunks that stay in cache
CLOSEST = 1e-12  # rows nearer to each other than this: R^3 would come near the end of float32
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

_nll_loss = torch.ops.aten.nll_loss_forward.default
_nll_loss_backward = torch.ops.aten.nll_loss_backward.default
_log_softmax_backward = torch.ops.aten._log_softmax_backward_data.default


class NotPlainError(Exception):
    """This batch needs a corner of the definition that the small form leaves to the general one."""


def applies(
    logits: Tensor, head_weight: Tensor, target: Tensor, class_weight: Tensor | None, label_smoothing: float
) -> bool:
    """Whether shapes, dtypes, device and keywords are those of the small form."""
    n_samples, n_classes = logits.shape
    return (
        1 < n_classes <= MAX_CLASSES
        and n_classes <= n_samples
        and n_samples * n_classes <= MAX_ELEMENTS
        and label_smoothing == 0
        and logits.device.type == "cpu"
        and logits.dtype == head_weight.dtype
        and logits.dtype.itemsize >= 4
        and not target.is_floating_point()
        and (class_weight is None or class_weight.dtype == logits.dtype)
    )


@functools.lru_cache(maxsize=16)
def _square_from_condensed(n_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions that turn pdist's order, followed by one 0 for the diagonal, into a square; and that 0."""
    positions = torch.full((n_classes, n_classes), n_classes * (n_classes - 1) // 2, device="cpu")
    row, column = torch.triu_indices(n_classes, n_classes, 1, device="cpu")
    positions[row, column] = positions[column, row] = torch.arange(row.shape[0], device="cpu")
    return positions, torch.zeros(1, dtype=dtype, device="cpu")


def forward(
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    eps: float,
    average_offset: int,
) -> tuple[Tensor, ...]:
    """(reduced loss, D, and what `backward` takes: -g, u = -g / D, log-probabilities, total weight, p, D, table).

    The table holds -R / (K + offset): the sign and the share once for its c^2 elements, not for everything made of it.

    Raises NotPlainError, or IndexError for a target out of range.
    """
    n_classes = logits.shape[1]
    positions, zero = _square_from_condensed(n_classes, logits.dtype)
    condensed = torch.pdist(head_weight)
    # Rows that coincide are 0 * inf in `backward`, also where neither of them is predicted and D does not show it.
    if not condensed.min().item() > CLOSEST:
        raise NotPlainError
    condensed.reciprocal_().mul_(-1.0 / (n_classes - 1 + average_offset))
    table = torch.cat((condensed, zero)).take(positions)
    top, predicted = logits.max(1, keepdim=True)
    minus_gap = logits - top
    distance = table.index_select(0, predicted.view(-1)).mul_(minus_gap).sum(1, keepdim=True)
    low, high = torch.aminmax(distance)
    if not (low.item() > eps and high.item() < math.inf):
        raise NotPlainError
    scaled = minus_gap / distance
    log_probability = torch.log_softmax(scaled, 1)
    try:
        loss, total = _nll_loss(log_probability, target, class_weight, _REDUCTIONS[reduction], ignore_index)
    except IndexError:
        checks.index_range(target, n_classes, ignore_index)  # raises, and names the value
        raise
    return loss, distance.view(-1).clone(), minus_gap, scaled, log_probability, total, predicted, distance, table


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    minus_gap: Tensor,
    scaled: Tensor,
    log_probability: Tensor,
    total: Tensor,
    predicted: Tensor,
    distance: Tensor,
    table: Tensor,
    ignore_index: int,
    reduction: str,
    average_offset: int,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients for logits and W."""
    n_classes = logits.shape[1]
    gradient = _nll_loss_backward(
        grad_loss, log_probability, target, class_weight, _REDUCTIONS[reduction], ignore_index, total
    )
    gradient = _log_softmax_backward(gradient, log_probability, 1, log_probability.dtype)  # by u
    gradient.div_(distance)
    # dL/dD = -sum_j dL/du_j u_j / D. The log-probabilities, u less a constant, would do as well, but for their rounding
    # where all u are small: rows of W that are close together.
    minus_slope = (gradient * scaled).sum(1, keepdim=True)
    p = predicted.view(-1)
    inverse = table.index_select(0, p)
    gradient.addcmul_(inverse, minus_slope, value=-1)
    gradient.scatter_add_(1, predicted, inverse.sum(1, keepdim=True).mul_(minus_slope))
    if not need_weight:
        return gradient, None
    # The table's cube is -(R / share)^3, and the slope lacks its share: share^2 is left over.
    share = n_classes - 1 + average_offset
    pull = torch.zeros_like(table).index_add_(0, p, minus_gap.mul(minus_slope), alpha=share * share)
    pull.mul_(table.pow(3))
    pull = pull + pull.t()
    centered = head_weight - head_weight.mean(0)
    return gradient, (centered * pull.sum(1, keepdim=True)).sub_(eager._product(pull, centered))
