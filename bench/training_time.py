"""How long the recipes of docs/reproduce.md would train here: `python -m bench.training_time > training-time.txt`.

Images a second of the recipe's model, loss and optimiser on made images, without loading: one step, then two that are
timed. From that the hours of one seed. About two minutes on two cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ood_fast import recipes
from ood_fast.training.build import criterion_of, model_of, optimizer_of

from .measure import environment

# Images of an epoch (whole batches) and classes. Those of ImageNet-200: a fifth of ImageNet-1K's, rounded.
DATA = {"cifar10": (49_920, 10, 32), "imagenet200": (256_000, 200, 224), "imagenet": (1_281_000, 1000, 224)}
RECIPES = (
    *("cifar10-elogitnorm", "cifar10-elogitnorm-200", "cifar10-l2norm-resnet50-100"),
    *("imagenet200-elogitnorm", "imagenet-finetune-elogitnorm"),
)
STEPS = 2


def images_a_second(step: Callable[[], object], n_images: int) -> float:
    step()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * n_images / (time.perf_counter() - began)


def line(name: str, device: torch.device) -> str:
    """Recipe, model, input, multiply-adds of a forward pass, images of the training, operations, images/s, hours."""
    recipe = recipes.RECIPES[name]
    n_images, n_classes, size = DATA[recipe.benchmark]
    torch.manual_seed(0)
    model = model_of(recipe, n_classes, (3, size, size), pretrained=False).to(device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=device))
    operations = counter.get_total_flops()
    n = min(recipe.batch_size, 128 if size == 32 else 16)
    x, y = torch.randn(n, 3, size, size, device=device), torch.randint(0, n_classes, (n,), device=device)
    criterion, optimizer = criterion_of(recipe, model), optimizer_of(recipe, model.parameters())

    def train() -> float:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    def evaluate() -> float:
        with torch.no_grad():
            return model(x).sum().item()

    model.train()
    training = images_a_second(train, n)
    model.eval()
    evaluation = images_a_second(evaluate, n)
    total = n_images * recipe.epochs
    cells = (
        *(f"`{name}`", f"{recipe.model}, {size}×{size}", f"{operations / 2e9:.3f}", f"{n_images:,} × {recipe.epochs}"),
        *(f"{3 * operations * total / 1e15:,.3g}", f"{training:.1f}", f"{total / training / 3600:,.0f}"),
        f"{evaluation:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(", ".join(f"{name} {value}" for name, value in environment().items()), end="\n\n")
    header = ["recipe", "model, input", "forward, 10⁹ multiply-adds an image", "images × epochs"]
    header += ["training, 10¹⁵ operations", "images/s", "hours", "images/s, evaluation"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name in RECIPES:
        print(line(name, device), flush=True)


if __name__ == "__main__":
    main()
