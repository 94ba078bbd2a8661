"""Scores of a batch: NCI from features and logits and from features alone, and the distance to the boundaries.

Rows: ours; the reference, which is all that plain PyTorch offers; and, where the logits are at hand, the maximal
softmax probability that these scores replace.
"""

from __future__ import annotations

import pytest
import torch

import ood_fast
from ood_fast import reference

from .baselines import reference_bytes
from .cases import CIFAR10, CIFAR100, IMAGENET, IMAGENET21K, IMAGENET_VIT
from .conftest import over, relative_error

SCORES = {"nci_score": ood_fast.nci_score, "literal definition": reference.nci_score}


@pytest.fixture(**over((CIFAR10, CIFAR100, IMAGENET_VIT, IMAGENET, IMAGENET21K)))
def case(request):
    return request.param


@pytest.mark.parametrize("given", ["logits", "features alone"])
@pytest.mark.parametrize("name", SCORES)
@torch.no_grad()
def test_nci(name, given, inputs, measure):
    """Scores alone, no gradients; compared with float64 before they are timed."""
    logits = inputs.logits if given == "logits" else None
    arguments = (inputs.z, inputs.W, inputs.b, inputs.mean, logits)
    truth = reference.nci_score(*(None if tensor is None else tensor.double() for tensor in arguments))
    measure(
        f"NCI from {given}",
        lambda: SCORES[name](*arguments),
        row=name,
        counts="nci" if given == "logits" else "nci from features",
        error=relative_error([SCORES[name](*arguments)], [truth]),
    )


@torch.no_grad()
def test_softmax(inputs, measure):
    logits = inputs.logits
    truth = logits.double().softmax(1).amax(1)
    step = lambda: logits.softmax(1).amax(1)  # noqa: E731
    measure(
        "NCI from logits", step, row="MSP, torch", counts="softmax maximum", error=relative_error([step()], [truth])
    )


@torch.no_grad()
def test_boundary_distance(inputs, case, measure, leave_out, device):
    """D of each sample, the table of distances included: nothing is kept from batch to batch."""
    x = inputs.double()
    step = lambda: ood_fast.boundary_distance(inputs.logits, inputs.W)  # noqa: E731
    measure(
        "D from logits",
        step,
        row="boundary_distance",
        counts="boundary_distance",
        error=relative_error([step()], [_distance(x)]),
        distinct=inputs.distinct_predictions,
    )


@torch.no_grad()
def test_boundary_distance_literally(inputs, case, measure, leave_out, device):
    needed = reference_bytes(case) // 3 * 2
    limit = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**30
    reason = f"out of memory at {needed / 1e9:.1f} GB" if needed > limit else None
    leave_out("D from logits", case, "literal definition", reason)
    step = lambda: reference.boundary_distance(inputs.logits.float(), inputs.W.float())  # noqa: E731
    measure(
        "D from logits",
        step,
        row="literal definition",
        counts="boundary_distance",
        error=relative_error([step()], [_distance(inputs.double())]),
        distinct=inputs.distinct_predictions,
    )


def _distance(x):
    """D by the Gram form, in float64."""
    predicted = x.logits.argmax(1)
    rows = x.W[predicted]
    s = rows.square().sum(1, keepdim=True) + x.W.square().sum(1) - 2 * rows @ x.W.T
    gaps = x.logits.gather(1, predicted[:, None]) - x.logits
    s.scatter_(1, predicted[:, None], 1.0)
    return (gaps / s.sqrt()).sum(1) / (x.logits.shape[1] - 1)
