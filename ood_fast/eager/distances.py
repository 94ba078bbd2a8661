"""Inverse distances between rows of the head, and the frames in which its rows are compared.

Products of rows lose the digits of a difference that is small beside what they multiply. Therefore rows are taken less
an origin near to them all: the mean row serves most heads, and whether it does falls out of the distances themselves.
Where it does not (one row much longer than the others moves the mean away from them), or where squares would leave the
range of the dtype, rows are taken less a median row, at a scale of theirs, and the pairs that are doubtful even so are
worked by their differences.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..records import Geometry
from . import sizes
from .precision import compute_dtype, full_precision, matmul
from .sizes import parts, slices, take

# The Gram form of s = |w_p|^2 + |w_j|^2 - 2 w_p.w_j has an absolute error of about eps * sqrt(m) * (|w_p|^2 + |w_j|^2),
# in float32 up to 1e-6 of the norms at m = 2048. Below this share of the norms the relative error of 1/sqrt(s) could
# pass 2e-5: such pairs are recomputed from their differences.
CLOSE_PAIR = 1 / 32
# Where more of a tile than this share is doubtful, the mean frame is to blame.
MANY_PAIRS = 1 / 16
# Lengths whose squares, cubes and products with each other keep all digits in float32.
LONG, SHORT = 2.0**20, 2.0**-20
# Rows of W of which the robust frame takes the median.
SAMPLED_ROWS = 31


class Rows(NamedTuple):
    """The rows w_p that are compared with every row of W: source[at]."""

    source: Tensor
    at: Tensor  # (k,) int64
    own: Tensor  # (k,) int64: where among the rows of W each of them is, or anything negative where it is not


class RowFrame(NamedTuple):
    """Rows are compared as (w - origin) * scale."""

    origin: Tensor  # (m,), in the dtype of the arithmetic
    scale: float  # a power of two


class Head:
    """W (c, m), and the frames of its rows."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    @functools.cached_property
    def mean(self) -> RowFrame:
        """The mean row."""
        return RowFrame(self.weight.mean(0, dtype=self.dtype), 1.0)

    @functools.cached_property
    def robust(self) -> RowFrame:
        """The median, entry by entry, of some rows, and the scale that makes the median of their lengths about 1."""
        n_rows = self.weight.shape[0]
        sample = self.weight[:: -(-n_rows // SAMPLED_ROWS)].to(self.dtype)
        # Not `median(0)`, which torch.use_deterministic_algorithms refuses on a GPU.
        origin = sample.sort(0).values[(sample.shape[0] - 1) // 2]
        largest = (sample - origin).abs().amax(1) if sample.shape[1] else sample.new_zeros(1)
        size = largest.median().item() or largest.amax().item()
        if not 0 < size < math.inf:
            return RowFrame(origin, 1.0)
        limit = math.frexp(torch.finfo(sample.dtype).max)[1] - 8
        return RowFrame(origin, 2.0 ** -max(-limit, min(limit, math.frexp(size)[1])))


def centered(weight: Tensor, origin: Tensor, out: Tensor | None = None) -> Tensor:
    """W less the origin: differences stay as they are, and products of the rest lose no digits to a common offset.

    Written over the first rows of `out` where it is given: a fresh tile costs more in page faults than in arithmetic.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=origin.dtype, device=weight.device)
    return torch.sub(weight, origin, out=out[: weight.shape[0]])


def framed(weight: Tensor, frame: RowFrame) -> tuple[Tensor, Tensor]:
    """(rows in the frame, 0 in place of those too long for products; the length of each, inf where it has none)."""
    rows = centered(weight, frame.origin).mul_(frame.scale)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return rows.masked_fill_((lengths > LONG).unsqueeze(1), 0.0), lengths


def weight_tile(head_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a tile of rows of W: as many as `sizes.WEIGHT_TILE_ELEMENTS` holds."""
    n_classes, n_features = head_weight.shape
    n_rows = min(n_classes, max(1, sizes.WEIGHT_TILE_ELEMENTS // max(1, n_features)))
    return torch.empty(n_rows, n_features, dtype=dtype, device=head_weight.device)


def inverse_distances(head: Head, rows: Rows | None, out: Tensor) -> tuple[bool, bool]:
    """out[r, j] = 1 / ||w_p - w_j||, p = r-th of the `rows` (all of W in order if None); 0 where the two coincide.

    Returns whether no two of the rows compared coincide: then every row has c - 1 boundaries; and whether no two are
    even close, and the mean frame serves all.
    """
    head_weight, origin = head.weight, head.mean.origin
    n_rows, n_classes = out.shape
    square = rows is None
    if rows is None:
        left = centered(head_weight, origin)
        every = torch.arange(n_classes, device=out.device)
        rows = Rows(head_weight, every, every)
    else:
        left = rows.source[rows.at].to(out.dtype).sub_(origin)
    left_norms = torch.linalg.vector_norm(left, dim=1).square_()
    buffer = left if square else weight_tile(head_weight, out.dtype)
    distinct = apart = True
    for columns in parts(n_classes, buffer.shape[0]):
        right_rows = take(head_weight, columns)
        right = left if square else centered(right_rows, origin, buffer)
        norms = left_norms if square else torch.linalg.vector_norm(right, dim=1).square_()
        into = out if columns is None else out[:, columns]
        for part in parts(n_rows, sizes.TABLE_TILE_ELEMENTS // right.shape[0]):
            norms_of_part = take(left_norms, part)
            tile = torch.add(norms_of_part.unsqueeze(1), norms, out=take(into, part))
            tile.sub_(matmul(take(left, part), right.t()), alpha=2)
            own = take(rows.own, part)
            own = own if columns is None else own - columns.start
            if square:
                tile.scatter_(1, own.unsqueeze(1), math.inf)
            else:
                _set_own(tile, own, math.inf)
            # Most heads are settled by their extremes: one pass instead of three.
            bound = norms_of_part.amax().item() + norms.amax().item()
            in_range = SHORT**2 < bound < LONG**2
            if in_range and tile.amin().item() > bound * CLOSE_PAIR:
                tile.rsqrt_()
                continue
            apart = False
            of_part = Rows(rows.source, take(rows.at, part), own)
            distinct &= _compare(tile, norms_of_part.unsqueeze(1) + norms, of_part, right_rows, head, in_range)
    return distinct, apart


def _set_own(tile: Tensor, own: Tensor, value: float) -> None:
    """Write `value` where a row meets itself."""
    here = ((own >= 0) & (own < tile.shape[1])).nonzero().squeeze(1)
    tile[here, own[here]] = value


def _compare(tile: Tensor, norms: Tensor, rows: Rows, right_rows: Tensor, head: Head, in_range: bool) -> bool:
    """Turn squared distances into inverse distances in place, doubtful ones recomputed; whether no pair coincides."""
    doubtful, frame = tile <= norms * CLOSE_PAIR, head.mean
    if not in_range or doubtful.sum() > MANY_PAIRS * tile.numel():
        frame = head.robust
        left, left_lengths = framed(rows.source[rows.at], frame)
        right, right_lengths = framed(right_rows, frame)
        norms = left_lengths.square().unsqueeze(1) + right_lengths.square()
        torch.sub(norms, matmul(left, right.t()), alpha=2, out=tile)
        # Nothing of NaN is doubtful; rows that are the origin itself coincide with each other.
        doubtful = (tile <= norms * CLOSE_PAIR) | (tile < SHORT**2)
        doubtful &= (left != 0).any(1).unsqueeze(1) | (right != 0).any(1)
        doubtful |= norms > LONG**2
    _set_own(doubtful, rows.own, False)
    row, other = doubtful.nonzero(as_tuple=True)
    tile.rsqrt_().mul_(frame.scale)
    # By direct differences, a batch of pairs in cache at a time.
    for pairs in slices(row.shape[0], sizes.DIFFERENCE_ELEMENTS // max(1, right_rows.shape[1])):
        r, j = row[pairs], other[pairs]
        difference = rows.source[rows.at[r]].to(tile.dtype) - right_rows[j].to(tile.dtype)
        # Squares of what has the size 1 stay in range.
        size = difference.abs().amax(1)
        difference.div_(size.unsqueeze(1))
        tile[r, j] = difference.square_().sum(1).rsqrt_().div_(size).masked_fill_(size == 0, 0.0)
    _set_own(tile, rows.own, 1.0)
    coincident = (tile == 0) | (tile == math.inf)
    tile.masked_fill_(coincident, 0.0)
    _set_own(tile, rows.own, 0.0)
    return not coincident.any()


def geometry_of(head_weight: Tensor, predicted: Tensor, dtype: torch.dtype) -> tuple[Geometry, bool]:
    """(the table: rows of all classes when n >= c, of the distinct predictions when n < c; whether none of them
    coincides with another row of W)."""
    n_samples, n_classes = predicted.shape[0], head_weight.shape[0]
    head = Head(head_weight, dtype)
    new: dict[str, Any] = {"dtype": dtype, "device": head_weight.device}
    if n_samples >= n_classes:
        table = torch.empty(n_classes, n_classes, **new)
        distinct, _ = inverse_distances(head, None, table)
        # A copy: an operator may not return one tensor twice.
        return Geometry(predicted.clone(), table, torch.arange(n_classes, device=predicted.device)), distinct
    classes, table_row = torch.unique(predicted, return_inverse=True)
    # Zeros, not empty: rows that no prediction uses are returned too, and an operator must give the same twice.
    table = torch.zeros(n_samples, n_classes, **new)
    distinct, _ = inverse_distances(head, Rows(head_weight, classes, classes), table[: classes.shape[0]])
    row_class = torch.full((n_samples,), -1, dtype=torch.int64, device=predicted.device)
    row_class[: classes.shape[0]] = classes
    return Geometry(table_row, table, row_class), distinct


def distance_table(head_weight: Tensor) -> Tensor:
    """R of all pairs of classes, (c, c), 0 on the diagonal and where rows coincide."""
    n_classes, dtype = head_weight.shape[0], compute_dtype(head_weight)
    table = torch.empty(n_classes, n_classes, dtype=dtype, device=head_weight.device)
    with full_precision(head_weight.device):
        inverse_distances(Head(head_weight, dtype), None, table)
    return table
