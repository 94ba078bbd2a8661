"""The settings of the papers and of their authors' code, each with the table or section that it repeats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .recipe import CONTRASTIVE, TAU, WITH_IMAGES, TrainingRecipe

# ---- what `compare` runs

# name -> what it is; `METHODS` has its settings
LOSSES = {
    "ce": "cross-entropy, the baseline",
    "logitnorm": f"LogitNorm: cross-entropy of f / (τ‖f‖), τ = {TAU}",
    "elogitnorm": "ELogitNorm: cross-entropy of f / D, D = mean distance to the decision boundaries",
    "l2norm": "cross-entropy with features of unit length in training (L2NormLinear)",
}
# of `METHODS` too, not among what `compare` trains unless asked to
MORE_LOSSES = {
    "vos": "VOS: cross-entropy, and virtual outliers told from samples by their energy",
    "elogitnorm-vos": "ELogitNorm with VOS's outliers",
    "npos": "NPOS: CIDER, and outliers drawn where a class has few neighbours",
    "elogitnorm-npos": "ELogitNorm with NPOS's outliers",
    "oe": "outlier exposure: cross-entropy, and uniform predictions of --outliers",
    "elogitnorm-oe": "the same with ELogitNorm",
    "mixoe": "cross-entropy, and images mixed with --outliers",
    "regmixup": "RegMixup: cross-entropy of images and of mixed images",
    "supcon": "supervised contrastive features, and a linear head on them",
    "ish": "ISH: cross-entropy, the head learning from sharpened features",
    "cider": "CIDER: features near prototypes, and a linear head on them",
    "palm": "PALM: features near some of several prototypes of a class, and a linear head on them",
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
    "vos": {"outliers": "vos"},
    "elogitnorm-vos": {"loss": "elogitnorm", "average": "classes", "outliers": "vos"},
    "npos": {"loss": "cider", "outliers": "npos"},
    "elogitnorm-npos": {"loss": "elogitnorm", "average": "classes", "outliers": "npos"},
    "oe": {"outliers": "oe", "outlier_batch_size": 256},
    "elogitnorm-oe": {"loss": "elogitnorm", "average": "classes", "outliers": "oe", "outlier_batch_size": 256},
    "mixoe": {"outliers": "mixoe"},
    "regmixup": {"regmixup": 20.0},
    "ish": {"head": "ish"},
    "supcon": {"loss": "supcon"},
    "cider": {"loss": "cider"},
    "palm": {"loss": "palm"},
}
# What of a recipe says which loss it is: runs that differ in nothing else are compared.
OF_THE_LOSS = (
    *("loss", "tau", "prototype_momentum", "average", "detach_geometry", "head", "head_tau"),
    *("outliers", "outlier_weight", "outlier_start", "outlier_queue", "outlier_batch_size", "regmixup"),
)
_VOS, _OE = "Du et al., ICLR 2022, arXiv 2202.01197", "Hendrycks et al., ICLR 2019, arXiv 1812.04606"
_NPOS = "Tao et al., ICLR 2023, arXiv 2303.02966"
_THEIRS, _CROPS = f"as {OPENOOD} trains it", "crops and flips, no colours"
_SSD = "Khosla et al., NeurIPS 2020, arXiv 2004.11362 (SSD+, KNN+)"
SOURCES = {  # of what is trained with the schedule of `BENCHMARKS`; others: the tables of ELogitNorm
    "ce": OPENOOD,
    "t2fnorm": OPENOOD,
    "vos": f"{_VOS}, with the schedule of {OPENOOD}, whose term of VOS has no gradient in the model",
    "elogitnorm-vos": f"of no paper: {ELOGITNORM}, with the outliers of {_VOS}",
    "npos": f"{_NPOS}, {_THEIRS}; {_CROPS}",
    "elogitnorm-npos": f"of no paper: {ELOGITNORM}, with the outliers of {_NPOS}",
    "oe": f"{_OE}, {_THEIRS}",
    "elogitnorm-oe": f"of no paper: {ELOGITNORM}, with the outliers of {_OE}",
    "mixoe": f"Zhang et al., WACV 2023, arXiv 2106.03917, {_THEIRS}, from trained weights: --init FILE",
    "regmixup": f"Pinto et al., NeurIPS 2022, arXiv 2206.14502, {_THEIRS}",
    "ish": "Xu et al., ICLR 2024, arXiv 2310.00227, with the share that is pruned on ImageNet",
    "supcon": f"{_SSD}, with the settings of CIDER; crops and flips",
    "cider": f"Ming et al., ICLR 2023, arXiv 2203.04450, {_THEIRS}; {_CROPS}",
    "palm": f"Lu et al., ICLR 2024, arXiv 2402.02653, {_THEIRS}; {_CROPS}",
}
_CONTRASTIVE = {"batch_size": 512, "learning_rate": 0.5, "final_learning_rate": 5e-4, "weight_decay": 1e-4}
_SMALL_STEPS = {"learning_rate": 0.1, "final_learning_rate": 1e-4, "weight_decay": 1e-4, "warmup_epochs": 10}
OWN_SCHEDULE: dict[str, dict[str, Any]] = {
    "mixoe": {"epochs": 10, "learning_rate": 1e-3},  # from trained weights
    "supcon": _CONTRASTIVE | {"warmup_epochs": 10},
    "cider": _CONTRASTIVE | {"warmup_epochs": 10},
    "palm": _CONTRASTIVE | {"warmup_epochs": 10},
    "cifar100-cider": {"prototype_momentum": 0.5},
    "cifar100-regmixup": {"regmixup": 10.0},
    "imagenet200-regmixup": {"regmixup": 10.0},
    "cifar10-palm": _SMALL_STEPS | {"batch_size": 16, "prototype_momentum": 0.9},
    "npos": _SMALL_STEPS | {"batch_size": 256},
}
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


def _steps(epochs: int) -> dict[str, Any]:
    return {"epochs": epochs, "milestones": _STEPS[epochs]}


_SMALL: dict[str, Any] = {"benchmark": "cifar10", "small_images": True}
_HAAS: dict[str, Any] = {"model": "resnet18", "spectral_norm": True, "activation": "leaky_relu", "head": "l2norm"}
_HAAS |= {"nesterov": False, "batch_size": 1024, "schedule": "steps"}
_HAAS_RESNET = TrainingRecipe(**_SMALL, **_HAAS, **_steps(60))
_PLUS: dict[str, Any] = {"head": "linear", "loss": "logitnorm", "nesterov": True, "batch_size": 128}
_PLUS |= {"epochs": 200, "milestones": (80, 140)}
_CCT: dict[str, Any] = {"model": "cct_7_3x1", "optimizer": "adamw", "epochs": 300, "batch_size": 128}
_CCT |= {"learning_rate": 5.5e-4, "final_learning_rate": 1e-5, "weight_decay": 0.06, "warmup_epochs": 10}
_CCT |= {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0}
_CONVNEXT: dict[str, Any] = {"model": "convnext_tiny", "optimizer": "adamw", "epochs": 100}
_CONVNEXT |= {"learning_rate": 1e-3, "weight_decay": 0.05, "warmup_epochs": 5}
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
    "ish": f"Xu et al., ICLR 2024, arXiv 2310.00227, as {OPENOOD} has it (its head decays by 5e-5), 128 on each of 4",
}
_IMAGENET: dict[str, Any] = {"benchmark": "imagenet", "model": "resnet50", "pretrained": True}
_DING: dict[str, Any] = {"epochs": 30, "learning_rate": 1e-3, "n_processes": 2}
_ISH: dict[str, Any] = {"epochs": 10, "learning_rate": 3e-3, "n_processes": 4}


def _all_recipes() -> Iterable[TrainingRecipe]:
    for benchmark, base in BENCHMARKS.items():
        for method, settings in METHODS.items():
            paper = SOURCES.get(method, f"{ELOGITNORM}, OOD tables")
            paper += f", {method}" * (paper == OPENOOD)
            if settings.get("loss") in CONTRASTIVE and benchmark == "imagenet200":
                continue  # OpenOOD fine-tunes the last block there; of NPOS more outliers are drawn
            name = f"{benchmark}-{method}"
            own = {**OWN_SCHEDULE.get(method, {}), **OWN_SCHEDULE.get(name, {})}
            yield replace(base, **{**settings, **own}, name=name, source=paper)
            if method in LOSSES:  # in its table 5
                source = f"{ELOGITNORM}, table 5 (accuracy, 200 epochs)"
                yield replace(base, **settings, epochs=200, name=f"{benchmark}-{method}-200", source=source)

    for method, source in _FINE_TUNED.items():
        settings = {**_IMAGENET, **(_ISH if method == "ish" else _DING), **METHODS[method]}
        yield TrainingRecipe(name=f"imagenet-finetune-{method}", source=source, **settings)

    for name, settings, with_l2, without in _HAAS_RUNS:
        benchmark, _, rest = name.partition("-")
        for kind, head, where in (("l2norm", "l2norm", with_l2), ("nol2", "linear", without)):
            if where is not None:
                told: dict[str, Any] = {"name": f"{benchmark}-{kind}-{rest}", "source": f"{_A1}; {where}"}
                yield replace(_HAAS_RESNET, benchmark=benchmark, head=head, **settings, **told)
    source = f"{HAAS}, table 1 (LogitNorm+); schedule of Wei et al., ICML 2022"
    yield replace(_HAAS_RESNET, **_PLUS, name="cifar10-logitnorm-plus", source=source)
    for kind, head in (("l2norm", "l2norm"), ("nol2", "linear")):
        source = f"{HAAS}, table 4: CCT-7/3x1 as its authors train it, without RandAugment and mixup's end at 175"
        yield TrainingRecipe(name=f"cifar10-{kind}-cct", source=source, head=head, **_SMALL, **_CCT)
        source = f"{HAAS}, table 4; A.1 says AdamW and one cosine; epochs, rate, decay and batch are ours"
        yield TrainingRecipe(name=f"cifar10-{kind}-convnext", source=source, head=head, **_SMALL, **_CONVNEXT)

    for method, settings in METHODS.items():
        if settings.get("outliers") not in WITH_IMAGES:
            alike = "; both views are the image" * (settings.get("loss") in CONTRASTIVE)  # nothing augments the digits
            yield TrainingRecipe(
                name=f"digits-{method}",
                source="what `ood-fast compare` trains" if method in LOSSES else f"as the other digits recipes{alike}",
                **{**settings, "average": "boundaries", "outlier_queue": 100},  # about as many as a class has images
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
