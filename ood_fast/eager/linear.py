"""ELogitNorm of z W^T + b in chunks of rows: the logits are never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..records import Geometry, Labels, Needs
from . import sizes
from .boundary import add_distance_gradient, boundary_gaps
from .distances import Head, Rows, centered, inverse_distances, weight_tile
from .precision import compute_dtype, full_precision, matmul
from .rows import Part, Softmax, Targets, row_gradient
from .sizes import join, slices
from .tempered import elogitnorm_rows
from .weight_gradient import add_rows, pull_rows, unit_of, weight_gradient


def linear_elogitnorm(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Labels,
    eps: float,
    average_offset: int,
    sample_grad: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """ELogitNorm of z W^T + b in chunks of rows: (loss, D, dz, dW, db), the logits (n, c) are never stored.

    The gradients are those of sum_i sample_grad_i loss_i, and come from the same pass over the logits; None if not
    needed or without `sample_grad`, and in the dtype of the arithmetic (they may still be scaled).

    A chunk of rows works in place: the logits become their gradient G, and with n < c the inverse distances R, a row
    for each sample, become -S = sample_grad slope g R^3 (`weight_gradient`). Then one product with [G; -S] gives dz
    and another dW, tile by tile of W. With n >= c the distances are a table of all classes as usual.
    """
    n_samples, n_classes = features.shape[0], head_weight.shape[0]
    dtype = compute_dtype(features, head_weight)
    new: dict[str, Any] = {"dtype": dtype, "device": features.device}
    head = Head(head_weight, dtype)
    bias = torch.zeros((), **new) if head_bias is None else head_bias.to(dtype)
    needs = Needs() if sample_grad is None else needs
    # Contiguous, whatever the strides of the features are.
    grad_features = torch.empty(features.shape, **new) if needs.features else None
    grad_weight = torch.zeros(head_weight.shape, **new) if needs.weight else None
    grad_bias = torch.zeros(n_classes, **new) if needs.bias else None
    results = []
    with full_precision(features.device):
        worked = _Worked(Targets(labels, n_classes, dtype), eps, average_offset, sample_grad, needs)
        square = n_samples >= n_classes
        table = worked.make_table(head) if square else None
        # Chunks of one size: a short last one would stream all of W for a few rows.
        widths = 1 if square else 2
        n_chunks = -(-n_samples // max(sizes.MIN_LINEAR_ROWS, sizes.LINEAR_BUFFER_ELEMENTS // (widths * n_classes)))
        step = -(-n_samples // n_chunks)
        buffer = torch.empty(widths * step, n_classes, **new)
        for chunk in slices(n_samples, step):
            n_rows = chunk.stop - chunk.start
            logits, inverses = buffer[:n_rows], table
            z = features[chunk].to(dtype)
            linear_into(logits, z, head_weight, bias)
            top, predicted = logits.max(1)
            if inverses is None:
                inverses = buffer[n_rows : 2 * n_rows]
                rows = Rows(head_weight, predicted, predicted)
                worked.find(head, rows, inverses)
            results += worked.chunk(chunk.start, logits, top, predicted, inverses)
            if sample_grad is None:
                continue
            push = inverses if table is None and worked.pulls and worked.apart else None
            into = None if grad_features is None else grad_features[chunk]
            linear_backward(logits, push, z, predicted, head, worked.apart, into, grad_weight)
            if not (square or worked.gap_sums is None or grad_weight is None):
                left = head_weight[predicted].to(dtype)
                _, own = pull_rows(worked.gap_sums, inverses, left, head, worked.units, grad_weight)
                add_rows(grad_weight, predicted, own)
            if grad_bias is not None:
                grad_bias.add_(logits.sum(0))
        if not (table is None or worked.gap_sums is None or grad_weight is None):
            every_class = torch.arange(n_classes, device=features.device)
            geometry = Geometry(every_class, table, every_class)
            grad_weight.add_(weight_gradient(worked.gap_sums, head, geometry, *worked.units, worked.apart))
    return *join(results), grad_features, grad_weight, grad_bias


class _Worked:
    """What turns the logits of a chunk into their gradient."""

    def __init__(
        self, targets: Targets, eps: float, average_offset: int, sample_grad: Tensor | None, needs: Needs
    ) -> None:
        self.targets, self.eps, self.average_offset, self.sample_grad = targets, eps, average_offset, sample_grad
        self.pulls = needs.weight and needs.geometry
        # (c, c): what each class pulls at each predicted one; where n < c (r, c), and only for rows that are close
        self.gap_sums: Tensor | None = None
        self.square = self.distinct = self.apart = False
        self.units = 0.0, 1.0  # as `unit_of` has them

    def make_table(self, head: Head) -> Tensor:
        """R of all pairs of classes."""
        self.square, table = True, head.mean.origin.new_empty(head.weight.shape[0], head.weight.shape[0])
        self.gap_sums = torch.zeros_like(table) if self.pulls else None
        self.distinct, self.apart = inverse_distances(head, None, table)
        if self.pulls and not self.apart:
            self.units = unit_of(table)
        return table

    def find(self, head: Head, rows: Rows, inverses: Tensor) -> None:
        """R of the rows of a chunk."""
        self.distinct, self.apart = inverse_distances(head, rows, inverses)
        self.gap_sums, self.units = None, (0.0, 1.0)  # those of the chunk before are not this one's
        if self.pulls and not self.apart:
            self.gap_sums, self.units = torch.empty_like(inverses), unit_of(inverses)

    def chunk(
        self, start: int, logits: Tensor, top: Tensor, predicted: Tensor, inverses: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """(loss, D) of parts of a chunk whose first sample is `start`; `logits` become G, and `inverses`, unless they
        are the table, -S in place."""
        results = []
        for rows in slices(logits.shape[0], sizes.ROW_CHUNK_ELEMENTS // logits.shape[1]):
            at, p = slice(start + rows.start, start + rows.stop), predicted[rows]
            inverse = inverses.index_select(0, p) if self.square else inverses[rows]
            found = boundary_gaps(logits[rows], top[rows], inverse, self.distinct, self.average_offset, self.eps)
            grads = self.sample_grad is not None
            loss, temperature, log_partition, slope = elogitnorm_rows(found, self.targets, at, self.eps, grads)
            self.targets.settle(loss, slope, at)
            results.append((loss, found.distance))
            if self.sample_grad is None:
                continue
            gap, spent, _, _, live = found
            scale, part = self.sample_grad[at].to(gap.dtype), Part(at, live)
            push = (scale * slope).unsqueeze(1)
            gradient = row_gradient(gap, scale, Softmax(self.targets, temperature, log_partition), part)
            add_distance_gradient(gradient, inverse, p.unsqueeze(1), push)
            self.targets.silence(gradient, at)
            logits[rows] = gradient
            if self.pulls:
                if live is not None:
                    gap.masked_fill_(push == 0, 0.0)
                unit = self.units[1]
                gap.mul_(push if unit == 1.0 else push * unit)
                if self.gap_sums is None:
                    inverse.mul_(torch.mul(inverse, inverse, out=spent)).mul_(gap)
                elif self.square:
                    add_rows(self.gap_sums, p, gap)
                else:
                    self.gap_sums[rows] = gap
        return results


class Affine:
    """z W^T + b of chunks of rows, and the gradients through it."""

    def __init__(self, features: Tensor, head: Head, bias: Tensor | None) -> None:
        self.features, self.head = features, head
        self.bias = features.new_zeros((), dtype=head.dtype) if bias is None else bias.to(head.dtype)

    def logits(self, rows: slice) -> Tensor:
        """Those of some rows, in the dtype of the arithmetic."""
        z = self.features[rows].to(self.head.dtype)
        logits = z.new_empty(z.shape[0], self.head.weight.shape[0])
        with full_precision(z.device):
            linear_into(logits, z, self.head.weight, self.bias)
        return logits

    def add(self, rows: slice, gradient: Tensor, grads: Sequence[Tensor | None], apart: bool) -> None:
        """Write dz of these rows, and add to dW and db, those of `grads` that are given. `apart` as in
        `linear_backward`."""
        grad_features, grad_weight, grad_bias = grads
        z, into = self.features[rows].to(self.head.dtype), None if grad_features is None else grad_features[rows]
        with full_precision(z.device):
            linear_backward(gradient, None, z, None, self.head, apart, into, grad_weight)
        if grad_bias is not None:
            grad_bias.add_(gradient.sum(0))


def linear_into(logits: Tensor, z: Tensor, head_weight: Tensor, bias: Tensor) -> None:
    """logits = z W^T + b, tile by tile of W: in one product the matrix library would pack half of W beside it."""
    for columns in slices(head_weight.shape[0], sizes.WEIGHT_TILE_ELEMENTS // max(1, z.shape[1])):
        tile_bias = bias[columns] if bias.dim() else bias
        torch.add(matmul(z, head_weight[columns].to(logits.dtype).t()), tile_bias, out=logits[:, columns])


def linear_backward(
    gradient: Tensor,
    push: Tensor | None,
    z: Tensor,
    predicted: Tensor | None,
    head: Head,
    apart: bool,
    grad_features: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Write dz = G W, (r, m), from the logit gradient G (r, c); add to `grad_weight` G^T z and what `push` (r, c) says,
    which is None, as `predicted` may be, where nothing comes through the distances.

    `push` is -S of `weight_gradient`, the second half of the buffer that `gradient` begins, so that both are one
    operand. W is read once, in centred tiles: the rows of G sum to 0 but for rounding, which the last line puts back.
    `apart` as of `inverse_distances`, and so where there is a `push`.
    """
    head_weight, origin = head.weight, (head.mean if apart else head.robust).origin
    n_rows, n_features = z.shape
    n_used = n_rows if push is None else 2 * n_rows
    both = gradient.as_strided((n_used, gradient.shape[1]), gradient.stride())
    read_weight = grad_features is not None or push is not None
    product = z.new_zeros(n_used, n_features)
    outer = z
    if push is not None:
        left = head_weight[predicted].to(z.dtype).sub_(origin)
        outer = torch.cat([z, left])
    buffer = weight_tile(head_weight, z.dtype)
    for columns in slices(both.shape[1], buffer.shape[0]):
        if read_weight:
            right = centered(head_weight[columns], origin, buffer)
            product.add_(matmul(both[:, columns], right))
        if grad_weight is not None:
            grad_weight[columns].add_(matmul(both[:, columns].t(), outer))
            if push is not None:
                grad_weight[columns].addcmul_(right, push[:, columns].sum(0).unsqueeze(1), value=-1)
    if not (push is None or predicted is None or grad_weight is None):
        own = product[n_rows:].sub_(left.mul_(push.sum(1, keepdim=True)))
        add_rows(grad_weight, predicted, own)
    if grad_features is not None:
        grad_features.copy_(product[:n_rows].addmm_(gradient.sum(1, keepdim=True), origin.unsqueeze(0)))
