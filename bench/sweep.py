"""Choices that a GPU must decide, timed in one process: a step under each value of each choice, beside the default.

python -m bench.sweep --out sweep.json      # on a GPU
python -m bench.sweep --dry                 # without one: every choice once, by the driver that launches nothing
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import host

CASES = (
    ((65536, 1000, 2048), torch.bfloat16),
    ((4096, 21841, 768), torch.bfloat16),
    ((128, 100, 512), torch.float32),
)
DRY_CASES = (((40, 10, 8), torch.float32), ((6, 10, 8), torch.bfloat16))
ROUNDS = 20


def _replaced(function: Callable, **changes: Any) -> Callable:
    """The configuration that `function` gives, but for these fields."""

    def changed(*arguments: Any, **keywords: Any) -> Any:
        return dataclasses.replace(function(*arguments, **keywords), **changes)

    return changed


def choices() -> dict[str, tuple[str, dict[str, Any]]]:
    """{name: (function of kernels/launch.py, fields to replace)}; the launchers look them up in their own modules."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for warps in (1, 2, 4, 8):
        for function in ("row_config", "loop_config", "scan_config", "segment_config"):
            found[f"{function}, {warps} warps"] = function, {"num_warps": warps}
    for rows, columns, inner in ((64, 64, 32), (128, 64, 32), (128, 64, 64), (128, 128, 64)):
        for warps in (4, 8):
            tile = {"rows": rows, "columns": columns, "inner": inner, "num_warps": warps}
            found[f"tile_config, {rows} x {columns} x {inner}, {warps} warps"] = "tile_config", tile
    for stages in (1, 3, 4):
        found[f"tile_config, {stages} stages"] = "tile_config", {"num_stages": stages}
    return found


@contextlib.contextmanager
def chosen(function: str, changes: dict[str, Any]) -> Iterator[None]:
    """Inside, every launcher takes the changed configuration."""
    import aot_compile

    def forget() -> None:  # what was made by another configuration
        for module in aot_compile.MODULES:
            for value in vars(module).values():
                getattr(value, "cache_clear", bool)()

    with contextlib.ExitStack() as stack:
        stack.callback(forget)
        for module in aot_compile.MODULES:
            if hasattr(module, function):
                stack.enter_context(
                    mock.patch.object(module, function, _replaced(getattr(module, function), **changes))
                )
        forget()
        yield


def milliseconds(step: Callable[[], Any]) -> float:
    """The median of ROUNDS steps by CUDA events."""
    for _ in range(3):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for began, ended in events:
        began.record()
        step()
        ended.record()
    torch.cuda.synchronize()
    return sorted(began.elapsed_time(ended) for began, ended in events)[ROUNDS // 2]


def sweep(cases: tuple, device: str, measure: Callable[[Callable[[], Any]], float]) -> Iterator[dict[str, Any]]:
    """A line for each case and choice; what cannot be launched says why."""
    for shape, dtype in cases:
        step = host.steps(shape, device, dtype)["elogitnorm"]
        default = measure(step)
        print(f"{shape} {dtype}: default {default:.3f} ms", flush=True)
        for name, choice in choices().items():
            line: dict[str, Any] = {"shape": shape, "choice": name, "default_ms": default}
            try:
                with chosen(*choice):
                    line["ms"] = measure(step)
                print(f"  {name:48} {line['ms']:8.3f} ms  {default / max(line['ms'], 1e-9):5.2f} x", flush=True)
            except Exception as error:  # too many registers, too much shared memory: itself a result
                line["error"] = f"{type(error).__name__}: {error}"[:200]
                print(f"  {name:48} {line['error']}", flush=True)
            yield line


def main() -> None:
    """Sweep, and write the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, nothing is compiled or launched")
    arguments = parser.parse_args()
    if not (arguments.dry or torch.cuda.is_available()):
        raise SystemExit("no GPU found: --dry goes through every choice without one")
    lines = []
    with contextlib.ExitStack() as stack:
        if arguments.dry:
            stack.enter_context(host.no_gpu())
            stack.enter_context(host.no_launch())
            found = sweep(DRY_CASES, "cpu", lambda step: float(bool(step()) or 0.0))
        else:
            found = sweep(CASES, "cuda", milliseconds)
        for line in found:
            lines.append(line)
            if arguments.out:  # what there is, should the next choice not end
                arguments.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
