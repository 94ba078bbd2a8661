"""Detectors fitted by two gloo processes, each on its part of the data, beside one process with all of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from detector_cases import sizes
from gloo import run_scenarios
from torch import nn

from ood_fast import detectors

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

N, C = 300, 4
SETTINGS = {**sizes(k=5, dim=3, fraction=0.3), "KNN of a sample": {"k": 5, "budget": 40}}
NAMES = [name for name in detectors.known() if detectors.create(name, **SETTINGS.get(name, {})).needs_fit]
LAYERED = [name for name in NAMES if detectors.find(name).needs_model]  # fitted by `fit` alone
NAMES += ["KNN of a sample"]
SPLITS = {"uneven": 221, "nothing in the second": N, "nothing in the first": 0}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        self.fc = nn.Linear(8, C)

    def features(self, x):
        return self.body(x.view(-1, 3, 2, 1)).mean(dim=(2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


def problem() -> tuple[Classifier, torch.Tensor, torch.Tensor]:
    """A model that gets most of the inputs right, the inputs and their classes."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Classifier().double().eval()
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():  # every class is predicted
        model.fc.bias.copy_(-model.fc.weight @ model.features(x).mean(0))
    y = model(x).argmax(1)
    y[::7] = torch.randint(C, (len(y[::7]),), generator=generator)
    return model, x, y


def new_set(names: list[str] = NAMES) -> detectors.DetectorSet:
    def make(name: str) -> detectors.Detector:
        return detectors.create(name.split()[0], **SETTINGS.get(name, {}))

    return detectors.DetectorSet({name: make(name) for name in names})


def buffers(fitted: detectors.DetectorSet) -> dict[str, dict[str, torch.Tensor]]:
    return {name: detector.state_dict() for name, detector in fitted.items()}


def fitted_here(split: str, rank: int) -> dict:
    """All processes of the group: batches of 50 rows of one's own part."""
    model, x, y = problem()
    at = SPLITS[split]
    part = slice(0, at) if rank == 0 else slice(at, N)
    batches = list(zip(x[part].split(50), y[part].split(50), strict=True)) if len(x[part]) else []
    return buffers(new_set().fit(model, batches, group=dist.group.WORLD))


def fitted_by_hand(rank: int) -> dict:
    """partial_fit and finalize, and a second fit of the same detectors."""
    model, x, y = problem()
    fitted = new_set([name for name in NAMES if name not in LAYERED])
    for first in (False, True):
        rows = torch.arange(rank, N, 2) if not first else torch.arange(N).chunk(2)[rank]
        z = model.features(x[rows]).detach()
        fitted.partial_fit(z, model.fc(z).detach(), y[rows])
        fitted.finalize(model.fc, group=dist.group.WORLD)
    return buffers(fitted)


SCENARIOS: dict[str, Callable[[int], dict]] = {split: partial(fitted_here, split) for split in SPLITS}
SCENARIOS["by hand, twice"] = fitted_by_hand
CASES = [(scenario, name) for scenario in SCENARIOS for name in NAMES if scenario in SPLITS or name not in LAYERED]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each process brought back."""
    return run_scenarios(__name__, str(tmp_path_factory.mktemp("gloo")))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    model, x, y = problem()
    return buffers(new_set().fit(model, list(zip(x.split(50), y.split(50), strict=True))))


@pytest.mark.parametrize(("scenario", "name"), CASES)
def test_two_processes_fit_what_one_does(scenario, name, results, alone):
    for rank, result in enumerate(results):
        assert not isinstance(result[scenario], str), f"process {rank}: {result[scenario]}"
        fitted, expected = result[scenario][name], alone[name]
        assert fitted.keys() == expected.keys()
        for buffer, values in expected.items():
            torch.testing.assert_close(fitted[buffer], values, rtol=1e-6, atol=1e-6, msg=f"process {rank}: {buffer}")


@pytest.mark.parametrize(("scenario", "name"), CASES)
def test_both_processes_hold_the_same_bits(scenario, name, results):
    first, second = (result[scenario][name] for result in results)
    assert all(torch.equal(first[buffer], second[buffer]) for buffer in first)
