"""What a recipe is: all that decides a training run besides its seed and its machine."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError, unknown
from ..registry import TAKEN, added
from ..values import TAU as TAU

# What `data.open_benchmark` takes; here, because it is wanted where torch is not imported
BENCHMARK_NAMES = TAKEN["benchmark"]


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """UserError unless it holds."""
    if not holds:
        raise UserError(f"{name}: got {value}, expected {expected}")


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
        head: "linear", or "l2norm" for `L2NormLinear`, with `head_tau` as its τ (None: L2 normalisation; 0.1: T2FNorm);
            "ish" for `training.sharpened.ISHLinear`.
        loss: "ce", "logitnorm" with `tau`, "elogitnorm" with `average` and `detach_geometry` as in `ELogitNormLoss`, or
            "supcon", "cider" of `training.contrastive`, "palm" of `training.palm`, alone or with outliers=npos.
        prototype_momentum: of CIDER and PALM; None: 0.95, 0.999.
        label_smoothing: as in F.cross_entropy. mixup, cutmix: α of the Beta(α, α) that the share of an image is drawn
            from, 0 = off; with both on, one of them is drawn for each batch. regmixup: α of mixup beside the images,
            not in their place; without the others and without outliers.
        outliers: what is trained beside the loss, see `training.outliers`: "none"; "vos", "npos", of `outlier_queue`
            features a class; of a folder of images "oe", "energy", "mixoe", in batches of `outlier_batch_size` (0:
            `batch_size`).
        outlier_weight: of that term, outlier_start: of VOS and NPOS; None: the paper's.
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
    prototype_momentum: float | None = None
    average: str = "boundaries"
    detach_geometry: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    regmixup: float = 0.0
    outliers: str = "none"
    outlier_weight: float | None = None
    outlier_start: float | None = None
    outlier_queue: int = 1000
    outlier_batch_size: int = 0
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
                raise UserError(unknown(name, getattr(self, name), choices))
        for name in ("epochs", "batch_size", "n_processes"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "tau"):
            require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in ("final_learning_rate", "weight_decay", "mixup", "cutmix", "regmixup", "gamma", "warmup_epochs"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "no negative number")
        for name in ("momentum", "label_smoothing"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._check_outliers()
        momentum = self.prototype_momentum
        require("prototype_momentum", momentum, momentum is None or 0 <= momentum < 1, "none or a number in [0, 1)")
        if momentum is not None and self.loss not in ("cider", "palm"):
            raise UserError(f"prototype_momentum: expected none with loss={self.loss}, which has no prototypes")
        require("head_tau", self.head_tau, self.head_tau is None or self.head_tau > 0, "none or a number above 0")
        ascending = tuple(sorted(set(self.milestones)))
        require("milestones", self.milestones, self.milestones == ascending, "epochs in ascending order")
        if self.schedule == "steps":
            require("milestones", self.milestones, bool(self.milestones), "epochs, for schedule=steps")
        if self.init and self.pretrained:
            raise UserError("init, pretrained: expected one of them, weights to start from")

    def _check_outliers(self) -> None:
        """What is set of outliers fits together."""
        require("outlier_queue", self.outlier_queue, self.outlier_queue >= 1, "at least 1")
        require("outlier_batch_size", self.outlier_batch_size, self.outlier_batch_size >= 0, "no negative number")
        weight, start = self.outlier_weight, self.outlier_start
        require("outlier_weight", weight, weight is None or weight >= 0, "none or no negative number")
        require("outlier_start", start, start is None or 0 <= start <= 1, "none or a number in [0, 1]")
        if self.regmixup and (self.mixup or self.cutmix or self.outliers != "none"):
            raise UserError("regmixup: expected 0 with mixup, cutmix or outliers")
        others = self.mixup or self.cutmix or self.regmixup or self.outliers not in ("none", "npos")
        if self.loss in CONTRASTIVE and others:
            raise UserError(f"mixup, cutmix, regmixup, outliers but npos: expected none with loss={self.loss}")
        if self.outliers in OF_CLASSES and (self.mixup or self.cutmix):
            raise UserError(f"mixup, cutmix: expected 0 with outliers={self.outliers}, which needs images of one class")


CONTRASTIVE = ("supcon", "cider", "palm")  # losses of features
OF_CLASSES = ("vos", "npos")  # outliers that are drawn from the features of a class
WITH_IMAGES = ("oe", "energy", "mixoe")  # outliers that are images
CHOICES = {
    "activation": ("relu", "leaky_relu"),
    "head": ("linear", "l2norm", "ish"),
    "loss": ("ce", "logitnorm", "elogitnorm", *CONTRASTIVE),
    "average": ("boundaries", "classes"),
    "outliers": ("none", *OF_CLASSES, *WITH_IMAGES),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "steps", "onecycle"),
    "amp": ("none", "bf16", "fp16"),
}
