"""ISH: the gradients of its head against the authors' in a loop, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ood_fast
from ood_fast import recipes, reference
from ood_fast.training import build
from ood_fast.training.sharpened import ISHLinear, sharpened

N, C, M = 6, 3, 8


def literal(row: list[float], n_kept: int) -> list[float]:
    order = sorted(range(len(row)), key=lambda j: -abs(row[j]))[:n_kept]
    ratio = sum(row) / sum(abs(row[j]) for j in order)
    return [abs(v) * math.exp(ratio) if j in order else 0.0 for j, v in enumerate(row)]


def test_the_gradients_are_the_authors():
    layer = ISHLinear(M, C, prune=0.6)  # int(8 · 0.4) = 3 are kept
    plain = nn.Linear(M, C)
    plain.load_state_dict(layer.state_dict())
    z = torch.randn(N, M, requires_grad=True)
    incoming = torch.randn(N, C)
    f = layer(z)
    assert torch.equal(f, F.linear(z, layer.weight, layer.bias))
    f.backward(incoming)
    sharp = torch.tensor([literal(row, 3) for row in z.tolist()])
    torch.testing.assert_close(sharpened(z.detach(), 0.6), sharp)
    torch.testing.assert_close(sharpened(z.detach().view(2, -1, M), 0.6), sharp.view(2, -1, M))  # each place a sample
    torch.testing.assert_close(layer.weight.grad, sum(torch.outer(g, s) for g, s in zip(incoming, sharp, strict=True)))
    torch.testing.assert_close(z.grad, incoming @ layer.weight)
    torch.testing.assert_close(layer.bias.grad, incoming.sum(0))


def test_in_evaluation_it_is_a_linear_layer_and_a_dead_sample_stays_zero():
    layer = ISHLinear(M, C).eval()
    z = torch.randn(N, M)
    layer(z).sum().backward()
    torch.testing.assert_close(layer.weight.grad, z.sum(0).expand(C, M))
    assert torch.equal(sharpened(torch.zeros(2, M), 0.5), torch.zeros(2, M))


def test_with_elogitnorm_and_autocast():
    layer = ISHLinear(M, C)
    z, y = torch.randn(N, M), torch.arange(N) % C
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(z)
    assert logits.dtype == torch.bfloat16
    loss = ood_fast.ELogitNormLoss(layer)(layer(z), y)
    torch.testing.assert_close(loss, reference.elogitnorm(layer(z), None, layer.weight, None, y))
    loss.backward()
    assert layer.weight.grad.isfinite().all()


def test_the_recipe_and_what_is_refused():
    recipe = recipes.find("imagenet-finetune-ish")
    assert (recipe.epochs, recipe.learning_rate, recipe.n_processes, recipe.pretrained) == (10, 3e-3, 4, True)
    assert isinstance(build.model_of(recipes.find("digits-ish"), 6, (1, 8, 8)).fc, ISHLinear)
    with pytest.raises(ValueError, match=r"prune: got 1\.5"):
        ISHLinear(M, C, prune=1.5)
    with pytest.raises(ValueError, match=r"prune: got 0\.9, expected less: of 8 activations none"):
        ISHLinear(M, C, prune=0.9)
