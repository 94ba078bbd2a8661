"""What the ranks find out together about rows of logits, by sums over the classes of all of them.

The mathematics of a row is that of `ood_fast.eager`. Three passes over the logits of this rank, with collectives of
n-vectors after the first two:

1. D needs the largest logit over all ranks, and the row w_p of the predicted class, which its owner sends to all;
2. the softmax of the gaps needs D;
3. the gradients need both. What the classes of all ranks pull at w_p is summed once more, and goes to the owner.

Nothing here meets an empty dimension: a call without samples ends before, and a rank without classes gets one that is
masked (`masked_class`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import eager
from ..eager import sizes
from ..eager.boundary import Totals, gradients, share_of
from ..eager.distances import Head, Rows, inverse_distances
from ..eager.precision import full_precision
from ..eager.rows import Part, RowSums, Targets, gaps_of, row_loss, row_sums, temperature_of
from ..eager.sizes import slices
from ..eager.weight_gradient import add_rows, pull_rows, unit_of
from ..ops.backend import backend_of
from ..records import Geometry, Needs, Tempered
from .shards import Shards


def masked_class(head_weight: Tensor, *columns: Tensor | None) -> tuple[Any, ...]:
    """W, logits (or the bias), and other columns, with a class more: its logit is -inf, everything else of it 0."""
    masked, *others = columns
    masked = head_weight.new_full((1,), -math.inf) if masked is None else F.pad(masked, (0, 1), value=-math.inf)
    padded = (t if t is None or not t.is_floating_point() else F.pad(t, (0, 1)) for t in others)
    return F.pad(head_weight, (0, 0, 0, 1)), masked, *padded


def _flip_negative(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


def predict(logits: Tensor, shards: Shards, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(f_p, p) over all ranks, (n,): the first index on ties; NaN wins."""
    own_top, own_index = logits.max(1)
    # int64 numbers in the order of the floats, NaN above all: a maximum that no NaN gets lost in. -0.0 + 0.0 is 0.0.
    bits = (own_top.double() + 0.0).masked_fill_(own_top.isnan(), math.nan).view(torch.int64)
    numbers = _flip_negative(bits)
    best = shards.max(numbers.clone())
    index = (own_index + shards.start).masked_fill_(numbers != best, torch.iinfo(torch.int64).max)
    return _flip_negative(best).view(torch.float64).to(dtype), shards.min(index)


def gaps(logits: Tensor, top: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(rows, gaps g (r, c_r), live classes; None where all are) for chunks of rows that stay in cache.

    Gaps are 0 on masked classes, NaN throughout rows that hold NaN or +inf on any rank, or nothing live on all of them.
    """
    for rows in slices(logits.shape[0], sizes.ROW_CHUNK_ELEMENTS // logits.shape[1]):
        yield rows, *gaps_of(logits[rows], top[rows].unsqueeze(1))


class Found(NamedTuple):
    """What the first pass finds; n-vectors are over the classes of all ranks."""

    distance: Tensor
    """D (n,); 0 without a boundary"""
    share: Tensor
    """1 / (K + average_offset), (n,); 0 where K = 0"""
    place: Tensor
    """(n,) of the predicted class among those of this rank; 0 where it is another's"""
    left: Tensor
    """(u, m): w_p of the u predicted classes"""
    apart: bool
    """whether no rows are close, as of `inverse_distances`"""
    geometry: Geometry
    """the table (u, c_r); 1 / ||w_p - w_j|| for the classes of this rank, which `row_class` (u,) numbers among all"""
    totals: Totals


def find(logits: Tensor, head: Head, average_offset: int, shards: Shards) -> Found:
    """Predictions and distances. Each rank compares rows in frames of its own."""
    head_weight, origin = head.weight, head.mean.origin
    with full_precision(logits.device):
        top, predicted = predict(logits, shards, origin.dtype)
        classes, table_row = torch.unique(predicted, return_inverse=True)
        mine, place = shards.locate(classes)
        rows = origin.new_zeros(classes.shape[0], head_weight.shape[1])
        rows[mine] = head_weight[place[mine]].to(origin.dtype)
        shards.sum(rows)  # exact: all but one of the terms are 0
        inverse = origin.new_empty(classes.shape[0], head_weight.shape[0])
        every = torch.arange(classes.shape[0], device=classes.device)
        _, apart = inverse_distances(head, Rows(rows, every, place.masked_fill(~mine, -1)), inverse)
    sums = _boundary_sums(logits, top, Geometry(table_row, inverse, classes))
    to_boundaries, n_boundaries, inverse_sum, n_live = shards.sum(sums)
    share = share_of(n_boundaries, average_offset, top.dtype)
    mine, place = shards.locate(predicted)
    return Found(
        *(to_boundaries * share, share, place, rows, apart, Geometry(table_row, inverse, classes)),
        Totals(top, inverse_sum, inverse_sum, n_live, mine),
    )


def _boundary_sums(logits: Tensor, top: Tensor, geometry: Geometry) -> Tensor:
    """sum g R, K, sum R and the number of live classes among those of this rank, (4, n)."""
    backend = backend_of(logits, geometry.table)
    if backend is not eager:
        there: Tensor = backend.shard_boundary_sums(logits, top, geometry)
        return there
    sums = top.new_empty(4, top.shape[0])
    for part, gap, live in gaps(logits, top):
        near = geometry.table.index_select(0, geometry.table_row[part])
        if live is not None:
            near.masked_fill_(~live, 0.0)
        sums[0, part] = (near * gap).sum(1)
        sums[1, part] = (near > 0).sum(1).to(sums.dtype)
        sums[2, part] = near.sum(1)
        sums[3, part] = float(gap.shape[1]) if live is None else live.sum(1).to(sums.dtype)
    return sums


def _softmax_sums(
    logits: Tensor, top: Tensor, temperature: Tensor, n_live: Tensor, targets: Targets, shards: Shards
) -> Tensor:
    """The fields of `RowSums` for the classes of this rank, (5, n)."""
    backend = backend_of(logits, temperature)
    if backend is not eager:
        there: Tensor = backend.shard_softmax_sums(logits, top, temperature, n_live, targets.labels, shards)
        return there
    sums = temperature.new_zeros(len(RowSums._fields), temperature.shape[0])
    for rows, gap, live in gaps(logits, top):
        part = Part(rows, live, n_live[rows])
        for i, of_rows in enumerate(row_sums(gap, temperature[rows], targets, part, torch.empty_like(gap), True)):
            if of_rows is not None:
                sums[i, rows] = of_rows if not isinstance(of_rows, Tensor) else of_rows.to(sums.dtype)
    return sums


def losses(
    logits: Tensor, targets: Targets, found: Found, eps: float, shards: Shards
) -> tuple[Tensor, Tempered, Totals]:
    """(the loss of each sample, what its gradients need)."""
    temperature = temperature_of(found.distance, eps)
    sums = _softmax_sums(logits, found.totals.top, temperature, found.totals.n_live, targets, shards)
    partition, weighted_gap, total, impossible, weighted_exponent = shards.sum(sums)
    totals = found.totals._replace(total=total)
    loss, log_partition, slope = row_loss(
        RowSums(partition, weighted_gap, total, impossible > 0, weighted_exponent), temperature
    )
    slope.masked_fill_(found.distance <= eps, 0.0).mul_(found.share)
    targets.settle(loss, slope)
    return loss, Tempered(found.place, temperature, log_partition, slope), totals


class State(NamedTuple):
    """What the gradients need of the first two passes."""

    geometry: Geometry
    tempered: Tempered
    totals: Totals
    left: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them in a row, as autograd keeps them."""
        return *self.geometry, *self.tempered, *self.totals, self.left

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> State:
        """The inverse of `tensors`."""
        return cls(Geometry(*tensors[:3]), Tempered(*tensors[3:7]), Totals(*tensors[7:12]), *tensors[12:])


def pulled(
    sample_grad: Tensor, logits: Tensor, targets: Targets | None, state: State, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient of the logits of this rank, the summed gaps (u, c_r) for `add_pull`), of sum_i sample_grad_i
    loss_i; without `targets`, ... D_i. No collective."""
    unit = unit_of(state.geometry.table)[1] if needs.weight else 1.0
    geometry, tempered, totals, _ = state
    backend, grad_logits = backend_of(logits, geometry.table), None
    if needs.logits and targets is not None and targets.shards is not None and backend is not eager:
        given = (
            *(totals.top, totals.total, totals.inverse_sum.masked_fill(~totals.mine, 0.0), totals.n_live.contiguous()),
            *(targets.shards.start, targets.n_classes),
        )
        grad_logits = backend.tempered_gradient(sample_grad, logits, targets.labels, tempered, geometry, given)
        needs = needs._replace(logits=False)
    if grad_logits is not None and not needs.weight:
        return grad_logits, None
    found, gap_sums = gradients(sample_grad, logits, targets, geometry, tempered, needs, totals, unit)
    return found if grad_logits is None else grad_logits, gap_sums


def add_pull(gap_sums: Tensor, state: State, head: Head, grad_weight: Tensor) -> Tensor:
    """Add to `grad_weight` what S makes of the classes of this rank; return what it makes of the predicted, (u, m),
    for `add_own`."""
    table = state.geometry.table
    return pull_rows(gap_sums, table, state.left, head, unit_of(table), grad_weight)[1]


def add_own(grad_weight: Tensor, own: Tensor, classes: Tensor, shards: Shards) -> None:
    """Sum over the ranks what is pulled at the rows of `classes`, and add it where they are."""
    shards.sum(own)
    mine, place = shards.locate(classes)
    add_rows(grad_weight, place[mine], own[mine])


def input_gradients(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    targets: Targets | None,
    state: State,
    needs: Needs,
    shards: Shards,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logits and W of this rank."""
    grad_logits, gap_sums = pulled(sample_grad, logits, targets, state, needs)
    if gap_sums is None:
        return grad_logits, None
    grad_weight = torch.zeros_like(head_weight, dtype=gap_sums.dtype)
    with full_precision(logits.device):
        own = add_pull(gap_sums, state, Head(head_weight, gap_sums.dtype), grad_weight)
    add_own(grad_weight, own, state.geometry.row_class, shards)
    return grad_logits, grad_weight.to(head_weight.dtype)
