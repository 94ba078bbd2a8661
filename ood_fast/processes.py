"""The processes of torch.distributed that share a piece of work: which one this is, its share, what all of them say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of the default group; alone without one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """Those that are there now."""
        there = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if there else cls()

    @property
    def group(self) -> Any:
        """The default group; None alone. Asked for each time: a group that nobody holds ends its threads."""
        return None if self.size == 1 else dist.group.WORLD

    def share(self, n: int) -> range:
        """The samples of this process: a contiguous part, none twice, none left out."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def everyone(self, value: Any) -> list[Any]:
        """What each process gives, in the order of the ranks; all wait for each other."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """What the first process gives."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def reduced(self, tensor: Tensor, by: str = "SUM") -> Tensor:
        """The sum over the processes, or their "MIN" or "MAX"."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, getattr(dist.ReduceOp, by))
        return tensor
