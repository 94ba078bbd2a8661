"""What the kernels should take on a GPU, by their compiled code, without one.

    python -m bench.static                    # the cases of `CASES`, for an H200
    python -m bench.static --measured FILE    # beside what `python -m bench.kernel_times --out FILE` measured
    python -m bench.static --write            # keep the figures in tests/static_gates/, for tests/test_gates.py

For each kernel of a case, compiled for sm_90: instructions that the warps issue, matrix instructions against those
that the product needs, barriers of a turn, programs that fit a multiprocessor, bytes (bench/counts.py). From these the
time by issue, at the rate that the schedulers have and at the 70 % of it that kernels reach, and by bytes; the largest
rules. Measured times in bench/results/<gpu>/kernel_times*.json stand beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import counts, sass
from .cases import SHORT_NAMES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TARGET = "sm_90"
RESULTS = Path(__file__).with_name("results")
# An H200: 132 multiprocessors with four schedulers at 1.85 GHz, copies at 4.0 TB/s.
MULTIPROCESSORS, ISSUE, REACHED, BYTES, BF16 = 132, 132 * 4 * 1.85e9, 0.7, 4.0e12, 790e12
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 227 * 1024, 64, 32
# Kernels that keep rare rows, or tiles, in a branch: the others take the shortest way through them.
RARE_BRANCH = ("fused_row",)
COLUMNS = ("case", "kernel", "instructions", "unit", "matrix", "barriers", "registers", "programs")


class Case(NamedTuple):
    """A step at one shape; `u` distinct predictions; what stands beside it in the table."""

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    u: int
    beside: tuple[str, ...]

    def sizes(self) -> counts.Sizes:
        return counts.Sizes.of(self.shape, self.dtype, self.u)


CASES = (
    Case("elogitnorm", (65536, 1000, 2048), torch.bfloat16, 1000, ("copy of (n, c)", "cross_entropy", "head")),
    Case("elogitnorm", (128, 100, 512), torch.float32, 100, ("copy of (n, c)", "cross_entropy", "head")),
    Case("elogitnorm", (4096, 21841, 768), torch.bfloat16, 3570, ("copy of (n, c)", "cross_entropy", "head")),
    Case("linear", (512, 100_000, 512), torch.bfloat16, 511, ("linear_cross_entropy",)),
    Case("nci", (65536, 1000, 2048), torch.bfloat16, 1000, ("copy of (n, c)",)),
    Case("statistics", (65536, 1000, 2048), torch.bfloat16, 1000, ("copy of (n, c)",)),
    Case("MSP", (65536, 1000, 0), torch.bfloat16, 1000, ("copy of (n, c)",)),
)


def run(case: Case) -> None:
    """The launches of a case, on tensors without data."""
    import aot_compile as aot

    from ood_fast.kernels import losses, nci
    from ood_fast.kernels.launch import ROW_IN_REGISTERS
    from ood_fast.records import Labels

    (n, c, m), dtype = case.shape, case.dtype
    logits = aot.meta(n, c, dtype=dtype)
    if case.name in ("elogitnorm", "linear"):
        weight = aot.meta(c, m, dtype=dtype)
        labels = Labels(aot.meta(n, dtype=torch.int64), None, -100, 0.0)
        if c > ROW_IN_REGISTERS:
            losses.elogitnorm_step(logits, weight, labels, losses.Rule(1e-6), aot.meta(n), need_weight=True)
        else:
            divisor = None if losses.counts(labels, "mean") else aot.meta(())
            *_, ahead = losses.elogitnorm_ahead(logits, weight, labels, 1e-6, 0, divisor)
            losses.elogitnorm_finish(ahead, aot.meta(()), logits, weight, True)
    elif case.name == "nci":
        nci.nci_forward(aot.meta(n, m, dtype=dtype), aot.meta(c, m, dtype=dtype), None, aot.meta(m), logits, 1e-3)
    elif case.name == "statistics":
        aot.run_statistics(n, c, m, dtype)
    else:
        aot.run_statistics(n, c, 0, dtype, ("max", "logsumexp"))


def turns(kernel: str, values: dict[str, Any], case: Case) -> tuple[float, ...] | float:
    """How often each loop of a kernel turns, in the order of its code, or its one loop of products: no pair of rows is
    close. What depends on the data as it is on average."""

    def of(size: float, block: str) -> float:
        return math.ceil(size / values[block])

    (n, c, m), u = case.shape, case.u
    samples = values.get("SAMPLES", 1)  # of a turn of the segmented sums
    segment = math.ceil(n / u / samples) if samples > 1 else n / u
    table: dict[str, Callable[[], tuple[float, ...] | float]] = {
        "distance_gram": lambda: float(of(m, "INNER")),
        "predict": lambda: (of(c, "BLOCK") - 1,),
        "nci_forward": lambda: (of(c, "CLASS_BLOCK") - 1, of(m, "FEATURE_BLOCK")),
        "row_statistics": lambda: (of(m, "FEATURE_BLOCK"),) if m else (),
        "weight_gradient_table": lambda: float(of(c, "INNER")),
        "weight_gradient_own": lambda: values["split_classes"] / values["INNER"],
        "weight_gradient_all": lambda: float(of(u, "INNER")),
        # A piece has at most 128 samples; a segment is summed whole, or from its pieces.
        "segment_piece": lambda: (min(128, n / u) / samples,),
        "segment_sum": lambda: (segment if n / u <= 128 else 0, n / u / 128 / 4, 0),
    }
    rows = of(c, "BLOCK") if kernel.startswith("tempered") else 0
    return (rows,) * 8 if rows else table.get(kernel, tuple)()


def launches(case: Case) -> list[dict[str, Any]]:
    """A line for each launch of a case: the figures of COLUMNS, and what the prediction needs."""
    import aot_compile as aot

    found: dict[Any, tuple[tuple[int, ...], dict[str, Any]]] = {}

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        found[aot.job_of(kernel, TARGET, "", arguments, dict(options))] = grid, values

    for module in aot.MODULES:
        for name, stand_in in (("launch", record), ("target_of", lambda _: TARGET)):
            if hasattr(module, name):
                setattr(module, name, stand_in)
    run(case)
    return [line(case, job, *launch) for job, launch in found.items()]


def line(case: Case, job: Any, grid: tuple[int, ...], values: dict[str, Any]) -> dict[str, Any]:
    import aot_compile as aot

    kernel = job.kernel.removesuffix("_kernel")
    compiled = aot.compiled(job)
    usage, shared = aot.cuda_usage(compiled.asm["cubin"]), compiled.metadata.shared
    text = aot.nvidia_tool(compiled.asm["cubin"], "nvdisasm", "-ndf", "-c")
    programs, warps = math.prod(grid), job.num_warps
    if kernel in ("distance_gram", "weight_gradient_own"):  # tiles of unused rows of the table stop at once
        axis = 1 if kernel == "distance_gram" else 0
        programs *= math.ceil(min(case.u, case.shape[0]) / values["ROWS"]) / grid[axis]
    scaling = 0
    if kernel == "segment_sum" and values["gradient_pointer"] is not None:  # its last programs: a factor of 1 ends them
        scaling = math.ceil(values["gradient_pointer"].numel() / values["SCALE"])
        programs -= scaling
    executed = sass.executed(text, turns(kernel, values, case), kernel in RARE_BRANCH)
    issued = executed["all"] * warps * programs + 30.0 * warps * scaling
    body, flops, parts = sass.busiest_loop(text), 0.0, 0
    key = {"fused_row": "fused_row, ELogitNorm", "row_statistics": "row_statistics, MSP"}.get(kernel, kernel)
    if case.name == "statistics":
        key = "row_statistics, all"
    needed = counts.of(key, case.sizes()) if key in counts.FORMULAS else counts.Counts(0.0, 0.0)
    matrix = ""
    if body["multiplied"]:
        tile = math.prod(values[name] for name in ("ROWS", "COLUMNS", "INNER"))
        # Three products of TF32; of bf16 one, or two where S comes in two parts.
        parts = 3 if values["PRECISION"] == "tf32x3" else 1 + kernel.startswith("weight_gradient")
        matrix = round(body["multiplied"] * warps / 4 / (parts * tile), 2)
        flops = needed.flops / 1e6
    fit = min(REGISTERS // (usage["registers"] * 32 * warps), SHARED // max(shared, 1), WARPS // warps, BLOCKS)
    if case.shape[0] / case.u <= 128 and kernel == "segment_piece":  # no segment is cut: programs see that, and end
        issued = 30.0 * warps * programs
    tensor = parts * needed.flops / (BF16 / (2 if parts == 3 else 1)) if flops else 0.0
    return {
        "case": f"{case.name} {'x'.join(map(str, case.shape))}",
        "kernel": kernel,
        "instructions": round(issued / (flops or case.shape[0]), 1),
        "unit": "Mflop" if flops else "row",
        "matrix": matrix,
        "barriers": body["barriers"],
        "registers": usage["registers"],
        "programs": fit,
        "issue": issued / ISSUE,
        "tensor": tensor,
        "bytes": needed.bytes / BYTES,
    }


def measured(files: Iterable[Path]) -> dict[tuple[str, str], float]:
    """{(case and dtype, kernel): microseconds of a step} from what `bench.kernel_times` wrote; "torch" is what is no
    kernel of this package."""
    found = {}
    for file in files:
        content = json.loads(file.read_text())
        for case in content["cases"]:
            name = f"elogitnorm {'x'.join(map(str, case['shape']))} {content['dtype']}"
            for of_kernel in case["rows"].get("elogitnorm", []):
                found[name, of_kernel["kernel"]] = of_kernel["seconds"] * 1e6
    return found


def show(cases: Iterable[Case] = CASES, seen: dict[tuple[str, str], float] | None = None) -> str:
    """The table; `seen`: what was measured."""
    text = [
        f"{'':24} {'instructions':>14} {'matrix':>7} {'barriers':>8} {'programs':>8} "
        f"{'issue':>8} {'at 70 %':>8} {'bytes':>8} {'measured':>8}  us"
    ]
    for case in cases:
        lines = launches(case)
        name = f"{lines[0]['case']} {SHORT_NAMES[case.dtype]}"
        of_case = {kernel: us for (where, kernel), us in (seen or {}).items() if where == name}
        text.append(f"\n{lines[0]['case']} {case.dtype}".replace("torch.", ""))
        total = 0.0
        for found in lines:
            issue, moved = found["issue"] * 1e6, found["bytes"] * 1e6
            total += max(issue / REACHED, moved, found["tensor"] * 1e6 / REACHED)
            text.append(
                f"{found['kernel']:24} {found['instructions']:8.0f}/{found['unit']:5} {found['matrix']:>7} "
                f"{found['barriers']:8.0f} {found['programs']:8} {issue:8.1f} {issue / REACHED:8.1f} {moved:8.1f}"
                + (f" {of_case[found['kernel']]:8.1f}" if found["kernel"] in of_case else "")
            )
        everything = sum(us for kernel, us in of_case.items() if not kernel.startswith("row kernels"))
        text.append(f"{'all':24} {total:64.0f}" + (f" {everything:17.0f}" if of_case else ""))
        for beside in case.beside:
            needed = counts.operation(beside, case.sizes())
            text.append(f"{beside:24} {needed.floor(BYTES, BF16) * 1e6:64.0f}")
    return "\n".join(text)


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the figures in tests/static_gates/")
    parser.add_argument("--json", action="store_true", help="print the figures that are kept")
    parser.add_argument("--measured", nargs="+", type=Path, default=sorted(RESULTS.glob("*/kernel_times*.json")))
    parser.add_argument("--dry", action="store_true", help="the two smallest cases alone")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.json):
        print(show((CASES[1], CASES[-1]) if arguments.dry else CASES, measured(arguments.measured)))
        return
    kept = [{name: found[name] for name in COLUMNS} for case in CASES for found in launches(case)]
    if arguments.json:
        print(json.dumps({"triton": triton.__version__, "lines": kept}))
    else:
        import gates

        gates.write(gates.model_table_path(triton.__version__), f"triton {triton.__version__}, {TARGET}", COLUMNS, kept)


if __name__ == "__main__":
    main()
