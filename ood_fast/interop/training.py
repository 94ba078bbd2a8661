"""OOD metrics while a model is trained: by a callback of Lightning, or by a call in any loop and for any logger.

    from ood_fast.interop.training import OODMetrics

    metrics = OODMetrics(val_loader, {"near": near_loader, "far": far_loader}, ["NCI", "MSP"], fit=train_loader)
    lightning.Trainer(callbacks=[metrics], ...)                    # its loggers get them, whichever they are

    for name, value in metrics(model).items():                     # in a loop of your own
        writer.add_scalar(name, value, step)                       # TensorBoard; wandb.log(metrics(model)), mlflow, ...

Choose epochs and settings on validation data: what is chosen on test images tells nothing of others.
"""

from __future__ import annotations

import importlib
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import checks
from ..detectors import Detector
from ..evaluation.loaders import evaluate_loaders
from ..training.randomness import random_state_kept


def _callback() -> Any:
    """Lightning's class, by either name of the package; without it the call is what remains."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    return object


Callback: Any = _callback()


@contextmanager
def _generators_kept(loaders: Iterable[Any]) -> Iterator[None]:
    """The generators of loaders and of their samplers are afterwards as they were before."""
    parts = [(each, getattr(each, "sampler", None), getattr(each, "batch_sampler", None)) for each in loaders]
    held = [part for each in parts for part in (*each, getattr(each[2], "sampler", None))]
    generators = [found for part in held if isinstance(found := getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class OODMetrics(Callback):  # type: ignore[misc]  # of a package that need not be there
    """{"ood/SET/DETECTOR/METRIC": value}: detectors fitted anew on the model as it is, and measured.

    The model, its modes, its gradients and all generators, those of the loaders too, are left as they were: what is
    trained does not depend on whether it is measured. Under Lightning each process measures all of the data, after the
    epochs `every` says.

    Args:
        id_loader: in-distribution batches x or (x, y, ...), which are not trained on.
        ood: name -> loader of OOD batches.
        detectors, fit, head: as in `ood_fast.evaluate`: names or detectors, the training batches they are fitted on.
        metrics: of `ood_fast.metrics.detection`.
        every: epochs from one measurement to the next, with Lightning.
        model: with Lightning, the attribute of the module that is the classifier, as "model" or "net.body"; None: the
            module itself.

    Attributes:
        history: what was measured, a mapping for each time.
    """

    def __init__(
        self,
        id_loader: Iterable[Any],
        ood: Mapping[str, Iterable[Any]],
        detectors: Mapping[str, Detector] | Iterable[str] | None = None,
        *,
        fit: Iterable[Any] | None = None,
        head: str | None = None,
        metrics: Iterable[str] = ("auroc", "fpr95_ood_positive"),
        every: int = 1,
        model: str | None = None,
    ) -> None:
        super().__init__()
        checks.instance("ood", ood, Mapping, "a mapping from names to loaders")
        checks.positive_int("every", every)
        self.id_loader, self.ood, self.fit, self.head = id_loader, ood, fit, head
        self.detectors = detectors if detectors is None or isinstance(detectors, Mapping) else list(detectors)
        self.metrics, self.every, self.model = tuple(metrics), every, model
        self.history: list[dict[str, float]] = []

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure it. Raises as `ood_fast.evaluate`; ValueError for a metric that is not known."""
        parameter = next(model.parameters(), torch.empty(0))
        # A DataLoader draws from its own or the global generator when it is iterated, transforms from any.
        with random_state_kept(parameter.device), _generators_kept([self.id_loader, *self.ood.values(), self.fit]):
            measured = evaluate_loaders(
                model, self.id_loader, self.ood, fit=self.fit, detectors=self.detectors, head=self.head
            )
        rows = [row for row in measured.rows() if row["detector"] and row["set"] in self.ood]
        for metric in self.metrics:
            checks.one_of("metrics", metric, tuple(sorted({row["metric"] for row in rows})))
        found = {
            f"ood/{row['set']}/{row['detector']}/{row['metric']}": float(row["value"])
            for row in rows
            if row["metric"] in self.metrics
        }
        self.history.append(found)
        return found

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """What Lightning calls: measures, and logs by the module."""
        if (trainer.current_epoch + 1) % self.every:
            return
        try:
            found = self(module if self.model is None else operator.attrgetter(self.model)(module))
        except ValueError as error:
            if not self.history:  # it was never right: the request is wrong
                raise
            warnings.warn(f"OODMetrics: epoch {trainer.current_epoch}: not measured: {error}", stacklevel=2)
            return
        module.log_dict(found)
