"""Triton kernels of ELogitNorm, LogitNorm, boundary distances, NCI and row statistics: ``ood_fast.kernels``.

Nothing is imported until a name is used: ``import ood_fast.kernels`` needs neither Triton nor a GPU. The functions
offered here are those of ``ood_fast.eager``, with the same arguments and results; ``ood_fast.ops`` chooses between
the two. Derivations, and the bytes and flops of every kernel, are in ``README.md`` beside this file.

Notation (the same in all code, docstrings and tests):

====== ==================== ============= ============================================================================
symbol name in code         shape         meaning
====== ==================== ============= ============================================================================
n,c,m  ``n_samples``,       ()            batch, classes, feature width
       ``n_classes``,
       ``n_features``
z      ``features``         (n, m)        penultimate features, what enters the last linear layer
W, b   ``head_weight``,     (c, m), (c,)  the last linear layer, the *head*
       ``head_bias``
f      ``logits``           (n, c)        z W^T + b; -inf marks a masked class, the others are *live*
y      ``target``           (n,), (n, c)  class indices (int64) or class probabilities (float)
w      ``class_weight``     (c,)          weight of each class in the loss
q, Q   ``q``,               (n, c), (n,)  target distribution after class weights and label smoothing, and its sum
       ``target_mass``
p      ``predicted``        (n,)          arg-max of f, first index on ties
g      ``gap``              (n, c)        f_p - f_j, never negative, 0 at j = p
s      ``squared_distance`` (k, c)        |w_p - w_j|^2
R      ``table``            (k, c)        1 / sqrt(s); 0 at j = p and where w_p = w_j: no boundary. k = min(n, c) rows,
                                          one for every class (n >= c) or one for every distinct prediction (n < c)
K      ``n_boundaries``     (n,)          number of live classes j with R_pj > 0
D      ``distance``         (n,)          mean distance to the boundaries of p: sum_j g_j R_pj / (K + average_offset)
T      ``temperature``      (n,)          what the logits are divided by: D (1 where D falls back), or tau (|f| + 1e-7)
P      ``probability``      (n, c)        softmax of f / T = exp(-g/T - log_partition)
-      ``slope``            (n,)          dL/dD / (K + average_offset), or dL/dT tau / |f| for LogitNorm
S      ``summed``           (k, c)        R^3 sum_i (sample_grad_i slope_i) (-g_i) over the samples i of a table row
mu     ``mean``             (m,)          mean of the training features (NCI)
====== ==================== ============= ============================================================================
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "elogitnorm_forward": "losses",
    "elogitnorm_ahead": "losses",
    "elogitnorm_finish": "losses",
    "steps_ahead": "losses",
    "counts": "losses",
    "elogitnorm_backward": "losses",
    "logitnorm_forward": "losses",
    "logitnorm_backward": "losses",
    "boundary_distance_forward": "boundary",
    "boundary_distance_backward": "boundary",
    "nci_forward": "nci",
    "nci_backward": "nci",
    "linear_elogitnorm": "linear",
    "row_statistics": "statistics",
    "distance_table": "statistics",
    "shard_affine": "linear",
    "shard_boundary_sums": "shards",
    "shard_distances": "shards",
    "shard_gradients": "shards",
    "shard_pull": "shards",
    "shard_softmax_sums": "shards",
    "launches": "launch",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
