"""The nearest rows of a bank by an approximate index of faiss, which is no dependency: it is there or asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import checks
from .numbers import at_least_float32

QUERIES = 1000  # rows of the bank that the recall is measured on
# The indices of banks, built when they are first asked for: no file holds one, and no copy of a detector.
_BUILT: Any = WeakTensorKeyDictionary()


def faiss() -> Any:
    """The module; UserError that says how to get it."""
    return checks.optional_import("probes: an approximate index", "faiss")


def _index(bank: Tensor) -> Any:
    """An inverted file of the bank (N, m): √N lists about the centres of k-means."""
    if bank not in _BUILT:
        rows, module = _rows(bank), faiss()
        index = module.IndexIVFFlat(module.IndexFlatL2(rows.shape[1]), rows.shape[1], max(1, round(len(rows) ** 0.5)))
        index.cp.min_points_per_centroid = 1  # of its warnings
        index.train(rows)
        index.add(rows)
        _BUILT[bank] = index
    return _BUILT[bank]


def _rows(z: Tensor) -> Any:
    return at_least_float32(z).detach().float().cpu().contiguous().numpy()


def search(queries: Tensor, bank: Tensor, k: int, probes: int) -> Tensor:
    """Squared distances (n, k) to the k nearest found in the `probes` lists nearest to each query, ascending; inf where
    these hold fewer."""
    parameters = faiss().SearchParametersIVF(nprobe=probes)
    squared, rows = (torch.from_numpy(found) for found in _index(bank).search(_rows(queries), k, params=parameters))
    return squared.masked_fill(rows < 0, torch.inf).to(queries)


def share_found(bank: Tensor, k: int, probes: int) -> float:
    """The share of the k nearest of rows of the bank, without themselves, that `search` finds."""
    step = max(1, len(bank) // QUERIES)
    own = torch.arange(0, len(bank), step, device=bank.device)[:QUERIES]
    queries = at_least_float32(bank[own])
    k = min(k, len(bank) - 1)
    if not k:
        return 1.0
    furthest = search(queries, bank, k + 1, len(bank))[:, -1:]  # of all lists
    found = search(queries, bank, k + 1, probes)
    hits = (found <= furthest).sum(dim=1) - 1  # but for themselves
    return float(hits.clamp(0, k).sum() / (len(own) * k))
