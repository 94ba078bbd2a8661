"""Row statistics: what the scores of most detectors are made of, from one read of the logits and one of the features.

MSP, MaxLogit, Energy, GEN over all classes, the entropy, fDBD, NCI and the norms are functions of these n-vectors, so
any number of such detectors costs one pass over the data.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
from torch import Tensor

from . import checks, eager
from .eager.precision import compute_dtype, is_exporting
from .ops import scores
from .records import Inputs
from .values import GAMMA

FROM_LOGITS: tuple[str, ...] = ("max", "predicted", "logsumexp", "confidence", "entropy", "gen")
FROM_LOGITS += ("logit_norm1", "logit_norm2", "distance")
FROM_FEATURES = ("norm1", "norm2", "centred_norm", "projection")
STATISTICS = FROM_LOGITS + FROM_FEATURES


def row_statistics(
    names: Collection[str],
    logits: Tensor | None = None,
    features: Tensor | None = None,
    *,
    W: Tensor | None = None,
    mean: Tensor | None = None,
    table: Tensor | None = None,
    boundaries: Tensor | None = None,
    gamma: float = GAMMA,
) -> dict[str, Tensor]:
    """The statistics `names` of each row, in one pass; only what is asked for is read and computed.

    From the logits f, with the prediction p = argmax f, the softmax P and the gaps g_j = f_p - f_j:

        max           f.amax(1)
        predicted     f.argmax(1), int64, the first class on ties
        logsumexp     f.logsumexp(1)
        confidence    max_j P_j = 1 / sum_j exp(-g_j); exp(max - logsumexp) would round at the size of the logits
        entropy       -sum_j P_j log P_j
        gen           sum_j P_j^gamma (1 - P_j)^gamma over all classes
        logit_norm1   f.abs().sum(1)
        logit_norm2   f.norm(dim=1)
        distance      D = sum_j g_j R_pj / K over the K boundaries of p, as `ood_fast.boundary_distance` has it

    From the features z:

        norm1         z.abs().sum(1)
        norm2         z.norm(dim=1)
        centred_norm  (z - mean).norm(dim=1)
        projection    (W[p] * (z - mean)).sum(1)

    Args:
        names: any of the names above.
        logits: f, (n, c), any float dtype; needed by the first list and by "projection". -inf marks a masked class,
            which no statistic counts.
        features: z, (n, m), any float dtype; needed by the second list.
        W: weight of the last linear layer, (c, m); needed by "projection", and by "distance" where `table` is None.
        mean: mean feature of the training data, (m,); needed by "centred_norm" and "projection".
        table: R, (c, c), `distance_table(W)`: 1 / ||w_p - w_j||, 0 where p has no boundary with j. With it "distance"
            costs no product; without it the needed rows are computed from `W`, in a pass of their own.
        boundaries: number of boundaries of each class, (c,), int64: `table.count_nonzero(1)`. Given beside `table` it
            saves plain PyTorch a pass; without it they are counted anew.
        gamma: exponent of "gen", > 0.

    Returns:
        {name: (n,)} for the names asked, in float32; in float64 where a tensor that is read has it ("distance" without
        `table` is read apart). They are constants to autograd: `ood_fast.boundary_distance` and `ood_fast.nci_score`
        are differentiable.

    1 - P_p, which loses its digits as P_p approaches 1, is taken as sum_{j != p} P_j in "gen" and "entropy": they are
    as precise for certain predictions as for others. It counts as 0 below the smallest float.

    NaN in a row gives NaN in all that is made of that row ("projection" is made of both); "predicted" is then some
    class. "logsumexp", "confidence", "entropy", "gen" and "distance" are NaN also for a row that holds +inf or has no
    live class.

    Under `torch.export` and `torch.onnx` the graph holds plain ATen operators; "distance" without `table` then takes
    products of rows of W in float64, of which rows within √(m · 2⁻⁵²) of their length coincide.

    Raises:
        TypeError, ValueError: a name is unknown, a tensor that a statistic needs is missing, or dtypes, shapes, devices
        or gamma do not fit.

    Papers: GEN: Liu, Lochman, Zach, CVPR 2023. D: Ding et al., arXiv:2504.11434. NCI: Liu and Qin, CVPR 2025.
    """
    names, needs = plan(names, table is not None)
    given = {"logits": logits, "features": features, "W": W, "mean": mean, "table": table}
    for argument, value in given.items():
        if argument not in needs:
            given[argument] = None
        elif value is None:
            because = needs[argument]
            raise ValueError(
                f"{argument}: got None, but it is needed by {' and '.join(map(repr, because))}; "
                f"pass {_CURES[argument]}{' or table=distance_table(W)' if because == ['distance'] else ''}"
            )
    _check(names, **given)
    if boundaries is not None and given["table"] is not None:
        _check_boundaries(boundaries, given["table"])
    checks.real("gamma", gamma, 0.0, open_low=True)
    if not names:
        return {}
    for argument, value in given.items():
        if value is not None and value.requires_grad:
            given[argument] = value.detach()
    if is_exporting():
        values = eager.row_statistics(names, Inputs(*given.values()), float(gamma), traced=True)
        return dict(zip(names, values, strict=True))
    return _computed(names, Inputs(*given.values()), float(gamma), boundaries)


def _computed(names: list[str], inputs: Inputs, gamma: float, boundaries: Tensor | None) -> dict[str, Tensor]:
    logits, head_weight = inputs.logits, inputs.head_weight
    by_weight = "distance" in names and inputs.table is None  # with an operator of its own, from logits and W alone
    if by_weight and len(names) > 1:
        others, needs = plan(set(names) - {"distance"}, False)
        found = _computed(["distance"], Inputs(logits, None, head_weight, None, None), gamma, None)
        rest = inputs._replace(
            logits=logits if "logits" in needs else None, head_weight=head_weight if "W" in needs else None
        )
        found |= _computed(others, rest, gamma, None)
        return {name: found[name] for name in names}
    like = inputs.features if logits is None else logits
    assert like is not None  # every statistic needs one of the two
    if like.shape[0] == 0:
        dtype = compute_dtype(*inputs)
        return {name: like.new_empty(0, dtype=torch.int64 if name == "predicted" else dtype) for name in names}
    if by_weight and logits is not None and head_weight is not None:
        return {"distance": scores.boundary_distance(logits, head_weight, 0)}
    return dict(zip(names, scores.row_statistics(names, inputs, gamma, boundaries), strict=True))


def distance_table(W: Tensor) -> Tensor:
    """R of all pairs of classes, (c, c): 1 / ||w_p - w_j||, 0 on the diagonal and where rows coincide.

    In float32 (float64 for float64), a constant to autograd. Close rows are compared by direct differences, so R is as
    precise for them as for others.

    Raises:
        TypeError, ValueError: W is not a floating-point tensor (c, m).
    """
    checks.float_tensor("W", W, 2, "(c, m)")
    return scores.distance_table(W.detach())


_CURES = {
    "logits": "the logits (n, c)",
    "features": "the features (n, m), what enters the last linear layer",
    "W": "the weight of the last linear layer (c, m)",
    "mean": "the mean of the training features (m,)",
}


def plan(names: Collection[str], has_table: bool) -> tuple[list[str], dict[str, list[str]]]:
    """The names without repetition, in the order of STATISTICS; and argument -> the statistics that need it, for the
    arguments that any needs."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"names: got {names!r}, expected a collection of names, such as ['max', 'logsumexp']")
    made = _plan if torch.compiler.is_compiling() else _kept_plan  # the compiler warns of what is kept
    return made(frozenset(names), has_table)


def _plan(names: frozenset[str], has_table: bool) -> tuple[list[str], dict[str, list[str]]]:
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"names: {checks.unknown('statistic', name, STATISTICS)}")
    ordered = [name for name in STATISTICS if name in names]
    readers = {
        "logits": (*FROM_LOGITS, "projection"),
        "features": FROM_FEATURES,
        "W": ("projection",) if has_table else ("projection", "distance"),
        "mean": ("centred_norm", "projection"),
        "table": ("distance",) if has_table else (),
    }
    needs = {argument: [name for name in ordered if name in read] for argument, read in readers.items()}
    return ordered, {argument: because for argument, because in needs.items() if because}


_kept_plan = functools.lru_cache(maxsize=256)(_plan)


def _check(
    names: list[str],
    logits: Tensor | None,
    features: Tensor | None,
    W: Tensor | None,
    mean: Tensor | None,
    table: Tensor | None,
) -> None:
    if logits is not None:
        checks.logits(logits)
    if features is not None:
        checks.float_tensor("features", features, 2, "(n, m)")
    if logits is not None and features is not None:
        if features.shape[0] != logits.shape[0]:
            raise ValueError(
                f"features: got {features.shape[0]} rows, expected {logits.shape[0]}, one for each row of logits"
            )
        checks.same_device("features", features, "logits", logits)
    if W is not None and logits is not None:
        checks.head_weight(W, logits)
        if features is not None and "projection" in names and W.shape[1] != features.shape[1]:
            raise ValueError(
                f"features: got shape {tuple(features.shape)}, expected (n, {W.shape[1]}) to fit W {tuple(W.shape)}"
            )
    if mean is not None and features is not None:
        checks.vector("mean", mean, features.shape[1], "features", features)
    if table is not None and logits is not None:
        checks.float_tensor("table", table, 2, "(c, c)")
        n_classes = logits.shape[1]
        if table.shape != (n_classes, n_classes):
            raise ValueError(
                f"table: got shape {tuple(table.shape)}, expected ({n_classes}, {n_classes}), distance_table(W) of the "
                f"head that made logits {tuple(logits.shape)}"
            )
        checks.same_device("table", table, "logits", logits)


def _check_boundaries(boundaries: Tensor, table: Tensor) -> None:
    checks.instance("boundaries", boundaries, Tensor, "a tensor of shape (c,)")
    if boundaries.dtype != torch.int64:
        raise TypeError(f"boundaries: got dtype {boundaries.dtype}, expected int64, table.count_nonzero(1)")
    if boundaries.shape != table.shape[:1]:
        raise ValueError(
            f"boundaries: got shape {tuple(boundaries.shape)}, expected ({table.shape[0]},), table.count_nonzero(1) of "
            f"the table {tuple(table.shape)}"
        )
    checks.same_device("boundaries", boundaries, "table", table)
