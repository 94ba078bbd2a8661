"""How images were prepared for a model, as the model or those who published its weights say."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..data import specs
from . import vision

IMAGENET: dict[str, Any] = {"size": 224, "interpolation": "bilinear"}
IMAGENET |= {name: specs.IMAGENET[name] for name in ("resize", "mean", "std")}


def own_preparation(model: nn.Module, name: str, published: bool) -> dict[str, Any] | None:
    """Size, resize, mean, std and interpolation of a timm or transformers model, or of torchvision's weights.

    None where nobody says. `resize` is a length for the short side, or (height, width).

    Args:
        name: what the model is called. published: it has the weights that were published under this name.
    """
    own = getattr(model, "preparation", None)
    if isinstance(own, dict):
        return own
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and "mean" in config:
        return _of_timm(config, published)
    if not published or name not in vision.names():
        return None
    transform = vision.weights_of(name).transforms()
    return {
        "size": transform.crop_size[0],
        "resize": transform.resize_size[0],
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
    }


def _of_timm(config: dict[str, Any], published: bool) -> dict[str, Any]:
    size = (config.get("test_input_size" if published else "input_size") or config["input_size"])[-1]
    share = config.get("test_crop_pct" if published else "crop_pct") or config.get("crop_pct") or 0.875
    scaled = int(size / share)
    return {
        "size": size,
        "resize": (scaled, scaled) if config.get("crop_mode") == "squash" else scaled,
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config.get("interpolation") or "bilinear",
    }
