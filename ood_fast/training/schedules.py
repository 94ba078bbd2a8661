"""The learning rate, a function of the step alone: a schedule has no state to save."""

from __future__ import annotations

import math

from ..recipes import Recipe, TrainingRecipe


def cosine(recipe: Recipe, step: int, n_steps: int) -> float:
    """Half a cosine from the first to the final rate."""
    low, high = recipe.final_learning_rate, recipe.learning_rate
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * step / n_steps))


def learning_rate(recipe: TrainingRecipe, step: int, steps_an_epoch: int) -> float:
    """The rate of a step, counted from 0 over the whole training.

    Warm-up: w steps with (step + 1) / (w + 1) of the rate. Then a cosine over the other steps, or × gamma for each of
    the milestones (in epochs, warm-up included) that are complete.
    """
    warm_up = min(recipe.warmup_epochs, recipe.epochs) * steps_an_epoch
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / (warm_up + 1)
    if recipe.schedule == "cosine":
        return cosine(recipe, step - warm_up, recipe.epochs * steps_an_epoch - warm_up)
    n_complete = sum(step >= milestone * steps_an_epoch for milestone in recipe.milestones)
    return recipe.learning_rate * recipe.gamma**n_complete
