"""The features and the decision regions of the head, in two dimensions.

The plots of Ding et al., "Enhancing Out-of-Distribution Detection with Extended Logit Normalization", CVPR 2026,
arXiv:2504.11434, are of a model with two features. Of any other, this is the plane of the first two principal
components of the training features, and the regions are those of its points: features lie beside it, and may be
classified otherwise than the place where they are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .collapse import Moments


@dataclass(frozen=True)
class Plane:
    """The points o + u A, u (2,).

    Attributes:
        origin: o (m,). axes: A (2, m), orthonormal rows; for a single feature the second is 0.
        share: of the variance of the training features, that along the axes.
        direct: there are no more than two features, and the plane holds all of them.
    """

    origin: Tensor
    axes: Tensor
    share: float
    direct: bool

    def project(self, features: Tensor) -> Tensor:
        """u = (z − o) Aᵀ, (n, 2), of features (n, m) in float64."""
        return (features - self.origin.to(features)) @ self.axes.T.to(features)

    def head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The head on the plane, f(u) = u (W Aᵀ)ᵀ + (W o + b): its weight (c, 2) and bias (c,)."""
        weight = weight.to(self.axes)
        level = weight @ self.origin
        return weight @ self.axes.T, level if bias is None else level + bias.to(self.axes)


def plane_of(geometry: Moments) -> Plane:
    """The plane of the training features: all of it up to two features, else the first two principal components."""
    n_features = len(geometry.mean)
    if n_features <= 2:
        axes = torch.zeros(2, n_features, dtype=torch.float64)
        axes[:n_features] = torch.eye(n_features, dtype=torch.float64)
        return Plane(torch.zeros(n_features, dtype=torch.float64), axes, 1.0, direct=True)
    values, vectors = torch.linalg.eigh(geometry.covariance)
    axes = vectors[:, [-1, -2]].T
    # An eigenvector has no sign of its own: its largest entry is positive here.
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    total = values.clamp(min=0).sum()
    share = (values[-2:].clamp(min=0).sum() / total).item() if total > 0 else 1.0
    return Plane(geometry.mean, axes, share, direct=False)


def regions(
    weight: Tensor, bias: Tensor, box: tuple[float, float, float, float]
) -> dict[int, list[tuple[float, float]]]:
    """The decision regions of a head on the plane, weight (c, 2) and bias (c,), in a box (left, right, low, high).

    Each is convex: the box cut by the half-planes f_p ≥ f_j. Returns {class: corners in order}, of those that have an
    area.
    """
    left, right, low, high = box
    # Classes that win somewhere on a grid come first: most others have lost all of the box after a few of them.
    xs, ys = torch.linspace(left, right, 33).double(), torch.linspace(low, high, 33).double()
    winners = (torch.cartesian_prod(xs, ys) @ weight.T + bias).argmax(dim=1).unique().tolist()
    order = winners + sorted(set(range(len(weight))) - set(winners))
    rows = torch.cat([weight, bias.unsqueeze(1)], dim=1).tolist()
    found = {}
    for p in range(len(rows)):
        corners = [(left, low), (right, low), (right, high), (left, high)]
        for j in order:
            if j != p and corners:
                a, b, c = (ours - theirs for ours, theirs in zip(rows[p], rows[j], strict=True))
                corners = _cut(corners, a, b, c, ties=p < j)
        if _area(corners) > 1e-9 * (right - left) * (high - low):
            found[p] = corners
    return found


def _cut(corners: list[tuple[float, float]], a: float, b: float, c: float, ties: bool) -> list[tuple[float, float]]:
    """The part of a convex polygon where a x + b y + c ≥ 0; of coincident classes, the first has all."""
    if a == b == 0 and c == 0:
        return corners if ties else []
    sides = [a * x + b * y + c for x, y in corners]
    kept = []
    for i, (x, y) in enumerate(corners):
        (next_x, next_y), side, next_side = corners[(i + 1) % len(corners)], sides[i], sides[(i + 1) % len(corners)]
        if side >= 0:
            kept.append((x, y))
        if (side >= 0) != (next_side >= 0):
            t = side / (side - next_side)
            kept.append((x + t * (next_x - x), y + t * (next_y - y)))
    return kept


def _area(corners: list[tuple[float, float]]) -> float:
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(sum(x * other_y - other_x * y for (x, y), (other_x, other_y) in pairs)) / 2
