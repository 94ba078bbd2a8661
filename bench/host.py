"""What a step costs the host, without a GPU: Python and ATen as they are, under a driver that launches nothing.

    python -m bench.host [--json]

Kernels are compiled for sm_90 and handed to a driver that returns at once; tensors lie in CPU memory, where the ATen
calls of a step are so small that the call is the cost. Microseconds are the lower quartile of many steps, forward and
backward; launches and ATen calls are counted. Large shapes have counts only, on tensors without data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SMALL = ((128, 100, 512), (128, 10, 512), (64, 100, 512))
LARGE = ((65536, 1000, 2048), (4096, 21841, 768))
# Host microseconds and counts that a step with dW is to stay within, n >= c and n < c.
TARGETS = {"us": (120, 200), "kernels": (4, None), "aten": (8, None)}
STEPS = 400


class NoDriver:
    """What Triton asks of a driver; nothing reaches a device."""

    class launcher_cls:
        def __init__(self, *source: Any) -> None: ...

        def __call__(self, *arguments: Any) -> None: ...

    class utils:
        @staticmethod
        def load_binary(*arguments: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 0, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def unload_module(module: int) -> None: ...

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def no_gpu(target: str = "sm_90") -> Iterator[None]:
    """Inside, CPU tensors take the kernels as those on a GPU would, up to the launch."""
    import aot_compile
    from triton.runtime import driver

    from ood_fast.ops import backend, losses

    def where(*ignored: Any) -> str:
        return target

    def kernels(*ignored: Any) -> str:
        return "triton"

    def nothing(*ignored: Any) -> None: ...

    driver.set_active(NoDriver())
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "backend_name", kernels))
        # which looks at targets on the CPU alone; a Mock would take 30 us a call
        stack.enter_context(mock.patch.object(losses, "_check_indices", nothing))
        for module in aot_compile.MODULES:
            if hasattr(module, "target_of"):
                stack.enter_context(mock.patch.object(module, "target_of", where))
        yield


class Calls(TorchDispatchMode):
    """Counts ATen operators, allocations and views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def steps(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A training step of the loss, by name."""
    import ood_fast

    n, c, m = shape
    logits = torch.empty(n, c, device=device, dtype=dtype).normal_().requires_grad_()
    W = torch.empty(c, m, device=device, dtype=dtype).normal_().requires_grad_()
    y = torch.empty(n, device=device, dtype=torch.int64).zero_()
    # Gradients are handed over, as to what made the logits and to a `.grad` of None; nothing is added up.
    criterion, grad = ood_fast.elogitnorm, torch.autograd.grad
    return {
        "elogitnorm": lambda: grad(criterion(logits, None, W, None, y), (logits, W)),
        "elogitnorm, detached": lambda: grad(criterion(logits, None, W, None, y, detach_geometry=True), logits),
        "F.cross_entropy": lambda: grad(F.cross_entropy(logits, y), logits),
    }


def counted(step: Callable[[], Any]) -> dict[str, Any]:
    """Launches of kernels and ATen calls of one step, but for what autograd does to add up gradients."""
    from ood_fast.kernels.launch import launches

    step()
    launches.clear()
    with Calls() as calls:
        step()
    names = [name for name in calls.names if not name.startswith(("detach", "ones_like", "add_", "alias"))]
    return {"kernels": sum(launches.values()), "aten": len(names), "names": names, "launches": dict(launches)}


def microseconds(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The lower quartile of each, taken in turns: another job on the machine adds to all, and never subtracts."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.quantiles(values, n=4)[0] * 1e6 for name, values in taken.items()}


def measure(shapes: tuple = SMALL + LARGE) -> list[dict[str, Any]]:
    """A line for each step and shape."""
    lines = []
    torch.set_num_threads(1)
    with no_gpu():
        for shape in shapes:
            small = shape in SMALL
            found = steps(shape, "cpu" if small else "meta", torch.float32 if small else torch.bfloat16)
            # The handles of kernels want data; without any, launches are counted and left out.
            with contextlib.nullcontext() if small else no_launch():
                of_shape = [{"step": name, "shape": shape, **counted(step)} for name, step in found.items()]
            us = microseconds(found) if small else {}
            lines += [line | {"us": us.get(line["step"])} for line in of_shape]
    return lines


@contextlib.contextmanager
def no_launch() -> Iterator[None]:
    """Launches are counted only."""
    import aot_compile

    from ood_fast.kernels import launch

    def count(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        launch.launches[kernel.fn.__name__] += 1

    with contextlib.ExitStack() as stack:
        for module in aot_compile.MODULES:
            if hasattr(module, "launch") and callable(module.launch):
                stack.enter_context(mock.patch.object(module, "launch", count))
        yield


def show(lines: list[dict[str, Any]]) -> str:
    """The lines as text, with the targets of a step with dW."""
    text = [f"{'':24} {'shape':>22} {'kernels':>8} {'ATen':>5} {'us':>6} {'/ F.cross_entropy':>18}  targets"]
    usual = {line["shape"]: line["us"] for line in lines if line["step"] == "F.cross_entropy"}
    for line in lines:
        n, c, _ = line["shape"]
        taken = ratio = ""
        if line["us"] is not None:
            taken, ratio = f"{line['us']:.0f}", f"{line['us'] / usual[line['shape']]:.1f}"
        targets = ""
        if line["step"] == "elogitnorm" and line["us"] is not None:
            targets = ", ".join(f"{k} <= {v[n < c]}" for k, v in TARGETS.items() if v[n < c])
        shape = "x".join(map(str, line["shape"]))
        text.append(
            f"{line['step']:24} {shape:>22} {line['kernels']:8} {line['aten']:5} {taken:>6} {ratio:>18}  {targets}"
        )
    return "\n".join(text)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print every call and launch by name")
    parser.add_argument("--dry", action="store_true", help="one small shape")
    arguments = parser.parse_args()
    lines = measure(SMALL[:1]) if arguments.dry else measure()
    print(json.dumps(lines) if arguments.json else show(lines))


if __name__ == "__main__":
    main()
