"""What the loss and score tests share: batches, and the yardstick of STYLE: no worse than plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond the error of plain PyTorch in the same dtype: what rounding the result once costs, and for float32 the Gram
# form of the distances (1e-5 relative, see CLOSE_PAIR in eager/distances.py).
SLACK = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Batch:
    """A random head and a random batch; `logits` is a leaf, rounded to its dtype, as the loss sees it."""

    logits: Tensor
    z: Tensor
    W: Tensor
    b: Tensor
    y: Tensor

    @classmethod
    def of(
        cls, n_samples: int, n_classes: int, n_features: int, dtype=torch.float32, device: torch.device | str = "cpu"
    ) -> Batch:
        z = torch.randn(n_samples, n_features, dtype=torch.float64)
        W = torch.randn(n_classes, n_features, dtype=torch.float64) / n_features**0.5
        b = torch.randn(n_classes, dtype=torch.float64)
        y = torch.randint(0, n_classes, (n_samples,))
        return cls(*((z @ W.T + b).to(device, dtype), *(t.to(device, dtype) for t in (z, W, b)), y.to(device)))

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
        """The same values, in another dtype and place."""
        return Batch(*(t.to(device, dtype) for t in (self.logits, self.z, self.W, self.b)), self.y.to(device))


def loss_and_gradients(function, batch: Batch, upstream: Tensor | None = None, **keywords) -> list[Tensor]:
    """[loss, d logits, d W] of an ELogitNorm-like function, with a given incoming gradient (1 if None)."""
    logits, W = batch.logits.detach().requires_grad_(), batch.W.detach().requires_grad_()
    loss = function(logits, batch.z, W, batch.b, keywords.pop("y", batch.y), **keywords)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, [logits, W], upstream)]


def assert_no_worse(actual: Tensor, truth: Tensor, plain: Tensor | None, dtype: torch.dtype, what: str) -> None:
    """|actual - truth| <= the largest error of plain PyTorch + slack, element by element; NaN and inf must agree."""
    # A GPU divides, and takes roots and powers, to two units in the last place.
    slack = SLACK[dtype] * (2 if actual.is_cuda else 1)
    actual, truth = actual.detach().cpu().double(), truth.detach().cpu().double()
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    special = ~truth.isfinite()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    assert same[special].all(), f"{what}: expected {truth[special]}, got {actual[special]}"
    actual, truth = actual.masked_fill(special, 0.0), truth.masked_fill(special, 0.0)
    # Terms of size 1 / n cancel in a gradient that is small or 0: 0.05 is their size in the batches of these tests.
    typical = max(0.05, truth.abs().mean().item()) if truth.numel() else 0.0
    bound = slack * (truth.abs() + typical)
    if plain is not None:
        plain_error = (plain.detach().cpu().double().masked_fill(special, 0.0) - truth).abs()
        bound = bound + plain_error.nan_to_num(0.0, 0.0, 0.0).max() if truth.numel() else bound
    excess = (actual - truth).abs() - bound
    if excess.numel() and not (excess <= 0).all():
        worst = int(excess.nan_to_num(torch.inf).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        raise AssertionError(
            f"{what}: worst at {index}: got {actual[index]}, truth {truth[index]}, "
            f"error {(actual - truth).abs()[index]} > allowed {bound[index]}"
        )
