"""How images were prepared: whether as those of the fit of a detector, and as those that a model was trained on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..heads import may_run_compiled, unwrapped
from .layers import LayerReading

if TYPE_CHECKING:
    from .running import Batch

Range = tuple[float, float]  # the smallest and the largest number of images
CURE = "prepare them alike: 0 to 1 in both (ToTensor, or / 255), normalised once"
LOOKED_AT = 1000  # images whose first norm is looked at
SPREAD = 6.0  # times what a norm saw in training: by JPEG, crops and single classes it is 0.3 to 1.4 of that
WIDE, FAINT = 8.0, 0.2  # normalised once, images lie within 2.9; not normalised, they spread 0.03 to 0.1

_NORMS_SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by `warn_of_batches`, once
_RUN_AGAIN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by `warn_random`: each costs one more pass, once


class _OfNorm(LayerReading):
    """The variance of what enters a batch norm, as a multiple of its running one, and the square of its mean."""

    def check(self, rows: Tensor | None, n_rows: int) -> None:
        """It may be one that does not run."""


class SeenImages:
    """What a pass sees of images; with a model, also of what its first batch norm makes of them."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.reach: Tensor | None = None
        self.readings: tuple[LayerReading, ...] = ()
        self.sums, self.n_rows = torch.zeros(()), 0
        if model is None or may_run_compiled([*model.modules()]):
            return
        for name, norm in unwrapped(model).named_modules():
            if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and norm.affine and norm.running_mean is not None:
                if not norm.running_mean.any():  # it has never been trained
                    return
                self.readings = (_OfNorm(name, "entering", partial(self._read, norm)),)
                break

    def _read(self, norm: nn.BatchNorm2d, maps: Tensor) -> Tensor:
        """Of each channel of the output (n, c, positions): mean and mean square of what entered, in deviations."""
        if self.n_rows >= LOOKED_AT:
            return maps.new_zeros(len(maps), 0)
        variance, mean = torch.var_mean(maps, dim=2, correction=0)
        scale = norm.weight.to(maps)
        mean = (mean - norm.bias.to(maps)) / scale
        return torch.cat([mean, variance / scale.square() + mean.square()], dim=1)

    def take(self, batch: Batch) -> None:
        """See one batch."""
        self.reach = input_range(batch.inputs, self.reach)
        for reading in self.readings:
            rows = batch.read.pop(reading.key, None)
            if rows is not None and rows.shape[1]:
                self.sums, self.n_rows = self.sums.to(rows) + rows.sum(0), self.n_rows + len(rows)

    @property
    def range(self) -> Range | None:
        """The smallest and the largest number seen."""
        return None if self.reach is None else (float(self.reach[0]), float(self.reach[1]))

    def tell(self, what: str) -> None:
        """Warn of images that the model was not trained on: not normalised, of 0 to 255, or normalised twice."""
        if self.range is None:
            return
        low, high = self.range
        spread = 1.0
        if self.n_rows >= 2:
            mean, square = (self.sums / self.n_rows).chunk(2)
            spread = float((square - mean.square()).nanmedian())
        told = "normalised twice by 0.5" if abs(low + 3) < 0.01 and abs(high - 1) < 0.01 else ""
        if low >= 0 and high <= 1 and spread < FAINT:
            told = "not normalised"
        elif max(high, -low) > WIDE and spread > SPREAD:
            told = "of 0 to 255, or normalised twice"
        if told:
            seen = f" and spread {spread:.2g} times as far as its first batch norm saw in training" * bool(self.n_rows)
            checks.warn_caller(
                f"{what}: inputs are {told}: they lie within {low:.3g} and {high:.3g}{seen}; prepare them as those "
                "that the model was trained on"
            )


def _images(x: Any) -> Tensor | None:
    """The images (n, channels, h, w) of a batch of inputs; None where there are none with numbers."""
    there = [x] if isinstance(x, Tensor) else x.values()
    return next((value.detach() for value in there if value.dim() == 4 and value.numel() and not value.is_meta), None)


def input_range(x: Any, before: Tensor | None = None) -> Tensor | None:
    """The smallest and the largest number of the images of a batch, and of those `before`, (2,); None without images.

    On their device, which is not waited for."""
    if (images := _images(x)) is None:
        return before
    low, high = (value.float() for value in images.aminmax())
    return torch.stack([low, high] if before is None else [low.minimum(before[0]), high.maximum(before[1])])


def joined_range(ranges: list[Range]) -> Range | None:
    """That of the images of all processes; None without images."""
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None


def warn_other_range(x: Any, fitted: Range | None, what: str) -> None:
    """Warn of images that were not prepared as those of a fit, whose numbers lay within `fitted`.

    Only where nothing else explains it: normalised once, images lie within 2.9, and noise of deviation 1 within 6; no
    black or dark image of 0 to 255 has fractions; normalised images have no pixel of exactly 0 and none below 0 at
    once; noise that goes far below what is black goes above what is white, too.
    """
    if fitted is None or torch.compiler.is_compiling() or (images := _images(x)) is None:
        return
    low, high = input_range(images).tolist()  # type: ignore[union-attr] # there are images
    size, reach = max(high, -low), max(fitted[1], -fitted[0])
    fractions = reach >= 64 and size <= 1 and bool((images != images.round()).any())
    plain = fitted[0] < -0.3 and low == 0 and 0.5 < high <= 1
    twice = fitted[0] < -0.3 and low < 2.5 * fitted[0] and high <= fitted[1]
    if fractions or plain or twice or size > max(WIDE, 3 * reach):
        checks.warn_caller(
            f"{what}: inputs are numbers from {low:.3g} to {high:.3g}, those that it was fitted on from "
            f"{fitted[0]:.3g} to {fitted[1]:.3g}; {CURE}"
        )


def warn_of_batches(model: nn.Module) -> None:
    """Warn, once a model, of one whose batch norms have no running statistics: they take those of each batch."""
    if model in _NORMS_SEEN:
        return
    _NORMS_SEEN.add(model)
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    bare = (name for name, norm in model.named_modules() if isinstance(norm, kinds) and norm.running_mean is None)
    if (name := next(bare, None)) is not None:
        checks.warn_caller(
            f"model: batch norm {name!r} keeps no running statistics (track_running_stats=False), in eval mode too it "
            "takes those of the batch: logits and scores of an image depend on the images beside it"
        )


def random_states(device: torch.device | None) -> tuple[Tensor, ...]:
    """Of the generators that a model on this device draws from."""
    if device is None or device.type != "cuda":
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), torch.cuda.get_rng_state(device)


def warn_random(
    model: nn.Module,
    before: tuple[Tensor, ...],
    device: torch.device | None,
    logits: Tensor,
    again: Callable[[], Tensor],
) -> None:
    """Warn, once a model, of one that has drawn random numbers, and makes other logits of them in a run once more. Not
    where there are other processes: all of them would have to run it."""
    if not before or model in _RUN_AGAIN or not len(logits) or all(map(torch.equal, before, random_states(device))):
        return
    if dist.is_available() and dist.is_initialized():
        return
    _RUN_AGAIN.add(model)
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        other = again()
    if not torch.allclose(other, logits, 1e-2, 1e-3, equal_nan=True):
        checks.warn_caller(
            "model: it draws random numbers in eval mode, as dropout that is kept on (F.dropout(x) needs "
            "training=self.training) and stochastic depth do: run once more, the logits of a batch differ, and so do "
            "scores"
        )
