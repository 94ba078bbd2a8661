"""Out-of-distribution detection for image classifiers: ELogitNorm, NCI, and the detectors around them.

    import ood_fast

    criterion = ood_fast.ELogitNormLoss(model.fc)     # criterion(model(x), y): one line changed in a training loop
    loss = ood_fast.elogitnorm(logits, z, W, b, y)    # the same as a function
    scores = ood_fast.nci_score(z, W, b, mean)        # higher = more in-distribution

`ood_fast.detectors`, `ood_fast.reference` and the other modules are imported when they are first used.
"""

import importlib

from .functional import boundary_distance, elogitnorm, l2_normalize, linear_elogitnorm, logitnorm, nci_score
from .heads import L2NormLinear
from .losses import ELogitNormLoss, LogitNormLoss

__version__ = "0.1.0"

__all__ = [
    "ELogitNormLoss",
    "L2NormLinear",
    "LogitNormLoss",
    "boundary_distance",
    "elogitnorm",
    "l2_normalize",
    "linear_elogitnorm",
    "logitnorm",
    "nci_score",
]

_MODULES = ("data", "detectors", "diagnostics", "heads", "metrics", "models", "ops", "reference")


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
