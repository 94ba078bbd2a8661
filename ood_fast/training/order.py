"""Which images make which batch: a function of (seed, epoch, step, rank), so that there is no state to lose."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import checks
from ..data.images import mixed


class Batches(torch.utils.data.Sampler[list[int]]):
    """A batch sampler: step s of rank r takes the images order[(s·R + r)·b : (s·R + r + 1)·b], R processes.

    `order` is a permutation drawn by (seed, epoch). No image comes twice in an epoch; batches are full: the end of the
    order, fewer images than R·b, is left out, another part each epoch. So R processes with batch b see what one process
    with batch R·b sees. A set beside another is gone through again and again in the steps of the other.

    Args:
        steps_an_epoch: of the other set; None: of its own.

    Attributes:
        batch_size: b, smaller than asked where there are fewer images.
        epoch, first_step: what the next iteration gives; set them before it begins.
    """

    def __init__(
        self,
        n_images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        n_processes: int = 1,
        steps_an_epoch: int | None = None,
    ) -> None:
        if n_images < n_processes:
            raise checks.UserError(f"training images: got {n_images}, expected one for each of {n_processes} processes")
        self.n_images, self.seed, self.rank, self.n_processes = n_images, seed, rank, n_processes
        self.batch_size = min(batch_size, n_images // n_processes)
        self.own_steps = n_images // (self.batch_size * n_processes)  # full batches until all images have come
        self.steps_an_epoch = self.own_steps if steps_an_epoch is None else steps_an_epoch
        self.epoch = self.first_step = 0

    def beside(self, n_images: int, batch_size: int) -> Batches:
        """Batches of another set, one for each step of this one."""
        return Batches(n_images, batch_size, self.seed, self.rank, self.n_processes, self.steps_an_epoch)

    def __len__(self) -> int:
        return self.steps_an_epoch - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        before: int | None = None
        for step in range(self.first_step, self.steps_an_epoch):
            round_, place = divmod(self.epoch * self.steps_an_epoch + step, self.own_steps)
            if round_ != before:
                generator = torch.Generator().manual_seed(mixed(self.seed, round_))
                order, before = torch.randperm(self.n_images, generator=generator, device="cpu"), round_
            first = (place * self.n_processes + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()
