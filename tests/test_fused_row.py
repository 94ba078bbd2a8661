"""Loss and logit gradient from one read of a row: when that kernel runs, and what the backward pass does."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import ood_fast
from ood_fast import ops, reference

launch = pytest.importorskip("ood_fast.kernels.launch")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    with ops.use_backend("triton"):
        launch.launches.clear()
        yield


def problem(n: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits, W = (3 * torch.randn(n, c)).to(dtype).requires_grad_(), torch.randn(c, 6).to(dtype).requires_grad_()
    return logits, torch.zeros(n, 6, dtype=dtype), W, torch.zeros(c, dtype=dtype), torch.randint(c, (n,))


@pytest.mark.parametrize(("n", "c"), [(9, 5), (4, 37)])
def test_one_read_and_one_write(interpreted, n: int, c: int) -> None:
    """A step launches the row kernel once; a second backward pass, through the retained graph, begins with a forward
    pass and launches it twice."""
    inputs = problem(n, c)
    loss = ood_fast.elogitnorm(*inputs)
    first = torch.autograd.grad(3 * loss, (inputs[0], inputs[2]), retain_graph=True)
    assert launch.launches["fused_row_kernel"] == 1
    assert not {"tempered_forward_kernel", "tempered_backward_kernel"} & launch.launches.keys()
    second = torch.autograd.grad(3 * loss, (inputs[0], inputs[2]))
    assert launch.launches["fused_row_kernel"] == 3
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "keywords", [{"reduction": "none"}, {"weight": True, "label_smoothing": 0.1}, {"no_grad": True}]
)
def test_no_gradient_before_it_is_known(interpreted, keywords: dict) -> None:
    """Where every sample has an upstream gradient of its own, or nobody asks for one, or in other kernels' rows."""
    logits, *others = problem(9, 5)
    keywords = keywords | ({"weight": torch.ones(5)} if "weight" in keywords else {})
    if keywords.pop("no_grad", False):
        logits = logits.detach()
    loss = ood_fast.elogitnorm(logits, *others, **keywords)
    assert launch.launches["scale_kernel"] == 0
    assert getattr(loss.grad_fn, "finish", None) is None


def test_half_precision_waits_for_its_loss_scale(interpreted) -> None:
    """1/n of a gradient would fall below fp16's range before the loss scale arrives."""
    logits, *others = problem(9, 5, torch.float16)
    loss = ood_fast.elogitnorm(logits, *others)
    (gradient,) = torch.autograd.grad(loss * 2.0**20, logits)
    assert launch.launches["fused_row_kernel"] == 2
    assert gradient.isinf().logical_or(gradient != 0).all()


def test_rows_nearer_than_a_float_can_square_keep_their_boundary(interpreted) -> None:
    """Rows 1e-20 apart: 1e-40 is no normal float32, and a GPU's root of it is that of 0."""
    logits, _, W, *_ = problem(4, 5)
    W = torch.zeros_like(W) + torch.eye(5, 6)
    W[1] = 0
    W[2] = W[1]
    W[2, 0] = 1e-20
    expected = reference.boundary_distance(logits.detach().double(), W.double())
    torch.testing.assert_close(ood_fast.boundary_distance(logits.detach(), W).double(), expected, rtol=1e-5, atol=0)
