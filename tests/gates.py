"""The committed tables behind test_gates.py, and how to make them anew after a change that is meant:

    python tests/gates.py kernels      # registers, shared memory, load widths of every kernel: some two minutes
    python -m bench.static --write     # the cost model: instructions that the cases issue, by kernel
    python tests/gates.py calls        # calls, passes and products of every function on the CPU: seconds

`static_gates/kernels-triton-<version>.csv` has a line for each kernel, dtypes and target. What compilers make of a
kernel depends on their version, so there is a table for each, and only its own version is compared with it.

`static_gates/calls.csv` has a line for each public function and shape:
    calls     ATen operators in a step, below autograd
    passes    elements read or written in tensors of the size of the logits or of the distance table, over n·c
    products  flops of matrix products, over those of the head's forward pass, 2·n·c·m
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parent / "static_gates"
CALLS = FOLDER / "calls.csv"
Line = dict[str, Any]

# ----------------------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------------------

KERNEL_COLUMNS = ("kernel", "dtypes", "target", "registers", "shared_bytes", "spilled_bytes", "load_bits")
# Rows of these launches cannot be read 128 bits at a time: an odd number of classes, or fewer than fill a load.
UNALIGNED = ("looped", "mixed", "one class", "shared rows")
HIP_LOADS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


@functools.cache
def compiled() -> dict[str, Any]:
    """What aot_compile.py prints: every kernel compiled for every target, once in a test run, in another process."""
    return _printed(str(Path(__file__).with_name("aot_compile.py")))


@functools.cache
def model() -> dict[str, Any]:
    """What `python -m bench.static --json` prints: the cost model of its cases."""
    return _printed("-m", "bench.static", "--json")


def _printed(*command: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parents[1])
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


def kernel_table_path(triton_version: str) -> Path:
    return FOLDER / f"kernels-triton-{triton_version}.csv"


def kernel_table(records: Iterable[dict[str, Any]]) -> list[Line]:
    """A line for each kernel, dtypes and target: the most registers and memory of its launches, and the widest load of
    the one that loads least at a time, over the launches whose rows allow 128 bits (empty if there is none)."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (
            record["kernel"].removesuffix("_kernel"),
            "+".join(d.strip("*") for d in record["dtypes"]),
            record["target"],
        )
        groups.setdefault(key, []).append(record)
    lines = []
    for key, launches in sorted(groups.items()):
        most = {name: max(r[name] for r in launches) for name in ("registers", "shared_bytes", "spilled_bytes")}
        widths = [widest_load(r) for r in launches if r["launch"] not in UNALIGNED]
        lines.append(dict(zip(KERNEL_COLUMNS, key, strict=False)) | most | {"load_bits": min(widths, default="")})
    return lines


def widest_load(record: dict[str, Any]) -> int:
    """Bits of the widest global access: of the machine code on sm_90 and gfx942, of the PTX on the others."""
    if "sass" in record:
        loads = record["sass"]["load_bits"]
        return 128 if "tensor" in loads else max(map(int, loads), default=0)
    if record["target"] == "gfx942":
        return max((HIP_LOADS.get(name, 16) for name in record["accesses"]), default=0)
    widths = [access.replace("v", "").replace("b", "").split(".") for access in record["accesses"]]
    return max((int(w[0]) * int(w[-1]) if len(w) == 2 else int(w[0]) for w in widths), default=0)


def worse_kernels(expected: list[Line], found: list[Line]) -> list[str]:
    """What a change made worse, or what the table does not know yet, as the lines to look at."""
    known = {_key(line): line for line in expected}
    complaints = []
    for line in found:
        before = known.get(_key(line))
        if before is None:
            complaints.append(f"not in the table: {_show(line)}")
            continue
        grown = [name for name in ("registers", "shared_bytes", "spilled_bytes") if line[name] > int(before[name])]
        if before["load_bits"] and (line["load_bits"] or 0) < int(before["load_bits"]):
            grown.append("load_bits")
        if grown:
            complaints.append(f"{', '.join(grown)}: was {_show(before)}; is {_show(line)}")
    missing = known.keys() - {_key(line) for line in found}
    return complaints + [f"in the table, but no longer compiled: {_show(known[key])}" for key in sorted(missing)]


def model_table_path(triton_version: str) -> Path:
    return FOLDER / f"model-triton-{triton_version}.csv"


def worse_model(expected: list[Line], found: Iterable[Line]) -> list[str]:
    """Where the cost model (bench/static.py) says more than the table allows: 2 % more instructions, a matrix
    instruction or a barrier more, a program fewer on a multiprocessor."""
    known = {(line["case"], line["kernel"]): line for line in expected}
    complaints = []
    for line in found:
        line = {name: line[name] for name in next(iter(known.values()), line)}
        before = known.get((line["case"], line["kernel"]))
        if before is None:
            complaints.append(f"not in the table: {_show(line)}")
            continue
        most = {name: float(before[name] or 0) for name in ("instructions", "matrix", "barriers")}
        most["instructions"] *= 1.02
        grown = [name for name, bound in most.items() if float(line[name] or 0) > bound]
        grown += ["programs"] if int(line["programs"]) < int(before["programs"]) else []
        if grown:
            complaints.append(f"{', '.join(grown)}: was {_show(before)}; is {_show(line)}")
    return complaints


def _key(line: Line) -> tuple[str, ...]:
    return tuple(str(value) for value in list(line.values())[:3])


def _show(line: Line) -> str:
    return ",".join(str(value) for value in line.values())


# ----------------------------------------------------------------------------------------------------------------------
# Calls, passes and products on the CPU
# ----------------------------------------------------------------------------------------------------------------------

OF_LOGITS = ("max", "predicted", "logsumexp", "entropy", "gen", "logit_norm1", "logit_norm2")
CALL_COLUMNS = ("function", "n", "c", "m", "calls", "passes", "products")
# One for each path of the CPU: small heads; n >= c; n < c; n < c in several chunks of rows.
SHAPES = ((128, 10, 512), (128, 100, 512), (384, 300, 128), (256, 1000, 2048), (96, 5000, 64))


class Passes(TorchDispatchMode):
    """Counts operators, and the elements they touch in tensors like the logits (r, c) or the table (k, c).

    No two of n, c and m may be equal. A view touches nothing; what is read and written in place is touched once.
    """

    def __init__(self, n_classes: int, n_features: int):
        super().__init__()
        self.n_classes, self.n_features = n_classes, n_features
        self.calls = self.touched = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls += 1
        if not func.is_view:
            seen = set()
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor) and self._is_large(tensor):
                    place = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
                    if place not in seen:
                        seen.add(place)
                        self.touched += tensor.numel()
        return result

    def _is_large(self, tensor: Tensor) -> bool:
        return tensor.dim() == 2 and self.n_classes in tensor.shape and self.n_features not in tensor.shape


def functions(shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """A step of every public function, forward and backward unless its name says otherwise."""
    import ood_fast
    from ood_fast.statistics import row_statistics

    n, c, m = shape
    torch.manual_seed(0)
    z, W, b = (t.requires_grad_() for t in (torch.randn(n, m), torch.randn(c, m) / m**0.5, torch.zeros(c)))
    logits = torch.nn.functional.linear(z, W).detach().requires_grad_()
    y, mean = torch.randint(c, (n,)), torch.zeros(m)
    grad = torch.autograd.grad
    detached = {"detach_geometry": True}

    def no_grad(step: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(step)

    return {
        "elogitnorm": lambda: grad(ood_fast.elogitnorm(logits, z, W, b, y), (logits, W)),
        "elogitnorm detached": lambda: grad(ood_fast.elogitnorm(logits, z, W, b, y, **detached), logits),
        "elogitnorm forward": no_grad(lambda: ood_fast.elogitnorm(logits, z, W, b, y)),
        "linear_elogitnorm": lambda: grad(ood_fast.linear_elogitnorm(z, W, b, y), (z, W, b)),
        "linear_elogitnorm detached": lambda: grad(ood_fast.linear_elogitnorm(z, W, b, y, **detached), (z, W, b)),
        "logitnorm": lambda: grad(ood_fast.logitnorm(logits, y), logits),
        "boundary_distance forward": no_grad(lambda: ood_fast.boundary_distance(logits, W)),
        "nci_score forward": no_grad(lambda: ood_fast.nci_score(z, W, b, mean, logits)),
        "row_statistics max, logsumexp": lambda: row_statistics(["max", "logsumexp"], logits),
        "row_statistics of logits": lambda: row_statistics(OF_LOGITS, logits),
        "nci_score forward, from features": no_grad(lambda: ood_fast.nci_score(z, W, b, mean)),
    }


def _addmm_flops(total: torch.Size, a: torch.Size, b: torch.Size, **ignored: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def _linear_flops(x: torch.Size, weight: torch.Size, *others: object, **ignored: object) -> int:
    return 2 * x.numel() * weight[0]


def _flop_counter() -> FlopCounterMode:
    """With the products that torch's counter does not know."""
    products = {torch.ops.aten.addmm_: _addmm_flops, torch.ops.aten.linear: _linear_flops}
    with contextlib.suppress(AttributeError):  # a build of torch without oneDNN
        products[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    return FlopCounterMode(display=False, custom_mapping=products)


def count(step: Callable[[], object], shape: tuple[int, int, int]) -> dict[str, float]:
    n, c, m = shape
    step()  # what is made once and kept is not part of a step
    with _flop_counter() as flops, Passes(c, m) as passes:
        step()
    return {
        "calls": passes.calls,
        "passes": round(passes.touched / (n * c), 1),
        "products": round(flops.get_total_flops() / (2 * n * c * m), 2),
    }


def call_table() -> list[Line]:
    from ood_fast.ops import use_backend

    with use_backend("eager"):
        return [
            {"function": name, "n": shape[0], "c": shape[1], "m": shape[2]} | count(step, shape)
            for shape in SHAPES
            for name, step in functions(shape).items()
        ]


def more_work(expected: list[Line], found: list[Line], same_torch: bool) -> list[str]:
    """What does more than the table allows. Another version of torch may need a tenth more calls for the same lines,
    or two."""
    known = {tuple(str(line[k]) for k in CALL_COLUMNS[:4]): line for line in expected}
    complaints = []
    for line in found:
        before = known.get(tuple(str(line[k]) for k in CALL_COLUMNS[:4]))
        if before is None:
            complaints.append(f"not in the table: {_show(line)}")
            continue
        calls = int(before["calls"])
        most = {"calls": calls if same_torch else max(1.1 * calls, calls + 2)}
        most |= {name: float(before[name]) * 1.01 + 0.05 for name in ("passes", "products")}
        grown = [name for name, bound in most.items() if line[name] > bound]
        if grown:
            complaints.append(f"{', '.join(grown)}: was {_show(before)}; is {_show(line)}")
    return complaints


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def read(path: Path) -> tuple[str, list[Line]]:
    """(what the first line says after the #, the lines)."""
    with path.open(newline="") as file:
        comment = file.readline().lstrip("# ").strip()
        return comment, list(csv.DictReader(file))


def write(path: Path, comment: str, columns: tuple[str, ...], lines: list[Line]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {comment}\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(f"{path}: {len(lines)} lines")


def main() -> None:
    chosen = sys.argv[1:] or ["kernels", "calls"]
    if unknown := set(chosen) - {"kernels", "calls"}:
        sys.exit(f"{', '.join(sorted(unknown))}: expected kernels, calls, or nothing for both")
    if "calls" in chosen:
        write(CALLS, f"torch {minor(torch.__version__)}", CALL_COLUMNS, call_table())
    if "kernels" in chosen:
        found = compiled()
        path = kernel_table_path(found["triton"])
        write(path, f"triton {found['triton']}", KERNEL_COLUMNS, kernel_table(found["records"]))


if __name__ == "__main__":
    main()
