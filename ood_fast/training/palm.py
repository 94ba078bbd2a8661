"""PALM: several prototypes for each class, to which samples are assigned softly."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..functional import l2_normalize
from .contrastive import SupConLoss
from .objective import Criterion


class PALMLoss(SupConLoss):
    """PALM: samples near some of the prototypes of their class, prototypes of a class near each other.

        contrast = −mean_i( Σ_j a_ij u_i·μ_j/T − log Σ_j exp(u_i·μ_j/T) ) + pull · P
        P        = −mean_j( 1/|S_j| Σ_{s ∈ S_j} μ_j·μ_s/T' − log Σ_{s ≠ j} exp(μ_j·μ_s/T') )
        μ_j     ←  unit(momentum · μ_j + (1 − momentum) · Σ_i b_ij u_i)       before both terms

    j runs over all c · prototypes, S_j are the others of j's class, T' = 0.5. q (n, c · prototypes) are Sinkhorn's
    weights of u·μ/0.05, three rounds, each prototype then each sample with the same total. b: q within the class of i,
    its `nearest` largest, of sum 1 over j, then of sum 1 over i; a: q of the moved prototypes at the same `nearest`, of
    sum 1 over j. a and b are constants, and so is μ in the first term; the gradient of P goes through u into μ. The
    authors' code and OpenOOD are the same in all of this.

    The prototypes are a buffer (c · prototypes, d), that of class k at k, k + c, k + 2c, ...; with several processes
    each has its own. They begin at random. For use in a loop, and `step`, see `SupConLoss`.

    Args:
        head, criterion, projection, temperature: as in `SupConLoss`.
        prototypes: of each class. nearest: at most so many of them take a sample; 5 of 6 as in the paper.
        momentum: in [0, 1): 0.999 as the paper has it; OpenOOD has 0.9 for CIFAR-10, in batches of 16.
        pull: not negative, 1 in the paper; 0 leaves P out.

    Lu et al., "Learning with Mixture of Prototypes for Out-of-Distribution Detection", ICLR 2024, arXiv:2402.02653.
    """

    shown = ("temperature", "nearest", "momentum", "pull")
    epsilon: ClassVar[float] = 0.05  # of Sinkhorn's weights
    rounds: ClassVar[int] = 3
    pull_temperature: ClassVar[float] = 0.5
    prototypes: Tensor
    classes: Tensor

    def __init__(
        self,
        head: nn.Module,
        criterion: Criterion | None = None,
        projection: nn.Module | int = 128,
        temperature: float = 0.1,
        prototypes: int = 6,
        nearest: int = 5,
        momentum: float = 0.999,
        pull: float = 1.0,
    ) -> None:
        super().__init__(head, criterion, projection, temperature)
        checks.positive_int("prototypes", prototypes)
        checks.positive_int("nearest", nearest)
        checks.real("momentum", momentum, 0.0, 1.0, open_high=True)
        checks.real("pull", pull, 0.0)
        self.nearest, self.momentum, self.pull = min(nearest, prototypes), momentum, pull
        weight: Tensor = self._head().weight  # type: ignore[assignment]  # checked by SupConLoss
        with torch.no_grad():
            width = copy.deepcopy(self.projection).eval()(torch.zeros_like(weight[:1])).shape[1]
        begin = torch.rand(prototypes * self.n_classes, width, device=weight.device)
        self.register_buffer("prototypes", l2_normalize(begin)[0])
        classes = torch.arange(self.n_classes, device=weight.device).repeat(prototypes)
        self.register_buffer("classes", classes, persistent=False)

    def contrast(self, unit: Tensor, y: Tensor) -> Tensor:
        """The contrast of unit vectors (n, d) and classes (n,), which move the prototypes."""
        own = y[:, None] == self.classes
        taken = self._assigned(unit, self.prototypes) * own
        kept = torch.zeros_like(taken).scatter_(1, taken.topk(self.nearest, dim=1).indices, 1.0)
        share = F.normalize(F.normalize(taken * kept, p=1.0, dim=1), p=1.0, dim=0)
        moved = self.momentum * self.prototypes + (1 - self.momentum) * (share.T @ unit)
        # Those of one overflow, which a gradient scaler skips, would be NaN for good.
        moves = moved.detach().isfinite().all() & self.training
        prototypes = l2_normalize(torch.where(moves, moved, self.prototypes))[0]
        self.prototypes = prototypes.detach()
        # the same ones take the sample, though the order may have changed since
        kept = torch.zeros_like(taken).scatter_(1, share.topk(self.nearest, dim=1).indices, 1.0)
        weight = F.normalize(self._assigned(unit, self.prototypes) * own * kept, p=1.0, dim=1)
        similar = unit @ self.prototypes.T / self.temperature
        loss = -((weight * similar).sum(dim=1) - similar.logsumexp(dim=1)).mean()
        return loss + self.pull * self._pulled(prototypes) if self.pull else loss

    @torch.no_grad()
    def _assigned(self, unit: Tensor, prototypes: Tensor) -> Tensor:
        """q (n, c · prototypes), rows of sum 1."""
        log = unit @ prototypes.T / self.epsilon
        for _ in range(self.rounds):
            log = log - log.logsumexp(dim=0)
            log = log - log.logsumexp(dim=1, keepdim=True)
        return log.exp()

    def _pulled(self, prototypes: Tensor) -> Tensor:
        """P."""
        other = ~torch.eye(len(prototypes), dtype=torch.bool, device=prototypes.device)
        same = F.normalize(((self.classes[:, None] == self.classes) & other).float(), p=1.0, dim=1)
        similar = prototypes @ prototypes.T / self.pull_temperature
        apart = similar.masked_fill(~other, -torch.inf).logsumexp(dim=1)
        return -((same * similar).sum(dim=1) - apart).mean()
