"""The gradient of W through the distances between its rows."""

from __future__ import annotations

from torch import Tensor

from .distances import centered, centered_rows, weight_tile
from .precision import matmul
from .sizes import slices


def weight_gradient(gap_sums: Tensor, head_weight: Tensor, table: Tensor, row_class: Tensor) -> Tensor:
    """dW from the summed gaps of each table row: S = -R^3 * gap_sums, then the pull of every pair along its difference.

    dw_p += sum_j S_pj (w_p - w_j) and dw_j += S_pj (w_j - w_p), on centred rows. `gap_sums` is spent; it becomes -S,
    the sign in which the products are added.
    """
    n_rows, n_classes = table.shape
    mean_row = head_weight.mean(0, dtype=table.dtype)
    if n_rows == n_classes:
        push = gap_sums.mul_(table).mul_(table).mul_(table)
        push = push + push.t()
        push.diagonal().sub_(push.sum(1))
        return matmul(push, centered(head_weight, mean_row)).to(head_weight.dtype)
    n_distinct = int((row_class >= 0).sum())
    classes, inverse = row_class[:n_distinct], table[:n_distinct]
    push = gap_sums[:n_distinct].mul_(inverse).mul_(inverse).mul_(inverse)
    left = centered_rows(head_weight, classes, mean_row)
    grad_weight = matmul(push.t(), left)
    own = left.mul_(push.sum(1, keepdim=True).neg_())
    buffer = weight_tile(head_weight, table.dtype)
    for columns in slices(n_classes, buffer.shape[0]):
        right = centered(head_weight[columns], mean_row, buffer)
        part = push[:, columns]
        own.add_(matmul(part, right))
        grad_weight[columns].addcmul_(right, part.sum(0).unsqueeze(1), value=-1)
    return grad_weight.index_add_(0, classes, own).to(head_weight.dtype)
