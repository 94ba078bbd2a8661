"""NPOS: outliers drawn around the samples of a class that have the fewest neighbours, beside any criterion."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..eager.precision import full_precision
from ..functional import l2_normalize
from .contrastive import SupConLoss, both_views
from .objective import Criterion, StepBatch
from .outliers import VirtualOutliersLoss

VALUES = 1 << 26  # similarities that are worked on at a time: the classes come in parts


class Synthesis(NamedTuple):
    """How NPOS draws outliers of a class; the numbers are OpenOOD's for CIFAR, with queues of 1000.

    Attributes:
        neighbours: k; density is read from the distance to the k-th of the class's features, which counts itself.
        boundary: of the features of a class, this many with the largest distance are its boundary.
        anchors: of these, how many are drawn in each step.
        candidates: around each of them, this many are drawn with the standard `deviation`;
        keep: and those with the largest distance are outliers.
    """

    neighbours: int = 300
    boundary: int = 200
    anchors: int = 2
    candidates: int = 600
    keep: int = 200
    deviation: float = 0.1

    @classmethod
    def of_queue(cls, queue: int) -> Synthesis:
        """The same shares of a queue of another length."""
        boundary = max(1, queue // 5)
        return cls(neighbours=max(1, 3 * queue // 10), boundary=boundary, anchors=min(2, boundary))


class NPOSLoss(VirtualOutliersLoss):
    """NPOS: outliers drawn around the samples with the fewest neighbours in their class, and told from the samples by
    a small network.

        loss  = criterion_weight · criterion + weight · L
        L     = mean_x softplus(−φ(z)) + mean_v softplus(φ(v))            φ two layers, m -> 128 -> 1, learned
        v     = a + deviation · ε,  ε ~ N(0, I)
        a     one of the `boundary` features of a class that are farthest from their k-th neighbour in it

    of the v around each a the `keep` that are farthest from their k-th neighbour. Distances are those of unit vectors;
    v and φ take the features as they are. See `Synthesis` for the numbers; queues and `average` are those of `VOSLoss`.

    `criterion` is (logits, y) -> scalar, as for `VOSLoss`, or a contrastive loss of (z, y), which the papers train
    with: OpenOOD's NPOS is `NPOSLoss(fc, CIDERLoss(fc), criterion_weight=0.5)`. In a loop of your own, z being what
    enters the head:

        criterion = NPOSLoss(model.fc, ELogitNormLoss(model.fc))
        optimizer.add_param_group({"params": criterion.parameters()})
        loss = criterion(logits, z, y)

    The authors' code and OpenOOD rank the distances of candidates in another order than they stand in, so that those
    they keep are not the farthest; here they are, as the paper says. OpenOOD also empties its queues in each epoch.

    Args:
        head: the linear layer that makes the logits; not a part of this module.
        criterion, criterion_weight: see above; None: cross-entropy.
        weight: of L. queue: features kept of each class. synthesis: None: `Synthesis.of_queue(queue)`.
        average, start: as in `VOSLoss`.

    Raises:
        ValueError: one class, settings out of range, more neighbours, boundary, anchors or outliers than there are
            features or candidates. TypeError: as `VOSLoss`.

    Tao et al., "Non-parametric Outlier Synthesis", ICLR 2023, arXiv:2303.02966.
    """

    shown = ("weight", "queue", "synthesis", "average", "start", "criterion_weight")

    def __init__(
        self,
        head: nn.Module,
        criterion: Criterion | None = None,
        weight: float = 0.1,
        queue: int = 1000,
        synthesis: Synthesis | None = None,
        average: str = "samples",
        start: float = 0.4,
        criterion_weight: float = 1.0,
    ) -> None:
        super().__init__(head, criterion, weight, queue, average, start)
        checks.real("criterion_weight", criterion_weight, 0.0)
        self.criterion_weight = criterion_weight
        self.synthesis = Synthesis.of_queue(queue) if synthesis is None else synthesis
        checks.instance("synthesis", self.synthesis, Synthesis, "a Synthesis")
        limits = {"neighbours": queue, "boundary": queue, "anchors": self.synthesis.boundary, "candidates": None}
        limits["keep"] = self.synthesis.candidates
        for name, most in limits.items():
            checks.positive_int(name, value := getattr(self.synthesis, name))
            if most is not None and value > most:
                raise ValueError(f"{name}: got {value}, expected at most {most}")
        checks.real("deviation", self.synthesis.deviation, 0.0, open_low=True)
        where: dict[str, Any] = {"device": self.samples.device}
        self.told_by = nn.Sequential(nn.Linear(self.n_features, 128, **where), nn.ReLU(), nn.Linear(128, 1, **where))
        if isinstance(self.criterion, SupConLoss):
            self.companion = self.criterion.companion

    def closed(self, logits: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """The weighted criterion, of logits or of features."""
        of = z if isinstance(self.criterion, SupConLoss) else logits
        return self.criterion_weight * self.criterion(of, y)

    def told(self, logits: Tensor, z: Tensor, outliers: Tensor) -> Tensor:
        """By φ of features and outliers."""
        with torch.autocast(z.device.type, enabled=False):
            score = self.told_by(torch.cat([z.float(), outliers])).squeeze(1)
        return F.softplus(torch.where(torch.arange(len(score), device=score.device) < len(z), -score, score))

    @torch.no_grad()
    def virtual_outliers(self) -> Tensor:
        """v (c · anchors · keep, m), in the order of the classes."""
        how, (_, queue, width) = self.synthesis, self.samples.shape
        noise = how.deviation * torch.randn(how.candidates, width, device=self.samples.device)  # the same for all
        step = max(1, VALUES // (queue * max(queue, how.anchors * how.candidates)))
        return torch.cat([self._around(samples, noise).flatten(0, -2) for samples in self.samples.split(step)])

    def _around(self, samples: Tensor, noise: Tensor) -> Tensor:
        """(classes, anchors, keep, m) of the samples (classes, queue, m) of some classes."""
        how = self.synthesis
        unit, _ = l2_normalize(samples)
        boundary = self._nearness(samples, unit).topk(how.boundary, dim=1, largest=False).indices
        drawn = torch.rand(boundary.shape, device=samples.device).topk(how.anchors, dim=1).indices
        anchors = _rows(samples, boundary.gather(1, drawn))
        candidates = anchors[:, :, None] + noise
        nearness = self._nearness(candidates.flatten(1, 2), unit).unflatten(1, (how.anchors, -1))
        kept = nearness.topk(how.keep, dim=2, largest=False).indices
        return candidates.gather(2, kept[..., None].expand(-1, -1, -1, samples.shape[2]))

    def _nearness(self, points: Tensor, unit: Tensor) -> Tensor:
        """The cosine (classes, n) of points (classes, n, m) and their k-th neighbour among unit vectors; the squared
        distance of unit vectors is 2 − 2 cos."""
        with full_precision(points.device):
            cosines = l2_normalize(points)[0] @ unit.mT
        return cosines.kthvalue(unit.shape[1] - self.synthesis.neighbours + 1, dim=2).values

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """As `forward`, L from `start` on; with a contrastive criterion of both views."""
        if not isinstance(self.criterion, SupConLoss):
            return super().step(network, batch)
        logits, z, target = both_views(network, batch)
        return self(logits, z, target, active=batch.done >= self.start), logits[: len(batch.x)]


def _rows(samples: Tensor, rows: Tensor) -> Tensor:
    """samples (classes, n, m) at rows (classes, k): (classes, k, m)."""
    return samples.gather(1, rows[..., None].expand(-1, -1, samples.shape[2]))
