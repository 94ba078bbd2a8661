"""A detector that looks at features through heads with noise in their weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from . import streaming
from .detector import Detector
from .fitting import Limit, at_most
from .neighbour import query_chunks
from .numbers import at_least_float32, exact_linear, nan_where_too_long
from .registry import register

SAMPLE = 10_000  # training samples that the densities are means of
HEAD_VALUES = 1 << 26  # numbers of all heads: 256 MiB in float32
FLOORS = (0.01, 0.025)  # added to the densities, of features and of perturbed logits, before their logarithm
ROUNDING = 1e-4  # of a range: a value as far outside is on its end


@register
class WeiPer(Detector):
    """WeiPer + KLD: how far the distribution of the numbers of one sample is from that of the training samples, for its
    features and for its logits under r heads with noise, less the certainty of those:

        −KL(z) − λ₁ KL(W̃ z + b) + λ₂ mean_r max_j softmax(W̃_r z + b)_j        W̃_rj = w_j + δ ‖w_j‖ u_rj

    u_rj: random unit vectors. A distribution: the share of the m features, or r · c logits, in each of `bins` cells
    between the smallest and the largest number of the training samples, averaged over `smoothing` cells (the ends
    repeated) for the sample, over samples for the training data, plus 0.01 or 0.025, scaled to a sum of 1. KL:
    Σ (p − q) log(p/q), both directions. Fitted on features and head: on 10,000 random training samples, of which the
    authors take all.

    Granz, Heurich and Landgraf, "WeiPer: OOD Detection using Weight Perturbations of Class Projections", NeurIPS 2024,
    arXiv:2405.17164. Defaults as in the authors' postprocessor for OpenOOD, which chooses all but r on validation data.

    Args:
        repeats: r heads. Heads of more than 2²⁶ numbers are refused; of the default fewer are taken, with a warning.
        delta: δ > 0.
        kld_weight, msp_weight: λ₁ and λ₂, >= 0.
        bins: 2 or more.
        smoothing, smoothing_perturbed: cells, of features and of perturbed logits, 1 to `bins`.
        seed: of u.
    """

    needs_features = True
    needs_head = True
    heads: Tensor
    limits: Tensor
    density: Tensor
    density_perturbed: Tensor
    state = ("heads", "limits", "density", "density_perturbed")  # heads (r · c, m); limits (2, 2): low, high of each

    def __init__(
        self,
        repeats: int = 100,
        *,
        delta: float = 1.8,
        kld_weight: float = 2.5,
        msp_weight: float = 0.1,
        bins: int = 100,
        smoothing: int = 4,
        smoothing_perturbed: int = 15,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.positive_int("repeats", repeats)
        checks.real("delta", delta, 0.0, open_low=True)
        checks.real("kld_weight", kld_weight, 0.0)
        checks.real("msp_weight", msp_weight, 0.0)
        checks.positive_int("bins", bins)
        for name, width in (("smoothing", smoothing), ("smoothing_perturbed", smoothing_perturbed)):
            checks.positive_int(name, width)
            if width > bins:
                raise ValueError(f"{name}: got {width}, expected at most bins, {bins}")
        if bins < 2:
            raise ValueError(f"bins: got {bins}, expected 2 or more")
        checks.seed(seed)
        self.repeats, self.delta, self.kld_weight, self.msp_weight = repeats, delta, kld_weight, msp_weight
        self.bins, self.smoothing, self.smoothing_perturbed, self.seed = bins, smoothing, smoothing_perturbed, seed

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"sample": streaming.Bank(budget=SAMPLE)}

    def _finish(self, sample: streaming.Bank) -> None:
        assert self.head_weight is not None
        weight = at_least_float32(self.head_weight)
        most = HEAD_VALUES // weight.numel()
        why = f"expected at most {most}: heads of {HEAD_VALUES} numbers"
        at_most(self, "repeats", Limit(most, why, f"take {max(1, most)}", max(1, most)))
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.repeats, *weight.shape, generator=generator, device="cpu").to(weight)
        noise = noise / torch.linalg.vector_norm(noise, dim=2, keepdim=True)
        noise = noise[:, weight.unique(dim=0, return_inverse=True)[1]]  # whatever the order of the classes
        length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        self.heads = (weight + self.delta * length * noise).flatten(0, 1)
        rows = sample.value().to(sample.like.dtype)
        chunks = list(query_chunks(rows, len(self.heads)))
        low, high = (torch.stack(ends) for ends in zip(*(_ends(z, self._logits(z)) for z in chunks), strict=True))
        self.limits = torch.stack([low.amin(dim=0), high.amax(dim=0)], dim=1)  # a row for features, one for logits
        if not (self.limits[:, 1] > self.limits[:, 0]).all():
            raise ValueError("features: got one number in all of them, expected some that differ")
        totals = [torch.stack([self._shares(z, 0).sum(0), self._shares(self._logits(z), 1).sum(0)]) for z in chunks]
        self.density, self.density_perturbed = torch.stack(totals).sum(dim=0).div(len(rows)).unbind()

    def _logits(self, z: Tensor) -> Tensor:
        """Of all heads, (n, r · c)."""
        bias = None if self.head_bias is None else self.head_bias.repeat(self.repeats)
        return exact_linear(z, self.heads, bias)

    def _shares(self, values: Tensor, which: int) -> Tensor:
        """The share of the numbers of each row in each cell, (n, bins); those outside count in the sum."""
        low, high = self.limits[which]
        place = (values - low) / (high - low)
        outside = (place < -ROUNDING) | (place > 1 + ROUNDING)
        cell = (place * self.bins).clamp(0, self.bins - 1).nan_to_num(0.0).long().masked_fill(outside, self.bins)
        counts = values.new_zeros(values.shape[0], self.bins + 1).scatter_add(1, cell, torch.ones_like(values))
        return counts[:, :-1] / values.shape[1]

    def _divergence(self, values: Tensor, which: int) -> Tensor:
        """KL in both directions, (n,), of the numbers of each row from the density kept."""
        width = (self.smoothing, self.smoothing_perturbed)[which]
        kept = (self.density, self.density_perturbed)[which]
        padded = F.pad(self._shares(values, which).unsqueeze(1), ((width - 1) // 2, width // 2), mode="replicate")
        q = F.avg_pool1d(padded, width, stride=1).squeeze(1) + FLOORS[which]
        p = kept + FLOORS[which]
        p, q = p / p.sum(), q / q.sum(dim=1, keepdim=True)
        return ((p - q) * (p.log() - q.log())).sum(dim=1)

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        scores = []
        for z in query_chunks(at_least_float32(features).to(self.heads.dtype), len(self.heads)):
            f = self._logits(z)
            certainty = f.unflatten(1, (self.repeats, -1)).softmax(dim=2).amax(dim=2).mean(dim=1)
            divergence = self._divergence(z, 0) + self.kld_weight * self._divergence(f, 1)
            scores.append(self.msp_weight * certainty - divergence)
        score = torch.cat(scores)
        length = torch.linalg.vector_norm(at_least_float32(features), dim=1)
        return nan_where_too_long(score, length).masked_fill(length.isnan(), torch.nan)


def _ends(*values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each."""
    return torch.stack([v.amin() for v in values]), torch.stack([v.amax() for v in values])
