"""Training: the names of `ood_fast.training`, where each of them lives.

run = fit_recipe(recipes.find("cifar10-elogitnorm"), benchmark, "runs/mine")
"""

from .training import DivergedError, Interrupted, Run, Watcher, criterion_of, fit_recipe, load_run, model_of

__all__ = ["DivergedError", "Interrupted", "Run", "Watcher", "criterion_of", "fit_recipe", "load_run", "model_of"]
