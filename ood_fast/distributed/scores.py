"""Scores of a head whose classes are sharded: the boundary distance, NCI, and statistics of each row of logits.

Higher scores mean more in-distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, statistics
from ..eager import sizes
from ..eager.boundary import slope_of
from ..eager.distances import Head
from ..eager.linear import Affine
from ..eager.precision import compute_dtype
from ..eager.sizes import join, slices
from ..eager.statistics import exp_of_minus
from ..functional import average_offset, nothing
from ..ops.registration import Operator, first_derivative
from ..records import Needs
from ..values import ALPHA, GAMMA
from . import rows as together
from .losses import chunk_rows, needs_grad
from .shards import Call, Shards, agree


def boundary_distance(
    logits_shard: Tensor,
    W_shard: Tensor,
    *,
    group: object = None,
    average: str = "boundaries",
    shards: Sequence[int] | None = None,
    check: bool = True,
) -> Tensor:
    """`ood_fast.boundary_distance` where each rank holds c_r classes: D, (n,), the same on every rank.

    Args:
        logits_shard: (n, c_r), any float dtype; -inf marks a masked class.
        W_shard: (c_r, m). Both receive the gradient that one process would give them.
        average: as in `ood_fast.elogitnorm`. group, shards, check: as in `elogitnorm`.

    Raises:
        As `elogitnorm`.
    """

    def examine() -> Call:
        _check_logits(logits_shard)
        checks.head_weight(W_shard, logits_shard)
        checks.one_of("average", average, checks.AVERAGES)
        width = f"{W_shard.shape[1]} columns"
        facts = _facts("boundary_distance", logits_shard, W_shard, average=repr(average), W_shard=width)
        return Call(W_shard.shape[0], len(logits_shard), -1, facts)

    layout, *_ = agree(group, examine, W_shard, shards, check)
    logits, W = logits_shard, W_shard
    if logits.shape[0] == 0:
        return nothing(logits, W)
    if W.shape[0] == 0:
        W, logits = together.masked_class(W, logits)
    distance: Tensor = _BoundaryDistance.apply(logits, W, layout, average_offset(average))
    return distance


def nci_score(
    z: Tensor,
    W_shard: Tensor,
    b_shard: Tensor | None,
    mean: Tensor,
    logits_shard: Tensor | None = None,
    alpha: float = ALPHA,
    *,
    group: object = None,
    shards: Sequence[int] | None = None,
    check: bool = True,
) -> Tensor:
    """`ood_fast.nci_score` where each rank holds c_r classes: (n,), the same on every rank.

    Args:
        z, mean: (n, m) and (m,), the same on every rank. They receive the whole gradient, W_shard that of its rows.
        W_shard, b_shard: (c_r, m) and (c_r,) or None; b_shard is used only when `logits_shard` is None.
        logits_shard: (n, c_r); None: the prediction is found from the features, in chunks of rows.
        alpha: weight of ||z||_1. group, shards, check: as in `elogitnorm`.

    Raises:
        As `elogitnorm`.
    """

    def examine() -> Call:
        checks.float_tensor("W_shard", W_shard, 2, "(c_r, m)")
        checks.features(z, W_shard)
        checks.head_bias(b_shard, W_shard)
        checks.vector("mean", mean, z.shape[1], "z", z)
        checks.real("alpha", alpha, -float("inf"))
        if logits_shard is not None:
            _check_logits(logits_shard)
            checks.head_weight(W_shard, logits_shard)
            checks.features(z, W_shard, logits_shard.shape[0])
        facts = _facts("nci_score", z, W_shard, mean, logits_shard)
        facts |= {"alpha": float(alpha), "W_shard": f"{W_shard.shape[1]} columns"}
        if logits_shard is None:
            facts["b_shard"] = None if b_shard is None else b_shard.dtype
        return Call(W_shard.shape[0], len(z), -1, facts)

    layout, *_ = agree(group, examine, W_shard, shards, check)
    dtype = compute_dtype(z, W_shard, mean)
    if z.shape[0] == 0:
        return nothing(z, W_shard, mean)
    W, b, logits = W_shard, b_shard, logits_shard
    if W.shape[0] == 0:
        W, b = together.masked_class(W, b)
        logits = None if logits is None else together.masked_class(W_shard, logits)[1]
    with torch.no_grad():
        if logits is None:
            of_head, step = Affine(z, Head(W, dtype), b), chunk_rows(layout.counts, z.device)
            chunks = [together.predict(of_head.logits(rows), layout, dtype) for rows in slices(len(z), step)]
            top, predicted = join(chunks)
        else:
            top, predicted = together.predict(logits, layout, dtype)
        mine, place = layout.locate(predicted)

    # As `ood_fast.reference.nci_score`, but that w_p.(z - mu) is known to one rank, and its gradient for z as well.
    features = z.to(dtype)
    centered = features - mean.to(dtype)
    norm = torch.linalg.vector_norm(centered, dim=1)
    shared = _Shared.apply(centered, layout) if needs_grad(centered) else centered
    product = (W[place].to(dtype) * shared).sum(1).masked_fill(~mine, 0.0)
    projection = _Sum.apply(product, layout)
    at_mean = norm == 0
    p_score = projection.masked_fill(at_mean, 0.0) / norm.masked_fill(at_mean, 1.0)
    score: Tensor = p_score + alpha * features.abs().sum(1)
    return score.masked_fill(top.isnan(), torch.nan)


def row_statistics(
    names: Collection[str],
    logits_shard: Tensor,
    features: Tensor | None = None,
    *,
    W_shard: Tensor | None = None,
    mean: Tensor | None = None,
    gamma: float = GAMMA,
    group: object = None,
    shards: Sequence[int] | None = None,
    check: bool = True,
) -> dict[str, Tensor]:
    """`ood_fast.statistics.row_statistics` where each rank holds c_r columns: what most scores are made of.

    Args:
        names: any of those of `ood_fast.statistics.row_statistics`, which defines them.
        logits_shard: (n, c_r), any float dtype; -inf marks a masked class.
        features, mean: (n, m) and (m,), the same on every rank; W_shard: (c_r, m). Needed as there.
        gamma: exponent of "gen". group, shards, check: as in `elogitnorm`.

    Returns:
        {name: (n,)}, as there, the same on every rank; constants to autograd.

    Collectives: all-reduces of n-vectors; for "distance" also the rows of the predicted classes.

    Raises:
        As `elogitnorm`; ValueError where a name is unknown, or what it needs is missing.
    """

    def examine() -> Call:
        _check_logits(logits_shard)
        known, needs = statistics.plan(names, False)
        checks.real("gamma", gamma, 0.0, open_low=True)
        given = {"logits": logits_shard, "features": features, "W": W_shard, "mean": mean}
        for argument, because in needs.items():
            if given[argument] is None:
                raise ValueError(f"{argument}: got None, but {', '.join(map(repr, because))} needs it")
        if W_shard is not None and "W" in needs:
            checks.head_weight(W_shard, logits_shard)
        if features is not None and "features" in needs:
            checks.float_tensor("features", features, 2, "(n, m)")
            if features.shape[0] != logits_shard.shape[0]:
                raise ValueError(f"features: got {features.shape[0]} rows, expected {logits_shard.shape[0]}")
            if W_shard is not None and "W" in needs:
                checks.features(features, W_shard)
        if features is not None and "mean" in needs:
            checks.vector("mean", mean, features.shape[1], "features", features)
        facts = _facts("row_statistics", logits_shard, features, W_shard, mean, gamma=float(gamma), names=sorted(known))
        if W_shard is not None and "W" in needs:
            facts["W_shard"] = f"{W_shard.shape[1]} columns"
        return Call(logits_shard.shape[1], len(logits_shard), -1, facts)

    layout, *_ = agree(group, examine, logits_shard, shards, check)
    names, _ = statistics.plan(names, False)
    features, W, mean = (None if t is None else t.detach() for t in (features, W_shard, mean))
    with torch.no_grad():
        found = _row_statistics(set(names), logits_shard.detach(), features, W, mean, gamma, layout)
    return {name: found[name] for name in names}


def _row_statistics(
    names: set[str],
    logits: Tensor,
    features: Tensor | None,
    head_weight: Tensor | None,
    mean: Tensor | None,
    gamma: float,
    shards: Shards,
) -> dict[str, Tensor]:
    """Of what is asked for; the formulas, and why `rest` leaves out e_p = 1, are those of `eager.statistics`."""
    dtype = compute_dtype(logits, features, head_weight, mean)
    n_samples = logits.shape[0]
    own = [name for name in names if name in ("norm1", "norm2", "centred_norm")]  # of features, which every rank has
    found = statistics.row_statistics(own, features=features, mean=mean) if own else {}
    if n_samples == 0:
        empty = logits.new_empty(0, dtype=dtype)
        return {name: empty.long() if name == "predicted" else empty for name in names} | found
    if logits.shape[1] == 0:
        like = logits.new_zeros(0, 1) if head_weight is None else head_weight
        head_weight, logits = together.masked_class(like, logits)
    logits = logits.to(dtype)
    top, predicted = together.predict(logits, shards, dtype)
    mine, place = shards.locate(predicted)
    broken = ~top.isfinite()

    sums = top.new_zeros(5, n_samples)  # rest, sum_j e_j g_j, the two norms, the projection
    # Of a masked class g is inf and e_j 0; a row that is broken or without a live class has g_p = NaN.
    parts = [(rows, top[rows].unsqueeze(1)) for rows in slices(n_samples, sizes.ROW_CHUNK_ELEMENTS // logits.shape[1])]
    for rows, highest in parts:
        gap = highest - logits[rows]
        weight = exp_of_minus(gap)
        sums[1, rows] = (gap.clamp(max=torch.finfo(dtype).max) * weight).sum(1)
        weight.scatter_(
            1, place[rows].unsqueeze(1), weight.gather(1, place[rows].unsqueeze(1)) * ~mine[rows].unsqueeze(1)
        )
        sums[0, rows] = weight.sum(1)
        live_logits = logits[rows].nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)
        sums[2, rows], sums[3, rows] = live_logits.abs().sum(1), live_logits.square().sum(1)
    if "projection" in names and not (head_weight is None or features is None or mean is None):
        product = (head_weight[place].to(dtype) * (features.to(dtype) - mean.to(dtype))).sum(1)
        sums[4] = product.masked_fill(~mine, 0.0).masked_fill(top.isnan(), torch.nan)
    rest, mean_gap, norm1, squares, projection = shards.sum(sums)
    log_partition = rest.log1p()
    found |= {
        "max": top,
        "predicted": predicted,
        "logsumexp": (top + log_partition).masked_fill_(broken, torch.nan),
        "confidence": (1 + rest).reciprocal(),
        "entropy": mean_gap / (1 + rest) + log_partition,
        "logit_norm1": norm1,
        "logit_norm2": squares.sqrt(),
        "projection": projection,
    }
    if "gen" in names:
        gen = torch.empty_like(top)
        for rows, highest in parts:
            gap = highest - logits[rows]
            # In logarithms: e_j is 0 long before its power gamma is.
            log_term = (1 - exp_of_minus(gap)).add_(rest[rows].unsqueeze(1)).log_().sub_(gap)
            gen[rows] = log_term.sub_(2 * log_partition[rows].unsqueeze(1)).mul_(gamma).exp_().sum(1)
        found["gen"] = shards.sum(gen)
    if "distance" in names and head_weight is not None:
        found["distance"] = together.find(logits, Head(head_weight, dtype), 0, shards).distance
    return found


def _check_logits(logits: object) -> None:
    checks.float_tensor("logits_shard", logits, 2, "(n, c_r)")


def _facts(function: str, first: Tensor, *others: Tensor | None, **keywords: object) -> dict[str, object]:
    """What every rank must give alike; the first tensor has a row for each sample."""
    return {
        "function": function,
        "samples": first.shape[0],
        "dtypes": tuple(None if t is None else t.dtype for t in (first, *others)),
        "device": first.device.type,
        "requires_grad": tuple(needs_grad(t) for t in (first, *others)),
        **keywords,
    }


class _BoundaryDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, head_weight: Tensor, shards: Shards, offset: int) -> Tensor:
        found = together.find(logits, Head(head_weight, compute_dtype(logits, head_weight)), offset, shards)
        slope = slope_of(found.share, found.shard.top)
        ctx.save_for_backward(logits, head_weight, slope, *together.flat(found.shard))
        ctx.shards = shards
        return found.distance.clone()

    @staticmethod
    def backward(ctx: Any, grad_distance: Tensor) -> tuple[Any, ...]:
        logits, head_weight, slope, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]

        def run(grad_distance: Tensor) -> tuple[Tensor | None, Tensor | None]:
            needs = Needs(logits=needed[0], weight=needed[1])
            shard = together.shard_of(kept)
            return together.input_gradients(grad_distance, logits, head_weight, None, slope, shard, needs, ctx.shards)

        operator = Operator("distributed.boundary_distance", run)
        return *first_derivative(operator, (grad_distance,), needed, (logits, head_weight)), None, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks. Backward, each keeps the gradient of the sum, which is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shards: Shards) -> Tensor:
        return shards.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


class _Shared(torch.autograd.Function):
    """The same tensor on every rank, whose gradient is the sum of what the ranks do with it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operator = Operator("distributed.nci_score", lambda grad: ctx.shards.sum(grad.clone()))
        return *first_derivative(operator, (grad,), (True,), (grad,)), None
