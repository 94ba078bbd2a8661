"""What the calls from a loss to its kernel carry together: one set of records for both backends.

The notation is that of `ood_fast.kernels`. Registered operators have flat schemas, which `ops` alone packs and unpacks:
the fields of `Tempered` and `Geometry` stand in the order in which operators return them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Labels(NamedTuple):
    """What the target distribution q is made of, as in `torch.nn.functional.cross_entropy`."""

    target: Tensor  # y: class indices, int64 (n,), or class probabilities, float (n, c)
    class_weight: Tensor | None  # (c,)
    ignore_index: int
    label_smoothing: float


class Tempered(NamedTuple):
    """What the forward pass of a softmax with a temperature for each sample leaves for the backward pass; all (n,)."""

    predicted: Tensor  # p, int64
    temperature: Tensor
    log_partition: Tensor  # log sum_j exp(-g_j / T)
    slope: Tensor  # dL/dD / (K + average_offset), or dL/dT tau / ||f|| for LogitNorm; 0 where T is a constant


class Geometry(NamedTuple):
    """R, the inverse distances between rows of W, and which row of it each sample needs; k = min(n, c)."""

    table_row: Tensor  # (n,) int64
    table: Tensor  # (k, c): 1 / ||w_p - w_j||; 0 at j = p and where the two coincide
    row_class: Tensor  # (k,) int64: the class p of each row of the table, -1 behind the last one in use


class Shard(NamedTuple):
    """What one process among many keeps of a batch; vectors (n,) are over the classes of all of them."""

    geometry: Geometry  # of u rows against the classes here; `row_class`: p less the number of the first of these
    place: Tensor  # (n,) int64: p among the classes here, -1 where another process has it
    top: Tensor  # f_p
    inverse_sum: Tensor  # sum_j R_j over the live classes
    n_live: Tensor
    left: Tensor  # (u, m): w_p of the u predicted classes
    origin: Tensor | None  # of the kernels, as is the next: what `kernels.distances.Kept` has
    flags: Tensor | None


class Needs(NamedTuple):
    """Of which inputs the gradient is asked for; the others get None."""

    logits: bool = False
    features: bool = False
    weight: bool = False
    bias: bool = False
    mean: bool = False
    geometry: bool = True
    """whether the gradient of W includes what comes through ||w_p - w_j|| (the form without logits)"""


class Projected(NamedTuple):
    """What the forward pass of the NCI score leaves for the backward pass; all (n,)."""

    predicted: Tensor  # p, int64
    projection: Tensor  # w_p.(z - mu) / ||z - mu||
    inverse_norm: Tensor  # 1 / ||z - mu||; 0 at z = mu


class Inputs(NamedTuple):
    """What row statistics are made of; None where none of those asked for needs it."""

    logits: Tensor | None
    features: Tensor | None
    head_weight: Tensor | None
    mean: Tensor | None
    table: Tensor | None  # R of all pairs of classes, (c, c)
