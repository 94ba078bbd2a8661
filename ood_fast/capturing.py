"""What enters the head of a model, and what is read of its other layers: hooks for the time of a call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


class CapturedFeatures:
    """What entered a head, and what was read of other layers, see `capture_features`."""

    def __init__(self) -> None:
        self._features: Tensor | None = None
        self.read: dict[Hashable, Tensor] = {}
        self.dtype: torch.dtype | None = None  # of what came out of the head

    @property
    def seen(self) -> bool:
        """Whether a forward pass has been seen."""
        return self._features is not None

    @property
    def features(self) -> Tensor:
        """z (n, m) of the last forward pass, still part of its autograd graph; RuntimeError before the first."""
        if self._features is None:
            raise RuntimeError(
                "the head has not run as a module: call the model inside capture_features(head), where head is the "
                "nn.Linear that makes the logits"
            )
        return self._features

    def keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, output: Any = None) -> None:
        """Forward hook of the head; keeps nothing of passes that another call made."""
        if any(captured is self for captured in _CAPTURING.get()):
            (self._features,) = (*args, *(kwargs or {}).values())  # a linear layer takes one argument
            self.dtype = getattr(output, "dtype", None)

    def keeping(self, key: Hashable, read: Callable[[Any], Tensor]) -> Callable[..., Any]:
        """A forward hook that keeps read(output) of a layer's last run as `self.read[key]`."""

        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if any(captured is self for captured in _CAPTURING.get()):
                self.read[key] = read(output)

        return keep


# A layer is shared by all who call its model, so every capture sees every pass. Which are its own, the context says:
# that of the thread, or of the asyncio task.
_CAPTURING: ContextVar[tuple[CapturedFeatures, ...]] = ContextVar("capturing", default=())


class _Uncompiled:
    """While any capture is open, what torch.compile made runs uncompiled: a compiled program calls no new hook.

    The stance is the process's, so it is counted: the first one in sets it, the last one out restores it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.stance: Any = None

    def enter(self) -> None:
        """One more; under the lock, to be held by the caller."""
        self.count += 1
        if self.stance is None and "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it is slow
            self.stance = torch.compiler.set_stance("force_eager")
            self.stance.__enter__()

    def leave(self) -> None:
        """One less; under the lock, to be held by the caller."""
        self.count -= 1
        if not self.count and self.stance is not None:
            stance, self.stance = self.stance, None
            stance.__exit__(None, None, None)


_UNCOMPILED = _Uncompiled()


@contextmanager
def capture_features(
    head: nn.Module | None,
    *,
    all_uncompiled: bool = True,
    others: Mapping[Hashable, tuple[nn.Module, Callable[[Any], Tensor]]] = MappingProxyType({}),
) -> Iterator[CapturedFeatures]:
    """While this context is open, `.features` of what it yields is the input of the head's last forward pass.

    A forward hook, removed at the end: nothing is computed twice, and the model is not changed. For scoring and
    evaluation; the training losses need no features. Of an `L2NormLinear`, the features before normalisation.

    Safe in any number of threads and asyncio tasks that share the model: each sees the passes that it made itself, not
    those of threads that it starts (several devices of `DataParallel`: capture in the model inside it). Compiled models
    run uncompiled meanwhile, in all threads.

    Args:
        all_uncompiled: False where nothing compiled runs the head: compiled programs then stay compiled.
        others: key -> (layer, read): `.read[key]` is read(output) of the last run of a layer, taken while it runs.
    """
    captured = CapturedFeatures()
    with _UNCOMPILED.lock:  # handles take their numbers from a counter that all threads share
        if all_uncompiled:
            _UNCOMPILED.enter()
        handles = [] if head is None else [head.register_forward_hook(captured.keep, with_kwargs=True)]
        for key, (layer, read) in others.items():  # under its own name: what a layer gives before hooks change that
            handles.append(layer.register_forward_hook(captured.keeping(key, read), prepend=key is layer))
    _CAPTURING.set((*_CAPTURING.get(), captured))
    try:
        yield captured
    finally:
        _CAPTURING.set(tuple(other for other in _CAPTURING.get() if other is not captured))
        with _UNCOMPILED.lock:
            for handle in handles:
                handle.remove()
            if all_uncompiled:
                _UNCOMPILED.leave()
