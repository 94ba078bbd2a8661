"""The operators of ELogitNorm, with logits and without, and of LogitNorm. Their callers check arguments; n >= 1."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks, eager
from ..eager.precision import compute_dtype
from ..records import Geometry, Labels, Needs, Tempered
from .backend import backend_of
from .registration import Differentiable, Operator, call, first_derivative, is_traced, needs_grad, operator

if TYPE_CHECKING:
    from ..distributed.shards import Shards


def _check_indices(backend: ModuleType, labels: Labels, n_classes: int) -> None:
    """On the CPU a target out of range raises; `eager` looks at the targets itself."""
    target = labels.target
    if backend is not eager and target.device.type == "cpu" and not target.is_floating_point():
        checks.index_range(target, n_classes, labels.ignore_index)


def _labels(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float, *rest: Any
) -> tuple[Labels, str, tuple[Any, ...]]:
    """(labels, reduction, the others) from the part of a flat schema that begins with the target."""
    return Labels(target, class_weight, ignore_index, label_smoothing), reduction, rest


def normalizer(labels: Labels, reduction: str, dtype: torch.dtype, shards: Shards | None = None) -> Tensor:
    """What the sum of the losses is divided by, 0-dim: for "mean" the weight of all that count, otherwise 1."""
    target, class_weight, ignore_index, _ = labels
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=target.device)
    if target.is_floating_point():
        return torch.full((), float(target.shape[0]), dtype=dtype, device=target.device)
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum(dtype=dtype)
    if shards is None:
        return (class_weight.to(dtype)[target.clamp(0, class_weight.shape[0] - 1)] * counted).sum()
    mine, place = shards.locate(target)
    return shards.sum((class_weight.to(dtype)[place] * (mine & counted)).sum())


def reduced(loss: Tensor, divisor: Tensor, reduction: str) -> Tensor:
    """The loss of a batch from those of its samples; `divisor` is `normalizer`'s."""
    if reduction == "mean":
        return loss.sum() / divisor
    return loss.sum() if reduction == "sum" else loss


def sample_grads(grad_loss: Tensor, divisor: Tensor, reduction: str, labels: Labels) -> Tensor:
    """The gradient of each unreduced loss, (n,)."""
    target = labels.target
    if reduction != "mean":
        return grad_loss if reduction == "none" else grad_loss.expand(target.shape[0])
    grad_loss = (grad_loss / divisor).expand(target.shape[0])
    if target.is_floating_point():
        return grad_loss
    # Where every sample is ignored the mean divides by 0, and 0 * inf would be NaN in the gradient of W.
    return grad_loss.masked_fill(target == labels.ignore_index, 0.0)


# ---- outputs without values


def fake_vectors(like: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """A vector (n,) of each dtype."""
    return [like.new_empty(like.shape[0], dtype=dtype) for dtype in dtypes]


def fake_gradient(like: Tensor, needed: bool) -> Tensor | None:
    """The gradient for `like`."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if needed else None


def fake_geometry(logits: Tensor, dtype: torch.dtype) -> Geometry:
    """The geometry of (n, c) logits."""
    n_samples, n_classes = logits.shape
    n_rows = torch.sym_min(n_samples, n_classes)
    return Geometry(
        logits.new_empty(n_samples, dtype=torch.int64),
        logits.new_empty((n_rows, n_classes), dtype=dtype),
        logits.new_empty(n_rows, dtype=torch.int64),
    )


def fake_logits_and_weight(grad: Tensor, logits: Tensor, head_weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The gradients for logits and W, of which the last two arguments say whether they are needed."""
    return fake_gradient(logits, rest[-2]), fake_gradient(head_weight, rest[-1])


def _fake_reduced(like: Tensor, dtype: torch.dtype, reduction: str) -> Tensor:
    return like.new_empty(like.shape[0] if reduction == "none" else (), dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# ELogitNorm
# ----------------------------------------------------------------------------------------------------------------------


def _fake_elogitnorm(logits: Tensor, head_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(logits, head_weight)
    return (
        _fake_reduced(logits, dtype, rest[3]),
        *fake_vectors(logits, dtype),
        logits.new_empty((), dtype=dtype),
        *fake_vectors(logits, torch.int64, dtype, dtype, dtype),
        *fake_geometry(logits, dtype),
    )


@operator(
    "elogitnorm",
    "(Tensor logits, Tensor head_weight, Tensor target, Tensor? class_weight, int ignore_index, str reduction,"
    " float label_smoothing, float eps, int average_offset, bool with_slope)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_elogitnorm,
)
def _elogitnorm(logits: Tensor, head_weight: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """loss, D, normalizer, *tempered, *geometry."""
    labels, reduction, keywords = _labels(*flat)  # eps, average_offset, with_slope
    backend = backend_of(logits, head_weight)
    _check_indices(backend, labels, logits.shape[1])
    loss, distance, tempered, geometry = backend.elogitnorm_forward(logits, head_weight, labels, *keywords)
    divisor = normalizer(labels, reduction, loss.dtype)
    return reduced(loss, divisor, reduction), distance, divisor, *tempered, *geometry


@operator(
    "elogitnorm_backward",
    "(Tensor grad_loss, Tensor logits, Tensor head_weight, Tensor target, Tensor? class_weight, Tensor[] saved,"
    " int ignore_index, str reduction, float label_smoothing, bool need_logits, bool need_weight) -> (Tensor, Tensor)",
    fake_logits_and_weight,
)
def _elogitnorm_backward(grad_loss: Tensor, logits: Tensor, head_weight: Tensor, *flat: Any) -> Any:
    target, class_weight, saved, *keywords = flat
    labels, reduction, (need_logits, need_weight) = _labels(target, class_weight, *keywords)
    sample_grad = sample_grads(grad_loss, saved[0], reduction, labels)
    tempered, geometry = Tempered(*saved[1:5]), Geometry(*saved[5:])
    needs = Needs(logits=need_logits, weight=need_weight)
    return backend_of(logits, head_weight).elogitnorm_backward(
        sample_grad, logits, head_weight, labels, geometry, tempered, needs
    )


class _ELogitNorm(Differentiable):
    """Where the kernels can, one pass over the logits makes the loss and the gradients for an upstream gradient of 1;
    the first backward pass scales and hands them out. A further one begins with a forward pass: nothing else is kept.
    """

    operator = _elogitnorm
    n_visible = 2

    @classmethod
    def forward(cls, ctx: Any, *inputs: Any) -> Any:
        logits, head_weight, target, class_weight, ignore_index, reduction, label_smoothing, *rule, _ = inputs
        labels = Labels(target, class_weight, ignore_index, label_smoothing)
        backend = backend_of(logits, head_weight)
        ahead = reduction != "none" and ctx.needs_input_grad[0] and backend is not eager
        ctx.ahead = None
        if not ahead or not backend.steps_ahead(logits, head_weight, labels):
            return super().forward(ctx, *inputs)
        _check_indices(backend, labels, logits.shape[1])
        divisor = None if backend.counts(labels, reduction) else normalizer(labels, reduction, torch.float32)
        loss, distance, made = backend.elogitnorm_ahead(logits, head_weight, labels, *rule, divisor)
        ctx.ahead = made, backend.elogitnorm_finish
        ctx.save_for_backward(*inputs[:4])
        ctx.keywords = inputs[4:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(distance)
        return loss, distance

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:4], *output[2:])
        ctx.keywords = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Any, ...]:
        logits, head_weight, target, class_weight, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        ahead, ctx.ahead = getattr(ctx, "ahead", None), None
        if ahead and not (grad_loss is None or torch.is_grad_enabled() or is_traced(grad_loss)):
            made, finish = ahead
            return *finish(made, grad_loss, logits, head_weight, needed[1]), *[None] * 8
        inputs = logits, head_weight, target, class_weight
        if not saved and grad_loss is not None:
            with torch.no_grad():
                saved = call(_elogitnorm, *inputs, *ctx.keywords)[2:]
        args = (grad_loss, *inputs, [*saved], *ctx.keywords[:3], *needed)
        return *first_derivative(_elogitnorm_backward, args, needed, (logits, head_weight)), *[None] * 8


def elogitnorm(
    logits: Tensor, head_weight: Tensor, labels: Labels, reduction: str, eps: float, average_offset: int
) -> tuple[Tensor, Tensor]:
    """(reduced loss, D)."""
    target, class_weight, ignore_index, label_smoothing = labels
    with_slope = needs_grad(logits, head_weight)
    loss, distance, *_ = call(
        _elogitnorm,
        *(logits, head_weight, target, class_weight, ignore_index, reduction, label_smoothing),
        *(eps, average_offset, with_slope),
    )
    return loss, distance


# ----------------------------------------------------------------------------------------------------------------------
# ELogitNorm without logits
# ----------------------------------------------------------------------------------------------------------------------


def _linear_needs(detach_geometry: bool, features: bool, weight: bool, bias: bool) -> Needs:
    return Needs(features=features, weight=weight, bias=bias, geometry=not detach_geometry)


def _fake_linear(features: Tensor, head_weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    dtype, reduction = compute_dtype(features, head_weight), rest[4]
    needs = [need and reduction != "none" for need in rest[-3:]]
    return (
        _fake_reduced(features, dtype, reduction),
        *fake_vectors(features, dtype),
        *_fake_linear_gradients(features, head_weight, needs),
    )


def _fake_linear_gradients(features: Tensor, head_weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    dtype = compute_dtype(features, head_weight)
    shapes = features.shape, head_weight.shape, head_weight.shape[:1]
    return tuple(
        features.new_empty(shape, dtype=dtype) if need else None for shape, need in zip(shapes, needs, strict=True)
    )


@operator(
    "linear_elogitnorm",
    "(Tensor features, Tensor head_weight, Tensor? head_bias, Tensor target, Tensor? class_weight, int ignore_index,"
    " str reduction, float label_smoothing, float eps, int average_offset, bool detach_geometry, bool need_features,"
    " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_linear,
)
def _linear_elogitnorm(
    features: Tensor, head_weight: Tensor, head_bias: Tensor | None, *flat: Any
) -> tuple[Tensor | None, ...]:
    """Loss, D, and unless the reduction is "none" the gradients: they cost least while the logits are at hand."""
    labels, reduction, (eps, average_offset, detach_geometry, *needed) = _labels(*flat)
    needs = _linear_needs(detach_geometry, *needed)
    backend = backend_of(features, head_weight)
    _check_indices(backend, labels, head_weight.shape[0])
    divisor = normalizer(labels, reduction, compute_dtype(features, head_weight))
    sample_grad = None
    if reduction != "none" and any(needed):
        sample_grad = sample_grads(torch.ones_like(divisor), divisor, reduction, labels)
    loss, *rest = backend.linear_elogitnorm(
        features, head_weight, head_bias, labels, eps, average_offset, sample_grad, needs
    )
    return reduced(loss, divisor, reduction), *rest


@operator(
    "linear_elogitnorm_backward",
    "(Tensor grad_loss, Tensor features, Tensor head_weight, Tensor? head_bias, Tensor target, Tensor? class_weight,"
    " int ignore_index, str reduction, float label_smoothing, float eps, int average_offset, bool detach_geometry,"
    " bool need_features, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, features, head_weight, *rest: _fake_linear_gradients(features, head_weight, rest[-3:]),
)
def _linear_elogitnorm_backward(
    grad_loss: Tensor, features: Tensor, head_weight: Tensor, head_bias: Tensor | None, *flat: Any
) -> tuple[Tensor | None, ...]:
    """The gradients from the start again: for reduction "none", and when a graph is walked a second time."""
    labels, reduction, (eps, average_offset, detach_geometry, *needed) = _labels(*flat)
    needs = _linear_needs(detach_geometry, *needed)
    divisor = normalizer(labels, reduction, compute_dtype(features, head_weight))
    sample_grad = sample_grads(grad_loss, divisor, reduction, labels)
    _, _, *grads = backend_of(features, head_weight).linear_elogitnorm(
        features, head_weight, head_bias, labels, eps, average_offset, sample_grad, needs
    )
    return tuple(grads)


class _LinearELogitNorm(Differentiable):
    operator = _linear_elogitnorm
    n_visible = 2

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.keywords = inputs[5:]
        # Ours alone, so that the first backward may scale them in place: dW can be all the memory there is.
        ctx.grads = output[2:]

    @classmethod
    def save_for_operator(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """The gradients are outputs there, which others may hold."""
        ctx.save_for_backward(*inputs[:5], *output[2:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.keywords, ctx.grads = inputs[5:], None

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpoints give them once
        inputs, kept = saved[:5], saved[5:]
        needed, keywords = ctx.needs_input_grad[:3], ctx.keywords
        ours, ctx.grads = ctx.grads, None
        if keywords[1] == "none" or not (ours or kept):
            args = (grad_loss, *inputs, *keywords[:-3], *needed)
            grads = first_derivative(_linear_elogitnorm_backward, args, needed, inputs[:3])
        else:

            def scale(grad_loss: Tensor) -> tuple[Tensor | None, ...]:
                if ours:
                    return tuple(None if grad is None else grad.mul_(grad_loss) for grad in ours)
                return tuple(grad * grad_loss if need else None for grad, need in zip(kept, needed, strict=True))

            grads = first_derivative(Operator("linear_elogitnorm", scale), (grad_loss,), needed, inputs[:3])
        cast = (None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs[:3], strict=True))
        return *cast, *[None] * 11


def linear_elogitnorm(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Labels,
    reduction: str,
    eps: float,
    average_offset: int,
    detach_geometry: bool,
) -> tuple[Tensor, Tensor]:
    """(reduced loss, D)."""
    target, class_weight, ignore_index, label_smoothing = labels
    needs = (t is not None and needs_grad(t) for t in (features, head_weight, head_bias))
    loss, distance, *_ = call(
        _linear_elogitnorm,
        *(features, head_weight, head_bias, target, class_weight, ignore_index, reduction, label_smoothing),
        *(eps, average_offset, detach_geometry, *needs),
    )
    return loss, distance


# ----------------------------------------------------------------------------------------------------------------------
# LogitNorm
# ----------------------------------------------------------------------------------------------------------------------


def _fake_logitnorm(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(logits)
    return (
        _fake_reduced(logits, dtype, rest[3]),
        logits.new_empty((), dtype=dtype),
        *fake_vectors(logits, torch.int64, dtype, dtype, dtype),
    )


@operator(
    "logitnorm",
    "(Tensor logits, Tensor target, Tensor? class_weight, int ignore_index, str reduction, float label_smoothing,"
    " float tau, bool with_slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_logitnorm,
)
def _logitnorm(logits: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """loss, normalizer, *tempered."""
    labels, reduction, keywords = _labels(*flat)  # tau, with_slope
    backend = backend_of(logits)
    _check_indices(backend, labels, logits.shape[1])
    loss, tempered = backend.logitnorm_forward(logits, labels, *keywords)
    divisor = normalizer(labels, reduction, loss.dtype)
    return reduced(loss, divisor, reduction), divisor, *tempered


@operator(
    "logitnorm_backward",
    "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? class_weight, Tensor[] saved,"
    " int ignore_index, str reduction, float label_smoothing) -> Tensor",
    lambda grad_loss, logits, *rest: fake_gradient(logits, True),
)
def _logitnorm_backward(grad_loss: Tensor, logits: Tensor, *flat: Any) -> Any:
    target, class_weight, saved, *keywords = flat
    labels, reduction, _ = _labels(target, class_weight, *keywords)
    sample_grad = sample_grads(grad_loss, saved[0], reduction, labels)
    return backend_of(logits).logitnorm_backward(sample_grad, logits, labels, Tempered(*saved[1:]))


class _LogitNorm(Differentiable):
    operator = _logitnorm

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.keywords = inputs[3:6]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Any, ...]:
        logits, target, class_weight, *saved = ctx.saved_tensors
        args = (grad_loss, logits, target, class_weight, saved, *ctx.keywords)
        return *first_derivative(_logitnorm_backward, args, (True,), (logits,)), *[None] * 7


def logitnorm(logits: Tensor, labels: Labels, reduction: str, tau: float) -> Tensor:
    """The reduced loss."""
    target, class_weight, ignore_index, label_smoothing = labels
    keywords = ignore_index, reduction, label_smoothing, tau, needs_grad(logits)
    return call(_logitnorm, logits, target, class_weight, *keywords)[0]
