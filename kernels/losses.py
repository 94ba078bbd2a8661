"""ELogitNorm and LogitNorm: what launches the kernels of `fused_row.py` and `tempered.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Geometry, Labels, Needs, Tempered
from .distances import geometry_of
from .fused_row import fused_row_kernel, scale_kernel
from .launch import (
    ROW_IN_REGISTERS,
    alignment,
    cdiv,
    gradient_buffer,
    has_exp2,
    launch,
    loop_config,
    row_config,
    target_of,
    unit_stride,
)
from .tempered import tempered_backward_kernel, tempered_forward_kernel
from .weight_gradient import weight_gradient


class Rule(NamedTuple):
    """What the temperature follows from: ELogitNorm takes the first two, LogitNorm tau."""

    eps: float = 0.0
    average_offset: int = 0
    tau: float = 1.0


def is_fused(logits: Tensor, labels: Labels) -> bool:
    """Whether `fused_row_kernel` takes these rows; `tempered.py` has the others."""
    both = labels.class_weight is not None and labels.label_smoothing > 0
    return not (labels.target.is_floating_point() or both or logits.shape[1] > ROW_IN_REGISTERS)


def _fused(
    logits: Tensor,
    labels: Labels,
    geometry: Geometry | None,
    tempered: Tempered,
    prediction_known: bool,
    statistics: tuple[Tensor, Tensor | None, Tensor | None] | None,
    rule: Rule,
    sample_grad: Tensor | None,
) -> Tensor | None:
    """Launch `fused_row_kernel`: writes loss, distance, sample_grad slope (`statistics`) and `tempered`, which without
    `statistics` it reads. Returns the gradient of the logits if `sample_grad` is given."""
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    loss, distance, pull = statistics or (None, None, None)
    rows = unit_stride(logits)
    n_samples, n_classes = rows.shape
    grad_logits = None if sample_grad is None else gradient_buffer(logits, (n_samples, n_classes))
    config = row_config(n_classes, target_of(rows))
    by_sample = sample_grad is not None and sample_grad.dim() == 1
    launch(
        fused_row_kernel, (n_samples,), sample_grad, sample_grad.stride(0) if by_sample else 0, rows, rows.stride(0),
        unit_stride(target), None if class_weight is None else class_weight.contiguous(), table, table_row,
        tempered.predicted, loss, distance, tempered.temperature, None if loss is None else tempered.log_partition,
        tempered.slope, pull, grad_logits, n_classes, ignore_index, float(label_smoothing), float(rule.eps),
        float(rule.average_offset), float(rule.tau), BLOCK=config.block, ALIGN=alignment(n_classes, rows.stride(0)),
        BOUNDARY=table is not None, PREDICTION_KNOWN=prediction_known, SMOOTHED=label_smoothing > 0,
        IS_DIVISOR=sample_grad is not None and not by_sample, HARDWARE=has_exp2(target_of(rows)),
        num_warps=config.num_warps,
    )  # fmt: skip
    return None if grad_logits is None else grad_logits.to(logits.dtype)


def _shape(logits: Tensor, labels: Labels, geometry: Geometry | None) -> dict[str, object]:
    """The constants that both kernels of `tempered.py` share."""
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
        grad_logits = _fused(
            logits, labels, geometry, tempered, prediction_known, (loss, distance, None), rule, sample_grad
        )
        return loss, distance, tempered, grad_logits
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    launch(
        tempered_forward_kernel, (n_samples,), rows, rows.stride(0), target, target.stride(0),
        None if class_weight is None else class_weight.contiguous(), table, table_row, predicted, loss, distance,
        temperature, log_partition, slope, n_classes, ignore_index, float(label_smoothing), float(rule.eps),
        float(rule.average_offset), float(rule.tau), PREDICTION_KNOWN=prediction_known,
        **_shape(rows, labels, geometry),
    )  # fmt: skip
    grad_logits = None if sample_grad is None else _backward(sample_grad, logits, labels, tempered, geometry)
    return loss, distance, tempered, grad_logits


def _backward(
    sample_grad: Tensor, logits: Tensor, labels: Labels, tempered: Tempered, geometry: Geometry | None
) -> Tensor:
    """The gradient of the logits after `_forward`."""
    if is_fused(logits, labels):
        return _fused(logits, labels, geometry, tempered, True, None, Rule(), sample_grad)
    rows, labels = unit_stride(logits), labels._replace(target=unit_stride(labels.target))
    target, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    n_samples, n_classes = logits.shape
    grad_logits = gradient_buffer(logits, (n_samples, n_classes))
    launch(
        tempered_backward_kernel, (n_samples,), sample_grad.contiguous(), rows, rows.stride(0), target,
        target.stride(0), None if class_weight is None else class_weight.contiguous(), table, table_row, *tempered,
        grad_logits, n_classes, ignore_index, float(label_smoothing), **_shape(rows, labels, geometry),
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
    geometry, *prediction = geometry_of(logits, head_weight)
    loss, distance, tempered, _ = _forward(logits, labels, geometry, *prediction, Rule(eps, average_offset))
    return loss, distance, tempered, geometry


class Step(NamedTuple):
    """What one pass over the logits makes; the gradients are those of sum_i sample_grad_i loss_i."""

    loss: Tensor
    distance: Tensor
    tempered: Tempered
    geometry: Geometry
    grad_logits: Tensor | None
    grad_weight: Tensor | None


def steps_ahead(logits: Tensor, head_weight: Tensor, labels: Labels) -> bool:
    """Whether `elogitnorm_step` takes one read and one write for loss and gradient, and the gradients of a loss whose
    scale comes later can be held in the inputs' dtypes: in fp16, 1/n of them would fall below the range."""
    return torch.float16 not in (logits.dtype, head_weight.dtype) and is_fused(logits, labels)


def elogitnorm_step(
    logits: Tensor,
    head_weight: Tensor,
    labels: Labels,
    eps: float,
    average_offset: int,
    sample_grad: Tensor | None,
    need_weight: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> Step:
    """`elogitnorm_forward`, and the gradients for `sample_grad`: (n,), or 0-dim what the losses will be divided by;
    that of W in its dtype, or in `weight_dtype`.

    A small step is made of host calls: what can share an allocation does, and for n >= c the predictions are the rows
    of the table.
    """
    geometry, *prediction = geometry_of(logits, head_weight, aliased=True)
    rule = Rule(eps, average_offset)
    if sample_grad is None or not is_fused(logits, labels):
        loss, distance, tempered, grad_logits = _forward(logits, labels, geometry, *prediction, rule, sample_grad)
        pull, scale = tempered.slope, sample_grad
    else:
        n_samples = logits.shape[0]
        vectors = torch.empty(6, n_samples, dtype=torch.float32, device=logits.device)
        loss, distance, temperature, log_partition, slope, pull = vectors.unbind()
        tempered, scale = Tempered(prediction[0], temperature, log_partition, slope), None
        grad_logits = _fused(
            logits, labels, geometry, tempered, prediction[1], (loss, distance, pull), rule, sample_grad
        )
    grad_weight = None
    if need_weight and sample_grad is not None:
        grad_weight = weight_gradient(scale, pull, logits, head_weight, tempered.predicted, geometry, weight_dtype)
    return Step(loss, distance, tempered, geometry, grad_logits, grad_weight)


def scale_(gradient: Tensor, others: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both times factor (0-dim), in place, in one launch and without a pass over them where the factor is 1."""
    if gradient.dtype == torch.bfloat16 and target_of(gradient) == "interpreter":  # which truncates
        return gradient.mul_(factor), None if others is None else others.mul_(factor)
    block = 8 * 32 * 4  # 8 a thread with 4 warps: a 128-bit load in half precision
    sizes = gradient.numel(), 0 if others is None else others.numel()
    grid = (sum(cdiv(size, block) for size in sizes),)
    launch(scale_kernel, grid, gradient, others, factor, *sizes, BLOCK=block, num_warps=4)
    return gradient, others


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
        grad_weight = weight_gradient(sample_grad, tempered.slope, logits, head_weight, tempered.predicted, geometry)
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
