"""A classifier and a fitted detector as one module, for servers, `torch.export` and ONNX.

    deployed = ood_fast.deploy(model, detector)
    logits, score, is_ood = deployed(x)

    program = torch.export.export(deployed, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=1024)},))
    torch.onnx.export(deployed, (x,), "model.onnx", dynamo=True, dynamic_shapes=({0: "batch"},),
                      input_names=["x"], output_names=["logits", "score", "is_ood"])

What is exported runs without this package. Of a `DetectorSet`, score and is_ood have a column for each
of its detectors. `ood_fast.onnx_export` puts the normalisation of images inside too.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .detectors import Detector, DetectorSet, threshold
from .eager.precision import is_exporting
from .heads import capture_features, given_head, refuse_script, unwrapped
from .models.inputs import warn_of_batches, warn_other_range
from .models.outputs import check_head, check_width, logits_of
from .models.running import refuse_meta, run_model
from .models.weights import Watched, refuse_other, refuse_other_head
from .ops.registration import is_compiled


def deploy(model: nn.Module, detector: Detector | DetectorSet, head: str | nn.Linear | None = None) -> Deployed:
    """One module in eval mode: x -> (logits (n, c), score (n,), is_ood (n,) bool); it needs neither model nor detector.

    The model is copied, so that training it further changes nothing here, and its parameters take no gradient. The
    buffers of the detector, which may be large, are shared until one of the two is moved; its head is the copy's. A new
    fit or threshold of the detector changes nothing here. Nothing is moved.

    An exported or compiled program rounds otherwise in the last digits, so an input whose score is the threshold itself
    may be judged otherwise there.

    Args:
        model: a classifier; what it returns is read as in `Detector.fit`.
        detector: fitted, with a threshold: call its `calibrate` first. Not one that needs passes of its own through the
            model (ODIN), which no exported program could make. Of a set of k, score and is_ood are (n, k).
        head: as in `Detector.fit`. A detector that reads nothing but logits looks for none.

    Raises:
        RuntimeError: the detector is not fitted or has no threshold.
        ValueError: it needs the model, is on another device, or was fitted on a model with other weights; the head
            cannot be told.
    """
    refuse_meta(model)
    checks.instance("detector", detector, (Detector, DetectorSet), "a Detector or a DetectorSet")
    refuse_script(model, "score with the detector itself")
    for single in _detectors(detector):
        _check(single)
        refuse_other(model, single.fitted_on, single.label, head)
    model = unwrapped(model)  # torch.compile and DistributedDataParallel can be neither exported nor copied
    warn_of_batches(model)
    path = None
    if any(single.needs_features for single in _detectors(detector)):
        layer = given_head(model, head)
        path = next(name for name, module in model.named_modules() if module is layer)
        path = ".".join(part for part in path.split(".") if part != "_orig_mod")
    parameter = next(model.parameters(), None)
    for name, buffer in detector.named_buffers():
        if parameter is not None:
            checks.same_device(f"detector: {name}", buffer, "the model", parameter)
    shared = {id(buffer): buffer for buffer in detector.buffers()}
    return Deployed(_copied(model), copy.deepcopy(detector, shared), path)


def _detectors(detector: Detector | DetectorSet) -> list[Detector]:
    return list(detector.detectors) if isinstance(detector, DetectorSet) else [detector]


def _check(detector: Detector) -> None:
    """RuntimeError, or ValueError, unless it can be deployed."""
    if detector.needs_model:
        raise ValueError(
            f"detector: {detector.label} passes inputs of its own through the model, expected one that scores features "
            "and logits"
        )
    detector.require_fitted()
    if detector.threshold is None:
        raise RuntimeError(f"{detector.label} has no threshold: call calibrate(scores of in-distribution data) first")
    threshold.check(detector.threshold)


def _copied(model: nn.Module) -> nn.Module:
    """A copy without what torch.compile put around parts; ValueError for one whose parameters are sharded."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"model: {name} is sharded over processes, expected a whole model: load its full state_dict "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict) into a plain one"
            )
    # The weights that old-style weight_norm and spectral_norm left in the last pass are part of its graph.
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with torch.no_grad():  # what torch.jit has made copies its parameters as part of a graph
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"model: a {type(model).__name__} that cannot be copied ({error})") from error
    originals = {id(module) for module in model.modules()}
    for module in list(copied.modules()):
        own: Any = vars(module).get("forward")  # `model.forward = torch.compile(model.forward)` still runs the original
        if is_compiled(own) and getattr(inspect.unwrap(own), "__func__", None) is type(module).forward:
            del module.forward
        elif _reaches(own, originals):
            raise ValueError(
                f"model: {type(module).__name__}.forward was replaced by a function that runs the model itself, which "
                "a copy would go on running; undo what replaced it (accelerate: accelerator.unwrap_model(model, "
                "keep_fp32_wrapper=False)), or give the class another forward"
            )
        for name, child in list(module.named_children()):
            if unwrapped(child) is not child:
                setattr(module, name, unwrapped(child))
    return copied


def _reaches(called: object, modules: set[int], depth: int = 4) -> bool:
    """Whether a callable holds one of these modules, by their id, or is made of one that does."""
    if id(called) in modules:
        return True
    if depth == 0 or called is None or isinstance(called, nn.Module):
        return False
    held = [getattr(called, name, None) for name in ("__self__", "__wrapped__", "func", "_torchdynamo_orig_callable")]
    for cell in getattr(called, "__closure__", None) or ():
        with suppress(ValueError):  # empty
            held.append(cell.cell_contents)
    held += [*(getattr(called, "__defaults__", None) or ()), *getattr(called, "__dict__", {}).values()]
    return any(_reaches(value, modules, depth - 1) for value in held)


class Deployed(nn.Module):
    """What `deploy` makes. Always in eval mode.

    Weights that are loaded into it or changed in place later are refused as those of another model are; hooks, settings
    and modules inside that are exchanged, and what is written through `.data`, nobody notices.
    """

    def __init__(self, model: nn.Module, detector: Detector | DetectorSet, head: str | None) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.detector = detector
        self.eval()
        self._seen: _Seen | None = None
        self._checked = False
        self._watched, self._state = Watched(model), tuple[list[Any], ...]()
        self.head = head
        if head is not None:
            self._seen = _Seen()
            self.model.get_submodule(head).register_forward_pre_hook(self._seen, with_kwargs=True)
        self._share()

    def _share(self) -> None:
        """Let the head of the detector be that of the model: of 1,000,000 classes gigabytes, once, in files too."""
        for module in self.detector.modules():
            kept: Any = getattr(module, "head_weight", None)
            if kept is None or kept.is_meta:
                continue
            about = (kept.shape, kept.dtype, kept.device)
            alike = (each for each in self.model.parameters() if (each.shape, each.dtype, each.device) == about)
            if (weight := next((each for each in alike if torch.equal(each, kept)), None)) is not None:
                module.register_buffer("head_weight", weight)

    def _apply(self, *args: Any, **keywords: Any) -> Deployed:
        super()._apply(*args, **keywords)  # type: ignore[no-untyped-call]  # torch's
        self._share()
        return self

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, score, is_ood) of a batch of inputs, or of a mapping of the model's keyword arguments."""
        eager = not (torch.compiler.is_compiling() or is_exporting())
        if eager:
            self._as_deployed()
        checking = eager and not self._checked  # the first batch
        layer: Any = self.model.get_submodule(self.head) if checking and self.head is not None else None
        layer = layer if isinstance(layer, nn.Linear) else None  # quantized since, it cannot be read
        watching: Any = nullcontext() if layer is None else capture_features(layer)
        with watching as captured:
            logits = logits_of(self.model(**x) if isinstance(x, Mapping) else self.model(x))
        features = None
        if self._seen is not None and self.head is not None:
            head: Any = self.model
            for name in filter(None, self.head.split(".")):  # get_submodule cannot be traced by torch 2.9
                head = getattr(head, name)
            check_width(head, logits)
            features = self._seen.take()
        if checking and len(logits):
            if layer is not None:
                check_head(layer, captured, logits)
            elif self.head is None:  # a pass that looks whether these are logits, and which layer made them
                layer = next(run_model(self.model, [x], None, find_maker=True)).maker
            for detector in _detectors(self.detector):
                warn_other_range(x, detector.input_range, detector.label)
                refuse_other_head(layer, detector.fitted_on, detector.label)
            self._checked = True
        found = self.detector.score_features(features, logits)
        scores: list[Tensor] = list(found.values()) if isinstance(found, dict) else [found]
        if is_exporting():  # onnxruntime's max pooling drops NaN
            given = x.values() if isinstance(x, Mapping) else (x,)
            for rows in (each.flatten(1) for each in given if each.is_floating_point() and each.dim() > 1):
                scores = [score.masked_fill(rows.isnan().any(dim=1), torch.nan) for score in scores]
        flagged = [each.is_ood(score) for each, score in zip(_detectors(self.detector), scores, strict=True)]
        if isinstance(found, dict):
            wide = functools.reduce(torch.promote_types, (score.dtype for score in scores))  # ONNX stacks one dtype
            return logits, torch.stack([score.to(wide) for score in scores], 1), torch.stack(flagged, 1)
        return logits, scores[0], flagged[0]

    def _as_deployed(self) -> None:
        """Eval mode, whoever switched it; ValueError for other weights than those of the fit."""
        if self._watched.state() != self._state:
            self.model.eval()
            for detector in _detectors(self.detector):
                refuse_other(self.model, detector.fitted_on, detector.label, self.head)
            self._state = self._watched.state()

    @property
    def thresholds(self) -> Tensor:
        """The threshold, a scalar; of a set of k, those of its detectors, (k,)."""
        found: list[Any] = [detector.threshold for detector in _detectors(self.detector)]
        found = [each.reshape(()) for each in found]  # by hand it may be one number in a row
        thresholds: Tensor = torch.stack(found) if isinstance(self.detector, DetectorSet) else found[0]
        return thresholds

    def train(self, mode: bool = True) -> Deployed:
        """Stays in eval mode: scores hold for that."""
        return super().train(False)


class _Seen:
    """Forward pre-hook of the head: keeps what entered it until it is taken.

    A hook and not another module in its place, so that the model keeps its names; an object and not a function, so that
    a copy of the module gets a store of its own.
    """

    def __init__(self) -> None:
        self.features: dict[int, Tensor] = {}  # by thread: servers call one module from several

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        # What quantizes a layer hands the hook on without keywords.
        (self.features[self._place()],) = (*args, *kwargs.values())

    def take(self) -> Tensor:
        features = self.features.pop(self._place(), None)
        if features is None:
            raise RuntimeError(
                "model: its head did not run as a module; pass head=..., the nn.Linear that makes the logits"
            )
        return features

    @staticmethod
    def _place() -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()
