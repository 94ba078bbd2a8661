"""The head of a classifier, the linear layer that makes the logits: find it, see what enters it, normalise before it.

Scoring needs the features, which most models do not return:

    head = find_head(model)  # an nn.Linear
    with capture_features(head) as captured:
        logits = model(x)
    captured.features  # (n, m), so that logits = head(captured.features)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .functional import l2_normalize

# What the classifiers of torchvision, timm, transformers and OpenOOD call their head, or the block that ends in it.
HEAD_NAMES = ("fc", "classifier", "head", "heads", "linear", "last_linear")


def find_head(model: nn.Module, name: str | None = None) -> nn.Linear:
    """The last linear layer of a classifier, whose output are the logits.

    By `name`, the dotted path as `model.get_submodule` takes it. Without one, from the outside in:

    1. a child named as in `HEAD_NAMES` (torchvision `fc`, `classifier.6`, `heads.head`; timm `head.fc`; ...);
    2. the last part of an `nn.Sequential` that holds a linear layer, or the only such part of any module (a wrapper);
    3. linear layers that the module itself registers last and that fit one behind the other (`fc1`, `fc2`, `fc3`).

    Raises:
        TypeError: `model` is no module.
        ValueError: no linear layer; more than one that could be the head, all of which are listed: pass `name`.
    """
    checks.instance("model", model, nn.Module, "an nn.Module")
    if name is not None:
        return _head_by_name(model, name, "name")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(
            f"model: {type(model).__name__} has no nn.Linear, expected a classifier that ends in one. With logits made "
            f"otherwise{_last_convolution(model)}, take features (n, m) and logits (n, c) from the model yourself and "
            "call fit_features(features, logits, targets, head=(W, b)) and score_features(features, logits) of the "
            "detector; one that reads nothing but logits needs no head"
        )
    head = _search(model)
    if head is None:
        candidates = ", ".join(
            f"{path} ({layer.in_features} → {layer.out_features})" for path, layer in linears.items()
        )
        raise ValueError(
            f"model: cannot tell which layer of {type(model).__name__} makes the logits; pass its name "
            f"(a detector takes it as head=...). Linear layers: {candidates}"
        )
    return head


def given_head(model: nn.Module, head: str | nn.Linear | None) -> nn.Linear:
    """The head that an argument `head` means: a layer of `model`, by its name or itself; None: `find_head(model)`."""
    if head is None:
        return find_head(model)
    if isinstance(head, str):
        return _head_by_name(model, head, "head")
    checks.instance("head", head, nn.Linear, "the name of a layer or an nn.Linear")
    if all(module is not head for module in model.modules()):
        raise ValueError(f"head: the nn.Linear given is no layer of {type(model).__name__}")
    return head


# What DistributedDataParallel and torch.compile put before the names of the model that they wrap.
_WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def path_to_layer(model: nn.Module, name: str, argument: str) -> list[nn.Module]:
    """The layer `name` and the modules around it from the inside out, `model` the last; looked for inside wrappers too.

    Raises ValueError, naming `argument`, where there is none; lists the linear layers.
    """
    for prefix in _WRAPPERS:
        path = [model]
        try:
            for part in f"{prefix}{name}".split("."):
                path.append(path[-1].get_submodule(part))
        except AttributeError:
            continue
        return path[::-1]
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    raise ValueError(f"{argument}: " + checks.unknown(f"layer of {type(model).__name__}", name, linear))


def _head_by_name(model: nn.Module, name: str, argument: str) -> nn.Linear:
    head = path_to_layer(model, name, argument)[0]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{argument}: {name!r} is a {type(head).__name__}, expected an nn.Linear")
    return head


def _search(module: nn.Module) -> nn.Linear | None:
    """The head inside `module`, which holds at least one linear layer; None where that is anyone's guess."""
    if isinstance(module, nn.Linear):
        return module
    parts = {name: child for name, child in module.named_children() if _holds_linear(child)}
    own = [child for child in parts.values() if isinstance(child, nn.Linear)]
    named = [parts[name] for name in HEAD_NAMES if name in parts]
    if len(named) == 1:
        head = _search(named[0])
        # A sibling of its kind with as many outputs is a second head, and the logits are made of both (distilled DeiT,
        # LeViT and RepViT average two): the name proves nothing.
        kin = [child for child in parts.values() if type(child) is type(named[0]) or child in own]
        rivals = [_search(child) for child in kin if child is not named[0] and type(child) is not nn.Sequential]
        return None if head and any(rival and rival.out_features == head.out_features for rival in rivals) else head
    if named:
        return None
    last = list(parts.values())[-1]
    if isinstance(module, nn.Sequential) or len(parts) == 1:
        return _search(last)
    chained = all(first.out_features == second.in_features for first, second in pairwise(own))
    return last if own and last is own[-1] and chained else None


def _last_convolution(model: nn.Module) -> str:
    convolutions = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        return ""
    path, last = convolutions[-1]
    return f" (the last convolution is {path}, {last.in_channels} → {last.out_channels})"


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(submodule, nn.Linear) for submodule in module.modules())


class CapturedFeatures:
    """What entered a head, see `capture_features`."""

    def __init__(self) -> None:
        self._features: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """z (n, m) of the last forward pass, still part of its autograd graph; RuntimeError before the first."""
        if self._features is None:
            raise RuntimeError("the head has not run: call the model inside capture_features(head)")
        return self._features


@contextmanager
def capture_features(head: nn.Module) -> Iterator[CapturedFeatures]:
    """While this context is open, `.features` of what it yields is the input of the head's last forward pass.

    A forward pre-hook, removed at the end: nothing is computed twice, and the model is not changed. For scoring and
    evaluation; the training losses need no features. Of an `L2NormLinear`, the features before normalisation.
    """
    captured = CapturedFeatures()

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        (captured._features,) = (*args, *kwargs.values())  # a linear layer takes one argument

    handle = head.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield captured
    finally:
        handle.remove()


def inference_head(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """(W, b) with which the layer makes its logits from z in evaluation: W/τ for an `L2NormLinear` with τ."""
    if isinstance(head, L2NormLinear) and head.tau is not None and head.scale_at_test:
        return head.weight / head.tau, head.bias
    return head.weight, head.bias


class L2NormLinear(nn.Linear):
    """A head that is trained on features of unit length, and sees them as they are at test time.

        tau=None:   training  f = W z / max(‖z‖₂, eps) + b             evaluation  f = W z + b
        tau=τ:      training  f = W z / (τ max(‖z‖₂, eps)) + b         evaluation  f = W z / τ + b

    The first is the L2 normalisation of Haas, Yolland and Rabus, "Exploring Simple, High Quality Out-of-Distribution
    Detection with L2 Normalization", TMLR 2024, arXiv 2306.04072; its score is ‖z‖₂. The second is T2FNorm, Regmi et
    al., CVPR 2024 Workshops, arXiv 2305.17797, τ = 0.1.

    Parameters and state_dict are those of `nn.Linear`, so that checkpoints of one load into the other.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        tau: T2FNorm's temperature, above 0, or None.
        eps: lower bound of the length that z is divided by, above 0.
        scale_at_test: False leaves /τ out in evaluation, as OpenOOD does with 1000 classes.

    Attributes:
        last_norm: ‖z‖₂ of the last forward pass, (n,), before normalisation and detached, in training and evaluation;
            higher = more in-distribution. None before the first.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        tau: float | None = None,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale_at_test: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if tau is not None:
            checks.real("tau", tau, 0.0, open_low=True)
        checks.real("eps", eps, 0.0, open_low=True)
        self.tau = tau
        self.eps = eps
        self.scale_at_test = scale_at_test
        self.last_norm: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Logits (n, c) of features z (n, m)."""
        unit, norms = l2_normalize(z, self.eps)
        self.last_norm = norms.detach()
        entering = unit if self.training else z
        if self.tau is not None and (self.training or self.scale_at_test):
            entering = entering / self.tau
        return F.linear(entering, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{super().extra_repr()}, tau={self.tau}, eps={self.eps}, scale_at_test={self.scale_at_test}"
