"""The head of a classifier, the linear layer that makes the logits: find it, see what enters it, normalise before it.

Scoring needs the features, which most models do not return:

    head = find_head(model)  # an nn.Linear
    with capture_features(head) as captured:
        logits = model(x)
    captured.features  # (n, m), so that logits = head(captured.features)
"""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .capturing import capture_features as capture_features
from .functional import l2_normalize
from .ops.registration import COMPILED_CALL, is_compiled

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
    refuse_script(model)
    if name is not None:
        return _head_by_name(model, name, "name")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(
            f"model: {type(model).__name__} has no nn.Linear, expected a classifier that ends in one. With logits made "
            f"otherwise{_other_head(model)}, take features (n, m) and logits (n, c) from the model yourself and "
            "call fit_features(features, logits, targets, head=(W, b)) and score_features(features, logits) of the "
            "detector; one that reads nothing but logits needs no head"
        )
    head = _search(model)
    if head is None:
        candidates = ", ".join(f"{path} ({at.in_features} → {at.out_features})" for path, at in linears.items())
        raise ValueError(
            f"model: cannot tell which layer of {type(model).__name__} makes the logits; pass its name "
            f"(a detector takes it as head=...{_merge(model)}). Linear layers: {candidates}"
        )
    return head


def _merge(model: nn.Module) -> str:
    """The cure where PEFT has put an adapter around a linear layer."""
    linear = (isinstance(getattr(module, "base_layer", None), nn.Linear) for module in model.modules())
    return "; merge the adapter first: model.merge_and_unload()" if any(linear) else ""


def last_linear(model: nn.Module) -> nn.Linear | None:
    """As `find_head`; None where there is none, it cannot be told, or the compiler may run it."""
    try:
        head = find_head(model)
    except ValueError:
        return None
    return None if is_compiled(model) or may_run_compiled(modules_around(model, head)) else head


def given_head(model: nn.Module, head: str | nn.Linear | None) -> nn.Linear:
    """The head that an argument `head` means: a layer of `model`, by its name or itself; None: `find_head(model)`."""
    if head is None:
        return find_head(model)
    refuse_script(model)
    if isinstance(head, str):
        return _head_by_name(model, head, "head")
    checks.instance("head", head, nn.Linear, "the name of a layer or an nn.Linear")
    if all(module is not head for module in model.modules()):
        raise ValueError(f"head: the nn.Linear given is no layer of {type(model).__name__}")
    return head


def refuse_script(model: nn.Module, or_else: str = "") -> None:
    """ValueError for what torch.jit made."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: got a ScriptModule, whose layers cannot be watched; pass the module that it was made from, or "
            + (or_else or "take features and logits yourself and call fit_features and score_features of the detector")
        )


# What DistributedDataParallel, torch.compile and PEFT put before the names of the model that they wrap.
_WRAPPERS = [
    outer + inner
    for inner in ("", "base_model.model.")
    for outer in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in dict(model.named_children()):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _active(layer: nn.Module) -> nn.Module:
    """The copy of a layer that PEFT trains and runs (`modules_to_save`); any other layer itself."""
    saved = getattr(layer, "modules_to_save", None)
    if not isinstance(saved, nn.ModuleDict) or not hasattr(layer, "original_module"):
        return layer
    adapter: Any = layer
    active = [name for name in adapter.active_adapters if name in saved]
    chosen: nn.Module = saved[active[0]] if active and not adapter.disable_adapters else adapter.original_module
    return chosen


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
        for inner in (unwrapped(path[-1]), _active(unwrapped(path[-1]))):
            if inner is not path[-1]:
                path.append(inner)
        return path[::-1]
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    what = f"layer of {type(model).__name__}"
    if len(linear) > checks.SHORT_LIST and (head := _search(model)) is not None:
        place = next(path for path, layer in model.named_modules() if layer is head)
        raise ValueError(f"{argument}: unknown {what} {name!r}; its head is {place!r}")
    raise ValueError(f"{argument}: {checks.unknown(what, name, linear)}")


def _head_by_name(model: nn.Module, name: str, argument: str) -> nn.Linear:
    head = path_to_layer(model, name, argument)[0]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{argument}: {name!r} is a {type(head).__name__}, expected an nn.Linear{_merge(head)}")
    return head


def _search(module: nn.Module) -> nn.Linear | None:
    """The head inside `module`, which holds at least one linear layer; None where that is anyone's guess."""
    module = _active(module)
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


def is_pointwise(layer: nn.Module, weight: Tensor) -> bool:
    """Whether a convolution is a linear layer at every place: weight (c, m, 1, ...), all channels in one group."""
    return weight.dim() > 2 and weight.shape[2:].numel() == 1 and getattr(layer, "groups", 1) == 1


def _other_head(model: nn.Module) -> str:
    """What may make the logits of a model without linear layers, for a message."""
    layers = [(path, module) for path, module in model.named_modules() if hasattr(module, "weight")]
    if quantized := [path for path, module in layers if type(module).__module__.startswith("torch.ao.nn.quantized")]:
        return f" (its last quantized layer is {quantized[-1]}: leave the head out when you quantize the model)"
    convolutions = [(path, module) for path, module in layers if isinstance(module, nn.Conv2d)]
    if not convolutions:
        return ""
    path, last = convolutions[-1]
    return f" (the last convolution is {path}, {last.in_channels} → {last.out_channels})"


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(submodule, nn.Linear) for submodule in module.modules())


def modules_around(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """`model`, the modules between it and the head, and the head."""
    paths = [path.split(".") for path, module in model.named_modules(remove_duplicate=False) if module is head]
    around = {".".join(path[:depth]): None for path in paths for depth in range(len(path) + 1)}
    return [model.get_submodule(path) for path in around]


def may_run_compiled(around: list[nn.Module]) -> bool:
    """Whether what torch.compile made may run the head: a module around it, or a function that such a module holds.

    `around`: as `modules_around` has it; the first, the model, is called past its own `compile()`.
    """
    if any(is_compiled(module) for module in around[1:]):
        return True
    held = [names for module in around for names in (vars(module), *map(vars, type(module).__mro__))]
    return any(callable(v) and is_compiled(v) for names in held for key, v in names.items() if key != COMPILED_CALL)


def inference_head(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """(W, b) with which the layer makes its logits from z in evaluation: W/τ for an `L2NormLinear` with τ.

    A weight that `fully_shard` or tensor parallelism shards is gathered, by all its processes.
    """
    weight, bias = head.weight, head.bias
    check_whole(head)
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if hasattr(bias, "full_tensor") else bias
    tau = temperature_of_head(head, training=False)
    return (weight if tau is None else weight / tau), bias


def check_whole(head: Any) -> None:
    """ValueError for a weight that ZeRO-3 or FSDP has emptied or flattened: nothing can be read from it."""
    if head.weight.dim() < 2 or not head.weight.numel():
        raise ValueError(
            f"head: got a weight of shape {tuple(head.weight.shape)}, as DeepSpeed's ZeRO-3 and FSDP leave it between "
            "passes, expected (c, m); gather it around the call: `with deepspeed.zero.GatheredParameters(list("
            "head.parameters())):` or `with FSDP.summon_full_params(model):`, or use fully_shard"
        )


def temperature_of_head(head: nn.Module, training: bool) -> float | None:
    """τ that a head divides its features by, in training or in evaluation; None where it does not."""
    return head.tau if isinstance(head, L2NormLinear) and (training or head.scale_at_test) else None


def check_plain(layer: nn.Module) -> None:
    """ValueError for a layer with a forward of its own that is not F.linear(z, W, b) of its weight and bias: a cosine
    head, a temperature, LoRA by hand. It is tried on two rows, in eval mode: dropout may be part of it."""
    refuse_script(layer, "call ood_fast.elogitnorm(logits, None, W, b, y)")
    known = (nn.Linear.forward, L2NormLinear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    weight: Any = getattr(layer, "weight", None)
    if type(layer).forward in known or hasattr(layer, "base_layer") or type(weight) not in (Tensor, nn.Parameter):
        return
    if weight.dim() != 2 or not weight.numel() or weight.is_meta:
        return
    z = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    z = torch.stack([z, 3 * z + 1])
    others = {name for name, _ in layer.named_parameters() if not name.startswith("parametrizations.")}
    differs, mode = bool(others - {"weight", "bias"}), layer.training
    try:
        layer.training = False
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            expected = F.linear(z, weight, getattr(layer, "bias", None))
            got: Any = None if differs else layer.forward(z)
        differs = differs or not torch.allclose(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    except Exception:  # it takes something else
        differs = True
    finally:
        layer.training = mode
    if differs:
        raise ValueError(
            f"head: a {type(layer).__name__} makes its logits otherwise than F.linear(z, W, b) of its weight and bias, "
            "so that its weight does not tell the distances; call ood_fast.elogitnorm(logits, None, W, b, y) with the "
            "weight that it works with, or merge an adapter into it"
        )


def adapted_weight(layer: Any) -> Tensor:
    """The weight that a layer works with: with the adapters of PEFT (LoRA) that are active and not merged into it.

    Raises ValueError for an adapter that is no sum of weights (DoRA, IA³, prompts).
    """
    adapts = hasattr(layer, "base_layer")
    weight: Tensor = layer.get_base_layer().weight if adapts else layer.weight
    if not adapts or layer.merged or layer.disable_adapters:
        return weight
    active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
    others = {**getattr(layer, "use_dora", {}), **getattr(layer, "lora_variant", {})}
    if not hasattr(layer, "get_delta_weight") or not active or any(others.get(name) for name in active):
        raise ValueError(
            f"head: the weight of a {type(layer).__module__}.{type(layer).__name__} cannot be told, expected LoRA; "
            "merge the adapter (model.merge_and_unload()), or train a copy of the head (modules_to_save)"
        )
    return weight.add(sum(layer.get_delta_weight(name).to(weight.dtype) for name in active))


class Beside:
    """A layer or model that a criterion reads and does not hold: no submodule, neither moved nor saved with it.

    A copy (`copy.deepcopy`) reads the module that is copied in the same call. It holds that weakly: one that nothing
    else in the copy holds is gone, for nobody trains it, and asking for it raises RuntimeError.
    """

    def __init__(self, module: nn.Module) -> None:
        self._held: tuple[nn.Module] | weakref.ref[nn.Module] = (module,)

    def __call__(self) -> nn.Module:
        """The module."""
        module = self._held() if isinstance(self._held, weakref.ref) else self._held[0]
        if module is None:
            raise RuntimeError(
                "head: this copy of a criterion has none, as it was copied without the model; copy both in one call, "
                "copy.deepcopy((model, criterion)), or build a new criterion on the copied model"
            )
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Beside:
        twin = Beside(copy.deepcopy(self(), memo))
        twin._held = weakref.ref(twin())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return Beside, (self(),)


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
        return f"{super().extra_repr()}, tau={self.tau}, eps={self.eps}, scale_at_test={self.scale_at_test}"
