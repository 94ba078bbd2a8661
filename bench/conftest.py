"""Fixtures of the benchmarks: the device, timing of one step, and what is written down about it."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .cases import CASES, Case, Inputs, machine

# Some thirty rows within a minute, set-up included. The plugin's own calibration fixes the number of rounds by the
# fastest call: on a busy machine one row then took 38 s. A cap on the rounds bounds it.
SECONDS_A_ROW = 0.3
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def inputs(case: Case, device: torch.device) -> Inputs:
    return Inputs.of(case, device)


@pytest.fixture
def measure(benchmark: Any, case: Case, inputs: Inputs, device: torch.device) -> Callable[[str, Callable], None]:
    """measure(what, step): time `step()` to the end of its work on the device, in the table of `what` for this case."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(step: Callable[[], Any]) -> None:
        step()
        synchronize()

    def measure(what: str, step: Callable[[], Any]) -> None:
        benchmark.group = f"{what}, {case}"
        benchmark.extra_info.update(
            n=case.n_samples,
            c=case.n_classes,
            m=case.n_features,
            distinct_predictions=inputs.distinct_predictions,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            machine=machine(),
        )
        timed(step)  # kernels are compiled and buffers made before the clock runs
        once = min(timeit.repeat(lambda: timed(step), number=1, repeat=3))
        rounds = int(SECONDS_A_ROW / once)
        benchmark.pedantic(timed, (step,), rounds=min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))

    return measure


def pytest_configure(config: pytest.Config) -> None:
    """Narrow tables, unless other columns are asked for. No mean: it tells what else the machine had to do."""
    config.option.benchmark_columns = config.option.benchmark_columns or ["min", "median", "iqr", "rounds"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the tables leave out, and on what they were measured."""
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"left out: {report.head_line}: {report.longrepr[2].removeprefix('Skipped: ')}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    terminalreporter.write_line(
        f"measured with torch {torch.__version__} on {device}, {torch.get_num_threads()} threads, {machine()}"
    )
