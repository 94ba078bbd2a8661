"""Compact Convolutional Transformer, Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers", 2021,
arXiv 2104.05704.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_FEATURES, N_LAYERS, N_HEADS, MLP_RATIO = 256, 7, 4, 2
ATTENTION_DROPOUT, STOCHASTIC_DEPTH = 0.1, 0.1  # the latter of the last layer; 0 in the first, in even steps between


class CCT(nn.Module):
    """CCT-7/3×1: 7 layers; a tokenizer of one 3×3 convolution. 3.76 million parameters at 32×32 pixels, 10 classes.

        tokens  x_0 = MaxPool(ReLU(Conv(image))) + positions          (n, k, 256), k = 256 places for 32×32 pixels
        layer   x' = x + Attention(Norm(x)),  x = x' + MLP(Norm(x'))  4 heads, 512 hidden GELU units
        z       = softmax(g(Norm(x_7)))ᵀ Norm(x_7)                    sequence pooling: g a linear layer to one number
        f       = W z + b

    Input (n, in_channels, image_size, image_size), output: logits (n, n_classes). The layer is the pre-norm encoder
    that the paper takes over from ViT; the authors' code normalises the residual stream itself between attention and
    MLP, so its checkpoints do not fit.
    """

    def __init__(self, n_classes: int, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Conv2d(in_channels, N_FEATURES, kernel_size=3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.image_size = image_size
        self.positions = nn.Parameter(torch.empty(1, ((image_size + 1) // 2) ** 2, N_FEATURES))
        depth_rates = [STOCHASTIC_DEPTH * number / (N_LAYERS - 1) for number in range(N_LAYERS)]
        self.layers = nn.Sequential(*(_Layer(rate) for rate in depth_rates))
        self.norm = nn.LayerNorm(N_FEATURES)
        self.pool = nn.Linear(N_FEATURES, 1)
        self.fc = nn.Linear(N_FEATURES, n_classes)
        nn.init.trunc_normal_(self.positions, std=0.2)
        nn.init.kaiming_normal_(self.tokenizer[0].get_parameter("weight"))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, height, width) -> logits (n, c)."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"x: got images of {x.shape[-2]}×{x.shape[-1]}, expected {self.image_size}×{self.image_size}"
            )
        tokens = self.tokenizer(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.layers(tokens + self.positions))
        share = self.pool(tokens).softmax(dim=1)  # (n, k, 1)
        logits: Tensor = self.fc((share * tokens).sum(dim=1))
        return logits


class _Layer(nn.Module):
    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(N_FEATURES)
        self.qkv = nn.Linear(N_FEATURES, 3 * N_FEATURES, bias=False)
        self.proj = nn.Linear(N_FEATURES, N_FEATURES)
        self.norm2 = nn.LayerNorm(N_FEATURES)
        self.mlp = nn.Sequential(
            nn.Linear(N_FEATURES, MLP_RATIO * N_FEATURES), nn.GELU(), nn.Linear(MLP_RATIO * N_FEATURES, N_FEATURES)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self._attention(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor) -> Tensor:
        n_samples, n_tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n_samples, n_tokens, 3, N_HEADS, -1).permute(2, 0, 3, 1, 4)
        dropout = ATTENTION_DROPOUT if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n_samples, n_tokens, N_FEATURES))
        return out

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: in training, the branch is left out for some samples and larger for the others."""
        if not self.training or self.drop_rate == 0.0:
            return branch
        keep = 1.0 - self.drop_rate
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep
