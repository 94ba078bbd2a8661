"""transformers' image classifiers, from a folder that `save_pretrained` wrote or by their name on the hub."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from typing import Any

import numpy as np
from torch import Tensor, nn

from .. import checks

HF = "hf:"
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers


class HuggingFaceClassifier(nn.Module):
    """x (n, channels, height, width) -> logits (n, c) by the `model` of transformers.

    Attributes:
        config: of the model; its `id2label` names the classes.
        preparation: how its processor prepares images, see `of_processor`; None without one.
    """

    def __init__(self, model: nn.Module, preparation: dict[str, Any] | None) -> None:
        super().__init__()
        self.model, self.preparation = model, preparation

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.model.config

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def create(name: str, n_classes: int | None, in_channels: int, pretrained: bool) -> nn.Module:
    """The classifier in the folder or of the name `name`, with its weights or, to load others, without.

    Code that a folder brings is not run. UserError where there is none, or its weights lack the head.
    """
    config, classes = _config(name), _transformers(name).AutoModelForImageClassification
    with _told(name):
        if getattr(config, "num_channels", in_channels) != in_channels:
            raise ValueError(f"images have {in_channels} channels, the model takes {config.num_channels}")
        if pretrained:
            given = {"output_loading_info": True, "trust_remote_code": False}
            model, told = classes.from_pretrained(name, config=config, **given)
            model = model.float()
            if missing := sorted(told["missing_keys"]):
                raise ValueError(f"the weights of an image classifier lack {', '.join(missing[:3])}")
        else:
            config.num_labels = config.num_labels if n_classes is None else n_classes
            model = classes.from_config(config, trust_remote_code=False).float()
    return HuggingFaceClassifier(model.eval() if pretrained else model, _preparation(name))


def n_labels(name: str) -> int:
    """How many classes the classifier of that name tells apart."""
    return int(_config(name).num_labels)


def _config(name: str) -> Any:
    with _told(name):
        return _transformers(name).AutoConfig.from_pretrained(name, trust_remote_code=False)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """The first line of what transformers says, as a UserError."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, checks.UserError):
            raise
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise checks.UserError(
            f"model {HF}{name}: {first}; expected a folder that save_pretrained wrote, or a name on the hub"
        ) from error


def _transformers(name: str) -> Any:
    return checks.optional_import(f"model {HF}{name}", "transformers")


def _preparation(name: str) -> dict[str, Any] | None:
    local = os.path.join(os.path.expanduser(name), "preprocessor_config.json")
    if os.path.isdir(os.path.expanduser(name)) and not os.path.isfile(local):
        return None
    try:
        processor = _transformers(name).AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
    try:
        told = of_processor(processor.to_dict(), name)
        different = _difference(processor, told)
    except (TypeError, KeyError, IndexError):  # settings of another kind
        different = math.inf
    if different > 0.02:  # of two ways to resize it is below 0.001
        raise checks.UserError(
            f"model {HF}{name}: its {type(processor).__name__} prepares images as no size, resize, mean, std and "
            "interpolation do; give the model as MODULE:CALLABLE, with what comes nearest, or that step inside"
        )
    return told


def _difference(processor: Any, told: dict[str, Any]) -> float:
    """How far what a processor makes of an image is from what `prepared_as` makes, in standard deviations."""
    if util.find_spec("torchvision") is None:  # there are no images without it
        return 0.0
    from PIL import Image

    from ..data.images import prepared_as

    y, x = np.mgrid[0:360, 0:480] / 360
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y - 4 * x), np.sin(5 * x) * y], 2)
    image = Image.fromarray((127.5 * (waves + 1)).astype(np.uint8))
    ours, theirs = prepared_as(told)(image), processor(image, return_tensors="pt")["pixel_values"][0]
    return float((ours - theirs).abs().mean() / theirs.std()) if ours.shape == theirs.shape else math.inf


def of_processor(settings: dict[str, Any], name: str = "") -> dict[str, Any]:
    """What the settings of an image processor do, as size, resize, mean, std, interpolation.

    `resize` is a length for the short side, or (height, width) where the whole image is brought to it. Pixels are in
    [0, 1] before mean and std, whatever the processor scales by. UserError for images that are not square.
    """
    resize, size = _resized(settings)
    if isinstance(size, (list, tuple)):
        if size[0] != size[1]:
            raise checks.UserError(f"model {HF}{name}: its processor makes images of {tuple(size)}, expected squares")
        size = size[0]
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", True) or mean is None or std is None:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.get("include_top"):  # EfficientNet divides twice
        std = tuple(value * value for value in std)
    return {
        "size": int(size),
        "resize": resize,
        "mean": tuple(round((value + offset) / scale, 12) for value in mean),
        "std": tuple(round(value / scale, 12) for value in std),
        "interpolation": RESAMPLING[settings.get("resample", 2)],
    }


def _resized(settings: dict[str, Any]) -> tuple[Any, Any]:
    """(resize, size) of a processor."""
    given, crop = _lengths(settings.get("size")), _lengths(settings.get("crop_size"))
    if not settings.get("do_resize", True):
        given = crop if settings.get("do_center_crop") else given
        return (given if isinstance(given, int) else max(given)), given
    if isinstance(given, int) and settings.get("crop_pct") is not None:  # ConvNeXt: large images are not cropped
        return (int(given / settings["crop_pct"]), given) if given < 384 else ((given, given), given)
    return given, crop if settings.get("do_center_crop") and crop is not None else given


def _lengths(size: Any) -> Any:
    """An int, the short side, or (height, width); None if nothing is said."""
    if isinstance(size, dict):
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        return int(size["height"]), int(size["width"])
    return size
