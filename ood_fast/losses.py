"""The losses as modules: `criterion = ood_fast.ELogitNormLoss(model.fc)`, then `criterion(model(x), y)`."""

from __future__ import annotations

from torch import Tensor, nn

from . import checks, functional


class _Loss(nn.Module):
    """Keywords that every loss here shares with `nn.CrossEntropyLoss`; the class weights are a buffer."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float):
        super().__init__()
        checks.loss_keywords(ignore_index, reduction, label_smoothing)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def _keywords(self) -> dict[str, object]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class ELogitNormLoss(_Loss):
    """`ood_fast.elogitnorm` bound to the last linear layer of a model: ``criterion(logits, y)``.

    Args:
        head: the last linear layer (any module with a `weight` of shape (c, m)), or the model it belongs to.
        name: with a model, the qualified name of that layer, such as "fc"; it is looked up at each call, so that a
            replaced head is followed, and found inside `DistributedDataParallel` and `torch.compile` wrappers too.
        weight, ignore_index, reduction, label_smoothing, eps, average, detach_geometry, return_distance: as in
            `ood_fast.elogitnorm`.

    The head is not a submodule of the criterion: ``criterion.parameters()`` is empty, and moving the criterion does not
    move the head. Moves and casts of the head are followed, since its weight is read at each call.

    Raises:
        TypeError: `head` is not a module, or without `name` has no 2-D `weight`. ValueError: there is no layer called
        `name`.

    Paper: Ding et al., CVPR 2026, arXiv:2504.11434.
    """

    def __init__(
        self,
        head: nn.Module,
        name: str | None = None,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        eps: float = 1e-6,
        average: str = "boundaries",
        detach_geometry: bool = False,
        return_distance: bool = False,
    ):
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        if not isinstance(head, nn.Module):
            raise TypeError(
                f"head: got {type(head).__name__}, expected the last linear layer, or a model and the layer's name"
            )
        checks.real("eps", eps, 0.0)
        checks.one_of("average", average, checks.AVERAGES)
        # In a tuple, so that nn.Module does not register the head as a submodule of the criterion.
        self._owner = (head,)
        self.name = name
        self.eps = eps
        self.average = average
        self.detach_geometry = detach_geometry
        self.return_distance = return_distance
        self.head  # noqa: B018  a wrong head or name is an error now, not in the first training step

    @property
    def head(self) -> nn.Module:
        """The layer whose weight the next call will use."""
        (owner,) = self._owner
        head = owner if self.name is None else _find(owner, self.name)
        head_weight = getattr(head, "weight", None)
        if not isinstance(head_weight, Tensor) or head_weight.dim() != 2:
            advice = (
                "" if self.name else "; for a whole model give the name of its last layer: ELogitNormLoss(model, 'fc')"
            )
            raise TypeError(f"head: {type(head).__name__} has no 2-D weight, expected a linear layer{advice}")
        return head

    def forward(self, logits: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of logits (n, c) against y, class indices (n,) or probabilities (n, c)."""
        head = self.head
        return functional.elogitnorm(
            logits,
            None,
            head.weight,
            None,
            y,
            eps=self.eps,
            average=self.average,
            detach_geometry=self.detach_geometry,
            return_distance=self.return_distance,
            **self._keywords(),
        )

    def extra_repr(self) -> str:
        where = f"name={self.name!r}, " if self.name else ""
        own = f"eps={self.eps}, average={self.average!r}, detach_geometry={self.detach_geometry}"
        return f"{where}{super().extra_repr()}, {own}"


def _find(model: nn.Module, name: str) -> nn.Module:
    for wrapped in (
        name,
        f"module.{name}",
        f"_orig_mod.{name}",
        f"module._orig_mod.{name}",
        f"_orig_mod.module.{name}",
    ):
        try:
            return model.get_submodule(wrapped)
        except AttributeError:
            continue
    linear = [n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    raise ValueError("name: " + checks.unknown(f"layer of {type(model).__name__}", name, linear))


class LogitNormLoss(_Loss):
    """`ood_fast.logitnorm` as a module: ``criterion(logits, y)``.

    Args:
        tau: temperature, > 0.
        weight, ignore_index, reduction, label_smoothing: as in `nn.CrossEntropyLoss`.

    Paper: Wei et al., ICML 2022, arXiv:2205.09310.
    """

    def __init__(
        self,
        tau: float = 0.04,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        checks.real("tau", tau, 0.0, open_low=True)
        self.tau = tau

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (n, c) against y, class indices (n,) or probabilities (n, c)."""
        return functional.logitnorm(logits, y, tau=self.tau, **self._keywords())

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"
