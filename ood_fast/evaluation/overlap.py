"""Images in two roles of an evaluation, known by what the model makes of them: whatever files they lie in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import checks
from .cache import Outputs

MOST, SAMPLED = 50_000, 256  # rows of a set that are looked at, and of those how many are looked for in another
FEWEST, SHARE = 8, 0.1  # that tell: distinct rows, and the share of them that the other set has
ROUNDING = 2e-5  # of a row's length: what another batch may change


def shared_images(outputs: Mapping[str, Outputs]) -> list[str]:
    """Warns of each two sets with the same images, and gives the sentences: what is fitted on cannot test, and what is
    both in- and out-of-distribution scores an AUROC of 50 %."""
    keys, told = {name: _keys(part) for name, part in outputs.items()}, []
    for one, other in itertools.combinations(keys, 2):
        share, of, there = max((_share(keys[a], keys[b]), a, b) for a, b in ((one, other), (other, one)))
        if share >= SHARE:
            told.append(f"{of}: {100 * share:.0f} % of its images are among those of {there}, expected other data")
            checks.warn_caller(told[-1])
    return told


def _keys(part: Outputs) -> Tensor:
    """A few projections of each row, and its length, (n, 5)."""
    found, n_rows = [], 0
    for features, logits, _ in part.chunks():
        rows = features if logits is None else torch.cat([features, logits], dim=1)
        waves = torch.arange(1, 1 + rows.shape[1], device=rows.device, dtype=rows.dtype)[:, None]
        waves = (waves * torch.arange(1, 5, device=rows.device).sqrt()).cos()
        found.append(torch.cat([rows @ waves, torch.linalg.vector_norm(rows, dim=1, keepdim=True)], dim=1).cpu())
        n_rows += len(rows)
        if n_rows >= MOST:
            break
    return torch.cat(found)[:MOST]


def _share(one: Tensor, other: Tensor) -> float:
    """Of rows of `one` that differ from each other, the share that `other` has."""
    sample = one[torch.linspace(0, len(one) - 1, min(SAMPLED, len(one))).long()]
    sample = sample[sample.isfinite().all(dim=1)]
    allowed = ROUNDING * sample[:, -1]
    apart = torch.cdist(sample, sample, p=torch.inf).fill_diagonal_(torch.inf)
    distinct = apart.amin(dim=1) > 4 * allowed if len(sample) else allowed.bool()
    if distinct.sum() < FEWEST:
        return 0.0
    nearest = torch.cdist(sample[distinct], other.nan_to_num(nan=torch.inf), p=torch.inf).amin(dim=1)
    return float((nearest <= allowed[distinct]).double().mean())
