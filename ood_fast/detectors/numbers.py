"""Numbers of the scores: their precision, products of matrices, the k smallest, and rows that hold none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..eager.precision import compute_dtype, full_precision, has_float64, is_exporting, matmul

# A row may be too long for the sum of its squares in float32 from here on: (2e17)² · 8192 features.
TOO_LONG = 2e17
# Of targets without logits: what is beyond is no class index, and means of all below would not fit into memory.
MOST_CLASSES = 1 << 24


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values as float32: statistics and scores are computed in float32 or better."""
    return values.float() if values.dtype.itemsize < 4 else values


def widened(values: Tensor) -> Tensor:
    """In float64, of a device without in float32: the softmax of a confident model is exactly 1 in float32."""
    return values.double() if has_float64(values.device) else at_least_float32(values)


def exact_linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in float32 (float64 where any of them has it), whatever autocast says: scores are differences of large
    numbers, and reshaped features overflow float16. Fit for `torch.compile` and `torch.export`; differentiable."""
    dtype = compute_dtype(x, W, b)
    x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    exact: AbstractContextManager[Any]
    if is_exporting():  # the graph keeps no autocast of its own
        exact = nullcontext()
    elif torch.compiler.is_compiling():  # the compiler cannot trace the other precision settings
        exact = torch.autocast(x.device.type, enabled=False)
    elif x.requires_grad:
        exact = full_precision(x.device)
    else:  # takes half the time of F.linear on some CPUs, and is not differentiable
        with full_precision(x.device):
            result = matmul(x, W.t())
        return result if b is None else result.add_(b)
    with exact:
        return F.linear(x, W, b)


def k_smallest(values: Tensor, k: int) -> Tensor:
    """(n, k): the k smallest of each row of `values` (n, c), in any order. ``values.topk(k, 1, False, False).values``.

    On the CPU by NumPy, whose partition takes a quarter of topk's time at c = 1000, k = 100.
    """
    plain = values.device.type == "cpu" and not values.requires_grad and not torch.compiler.is_compiling()
    if not plain or type(values) is not Tensor or k >= values.shape[1]:
        return values.topk(min(k, values.shape[1]), dim=1, largest=False, sorted=False).values
    return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, :k])


def nan_where_too_long(values: Tensor, lengths: Tensor) -> Tensor:
    """`values` (n,), NaN where the length (n,) of the row that they were made with is inf: they would be wrong."""
    return values.masked_fill(lengths.isinf(), torch.nan)


def check_features(features: Any) -> None:
    """Floating point, (n, m), m >= 1."""
    checks.float_tensor("features", features, 2, "(n, m)")
    if features.shape[1] == 0:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected at least one feature")


def check_targets(targets: Tensor, n_classes: int | None) -> None:
    """ValueError for a class index outside [0, n_classes); where that is not known, for what can be none."""
    bound = MOST_CLASSES if n_classes is None else n_classes
    outside = (targets < 0) | (targets >= bound)
    if outside.any():
        row = int(outside.int().argmax())
        text = f"targets: got {int(targets[row])} in {checks.ROW}, expected class indices in [0, {bound})"
        raise checks.RowError(text, row)


def refuse_one_logit(logits: Tensor) -> None:
    """ValueError for logits (n, 1), of which every softmax is 1 and every distance between classes 0."""
    if logits.shape[1] == 1:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, one logit a row, expected (n, c) of two classes or more: the "
            "softmax of one is 1 whatever the input. For a binary classifier with the logit f give two, [0, f]: a head "
            "with a row of zeros, W = [0, w], b = [0, b]"
        )


def refuse_short(extent: Tensor) -> None:
    """ValueError for features that are not 0 and all so short that their squares are below the dtype; `extent` (3,):
    the largest length of a row, the largest size of a number and the largest one below 0, its sign turned."""
    longest, largest, _ = extent.tolist()
    shortest = torch.finfo(extent.dtype).tiny ** 0.5 / torch.finfo(extent.dtype).eps
    if longest < shortest and largest > 0:
        raise ValueError(
            f"features: got rows of length {longest:.1e} at most, expected some of {shortest:.0e} or more, whose "
            "squares are numbers; scale them"
        )


def refuse_rows(argument: str, values: Tensor, of_rows: Tensor | None = None) -> None:
    """ValueError naming the first row of `values` with NaN or, if none has, with the infinities that made NaN of it, or
    the numbers whose squares are beyond float32; `of_rows` (n,) is NaN where a row holds such, None: by its length.

    One word from the device; the rows are looked at only where something is wrong.
    """
    of_rows = 0 * torch.linalg.vector_norm(at_least_float32(values), dim=1) if of_rows is None else of_rows
    suspect = of_rows.isnan()
    if suspect.any():
        found, rows = "NaN", values.isnan().any(dim=1)
        if not rows.any():
            found, rows = "inf", suspect & values.isinf().any(dim=1)
        if not rows.any():
            found, rows = f"numbers beyond {TOO_LONG:.1e}", suspect & (values.abs().amax(dim=1) > TOO_LONG)
        rows = rows.nonzero()
        if len(rows):
            raise checks.RowError(
                f"{argument}: got {found} in {len(rows)} of {len(values)} rows, the first is {checks.ROW}, "
                "expected numbers; look at that input, and at the model in reduced precision",
                int(rows[0]),
            )


def first_largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``values.topk(k, dim=1)``, of equal ones the first: topk takes any, another one on another machine."""
    if is_exporting():  # ONNX has no stable sort; its TopK takes the first
        return values.topk(k, dim=1)
    ordered, columns = values.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], columns[:, :k]
