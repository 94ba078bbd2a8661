"""Training in a folder: schedules, batches and mixing by their formulas; interrupted and continued to the same bits."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import math
import os
import shutil
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from test_data import write_cifar10, write_tiny_imagenet
from torch import nn

import ood_fast
from ood_fast import checks, data, files, heads, losses, models, recipes
from ood_fast import train as training
from ood_fast.training import build, folder, loop, randomness
from ood_fast.training.mixing import Mixing
from ood_fast.training.objective import n_correct
from ood_fast.training.order import Batches
from ood_fast.training.schedules import learning_rate

BASE = recipes.TrainingRecipe(
    benchmark="cifar10", model="tiny", loss="elogitnorm", epochs=3, batch_size=16, learning_rate=0.05
)
N_STEPS = 4  # of an epoch: 70 images, 16 a step


@pytest.fixture(autouse=True)
def tiny_models_on_one_thread():
    """More threads only get into each other's way in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_models.registered():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_cifar10(path, n_train=70, n_test=40)
    return path


@pytest.fixture
def images(root) -> data.ImageBenchmark:
    return data.open_benchmark("cifar10", root, seed=1)


def final(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "final.ckpt", weights_only=True)


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class Sends(training.Watcher):
    """A signal after that step of that epoch, both from 1."""

    def __init__(self, signum: int, epoch: int, step: int) -> None:
        self.signum, self.at = signum, (epoch - 1, step)

    def on_step(self, run):
        if (run.epoch, run.step) == self.at:
            os.kill(os.getpid(), self.signum)


# ---- the parts


def test_cosine_schedule_with_warm_up():
    recipe = replace(BASE, epochs=10, warmup_epochs=2, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(recipe, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    for step in range(10, 50):
        assert rates[step] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * (step - 10) / 40))


def test_one_cycle_is_torchs():
    recipe = recipes.TrainingRecipe(schedule="onecycle", epochs=4, learning_rate=0.05, final_learning_rate=0.05 / 25e4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40, cycle_momentum=False)
    for step in range(40):
        assert learning_rate(recipe, step, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 39:
            theirs.step()
    short = replace(recipe, epochs=1)
    assert [learning_rate(short, step, 2) for step in range(2)] == pytest.approx([0.05, 0.05 / 25e4])


def test_step_schedule_falls_when_a_milestone_is_complete():
    recipe = replace(BASE, epochs=6, schedule="steps", milestones=(2, 4), learning_rate=1.0, gamma=0.1)
    rates = [learning_rate(recipe, step, 3) for step in range(18)]
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 6)


def test_batches_cover_the_images_once_and_are_shared_out():
    whole = Batches(103, 20, seed=5)
    whole.epoch = 3
    parts = [Batches(103, 10, seed=5, rank=rank, n_processes=2) for rank in (0, 1)]
    for part in parts:
        part.epoch = 3
    batches = list(whole)
    assert [len(batch) for batch in batches] == [20] * 5
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == 100
    assert set(rows) < set(range(103))
    assert [first + second for first, second in zip(*parts, strict=True)] == batches
    whole.first_step = 2
    assert list(whole) == batches[2:]
    assert len(whole) == 3
    whole.epoch, whole.first_step = 4, 0
    assert list(whole) != batches
    assert list(Batches(103, 20, seed=6)) != list(Batches(103, 20, seed=5))


def test_a_set_beside_goes_round_in_the_steps_of_the_other():
    whole = Batches(103, 20, seed=5).beside(31, 10)
    rounds = [Batches(31, 10, seed=5) for _ in range(4)]
    for epoch, batches in enumerate(rounds):
        batches.epoch = epoch
    expected = [batch for batches in rounds for batch in batches]
    for epoch in range(2):
        whole.epoch = epoch
        assert list(whole) == expected[5 * epoch : 5 * epoch + 5]
    whole.first_step = 3
    assert list(whole) == expected[8:10]


def test_a_batch_is_no_larger_than_the_data():
    assert [len(batch) for batch in Batches(7, 128, seed=0)] == [7]
    with pytest.raises(checks.UserError, match="training images: got 1, expected one for each of 2 processes"):
        Batches(1, 8, 0, 0, 2)


def test_mixup_is_a_mean_of_two_and_so_is_its_target():
    x, y = torch.randn(6, 3, 4, 4), torch.arange(6) % 3
    mixed, target = Mixing(replace(BASE, mixup=0.8), 3, seed=2)(x, y, 4, 1, 0)
    random = np.random.default_rng([2, 4, 1, 0])
    assert random.integers(1) == 0
    share, other = random.beta(0.8, 0.8), None
    other = random.permutation(6)
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[other])
    onehot = torch.eye(3)[y]
    torch.testing.assert_close(target, share * onehot + (1 - share) * onehot[other], rtol=1e-5, atol=1e-6)
    again, _ = Mixing(replace(BASE, mixup=0.8), 3, seed=2)(x, y, 4, 1, 0)
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, Mixing(replace(BASE, mixup=0.8), 3, seed=2)(x, y, 4, 2, 0)[0])


def test_cutmix_counts_the_pixels_it_took():
    n = 8
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 2, 9, 7)  # every pixel says which image it is from
    shares = []
    for step in range(40):
        mixed, target = Mixing(replace(BASE, cutmix=1.0), n, seed=0)(x, torch.arange(n), 0, step, 0)
        for row in range(n):
            counts = torch.bincount(mixed[row].flatten().long(), minlength=n) / mixed[row].numel()
            torch.testing.assert_close(target[row], counts, rtol=1e-5, atol=1e-6)
            assert torch.equal(mixed[row, 0], mixed[row, 1]), "a rectangle is cut from all channels"
        shares.append(target.max(dim=1).values.min().item())
    assert torch.equal(x[:, 0, 0, 0], torch.arange(n).float()), "the images given are not written to"
    assert min(shares) < 0.7
    assert max(shares) > 0.9


def test_with_both_each_batch_gets_one_of_them():
    x, y = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8), torch.arange(4)
    mixing = Mixing(replace(BASE, mixup=1.0, cutmix=1.0), 4, seed=0)
    blended = [not torch.equal(mixed, mixed.round()) for mixed in (mixing(x, y, 0, step, 0)[0] for step in range(40))]
    assert 8 < sum(blended) < 32
    same_x, same_y = Mixing(BASE, 4, seed=0)(x, y, 0, 0, 0)
    assert same_x is x
    assert same_y is y


def test_model_loss_and_optimiser_are_the_recipes():
    recipe = replace(BASE, model="small_cnn", head="l2norm", head_tau=0.1, spectral_norm=True, activation="leaky_relu")
    model = build.model_of(recipe, 7, (3, 32, 32))
    assert isinstance(model.fc, heads.L2NormLinear)
    assert model.fc.tau == 0.1
    assert any(isinstance(module, nn.LeakyReLU) for module in model.modules())
    criterion = build.criterion_of(replace(BASE, average="classes", detach_geometry=True, label_smoothing=0.1), model)
    assert isinstance(criterion, losses.ELogitNormLoss)
    assert criterion.head is model.fc
    assert (criterion.average, criterion.detach_geometry, criterion.label_smoothing) == ("classes", True, 0.1)
    assert build.criterion_of(replace(BASE, loss="logitnorm", tau=0.5), model).tau == 0.5
    sgd = build.optimizer_of(recipe, model.parameters())
    assert sgd.defaults["nesterov"]
    assert sgd.defaults["weight_decay"] == 5e-4
    adamw = build.optimizer_of(replace(recipe, optimizer="adamw", weight_decay=0.05), model.parameters())
    decayed = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decayed[id(model.fc.weight)] == 0.05
    assert decayed[id(model.fc.bias)] == 0.0
    assert len(decayed) == len(list(model.parameters()))


def test_every_recipe_can_be_built_with_its_model():
    """Names, options and heads of all the papers' recipes fit the models; the large ones are one of a kind."""
    seen = set()
    for recipe in recipes.RECIPES.values():
        key = (recipe.model, recipe.small_images, recipe.spectral_norm, recipe.activation, recipe.head)
        if key in seen or recipe.model in ("convnext_tiny",):
            continue
        seen.add(key)
        with torch.device("meta"):
            model = build.model_of(replace(recipe, pretrained=False, spectral_norm=False), 10, (3, 32, 32))
            build.criterion_of(recipe, model)


# ---- a run


def test_a_run_leaves_what_it_says(images, tmp_path):
    rows = []

    class Keeps(training.Watcher):
        def on_epoch(self, run, row):
            rows.append(dict(row))

    out = tmp_path / "cifar10-test" / "s1"
    before = torch.get_rng_state()
    run = training.fit_recipe(BASE, images, out, 1, keep_every=2, watcher=Keeps(), context={"command": "a test"})
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are as they were"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {"run.json", "log.csv", "last.ckpt", "best.ckpt", "final.ckpt", "epochs/0002.ckpt"}
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "complete"
    assert (info["epochs"], info["seed"], info["n_classes"], info["image_shape"]) == (3, 1, 10, [3, 32, 32])
    assert info["class_names"][1] == "automobile"
    assert recipes.from_dict(info["recipe"]) == BASE
    assert info["command"] == "a test"
    with open(out / "log.csv") as file:
        logged = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert logged == rows == run.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert list(rows[0]) == [
        "epoch",
        "learning_rate",
        "loss",
        "train_accuracy",
        "validation_accuracy",
        "images_per_second",
        "seconds",
    ]
    best = max(rows, key=lambda row: (row["validation_accuracy"], row["epoch"]))
    assert info["best"] == {"epoch": best["epoch"], "validation_accuracy": best["validation_accuracy"]}

    for checkpoint in ("best", "final", "last", "epochs/0002.ckpt"):
        model, recipe, told = training.load_run(out, checkpoint)
        assert recipe == BASE
        assert told == info
        assert not model.training
        assert run._accuracy(images.validation) == rows[-1]["validation_accuracy"]
        if checkpoint in ("final", "last"):
            assert_same_bits(model.state_dict(), run.model.state_dict())
    assert torch.load(out / "epochs" / "0002.ckpt", weights_only=True).keys() == final(out).keys()


def test_a_run_is_the_plain_loop(images, tmp_path):
    """Written out: the same batches, schedule and loss by hand give the same weights, and the logged loss."""
    recipe = replace(BASE, epochs=2)
    run = training.fit_recipe(recipe, images, tmp_path / "run", 4)
    torch.manual_seed(4)
    model = build.model_of(recipe, 10, (3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    criterion, step = losses.ELogitNormLoss(model[-1]), 0
    order = Batches(70, 16, 4)
    for epoch in range(2):
        order.epoch, losses_ = epoch, []
        images.train.set_epoch(epoch)
        for batch in order:
            x = torch.stack([images.train[row][0] for row in batch])
            y = torch.tensor([images.train[row][1] for row in batch])
            optimizer.param_groups[0]["lr"] = 1e-6 + (0.05 - 1e-6) * 0.5 * (1 + math.cos(math.pi * step / 8))
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses_.append(loss.item())
            step += 1
        assert run.history[epoch]["loss"] == pytest.approx(sum(losses_) / 4, rel=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_training_accuracy_with_probabilities_as_targets():
    logits, target = torch.eye(3)[[0, 2]], torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.5, 0.0]])
    assert n_correct(logits, target).item() == 0.75
    assert n_correct(logits, torch.tensor([0, 1])).item() == 1


# ---- interrupted and continued

RESUMED = {
    "momentum": {},
    "dropout, adamw, warm-up": {
        "model": "tiny_dropout",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "warmup_epochs": 1,
        "loss": "ce",
    },
    "mixup, cutmix, smoothing": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    "running means, spectral norm, L2": {
        "model": "tiny_dropout",
        "spectral_norm": True,
        "head": "l2norm",
        "loss": "ce",
    },
    "bf16, steps": {"amp": "bf16", "schedule": "steps", "milestones": (1, 2)},
    "fp16 and its scaler": {"amp": "fp16", "loss": "logitnorm"},
    "two views, prototypes": {"loss": "cider", "outlier_batch_size": 5},  # of outliers, not of views
    "prototypes that begin at random": {"loss": "palm"},
    "outliers of two views": {"loss": "cider", "outliers": "npos", "outlier_queue": 5, "outlier_start": 0.3},
    "virtual outliers": {"outliers": "vos", "outlier_queue": 3, "outlier_start": 0.3},
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, N_STEPS)], ids=["mid-epoch", "after the last step"])
def test_stopped_by_sigterm_and_continued_to_the_same_bits(changes, epoch, step, root, tmp_path):
    recipe = replace(BASE, **changes)
    fresh = lambda: data.open_benchmark("cifar10", root, seed=3)  # noqa: E731  as in a new process
    whole = training.fit_recipe(recipe, fresh(), tmp_path / "whole", 3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(training.Interrupted, match=f"stopped by SIGTERM in epoch {epoch}, after step {step}") as stop:
        training.fit_recipe(
            recipe, fresh(), tmp_path / "parts", 3, watcher=Sends(signal.SIGTERM, epoch, step), diagnostics=False
        )
    assert stop.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "interrupted"
    torch.rand(7)  # what else happens in between must not matter
    parts = training.fit_recipe(recipe, fresh(), tmp_path / "parts", 3, resume=True)
    assert_same_bits(final(tmp_path / "parts"), final(tmp_path / "whole"))
    assert_same_bits(parts.optimizer.state_dict()["state"][0], whole.optimizer.state_dict()["state"][0])
    for row, expected in zip(parts.history, whole.history, strict=True):
        for column in ("epoch", "learning_rate", "loss", "train_accuracy", "validation_accuracy"):
            assert row[column] == expected[column]
    assert parts.best == whole.best
    assert parts.scaler.state_dict() == whole.scaler.state_dict()


class SendsWhenRead(torch.utils.data.Dataset):
    """A signal when the last image is read for the n-th time."""

    def __init__(self, images, signum: int, n: int) -> None:
        self.images, self.signum, self.left = images, signum, n

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i):
        self.left -= i == len(self) - 1
        if i == len(self) - 1 and self.left == 0:
            os.kill(os.getpid(), self.signum)
        return self.images[i]


def test_stopped_during_validation_and_continued_to_the_same_bits(root, tmp_path):
    """Not only at the first step after it, which may be minutes away: a cluster gives half a minute."""
    recipe = replace(BASE, model="tiny_dropout", mixup=0.5)
    fresh = lambda: data.open_benchmark("cifar10", root)  # noqa: E731
    whole = training.fit_recipe(recipe, fresh(), tmp_path / "whole")
    images = fresh()
    images.validation = SendsWhenRead(images.validation, signal.SIGTERM, 2)
    with pytest.raises(training.Interrupted, match=f"stopped by SIGTERM in epoch 2, after step {N_STEPS}"):
        training.fit_recipe(recipe, images, tmp_path / "parts")
    state = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["step"], len(state["history"])) == (1, N_STEPS, 1)
    parts = training.fit_recipe(recipe, fresh(), tmp_path / "parts", resume=True)
    assert_same_bits(final(tmp_path / "parts"), final(tmp_path / "whole"))
    accuracies = [[row["validation_accuracy"] for row in run.history] for run in (parts, whole)]
    assert accuracies[0] == accuracies[1]
    assert parts.best == whole.best


@pytest.mark.slow
def test_workers_change_no_bit_also_over_a_resume(root, tmp_path):
    recipe = replace(BASE, model="tiny_dropout", mixup=0.5)
    training.fit_recipe(recipe, data.open_benchmark("cifar10", root), tmp_path / "alone")
    images = data.open_benchmark("cifar10", root)
    with pytest.raises(training.Interrupted):
        training.fit_recipe(recipe, images, tmp_path / "run", workers=2, watcher=Sends(signal.SIGINT, 2, 1))
    training.fit_recipe(recipe, data.open_benchmark("cifar10", root), tmp_path / "run", workers=1, resume=True)
    assert_same_bits(final(tmp_path / "run"), final(tmp_path / "alone"))


def test_saved_within_an_epoch_when_it_is_time(images, tmp_path):
    """Every step, with 0 minutes: killed (here: an exception nobody expects), it goes on from the last step."""
    training.fit_recipe(BASE, images, tmp_path / "whole")

    class Fails(training.Watcher):
        def on_step(self, run):
            if (run.epoch, run.step) == (1, 3):
                raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="the power is gone"):
        training.fit_recipe(BASE, images, tmp_path / "parts", save_minutes=1e-9, watcher=Fails())
    state = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "failed"
    training.fit_recipe(BASE, images, tmp_path / "parts", resume=True)
    assert_same_bits(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_a_second_ctrl_c_does_not_wait(images, tmp_path):
    class Impatient(training.Watcher):
        def on_step(self, run):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.fit_recipe(BASE, images, tmp_path, watcher=Impatient())
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


def test_epochs_since_the_last_save_are_in_the_log_of_a_run_that_failed(images, tmp_path):
    """What run.json counts: as a comparison that diverges, whose short epochs are not all saved."""

    class Fails(training.Watcher):
        def on_epoch(self, run, row):
            if row["epoch"] == 2:
                raise training.DivergedError("as if")

    with pytest.raises(training.DivergedError):
        training.fit_recipe(BASE, images, tmp_path, watcher=Fails(), epoch_seconds=1000.0)
    assert json.loads((tmp_path / "run.json").read_text())["epochs"] == 2
    assert [row["epoch"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["1", "2"]
    assert training.fit_recipe(BASE, images, tmp_path, resume=True).epoch == 3


def test_a_complete_run_resumed_changes_nothing(images, tmp_path):
    training.fit_recipe(BASE, images, tmp_path)
    before, log = final(tmp_path), (tmp_path / "log.csv").read_text()
    run = training.fit_recipe(BASE, images, tmp_path, resume=True)
    assert_same_bits(final(tmp_path), before)
    assert (tmp_path / "log.csv").read_text() == log
    assert run.epoch == 3


def test_resume_begins_where_there_is_nothing(images, tmp_path):
    assert training.fit_recipe(replace(BASE, epochs=1), images, tmp_path / "new", resume=True).epoch == 1


def test_the_random_state_is_that_of_the_device_and_not_of_the_current_one(monkeypatch):
    states = {None: torch.tensor([0]), 1: torch.tensor([1])}
    module = types.SimpleNamespace(
        get_rng_state=lambda index=None: states[index].clone(),
        set_rng_state=lambda state, index=None: states.update({index: state}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with randomness.random_state_kept(torch.device("cuda", 1)):
        states[1] = torch.tensor([5])
    assert (states[None], states[1]) == (0, 1)


# ---- what must not happen


def test_a_run_is_not_overwritten(images, tmp_path):
    one = replace(BASE, epochs=1)
    training.fit_recipe(one, images, tmp_path)
    with pytest.raises(checks.UserError, match=r"holds this run, 1 of 1 epochs done; pass --resume .* another --out"):
        training.fit_recipe(one, images, tmp_path)
    other = replace(one, learning_rate=0.2, milestones=(3,), name="another name does not matter")
    expected = r"learning_rate: 0.05 there, 0.2 here; milestones: \[\] there, \[3\] here; seed: 0 there, 7 here\)"
    for resume in (False, True):
        with pytest.raises(checks.UserError, match=rf"other settings \({expected}.*another --out, .*--resume"):
            training.fit_recipe(other, images, tmp_path, 7, resume=resume)
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["learning_rate"] == 0.05
    grey = copy.copy(images)
    grey.prepared = {**images.prepared, "mean": (0.5, 0.5, 0.5)}
    with pytest.raises(checks.UserError, match=r"other settings \(prepared: mean: \[0\.4914, .* here\)"):
        training.fit_recipe(one, grey, tmp_path, resume=True)


def test_a_run_is_not_continued_with_other_images_of_the_same_number(images, tmp_path):
    one = replace(BASE, epochs=1)
    training.fit_recipe(one, images, tmp_path / "run")
    write_cifar10(tmp_path / "copy", n_train=70, n_test=40)
    training.fit_recipe(one, data.open_benchmark("cifar10", tmp_path / "copy", seed=1), tmp_path / "run", resume=True)
    other = data.open_benchmark("cifar10", tmp_path / "copy", seed=1)
    other.train.source.pixels = other.train.source.pixels[::-1]
    with pytest.raises(checks.UserError, match=r'other settings \(training_content: "\w+" there, "\w+" here\)'):
        training.fit_recipe(one, other, tmp_path / "run", resume=True)
    written = json.loads((tmp_path / "run/run.json").read_text())
    del written["training_content"], written["validation_content"]  # of an older version
    (tmp_path / "run/run.json").write_text(json.dumps(written))
    training.fit_recipe(one, other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", ["loss", "model"])
def test_a_run_is_not_continued_with_other_code_of_its_own(images, tmp_path, monkeypatch, own_names, kind):
    """Nor taken for finished: its results would be told as those of the loss or model as it is now."""
    file, run = tmp_path / f"edited_{kind}.py", tmp_path / "run"
    made = {"loss": "(model, recipe):\n    return lambda f, y: _scale() * F.cross_entropy(f, y)\n"}
    made["model"] = "(n_classes, in_channels, image_size):\n    return SmallCNN(n_classes, in_channels=_scale())\n"
    imports = "import torch.nn.functional as F\nfrom ood_fast.models.small import SmallCNN\nNUMBER = {}\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which is told from others by second and size

    def given(number):
        helper = "def _scale():\n    return NUMBER\n"
        file.write_text(f"{imports.format(number)}{helper}\n\ndef edited{made[kind]}")
        sys.modules.pop(file.stem, None)
        importlib.invalidate_caches()
        ood_fast.register(kind)(importlib.import_module(file.stem).edited)

    given(3)
    one = replace(BASE, epochs=1, **{kind: "edited"})
    training.fit_recipe(one, images, run)
    file.write_text("# a word above\n" + file.read_text())
    sys.modules.pop(file.stem)
    ood_fast.register(kind)(importlib.import_module(file.stem).edited)
    assert training.Run(one, images, run).finished
    given(4)
    assert not training.Run(one, images, run).finished
    with pytest.raises(checks.UserError, match=rf'other settings \({kind}_code: "\w+" there, "\w+" here\)'):
        training.fit_recipe(one, images, run, resume=True)


def test_other_folders_are_left_alone(images, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for resume in (False, True):
        with pytest.raises(checks.UserError, match="is not empty and holds no run"):
            training.fit_recipe(BASE, images, tmp_path, resume=resume)
    with pytest.raises(checks.UserError, match="is a file"):
        training.fit_recipe(BASE, images, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_killed_before_its_first_file_was_there(images, tmp_path, monkeypatch):
    """Of a run there is run.json before anything else: whatever else is found without it is not ours."""

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*run\.json: No space left"):
        training.fit_recipe(BASE, images, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".run.json.part").write_text('{"status": "runn')
    assert training.fit_recipe(replace(BASE, epochs=1), images, tmp_path, resume=True).epoch == 1


def test_what_is_no_run_of_ours_is_told(images, tmp_path):
    one = replace(BASE, epochs=1)
    training.fit_recipe(one, images, tmp_path)
    shutil.copy(tmp_path / "best.ckpt", tmp_path / "last.ckpt")
    with pytest.raises(checks.UserError, match=r"last\.ckpt: nothing to continue from, it holds no model"):
        training.fit_recipe(one, images, tmp_path, resume=True)
    info = json.loads((tmp_path / "run.json").read_text())
    for changes, message in (
        ({"recipe": 5}, "says nothing of a recipe"),
        ({"recipe": {**info["recipe"], "epochs": "x"}}, r"run\.json: epochs: got 'x'"),
        ({"recipe": {**info["recipe"], "of_tomorrow": 3}}, r"run\.json: unknown setting 'of_tomorrow'"),
        ({"n_classes": None}, r"run\.json: n_classes: got None, expected .*int"),
        ({"image_shape": 32}, r"run\.json: image_shape: got 32"),
        ({"benchmark": ["cifar10"]}, r"run\.json: benchmark: got \['cifar10'\]"),
    ):
        (tmp_path / "run.json").write_text(json.dumps({**info, **changes}))
        for attempt in (
            lambda: training.load_run(tmp_path),
            lambda: training.fit_recipe(one, images, tmp_path, resume=True),
        ):
            with pytest.raises(checks.UserError, match=message):
                attempt()
    older = {name: value for name, value in info["recipe"].items() if name != "amp"}  # from before there was such
    (tmp_path / "run.json").write_text(json.dumps({**info, "recipe": older}))
    assert training.load_run(tmp_path)[1] == one


def test_a_full_disk_keeps_the_last_checkpoint(images, tmp_path, monkeypatch):
    """The disk fills up while the checkpoint of epoch 2 is written: that of epoch 1 is whole, and continued from."""
    training.fit_recipe(BASE, images, tmp_path / "whole")
    save, calls = torch.save, []

    def save_half(state, file):
        calls.append(state)
        if "optimizer" in state and state["epoch"] == 2:
            file.write(b"x" * 100)
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(OSError, match=r"cannot write .*last\.ckpt: No space left"):
        training.fit_recipe(BASE, images, tmp_path / "run")
    monkeypatch.undo()
    assert calls
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert not list((tmp_path / "run").glob(".*"))
    training.load_run(tmp_path / "run")
    training.fit_recipe(BASE, images, tmp_path / "run", resume=True)
    assert_same_bits(final(tmp_path / "run"), final(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path, monkeypatch):
    """In epoch 2 at step 3: the checkpoints are those of epoch 1."""
    original = build.criterion_of

    def criterion_of(recipe, model):
        calls, criterion = [], original(recipe, model)

        def loss(logits, y):
            calls.append(1)
            return criterion(logits, y) * (float("nan") if len(calls) == N_STEPS + 3 else 1.0)

        return loss

    monkeypatch.setattr(build, "criterion_of", criterion_of)
    for device_check in (1, 1000):  # at every step, or at the end of the epoch as on a GPU: the step told is the same
        out = tmp_path / str(device_check)
        run = training.Run(BASE, images, out)
        if device_check > 1:
            calls = []
            check = training.Run._check_finite
            monkeypatch.setattr(
                training.Run,
                "_check_finite",
                lambda run, calls=calls, check=check: calls.append(1) if run.step < N_STEPS else check(run),
            )
        with pytest.raises(training.DivergedError, match="became NaN or infinite in epoch 2 at step 3"):
            run.train()
        assert json.loads((out / "run.json").read_text())["status"] == "diverged"
        state = torch.load(out / "last.ckpt", weights_only=True)
        assert state["epoch"] == 1
        assert all(value.isfinite().all() for value in state["model"].values())
        training.load_run(out)


def test_bad_arguments(images, tmp_path):
    with pytest.raises(TypeError, match="recipe: got Recipe, expected a TrainingRecipe"):
        training.Run(recipes.Recipe(), images, tmp_path)
    with pytest.raises(checks.UserError, match="seed: got -1"):
        training.Run(BASE, images, tmp_path, -1)
    with pytest.raises(ValueError, match="keep_every: got 0"):
        training.Run(BASE, images, tmp_path, keep_every=0)
    for name, value in (("workers", -1), ("epoch_seconds", -1.0), ("save_minutes", math.nan)):
        with pytest.raises(ValueError, match=f"{name}: got {value}, expected a number in"):
            training.Run(BASE, images, tmp_path, **{name: value})
    with pytest.raises(checks.UserError, match="SyncBatchNorm runs on GPUs"):
        training.Run(BASE, images, tmp_path, sync_bn=True)
    with pytest.raises(checks.UserError, match=r"no run \(run.json: No such file"):
        training.load_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(checks.UserError, match="no JSON"):
        training.load_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(checks.UserError, match="says nothing of a recipe"):
        folder.read_info(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# ---- options


def test_diagnostics_are_logged_and_change_no_bit(root, images, tmp_path, monkeypatch):
    from ood_fast import diagnostics

    write_tiny_imagenet(root) if not (root / "tiny-imagenet-200").exists() else None
    seen = []

    def epoch_diagnostics(model, train_loader, validation_loader, validation_ood_loader):
        assert not model.training
        seen.append(
            [sum(len(x) for x, _ in loader) for loader in (train_loader, validation_loader, validation_ood_loader)]
        )
        torch.rand(3)  # a diagnostic that samples
        return {"effective_rank": float(len(seen)), "nc1": 0.5}

    monkeypatch.setattr(diagnostics, "epoch_diagnostics", epoch_diagnostics, raising=False)
    recipe = replace(BASE, model="tiny_dropout")
    training.fit_recipe(recipe, images, tmp_path / "plain")
    options = {"diagnostics": True, "watcher": Sends(signal.SIGTERM, 2, 2)}
    with pytest.raises(training.Interrupted):
        training.fit_recipe(recipe, images, tmp_path / "run", **options)
    training.fit_recipe(recipe, images, tmp_path / "run", diagnostics=True, resume=True)
    assert_same_bits(final(tmp_path / "run"), final(tmp_path / "plain"))
    text = (tmp_path / "run" / "diagnostics.csv").read_text()
    assert text == "epoch,effective_rank,nc1\n1,1.0,0.5\n2,2.0,0.5\n3,3.0,0.5\n"
    assert seen == [[70, len(images.validation), len(images.validation_ood)]] * 3
    monkeypatch.setattr(loop, "DIAGNOSED_IMAGES", 30)
    training.fit_recipe(replace(recipe, epochs=1), images, tmp_path / "few", diagnostics=True)
    assert seen[-1][0] == 24  # every third of 70


def test_channels_last_is_the_same_training(images, tmp_path):
    plain = training.fit_recipe(BASE, images, tmp_path / "plain")
    other = training.fit_recipe(BASE, images, tmp_path / "last", channels_last=True)
    assert other.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_is_the_same_training(images, tmp_path):
    plain = training.fit_recipe(BASE, images, tmp_path / "plain")
    other = training.fit_recipe(BASE, images, tmp_path / "compiled", compile=True)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert final(tmp_path / "compiled").keys() == final(tmp_path / "plain").keys()


def test_digits_train_too(tmp_path):
    recipe = recipes.override(recipes.find("digits-elogitnorm"), ["epochs=2"])
    run = training.fit_recipe(recipe, data.open_benchmark("digits", seed=0), tmp_path)
    assert run.history[-1]["validation_accuracy"] > 0.8


def test_pretrained_weights_are_not_fetched_for_a_run_that_has_its_own(images, tmp_path, monkeypatch):
    asked = []
    create = models.create

    def counting(*arguments, pretrained=False, **keywords):
        asked.append(pretrained)
        return create(*arguments, **keywords)

    monkeypatch.setattr(models, "create", counting)
    recipe = replace(BASE, epochs=1, pretrained=True)
    training.fit_recipe(recipe, images, tmp_path)
    training.fit_recipe(recipe, images, tmp_path, resume=True)
    training.load_run(tmp_path)
    assert asked == [True, False, False]


@pytest.mark.parametrize("settings", [{"loss": "elogitnorm"}, {"loss": "cider"}, {"loss": "ce", "outliers": "vos"}])
def test_losses_of_a_head_refuse_models_without_one(settings):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(checks.UserError, match="Sequential has no single linear layer that makes its logits"):
        build.objective_of(replace(BASE, **settings), model)
    assert isinstance(build.criterion_of(replace(BASE, loss="ce"), model), nn.CrossEntropyLoss)
