"""Fixtures for every test file, and what must be set before anything imports Triton or starts a process.

Triton decides when a kernel is *decorated* whether it will be interpreted. So without a GPU TRITON_INTERPRET is set
here, at import, before pytest imports the test files.

A shell starts what it runs in the background with interrupts ignored, which every process below would inherit: tests of
Ctrl-C could then wait for ever. So they are received here.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # each, and what it starts, its share of the cores
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        del os.environ[name]  # a pytest that a test starts is no worker
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All tests, as many files at a time as there are cores; what is named on the command line, in this process."""
    if config.args != config.getini("testpaths"):
        return 0
    config.option.dist = "loadfile"  # not among the options of pyproject.toml: pytest-benchmark would measure nothing
    return min(8, os.cpu_count() or 1)


@pytest.fixture
def folder_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes an empty folder the current one, with modules in it by their names, which no test before has imported."""

    def made(**modules: str) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        for name, code in modules.items():
            sys.modules.pop(name, None)
            Path(f"{name}.py").write_text(code)
        return tmp_path

    return made


@dataclass(frozen=True)
class Backend:
    """Where a test runs: tensors on `device`, arithmetic by the implementation `name` of `ood_fast.ops.use_backend`."""

    name: str
    device: torch.device


@pytest.fixture(params=["eager", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """One test, three ways: PyTorch on the CPU, the kernels there by Triton's interpreter, the kernels on a GPU."""
    from ood_fast.ops import use_backend

    if request.param == "eager":
        chosen = Backend("eager", torch.device("cpu"))
    elif request.param == "triton":
        if not HAS_TRITON:
            pytest.skip("triton is not installed")
        if HAS_GPU:
            pytest.skip("kernels are compiled for the GPU in this process; the interpreter needs one without a GPU")
        chosen = Backend("triton", torch.device("cpu"))
    else:
        chosen = Backend("triton", torch.device("cuda"))
    with use_backend(chosen.name):
        yield chosen


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands remember of their user is that of the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


def pytest_collectstart() -> None:
    """What a file draws as it is imported is the same, whatever was imported before."""
    torch.manual_seed(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, not failed, where there is no GPU."""
    if HAS_GPU:
        return
    no_gpu = pytest.mark.skip(reason="no GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    from ood_fast import detectors, registry

    assert detectors.known()  # those of the package are registered when they are first asked for
    for kind in registry.KINDS:
        monkeypatch.setitem(registry._ADDED, kind, dict(registry.added(kind)))
