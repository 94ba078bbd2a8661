"""Row statistics in plain PyTorch: the path of CPUs, of devices without Triton, of float64, and of exported graphs.

Rows are worked in chunks that stay in cache, the gaps g_j = f_p - f_j carry the computation, and each exponential is
taken once, as everywhere here. Time goes by the passes over a chunk, so every function is chosen for PyTorch's
vectorised form of it: `exp2` and not `exp`, `abs().sum()` and not `vector_norm(ord=1)`, no `argmax`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..records import Inputs
from .precision import compute_dtype, has_float64, is_exporting, keep_tensors

_LOG2_E = 1 / math.log(2)


# Elements of a chunk: a pass over it takes some fifty microseconds, ten times what it costs to start the threads, and
# three float32 temporaries (6 MiB) stay in the last cache. Smaller chunks, in each core's own cache, are slower.
CHUNK_ELEMENTS = 1 << 19

_OF_SOFTMAX = {"logsumexp", "confidence", "entropy", "gen"}
SUM_OF_BAG = 0  # the mode of `embedding_bag`, as its operators number them


def row_statistics(
    names: list[str], inputs: Inputs, gamma: float, *, boundaries: Tensor | None = None, traced: bool = False
) -> list[Tensor]:
    """The statistics `names`, each (n,), in that order; `ood_fast.statistics.row_statistics` defines them.

    `boundaries` (c,): how many boundaries each class has in the table, where that is known. `traced`: nothing but what
    a compiled or exported graph can hold: no chunks and no look at the values; D may come from W instead of the table.
    """
    dtype = compute_dtype(*inputs)
    wanted = set(names)
    found: dict[str, Tensor] = {}
    if inputs.logits is not None:
        found = _by_chunks(
            lambda f: _LogitStatistics(wanted, f.to(dtype), inputs, traced).found(boundaries, gamma),
            traced,
            inputs.logits,
        )
    if inputs.features is not None:
        of_logits = [found["max"], found["predicted"]] if "projection" in wanted else []
        found |= _by_chunks(
            lambda z, *p: _feature_statistics(wanted, z.to(dtype), inputs.head_weight, inputs.mean, traced, *p),
            traced,
            *(inputs.features, *of_logits),
        )
    return [found[name] for name in names]


def _by_chunks(function: Callable[..., dict[str, Tensor]], traced: bool, *tensors: Tensor) -> dict[str, Tensor]:
    """function(*tensors), a chunk of rows at a time."""
    n_samples, width = tensors[0].shape
    if traced or n_samples * width <= CHUNK_ELEMENTS:
        return function(*tensors)
    step = max(1, CHUNK_ELEMENTS // width)
    chunks = [function(*rows) for rows in zip(*(t.split(step) for t in tensors), strict=True)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


class _LogitStatistics:
    """With e_j = exp(-g_j), rest = sum_{j != p} e_j and Z = 1 + rest:

        logsumexp = f_p + log Z      confidence = 1 / Z
        entropy = log Z + sum_j e_j g_j / Z      gen = sum_j (e_j (1 - e_j/Z) / Z)^gamma

    A masked class has g = inf, e = 0 and adds nothing. A row with NaN or +inf, or without a live class, has g_p = NaN.
    """

    def __init__(self, names: set[str], logits: Tensor, inputs: Inputs, traced: bool) -> None:
        self.names, self.logits, self.inputs, self.traced = names, logits, inputs, traced
        # Where a look at the numbers is free, and nothing is fused.
        self.by_hand = not traced and logits.device.type == "cpu"
        self.known: dict[str, Tensor] = {}
        if names - {"logit_norm1", "logit_norm2"}:
            top = logits.amax(1, keepdim=True)
            if traced and is_exporting():  # ONNX leaves open what the maximum makes of NaN, and onnxruntime drops it
                top = top.masked_fill(logits.isnan().any(1, keepdim=True), math.nan)
            self.top, self.known["max"] = top, top.squeeze(1)
        if names & {"predicted", "distance", "projection"}:
            self.predicted = self.known["predicted"] = logits.argmax(1) if traced else _first_equal(logits, self.top)
        self.column = self.predicted.unsqueeze(1) if "predicted" in self.known and self.by_hand else None
        if names & {"distance", *_OF_SOFTMAX}:
            self.gap = self.top - logits

    def found(self, boundaries: Tensor | None, gamma: float) -> dict[str, Tensor]:
        """Those of the names, and perhaps others that they needed."""
        found = self.known
        if self.names & _OF_SOFTMAX:
            found |= self.of_softmax(gamma)
        if "distance" in self.names:
            found["distance"] = self.distance(boundaries)
        if self.names & {"logit_norm1", "logit_norm2"}:
            live = self.logits.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)
            if "logit_norm2" in self.names:
                found["logit_norm2"] = torch.linalg.vector_norm(live, dim=1)
            if "logit_norm1" in self.names:
                found["logit_norm1"] = live.abs_().sum(1)
        return found

    def of_softmax(self, gamma: float) -> dict[str, Tensor]:
        """logsumexp, confidence, entropy and gen."""
        gap, column = self.gap, self.column
        exponential = exp_of_minus(gap)
        if not self.names & {"entropy", "gen"}:
            partition = exponential.sum(1)
            found = {"confidence": partition.reciprocal()} if "confidence" in self.names else {}
            if "logsumexp" in self.names:
                found["logsumexp"] = self.top.squeeze(1) + partition.log()
            return found
        # With the column e_p becomes g_p: 0, or NaN without softmax. Later it is a factor of g_p, or overwritten.
        if column is None:
            rest = softmax_rest(exponential)
        else:
            rest = exponential.scatter_(1, column, self.top - self.top).sum(1)
        log_partition, inverse = rest.log1p(), (rest + 1).reciprocal()
        found = {"logsumexp": self.top.squeeze(1) + log_partition, "confidence": inverse}
        if "entropy" in self.names:
            weighted = row_dots(gap, exponential) if self.by_hand else None
            if weighted is None or not _finite(weighted):  # a masked class, of infinite gap, made NaN of 0 * inf
                weighted = (gap.clamp(max=torch.finfo(gap.dtype).max) * exponential).sum(1)
            found["entropy"] = torch.addcmul(log_partition, weighted, inverse)
        if "gen" in self.names:
            # Logarithms of 1 - e/Z; for the prediction that is rest/Z with all its digits.
            of_prediction = (rest * inverse).unsqueeze(1)
            if column is None:  # (lerp would do it in three times the time)
                others = (1 - exponential).addcmul_(exponential, of_prediction).log2_()
                terms = others.sub_(gap, alpha=_LOG2_E).mul_(gamma).exp2_()
            else:  # log1p takes two thirds of the time of log2
                others = exponential.mul_(-inverse.unsqueeze(1)).log1p_().scatter_(1, column, of_prediction.log())
                terms = others.sub_(gap).mul_(gamma * _LOG2_E).exp2_()
            found["gen"] = terms.sum(1) * inverse.pow(gamma)
        return found

    def distance(self, boundaries: Tensor | None) -> Tensor:
        """D; `boundaries` (c,) counts those of each class."""
        gap, table = self.gap, self.inputs.table
        if self.by_hand and table is not None:
            distance = _mean_over_boundaries(gap, table, boundaries, self.predicted)
            if _finite(distance):
                return distance
        # A masked class, which is no boundary; a class that has none.
        masked = gap == math.inf
        rows = _inverse_rows(self.inputs.head_weight, table, self.predicted, gap.dtype).masked_fill(masked, 0.0)
        return (gap.masked_fill(masked, 0.0) * rows).sum(1) / rows.sign().sum(1).clamp(min=1)


def _feature_statistics(
    names: set[str],
    features: Tensor,
    head_weight: Tensor | None,
    mean: Tensor | None,
    traced: bool,
    *of_logits: Tensor,
) -> dict[str, Tensor]:
    found = {}
    if "norm2" in names:
        found["norm2"] = torch.linalg.vector_norm(features, dim=1)
    centred = None
    if mean is not None:
        centred = features - mean.to(features.dtype)
    if centred is not None and "centred_norm" in names:
        found["centred_norm"] = torch.linalg.vector_norm(centred, dim=1)
    if centred is not None and head_weight is not None and "projection" in names:
        top, predicted = of_logits
        projection = row_dots(centred, head_weight, predicted, traced)
        # The prediction of a row of logits with NaN means nothing.
        found["projection"] = projection.masked_fill_(top.isnan(), math.nan)
    centred = None  # its memory is in the cache: that of the absolute values
    if "norm1" in names:
        found["norm1"] = features.abs().sum(1)  # vector_norm(ord=1) takes seven times as long
    return found


def _first_equal(logits: Tensor, top: Tensor) -> Tensor:
    """argmax where the maximum `top` (n, 1) is known; of a row with NaN, some class.

    On the CPU three vectorised passes take a third of the time of argmax, which is scalar there. With c - 1 added to
    all but those of the maximum, the first class is the smallest of the places. float32 holds them exactly up to 2^24.
    """
    n_classes = logits.shape[1]
    if logits.device.type != "cpu" or n_classes > 1 << 23:
        return logits.argmax(1)
    place = torch.ne(logits, top, out=torch.empty_like(logits))
    torch.add(_each(n_classes, place.dtype), place, alpha=n_classes - 1, out=place)
    return place.amin(1).long()


def exp_of_minus(gap: Tensor) -> Tensor:
    """exp(-gap), fresh. PyTorch's exp2 on the CPU takes a third of the time of its exp."""
    return (gap * -_LOG2_E).exp2_()


def softmax_rest(exponential: Tensor) -> Tensor:
    """rest = sum_{j != p} e_j, (n,), where the prediction, of e_p = 1, is not known: 1 - P_p = rest / (1 + rest).

    It loses its digits as the prediction becomes certain if it is taken from Z.
    """
    # frac leaves out what is exactly 1: the prediction, and what ties with it; but with a tie rest >= 1.
    partition = exponential.sum(1)
    return torch.where(partition < 1.5, exponential.frac().sum(1), partition - 1)


def _inverse_rows(head_weight: Tensor | None, table: Tensor | None, predicted: Tensor, dtype: torch.dtype) -> Tensor:
    """R_p of each sample, (n, c)."""
    if table is not None:
        return table.index_select(0, predicted).to(dtype)
    assert head_weight is not None  # one of the two is given
    # A graph cannot look at close pairs again, ONNX has no `cdist`, and differences would be (n, c, m): products in
    # float64 of rows less their mean have the digits.
    weight = head_weight.to(torch.float64 if has_float64(head_weight.device) else dtype)
    weight = weight - weight.mean(0)
    norms = weight.square().sum(1)
    sizes = norms.index_select(0, predicted).unsqueeze(1) + norms
    squared = sizes - 2 * torch.mm(weight.index_select(0, predicted), weight.t())
    coincident = squared <= weight.shape[1] * torch.finfo(weight.dtype).eps * sizes
    return squared.masked_fill(coincident, math.inf).rsqrt().to(dtype)


def _mean_over_boundaries(gap: Tensor, table: Tensor, boundaries: Tensor | None, predicted: Tensor) -> Tensor:
    """D, if no class is masked; 0/0 for a class without boundaries."""
    if boundaries is None:
        counted = table.index_select(0, predicted).sign_().sum(1, dtype=gap.dtype)
    else:
        counted = boundaries.index_select(0, predicted)
    return row_dots(gap, table, predicted) / counted


def _finite(values: Tensor) -> bool:
    """Whether all are; False also where only their sum overflows."""
    return math.isfinite(values.sum().item())


@keep_tensors(maxsize=8)
def _each(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(n, dtype=dtype, device="cpu")


@functools.cache
def _bag_gradient() -> Callable[..., Tensor] | None:
    from ..ops.registration import BAG_WEIGHTS_GRADIENT  # importing it makes `ops`, which is made of this

    return BAG_WEIGHTS_GRADIENT


def row_dots(left: Tensor, right: Tensor, rows: Tensor | None = None, traced: bool = False) -> Tensor:
    """(left * right[rows]).sum(1), (n,); all rows in order where `rows` (n,) is None.

    PyTorch has no public function that does it in one pass. The gradient of `embedding_bag` with respect to the weights
    of its samples is just this: one product of the BLAS a row, which writes and gathers nothing.
    """
    supported = left.device.type == "cpu" and right.dtype == left.dtype in (torch.float32, torch.float64)
    bag_gradient = None if traced or not supported else _bag_gradient()
    if bag_gradient is None:
        return (left * (right if rows is None else right.index_select(0, rows))).sum(1)
    each = _each(len(left))
    return bag_gradient(left, right, each if rows is None else rows, each, each, SUM_OF_BAG)
