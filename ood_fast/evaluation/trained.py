"""The models that are evaluated, from what training left on the disk."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import checks, models, recipes
from ..recipes import TrainingRecipe
from ..training import load_run, model_of
from ..training.folder import CHECKPOINTS, COMPLETE, RUN

PRETRAINED = "pretrained:"


@dataclass(frozen=True)
class Trained:
    """A trained classifier and what is known of its training.

    Attributes:
        name: what tables call the run.
        model: in evaluation mode; None where what it made of the images is stored. head: as in `Detector.fit`.
        method: runs of one method are seeds of each other: the recipe's name, or that of the folder of the seeds.
        folder: where its results and its cache go.
        recipe: None if nobody said which. seed: None if unknown.
        info: `run.json`, or nothing.
    """

    name: str
    model: nn.Module | None
    method: str
    folder: Path
    checkpoint: str
    head: str | nn.Linear | None = None
    recipe: TrainingRecipe | None = None
    seed: int | None = None
    info: dict[str, Any] | None = None

    @property
    def family(self) -> Path:
        """The folder that holds the seeds, if it is in one that is called so, else the checkpoint."""
        file = Path(self.checkpoint).resolve()
        return file if self.seed is None else file.parent.parent

    @property
    def unfinished(self) -> str:
        """How far the training is, if it was not done; else empty."""
        if not self.info or self.recipe is None or self.info.get("status") == COMPLETE:
            return ""
        return f"the training is not complete: {self.info.get('epochs', 0)} of {self.recipe.epochs} epochs"


def paths_of(path: str | os.PathLike[str]) -> list[str]:
    """The runs that a path means: itself, or OpenOOD's `<path>/s<seed>/` with a checkpoint in each."""
    folder = Path(path).expanduser()
    if str(path).startswith(PRETRAINED) or not folder.is_dir() or _holds_run(folder):
        return [str(path)]
    seeds = [entry for entry in folder.iterdir() if re.fullmatch(r"s\d+", entry.name) and _holds_run(entry)]
    return [str(entry) for entry in sorted(seeds, key=lambda entry: int(entry.name[1:]))] or [str(path)]


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RUN, *CHECKPOINTS.values()))


def default_folder(path: str | os.PathLike[str]) -> Path:
    """Where the results of what `path` means go if nobody says: into the run, beside a checkpoint."""
    if str(path).startswith(PRETRAINED):
        return Path("runs") / str(path).replace(":", "-")
    path = Path(path).expanduser()
    return path if path.is_dir() else path.parent


def open_run(
    path: str | os.PathLike[str],
    n_classes: int,
    image_shape: tuple[int, int, int],
    *,
    model: str | nn.Module | None = None,
    recipe: str | os.PathLike[str] | None = None,
    checkpoint: str = "best",
    head: str | nn.Linear | None = None,
) -> Trained:
    """The model of one run.

    Args:
        path: a folder that `ood-fast train` wrote; one with nothing but a checkpoint, as OpenOOD's `<run>/s<seed>/`; a
            checkpoint; or "pretrained:NAME", torchvision's weights for ImageNet.
        n_classes, image_shape: of the benchmark; used where the folder does not say.
        model: name of the model (or the model, whose weights are replaced) of a checkpoint that does not say.
        recipe: what it was trained with, by name or file; says the model too.
        checkpoint: in a folder: "best", "final", "last" or a file.

    Raises:
        UserError: nothing there, a checkpoint that does not fit, or nothing says which model it is of.
    """
    given = None if recipe is None else recipes.find(os.fspath(recipe))
    if str(path).startswith(PRETRAINED):
        name = str(path).removeprefix(PRETRAINED)
        built = models.create(name, n_classes, pretrained=True).eval()
        if (published := models.n_published(name)) != n_classes:
            told = f"the published weights have {published} classes, the benchmark {n_classes}"
            raise checks.UserError(f"{path}: {told}: another head is drawn at random; train one")
        label = str(path).replace(":", "-")
        return Trained(str(path), built, label, default_folder(path), str(path), head, given)
    place = Path(path).expanduser()
    if (place / RUN).is_file():
        if model is not None or recipe is not None:
            raise checks.UserError(f"--model, --recipe: {place} says what it was trained with; leave them out")
        built, own, info = load_run(place, checkpoint)
        own = replace(own, n_processes=info.get("processes", own.n_processes))  # as it was run: they decide the batch
        file = place / CHECKPOINTS.get(checkpoint, checkpoint)
        return Trained(str(path), built.eval(), method_of(own), place, str(file), head, own, info.get("seed"), info)
    file = place if place.is_file() else place / CHECKPOINTS.get(checkpoint, checkpoint)
    if not file.is_file():
        wanted = f"{RUN}, {CHECKPOINTS.get(checkpoint, checkpoint)} or s0/, s1/, ... with such a file"
        raise checks.UserError(f"{place}: no run there, expected {wanted}")
    if isinstance(model, nn.Module):
        built = model
    elif model is not None:
        built = models.create(model, n_classes, in_channels=image_shape[0], image_size=image_shape[-1])
    elif given is not None:
        built = model_of(given, n_classes, image_shape, pretrained=False)
    else:
        raise checks.UserError(f"{file}: does not say of which model it is; give --model or --recipe")
    models.load_checkpoint(built, file)
    seed = re.fullmatch(r"s(\d+)", file.parent.name)
    named = file.resolve().parent.parent if seed else place.resolve()
    method = method_of(given) if given is not None else named.name if named.is_dir() else named.stem
    folder = place if place.is_dir() else place.parent
    return Trained(str(path), built.eval(), method, folder, str(file), head, given, int(seed[1]) if seed else None)


def as_published(run: Trained) -> bool:
    """Whether numbers that are published of the run's method are of the same training: the recipe of that name without
    changes, to its end; or weights that somebody else published."""
    if run.recipe is None:
        return run.name.startswith(PRETRAINED)
    if not unchanged(run.recipe):
        return False
    if run.info is None:
        return True
    return run.info.get("status") == COMPLETE and Path(run.checkpoint).name in CHECKPOINTS.values()


def method_of(recipe: TrainingRecipe) -> str:
    """The name of the recipe, and what was changed in it."""
    if recipe.name not in recipes.RECIPES:
        return recipe.name or "recipe"
    before, now = _what_counts(recipes.RECIPES[recipe.name]), _what_counts(recipe)
    return " ".join([recipe.name, *(f"{name}={value}" for name, value in now.items() if before[name] != value)])


def unchanged(recipe: TrainingRecipe) -> bool:
    """Whether these are the settings of the recipe of that name. Precision, and how the batch is spread over processes,
    may differ."""
    return recipe.name in recipes.RECIPES and same_training(recipe, recipes.RECIPES[recipe.name])


def same_training(one: TrainingRecipe, other: TrainingRecipe) -> bool:
    """Whether runs of the two are seeds of each other."""
    return _what_counts(one) == _what_counts(other)


def _what_counts(recipe: TrainingRecipe) -> dict[str, Any]:
    settings = recipes.as_dict(recipe)
    settings["batch_size"] *= settings.pop("n_processes")
    return {name: value for name, value in settings.items() if name not in ("name", "source", "amp")}
