"""Classifiers by name, their options, and their checkpoints.

    model = models.create("resnet18_32x32", 10, head=L2NormLinear)
    models.load_checkpoint(model, "best.ckpt")

Every model ends in one linear layer, its head, which `heads.find_head` finds; what enters it are the features.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import checks
from ..heads import find_head
from ..registry import added
from . import hugging_face, vision
from .cct import CCT
from .checkpoints import load_checkpoint, openood_keys, save_checkpoint, torchvision_keys, weight_fingerprint
from .hugging_face import HF
from .preparation import own_preparation
from .small import SmallCNN

__all__ = ["CCT", "ModelOptions", "SmallCNN", "create", "known", "load_checkpoint", "n_published", "openood_keys"]
__all__ += ["own_preparation", "save_checkpoint", "torchvision_keys", "weight_fingerprint"]

ACTIVATIONS = ("relu", "leaky_relu")
TIMM = "timm:"


@dataclass(frozen=True)
class ModelOptions:
    """What a model is besides its name, its classes, its head and its weights.

    Attributes:
        small_images: the form for images of about 32×32 (see `vision.py` for what changes). `resnet18_32x32` and
            `cct_7_3x1` have no other, `small_cnn` no second.
        spectral_norm: divide the weight of each convolution by its largest singular value, as
            `torch.nn.utils.parametrizations.spectral_norm`: the weight as a matrix (channels out, all others).
        activation: "relu", or "leaky_relu" (slope 0.01) in place of every ReLU.
        in_channels: 1 for grey images; torchvision's models take 3.
        image_size: height and width, for transformers that must know; default 224, or 32 for small images.
    """

    small_images: bool = False
    spectral_norm: bool = False
    activation: str = "relu"
    in_channels: int = 3
    image_size: int | None = None

    def __post_init__(self) -> None:
        checks.one_of("activation", self.activation, ACTIVATIONS)


@dataclass(frozen=True)
class _Model:
    """`build(n_classes, in_channels, image_size)` and, for small images, `build_small` with the same arguments.

    relu: every activation is an `nn.ReLU` module, so that it can be exchanged. convolutional: spectral normalisation
    means something.
    """

    build: Callable[[int, int, int | None], nn.Module] | None
    build_small: Callable[[int, int, int | None], nn.Module] | None = None
    relu: bool = False
    convolutional: bool = False


def _small_cnn(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    return SmallCNN(n_classes, in_channels=in_channels)


_CNN: dict[str, Any] = {"relu": True, "convolutional": True}
MODELS = {
    "small_cnn": _Model(_small_cnn, _small_cnn, **_CNN),
    "resnet18_32x32": _Model(None, vision.resnet18_32x32, **_CNN),
    "cct_7_3x1": _Model(None, lambda n_classes, in_channels, size: CCT(n_classes, in_channels, size or 32)),
    "resnet18": _Model(*vision.both("resnet18", vision.small_resnet), **_CNN),
    "resnet50": _Model(*vision.both("resnet50", vision.small_resnet), **_CNN),
    "vgg16": _Model(partial(vision.large, "vgg16"), vision.small_vgg16, **_CNN),
    "densenet121": _Model(*vision.both("densenet121", vision.small_densenet), convolutional=True),
    "vit_b_16": _Model(vision.vit_b_16, vision.small_vit),
    "swin_t": _Model(partial(vision.large, "swin_t"), partial(vision.small_swin, "swin_t")),
    "swin_v2_t": _Model(partial(vision.large, "swin_v2_t"), partial(vision.small_swin, "swin_v2_t")),
    "convnext_tiny": _Model(*vision.both("convnext_tiny", vision.small_convnext), convolutional=True),
}


def known() -> list[str]:
    """The names that `create` takes, besides "timm:NAME", "hf:NAME" and torchvision's others."""
    return sorted({**MODELS, **added("model")})


def _kind(name: str) -> _Model | None:
    own = added("model").get(name)
    return _Model(own, own, relu=True, convolutional=True) if own else MODELS.get(name)


def create(
    name: str,
    n_classes: int | None,
    *,
    head: Callable[[int, int], nn.Linear] = nn.Linear,
    pretrained: bool | str | Path = False,
    **options: Any,
) -> nn.Module:
    """An untrained (or pretrained) classifier.

    The weights come from torch's global generator. For a given state of it they do not depend on `head`: the heads take
    over the weights of the model's own, so that losses can be compared from the same start.

    Args:
        name: one of `known()`, another of torchvision's classifiers, "timm:NAME" if timm is installed, or with
            transformers "hf:FOLDER" or "hf:NAME", of a folder that `save_pretrained` wrote or of the hub.
        n_classes: None, with `pretrained=True`: those of the weights.
        head: makes the last layer from (m, n_classes): `nn.Linear`, `L2NormLinear`, `partial(L2NormLinear, tau=0.1)`.
        pretrained: True: torchvision's weights `IMAGENET1K_V1` (timm's default, those of the folder), from the cache of
            each or downloaded; a path: that checkpoint. With other than their classes the head is new.
        options: the keywords of `ModelOptions`.

    Raises:
        UserError: an unknown name; an option that the model does not have; torchvision or timm is not installed.
    """
    given = ModelOptions(**options)
    if n_classes is None and pretrained is True:
        n_classes = n_published(name)
    if isinstance(n_classes, bool) or not isinstance(n_classes, int) or n_classes < 1:
        raise ValueError(f"n_classes: got {n_classes!r}, expected a whole number of at least 1")
    if name.startswith(TIMM):
        model, kind = _timm(name.removeprefix(TIMM), n_classes, pretrained is True, given), None
    elif name.startswith(HF):
        _check_option("small_images", name, not given.small_images, "of this package")
        model, kind = hugging_face.create(name.removeprefix(HF), n_classes, given.in_channels, pretrained is True), None
    elif (kind := _kind(name)) or name in vision.names():
        model = _build(name, kind or _Model(partial(vision.large, name)), n_classes, pretrained is True, given)
    else:
        near = difflib.get_close_matches(name, vision.names(), n=1) if vision.names() else ["others with torchvision"]
        raise checks.UserError(checks.unknown("model", name, {*known(), *near, "timm:NAME", "hf:NAME"}))
    if given.activation == "leaky_relu":
        _check_option("activation", name, kind is None or kind.relu, "all of whose activations are ReLU modules")
        _exchange(model, nn.ReLU, lambda relu: nn.LeakyReLU(inplace=bool(relu.inplace)))
    if given.spectral_norm:
        _check_option("spectral_norm", name, kind is None or kind.convolutional, "made of convolutions")
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d):
                nn.utils.parametrizations.spectral_norm(module)
    _replace_head(model, n_classes, head, pretrained is not True or n_classes == n_published(name))
    if not isinstance(pretrained, bool):
        load_checkpoint(model, pretrained)
    return model


def _build(name: str, kind: _Model, n_classes: int, pretrained: bool, given: ModelOptions) -> nn.Module:
    build = kind.build_small if given.small_images or kind.build is None else kind.build
    if build is None:
        raise checks.UserError(f"small_images: {name} has no form for small images")
    if not pretrained:
        return build(n_classes, given.in_channels, given.image_size)
    checks.optional_import(f"pretrained {name}", "torchvision")
    if name not in vision.names() or build is not kind.build:
        raise checks.UserError(f"pretrained: there are no weights for {name}{' for small images' * given.small_images}")
    return vision.with_weights(build(1000, given.in_channels, given.image_size), name)


def n_published(name: str) -> int:
    """The classes of the weights that were published with a model."""
    if name.startswith(HF):
        return hugging_face.n_labels(name.removeprefix(HF))
    return _timm_config(name.removeprefix(TIMM)).num_classes if name.startswith(TIMM) else 1000


def _check_option(option: str, name: str, possible: bool, expected: str) -> None:
    if not possible:
        raise checks.UserError(f"{option}: not for {name}, only for models {expected}")


def _exchange(module: nn.Module, kind: type[nn.Module], other: Callable[[nn.Module], nn.Module]) -> None:
    """Put `other(child)` in the place of each child of that kind, however deep."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, other(child))
        else:
            _exchange(child, kind, other)


def _replace_head(model: nn.Module, n_classes: int, head: Callable[[int, int], nn.Linear], made_for_them: bool) -> None:
    """Make the last layer by `head`; it keeps the weights of the old one if that has as many classes."""
    try:
        old = find_head(model)
    except ValueError:
        if head is nn.Linear and made_for_them:  # two heads, or one that is a convolution: good for logits
            return
        raise
    if head is nn.Linear and old.out_features == n_classes:
        return
    new = head(old.in_features, n_classes)
    checks.instance("head", new, nn.Linear, "a function (n_features, n_classes) -> nn.Linear")
    if old.out_features == n_classes and new.state_dict().keys() == old.state_dict().keys():
        new.load_state_dict(old.state_dict())
    path = next(path for path, module in model.named_modules() if module is old)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _timm(name: str, n_classes: int, pretrained: bool, given: ModelOptions) -> nn.Module:
    config = _timm_config(name)
    import timm

    if given.small_images:
        raise checks.UserError(f"small_images: not for timm:{name}; timm has models for small images by other names")
    if pretrained and not config.has_weights:
        raise checks.UserError(f"pretrained: timm has no weights for {name}")
    try:
        return timm.create_model(name, num_classes=n_classes, in_chans=given.in_channels, pretrained=pretrained)
    except OSError as error:  # of the hub, which is not reached
        raise checks.UserError(
            f"pretrained: cannot get the weights of timm:{name} ({error}); load them into the cache where there is a "
            "network, or pass a file of them as the checkpoint"
        ) from error


def _timm_config(name: str) -> Any:
    """What timm says of a model and of its weights."""
    timm = checks.optional_import(f"model timm:{name}", "timm")
    if not timm.is_model(name):
        raise checks.UserError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() lists them")
    return timm.get_pretrained_cfg(name)
