"""Which rank holds which classes, how the ranks agree on that, and the collectives that they talk by.

Every collective of the package's class-parallel functions is a method of `Shards`, and `communication_bytes` has a line
for each of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks

# int64 numbers by which the ranks compare how they were called: always as many, so that even calls of two different
# functions meet in one collective. Four are values (see `_Slot`), the others check sums of one argument each.
SIGNATURE_NUMBERS = 32
# Bytes of what each rank says for the error message once the signatures differ.
_TEXT_BYTES = 512
SAMPLES = ("replicated", "sharded")
# What is raised everywhere is one of these, whatever subclass it was where it was found.
_ERRORS = {kind.__name__: kind for kind in (TypeError, ValueError, IndexError, RuntimeError)}


class _Slot:
    FAILED, CLASSES, SAMPLES, CLASS_WEIGHTS, FACTS = range(5)


class Call(NamedTuple):
    """What the arguments of one rank say: numbers that may differ from rank to rank, and facts that may not."""

    n_classes: int  # of this rank
    n_samples: int  # of this rank
    n_class_weights: int  # -1 without
    facts: dict[str, object]


class Shards:
    """A process group and the number of classes that each of its ranks holds, in order.

    Args:
        group: a process group, or a one-dimensional `DeviceMesh`; None: the default group.
        counts: classes of rank 0, 1, ...; 0 is allowed.
    """

    def __init__(self, group: object, counts: Sequence[int]) -> None:
        self.group = process_group(group)
        self.counts = tuple(int(count) for count in counts)
        self.rank = dist.get_rank(self.group)
        self.n_ranks = dist.get_world_size(self.group)
        if len(self.counts) != self.n_ranks or min(self.counts) < 0:
            raise ValueError(
                f"shards: got {self.counts}, expected a number of classes >= 0 for each of the {self.n_ranks} ranks"
            )
        self.n_classes = sum(self.counts)
        # A rank without classes is given a masked one (`rows.masked_class`): its number is nobody's.
        self.start = sum(self.counts[: self.rank]) if self.counts[self.rank] else self.n_classes

    @property
    def own(self) -> slice:
        """The classes of this rank."""
        return slice(self.start, self.start + self.counts[self.rank])

    def locate(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """(which of the classes this rank holds, their place in its shard; 0 for those of other ranks)."""
        mine = (classes >= self.own.start) & (classes < self.own.stop)
        return mine, (classes - self.start).masked_fill(~mine, 0)

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """All-reduce in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def min(self, tensor: Tensor) -> Tensor:
        """All-reduce in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.group)
        return tensor

    def gather(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of every rank, in order; rank r gives counts[r] of them."""
        return _gather(tensor, counts, self.group)

    def scatter_sum(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """The inverse: the sum over the ranks of `tensor`, of which rank r keeps its counts[r] rows."""
        longest = max(counts)
        if any(count != longest for count in counts):
            padded = tensor.new_zeros(len(counts) * longest, *tensor.shape[1:])
            start = 0
            for rank, count in enumerate(counts):
                padded[rank * longest : rank * longest + count] = tensor[start : start + count]
                start += count
            tensor = padded
        own = tensor.new_empty(longest, *tensor.shape[1:])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, tensor.contiguous(), group=self.group)
        return own[: counts[self.rank]]


def _gather(tensor: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    longest = max(counts)
    if tensor.shape[0] != longest:
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        tensor = padded
    every = tensor.new_empty(len(counts) * longest, *tensor.shape[1:])
    # Its name in newer torch, which warns of the old one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(every, tensor.contiguous(), group=group)
    if all(count == longest for count in counts):
        return every
    return torch.cat([part[:count] for part, count in zip(every.split(longest), counts, strict=True)])


def process_group(group: Any) -> dist.ProcessGroup:
    """The process group that `group` means; ValueError where this process has none or is not part of it."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialised; call torch.distributed.init_process_group first")
    if group is None:
        group = dist.group.WORLD
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            raise ValueError(f"group: got a mesh of {group.ndim} dimensions, expected one: mesh['tp'], say")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"group: got {group!r}, expected a process group or mesh that this process is part of")
    return group


# ----------------------------------------------------------------------------------------------------------------------
# Agreement
# ----------------------------------------------------------------------------------------------------------------------


def agree(
    group: object, examine: Callable[[], Call], tensor: object, shards: Sequence[int] | None, check: bool
) -> tuple[Shards, tuple[int, ...], bool]:
    """(the shards, the number of samples of each rank, whether the class weights given are those of all classes).

    `examine` checks what one rank can see of its own arguments. With `check` every rank tells the others what it found,
    and what is wrong anywhere is raised everywhere, in the same words; without, only here, and `shards` is trusted.
    `tensor` says on which device to talk.
    """
    group = process_group(group)
    if not check:
        if shards is None:
            raise ValueError("shards: got None with check=False, expected the number of classes of each rank")
        call = examine()
        layout = Shards(group, shards)
        if call.n_classes != layout.counts[layout.rank]:
            raise ValueError(f"shards: got {layout.counts}, but rank {layout.rank} holds {call.n_classes} classes")
        n_ranks = layout.n_ranks
        is_full = _check_class_weights([call.n_class_weights] * n_ranks, [call.n_classes] * n_ranks, layout.n_classes)
        return layout, (call.n_samples,) * n_ranks, is_full

    error, call = None, Call(0, 0, -1, {})
    try:
        call = examine()
        call.facts["shards"] = None if shards is None else tuple(int(count) for count in shards)
    except Exception as problem:  # of whatever kind: the other ranks wait for this one
        error = problem
    numbers = [int(error is not None), call.n_classes, call.n_samples, call.n_class_weights]
    numbers += [zlib.crc32(str(fact).encode()) for fact in call.facts.values()]
    numbers += [0] * (SIGNATURE_NUMBERS - len(numbers))
    n_ranks = dist.get_world_size(group)
    device = meeting_place(group, tensor)
    every = _gather(torch.tensor([numbers], device=device), [1] * n_ranks, group).tolist()
    column = list(zip(*every, strict=True))

    if any(column[_Slot.FAILED]):
        kind = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "RuntimeError")
        texts = _gather_texts(f"{kind}: {error}", n_ranks, device, group)
        rank = column[_Slot.FAILED].index(1)
        kind, _, message = texts[rank].partition(": ")
        raise _ERRORS[kind](f"rank {rank}: {message}") from error
    for name, found in zip(call.facts, column[_Slot.FACTS :], strict=False):
        if len(set(found)) > 1:
            texts = _gather_texts(str(call.facts[name]), n_ranks, device, group)
            raise ValueError(f"{name}: got {_by_rank(texts)}, expected the same on every rank")
    counts = column[_Slot.CLASSES]
    if shards is not None and tuple(shards) != counts:
        raise ValueError(f"shards: got {tuple(shards)}, but the ranks hold {counts} classes")
    if sum(counts) == 0:
        raise ValueError("W_shard: no rank holds a class, expected at least one class")
    is_full = _check_class_weights(column[_Slot.CLASS_WEIGHTS], counts, sum(counts))
    return Shards(group, counts), column[_Slot.SAMPLES], is_full


def _check_class_weights(found: Sequence[int], counts: Sequence[int], n_classes: int) -> bool:
    """Whether every rank gave the weights of all classes; ValueError unless all did, or each those of its own."""
    if all(length == count for length, count in zip(found, counts, strict=True)) or set(found) == {-1}:
        return False
    if set(found) == {n_classes}:
        return True
    raise ValueError(
        f"weight: got {_by_rank([f'shape ({length},)' if length >= 0 else 'None' for length in found])}, expected "
        f"({n_classes},), one factor for each class, or the part of it that fits each rank's classes {tuple(counts)}"
    )


def _by_rank(texts: Iterable[str]) -> str:
    """ "0.0 on rank 0, 0.1 on ranks 1, 2"."""
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(str(rank))
    return ", ".join(f"{text} on rank{'s' * (len(where) > 1)} {', '.join(where)}" for text, where in ranks.items())


def _gather_texts(text: str, n_ranks: int, device: torch.device, group: dist.ProcessGroup) -> list[str]:
    content = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    every = _gather(torch.tensor([list(content)], dtype=torch.uint8, device=device), [1] * n_ranks, group)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in every.tolist()]


def meeting_place(group: dist.ProcessGroup | None, tensor: object) -> torch.device:
    """A device that every rank of the group can talk on, whatever its arguments are."""
    if "cpu:" in dist.get_backend_config(group):  # gloo, alone or beside nccl
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if isinstance(tensor, Tensor) and (accelerator is None or tensor.device.type == accelerator.type):
        return tensor.device
    return accelerator or torch.device("cpu")


def fingerprint(y: Tensor) -> int:
    """A check sum of integers that depends on their order."""
    places = torch.arange(1, y.numel() + 1, device=y.device)
    return int((y.flatten() * (places * 0x9E3779B1 + 1)).sum())


# ----------------------------------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes that the collectives of one step move, by ring algorithms."""

    per_rank: float
    """sent by each rank, which receives as many"""
    total: int
    """sent by all ranks together: what goes over the wires"""


def communication_bytes(
    n: int,
    m: int,
    ranks: int,
    *,
    without_logits: bool = False,
    samples: str = "replicated",
    n_predicted: int | None = None,
    itemsize: int = 4,
    feature_itemsize: int = 4,
    weighted_mean: bool = False,
    backward: bool = True,
    detach_geometry: bool = False,
    check: bool = True,
) -> Traffic:
    """What one call of `elogitnorm`, or of `linear_elogitnorm` (`without_logits`), and its backward pass send.

    With S the bytes of a tensor and R ranks, ring algorithms send in total 2 (R - 1) S for an all-reduce,
    R (R - 1) S for an all-gather of S from each rank, and (R - 1) S for a reduce-scatter of S. The number of classes
    appears nowhere.

    Args:
        n, m, ranks: samples of the whole batch, features, ranks of the group.
        samples: as in `linear_elogitnorm`; "sharded" assumes as many samples on each rank.
        n_predicted: u, the number of distinct predicted classes (with `without_logits` their sum over the chunks of
            rows); n where None, which is the most that it can be.
        itemsize: of the arithmetic: 4, or 8 for float64 inputs. feature_itemsize: of z, for samples="sharded".
        weighted_mean: whether class weights and reduction "mean" are given with class indices.
        backward: whether the gradients are computed: those of W, and of z with `without_logits`.
        detach_geometry, check: as in the functions.
    """
    checks.one_of("samples", samples, SAMPLES)
    n_predicted = n if n_predicted is None else n_predicted
    geometry = backward and not detach_geometry
    reduced = [
        2 * 8 * n,  # the largest logit, and the first class that has it
        n_predicted * m * itemsize,  # the rows of the predicted classes
        4 * n * itemsize,  # sums over the boundaries
        5 * n * itemsize,  # sums over the softmax
        itemsize if weighted_mean else 0,
        n_predicted * m * itemsize if geometry else 0,  # what all classes pull at those rows
    ]
    gathered = [8 * SIGNATURE_NUMBERS if check else 0]
    scattered = 0
    if samples == "sharded":
        per_rank = -(-n // ranks)
        gathered += [per_rank * m * feature_itemsize, per_rank * 8]
        scattered = ranks * per_rank * m * itemsize if backward else 0
    elif without_logits and backward:
        reduced.append(n * m * itemsize)  # the gradient of z
    total = (ranks - 1) * (2 * sum(reduced) + ranks * sum(gathered) + scattered)
    return Traffic(total / ranks, total)
