"""Detectors that read the penultimate features z (n, m): their norm, and their proximity to the head's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..functional import l2_normalize, nci_score
from ..statistics import row_statistics
from . import streaming
from .detector import Detector
from .logit import confidence
from .numbers import at_least_float32, exact_linear, nan_where_too_long
from .registry import register


@register
class FeatureNorm(Detector):
    """The p-norm of the features, ‖z‖_p, or of the logits, ‖f‖_p. A head that normalises its input is scored on z and f
    without normalisation.

    p = 2: Haas, Yolland and Rabus, "Exploring Simple, High Quality Out-of-Distribution Detection with L2
    Normalization", TMLR 2024, arXiv:2306.04072; its norm of logits is of="logits", its scaled softmax is
    TemperedMSP(T, of="features"). p = 1 is the filter term of NCI (Liu and Qin, CVPR 2025).

    Args:
        p: order of the norm, 1 <= p <= inf.
        of: "features" or "logits"; logits of −inf, masked classes, count as 0.
    """

    label = "Feature norm"
    needs_features = True

    def __init__(self, p: float = 2.0, of: str = "features") -> None:
        super().__init__()
        checks.real("p", p, 1.0, infinite=True)
        checks.one_of("of", of, ("features", "logits"))
        self.p, self.of = float(p), of
        self.needs_features, self.needs_logits = of == "features", of == "logits"

    def statistics(self) -> tuple[str, ...]:
        if self.p != 1 and self.p != 2:  # `in` would not do: p may be a symbol of the compiler
            return ()
        return (f"{'norm' if self.of == 'features' else 'logit_norm'}{1 if self.p == 1 else 2}",)

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        norm = statistics[self.statistics()[0]]
        return nan_where_too_long(norm, norm)

    def _score(self, features: Any, logits: Any) -> Tensor:
        if self.statistics():
            return super()._score(features, logits)
        values = at_least_float32(features if self.of == "features" else logits)
        if self.of == "logits":
            values = values.masked_fill(values.isneginf(), 0.0)
        norm = torch.linalg.vector_norm(values, ord=self.p, dim=1)
        return nan_where_too_long(norm, norm)


@register
class NCI(Detector):
    """Proximity of the centred feature to the weight of its predicted class, plus the L1 norm of the feature:

        w_p · (z − μ) / ‖z − μ‖₂ + α ‖z‖₁        p = argmax_j f_j,  μ = mean of the training features

    Without logits the prediction is made from the kept head, and the (n, c) logits are never stored.

    Liu and Qin, "Detecting Out-of-Distribution through the Lens of Neural Collapse", CVPR 2025, arXiv:2311.01479.

    Args:
        alpha: weight of the norm. Fitting keeps the one given; the papers choose it from `grid` on validation data, see
            `ood_fast.detectors.tune`. 0 is the proximity (pScore) alone, as in the paper's ablation and by default in
            pytorch-ood.
        p: 1, or 2 for the L2 norm of the ablation.
        proximity: False leaves the first term out, for the ablation: the score is α ‖z‖_p.
    """

    needs_features = True
    needs_head = True
    state = ("mean",)
    grid = {"alpha": (1e-4, 1e-3, 1e-2, 1e-1)}

    def __init__(self, alpha: float = 1e-4, p: int = 1, proximity: bool = True) -> None:
        super().__init__()
        checks.real("alpha", alpha, 0.0)
        checks.one_of("p", p, (1, 2))
        self.alpha, self.p, self.proximity = alpha, p, proximity

    def gathers(self) -> dict[str, streaming.Gathered]:
        return {"mean": streaming.FeatureMean()}

    def _finish(self, mean: streaming.FeatureMean) -> None:
        self.mean = mean.value()

    @property
    def _norm(self) -> str:
        return "norm1" if self.p == 1 else "norm2"

    def statistics(self) -> tuple[str, ...]:
        return (self._norm, "centred_norm", "projection") if self.proximity else (self._norm,)

    def constants(self) -> dict[str, Any]:
        return {"W": self._buffers["head_weight"], "mean": self._buffers["mean"]}

    def _combine(self, statistics: Mapping[str, Tensor]) -> Tensor:
        norm = statistics[self._norm]
        if not self.proximity:
            return self.alpha * norm
        length = statistics["centred_norm"]
        proximity = (statistics["projection"] / length).masked_fill_(length == 0, 0.0)  # 0 for z = μ
        return nan_where_too_long(torch.add(proximity, norm, alpha=self.alpha), length)

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        if logits is not None or not self.proximity:
            return super()._score(features, logits)
        proximity = nci_score(features, self.head_weight, self.head_bias, self.mean, None, alpha=0.0)
        read = row_statistics((self._norm, "centred_norm"), None, features, mean=self.mean)
        return nan_where_too_long(proximity + self.alpha * read[self._norm], read["centred_norm"])


class CosineDetector(Detector):
    """Base class of what reads the directions of features and of the head's weights."""

    needs_features = True
    needs_head = True

    def _cosines(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """cos(z, w_j), (n, c), 0 of a zero vector; ‖z‖₂, (n,)."""
        unit, lengths = l2_normalize(at_least_float32(features))
        cosines = exact_linear(unit, l2_normalize(at_least_float32(self.head_weight))[0])
        return cosines.masked_fill(lengths.isinf().unsqueeze(1), torch.nan), lengths


@register
class DML(CosineDetector):
    """Decoupled MaxLogit: the largest cosine with a weight of the head and the length of the feature, balanced anew:

        λ max_j cos(z, w_j) + ‖z‖₂

    The bias takes no part. Fitting only copies the head.

    Zhang and Xiang, "Decoupling MaxLogit for Out-of-Distribution Detection", CVPR 2023. The paper chooses λ for each
    net; DML+, two nets trained for the two terms, is not here.

    Args:
        weight: λ >= 0, in the unit of ‖z‖.
    """

    label = "Decoupled MaxLogit"
    grid = {"weight": (1, 3, 10, 30, 100, 300)}

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__()
        checks.real("weight", weight, 0.0)
        self.weight = weight

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        cosines, lengths = self._cosines(features)
        return self.weight * cosines.amax(dim=1) + lengths


@register
class MCM(CosineDetector):
    """Maximum concept matching, for heads made of text: max_j softmax(cos(z, w_j) / T)_j, with z the embedding of an
    image and w_j that of the name of class j,

        MCM().fit_features(None, head=(text_embeddings, None)).score_features(image_embeddings)

    GL-MCM adds the best match of a place of the image, z_i being the embeddings of places (CLIP's patches, projected as
    the whole image is):

        max_j softmax(cos(z, w_j) / T)_j + local · max_{i,j} softmax(cos(z_i, w_j) / T)_j

    Its features are those of the image and of its places in one row, (n, (1 + places) · m).

    Ming et al., "Delving into Out-of-Distribution Detection with Vision-Language Representations", NeurIPS 2022,
    arXiv:2211.13445; OpenOOD takes what its net gives for the cosines. Miyai et al., "GL-MCM: Global and Local Maximum
    Concept Matching for Zero-Shot Out-of-Distribution Detection", IJCV 2025, arXiv:2304.04521: local = 1.

    Args:
        temperature: T > 0.
        local: >= 0; above 0 for GL-MCM.
    """

    grid = {"temperature": (0.01, 1, 10)}

    def __init__(self, temperature: float = 1.0, local: float = 0.0) -> None:
        super().__init__()
        checks.real("temperature", temperature, 0.0, open_low=True)
        checks.real("local", local, 0.0)
        self.temperature, self.local = temperature, local

    def widths(self) -> tuple[int | None, int | None]:
        """With places, rows of any number of them."""
        return (None, None) if self.local else super().widths()

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        if not self.local:
            return confidence(self._cosines(features)[0], self.temperature)
        n_features = self.head_weight.shape[1]
        if features.shape[1] % n_features or features.shape[1] == n_features:
            raise ValueError(
                f"features: got shape {tuple(features.shape)}, expected (n, (1 + places) · {n_features}): with local="
                f"{self.local}, the embedding of an image and then those of its places"
            )
        matches = confidence(self._cosines(features.reshape(-1, n_features))[0], self.temperature)
        matches = matches.view(len(features), -1)
        return matches[:, 0] + self.local * matches[:, 1:].amax(dim=1)
