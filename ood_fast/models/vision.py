"""torchvision's models, and their forms for images of about 32×32, whose stems would throw most of the image away.

What changes for small images:

- ResNet: a 3×3 convolution with stride 1 in place of the 7×7 with stride 2, and no max-pooling behind it (He et al.,
  section 4.2). DenseNet: the same.
- VGG16: with batch normalisation, global average pooling and one linear layer in place of three.
- ViT: patches of 4×4. Swin: patches of 2×2, windows of 4×4.
- ConvNeXt: first kernel 4 → 3, its stride 4 → 2, all 7×7 kernels 3×3 (Haas et al., TMLR 2024, appendix A.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import util
from typing import Any

from torch import nn

from .. import checks

AUXILIARY = ("googlenet", "inception_v3")  # with further heads for training, which are left out
Build = Callable[[int, int, "int | None"], nn.Module]


def _models() -> Any:
    return checks.optional_import("this model", "torchvision").models


def _colour_only(in_channels: int) -> None:
    if in_channels != 3:
        raise checks.UserError(f"in_channels: got {in_channels}, expected 3, which torchvision's models take")


def large(name: str, n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """torchvision's model of that name as it is."""
    _colour_only(in_channels)
    extra = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    model: nn.Module = _models().get_model(name, weights=None, num_classes=n_classes, **extra)
    return model


def _shrunk(name: str, shrink: Callable[[nn.Module], None], *asked: Any) -> nn.Module:
    model = large(name, *asked)
    shrink(model)
    return model


def both(name: str, shrink: Callable[[nn.Module], None]) -> tuple[Build, Build]:
    """torchvision's model as it is, and the same with `shrink` applied."""
    return functools.partial(large, name), functools.partial(_shrunk, name, shrink)


@functools.cache
def names() -> frozenset[str]:
    """torchvision's classifiers; empty without it."""
    return frozenset(_models().list_models(module=_models())) if util.find_spec("torchvision") else frozenset()


def weights_of(name: str) -> Any:
    """torchvision's description of the weights of a model: `IMAGENET1K_V1`, or its default where there is none."""
    weights = _models().get_model_weights(name)
    return getattr(weights, "IMAGENET1K_V1", weights.DEFAULT)


def with_weights(model: nn.Module, name: str) -> nn.Module:
    """`weights_of(name)`, from torch.hub's cache or downloaded into it."""
    import torch

    weights = weights_of(name)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise checks.UserError(
            f"pretrained: cannot get the weights ({error}); put {weights.url} into {folder}/ yourself"
        ) from error
    if name in AUXILIARY:  # heads that the model does without when it is evaluated
        state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
        vars(model)["transform_input"] = True  # as torchvision does with these weights
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # a ViT for another image size
        raise checks.UserError(f"pretrained: the weights do not fit: {error}") from error
    return model


def small_resnet(model: nn.Module) -> None:
    """A stem for small images, in place."""
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as its other convolutions
    model.maxpool = nn.Identity()


def resnet18_32x32(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """OpenOOD's ResNet18_32x32: torchvision's layers and names (`downsample` where OpenOOD says `shortcut`), and
    PyTorch's own initialisation of convolutions.
    """
    model = large("resnet18", n_classes, 3, image_size)
    model.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return model


def small_densenet(model: Any) -> None:
    """A stem for small images, in place."""
    model.features.conv0 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()


def small_vgg16(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """VGG16 with batch normalisation and one linear layer."""
    model = large("vgg16_bn", n_classes, in_channels, image_size)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, n_classes)
    return model


def vit_b_16(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """torchvision's ViT-B/16 for a size of images."""
    _colour_only(in_channels)
    model: nn.Module = _models().vit_b_16(weights=None, num_classes=n_classes, image_size=image_size or 224)
    return model


def small_vit(n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """ViT with patches of 4×4."""
    _colour_only(in_channels)
    base = {"num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072, "num_classes": n_classes}
    model: nn.Module = _models().VisionTransformer(image_size=image_size or 32, patch_size=4, **base)
    return model


def small_swin(name: str, n_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """Swin with patches of 2×2 and windows of 4×4."""
    _colour_only(in_channels)
    swin = _models().swin_transformer
    tiny: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
    tiny |= {"patch_size": [2, 2], "window_size": [4, 4], "stochastic_depth_prob": 0.2}
    if name == "swin_v2_t":
        tiny |= {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    model: nn.Module = swin.SwinTransformer(num_classes=n_classes, **tiny)
    return model


def small_convnext(model: nn.Module) -> None:
    """Smaller kernels and strides, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size in ((4, 4), (7, 7)):
                setattr(module, name, _three_by_three(child))


def _three_by_three(conv: nn.Conv2d) -> nn.Conv2d:
    stride = 2 if conv.kernel_size == (4, 4) else 1
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=stride, padding=1, groups=conv.groups)
    nn.init.trunc_normal_(new.weight, std=0.02)  # as torchvision initialises its ConvNeXt
    nn.init.zeros_(new.get_parameter("bias"))
    return new
