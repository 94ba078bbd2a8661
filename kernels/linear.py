"""ELogitNorm without logits: chunks of rows, the kernels of `tempered.py` on logits that live as long as the chunk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..records import Labels, Needs
from . import losses
from .launch import LINEAR_LOGIT_ELEMENTS


def _without_autocast(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(features: Tensor, *others: Any) -> Any:
        kind = features.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if on else contextlib.nullcontext():
            return function(features, *others)

    return run


@_without_autocast
def linear_elogitnorm(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Labels,
    eps: float,
    average_offset: int,
    sample_grad: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, D, dz, dW, db) of z W^T + b, gradients of sum_i sample_grad_i loss_i in fp32; see `ood_fast.eager`.

    The logits come from the vendor's matrix product in the dtype that features and head have in common, whatever
    autocast says: it would choose another in a backward pass that computes them again, and fp16 behind the back of the
    scale below. The chunk follows from the number of classes alone.
    """
    n_samples, n_classes = features.shape[0], head_weight.shape[0]
    dtype = torch.promote_types(features.dtype, head_weight.dtype)
    weight = head_weight.to(dtype)
    bias = None if head_bias is None else head_bias.to(dtype)
    grads = sample_grad is not None
    geometry = grads and needs.weight and needs.geometry
    loss = torch.empty(n_samples, dtype=torch.float32, device=features.device)
    distance = torch.empty_like(loss)
    grad_features = (
        torch.empty(features.shape, dtype=torch.float32, device=loss.device) if grads and needs.features else None
    )
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=loss.device) if grads and needs.weight else None
    grad_bias = torch.zeros(n_classes, dtype=torch.float32, device=loss.device) if grads and needs.bias else None
    chunk = max(1, LINEAR_LOGIT_ELEMENTS // n_classes)
    scale = 1.0
    if grads and dtype == torch.float16:
        # The gradient of the logits is formed before a loss scale arrives, and 1/n of it would fall below fp16's range:
        # a power of two brings the largest incoming gradient to 1, and is taken out of the fp32 sums.
        largest = sample_grad.abs().max().float().clamp_min(2.0**-60)
        scale = torch.exp2(-torch.ceil(torch.log2(largest)))
        sample_grad = sample_grad * scale
    for start in range(0, n_samples, chunk):
        rows = slice(start, start + chunk)
        z = features[rows].to(dtype)
        logits = F.linear(z, weight, bias)
        part = labels._replace(target=labels.target[rows])
        part_grad = sample_grad[rows] if grads else None
        # Both parts of dW in fp32: their sum is rounded, not each of them.
        step = losses.elogitnorm_step(
            logits, head_weight, part, losses.Rule(eps, average_offset), part_grad, geometry, torch.float32
        )
        loss[rows], distance[rows], d_logits = step.loss, step.distance, step.grad_logits
        if not grads:
            continue
        if needs.features:
            grad_features[rows] = d_logits @ weight
        if needs.weight:
            grad_weight += d_logits.t() @ z
            if geometry:
                grad_weight += step.grad_weight
        if needs.bias:
            grad_bias += d_logits.sum(0, dtype=torch.float32)
    if isinstance(scale, Tensor):
        for grad in (grad_features, grad_weight, grad_bias):
            if grad is not None:
                grad.div_(scale)
    return loss, distance, grad_features, grad_weight, grad_bias
