"""Dense prediction: a score for every pixel of logits (n, c, h, w) and features (n, m, h, w), and metrics over pixels.

    W, b = dense.head_of(model.classifier[-1])                     # a 1×1 convolution
    detectors = DetectorSet(["MSP", "FDBD", "NCI"])
    for x, y in train_loader:                                      # z: what enters that convolution
        dense.partial_fit(detectors, z, logits, y)
    detectors.finalize((W, b))

    metrics = dense.PixelMetrics()
    for x, is_ood in test_loader:                                  # (n, h, w): 0, 1, and 255 for what does not count
        metrics.update(dense.score_set(detectors, z, logits)["NCI"], is_ood)
    metrics.compute()["auroc"]                                     # (value, low, high)

Every pixel is a sample: what a detector, D and NCI are of a row they are of a pixel. Detectors that need no bank of
features take a few passes over the maps; KNN and NNGuide work, but compare each pixel with their bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .detectors import Detector, DetectorSet
from .detectors.fitting import check_batch
from .detectors.numbers import check_targets
from .functional import as_places, as_rows
from .heads import inference_head, is_pointwise
from .metrics import Binned, binned

VALUES = 1 << 24  # of features and logits that are worked on at a time
SAMPLED = 1 << 20  # scores of the first update that edges are chosen from
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def head_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(W (c, m), b (c,) or None) of the layer that makes the logits: a convolution of one place, or an `nn.Linear`; W/τ
    of an `L2NormLinear` with τ.

    The gradient goes through to the layer. TypeError for another layer; ValueError for a convolution that is no linear
    layer at every place: a larger kernel, groups, a stride, padding.
    """
    if isinstance(layer, nn.Linear):
        return inference_head(layer)
    if not isinstance(layer, CONVOLUTIONS):
        raise TypeError(f"layer: got {type(layer).__name__}, expected a 1×1 convolution or nn.Linear")
    padded = layer.padding not in ("valid", "same") and any(layer.padding)
    if not is_pointwise(layer, layer.weight) or padded or any(step != 1 for step in layer.stride):
        expected = "expected a linear layer at every place: kernel 1, stride 1, no padding, one group"
        raise ValueError(f"layer: got {layer}, {expected}")
    return layer.weight.flatten(1), layer.bias


def per_pixel(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """function(*rows) -> (k,) of maps (n, ·, h, w), whose rows are all pixels, as a map (n, h, w).

    `per_pixel(lambda f: boundary_distance(f, W), logits)` is D at every pixel, `per_pixel(lambda z, f: nci_score(z, W,
    b, mean, f), features, logits)` NCI. ValueError for maps of other sizes.
    """
    _check_maps({f"map {number}": values for number, values in enumerate(maps)})
    return as_places(function(*(as_rows(values, None)[0] for values in maps)), maps[0].shape)


@torch.no_grad()
def score(detector: Detector, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
    """The scores (n, h, w) of every pixel by one detector, higher = more in-distribution.

    Args:
        detector: fitted; none that passes inputs through the model.
        features: (n, m, h, w), what enters the last layer. logits: (n, c, h, w). None where they are not read.

    Raises:
        ValueError: features and logits of other sizes (interpolate one of them first); NaN in them, with the row, which
            counts the pixels of all images in their order. RuntimeError: it is not fitted.
    """
    checks.instance("detector", detector, Detector, "a Detector; score_set takes a DetectorSet")
    return _scored(lambda *rows: {"": detector.score_features(*rows)}, features, logits)[""]


@torch.no_grad()
def score_set(detectors: DetectorSet, features: Tensor | None, logits: Tensor | None = None) -> dict[str, Tensor]:
    """As `score`, of several detectors, which share a read of the maps: {name: (n, h, w)}."""
    checks.instance("detectors", detectors, DetectorSet, "a DetectorSet; score takes a Detector")
    return _scored(detectors.score_features, features, logits)


def _scored(
    of_rows: Callable[..., Mapping[str, Tensor]], features: Tensor | None, logits: Tensor | None
) -> dict[str, Tensor]:
    first = _check_maps({"features": features, "logits": logits})
    parts: dict[str, list[Tensor]] = {}
    for start, *rows in _chunks(features, logits):
        with checks.behind(start):
            for name, values in of_rows(*rows).items():
                parts.setdefault(name, []).append(values)
    return {name: as_places(torch.cat(values), first.shape) for name, values in parts.items()}


def partial_fit(
    detector: Detector | DetectorSet,
    features: Tensor | None,
    logits: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int = 255,
) -> None:
    """Take in the pixels of one training batch; `detector.finalize(head_of(layer))` ends the fit.

    Args:
        features, logits: as in `score`.
        target: the classes (n, h, w); pixels of `ignore_index` and below 0 are left out. None: all pixels are taken,
            for detectors that read no class.
    """
    first = _check_maps({"features": features, "logits": logits})
    size = first.shape[:1] + first.shape[2:]
    if target is not None and (target.shape != size or target.is_floating_point() or target.dtype == torch.bool):
        raise ValueError(f"target: got {target.dtype} of shape {tuple(target.shape)}, expected {tuple(size)} of int")
    for rows in _training_rows(features, logits, target, ignore_index):  # what is refused leaves nothing in any sum
        check_batch(*rows)
        if rows[2] is not None:
            check_targets(rows[2], None if logits is None else logits.shape[1])
    for rows in _training_rows(features, logits, target, ignore_index):
        detector.partial_fit(*rows)


def _training_rows(
    features: Tensor | None, logits: Tensor | None, target: Tensor | None, ignore_index: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Features, logits and classes of the pixels that count, as many at a time as `VALUES` allows."""
    for start, *rows in _chunks(features, logits):
        if target is None:
            yield rows[0], rows[1], None
            continue
        n_rows = len(rows[1] if rows[0] is None else rows[0])
        classes = target.flatten()[start : start + n_rows].long()
        kept = (classes >= 0) & (classes != ignore_index)
        if kept.any():
            of_features, of_logits = (part if part is None else part[kept] for part in rows)
            yield of_features, of_logits, classes[kept]


class PixelMetrics:
    """AUROC, FPR95 and average precision over pixels, from counts of their scores in bins: memory does not grow.

    `update` as often as there are batches, then `compute`. The bins lie between `edges`, or are chosen from the first
    update: half of them hold equally many of its scores, half are equally wide over three times its range. Where all
    scores of a bin lie is not known: the numbers count pairs in one bin as ties, and come with the bounds that any
    order within the bins gives. More bins, or edges of your own, bring these together.

    With several processes give all the same `edges`, and add up `counts` before `compute` (`dist.all_reduce`).

    Args:
        n_bins: at least 2. edges: finite, in ascending order, in place of n_bins. ignore_index: of pixels that do not
            count.

    Attributes:
        edges: (bins − 1,); None before the first update. counts: (2, bins) int64 on the CPU, of ID and OOD pixels, the
            lowest scores first; None before.
    """

    edges: Tensor | None
    counts: Tensor | None

    def __init__(self, n_bins: int = 4096, edges: Tensor | None = None, ignore_index: int = 255) -> None:
        checks.positive_int("n_bins", n_bins)
        if n_bins < 2:
            raise ValueError(f"n_bins: got {n_bins}, expected at least 2")
        self.n_bins, self.ignore_index = n_bins, ignore_index
        self.edges = self.counts = None
        if edges is not None:
            checks.float_tensor("edges", edges, 1, "(bins − 1,)")
            if not len(edges) or not edges.isfinite().all() or not (edges.diff() > 0).all():
                raise ValueError("edges: expected at least one, finite numbers in ascending order")
            self._begin(edges)

    @torch.no_grad()
    def update(self, scores: Tensor, ood: Tensor) -> None:
        """Count the pixels of a batch: scores (n, h, w), and which are OOD, bool, or 0, 1 and `ignore_index`.

        TypeError, ValueError: dtypes or shapes do not fit; another label; a score of NaN that counts.
        """
        checks.float_tensor("scores", scores, getattr(scores, "ndim", 3), "(n, h, w)")
        checks.instance("ood", ood, Tensor, "a tensor of 0, 1 and ignore_index")
        if ood.shape != scores.shape or ood.is_floating_point() or ood.is_complex():
            got = f"{ood.dtype} of shape {tuple(ood.shape)}"
            raise ValueError(f"ood: got {got}, expected bool or int of shape {tuple(scores.shape)}, as the scores")
        ood = ood.to(scores.device)
        kept = torch.ones_like(ood, dtype=torch.bool) if ood.dtype == torch.bool else ood != self.ignore_index
        labels, values = ood[kept].long(), scores[kept]
        if ((labels != 0) & (labels != 1)).any():
            other = int(labels[(labels != 0) & (labels != 1)][0])
            raise ValueError(f"ood: got {other}, expected 0, 1 or ignore_index={self.ignore_index}")
        if (bad := values.isnan()).any():
            place = tuple((kept & scores.isnan()).nonzero()[0].tolist())
            raise ValueError(f"scores: {int(bad.sum())} are NaN, the first at {place}, expected numbers")
        if not len(values):
            return
        values = values.double() if values.dtype == torch.float64 else values.float()
        if self.edges is None or self.counts is None:
            self._begin(self._chosen(values))
        assert self.edges is not None
        assert self.counts is not None
        self.edges = self.edges.to(values.device)
        bins = torch.searchsorted(self.edges, values.to(self.edges.dtype), right=True)
        n_bins = len(self.edges) + 1
        self.counts += torch.bincount(labels * n_bins + bins, minlength=2 * n_bins).view(2, n_bins).cpu()

    def compute(self) -> dict[str, Binned]:
        """{"auroc", "fpr95_ood_positive", "fpr95_id_positive", "ap_ood_positive"}, each (value, low, high), see
        `metrics.binned`; ValueError where no ID or no OOD pixel was counted."""
        if self.counts is None:
            raise ValueError("compute: no pixel was counted, expected an update before it")
        return binned(*self.counts)

    def _begin(self, edges: Tensor) -> None:
        self.edges, self.counts = edges, torch.zeros(2, len(edges) + 1, dtype=torch.int64, device="cpu")

    def _chosen(self, values: Tensor) -> Tensor:
        """Edges by the scores (k,) of the first update, at most n_bins − 1."""
        values = values[values.isfinite()]
        values = values[:: max(1, len(values) // SAMPLED)].sort().values
        if not len(values):
            return torch.zeros(1, device=values.device)
        half = self.n_bins // 2
        ranks = torch.linspace(0, len(values) - 1, half, device=values.device).round().long()
        low, high = values[0].item(), values[-1].item()
        span = high - low
        # In float64: thrice the range may be beyond float32.
        even = torch.linspace(low - span, high + span, self.n_bins - 1 - half, dtype=torch.float64, device="cpu")
        even = even.to(values.dtype).to(values.device)
        edges: Tensor = torch.cat([values[ranks], even[even.isfinite()]]).unique()
        return edges


def _check_maps(maps: Mapping[str, Tensor | None]) -> Tensor:
    """One of the maps that are there, all of one size; TypeError, ValueError otherwise."""
    there = {name: values for name, values in maps.items() if values is not None}
    if not there:
        raise ValueError(f"{', '.join(maps) or 'maps'}: got None, expected maps (n, ·, h, w)")
    first_name, first = next(iter(there.items()))
    for name, values in there.items():
        checks.float_tensor(name, values, getattr(values, "ndim", 4), "(n, ·, h, w)")
        if values.dim() < 3 or not values.numel():
            raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected maps (n, ·, h, w)")
        if values.shape[:1] + values.shape[2:] != first.shape[:1] + first.shape[2:]:
            raise ValueError(
                f"{name}: got shape {tuple(values.shape)}, expected the images and the size of {first_name}, "
                f"{tuple(first.shape)}; F.interpolate one of them"
            )
    return first


def _chunks(features: Tensor | None, logits: Tensor | None) -> Iterator[tuple[int, Any, Any]]:
    """The number of pixels before it, and rows of features and logits: of one image, as many as `VALUES` allows."""
    there = [part for part in (features, logits) if part is not None]
    step, n_pixels = max(1, VALUES // sum(part.shape[1] for part in there)), there[0].shape[2:].numel()
    for image in range(len(there[0])):
        of_image = [part if part is None else part[image].flatten(1) for part in (features, logits)]
        for start in range(0, n_pixels, step):
            rows = [part if part is None else part[:, start : start + step].T.contiguous() for part in of_image]
            yield image * n_pixels + start, rows[0], rows[1]
