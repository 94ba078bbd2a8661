"""ELogitNorm and LogitNorm: what launches the kernels of `fused_row.py` and `tempered.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Geometry, Labels, Needs, Tempered
from .distances import Kept, kept_sizes
from .fused_row import fused_row_kernel
from .geometry import geometry_of
from .launch import (
    ROW_IN_REGISTERS,
    SCAN_SAMPLES,
    Layout,
    StepLaunch,
    alignment,
    cdiv,
    gradient_buffer,
    has_exp2,
    kinds_of,
    laid_out,
    launch,
    layout_of,
    loop_config,
    next_power_of_2,
    packed,
    prepared,
    row_config,
    target_of,
    unit_stride,
)
from .segments import Segments, Upstream, scale_
from .tempered import tempered_backward_kernel, tempered_forward_kernel
from .weight_gradient import weight_gradient

# What losses are divided by: a tensor that is given, or how many targets are not ignored, found by the kernel.
DIVIDED, COUNTED = 1, 2


class Rule(NamedTuple):
    """What the temperature follows from: ELogitNorm takes the first two, LogitNorm tau."""

    eps: float = 0.0
    average_offset: int = 0
    tau: float = 1.0


def is_fused(logits: Tensor, labels: Labels) -> bool:
    """Whether `fused_row_kernel` takes these rows; `tempered.py` has the others."""
    both = labels.class_weight is not None and labels.label_smoothing > 0
    return not (labels.target.is_floating_point() or both or logits.shape[1] > ROW_IN_REGISTERS)


class RowOutputs(NamedTuple):
    """What `fused_row_kernel` writes for each sample beside `Tempered`, all (n,)."""

    loss: Tensor
    distance: Tensor | None


def _fused(
    layout: Layout,
    rows: Tensor,
    labels: Labels,
    geometry: Geometry | None,
    outputs: RowOutputs | None,
    tempered: Tempered,
    rule: Rule,
    sample_grad: Tensor | None,
) -> Tensor | None:
    """Launch `fused_row_kernel`: writes `outputs` and `tempered`, which without outputs it reads. Returns the gradient
    of the logits unless `sample_grad` (n,) is None. These and labels are among those that `layout` knows."""
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    predicted, temperature, log_partition, slope = tempered
    loss, distance = outputs or (None, None)
    grad_logits = None if sample_grad is None else gradient_buffer(rows, layout.shape)
    stride = 0 if sample_grad is None else sample_grad.stride(0)
    is_known = outputs is None or (table is not None and layout.by_row)
    _row_kernel(layout, table is not None, is_known, label_smoothing > 0, 0, stride, ignore_index)(
        rows, sample_grad, target, class_weight, table, None if table_row is predicted else table_row, predicted, loss,
        distance, temperature, None if loss is None else log_partition, slope, None, grad_logits,
        floats=(float(label_smoothing), float(rule.eps), float(rule.average_offset), float(rule.tau), layout.boost),
    )  # fmt: skip
    return grad_logits if grad_logits is None or grad_logits.dtype == rows.dtype else grad_logits.to(rows.dtype)


@prepared
def _row_kernel(
    layout: Layout, boundary: bool, is_known: bool, smoothed: bool, divides: int, *numbers: int
) -> StepLaunch:
    """`numbers`: the stride of sample_grad, ignore_index."""
    (n_samples, n_classes), stride = layout.shape, layout.stride
    config = row_config(n_classes, layout.target)
    count = max(next_power_of_2(n_samples), 32) if divides == COUNTED else 0
    # The kernel asks for n where it counts; elsewhere a smaller last batch would be compiled for its own n.
    return StepLaunch(
        fused_row_kernel, (n_samples,), *numbers, stride, n_samples if count else 0, n_classes, BLOCK=config.block,
        ALIGN=alignment(n_classes, stride), BOUNDARY=boundary, PREDICTION_KNOWN=is_known, SMOOTHED=smoothed,
        IS_DIVISOR=divides > 0, COUNT=count, HARDWARE=has_exp2(layout.target), num_warps=config.num_warps,
    )  # fmt: skip


def contiguous(labels: Labels) -> Labels:
    """With unit strides, as kernels want them."""
    target, class_weight, ignore_index, label_smoothing = labels
    class_weight = None if class_weight is None else class_weight.contiguous()
    return Labels(unit_stride(target), class_weight, ignore_index, label_smoothing)


def loop_constants(logits: Tensor, labels: Labels, geometry: Geometry | None = None) -> dict[str, object]:
    """The constants that the kernels of `tempered.py` share."""
    n_classes = logits.shape[1]
    probabilities = labels.target.is_floating_point()
    strides = (logits.stride(0), labels.target.stride(0)) if probabilities else (logits.stride(0),)
    config = loop_config(n_classes, target_of(logits))
    return {
        "BLOCK": config.block,
        "ALIGN": alignment(n_classes, *strides),
        "BOUNDARY": geometry is not None,
        "PROBABILITIES": probabilities,
        "WEIGHTED": labels.class_weight is not None,
        "SMOOTHED": labels.label_smoothing > 0,
        "HARDWARE": has_exp2(target_of(logits)),
        "num_warps": config.num_warps,
    }


def _forward(
    layout: Layout,
    rows: Tensor,
    labels: Labels,
    geometry: Geometry | None,
    predicted: Tensor,
    rule: Rule,
    sample_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tempered, Tensor | None]:
    """Loss, distance, what the backward pass needs and, if `sample_grad` is given, the gradient of the logits."""
    n_samples, n_classes = layout.shape
    loss, temperature, log_partition, slope = (
        torch.empty(n_samples, dtype=torch.float32, device=rows.device) for _ in range(4)
    )
    distance = None if geometry is None else torch.empty_like(loss)
    tempered = Tempered(predicted, temperature, log_partition, slope)
    if is_fused(rows, labels):
        outputs = RowOutputs(loss, distance)
        grad_logits = _fused(layout, rows, labels, geometry, outputs, tempered, rule, sample_grad)
        return loss, distance, tempered, grad_logits
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    launch(
        tempered_forward_kernel, (n_samples,), rows, rows.stride(0), target, target.stride(0), class_weight, table,
        table_row, predicted, loss, distance, temperature, log_partition, slope, n_classes, ignore_index,
        float(label_smoothing), float(rule.eps), float(rule.average_offset), float(rule.tau),
        PREDICTION_KNOWN=table is not None and layout.by_row, **loop_constants(rows, labels, geometry),
    )  # fmt: skip
    grad_logits = None if sample_grad is None else _backward(layout, sample_grad, rows, labels, tempered, geometry)
    return loss, distance, tempered, grad_logits


def _backward(
    layout: Layout, sample_grad: Tensor, rows: Tensor, labels: Labels, tempered: Tempered, geometry: Geometry | None
) -> Tensor:
    """The gradient of the logits after `_forward`."""
    if is_fused(rows, labels):
        return _fused(layout, rows, labels, geometry, None, tempered, Rule(), sample_grad)
    return tempered_gradient(sample_grad, rows, labels, tempered, geometry)


def tempered_gradient(
    sample_grad: Tensor,
    logits: Tensor,
    labels: Labels,
    tempered: Tempered,
    geometry: Geometry | None,
    given: tuple | None = None,
) -> Tensor:
    """The gradient of the logits, of rows of any length.

    `given`, where these are the classes of one process among many: the largest logit, Q, sum R where p is one of them
    and 0 elsewhere, the number of live classes, each (n,) fp32; the first of them, the number of all.
    """
    rows, labels = unit_stride(logits), contiguous(labels)
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    n_samples, n_classes = logits.shape
    grad_logits = gradient_buffer(logits, (n_samples, n_classes))
    launch(
        tempered_backward_kernel, (n_samples,), sample_grad.contiguous(), rows, rows.stride(0), target,
        target.stride(0), class_weight, table, table_row, *tempered, grad_logits,
        *(given or (None, None, None, None, 0, n_classes)), n_classes, ignore_index, float(label_smoothing),
        **loop_constants(rows, labels, geometry),
    )  # fmt: skip
    return grad_logits.to(logits.dtype)


def elogitnorm_forward(
    logits: Tensor, head_weight: Tensor, labels: Labels, eps: float, average_offset: int, with_slope: bool = True
) -> tuple[Tensor, Tensor, Tempered, Geometry]:
    """ELogitNorm of (n, c) logits under the (c, m) head: see `ood_fast.functional.elogitnorm` for the mathematics.

    Returns loss, distance, and what the backward pass needs (notation: the package's docstring). For n >= c the row
    kernel finds the predictions itself, so the logits are read once; for n < c they are found first, because the table
    has a row for each distinct one. The slope costs next to nothing, so it is always computed;
    `with_slope` stands in the signature because the PyTorch path has to pay for it.
    """
    labels = contiguous(labels)
    layout, rows, weight = laid_out("forward", logits, head_weight, *labels[:2])
    geometry, predicted, _ = geometry_of(layout, rows, weight)
    loss, distance, tempered, _ = _forward(layout, rows, labels, geometry, predicted, Rule(eps, average_offset))
    return loss, distance, tempered, geometry


class Ahead(NamedTuple):
    """What is made for an upstream gradient of 1, before the true one is known."""

    predicted: Tensor
    geometry: Geometry
    grad_logits: Tensor
    pull: Tensor
    """(n,): what the gradient of W is made of"""
    kept: Kept


def steps_ahead(logits: Tensor, head_weight: Tensor, labels: Labels) -> bool:
    """Whether `elogitnorm_ahead` takes one read and one write for loss and gradient, and the gradients of a loss whose
    scale comes later can be held in the inputs' dtypes: in fp16, 1/n of them would fall below the range."""
    return torch.float16 not in (logits.dtype, head_weight.dtype) and is_fused(logits, labels)


def counts(labels: Labels, reduction: str) -> bool:
    """Whether `elogitnorm_ahead` finds by itself what the losses are divided by: in a small step, two calls less."""
    return reduction == "mean" and labels.class_weight is None and labels.target.shape[0] <= SCAN_SAMPLES


def elogitnorm_ahead(
    logits: Tensor, head_weight: Tensor, labels: Labels, eps: float, average_offset: int, divisor: Tensor | None
) -> tuple[Tensor, Tensor, Ahead]:
    """(loss of the batch, D, what the backward pass finishes): from one read of the logits their gradient, too. 0-dim
    `divisor`, None where it `counts`.

    A small step is made of host calls: what can share an allocation does, and for n >= c the predictions are the rows
    of the table.
    """
    target, class_weight, ignore_index, smoothing = contiguous(labels)
    layout, rows, weight = laid_out("ahead", logits, head_weight, target, class_weight, divisor)
    kept, (loss, distance, pull) = _vectors(layout, 3, rows.device)
    geometry, predicted, kept = geometry_of(layout, rows, weight, kept)
    grad_logits = gradient_buffer(rows, layout.shape)
    divides = COUNTED if divisor is None else DIVIDED
    _row_kernel(layout, True, layout.by_row, smoothing > 0, divides, 0, ignore_index)(
        rows, divisor, target, class_weight, geometry.table, geometry.table_row if layout.by_row else None, predicted,
        loss, distance, None, None, None, pull, grad_logits,
        floats=(float(smoothing), float(eps), float(average_offset), 1.0, layout.boost),
    )  # fmt: skip
    if grad_logits.dtype != rows.dtype:
        grad_logits = grad_logits.to(rows.dtype)
    return loss.sum(), distance, Ahead(predicted, geometry, grad_logits, pull, kept)


def _vectors(layout: Layout, count: int, device: torch.device) -> tuple[Kept, list[Tensor]]:
    """Room for what is kept, and `count` vectors (n,), in one allocation."""
    size, sizes, step = _room(layout, count)
    origin, flags, *vectors = torch.empty(size, dtype=torch.float32, device=device).split_with_sizes(sizes)
    return Kept(origin if sizes[0] else None, flags), vectors[::step]


@prepared
def _room(layout: Layout, count: int) -> tuple[int, tuple[int, ...], int]:
    """(size, sizes of the parts, steps from vector to vector): each begins on 16 bytes, by what fills up the last."""
    padded = (4 * cdiv(size, 4) for size in kept_sizes(layout))
    filled = (layout.n_samples, -layout.n_samples % 4) if layout.n_samples % 4 else (layout.n_samples,)
    sizes = (*padded, *filled * count)
    return sum(sizes), sizes, len(filled)


def elogitnorm_finish(
    ahead: Ahead, factor: Tensor, logits: Tensor, head_weight: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients by logits and W of the loss times `factor` (0-dim), which no host needs to know."""
    if not need_weight:
        return scale_(ahead.grad_logits, factor), None
    predicted, geometry, grad_logits, pull, kept = ahead
    # What hooks of saved tensors give back need not lie as it lay.
    layout, rows, weight = laid_out("finish", logits, head_weight, factor)
    segments, upstream = Segments(geometry.table_row, None, pull, rows), Upstream(factor, grad_logits)
    return grad_logits, weight_gradient(layout, segments, weight, predicted, geometry, kept, upstream)


class Step(NamedTuple):
    """What one pass over the logits makes; the gradients are those of sum_i sample_grad_i loss_i."""

    loss: Tensor
    distance: Tensor
    grad_logits: Tensor | None
    grad_weight: Tensor | None


def elogitnorm_step(
    logits: Tensor,
    head_weight: Tensor,
    labels: Labels,
    rule: Rule,
    sample_grad: Tensor | None,
    need_weight: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> Step:
    """`elogitnorm_forward`, and the gradients for `sample_grad` (n,); that of W in its dtype, or in `weight_dtype`."""
    labels, sample_grad = contiguous(labels), None if sample_grad is None else sample_grad.contiguous()
    layout, rows, weight = laid_out("step", logits, head_weight, *labels[:2], sample_grad)
    geometry, predicted, kept = geometry_of(layout, rows, weight, _vectors(layout, 0, rows.device)[0])
    loss, distance, tempered, grad_logits = _forward(layout, rows, labels, geometry, predicted, rule, sample_grad)
    grad_weight = None
    if need_weight and sample_grad is not None:
        segments = Segments(geometry.table_row, sample_grad, tempered.slope, rows)
        grad_weight = weight_gradient(layout, segments, weight, predicted, geometry, kept, dtype=weight_dtype)
    return Step(loss, distance, grad_logits, grad_weight)


def elogitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    labels: Labels,
    geometry: Geometry,
    tempered: Tempered,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i loss_i by the logits and by the head weight, each None unless needed."""
    grad_logits = grad_weight = None
    labels, sample_grad = contiguous(labels), sample_grad.contiguous()
    tempered, geometry = packed(tempered), packed(geometry)
    others = *labels[:2], sample_grad, *tempered, *geometry
    layout, rows, weight = laid_out("backward", logits, head_weight, *others)
    if needs.logits:
        grad_logits = _backward(layout, sample_grad, rows, labels, tempered, geometry)
    if needs.weight:
        segments = Segments(geometry.table_row, sample_grad, tempered.slope, rows)
        grad_weight = weight_gradient(layout, segments, weight, tempered.predicted, geometry)
    return grad_logits, grad_weight


def logitnorm_forward(logits: Tensor, labels: Labels, tau: float, with_slope: bool = True) -> tuple[Tensor, Tempered]:
    """LogitNorm, CE(f / (tau (|f| + 1e-7)), y): the loss, and what the backward pass needs.

    `with_slope` as in `elogitnorm_forward`.
    """
    rows, labels = unit_stride(logits), contiguous(labels)
    predicted = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    layout = _of_logits("logitnorm", rows, *labels[:2])
    loss, _, tempered, _ = _forward(layout, rows, labels, None, predicted, Rule(tau=tau))
    return loss, tempered


def _of_logits(step: str, rows: Tensor, *others: Tensor | None) -> Layout:
    return layout_of(step, target_of(rows), kinds_of(rows, None, *others), rows.shape, rows.stride())


def logitnorm_backward(sample_grad: Tensor, logits: Tensor, labels: Labels, tempered: Tempered) -> Tensor:
    """Gradient of sum_i sample_grad_i loss_i by the logits."""
    rows, labels, tempered = unit_stride(logits), contiguous(labels), packed(tempered)
    layout = _of_logits("logitnorm backward", rows, *labels[:2], sample_grad, *tempered)
    return _backward(layout, sample_grad, rows, labels, tempered, None)
