"""A run on the disk. Every file appears under its name when all of it is written; see `models.save_checkpoint`.

run.json          recipe, seed, benchmark, how far it is; what `load_run` needs
log.csv           a row for each epoch; diagnostics.csv likewise, if asked for
last.ckpt         all that `--resume` needs, the rows of both tables included
best.ckpt         state_dict with the best validation accuracy, the later of equals (as OpenOOD keeps it)
final.ckpt        state_dict of the last epoch
epochs/0010.ckpt  state_dicts, if asked for
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import checks, files, intact, models, recipes, spreadsheet
from ..models.checkpoints import read_checkpoint
from ..registry import added, code_key
from .build import OF_IMAGES, model_of

if TYPE_CHECKING:
    from ..data import ImageBenchmark
    from .loop import Run

RUN, LOG, DIAGNOSTICS = "run.json", "log.csv", "diagnostics.csv"
LAST, BEST, FINAL, EPOCHS = "last.ckpt", "best.ckpt", "final.ckpt", "epochs"
CHECKPOINTS = {"best": BEST, "final": FINAL, "last": LAST}  # as people call them
COMPLETE = "complete"
# of run.json, besides the recipe and what is prepared: a run is only continued where these are the same
DECIDING: tuple[str, ...] = ("seed", "init_weights", "processes", "sync_bn", "loss_code", "model_code")
IMAGES: tuple[str, ...] = ("class_names", "image_shape", "training_images", "validation_images", "training_content")
IMAGES += ("validation_content",)
DECIDING += IMAGES


def describe(run: Run, status: str) -> dict[str, Any]:
    """What run.json says of a run. `DECIDING` names what decides the outcome."""
    benchmark, options = run.benchmark, run.options
    return {
        "status": status,
        "id": run.folder.id,
        "epochs": run.epoch,
        "best": run.best,
        "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": recipes.as_dict(run.recipe),
        "seed": run.seed,
        "init_weights": file_key(run.recipe.init),
        "loss_code": loss_code(run.recipe),
        "model_code": code_key([added("model").get(run.recipe.model)]),
        "processes": run.n_processes,
        "sync_bn": options.sync_bn,
        **images_of(benchmark),
        "n_classes": benchmark.n_classes,
        "prepared": benchmark.prepared,
        "outlier_images": None if benchmark.outliers is None else len(benchmark.outliers),
        "outlier_content": _content(benchmark.outliers),
        "device": str(run.device),
        "workers": options.workers,
        "compile": options.compile,
        "channels_last": options.channels_last,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **(options.context or {}),
    }


def images_of(benchmark: ImageBenchmark) -> dict[str, Any]:
    """What run.json says of the images, which runs that are compared have in common."""
    return {
        "benchmark": benchmark.name,
        "class_names": list(benchmark.class_names),
        "image_shape": list(benchmark.image_shape),
        "training_images": len(benchmark.train),
        "validation_images": len(benchmark.validation),
        "training_content": _content(benchmark.train),
        "validation_content": _content(benchmark.validation),
    }


def loss_code(recipe: recipes.TrainingRecipe) -> str | None:
    """What tells the text of a loss of the user's own from what it was before."""
    return code_key([added("loss").get(recipe.loss)])


def _content(images: Any) -> str | None:
    key: str | None = getattr(images, "content", None)  # not of a data set of the caller's own
    return key


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.id = uuid.uuid4().hex  # by which evaluations know the run, wherever its folder is moved

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While a run trains, no other may in this folder, which is made; UserError if one does, or it cannot be."""
        checks.writable_folder("--out", self.path)
        missing = [parent for parent in (self.path, *self.path.parents) if not parent.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with files.locked(self.path):
                yield
        except files.BusyError as error:
            raise checks.UserError(f"--out: {self.path}: another training is at work there") from error
        finally:
            for parent in missing:  # where nothing came of it
                with suppress(OSError):
                    parent.rmdir()

    def claim(self, info: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
        """What `last.ckpt` holds of the run that `info` tells of, to continue from; None to start anew. Writes nothing.

        Raises:
            UserError: the folder holds something else, a run with other settings, or this run without `resume`.
        """
        checks.writable_folder("--out", self.path)
        # A part alone: killed before its first file was there, nothing is lost.
        if not self.path.is_dir() or all(re.fullmatch(rf"\.{RUN}\..*part", e.name) for e in self.path.iterdir()):
            return None
        if not (self.path / RUN).is_file():
            raise checks.UserError(f"--out: {self.path} is not empty and holds no run; pass another folder")
        there = read_info(self.path)
        self.id = there.get("id", self.id)
        if differences := _differences(_deciding(there), _deciding(info)):
            raise checks.UserError(
                f"--out: {self.path} holds a run with other settings ({'; '.join(differences)}); pass another "
                "--out, or these settings and --resume to continue it"
            )
        if not resume:
            done, wanted = there.get("epochs", 0), there["recipe"]["epochs"]
            raise checks.UserError(
                f"--out: {self.path} holds this run, {done} of {wanted} epochs done; pass --resume to continue it, or "
                "another --out"
            )
        if not (self.path / LAST).is_file():
            return None
        state = read_checkpoint(self.path / LAST)
        if missing := [part for part in ("model", "optimizer", "history", "ranks") if part not in state]:
            raise checks.UserError(f"{self.path / LAST}: nothing to continue from, it holds no {missing[0]}")
        return state

    def finished(self, info: Mapping[str, Any]) -> bool:
        """Whether it holds the run that `info` tells of, trained to its end."""
        if not all((self.path / name).is_file() for name in (RUN, BEST, FINAL)):
            return False
        there = read_info(self.path)
        return there.get("status") == COMPLETE and not _differences(_deciding(there), _deciding(info))

    def write_info(self, info: Mapping[str, Any]) -> None:
        """run.json."""
        files.write_text(self.path / RUN, json.dumps(info, indent=2, ensure_ascii=False) + "\n")

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows anew: after a resume, none is there twice."""
        text = io.StringIO()
        spreadsheet.write_records(text, rows)
        files.write_text(self.path / name, text.getvalue())

    def write_checkpoint(self, name: str, contents: nn.Module | Mapping[str, Any]) -> None:
        """A state_dict, or what `--resume` needs."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        models.save_checkpoint(contents, path)


def file_key(path: str | os.PathLike[str] | None) -> str | None:
    """What tells the bytes of a checkpoint, if there is one, from others; UserError if it cannot be read."""
    try:
        return files.sha256(path)[:16] if path else None
    except OSError as error:
        raise checks.UserError(f"init: {path}: {error.strerror or error}") from error


def _deciding(info: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {name: value for name, value in info["recipe"].items() if name not in ("name", "source", "init")}
    prepared = {f"prepared: {name}": value for name, value in (info.get("prepared") or {}).items()}
    beside = ("outlier_images", "outlier_content") * (
        recipe.get("outliers") in OF_IMAGES or recipe.get("loss") in added("loss")
    )
    images = {name: info.get(name) for name in (*DECIDING, *beside)}
    read: dict[str, Any] = json.loads(json.dumps(recipe | images | prepared))
    return read  # as from a file


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} here"
        for name in dict.fromkeys([*there, *here])
        if differ(name, there, here)
    ]


def differ(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two runs have another value of it; runs of older versions say nothing of the content of images, and not
    all code has a text."""
    unknown = name.endswith(("_content", "_code")) and None in (there.get(name), here.get(name))
    return not unknown and bool(there.get(name) != here.get(name))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `run.json` in the folder of a run says; settings that its recipe does not know have their defaults.

    Raises:
        UserError: there is none, or it is not what `ood-fast train` writes.
    """
    file = Path(path).expanduser() / RUN
    try:
        info = intact.read_json(file)
    except OSError as error:
        raise checks.UserError(f"{path}: no run ({RUN}: {error.strerror or error})") from error
    if not isinstance(info, dict) or not isinstance(info.get("recipe"), dict):
        raise checks.UserError(f"{file}: says nothing of a recipe, expected what `ood-fast train` writes")
    for name, kind in (("benchmark", str), ("n_classes", int), ("image_shape", list)):
        if not isinstance(info.get(name), kind):
            raise checks.UserError(
                f"{file}: {name}: got {info.get(name)!r}, expected what `ood-fast train` writes ({kind.__name__})"
            )
    try:
        recipe = recipes.from_dict(info["recipe"])
    except checks.UserError as error:
        raise checks.UserError(f"{file}: {error}") from error
    return info | {"recipe": recipes.as_dict(recipe)}


def load_run(
    path: str | os.PathLike[str], checkpoint: str = "best"
) -> tuple[nn.Module, recipes.TrainingRecipe, dict[str, Any]]:
    """(model, recipe, info) of the run in the folder `path`; the model on the CPU, in evaluation mode.

    Args:
        checkpoint: "best", "final", "last", or a file in the folder, as "epochs/0010.ckpt".

    Raises:
        UserError: no run, no such checkpoint, or one that does not fit.
    """
    folder = Path(path).expanduser()
    info = read_info(folder)
    recipe = recipes.from_dict(info["recipe"])
    model = model_of(recipe, info["n_classes"], tuple(info["image_shape"]), pretrained=False)
    models.load_checkpoint(model, folder / CHECKPOINTS.get(checkpoint, checkpoint))
    return model.eval(), recipe, info
