"""Compile every kernel ahead of time, without a GPU, and print what each needs as JSON: one record a kernel, launch
and target.

Run by test_kernels_aot.py in a process of its own, because Triton decides once, when it is imported, whether
kernels are compiled or interpreted. Nothing is listed by hand: the launchers themselves run, on tensors without
data (device "meta"), and what they would launch is compiled, with the specialisation that Triton would choose:
pointers that are multiples of 16 bytes, integers that are 1 or multiples of 16.

    python tests/aot_compile.py [--processes 2] [--targets sm_90 ...] [--table]
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ood_fast import kernels as package
from ood_fast.eager.rows import Softmax
from ood_fast.kernels import boundary, losses, nci, shards, statistics
from ood_fast.records import Geometry, Inputs, Labels, Needs, Shard

MODULES = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Disassembling takes 0.2 s a kernel: once. The loads of the other NVIDIA targets come from the same PTX.
SASS_TARGET = "sm_90"
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


class Job(NamedTuple):
    """One compilation. Hashable, so that equal launches compile once, and free of Triton objects, so that it can be
    sent."""

    kernel: str
    target: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    label: str = ""


def kernels() -> dict[str, triton.JITFunction]:
    """Every kernel of the package. What ends in _kernel is launched; the other jitted functions are parts of these."""
    return {
        name: value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


def unused() -> list[str]:
    """Jitted functions that are not kernels and that no jitted function mentions."""
    jitted = {v.fn: v for module in MODULES for v in vars(module).values() if isinstance(v, triton.JITFunction)}
    mentioned = {name for fn in jitted for name in fn.__code__.co_names}
    return sorted(fn.__name__ for fn in jitted if not fn.__name__.endswith("_kernel") and fn.__name__ not in mentioned)


def job_of(kernel: Any, target: str, label: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Job:
    """The compilation that a launch with these arguments causes."""
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages", 2)
    signature, constants, divisible = [], [], []
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    # An interpreted kernel keeps what it was decorated with.
    loose = getattr(kernel, "kwargs", vars(kernel))["do_not_specialize"] or ()
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        specialised = name not in loose
        if isinstance(value, Tensor):
            signature.append((name, TYPE_NAMES[value.dtype]))
            divisible.append(index)
        elif value is None or name in options or (specialised and type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if specialised and value % 16 == 0:
                divisible.append(index)
    return Job(
        kernel.fn.__name__, target, tuple(signature), tuple(constants), tuple(divisible), num_warps, num_stages, label
    )


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def run_elogitnorm(
    n: int, c: int, m: int, dtype: torch.dtype, *, weight_dtype: torch.dtype, heavy: bool, smoothing: float = 0.0
) -> None:
    """Forward and backward, and both at once; `heavy`: probability targets, class weights and smoothing, the most that
    a row can need."""
    logits, head_weight = meta(n, c, dtype=dtype), meta(c, m, dtype=weight_dtype)
    target = meta(n, c, dtype=dtype) if heavy else meta(n, dtype=torch.int64)
    class_weight, smoothing = (meta(c), 0.1) if heavy else (None, smoothing)
    labels = Labels(target, class_weight, -100, smoothing)
    if losses.steps_ahead(logits, head_weight, labels):
        divisor = None if losses.counts(labels, "mean") else meta(())
        *_, ahead = losses.elogitnorm_ahead(logits, head_weight, labels, 1e-6, 0, divisor)
        for need_weight in (False, True):
            losses.elogitnorm_finish(ahead, meta(()), logits, head_weight, need_weight)
    losses.elogitnorm_step(logits, head_weight, labels, losses.Rule(1e-6), meta(n), need_weight=True)
    _, _, tempered, geometry = losses.elogitnorm_forward(logits, head_weight, labels, 1e-6, 0)
    needs = Needs(logits=True, weight=True)
    losses.elogitnorm_backward(meta(n), logits, head_weight, labels, geometry, tempered, needs)


def run_boundary_distance(n: int, c: int, m: int, dtype: torch.dtype) -> None:
    logits, head_weight = meta(n, c, dtype=dtype), meta(c, m, dtype=dtype)
    _, predicted, slope, geometry = boundary.boundary_distance_forward(logits, head_weight, 0)
    boundary.boundary_distance_backward(meta(n), logits, head_weight, predicted, slope, geometry, Needs(logits=True))


def run_logitnorm(n: int, c: int, dtype: torch.dtype, *, heavy: bool) -> None:
    logits = meta(n, c, dtype=dtype)
    target = meta(n, c, dtype=dtype) if heavy else meta(n, dtype=torch.int64)
    class_weight, smoothing = (meta(c), 0.1) if heavy else (None, 0.0)
    labels = Labels(target, class_weight, -100, smoothing)
    _, tempered = losses.logitnorm_forward(logits, labels, 0.04)
    losses.logitnorm_backward(meta(n), logits, labels, tempered)


def run_nci(n: int, c: int, m: int, dtype: torch.dtype, *, weight_dtype: torch.dtype, from_features: bool) -> None:
    features, head_weight, mean = meta(n, m, dtype=dtype), meta(c, m, dtype=weight_dtype), meta(m)
    bias, logits = meta(c, dtype=weight_dtype), None if from_features else meta(n, c, dtype=dtype)
    _, projected = nci.nci_forward(features, head_weight, bias, mean, logits, 1e-3)
    needs = Needs(features=True, weight=True, mean=True)
    nci.nci_backward(meta(n), features, head_weight, mean, projected, 1e-3, needs)


def run_shard(n: int, c: int, m: int, dtype: torch.dtype) -> None:
    """A step of one process among two, each prediction another: the loss, and the distance."""
    logits, head = meta(n, c, dtype=dtype), SimpleNamespace(weight=meta(c, m, dtype=dtype))
    place, vector, left = meta(n, dtype=torch.int64), meta(n), meta(n, m)
    table, _, *kept = shards.shard_distances(head, left, place)
    shard = Shard(Geometry(place, table, place), place, vector, vector, vector, left, *kept)
    shards.shard_boundary_sums(logits, vector, shard.geometry)
    labels, both = Labels(meta(n, dtype=torch.int64), None, -100, 0.1), SimpleNamespace(start=c)
    softmax = Softmax(SimpleNamespace(labels=labels, shards=both, n_classes=2 * c), vector, vector, vector)
    shards.shard_softmax_sums(logits, vector, vector, vector, softmax[0])
    _, summed = shards.shard_gradients(vector, logits, softmax, vector, shard, Needs(logits=True, weight=True))
    shards.shard_pull(summed, shard, head, None)
    shards.shard_gradients(vector, logits, None, vector, shard, Needs(logits=True))


def run_statistics(
    n: int, c: int, m: int, dtype: torch.dtype, names: tuple[str, ...] = statistics.OF_LOGITS + statistics.OF_FEATURES
) -> None:
    """All statistics unless `names` are given; m = 0 or c = 0: without features or logits."""
    logits, features = (meta(n, width, dtype=dtype) if width else None for width in (c, m))
    head_weight, mean = (meta(c, m, dtype=dtype), meta(m)) if "projection" in names else (None, None)
    table = meta(c, c) if "distance" in names else None
    statistics.row_statistics([*names], Inputs(logits, features, head_weight, mean, table), 0.1)


def workloads() -> Iterator[tuple[str, Callable[[], None]]]:
    """The launches to compile: for each kernel a real head in each dtype that changes the code, and the widest row of
    each form. Every line costs CI four targets, so there is one where it shows a branch that no other line has."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    part = functools.partial
    # ImageNet-1K in batches with n < c, also with the head that autocast leaves in fp32, and with n >= c; CIFAR-100.
    for dtype, weight_dtype in ((fp32, fp32), (bf16, bf16), (bf16, fp32), (fp16, fp32)):
        yield "imagenet", part(run_elogitnorm, 256, 1000, 2048, dtype, weight_dtype=weight_dtype, heavy=False)
    yield "imagenet", part(run_elogitnorm, 4096, 1000, 2048, bf16, weight_dtype=bf16, heavy=False)
    yield "cifar100", part(run_elogitnorm, 512, 100, 512, fp32, weight_dtype=fp32, heavy=False)
    yield "imagenet", part(run_logitnorm, 256, 1000, fp16, heavy=False)
    # The widest row in registers; the looped form with an odd class count (scalar loads) and all that a row can need.
    yield "widest", part(run_elogitnorm, 8200, 8192, 512, fp32, weight_dtype=fp32, heavy=False, smoothing=0.1)
    yield "widest", part(run_statistics, 16, 8192, 2048, fp32)
    yield "widest", part(run_boundary_distance, 8200, 8191, 512, fp32)
    for dtype in (fp32, bf16):
        yield "looped", part(run_elogitnorm, 16, 21841, 768, dtype, weight_dtype=dtype, heavy=True)
    yield "looped", part(run_logitnorm, 16, 21841, fp32, heavy=True)
    yield "looped", part(run_boundary_distance, 16, 21841, 768, fp32)
    for dtype in (fp32, bf16):
        yield "imagenet", part(run_nci, 256, 1000, 2048, dtype, weight_dtype=dtype, from_features=False)
        yield "imagenet", part(run_nci, 256, 1000, 2048, dtype, weight_dtype=dtype, from_features=True)
    yield "imagenet", part(run_statistics, 256, 1000, 2048, bf16)
    yield "looped", part(run_statistics, 16, 21841, 768, fp32)
    yield "shared rows", part(run_statistics, 100_000, 10, 0, fp32, statistics.OF_LOGITS)
    yield "MSP", part(run_statistics, 256, 1000, 0, bf16, ("max", "logsumexp"))
    yield "NCI", part(run_statistics, 256, 1000, 2048, bf16, ("predicted", *statistics.OF_FEATURES))
    yield "norms", part(run_statistics, 256, 0, 2048, fp32, ("norm1", "norm2"))
    yield "imagenet", part(run_boundary_distance, 256, 1000, 2048, bf16)
    for dtype in (fp32, bf16):
        yield "shard", part(run_shard, 256, 1000, 2048, dtype)
    yield "mixed", part(run_nci, 64, 10, 512, bf16, weight_dtype=fp32, from_features=True)


def jobs(target: str) -> list[Job]:
    """Every distinct compilation for a target, from the launches of all workloads."""
    found: dict[Job, str] = {}
    for label, run in workloads():

        def record(kernel: Any, grid: Any, *arguments: Any, _label: str = label, **options: Any) -> None:
            job = job_of(kernel, target, "", arguments, options)
            found.setdefault(job, _label)

        for module in MODULES:
            for name, replacement in (
                ("launch", record),
                ("target_of", lambda tensor: "hip" if target == "gfx942" else target),
            ):
                if callable(getattr(module, name, None)):
                    setattr(module, name, replacement)
        run()
    return [job._replace(label=label) for job, label in found.items()]


def nvidia_tool(cubin: bytes, name: str, *options: str) -> str:
    """What one of the tools that Triton ships (cuobjdump, nvdisasm) prints about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def sass_usage(cubin: bytes) -> dict[str, Any]:
    """From the machine code: global loads by width in bits, accesses of local memory, atomic instructions."""
    text = nvidia_tool(cubin, "nvdisasm", "-ndf", "-c")  # without its data-flow analysis, which takes half of the time
    widths = collections.Counter()
    for modifiers in re.findall(r"\b(?:LDG|LDGSTS)\.(\S+)", text):
        width = re.search(r"\b[US]?(8|16|64|128|256)\b", modifiers.replace(".", " "))
        widths[width.group(1) if width else "32"] += 1
    widths["tensor"] = len(re.findall(r"\bUTMALDG\b", text))  # the copy engine: whole tiles
    return {
        "load_bits": {width: count for width, count in widths.items() if count},
        "local": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "atomics": sorted(set(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG)\.\S*", text))),
    }


def cuda_usage(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a cubin."""
    text = nvidia_tool(cubin, "cuobjdump", "-res-usage")
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spilled_bytes": usage["STACK"] + usage["LOCAL"]}


def hip_usage(assembly: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    spilled = field("private_segment_fixed_size") + 4 * field("vgpr_spill_count")
    return {"registers": field("vgpr_count"), "spilled_bytes": spilled}


def compiled(job: Job) -> Any:
    kernel = kernels()[job.kernel]
    names = [name for name, _ in job.signature]
    source = ASTSource(
        kernel,
        dict(job.signature),
        {(names.index(name),): value for name, value in job.constants},
        {(index,): [["tt.divisibility", 16]] for index in job.divisible},
    )
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[job.target], options=options)


def compile_job(job: Job) -> dict[str, Any]:
    code = compiled(job)
    record = {
        "kernel": job.kernel,
        "target": job.target,
        "launch": job.label,
        "dtypes": sorted({t for _, t in job.signature if t.startswith("*") and t != "*i64"}),
        "num_warps": job.num_warps,
        "shared_bytes": code.metadata.shared,
    }
    if job.target == "gfx942":
        assembly = code.asm["amdgcn"]
        atomics = re.findall(r"\b(?:global|flat|buffer)_atomic_\w+", assembly)
        loads = collections.Counter(re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly))
        return record | hip_usage(assembly) | {"atomics": sorted(set(atomics)), "accesses": dict(loads)}
    ptx = code.asm["ptx"]
    vectors = collections.Counter(re.findall(r"(?:ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?\.((?:v\d\.)?b\d+)\b", ptx))
    cubin = code.asm["cubin"]
    return (
        record
        | cuda_usage(cubin)
        | {"atomics": sorted(set(re.findall(r"\b(?:atom|red)\.[\w.]+", ptx))), "accesses": dict(vectors)}
        | ({"sass": sass_usage(cubin)} if job.target == SASS_TARGET else {})
    )


def table(records: list[dict[str, Any]]) -> str:
    """Registers (most of any launch) by kernel and target, as Markdown."""
    most: dict[str, dict[str, int]] = {}
    for record in records:
        by_target = most.setdefault(record["kernel"], {})
        by_target[record["target"]] = max(by_target.get(record["target"], 0), record["registers"])
    lines = ["| kernel | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(str(v[t]) for t in TARGETS) + " |" for name, v in sorted(most.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=[*TARGETS])
    parser.add_argument("--table", action="store_true", help="print a Markdown table instead of JSON")
    arguments = parser.parse_args()
    work = [job for target in arguments.targets for job in jobs(target)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        records = list(pool.map(compile_job, work, chunksize=4))
    if arguments.table:
        print(table(records))
    else:
        found = {"triton": triton.__version__, "kernels": sorted(kernels()), "unused": unused(), "records": records}
        json.dump(found, sys.stdout)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    main()
