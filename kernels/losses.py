"""ELogitNorm and LogitNorm: what launches the kernels of `tempered.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .distances import Geometry
from .launch import alignment, gradient_buffer, launch, row_config, target_of, unit_stride
from .tempered import tempered_backward_kernel, tempered_forward_kernel
from .weight_gradient import weight_gradient


def _forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    eps: float,
    average_offset: int,
    tau: float,
    table: Tensor | None,
    table_row: Tensor | None,
    predicted: Tensor,
    prediction_known: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Launch `tempered_forward_kernel`; allocates and returns loss, distance, temperature, log_partition and slope."""
    logits, target = unit_stride(logits), unit_stride(target)
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
    return loss, distance, temperature, log_partition, slope


def _backward(
    sample_grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    predicted: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    slope: Tensor,
    table: Tensor | None,
    table_row: Tensor | None,
) -> Tensor:
    """Launch `tempered_backward_kernel`; allocates and returns the gradient of the logits."""
    logits, target = unit_stride(logits), unit_stride(target)
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
        predicted,
        temperature,
        log_partition,
        slope,
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
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    eps: float,
    average_offset: int,
    with_slope: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ELogitNorm of (n, c) logits under the (c, m) head: see `ood_fast.functional.elogitnorm` for the mathematics.

    Returns loss, distance, predicted, temperature, log_partition, slope, table_row, table and row_class (notation:
    the package's docstring), float32 and int64. For n >= c the row kernel finds the predictions itself, so the
    logits are read once; for n < c they are found first, because the table has a row for each distinct one. The
    slope costs nothing while the row is in registers, so it is always computed; `with_slope` stands in the
    signature because the PyTorch path has to pay for it.
    """
    geometry = Geometry.of(logits, head_weight)
    loss, distance, temperature, log_partition, slope = _forward(
        logits,
        target,
        class_weight,
        ignore_index,
        label_smoothing,
        eps,
        average_offset,
        1.0,
        geometry.table,
        geometry.table_row,
        geometry.predicted,
        geometry.prediction_known,
    )
    return (
        loss,
        distance,
        geometry.predicted,
        temperature,
        log_partition,
        slope,
        geometry.table_row,
        geometry.table,
        geometry.row_class,
    )


def elogitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    predicted: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    slope: Tensor,
    table_row: Tensor,
    table: Tensor,
    row_class: Tensor,
    need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i sample_grad_i loss_i by the logits and by the head weight, each None unless needed."""
    grad_logits = grad_weight = None
    if need_logits:
        grad_logits = _backward(
            sample_grad,
            logits,
            target,
            class_weight,
            ignore_index,
            label_smoothing,
            predicted,
            temperature,
            log_partition,
            slope,
            table,
            table_row,
        )
    if need_weight:
        grad_weight = weight_gradient(sample_grad, slope, logits, head_weight, predicted, table_row, table, row_class)
    return grad_logits, grad_weight


def logitnorm_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    tau: float,
    with_slope: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LogitNorm, CE(f / (tau (|f| + 1e-7)), y): returns loss, predicted, temperature, log_partition and slope.

    `with_slope` as in `elogitnorm_forward`.
    """
    predicted = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    loss, _, temperature, log_partition, slope = _forward(
        logits, target, class_weight, ignore_index, label_smoothing, 0.0, 0, tau, None, None, predicted, False
    )
    return loss, predicted, temperature, log_partition, slope


def logitnorm_backward(
    sample_grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    predicted: Tensor,
    temperature: Tensor,
    log_partition: Tensor,
    slope: Tensor,
) -> Tensor:
    """Gradient of sum_i sample_grad_i loss_i by the logits."""
    return _backward(
        sample_grad,
        logits,
        target,
        class_weight,
        ignore_index,
        label_smoothing,
        predicted,
        temperature,
        log_partition,
        slope,
        None,
        None,
    )
