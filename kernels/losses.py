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
    alignment,
    gradient_buffer,
    has_exp2,
    launch,
    loop_config,
    next_power_of_2,
    row_config,
    target_of,
    unit_stride,
)
from .segments import Segments, Upstream, boost_of, scale_
from .tempered import tempered_backward_kernel, tempered_forward_kernel
from .weight_gradient import weight_gradient

# In place of what losses are divided by: how many targets are not ignored, found by the kernel.
COUNTED = 1


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
    pull: Tensor | None = None


def _fused(
    logits: Tensor,
    labels: Labels,
    geometry: Geometry | None,
    prediction_known: bool,
    outputs: RowOutputs | None,
    tempered: Tempered,
    rule: Rule,
    sample_grad: Tensor | int | None,
) -> Tensor | None:
    """Launch `fused_row_kernel`: writes `outputs` and `tempered`, which without outputs it reads. Returns the gradient
    of the logits unless `sample_grad` is None: (n,), or what the losses are divided by, () or COUNTED."""
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    loss, distance, pull = outputs or (None, None, None)
    rows, target = unit_stride(logits), unit_stride(target)
    n_samples, n_classes = rows.shape
    grad_logits = None if sample_grad is None else gradient_buffer(logits, (n_samples, n_classes))
    where = target_of(rows)
    config = row_config(n_classes, where)
    count, stride = 0, 0
    if isinstance(sample_grad, int):
        sample_grad, count = None, max(next_power_of_2(n_samples), 32)
    elif sample_grad is not None and sample_grad.dim() == 1:
        stride = sample_grad.stride(0)
    launch(
        fused_row_kernel, (n_samples,), sample_grad, stride, rows, rows.stride(0), target,
        None if class_weight is None else class_weight.contiguous(), table,
        None if table_row is tempered.predicted else table_row, tempered.predicted, loss, distance,
        tempered.temperature, None if loss is None else tempered.log_partition, tempered.slope, pull, grad_logits,
        n_samples, n_classes, ignore_index, float(label_smoothing), float(rule.eps),
        float(rule.average_offset), float(rule.tau), boost_of(n_samples, n_classes), BLOCK=config.block,
        ALIGN=alignment(n_classes, rows.stride(0)), BOUNDARY=table is not None, PREDICTION_KNOWN=prediction_known,
        SMOOTHED=label_smoothing > 0, IS_DIVISOR=count > 0 or (sample_grad is not None and sample_grad.dim() == 0),
        COUNT=count, HARDWARE=has_exp2(where), num_warps=config.num_warps,
    )  # fmt: skip
    return None if grad_logits is None else grad_logits.to(logits.dtype)


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
    logits: Tensor,
    labels: Labels,
    geometry: Geometry | None,
    predicted: Tensor,
    prediction_known: bool,
    rule: Rule,
    sample_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tempered, Tensor | None]:
    """Loss, distance, what the backward pass needs and, if `sample_grad` is given, the gradient of the logits."""
    rows, labels = unit_stride(logits), labels._replace(target=unit_stride(labels.target))
    n_samples, n_classes = logits.shape
    loss, temperature, log_partition, slope = (
        torch.empty(n_samples, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    distance = None if geometry is None else torch.empty_like(loss)
    tempered = Tempered(predicted, temperature, log_partition, slope)
    if is_fused(logits, labels):
        outputs = RowOutputs(loss, distance)
        grad_logits = _fused(logits, labels, geometry, prediction_known, outputs, tempered, rule, sample_grad)
        return loss, distance, tempered, grad_logits
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    launch(
        tempered_forward_kernel, (n_samples,), rows, rows.stride(0), target, target.stride(0),
        None if class_weight is None else class_weight.contiguous(), table, table_row, predicted, loss, distance,
        temperature, log_partition, slope, n_classes, ignore_index, float(label_smoothing), float(rule.eps),
        float(rule.average_offset), float(rule.tau), PREDICTION_KNOWN=prediction_known,
        **loop_constants(rows, labels, geometry),
    )  # fmt: skip
    grad_logits = None if sample_grad is None else _backward(sample_grad, logits, labels, tempered, geometry)
    return loss, distance, tempered, grad_logits


def _backward(
    sample_grad: Tensor, logits: Tensor, labels: Labels, tempered: Tempered, geometry: Geometry | None
) -> Tensor:
    """The gradient of the logits after `_forward`."""
    if is_fused(logits, labels):
        return _fused(logits, labels, geometry, True, None, tempered, Rule(), sample_grad)
    return tempered_gradient(sample_grad, logits, labels, tempered, geometry)


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
    rows, labels = unit_stride(logits), labels._replace(target=unit_stride(labels.target))
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    n_samples, n_classes = logits.shape
    grad_logits = gradient_buffer(logits, (n_samples, n_classes))
    launch(
        tempered_backward_kernel, (n_samples,), sample_grad.contiguous(), rows, rows.stride(0), target,
        target.stride(0), None if class_weight is None else class_weight.contiguous(), table, table_row, *tempered,
        grad_logits, *(given or (None, None, None, None, 0, n_classes)), n_classes, ignore_index,
        float(label_smoothing), **loop_constants(rows, labels, geometry),
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
    geometry, *prediction, _ = geometry_of(logits, head_weight)
    loss, distance, tempered, _ = _forward(logits, labels, geometry, *prediction, Rule(eps, average_offset))
    return loss, distance, tempered, geometry


class Ahead(NamedTuple):
    """A loss whose upstream gradient is not known yet, and what is made for one of 1."""

    loss: Tensor
    """(n,), divided: their sum is the loss of the batch"""
    distance: Tensor
    tempered: Tempered
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
) -> Ahead:
    """`elogitnorm_forward`, and from the same read the gradient of the logits; 0-dim `divisor`, None where it `counts`.

    A small step is made of host calls: what can share an allocation does, and for n >= c the predictions are the rows
    of the table.
    """
    kept, (loss, distance, temperature, log_partition, slope, pull) = _vectors(logits, head_weight, 6)
    geometry, predicted, is_known, kept = geometry_of(logits, head_weight, kept)
    tempered = Tempered(predicted, temperature, log_partition, slope)
    outputs, rule = RowOutputs(loss, distance, pull), Rule(eps, average_offset)
    sample_grad = COUNTED if divisor is None else divisor
    grad_logits = _fused(logits, labels, geometry, is_known, outputs, tempered, rule, sample_grad)
    return Ahead(loss, distance, tempered, geometry, grad_logits, pull, kept)


def _vectors(logits: Tensor, head_weight: Tensor, count: int) -> tuple[Kept, list[Tensor]]:
    """Room for what is kept, and `count` vectors (n,), in one allocation."""
    n_samples = logits.shape[0]
    n_origin, n_flags = kept_sizes(n_samples, head_weight)
    sizes = [n_samples] * count + [n_origin, n_flags]
    room = torch.empty(sum(sizes), dtype=torch.float32, device=logits.device)
    *vectors, origin, flags = room.split_with_sizes(sizes)
    return Kept(origin if n_origin else None, flags), vectors


def elogitnorm_finish(
    ahead: Ahead, logits: Tensor, head_weight: Tensor, factor: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients by logits and W of the loss times `factor` (0-dim), which no host needs to know."""
    if not need_weight:
        return scale_(ahead.grad_logits, factor), None
    segments = Segments(ahead.geometry.table_row, None, ahead.pull, unit_stride(logits))
    upstream = Upstream(factor, ahead.grad_logits)
    predicted = ahead.tempered.predicted
    return ahead.grad_logits, weight_gradient(segments, head_weight, predicted, ahead.geometry, ahead.kept, upstream)


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
    geometry, *prediction, kept = geometry_of(logits, head_weight, _vectors(logits, head_weight, 0)[0])
    loss, distance, tempered, grad_logits = _forward(logits, labels, geometry, *prediction, rule, sample_grad)
    grad_weight = None
    if need_weight and sample_grad is not None:
        segments = Segments(geometry.table_row, sample_grad.contiguous(), tempered.slope, unit_stride(logits))
        grad_weight = weight_gradient(segments, head_weight, tempered.predicted, geometry, kept, dtype=weight_dtype)
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
    if needs.logits:
        grad_logits = _backward(sample_grad, logits, labels, tempered, geometry)
    if needs.weight:
        segments = Segments(geometry.table_row, sample_grad.contiguous(), tempered.slope, unit_stride(logits))
        grad_weight = weight_gradient(segments, head_weight, tempered.predicted, geometry)
    return grad_logits, grad_weight


def logitnorm_forward(logits: Tensor, labels: Labels, tau: float, with_slope: bool = True) -> tuple[Tensor, Tempered]:
    """LogitNorm, CE(f / (tau (|f| + 1e-7)), y): the loss, and what the backward pass needs.

    `with_slope` as in `elogitnorm_forward`.
    """
    predicted = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    loss, _, tempered, _ = _forward(logits, labels, None, predicted, False, Rule(tau=tau))
    return loss, tempered


def logitnorm_backward(sample_grad: Tensor, logits: Tensor, labels: Labels, tempered: Tempered) -> Tensor:
    """Gradient of sum_i sample_grad_i loss_i by the logits."""
    return _backward(sample_grad, logits, labels, tempered, None)
