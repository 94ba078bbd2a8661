"""The gradient of W through the distances between its rows.

With S of `kernels/README.md`: dw_p += sum_j S_pj (w_p - w_j) and dw_j += S_pj (w_j - w_p), on centred rows. Here the
`push` is -S, the sign in which the products are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import Geometry
from . import sizes
from .distances import centered, centered_rows, weight_tile
from .precision import matmul
from .sizes import slices

# A product loses digits of the difference of rows that are nearer to each other than this share of their lengths.
CLOSE_ROWS = 1e-2


def add_rows(out: Tensor, places: Tensor, rows: Tensor) -> None:
    """out[places[i]] += rows[i], places repeated or not, the same bits in every run."""
    if out.device.type == "cpu":
        out.index_add_(0, places, rows)
    else:  # index_add_ adds by atomics there; this sorts
        out.index_put_((places,), rows, accumulate=True)


def weight_gradient(gap_sums: Tensor, head_weight: Tensor, geometry: Geometry, apart: bool = False) -> Tensor:
    """dW from the summed gaps of each table row, which are spent: S = -R^3 * gap_sums.

    `apart`: no two rows of W are known to be close.
    """
    _, table, row_class = geometry
    n_rows, n_classes = table.shape
    mean_row = head_weight.mean(0, dtype=table.dtype)
    if n_rows == n_classes:
        push = gap_sums.mul_(table).mul_(table).mul_(table)
        return _pull_all(push + push.t(), head_weight, mean_row, None if apart else table).to(head_weight.dtype)
    n_distinct = int((row_class >= 0).sum())
    classes, inverse = row_class[:n_distinct], table[:n_distinct]
    push = gap_sums[:n_distinct].mul_(inverse).mul_(inverse).mul_(inverse)
    left = centered_rows(head_weight, classes, mean_row)
    grad_weight, own = pull_rows(push, left, head_weight, mean_row)
    add_rows(grad_weight, classes, own)
    return grad_weight.to(head_weight.dtype)


def _pull_all(push: Tensor, head_weight: Tensor, mean_row: Tensor, table: Tensor | None) -> Tensor:
    """Row i: sum_j push_ij (w_j - w_i), in one product; the pairs that the `table` finds close, by their differences.

    `push` is spent.
    """
    rows = centered(head_weight, mean_row)
    close = None
    # Most heads have none, as the least distance and the length of all rows together say.
    if table is not None and (table.amax() * torch.linalg.vector_norm(rows)).item() > 1 / CLOSE_ROWS:
        norms = torch.linalg.vector_norm(rows, dim=1)
        close = torch.maximum(norms, norms.unsqueeze(1)).mul_(table) > 1 / CLOSE_ROWS
        pull = push[close]
        push[close] = 0.0
    push.diagonal().sub_(push.sum(1))
    gradient = matmul(push, rows)
    if close is not None:
        row, other = close.nonzero(as_tuple=True)
        for pairs in slices(row.shape[0], sizes.DIFFERENCE_ELEMENTS // max(1, rows.shape[1])):
            i, j = row[pairs], other[pairs]
            difference = head_weight[j].to(pull.dtype) - head_weight[i].to(pull.dtype)
            add_rows(gradient, i, difference.mul_(pull[pairs].unsqueeze(1)))
    return gradient


def pull_rows(
    push: Tensor, left: Tensor, head_weight: Tensor, mean_row: Tensor, grad_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dW of all classes at hand, added to `grad_weight` where it is given; what they make of the predicted, (u, m)).

    `push` (u, c); `left` (u, m): the centred rows w_p, which are spent without `grad_weight`. W is read in tiles.
    """
    minus_sums = push.sum(1, keepdim=True).neg_()
    adds = grad_weight is not None
    if adds:
        own = left * minus_sums
    else:
        grad_weight = matmul(push.t(), left)
        own = left.mul_(minus_sums)
    buffer = weight_tile(head_weight, mean_row.dtype)
    for columns in slices(head_weight.shape[0], buffer.shape[0]):
        right = centered(head_weight[columns], mean_row, buffer)
        part = push[:, columns]
        own.add_(matmul(part, right))
        grad_weight[columns].addcmul_(right, part.sum(0).unsqueeze(1), value=-1)
        if adds:
            grad_weight[columns].add_(matmul(part.t(), left))
    return grad_weight, own
