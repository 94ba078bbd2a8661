"""Out-of-distribution detection for image classifiers: ELogitNorm, NCI, and the detectors around them.

    import ood_fast

    criterion = ood_fast.ELogitNormLoss(model.fc)     # criterion(model(x), y): one line changed in a training loop
    loss = ood_fast.elogitnorm(logits, z, W, b, y)    # the same as a function
    scores = ood_fast.nci_score(z, W, b, mean)        # higher = more in-distribution

Every name is imported when it is first used, and torch with it: the command line can so report what goes wrong in that
import. A program that runs the operators by their registered names alone imports `ood_fast.ops`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import load_bundle, save_bundle
    from .deployment import deploy
    from .functional import boundary_distance, elogitnorm, l2_normalize, linear_elogitnorm, logitnorm, nci_score
    from .heads import L2NormLinear
    from .losses import ELogitNormLoss, LogitNormLoss
    from .monitor import Monitor
    from .registry import register

__version__ = "0.1.0"

__all__ = ["ELogitNormLoss", "L2NormLinear", "LogitNormLoss", "Monitor", "boundary_distance", "deploy", "elogitnorm"]
__all__ += ["l2_normalize", "linear_elogitnorm", "load_bundle", "logitnorm", "nci_score", "register", "save_bundle"]

_MODULES = ["bundle", "data", "dense", "deployment", "detectors", "diagnostics", "distributed", "evaluate", "features"]
_MODULES += ["functional", "heads", "interop", "losses", "metrics", "models", "monitor", "onnx_export", "ops"]
_MODULES += ["recipes", "reference", "serving", "statistics", "train"]
# where they are defined, but for those of `functional`
_HOMES = {"ELogitNormLoss": "losses", "LogitNormLoss": "losses", "L2NormLinear": "heads", "Monitor": "monitor"}
_HOMES |= {"deploy": "deployment", "load_bundle": "bundle", "save_bundle": "bundle", "register": "registry"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'functional')}"), name)
        globals()[name] = value  # the next time it is found without coming here
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
