"""Training: the names of `ood_fast.training`, where each of them lives.

run = fit_recipe(recipes.find("cifar10-elogitnorm"), benchmark, "runs/mine")   # images on the disk, a run's folder
train(model, criterion, split, recipe, seed)                                   # images that fit in memory
"""

from .training import DivergedError, Interrupted, Run, Watcher, criterion_of, fit_recipe, load_run
from .training.in_memory import criterion_for, model_for, train

__all__ = [
    "DivergedError",
    "Interrupted",
    "Run",
    "Watcher",
    "criterion_for",
    "criterion_of",
    "fit_recipe",
    "load_run",
    "model_for",
    "train",
]
