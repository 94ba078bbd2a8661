"""The learning rate, a function of the step alone: a schedule has no state to save."""

from __future__ import annotations

import math

from ..recipes import TrainingRecipe

RISE, FIRST = 0.3, 1 / 25  # of one cycle: the share of the steps that rise, and the first rate of the highest


def cosine(first: float, last: float, step: float, n_steps: float) -> float:
    """Half a cosine from the first to the last rate."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / n_steps))


def learning_rate(recipe: TrainingRecipe, step: int, steps_an_epoch: int) -> float:
    """The rate of a step, counted from 0 over the whole training.

    Warm-up: w steps with (step + 1) / (w + 1) of the rate. Then a cosine over the other steps; or × gamma for each of
    the milestones (in epochs, warm-up included) that are complete; or one cycle, as `torch.optim.lr_scheduler.
    OneCycleLR`: half a cosine from 1/25 of the rate up to it over 30 % of the steps, another one down to the final rate
    (Smith and Topin, 2018, arXiv:1708.07120; the momentum stays).
    """
    warm_up = min(recipe.warmup_epochs, recipe.epochs) * steps_an_epoch
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / (warm_up + 1)
    high, low = recipe.learning_rate, recipe.final_learning_rate
    n_steps, step_after = recipe.epochs * steps_an_epoch - warm_up, step - warm_up
    if recipe.schedule == "cosine":
        return cosine(high, low, step_after, n_steps)
    if recipe.schedule == "onecycle":
        top = RISE * n_steps - 1
        if step_after <= top:
            return cosine(FIRST * high, high, step_after, top) if top > 0 else high
        return cosine(high, low, step_after - max(top, 0), max(n_steps - 1 - max(top, 0), 1))
    n_complete = sum(step >= milestone * steps_an_epoch for milestone in recipe.milestones)
    return recipe.learning_rate * recipe.gamma**n_complete
