"""How things are measured: time on the device, peak memory, this machine's ceilings, and what machine it is."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import torch
from torch import Tensor

from .cases import Inputs, machine

# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------


class DeviceTimer:
    """A clock for pytest-benchmark that reads the GPU's own: called before and after a step, it returns 0 and the
    seconds between two events on the stream.

    The first event waits behind a kernel that sleeps for longer than Python takes to launch the step, so the gaps
    between launches are not counted where they would be hidden in a training step too. `wait` is that time in seconds.
    """

    CYCLES_A_SECOND = 1.5e9  # of the sleeping kernel; a GPU that runs faster waits less, so `wait` has a reserve
    LONGEST = 0.05

    def __init__(self) -> None:
        self.wait = 0.0
        self._start = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self._start is None:
            torch.cuda._sleep(int(min(2 * self.wait + 1e-5, self.LONGEST) * self.CYCLES_A_SECOND))
            event.record()
            self._start = event
            return 0.0
        event.record()
        event.synchronize()
        start, self._start = self._start, None
        return start.elapsed_time(event) / 1e3

    def reset(self, wait: float) -> None:
        self.wait, self._start = wait, None


def synchronizer(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def median_seconds(step: Callable[[], object], device: torch.device, seconds: float, rounds: int = 100) -> float:
    """Median time of a step, in at least 3 rounds, more as far as `seconds` allow."""
    timer = DeviceTimer() if device.type == "cuda" else time.perf_counter
    step()
    synchronizer(device)()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < rounds and time.perf_counter() < end):
        start = timer()
        step()
        times.append(timer() - start)
    return statistics.median(times)


def in_turns(
    steps: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, rounds: int = 100
) -> dict[str, float]:
    """The shortest time of each step; the steps take turns for some `seconds` in all.

    What else the machine does falls on all of them alike, and only adds: the ratio of two of these numbers tells more
    than that of rows that were measured one after the other.
    """
    synchronize = synchronizer(device)
    shortest = dict.fromkeys(steps, math.inf)
    for step in steps.values():
        step()
    synchronize()
    end = time.perf_counter() + seconds
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            synchronize()
            shortest[name] = min(shortest[name], time.perf_counter() - start)
        if time.perf_counter() >= end:
            break
    return shortest


def ratio_in_groups(
    step: Callable[[], object], other: Callable[[], object], device: torch.device, seconds: float
) -> float:
    """Time of `step` over that of `other`: the median over groups of step, other, other, step.

    For steps that differ by less than the machine drifts in a second, where the shortest times of `in_turns` are too
    rough; a steady drift falls on both alike.
    """
    synchronize = synchronizer(device)

    def timed(run: Callable[[], object]) -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    step(), other()
    ratios, end = [], time.perf_counter() + seconds
    while not ratios or time.perf_counter() < end:
        first, second, third, fourth = timed(step), timed(other), timed(other), timed(step)
        ratios.append((first + fourth) / (second + third))
    return statistics.median(ratios)


def input_sets(x: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of the inputs to take turns with, together larger than twice the GPU's L2 cache: a step must find its
    inputs in memory. On a CPU one set: there a loss finds in the caches what the head has just written."""
    if device.type != "cuda":
        return [x]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(max(math.ceil(2 * cache / x.n_bytes), 2), 32)
    return [x] + [x.copy() for _ in range(count - 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


# Makes inputs and state, runs the step once on all or a part of them, and returns it: what is measured then is the step
# alone. It is pickled for another process: a functools.partial of a module's function or of a row's method.
Prepare = Callable[[], Callable[[], object]]


def peak_megabytes(prepare: Prepare, device: torch.device) -> float | None:
    """MB that the step of `prepare` takes at its peak, beyond its inputs and what it returns.

    On a GPU torch's allocator tells. On a CPU it is the growth of the resident set, in a process of its own where what
    is freed goes back to the system at once: kept by the allocator it would hide what the next step takes. None where
    the system does not tell, or memory does not go back (Linux with glibc does both).
    """
    if device.type == "cuda":
        return _gpu_peak(prepare, device)
    try:
        return _worker().submit(_cpu_peak, prepare).result()
    except BrokenProcessPool:  # killed, for memory most likely: the next row gets another worker
        _worker.cache_clear()
        raise


@functools.cache
def _worker() -> ProcessPoolExecutor:
    """One process for all rows: what they fit and load can be kept.

    Its threads sleep as soon as a step is done. By default they spin on for some milliseconds, in which a step of this
    process that is timed takes twice its time.
    """
    with mock.patch.dict(os.environ, OMP_WAIT_POLICY="passive"):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare_worker)
        pool.submit(int).result()  # starts it
    return pool


def _prepare_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what has been imported: a collection of the rest takes no time, of all a tenth of a second a row
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc only
        ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: blocks of 128 KiB and more are maps of their own


def _end_with_parent() -> None:
    """A worker of a pool waits for work for ever, also where a signal has ended who would give it."""
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.cache
def _is_returned() -> bool:
    """Whether the system tells the resident set and its peak, and 64 MB that are freed leave it."""
    try:
        _forget_peak()
        before = _resident("VmHWM")
        torch.ones(2**24)
        return _resident("VmRSS") - before < 2**24
    except (OSError, StopIteration):  # no such file, no right to it, no such line in it
        return False


def _forget_peak() -> None:
    """Set the high-water mark to what is resident now."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def _gpu_peak(prepare: Prepare, device: torch.device) -> float:
    step = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated(device) - before - _bytes(returned)) / 1e6


def _cpu_peak(prepare: Prepare) -> float | None:
    if not _is_returned():
        return None
    step = prepare()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the small blocks too
        ctypes.CDLL(None).malloc_trim(0)
    _forget_peak()
    before = _resident("VmRSS")
    returned = step()
    return max((_resident("VmHWM") - before - _bytes(returned)) / 1e6, 0.0)


def _bytes(returned: object) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(returned))


def _tensors(returned: object) -> Iterator[Tensor]:
    """Those of a step: a tensor, or a sequence or mapping of what a step may return."""
    if isinstance(returned, Tensor):
        yield returned
    elif isinstance(returned, Mapping):
        yield from _tensors(list(returned.values()))
    elif isinstance(returned, (list, tuple)):
        for one in returned:
            yield from _tensors(one)


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


# ----------------------------------------------------------------------------------------------------------------------
# Ceilings
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def ceilings(device_name: str) -> dict[str, float]:
    """What this machine reaches at best, measured now: GB/s of a copy that no cache holds, bytes read plus bytes
    written, and GFLOP/s of a large matrix product of random numbers in each dtype."""
    device = torch.device(device_name)
    gpu = device.type == "cuda"
    measured = {"copy": _copy_bandwidth(2**30 if gpu else 2**26, device)}  # 4 GB, or 256 MB
    size = 8192 if gpu else 1536
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        products = [lambda a=a, b=b, out=out: torch.mm(a, b, out=out)]
        if not gpu:  # torch.mm asks one library, F.linear of compiled models another, and the faster one is the ceiling
            with contextlib.suppress(AttributeError):
                linear = torch.ops.mkldnn._linear_pointwise
                products.append(lambda a=a, b=b, linear=linear: linear(a, b, None, "none", [], ""))
        measured[name] = 2 * size**3 / min(median_seconds(product, device, 0.5) for product in products) / 1e9
    return measured


def _copy_bandwidth(n_elements: int, device: torch.device) -> float:
    source = torch.randn(n_elements, device=device)
    target = torch.empty_like(source)
    return 2 * _bytes(source) / median_seconds(lambda: target.copy_(source), device, 0.5) / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, object]:
    """Processor, GPU, versions, commit: what a number must be quoted with."""
    found: dict[str, object] = {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "changed_files": len((_output("git", "status", "--porcelain", "--untracked-files=no") or "").splitlines()),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    for package in ("torch", "triton", "numpy", "pytorch-ood", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found |= gpu_state()
    return found


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them now; {} without it."""
    fields = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "power.draw",
        "temperature.gpu",
        "clocks_throttle_reasons.active",
    )
    values = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    return dict(zip(fields, (v.strip() for v in values.split(",")), strict=False)) if values else {}


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() if finished.returncode == 0 else None
