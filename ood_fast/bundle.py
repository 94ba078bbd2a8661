"""A classifier, its detectors and how its images are prepared as one folder that can be handed on.

    ood_fast.save_bundle("flowers", model, detectors, {"size": 224, "resize": 256, "mean": ..., "std": ...},
                         architecture="resnet50")
    bundle = ood_fast.load_bundle("flowers")               # or load_bundle("flowers", MyNet())
    logits, score, is_ood = bundle.deploy()(bundle.transform()(image)[None])

    model.safetensors        the weights
    detectors.safetensors    fitted, with their thresholds
    bundle.json              format, architecture, classes, preparation, checksums of the two
    README.md                a model card, as the Hugging Face Hub shows it

There is no code in it: `models.create` makes the network from a name that the package knows, or the caller gives it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import __version__, checks, files, intact, models
from .deployment import Deployed, deploy
from .detectors import Detector, DetectorSet, load
from .heads import last_linear, unwrapped
from .models.checkpoints import n_classes_of
from .models.outputs import logits_of
from .models.running import evaluating, refuse_meta
from .models.weights import refuse_other

FORMAT = "ood_fast bundle 1"
WEIGHTS, DETECTORS, ABOUT, CARD = "model.safetensors", "detectors.safetensors", "bundle.json", "README.md"
PREPARED = ("size", "resize", "mean", "std")
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")  # torchvision's
TOLERANCE = 1e-3  # of the logits of one network made twice, relative to the largest


class Bundle(NamedTuple):
    """What `load_bundle` gives."""

    model: nn.Module  # in eval mode
    detectors: Detector | DetectorSet
    preparation: dict[str, Any]  # size, resize, mean, std, interpolation
    classes: tuple[str, ...] | None

    def deploy(self) -> Deployed:
        """As `ood_fast.deploy` of the two."""
        return deploy(self.model, self.detectors)

    def transform(self) -> Callable[[Any], Tensor]:
        """PIL image -> the tensor (channels, size, size) that the model takes; needs torchvision."""
        from .data.images import prepared_as

        return prepared_as(self.preparation)


def save_bundle(
    folder: str | os.PathLike[str],
    model: nn.Module,
    detectors: Detector | DetectorSet,
    preparation: Mapping[str, Any],
    *,
    architecture: str | None = None,
    classes: Sequence[str] | None = None,
    card: str = "",
) -> None:
    """Write the four files; they take the places of an older bundle's when all are whole, what else is there stays.

    Args:
        preparation: size (of the square that is cut), resize (of the short side before, or (height, width)), mean, std
            and, if it is not bilinear, interpolation.
        architecture: the name by which `models.create` makes this model, but for its weights, and `load_bundle` then;
            None: it has to be given there, as a model with options has to be (another head, activation, ...).
        classes: their names in the order of the logits; None: those of the detectors.
        card: Markdown that README.md says first: what it is for, what it was trained on, what it cannot do.

    Raises:
        ValueError, TypeError: arguments that are not so; an architecture that makes other logits of an image.
        RuntimeError: a detector is not fitted. OSError: not written; FileExistsError: such a file, of no bundle.
    """
    refuse_meta(model)
    checks.instance("detectors", detectors, (Detector, DetectorSet), "a Detector or a DetectorSet")
    preparation = _plain(preparation)
    named = dict(detectors.items()) if isinstance(detectors, DetectorSet) else {type(detectors).__name__: detectors}
    for name, detector in named.items():
        refuse_other(model, detector.fitted_on, name)
    names = classes or next((each.class_names for each in named.values() if each.class_names), None)
    layer = last_linear(unwrapped(model))
    if names is not None and layer is not None and len(names) != layer.out_features:
        raise ValueError(f"classes: got {len(names)} names, expected {layer.out_features}, one for each logit")
    taken = [file for name in (WEIGHTS, DETECTORS, CARD) if (file := Path(folder) / name).exists()]
    if taken and not (Path(folder) / ABOUT).exists():
        raise FileExistsError(f"{taken[0]}: is there, and no bundle, expected another folder")
    about: dict[str, Any] = {"format": FORMAT, "ood_fast": __version__, "torch": torch.__version__}
    about |= {"architecture": architecture, "preparation": preparation}
    about["classes"] = None if names is None else list(names)
    with files.staged(folder) as staging:
        state = {key: value.detach().cpu().clone() for key, value in unwrapped(model).state_dict().items()}
        models.save_checkpoint(state, staging / WEIGHTS)
        if architecture is not None:
            _check_architecture(model, architecture, staging, about)
        detectors.save(staging / DETECTORS, names, notes={"model": architecture, **preparation})
        about["sha256"] = {name: files.sha256(staging / name) for name in (WEIGHTS, DETECTORS)}
        about = json.loads(json.dumps(about))  # as it will be read
        about[intact.CHECKSUM] = intact.checksum_of(about)
        files.write_text(staging / ABOUT, json.dumps(about, indent=1) + "\n")
        files.write_text(staging / CARD, _card(Path(folder).name, about, named, card))


def _plain(preparation: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON holds it; ValueError for what no image could be prepared by."""
    if missing := [name for name in PREPARED if name not in preparation]:
        raise ValueError(f"preparation: got no {', '.join(missing)}, expected {', '.join(PREPARED)}")
    try:
        size, resize, mean, std = (torch.as_tensor(preparation[name], dtype=torch.float64) for name in PREPARED)
        whole = size.dim() == 0 and resize.shape in ((), (2,)) and mean.dim() == 1 and mean.shape == std.shape
        whole = whole and bool((size >= 1) & (resize >= 1).all() & mean.isfinite().all() & (std > 0).all())
    except (TypeError, ValueError, RuntimeError):  # no numbers
        whole = False
    if not whole:
        raise ValueError(
            f"preparation: got {dict(preparation)}, expected a size, resize (a length, or (height, width)), and mean "
            "and std of each channel"
        )
    plain = {name: getattr(value, "value", value) for name, value in preparation.items()}  # of an InterpolationMode
    checks.one_of("preparation: interpolation", plain.get("interpolation", "bilinear"), INTERPOLATIONS)
    numbers = {"size": int(size), "resize": resize.int().tolist(), "mean": mean.tolist(), "std": std.tolist()}
    return plain | numbers


def load_bundle(folder: str | os.PathLike[str], model: nn.Module | str | None = None) -> Bundle:
    """What `save_bundle` wrote, on the CPU.

    Args:
        model: an untrained one of the same architecture, which takes the weights; or the name of one for
            `models.create`; None: the name that the bundle has.

    Raises:
        OSError: a file is not there, or cannot be read.
        ValueError: not a bundle, damaged, files of several bundles; weights that do not fit the model, or no model.
    """
    files.settle(folder)
    folder = Path(folder)
    about = intact.read_json(folder / ABOUT)
    kinds: dict[str, Any] = {"format": str, "sha256": dict, "preparation": dict, "classes": (list, type(None))}
    whole = isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in kinds.items())
    if not whole or about["format"] != FORMAT or not set(PREPARED) <= set(about["preparation"]):
        raise ValueError(f"{folder / ABOUT}: is no bundle that ood_fast {__version__} reads")
    if about.get(intact.CHECKSUM, checksum := intact.checksum_of(about)) != checksum:  # older ones have none
        raise ValueError(f"{folder / ABOUT}: is damaged or was edited: its checksum is not its own; save it anew")
    for name in (WEIGHTS, DETECTORS):
        if about["sha256"].get(name) != files.sha256(folder / name):
            raise ValueError(f"{folder / name}: is damaged, or of another bundle: its checksum is not that of {ABOUT}")
    preparation, classes = about["preparation"], about["classes"]
    if model is None and (model := about.get("architecture")) is None:
        raise ValueError("model: got None, but the bundle names no architecture, expected the network of its weights")
    model = _with_weights(model, folder, about)
    return Bundle(model.eval(), load(folder / DETECTORS), preparation, None if classes is None else tuple(classes))


def _with_weights(model: nn.Module | str, folder: Path, about: Mapping[str, Any]) -> nn.Module:
    """The model, or the one of that name, with the weights in the folder."""
    if isinstance(model, str):
        n_classes = n_classes_of(folder / WEIGHTS) if about["classes"] is None else len(about["classes"])
        prepared = about["preparation"]
        model = models.create(model, n_classes, in_channels=len(prepared["mean"]), image_size=prepared["size"])
    checks.instance("model", model, nn.Module, "an nn.Module, the name of one, or None")
    models.load_checkpoint(model, folder / WEIGHTS)
    return model


@torch.no_grad()
def _check_architecture(model: nn.Module, name: str, folder: Path, about: Mapping[str, Any]) -> None:
    """ValueError unless `load_bundle` would make the model by that name: weights may fit another one, too."""
    with torch.random.fork_rng(devices=[]):
        made, like = _with_weights(name, folder, about).eval(), next(model.parameters())
    n_channels, size = len(about["preparation"]["mean"]), about["preparation"]["size"]
    x = torch.linspace(-2, 2, n_channels * size**2).view(1, n_channels, size, size).to(like)
    with evaluating(model):
        expected, found = (logits_of(network(x)) for network in (model, made.to(like)))
    if not (expected - found).abs().max() <= TOLERANCE * expected.abs().max():
        raise ValueError(
            f"architecture: {name!r} makes other logits with these weights than the model, which was made with options "
            "(a head with a temperature, another activation, ...); pass None, and the network to load_bundle"
        )


def _card(title: str, about: Mapping[str, Any], named: Mapping[str, Detector], text: str) -> str:
    rows = [
        f"| {name} | `{each}` | {'none' if each.threshold is None else f'{float(each.threshold):.6g}'} |"
        for name, each in named.items()
    ]
    tags = "library_name: ood_fast\npipeline_tag: image-classification\ntags:\n- out-of-distribution-detection"
    made = f'load_bundle("{title}"' + (")" if about["architecture"] else ", model)  # the network, untrained")
    use = f"```python\nimport ood_fast\n\nbundle = ood_fast.{made}\n```"
    prepared = ", ".join(f"{name} {value}" for name, value in about["preparation"].items())
    table = "\n".join(["| detector | parameters | threshold: scores below are OOD |", "|---|---|---|", *rows])
    parts = [f"---\n{tags}\n---", f"# {title}", text, use, table, f"Images: {prepared}."]
    return "\n\n".join(part for part in parts if part) + "\n"
