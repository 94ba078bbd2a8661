"""The losses as modules: `criterion = ood_fast.ELogitNormLoss(model.fc)`, then `criterion(model(x), y)`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, functional
from .heads import (
    Beside,
    adapted_weight,
    check_plain,
    check_whole,
    is_pointwise,
    path_to_layer,
    refuse_script,
    temperature_of_head,
)
from .values import EPS, TAU


class _Loss(nn.Module):
    """Keywords that every loss here shares with `nn.CrossEntropyLoss`; the class weights are a buffer."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float) -> None:
        super().__init__()
        checks.loss_keywords(ignore_index, reduction, label_smoothing)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def _keywords(self) -> dict[str, Any]:
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
        head: the last linear layer (any module with a `weight` of shape (c, m), or a convolution of one place, whose
            `weight` is (c, m, 1, ...)), or the model it belongs to.
        name: with a model, the qualified name of that layer, such as "fc"; it is looked up at each call, so that a
            replaced head is followed, and found inside `DistributedDataParallel` and `torch.compile` wrappers too.
            Without a name it stays with the old one: build it after replacing the head, or name it.
        weight, ignore_index, reduction, label_smoothing, eps, average, detach_geometry, return_distance: as in
            `ood_fast.elogitnorm`.

    The head is not a submodule of the criterion: ``criterion.parameters()`` is empty, and moving the criterion does not
    move the head. Moves and casts of the head are followed, since its weight is read at each call. So are parametrised
    heads (weight norm): the gradient reaches what the weight is computed from; LoRA's W + BA, by the layer that PEFT
    puts in place of the head; its `modules_to_save`, by the head's plain name; W/τ of an `L2NormLinear` with τ.

    A copy (`copy.deepcopy`) follows the head that is copied in the same call, as in a model that has the criterion, or
    in ``copy.deepcopy((model, criterion))``; copied alone, its call raises RuntimeError. Any number of threads may call
    one criterion.

    Logits of another model, or of other parameters (`torch.func.functional_call`), need its weight: where the graph of
    the logits shows that another weight made them they are refused; without gradients nothing shows it. Inside a
    `functional_call` of a module that has both the model and the criterion, the criterion sees these parameters.

    A head that `fully_shard` keeps sharded between forward and backward is gathered for the loss, by FSDP itself: its
    gradient is averaged over the processes together with that of the layer. Where a module around the head is the
    sharded one, pass that model and the head's `name`.

    A head that tensor parallelism shards over classes (`ColwiseParallel(output_layouts=Shard(-1))`, with or without DDP
    or FSDP around it) is left where it is: `ood_fast.distributed.elogitnorm` computes the loss, on every rank of its
    mesh. `weight` is then that of all classes.

    Raises:
        TypeError: `head` is not a module, or without `name` has no 2-D `weight`; in a call, the weight is sharded and
        no module at hand can gather it. ValueError: there is no layer called `name`; in a call, the logits have
        not as many classes as the weight has rows or were made by another weight, the weight is emptied by
            ZeRO-3, or an adapter is no LoRA.

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
        eps: float = EPS,
        average: str = "boundaries",
        detach_geometry: bool = False,
        return_distance: bool = False,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        if not isinstance(head, nn.Module):
            raise TypeError(
                f"head: got {type(head).__name__}, expected the last linear layer, or a model and the layer's name"
            )
        refuse_script(head, "call ood_fast.elogitnorm(logits, None, W, b, y)")
        checks.real("eps", eps, 0.0)
        checks.one_of("average", average, checks.AVERAGES)
        self._owner = Beside(head)
        self.name = name
        self.eps = eps
        self.average = average
        self.detach_geometry = detach_geometry
        self.return_distance = return_distance
        check_plain(self.head)  # a wrong head or name is an error now, not in the first training step
        self._plain: weakref.ref[nn.Module] | None = weakref.ref(self.head)  # what was looked at

    @property
    def head(self) -> nn.Module:
        """The layer whose weight the next call will use."""
        head = self._path()[0]
        head_weight = getattr(head, "weight", None)
        if isinstance(head_weight, Tensor) and not head_weight.numel():
            return head  # emptied by ZeRO-3, and whole in the call if it is gathered around that
        if not isinstance(head_weight, Tensor) or not (head_weight.dim() == 2 or is_pointwise(head, head_weight)):
            advice = (
                "" if self.name else "; for a whole model give the name of its last layer: ELogitNormLoss(model, 'fc')"
            )
            raise TypeError(
                f"head: {type(head).__name__} has no 2-D weight (c, m), "
                f"expected a linear layer or a convolution of one place{advice}"
            )
        return head

    def forward(self, logits: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of logits (n, c) against y, class indices (n,) or probabilities (n, c); dense: (n, c, d1, ...)."""
        head = self.head
        if not torch.compiler.is_compiling() and (self._plain is None or self._plain() is not head):
            check_plain(head)
            self._plain = weakref.ref(head)
        head_weight = adapted_weight(head)
        if type(head_weight) is nn.Parameter and not torch.compiler.is_compiling():
            _check_made_by(head_weight, logits)
        if not head_weight.numel():
            check_whole(head)
        gathered = None
        if type(head_weight) not in (Tensor, nn.Parameter):
            head_weight, gathered = self._gathered(head_weight)
        tau = temperature_of_head(head, head.training)
        if tau is not None:
            head_weight = head_weight / tau
        keywords: dict[str, Any] = {
            "eps": self.eps,
            "average": self.average,
            "detach_geometry": self.detach_geometry,
            "return_distance": self.return_distance,
            **self._keywords(),
        }
        shards = _class_shards(logits, head_weight, y)
        if shards is not None:
            from . import distributed

            *inputs, mesh = shards
            output = distributed.elogitnorm(*inputs, group=mesh, **keywords)
        else:
            if head_weight.dim() > 2:
                head_weight = head_weight.flatten(1)
            try:
                output = functional.elogitnorm(logits, None, head_weight, None, y, **keywords)
            except ValueError as error:
                if self.name is None and logits.dim() > 1 and logits.shape[1] != len(head_weight):
                    advice = "was the head replaced? ELogitNormLoss(model, 'fc') follows it"
                    raise ValueError(f"{error}; {advice}") from None
                raise
        if gathered is not None and not torch.is_grad_enabled():
            gathered.reshard()  # with a backward pass to come, FSDP does so after it
        return output

    def _path(self) -> list[nn.Module]:
        """The head, and from the inside out the modules around it that this criterion knows of."""
        owner = self._owner()
        path = [owner] if self.name is None else path_to_layer(owner, self.name, "name")
        # PEFT keeps the layer as `base_layer` of the one that adds the adapter to it.
        return path[1:] if len(path) > 1 and getattr(path[1], "base_layer", None) is path[0] else path

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plain": None}

    def _gathered(self, head_weight: Tensor) -> tuple[Tensor, Any]:
        """The weight that FSDP has gathered, and the module that holds it; any other weight as it is.

        Of a head that tensor parallelism shards as well, FSDP gathers what belongs to this rank's classes.
        """
        if hasattr(head_weight, "full_tensor"):
            from torch.distributed.fsdp import FSDPModule

            path: list[Any] = self._path()
            for module in path:
                if isinstance(module, FSDPModule):
                    module.unshard()
                    if path[0].weight is not head_weight:
                        return path[0].weight, module
        return head_weight, None

    def extra_repr(self) -> str:
        where = f"name={self.name!r}, " if self.name else ""
        own = f"eps={self.eps}, average={self.average!r}, detach_geometry={self.detach_geometry}"
        return f"{where}{super().extra_repr()}, {own}"


# Of a node of the graph that multiplies by a weight: the place of the weight among its inputs.
_WEIGHT_OF = {"AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1, "ConvolutionBackward0": 1}
_PASSED = ("TBackward0", "ToCopyBackward0")  # between a parameter and that place


def _check_made_by(head_weight: Tensor, logits: Tensor) -> None:
    """ValueError where the graph of the logits ends in a linear layer with another parameter than the weight, or in a
    softmax or sigmoid."""
    node = getattr(logits, "grad_fn", None)
    if node is not None and node.name() in ("SoftmaxBackward0", "SigmoidBackward0"):
        made = node.name().removesuffix("Backward0").lower()
        raise ValueError(f"logits: got the output of a {made}, expected what the head makes: leave out the {made}")
    if node is None or node.name() not in _WEIGHT_OF:
        return
    node = node.next_functions[_WEIGHT_OF[node.name()]][0]
    while node is not None and node.name() in _PASSED:
        node = node.next_functions[0][0]
    made_by = getattr(node, "variable", None)
    if made_by is not None and made_by is not head_weight and len(made_by) == len(head_weight):
        raise ValueError(
            f"logits: were made by another weight {tuple(made_by.shape)} than that of the head of this criterion, "
            f"{tuple(head_weight.shape)}: another model, a head that was replaced, or the parameters of a "
            "functional_call; build the criterion on the model that makes them, by name to follow a replaced head "
            "(ELogitNormLoss(model, 'fc')), or call ood_fast.elogitnorm(logits, None, W, b, y) with that weight"
        )


def _class_shards(logits: Tensor, head_weight: Tensor, y: Tensor) -> tuple[Any, ...] | None:
    """(logits, W, y, mesh) of this rank's classes, where tensor parallelism shards the head; None otherwise."""
    if not hasattr(head_weight, "full_tensor"):
        return None
    from .distributed.dtensors import local_shards

    return local_shards(logits, head_weight, y)


class LogitNormLoss(_Loss):
    """`ood_fast.logitnorm` as a module: ``criterion(logits, y)``.

    Args:
        tau: temperature, > 0.
        weight, ignore_index, reduction, label_smoothing: as in `nn.CrossEntropyLoss`.

    Paper: Wei et al., ICML 2022, arXiv:2205.09310.
    """

    def __init__(
        self,
        tau: float = TAU,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        checks.real("tau", tau, 0.0, open_low=True)
        self.tau = tau

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (n, c) against y, class indices (n,) or probabilities (n, c); dense: (n, c, d1, ...)."""
        return functional.logitnorm(logits, y, tau=self.tau, **self._keywords())

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"
