"""Detectors that pass inputs moved along their gradients through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..models.outputs import logits_of
from ..models.running import batches_of, evaluating, inputs_and_targets, joined, refuse_meta
from ..models.weights import refuse_other
from .detector import Detector
from .logit import confidence
from .numbers import at_least_float32, refuse_one_logit, refuse_rows, widened
from .registry import register


def input_gradient(model: nn.Module, x: Tensor, of_logits: Callable[[Tensor], Tensor], label: str) -> Tensor:
    """∂ of_logits(f(x)) / ∂x, none of it left in the model, whose mode the caller sees to; also in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(of_logits(at_least_float32(logits_of(model(x)))), x, allow_unused=True)
    if gradient is None:
        raise ValueError(f"model: no gradient reaches its inputs, along which {label} moves them (quantised layers?)")
    return gradient


def check_movable(x: Any, label: str, std: Sequence[float] | None = None) -> None:
    """TypeError for what is no batch of inputs in floating point; ValueError where `std` does not fit its channels."""
    checks.instance("x", x, Tensor, f"a tensor, one batch of inputs; {label} moves them along their gradient")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {x.dtype}, expected floating point: {label} moves inputs by their gradient")
    if std is not None and (x.dim() < 2 or x.shape[1] != len(std)):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (n, {len(std)}, ...), a channel for each std")


def check_std(std: Sequence[float] | None) -> tuple[float, ...] | None:
    """The setting `std` of `by_std`."""
    for value in std or ():
        checks.real("std", value, 0.0, open_low=True)
    return None if std is None else tuple(std)


def by_std(step: Tensor, std: tuple[float, ...] | None) -> Tensor:
    """step / std, of inputs (n, channels, ...) that were divided by `std`, one number a channel; None: by 1."""
    return step if std is None else step / step.new_tensor(std).view(1, -1, *[1] * (step.dim() - 2))


def on_images(detector: Detector, std: Iterable[float] | None) -> Detector:
    """`detector` for images whose channels were divided by `std`: one that moves inputs, was given no std of its own
    and is not fitted takes it, as in OpenOOD; any other stays."""
    takes = detector.moves_inputs and detector.std is None and not (detector.needs_fit and detector.fitted)
    return detector.changed(std=tuple(map(float, std))) if takes and std is not None else detector


@register
class ODIN(Detector):
    """Maximum softmax probability at temperature T of an input moved to where the prediction is more certain:

        max_j softmax(f(x̂) / T)_j,    x̂ = x − ε · sign(∂L/∂x) / std,    L = −log softmax(f(x) / T)_p,  p = argmax_j f_j

    Two forward passes and one backward pass of the model, in eval mode; no gradients are left in its parameters. Scores
    are float64 where the device has it.

    Liang, Li and Srikant, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks",
    ICLR 2018, arXiv:1706.02690.

    Args:
        temperature: T > 0.
        eps: ε >= 0, in the unit of inputs before they were divided by `std`.
        std: what the channels of x were divided by in preprocessing, one number each, for x (n, channels, ...); None:
            1. OpenOOD always takes the data set's.
        sign_of_zero: how sign(0) counts: 0, or 1 as OpenOOD has it.
    """

    needs_logits = True
    needs_model = True
    moves_inputs = True
    grid = {"temperature": (1, 10, 100, 1000), "eps": (0.0014, 0.0028)}

    def __init__(
        self,
        temperature: float = 1000.0,
        eps: float = 0.0014,
        std: Sequence[float] | None = None,
        sign_of_zero: int = 0,
    ) -> None:
        super().__init__()
        checks.real("temperature", temperature, 0.0, open_low=True)
        checks.real("eps", eps, 0.0)
        checks.one_of("sign_of_zero", sign_of_zero, (0, 1))
        self.temperature, self.eps, self.sign_of_zero, self.std = temperature, eps, sign_of_zero, check_std(std)

    def score(self, model: nn.Module, x: Any, head: str | nn.Linear | None = None) -> Tensor:
        """Scores of a batch of inputs x (n, ...), floating point, or of a loader of them; `head` is not needed.

        Works inside `torch.no_grad` and `torch.inference_mode`.
        """
        refuse_meta(model)
        refuse_other(model, self.fitted_on, self.label, head)
        if not isinstance(x, (Tensor, Mapping)):
            parts: list[Tensor] = []
            for batch in batches_of(x):
                with checks.behind(sum(map(len, parts))):
                    parts.append(self.score(model, inputs_and_targets(batch)[0]))
            return joined(parts)
        check_movable(x, self.label, self.std)
        parameter = next(model.parameters(), None)
        given: Any = x
        x = given.detach() if parameter is None else given.detach().to(parameter.device)
        with torch.inference_mode(False), evaluating(model):
            step = self._direction(model, x)
            with torch.no_grad():
                logits = widened(logits_of(model(x - self.eps * step)))
            refuse_one_logit(logits)
            scores = confidence(logits, self.temperature)
        refuse_rows("logits", logits, scores)
        return scores

    def _loss(self, logits: Tensor) -> Tensor:
        """Σ L T: the sign is that of L, and in half precision a gradient divided by T would be 0."""
        loss = F.cross_entropy(logits / self.temperature, logits.max(dim=1).indices, reduction="sum")
        return loss * self.temperature

    def _direction(self, model: nn.Module, x: Tensor) -> Tensor:
        """sign(∂L/∂x) / std."""
        gradient = input_gradient(model, x, self._loss, self.label)
        sign = gradient.sign()
        if self.sign_of_zero:
            sign = sign.masked_fill(sign == 0, 1.0)
        return self._masked(by_std(sign, self.std), gradient)

    def _masked(self, step: Tensor, gradient: Tensor) -> Tensor:
        """The step of the numbers of x that are moved, 0 of the others."""
        return step

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """RuntimeError: the score is a function of the inputs and the model, not of features."""
        raise RuntimeError(f"{self.label} scores inputs, not features or logits: call score(model, x)")


@register
class IODIN(ODIN):
    """ODIN that moves the one number of each input whose gradient is largest: x̂ = x − ε · M · sign(∂L/∂x) / std with
    M = 1 at argmax |∂L/∂x|, the first of equals, and 0 elsewhere.

    Regmi, "Going Beyond Conventional OOD Detection", 2025, arXiv:2411.10794. Keywords and passes as of `ODIN`.
    """

    label = "iODIN"

    def _masked(self, step: Tensor, gradient: Tensor) -> Tensor:
        largest = gradient.abs().flatten(1).max(dim=1, keepdim=True).indices
        mask = torch.zeros_like(gradient).flatten(1).scatter_(1, largest, 1.0)
        return step * mask.view_as(step)
