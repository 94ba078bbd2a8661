"""The operators of the boundary distance, of NCI, and of row statistics. Their callers check arguments; n >= 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import eager
from ..eager.precision import compute_dtype
from ..records import Geometry, Inputs, Needs, Projected
from .backend import backend_of
from .losses import fake_geometry, fake_gradient, fake_logits_and_weight, fake_vectors
from .registration import Differentiable, call, first_derivative, has_tangents, is_traced, operator

# ----------------------------------------------------------------------------------------------------------------------
# Boundary distance
# ----------------------------------------------------------------------------------------------------------------------


def _fake_boundary_distance(logits: Tensor, head_weight: Tensor, average_offset: int) -> tuple[Tensor, ...]:
    dtype = compute_dtype(logits, head_weight)
    return *fake_vectors(logits, dtype, torch.int64, dtype), *fake_geometry(logits, dtype)


@operator(
    "boundary_distance",
    "(Tensor logits, Tensor head_weight, int average_offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_boundary_distance,
)
def _boundary_distance(logits: Tensor, head_weight: Tensor, average_offset: int) -> tuple[Tensor, ...]:
    """D, predicted, slope, *geometry."""
    backend = backend_of(logits, head_weight)
    *vectors, geometry = backend.boundary_distance_forward(logits, head_weight, average_offset)
    return *vectors, *geometry


@operator(
    "boundary_distance_backward",
    "(Tensor grad_distance, Tensor logits, Tensor head_weight, Tensor[] saved, bool need_logits, bool need_weight)"
    " -> (Tensor, Tensor)",
    fake_logits_and_weight,
)
def _boundary_distance_backward(
    grad_distance: Tensor,
    logits: Tensor,
    head_weight: Tensor,
    saved: list[Tensor],
    need_logits: bool,
    need_weight: bool,
) -> Any:
    predicted, slope, *geometry = saved
    needs = Needs(logits=need_logits, weight=need_weight)
    return backend_of(logits, head_weight).boundary_distance_backward(
        grad_distance, logits, head_weight, predicted, slope, Geometry(*geometry), needs
    )


class _BoundaryDistance(Differentiable):
    operator = _boundary_distance

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_distance: Tensor | None, *unused: None) -> tuple[Any, ...]:
        logits, head_weight, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        args = (grad_distance, logits, head_weight, saved, *needed)
        return *first_derivative(_boundary_distance_backward, args, needed, (logits, head_weight)), None


def boundary_distance(logits: Tensor, head_weight: Tensor, average_offset: int) -> Tensor:
    """D, (n,)."""
    return call(_boundary_distance, logits, head_weight, average_offset)[0]


# ----------------------------------------------------------------------------------------------------------------------
# NCI
# ----------------------------------------------------------------------------------------------------------------------


def _fake_nci_score(
    features: Tensor, head_weight: Tensor, bias: Tensor, mean: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(features, head_weight, mean)
    return tuple(fake_vectors(features, dtype, torch.int64, dtype, dtype))


def _fake_nci_gradients(
    grad: Tensor, features: Tensor, head_weight: Tensor, mean: Tensor, *rest: Any
) -> tuple[Any, ...]:
    return tuple(fake_gradient(t, need) for t, need in zip((features, head_weight, mean), rest[-3:], strict=True))


@operator(
    "nci_score",
    "(Tensor features, Tensor head_weight, Tensor? head_bias, Tensor mean, Tensor? logits, float alpha)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_nci_score,
)
def _nci_score(
    features: Tensor, head_weight: Tensor, bias: Tensor | None, mean: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """score, *projected."""
    backend = backend_of(features, head_weight, mean)
    score, projected = backend.nci_forward(features, head_weight, bias, mean, *rest)
    return score, *projected


@operator(
    "nci_score_backward",
    "(Tensor grad_score, Tensor features, Tensor head_weight, Tensor mean, Tensor predicted, Tensor projection,"
    " Tensor inverse_norm, float alpha, bool need_features, bool need_weight, bool need_mean)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_nci_gradients,
)
def _nci_score_backward(grad_score: Tensor, features: Tensor, head_weight: Tensor, mean: Tensor, *flat: Any) -> Any:
    *fields, alpha, need_features, need_weight, need_mean = flat
    projected = Projected(*fields)
    needs = Needs(features=need_features, weight=need_weight, mean=need_mean)
    backend = backend_of(features, head_weight, mean)
    return backend.nci_backward(grad_score, features, head_weight, mean, projected, alpha, needs)


class _NCIScore(Differentiable):
    operator = _nci_score

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        features, head_weight, _, mean, _, ctx.alpha = inputs
        ctx.save_for_backward(features, head_weight, mean, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_score: Tensor | None, *unused: None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpoints give them once
        needed = tuple(ctx.needs_input_grad[i] for i in (0, 1, 3))
        args = (grad_score, *saved, ctx.alpha, *needed)
        grad_features, grad_weight, grad_mean = first_derivative(_nci_score_backward, args, needed, saved[:3])
        return grad_features, grad_weight, None, grad_mean, None, None


def nci_score(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, mean: Tensor, logits: Tensor | None, alpha: float
) -> Tensor:
    """The NCI score, (n,)."""
    return call(_nci_score, features, head_weight, head_bias, mean, logits, alpha)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Row statistics: forward only
# ----------------------------------------------------------------------------------------------------------------------


def _fake_row_statistics(names: list[str], *inputs_and_gamma: Any) -> list[Tensor]:
    inputs = Inputs(*inputs_and_gamma[:-1])
    dtype = compute_dtype(*inputs)
    like = inputs.features if inputs.logits is None else inputs.logits
    assert like is not None  # every statistic needs one of the two
    return fake_vectors(like, *(torch.int64 if name == "predicted" else dtype for name in names))


@operator(
    "row_statistics",
    "(str[] names, Tensor? logits, Tensor? features, Tensor? head_weight, Tensor? mean, Tensor? table, float gamma)"
    " -> Tensor[]",
    _fake_row_statistics,
)
def _row_statistics(names: list[str], *inputs_and_gamma: Any) -> Any:
    *inputs, gamma = inputs_and_gamma
    return backend_of(*inputs).row_statistics(names, Inputs(*inputs), gamma)


def row_statistics(names: list[str], inputs: Inputs, gamma: float, boundaries: Tensor | None = None) -> list[Tensor]:
    """The statistics `names`, each (n,), in that order; the inputs are detached, None where no statistic needs them.

    `boundaries` (c,): how many each class has in the table, where that is known.
    """
    is_eager = backend_of(*inputs) is eager
    if not (is_traced(*inputs) or has_tangents(*inputs)):
        if is_eager:
            return eager.row_statistics(names, inputs, gamma, boundaries=boundaries)
        run = _row_statistics.run  # the kernel counts as it goes
    else:
        like = inputs.features if inputs.logits is None else inputs.logits
        if torch.compiler.is_compiling() and like is not None and like.device.type == "cpu" and is_eager:
            # The compiler for CPUs fuses what plain PyTorch does in two dozen passes, so it must see inside.
            return eager.row_statistics(names, inputs, gamma, traced=True)
        run = _row_statistics.registered
    found: list[Tensor] = run(names, *inputs, gamma)
    return found


def distance_table(head_weight: Tensor) -> Tensor:
    """R of all pairs of classes, (c, c)."""
    table: Tensor = backend_of(head_weight).distance_table(head_weight)
    return table
