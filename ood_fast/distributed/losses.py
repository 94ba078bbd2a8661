"""ELogitNorm over sharded classes: from the logits, and without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..eager import sizes
from ..eager.precision import compute_dtype, full_precision
from ..eager.sizes import join, slices
from ..ops import _backward, _sample_grad
from . import boundary
from .shards import SAMPLES, Call, Shards, agree, fingerprint

# Elements of the four buffers of a chunk of rows on a GPU: 2 GiB in float32, where a shard of W and its gradient are as
# much each at a million classes. Fewer rows would read W from memory for too little arithmetic.
_GPU_BUFFER_ELEMENTS = 1 << 29


class _Keywords(NamedTuple):
    ignore_index: int
    reduction: str
    label_smoothing: float
    eps: float
    average_offset: int


def elogitnorm(
    logits_shard: Tensor,
    W_shard: Tensor,
    y: Tensor,
    *,
    group: object = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-6,
    average: str = "boundaries",
    detach_geometry: bool = False,
    return_distance: bool = False,
    shards: Sequence[int] | None = None,
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ood_fast.elogitnorm` where each rank of `group` holds c_r of the c classes.

    Equivalent to ``ood_fast.elogitnorm(torch.cat(all logits_shard, 1), None, torch.cat(all W_shard), None, y)``: each
    rank gets that loss, and its gradient for its own shards.

    Args:
        logits_shard: f for the classes of this rank, (n, c_r) or dense (n, c_r, d1, ...), any float dtype; -inf marks a
            masked class. c_r may differ from rank to rank, and may be 0.
        W_shard: the rows of W of this rank, (c_r, m).
        y: indices among all classes, int64 (n,), the same on every rank, or the probabilities of the classes of this
            rank, float (n, c_r); dense as in `ood_fast.elogitnorm`.
        group: a process group or one-dimensional `DeviceMesh`, whose ranks hold the classes in order; None: the default
            group.
        weight: class weights: those of all classes, (c,), on every rank, or on every rank those of its own, (c_r,).
        ignore_index, reduction, label_smoothing, eps, average, detach_geometry, return_distance: as in
            `ood_fast.elogitnorm`.
        shards: c_r of every rank, to be held to; None: what the ranks say.
        check: begin with a small all-gather (and a read of it by the host) that finds disagreement between the ranks.
            False: `shards` must be given, `y` is trusted on a GPU, and ranks that disagree wait for the timeout.

    Returns:
        As `ood_fast.elogitnorm`, the same bits on every rank. Backward must be called on every rank, with the same
        incoming gradient. The gradient of whatever made `logits_shard` (the features, say) is that of these classes
        alone: sum it over the group, as torch's `ColwiseParallel` does.

    Collectives: all-reduces of n-vectors and of u rows of W, u <= n the number of distinct predictions; see
    `communication_bytes`.

    Raises:
        TypeError, ValueError, IndexError: as `ood_fast.elogitnorm`; and ValueError where the ranks disagree on n, m,
        dtypes, y or keywords, or the shards do not add up to `weight` or `shards`. With `check` every rank raises the
        same. RuntimeError: a rank is gone (from torch.distributed, within the timeout of the group), or a second
        derivative.
    """
    logits, W = logits_shard, W_shard

    def examine() -> Call:
        checks.float_tensor("logits_shard", logits, max(2, getattr(logits, "ndim", 2)), "(n, c_r) or (n, c_r, d1, ...)")
        checks.head_weight(W, logits)
        checks.target(y, logits)
        _check_class_weight(weight, W)
        facts = {
            "function": "elogitnorm",
            "logits_shard": f"shape {(logits.shape[0], 'c_r', *logits.shape[2:])}",
            "requires_grad": (_needs(logits), _needs(W) and not detach_geometry),
            "return_distance": bool(return_distance),
            **_facts(W, y, logits, ignore_index, reduction, label_smoothing, eps, average, detach_geometry),
        }
        if check and not y.is_floating_point():
            facts["y"] = fingerprint(y)
        return Call(W.shape[0], logits.shape[0], -1 if weight is None else weight.shape[0], facts)

    layout, _, is_full = agree(group, examine, W, shards, check)
    if is_full:
        weight = weight[layout.own]
    _check_indices(y, layout, ignore_index, check)
    W = W.detach() if detach_geometry else W
    shape = logits.shape
    if len(shape) > 2:
        logits = logits.movedim(1, -1).reshape(-1, shape[1])
        y = y.movedim(1, -1).reshape(logits.shape) if y.is_floating_point() else y.reshape(-1)
    if logits.shape[0] == 0:
        loss = _empty_loss(logits, compute_dtype(logits, W), reduction)
        distance = loss.new_empty(0)
    else:
        if W.shape[0] == 0:
            W, logits, weight, y = boundary.masked_class(W, logits, weight, y)
        keywords = _Keywords(ignore_index, reduction, float(label_smoothing), float(eps), _offset(average))
        loss, distance = _ELogitNorm.apply(logits, W, y, weight, layout, keywords)
    if len(shape) > 2:
        places = shape[:1] + shape[2:]
        loss = loss if loss.dim() == 0 else loss.reshape(places)
        distance = distance.reshape(places)
    return (loss, distance) if return_distance else loss


def linear_elogitnorm(
    z: Tensor,
    W_shard: Tensor,
    b_shard: Tensor | None,
    y: Tensor,
    *,
    group: object = None,
    samples: str = "replicated",
    feature_grad_scale: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-6,
    average: str = "boundaries",
    detach_geometry: bool = False,
    return_distance: bool = False,
    shards: Sequence[int] | None = None,
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ood_fast.linear_elogitnorm` where each rank of `group` holds c_r of the c classes.

    Rows are worked in chunks, so that neither (n, c) nor (n, c_r) numbers are stored at once. Each rank gets the one
    loss and its gradient for its own W and b, and for z.

    Args:
        z: features, (n, m), any float dtype.
        W_shard, b_shard: the rows of the head of this rank, (c_r, m), and (c_r,) or None.
        y: indices among all classes, int64 (n,); with replicated samples also the probabilities of the classes of this
            rank, float (n, c_r).
        samples: "replicated": z and y are the same on every rank. "sharded": each rank brings samples of its own, as
            many as it has (with ``check=False`` as many as the others); they are gathered, and the loss is that of all
            of them; with ``reduction="none"``, and for D, each rank gets what belongs to its own.
        feature_grad_scale: a factor on the gradient of z alone. `DistributedDataParallel` and FSDP average the
            gradients of the body over its ranks; where those are the ranks of `group` with sharded samples, give the
            number of ranks, for the gradient of z is a share of that of one loss.
        others: as in `elogitnorm`.

    Returns, Raises: as `elogitnorm`. Papers: the class-parallel pattern is that of An et al., "Partial FC: Training 10
    Million Identities on a Single Machine", ICCV-W 2021, arXiv:2010.05222.
    """
    W, b = W_shard, b_shard

    def examine() -> Call:
        checks.float_tensor("W_shard", W, 2, "(c_r, m)")
        checks.features(z, W)
        checks.head_bias(b, W)
        checks.one_of("samples", samples, SAMPLES)
        checks.real("feature_grad_scale", feature_grad_scale, 0.0)
        checks.target(y, z.new_empty(()).expand(z.shape[0], W.shape[0]))
        if samples == "sharded" and y.is_floating_point():
            raise ValueError("y: got class probabilities, expected class indices with samples='sharded'")
        _check_class_weight(weight, W)
        facts = {
            "function": "linear_elogitnorm",
            "samples": repr(samples),
            "z": f"{z.shape[0]} rows" if samples == "replicated" else "any rows",
            "b_shard": None if b is None else b.dtype,
            "requires_grad": (_needs(z), _needs(W), _needs(b)),
            "feature_grad_scale": float(feature_grad_scale),
            "return_distance": bool(return_distance),
            **_facts(W, y, z, ignore_index, reduction, label_smoothing, eps, average, detach_geometry),
        }
        if check and samples == "replicated" and not y.is_floating_point():
            facts["y"] = fingerprint(y)
        return Call(W.shape[0], z.shape[0], -1 if weight is None else weight.shape[0], facts)

    layout, counts, is_full = agree(group, examine, W, shards, check)
    if is_full:
        weight = weight[layout.own]
    if samples == "replicated":
        counts = None
    else:
        y = layout.gather(y, counts) if sum(counts) else y
    _check_indices(y, layout, ignore_index, check)
    if (z.shape[0] if counts is None else sum(counts)) == 0:
        dtype = compute_dtype(z, W)
        loss = _empty_loss(F.linear(z.to(dtype), W.to(dtype), None if b is None else b.to(dtype)), dtype, reduction)
        distance = loss.new_empty(0)
    else:
        if W.shape[0] == 0:
            W, b, weight, y = boundary.masked_class(W, b, weight, y)
        keywords = _Keywords(ignore_index, reduction, float(label_smoothing), float(eps), _offset(average))
        needs = _needs(z), _needs(W), _needs(b)
        loss, distance = _LinearELogitNorm.apply(
            *(z, W, b, y, weight, layout, keywords, counts, float(feature_grad_scale), detach_geometry, needs)
        )
    return (loss, distance) if return_distance else loss


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def _facts(W, y, input, ignore_index, reduction, label_smoothing, eps, average, detach_geometry) -> dict[str, object]:
    """The arguments that both losses share, checked: what every rank must give alike."""
    checks.loss_keywords(ignore_index, reduction, label_smoothing)
    checks.real("eps", eps, 0.0)
    checks.one_of("average", average, checks.AVERAGES)
    return {
        "W_shard": f"{W.shape[1]} columns",
        "dtypes": (W.dtype, y.dtype, input.dtype),
        "device": W.device.type,
        "ignore_index": ignore_index,
        "reduction": repr(reduction),
        "label_smoothing": float(label_smoothing),
        "eps": float(eps),
        "average": repr(average),
        "detach_geometry": bool(detach_geometry),
    }


def _check_class_weight(weight: Tensor | None, W: Tensor) -> None:
    """What one rank can see of it: its length is for all ranks to judge."""
    if weight is not None:
        checks.float_tensor("weight", weight, 1, "(c,) or (c_r,)")
        checks.class_weight(weight, weight.new_empty(()).expand(1, weight.shape[0]))
        checks.same_device("weight", weight, "W", W)


def _needs(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _offset(average: str) -> int:
    return 0 if average == "boundaries" else 1


def _check_indices(y: Tensor, layout: Shards, ignore_index: int, check: bool) -> None:
    """IndexError where y holds a class that no rank has: on every rank, for y is the same on all of them."""
    if not y.is_floating_point() and y.numel() and (check or y.device.type == "cpu"):
        checks.index_range(y, layout.n_classes, ignore_index)


def _empty_loss(logits: Tensor, dtype: torch.dtype, reduction: str) -> Tensor:
    """n = 0: NaN for the mean, 0 for the sum, (0,) for none, as F.cross_entropy has them."""
    nothing = logits.to(dtype).sum(1)
    return nothing if reduction == "none" else nothing.sum() if reduction == "sum" else nothing.sum() / 0.0


def _normalizer(y: Tensor, class_weight: Tensor | None, keywords: _Keywords, shards: Shards, dtype) -> Tensor:
    """What the sum of the losses is divided by, 0-dim: for "mean" the weight of all that count, otherwise 1."""
    if keywords.reduction != "mean":
        return torch.ones((), dtype=dtype, device=y.device)
    if y.is_floating_point():
        return torch.full((), float(y.shape[0]), dtype=dtype, device=y.device)
    counted = y != keywords.ignore_index
    if class_weight is None:
        return counted.sum(dtype=dtype)
    mine, place = shards.locate(y)
    return shards.sum((class_weight.to(dtype)[place] * (mine & counted)).sum())


# ----------------------------------------------------------------------------------------------------------------------
# Autograd
# ----------------------------------------------------------------------------------------------------------------------


class _ELogitNorm(torch.autograd.Function):
    """(reduced loss, D) from the logits."""

    @staticmethod
    def forward(ctx, logits, head_weight, y, class_weight, shards, keywords):
        dtype = compute_dtype(logits, head_weight)
        target = boundary.Target(y, class_weight, keywords.ignore_index, keywords.label_smoothing, shards, dtype)
        with full_precision(logits.device):
            mean = boundary.mean_row(head_weight, shards, dtype)
            top, predicted = boundary.predict(logits, shards, dtype)
            head = boundary.geometry(predicted, head_weight, mean, shards)
        found = boundary.distances(logits, top, head, keywords.average_offset, shards)
        loss, at = boundary.softmax(logits, top, target, found, keywords.eps, shards)
        normalizer = _normalizer(y, class_weight, keywords, shards, dtype)
        ctx.save_for_backward(logits, head_weight, y, class_weight, normalizer, top, predicted, *head, *found, *at)
        ctx.shards, ctx.keywords = shards, keywords
        ctx.mark_non_differentiable(found.distance)
        return loss if keywords.reduction == "none" else loss.sum() / normalizer, found.distance

    @staticmethod
    def backward(ctx, grad_loss, _):
        logits, head_weight, y, class_weight, normalizer, top, predicted, *rest = ctx.saved_tensors
        shards, keywords = ctx.shards, ctx.keywords
        n_head, n_found = len(boundary.Geometry._fields), len(boundary.Distances._fields)
        head = boundary.Geometry(*rest[:n_head])
        found = boundary.Distances(*rest[n_head : n_head + n_found])
        at = boundary.Softmax(*rest[n_head + n_found :])

        def run(grad_loss):
            target = boundary.Target(
                y, class_weight, keywords.ignore_index, keywords.label_smoothing, shards, top.dtype
            )
            sample_grad = _sample_grad(grad_loss, normalizer, keywords.reduction, y, keywords.ignore_index)
            return gradients(
                *(sample_grad, logits, head_weight, top, predicted, head, found, target, at),
                *(shards, ctx.needs_input_grad),
            )

        return *_backward("distributed.elogitnorm", (run, run), (grad_loss,), None, (logits, head_weight)), *[None] * 4


def gradients(
    sample_grad, logits, head_weight, top, predicted, head, found, target, at, shards, needed
) -> tuple[Tensor | None, Tensor | None]:
    """Those of logits and W, of sum_i sample_grad_i loss_i, or without `target` of the distances D."""
    need_logits, need_weight, *_ = needed
    grad_logits, pull = boundary.gradients(
        sample_grad, logits, top, predicted, head, found, target, at, shards, need_logits, need_weight
    )
    if not need_weight:
        return grad_logits, None
    grad_weight = torch.zeros_like(head_weight, dtype=top.dtype)
    with full_precision(logits.device):
        own = boundary.pull_weights(pull, head, head_weight, grad_weight)
    boundary.add_own(grad_weight, own, head.classes, shards)
    return grad_logits, grad_weight.to(head_weight.dtype)


class _LinearELogitNorm(torch.autograd.Function):
    """(reduced loss, D) without logits. The gradients come from the same pass, unless the reduction is "none".

    `counts`, the samples of each rank, is None where they are replicated; y is gathered already.
    """

    @staticmethod
    def forward(ctx, z, head_weight, bias, y, class_weight, shards, keywords, counts, scale, detach_geometry, needs):
        dtype = compute_dtype(z, head_weight)
        normalizer = _normalizer(y, class_weight, keywords, shards, dtype)
        sample_grad = None
        if keywords.reduction != "none" and any(needs):
            one = torch.ones_like(normalizer)
            sample_grad = _sample_grad(one, normalizer, keywords.reduction, y, keywords.ignore_index)
        loss, distance, *ctx.grads = _linear(
            *(z, head_weight, bias, y, class_weight, shards, keywords, counts, detach_geometry, needs, sample_grad)
        )
        ctx.save_for_backward(z, head_weight, bias, y, class_weight, normalizer)
        ctx.arguments = shards, keywords, counts, detach_geometry, needs
        ctx.scale = scale
        if counts is not None:
            own = slice(sum(counts[: shards.rank]), sum(counts[: shards.rank + 1]))
            distance = distance[own].clone()
            loss = loss[own].clone() if keywords.reduction == "none" else loss
        ctx.mark_non_differentiable(distance)
        return loss if keywords.reduction == "none" else loss.sum() / normalizer, distance

    @staticmethod
    def backward(ctx, grad_loss, _):
        z, head_weight, bias, y, class_weight, normalizer = ctx.saved_tensors
        shards, keywords, counts, *_ = ctx.arguments
        inputs = z, head_weight, bias

        def run(grad_loss):
            # Handed over by the first backward, which scales them in place; a second one computes them anew.
            grads, ctx.grads = ctx.grads, (None, None, None)
            scales = grad_loss * ctx.scale, grad_loss, grad_loss
            if all(grad is None for grad in grads):
                if counts is not None and keywords.reduction == "none":
                    grad_loss = shards.gather(grad_loss.contiguous(), counts)
                sample_grad = _sample_grad(grad_loss, normalizer, keywords.reduction, y, keywords.ignore_index)
                _, _, *grads = _linear(*inputs, y, class_weight, *ctx.arguments, sample_grad)
                scales = ctx.scale, 1.0, 1.0
            return tuple(
                None if grad is None else grad.mul_(scale).to(like.dtype)
                for grad, scale, like in zip(grads, scales, inputs, strict=True)
            )

        return *_backward("distributed.linear_elogitnorm", (run, run), (grad_loss,), None, inputs), *[None] * 8


def chunk_rows(counts: Sequence[int], device: torch.device) -> int:
    """Rows of a chunk, the same on every rank: (rows, c_r) of logits, of distances, and of the gradients of both."""
    elements = sizes.LINEAR_BUFFER_ELEMENTS if device.type == "cpu" else _GPU_BUFFER_ELEMENTS
    return max(sizes.MIN_LINEAR_ROWS, elements // (4 * max(counts)))


def _linear(
    z, head_weight, bias, y, class_weight, shards, keywords, counts, detach_geometry, needs, sample_grad
) -> tuple[Tensor | None, ...]:
    """(loss and D of every sample, dz of those of this rank, dW, db), in chunks of rows of one size on every rank.

    dz is a sum over the ranks of G (W - mean row): the mean row drops out, because the rows of G sum to 0 over all
    classes. The gradients are None if not needed, or without `sample_grad`.
    """
    dtype = compute_dtype(z, head_weight)
    if counts is not None:
        z = shards.gather(z.detach(), counts)
    n_samples, n_classes = z.shape[0], head_weight.shape[0]
    need_z, need_weight, need_bias = (need and sample_grad is not None for need in needs)
    grad_z = z.new_zeros(z.shape, dtype=dtype) if need_z else None
    grad_weight = torch.zeros_like(head_weight, dtype=dtype) if need_weight else None
    grad_bias = z.new_zeros(n_classes, dtype=dtype) if need_bias else None
    target = boundary.Target(y, class_weight, keywords.ignore_index, keywords.label_smoothing, shards, dtype)
    mean = boundary.mean_row(head_weight, shards, dtype)
    step = chunk_rows(shards.counts, z.device)
    results, pulled = [], []
    with full_precision(z.device):
        for rows in slices(n_samples, step):
            chunk = z[rows].to(dtype)
            logits = boundary.linear(chunk, head_weight, bias)
            top, predicted = boundary.predict(logits, shards, dtype)
            head = boundary.geometry(predicted, head_weight, mean, shards)
            found = boundary.distances(logits, top, head, keywords.average_offset, shards)
            part = target.of(rows)
            loss, at = boundary.softmax(logits, top, part, found, keywords.eps, shards)
            results.append((loss, found.distance))
            if sample_grad is None or not any(needs):
                continue
            geometry = need_weight and not detach_geometry
            gradient, pull = boundary.gradients(
                *(sample_grad[rows].to(dtype), logits, top, predicted, head, found, part, at, shards, True, geometry)
            )
            part_z = None if grad_z is None else grad_z[rows]
            boundary.linear_backward(gradient, chunk, head_weight, mean, part_z, grad_weight)
            if need_bias:
                grad_bias.add_(gradient.sum(0))
            if geometry:
                pulled.append((boundary.pull_weights(pull, head, head_weight, grad_weight), head.classes))
        if pulled:
            own, classes = join(pulled)
            boundary.add_own(grad_weight, own, classes, shards)
    if need_z:
        grad_z = shards.sum(grad_z) if counts is None else shards.scatter_sum(grad_z, counts)
    return *join(results), grad_z, grad_weight, grad_bias
