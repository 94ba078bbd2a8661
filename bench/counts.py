"""Bytes and flops of every kernel and of every operation that a benchmark times: the one place that counts them.

    python -m bench.counts 65536 1000 2048 --dtype bfloat16      # every kernel at one shape

The expressions of `KERNELS` and `DETECTORS` are the tables of kernels/README.md, section 6 (tests/test_bench.py
compares them):

    L, V, T   bytes of an element of the logits, of W, of the features
    n, c, m   samples, classes, features;  k = min(n, c);  u distinct predictions;  s splits of the classes
    N, M      training features kept, largest probabilities taken

What an operation costs is the sum of its kernels, each input read once and each output written once, whoever computes
it: an implementation that moves more shows a lower GB/s, never a higher one.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Sizes:
    """A shape and the sizes of its elements. `u`: distinct predictions, the most that are possible unless given; `M`
    is all classes unless given."""

    n: int
    c: int
    m: int
    u: int = 0
    L: int = 4
    V: int = 4
    T: int = 4
    s: int = 1
    N: int = 0
    M: int = 0

    @classmethod
    def of(cls, shape: tuple[int, int, int], dtype: torch.dtype, u: int | None = None, **more: int) -> Sizes:
        n, c, m = shape
        size = dtype.itemsize
        return cls(n, c, m, min(n, c) if u is None else u, size, size, size, **more)

    def names(self) -> dict[str, object]:
        return vars(self) | {
            "k": min(self.n, self.c),
            "u": self.u or min(self.n, self.c),
            "M": min(self.M or self.c, self.c),
            "min": min,
            "ceil": math.ceil,
        }


class Formula(NamedTuple):
    """Bytes read, bytes written and flops, as expressions in the names above."""

    read: str
    written: str
    flops: str


class Counts(NamedTuple):
    bytes: float
    flops: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, bytes_a_second: float, flops_a_second: float) -> float:
        """Seconds below which no implementation comes: the slower of moving the bytes and doing the arithmetic."""
        return max(self.bytes / bytes_a_second, self.flops / flops_a_second)


KERNELS = {
    "predict": Formula("L*n*c", "0", "4*n*c"),
    "distance_gram": Formula("V*(k + c)*m", "4*k*c", "2*k*c*m"),
    "fused_row, ELogitNorm": Formula("L*n*c + 4*min(n, u)*c", "L*n*c", "25*n*c"),
    "fused_row, LogitNorm": Formula("L*n*c", "L*n*c", "22*n*c"),
    "tempered_forward, ELogitNorm": Formula("L*n*c + 4*min(n, u)*c", "0", "15*n*c"),
    "tempered_forward, LogitNorm": Formula("L*n*c", "0", "14*n*c"),
    "tempered_backward, ELogitNorm": Formula("L*n*c + 4*min(n, u)*c", "L*n*c", "12*n*c"),
    "tempered_backward, LogitNorm": Formula("L*n*c", "L*n*c", "12*n*c"),
    "boundary_distance_forward": Formula("L*n*c + 4*min(n, u)*c", "0", "8*n*c"),
    "boundary_distance_backward": Formula("L*n*c + 4*min(n, u)*c", "L*n*c", "4*n*c"),
    "segment_sum": Formula("L*n*c + 4*k*c", "4*k*c", "3*n*c"),
    "weight_gradient_table": Formula("8*c*c + V*c*m", "V*c*m", "2*c*c*m"),
    "weight_gradient_own": Formula("4*u*c + V*c*m", "4*s*u*m", "2*u*c*m"),
    "weight_gradient_all": Formula("4*u*c + V*c*m + 4*s*u*m", "V*c*m", "2*u*c*m"),
    "features_argmax": Formula("T*n*m + V*c*m", "12*n*s", "2*n*c*m"),
    "nci_forward": Formula("L*n*c + T*n*m + V*n*m", "0", "4*n*c + 8*n*m"),
    "nci_forward, after features_argmax": Formula("12*n*s + T*n*m + V*n*m", "0", "8*n*m"),
    "nci_features_backward": Formula("T*n*m + V*n*m", "T*n*m", "8*n*m"),
    "nci_mean_backward": Formula("T*n*m + V*n*m", "4*m*ceil(n/128)", "6*n*m"),
    # By what is asked of it: the statistics of one detector, or all of them. The table of distances is an input.
    "row_statistics, MSP": Formula("L*n*c", "0", "7*n*c"),
    "row_statistics, entropy": Formula("L*n*c", "0", "10*n*c"),
    "row_statistics, GEN": Formula("L*n*c", "0", "15*n*c"),
    "row_statistics, fDBD": Formula("L*n*c + 4*min(n, u)*c + T*n*m", "0", "8*n*c + 3*n*m"),
    "row_statistics, NCI": Formula("L*n*c + T*n*m + V*min(n, u)*m", "0", "4*n*c + 8*n*m"),
    "row_statistics, all": Formula("L*n*c + 4*min(n, u)*c + T*n*m + V*min(n, u)*m", "0", "26*n*c + 10*n*m"),
}
# Scores of detectors from stored features and logits, where no kernel's expression says it. What has been fitted is an
# input, in float32: class means and roots of precision matrices, or a bank of N features.
DETECTORS = {
    "MaxLogit": Formula("L*n*c", "0", "4*n*c"),
    "GEN": Formula("L*n*c", "0", "7*n*c + 8*n*M"),
    "FeatureNorm": Formula("T*n*m", "0", "2*n*m"),
    "ReAct": Formula("T*n*m + V*c*m", "0", "2*n*c*m + 7*n*c + n*m"),
    "ASH": Formula("T*n*m + V*c*m", "0", "2*n*c*m + 7*n*c + 3*n*m"),
    "SCALE": Formula("T*n*m + V*c*m", "0", "2*n*c*m + 7*n*c + 3*n*m"),
    "Mahalanobis": Formula("T*n*m + 4*(m + c)*m", "0", "2*n*m*m + 2*n*c*m"),
    "RMDS": Formula("T*n*m + 4*(2*m + c)*m", "0", "4*n*m*m + 2*n*c*m"),
    "KNN": Formula("T*n*m + 4*N*m", "0", "2*n*N*m + 3*n*m"),
    "NNGuide": Formula("L*n*c + T*n*m + 4*N*m", "0", "7*n*c + 2*n*N*m + 3*n*m"),
    # Every score that is a function of row statistics, GEN over all classes.
    "together": Formula("L*n*c + 4*min(n, u)*c + T*n*m + V*min(n, u)*m", "0", "22*n*c + 10*n*m"),
}
# What stands beside them in the tables, counted in the same way.
NEIGHBOURS = {
    "cross_entropy forward": Formula("L*n*c", "0", "4*n*c"),
    "cross_entropy backward": Formula("L*n*c", "L*n*c", "3*n*c"),
    "head forward": Formula("T*n*m + V*c*m", "L*n*c", "2*n*c*m"),
    "head backward": Formula("L*n*c + T*n*m + V*c*m", "T*n*m + V*c*m", "4*n*c*m"),
    # Without logits only z, W and their gradients meet memory, and the arithmetic is that of head and loss.
    "linear_cross_entropy": Formula("T*n*m + V*c*m", "T*n*m + V*c*m", "6*n*c*m + 7*n*c"),
    "linear_elogitnorm": Formula("T*n*m + V*c*m", "T*n*m + V*c*m", "6*n*c*m + 6*u*c*m + 30*n*c"),
    "linear_elogitnorm, detached": Formula("T*n*m + V*c*m", "T*n*m + V*c*m", "6*n*c*m + 2*u*c*m + 27*n*c"),
    "copy of (n, c)": Formula("L*n*c", "L*n*c", "0"),
}
FORMULAS = KERNELS | DETECTORS | NEIGHBOURS


def of(name: str, sizes: Sizes) -> Counts:
    """Bytes and flops of one kernel, of one detector's score, or of one of their neighbours."""
    formula = FORMULAS[name]
    read, written, flops = (eval(text, {"__builtins__": {}}, sizes.names()) for text in formula)
    return Counts(float(read + written), float(flops))


def launches(operation: str, sizes: Sizes) -> list[str]:
    """The kernels that an operation of a benchmark consists of, in order."""
    few = sizes.n < sizes.c  # samples: a row of the table for each distinct prediction, found before it
    table = (["predict"] if few else []) + ["distance_gram"]
    weight = ["segment_sum"] + (["weight_gradient_own", "weight_gradient_all"] if few else ["weight_gradient_table"])
    forward = [*table, "tempered_forward, ELogitNorm"]
    return {
        "elogitnorm forward": forward,
        "elogitnorm": [*table, "fused_row, ELogitNorm", *weight],
        "elogitnorm, detached": [*table, "fused_row, ELogitNorm"],
        "logitnorm forward": ["tempered_forward, LogitNorm"],
        "logitnorm": ["tempered_forward, LogitNorm", "tempered_backward, LogitNorm"],
        "boundary_distance": [*table, "boundary_distance_forward"],
        "cross_entropy": ["cross_entropy forward", "cross_entropy backward"],
        "head": ["head forward", "head backward"],
        "nci": ["nci_forward"],
        "nci from features": ["features_argmax", "nci_forward, after features_argmax"],
        "MSP": ["row_statistics, MSP"],
        "Energy": ["row_statistics, MSP"],
        "Entropy": ["row_statistics, entropy"],
        "FDBD": ["row_statistics, fDBD"],
        "NCI": ["row_statistics, NCI"],
        "BoundaryDistance": ["boundary_distance_forward"],
    }.get(operation, [operation])


def operation(name: str, sizes: Sizes) -> Counts:
    """Bytes and flops of an operation: the sum over its kernels."""
    return sum((of(kernel, sizes) for kernel in launches(name, sizes)), Counts(0.0, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs=3, type=int, metavar=("n", "c", "m"))
    parser.add_argument("--distinct", type=int, help="distinct predictions (default: as many as there can be)")
    parser.add_argument("--kept", type=int, default=50_000, help="training features kept by KNN and NNGuide")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    sizes = Sizes.of(tuple(arguments.shape), getattr(torch, arguments.dtype), arguments.distinct, N=arguments.kept)
    print(f"{'':36} {'MB':>12} {'GFLOP':>12} {'flop/byte':>10}")
    for name in FORMULAS:
        counts = of(name, sizes)
        print(f"{name:36} {counts.bytes / 1e6:12.3f} {counts.flops / 1e9:12.3f} {counts.flops / counts.bytes:10.1f}")


if __name__ == "__main__":
    main()
