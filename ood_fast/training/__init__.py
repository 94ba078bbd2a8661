"""Training that can be left alone: recipes run on one process or many, checkpointed, resumed to the same bits.

`build.py` makes model, loss and optimiser of a recipe, `order.py` the batches, `mixing.py` mixup and CutMix,
`schedules.py` the learning rate, `folder.py` keeps a run on the disk, `loop.py` trains.
"""

from .build import criterion_of, model_of, optimizer_of
from .folder import load_run
from .loop import DivergedError, Interrupted, Run, Watcher, fit_recipe

__all__ = [
    "DivergedError",
    "Interrupted",
    "Run",
    "Watcher",
    "criterion_of",
    "fit_recipe",
    "load_run",
    "model_of",
    "optimizer_of",
]
