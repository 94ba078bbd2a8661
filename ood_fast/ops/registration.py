"""What every operator shares: its registration, how it is called, and that it is differentiated once.

Here, and nowhere else, stand the private names of torch that this package uses. Each is looked up when this module is
imported, and has a fallback for a torch that renames it: slower, and as right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

# ----------------------------------------------------------------------------------------------------------------------
# Private names of torch
# ----------------------------------------------------------------------------------------------------------------------


def _private_operator(namespace: str, name: str) -> Callable[..., Any] | None:
    """torch.ops.<namespace>.<name>.default, or None."""
    operator = getattr(getattr(torch.ops, namespace), name, None)
    return getattr(operator, "default", None)


# The test that autograd.Function.apply itself makes. Without it every call goes the way of torch.func.
is_transforming: Callable[[], bool] = getattr(_C, "_are_functorch_transforms_active", lambda: True)
_FUNCTORCH = getattr(_C, "_functorch", None)
# Whether a tensor stands for others of torch.func, also where what vjp gave is called behind it. Without the name every
# backward pass goes through the registered operators.
is_wrapped: Callable[[Tensor], bool] = getattr(_FUNCTORCH, "is_functorch_wrapped_tensor", lambda tensor: True)
# Whether it stands for the batch of `is_grads_batched`, which no operator with a list of tensors takes. Without it the
# error is one of torch.
is_batched: Callable[[Tensor], bool] = getattr(_FUNCTORCH, "is_legacy_batchedtensor", lambda tensor: False)
# The mode in which make_fx records true tensors, which look like any: a graph would hold none of what kernels do.
# Without the name make_fx wants tracing_mode="symbolic".
_MODE_OF = getattr(_C, "_get_dispatch_mode", lambda key: None)
_KEYS = getattr(_C, "_TorchDispatchModeKey", None)
recording: Callable[[], object] = functools.partial(_MODE_OF, getattr(_KEYS, "PROXY", None))
# x W^T as torch's own compiler has it multiplied on CPUs. Without it: x @ W.t().
ONEDNN_LINEAR = _private_operator("mkldnn", "_linear_pointwise")
# (left * right[rows]).sum(1) in one pass. Without it: that.
BAG_WEIGHTS_GRADIENT = _private_operator("aten", "_embedding_bag_per_sample_weights_backward")


FORWARD_LEVEL = "_current_level"  # of forward-mode derivatives, -1 outside of all; without it tensors are asked
COMPILED_CALL = "_compiled_call_impl"  # where `module.compile()` puts what it made


def is_compiled(called: object) -> bool:
    """Whether torch.compile made it: a module by either way, or a function. Without the private names: as seen."""
    if isinstance(called, torch.nn.Module):
        return getattr(called, COMPILED_CALL, None) is not None or "_orig_mod" in dict(called.named_children())
    return hasattr(called, "_torchdynamo_orig_callable")


def uncompiled(module: torch.nn.Module) -> Callable[..., Any]:
    """What calls a module past `module.compile()`. Without the private name: the module itself."""
    return getattr(module, "_call_impl", module) if is_compiled(module) else module


def version_of(tensor: Tensor) -> object:
    """Equal as long as nobody changed the tensor in place. Without the private name, and for tensors of inference mode,
    where nothing is counted: never equal."""
    try:
        return tensor._version  # noqa: SLF001
    except (AttributeError, RuntimeError):
        return object()


def versions_of(tensors: Sequence[Any]) -> list[object]:
    """`version_of` each tensor; None of None, and of tensors of inference mode."""
    try:
        return [each._version for each in tensors]  # noqa: SLF001
    except (AttributeError, RuntimeError):
        return [None if each is None or each.is_inference() else version_of(each) for each in tensors]


# ----------------------------------------------------------------------------------------------------------------------
# Operators and calls
# ----------------------------------------------------------------------------------------------------------------------

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))  # what an argument may be that nothing traces


class Operator:
    """A function in plain Python, the same registered with torch, and its `Differentiable` where it has one."""

    function: type[Differentiable]

    def __init__(self, name: str, run: Callable[..., Any], registered: Any = None) -> None:
        self.name, self.run = name, run
        self.registered: Any = registered or run


def operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate a function that becomes torch.ops.ood_fast.<name>; `fake` makes its outputs without values.

    Both may return None for an output that nobody asked for. Registered operators must return tensors: there an empty
    one stands for it.
    """

    def register(run: Callable[..., Any]) -> Operator:
        made = torch.library.custom_op(f"ood_fast::{name}", _filled(run), mutates_args=(), schema=schema)
        made.register_fake(_filled(fake))
        made.register_vmap(functools.partial(_one_at_a_time, made))
        return Operator(name, run, made)

    return register


def _filled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def filled(*args: Any) -> Any:
        outputs = function(*args)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(args[0].new_empty(0) if output is None else output for output in outputs)

    return filled


class Differentiable(torch.autograd.Function):
    """An operator for eager calls; the registered one uses `save` and `backward`, too.

    `forward` takes the context itself. For the split form (`setup_context`) torch binds the arguments by `inspect` each
    call, which at 128 x 10 would cost more than the loss.
    """

    operator: Operator
    save: Callable[..., None]  # (ctx, inputs, outputs): keep what backward needs
    n_visible = 1  # how many outputs a caller sees; the rest are statistics for the backward pass

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.operator.function = cls
        cls.operator.registered.register_autograd(cls.backward, setup_context=cls.save_for_operator)

    @classmethod
    def forward(cls, ctx: Any, *inputs: Any) -> Any:
        """The visible outputs."""
        output = cls.operator.run(*inputs)
        cls.save(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        if cls.n_visible == 1:
            return output[0]
        ctx.mark_non_differentiable(*output[1 : cls.n_visible])
        return output[: cls.n_visible]

    @classmethod
    def save_for_operator(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """What `forward` does around `run`, for the registered operator: that one must return every statistic."""
        cls.save(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])


def _is_opaque(tensors: Sequence[Any]) -> bool:
    return torch.compiler.is_compiling() or recording() is not None or not _PLAIN.issuperset(map(type, tensors))


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether something looks at the operators instead of running them: compilation, torch.func, tensor subclasses."""
    return (
        _is_opaque(tensors)
        or is_transforming()
        or any(t is not None and (is_wrapped(t) or is_batched(t)) for t in tensors)
    )


def has_tangents(*tensors: Tensor | None) -> bool:
    """Whether a forward-mode derivative is under way."""
    if getattr(forward_ad, FORWARD_LEVEL, 0) < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in tensors)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient for any of these may be asked for."""
    # The level of torch.func that will differentiate need not be the innermost one, which is all that shows here.
    return is_transforming() or (torch.is_grad_enabled() and _any_requires_grad(tensors))


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    """A loop: `any` of a generator takes twice the time."""
    for t in tensors:  # noqa: SIM110
        if t is not None and t.requires_grad:
            return True
    return False


def call(operator: Operator, *args: Any) -> tuple[Tensor, ...]:
    """The outputs of a differentiable operator, the visible ones at least.

    The registered operator where something traces; an autograd function, or a plain call, otherwise.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    output: tuple[Tensor, ...]
    if _is_opaque(tensors):
        output = operator.registered(*args)
    elif is_transforming() or has_tangents(*tensors):
        output = _Transformed.apply(*args, operator)
    elif torch.is_grad_enabled() and _any_requires_grad(tensors):
        visible: Any = operator.function.apply(*args)
        output = visible if operator.function.n_visible > 1 else (visible,)
    else:
        output = operator.run(*args)
    return output


# ----------------------------------------------------------------------------------------------------------------------
# torch.func
# ----------------------------------------------------------------------------------------------------------------------


class _Transformed(torch.autograd.Function):
    """Any operator under torch.func.grad, vjp, vmap, jacrev: the split form that they need around the registered one.

    Forward-mode derivatives come here too, for an error: in a kernel the tangent would silently get lost.

    The last argument is the `Operator`: `needs_input_grad` keeps its places.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *args, operator = inputs
        return operator.registered(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *args, ctx.operator = inputs
        ctx.operator.function.save_for_operator(ctx, args, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *ctx.operator.function.backward(ctx, *grads), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError(
            f"ood_fast.{ctx.operator.name}: forward-mode derivatives (jvp, jacfwd, hessian) are not "
            "implemented; use reverse mode (grad, vjp, jacrev), or ood_fast.reference"
        )


def _one_at_a_time(registered: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """The rule of torch.func.vmap for every operator: a call for each element, stacked. Right, not fast."""

    def element(i: int, value: Any, dim: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [element(i, v, d) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    calls = [
        registered(*(element(i, value, dim) for value, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


# ----------------------------------------------------------------------------------------------------------------------
# First derivatives
# ----------------------------------------------------------------------------------------------------------------------


class _FirstDerivative(torch.autograd.Function):
    """The identity on gradients, which refuses to be differentiated itself.

    Without it a second derivative would be silently wrong: the saved statistics are constants to autograd.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, n_grads: int, *grads_then_inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in grads_then_inputs[:n_grads])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.op_name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"ood_fast.{ctx.op_name}: second derivatives are not implemented; "
            "ood_fast.reference has a form that autograd can differentiate twice"
        )


def first_derivative(
    operator: Operator, args: tuple[Any, ...], needed: tuple[bool, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients for `inputs` that `operator` makes of the arguments, of which the first is the incoming gradient.

    The plain function in eager calls, the registered operator where something traces. With create_graph=True they carry
    a clear error instead of a wrong graph.
    """
    if args[0] is None:
        return (None,) * len(inputs)
    name = operator.name.removesuffix("_backward")
    if not torch.compiler.is_compiling() and is_batched(args[0]):
        raise RuntimeError(
            f"ood_fast.{name}: batches of upstream gradients (is_grads_batched, jacobian(vectorize=True)) are not "
            "implemented; use torch.func.jacrev, or torch.func.vmap around what torch.func.vjp gives"
        )
    if not torch.is_grad_enabled():
        return _gradients(operator, args, needed, inputs)
    with torch.no_grad():
        grads: tuple[Tensor | None, ...] = _gradients(operator, args, needed, inputs)
    grads = _FirstDerivative.apply(name, len(grads), *grads, args[0], *inputs)
    return grads


def _gradients(
    operator: Operator, args: Sequence[Any], needed: Any, inputs: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    if not is_traced(args[0], *inputs):
        grads = operator.run(*args)
        return (grads,) if isinstance(grads, Tensor) else grads
    grads = operator.registered(*args)
    grads = (grads,) if isinstance(grads, Tensor) else grads
    # None again for what is empty because nobody asked for it.
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))
