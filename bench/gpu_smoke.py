"""Every public function once on a GPU, at usual and at odd shapes, against float64: seconds, and small enough for a
sanitizer.

    python -m bench.gpu_smoke            # every shape and dtype, in processes that compile side by side
    python -m bench.gpu_smoke --once     # three small shapes, for compute-sanitizer
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

import ood_fast
from ood_fast import reference

from .baselines import LINEAR_LOSSES, LOSSES
from .cases import SHORT_NAMES, Case, Inputs
from .conftest import TOLERANCE, relative_error

# n >= c and n < c; counts of classes and features that no vector load divides; one class more than a row in registers
# holds. Not two classes: gap over D is then the distance of the two rows, and the gradient of the logits is 0.
SHAPES = ((128, 10, 512), (128, 100, 512), (256, 1000, 2048), (4096, 1000, 768), (64, 8192, 64))
ODD_SHAPES = ((1, 3, 2), (3, 1, 5), (33, 37, 19), (257, 129, 65), (130, 1001, 511), (5, 8193, 33), (7, 21841, 17))
ONCE = ((33, 37, 19), (9, 130, 40), (3, 8193, 17))


def checks(case: Case, device: torch.device) -> Iterator[tuple[str, Callable[[], tuple[list[Tensor], list[Tensor]]]]]:
    """(what, a function that returns what was computed and the truth)."""
    x = Inputs.of(case, device)
    exact = x.double()
    if case.n_classes > 1:  # with one class there is no boundary, and the Gram form of the truth divides by 0
        for row in LOSSES + LINEAR_LOSSES:
            if row.name.startswith(("elogitnorm", "logitnorm", "linear_elogitnorm")):
                yield row.name, lambda row=row: (row.step(x), row.true_step(exact))
    arguments = (x.z, x.W, x.b, x.mean)
    truth = tuple(t.double() for t in arguments)
    for name, logits in (("nci_score", x.logits), ("nci_score, from features", None)):
        wide = None if logits is None else exact.logits
        yield (
            name,
            lambda logits=logits, wide=wide: (
                [ood_fast.nci_score(*arguments, logits)],
                [reference.nci_score(*truth, wide)],
            ),
        )


def checked(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[int, list[str]]:
    """(how many functions agree at one shape, what the others did)."""
    passed, wrong = 0, []
    case = Case("smoke", *shape, dtype=dtype)
    for what, run in checks(case, device):
        try:
            with torch.set_grad_enabled(not what.startswith("nci")):
                error = relative_error(*run())
        except Exception as failure:  # one kernel that does not compile hides none of the others
            wrong.append(f"{what} at {shape} {SHORT_NAMES[dtype]}: {type(failure).__name__}: {failure}")
            continue
        # The gradient of an untrained head that predicts well in bfloat16 is a difference of near equals.
        limit = 2 * TOLERANCE[dtype]
        if error <= limit:
            passed += 1
        else:
            wrong.append(f"{what} at {shape} {SHORT_NAMES[dtype]}: error {error:.1e} > {limit:.0e}")
    return passed, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="few and small shapes, for compute-sanitizer")
    parser.add_argument("--dry", action="store_true", help="the smallest shape, on the CPU")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry else arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU found; --device cpu runs the same checks there")
    shapes = ONCE if arguments.once or arguments.dry else SHAPES + ODD_SHAPES + ONCE
    work = [*itertools.product(shapes[: 1 if arguments.dry else None], (torch.float32, torch.bfloat16), [device])]
    # Each compiles a dozen kernels of its own: one after the other that is minutes.
    side_by_side = device.type == "cuda" and not arguments.once
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        failed = passed = 0
        for agree, wrong in (pool.map if side_by_side else map)(checked, *zip(*work, strict=True)):
            passed, failed = passed + agree, failed + len(wrong)
            for line in wrong:
                print(f"WRONG: {line}", flush=True)
    print(f"{passed} of {passed + failed} agree with float64 on {device}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
