"""The norm of a block's maps, and the choice of the block."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..models.layers import LayerReading, stages
from ..models.running import inputs_and_targets, run_model
from .layers import LayerDetector
from .numbers import refuse_rows
from .registry import register


@register
class BlockNorm(LayerDetector):
    """The norm of the maps of a block: the mean over channels k of ‖relu(F_k)‖₂, F (channels, positions).

    Which block, `norm_ratios` tells on training images; without, it is the last stage.

    Yu et al., "Block Selection Method for Using Feature Norm in Out-of-Distribution Detection", CVPR 2023,
    arXiv:2212.02295.

    Args:
        layers: the name of one block, or of several, whose norms are summed; None: the last stage.
    """

    label = "Block norm"
    only_last = True
    kind = "norm"

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        super().__init__(layers)
        self.make_members()

    def read(self, maps: Tensor) -> Tensor:
        """The norm of maps (n, c, s): (n, 1)."""
        norms: Tensor = torch.linalg.vector_norm(maps.clamp(min=0), dim=2).mean(dim=1, keepdim=True)
        return norms


@torch.no_grad()
def norm_ratios(
    model: nn.Module, loader: Iterable[Any], layers: Sequence[str] | None = None, *, pieces: int = 4, seed: int = 0
) -> dict[str, float]:
    """NormRatio of each layer: the mean of the norm of an image over that of the same image as a jigsaw puzzle.

    The block with the largest is the one to take: `BlockNorm(layers=(max(ratios, key=ratios.get),))`. Yu et al. take
    training images in 4 × 4 pieces in random order; pieces as large as a pixel shuffle pixels. Two passes of the model.

    Args:
        model, loader: as in `Detector.fit`, of images (n, channels, h, w).
        layers: None: the stages of the model.
        pieces: along each side, which it divides.
        seed: of the order.
    """
    norm = BlockNorm()
    readings = [LayerReading(name, norm.kind, norm.read) for name in layers or stages(model)]
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(len(readings), dtype=torch.float64)
    n_rows = 0
    for given in loader:
        x: Any = inputs_and_targets(given, model)[0]
        checks.float_tensor("loader: x of a batch", x, 4, "(n, channels, h, w)")
        whole, puzzled = (
            next(run_model(model, [images], None, readings)).read for images in (x, _jigsaw(x, pieces, generator))
        )
        for of, r in itertools.product((whole, puzzled), readings):
            refuse_rows(f"layer {r.layer}", of[r.key])
        ratios = [whole[r.key] / puzzled[r.key].clamp(min=torch.finfo(torch.float32).tiny) for r in readings]
        totals += torch.cat(ratios, dim=1).double().sum(dim=0).cpu()
        n_rows += len(x)
    if not n_rows:
        raise ValueError("loader: got none or empty batches, expected images")
    return {reading.layer: total / n_rows for reading, total in zip(readings, totals.tolist(), strict=True)}


def _jigsaw(x: Tensor, pieces: int, generator: torch.Generator) -> Tensor:
    """Images whose pieces are in random order, another for each."""
    n, c, h, w = x.shape
    if h % pieces or w % pieces:
        raise ValueError(f"pieces: got {pieces}, expected a divisor of {h} and {w}, the sides of the images")
    cut = x.reshape(n, c, pieces, h // pieces, pieces, w // pieces).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(n, pieces * pieces, generator=generator).argsort(dim=1).to(x.device)
    cut = cut[torch.arange(n, device=x.device).unsqueeze(1), order].unflatten(1, (pieces, pieces))
    puzzle: Tensor = cut.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
    return puzzle
