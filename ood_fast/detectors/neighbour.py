"""Detectors that keep training features and compare with the nearest of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..eager.precision import double, has_float64, is_exporting
from ..functional import l2_normalize
from . import approximate, streaming
from .detector import Detector
from .fitting import Limit, at_most, tell
from .numbers import at_least_float32, exact_linear, nan_where_too_long
from .registry import register
from .subspace import deviations

# Entries of one block of the table (queries, bank) in float32, whatever the two numbers: 24 MiB. From 32 MiB on the C
# library takes fresh pages for each block, whose faults cost a quarter of the time. In float64 half as many.
CHUNK_ELEMENTS = 3 << 21
TILE_ELEMENTS = 1 << 20  # of a bank that are converted to another dtype at a time: 8 MiB in float64
PAIR_ELEMENTS = 1 << 18  # of features whose differences are taken at a time: 1 MiB in float32, which stays in cache
WINDOW = 8  # neighbours before and behind the k-th that are measured where the ranking leaves more in doubt
# Of a group of columns `largest` reads the maximum first. Fewer columns a group than this cost more than they save.
GROUP = 8
NEAREST = 1e-12  # of squared distances between unit vectors, whose rounding it is in float32


def largest(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row (n, N) in descending order, and their columns: `table.topk(k)`, sooner.

    The columns are dealt into √(k N) groups. The k groups with the largest maxima hold the k largest entries.
    """
    n_columns = table.shape[1]
    n_groups = math.isqrt(k * n_columns)
    size = n_columns // max(1, n_groups)
    if size < GROUP or k > n_groups:
        return table.topk(k, dim=1)
    grouped = n_groups * size
    groups = table[:, :grouped].unflatten(1, (size, n_groups)).amax(dim=1).topk(k, dim=1, sorted=False).indices
    columns = (groups.unsqueeze(2) + torch.arange(0, grouped, n_groups, device=table.device)).flatten(1)
    rest = torch.arange(grouped, n_columns, device=table.device).expand(table.shape[0], -1)
    columns = torch.cat([columns, rest], dim=1)
    values, places = table.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


def row_tiles(bank: Tensor) -> tuple[Tensor, ...]:
    """Rows of a bank (N, m) that are converted at a time."""
    tiles: tuple[Tensor, ...] = bank.split(max(1, TILE_ELEMENTS // max(1, bank.shape[1])))
    return tiles


def products(queries: Tensor, bank: Tensor) -> Tensor:
    """queries @ bank.T, (n, N), in the dtype of the queries."""
    if bank.dtype == queries.dtype:
        return exact_linear(queries, bank)
    table, start = queries.new_empty(queries.shape[0], len(bank)), 0  # torch.export would take len(queries) as fixed
    for tile in row_tiles(bank):
        table[:, start : start + len(tile)] = exact_linear(queries, tile.to(queries.dtype))
        start += len(tile)
    return table


def becomes_program() -> bool:
    """Whether what runs becomes a program, which cannot choose by the numbers that it will see."""
    return torch.compiler.is_compiling() or is_exporting()


def query_chunks(queries: Tensor, n_bank: int) -> Iterator[Tensor]:
    """Rows whose tables stay within `CHUNK_ELEMENTS` float32. A compiled program takes all at once."""
    rows = max(1, CHUNK_ELEMENTS * 4 // (n_bank * queries.dtype.itemsize))
    return iter([queries] if becomes_program() or len(queries) <= rows else queries.split(rows))


def centred_squares(bank: Tensor, mean: Tensor) -> Tensor:
    """‖x − mean‖² of each row x of a bank (N, m), (N,); the mean and they in float64."""
    return torch.cat([(double(tile) - mean).square().sum(dim=1) for tile in row_tiles(bank)])


def squared_distances(queries: Tensor, bank: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """‖queries[query_p] − bank[row_p]‖² of each pair p, (p,), by differences, in the dtype of the queries."""
    step = max(1, PAIR_ELEMENTS // max(1, queries.shape[1]))
    pairs = zip(query.split(step), row.split(step), strict=True)
    return torch.cat([(queries[q] - bank[r].to(queries.dtype)).square().sum(dim=1) for q, r in pairs])


def check_bank(detector: KNN | NNGuide, bank: Tensor, or_else: str) -> None:
    """`at_most` of k: there are as many neighbours as the bank has rows."""
    advice = math.ceil(len(bank) / 10) or None
    cure = f"take a smaller k, such as {advice}, or {or_else}" if advice else f"take {or_else}"
    limit = Limit(len(bank), f"expected at most {len(bank)}, the number of training features kept", cure, advice)
    at_most(detector, "k", limit)


@register
class KNN(Detector):
    """Minus the squared Euclidean distance to the k-th nearest training feature, all features scaled to unit length:

        −‖ z/‖z‖ − z_(k)/‖z_(k)‖ ‖² + α ‖z‖₁

    Keeps the training features, and works through the (queries, bank) table in blocks of bounded size. Neighbours are
    ranked by the expanded square about the mean of the bank; those that rounding could have put in the place of the
    k-th are then measured by their differences, and a query with too many of these is ranked again in float64. A zero
    feature stays zero and lies at distance 1 from every unit vector.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022, arXiv:2204.06507. With α > 0 the
    KNN + L1 filter of Liu and Qin, CVPR 2025. pytorch-ood's is `KNN(squared=False)`.

    Args:
        k: which neighbour; 1 <= k <= number of features kept.
        alpha: weight of the norm, >= 0.
        squared: False takes the distance itself.
        budget: keep a random sample of at most so many training features; None: all.
        dtype: what they are kept in, such as torch.float16, which halves the memory; None: as they come, float32 at
            least.
        seed: of the sample.
        probes: None: exact. Else an approximate index of faiss: √N lists, of which so many are searched. A fit tells
            its recall, `recall`. The index takes as much memory as the bank again, is built on the CPU when it is first
            needed, and is no part of files and exported programs, which search all.
    """

    needs_features = True
    state: ClassVar[tuple[str, ...]] = ("bank", "mean", "squares")  # squares: ‖x − mean‖² of each row x of the bank
    optional_state = ("recall",)  # (): the share of the k nearest that the approximate index finds
    grid = {"k": (50, 100, 200, 500, 1000)}

    def __init__(
        self,
        k: int = 50,
        *,
        alpha: float = 0.0,
        squared: bool = True,
        budget: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        probes: int | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("k", k)
        checks.real("alpha", alpha, 0.0)
        check_kept(budget, dtype, seed)
        if probes is not None:
            checks.positive_int("probes", probes, ", or None for all")
            approximate.faiss()
        self.k, self.alpha, self.squared = k, alpha, squared
        self.budget, self.dtype, self.seed, self.probes = budget, dtype, seed, probes

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"bank": streaming.Bank("unit", budget=self.budget, dtype=self.dtype, seed=self.seed)}

    def _finish(self, bank: streaming.Bank) -> None:
        rows = bank.value()
        check_bank(self, rows, "more training data")
        self._keep(rows, bank.like)
        self.recall = None
        if self.probes is not None:
            self.recall = self.mean.new_tensor(approximate.share_found(rows, self.k, self.probes))
            tell(self, f"probes={self.probes} of {round(len(rows) ** 0.5)} lists find {100 * self.recall:.1f} % of the "
                 f"{self.k} nearest training features")  # fmt: skip

    def _keep(self, rows: Tensor, like: Tensor) -> None:
        """The bank, and what is measured of it, in the dtype and on the device of `like`."""
        total: Any = sum(double(tile).sum(dim=0) for tile in row_tiles(rows))
        self.bank, self.mean = rows, (total / len(rows)).to(like)
        self.squares = centred_squares(rows, double(self.mean)).to(like)

    # .half(), .float(), .double() round what was measured, or give it digits that it does not have.
    def _apply(self, *args: Any, **keywords: Any) -> KNN:
        before = [buffer.dtype for buffer in self.buffers()]
        super()._apply(*args, **keywords)
        if self.bank is not None and before != [buffer.dtype for buffer in self.buffers()]:
            self._keep(self.bank, at_least_float32(self.bank[:0]))
        return self

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        z = at_least_float32(features).to(self.mean.dtype)
        unit, lengths = l2_normalize(z)
        squared, unsure = self._found(unit)
        # A compiled program cannot choose by its numbers, and MPS has no float64.
        if not becomes_program() and z.dtype == torch.float32 and has_float64(z.device) and unsure.any():
            again = unsure.nonzero().squeeze(1)
            squared[again] = self._ranked(unit[again].double())[0].to(squared.dtype)
        score = nan_where_too_long(-squared if self.squared else -squared.sqrt(), lengths)
        return score + self.alpha * torch.linalg.vector_norm(z, ord=1, dim=1) if self.alpha else score

    def _found(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As `_ranked`, by the approximate index if there shall be one; unsure is what its lists do not tell."""
        if self.probes is None or becomes_program():
            return self._ranked(queries)
        squared = approximate.search(queries, self.bank, self.k, self.probes)[:, -1]
        short = squared.isinf().nonzero().squeeze(1)
        if len(short):
            squared[short] = self._ranked(queries[short])[0]
        return squared, torch.zeros_like(squared, dtype=torch.bool)

    def _ranked(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance to the k-th neighbour as ranked in the dtype of the queries, (n,); and where that may be
        another's, bool."""
        mean, squares = self.mean.to(queries.dtype), self.squares
        if squares.dtype != queries.dtype:  # rounded to float32 they would hide what float64 is to tell apart
            squares = centred_squares(self.bank, mean)
        chunks = [self._ranked_chunk(chunk, mean, squares) for chunk in query_chunks(queries, len(self.bank))]
        distances, unsure = zip(*chunks, strict=True)
        return torch.cat(distances), torch.cat(unsure)

    def _nearness(self, queries: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """−‖x − q‖² plus what is the same for a whole row, (n, N), and by how much an entry may err, (n, 1)."""
        centred, eps = queries - mean, torch.finfo(queries.dtype).eps
        # ‖x − q‖² = ‖x − μ‖² − 2 (q − μ)·x + ‖q‖² − ‖μ‖²
        table = products(2 * centred, self.bank).sub_(squares)
        # Rounding errors of a sum of m products grow as √m, with a factor 6 for all but one in 10⁷ (Higham and Mary,
        # 2019); the lengths of the rows are at most 1.
        error = 6 * math.sqrt(queries.shape[1]) * eps * torch.linalg.vector_norm(centred, dim=1) + 4 * eps
        return table, error.unsqueeze(1)

    def _ranked_chunk(self, queries: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        k, n_bank = self.k, len(self.bank)
        table, error = self._nearness(queries, mean, squares)
        nearness, rows = largest(table, min(n_bank, k + max(WINDOW, k // 4)))
        # If no entry errs by more than e, neither does the k-th largest. The true k-th then lies within 2e of it, and
        # what lies further off is before or behind both.
        near = ~((nearness - nearness[:, k - 1 : k]).abs() > 2 * error)  # NaN too
        # What was not taken is behind the last that was.
        unsure = near[:, -1] if near.shape[1] < n_bank else torch.zeros_like(near[:, -1])
        first, last = max(0, k - 1 - WINDOW), k + WINDOW
        if becomes_program():  # as many for each query
            distances = (queries.unsqueeze(1) - self.bank[rows[:, first:last]].to(queries.dtype)).square().sum(dim=2)
            return distances.topk(k - first, dim=1, largest=False).values[:, -1], unsure
        place = torch.arange(near.shape[1], device=near.device)
        near = torch.where(unsure.unsqueeze(1), (place >= first) & (place < last), near)
        query, column = near.nonzero(as_tuple=True)
        distances = torch.where(place < k, -math.inf, math.inf).to(queries.dtype).repeat(len(queries), 1)
        distances[query, column] = squared_distances(queries, self.bank, query, rows[query, column])
        return distances.topk(k, dim=1, largest=False).values[:, -1], unsure


@register
class NNGuide(Detector):
    """Nearest-neighbour guidance: the energy times the mean similarity to the k most similar training features,

        E(z) · 1/k Σ_{i of the k largest} ẑ · (E(z_i) ẑ_i)        ẑ = z/‖z‖,  E = log Σ_j exp f_j

    The bank of E(z_i) ẑ_i holds a random share of the training features. A zero feature scores 0. Fitted on features
    and logits.

    Park et al., "Nearest Neighbor Guidance for Out-of-Distribution Detection", ICCV 2023, arXiv:2309.14888.
    pytorch-ood's is `NNGuide(k=10, fraction=1.0)`.

    Args:
        k: number of neighbours; 1 <= k <= number of features kept.
        fraction: each training feature is kept with this chance, 0 < fraction <= 1. Where neither k nor fraction is
            given, at least k of them.
        budget: keep at most so many of them; None: no limit.
        dtype: what they are kept in, such as torch.float16, which halves the memory; None: as they come, float32 at
            least.
        seed: of the sample.
    """

    needs_features = True
    needs_logits = True
    state = ("bank",)

    def __init__(
        self,
        k: int = 100,
        *,
        fraction: float = 0.01,
        budget: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.positive_int("k", k)
        checks.real("fraction", fraction, 0.0, 1.0, open_low=True)
        check_kept(budget, dtype, seed)
        self.k, self.fraction, self.budget, self.dtype, self.seed = k, fraction, budget, dtype, seed

    def gathers(self) -> dict[str, streaming.Gathered]:
        least = 0 if {"k", "fraction"} & self.given else self.lowered.get("k", self.k)
        kept: dict[str, Any] = {"budget": self.budget, "fraction": self.fraction, "least": least}
        return {"bank": streaming.Bank("energy", **kept, dtype=self.dtype, seed=self.seed)}

    def _finish(self, bank: streaming.Bank) -> None:
        rows = bank.value()
        check_bank(self, rows, f"a larger fraction than {self.fraction:g}")
        if rows.isinf().any():
            most = torch.finfo(rows.dtype).max
            raise ValueError(
                f"dtype: got {rows.dtype}, which holds numbers up to {most:.3g}, expected one that holds the energies "
                "of these logits; take torch.bfloat16, or None"
            )
        self.bank = rows

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        dtype = at_least_float32(self.bank[:0]).dtype
        unit, lengths = l2_normalize(at_least_float32(features).to(dtype))
        chunks = query_chunks(unit, len(self.bank))
        guidance = torch.cat([largest(products(q, self.bank), self.k)[0].mean(dim=1) for q in chunks])
        return nan_where_too_long(guidance, lengths) * torch.logsumexp(at_least_float32(logits), dim=1)


@register
class CombOOD(KNN):
    """Nearest neighbour and Mahalanobis distance as one log density:

        −λ log ‖ z/‖z‖ − z_(k)/‖z_(k)‖ ‖² − xᵀ (R + I)⁻¹ x        λ = √m,  x = (z − μ) / σ

    The k-th nearest training feature as in `KNN`, its squared distance counted as 10⁻¹² at least; μ, σ and R: mean,
    standard deviation (1 for a feature that does not vary) and correlation matrix of the training features. Fitted on
    features.

    Rajasekaran et al., "COMBOOD: A Semiparametric Approach for Detecting Out-of-distribution Data for Image
    Classification", SDM 2024, arXiv:2602.07042. The authors take the second term of the largest and smallest
    activation of every layer, made normal by a power transform; here it is of the features.

    Args:
        k, budget, dtype, seed: as in `KNN`.
        weight: λ >= 0; None: √m, as in the authors' last tables; m is the exponent of a density.
    """

    state = (*KNN.state, "centre", "whitening")
    grid = {}

    def __init__(
        self,
        k: int = 50,
        *,
        weight: float | None = None,
        budget: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(k, budget=budget, dtype=dtype, seed=seed)
        if weight is not None:
            checks.real("weight", weight, 0.0)
        self.weight = weight

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {**super().gathers(), "scatter": streaming.Scatter()}

    def _finish(self, bank: streaming.Bank, scatter: streaming.Scatter) -> None:
        super()._finish(bank)
        deviation = deviations(scatter)
        values, vectors = torch.linalg.eigh(scatter.covariance() / torch.outer(deviation, deviation))
        whitening = (vectors / (values.clamp(min=0) + 1).sqrt()).T / deviation  # (m, m), applied to z − μ
        self.centre, self.whitening = scatter.mean.to(scatter.like), whitening.to(scatter.like)

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        near = -super()._score(features, logits).clamp(max=-NEAREST)
        z = at_least_float32(features).to(self.centre.dtype)
        far = exact_linear(z - self.centre, self.whitening).square().sum(dim=1)
        return -(math.sqrt(z.shape[1]) if self.weight is None else self.weight) * near.log() - far


@register
class Relation(Detector):
    """Neural relation graph: the training samples that are near in direction and alike in their softmax P,

        Σ_i r_i^pow over those with r_i > cutoff        r_i = max(cos(z, z_i), 0) · P · P_i

    Keeps features of unit length and softmax of the training samples. A zero feature scores 0. Fitted on features and
    logits.

    Kim, Yun and Song, "Neural Relation Graph: A Unified Framework for Identifying Label Noise and Outlier Data",
    NeurIPS 2023, arXiv:2301.12321.

    Args:
        pow: > 0.
        cutoff: 0 <= cutoff < 1.
        budget: keep a random sample of at most so many training samples; None: all. 50,000 is all of CIFAR, and of
            ImageNet a share that fits into memory; OpenOOD keeps all.
        dtype, seed: as in `KNN`.
    """

    needs_features = True
    needs_logits = True
    state = ("bank", "softmax")
    grid = {"pow": (1, 2, 4, 6, 8)}

    def __init__(
        self,
        pow: float = 1.0,
        *,
        cutoff: float = 0.03,
        budget: int | None = 50_000,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.real("pow", pow, 0.0, open_low=True)
        checks.real("cutoff", cutoff, 0.0, 1.0, open_high=True)
        check_kept(budget, dtype, seed)
        self.pow, self.cutoff, self.budget, self.dtype, self.seed = pow, cutoff, budget, dtype, seed

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"bank": streaming.Bank("softmax", budget=self.budget, dtype=self.dtype, seed=self.seed)}

    def _finish(self, bank: streaming.Bank) -> None:
        rows = bank.value()
        n_features = bank.like.shape[1]
        self.bank, self.softmax = rows[:, :n_features].contiguous(), rows[:, n_features:].contiguous()

    def widths(self) -> tuple[int | None, int | None]:
        """(m, c) of the bank."""
        return (None, None) if self.bank is None else (self.bank.shape[1], self.softmax.shape[1])

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        dtype = at_least_float32(self.bank[:0]).dtype
        unit, lengths = l2_normalize(at_least_float32(features).to(dtype))
        softmax = torch.softmax(at_least_float32(logits).to(dtype), dim=1)
        chunks = zip(*(query_chunks(queries, len(self.bank)) for queries in (unit, softmax)), strict=True)
        sums = []
        for z, P in chunks:
            relation = products(z, self.bank).clamp_(min=0).mul_(products(P, self.softmax))
            sums.append(torch.where(relation <= self.cutoff, 0.0, relation.pow(self.pow)).sum(dim=1))
        return nan_where_too_long(torch.cat(sums), lengths)


def check_kept(budget: object, dtype: object, seed: object) -> None:
    """The settings of a bank."""
    if budget is not None:
        checks.positive_int("budget", budget, ", or None for all")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype, or None")
    checks.seed(seed)
