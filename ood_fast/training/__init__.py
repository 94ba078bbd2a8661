"""Training that can be left alone: recipes run on one process or many, checkpointed, resumed to the same bits.

`build.py` makes model, loss and optimiser of a recipe, `order.py` the batches, `mixing.py` mixup and CutMix,
`schedules.py` the learning rate; `folder.py` keeps a run on the disk, `options.py` says how it runs, `loop.py` trains;
`in_memory.py` trains on images that fit in memory.
"""

from .build import criterion_of, model_of, optimizer_of
from .folder import load_run
from .loop import Run, fit_recipe
from .options import DivergedError, Interrupted, RunOptions, Watcher

__all__ = [
    "DivergedError",
    "Interrupted",
    "Run",
    "RunOptions",
    "Watcher",
    "criterion_of",
    "fit_recipe",
    "load_run",
    "model_of",
    "optimizer_of",
]
