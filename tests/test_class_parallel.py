"""Classes over many processes equal one process, on 2 and 4 gloo processes; see `class_parallel_worker.py`.

The processes are started once for each number of them and run every scenario; a test reads what its scenario brought
back: nothing, or a traceback.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

import class_parallel_worker as worker
import gloo
from processes import forked

from ood_fast import distributed

TIMEOUT = 240  # seconds for everything; a lost process must not stop the suite
ROOT = Path(__file__).parents[1]


def run_processes(size: int, folder: str) -> list[dict]:
    gloo.spawn(worker.process, size, folder, size=size, seconds=TIMEOUT)
    return [torch.load(f"{folder}/{size}-{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """What each process brought back. Four go first: two load what they saved."""
    folder = str(tmp_path_factory.mktemp("gloo"))
    return {size: run_processes(size, folder) for size in (4, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", worker.SCENARIOS)
def test_equals_one_process(name, size, results):
    for rank, result in enumerate(results[size]):
        assert result[name] is None, f"process {rank} of {size}: {result[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4], ids=["hangs", "dies"])
def test_a_lost_process_is_an_error_within_the_timeout(size, results):
    for result in results[size][:-1]:
        text, seconds = result["lost"]
        assert text.startswith("RuntimeError"), text
        assert seconds < worker.LOST_TIMEOUT + 2


def test_a_process_alone():
    """Without torch.distributed, an error that says what to do."""
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised; call .*init_process_group"):
        distributed.elogitnorm(torch.randn(2, 3), torch.randn(3, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("backends", "device", "expected"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "meta", "cpu"),
        ("meta:nccl", "meta", "meta"),
        ("meta:nccl", "cpu", "meta"),  # a tensor left on the CPU: an error everywhere, and no rank that waits
        ("meta:nccl", None, "meta"),
    ],
)
def test_ranks_meet_where_all_can(backends, device, expected, monkeypatch):
    """The device on which the ranks tell each other what they were given; `meta` stands for a GPU."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    tensor = None if device is None else torch.empty(1, device=device)
    assert distributed.shards.meeting_place(None, tensor).type == expected


def test_communication_does_not_grow_with_the_classes():
    """n and m decide, and by how much is written down: 2 (R - 1) bytes for each byte that is reduced."""
    one_rank = distributed.communication_bytes(100, 64, 1)
    assert one_rank == (0, 0)
    two = distributed.communication_bytes(100, 64, 2, check=False)
    # two rows of n int64, W rows there and back, 4 + 5 n-vectors
    assert two.total == 2 * (16 * 100 + 2 * 4 * 100 * 64 + 9 * 4 * 100)
    assert two.per_rank == two.total / 2
    with pytest.raises(ValueError, match="samples: got 'some'"):
        distributed.communication_bytes(1, 1, 2, samples="some")


def test_the_page_says_what_the_formulas_say():
    """Every line of docs/scale.md that shows a call of `communication_bytes` shows its result."""
    page = (ROOT / "docs" / "scale.md").read_text()
    shown = re.findall(r">>> (communication_bytes\(.*\))\n(Traffic.*)\n", page)
    assert len(shown) >= 3
    for call, result in shown:
        assert repr(eval(call, {"communication_bytes": distributed.communication_bytes})) == result, call


@pytest.mark.slow
def test_the_example():
    """`torchrun --nproc-per-node 2 examples/class_parallel.py`, as it stands in the file."""
    finished = forked(ROOT / "examples/class_parallel.py", "--classes", "999", "--steps", "8", processes=2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "step   8/8" in finished.stdout
    (difference,) = re.findall(r"one process: .* the same to (\S+)", finished.stdout)
    assert float(difference) < 1e-5
