"""Heads whose classes are spread over many processes: the loss and the scores follow them there.

Rank r of a `torch.distributed` process group holds a contiguous slice of the classes: rows of W, entries of b, columns
of the logits. Every function here is the one of the same name in `ood_fast`, on such slices, and equal to it: each rank
gets the value of the one loss and the gradient of that one loss for its own slice, as one process would. What travels
between the ranks is of size O(n) and O(n m) for n samples and m features, never O(n c); `communication_bytes` says how
much, `docs/scale.md` what that costs.

    loss = ood_fast.distributed.elogitnorm(logits_shard, W_shard, y, group=group)
    loss = ood_fast.distributed.linear_elogitnorm(z, W_shard, b_shard, y, group=group)    # no logits are stored

`ood_fast.ELogitNormLoss` comes here by itself where the head is a tensor-parallel `nn.Linear` (a DTensor `Shard(0)`).

Every rank of the group calls the same function with the same keywords, and calls backward with the same incoming
gradient. With `check` (the default) each call begins with one all-gather of 256 bytes a rank, by which every rank
raises the same error where any of them was called wrongly; a rank that is gone makes the others fail within the timeout
of the group.
"""

from .losses import elogitnorm, linear_elogitnorm
from .scores import boundary_distance, nci_score, row_statistics
from .shards import Shards, Traffic, communication_bytes

__all__ = ["Shards", "Traffic", "boundary_distance", "communication_bytes", "elogitnorm", "linear_elogitnorm"]
__all__ += ["nci_score", "row_statistics"]
