"""The evaluation of a model on data loaders of one's own: `ood_fast.evaluate(model, id_loader, {"near": loader})`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..agreement import confusion, refuse_order
from ..detectors import Detector, DetectorSet, ModelEnsemble, create, find, known
from ..detectors.fitting import Fit, readings_of
from ..heads import given_head, inference_head
from ..models.inputs import Range, SeenImages, warn_other_range
from ..models.running import check_loader, run_model
from .cache import Outputs, score_key
from .measure import Chosen, Measuring, check_names, measure
from .results import CSID, FIT, ID, TEST, Results, RunResult, TestSet
from .trained import Trained


class Evaluation(Results):
    """`Results` of one model; `print` shows its tables."""

    def __str__(self) -> str:
        from ..report.tables import as_markdown
        from .tables import build

        return "\n\n".join(as_markdown(table) for table in build(self))

    def rows(self) -> Iterator[dict[str, Any]]:
        """{detector, set, group, metric, value}: every number, from 0 to 1."""
        for found in self.runs[0].measurements:
            about = {"detector": found.detector, "set": found.ood_set, "group": found.group}
            yield {**about, "metric": found.metric, "value": found.value}

    def to_pandas(self) -> Any:
        """The rows as a DataFrame; needs pandas."""
        import pandas

        return pandas.DataFrame(list(self.rows()))


def evaluate_loaders(
    model: nn.Module,
    id_loader: Iterable[Any],
    ood: Mapping[str, Iterable[Any]],
    *,
    fit: Iterable[Any] | None = None,
    detectors: Mapping[str, Detector] | Iterable[str] | None = None,
    head: str | nn.Linear | None = None,
    bootstrap: int = 0,
) -> Evaluation:
    """AUROC, FPR95 and AUPR of detectors, accuracy and calibration; the model runs once over each loader.

    Args:
        model: a classifier that ends in one linear layer, `head`. With an `Ensemble` a `ModelEnsemble`, of which the
            other detectors read the mean logits.
        id_loader: test batches x, (x, y, ...) or mappings. Without y there is no accuracy.
        ood: name -> loader; called near, or near and something that is no letter (near/NAME, near_NAME, Near-OOD) it
            counts as near-OOD; csid likewise as a covariate-shifted in-distribution set, see below; else as far.
        fit: training batches, for the detectors that are fitted on data.
        detectors: names, or name -> detector, whose parameters are taken and which is left as it is; default: all but
            those that run the model several times, without `fit` those that need no data.
        bootstrap: draws for intervals.

    Raises:
        ValueError: no OOD loader, one without a batch; a detector that needs `fit`, or does not fit its data; targets
            that are no class indices of the model, or in another order than its classes.

    With covariate-shifted sets the evaluation is also a full-spectrum one, as OpenOOD's `fsood`: the metrics
    `fsood_auroc`, ... take the ID test images and all shifted ones together as in-distribution, `fsood_accuracy` is
    over them, and each shifted set has its accuracy.
    """
    if not isinstance(ood, Mapping):
        got = type(ood).__name__
        raise TypeError(f"ood: got {got}, expected a mapping from names to loaders, such as {{'near': loader}}")
    if all(_group(name) == CSID for name in ood):
        raise ValueError(f"ood: got {list(ood) or 'no loader'}, expected a mapping from names to loaders of OOD data")
    check_names(ood)
    for name, loader in {"id_loader": id_loader, **ood, **({} if fit is None else {"fit": fit})}.items():
        check_loader(loader, name)
    if detectors is None:
        every = {name: create(name) for name in known() if not find(name).needs_model}
        given = {name: d for name, d in every.items() if fit is not None or not d.gathers()}
    else:
        listed = DetectorSet(detectors)
        # Those that are fitted here are others: the user's stay as they are.
        given = {name: d.changed() if d.needs_fit else d for name, d in listed.items()}
        if fit is None and (wanting := [name for name, d in given.items() if d.gathers()]):
            raise ValueError(f"fit: got None, but {', '.join(wanting)} are fitted on training data")
    how = Measuring(tune=False, leave_out=detectors is None, bootstrap=bootstrap)
    if head is None and not any(map(reads_features, given.values())):
        layer, id_loader = _perhaps_head(model, id_loader)
    else:
        layer = given_head(model, head)
    seeing = {name: detector for name, detector in given.items() if detector.needs_model}
    parts: dict[str, Outputs] = {}
    before = _Before()
    if fit is not None:
        fitting = Fit([detector for detector in seeing.values() if detector.needs_fit], anew=True)
        parts[FIT] = _outputs(model, layer, FIT, fit, {}, before, fitting)
        if fitting.detectors:
            fitting.finish(layer)
        for detector in fitting.given:
            if not detector.learners():  # of several models
                detector.fit(model, fit)
    parts |= {TEST: _outputs(model, layer, TEST, id_loader, seeing, before)}
    parts |= {name: _outputs(model, layer, name, loader, seeing, before) for name, loader in ood.items()}
    groups = {ID: "id", **{name: _group(name) for name in ood}}
    sets = {name: TestSet(name, group, len(parts[TEST if name == ID else name])) for name, group in groups.items()}
    title = type(model).__name__
    result = RunResult(Trained(title, model, title, Path(), ""), "", sets, outputs=parts)
    if layer is not None:
        weight, bias = inference_head(layer)
        result.head = (weight.detach().cpu().double(), None if bias is None else bias.detach().cpu().double())
    measure(result, given, [], how, Chosen(seeing))
    return Evaluation(title, [result], bootstrap, tuned=False)


def reads_features(detector: Detector) -> bool:
    """Whether it needs the head, or what enters it."""
    members = detector.learners()
    reads = {name for one in members for part in one.gathers().values() for name in part.reads}
    return "features" in reads or any(one.needs_features or one.needs_head for one in members)


def _perhaps_head(model: nn.Module, loader: Iterable[Any]) -> tuple[nn.Linear | None, Iterable[Any]]:
    """The head of a model whose logits alone are read, None where it is not found or did not make them; the loader from
    its beginning."""
    batches = iter(loader)
    first = list(itertools.islice(batches, 1))
    layer = None
    with suppress(ValueError, RuntimeError):
        found = None if isinstance(model, ModelEnsemble) else given_head(model, None)
        next(run_model(model, first, found), None)
        layer = found
    return layer, itertools.chain(first, batches)


def _group(name: str) -> str:
    """What the name of a loader says it is."""
    found = re.match(r"(near|csid)(?![a-z])", name.lower())
    return found[1] if found else "far"


@dataclass
class _Before:
    """What is known of the loaders before."""

    ranges: dict[str, Range | None] = field(default_factory=dict)
    told_chance: bool = False  # that the accuracy is at chance level, once


def _check_classes(name: str, logits: Tensor, targets: list[Tensor], before: _Before) -> None:
    """ValueError for targets that are no class indices of the logits, or those of another order."""
    for some in targets:
        if some.dim() != 1 or some.is_floating_point() or some.is_complex() or some.dtype == torch.bool:
            got = f"{some.dtype} of shape {tuple(some.shape)}"
            raise ValueError(f"{name}: targets: got {got}, expected class indices (n,)")
    joined = torch.cat(targets).long()
    if joined.max() >= logits.shape[1]:
        raise ValueError(
            f"{name}: targets: got {joined.max()}, expected indices of the model's {logits.shape[1]} classes"
        )
    counts = confusion(logits, joined)
    before.told_chance = refuse_order(counts, name, told=before.told_chance)


def _outputs(
    model: nn.Module,
    head: nn.Linear | None,
    name: str,
    loader: Iterable[Any],
    seeing: Mapping[str, Detector],
    before: _Before,
    fitting: Fit | None = None,
) -> Outputs:
    """What the model makes of a loader, on the CPU: also for `fitting`, and the scores of detectors that need it."""
    features, logits, targets = list[Tensor](), list[Tensor](), list[Tensor]()
    scores: dict[str, list[torch.Tensor]] = {score_key(detector): [] for detector in seeing.values()}
    readings = readings_of(seeing.values()) if fitting is None else fitting.prepare(model)
    seen, labelled = SeenImages(model if head is not None and name == TEST else None), False
    for batch in run_model(model, loader, head, [*readings, *seen.readings]):
        if not logits:
            warn_other_range(batch.inputs, before.ranges.get(FIT, before.ranges.get(TEST)), name)
        seen.take(batch)
        if fitting is not None:
            fitting.see(model, batch, head)
        logits.append(batch.logits.cpu())
        features.append(logits[-1][:, :0] if batch.features is None else batch.features.cpu())
        labelled |= batch.targets is not None
        targets.append(torch.full((len(logits[-1]),), -1) if batch.targets is None else batch.targets.cpu())
        for detector in seeing.values():
            scores[score_key(detector)].append(detector.score_batch(model, batch, head).cpu().double())
    before.ranges[name] = seen.range
    if name in (FIT, TEST):
        seen.tell(name)
    if not any(map(len, logits)):
        raise ValueError(f"{name}: got a loader without {'an input' if logits else 'a batch'}, expected inputs")
    if labelled and (name in (TEST, FIT) or _group(name) == CSID):
        _check_classes(name, torch.cat(logits), targets, before)
    joined = {key: torch.cat(parts) for key, parts in scores.items()}
    group = "id" if name in (TEST, FIT) else "ood"
    return Outputs(name, name, group, torch.cat(features), torch.cat(logits), torch.cat(targets), joined)
