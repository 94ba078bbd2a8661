"""A head whose weights learn from the large activations: ISH."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks


class ISHLinear(nn.Linear):
    """In-distribution sample emphasis: the logits are those of `nn.Linear`, and so is the gradient of z; W learns from
    sharpened features, which emphasise samples whose large activations hold little of their sum.

        ∂L/∂W = Σ_i (∂L/∂f_i) ẑ_iᵀ        ẑ = |z| · exp(Σ z / Σ_kept |z|) where kept, 0 elsewhere

    Kept are the (1 − prune) · m activations of largest size of each sample. In evaluation it is a
    plain linear layer. Parameters and state_dict are those of `nn.Linear`, so that checkpoints of one load
    into the other. OpenOOD also lessens the weight decay of the head, to 5e-5.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        prune: share of the activations that is left out, in [0, 1); 0.85 as the authors fine-tune ImageNet.

    Xu et al., "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement", ICLR 2024,
    arXiv:2310.00227.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, prune: float = 0.85) -> None:
        super().__init__(in_features, out_features, bias)
        checks.real("prune", prune, 0.0, 1.0)
        self.prune = prune
        if int(in_features * (1 - prune)) < 1:
            raise ValueError(f"prune: got {prune}, expected less: of {in_features} activations none would be kept")

    def forward(self, z: Tensor) -> Tensor:
        """Logits (..., c) of features (..., m)."""
        if not self.training:
            return F.linear(z, self.weight, self.bias)
        of_weight = F.linear(sharpened(z.detach(), self.prune), self.weight)
        return F.linear(z, self.weight.detach(), self.bias) + (of_weight - of_weight.detach())  # + 0, and its gradient

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, prune={self.prune}"


def sharpened(z: Tensor, prune: float) -> Tensor:
    """ẑ (..., m) of features (..., m), in their dtype; a sample without activations stays zero."""
    values = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    largest, places = values.abs().topk(int(z.shape[-1] * (1 - prune)), dim=-1)
    kept = largest.sum(dim=-1, keepdim=True)
    ratio = values.sum(dim=-1, keepdim=True) / torch.where(kept > 0, kept, 1.0)
    return torch.zeros_like(values).scatter_(-1, places, largest * ratio.exp()).to(z.dtype)
