"""The k largest or smallest of each row, in any order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def k_smallest(values: Tensor, k: int) -> Tensor:
    """(n, k): the k smallest of each row of `values` (n, c), in any order. ``values.topk(k, 1, False, False).values``.

    On the CPU by NumPy, whose partition takes a quarter of topk's time at c = 1000, k = 100.
    """
    plain = values.device.type == "cpu" and not values.requires_grad and not torch.compiler.is_compiling()
    if not plain or type(values) is not Tensor or k >= values.shape[1]:
        return values.topk(min(k, values.shape[1]), dim=1, largest=False, sorted=False).values
    return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, :k])
