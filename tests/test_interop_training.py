"""`interop.training.OODMetrics`: what it gives, that nothing is trained otherwise for it, and Lightning's callback."""

from __future__ import annotations

import csv
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import ood_fast
from ood_fast.detectors import KNN, MSP
from ood_fast.interop import training
from ood_fast.interop.training import OODMetrics


def loader(n: int = 40, shift: float = 0.0, shuffle: bool = False) -> DataLoader:
    images = torch.rand(n, 3, 4, 4) + shift
    return DataLoader(TensorDataset(images, torch.arange(n) % 3), batch_size=10, shuffle=shuffle)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def test_generators_of_loaders_and_of_transforms_are_left_as_they_were():
    """The loader to fit on is that of the training, whose next epoch had another order."""

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + random.random() + np.random.rand(), y

    data, own = Augmented(*loader().dataset.tensors), torch.Generator().manual_seed(0)
    drawn = BatchSampler(RandomSampler(data, generator=own), 10, drop_last=False)
    for train in (DataLoader(data, 10, shuffle=True, generator=own), DataLoader(data, batch_sampler=drawn)):
        before = own.get_state(), random.getstate(), np.random.get_state()[1].tolist()
        OODMetrics(loader(), {"far": loader(shift=2.0)}, ["NCI"], fit=train)(classifier())
        assert torch.equal(own.get_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_what_it_gives():
    model = classifier()
    inside, near, far = loader(), loader(shift=0.3), loader(shift=2.0)
    metrics = OODMetrics(inside, {"near": near, "far": far}, {"MSP": MSP(), "KNN": KNN(k=3)}, fit=loader())
    model.train()
    state = torch.get_rng_state()
    found = metrics(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert set(found) == {
        f"ood/{name}/{detector}/{metric}"
        for name in ("near", "far")
        for detector in ("MSP", "KNN")
        for metric in ("auroc", "fpr95_ood_positive")
    }
    scores = (MSP().score(model, data) for data in (inside, far))
    assert found["ood/far/MSP/auroc"] == pytest.approx(ood_fast.metrics.auroc(*scores), abs=1e-6)
    assert metrics.history == [found]
    with torch.no_grad():
        model[1].weight.mul_(-1)
    assert metrics(model)["ood/near/KNN/auroc"] != found["ood/near/KNN/auroc"], "fitted anew"


def test_refuses():
    with pytest.raises(TypeError, match="ood: got list"):
        OODMetrics(loader(), [loader()])
    with pytest.raises(ValueError, match="every: got 0"):
        OODMetrics(loader(), {"far": loader()}, every=0)
    with pytest.raises(ValueError, match="metrics: got 'auc', expected one of"):
        OODMetrics(loader(), {"far": loader()}, ["MSP"], metrics=["auc"])(classifier())
    with pytest.raises(ValueError, match="fit: got None"):
        OODMetrics(loader(), {"far": loader()}, ["KNN"])(classifier())


def by_lightning(logger, *callbacks) -> nn.Module:
    """What Lightning trains in two epochs."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    module, silent = Module(), ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    given = {"max_epochs": 2, "logger": logger, "callbacks": list(callbacks), "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        lightning.Trainer(**given, **dict.fromkeys(silent, False)).fit(module, loader(shuffle=True))
    return module


@pytest.mark.parametrize("package", ["wandb", "mlflow", "tensorboard"])
def test_loggers_of_others(package, tmp_path, monkeypatch):
    """They take the names and numbers, where they are installed."""
    pytest.importorskip(package)
    loggers = pytest.importorskip("lightning").pytorch.loggers
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = {
        "wandb": lambda: loggers.WandbLogger(offline=True, save_dir=tmp_path),
        "mlflow": lambda: loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}"),
        "tensorboard": lambda: loggers.TensorBoardLogger(tmp_path),
    }[package]()
    taken, log = [], logger.log_metrics
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: (taken.append(metrics), log(metrics, step)))
    by_lightning(logger, OODMetrics(loader(), {"far": loader(shift=2.0)}, ["MSP"], model="net"))
    assert sum("ood/far/MSP/auroc" in found for found in taken) == 2
    if package == "mlflow":
        assert "ood/far/MSP/auroc" in logger.experiment.get_run(logger.run_id).data.metrics
    if package == "wandb":
        assert "ood/far/MSP/auroc" in logger.experiment.summary._as_dict()
        logger.experiment.finish()


def test_lightning(tmp_path):
    """Two epochs, logged by its own logger; the weights are those of a training without the callback."""
    lightning = pytest.importorskip("lightning")
    assert issubclass(OODMetrics, lightning.pytorch.Callback)
    from lightning.pytorch.loggers import CSVLogger

    metrics = OODMetrics(loader(), {"far": loader(shift=2.0)}, ["MSP", "NCI"], fit=loader(), model="net")
    module, plain = by_lightning(CSVLogger(tmp_path), metrics), by_lightning(False)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(metrics.history) == 2
    with next(tmp_path.rglob("metrics.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["ood/far/NCI/auroc"]) for row in rows if row["ood/far/NCI/auroc"]]
    assert logged == pytest.approx([found["ood/far/NCI/auroc"] for found in metrics.history])


def test_later_failures_are_told_and_training_goes_on():
    """A model that has diverged; a request that is wrong from the start is an error."""

    class Trainer:
        current_epoch = 0

    class Module(nn.Module):
        logged = 0

        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def log_dict(self, found: dict) -> None:
            self.logged += 1

    metrics, module = OODMetrics(loader(), {"far": loader()}, ["MSP"], model="net", every=1), Module()
    metrics.on_train_epoch_end(Trainer(), module)
    with torch.no_grad():
        module.net[1].weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="epoch 0: not measured"):
        metrics.on_train_epoch_end(Trainer(), module)
    assert module.logged == 1
    with pytest.raises(ValueError, match="NaN"):
        OODMetrics(loader(), {"far": loader()}, ["MSP"], model="net").on_train_epoch_end(Trainer(), module)
    every = OODMetrics(loader(), {"far": loader()}, ["MSP"], model="net", every=2)
    every.on_train_epoch_end(Trainer(), module)
    assert not every.history
    assert training.Callback is not None
