"""Every kernel of the loss by itself, on a GPU: its time, beside the least that its bytes and its flops take.

    python -m bench.kernel_times --out kernels.json                       # (65536, 1000, 2048) in bfloat16
    python -m bench.kernel_times --shapes 4096x21841x768 128x100x512 --dtype float32

The times are the profiler's, by the name of the kernel, so what runs inside a step is what is timed: forward and
backward, the inputs taking turns so that no cache holds them. Bytes and flops are those of bench/counts.py; ceilings
are measured in the same run. What is not a kernel of this package (sorting predictions, reductions) is summed as
"torch". The targets of the row kernel are told by "row kernels, one read and one write": its
launches together, against a copy of (n, c).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import counts, host
from .baselines import LOSSES
from .cases import SHORT_NAMES, Case, Inputs
from .measure import ceilings, environment, gpu_state, input_sets

ROUNDS = 20
ROW_KERNELS = ("fused_row", "tempered_forward", "tempered_backward")


def by_kernel(events: Iterable[tuple[str, float]], rounds: int) -> dict[str, dict[str, float]]:
    """{kernel: launches and seconds in a step} from (name, seconds) of every kernel that ran in `rounds` steps.

    Seconds: the median launch times the launches, so that one that another job has slowed down does not count.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for name, seconds in events:
        times[name.removesuffix("_kernel") if name.removesuffix("_kernel") in _NAMES else "torch"].append(seconds)
    found = {}
    for name, values in times.items():
        launches = len(values) / rounds
        middle = statistics.mean(values) if name == "torch" else statistics.median(values)
        found[name] = {"launches": launches, "seconds": middle * launches}
    return found


_NAMES = {name.partition(",")[0] for name in counts.KERNELS} | {"segment_piece"}


def profile(case: Case, row_name: str) -> dict[str, dict[str, float]]:
    device = torch.device("cuda")
    row = next(row for row in LOSSES if row.name == row_name)
    sets = input_sets(Inputs.of(case, device), device)
    for x in sets:
        row.step(x)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(ROUNDS):
            row.step(sets[i % len(sets)])
        torch.cuda.synchronize()
    events = [
        (event.name, event.device_time * 1e-6)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return by_kernel(events, ROUNDS)


def dry_profile(case: Case, row_name: str) -> dict[str, dict[str, float]]:
    """`profile` without a GPU: the launches of a small step, each of which takes a microsecond."""
    from ood_fast.kernels.launch import launches

    row = next(row for row in LOSSES if row.name == row_name)
    x = Inputs.of(Case("dry", 8, 10, 4, dtype=case.dtype), "cpu")
    with host.no_gpu(), host.no_launch():
        launches.clear()
        row.step(x)
    return by_kernel([(name, 1e-6) for name in launches.elements()] + [("sort", 1e-6)], 1)


def table(found: dict[str, dict[str, float]], sizes: counts.Sizes, most: dict[str, float], dtype: str) -> list[dict]:
    """A line a kernel: time, floor by bytes and by flops, and the share of the ceiling that it reaches."""
    lines = []
    for name, measured in sorted(found.items(), key=lambda item: -item[1]["seconds"]):
        key = f"{name}, ELogitNorm" if name in ROW_KERNELS else name
        line: dict[str, Any] = {"kernel": name, **measured}
        if key in counts.KERNELS:
            needed = counts.of(key, sizes)
            floor = needed.floor(most["copy"] * 1e9, most[dtype] * 1e9)
            line |= {
                "bytes": needed.bytes,
                "flops": needed.flops,
                "GB_per_s": needed.bytes / measured["seconds"] / 1e9,
                "share_of_copy": needed.bytes / measured["seconds"] / 1e9 / most["copy"],
                "share_of_ceiling": floor / measured["seconds"],
            }
        lines.append(line)
    rows = [found[name]["seconds"] for name in ROW_KERNELS if name in found]
    if rows:
        copy = counts.of("copy of (n, c)", sizes)
        seconds = sum(rows)
        lines.append(
            {
                "kernel": "row kernels, one read and one write",
                "launches": len(rows),
                "seconds": seconds,
                "bytes": copy.bytes,
                "GB_per_s": copy.bytes / seconds / 1e9,
                "share_of_copy": copy.bytes / seconds / 1e9 / most["copy"],
            }
        )
    return lines


def show(lines: list[dict[str, Any]]) -> str:
    text = [f"{'kernel':38} {'launches':>8} {'us':>10} {'GB/s':>8} {'of copy':>8} {'of ceiling':>10}"]
    for line in lines:
        cells = f"{line['kernel']:38} {line['launches']:8.1f} {line['seconds'] * 1e6:10.1f}"
        if "GB_per_s" in line:
            cells += f" {line['GB_per_s']:8.0f} {line['share_of_copy']:8.0%} {line.get('share_of_ceiling', 0):10.0%}"
        text.append(cells)
    return "\n".join(text)


def shape_of(text: str) -> tuple[int, ...]:
    """(n, c, m) of "65536x1000x2048"."""
    return tuple(map(int, text.split("x")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(65536, 1000, 2048)], metavar="NxCxM")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", nargs="+", default=["elogitnorm", "elogitnorm, detached", "F.cross_entropy"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="without a GPU, in made times")
    arguments = parser.parse_args()
    if not (arguments.dry or torch.cuda.is_available()):
        raise SystemExit("no GPU found: this times kernels on one")
    dtype, take = getattr(torch, arguments.dtype), dry_profile if arguments.dry else profile
    most = {"copy": 4e3, "bf16": 790e3, "fp32": 55e3} if arguments.dry else ceilings("cuda")
    found: dict[str, Any] = {"environment": environment(), "ceilings": most, "dtype": SHORT_NAMES[dtype], "cases": []}
    for shape in arguments.shapes:
        case = Case("kernels", *shape, dtype=dtype)
        u = min(shape[:2]) if arguments.dry else Inputs.of(case, "cuda").distinct_predictions
        rows = {}
        print(f"{case}, u = {u}; ceilings: {most}")
        for name in arguments.rows:
            lines = rows[name] = table(take(case, name), counts.Sizes.of(shape, dtype, u), most, SHORT_NAMES[dtype])
            total = sum(line["seconds"] for line in lines if "row kernels" not in line["kernel"])
            print(f"\n{name}: {total * 1e6:.0f} us\n{show(lines)}")
        found["cases"].append({"shape": shape, "distinct_predictions": u, "rows": rows})
        if arguments.out:  # what there is, should the next shape not end
            arguments.out.write_text(json.dumps(found | {"gpu_state_at_end": gpu_state()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
