"""ELogitNorm over sharded classes: from the logits, and without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..eager import sizes
from ..eager.distances import Head
from ..eager.precision import compute_dtype
from ..eager.rows import Softmax, Targets
from ..eager.sizes import join, slices
from ..functional import as_places, as_rows, average_offset, empty_loss
from ..ops.backend import backend_of
from ..ops.losses import normalizer, reduced, sample_grads
from ..ops.registration import Operator, first_derivative
from ..records import Labels, Needs
from ..values import EPS
from . import rows as together
from .shards import SAMPLES, Call, Shards, agree, fingerprint

# Elements of the four buffers of a chunk of rows on a GPU: 2 GiB in float32, where a shard of W and its gradient are as
# much each at a million classes. Fewer rows would read W from memory for too little arithmetic.
_GPU_BUFFER_ELEMENTS = 1 << 29


class _Keywords(NamedTuple):
    """The loss of which a gradient is asked, but for its inputs."""

    labels: Labels
    reduction: str
    eps: float
    average_offset: int
    shards: Shards


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
    eps: float = EPS,
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
    given = Labels(y, weight, ignore_index, label_smoothing)

    def examine() -> Call:
        checks.float_tensor("logits_shard", logits, max(2, getattr(logits, "ndim", 2)), "(n, c_r) or (n, c_r, d1, ...)")
        checks.head_weight(W, logits)
        checks.target(y, logits)
        _check_class_weight(weight, W)
        facts = {
            "function": "elogitnorm",
            "logits_shard": f"shape {(logits.shape[0], 'c_r', *logits.shape[2:])}",
            "requires_grad": (needs_grad(logits), needs_grad(W) and not detach_geometry),
            "return_distance": bool(return_distance),
            **_facts(W, logits, given, reduction, eps, average, detach_geometry),
        }
        if check and not y.is_floating_point():
            facts["y"] = fingerprint(y)
        return Call(W.shape[0], logits.shape[0], -1 if weight is None else weight.shape[0], facts)

    layout, _, is_full = agree(group, examine, W, shards, check)
    checks.several_classes("logits_shard", layout.n_classes)
    if is_full and weight is not None:
        weight = weight[layout.own]
    _check_indices(y, layout, ignore_index, check)
    W = W.detach() if detach_geometry else W
    shape = logits.shape
    logits, y = as_rows(logits, y)
    if logits.shape[0] == 0:
        loss = empty_loss(reduction, logits, W)
        distance = loss.new_empty(0)
    else:
        if W.shape[0] == 0:
            W, logits, weight, y = together.masked_class(W, logits, weight, y)
        labels = Labels(y, weight, ignore_index, float(label_smoothing))
        keywords = _Keywords(labels, reduction, float(eps), average_offset(average), layout)
        loss, distance = _ELogitNorm.apply(logits, W, keywords)
    loss = as_places(loss, shape)
    return (loss, as_places(distance, shape)) if return_distance else loss


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
    eps: float = EPS,
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
    given = Labels(y, weight, ignore_index, label_smoothing)

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
            "requires_grad": (needs_grad(z), needs_grad(W), needs_grad(b)),
            "feature_grad_scale": float(feature_grad_scale),
            "return_distance": bool(return_distance),
            **_facts(W, z, given, reduction, eps, average, detach_geometry),
        }
        if check and samples == "replicated" and not y.is_floating_point():
            facts["y"] = fingerprint(y)
        return Call(W.shape[0], z.shape[0], -1 if weight is None else weight.shape[0], facts)

    layout, every, is_full = agree(group, examine, W, shards, check)
    checks.several_classes("W_shard", layout.n_classes)
    if is_full and weight is not None:
        weight = weight[layout.own]
    counts = None if samples == "replicated" else every
    if counts is not None and sum(counts) > 0:
        y = layout.gather(y, counts)
    _check_indices(y, layout, ignore_index, check)
    if (z.shape[0] if counts is None else sum(counts)) == 0:
        loss = empty_loss(reduction, z, W, b)
        distance = loss.new_empty(0)
    else:
        if W.shape[0] == 0:
            W, b, weight, y = together.masked_class(W, b, weight, y)
        labels = Labels(y, weight, ignore_index, float(label_smoothing))
        keywords = _Keywords(labels, reduction, float(eps), average_offset(average), layout)
        needs = Needs(features=needs_grad(z), weight=needs_grad(W), bias=needs_grad(b), geometry=not detach_geometry)
        loss, distance = _LinearELogitNorm.apply(z, W, b, keywords, counts, float(feature_grad_scale), needs)
    return (loss, distance) if return_distance else loss


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def _facts(
    W: Tensor, inputs: Tensor, labels: Labels, reduction: str, eps: float, average: str, detach_geometry: bool
) -> dict[str, object]:
    """The arguments that both losses share, checked: what every rank must give alike."""
    checks.loss_keywords(labels.ignore_index, reduction, labels.label_smoothing)
    checks.real("eps", eps, 0.0)
    checks.one_of("average", average, checks.AVERAGES)
    return {
        "W_shard": f"{W.shape[1]} columns",
        "dtypes": (W.dtype, labels.target.dtype, inputs.dtype),
        "device": W.device.type,
        "ignore_index": labels.ignore_index,
        "reduction": repr(reduction),
        "label_smoothing": float(labels.label_smoothing),
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


def needs_grad(tensor: Tensor | None) -> bool:
    """Whether a gradient for it may be asked for."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _check_indices(y: Tensor, layout: Shards, ignore_index: int, check: bool) -> None:
    """IndexError where y holds a class that no rank has: on every rank, for y is the same on all of them."""
    if not y.is_floating_point() and y.numel() and (check or y.device.type == "cpu"):
        checks.index_range(y, layout.n_classes, ignore_index)


# ----------------------------------------------------------------------------------------------------------------------
# Autograd
# ----------------------------------------------------------------------------------------------------------------------


class _ELogitNorm(torch.autograd.Function):
    """(reduced loss, D) from the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, head_weight: Tensor, keywords: _Keywords) -> tuple[Tensor, Tensor]:
        labels, reduction, eps, offset, shards = keywords
        dtype = compute_dtype(logits, head_weight)
        targets = Targets(labels, shards.n_classes, dtype, shards)
        found = together.find(logits, Head(head_weight, dtype), offset, shards)
        loss, softmax, slope = together.losses(logits, targets, found, eps, shards)
        divisor = normalizer(labels, reduction, dtype, shards)
        kept = *softmax[1:], slope, *together.flat(found.shard)
        ctx.save_for_backward(logits, head_weight, labels.target, labels.class_weight, divisor, *kept)
        ctx.keywords = keywords._replace(labels=labels._replace(target=divisor, class_weight=None))
        ctx.mark_non_differentiable(found.distance)
        return reduced(loss, divisor, reduction), found.distance

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Any, ...]:
        logits, head_weight, target, class_weight, divisor, *kept = ctx.saved_tensors
        labels, reduction, _, _, shards = ctx.keywords
        labels = labels._replace(target=target, class_weight=class_weight)
        needed = ctx.needs_input_grad[:2]

        def run(grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
            softmax = Softmax(Targets(labels, shards.n_classes, divisor.dtype, shards), *kept[:3])
            sample_grad = sample_grads(grad_loss, divisor, reduction, labels)
            needs, shard = Needs(logits=needed[0], weight=needed[1]), together.shard_of(kept[4:])
            return together.input_gradients(sample_grad, logits, head_weight, softmax, kept[3], shard, needs, shards)

        operator = Operator("distributed.elogitnorm", run)
        return *first_derivative(operator, (grad_loss,), needed, (logits, head_weight)), None


class _LinearELogitNorm(torch.autograd.Function):
    """(reduced loss, D) without logits. The gradients come from the same pass, unless the reduction is "none".

    `counts`, the samples of each rank, is None where they are replicated; y is gathered already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        keywords: _Keywords,
        counts: Sequence[int] | None,
        scale: float,
        needs: Needs,
    ) -> tuple[Tensor, Tensor]:
        labels, reduction, _, _, shards = keywords
        divisor = normalizer(labels, reduction, compute_dtype(z, head_weight), shards)
        sample_grad = None
        if reduction != "none" and (needs.features or needs.weight or needs.bias):
            sample_grad = sample_grads(torch.ones_like(divisor), divisor, reduction, labels)
        loss, distance, *ctx.grads = _linear(z, head_weight, bias, keywords, counts, sample_grad, needs)
        ctx.save_for_backward(z, head_weight, bias, labels.target, labels.class_weight, divisor)
        ctx.arguments = keywords._replace(labels=labels._replace(target=divisor, class_weight=None)), counts, needs
        ctx.scale = scale
        if counts is not None:
            own = slice(sum(counts[: shards.rank]), sum(counts[: shards.rank + 1]))
            distance = distance[own].clone()
            loss = loss[own].clone() if reduction == "none" else loss
        ctx.mark_non_differentiable(distance)
        return reduced(loss, divisor, reduction), distance

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Any, ...]:
        z, head_weight, bias, target, class_weight, divisor = ctx.saved_tensors
        keywords, counts, needs = ctx.arguments
        keywords = keywords._replace(labels=keywords.labels._replace(target=target, class_weight=class_weight))

        def run(grad_loss: Tensor) -> tuple[Tensor | None, ...]:
            # Handed over by the first backward, which scales them in place; a second one computes them anew.
            grads, ctx.grads = ctx.grads, (None, None, None)
            scales: tuple[Any, ...] = grad_loss * ctx.scale, grad_loss, grad_loss
            if all(grad is None for grad in grads):
                if counts is not None and keywords.reduction == "none":
                    grad_loss = keywords.shards.gather(grad_loss.contiguous(), counts)
                sample_grad = sample_grads(grad_loss, divisor, keywords.reduction, keywords.labels)
                _, _, *grads = _linear(z, head_weight, bias, keywords, counts, sample_grad, needs)
                scales = ctx.scale, 1.0, 1.0
            return tuple(
                None if grad is None else grad.mul_(scale).to(like.dtype)
                for grad, scale, like in zip(grads, scales, (z, head_weight, bias), strict=True)
            )

        operator = Operator("distributed.linear_elogitnorm", run)
        return *first_derivative(operator, (grad_loss,), (True,) * 3, (z, head_weight, bias)), *[None] * 4


def chunk_rows(counts: Sequence[int], device: torch.device) -> int:
    """Rows of a chunk, the same on every rank: (rows, c_r) of logits, of distances, and of the gradients of both."""
    elements = sizes.LINEAR_BUFFER_ELEMENTS if device.type == "cpu" else _GPU_BUFFER_ELEMENTS
    return max(sizes.MIN_LINEAR_ROWS, elements // (4 * max(counts)))


def _linear(
    z: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    keywords: _Keywords,
    counts: Sequence[int] | None,
    sample_grad: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss and D of every sample, dz of those of this rank, dW, db), in chunks of rows of one size on every rank.

    The gradients are None if not needed, or without `sample_grad`.
    """
    labels, _, eps, offset, shards = keywords
    dtype = compute_dtype(z, head_weight)
    if counts is not None:
        z = shards.gather(z.detach(), counts)
    needs = Needs(geometry=False) if sample_grad is None else needs
    grad_z = z.new_zeros(z.shape, dtype=dtype) if needs.features else None
    grad_weight = torch.zeros_like(head_weight, dtype=dtype) if needs.weight else None
    grad_bias = z.new_zeros(head_weight.shape[0], dtype=dtype) if needs.bias else None
    head, backend = Head(head_weight, dtype), backend_of(z, head_weight)
    affine = backend.shard_affine(z, head, bias)
    results, own = [], []
    for rows in slices(z.shape[0], chunk_rows(shards.counts, z.device)):
        logits = affine.logits(rows)
        targets = Targets(labels._replace(target=labels.target[rows]), shards.n_classes, dtype, shards)
        found = together.find(logits, head, offset, shards)
        loss, softmax, slope = together.losses(logits, targets, found, eps, shards)
        results.append((loss, found.distance))
        if sample_grad is None or not (needs.features or needs.weight or needs.bias):
            continue
        wanted = Needs(logits=True, weight=needs.weight and needs.geometry)
        part = sample_grad[rows].to(dtype)
        gradient, summed = backend.shard_gradients(part, logits, softmax, slope, found.shard, wanted)
        affine.add(rows, gradient, (grad_z, grad_weight, grad_bias), found.apart)
        if summed is not None:
            own.append((backend.shard_pull(summed, found.shard, head, grad_weight)[1], found.shard.geometry.row_class))
    if own and grad_weight is not None:
        together.add_own(grad_weight, *join(own), shards)
    if grad_z is not None:
        grad_z = shards.sum(grad_z) if counts is None else shards.scatter_sum(grad_z, counts)
    return *join(results), grad_z, grad_weight, grad_bias
