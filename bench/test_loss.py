"""A training step beyond the backbone: loss and gradients for the logits, and for W where the loss has one.

Rows: ours; the reference, which is the definition taken literally; the Gram form under autograd; the cross-entropy that
ELogitNorm replaces; and the head itself, forward and backward, as a measure of what a step costs anyway.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import ood_fast
from ood_fast import reference

from .baselines import gram_elogitnorm
from .cases import Case, Inputs, skip_unless_reference_fits

LOSSES = {
    "elogitnorm": lambda x: ood_fast.elogitnorm(x.logits, x.z, x.W, x.b, x.y),
    "gram-autograd": lambda x: gram_elogitnorm(x.logits, x.W, x.y),
    "reference": lambda x: reference.elogitnorm(x.logits, x.z, x.W, x.b, x.y),
}


def loss_and_gradients(loss_of, x: Inputs) -> tuple[torch.Tensor, ...]:
    loss = loss_of(x)
    return (loss, *torch.autograd.grad(loss, (x.logits, x.W)))


@functools.cache
def truth(case: Case) -> tuple[torch.Tensor, ...]:
    """Loss and gradients in float64, by the Gram form, which needs no cancellation with rows as far apart as these."""
    return loss_and_gradients(LOSSES["gram-autograd"], Inputs.of(case, torch.device("cpu"), torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_elogitnorm(name, case, inputs, device, measure):
    """Forward and backward; timed only once its loss and gradients are right."""
    if name == "reference":
        skip_unless_reference_fits(case, device)
    step = functools.partial(loss_and_gradients, LOSSES[name], inputs)
    for actual, expected in zip(step(), truth(case), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual.detach().cpu().double(), expected, rtol=1e-3, atol=1e-5 * scale)
    measure("loss forward + backward", step)


def test_cross_entropy(inputs, measure):
    def step():
        return torch.autograd.grad(F.cross_entropy(inputs.logits, inputs.y), inputs.logits)

    measure("loss forward + backward", step)


def test_head(inputs, measure):
    z, b = inputs.z.detach().requires_grad_(), inputs.b.detach().requires_grad_()
    upstream = torch.randn_like(inputs.logits)

    def step():
        return torch.autograd.grad(F.linear(z, inputs.W, b), (z, inputs.W, b), upstream)

    measure("loss forward + backward", step)
