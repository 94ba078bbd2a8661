"""Training that can be left alone: recipes run on one process or many, checkpointed, resumed to the same bits.

`build.py` makes model, loss and optimiser of a recipe; `objective.py` is what a method needs of a step, `outliers.py`,
`mixing.py` and `contrastive.py` have such methods; `order.py` makes the batches, `schedules.py` the learning rate;
`folder.py` keeps a run on the disk, `options.py` says how it runs, `loop.py` trains.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .build import criterion_of, model_of, optimizer_of
from .folder import load_run
from .loop import Run
from .options import DivergedError, Interrupted, RunOptions, Watcher

if TYPE_CHECKING:
    from ..data import ImageBenchmark
    from ..recipes import TrainingRecipe

__all__ = ["DivergedError", "Interrupted", "Run", "RunOptions", "Watcher", "criterion_of", "fit_recipe", "load_run"]
__all__ += ["model_of", "optimizer_of"]


def fit_recipe(
    recipe: TrainingRecipe, benchmark: ImageBenchmark, out: str | os.PathLike[str], seed: int = 0, **options: Any
) -> Run:
    """Train `recipe` in the folder `out`, and return the finished `Run`, whose arguments `options` are."""
    run = Run(recipe, benchmark, out, seed, **options)
    run.train()
    return run
