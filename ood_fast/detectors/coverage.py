"""How often the neurons of layers were seen in the state that an input puts them in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..capturing import capture_features
from ..heads import unwrapped
from ..models.layers import LayerReading, layer_of, maps, numbers_of, stages
from ..models.outputs import logits_of
from ..models.running import Batch, evaluating
from ..ops.registration import uncompiled
from . import streaming
from .detector import Detector
from .layers import Passed
from .numbers import at_least_float32, exact_linear, nan_where_too_long, refuse_one_logit, refuse_rows
from .registry import register

STEEPNESS = 1000.0  # of the logarithm that cells are spaced by


def edges(bins: int) -> Tensor:
    """(bins − 1,), float64: where cells begin, of the authors' M = `bins` marks but for the last; narrow about ½."""
    left = torch.linspace(1.0, STEEPNESS**0.5, bins // 2, dtype=torch.float64, device="cpu").log() / math.log(STEEPNESS)
    left[-1] = 0.5
    marks = torch.cat([left[:-1], (1 - left).flip(0)])
    marks[-1] += 0.01
    return marks


@register
class NAC(Detector):
    """Neuron activation coverage: the mean over layers and their neurons i of how often training samples were in the
    cell of the state of i,

        (1/L) Σ_l (1/m_l) Σ_i min(count_i(cell of s_i) / full, 1),   s_i = sigmoid(α · o_i · ∂KL(u ‖ softmax(f)) / ∂o_i)

    u: the same probability for each class. The cells cut [0, 1] as in the authors' code, narrow about ½. Of what enters
    the head, o = z, the gradient has a closed form, Wᵀ (softmax(f) − u), and all is one pass. Of `layers` it is taken
    by autograd in a pass of its own, forth and back, o the mean over positions and the gradient the sum over them. The
    authors sum both: their α is ours divided by the number of positions. What the model changes in place is read as
    changed. pytorch-ood's NACUE sums o · ∂ over positions before the sigmoid, and cuts other cells.

    Liu et al., "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization", ICLR 2024,
    arXiv:2306.02879. Defaults are theirs of CIFAR-10; α differs much between layers and nets (100 to 3000 at the head,
    0.001 to 5000 below; at the head of the CIFAR ResNets, 64 features, 1): tune it.

    Args:
        layers: None: what enters the head. "stages": each stage. Or names.
        alpha: α > 0, one or one a layer.
        bins: M, the number of marks, an even number >= 4: M − 1 cells.
        full: the count at which a cell is covered, > 0, one or one a layer.
        samples: training samples that are counted, drawn at random.
        seed: of the choice.
    """

    state = ("coverage",)  # (M − 1, Σ m_l), from 0 to 1
    needs_features = True
    needs_head = True
    grid = {"alpha": (1.0, 50.0, 100.0, 3000.0), "full": (10.0, 50.0)}  # the authors'
    coverage: Tensor

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        alpha: float | Sequence[float] = 100.0,
        bins: int = 50,
        full: float | Sequence[float] = 50.0,
        samples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._each = layers == "stages"
        if layers is not None and not self._each and (isinstance(layers, str) or not layers):
            raise ValueError(f"layers: got {layers!r}, expected None, 'stages', or names as in ('layer4',)")
        for name in layers or ():
            checks.instance("layers", name, str, "names of layers")
        self.alpha, self.full = (value if isinstance(value, (int, float)) else tuple(value) for value in (alpha, full))
        for name, values in (("alpha", self.alpha), ("full", self.full)):
            for value in values if isinstance(values, tuple) else (values,):
                checks.real(name, value, 0.0, open_low=True)
        checks.positive_int("bins", bins)
        if bins < 4 or bins % 2:
            raise ValueError(f"bins: got {bins}, expected an even number, 4 or more")
        checks.positive_int("samples", samples)
        checks.seed(seed)
        self.layers = layers if layers is None or self._each else tuple(layers)
        self.bins, self.samples, self.seed = bins, samples, seed
        if layers is not None:
            self.needs_model, self.needs_features, self.needs_head = True, False, False

    # ---- fitting

    def prepare(self, model: nn.Module) -> None:
        """Choose the layers, or look whether the model has those that were named."""
        if self._each:
            vars(self)["layers"] = stages(model)  # of a new fit; by hand a fitted one takes none
        for name in self.layers or ():
            layer_of(model, name)

    def gathers(self) -> dict[str, streaming.Gathered]:
        if self.layers is None:
            return {"0": streaming.Bank(budget=self.samples, seed=self.seed)}
        names = self.layers if isinstance(self.layers, tuple) else (self.layers,)  # which stages, is not known yet
        sample = partial(Passed, budget=self.samples, seed=self.seed)
        return {str(place): sample(key_read=(name, "nac")) for place, name in enumerate(names)}

    def _finish(self, **samples: Any) -> None:
        parts = [sample.value().to(sample.like) for sample in samples.values()]
        if self.layers is None:
            parts = [self._products(z) for z in parts]
        covered = []
        for part, alpha, full in zip(parts, self._of_layers("alpha"), self._of_layers("full"), strict=True):
            counts = part.new_zeros(self.bins - 1, part.shape[1])
            counts.scatter_add_(0, self._cells(part, alpha), torch.ones_like(part))
            covered.append((counts / full).clamp(max=1))
        self.coverage = torch.cat(covered, dim=1)

    def _of_layers(self, name: str) -> tuple[float, ...]:
        """The parameter of that name for each layer."""
        value, n_layers = getattr(self, name), 1 if self.layers is None else len(self.layers)
        if isinstance(value, tuple) and len(value) != n_layers:
            raise ValueError(f"{name}: got {len(value)}, expected {n_layers}, one a layer")
        return value if isinstance(value, tuple) else (value,) * n_layers

    def _products(self, z: Tensor) -> Tensor:
        """z_i ∂KL/∂z_i (n, m) of features (n, m)."""
        assert self.head_weight is not None
        weight = at_least_float32(self.head_weight).to(z.dtype)
        p = torch.softmax(exact_linear(z, self.head_weight, self.head_bias), dim=1)
        return z * exact_linear((p - 1 / len(weight)).to(z.dtype), weight.T)

    def _cells(self, products: Tensor, alpha: float) -> Tensor:
        """The cell that each state is in."""
        marks = edges(self.bins).to(products)
        return (torch.bucketize(torch.sigmoid(alpha * products), marks, right=True) - 1).clamp(0, self.bins - 2)

    @torch.no_grad()
    def see(self, model: nn.Module, batch: Batch, head: nn.Linear | None) -> None:
        """o_i ∂KL/∂o_i (n, m_l) of each layer, kept with the batch for others that read them."""
        wanted = [name for name in self.layers or () if (name, "nac") not in batch.read]
        if not wanted:
            return
        others: dict[Any, Any] = {name: (layer_of(model, name), partial(numbers_of, name)) for name in wanted}
        given = {"": batch.inputs} if isinstance(batch.inputs, Tensor) else batch.inputs
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            given = {key: x.clone().requires_grad_(x.is_floating_point()) for key, x in given.items()}
            call = uncompiled(unwrapped(model))
            with capture_features(None, others=others) as captured:
                logits = at_least_float32(logits_of(call(given[""]) if "" in given else call(**given)))
            refuse_one_logit(logits)
            for name in wanted:
                LayerReading(name, "nac", torch.clone).check(captured.read.get(name), len(logits))
            outputs = [captured.read[name] for name in wanted]
            divergence = -logits.log_softmax(dim=1).mean(dim=1).sum()  # but for a constant
            try:
                gradients = torch.autograd.grad(divergence, outputs)
            except RuntimeError as error:
                raise ValueError(f"layers: no gradient of the logits reaches {', '.join(wanted)}: {error}") from error
        for name, output, gradient in zip(wanted, outputs, gradients, strict=True):
            batch.read[name, "nac"] = maps(model, name, output).mean(dim=2) * maps(model, name, gradient).sum(dim=2)

    # ---- scoring

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        z = at_least_float32(features).to(self.coverage.dtype)
        score = self._covered([self._products(z)])
        length = torch.linalg.vector_norm(z, dim=1)
        return nan_where_too_long(score, length).masked_fill(length.isnan(), torch.nan)

    def _covered(self, parts: list[Tensor]) -> Tensor:
        """The score (n,) of the products of each layer."""
        coverage = self.coverage.split([part.shape[1] for part in parts], dim=1)
        found = [
            of_layer.gather(0, self._cells(part, alpha)).mean(dim=1)
            for of_layer, part, alpha in zip(coverage, parts, self._of_layers("alpha"), strict=True)
        ]
        return torch.stack(found).mean(dim=0)

    def score_batch(self, model: nn.Module, batch: Batch, head: str | nn.Linear | None = None) -> Tensor:
        if self.layers is None:
            return super().score_batch(model, batch, head)
        self.require_fitted()
        refuse_rows("logits", batch.logits, 0 * batch.logits.amax(dim=1))
        self.see(model, batch, None)
        parts = [batch.read[name, "nac"].to(self.coverage.dtype) for name in self.layers]
        for name, part in zip(self.layers, parts, strict=True):
            refuse_rows(f"layer {name}", part)
        return self._covered(parts)

    def score_features(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """As `Detector.score_features`; RuntimeError where it reads layers of the model."""
        if self.layers is not None:
            raise RuntimeError(f"{self.label} reads layers of the model, not features: call score(model, x)")
        return super().score_features(features, logits)
