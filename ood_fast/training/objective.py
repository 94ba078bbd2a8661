"""What a step minimises: the one place where a method of training meets the loop.

A loss of (logits, y) needs nothing of this. What reads more of a step is an `Objective`, which the function under
`@ood_fast.register("loss")` may return in place of a criterion; `docs/extending.md` has a whole one.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..distributed.shards import meeting_place
from ..heads import Beside

if TYPE_CHECKING:
    from ..data import ImageBenchmark

Criterion = Callable[[Tensor, Tensor], Tensor]


class StepBatch(NamedTuple):
    """What a step has."""

    x: Tensor  # images (n, channels, height, width)
    target: Tensor  # class indices (n,), or probabilities (n, c) where the recipe mixes images
    beside: Tensor | None = None  # the images that `Objective.companion` asks for
    done: float = 1.0  # the share of the training that is done, in [0, 1)


class Objective(nn.Module):
    """What a step minimises. Parameters of its own are trained with the model's, by the same optimiser; they and its
    buffers are saved with the run, those of each process by themselves, and do not go into the model's checkpoints.

    Attributes:
        companion: images that each step has besides its own: "outliers", those of `open_benchmark(outliers=...)`, in
            batches of `recipe.outlier_batch_size`; "views", the same images augmented another time; "" for none.
    """

    companion: str = ""

    def around(self, model: nn.Module) -> nn.Module:
        """What `step` gets as `network`, before DistributedDataParallel and torch.compile go around it: the model."""
        return model

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """(the loss, a scalar; the logits (n, c) of `batch.x`), by one call of `network`, under autocast."""
        raise NotImplementedError

    def images_beside(self, benchmark: ImageBenchmark) -> list[Any]:
        """The data set of `companion`, if it has one; UserError where the benchmark has none."""
        if not self.companion:
            return []
        if (images := getattr(benchmark, self.companion)) is None:
            raise checks.UserError(
                f"{self.companion}: got none, expected a folder of images of no class that is trained: --outliers DIR "
                "or open_benchmark(..., outliers=DIR)"
            )
        return [images]

    def average_gradients(self, n_processes: int) -> None:
        """Over the processes, as DistributedDataParallel does with the model's. None counts as 0 where another process
        has one, and stays None where none has: the optimiser then leaves the parameter as it is, decay included."""
        parameters = list(self.parameters())
        if n_processes == 1 or not parameters:
            return
        there = [parameter.grad is not None for parameter in parameters]
        place = meeting_place(None, parameters[0])  # the host, if it can be: no GPU waits
        anywhere = torch.tensor(there, dtype=torch.int32, device=place)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        for parameter in itertools.compress(parameters, anywhere.tolist()):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= n_processes


class Around(Objective):
    """Base class of what stands around a criterion, None: cross-entropy; `repr` shows its attributes `shown`."""

    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, criterion: Criterion | None) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)


class WithHead(Around):
    """Base class of what is computed from the features that enter `head`, which is not a part of it; see `Beside`."""

    def __init__(self, head: nn.Module, criterion: Criterion | None) -> None:
        super().__init__(criterion)
        weight = getattr(head, "weight", None)
        if not isinstance(head, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
            raise TypeError(f"head: got {type(head).__name__}, expected the linear layer that makes the logits")
        checks.several_classes("head", weight.shape[0])
        self.n_classes, self.n_features = weight.shape
        self._head = Beside(head)

    def around(self, model: nn.Module) -> nn.Module:
        """The model with its features."""
        return WithFeatures(model, self._head())


class Plain(Objective):
    """A criterion (logits, y) -> scalar."""

    def __init__(self, criterion: Criterion) -> None:
        super().__init__()
        self._criterion = (criterion,)  # in a tuple: what it holds, a model perhaps, is not trained and saved for it

    def step(self, network: nn.Module, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """(criterion(f, y), f)."""
        logits = network(batch.x)
        return self._criterion[0](logits, batch.target), logits


def of_step(name: str, result: Any) -> tuple[Tensor, Tensor]:
    """What `Objective.step` gave, (loss, logits); UserError that names the loss where it is something else."""
    loss, logits = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    got = type(loss).__name__
    if isinstance(loss, Tensor):
        if not loss.dim() and loss.requires_grad and isinstance(logits, Tensor):
            return loss, logits
        got = f"a tensor of shape {tuple(loss.shape)} with{'' if loss.requires_grad else 'out'} a gradient"
    raise checks.UserError(
        f"loss {name!r}: got {got} and {type(logits).__name__} for the logits, expected a scalar tensor with a "
        "gradient, of `Objective.step` also the logits (n, c)"
    )


class WithFeatures(nn.Module):
    """x -> (logits (n, c), z (n, m)), z what enters the head."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self._kept = model, _Kept()
        weakref.finalize(self, head.register_forward_pre_hook(self._kept).remove)  # the head is left as it was

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features of images."""
        self._kept.wanted = True
        logits = self.model(x)
        z, self._kept.z, self._kept.wanted = self._kept.z, None, False
        if z is None:
            raise RuntimeError("the head has not run as a module, so that no features were seen")
        return logits, z


class _Kept:
    """A hook that keeps what enters a layer, while it is wanted."""

    def __init__(self) -> None:
        self.z: Tensor | None = None
        self.wanted = False

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.wanted:
            self.z = inputs[0]


def n_correct(logits: Tensor, target: Tensor) -> Tensor:
    """How many predictions are right; of probabilities, the sum of those of the predicted classes."""
    predicted = logits.argmax(dim=1)
    if target.is_floating_point():
        return target.gather(1, predicted[:, None]).sum()
    return (predicted == target).sum()
