"""Inverse distances between rows of the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import sizes
from .precision import matmul
from .sizes import slices

# The Gram form of s = |w_p|^2 + |w_j|^2 - 2 w_p.w_j has an absolute error of about eps * sqrt(m) * (|w_p|^2 + |w_j|^2),
# in float32 up to 1e-6 of the norms at m = 2048. Below this share of the norms the relative error of 1/sqrt(s) could
# pass 5e-5: such pairs are recomputed from their differences.
CLOSE_PAIR = 1e-2


def centered(weight: Tensor, mean_row: Tensor, out: Tensor | None = None) -> Tensor:
    """W less its mean row: differences stay as they are, and products of the rest lose no digits to a common offset.

    Written over the first rows of `out` where it is given: a fresh tile costs more in page faults than in arithmetic.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=mean_row.dtype, device=weight.device)
    return torch.sub(weight, mean_row, out=out[: weight.shape[0]])


def centered_rows(head_weight: Tensor, classes: Tensor, mean_row: Tensor) -> Tensor:
    """`centered` rows W[classes]: in the place of what was gathered."""
    return head_weight[classes].to(mean_row.dtype).sub_(mean_row)


def weight_tile(head_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a tile of rows of W: as many as sizes.WEIGHT_TILE_ELEMENTS holds."""
    n_classes, n_features = head_weight.shape
    n_rows = min(n_classes, max(1, sizes.WEIGHT_TILE_ELEMENTS // max(1, n_features)))
    return torch.empty(n_rows, n_features, dtype=dtype, device=head_weight.device)


def inverse_distances(head_weight: Tensor, classes: Tensor | None, out: Tensor) -> bool:
    """out[r, j] = 1 / ||w_p - w_j||, p = classes[r] (all of them in order if None); 0 where j = p or rows coincide.

    Returns whether no two of the rows compared coincide: then every row has c - 1 boundaries.
    """
    n_rows, n_classes = out.shape
    mean_row = head_weight.mean(0, dtype=out.dtype)
    square = classes is None
    if square:
        classes = torch.arange(n_classes, device=out.device)
    left = centered(head_weight, mean_row) if square else centered_rows(head_weight, classes, mean_row)
    left_norms = torch.linalg.vector_norm(left, dim=1).square_()
    buffer = left if square else weight_tile(head_weight, out.dtype)
    distinct = True
    for columns in slices(n_classes, buffer.shape[0]):
        right = left if square else centered(head_weight[columns], mean_row, buffer)
        norms = left_norms if square else torch.linalg.vector_norm(right, dim=1).square_()
        for rows in slices(n_rows, sizes.TABLE_TILE_ELEMENTS // (columns.stop - columns.start)):
            tile = torch.add(left_norms[rows].unsqueeze(1), norms, out=out[rows, columns])
            tile.sub_(matmul(left[rows], right.t()), alpha=2)
            own = classes[rows] - columns.start
            if square:
                tile.scatter_(1, own.unsqueeze(1), math.inf)
            else:
                here = ((own >= 0) & (own < tile.shape[1])).nonzero().squeeze(1)
                tile[here, own[here]] = math.inf
            distinct &= _finish_tile(tile, left_norms[rows], norms, head_weight, classes[rows], columns)
    return distinct


def _finish_tile(
    tile: Tensor, left_norms: Tensor, norms: Tensor, head_weight: Tensor, own: Tensor, columns: slice
) -> bool:
    """Turn squared distances into inverse distances in place, close pairs recomputed; whether no pair coincides."""
    # Most heads are settled by their extremes: one pass instead of three.
    if tile.amin() > (left_norms.amax() + norms.amax()) * CLOSE_PAIR:
        tile.rsqrt_()
        return True
    bound = left_norms.unsqueeze(1) + norms
    close = tile <= bound * CLOSE_PAIR
    if not close.any():
        tile.rsqrt_()
        return True
    # Rows that centring made zero coincide with each other: their s is exactly 0 already.
    row, other = (close & (bound > 0)).nonzero(as_tuple=True)
    tile[close] = 0.0
    differences_into(tile, head_weight[columns], row, other, head_weight, own)
    coincident = tile == 0
    tile.rsqrt_().masked_fill_(coincident, 0.0)
    return not coincident.any()


def differences_into(tile: Tensor, right: Tensor, row: Tensor, other: Tensor, head_weight: Tensor, own: Tensor) -> None:
    """tile[row, other] = ||w_own[row] - right_other||^2 by direct differences, a batch of pairs in cache at a time."""
    for pairs in slices(row.shape[0], sizes.DIFFERENCE_ELEMENTS // max(1, right.shape[1])):
        r, j = row[pairs], other[pairs]
        difference = head_weight[own[r]].to(tile.dtype) - right[j].to(tile.dtype)
        tile[r, j] = difference.square_().sum(1)


def table_of_batch(
    head_weight: Tensor, predicted: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """(table_row, table, row_class), rows of all classes when n >= c, of the distinct predictions when n < c;
    and whether none of them coincides with another row of W."""
    n_samples, n_classes = predicted.shape[0], head_weight.shape[0]
    # Zeros, not empty: rows that no prediction uses are returned too, and an operator must give the same twice.
    table = torch.zeros(min(n_samples, n_classes), n_classes, dtype=dtype, device=predicted.device)
    if n_samples >= n_classes:
        distinct = inverse_distances(head_weight, None, table)
        # A copy: an operator may not return one tensor twice.
        return (predicted.clone(), table, torch.arange(n_classes, device=predicted.device)), distinct
    classes, table_row = torch.unique(predicted, return_inverse=True)
    distinct = inverse_distances(head_weight, classes, table[: classes.shape[0]])
    row_class = torch.full((n_samples,), -1, dtype=torch.int64, device=predicted.device)
    row_class[: classes.shape[0]] = classes
    return (table_row, table, row_class), distinct
