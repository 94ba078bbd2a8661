"""The row of ELogitNorm where each process holds some of the classes: what `distributed` makes collectives of.

The mathematics of a row is that of one process. Nothing here meets an empty dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..records import Geometry, Needs, Shard
from . import sizes
from .boundary import gradients
from .distances import Head, Rows, inverse_distances
from .linear import Affine
from .precision import full_precision
from .rows import Part, RowSums, Softmax, Targets, gaps_of, row_sums
from .sizes import slices
from .weight_gradient import pull_rows, unit_of


def gaps(logits: Tensor, top: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(rows, gaps g (r, c_r), live classes; None where all are) for chunks of rows that stay in cache.

    Gaps are 0 on masked classes, NaN throughout rows that hold NaN or +inf on any rank, or nothing live on all of them.
    """
    for rows in slices(logits.shape[0], sizes.ROW_CHUNK_ELEMENTS // logits.shape[1]):
        yield rows, *gaps_of(logits[rows], top[rows].unsqueeze(1))


def shard_affine(features: Tensor, head: Head, bias: Tensor | None) -> Affine:
    """Logits of the classes here, and the gradients through them."""
    return Affine(features, head, bias)


def shard_distances(head: Head, left: Tensor, row_class: Tensor) -> tuple[Tensor, bool, None, None]:
    """(R (u, c_r), whether no rows are close, as of `inverse_distances`, and nothing): between the rows `left` (u, m)
    and the classes here. `row_class` as of `Geometry` in a `Shard`."""
    table = left.new_empty(left.shape[0], head.weight.shape[0])
    every = torch.arange(left.shape[0], device=left.device)
    with full_precision(left.device):
        return table, inverse_distances(head, Rows(left, every, row_class), table)[1], None, None


def shard_boundary_sums(logits: Tensor, top: Tensor, geometry: Geometry) -> Tensor:
    """sum g R, K, sum R and the number of live classes among those here, (4, n)."""
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


def shard_softmax_sums(logits: Tensor, top: Tensor, temperature: Tensor, n_live: Tensor, targets: Targets) -> Tensor:
    """The fields of `RowSums` for the classes here, (5, n)."""
    sums = temperature.new_zeros(len(RowSums._fields), temperature.shape[0])
    for rows, gap, live in gaps(logits, top):
        part = Part(rows, live, n_live[rows])
        for i, of_rows in enumerate(row_sums(gap, temperature[rows], targets, part, torch.empty_like(gap), True)):
            if of_rows is not None:
                sums[i, rows] = of_rows if not isinstance(of_rows, Tensor) else of_rows.to(sums.dtype)
    return sums


def shard_gradients(
    sample_grad: Tensor, logits: Tensor, softmax: Softmax | None, slope: Tensor, shard: Shard, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient of the logits here, what `shard_pull` takes) of sum_i sample_grad_i loss_i; without `softmax`, ...
    D_i. None where it is not needed."""
    geometry, predicted = shard.geometry, shard.place
    return gradients(sample_grad, logits, softmax, geometry, predicted, slope, needs, shard)[:2]


def shard_pull(summed: Tensor, shard: Shard, head: Head, grad_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what the distances make of the classes here, added to `grad_weight` (c_r, m) if it is given; what these make of
    the predicted ones, (u, m))."""
    table = shard.geometry.table
    with full_precision(table.device):
        return pull_rows(summed, table, shard.left, head, unit_of(table), grad_weight)
