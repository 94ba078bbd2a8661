"""Detector classes from outside of the package: what their authors need not think of, and what they are told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_own(cls: type) -> bool:
    """Whether a class is of somebody who uses the package."""
    return cls.__module__.split(".")[0] != __name__.split(".")[0]


def check_class(cls: Any, base: type) -> None:
    """TypeError for a class that leaves out a part of the contract of `base`, or names what it does not have."""

    def supplies(name: str) -> bool:
        return getattr(cls, name) is not getattr(base, name)

    for name, value in (("state", cls.state), ("optional_state", cls.optional_state)):
        if isinstance(value, str):
            raise TypeError(f"{cls.__name__}.{name}: got the string {value!r}, expected a tuple of names of buffers")
    if supplies("gathers") and not cls.state and not supplies("learners"):
        raise TypeError(f"{cls.__name__}: has gathers, but names no buffers in state, so that no fit would be made")
    if cls.state and not supplies("_finish") and not supplies("learners"):
        raise TypeError(f"{cls.__name__}: has no _finish, which fills {', '.join(cls.state)}")
    if unknown := [name for name in cls.grid if name not in cls.parameters_of()]:
        raise TypeError(f"{cls.__name__}.grid: {unknown[0]!r} is no parameter of __init__")


def check_finished(detector: Any) -> None:
    """TypeError where a fit left buffers of `state` unset."""
    if missing := [name for name in detector.state if getattr(detector, name) is None]:
        raise TypeError(f"{detector.label}: _finish left {', '.join(missing)} unset, which state names")


def in_dtype_of_state(detector: Any, rows: Tensor | None) -> Tensor | None:
    """Features or logits in the dtype of the first buffer, float32 or wider: they come in float32, in `evaluate` in
    float64, and under autocast in bfloat16."""
    kept = (detector._buffers.get(name) for name in (*detector.state, "head_weight"))  # noqa: SLF001
    like = next((buffer for buffer in kept if buffer is not None and buffer.is_floating_point()), None)
    return rows if rows is None or like is None else rows.to(torch.promote_types(like.dtype, torch.float32))


def check_shape(detector: Any, scores: object, rows: Any) -> None:
    """TypeError unless `_score` gave one number a row."""
    if torch.compiler.is_compiling():  # n is any number there
        return
    n_rows = len(rows)
    if not isinstance(scores, Tensor) or scores.shape != (n_rows,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{detector.label}: its score is of {got}, expected ({n_rows},), one number a row")
