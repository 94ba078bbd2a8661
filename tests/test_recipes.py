"""The recipes: what they say is what the papers say, every one can be built, and changes are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from ood_fast import checks, models, recipes
from ood_fast.data import benchmarks
from ood_fast.heads import L2NormLinear, find_head
from ood_fast.losses import ELogitNormLoss, LogitNormLoss

RECIPES = recipes.RECIPES


def settings_of(recipe: recipes.TrainingRecipe) -> dict:
    return {key: value for key, value in recipes.as_dict(recipe).items() if key not in ("name", "source")}


def difference(a: str, b: str) -> dict:
    one, other = settings_of(RECIPES[a]), settings_of(RECIPES[b])
    return {key: (one[key], other[key]) for key in one if one[key] != other[key]}


# ---- what the recipes say


def test_the_names_that_are_promised():
    expected = {
        f"{benchmark}-{method}"
        for benchmark in ("cifar10", "cifar100", "imagenet200")
        for method in ("ce", "logitnorm", "elogitnorm", "t2fnorm", "l2norm-60", "l2norm-100", "l2norm-350")
    }
    expected |= {
        f"{benchmark}-{method}-200"
        for benchmark in ("cifar10", "cifar100", "imagenet200")
        for method in ("ce", "logitnorm", "elogitnorm")
    }
    expected |= {"imagenet-finetune-elogitnorm", "cifar10-logitnorm-plus", "digits-elogitnorm", "digits-l2norm"}
    assert expected <= set(RECIPES)
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert all(recipe.source for recipe in RECIPES.values())


@pytest.mark.parametrize("method", ["ce", "logitnorm", "elogitnorm", "t2fnorm"])
@pytest.mark.parametrize(("task", "epochs"), [("cifar10", 100), ("cifar100", 100), ("imagenet200", 90)])
def test_the_elogitnorm_authors_settings(task, epochs, method):
    recipe = RECIPES[f"{task}-{method}"]
    assert (recipe.epochs, recipe.batch_size, recipe.schedule) == (epochs, 128, "cosine")
    assert (recipe.optimizer, recipe.nesterov, recipe.momentum, recipe.weight_decay) == ("sgd", True, 0.9, 5e-4)
    assert (recipe.learning_rate, recipe.final_learning_rate) == (0.1, 1e-6)
    assert recipe.model == ("resnet18" if task == "imagenet200" else "resnet18_32x32")
    assert recipe.loss == ("ce" if method == "t2fnorm" else method)
    assert (recipe.head, recipe.head_tau) == (("l2norm", 0.1) if method == "t2fnorm" else ("linear", None))
    assert recipe.tau == 0.04
    assert not recipe.pretrained


def test_losses_differ_in_nothing_else():
    assert difference("cifar10-ce", "cifar10-elogitnorm") == {
        "loss": ("ce", "elogitnorm"),
        "average": ("boundaries", "classes"),  # what the published numbers were made with
    }
    assert difference("cifar10-ce", "cifar10-logitnorm") == {"loss": ("ce", "logitnorm")}
    assert difference("cifar10-elogitnorm", "cifar10-elogitnorm-200") == {"epochs": (100, 200)}
    assert difference("cifar10-l2norm-60", "cifar10-nol2-60") == {"head": ("l2norm", "linear")}


def test_fine_tuning_on_imagenet():
    recipe = RECIPES["imagenet-finetune-elogitnorm"]
    assert (recipe.model, recipe.pretrained, recipe.epochs, recipe.learning_rate) == ("resnet50", True, 30, 1e-3)
    assert (recipe.batch_size, recipe.n_processes) == (128, 2)
    assert difference("imagenet-finetune-elogitnorm", "imagenet-finetune-logitnorm") == {
        "loss": ("elogitnorm", "logitnorm"),
        "average": ("classes", "boundaries"),
    }


def test_haas_et_al_appendix_a1():
    for epochs, milestones in ((60, (40, 50)), (100, (75, 90)), (350, (150, 250))):
        recipe = RECIPES[f"cifar10-l2norm-{epochs}"]
        assert (recipe.epochs, recipe.milestones, recipe.gamma, recipe.learning_rate) == (epochs, milestones, 0.1, 0.1)
        assert (recipe.schedule, recipe.optimizer, recipe.batch_size) == ("steps", "sgd", 1024)
        assert (recipe.spectral_norm, recipe.activation, recipe.small_images) == (True, "leaky_relu", True)
        assert (recipe.head, recipe.head_tau) == ("l2norm", None)
    assert RECIPES["cifar10-l2norm-resnet50-100"].batch_size == 768
    assert RECIPES["tin-l2norm-resnet50-60"].batch_size == 512
    assert RECIPES["tin-l2norm-60"].batch_size == 1024
    vgg = RECIPES["cifar10-l2norm-vgg16-60"]
    assert (vgg.spectral_norm, vgg.activation, vgg.milestones) == (False, "relu", (40, 50))  # "all ResNet models use"
    plus = RECIPES["cifar10-logitnorm-plus"]
    assert (plus.loss, plus.head, plus.batch_size, plus.spectral_norm) == ("logitnorm", "linear", 128, True)


LONGER = {  # trained for longer without L2 than with it
    "cifar10-nol2-vgg16-350": "cifar10-l2norm-vgg16-60",
    "cifar100-nol2-resnet50-350": "cifar100-l2norm-resnet50-150",
}


@pytest.mark.parametrize("name", [name for name in RECIPES if "-nol2-" in name])
def test_without_l2_nothing_else_differs(name):
    found = difference(LONGER.get(name, name.replace("nol2", "l2norm")), name)
    if name in LONGER:
        assert (found.pop("epochs")[1], found.pop("milestones")[1]) == (350, [150, 250])
    assert found == {"head": ("l2norm", "linear")}


@pytest.mark.parametrize("method", recipes.LOSSES)
def test_digits_recipes_are_what_compare_trains(method):
    recipe, compared = RECIPES[f"digits-{method}"], recipes.Recipe()
    assert all(getattr(recipe, field.name) == getattr(compared, field.name) for field in fields(recipes.Recipe))
    assert (recipe.benchmark, recipe.model, recipe.average) == ("digits", "small_cnn", "boundaries")
    assert (recipe.loss, recipe.head) == (("ce", "l2norm") if method == "l2norm" else (method, "linear"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built(name):
    """Its benchmark is known, its model has the options it asks for, its loss takes the parameters."""
    recipe = RECIPES[name]
    assert recipe.benchmark in benchmarks.known()
    n_classes = benchmarks.SPECS[recipe.benchmark].n_classes if recipe.benchmark in benchmarks.SPECS else 6
    head = partial(L2NormLinear, tau=recipe.head_tau) if recipe.head == "l2norm" else torch.nn.Linear
    with torch.device("meta"):
        model = models.create(
            recipe.model, n_classes, head=head, small_images=recipe.small_images, activation=recipe.activation
        )
    assert find_head(model).out_features == n_classes
    smoothing = {"label_smoothing": recipe.label_smoothing}
    if recipe.loss == "elogitnorm":
        ELogitNormLoss(find_head(model), average=recipe.average, detach_geometry=recipe.detach_geometry, **smoothing)
    elif recipe.loss == "logitnorm":
        LogitNormLoss(recipe.tau, **smoothing)
    if recipe.spectral_norm:  # on the meta device its power iteration has nothing to iterate on
        assert models.MODELS[recipe.model].convolutional
    if recipe.pretrained:
        assert models.n_published(recipe.model) == 1000


# ---- find


def test_find():
    assert recipes.find("cifar10-elogitnorm") is RECIPES["cifar10-elogitnorm"]
    with pytest.raises(checks.UserError, match=r"unknown recipe 'cifar10-elognorm'.*did you mean 'cifar10-elogitnorm'"):
        recipes.find("cifar10-elognorm")


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"base": "cifar10-elogitnorm", "lr": 0.05, "milestones": [3, 5], "head_tau": None}))
    recipe = recipes.find(path)
    base = RECIPES["cifar10-elogitnorm"]
    assert recipe == replace(base, name="mine", learning_rate=0.05, milestones=(3, 5))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_written_to_a_file_and_back(tmp_path, name):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(recipes.as_dict(RECIPES[name])))
    assert recipes.find(path) == RECIPES[name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epoch": 3}', "unknown setting 'epoch'.*did you mean 'epochs'"),
        ('{"epochs": "3"}', "epochs: got '3', expected a whole number"),
        ('{"epochs": true}', "epochs: got True, expected a whole number"),
        ('{"lr": NaN}', "lr: got nan, expected a number"),
        ('{"base": "cifar"}', "unknown recipe 'cifar'"),
        ("[]", "expected an object of settings"),
        ("{", "no JSON"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(checks.UserError, match=message):
        recipes.find(tmp_path / "a.json")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(checks.UserError, match=r"recipe .*b.json: No such file"):
        recipes.find(tmp_path / "b.json")


# ---- override


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("lr=0.05", "learning_rate", 0.05),
        ("learning_rate = 5e-2", "learning_rate", 0.05),
        ("epochs=200", "epochs", 200),
        ("weight_decay=0", "weight_decay", 0.0),
        ("milestones=40,50", "milestones", (40, 50)),
        ("milestones=", "milestones", ()),
        ("head_tau=0.1", "head_tau", 0.1),
        ("head_tau=none", "head_tau", None),
        ("nesterov=false", "nesterov", False),
        ("spectral_norm=Yes", "spectral_norm", True),
        ("amp=bf16", "amp", "bf16"),
        ("optimiser=adamw", "optimizer", "adamw"),
        ("benchmark=folder", "benchmark", "folder"),
    ],
)
def test_override(setting, field, value):
    base = RECIPES["cifar10-ce"]
    changed = recipes.override(base, [setting])
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert changed == replace(base, **{field: value})


def test_overrides_together_and_none():
    base = RECIPES["cifar10-ce"]
    assert recipes.override(base, []) == base
    # Each alone would make no sense: steps without milestones.
    changed = recipes.override(base, ["schedule=steps", "milestones=3,6", "epochs=9", "epochs=8"])
    assert (changed.schedule, changed.milestones, changed.epochs) == ("steps", (3, 6), 8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rat=1", "unknown setting 'learning_rat'.*did you mean 'learning_rate'"),
        ("name=x", "unknown setting 'name'"),
        ("lr", "setting 'lr': expected key=value"),
        ("lr=fast", "lr: got 'fast', expected a number"),
        ("lr=nan", "lr: got 'nan', expected a number"),
        ("lr=0", "learning_rate: got 0.0, expected a number above 0"),
        ("epochs=2.5", "epochs: got '2.5', expected a whole number"),
        ("epochs=0", "epochs: got 0, expected at least 1"),
        ("nesterov=maybe", "nesterov: got 'maybe', expected true or false"),
        ("milestones=a", "milestones: got 'a', expected whole numbers"),
        ("milestones=5,3", "milestones: got .*expected epochs in ascending order"),
        ("schedule=steps", "milestones: got .*expected epochs, for schedule=steps"),
        ("head_tau=0", "head_tau: got 0.0, expected none or a number above 0"),
        ("loss=elogitnrm", "unknown loss 'elogitnrm'.*did you mean 'elogitnorm'"),
        ("label_smoothing=1", r"label_smoothing: got 1.0, expected a number in \[0, 1\)"),
        ("mixup=-1", "mixup: got -1.0, expected no negative number"),
    ],
)
def test_changes_that_make_no_sense(setting, message):
    with pytest.raises(checks.UserError, match=message):
        recipes.override(RECIPES["cifar10-ce"], [setting])


def test_recipes_need_no_torch():
    """The command line shows its help before torch is imported, which takes seconds."""
    code = (
        "import sys; from ood_fast import recipes; recipes.override(recipes.find('cifar10-ce'), ['lr=1']); "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
