"""Detectors that keep training features and compare with the nearest of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import l2_normalize
from .base import Detector, at_least_float32, register

CHUNK_ELEMENTS = 1 << 24  # entries of one block of the distance table: 64 MiB in fp32, whatever the numbers of rows


@register
class KNN(Detector):
    """Minus the squared Euclidean distance to the k-th nearest training feature, all features scaled to unit length:

        −‖ z/‖z‖ − z_(k)/‖z_(k)‖ ‖²

    Keeps every training feature. Exact; works through the (queries, bank) table in blocks of bounded size. A zero
    feature stays zero and lies at distance 1 from every unit vector.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022, arXiv:2204.06507.

    Args:
        k: which neighbour; 1 <= k <= number of training features.
    """

    needs_features = True
    state = ("bank",)

    def __init__(self, k: int = 50) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: got {k!r}, expected an int >= 1")
        self.k = k

    def _start(self) -> None:
        self._batches: list[Tensor] = []

    def _update(self, features: Tensor, logits: Tensor | None, targets: Tensor | None) -> None:
        self._batches.append(l2_normalize(at_least_float32(features))[0])

    def _finish(self) -> None:
        bank = torch.cat(self._batches)
        if self.k > len(bank):
            raise ValueError(
                f"k: got {self.k}, expected at most {len(bank)}, the number of training features; take a smaller k"
            )
        self.bank = bank
        del self._batches

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        queries = l2_normalize(at_least_float32(features))[0].to(self.bank.dtype)
        bank_squares = self.bank.square().sum(dim=1)
        rows = max(1, CHUNK_ELEMENTS // len(self.bank))
        return torch.cat([-self._kth_squared_distance(chunk, bank_squares) for chunk in queries.split(rows)])

    def _kth_squared_distance(self, queries: Tensor, bank_squares: Tensor) -> Tensor:
        # ‖q‖² is the same for the whole row: the order of the neighbours does not need it.
        ranked = torch.addmm(bank_squares, queries, self.bank.T, alpha=-2)
        kth = ranked.topk(self.k, dim=1, largest=False).indices[:, -1]
        # The expanded square cancels where q is close to its neighbour: take the distance itself from the difference.
        return (queries - self.bank[kth]).square().sum(dim=1)
