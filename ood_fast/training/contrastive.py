"""Contrastive losses: features that lie together by class on the sphere, for KNN, Mahalanobis (SSD+), other distances.

Each has a projection head of its own, whose output it trains, and trains the model's linear head beside it on features
without gradient, so that what comes out is a classifier like any other. Score the features z, as the papers do.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..eager.precision import full_precision
from ..functional import l2_normalize
from .objective import Criterion, StepBatch, WithHead
from .outliers import checked_features


class SupConLoss(WithHead):
    """Supervised contrastive loss, which SSD+ and KNN+ train with.

        loss = contrast(u, y) + criterion(W sg(z) + b, y)             u = P(z)/‖P(z)‖,  sg: without gradient
        contrast = mean_i −1/|S_i| Σ_{s ∈ S_i} log( exp(u_i·u_s/T) / Σ_{j ≠ i} exp(u_i·u_j/T) )

    S_i are the other samples of i's class; samples without any are left out. In `step` the samples are two
    augmentations of each image. In a loop of your own:

        criterion = SupConLoss(model.fc)
        optimizer.add_param_group({"params": criterion.parameters()})
        loss = criterion(z, y)               # z (2n, m) of two views, y (2n,); or any batch with several of a class

    With several processes each contrasts its own samples; P has to begin alike in each, by one seed, and stays so by
    `criterion.average_gradients(n_processes)` after `backward`.

    Args:
        head: the linear layer that makes the logits; not a part of this module.
        criterion: (logits, y) -> scalar, which trains the head alone; None: cross-entropy.
        projection: P, a module (n, m) -> (n, d); a number d makes one of two layers, Linear(m, m), ReLU, Linear(m, d).
        temperature: T, above 0.
        base_temperature: the authors' code multiplies the contrast by T / base_temperature, 0.07 there; None: 1.

    Raises:
        ValueError: one class, settings out of range, features that do not fit, no two samples of a class. TypeError: a
        head that is no module with a weight (c, m), targets that are no class indices.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv:2004.11362; Sehwag, Chiang and Mittal, "SSD: A
    Unified Framework for Self-Supervised Outlier Detection", ICLR 2021, arXiv:2103.12051.
    """

    companion = "views"
    shown: ClassVar[tuple[str, ...]] = ("temperature", "base_temperature")

    def __init__(
        self,
        head: nn.Module,
        criterion: Criterion | None = None,
        projection: nn.Module | int = 128,
        temperature: float = 0.1,
        base_temperature: float | None = None,
    ) -> None:
        super().__init__(head, criterion)
        checks.real("temperature", temperature, 0.0, open_low=True)
        if base_temperature is not None:
            checks.real("base_temperature", base_temperature, 0.0, open_low=True)
        if not isinstance(projection, nn.Module):
            checks.positive_int("projection", projection, " or a module")
            hidden = nn.Linear(self.n_features, self.n_features)
            projection = nn.Sequential(hidden, nn.ReLU(), nn.Linear(self.n_features, projection))
        self.projection = projection.to(next(head.parameters()).device)
        self.temperature, self.base_temperature = temperature, base_temperature

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features (n, m) and classes (n,); ignored ones, outside [0, c), are left out of the contrast."""
        logits = self._head()(z.detach())
        checked_features(logits, z, y, self._head().weight)
        known = (y >= 0) & (y < self.n_classes)
        unit, _ = l2_normalize(self.projection(z[known]).float())
        with full_precision(z.device):
            contrast = self.contrast(unit, y[known])
        return contrast + self.criterion(logits, y)

    def contrast(self, unit: Tensor, y: Tensor) -> Tensor:
        """The contrast of unit vectors (n, d) and classes (n,)."""
        other = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        positive = (y[:, None] == y) & other
        n_positive = positive.sum(dim=1)
        if unit.device.type == "cpu" and not n_positive.any():  # elsewhere it would wait: NaN
            raise ValueError("y: got no two samples of a class, expected positives: two views, or larger batches")
        similar = unit @ unit.T / self.temperature
        log_share = similar - similar.masked_fill(~other, -torch.inf).logsumexp(dim=1, keepdim=True)
        each = -(log_share * positive).sum(dim=1) / n_positive.clamp(min=1)
        return self.scale * each.sum() / (n_positive > 0).sum()

    @property
    def scale(self) -> float:
        """T / base_temperature, or 1."""
        return 1.0 if self.base_temperature is None else self.temperature / self.base_temperature

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """As `forward`, of the images and of their other views, which go through the network together."""
        logits, z, target = both_views(network, batch)
        return self(z, target), logits[: len(batch.x)]


def both_views(network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2n, c), features (2n, m) and targets (2n,) of the images and of their other views."""
    if batch.beside is None or len(batch.beside) != len(batch.x):
        raise ValueError("views: got none, expected another augmentation of each image")
    return *network(torch.cat([batch.x, batch.beside])), torch.cat([batch.target, batch.target])


class CIDERLoss(SupConLoss):
    """CIDER: samples near the prototype of their class, prototypes far from each other.

        contrast   = compactness · (T / base_temperature) · C + D
        C          = mean_i −log( exp(u_i·μ_y/T) / Σ_k exp(u_i·μ_k/T) )
        D          = mean_k log( 1/(c − 1) Σ_{l ≠ k} exp(μ_k·μ_l/T) )
        μ_y       ←  unit(momentum · μ_y + (1 − momentum) · u_i)           sample by sample, before C and D

    The gradient of D goes through the new samples in μ; in C the μ are constants, as in the authors' code. A μ is zero
    before the first sample of its class (OpenOOD begins with the means of validation images). They are a buffer,
    (c, d), that stays in eval mode; with several processes each has its own.

    Args:
        head, criterion, projection, temperature: as in `SupConLoss`; a projection that is a module needs `width`.
        momentum: in [0, 1): OpenOOD has 0.95 for CIFAR-10, 0.5 for CIFAR-100. compactness: not negative, 2 as the paper
            has it for CIFAR-10, 1 for CIFAR-100.
        base_temperature: the authors' code and OpenOOD have 0.07 here, which makes C 10/7 of the paper's; None: 1.

    Ming et al., "How to Exploit Hyperspherical Embeddings for Out-of-Distribution Detection?", ICLR 2023,
    arXiv:2203.04450.
    """

    shown = (*SupConLoss.shown, "momentum", "compactness")
    prototypes: Tensor

    def __init__(
        self,
        head: nn.Module,
        criterion: Criterion | None = None,
        projection: nn.Module | int = 128,
        temperature: float = 0.1,
        base_temperature: float | None = 0.07,
        momentum: float = 0.95,
        compactness: float = 2.0,
        width: int | None = None,
    ) -> None:
        super().__init__(head, criterion, projection, temperature, base_temperature)
        checks.real("momentum", momentum, 0.0, 1.0, open_high=True)
        checks.real("compactness", compactness, 0.0)
        if isinstance(projection, int):
            width = projection
        if width is None:
            raise ValueError("width: got none, expected d, the size of what the projection gives")
        self.momentum, self.compactness = momentum, compactness
        self.register_buffer("prototypes", torch.zeros(self.n_classes, width, device=next(head.parameters()).device))

    def contrast(self, unit: Tensor, y: Tensor) -> Tensor:
        """The contrast of unit vectors (n, d) and classes (n,), which move the prototypes."""
        prototypes = self._moved(unit, y) if self.training else self.prototypes
        self.prototypes = prototypes.detach()
        near = nn.functional.cross_entropy(unit @ self.prototypes.T / self.temperature, y)
        apart = prototypes @ prototypes.T / self.temperature
        apart = apart.masked_fill(torch.eye(len(apart), dtype=torch.bool, device=apart.device), -torch.inf)
        far = (apart.logsumexp(dim=1) - torch.tensor(len(apart) - 1.0, device=apart.device).log()).mean()
        return self.compactness * self.scale * near + far

    def _moved(self, unit: Tensor, y: Tensor) -> Tensor:
        """The prototypes after each sample in its turn: the first of every class together, the second, and so on."""
        of_class = y[:, None] == torch.arange(self.n_classes, device=y.device)
        turn = of_class.cumsum(dim=0).gather(1, y[:, None]).squeeze(1) - 1
        prototypes, good = self.prototypes, unit.detach().isfinite().all(dim=1)  # NaN would stay for good
        for number in range(int(turn.max()) + 1 if len(turn) else 0):
            rows = ((turn == number) & good).nonzero().squeeze(1)
            moved = self.momentum * prototypes[y[rows]] + (1 - self.momentum) * unit[rows]
            prototypes = prototypes.index_copy(0, y[rows], l2_normalize(moved)[0])
        return prototypes
