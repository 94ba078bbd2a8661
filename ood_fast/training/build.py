"""What a recipe says, as objects: model, loss, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, models
from ..heads import L2NormLinear, find_head
from ..losses import ELogitNormLoss, LogitNormLoss
from ..recipes import TrainingRecipe
from ..registry import added
from .contrastive import CIDERLoss, SupConLoss
from .mixing import MixOELoss, RegMixupLoss
from .objective import Objective, Plain
from .outliers import EnergyBoundedLoss, OutlierExposureLoss, VOSLoss
from .palm import PALMLoss
from .sharpened import ISHLinear
from .synthesis import NPOSLoss

CONTRASTIVE: dict[str, Callable[..., SupConLoss]] = {"supcon": SupConLoss, "cider": CIDERLoss, "palm": PALMLoss}
OF_IMAGES = {"oe": OutlierExposureLoss, "energy": EnergyBoundedLoss, "mixoe": MixOELoss}


def model_of(
    recipe: TrainingRecipe, n_classes: int, image_shape: tuple[int, int, int], pretrained: bool | None = None
) -> nn.Module:
    """The classifier before training, drawn from torch's global generator.

    `pretrained=False`: for weights that a checkpoint brings, whatever the recipe says.
    """
    channels, *_, size = image_shape
    return models.create(
        recipe.model,
        n_classes,
        head={"linear": nn.Linear, "ish": ISHLinear}.get(recipe.head) or partial(L2NormLinear, tau=recipe.head_tau),
        small_images=recipe.small_images,
        spectral_norm=recipe.spectral_norm,
        activation=recipe.activation,
        pretrained=recipe.pretrained if pretrained is None else pretrained,
        in_channels=channels,
        image_size=size,
    )


def criterion_of(recipe: TrainingRecipe, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss (logits, y) -> scalar; ELogitNorm's is bound to the head of `model`. One of your own may be an
    `Objective` instead, as "supcon", "cider" and "palm" are."""
    if own := added("loss").get(recipe.loss):
        criterion: Callable[[Tensor, Tensor], Tensor] = own(model, recipe)
        if not callable(criterion):
            raise checks.UserError(
                f"loss {recipe.loss!r}: got {type(criterion).__name__} of (model, recipe), expected a "
                "criterion (logits, y) -> scalar tensor, or an Objective"
            )
        return criterion
    smoothing: dict[str, Any] = {"label_smoothing": recipe.label_smoothing}
    if recipe.loss == "logitnorm":
        return LogitNormLoss(recipe.tau, **smoothing)
    if recipe.loss == "elogitnorm":
        keywords: dict[str, Any] = {"average": recipe.average, "detach_geometry": recipe.detach_geometry}
        return ELogitNormLoss(_head_of(model), **keywords, **smoothing)
    if recipe.loss in CONTRASTIVE:
        momentum = {} if recipe.prototype_momentum is None else {"momentum": recipe.prototype_momentum}
        return CONTRASTIVE[recipe.loss](_head_of(model), nn.CrossEntropyLoss(**smoothing), **momentum)
    return nn.CrossEntropyLoss(**smoothing)


def _head_of(model: nn.Module) -> nn.Linear:
    try:
        return find_head(model)
    except ValueError as error:
        raise checks.UserError(
            f"model: {type(model).__name__} has no single linear layer that makes its logits, which the loss reads; "
            "expected a model that ends in one, or loss=ce"
        ) from error


def objective_of(recipe: TrainingRecipe, model: nn.Module) -> Objective:
    """What a step minimises: the criterion, with the outliers of the recipe beside it.

    Raises:
        UserError: outliers beside a loss of your own that is an `Objective` already; parameters in one that is none.
    """
    criterion = criterion_of(recipe, model)
    given = {"weight": recipe.outlier_weight, "start": recipe.outlier_start}
    keywords: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if recipe.outliers == "npos" and (isinstance(criterion, SupConLoss) or not isinstance(criterion, Objective)):
        closed = 0.5 if recipe.loss == "cider" else 1.0  # OpenOOD's weights of C and D are half of CIDER's
        keywords |= {"queue": recipe.outlier_queue, "criterion_weight": closed}
        return NPOSLoss(_head_of(model), criterion, **keywords)
    if isinstance(criterion, Objective):
        if recipe.outliers != "none" or recipe.regmixup:
            raise checks.UserError(f"outliers, regmixup: expected none and 0: loss={recipe.loss} is no criterion")
        return criterion
    if recipe.outliers == "vos":
        return VOSLoss(_head_of(model), criterion, queue=recipe.outlier_queue, **keywords)
    if recipe.outliers != "none":
        keywords.pop("start", None)
        return OF_IMAGES[recipe.outliers](criterion, **keywords)
    if recipe.regmixup:
        return RegMixupLoss(criterion, recipe.regmixup)
    named = criterion.named_parameters() if isinstance(criterion, nn.Module) else ()
    trained = set(model.parameters())
    if own := [name for name, parameter in named if parameter.requires_grad and parameter not in trained]:
        raise checks.UserError(
            f"loss {recipe.loss!r}: got a criterion with parameters that are not the model's ({', '.join(own)}), which "
            "nothing would train; make it an Objective, or call requires_grad_(False) on them"
        )
    return Plain(criterion)


def optimizer_of(recipe: TrainingRecipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD decays every parameter; AdamW, as timm trains, matrices and kernels only: no biases and norms."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov and recipe.momentum > 0,
        )
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.learning_rate)
