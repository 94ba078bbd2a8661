"""What the ranks find out together about rows of logits, by sums over the classes of all of them.

The mathematics of a row is that of one process, in `eager/shards.py` and `kernels/shards.py`. Three passes over the
logits of this rank, with collectives of n-vectors after the first two:

1. D needs the largest logit over all ranks, and the row w_p of the predicted class, which its owner sends to all;
2. the softmax of the gaps needs D;
3. the gradients need both. What the classes of all ranks pull at w_p is summed once more, and goes to the owner.

Nothing here meets an empty dimension: a call without samples ends before, and a rank without classes gets one that is
masked (`masked_class`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eager.boundary import share_of
from ..eager.distances import Head
from ..eager.rows import RowSums, Softmax, Targets, row_loss, temperature_of
from ..eager.weight_gradient import add_rows
from ..ops.backend import backend_of
from ..records import Geometry, Needs, Shard
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


class Found(NamedTuple):
    """What the first pass finds; n-vectors are over the classes of all ranks."""

    distance: Tensor  # D (n,); 0 without a boundary
    share: Tensor  # 1 / (K + average_offset), (n,); 0 where K = 0
    apart: bool  # of `eager.shards.shard_distances`
    shard: Shard


def find(logits: Tensor, head: Head, average_offset: int, shards: Shards) -> Found:
    """Predictions and distances. Each rank compares rows in frames of its own."""
    backend = backend_of(logits, head.weight)
    top, predicted = predict(logits, shards, head.dtype)
    classes, table_row = torch.unique(predicted, return_inverse=True)
    mine, place = shards.locate(classes)
    # Exact: all but one of the terms are 0.
    left = shards.sum(head.weight[place].to(head.dtype).masked_fill_(~mine.unsqueeze(1), 0.0))
    row_class = place.masked_fill_(~mine, -1)
    table, apart, *kept = backend.shard_distances(head, left, row_class)
    geometry = Geometry(table_row, table, row_class)
    to_boundaries, n_boundaries, inverse_sum, n_live = shards.sum(backend.shard_boundary_sums(logits, top, geometry))
    share = share_of(n_boundaries, average_offset, top.dtype)
    mine, place = shards.locate(predicted)
    shard = Shard(geometry, place.masked_fill_(~mine, -1), top, inverse_sum, n_live, left, *kept)
    return Found(to_boundaries * share, share, apart, shard)


def losses(
    logits: Tensor, targets: Targets, found: Found, eps: float, shards: Shards
) -> tuple[Tensor, Softmax, Tensor]:
    """(the loss of each sample, what its gradients need, dL/dD / (K + average_offset))."""
    temperature, shard = temperature_of(found.distance, eps), found.shard
    backend = backend_of(logits, temperature)
    sums = shards.sum(backend.shard_softmax_sums(logits, shard.top, temperature, shard.n_live, targets))
    partition, weighted_gap, total, impossible, weighted_exponent = sums
    loss, log_partition, slope = row_loss(
        RowSums(partition, weighted_gap, total, impossible > 0, weighted_exponent), temperature
    )
    slope.masked_fill_(found.distance <= eps, 0.0).mul_(found.share)
    targets.settle(loss, slope)
    return loss, Softmax(targets, temperature, log_partition, total), slope


def flat(shard: Shard) -> tuple[Tensor | None, ...]:
    """All tensors in a row, as autograd keeps them."""
    return *shard.geometry, *shard[1:]


def shard_of(tensors: Sequence[Any]) -> Shard:
    """The inverse of `flat`."""
    return Shard(Geometry(*tensors[:3]), *tensors[3:])


def add_own(grad_weight: Tensor, own: Tensor, row_class: Tensor, shards: Shards) -> None:
    """Sum over the ranks what is pulled at the predicted rows, and add it where they are."""
    shards.sum(own)
    mine = row_class >= 0
    add_rows(grad_weight, row_class[mine], own[mine])


def input_gradients(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    softmax: Softmax | None,
    slope: Tensor,
    shard: Shard,
    needs: Needs,
    shards: Shards,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logits and W of this rank, of sum_i sample_grad_i loss_i; without `softmax`, ... D_i."""
    backend = backend_of(logits, head_weight)
    grad_logits, summed = backend.shard_gradients(sample_grad, logits, softmax, slope, shard, needs)
    if summed is None:
        return grad_logits, None
    grad_weight, own = backend.shard_pull(summed, shard, Head(head_weight, summed.dtype), None)
    add_own(grad_weight, own, shard.geometry.row_class, shards)
    return grad_logits, grad_weight.to(head_weight.dtype)
