"""Settings as data: the losses, how they are trained, and what `compare` scores with. Imports no torch.

`RECIPES` holds the settings of the papers and of their authors' code, each with the table or section that it repeats:

    recipe = recipes.find("cifar10-elogitnorm")
    recipe = recipes.override(recipe, ["lr=0.05", "epochs=200"])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .registry import added
from .values import KINDS

# What `data.open_benchmark` takes; here, because it is wanted where torch is not imported
BENCHMARK_NAMES = ("cifar10", "cifar100", "digits", "folder", "gtsrb", "imagenet", "imagenet200", "tin")
TAU = 0.04  # LogitNorm's temperature (Wei et al., ICML 2022), for its loss and for softmax(f / (τ‖f‖))


# ---- errors; `checks` imports torch, which only a message needs


def _refusal(message: str) -> Exception:
    from .checks import UserError

    return UserError(message)


def _unknown(what: str, name: object, known: Iterable[str]) -> str:
    from .checks import unknown

    return unknown(what, name, known)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise _refusal(f"{name}: got {value}, expected {expected}")


# ---- what a recipe is


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum and a cosine schedule by step, as the ELogitNorm authors train (they: 100 epochs)."""

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 0.1
    final_learning_rate: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class TrainingRecipe(Recipe):
    """All that decides a training run besides its seed and its machine. `UserError` on values that make no sense.

    Attributes:
        source: the table or section that it repeats, and what that leaves open.
        benchmark: one of `BENCHMARK_NAMES`.
        model, small_images, spectral_norm, activation, pretrained: as in `models.create`.
        init: a checkpoint whose weights the training starts from, head included; none if empty.
        head: "linear", or "l2norm" for `L2NormLinear`, with `head_tau` as its τ (None: L2 normalisation; 0.1: T2FNorm).
        loss: "ce", "logitnorm" with `tau`, or "elogitnorm" with `average` and `detach_geometry` as in `ELogitNormLoss`.
        label_smoothing: as in F.cross_entropy. mixup, cutmix: α of the Beta(α, α) that the share of an image is drawn
            from, 0 = off; with both on, one of them is drawn for each batch.
        optimizer: "sgd" (`momentum`, `nesterov`) or "adamw"; `weight_decay` for both.
        batch_size: of each process; n_processes: how many the source ran. Their product is what the rate is made for.
        schedule: "cosine", from `learning_rate` to `final_learning_rate` by step; "steps", × `gamma` when each epoch of
            `milestones` is complete; or "onecycle", up to `learning_rate` and down again. Before it, `warmup_epochs`
            with a rate that grows from 0 by step.
        amp: "none", "bf16" or "fp16" autocast.
    """

    name: str = ""
    source: str = ""
    benchmark: str = "digits"
    model: str = "small_cnn"
    small_images: bool = False
    spectral_norm: bool = False
    activation: str = "relu"
    pretrained: bool = False
    init: str = ""
    head: str = "linear"
    head_tau: float | None = None
    loss: str = "ce"
    tau: float = TAU
    average: str = "boundaries"
    detach_geometry: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    optimizer: str = "sgd"
    nesterov: bool = True
    n_processes: int = 1
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    amp: str = "none"

    def __post_init__(self) -> None:
        for name, choices in {**CHOICES, "loss": (*CHOICES["loss"], *added("loss"))}.items():
            if getattr(self, name) not in choices:
                raise _refusal(_unknown(name, getattr(self, name), choices))
        for name in ("epochs", "batch_size", "n_processes"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "tau"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in ("final_learning_rate", "weight_decay", "mixup", "cutmix", "gamma", "warmup_epochs"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "no negative number")
        for name in ("momentum", "label_smoothing"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        _require("head_tau", self.head_tau, self.head_tau is None or self.head_tau > 0, "none or a number above 0")
        ascending = tuple(sorted(set(self.milestones)))
        _require("milestones", self.milestones, self.milestones == ascending, "epochs in ascending order")
        if self.schedule == "steps":
            _require("milestones", self.milestones, bool(self.milestones), "epochs, for schedule=steps")
        if self.init and self.pretrained:
            raise _refusal("init, pretrained: expected one of them, weights to start from")


CHOICES = {
    "activation": ("relu", "leaky_relu"),
    "head": ("linear", "l2norm"),
    "loss": ("ce", "logitnorm", "elogitnorm"),
    "average": ("boundaries", "classes"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "steps", "onecycle"),
    "amp": ("none", "bf16", "fp16"),
}

# ---- what `compare` runs

# name -> what it is; `METHODS` has its settings
LOSSES = {
    "ce": "cross-entropy, the baseline",
    "logitnorm": f"LogitNorm: cross-entropy of f / (τ‖f‖), τ = {TAU}",
    "elogitnorm": "ELogitNorm: cross-entropy of f / D, D = mean distance to the decision boundaries",
    "l2norm": "cross-entropy with features of unit length in training (L2NormLinear)",
}
BASELINE = "ce"

# detector class name -> parameters that differ from the class's defaults
DETECTORS: dict[str, dict[str, Any]] = {
    "MSP": {},
    "MaxLogit": {},
    "Energy": {},
    "KNN": {"k": 10},  # about 110 training images a class: the 50th neighbour would lie in another one for many
    "NCI": {},  # α is chosen on validation images, see `commands.compare`
    "FDBD": {},
    "FeatureNorm": {},
}

# ---- the papers' settings

ELOGITNORM = "Ding et al., CVPR 2026, arXiv 2504.11434"
HAAS = "Haas et al., TMLR 2024, arXiv 2306.04072"
OPENOOD = "OpenOOD v1.5"

# The mean over all c classes is what the authors' code takes and the published numbers come from; the paper says c − 1.
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"loss": "ce"},
    "logitnorm": {"loss": "logitnorm"},
    "elogitnorm": {"loss": "elogitnorm", "average": "classes"},
    "t2fnorm": {"head": "l2norm", "head_tau": 0.1},
    "l2norm": {"head": "l2norm"},
}
# What of a recipe says which loss it is: runs that differ in nothing else are compared.
OF_THE_LOSS = ("loss", "tau", "average", "detach_geometry", "head", "head_tau")
BENCHMARKS = {
    "cifar10": TrainingRecipe(benchmark="cifar10", model="resnet18_32x32", small_images=True, epochs=100),
    "cifar100": TrainingRecipe(benchmark="cifar100", model="resnet18_32x32", small_images=True, epochs=100),
    # 128 images on each of two GPUs, as OpenOOD's script for this benchmark
    "imagenet200": TrainingRecipe(benchmark="imagenet200", model="resnet18", epochs=90, n_processes=2),
}

_STEPS = {  # appendix A.1: the rate falls to a tenth when these epochs are complete
    60: (40, 50),
    100: (75, 90),
    350: (150, 250),
}
_A1 = f"{HAAS}, appendix A.1; momentum 0.9 and weight decay 5e-4 are not told there"
_HAAS_RESNET = TrainingRecipe(
    benchmark="cifar10",
    model="resnet18",
    small_images=True,
    spectral_norm=True,
    activation="leaky_relu",
    head="l2norm",
    nesterov=False,
    batch_size=1024,
    schedule="steps",
    epochs=60,
    milestones=_STEPS[60],
)


def _steps(epochs: int) -> dict[str, Any]:
    return {"epochs": epochs, "milestones": _STEPS[epochs]}


_RESNET50 = {"model": "resnet50", "batch_size": 768}  # the batch of CIFAR-10; 512 for Tiny ImageNet
_VGG16 = {"model": "vgg16", "spectral_norm": False, "activation": "relu"}
_LARGE = {"small_images": False, "batch_size": 256}
_NOT_THERE = "no such run in the paper"

# benchmark and the rest of the name, settings, where it stands with L2 norm and without ("nol2"); None: not made
_HAAS_RUNS: tuple[tuple[str, dict[str, Any], str | None, str | None], ...] = (
    ("cifar10-60", _steps(60), "tables 1 to 4 and 8", "table 8"),
    ("cifar10-100", _steps(100), _NOT_THERE, None),
    ("cifar10-350", _steps(350), "table 4", "table 4"),
    ("cifar10-resnet50-100", _RESNET50 | _steps(100), "tables 1, 2 and 4", None),
    ("cifar10-resnet50-350", _RESNET50 | _steps(350), "table 4", "table 4"),
    ("cifar10-vgg16-60", _VGG16 | _steps(60), "tables 2 and 4", None),
    ("cifar10-vgg16-350", _VGG16 | _steps(350), None, "table 4, whose epochs are not told: as those of the ResNets"),
    *((f"cifar100-{epochs}", _steps(epochs), f"{_NOT_THERE}, whose CIFAR-100 is table 7", None) for epochs in _STEPS),
    (
        "cifar100-resnet50-150",
        _RESNET50 | {"epochs": 150, "milestones": (112, 135)},
        "table 7, whose steps are not told: those of 100 epochs, in proportion",
        None,
    ),
    ("cifar100-resnet50-350", _RESNET50 | _steps(350), None, "table 7"),
    *((f"imagenet200-{epochs}", _LARGE | _steps(epochs), f"{_NOT_THERE}; batch 256", None) for epochs in _STEPS),
    ("gtsrb-60", _steps(60), "table 5", "table 5"),
    ("tin-60", _steps(60), "table 6", "table 6"),
    ("tin-resnet50-60", _RESNET50 | _steps(60) | {"batch_size": 512}, "table 6", "table 6"),
)

_FINE_TUNED = {
    "elogitnorm": f"{ELOGITNORM}, ImageNet-1K: 30 epochs from torchvision's IMAGENET1K_V1, 128 images on each of 2",
    "logitnorm": f"{OPENOOD}, ImageNet-1K, with which {ELOGITNORM} compares: the same settings",
    "ce": "the same with cross-entropy, for comparison; the papers' row is torchvision's weights as they are",
}


def _all_recipes() -> Iterable[TrainingRecipe]:
    for benchmark, base in BENCHMARKS.items():
        for method, settings in METHODS.items():
            paper = f"{OPENOOD}, {method}" if method in ("ce", "t2fnorm") else f"{ELOGITNORM}, OOD tables"
            yield replace(base, **settings, name=f"{benchmark}-{method}", source=paper)
            if method != "t2fnorm":
                source = f"{ELOGITNORM}, table 5 (accuracy, 200 epochs)"
                yield replace(base, **settings, epochs=200, name=f"{benchmark}-{method}-200", source=source)

    for method, source in _FINE_TUNED.items():
        yield TrainingRecipe(
            name=f"imagenet-finetune-{method}",
            source=source,
            benchmark="imagenet",
            model="resnet50",
            pretrained=True,
            epochs=30,
            learning_rate=1e-3,
            n_processes=2,
            **METHODS[method],
        )

    for name, settings, with_l2, without in _HAAS_RUNS:
        benchmark, _, rest = name.partition("-")
        for kind, head, where in (("l2norm", "l2norm", with_l2), ("nol2", "linear", without)):
            if where is not None:
                named: dict[str, Any] = {
                    "name": f"{benchmark}-{kind}-{rest}",
                    "source": f"{_A1}; {where}",
                    "head": head,
                }
                yield replace(_HAAS_RESNET, benchmark=benchmark, **settings, **named)
    yield replace(
        _HAAS_RESNET,
        head="linear",
        loss="logitnorm",
        nesterov=True,
        batch_size=128,
        epochs=200,
        milestones=(80, 140),
        name="cifar10-logitnorm-plus",
        source=f"{HAAS}, table 1 (LogitNorm+); schedule of Wei et al., ICML 2022",
    )
    for kind, head in (("l2norm", "l2norm"), ("nol2", "linear")):
        yield TrainingRecipe(
            name=f"cifar10-{kind}-cct",
            source=f"{HAAS}, table 4: CCT-7/3x1 as its authors train it, without RandAugment and mixup's end at 175",
            benchmark="cifar10",
            model="cct_7_3x1",
            small_images=True,
            head=head,
            epochs=300,
            batch_size=128,
            optimizer="adamw",
            learning_rate=5.5e-4,
            final_learning_rate=1e-5,
            weight_decay=0.06,
            warmup_epochs=10,
            label_smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
        )
        yield TrainingRecipe(
            name=f"cifar10-{kind}-convnext",
            source=f"{HAAS}, table 4; A.1 says AdamW and one cosine; epochs, rate, decay and batch are ours",
            benchmark="cifar10",
            model="convnext_tiny",
            small_images=True,
            head=head,
            epochs=100,
            optimizer="adamw",
            learning_rate=1e-3,
            weight_decay=0.05,
            warmup_epochs=5,
        )

    for method, settings in METHODS.items():
        yield TrainingRecipe(
            name=f"digits-{method}",
            source="what `ood-fast compare` trains" if method != "t2fnorm" else "as the other digits recipes",
            **{**settings, "average": "boundaries"},
        )
        yield TrainingRecipe(
            name=f"folder-{method}",
            source="images of your own (docs/own-data.md): settings to begin with, of no paper",
            benchmark="folder",
            model="resnet18",
            epochs=60,
            **{**settings, "average": "boundaries"},
        )
    yield TrainingRecipe(name="digits-l2norm", source="what `ood-fast compare` trains", head="l2norm")


RECIPES: dict[str, TrainingRecipe] = {recipe.name: recipe for recipe in _all_recipes()}

# ---- by name, from a file, with changes

ALIASES = {"lr": "learning_rate", "optimiser": "optimizer"}


def find(name: str | Path) -> TrainingRecipe:
    """The recipe of that name, or from a JSON file: its settings, on top of those of `"base"` if it names a recipe.

    Raises:
        UserError: an unknown name, with the nearest known; a file that is not there or makes no sense.
    """
    if str(name) in RECIPES:
        return RECIPES[str(name)]
    path = Path(name)
    if path.suffix != ".json":
        raise _refusal(_unknown("recipe", str(name), RECIPES))
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise _refusal("is no regular file")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise _refusal("expected an object of settings")
        settings = {"name": path.stem, **settings}
        _require("name", "''", settings["name"] != "", "a name that a folder can have")
        return from_dict(settings)
    except OSError as error:
        raise _refusal(f"recipe {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(f"recipe {path}: no JSON ({error})") from error
    except ValueError as error:
        raise _refusal(f"recipe {path}: {error}") from error


def override(recipe: TrainingRecipe, settings: Iterable[str]) -> TrainingRecipe:
    """The recipe with changes, each written `key=value`: `lr=0.05`, `milestones=40,50`, `head_tau=none`, `amp=bf16`.

    Raises:
        UserError: an unknown key, with the nearest known; a value that is not of the field's type or makes no sense.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise _refusal(f"setting {setting!r}: expected key=value")
        name = _field(key)
        try:
            changes[name] = _FIELDS[name].parse(text.strip())
        except ValueError:
            raise _refusal(f"{key}: got {text!r}, expected {_FIELDS[name].expected}") from None
    return replace(recipe, **changes)


def as_dict(recipe: TrainingRecipe) -> dict[str, Any]:
    """Plain values for JSON; `from_dict` gives the recipe back."""
    return asdict(recipe) | {"milestones": list(recipe.milestones)}


def from_dict(settings: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe with these values, on top of `"base"` if it names one. `UserError` as in `override`."""
    settings = dict(settings)
    base = _base(settings.pop("base")) if "base" in settings else TrainingRecipe()
    name = settings.get("name", base.name)  # of the folder that a run is written in; empty for settings without a name
    if not isinstance(name, str) or name in (".", "..") or set(name) & set('/\\\0:*?"<>|'):
        raise _refusal(f"name: got {name!r}, expected a name that a folder can have")
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        name = key if key in ("name", "source") else _field(key)
        if not _FIELDS[name].accepts(value):
            raise _refusal(f"{key}: got {value!r}, expected {_FIELDS[name].expected}")
        changes[name] = tuple(value) if isinstance(value, list) else value
    return replace(base, **changes)


def _base(name: Any) -> TrainingRecipe:
    """A recipe of the package: files on top of files could go round."""
    if not isinstance(name, str) or name not in RECIPES:
        raise _refusal(f"base: {_unknown('recipe', name, RECIPES)}")
    return RECIPES[name]


def _field(key: str) -> str:
    name = ALIASES.get(key, key)
    if name not in _FIELDS or name in ("name", "source"):
        known = [*(field for field in _FIELDS if field not in ("name", "source")), *ALIASES]
        raise _refusal(_unknown("setting", key, known))
    return name


_FIELDS = {field.name: KINDS[str(field.type)] for field in fields(TrainingRecipe)}
