"""Training on images that fit in memory: what `ood-fast compare` does with digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data import Split
from ..heads import L2NormLinear
from ..models import SmallCNN
from ..recipes import Recipe, TrainingRecipe
from .build import criterion_of
from .options import DivergedError
from .schedules import cosine


def model_for(loss: str, n_classes: int, seed: int) -> nn.Module:
    """The untrained classifier for `loss`. Its weights depend on `seed` alone: every loss starts from the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallCNN(n_classes, head=L2NormLinear if loss == "l2norm" else nn.Linear)


def criterion_for(loss: str, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss (logits, targets) -> scalar for a name of `recipes.LOSSES`."""
    return criterion_of(TrainingRecipe(loss="ce" if loss == "l2norm" else loss), model)  # its head normalises


def train(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    data: Split,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> list[float]:
    """Train `model` in place and return the mean loss of each epoch.

    The order of the images depends on `seed` alone, so that runs with different losses see the same batches. Batches
    are full; the rest of an epoch's order, fewer images than a batch, is left out (another rest each epoch).

    Args:
        on_epoch: called after each epoch with its number, from 1, and its mean loss.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    batch_size = min(recipe.batch_size, len(data.images))
    steps_an_epoch = len(data.images) // batch_size
    total_steps = recipe.epochs * steps_an_epoch
    order_generator = torch.Generator().manual_seed(seed)
    history = []
    model.train()
    # Same seeds, same numbers, also on a GPU: no convolution algorithm that is chosen by timing or sums in any order.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(data.images), generator=order_generator).to(data.images.device)
            epoch_loss = torch.zeros((), device=data.images.device)
            for step in range(steps_an_epoch):
                rows = order[step * batch_size : (step + 1) * batch_size]
                optimizer.param_groups[0]["lr"] = cosine(recipe, epoch * steps_an_epoch + step, total_steps)
                optimizer.zero_grad()
                loss = criterion(model(data.images[rows]), data.targets[rows])
                loss.backward()
                optimizer.step()
                epoch_loss += loss.detach()
            history.append(epoch_loss.item() / steps_an_epoch)
            if not math.isfinite(history[-1]):
                raise DivergedError(f"the training loss became {history[-1]} in epoch {epoch + 1}")
            on_epoch(epoch + 1, history[-1])
    model.eval()
    return history
