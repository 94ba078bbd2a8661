"""Heads that torch's own tensor parallelism has sharded over classes: a DTensor `Shard(0)` on a mesh of one dimension.

Such a head comes from ``parallelize_module(model, mesh["tp"], {"fc": ColwiseParallel(output_layouts=Shard(-1))})``,
alone or inside DDP or FSDP over the other dimension of the mesh.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


class LocalShards(NamedTuple):
    """What one rank holds of a call."""

    logits: Tensor  # (n, c_r)
    W: Tensor  # (c_r, m)
    y: Tensor
    mesh: DeviceMesh


def local_shards(logits: Tensor, W: Tensor, y: Tensor) -> LocalShards | None:
    """What `elogitnorm` takes, on each rank of the mesh of W; None where W is not the weight of such a head.

    The logits may be a DTensor of any placement, or the plain columns of this rank, which `ColwiseParallel` returns
    with ``use_local_output=True``. Plain logits of all classes mean another kind of sharding (FSDP's): None. y may be a
    DTensor, too.
    """
    if not isinstance(W, DTensor) or W.device_mesh.ndim != 1 or not W.placements[0].is_shard(0):
        return None
    own = W.to_local()
    if isinstance(logits, DTensor):
        if logits.device_mesh != W.device_mesh:
            return None
        logits = logits.redistribute(placements=[Shard(1)]).to_local()
    elif W.device_mesh.size() > 1 and (W.shape[0] == 1 or logits.dim() < 2 or logits.shape[1] != own.shape[0]):
        return None
    if isinstance(y, DTensor):
        y = y.redistribute(placements=[Shard(1) if y.is_floating_point() else Replicate()]).to_local()
    return LocalShards(logits, own, y, W.device_mesh)
