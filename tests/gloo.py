"""Gloo processes on this machine alone that run the scenarios of a test file, and end."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# To import them takes seconds: all processes are forked from one that has.
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


def spawn(process: Callable, *arguments, size: int, seconds: float) -> None:
    """`process(rank, *arguments)` in `size` processes; the test fails where they have not ended in time."""
    with pytest.MonkeyPatch.context() as environment:
        if sys.platform == "linux":  # this machine alone: a network that is down must not matter
            environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        method = "forkserver" if sys.platform == "linux" else "spawn"
        mp.set_forkserver_preload(PRELOADED)
        context = mp.start_processes(process, args=arguments, nprocs=size, join=False, start_method=method)
        deadline = time.monotonic() + seconds
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for child in context.processes:
                    child.kill()
                pytest.fail(f"the {size} processes did not end within {seconds} s")


def process(rank: int, size: int, module: str, folder: str) -> None:
    """Each of the `SCENARIOS` of a module: what it gives for this rank, or a traceback."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",  # no port that another process could take first
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, scenario in importlib.import_module(module).SCENARIOS.items():
        try:
            results[name] = scenario(rank)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_scenarios(module: str, folder: str, size: int = 2) -> list[dict]:
    """What each process brought back."""
    spawn(process, size, module, folder, size=size, seconds=120)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]
