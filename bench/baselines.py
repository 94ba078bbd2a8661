"""What a careful user would write in plain PyTorch: no (c, c, m) tensor, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_elogitnorm(logits: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """ELogitNorm with ‖w_p − w_j‖² = ‖w_p‖² + ‖w_j‖² − 2 w_p·w_j for the predicted rows only, (n, c)."""
    top, predicted = logits.max(1, keepdim=True)
    rows = W[predicted[:, 0]]
    squared = rows.square().sum(1, keepdim=True) + W.square().sum(1) - 2 * rows @ W.T
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter(1, predicted, True)
    # 1 in place of the 0 (or the rounding error below it) at j = p: its square root has no gradient.
    length = squared.masked_fill(itself, 1).clamp_min(1e-12).sqrt()
    D = ((top - logits) / length).sum(1, keepdim=True) / (logits.shape[1] - 1)
    return F.cross_entropy(logits / D, y)
