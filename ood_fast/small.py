"""ELogitNorm for small heads on the CPU: the formulas of `eager.py` in a third of the calls.

At 128 x 10 the arithmetic takes microseconds and the calls are the cost. So here torch's own operators do all they can:
`pdist` gives every distance between rows of W by direct differences, `log_softmax` and `nll_loss` the loss with class
weights, ignored samples and reduction. The gradients are made together with the loss, from what is at hand. A batch
that is not plain (a masked class, coincident rows, D <= eps, NaN) is refused with `NotPlainError`, and takes the
general path.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .eager.precision import full_precision, keep_tensors, matmul

MAX_CLASSES = 128  # pdist's order is undone through cached tables of 1.5 c^2 positions: 190 KiB here
# Up to so many elements of differences between rows, pdist's own gradient costs less than the calls that a product
# takes: at m = 512, up to 32 classes.
PAIR_ELEMENTS = 1 << 18
MAX_ELEMENTS = 1 << 18  # of the logits: above, `eager.py` works in chunks that stay in cache
# Rows nearer to each other than this share of the largest distance: a product would lose digits of their difference.
CLOSE_ROWS = 1e-2
CLOSEST = 1e-12  # rows nearer to each other than this: powers of R would come near the end of float32
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

_pdist_backward = torch.ops.aten._pdist_backward.default
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
        and logits.is_cpu
        and logits.dtype == head_weight.dtype
        and logits.dtype.itemsize >= 4
        and not target.is_floating_point()
        and (class_weight is None or class_weight.dtype == logits.dtype)
    )


class Geometry(NamedTuple):
    """What the loss takes of W alone."""

    lengths: Tensor  # ||w_i - w_j|| of each pair i < j, in pdist's order
    nearest: float
    farthest: float
    table: Tensor  # (c, c), row p is dD/df: -R / (K + offset), and at p, where the gap is 0, minus their sum


@keep_tensors(maxsize=16)
def _constants(n_classes: int, average_offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-1 / (K + offset) and 1, 0-dim; where pdist puts each pair, (c, c); where each of its pairs is in that square.

    The diagonal of the square is no pair: it points at the first one.
    """
    row, column = torch.triu_indices(n_classes, n_classes, 1, device="cpu")
    positions = torch.zeros(n_classes, n_classes, dtype=torch.int64, device="cpu")
    positions[row, column] = positions[column, row] = torch.arange(row.shape[0], device="cpu")
    minus_inverse, one = torch.tensor([-1.0 / (n_classes - 1 + average_offset), 1.0], dtype=dtype, device="cpu")
    return minus_inverse, one, positions, row * n_classes + column


def _balance_rows(square: Tensor) -> Tensor:
    """The diagonal, in place, that lets each row add up to 0: W's rows times a row of it are differences of rows."""
    diagonal = square.diagonal()
    diagonal.zero_()
    diagonal.sub_(square.sum(1))
    return square


def geometry(head_weight: Tensor, average_offset: int) -> Geometry:
    """Raises NotPlainError where two rows coincide."""
    lengths = torch.pdist(head_weight)
    nearest, farthest = (extreme.item() for extreme in torch.aminmax(lengths))
    # They are 0 * inf in dW, also where neither of them is predicted and D does not show it.
    if not nearest > CLOSEST:
        raise NotPlainError
    minus_inverse, _, positions, _ = _constants(len(head_weight), average_offset, head_weight.dtype)
    table = _balance_rows(torch.div(minus_inverse, lengths).take(positions))
    return Geometry(lengths, nearest, farthest, table)


def loss_and_gradients(
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    eps: float,
    average_offset: int,
    grad_loss: Tensor | None = None,
    need_logits: bool = False,
    need_weight: bool = False,
    given: Geometry | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(reduced loss, D, gradient for logits if either is needed, gradient for W if needed); None for the others.

    `grad_loss`: the upstream gradient, 0-dim or with reduction "none" (n,); 1 if None. `given`: the geometry of W,
    where it is known.

    Raises NotPlainError, or IndexError for a target out of range.
    """
    n_classes = head_weight.shape[0]
    lengths, _, _, table = given = given or geometry(head_weight, average_offset)
    _, one, _, upper = _constants(n_classes, average_offset, logits.dtype)
    top, predicted = logits.max(1)
    minus_gap = logits - top.unsqueeze(1)
    rows = table.index_select(0, predicted)
    distance = (rows * minus_gap).sum(1)
    low, high = torch.aminmax(distance)
    if not (low.item() > eps and high.item() < math.inf):
        raise NotPlainError
    temperature = distance.unsqueeze(1)
    scaled = minus_gap.div_(temperature)  # u
    log_probability = torch.log_softmax(scaled, 1)
    kind = _REDUCTIONS[reduction]
    try:
        loss, total = _nll_loss(log_probability, target, class_weight, kind, ignore_index)
    except IndexError:
        checks.index_range(target, n_classes, ignore_index)  # raises, and names the value
        raise
    if not (need_logits or need_weight):
        return loss, distance, None, None
    grad_loss = one if grad_loss is None else grad_loss
    gradient = _nll_loss_backward(grad_loss, log_probability, target, class_weight, kind, ignore_index, total)
    gradient = _log_softmax_backward(gradient, log_probability, 1, logits.dtype)  # by u
    # sum_j dL/du_j u_j = -D dL/dD. The log-probabilities, u less a constant, would do as well, but for their rounding
    # where all u are small: rows of W that are close together.
    slope = (gradient * scaled).sum(1, keepdim=True)
    gradient.addcmul_(rows, slope, value=-1).div_(temperature)
    if not need_weight:
        return loss, distance, gradient, None
    # dL/d||w_p - w_j|| = -slope u R^2 / (K + offset), summed over the samples of each p and over both orders of a pair.
    # The table brings 1 / (K + offset) with each factor R, once more than is meant, or twice: `alpha` takes that out.
    count = n_classes - 1 + average_offset
    by_differences = lengths.shape[0] * head_weight.shape[1] <= PAIR_ELEMENTS
    alpha = -count if by_differences else -count * count
    pull = torch.zeros_like(table).index_add_(0, predicted, scaled.mul_(slope), alpha=alpha)
    pull = (pull + pull.t()).mul_(table).mul_(table)
    if by_differences:
        return loss, distance, gradient, _pdist_backward(pull.take(upper), head_weight.contiguous(), 2.0, lengths)
    return loss, distance, gradient, _weighted_differences(pull.mul_(table), head_weight, given, upper)


def _weighted_differences(pull: Tensor, head_weight: Tensor, given: Geometry, upper: Tensor) -> Tensor:
    """Row i: sum_j pull_ij (w_j - w_i), by one product, and close pairs by their differences. `pull` is spent.

    Raises NotPlainError where these are many: an outlier among the rows makes all others close.
    """
    close = None
    if given.nearest < CLOSE_ROWS * given.farthest:
        close = upper[given.lengths < CLOSE_ROWS * given.farthest]
        row, other = close // len(pull), close % len(pull)
        if row.shape[0] * head_weight.shape[1] > PAIR_ELEMENTS:
            raise NotPlainError
        by_pair = pull[row, other].unsqueeze(1) * (head_weight[other] - head_weight[row])
        pull[row, other] = pull[other, row] = 0.0
    # No common offset costs digits when a row of W is the origin; the mean row would serve as well, but takes a pass.
    centered = head_weight - head_weight[0]
    with full_precision(head_weight.device):
        gradient = matmul(_balance_rows(pull), centered)
    if close is not None:
        gradient.index_add_(0, row, by_pair).index_add_(0, other, by_pair, alpha=-1)
    return gradient
