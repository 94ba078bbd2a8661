"""Whether images were prepared as those that a detector was fitted on."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def _images(x: Any) -> Tensor | None:
    """The images (n, channels, h, w) of a batch of inputs; None where there are none with numbers."""
    there = [x] if isinstance(x, Tensor) else x.values()
    return next((value.detach() for value in there if value.dim() == 4 and value.numel() and not value.is_meta), None)


def input_range(x: Any, before: Tensor | None = None) -> Tensor | None:
    """The largest size of a number of the images of a batch, and of those `before`; None if there are no images."""
    if (images := _images(x)) is None:
        return before
    low, high = images.aminmax()
    found = torch.maximum(high.float(), -low.float())
    return found if before is None else torch.maximum(found, before)


def warn_other_range(x: Any, fitted: float | None, what: str) -> None:
    """Warn of images that were not prepared as those of a fit, whose largest number was `fitted`.

    Only where nothing else explains it: normalised once, images lie within 2.9, and noise of deviation 1 within 6; no
    black or dark image of 0 to 255 has fractions. Not normalised, or by 0.5 twice, is not noticed.
    """
    if fitted is None or torch.compiler.is_compiling() or (images := _images(x)) is None:
        return
    largest = float(input_range(images))  # type: ignore[arg-type]
    fractions = fitted >= 64 and largest <= 1 and bool((images != images.round()).any())
    if fractions or largest > max(8.0, 3 * fitted):
        warnings.warn(
            f"{what}: inputs are numbers up to {largest:.3g} in size, those that it was fitted on up to {fitted:.3g}; "
            "prepare them alike: 0 to 1 in both (ToTensor, or / 255), normalised once",
            stacklevel=3,
        )
