"""What a step of the class-parallel loss moves and costs here: `python -m bench.class_parallel`, about a minute.

Prints the table of docs/scale.md: bytes by `communication_bytes`, bytes that the kernel of the system counted on the
loopback interface meanwhile (so run it where nothing else talks on that: Linux only), and the time of forward and
backward on one thread a process.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import ood_fast
from ood_fast import distributed
from ood_fast.distributed.losses import chunk_rows

# (without logits, samples, processes, n, c, m)
CASES = [
    (False, "replicated", 2, 256, 20_000, 128),
    (True, "replicated", 2, 256, 20_000, 128),
    (True, "sharded", 2, 256, 20_000, 128),
    (True, "replicated", 2, 256, 200_000, 128),
    (False, "replicated", 4, 256, 20_000, 128),
    (True, "replicated", 4, 256, 20_000, 128),
    (True, "sharded", 4, 256, 20_000, 128),
]
STEPS = 3


def on_the_wire() -> int:
    with open("/proc/net/dev") as counters:
        return next(int(line.split()[1]) for line in counters if line.strip().startswith("lo:"))


def process(rank: int, folder: str, without_logits: bool, samples: str, n_ranks: int, n: int, c: int, m: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n_ranks)
    torch.manual_seed(0)
    z, y = torch.randn(n, m), torch.randint(0, c, (n,))
    W, b = torch.randn(c // n_ranks, m), torch.zeros(c // n_ranks)
    logits = F.linear(z, W, b)
    predicted = distributed.row_statistics(["predicted"], logits)["predicted"]
    rows_at_a_time = chunk_rows([c // n_ranks] * n_ranks, z.device) if without_logits else n
    u = sum(len(chunk.unique()) for chunk in predicted.split(rows_at_a_time))
    if samples == "sharded":
        own = slice(rank * n // n_ranks, (rank + 1) * n // n_ranks)
        z, y = z[own], y[own]
    for tensor in (z, W, b, logits):
        tensor.requires_grad_()

    def step() -> None:
        if without_logits:
            loss = distributed.linear_elogitnorm(z, W, b, y, samples=samples)
        else:
            loss = distributed.elogitnorm(logits, W, y)
        loss.backward()

    step()
    dist.barrier()
    time.sleep(0.3)
    wire, began = on_the_wire(), time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = (time.perf_counter() - began) / STEPS
    time.sleep(0.3)
    wire = (on_the_wire() - wire) / STEPS
    dist.barrier()
    if rank == 0:
        model = distributed.communication_bytes(
            n, m, n_ranks, without_logits=without_logits, samples=samples, n_predicted=u
        )
        name = f"linear_elogitnorm, {samples}" if without_logits else "elogitnorm"
        print(
            f"| {name} | {n_ranks} | {c:,} | {model.total / 1e6:.3f} | {wire / 1e6:.3f} | {1e3 * seconds:.0f} |",
            flush=True,
        )
    dist.destroy_process_group()


def alone(n: int, c: int, m: int) -> None:
    """The same in this process, which has as many threads as the others had together."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    z, y, W, b = torch.randn(n, m), torch.randint(0, c, (n,)), torch.randn(c, m), torch.zeros(c)
    for tensor in (z, W, b):
        tensor.requires_grad_()
    ood_fast.linear_elogitnorm(z, W, b, y).backward()
    began = time.perf_counter()
    for _ in range(STEPS):
        ood_fast.linear_elogitnorm(z, W, b, y).backward()
    ms = 1e3 * (time.perf_counter() - began) / STEPS
    print(f"| ood_fast.linear_elogitnorm, two threads | 1 | {c:,} | 0 | | {ms:.0f} |")


if __name__ == "__main__":
    if sys.platform != "linux":
        raise SystemExit("reads /proc/net/dev, expected Linux")
    from .measure import environment

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    print(", ".join(f"{name} {value}" for name, value in environment().items()), end="\n\n")
    print("| | processes | c | MB, formula | MB, counted | ms |\n|---|---|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, args=(folder, *case), nprocs=case[2])
    for n_classes in (20_000, 200_000):
        alone(256, n_classes, 128)
