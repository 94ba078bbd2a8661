"""How far the features of an image move from checkpoint to checkpoint.

Haas, Yolland and Rabus, TMLR 2024, arXiv:2306.04072, equation 8 and figures 3 and 6.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..eager.precision import double
from ..heads import find_head
from ..models.running import run_model


@dataclass(frozen=True)
class FeatureChange:
    """Change of the features by groups of the norm that they have in the last checkpoint.

        Δ_m = Σ_t 1/N_m Σ_{i in group m} ‖z_{i,t} − z_{i,t−1}‖²          (eq. 8), t over the checkpoints

    Attributes:
        edges: of the groups: group m holds edges[m] ≤ ‖z‖₂ < edges[m + 1], (g + 1,); the last is +inf.
        count: N_m, (g,).
        steps: the term of each t, (k − 1, g): their sum over t is Δ_m. NaN for an empty group.
    """

    edges: Tensor
    count: Tensor
    steps: Tensor

    @property
    def total(self) -> Tensor:
        """Δ_m, (g,)."""
        return self.steps.sum(dim=0)


def squared_change(previous: Iterable[Tensor], current: Iterable[Tensor]) -> Tensor:
    """‖z_{i,t} − z_{i,t−1}‖² of each sample, (n,) in float64, from the features of the same samples in equal chunks."""
    parts = []
    for before, after in zip_longest(previous, current):
        if before is None or after is None or before.shape != after.shape:
            shapes = [None if chunk is None else tuple(chunk.shape) for chunk in (before, after)]
            raise ValueError(f"current: got a chunk of shape {shapes[1]}, expected {shapes[0]}, as in `previous`")
        parts.append((double(after) - double(before)).square().sum(dim=1).cpu())
    return torch.cat(parts)


def change_by_norm(changes: Tensor, norm: Tensor, edges: Sequence[float] | None = None) -> FeatureChange:
    """`FeatureChange` from the squared change of each sample at each step, (k − 1, n), and its last norm (n,).

    Args:
        edges: lower edges of the groups, ascending; samples below the first are left out. (The paper's are 0, 10, 20,
            30 for a model trained with L2 normalisation and 0, 5, 7, 9 for one without.) None: the quartiles.
    """
    changes, norm = changes.cpu().double(), norm.cpu().double()
    if edges is None:
        edges = [0.0, *torch.quantile(norm, norm.new_tensor([0.25, 0.5, 0.75])).tolist()]
    if list(edges) != sorted(edges):
        raise ValueError(f"edges: got {list(edges)}, expected ascending numbers")
    bounds = norm.new_tensor([*edges, math.inf])
    group = torch.bucketize(norm, bounds[:-1], right=True) - 1
    inside = group >= 0
    member = torch.nn.functional.one_hot(group[inside], len(edges)).double()
    count = member.sum(dim=0)
    return FeatureChange(bounds, count.long(), changes[:, inside] @ member / count)


@torch.no_grad()
def feature_change(
    models: Iterable[nn.Module], loader: Iterable[Any], edges: Sequence[float] | None = None
) -> FeatureChange:
    """`FeatureChange` over the checkpoints `models`, the first first; each is run once.

    The features of two checkpoints are kept in temporary files, none in memory.

    Args:
        models: at least two; may be made one by one.
        loader: gives the same images in the same order each time it is iterated over: no shuffling, no augmentation.
    """
    changes, n_models = [], 0
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        before, after = one, other
        for n_models, model in enumerate(models, start=1):
            features = (batch.features for batch in run_model(model, loader, find_head(model)))
            now = _kept((z for z in features if z is not None), after)  # there is a head: all are there
            if n_models == 1:
                for _ in now:
                    pass
            else:
                changes.append(squared_change(_read(before), now))
            before, after = after, before
            before.seek(0)
            after.seek(0)
        if n_models < 2:
            raise ValueError(f"models: got {n_models}, expected at least two checkpoints")
        norm = torch.cat([torch.linalg.vector_norm(double(z), dim=1) for z in _read(before)])
    return change_by_norm(torch.stack(changes), norm, edges)


def _kept(chunks: Iterable[Tensor], file: IO[bytes]) -> Iterator[Tensor]:
    """The chunks, which are written to the file on the way; NumPy has no bfloat16."""
    for z in chunks:
        z = (z if z.dtype == torch.float64 else z.float()).cpu()
        np.save(file, z.numpy())
        yield z


def _read(file: IO[bytes]) -> Iterator[Tensor]:
    while True:
        try:
            yield torch.from_numpy(np.load(file))
        except EOFError:
            return
