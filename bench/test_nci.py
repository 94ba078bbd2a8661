"""The score of a batch: NCI from features and logits, and from features alone.

Rows: ours; the reference, which is all that plain PyTorch offers; and, where the logits are at hand, the maximal
softmax probability that NCI replaces.
"""

from __future__ import annotations

import pytest
import torch

import ood_fast
from ood_fast import reference

SCORES = {"nci_score": ood_fast.nci_score, "reference": reference.nci_score}


@pytest.mark.parametrize("given", ["logits", "features alone"])
@pytest.mark.parametrize("name", SCORES)
def test_nci(name, given, inputs, measure):
    """Scores alone, no gradients; timed only once they are right."""
    logits = inputs.logits.detach() if given == "logits" else None
    arguments = (inputs.z, inputs.W.detach(), inputs.b, inputs.mean, logits)
    in_float64 = (None if tensor is None else tensor.double() for tensor in arguments)
    with torch.no_grad():
        torch.testing.assert_close(
            SCORES[name](*arguments).double(), reference.nci_score(*in_float64), rtol=1e-4, atol=1e-5
        )
        measure(f"NCI from {given}", lambda: SCORES[name](*arguments))


def test_softmax(inputs, measure):
    logits = inputs.logits.detach()
    measure("NCI from logits", lambda: logits.softmax(1).amax(1))
