"""ELogitNorm and LogitNorm: what launches the kernels of `tempered.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import Geometry, Labels, Needs, Tempered
from .distances import geometry_of
from .launch import alignment, gradient_buffer, launch, row_config, target_of, unit_stride
from .tempered import tempered_backward_kernel, tempered_forward_kernel
from .weight_gradient import weight_gradient


def _forward(
    logits: Tensor,
    labels: Labels,
    geometry: Geometry | None,
    predicted: Tensor,
    prediction_known: bool,
    *,
    eps: float = 0.0,
    average_offset: int = 0,
    tau: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tempered]:
    """Launch `tempered_forward_kernel`; allocates and returns loss, distance and what the backward pass needs."""
    _, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    logits, target = unit_stride(logits), unit_stride(labels.target)
    n_samples, n_classes = logits.shape
    probabilities = target.is_floating_point()
    loss, temperature, log_partition, slope = (
        torch.empty(n_samples, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    distance = None if table is None else torch.empty_like(loss)
    config = row_config(n_classes, target_of(logits), 2 if target.is_floating_point() else 1)
    launch(
        tempered_forward_kernel,
        (n_samples,),
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        None if class_weight is None else class_weight.contiguous(),
        table,
        table_row,
        predicted,
        loss,
        distance,
        temperature,
        log_partition,
        slope,
        n_classes,
        ignore_index,
        float(label_smoothing),
        float(eps),
        float(average_offset),
        float(tau),
        BLOCK=config.block,
        LOOPED=config.looped,
        ALIGN=_row_alignment(logits, target),
        BOUNDARY=table is not None,
        PREDICTION_KNOWN=prediction_known,
        PROBABILITIES=probabilities,
        WEIGHTED=class_weight is not None,
        SMOOTHED=label_smoothing > 0,
        num_warps=config.num_warps,
    )
    return loss, distance, Tempered(predicted, temperature, log_partition, slope)


def _backward(
    sample_grad: Tensor, logits: Tensor, labels: Labels, tempered: Tempered, geometry: Geometry | None
) -> Tensor:
    """Launch `tempered_backward_kernel`; allocates and returns the gradient of the logits."""
    _, class_weight, ignore_index, label_smoothing = labels
    table_row, table, _ = geometry or (None, None, None)
    logits, target = unit_stride(logits), unit_stride(labels.target)
    n_samples, n_classes = logits.shape
    grad_logits = gradient_buffer(logits, (n_samples, n_classes))
    config = row_config(n_classes, target_of(logits), 2 if target.is_floating_point() else 1)
    launch(
        tempered_backward_kernel,
        (n_samples,),
        sample_grad.contiguous(),
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        None if class_weight is None else class_weight.contiguous(),
        table,
        table_row,
        *tempered,
        grad_logits,
        n_classes,
        ignore_index,
        float(label_smoothing),
        BLOCK=config.block,
        LOOPED=config.looped,
        ALIGN=_row_alignment(logits, target),
        BOUNDARY=table is not None,
        PROBABILITIES=target.is_floating_point(),
        WEIGHTED=class_weight is not None,
        SMOOTHED=label_smoothing > 0,
        num_warps=config.num_warps,
    )
    return grad_logits.to(logits.dtype)


def _row_alignment(logits: Tensor, target: Tensor) -> int:
    strides = [logits.stride(0)] + ([target.stride(0)] if target.is_floating_point() else [])
    return alignment(logits.shape[1], *strides)


def elogitnorm_forward(
    logits: Tensor, head_weight: Tensor, labels: Labels, eps: float, average_offset: int, with_slope: bool = True
) -> tuple[Tensor, Tensor, Tempered, Geometry]:
    """ELogitNorm of (n, c) logits under the (c, m) head: see `ood_fast.functional.elogitnorm` for the mathematics.

    Returns loss, distance, and what the backward pass needs (notation: the package's docstring). For n >= c the row
    kernel finds the predictions itself, so the logits are read once; for n < c they are found first, because the table
    has a row for each distinct one. The slope costs nothing while the row is in registers, so it is always computed;
    `with_slope` stands in the signature because the PyTorch path has to pay for it.
    """
    geometry, *prediction = geometry_of(logits, head_weight)
    loss, distance, tempered = _forward(logits, labels, geometry, *prediction, eps=eps, average_offset=average_offset)
    return loss, distance, tempered, geometry


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
    loss, _, tempered = _forward(logits, labels, None, predicted, False, tau=tau)
    return loss, tempered


def logitnorm_backward(sample_grad: Tensor, logits: Tensor, labels: Labels, tempered: Tempered) -> Tensor:
    """Gradient of sum_i sample_grad_i loss_i by the logits."""
    return _backward(sample_grad, logits, labels, tempered, None)
