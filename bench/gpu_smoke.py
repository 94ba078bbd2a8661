"""Every public function once on a GPU, at usual and at odd shapes, against float64: seconds, and small enough for a
sanitizer.

    python -m bench.gpu_smoke            # every shape and dtype
    python -m bench.gpu_smoke --once     # three small shapes, for compute-sanitizer
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="few and small shapes, for compute-sanitizer")
    parser.add_argument("--dry", action="store_true", help="the smallest shape, on the CPU")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry else arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU found; --device cpu runs the same checks there")
    failed = passed = 0
    shapes = ONCE if arguments.once or arguments.dry else SHAPES + ODD_SHAPES
    for shape in shapes[:1] if arguments.dry else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case("smoke", *shape, dtype=dtype)
            for what, run in checks(case, device):
                with torch.set_grad_enabled(not what.startswith("nci")):
                    actual, truth = run()
                # The gradient of an untrained head that predicts well in bfloat16 is a difference of near equals.
                error, limit = relative_error(actual, truth), 2 * TOLERANCE[dtype]
                passed, failed = passed + (error <= limit), failed + (not error <= limit)
                if not error <= limit:
                    print(f"WRONG: {what} at {shape} {SHORT_NAMES[dtype]}: error {error:.1e} > {limit:.0e}")
    print(f"{passed} of {passed + failed} agree with float64 on {device}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
