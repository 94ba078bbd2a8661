"""Outliers in training: drawn in feature space (VOS), or images of a loader (outlier exposure, energy bounds).

Each is a module for a loop of your own, and an `Objective` for that of `ood-fast train`. The loss that it is added to
is any criterion (logits, y): cross-entropy, or `ELogitNormLoss`, so that both work together.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Chi2

from .. import checks
from ..eager.precision import compute_dtype, full_precision
from .objective import Around, Criterion, StepBatch, WithHead

RIDGE = 1e-4  # on the diagonal of the covariance, as in the authors' code


class VirtualOutliersLoss(WithHead):
    """What VOS and NPOS share: queues of the newest features of each class, and a term that tells samples from outliers
    drawn from them.

        loss = criterion(f, y) + weight · L          L = mean_x told_1(x) + mean_v told_0(v)

    L begins when the queues of all classes are full. Subclasses draw v in `virtual_outliers()`, and tell by
    `told(logits, z, v)`, (n + k,): the binary cross-entropies of samples and of outliers.

    Attributes:
        samples: (c, queue, m), the newest of each class. seen: (c,), how many of each there were.
    """

    samples: Tensor
    seen: Tensor

    def __init__(
        self, head: nn.Module, criterion: Criterion | None, weight: float, queue: int, average: str, start: float
    ) -> None:
        super().__init__(head, criterion)
        checks.positive_int("queue", queue)
        checks.one_of("average", average, ("samples", "sets"))
        checks.real("weight", weight, 0.0)
        checks.real("start", start, 0.0, 1.0)
        self.weight, self.queue, self.average, self.start = weight, queue, average, start
        where: dict[str, Any] = {"device": next(head.parameters()).device}
        self.register_buffer("samples", torch.zeros(self.n_classes, queue, self.n_features, **where))
        self.register_buffer("seen", torch.zeros(self.n_classes, dtype=torch.int64, **where))
        self._is_full = False  # remembered: to ask the buffer waits for a GPU

    def forward(self, logits: Tensor, z: Tensor, y: Tensor, *, active: bool = True) -> Tensor:
        """The loss of logits (n, c), features (n, m) and classes (n,); z enters the queues, but in eval mode;
        `active=False`: no L."""
        checked_features(logits, z, y, self._head().weight)
        loss = self.closed(logits, z, y)
        if self.training:
            self._enqueue(z.detach(), y)
        if not active or not self.full:
            return loss
        told = self.told(logits, z, self.virtual_outliers())
        term = told.mean() if self.average == "samples" else told[: len(z)].mean() + told[len(z) :].mean()
        return loss + self.weight * term

    def closed(self, logits: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """The loss without L."""
        return self.criterion(logits, y)

    def virtual_outliers(self) -> Tensor:
        """v (k, m), float32."""
        raise NotImplementedError

    def told(self, logits: Tensor, z: Tensor, outliers: Tensor) -> Tensor:
        """(n + k,): how badly each sample is told to be one, and each outlier to be none."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        """Whether every class has filled its queue."""
        self._is_full = self._is_full or bool((self.seen >= self.queue).all())
        return self._is_full

    @torch.no_grad()
    def _enqueue(self, z: Tensor, y: Tensor) -> None:
        """The newest of a class take the places of its oldest. What is not finite, as after an overflow in float16, and
        what has no class (ignored indices) are left out."""
        good = (y >= 0) & (y < len(self.seen)) & z.isfinite().all(dim=1)
        of_class = (y[:, None] == torch.arange(len(self.seen), device=y.device)) & good[:, None]
        number = of_class.cumsum(dim=0).gather(1, y.clamp(0, len(self.seen) - 1)[:, None]).squeeze(1) - 1
        count = of_class.sum(dim=0)
        good &= number >= count.gather(0, y.clamp(0, len(self.seen) - 1)) - self.queue  # of more, the last
        y, number, z = y[good], number[good], z[good]
        self.samples[y, (self.seen[y] + number) % self.queue] = z.to(self.samples.dtype)
        self.seen += count

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """As `forward`, L from `start` on."""
        logits, z = network(batch.x)
        return self(logits, z, batch.target, active=batch.done >= self.start), logits

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        self._is_full = False
        super()._load_from_state_dict(*args, **keywords)


class VOSLoss(VirtualOutliersLoss):
    """VOS: virtual outliers, drawn where the Gaussians of the classes are least dense, and told from the samples by
    their energy.

        loss  = criterion(f, y) + weight · L
        L     = mean_x −log s(e(f(x)))_1 + mean_v −log s(e(W v + b))_0      s(e) = softmax(A e + a), A and a learned
        e(f)  = log Σ_j max(u_j, 0) exp f_j                                 u (c,) learned; minus the energy
        v     ~ N(μ_k, Σ), for each class k the `select` of lowest density among `candidates`

    μ_k is the mean of the last `queue` features of class k, Σ their common covariance (+ 1e-4 on the diagonal). L
    begins when there are so many of every class. With a common Σ = K Kᵀ the density of v = μ_k + K ε falls with ‖ε‖
    alone, which is chi-distributed: so the extremes are drawn as such, one number for each candidate in place of m.

    In a loop of your own, z being what enters the head:

        criterion = VOSLoss(model.fc)                                  # or VOSLoss(model.fc, ELogitNormLoss(model.fc))
        optimizer.add_param_group({"params": criterion.parameters()})
        loss = criterion(logits, z, y)

    Its numbers come from torch's global generator. The queues are buffers, c · queue · m numbers; with several
    processes each has its own. What is learned has to begin alike in each, by one seed, and stays so by
    `criterion.average_gradients(n_processes)` after `backward`.

    Args:
        head: the linear layer that makes the logits; not a part of this module.
        criterion: (logits, y) -> scalar; None: cross-entropy.
        weight: of L. queue, candidates, select: see above, at least 1; select <= candidates.
        average: "samples", one mean over samples and outliers, as the authors' code has it, or "sets", the sum of the
            means, as the paper has it (eq. 6). OpenOOD's version is "samples", but computes e outside of the autograd
            graph and with other u each time: its L has no gradient in the model.
        start: share of the training before which `step` leaves L out: 0.4, epoch 40 of 100.

    Raises:
        ValueError: one class, settings out of range, features that do not fit. TypeError: a head that is no module with
            a weight (c, m); targets that are no class indices.

    Du et al., "VOS: Learning What You Don't Know by Virtual Outlier Synthesis", ICLR 2022, arXiv:2202.01197.
    """

    shown = ("weight", "queue", "candidates", "select", "average", "start")

    def __init__(
        self,
        head: nn.Module,
        criterion: Criterion | None = None,
        weight: float = 0.1,
        queue: int = 1000,
        candidates: int = 10_000,
        select: int = 1,
        average: str = "samples",
        start: float = 0.4,
    ) -> None:
        super().__init__(head, criterion, weight, queue, average, start)
        for name, value in (("candidates", candidates), ("select", select)):
            checks.positive_int(name, value)
        if select > candidates:
            raise ValueError(f"select: got {select}, expected at most candidates={candidates}")
        self.candidates, self.select = candidates, select
        where: dict[str, Any] = {"device": self.samples.device}
        self.energy_weight = nn.Parameter(torch.rand(len(self.seen), **where))
        self.logistic = nn.Linear(1, 2, **where)

    def told(self, logits: Tensor, z: Tensor, outliers: Tensor) -> Tensor:
        """By the energies of samples and outliers."""
        evidence = torch.cat([self.evidence(logits), self.evidence(self._head()(outliers))])
        inside = torch.arange(len(evidence), device=logits.device) < len(logits)
        with torch.autocast(logits.device.type, enabled=False):
            return F.cross_entropy(self.logistic(evidence[:, None]), inside.long(), reduction="none")

    def evidence(self, logits: Tensor) -> Tensor:
        """e (n,) of logits (n, c), in float32."""
        logits = logits.float()
        highest = logits.amax(dim=1)
        parts = self.energy_weight.relu() * (logits - highest[:, None]).exp()
        return highest + parts.sum(dim=1).clamp(min=torch.finfo(parts.dtype).tiny).log()

    @torch.no_grad()
    def virtual_outliers(self) -> Tensor:
        """v (c · select, m), `select` for each class in the order of the classes."""
        mean = self.samples.mean(dim=1)
        centred = (self.samples - mean[:, None]).flatten(0, 1)
        with full_precision(mean.device):
            covariance = centred.T @ centred / len(centred)
            # float32 cannot factor what is smaller than its rounding of the rest
            ridge = (torch.finfo(mean.dtype).eps * covariance.trace()).clamp(min=RIDGE)
            covariance.diagonal().add_(ridge)
            factor, _ = torch.linalg.cholesky_ex(covariance)
            drawn: Tensor = mean.repeat_interleave(self.select, 0) + self._extremes(mean).flatten(0, 1) @ factor.T
            return drawn

    def _extremes(self, like: Tensor) -> Tensor:
        """ε (c, select, m): the longest of `candidates` standard normal vectors for each class; the length of such a
        vector and its direction are independent."""
        n_classes, n_features = like.shape
        squared = Chi2(like.new_full((), n_features), validate_args=False).sample((n_classes, self.candidates))
        lengths = squared.topk(self.select, dim=1).values.sqrt()
        directions = torch.randn(n_classes, self.select, n_features, dtype=like.dtype, device=like.device)
        return lengths[..., None] * F.normalize(directions, dim=-1)


class OutlierExposureLoss(Around):
    """Outlier exposure: of outliers, the model shall say that it cannot tell.

        loss = criterion(f, y) + weight · criterion(f', 1/c)

    f' are the logits of outliers, 1/c the uniform distribution over classes: with cross-entropy the second term is
    mean(logsumexp f' − mean_j f'_j), as OpenOOD writes it; with `ELogitNormLoss` it is that of f'/D.

    Args:
        criterion: (logits, y) -> scalar that takes class probabilities (n, c) too; None: cross-entropy.
        weight: not negative.

    Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure", ICLR 2019, arXiv:1812.04606.
    """

    companion = "outliers"
    shown: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, criterion: Criterion | None = None, weight: float = 0.5) -> None:
        super().__init__(criterion)
        checks.real("weight", weight, 0.0)
        self.weight = weight

    def forward(self, logits: Tensor, outlier_logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (n, c) with y, as the criterion takes it, and of logits (k, c) of outliers."""
        checked_outliers(logits, outlier_logits)
        uniform = torch.full_like(outlier_logits, 1 / outlier_logits.shape[1], dtype=compute_dtype(outlier_logits))
        return self.criterion(logits, y) + self.weight * self.criterion(outlier_logits, uniform)

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """As `forward`; images and outliers go through the network together, as in the authors' code."""
        logits, outlier_logits = network(torch.cat([batch.x, outliers_of(batch)])).tensor_split([len(batch.x)])
        return self(logits, outlier_logits, batch.target), logits


class EnergyBoundedLoss(OutlierExposureLoss):
    """Outliers kept apart from samples by their energy E(f) = −logsumexp f, for fine-tuning.

        loss = criterion(f, y) + weight · (mean max(E(f) − inside, 0)² + mean max(outside − E(f'), 0)²)

    Args:
        criterion: (logits, y) -> scalar; None: cross-entropy.
        weight: not negative. inside, outside: bounds of the energy, inside < outside; −23 and −5 are the paper's for
            CIFAR-10, −27 and −5 for CIFAR-100.

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, arXiv:2010.03759.
    """

    shown = ("weight", "inside", "outside")

    def __init__(
        self, criterion: Criterion | None = None, weight: float = 0.1, inside: float = -23.0, outside: float = -5.0
    ) -> None:
        super().__init__(criterion, weight)
        for name, value in (("inside", inside), ("outside", outside)):
            checks.real(name, value, -float("inf"))
        if not inside < outside:
            raise ValueError(f"inside, outside: got {inside}, {outside}, expected inside < outside")
        self.inside, self.outside = inside, outside

    def forward(self, logits: Tensor, outlier_logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (n, c) with y, as the criterion takes it, and of logits (k, c) of outliers."""
        checked_outliers(logits, outlier_logits)
        above = F.relu(-logits.float().logsumexp(dim=1) - self.inside)
        below = F.relu(self.outside + outlier_logits.float().logsumexp(dim=1))
        return self.criterion(logits, y) + self.weight * (above.square().mean() + below.square().mean())


# ---- checks


def checked_features(logits: Tensor, z: Tensor, y: Tensor, weight: Any) -> None:
    """Logits (n, c) and features (n, m) that fit the head's weight (c, m), class indices (n,)."""
    checks.logits(logits)
    checks.head_weight(weight, logits)
    checks.features(z, weight, len(logits))
    checks.target(y, logits)
    if y.is_floating_point():
        raise TypeError("y: got class probabilities, expected class indices (n,): an outlier is drawn from one class")


def checked_outliers(logits: Tensor, outlier_logits: Tensor) -> None:
    """Logits (n, c) and (k, c), k >= 1, c >= 2."""
    checks.logits(logits)
    checks.several_classes("logits", logits.shape[1])
    checks.float_tensor("outlier_logits", outlier_logits, 2, "(k, c)")
    if outlier_logits.shape[1] != logits.shape[1] or not len(outlier_logits):
        got = tuple(outlier_logits.shape)
        raise ValueError(f"outlier_logits: got shape {got}, expected (k, {logits.shape[1]}), k >= 1")


def outliers_of(batch: StepBatch) -> Tensor:
    """The images of outliers that a step has; ValueError without any."""
    if batch.beside is None or not len(batch.beside):
        raise ValueError("outliers: got none, expected images of outliers in each step: open_benchmark(outliers=DIR)")
    return batch.beside
