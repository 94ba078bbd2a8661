"""dW of heads whose rows are close, long or short, against float64: no worse than plain PyTorch, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ood_fast
from ood_fast import reference


def _heads(W: Tensor) -> dict[str, tuple[Tensor, float]]:
    """(the head, eps) by name."""
    close, giant = W.clone(), W.clone()
    close[1:3] = W[0] + 1e-5 * W[1:3]
    giant[2] *= 1e6
    return {
        "close": (close, 1e-6),
        "all close": (W[:1] + 1e-5 * W, 1e-6),
        "giant": (giant, 1e-6),
        "short": (1e-15 * W, 1e-6),
        "long": (1e15 * W, 0.0),
    }


def _gradients(function: Callable, logits: Tensor, W: Tensor, *others: Any, **keywords: Any) -> tuple[Tensor, ...]:
    logits, W = logits.detach().requires_grad_(), W.detach().requires_grad_()
    return torch.autograd.grad(function(logits, None, W, None, *others, **keywords).mean() * 3, (logits, W))


@pytest.mark.parametrize("name", _heads(torch.zeros(4, 2)))
@pytest.mark.parametrize(("n", "reduction"), [(7, "mean"), (4, "mean"), (4, "none")])
def test_gradients_of_close_and_extreme_rows(backend: Any, name: str, n: int, reduction: str) -> None:
    torch.manual_seed(0)
    logits, y = 3 * torch.randn(n, 5, device=backend.device), torch.randint(5, (n,), device=backend.device)
    W, eps = _heads(torch.randn(5, 6))[name]
    W = W.to(backend.device)
    keywords = {"eps": eps, "reduction": reduction}
    truth = _gradients(reference.elogitnorm, logits.double(), W.double(), y, **keywords)
    plain = _gradients(reference.elogitnorm, logits, W, y, **keywords)
    found = _gradients(ood_fast.elogitnorm, logits, W, y, **keywords)
    # A GPU divides, and takes roots and powers, to two units in the last place.
    least = 1e-6 if backend.device.type == "cpu" else 4e-6
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        size = true.abs().max()
        error, allowed = ((t.double() - true).abs().max() / size for t in (ours, theirs))
        assert error <= max(2 * allowed, least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [7, 4])
def test_only_tiles_with_close_rows_are_flagged(backend: Any, n: int, dtype: torch.dtype) -> None:
    """A tile is larger than five classes, and what it reads behind the last is a row of W that is there."""
    if backend.name == "eager":
        pytest.skip("has no tiles")
    from ood_fast.kernels.distances import Kept, distance_table, kept_sizes
    from ood_fast.kernels.launch import laid_out

    W = torch.randn(5, 6, device=backend.device).to(dtype)
    row_class = torch.tensor([0, 2, 4, -1], device=backend.device) if n < 5 else None
    for close in (False, True):
        W[1] = W[0] if close else W[1]
        layout, _, weight = laid_out("test", W.new_zeros(n, 5), W)
        flags = W.new_empty(kept_sizes(layout)[1], dtype=torch.float32)
        table = distance_table(layout, weight, row_class, Kept(None, flags))
        assert flags.tolist() == [close]
        used = range(5) if row_class is None else row_class[:-1]
        distance = (W.double()[used, None] - W.double()).norm(dim=2)
        expected = torch.where(distance > 0, 1 / distance, 0.0)
        torch.testing.assert_close(table[: len(used)].double(), expected, rtol=1e-5, atol=0)
        assert not table[len(used) :].any()
