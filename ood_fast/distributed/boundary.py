"""The mathematics of the loss, of D, and of their gradients, for a slice of the classes.

The notation and the formulas are those of `ood_fast.eager`. Three passes over the logits of this rank, with collectives
of n-vectors after the first two:

1. D needs the largest logit over all ranks, and the row w_p of the predicted class, which its owner sends to all;
2. the softmax of the gaps needs D;
3. the gradients need both. What the classes of all ranks pull at w_p is summed once more, and goes to the owner.

Nothing here meets an empty dimension: a call without samples ends before, and a rank without classes gets one that is
masked (`masked_class`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eager import sizes
from ..eager.distances import CLOSE_PAIR, centered, weight_tile
from ..eager.precision import matmul
from ..eager.rows import mask_gaps, temperature_of
from ..eager.sizes import row_chunks, slices
from .shards import Shards


def masked_class(head_weight: Tensor, *columns: Tensor | None) -> tuple[Tensor | None, ...]:
    """W, logits (or the bias), and other columns, with a class more: its logit is -inf, everything else of it 0."""
    masked, *others = columns
    masked = head_weight.new_full((1,), -math.inf) if masked is None else F.pad(masked, (0, 1), value=-math.inf)
    others = (t if t is None or not t.is_floating_point() else F.pad(t, (0, 1)) for t in others)
    return F.pad(head_weight, (0, 0, 0, 1)), masked, *others


def ordered(values: Tensor) -> Tensor:
    """int64 numbers in the order of the floats, NaN above all: a maximum over ranks that no NaN gets lost in."""
    bits = (values.double() + 0.0).masked_fill_(values.isnan(), math.nan).view(torch.int64)  # -0.0 + 0.0 is 0.0
    return _flip_negative(bits)


def unordered(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `ordered`."""
    return _flip_negative(numbers).view(torch.float64).to(dtype)


def _flip_negative(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


def predict(logits: Tensor, shards: Shards, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(f_p, p) over all ranks, (n,): the first index on ties; NaN wins."""
    own_top, own_index = logits.max(1)
    numbers = ordered(own_top)
    best = shards.max(numbers.clone())
    index = (own_index + shards.start).masked_fill_(numbers != best, torch.iinfo(torch.int64).max)
    return unordered(best, dtype), shards.min(index)


def linear(z: Tensor, head_weight: Tensor, bias: Tensor | None) -> Tensor:
    """z W^T + b in the dtype of z, tile by tile of W, of which one product could hold a whole copy."""
    logits = z.new_empty(z.shape[0], head_weight.shape[0])
    zero = z.new_zeros(())
    for columns in _tiles(head_weight):
        tile_bias = zero if bias is None else bias[columns].to(z.dtype)
        logits[:, columns] = matmul(z, head_weight[columns].to(z.dtype).t()).add_(tile_bias)
    return logits


def linear_backward(
    gradient: Tensor,
    z: Tensor,
    head_weight: Tensor,
    mean: Tensor,
    grad_z: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """grad_z += G (W - mean row), and grad_weight += G^T z, from the gradient G of the logits; tile by tile of W."""
    buffer = weight_tile(head_weight, mean.dtype)
    for columns in _tiles(head_weight):
        if grad_z is not None:
            grad_z.add_(matmul(gradient[:, columns], centered(head_weight[columns], mean, buffer)))
        if grad_weight is not None:
            grad_weight[columns].add_(matmul(gradient[:, columns].t(), z))


def _tiles(head_weight: Tensor) -> Iterator[slice]:
    """Slices of the classes, of which a centred copy stays small."""
    n_classes, n_features = head_weight.shape
    return slices(n_classes, sizes.WEIGHT_TILE_ELEMENTS // max(1, n_features))


# ----------------------------------------------------------------------------------------------------------------------
# Distances between rows of the head
# ----------------------------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """The u predicted classes and their distances to the classes of this rank."""

    classes: Tensor  # (u,), ascending
    table_row: Tensor  # (n,): where in `classes` the prediction of each sample is
    rows: Tensor  # (u, m): w_p
    mean_row: Tensor  # (m,): of all ranks
    inverse: Tensor  # (u, c_r): 1 / ||w_p - w_j||; 0 where j = p or rows coincide


def mean_row(head_weight: Tensor, shards: Shards, dtype: torch.dtype) -> Tensor:
    return shards.sum(head_weight.sum(0, dtype=dtype)).div_(shards.n_classes)


def geometry(predicted: Tensor, head_weight: Tensor, mean: Tensor, shards: Shards) -> Geometry:
    classes, table_row = torch.unique(predicted, return_inverse=True)
    mine, place = shards.locate(classes)
    rows = mean.new_zeros(classes.shape[0], head_weight.shape[1])
    rows[mine] = head_weight[place[mine]].to(mean.dtype)
    shards.sum(rows)  # exact: all but one of the terms are 0
    return Geometry(classes, table_row, rows, mean, _inverse_distances(rows, head_weight, mean))


def _inverse_distances(rows: Tensor, head_weight: Tensor, mean: Tensor) -> Tensor:
    """1 / ||rows_r - w_j||, 0 where the two coincide, (u, c_r); the Gram form, close pairs by direct differences."""
    inverse = rows.new_empty(rows.shape[0], head_weight.shape[0])
    left = rows - mean
    left_norms = left.square().sum(1)
    buffer = weight_tile(head_weight, mean.dtype)
    for columns in _tiles(head_weight):
        right = centered(head_weight[columns], mean, buffer)
        norms = right.square().sum(1)
        for some in slices(rows.shape[0], sizes.TABLE_TILE_ELEMENTS // right.shape[0]):
            tile = inverse[some, columns]
            bound = left_norms[some].unsqueeze(1) + norms
            torch.sub(bound, matmul(left[some], right.t()), alpha=2, out=tile)
            close = bound.mul_(CLOSE_PAIR) >= tile
            if close.any():
                row, other = (close & (bound > 0)).nonzero(as_tuple=True)
                tile.masked_fill_(close, 0.0)
                for pairs in slices(row.shape[0], sizes.DIFFERENCE_ELEMENTS // max(1, right.shape[1])):
                    r, j = row[pairs], other[pairs]
                    difference = rows[some][r] - head_weight[columns][j].to(tile.dtype)
                    tile[r, j] = difference.square_().sum(1)
            tile.rsqrt_().masked_fill_(tile.isinf(), 0.0)
    return inverse


def gaps(logits: Tensor, top: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(rows, gaps g (r, c_r), live classes; None where all are) for chunks of rows that stay in cache.

    Gaps are 0 on masked classes, NaN throughout rows that hold NaN or +inf on any rank, or nothing live on all of them.
    """
    for rows in row_chunks(*logits.shape):
        rows = slice(0, logits.shape[0]) if rows is None else rows
        gap, live = top[rows].unsqueeze(1) - logits[rows], None
        # The largest gap is finite exactly when no class here is masked and the row is sound.
        if not gap.amax().item() < math.inf:
            live, gap = mask_gaps(logits[rows], gap, top[rows])
        yield rows, gap, live


class Distances(NamedTuple):
    """n-vectors over the classes of all ranks."""

    distance: Tensor  # D; 0 without a boundary
    share: Tensor  # 1 / (K + average_offset); 0 where K = 0
    inverse_sum: Tensor  # sum_j R_j over the live classes
    n_live: Tensor


def distances(logits: Tensor, top: Tensor, head: Geometry, average_offset: int, shards: Shards) -> Distances:
    sums = top.new_empty(4, top.shape[0])
    for rows, gap, live in gaps(logits, top):
        inverse = head.inverse.index_select(0, head.table_row[rows])
        if live is not None:
            inverse.masked_fill_(~live, 0.0)
        sums[0, rows] = (inverse * gap).sum(1)
        sums[1, rows] = (inverse > 0).sum(1).to(sums.dtype)
        sums[2, rows] = inverse.sum(1)
        sums[3, rows] = float(gap.shape[1]) if live is None else live.sum(1).to(sums.dtype)
    to_boundaries, n_boundaries, inverse_sum, n_live = shards.sum(sums)
    share = torch.where(n_boundaries > 0, (n_boundaries + average_offset).reciprocal(), 0.0)
    return Distances(to_boundaries * share, share, inverse_sum, n_live)


# ----------------------------------------------------------------------------------------------------------------------
# Targets and the softmax
# ----------------------------------------------------------------------------------------------------------------------


class Target:
    """q_j, the target distribution over the classes of this rank, after class weights and label smoothing.

    `y` holds indices among all classes (n,), or the probabilities of the classes of this rank (n, c_r); `class_weight`
    is (c_r,). See `ood_fast.eager.rows.Targets`, which is this for one process.
    """

    def __init__(
        self,
        y: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        shards: Shards,
        dtype: torch.dtype,
    ):
        self.class_weight = None if class_weight is None else class_weight.to(dtype)
        self.smoothing = smoothing
        self.dtype = dtype
        self.is_index = not y.is_floating_point()
        if not self.is_index:
            self.probability = y
            return
        self.ignored = y == ignore_index
        self.invalid = ((y < 0) | (y >= shards.n_classes)) & ~self.ignored
        mine, place = shards.locate(y.masked_fill(self.ignored | self.invalid, -1))
        self.place = place.unsqueeze(1)
        own = mine.to(dtype) * (1.0 - smoothing)
        if class_weight is not None:
            own *= self.class_weight[place]
        self.own = own.unsqueeze(1)  # (n, 1): the mass on y; 0 on the other ranks

    def of(self, rows: slice) -> Target:
        """Those of a chunk of rows, counted from its first."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "class_weight":
                setattr(part, name, value[rows])
        return part

    def _mass(self, rows: slice, live: Tensor | None, n_live: Tensor, n_classes: int) -> Tensor:
        """q of the rows, (r, c_r)."""
        if self.is_index:
            mass = self.own.new_zeros(rows.stop - rows.start, n_classes)
            mass.scatter_(1, self.place[rows], self.own[rows])
        else:
            mass = self.probability[rows].to(self.dtype) * (1.0 - self.smoothing)
            if self.class_weight is not None:
                mass *= self.class_weight
        if self.smoothing:
            spread = (self.smoothing / n_live.clamp(min=1.0)).unsqueeze(1)
            if self.class_weight is not None:
                spread = spread * self.class_weight
            mass += spread if live is None else spread * live
        return mass

    def sums(self, gap: Tensor, rows: slice, live: Tensor | None, n_live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum_j q_j g_j, sum_j q_j, how many masked classes hold mass), over the classes of this rank, (r,)."""
        if self.is_index and not self.smoothing:
            mass, held = self.own[rows], self.place[rows]
            gap, live = gap.gather(1, held), None if live is None else live.gather(1, held)
        else:
            mass = self._mass(rows, live, n_live[rows], gap.shape[1])
        weighted = (mass * gap).sum(1)
        impossible = torch.zeros_like(weighted) if live is None else ((mass != 0) & ~live).sum(1).to(weighted.dtype)
        return weighted, mass.sum(1), impossible

    def subtract_from(self, gradient: Tensor, scale: Tensor, rows: slice, live: Tensor | None, n_live: Tensor) -> None:
        """gradient_ij -= scale_i q_ij in place; `scale` is (r, 1)."""
        if self.is_index and not self.smoothing:
            gradient.scatter_(1, self.place[rows], gradient.gather(1, self.place[rows]) - scale * self.own[rows])
        else:
            gradient.addcmul_(self._mass(rows, live, n_live[rows], gradient.shape[1]), scale, value=-1)

    def settle(self, loss: Tensor, slope: Tensor) -> None:
        """Ignored samples cost nothing; an index that nobody owns gives NaN (with `check` it is an error before)."""
        if self.is_index:
            loss.masked_fill_(self.ignored, 0.0).masked_fill_(self.invalid, math.nan)
            slope.masked_fill_(self.ignored, 0.0)

    def silence(self, gradient: Tensor, rows: slice) -> None:
        """The same for the gradient of the logits."""
        if self.is_index:
            gradient.masked_fill_(self.ignored[rows].unsqueeze(1), 0.0)
            gradient.masked_fill_(self.invalid[rows].unsqueeze(1), math.nan)


class Softmax(NamedTuple):
    """n-vectors over the classes of all ranks, of the softmax at temperature T."""

    temperature: Tensor
    log_partition: Tensor  # log sum_j exp(-g_j / T)
    total: Tensor  # Q = sum_j q_j
    slope: Tensor  # dL/dD / (K + average_offset)


def softmax(
    logits: Tensor, top: Tensor, target: Target, found: Distances, eps: float, shards: Shards
) -> tuple[Tensor, Softmax]:
    """(the loss of each sample, what its gradients need)."""
    fallback = found.distance <= eps
    temperature = temperature_of(found.distance, eps)
    sums = top.new_empty(5, top.shape[0])
    for rows, gap, live in gaps(logits, top):
        exponent = gap / temperature[rows].neg().unsqueeze(1)
        if live is not None:
            exponent.masked_fill_(~live, -math.inf)
        weight = exponent.exp_()
        sums[0, rows] = weight.sum(1)
        sums[1, rows] = weight.mul_(gap).sum(1)
        sums[2, rows], sums[3, rows], sums[4, rows] = target.sums(gap, rows, live, found.n_live)
    partition, mean_gap, weighted_gap, total, impossible = shards.sum(sums)
    log_partition = partition.log()
    impossible = impossible > 0
    loss = torch.addcdiv(log_partition * total, weighted_gap, temperature)
    loss.masked_fill_(impossible & ~loss.isnan(), math.inf)
    # Divided twice: T * T could underflow.
    slope = mean_gap.div_(partition).mul_(total).sub_(weighted_gap).div_(temperature).div_(temperature)
    slope.masked_fill_(impossible | fallback, 0.0).mul_(found.share)
    target.settle(loss, slope)
    return loss, Softmax(temperature, log_partition, total, slope)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


def add_rows(out: Tensor, places: Tensor, rows: Tensor) -> None:
    """out[places[i]] += rows[i], places repeated or not, the same bits in every run."""
    if out.device.type == "cpu":
        out.index_add_(0, places, rows)
    else:  # index_add_ adds by atomics there; this sorts
        out.index_put_((places,), rows, accumulate=True)


def gradients(
    sample_grad: Tensor,
    logits: Tensor,
    top: Tensor,
    predicted: Tensor,
    head: Geometry,
    found: Distances,
    target: Target | None,
    at: Softmax | None,
    shards: Shards,
    need_logits: bool,
    need_pull: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient of the logits of this rank, S), of sum_i sample_grad_i loss_i; without `target`, ... D_i.

    S (u, c_r) is what each class pulls at each predicted one, for `pull_weights`. No collective.
    """
    push = sample_grad * (found.share if at is None else at.slope)
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if need_logits else None
    pull = torch.zeros_like(head.inverse) if need_pull else None
    mine, place = shards.locate(predicted)
    at_predicted = (push * found.inverse_sum).masked_fill_(~mine, 0.0)
    for rows, gap, live in gaps(logits, top):
        row_push = push[rows].unsqueeze(1)
        if need_logits:
            if target is None:
                gradient = gap * 0.0  # NaN rows stay NaN
            else:
                inverse_temperature = at.temperature[rows].reciprocal().unsqueeze(1)
                gradient = torch.addcmul(at.log_partition[rows].neg().unsqueeze(1), gap, inverse_temperature, value=-1)
                gradient.exp_()
                if live is not None:
                    gradient.masked_fill_(~live, 0.0).masked_fill_(gap.isnan(), math.nan)
                scale = inverse_temperature.mul_(sample_grad[rows].unsqueeze(1))
                gradient.mul_(scale * at.total[rows].unsqueeze(1))
                target.subtract_from(gradient, scale, rows, live, found.n_live)
            inverse = head.inverse.index_select(0, head.table_row[rows])
            if live is not None:
                inverse.masked_fill_(~live, 0.0)
            gradient.addcmul_(inverse, row_push, value=-1)
            at_p = place[rows].unsqueeze(1)
            gradient.scatter_(1, at_p, gradient.gather(1, at_p) + at_predicted[rows].unsqueeze(1))
            if target is not None:
                target.silence(gradient, rows)
            grad_logits[rows] = gradient.to(logits.dtype)
        if need_pull:
            if live is not None:
                # 0 * NaN: an ignored sample's row may be anything, and its slope is 0.
                gap.masked_fill_(row_push == 0, 0.0)
            add_rows(pull, head.table_row[rows], gap.mul_(row_push.neg()))
    if need_pull:
        pull.mul_(head.inverse).mul_(head.inverse).mul_(head.inverse)
    return grad_logits, pull


def pull_weights(pull: Tensor, head: Geometry, head_weight: Tensor, grad_weight: Tensor) -> Tensor:
    """Add to `grad_weight` what S makes of the classes of this rank; return what it makes of the predicted, (u, m).

    dw_j += S_pj (w_j - w_p), and dw_p += sum_j S_pj (w_p - w_j), of which the return value is the part of this rank's
    j: `add_own` sums it. On centred rows, tile by tile of W.
    """
    left = head.rows - head.mean_row
    own = left * pull.sum(1, keepdim=True)
    buffer = weight_tile(head_weight, left.dtype)
    for columns in _tiles(head_weight):
        right = centered(head_weight[columns], head.mean_row, buffer)
        part = pull[:, columns]
        own.sub_(matmul(part, right))
        grad_weight[columns].addcmul_(right, part.sum(0).unsqueeze(1)).sub_(matmul(part.t(), left))
    return own


def add_own(grad_weight: Tensor, own: Tensor, classes: Tensor, shards: Shards) -> None:
    """Sum over the ranks what is pulled at the rows of `classes`, and add it where they are."""
    shards.sum(own)
    mine, place = shards.locate(classes)
    add_rows(grad_weight, place[mine], own[mine])
