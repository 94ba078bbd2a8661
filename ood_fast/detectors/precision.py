"""Matrix products of the scores."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eager.precision import compute_dtype, full_precision, is_exporting, matmul


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in float32 (float64 where any of them has it), whatever autocast says: scores are differences of large
    numbers, and reshaped features overflow float16. Fit for `torch.compile` and `torch.export`; differentiable."""
    dtype = compute_dtype(x, W, b)
    x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    if is_exporting():  # the graph keeps no autocast of its own
        exact = nullcontext()
    elif torch.compiler.is_compiling():  # the compiler cannot trace the other precision settings
        exact = torch.autocast(x.device.type, enabled=False)
    elif x.requires_grad:
        exact = full_precision(x.device)
    else:  # takes half the time of F.linear on some CPUs, and is not differentiable
        with full_precision(x.device):
            result = matmul(x, W.t())
        return result if b is None else result.add_(b)
    with exact:
        return F.linear(x, W, b)
