"""What the loss costs beside the head that it belongs to, on the CPU: ratios within one run, and peak memory.

    python -m bench.ratios                 # every table, about two minutes on two cores
    python -m bench.ratios dense small     # some of them

Times are medians of rounds in which the candidates take turns, so that what else the machine does meets all of them.
Peak memory is what a step takes beyond its inputs and the gradients returned, measured as in `pytest bench/`.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ood_fast
from ood_fast.eager.precision import matmul

from .measure import environment, peak_megabytes

DENSE = ((256, 1000, 2048), (64, 21841, 768))
SMALL = ((128, 10, 512), (128, 100, 512))
LINEAR = (512, 100_000, 512)


def alternate(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds a call of each candidate, measured in turns for about `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def leaves(shape: tuple[int, int, int], distinct: int | None = None) -> tuple[torch.Tensor, ...]:
    """z, W, b, logits as leaves, and y; `distinct` sets the number of distinct predictions."""
    n, c, m = shape
    torch.manual_seed(0)
    z, W, b = torch.randn(n, m), torch.randn(c, m) / m**0.5, torch.zeros(c)
    logits = F.linear(z, W, b)
    if distinct is not None:
        rows = torch.arange(n)
        logits[rows, rows % distinct] = logits.max() + 1
    return *(t.requires_grad_() for t in (z, W, b, logits)), torch.randint(0, c, (n,))


def steps(shape: tuple[int, int, int], distinct: int | None) -> dict[str, Callable[[], object]]:
    """Forward and backward of each loss for given logits, and of the head that makes them."""
    z, W, b, logits, y = leaves(shape, distinct)
    upstream = torch.randn_like(logits)
    return {
        "cross-entropy": lambda: torch.autograd.grad(F.cross_entropy(logits, y), logits),
        "elogitnorm": lambda: torch.autograd.grad(ood_fast.elogitnorm(logits, z, W, b, y), (logits, W)),
        "detached": lambda: torch.autograd.grad(ood_fast.elogitnorm(logits, z, W, b, y, detach_geometry=True), logits),
        "head": lambda: torch.autograd.grad(F.linear(z, W, b), (z, W, b), upstream),
    }


class Floor(torch.autograd.Function):
    """A part of the loss, in an autograd function of Python: what is left to hope for when all the rest is free.

    The cross-entropy of u = (f - f_p) / D, its gradient for f, and the two products (c, c, m) that the distances
    between rows of W and their gradient come to. Free: the table `R` of inverse distances and the matrix `S` that
    multiplies W in its gradient, each given, every check, and what the gradient for f_p takes.
    """

    @staticmethod
    def forward(ctx, logits, W, R, S, y):
        matmul(W, W.t())
        top, predicted = logits.max(1, keepdim=True)
        rows = R.index_select(0, predicted.view(-1))
        u = logits - top
        D = (u * rows).sum(1, keepdim=True)
        u.div_(D)
        log_probability = torch.log_softmax(u, 1)
        loss, total = torch.ops.aten.nll_loss_forward.default(log_probability, y, None, 1, -100)
        ctx.save_for_backward(W, S, y, rows, u, D, log_probability, total)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        W, S, y, rows, u, D, log_probability, total = ctx.saved_tensors
        gradient = torch.ops.aten.nll_loss_backward.default(upstream, log_probability, y, None, 1, -100, total)
        gradient = torch.ops.aten._log_softmax_backward_data.default(gradient, log_probability, 1, torch.float32)
        slope = (gradient * u).sum(1, keepdim=True)
        gradient.addcmul_(rows, slope, value=-1).div_(D)
        return gradient, matmul(S, W), None, None, None


class CallCount(TorchDispatchMode):
    """Counts the operators that reach ATen inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def count_calls(run: Callable[[], object]) -> int:
    run()
    with CallCount() as count:
        run()
    return count.calls


def held(value: float, target: float | None) -> str:
    """The target beside the value, and whether it holds; the value alone where there is no target."""
    if target is None:
        return f"{value:.2f}"
    return f"{value:6.2f} ({'<=' if value <= target else 'NOT <='} {target:g})"


# Most of extra / head: when all predictions differ, and when half of them do. Detached: at most half of the extra.
EXTRA = {((256, 1000, 2048), 256): 1.0, ((256, 1000, 2048), 128): 0.7, ((64, 21841, 768), 64): 1.3}
PEAK_MB = {(256, 1000, 2048): 16}


def dense() -> None:
    """The extra over cross-entropy, as a share of the head's own forward and backward."""
    print("\n(n, c, m)               u   head ms     extra / head   detached / extra           peak MB")
    for shape in DENSE:
        for distinct in (shape[0], shape[0] // 2):
            t = alternate(steps(shape, distinct), seconds=6)
            extra, detached = ((t[k] - t["cross-entropy"]) / t["head"] for k in ("elogitnorm", "detached"))
            megabytes = peak(prepare, shape, distinct)
            name = str(shape)
            goal = EXTRA.get((shape, distinct), EXTRA[shape, shape[0]])
            print(
                f"{name:20} {distinct:4d} {1e3 * t['head']:9.1f} {held(extra, goal):>16}"
                f" {held(detached / extra, 0.5):>18} {held(megabytes, PEAK_MB.get(shape)):>17}"
            )


def small() -> None:
    """All of the loss beside all of F.cross_entropy, where calls are the cost; and a part of it alone."""
    print("\n(n, c, m)       cross-entropy us, calls   elogitnorm / cross-entropy, calls   detached     floor")
    for shape in SMALL:
        _, W, _, logits, y = leaves(shape)
        ones = torch.ones(len(W), len(W))
        floor = functools.partial(Floor.apply, logits, W, -ones, ones, y)
        candidates = steps(shape, None)
        candidates["floor"] = lambda floor=floor, inputs=(logits, W): torch.autograd.grad(floor(), inputs)
        t = alternate(candidates, seconds=3)
        calls = {name: count_calls(run) for name, run in candidates.items()}
        name, ce = str(shape), t.pop("cross-entropy")
        ratio = {candidate: seconds / ce for candidate, seconds in t.items()}
        print(
            f"{name:15} {1e6 * ce:16.0f} {calls['cross-entropy']:6d}"
            f" {ratio['elogitnorm']:>28.2f} {calls['elogitnorm']:5d}"
            f" {ratio['detached']:10.1f} {ratio['floor']:9.1f}"
        )


def linear() -> None:
    """Without logits, beside the head and cross-entropy through them, and torch's chunked form where it exists."""
    z, W, b, y = linear_leaves()
    candidates = {
        name: (lambda f=f: torch.autograd.grad(f(z, W, b, y), (z, W, b))) for name, f in linear_losses().items()
    }
    t = alternate(candidates, seconds=20)
    print(f"\n{LINEAR}                       s   / unfused   peak MB")
    for name, seconds in t.items():
        megabytes = peak(prepare_linear, name)
        print(f"{name:36} {seconds:6.2f} {seconds / t['unfused linear + cross-entropy']:9.2f} {megabytes:9.0f}")


def linear_leaves() -> tuple[torch.Tensor, ...]:
    """z, W, b as leaves, and y; no logits."""
    n, c, m = LINEAR
    torch.manual_seed(0)
    leaves = torch.randn(n, m), torch.randn(c, m).div_(m**0.5), torch.zeros(c)
    return *(t.requires_grad_() for t in leaves), torch.randint(0, c, (n,))


def linear_losses() -> dict[str, Callable]:
    losses = {
        "unfused linear + cross-entropy": lambda z, W, b, y: F.cross_entropy(F.linear(z, W, b), y),
        "linear_elogitnorm": ood_fast.linear_elogitnorm,
        "linear_elogitnorm, detached": lambda z, W, b, y: ood_fast.linear_elogitnorm(z, W, b, y, detach_geometry=True),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        losses["torch's linear_cross_entropy"] = lambda z, W, b, y: F.linear_cross_entropy(
            z, W, y, linear_bias=b, options=options
        )
    return losses


def prepare(shape: tuple[int, int, int], distinct: int) -> Callable[[], object]:
    """The step of a row of `dense`; it has run once."""
    step = steps(shape, distinct)["elogitnorm"]
    step()
    return step


def prepare_linear(name: str) -> Callable[[], object]:
    z, W, b, y = linear_leaves()
    step = lambda: torch.autograd.grad(linear_losses()[name](z, W, b, y), (z, W, b))  # noqa: E731
    step()
    return step


def peak(prepare: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """MB beyond inputs and gradients; NaN where the system does not tell."""
    found = peak_megabytes(functools.partial(prepare, *arguments), torch.device("cpu"))
    return math.nan if found is None else found


TABLES = {"dense": dense, "small": small, "linear": linear}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="*", choices=[*TABLES, []], metavar="TABLE", help=f"{', '.join(TABLES)}; all of them by default"
    )
    chosen = parser.parse_args().tables or list(TABLES)
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    for name in chosen:
        TABLES[name]()
    print("\nTargets, and why that of 100 classes is not reached: kernels/README.md, section 8.")


if __name__ == "__main__":
    main()
