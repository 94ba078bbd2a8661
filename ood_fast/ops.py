"""An operator each for ELogitNorm, LogitNorm, the boundary distance, NCI and row statistics: autograd, registration,
backend.

Eager calls go straight through a `torch.autograd.Function` (the dispatcher costs a registered operator some 30
microseconds a call); under `torch.compile`, export and for tensor subclasses the same functions run as operators of the
library `ood_fast`, `torch.ops.ood_fast.elogitnorm` and so on. The gradient formula of both is one and the same code.

Backends: Triton kernels on CUDA and ROCm devices, fused PyTorch (`eager`) elsewhere and for float64. The environment
variable `OOD_FAST_BACKEND` (`eager` or `triton`, read at import) or `use_backend` overrides the choice; with
`TRITON_INTERPRET=1` the Triton kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import checks, eager, small
from .eager.precision import compute_dtype
from .records import Geometry, Inputs, Labels, Needs, Projected, Tempered

BACKENDS = ("auto", "eager", "triton")
_chosen = os.environ.get("OOD_FAST_BACKEND", "auto") or "auto"
if _chosen not in BACKENDS:
    raise ValueError(f"OOD_FAST_BACKEND: got {_chosen!r}, expected one of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside on the backend `name`: "auto", "eager" or "triton"."""
    global _chosen
    checks.one_of("backend", name, BACKENDS)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed. Looks for it without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_no_triton() -> None:
    warnings.warn(
        "ood_fast: triton is not installed, so tensors on the GPU take the slower PyTorch path; pip install triton",
        stacklevel=2,
    )


def backend_name(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Which backend ("eager" or "triton") serves tensors of this device and dtype."""
    device = torch.device(device)
    if dtype == torch.float64 or _chosen == "eager":
        return "eager"
    if _chosen == "triton":
        if not has_triton():
            raise RuntimeError("OOD_FAST_BACKEND=triton, but triton is not installed; pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "OOD_FAST_BACKEND=triton: Triton runs CPU tensors only through its interpreter; "
                "set TRITON_INTERPRET=1 before Python starts"
            )
        return "triton"
    if device.type == "cuda":  # also ROCm
        if has_triton():
            return "triton"
        _warn_no_triton()
    return "eager"


def _backend(*tensors: Tensor | None) -> ModuleType:
    if backend_name(tensors[0].device, compute_dtype(*tensors)) == "eager":
        return eager
    from . import kernels

    return kernels


# ----------------------------------------------------------------------------------------------------------------------
# What the four operators share
# ----------------------------------------------------------------------------------------------------------------------

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))  # what an argument may be that nothing traces


class _Function(torch.autograd.Function):
    """An operator for eager calls: `run` computes, `save` keeps what `backward` needs; the registered one uses both.

    `forward` takes the context itself. For the split form (`setup_context`) torch binds the arguments by `inspect` each
    call, which at 128 x 10 would cost more than the loss.
    """

    run: Callable  # inputs -> outputs
    save: Callable  # (ctx, inputs, outputs): keep what backward needs
    n_visible = 1  # how many outputs a caller sees; the rest are statistics for the backward pass

    @classmethod
    def forward(cls, ctx, *inputs):
        output = cls.run(*inputs)
        cls.save(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        if cls.n_visible == 1:
            return output[0]
        ctx.mark_non_differentiable(*output[1 : cls.n_visible])
        return output[: cls.n_visible]

    @classmethod
    def save_for_operator(cls, ctx, inputs, output) -> None:
        """What `forward` does around `run`, for the registered operator: that one must return every statistic."""
        cls.save(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])


def _operator(
    name: str, schema: str, run: Callable, fake: Callable, function: type[_Function] | None = None
) -> Callable:
    """Register `run` as torch.ops.ood_fast.<name>, with the autograd formula of `function`."""
    operator = torch.library.custom_op(f"ood_fast::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_vmap(functools.partial(_one_at_a_time, operator))
    if function is not None:
        function.name = name
        operator.register_autograd(function.backward, setup_context=function.save_for_operator)
    return operator


def _call(function: type[_Function], operator: Callable, *args) -> tuple[Tensor, ...]:
    """The outputs of an operator, the visible ones at least.

    The registered operator where something traces; an autograd function, or a plain call, otherwise.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return operator(*args)
    if _is_transforming() or torch.autograd.forward_ad._current_level >= 0:
        return _Transformed.apply(*args, function, operator)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        output = function.apply(*args)
        return output if function.n_visible > 1 else (output,)
    return function.run(*args)


# ----------------------------------------------------------------------------------------------------------------------
# torch.func
# ----------------------------------------------------------------------------------------------------------------------

_is_transforming = torch._C._are_functorch_transforms_active  # the test that autograd.Function.apply itself makes


class _Transformed(torch.autograd.Function):
    """Any operator under torch.func.grad, vjp, vmap, jacrev: the split form that they need around the registered one.

    Forward-mode derivatives come here too, for an error: in a kernel the tangent would silently get lost.

    The last two arguments are the `_Function` and its operator: `needs_input_grad` keeps its places.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        *args, _, operator = inputs
        return operator(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *args, ctx.function, _ = inputs
        ctx.function.save_for_operator(ctx, args, output)

    @staticmethod
    def backward(ctx, *grads):
        return *ctx.function.backward(ctx, *grads), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(
            f"ood_fast.{ctx.function.name}: forward-mode derivatives (jvp, jacfwd, hessian) are not implemented; "
            "use reverse mode (grad, vjp, jacrev), or ood_fast.reference"
        )


def _one_at_a_time(operator: Callable, info, in_dims: tuple, *args) -> tuple[tuple[Tensor, ...] | Tensor, tuple | int]:
    """The rule of torch.func.vmap for every operator: a call for each element, stacked. Right, not fast."""

    def element(i: int, value, dim):
        if isinstance(value, (list, tuple)):
            return [element(i, v, d) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    calls = [
        operator(*(element(i, value, dim) for value, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


class _FirstDerivative(torch.autograd.Function):
    """The identity on gradients, which refuses to be differentiated itself.

    Without it a second derivative would be silently wrong: the saved statistics are constants to autograd.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, n_grads: int, *grads_then_inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in grads_then_inputs[:n_grads])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.op_name = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"ood_fast.{ctx.op_name}: second derivatives are not implemented; "
            "ood_fast.reference has a form that autograd can differentiate twice"
        )


def _backward(
    name: str,
    run_and_operator: tuple[Callable, Callable],
    args: tuple,
    needed: tuple[bool, ...] | None,
    inputs: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of an operator: `run` in eager calls, its registered operator where something traces.

    With create_graph=True they carry a clear error instead of a wrong graph.
    """
    grad = args[0]
    if grad is None:
        return (None,) * len(inputs)
    run, operator = run_and_operator
    if torch.compiler.is_compiling() or _is_transforming() or not _PLAIN.issuperset(map(type, (grad, *inputs))):
        run = operator
    if needed is not None:
        args = (*args, *needed)
    if not torch.is_grad_enabled():
        return _asked_for(run(*args), needed)
    with torch.no_grad():
        grads = _asked_for(run(*args), needed)
    return _FirstDerivative.apply(name, len(grads), *grads, grad, *inputs)


def _asked_for(grads: tuple[Tensor, ...], needed: tuple[bool, ...] | None) -> tuple[Tensor | None, ...]:
    """The inverse of `_or_empty`."""
    if needed is None or all(needed):
        return grads
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


def _or_empty(*grads_and_likes: tuple[Tensor | None, Tensor]) -> tuple[Tensor, ...]:
    """Operators must return tensors: an empty one stands for a gradient that nobody asked for."""
    return tuple(like.new_empty(0) if grad is None else grad for grad, like in grads_and_likes)


def _is_traced(*tensors: Tensor | None) -> bool:
    """Whether something looks at the operators instead of running them: compilation, torch.func, tensor subclasses."""
    return (
        torch.compiler.is_compiling()
        or _is_transforming()
        or torch.autograd.forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _needs_grad(*tensors: Tensor) -> bool:
    # The level of torch.func that will differentiate need not be the innermost one, which is all that shows here.
    return _is_transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _check_indices(backend: ModuleType, target: Tensor, n_classes: int, ignore_index: int) -> None:
    """On the CPU a target out of range raises; `eager` looks at the targets itself."""
    if backend is not eager and target.device.type == "cpu" and not target.is_floating_point():
        checks.index_range(target, n_classes, ignore_index)


def _reduce(
    loss: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """The reduced loss and what a mean divides by (0-dim; 1 for other reductions), as F.cross_entropy weighs it."""
    normalizer = _normalizer(target, class_weight, ignore_index, reduction, loss.dtype)
    if reduction == "mean":
        return loss.sum() / normalizer, normalizer
    return loss.sum() if reduction == "sum" else loss, normalizer


def _normalizer(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str, dtype: torch.dtype
) -> Tensor:
    """What the sum of the losses is divided by, 0-dim: for "mean" the weight of all that count, otherwise 1."""
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=target.device)
    if target.is_floating_point():
        return torch.full((), float(target.shape[0]), dtype=dtype, device=target.device)
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum(dtype=dtype)
    weight = class_weight.to(dtype)[target.clamp(0, class_weight.shape[0] - 1)]
    return (weight * counted).sum()


def _sample_grad(grad_loss: Tensor, normalizer: Tensor, reduction: str, target: Tensor, ignore_index: int) -> Tensor:
    """The gradient of each unreduced loss, (n,)."""
    if reduction != "mean":
        return grad_loss if reduction == "none" else grad_loss.expand(target.shape[0])
    grad_loss = (grad_loss / normalizer).expand(target.shape[0])
    if target.is_floating_point():
        return grad_loss
    # Where every sample is ignored the mean divides by 0, and 0 * inf would be NaN in the gradient of W.
    return grad_loss.masked_fill(target == ignore_index, 0.0)


def _fake_reduced(logits: Tensor, dtype: torch.dtype, reduction: str) -> Tensor:
    return logits.new_empty(logits.shape[0] if reduction == "none" else (), dtype=dtype)


def _vectors(like: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    return [like.new_empty(like.shape[0], dtype=dtype) for dtype in dtypes]


def _fake_gradient(like: Tensor, needed: bool) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if needed else like.new_empty(0)


def _fake_table(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n_samples, n_classes = logits.shape
    n_rows = torch.sym_min(n_samples, n_classes)
    return (
        logits.new_empty(n_samples, dtype=torch.int64),
        logits.new_empty((n_rows, n_classes), dtype=dtype),
        logits.new_empty(n_rows, dtype=torch.int64),
    )


# ----------------------------------------------------------------------------------------------------------------------
# ELogitNorm
# ----------------------------------------------------------------------------------------------------------------------


def _elogitnorm(
    logits, head_weight, target, class_weight, ignore_index, reduction, label_smoothing, eps, average_offset, with_slope
):
    backend = _backend(logits, head_weight)
    _check_indices(backend, target, logits.shape[1], ignore_index)
    labels = Labels(target, class_weight, ignore_index, label_smoothing)
    loss, distance, tempered, geometry = backend.elogitnorm_forward(
        logits, head_weight, labels, eps, average_offset, with_slope
    )
    loss, normalizer = _reduce(loss, target, class_weight, ignore_index, reduction)
    return loss, distance, normalizer, *tempered, *geometry


def _elogitnorm_fake(logits, head_weight, target, class_weight, ignore_index, reduction, *rest):
    dtype = compute_dtype(logits, head_weight)
    return (
        _fake_reduced(logits, dtype, reduction),
        *_vectors(logits, dtype),
        logits.new_empty((), dtype=dtype),
        *_vectors(logits, torch.int64, dtype, dtype, dtype),
        *_fake_table(logits, dtype),
    )


def _elogitnorm_backward(
    grad_loss,
    logits,
    head_weight,
    target,
    class_weight,
    saved,
    ignore_index,
    reduction,
    label_smoothing,
    need_logits,
    need_weight,
):
    normalizer, *saved = saved
    sample_grad = _sample_grad(grad_loss, normalizer, reduction, target, ignore_index)
    labels = Labels(target, class_weight, ignore_index, label_smoothing)
    tempered, geometry = Tempered(*saved[:4]), Geometry(*saved[4:])
    needs = Needs(logits=need_logits, weight=need_weight)
    grads = _backend(logits, head_weight).elogitnorm_backward(
        sample_grad, logits, head_weight, labels, geometry, tempered, needs
    )
    return _or_empty((grads[0], logits), (grads[1], head_weight))


def _logits_and_weight_fake(grad, logits, head_weight, *rest):
    *_, need_logits, need_weight = rest
    return _fake_gradient(logits, need_logits), _fake_gradient(head_weight, need_weight)


_elogitnorm_backward_operator = _operator(
    "elogitnorm_backward",
    "(Tensor grad_loss, Tensor logits, Tensor head_weight, Tensor target, Tensor? class_weight, Tensor[] saved,"
    " int ignore_index, str reduction, float label_smoothing, bool need_logits, bool need_weight) -> (Tensor, Tensor)",
    _elogitnorm_backward,
    _logits_and_weight_fake,
)


class _ELogitNorm(_Function):
    run = staticmethod(_elogitnorm)
    n_visible = 2

    @staticmethod
    def save(ctx, inputs, output):
        logits, head_weight, target, class_weight, ignore_index, reduction, label_smoothing, *_ = inputs
        ctx.save_for_backward(logits, head_weight, target, class_weight, *output[2:])
        ctx.keywords = ignore_index, reduction, label_smoothing

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        logits, head_weight, target, class_weight, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        grads = _backward(
            "elogitnorm",
            (_elogitnorm_backward, _elogitnorm_backward_operator),
            (grad_loss, logits, head_weight, target, class_weight, saved, *ctx.keywords),
            needed,
            (logits, head_weight),
        )
        return *grads, *[None] * 8


_elogitnorm_operator = _operator(
    "elogitnorm",
    "(Tensor logits, Tensor head_weight, Tensor target, Tensor? class_weight, int ignore_index, str reduction,"
    " float label_smoothing, float eps, int average_offset, bool with_slope)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _elogitnorm,
    _elogitnorm_fake,
    _ELogitNorm,
)


def _general_gradients(forward, backward, grad_loss, logits, head_weight, target, class_weight, *keywords_and_needs):
    """What the small form gives, by the general one: `forward` and `backward` are its functions or its operators."""
    ignore_index, reduction, eps, average_offset, *needs = keywords_and_needs
    inputs = logits, head_weight, target, class_weight
    _, _, *saved = forward(*inputs, ignore_index, reduction, 0.0, eps, average_offset, True)
    return backward(grad_loss, *inputs, saved, ignore_index, reduction, 0.0, *needs)


class _SmallELogitNorm(torch.autograd.Function):
    """ELogitNorm for small heads on the CPU: eager calls only, so it has no registered operator.

    The forward pass makes the gradients too, those of a loss with upstream gradient 1. Where each sample has its own
    (`reduction="none"`), and in a second backward pass through a retained graph, the backward pass computes them.
    """

    @staticmethod
    def forward(ctx, logits, head_weight, target, class_weight, *keywords):
        inputs = logits, head_weight, target, class_weight
        ahead = keywords[1] != "none"
        needed = ctx.needs_input_grad[:2] if ahead else (False, False)
        geometry = small.geometry(head_weight, keywords[-1])
        loss, distance, *grads = small.loss_and_gradients(*inputs, *keywords, None, *needed, geometry)
        ctx.save_for_backward(*inputs)
        ctx.keywords = keywords
        # Nobody else has them, so that the first backward may scale them in place and give them away.
        ctx.grads = grads if ahead else None
        ctx.geometry = None if ahead else geometry
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(distance)
        return loss, distance

    @staticmethod
    def backward(ctx, grad_loss, _):
        inputs = ctx.saved_tensors
        ours, ctx.grads = ctx.grads, None
        geometry = ctx.geometry

        def run(grad_loss, *inputs_and_keywords):
            *args, need_logits, need_weight = inputs_and_keywords
            with_tangent = torch.autograd.forward_ad._current_level >= 0
            upstream = grad_loss.item() if ours and not with_tangent else math.nan
            if math.isfinite(upstream):  # 0 * inf would be NaN, also where a sample is ignored
                if upstream != 1.0:
                    for grad in filter(torch.is_tensor, ours):
                        grad.mul_(grad_loss)
                return ours
            if not with_tangent:
                with contextlib.suppress(small.NotPlainError):  # W was plain in the forward pass; .data may change it
                    return small.loss_and_gradients(*args, grad_loss, need_logits, need_weight, geometry)[2:]
            return _general_gradients(_elogitnorm, _elogitnorm_backward, grad_loss, *inputs_and_keywords)

        # The small form looks at numbers, which nothing can trace.
        operator = functools.partial(_general_gradients, _elogitnorm_operator, _elogitnorm_backward_operator)
        args = (grad_loss, *inputs, *ctx.keywords)
        grads = _backward("elogitnorm", (run, operator), args, ctx.needs_input_grad[:2], inputs[:2])
        return *grads, *[None] * 6


def elogitnorm(
    logits: Tensor,
    head_weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    eps: float,
    average_offset: int,
) -> tuple[Tensor, Tensor]:
    """(reduced loss, D). Arguments are checked by the caller; n >= 1."""
    with_slope = _needs_grad(logits, head_weight)
    args = (logits, head_weight, target, class_weight, ignore_index, reduction)
    if (
        small.applies(logits, head_weight, target, class_weight, label_smoothing)
        and not _is_traced(logits, head_weight, target, class_weight)
        and backend_name(logits.device) == "eager"
    ):
        with contextlib.suppress(small.NotPlainError):
            run = _SmallELogitNorm.apply if with_slope else small.loss_and_gradients
            return run(*args, eps, average_offset)[:2]
    loss, distance, *_ = _call(
        _ELogitNorm,
        _elogitnorm_operator,
        *(*args, label_smoothing, eps, average_offset, with_slope),
    )
    return loss, distance


# ----------------------------------------------------------------------------------------------------------------------
# ELogitNorm without logits
# ----------------------------------------------------------------------------------------------------------------------


def _linear_elogitnorm(
    features,
    head_weight,
    head_bias,
    target,
    class_weight,
    ignore_index,
    reduction,
    label_smoothing,
    eps,
    average_offset,
    detach_geometry,
    need_features,
    need_weight,
    need_bias,
):
    """Loss, D, and unless the reduction is "none" the gradients: they cost least while the logits are at hand."""
    backend = _backend(features, head_weight)
    _check_indices(backend, target, head_weight.shape[0], ignore_index)
    normalizer = _normalizer(target, class_weight, ignore_index, reduction, compute_dtype(features, head_weight))
    sample_grad = None
    if reduction != "none" and (need_features or need_weight or need_bias):
        one = torch.ones_like(normalizer)
        sample_grad = _sample_grad(one, normalizer, reduction, target, ignore_index)
    labels = Labels(target, class_weight, ignore_index, label_smoothing)
    needs = Needs(features=need_features, weight=need_weight, bias=need_bias, geometry=not detach_geometry)
    loss, distance, *grads = backend.linear_elogitnorm(
        features, head_weight, head_bias, labels, eps, average_offset, sample_grad, needs
    )
    loss = loss if reduction == "none" else loss.sum() / normalizer
    return loss, distance, *_or_empty(*((grad, distance) for grad in grads))


def _linear_elogitnorm_fake(features, head_weight, head_bias, target, class_weight, ignore_index, reduction, *rest):
    dtype = compute_dtype(features, head_weight)
    needs = [need and reduction != "none" for need in rest[-3:]]
    shapes = features.shape, head_weight.shape, head_weight.shape[:1]
    return (
        _fake_reduced(features, dtype, reduction),
        *_vectors(features, dtype),
        *(features.new_empty(s if need else (0,), dtype=dtype) for s, need in zip(shapes, needs, strict=True)),
    )


def _linear_elogitnorm_backward(
    grad_loss, features, head_weight, head_bias, target, class_weight, ignore_index, reduction, *rest
):
    """The gradients from the start again: for reduction "none", and when a graph is walked a second time."""
    label_smoothing, eps, average_offset, detach_geometry, need_features, need_weight, need_bias = rest
    needs = Needs(features=need_features, weight=need_weight, bias=need_bias, geometry=not detach_geometry)
    normalizer = _normalizer(target, class_weight, ignore_index, reduction, compute_dtype(features, head_weight))
    sample_grad = _sample_grad(grad_loss, normalizer, reduction, target, ignore_index)
    _, distance, *grads = _backend(features, head_weight).linear_elogitnorm(
        *(features, head_weight, head_bias, Labels(target, class_weight, ignore_index, label_smoothing), eps),
        *(average_offset, sample_grad, needs),
    )
    return _or_empty(*((grad, distance) for grad in grads))


def _linear_elogitnorm_backward_fake(grad_loss, features, head_weight, *rest):
    dtype = compute_dtype(features, head_weight)
    shapes = features.shape, head_weight.shape, head_weight.shape[:1]
    return tuple(
        features.new_empty(shape if need else (0,), dtype=dtype) for shape, need in zip(shapes, rest[-3:], strict=True)
    )


_linear_elogitnorm_backward_operator = _operator(
    "linear_elogitnorm_backward",
    "(Tensor grad_loss, Tensor features, Tensor head_weight, Tensor? head_bias, Tensor target, Tensor? class_weight,"
    " int ignore_index, str reduction, float label_smoothing, float eps, int average_offset, bool detach_geometry,"
    " bool need_features, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _linear_elogitnorm_backward,
    _linear_elogitnorm_backward_fake,
)


class _LinearELogitNorm(_Function):
    run = staticmethod(_linear_elogitnorm)
    n_visible = 2

    @staticmethod
    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.keywords = inputs[5:]
        # Ours alone, so that the first backward may scale them in place: dW can be all the memory there is.
        ctx.grads = output[2:]

    @classmethod
    def save_for_operator(cls, ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], *output[2:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.keywords = inputs[5:]
        ctx.grads = None

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        inputs, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        needed = ctx.needs_input_grad[:3]
        reduction = ctx.keywords[1]
        ours, ctx.grads = ctx.grads, None

        def first_time(grad_loss, *rest):
            if ours:
                return tuple(grad.mul_(grad_loss) for grad in ours)
            return tuple(grad * grad_loss for grad in kept)

        from_scratch = reduction == "none" or not (ours or kept)
        grads = _backward(
            "linear_elogitnorm",
            (_linear_elogitnorm_backward, _linear_elogitnorm_backward_operator)
            if from_scratch
            else (first_time, first_time),
            (grad_loss, *inputs, *ctx.keywords[:-3]),
            needed,
            inputs[:3],
        )
        grads = [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs[:3], strict=True)]
        return *grads, *[None] * 11


_linear_elogitnorm_operator = _operator(
    "linear_elogitnorm",
    "(Tensor features, Tensor head_weight, Tensor? head_bias, Tensor target, Tensor? class_weight, int ignore_index,"
    " str reduction, float label_smoothing, float eps, int average_offset, bool detach_geometry, bool need_features,"
    " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_elogitnorm,
    _linear_elogitnorm_fake,
    _LinearELogitNorm,
)


def linear_elogitnorm(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    eps: float,
    average_offset: int,
    detach_geometry: bool,
) -> tuple[Tensor, Tensor]:
    """(reduced loss, D). Arguments are checked by the caller; n >= 1."""
    needs = (t is not None and _needs_grad(t) for t in (features, head_weight, head_bias))
    loss, distance, *_ = _call(
        _LinearELogitNorm,
        _linear_elogitnorm_operator,
        *(features, head_weight, head_bias, target, class_weight, ignore_index, reduction, label_smoothing, eps),
        *(average_offset, detach_geometry, *needs),
    )
    return loss, distance


# ----------------------------------------------------------------------------------------------------------------------
# LogitNorm
# ----------------------------------------------------------------------------------------------------------------------


def _logitnorm(logits, target, class_weight, ignore_index, reduction, label_smoothing, tau, with_slope):
    backend = _backend(logits)
    _check_indices(backend, target, logits.shape[1], ignore_index)
    labels = Labels(target, class_weight, ignore_index, label_smoothing)
    loss, tempered = backend.logitnorm_forward(logits, labels, tau, with_slope)
    return *_reduce(loss, target, class_weight, ignore_index, reduction), *tempered


def _logitnorm_fake(logits, target, class_weight, ignore_index, reduction, *rest):
    dtype = compute_dtype(logits)
    return (
        _fake_reduced(logits, dtype, reduction),
        logits.new_empty((), dtype=dtype),
        *_vectors(logits, torch.int64, dtype, dtype, dtype),
    )


def _logitnorm_backward(grad_loss, logits, target, class_weight, saved, ignore_index, reduction, label_smoothing):
    normalizer, *saved = saved
    sample_grad = _sample_grad(grad_loss, normalizer, reduction, target, ignore_index)
    labels = Labels(target, class_weight, ignore_index, label_smoothing)
    return _backend(logits).logitnorm_backward(sample_grad, logits, labels, Tempered(*saved))


_logitnorm_backward_operator = _operator(
    "logitnorm_backward",
    "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? class_weight, Tensor[] saved,"
    " int ignore_index, str reduction, float label_smoothing) -> Tensor",
    _logitnorm_backward,
    lambda grad_loss, logits, *rest: _fake_gradient(logits, True),
)


class _LogitNorm(_Function):
    run = staticmethod(_logitnorm)

    @staticmethod
    def save(ctx, inputs, output):
        logits, target, class_weight, ignore_index, reduction, label_smoothing, *_ = inputs
        ctx.save_for_backward(logits, target, class_weight, *output[1:])
        ctx.keywords = ignore_index, reduction, label_smoothing

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        logits, target, class_weight, *saved = ctx.saved_tensors
        (grad_logits,) = _backward(
            "logitnorm",
            (lambda *args: (_logitnorm_backward(*args),), lambda *args: (_logitnorm_backward_operator(*args),)),
            (grad_loss, logits, target, class_weight, saved, *ctx.keywords),
            None,
            (logits,),
        )
        return grad_logits, *[None] * 7


_logitnorm_operator = _operator(
    "logitnorm",
    "(Tensor logits, Tensor target, Tensor? class_weight, int ignore_index, str reduction, float label_smoothing,"
    " float tau, bool with_slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _logitnorm,
    _logitnorm_fake,
    _LogitNorm,
)


def logitnorm(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    tau: float,
) -> Tensor:
    """The reduced loss. Arguments are checked by the caller; n >= 1."""
    with_slope = _needs_grad(logits)
    args = (logits, target, class_weight, ignore_index, reduction, label_smoothing, tau, with_slope)
    return _call(_LogitNorm, _logitnorm_operator, *args)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Boundary distance
# ----------------------------------------------------------------------------------------------------------------------


def _boundary_distance(logits, head_weight, average_offset):
    backend = _backend(logits, head_weight)
    distance, predicted, slope, geometry = backend.boundary_distance_forward(logits, head_weight, average_offset)
    return distance, predicted, slope, *geometry


def _boundary_distance_fake(logits, head_weight, average_offset):
    dtype = compute_dtype(logits, head_weight)
    return *_vectors(logits, dtype, torch.int64, dtype), *_fake_table(logits, dtype)


def _boundary_distance_backward(grad_distance, logits, head_weight, saved, need_logits, need_weight):
    grads = _backend(logits, head_weight).boundary_distance_backward(
        grad_distance,
        logits,
        head_weight,
        *saved[:2],
        Geometry(*saved[2:]),
        Needs(logits=need_logits, weight=need_weight),
    )
    return _or_empty((grads[0], logits), (grads[1], head_weight))


_boundary_distance_backward_operator = _operator(
    "boundary_distance_backward",
    "(Tensor grad_distance, Tensor logits, Tensor head_weight, Tensor[] saved, bool need_logits, bool need_weight)"
    " -> (Tensor, Tensor)",
    _boundary_distance_backward,
    _logits_and_weight_fake,
)


class _BoundaryDistance(_Function):
    run = staticmethod(_boundary_distance)

    @staticmethod
    def save(ctx, inputs, output):
        logits, head_weight, _ = inputs
        ctx.save_for_backward(logits, head_weight, *output[1:])

    @staticmethod
    def backward(ctx, grad_distance, *unused):
        logits, head_weight, *saved = ctx.saved_tensors
        grads = _backward(
            "boundary_distance",
            (_boundary_distance_backward, _boundary_distance_backward_operator),
            (grad_distance, logits, head_weight, saved),
            ctx.needs_input_grad[:2],
            (logits, head_weight),
        )
        return *grads, None


_boundary_distance_operator = _operator(
    "boundary_distance",
    "(Tensor logits, Tensor head_weight, int average_offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _boundary_distance,
    _boundary_distance_fake,
    _BoundaryDistance,
)


def boundary_distance(logits: Tensor, head_weight: Tensor, average_offset: int) -> Tensor:
    """D, (n,). Arguments are checked by the caller; n >= 1."""
    return _call(_BoundaryDistance, _boundary_distance_operator, logits, head_weight, average_offset)[0]


# ----------------------------------------------------------------------------------------------------------------------
# NCI
# ----------------------------------------------------------------------------------------------------------------------


def _nci_score(features, head_weight, head_bias, mean, logits, alpha):
    backend = _backend(features, head_weight, mean)
    score, projected = backend.nci_forward(features, head_weight, head_bias, mean, logits, alpha)
    return score, *projected


def _nci_score_fake(features, head_weight, head_bias, mean, logits, alpha):
    dtype = compute_dtype(features, head_weight, mean)
    return tuple(_vectors(features, dtype, torch.int64, dtype, dtype))


def _nci_score_backward(
    grad_score,
    features,
    head_weight,
    mean,
    predicted,
    projection,
    inverse_norm,
    alpha,
    need_features,
    need_weight,
    need_mean,
):
    grads = _backend(features, head_weight, mean).nci_backward(
        *(grad_score, features, head_weight, mean, Projected(predicted, projection, inverse_norm), alpha),
        Needs(features=need_features, weight=need_weight, mean=need_mean),
    )
    return _or_empty(*zip(grads, (features, head_weight, mean), strict=True))


def _nci_score_backward_fake(grad_score, features, head_weight, mean, *rest):
    return tuple(_fake_gradient(t, need) for t, need in zip((features, head_weight, mean), rest[-3:], strict=True))


_nci_score_backward_operator = _operator(
    "nci_score_backward",
    "(Tensor grad_score, Tensor features, Tensor head_weight, Tensor mean, Tensor predicted, Tensor projection,"
    " Tensor inverse_norm, float alpha, bool need_features, bool need_weight, bool need_mean)"
    " -> (Tensor, Tensor, Tensor)",
    _nci_score_backward,
    _nci_score_backward_fake,
)


class _NCIScore(_Function):
    run = staticmethod(_nci_score)

    @staticmethod
    def save(ctx, inputs, output):
        features, head_weight, _, mean, _, alpha = inputs
        ctx.save_for_backward(features, head_weight, mean, *output[1:])
        ctx.alpha = alpha

    @staticmethod
    def backward(ctx, grad_score, *unused):
        features, head_weight, mean, *saved = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[i] for i in (0, 1, 3))
        grad_features, grad_weight, grad_mean = _backward(
            "nci_score",
            (_nci_score_backward, _nci_score_backward_operator),
            (grad_score, features, head_weight, mean, *saved, ctx.alpha),
            needed,
            (features, head_weight, mean),
        )
        return grad_features, grad_weight, None, grad_mean, None, None


_nci_score_operator = _operator(
    "nci_score",
    "(Tensor features, Tensor head_weight, Tensor? head_bias, Tensor mean, Tensor? logits, float alpha)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _nci_score,
    _nci_score_fake,
    _NCIScore,
)


def nci_score(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    mean: Tensor,
    logits: Tensor | None,
    alpha: float,
) -> Tensor:
    """The NCI score, (n,). Arguments are checked by the caller; n >= 1."""
    return _call(_NCIScore, _nci_score_operator, features, head_weight, head_bias, mean, logits, alpha)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Row statistics: forward only
# ----------------------------------------------------------------------------------------------------------------------


def _row_statistics(names, logits, features, head_weight, mean, table, gamma, boundaries=None):
    given = [t for t in (logits, features, head_weight, mean, table) if t is not None]
    backend = _backend(*given)
    counted = {"boundaries": boundaries} if backend is eager else {}  # the kernel counts as it goes
    return backend.row_statistics(names, Inputs(logits, features, head_weight, mean, table), gamma, **counted)


def _row_statistics_fake(names, logits, features, head_weight, mean, table, gamma):
    dtype = compute_dtype(logits, features, head_weight, mean, table)
    like = features if logits is None else logits
    return _vectors(like, *(torch.int64 if name == "predicted" else dtype for name in names))


_row_statistics_operator = _operator(
    "row_statistics",
    "(str[] names, Tensor? logits, Tensor? features, Tensor? head_weight, Tensor? mean, Tensor? table, float gamma)"
    " -> Tensor[]",
    _row_statistics,
    _row_statistics_fake,
)


def row_statistics(
    names: list[str],
    logits: Tensor | None,
    features: Tensor | None,
    head_weight: Tensor | None,
    mean: Tensor | None,
    table: Tensor | None,
    gamma: float,
    boundaries: Tensor | None = None,
) -> list[Tensor]:
    """The statistics `names`, each (n,), in that order. Arguments are checked and detached by the caller, None where no
    statistic needs them; n >= 1."""
    given = (names, logits, features, head_weight, mean, table, gamma)
    if not _is_traced(*given[1:-1]):
        return _row_statistics(*given, boundaries)
    tensors = [t for t in given[1:-1] if t is not None]
    on_cpu = tensors[0].device.type == "cpu"
    if torch.compiler.is_compiling() and on_cpu and _backend(*tensors) is eager:
        # The compiler for CPUs fuses what plain PyTorch does in two dozen passes, so it must see inside.
        return eager.row_statistics(names, Inputs(*given[1:-1]), gamma, traced=True)
    return _row_statistics_operator(*given)


def distance_table(head_weight: Tensor) -> Tensor:
    """R of all pairs of classes, (c, c)."""
    return _backend(head_weight).distance_table(head_weight)
