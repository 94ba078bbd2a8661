"""Detectors that keep training features and compare with the nearest of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager import full_precision
from ..functional import l2_normalize
from . import streaming
from .base import Detector
from .registry import register
from .streaming import at_least_float32

CHUNK_ELEMENTS = 1 << 24  # entries of one block of the distance table: 64 MiB in fp32, whatever the numbers of rows


@register
class KNN(Detector):
    """Minus the squared Euclidean distance to the k-th nearest training feature, all features scaled to unit length:

        −‖ z/‖z‖ − z_(k)/‖z_(k)‖ ‖²

    Keeps every training feature; works through the (queries, bank) table in blocks of bounded size. Neighbours are
    ranked by the expanded square, in float64 on the CPU and in the dtype of the bank, about its mean, elsewhere; the
    distance of the one found is measured by its difference. A zero feature stays zero and lies at distance 1 from
    every unit vector.

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

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"bank": streaming.Bank("unit")}

    def _finish(self, bank: streaming.Bank) -> None:
        rows = bank.value()
        if self.k > len(rows):
            raise ValueError(
                f"k: got {self.k}, expected at most {len(rows)}, the number of training features; take a smaller k"
            )
        self.bank = rows

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        queries = l2_normalize(at_least_float32(features))[0].to(self.bank.dtype)
        # Features of one class lie close together: differences are what counts, and the mean takes no part in them.
        ranked = self.bank.double() if self.bank.device.type == "cpu" else self.bank - self.bank.mean(dim=0)
        shift = 0.0 if ranked.dtype == torch.float64 else self.bank.mean(dim=0)
        squares = ranked.square().sum(dim=1)
        rows = max(1, CHUNK_ELEMENTS // len(self.bank))
        scores = []
        with full_precision(self.bank.device):
            for chunk in queries.split(rows):
                # ‖q‖² is the same for the whole row: the order of the neighbours does not need it.
                table = torch.addmm(squares, (chunk - shift).to(ranked.dtype), ranked.T, alpha=-2)
                kth = table.topk(self.k, dim=1, largest=False).indices[:, -1]
                scores.append(-(chunk - self.bank[kth]).square().sum(dim=1))
        return torch.cat(scores)
