"""The losses and scores as functions. Higher scores mean more in-distribution.

Notation: n samples, c classes, m features; z (n, m) is what enters the last linear layer, W (c, m) and b (c,) are that
layer, f = z W^T + b (n, c) are the logits, p = argmax f the predicted class (first index on ties).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, overload

import torch
from torch import Tensor

from . import checks
from .eager.precision import compute_dtype
from .eager.rows import temperature_of as temperature_of
from .ops import losses, scores
from .values import ALPHA, EPS, TAU

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        weight: Tensor | None
        ignore_index: int
        reduction: str
        label_smoothing: float
        eps: float
        average: str
        detach_geometry: bool

    class _Loss(_Options, total=False):
        return_distance: Literal[False]

    class _LossAndDistance(_Options):
        return_distance: Literal[True]

    class _Either(_Options):
        return_distance: bool


@overload
def elogitnorm(
    logits: Tensor, z: Tensor | None, W: Tensor, b: Tensor | None, y: Tensor, **options: Unpack[_Loss]
) -> Tensor: ...
@overload
def elogitnorm(
    logits: Tensor, z: Tensor | None, W: Tensor, b: Tensor | None, y: Tensor, **options: Unpack[_LossAndDistance]
) -> tuple[Tensor, Tensor]: ...
@overload
def elogitnorm(
    logits: Tensor, z: Tensor | None, W: Tensor, b: Tensor | None, y: Tensor, **options: Unpack[_Either]
) -> Tensor | tuple[Tensor, Tensor]: ...
def elogitnorm(
    logits: Tensor,
    z: Tensor | None,
    W: Tensor,
    b: Tensor | None,
    y: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = EPS,
    average: str = "boundaries",
    detach_geometry: bool = False,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""ELogitNorm loss: cross-entropy of the logits divided by the mean distance to the decision boundaries.

    Equivalent to ``F.cross_entropy(logits / D[:, None], y)`` with

        D_i = 1/(c - 1) * sum_{j != p} (f_ip - f_ij) / ||w_p - w_j||_2,    p = argmax_j f_ij

    in one fused pass, forward and backward; nothing of shape (c, c, m) is built. No hyperparameter.

    Args:
        logits: f, (n, c), any float dtype. -inf marks a masked class: outside the softmax and outside D. For dense
            prediction (n, c, d1, ...), as in `F.cross_entropy`: every place is a sample.
        z: features, (n, m) or (n, m, d1, ...); None is accepted. Only its shape is checked: f already holds all that
            the distance needs of it.
        W: weight of the last linear layer, (c, m), any float dtype. Receives a gradient through ||w_p - w_j|| as well.
        b: bias of that layer, (c,), or None. Only its shape is checked.
        y: class indices, int64 (n,), or class probabilities, float (n, c); dense: (n, d1, ...) or (n, c, d1, ...).
        weight, ignore_index, reduction, label_smoothing: as in `torch.nn.functional.cross_entropy`; label smoothing
            spreads over live (not masked) classes only.
        eps: a sample with D <= eps, or with no boundary at all (a zero-initialised head), falls back to plain
            cross-entropy (temperature 1, no gradient through D). The gradient grows as 1/D down to eps: the jump there
            is real.
        average: "boundaries" divides by the number of boundaries, as the paper does; "classes" by one more, as the
            authors' code.
        detach_geometry: treat ||w_p - w_j|| as constants; gradients still flow through the logits inside D.
        return_distance: also return D, (n,) or (n, d1, ...), detached; 0 where a sample has no boundary.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or with ``reduction="none"`` (n,) or (n, d1, ...).

    Coincident rows of W (||w_p - w_j|| = 0) have no boundary between them and are left out of the sum and of the count.
    Rows as long or short as their dtype holds, and as near to each other, keep their digits; those nearer than 1 / (the
    largest number of the dtype) coincide. A masked target costs +inf. NaN or +inf among the logits of a sample gives
    NaN. An empty batch gives what F.cross_entropy gives.

    Raises:
        TypeError: a dtype is wrong. ValueError: shapes, devices or keywords do not fit, or there is one class, of which
        no loss could train anything. IndexError: on the CPU, an index in `y` is out of range (on a GPU that sample's
        loss is NaN instead: looking would stall it).
        RuntimeError: from a second derivative, which is not implemented.

    Paper: Ding, Liu, Unger, Eilertsen, "Enhancing Out-of-Distribution Detection with Extended Logit Normalization",
    CVPR 2026, arXiv:2504.11434.
    """
    if logits is None:
        raise TypeError(
            "logits: got None, expected a tensor; without logits it is ood_fast.linear_elogitnorm(z, W, b, y)"
        )
    checks.logits(logits, dense=True)
    checks.several_classes("logits", logits.shape[1])
    checks.head_weight(W, logits)
    checks.head_bias(b, W)
    if z is not None:
        checks.features(z, W, logits.shape[0], logits.shape[2:])
    labels = checks.labels(y, logits, weight, ignore_index, reduction, label_smoothing)
    checks.real("eps", eps, 0.0)
    checks.one_of("average", average, checks.AVERAGES)
    shape = logits.shape
    logits, y = as_rows(logits, y)
    W = W.detach() if detach_geometry else W
    if logits.shape[0] == 0:
        loss = empty_loss(reduction, logits, W)
        distance = loss.new_empty(0)
    else:
        labels = labels._replace(target=y)
        loss, distance = losses.elogitnorm(logits, W, labels, reduction, float(eps), average_offset(average))
    loss = as_places(loss, shape)
    return (loss, as_places(distance, shape)) if return_distance else loss


@overload
def linear_elogitnorm(z: Tensor, W: Tensor, b: Tensor | None, y: Tensor, **options: Unpack[_Loss]) -> Tensor: ...
@overload
def linear_elogitnorm(
    z: Tensor, W: Tensor, b: Tensor | None, y: Tensor, **options: Unpack[_LossAndDistance]
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_elogitnorm(
    z: Tensor, W: Tensor, b: Tensor | None, y: Tensor, **options: Unpack[_Either]
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_elogitnorm(
    z: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = EPS,
    average: str = "boundaries",
    detach_geometry: bool = False,
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ELogitNorm loss of a linear head, without its logits: for very many classes.

    Equivalent to ``elogitnorm(F.linear(z, W, b), z, W, b, y)``, but the (n, c) logits are never stored: the rows are
    worked in chunks, whose size follows from shapes and dtype alone, so that two runs give the same bits. Loss, D and
    the gradients for z, W and b come from one pass over each chunk's logits; with ``reduction="none"``, and in a second
    backward through a retained graph, the backward pass computes them anew.

    The prediction is that of the logits as they are computed here, not of logits made elsewhere: on a GPU, where z and
    W are half precision, they are rounded to that as `F.linear` rounds them, and the first of equal ones is predicted;
    elsewhere they are float32. `elogitnorm` takes the logits that it is given.

    Args:
        z: features, (n, m), any float dtype. Receives a gradient, as W and b do.
        W: weight of the last linear layer, (c, m).
        b: bias of that layer, (c,), or None.
        y: class indices, int64 (n,), or class probabilities, float (n, c).
        weight, ignore_index, reduction, label_smoothing, eps, average, detach_geometry, return_distance: as in
            `elogitnorm`.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or (n,) with ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `elogitnorm`.

    Paper: as `elogitnorm`.
    """
    checks.float_tensor("W", W, 2, "(c, m)")
    checks.features(z, W)
    checks.head_bias(b, W)
    # What the logits would be, as far as checks look: a view of one number, whatever n and c are.
    logits = z.new_empty(()).expand(z.shape[0], W.shape[0])
    checks.logits(logits)
    checks.several_classes("W", W.shape[0])
    labels = checks.labels(y, logits, weight, ignore_index, reduction, label_smoothing)
    checks.real("eps", eps, 0.0)
    checks.one_of("average", average, checks.AVERAGES)
    if z.shape[0] == 0:
        loss = empty_loss(reduction, z, W, b)
        distance = loss.new_empty(0)
    else:
        loss, distance = losses.linear_elogitnorm(
            z, W, b, labels, reduction, float(eps), average_offset(average), detach_geometry
        )
    return (loss, distance) if return_distance else loss


def logitnorm(
    logits: Tensor,
    y: Tensor,
    *,
    tau: float = TAU,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """LogitNorm loss: cross-entropy of normalised logits.

    Equivalent to ``F.cross_entropy(logits / (tau * (logits.norm(dim=1, keepdim=True) + 1e-7)), y)``, fused.

    Args:
        logits: f, (n, c) or dense (n, c, d1, ...), any float dtype. -inf marks a masked class: outside the softmax and
            outside the norm.
        y: class indices, int64 (n,), or class probabilities, float (n, c); dense: (n, d1, ...) or (n, c, d1, ...).
        tau: temperature, > 0.
        weight, ignore_index, reduction, label_smoothing: as in `elogitnorm`.

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or with ``reduction="none"`` (n,) or (n, d1, ...).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `elogitnorm`.

    Paper: Wei et al., "Mitigating Neural Network Overconfidence with Logit Normalization", ICML 2022, arXiv:2205.09310.
    """
    checks.logits(logits, dense=True)
    checks.several_classes("logits", logits.shape[1])
    labels = checks.labels(y, logits, weight, ignore_index, reduction, label_smoothing)
    checks.real("tau", tau, 0.0, open_low=True)
    shape = logits.shape
    logits, y = as_rows(logits, y)
    if logits.shape[0] == 0:
        loss = empty_loss(reduction, logits)
    else:
        labels = labels._replace(target=y)
        loss = losses.logitnorm(logits, labels, reduction, float(tau))
    return as_places(loss, shape)


def boundary_distance(logits: Tensor, W: Tensor, *, average: str = "boundaries") -> Tensor:
    """D: the mean distance from z to the decision boundaries of the predicted class. Higher = more in-distribution.

        D_i = 1/(c - 1) * sum_{j != p} (f_ip - f_ij) / ||w_p - w_j||_2

    Args:
        logits: f, (n, c) or dense (n, c, d1, ...), any float dtype; -inf marks a masked class.
        W: weight of the last linear layer, (c, m), any float dtype.
        average: as in `elogitnorm`.

    Returns:
        (n,) or (n, d1, ...), float32 (float64 for float64 inputs); 0 where a sample has no boundary (coincident rows of
        W have none between them). Differentiable with respect to `logits` and `W`; the prediction is a constant.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.

    Paper: as `elogitnorm`; summed instead of averaged and divided by ||z - mu|| it is fDBD (Liu and Qin, ICML 2024).
    """
    checks.logits(logits, dense=True)
    checks.head_weight(W, logits)
    checks.one_of("average", average, checks.AVERAGES)
    shape = logits.shape
    logits, _ = as_rows(logits, None)
    if logits.shape[0] == 0:
        distance = nothing(logits, W)
    else:
        distance = scores.boundary_distance(logits, W, average_offset(average))
    return as_places(distance, shape)


def nci_score(
    z: Tensor, W: Tensor, b: Tensor | None, mean: Tensor, logits: Tensor | None = None, alpha: float = ALPHA
) -> Tensor:
    """NCI score: how well the centred feature aligns with the weight of its predicted class, plus its L1 norm.

        pScore = w_p.(z - mu) / ||z - mu||_2 = cos(w_p, z - mu) ||w_p||_2,    NCI = pScore + alpha ||z||_1

    Higher = more in-distribution.

    Args:
        z: features, (n, m), any float dtype.
        W, b: the last linear layer, (c, m) and (c,) or None; b is used only when `logits` is None.
        mean: mu, mean feature of the training data, (m,).
        logits: f, (n, c). None: the prediction is found from the features tile by tile, and (n, c) is never stored.
        alpha: weight of the norm; 0 leaves pScore alone. `detectors.NCI` has 1e-4, OpenOOD's.

    Returns:
        (n,), float32 (float64 for float64 inputs). z = mu has pScore 0. Differentiable with respect to z, W and mean;
        the prediction is a constant.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.

    Paper: Liu and Qin, "Detecting Out-of-Distribution through the Lens of Neural Collapse", CVPR 2025,
    arXiv:2311.01479.
    """
    checks.float_tensor("W", W, 2, "(c, m)")
    if W.shape[0] == 0:
        raise ValueError(f"W: got shape {tuple(W.shape)}, expected at least one class")
    checks.features(z, W)
    checks.head_bias(b, W)
    checks.vector("mean", mean, z.shape[1], "z", z)
    checks.real("alpha", alpha, -float("inf"))
    if logits is not None:
        checks.logits(logits)
        checks.head_weight(W, logits)
        checks.features(z, W, logits.shape[0])
    if z.shape[0] == 0:
        return nothing(z, W, mean)
    return scores.nci_score(z, W, b, mean, logits, float(alpha))


def l2_normalize(z: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Unit features and their norms: ``(z / max(||z||_2, eps), ||z||_2)`` over the last dimension.

    Args:
        z: (..., m), any float dtype.
        eps: smallest divisor, > 0: a zero feature stays zero.

    Returns:
        (unit features of shape and dtype of z, norms (...,) in float32, float64 for float64 features). The norm before
        normalisation is the score of Haas et al.: higher = more in-distribution. Both are differentiable.

    Raises:
        TypeError: z is not a floating-point tensor. ValueError: z has no dimension, or eps <= 0.

    Paper: Haas, Yolland, Rabus, "Exploring Simple, High Quality Out-of-Distribution Detection with L2 Normalization",
    TMLR 2024.
    """
    if not isinstance(z, Tensor) or not checks.is_float(z):
        raise TypeError(
            f"z: got {z.dtype if isinstance(z, Tensor) else type(z).__name__}, expected a floating-point tensor"
        )
    if z.dim() == 0:
        raise ValueError("z: got a scalar, expected shape (..., m)")
    checks.real("eps", eps, 0.0, open_low=True)
    norms = torch.linalg.vector_norm(z, dim=-1, dtype=torch.promote_types(torch.float32, z.dtype))
    return (z / norms.clamp_min(eps).unsqueeze(-1)).to(z.dtype), norms


Target = TypeVar("Target", Tensor, None)


def as_rows(logits: Tensor, y: Target) -> tuple[Tensor, Target]:
    """Every place of (n, c, d1, ...) as a row of its own, (n d1 ..., c), and its target; (n, c) as it is."""
    if logits.dim() == 2:
        return logits, y
    rows = logits.movedim(1, -1).flatten(0, -2)  # not reshape(-1, c): a shard may have no class
    if y is not None:
        y = y.movedim(1, -1).reshape(rows.shape) if y.is_floating_point() else y.reshape(-1)
    return rows, y


def as_places(value: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_rows` for one value a row; a reduced value as it is."""
    return value if len(shape) == 2 or value.dim() == 0 else value.reshape(shape[:1] + shape[2:])


def nothing(*inputs: Tensor | None) -> Tensor:
    """What n = 0 samples have, (0,): the first of `inputs` is theirs, and all of them get gradients of 0."""
    dtype = compute_dtype(*inputs)
    return torch.stack([t[:0].sum().to(dtype) for t in inputs if t is not None]).sum().expand(0)


def empty_loss(reduction: str, *inputs: Tensor | None) -> Tensor:
    """n = 0: NaN for the mean, 0 for the sum, (0,) for none, as F.cross_entropy has them; no kernel runs."""
    of_none = nothing(*inputs)
    return of_none if reduction == "none" else of_none.sum() if reduction == "sum" else of_none.sum() / 0.0


def average_offset(average: str) -> int:
    """What the number of boundaries is added to, in the divisor of D."""
    return 0 if average == "boundaries" else 1
