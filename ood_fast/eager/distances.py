"""Inverse distances between rows of the head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Geometry
from . import sizes
from .precision import compute_dtype, full_precision, matmul
from .sizes import parts, slices, take

# The Gram form of s = |w_p|^2 + |w_j|^2 - 2 w_p.w_j has an absolute error of about eps * sqrt(m) * (|w_p|^2 + |w_j|^2),
# in float32 up to 1e-6 of the norms at m = 2048. Below this share of the norms the relative error of 1/sqrt(s) could
# pass 5e-5: such pairs are recomputed from their differences.
CLOSE_PAIR = 1e-2


class Rows(NamedTuple):
    """The rows w_p that are compared with every row of W: source[at]."""

    source: Tensor
    at: Tensor
    """(k,) int64"""
    own: Tensor
    """(k,) int64: where among the rows of W each of them is, or anything negative where it is not"""


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
    """Room for a tile of rows of W: as many as `sizes.WEIGHT_TILE_ELEMENTS` holds."""
    n_classes, n_features = head_weight.shape
    n_rows = min(n_classes, max(1, sizes.WEIGHT_TILE_ELEMENTS // max(1, n_features)))
    return torch.empty(n_rows, n_features, dtype=dtype, device=head_weight.device)


def inverse_distances(head_weight: Tensor, mean_row: Tensor, rows: Rows | None, out: Tensor) -> tuple[bool, bool]:
    """out[r, j] = 1 / ||w_p - w_j||, p = r-th of the `rows` (all of W in order if None); 0 where the two coincide.

    Returns whether no two of the rows compared coincide: then every row has c - 1 boundaries; and whether no two are
    even close.
    """
    n_rows, n_classes = out.shape
    square = rows is None
    if square:
        left = centered(head_weight, mean_row)
        every = torch.arange(n_classes, device=out.device)
        rows = Rows(head_weight, every, every)
    else:
        left = centered_rows(rows.source, rows.at, mean_row)
    left_norms = torch.linalg.vector_norm(left, dim=1).square_()
    buffer = left if square else weight_tile(head_weight, out.dtype)
    distinct = apart = True
    for columns in parts(n_classes, buffer.shape[0]):
        right_rows = take(head_weight, columns)
        right = left if square else centered(right_rows, mean_row, buffer)
        norms = left_norms if square else torch.linalg.vector_norm(right, dim=1).square_()
        into = out if columns is None else out[:, columns]
        for part in parts(n_rows, sizes.TABLE_TILE_ELEMENTS // right.shape[0]):
            norms_of_part = take(left_norms, part)
            tile = torch.add(norms_of_part.unsqueeze(1), norms, out=take(into, part))
            tile.sub_(matmul(take(left, part), right.t()), alpha=2)
            own = take(rows.own, part)
            if square:
                tile.scatter_(1, own.unsqueeze(1), math.inf)
            else:
                own = own if columns is None else own - columns.start
                here = ((own >= 0) & (own < tile.shape[1])).nonzero().squeeze(1)
                tile[here, own[here]] = math.inf
            of_part = Rows(rows.source, take(rows.at, part), own)
            # Most heads are settled by their extremes: one pass instead of three.
            if tile.amin() > (norms_of_part.amax() + norms.amax()) * CLOSE_PAIR:
                tile.rsqrt_()
                continue
            apart = False
            distinct &= _finish_tile(tile, norms_of_part, norms, right_rows, of_part)
    return distinct, apart


def _finish_tile(tile: Tensor, left_norms: Tensor, norms: Tensor, right: Tensor, rows: Rows) -> bool:
    """Turn squared distances into inverse distances in place, close pairs recomputed; whether no pair coincides."""
    bound = left_norms.unsqueeze(1) + norms
    close = tile <= bound * CLOSE_PAIR
    if not close.any():
        tile.rsqrt_()
        return True
    # Rows that centring made zero coincide with each other: their s is exactly 0 already.
    row, other = (close & (bound > 0)).nonzero(as_tuple=True)
    tile[close] = 0.0
    # By direct differences, a batch of pairs in cache at a time.
    for pairs in slices(row.shape[0], sizes.DIFFERENCE_ELEMENTS // max(1, right.shape[1])):
        r, j = row[pairs], other[pairs]
        difference = rows.source[rows.at[r]].to(tile.dtype) - right[j].to(tile.dtype)
        tile[r, j] = difference.square_().sum(1)
    coincident = tile == 0
    tile.rsqrt_().masked_fill_(coincident, 0.0)
    return not coincident.any()


def geometry_of(head_weight: Tensor, predicted: Tensor, dtype: torch.dtype) -> tuple[Geometry, bool]:
    """(the table: rows of all classes when n >= c, of the distinct predictions when n < c; whether none of them
    coincides with another row of W)."""
    n_samples, n_classes = predicted.shape[0], head_weight.shape[0]
    mean_row = head_weight.mean(0, dtype=dtype)
    if n_samples >= n_classes:
        table = mean_row.new_empty(n_classes, n_classes)
        distinct, _ = inverse_distances(head_weight, mean_row, None, table)
        # A copy: an operator may not return one tensor twice.
        return Geometry(predicted.clone(), table, torch.arange(n_classes, device=predicted.device)), distinct
    classes, table_row = torch.unique(predicted, return_inverse=True)
    rows = Rows(head_weight, classes, classes)
    # Zeros, not empty: rows that no prediction uses are returned too, and an operator must give the same twice.
    table = mean_row.new_zeros(n_samples, n_classes)
    distinct, _ = inverse_distances(head_weight, mean_row, rows, table[: classes.shape[0]])
    row_class = torch.full((n_samples,), -1, dtype=torch.int64, device=predicted.device)
    row_class[: classes.shape[0]] = classes
    return Geometry(table_row, table, row_class), distinct


def distance_table(head_weight: Tensor) -> Tensor:
    """R of all pairs of classes, (c, c), 0 on the diagonal and where rows coincide."""
    n_classes, dtype = head_weight.shape[0], compute_dtype(head_weight)
    table = torch.empty(n_classes, n_classes, dtype=dtype, device=head_weight.device)
    with full_precision(head_weight.device):
        inverse_distances(head_weight, head_weight.mean(0, dtype=dtype), None, table)
    return table
