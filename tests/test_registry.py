"""What users add by name: the module of docs/extending.md, used by each command that can."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import ood_fast
from ood_fast import cli, registry
from ood_fast.commands import code
from ood_fast.training import loop
from ood_fast.training.objective import Objective

PAGE = Path(__file__).parents[1] / "docs/extending.md"


@pytest.fixture
def mine(tmp_path, monkeypatch, own_names):
    """`mine.py` in the current folder: the blocks of the page up to the lines that show their use."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [
        line for block in blocks for line in block.splitlines() if not re.match(r"(scores|net|benchmark) = ", line)
    ]
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("\n".join(["import torch", "from torch import nn", *lines]), encoding="utf-8")
    yield
    sys.modules.pop("mine", None)


def test_one_decorator_for_all(mine, capsys):
    run = ["--recipe", "digits-ce", "--out", "run", "--set", "epochs=2", "--set", "loss=focal"]
    run += [
        "--set",
        "model=two_layers",
        "--set",
        "benchmark=ramps",
        "--set",
        "batch_size=16",
        "--set",
        "lr=0.01",
        "--data-root",
        ".",
    ]
    assert cli.main(["train", "--plugin", "mine", *run, "--quiet", "--workers", "0"]) == 0, capsys.readouterr().err
    chosen = ["--detectors", "MSP,Nearness", "--no-tune", "--bootstrap", "20", "--workers", "0", "--device", "cpu"]
    assert cli.main(["evaluate", "run", "--plugin", "mine", *chosen]) == 0, capsys.readouterr().err
    assert "separation" in capsys.readouterr().out
    results = json.loads(Path("run/eval/ramps/results.json").read_text(encoding="utf-8"))
    measured = {(m["detector"], m["metric"]) for run in results["runs"] for m in run["measurements"]}
    assert {("Nearness", "separation"), ("Nearness", "auroc")} <= measured


def test_own_losses_are_compared(mine, capsys):
    run = ["--losses", "ce,focal", "--seeds", "2", "--epochs", "1", "--detectors", "MSP", "--out", "it", "--quiet"]
    assert cli.main(["compare", "--plugin", "mine", *run]) == 0, capsys.readouterr().err
    assert Path("it/runs/focal/s1").is_dir()


def test_what_is_not_known_is_named(mine):
    with pytest.raises(ValueError, match="kind: got 'optimizer', expected one of detector, loss, model"):
        ood_fast.register("optimizer")
    with pytest.raises(ValueError, match="known by the name of its class"):
        ood_fast.register("detector", "mine")
    with pytest.raises(ood_fast.checks.UserError, match="unknown loss 'focal'"):
        ood_fast.recipes.override(ood_fast.recipes.find("digits-ce"), ["loss=focal"])


def test_names_that_are_taken_are_refused(own_names):
    from ood_fast import models, recipes

    assert {*recipes.METHODS, *recipes.LOSSES} == {*registry.TAKEN["loss"]}
    assert {*models.MODELS} == {*registry.TAKEN["model"]}
    with pytest.raises(ValueError, match="there is a loss 'ce' already"):
        ood_fast.register("loss", "ce")(print)
    ood_fast.register("metric", "gap")(min)
    with pytest.raises(ValueError, match="there is a metric 'gap' already"):
        ood_fast.register("metric", "gap")(max)
    with pytest.raises(ValueError, match="name: got none for a partial"):
        ood_fast.register("metric")(functools.partial(max, 0))


def test_a_name_of_ones_own(own_names):
    function = ood_fast.register("metric", "gap")(lambda one, other: 0.0)
    assert registry.added("metric")["gap"] is function


# ---- what is wrong with a plugin is told


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, own_names):
    """A folder of packages with `namesake.py`, which registers nothing, and another current folder."""
    for folder in ("packages", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "packages/namesake.py").write_text("open('RAN', 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path
    sys.modules.pop("namesake", None)


def plug(name):
    code.import_plugins(argparse.Namespace(plugin=[name], quiet=False))


@pytest.mark.parametrize("own", ["namesake.py", "namesake/detectors.py"])
@pytest.mark.parametrize("name", ["namesake", "namesake.detectors"])
def test_a_plugin_beside_a_package_of_its_name_is_refused(own, name, elsewhere):
    Path(own).parent.mkdir(exist_ok=True)
    Path(own).touch()
    with pytest.raises(ood_fast.checks.UserError) as refused:
        plug(name)
    for told in ("--plugin: 'namesake' is ", str(elsewhere / "packages/namesake.py"), own.partition("/")[0], "rename"):
        assert told in str(refused.value)
    assert not Path("RAN").exists()


def test_a_plugin_that_registers_nothing_is_told(elsewhere, capsys):
    Path("namesake").mkdir()  # of data: no module
    plug("namesake")
    told = f"--plugin namesake, {elsewhere / 'packages/namesake.py'}, registers nothing"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda model, recipe: None, "got NoneType of .*, expected a criterion"),
        (lambda model, recipe: lambda f, y: None, "got NoneType and Tensor for the logits, expected a scalar tensor"),
        (lambda model, recipe: lambda f, y: f.sum(dim=1), r"got a tensor of shape \(\d+,\) with a gradient"),
        (lambda model, recipe: lambda f, y: f.sum().detach(), r"got a tensor of shape \(\) without a gradient"),
        (lambda model, recipe: torch.nn.PReLU(), r"got a criterion with parameters .* \(weight\), which nothing would"),
        (lambda model, recipe: LossAlone(), "got a tensor of shape .* and NoneType for the logits"),
    ],
)
def test_a_loss_that_is_none_is_named(given, expected, tmp_path, own_names):
    ood_fast.register("loss", "odd")(given)
    recipe = ood_fast.recipes.override(ood_fast.recipes.find("digits-ce"), ["loss=odd", "epochs=1"])
    with pytest.raises(ood_fast.checks.UserError, match="loss 'odd': " + expected):
        ood_fast.train.Run(recipe, ood_fast.data.open_benchmark("digits"), tmp_path / "run").train()


def test_a_loss_in_half_precision_counts_every_image(tmp_path, own_names, monkeypatch):
    cross_entropy = torch.nn.functional.cross_entropy
    ood_fast.register("loss", "odd")(lambda model, recipe: lambda f, y: cross_entropy(f, y).bfloat16())
    monkeypatch.setattr(loop, "n_correct", lambda logits, target: torch.tensor(257))
    recipe = ood_fast.recipes.override(ood_fast.recipes.find("digits-ce"), ["loss=odd", "epochs=1", "batch_size=300"])
    run = ood_fast.train.fit_recipe(recipe, ood_fast.data.open_benchmark("digits"), tmp_path / "run")
    assert run.history[0]["train_accuracy"] == pytest.approx(257 / run.images_a_step, rel=1e-9)


class LossAlone(Objective):
    """Without the logits."""

    def step(self, network, batch):
        return network(batch.x).sum()


def test_a_metric_that_fails_is_named(own_names):
    ood_fast.register("metric", "odd")(lambda id_scores, ood_scores: 1 / 0)
    model = torch.nn.Linear(4, 3)
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    with pytest.raises(ood_fast.checks.UserError, match="metric 'odd': ZeroDivisionError: division by zero; expected"):
        ood_fast.evaluate(model, loader, {"far": loader}, detectors=["MSP"])
    registry.added("metric")["odd"] = lambda id_scores, ood_scores: torch.tensor(torch.nan)
    with pytest.raises(ood_fast.checks.UserError, match="metric 'odd': ValueError: got nan; expected"):
        ood_fast.evaluate(model, loader, {"far": loader}, detectors=["MSP"])
