"""Does anything grow? Memory, descriptors, threads and objects over many steps and many scored rows, with their slopes.

    python -m bench.soak                                     # 200,000 steps, 10,000,000 rows
    python -m bench.soak --steps 2000 --rows 100000          # a look

A slope is that of the straight line through the samples of the second half, when what is kept once is there. It is
given for all of a run, with the interval of two standard errors: 0 lies in it where nothing grows.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import ood_fast
from ood_fast import detectors

N_CLASSES, N_FEATURES, BATCH, ROWS = 10, 16, 32, 4096
DETECTORS = ("MSP", "Energy", "GEN", "NCI", "FDBD", "KNN", "Mahalanobis", "ViM", "ReAct")
PARAMETERS = {"KNN": {"k": 5}, "ViM": {"dim": 8}}
WATCHED = 16  # every so many batches go to the monitor too
SAMPLES = 200


class Sample(NamedTuple):
    """What the process holds."""

    done: int  # steps or rows
    memory: float  # KiB that are resident
    descriptors: int
    threads: int
    objects: int  # that Python's collector follows


class Slope(NamedTuple):
    """How much more at the end of a run than at its beginning, by the line, and two standard errors of that."""

    growth: float
    error: float


def sample(done: int) -> Sample:
    """As it is now, after a collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1024
    return Sample(done, memory, len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects()))


def steps() -> Iterator[int]:
    """Training steps of a tiny classifier with ELogitNorm: 1 for each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, N_FEATURES), nn.ReLU(), nn.Linear(N_FEATURES, N_CLASSES))
    criterion = ood_fast.ELogitNormLoss(model[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while True:
        x, y = torch.randn(BATCH, 8), torch.randint(N_CLASSES, (BATCH,))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        yield 1


def rows() -> Iterator[int]:
    """Scores of a set of detectors, some of which a monitor watches: the rows of each batch."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N_CLASSES, N_FEATURES, generator=generator)

    def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(n, N_FEATURES, generator=generator).relu()
        return z, z @ W.T

    z, logits = drawn(500)
    chosen = {name: detectors.create(name, **PARAMETERS.get(name, {})) for name in DETECTORS}
    fitted = detectors.DetectorSet(chosen).fit_features(z, logits, logits.argmax(1), head=(W, None))
    monitor = ood_fast.Monitor(fitted.score_features(*drawn(500))["NCI"], alpha=0.001)
    for index in range(1 << 62):
        scores = fitted.score_features(*drawn(ROWS))
        if index % WATCHED == 0:
            monitor.update(scores["NCI"])
        yield ROWS


def watch(work: Iterator[int], n: int, n_samples: int = SAMPLES) -> list[Sample]:
    """Samples at even distances over n steps or rows of `work`."""
    done, found = 0, []
    for at in np.linspace(0, n, n_samples + 1)[1:]:
        while done < at:
            done += next(work)
        found.append(sample(done))
    return found


def slopes(samples: list[Sample]) -> dict[str, Slope]:
    """For each of memory, descriptors, threads, objects: over as many steps or rows as the last sample has."""
    half = np.array(samples[len(samples) // 2 :], dtype=float)
    x = half[:, 0] - half[:, 0].mean()
    found = {}
    for name, y in zip(Sample._fields[1:], half[:, 1:].T, strict=True):
        slope = (x @ (y - y.mean())) / (x @ x)
        residual = y - y.mean() - slope * x
        error = np.sqrt(residual @ residual / max(1, len(x) - 2) / (x @ x))
        found[name] = Slope(slope * samples[-1].done, 2 * error * samples[-1].done)
    return found


def row(what: str, samples: list[Sample], seconds: float) -> str:
    """A line of the table."""
    found, last = slopes(samples), samples[-1]
    cells = [f"{s.growth:+.0f} ± {s.error:.0f} (at the end {getattr(last, name):,.0f})" for name, s in found.items()]
    return f"| {last.done:,} {what} | {seconds:.0f} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = "| over | s | resident KiB | descriptors | threads | objects |\n|---|---|---|---|---|---|"
    lines = [
        f"Growth of what the process holds: torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        head,
    ]
    kinds: tuple[tuple[str, Callable[[], Iterator[int]], int], ...] = (
        ("training steps", steps, options.steps),
        ("rows scored by " + ", ".join(DETECTORS), rows, options.rows),
    )
    for what, work, n in kinds:
        began = time.perf_counter()
        lines.append(row(what, watch(work(), n), time.perf_counter() - began))
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
