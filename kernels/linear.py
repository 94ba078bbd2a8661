"""ELogitNorm without logits: chunks of rows, the kernels of `tempered.py` on logits that live as long as the chunk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..records import Labels, Needs
from . import losses
from .launch import LINEAR_LOGIT_ELEMENTS

if TYPE_CHECKING:
    from ..eager.distances import Head


def _without_autocast(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(features: Tensor, *others: Any) -> Any:
        kind = features.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if on else contextlib.nullcontext():
            return function(features, *others)

    return run


class Affine:
    """z W^T + b of chunks of rows, by the vendor's products in `dtype`, and the gradients through it."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.features, self.dtype, self.device = features, dtype, features.device
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    @_without_autocast
    def logits(self, rows: slice) -> Tensor:
        """Those of some rows."""
        return F.linear(self.features[rows].to(self.dtype), self.weight, self.bias)

    @_without_autocast
    def add(self, rows: slice, gradient: Tensor, grads: Sequence[Tensor | None], _: bool = False) -> None:
        """Write dz of these rows, and add to dW and db in fp32, those of `grads` that are given."""
        grad_features, grad_weight, grad_bias = grads
        if grad_features is not None:
            grad_features[rows] = gradient @ self.weight
        if grad_weight is not None:
            grad_weight += gradient.t() @ self.features[rows].to(self.dtype)
        if grad_bias is not None:
            grad_bias += gradient.sum(0, dtype=torch.float32)


def shard_affine(features: Tensor, head: Head, bias: Tensor | None) -> Affine:
    """Logits of one process among many, in fp16 never: their gradient is formed before a loss scale arrives."""
    dtype = torch.promote_types(features.dtype, head.weight.dtype)
    return Affine(features, head.weight, bias, torch.float32 if dtype == torch.float16 else dtype)


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
    affine = Affine(features, head_weight, head_bias, dtype)
    grads = sample_grad is not None
    geometry = grads and needs.weight and needs.geometry
    new = {"dtype": torch.float32, "device": features.device}
    loss, distance = torch.empty(n_samples, **new), torch.empty(n_samples, **new)
    grad_features = torch.empty(features.shape, **new) if grads and needs.features else None
    grad_weight = torch.zeros(head_weight.shape, **new) if grads and needs.weight else None
    grad_bias = torch.zeros(n_classes, **new) if grads and needs.bias else None
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
        logits = affine.logits(rows)
        part = labels._replace(target=labels.target[rows])
        part_grad = sample_grad[rows] if grads else None
        # Both parts of dW in fp32: their sum is rounded, not each of them.
        step = losses.elogitnorm_step(
            logits, head_weight, part, losses.Rule(eps, average_offset), part_grad, geometry, torch.float32
        )
        loss[rows], distance[rows], d_logits = step.loss, step.distance, step.grad_logits
        if not grads:
            continue
        affine.add(rows, d_logits, (grad_features, grad_weight, grad_bias))
        if geometry:
            grad_weight += step.grad_weight
    if isinstance(scale, Tensor):
        for grad in (grad_features, grad_weight, grad_bias):
            if grad is not None:
                grad.div_(scale)
    return loss, distance, grad_features, grad_weight, grad_bias
