"""Maps without their first rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import streaming
from .detector import Detector
from .layers import EachLayer, LayerDetector
from .numbers import exact_linear
from .registry import register


@dataclass
class FewRows(streaming.Gathered):
    """A few rows, for a look at the end."""

    reads = ("features", "logits")

    def update(self, features: Tensor, logits: Tensor, targets: Tensor | None) -> None:
        if not self.rows:
            self.like, self.features, self.logits = features[:0], features[:32], logits[:32]

    def merge(self, other: FewRows) -> None:
        """Nothing more is kept."""


class _Seen(Detector):
    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"rows": FewRows()}

    def _finish(self, **_: Any) -> None:
        pass


@register
class RankFeat(LayerDetector):
    """Energy of the maps of the last stage without their first rank:

        log Σ_j exp(W mean_s(F − σ₁ u₁ v₁ᵀ) + b)_j

    σ₁ u₁ v₁ᵀ: the largest term of the singular value decomposition of F (channels, positions). For nets whose head
    takes the mean over positions of that layer, which the fit checks. The authors' average with an earlier block, whose
    pruned maps run through the rest of the net, is not here. Fitted on the head.

    Song, Sebe and Wang, "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection", NeurIPS 2022,
    arXiv:2209.08590.

    Args:
        layers: the name of the layer whose maps are averaged for the head; None: the last stage.
    """

    only_last = True
    needs_head = True
    kind = "rank"

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        super().__init__(layers)
        if layers is not None and len(layers) != 1:
            raise ValueError(f"layers: got {len(layers)}, expected one")
        self.make_members()

    def member(self) -> Detector:
        """What looks at the rows in the fit."""
        return _Seen()

    def read(self, maps: Tensor) -> Tensor:
        """The means over positions of maps (n, c, s), without the first rank and with it: (n, 2c)."""
        mean = maps.mean(dim=2)
        small = maps if maps.shape[1] <= maps.shape[2] else maps.transpose(1, 2)
        scale = maps.abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        side = (small / scale).double() if maps.device.type != "mps" else small / scale
        vectors = torch.linalg.eigh((side @ side.transpose(1, 2)).nan_to_num())[1][:, :, -1:].to(maps.dtype)
        if small is maps:  # u₁: σ₁ u₁ v₁ᵀ = u₁ u₁ᵀ F
            first = vectors @ (vectors.transpose(1, 2) @ mean.unsqueeze(2))
        else:  # v₁: F v₁ v₁ᵀ
            first = (maps @ vectors) * vectors.mean(dim=1, keepdim=True)
        return torch.cat([mean - first.squeeze(2), mean], dim=1)

    def finish_layers(self, layers: EachLayer) -> None:
        """Look whether the mean of the layer is what enters the head."""
        rows, (reading,) = layers.parts[0]["rows"], self.readings()
        m = self._n_features()
        pooled = rows.features[:, rows.features.shape[1] // 2 :]
        if pooled.shape[1] != m or not torch.allclose(
            self._logits(pooled).float(), rows.logits.float(), rtol=1e-2, atol=1e-2
        ):
            raise ValueError(
                f"layers: the mean over positions of {reading.layer!r} is not what enters the head ({m} features); "
                "name the layer whose maps are averaged for it; other nets RankFeat does not take"
            )

    def _logits(self, z: Tensor) -> Tensor:
        return exact_linear(z, self.head_weight, self.head_bias)

    def _n_features(self) -> int:
        return self.head_weight.shape[1]

    def score_rows(self, rows: list[Tensor], logits: Tensor) -> Tensor:
        return self._logits(rows[0][:, : self._n_features()]).logsumexp(dim=1)
