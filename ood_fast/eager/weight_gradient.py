"""The gradient of W through the distances between its rows.

With S of `kernels/README.md`: dw_p += sum_j S_pj (w_p - w_j) and dw_j += S_pj (w_j - w_p). Here the `push` is -S, the
sign in which the products are added, and rows are those of a frame of `distances`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Geometry
from . import sizes
from .distances import LONG, SHORT, Head, RowFrame, centered, framed, weight_tile
from .precision import matmul
from .sizes import slices

# Rows nearer than the inverse of this, in the robust frame, are few: their forces times R could leave the range.
NEAR = 2.0**10
# A product loses digits of the difference of rows that are nearer to each other than this share of their lengths.
CLOSE_ROWS = 1e-1


def add_rows(out: Tensor, places: Tensor, rows: Tensor) -> None:
    """out[places[i]] += rows[i], places repeated or not, the same bits in every run."""
    if out.device.type == "cpu":
        out.index_add_(0, places, rows)
    else:  # index_add_ adds by atomics there; this sorts
        out.index_put_((places,), rows, accumulate=True)


def unit_of(table: Tensor) -> tuple[float, float]:
    """(the largest R, a power of two near it where cubes of R may leave the range, 1 elsewhere).

    There gaps are as small as R is large, or the other way round, and so is what pushes them: the product of these two
    is taken in units of this.
    """
    nearest = table.amax().item()
    if SHORT <= nearest <= LONG or not 0 < nearest < math.inf:
        return nearest, 1.0
    return nearest, 2.0 ** max(-120, min(120, math.frexp(nearest)[1]))


def _is_apart(nearest: float, longest: float) -> bool:
    """Whether products serve all pairs: none is close beside the longest of the rows, and cubes stay in range."""
    return nearest == 0 or (SHORT < nearest < LONG and nearest * longest <= 1 / CLOSE_ROWS)


def weight_gradient(
    gap_sums: Tensor, head: Head, geometry: Geometry, nearest: float, unit: float, apart: bool = False
) -> Tensor:
    """dW in the dtype of the arithmetic, from the summed gaps of each table row, which are spent:
    S = -R^3 * gap_sums / unit.

    `nearest`, `unit`: of `unit_of`. `apart`: no two rows of W are known to be close, and the mean frame serves them.
    """
    _, table, row_class = geometry
    n_rows, n_classes = table.shape
    if n_rows == n_classes:  # one product for both sums
        rows = centered(head.weight, head.mean.origin)
        if apart or _is_apart(nearest, torch.linalg.vector_norm(rows, dim=1).amax().item()):
            push = gap_sums.mul_(table).mul_(table).mul_(table)
            push = push + push.t()
            push.diagonal().sub_(push.sum(1))
            return matmul(push, rows)
    n_distinct = int((row_class >= 0).sum())
    classes = row_class[:n_distinct]
    left = head.weight[classes].to(table.dtype)
    grad_weight, own = pull_rows(gap_sums[:n_distinct], table[:n_distinct], left, head, (nearest, unit))
    add_rows(grad_weight, classes, own)
    return grad_weight


def pull_rows(
    gap_sums: Tensor,
    inverse: Tensor,
    left: Tensor,
    head: Head,
    units: tuple[float, float],
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dW of all classes at hand, added to `grad_weight` where it is given; what they make of the predicted, (u, m)).

    `gap_sums`, which are spent, and `inverse`, R, are (u, c); `left` (u, m): the rows w_p; `units`
    of `unit_of`. W is read in tiles.
    """
    origin, (nearest, unit) = head.mean.origin, units
    force = gap_sums.mul_(inverse if unit == 1.0 else inverse / unit).mul_(inverse)
    ours = left - origin
    longest = torch.linalg.vector_norm(ours, dim=1).amax().item()
    # No row of W is farther from the origin than the longest w_p and the farthest from one of these together.
    farthest = inverse[0].masked_fill(inverse[0] == 0, math.inf).amin().reciprocal().item()
    if _is_apart(nearest, longest + farthest):
        return _pull_products(force.mul_(inverse), ours, head, grad_weight)
    buffer = weight_tile(head.weight, left.dtype)
    adds, own = grad_weight is not None, torch.zeros_like(left)
    if grad_weight is None:
        grad_weight = left.new_empty(head.weight.shape)
    for columns in slices(head.weight.shape[0], buffer.shape[0]):
        right_rows, near, push = head.weight[columns], inverse[:, columns], force[:, columns]
        left_rows, theirs, alone = ours, centered(right_rows, origin, buffer), None
        if _is_apart(nearest, max(longest, torch.linalg.vector_norm(theirs, dim=1).amax().item())):
            push.mul_(near)
        else:
            push, left_rows, theirs, alone = _separated(push, near, left, right_rows, head.robust)
        own_part = matmul(push, theirs).addcmul_(left_rows, push.sum(1, keepdim=True), value=-1)
        part = matmul(push.t(), left_rows).addcmul_(theirs, push.sum(0).unsqueeze(1), value=-1)
        if alone is not None:
            for pairs in slices(alone.row.shape[0], sizes.DIFFERENCE_ELEMENTS // max(1, left.shape[1])):
                r, j, of_force, of_near = (t[pairs] for t in alone)
                pull = (right_rows[j].to(left.dtype) - left[r]).mul_(of_near.unsqueeze(1)).mul_(of_force.unsqueeze(1))
                add_rows(own_part, r, pull)
                add_rows(part, j, pull.neg_())
        own.add_(own_part)
        grad_weight[columns] = part.add_(grad_weight[columns]) if adds else part
    return grad_weight, own


def _pull_products(push: Tensor, left: Tensor, head: Head, grad_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """`pull_rows` of -S and centred rows, which are spent, where products serve all pairs."""
    minus_sums = push.sum(1, keepdim=True).neg_()
    adds = grad_weight is not None
    if grad_weight is not None:
        own = left * minus_sums
    else:  # one product of all tiles is faster, and adding it would hold another dW
        grad_weight = matmul(push.t(), left)
        own = left.mul_(minus_sums)
    buffer = weight_tile(head.weight, left.dtype)
    for columns in slices(head.weight.shape[0], buffer.shape[0]):
        right, part = centered(head.weight[columns], head.mean.origin, buffer), push[:, columns]
        own.add_(matmul(part, right))
        into = grad_weight[columns].addcmul_(right, part.sum(0).unsqueeze(1), value=-1)
        if adds:
            into.add_(matmul(part.t(), left))
    return grad_weight, own


class Pairs(NamedTuple):
    """Pairs of rows that are worked by their differences, each (q,)."""

    row: Tensor
    other: Tensor
    force: Tensor  # gap_sums R^2 / unit
    inverse: Tensor  # R


def _separated(
    force: Tensor, inverse: Tensor, left: Tensor, right: Tensor, frame: RowFrame
) -> tuple[Tensor, Tensor, Tensor, Pairs]:
    """(push, and both sides in the robust frame, for products; the pairs that are not in them).

    A product of W/t and R t is that of W and R: at the scale of the rows no cube leaves the range.
    """
    ours, left_lengths = framed(left, frame)
    theirs, right_lengths = framed(right, frame)
    lengths = torch.maximum(left_lengths.unsqueeze(1), right_lengths)
    near = inverse / frame.scale
    alone = ((near * lengths > 1 / CLOSE_ROWS) | (near > NEAR) | (lengths > LONG)) & (inverse > 0)
    row, other = alone.nonzero(as_tuple=True)
    push = near.mul_(force).masked_fill_(alone, 0.0)
    return push, ours, theirs, Pairs(row, other, force[row, other], inverse[row, other])
