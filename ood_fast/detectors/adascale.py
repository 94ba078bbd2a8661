"""Features or logits scaled by how far the features move when the input does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..eager.precision import double
from ..heads import given_head
from ..models.layers import Key
from ..models.running import Batch, evaluating, run_model
from . import streaming
from .activation import MAX_EXPONENT
from .detector import Detector
from .gradient import check_movable, input_gradient
from .layers import Passed
from .numbers import at_least_float32, exact_linear, first_largest, refuse_rows
from .registry import register

SAMPLE = 5000  # validation samples that F is made of, as in OpenOOD


@register
class AdaSCALE(Detector):
    """Energy scaled by the largest features, their share less where the features move more:

        x̂ = x + ε · M · sign(∂f_p/∂x),  M = 1 at the `share` of the numbers of x where |∂f_p/∂x| is least,  p = argmax f
        Q' = λ Σ_{k in top k1} |ẑ_k − z_k| + Σ_{k in top k2} max(ẑ_k, 0)         ẑ = z(x̂), both tops those of z
        P = p_low + (1 − F(Q')) (p_high − p_low)           F: the distribution of Q' over in-distribution data
        r = Σ max(z, 0) / Σ of the k = m − round(m P / 100) largest of them
        variant="a"    log Σ_j exp(W (z · exp r) + b)_j
        variant="l"    log Σ_j exp(f_j · r²)

    with at least one number or feature in each sum. Features that are nowhere above 0 are not scaled; exp r is e^50 at
    most. Two more passes of the model and one backward, when it is fitted and when it scores. ε is in the unit of
    inputs as the model takes them.

    Regmi, "AdaSCALE: Adaptive Scaling for OOD Detection", 2025, arXiv:2503.08023.

    Args:
        variant: "a" or "l".
        p: (p_low, p_high) in percent, 0 <= p_low <= p_high <= 100.
        k1, k2: in percent of m, 0 < k <= 100; OpenOOD calls them k2 and k1.
        weight: λ >= 0.
        share: of the numbers of an input, 0 < share <= 1.
        eps: ε >= 0.
    """

    needs_features = True
    needs_logits = True
    needs_head = True
    needs_model = True
    in_all = False
    state = ("shifts",)  # (N,), in order
    fits_on = "validation"
    grid = {"p": tuple(itertools.combinations((60, 65, 70, 75, 80, 85, 90, 95, 99), 2))}
    shifts: Tensor

    def __init__(
        self,
        variant: str = "a",
        p: Sequence[float] = (75.0, 85.0),
        *,
        k1: float = 1.0,
        k2: float = 5.0,
        weight: float = 10.0,
        share: float = 0.05,
        eps: float = 0.5,
    ) -> None:
        super().__init__()
        checks.one_of("variant", variant, ("a", "l"))
        if isinstance(p, (str, int, float)) or len(p) != 2:
            raise ValueError(f"p: got {p!r}, expected two numbers, (p_low, p_high)")
        for value in p:
            checks.real("p", value, 0.0, 100.0)
        if p[0] > p[1]:
            raise ValueError(f"p: got {tuple(p)}, expected p_low <= p_high")
        checks.real("k1", k1, 0.0, 100.0, open_low=True)
        checks.real("k2", k2, 0.0, 100.0, open_low=True)
        checks.real("weight", weight, 0.0)
        checks.real("share", share, 0.0, 1.0, open_low=True)
        checks.real("eps", eps, 0.0)
        self.variant, self.p = variant, tuple(p)
        self.k1, self.k2, self.weight, self.share, self.eps = k1, k2, weight, share, eps

    @property
    def _key(self) -> Key:
        return type(self).__name__, repr((self.k1, self.k2, self.weight, self.share, self.eps))

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"shifts": Passed(budget=SAMPLE, key_read=self._key)}

    def _finish(self, shifts: Passed) -> None:
        self.shifts = shifts.value().flatten().sort().values

    @torch.no_grad()
    def see(self, model: nn.Module, batch: Batch, head: nn.Linear | None) -> None:
        """Q' (n, 1) of a batch; kept with it for others of these settings."""
        if self._key in batch.read:
            return
        x, z = batch.inputs, batch.features
        check_movable(x, self.label)
        assert z is not None
        with evaluating(model):
            gradient = input_gradient(model, x, lambda f: f.amax(dim=1).sum(), self.label).flatten(1)
        least = gradient.abs().topk(max(1, int(gradient.shape[1] * self.share)), dim=1, largest=False).indices
        step = torch.zeros_like(gradient).scatter(1, least, gradient.gather(1, least).sign())
        (moved,) = run_model(model, [x + self.eps * step.view_as(x)], head)
        z, moved_z = (at_least_float32(features) for features in (z, moved.features) if features is not None)
        shift, kept = (
            values.gather(1, first_largest(z, max(1, int(z.shape[1] * k / 100)))[1]).sum(dim=1, keepdim=True)
            for values, k in (((moved_z - z).abs(), self.k1), (moved_z.relu(), self.k2))
        )
        read = self.weight * shift + kept
        refuse_rows("features of the moved inputs", read)  # NaN would count as the furthest
        batch.read[self._key] = read

    def score_batch(self, model: nn.Module, batch: Batch, head: str | nn.Linear | None = None) -> Tensor:
        self.require_fitted()
        features: Any = batch.features
        self.check_widths(features, batch.logits)
        refuse_rows("features", features)
        self.see(model, batch, given_head(model, head))
        scores = self._scaled(at_least_float32(features), batch.logits, batch.read[self._key])
        self.check_scores(scores, features, batch.logits)
        return scores

    def _scaled(self, z: Tensor, logits: Tensor, shifts: Tensor) -> Tensor:
        """The energies (n,)."""
        below = torch.searchsorted(self.shifts, shifts.flatten().to(self.shifts), right=True)
        percent = self.p[0] + (1 - below.to(torch.float32) / len(self.shifts)) * (self.p[1] - self.p[0])
        m = z.shape[1]
        k = (m - (m * percent / 100).round()).long().clamp(min=1).unsqueeze(1)
        sums = double(z.relu().sort(dim=1, descending=True).values).cumsum(dim=1)
        largest = sums.gather(1, k - 1)
        r = sums[:, -1:] / largest.masked_fill(largest == 0, torch.inf)
        if self.variant == "l":
            scale = torch.where(largest == 0, 1.0, r).square().to(z)
            return torch.logsumexp(at_least_float32(logits) * scale, dim=1)
        assert self.head_weight is not None
        reshaped = z * r.clamp(max=MAX_EXPONENT).exp().to(z)
        return torch.logsumexp(exact_linear(reshaped, self.head_weight, self.head_bias), dim=1)

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """RuntimeError: the score is a function of the inputs and the model, not of features."""
        raise RuntimeError(f"{self.label} scores inputs, not features or logits: call score(model, x)")
