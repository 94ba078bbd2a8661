"""Detectors that measure the distance to the decision boundaries of the head, D, or divide the logits by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..eager.precision import is_exporting
from ..functional import boundary_distance, temperature_of
from ..statistics import distance_table, row_statistics
from ..values import EPS, TAU
from . import streaming
from .detector import Detector
from .logit import confidence
from .numbers import at_least_float32, nan_where_too_long
from .registry import register

# The table R of all pairs of classes is kept up to this size (c = 4096 in float32); above it, the rows that a batch
# needs are computed anew.
TABLE_BYTES = 1 << 26


class BoundaryDetector(Detector):
    """Base class: keeps the head, and R_pj = 1 / ‖w_p − w_j‖ of all pairs of classes as the buffer `table` (c, c) if
    that takes `TABLE_BYTES` at most, so that the statistic "distance" costs no product; with it the number of
    boundaries of each class, `boundaries` (c,)."""

    needs_logits = True
    needs_head = True
    optional_state = ("table", "boundaries")

    def _finish(self, **gathered: Any) -> None:
        W = self.head_weight
        fits = len(W) ** 2 * max(W.dtype.itemsize, 4) <= TABLE_BYTES
        table = distance_table(W) if fits else None
        self.table, self.boundaries = table, None if table is None else table.count_nonzero(1)

    def constants(self) -> dict[str, Any]:
        kept = self._buffers  # by way of the attributes of a module each would take half a microsecond
        return {"W": kept["head_weight"], "table": kept["table"], "boundaries": kept["boundaries"]}


@register
class FDBD(BoundaryDetector):
    """Distances to the decision boundaries of the predicted class p, relative to the distance from the training mean:

        Σ_j |f_p − f_j| / ‖w_p − w_j‖ / ‖z − μ‖₂  =  (c − 1) · D / ‖z − μ‖₂

    The sum over j, as OpenOOD has it; D is `boundary_distance`, the mean over the boundaries that exist (coincident
    rows of W and logits of −inf have none). The denominator counts as the machine epsilon at least: z = μ scores high,
    not inf, and z = 0 with denominator="norm" as D does.

    Liu and Qin, "Fast Decision Boundary based Out-of-Distribution Detector", ICML 2024, arXiv:2312.11536.

    Args:
        reduction: "sum", or "mean" for D in place of (c − 1) · D, as pytorch-ood has it.
        denominator: "centred" ‖z − μ‖₂, or "norm" ‖z‖₂; OpenOOD's search takes the better one on validation data.
    """

    label = "fDBD"
    needs_features = True
    state = ("mean",)
    grid = {"denominator": ("centred", "norm")}

    def __init__(self, reduction: str = "sum", denominator: str = "centred") -> None:
        super().__init__()
        checks.one_of("reduction", reduction, ("sum", "mean"))
        checks.one_of("denominator", denominator, ("centred", "norm"))
        self.reduction, self.denominator = reduction, denominator

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"mean": streaming.FeatureMean()}

    def _finish(self, mean: streaming.FeatureMean) -> None:
        super()._finish()
        self.mean = mean.value()

    @property
    def _length(self) -> str:
        return "centred_norm" if self.denominator == "centred" else "norm2"

    def statistics(self) -> tuple[str, ...]:
        return ("distance", self._length)

    def constants(self) -> dict[str, Any]:
        return {**super().constants(), "mean": self._buffers["mean"]}

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        distance, length = statistics["distance"], statistics[self._length]
        weight: Any = self._buffers["head_weight"]
        factor = weight.shape[0] - 1 if self.reduction == "sum" else 1
        score = factor * distance / length.clamp_min(torch.finfo(length.dtype).eps)
        return nan_where_too_long(score, length)


@register
class BoundaryDistance(BoundaryDetector):
    """D, the mean distance from z to the decision boundaries of the predicted class p:

        1/(c − 1) · Σ_{j≠p} (f_p − f_j) / ‖w_p − w_j‖

    0 where there is no boundary (coincident rows of W and logits of −inf have none). Fitting only copies the head.

    Ding, Liu, Unger and Eilertsen, "Enhancing Out-of-Distribution Detection with Extended Logit Normalization",
    CVPR 2026, arXiv:2504.11434.

    Args:
        average: "boundaries", or "classes" to divide by one more, as the authors' code does.
    """

    label = "Boundary distance"

    def __init__(self, average: str = "boundaries") -> None:
        super().__init__()
        checks.one_of("average", average, checks.AVERAGES)
        self.average = average

    def statistics(self) -> tuple[str, ...]:
        return ("distance",) if self.average == "boundaries" else ()

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        return statistics["distance"]

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        if self.average == "boundaries":
            return super()._score(features, logits)
        if is_exporting() and self.table is not None:  # ONNX has not the operator of `boundary_distance`
            found = row_statistics(("predicted", "distance"), logits, **self.constants())
            counted = ((self.table.index_select(0, found["predicted"]) > 0) & (logits > -math.inf)).sum(1)
            return found["distance"] * (counted / (counted + 1))
        return boundary_distance(logits, self.head_weight, average=self.average)


@register
class TemperedMSP(BoundaryDetector):
    """Maximum softmax probability at a temperature: max_j softmax(f / T)_j, the confidence that a loss was trained on.

        temperature="distance"   T = D, see `BoundaryDistance`; 1 where D <= eps        ELogitNorm
        temperature="norm"       T = τ (‖f‖₂ + 1e-7)                                    LogitNorm
        temperature=number       T = number                                             scaled softmax, T2FNorm

    Ding et al., CVPR 2026, arXiv:2504.11434; Wei et al., "Mitigating Neural Network Overconfidence with Logit
    Normalization", ICML 2022, arXiv:2205.09310; Haas, Yolland and Rabus, TMLR 2024, arXiv:2306.04072; Regmi et al.,
    "T2FNorm", CVPR 2024 Workshops, arXiv:2305.17797.

    Args:
        temperature: "distance", "norm" or a number > 0.
        tau: τ > 0, of "norm".
        of: what is divided by T: the "logits", or the "features" behind them, z / T, which leaves the bias of the head
            as it is: softmax(W z / T + b).
        eps: of "distance", as in `ood_fast.elogitnorm`.
    """

    label = "Tempered MSP"

    def __init__(
        self, temperature: str | float = "distance", tau: float = TAU, of: str = "logits", eps: float = EPS
    ) -> None:
        super().__init__()
        if isinstance(temperature, str):
            checks.one_of("temperature", temperature, ("distance", "norm"))
        else:
            checks.real("temperature", temperature, 0.0, open_low=True)
        checks.real("tau", tau, 0.0, open_low=True)
        checks.one_of("of", of, ("logits", "features"))
        checks.real("eps", eps, 0.0)
        self.temperature, self.tau, self.of, self.eps = temperature, tau, of, eps
        self.needs_head = temperature == "distance" or of == "features"

    def _finish(self, **gathered: Any) -> None:
        if self.temperature == "distance":
            super()._finish()

    def _score(self, features: Tensor | None, logits: Tensor) -> Tensor:
        temperature: Any = self.temperature
        if temperature == "distance":
            distance = row_statistics(("distance",), logits, **self.constants())["distance"]
            temperature = temperature_of(distance, self.eps).unsqueeze(1)
        elif temperature == "norm":
            norm = row_statistics(("logit_norm2",), logits)["logit_norm2"]
            temperature = (self.tau * (norm + 1e-7)).unsqueeze(1)
        logits = at_least_float32(logits)
        if self.of == "features" and self.head_bias is not None:
            logits = logits + self.head_bias * (temperature - 1)  # T · (W z / T + b)
        return confidence(logits, temperature)
