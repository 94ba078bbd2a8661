"""Speed that needs no clock: what the kernels need on a GPU, and how much the CPU path does, against committed tables.

A change that makes a line worse fails here and names it. If it is meant: `python tests/gates.py`, and commit the table.
"""

from __future__ import annotations

import copy
import importlib.util

import gates
import pytest
import torch

needs_triton = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def assert_none(complaints: list[str], command: str) -> None:
    assert not complaints, "\n".join([*complaints, f"If this is meant: python tests/gates.py {command}"])


class TestKernels:
    pytestmark = needs_triton

    def test_no_kernel_is_worse_than_its_line(self):
        """Registers, shared memory and spills no larger, loads no narrower, for every kernel, dtypes and target."""
        found = gates.compiled()
        path = gates.kernel_table_path(found["triton"])
        if not path.exists():
            pytest.skip(f"no table for triton {found['triton']}: python tests/gates.py kernels makes {path.name}")
        _, expected = gates.read(path)
        assert_none(gates.worse_kernels(expected, gates.kernel_table(found["records"])), "kernels")

    def test_machine_code_has_no_local_memory_and_no_atomics(self):
        """In the SASS itself, of every kernel: the compiler's own report of spills knows nothing of indexed arrays."""
        records = [record for record in gates.compiled()["records"] if "sass" in record]
        assert records
        assert [r for r in records if r["sass"]["local"] or r["sass"]["atomics"]] == []

    def test_no_case_issues_more_than_its_line(self):
        """`python -m bench.static` in another process, since this one may have imported Triton as an interpreter."""
        found = gates.model()
        path = gates.model_table_path(found["triton"])
        if not path.exists():
            pytest.skip(f"no table for triton {found['triton']}: python -m bench.static --write makes {path.name}")
        _, expected = gates.read(path)
        assert_none(gates.worse_model(expected, found["lines"]), "or python -m bench.static --write")


def test_a_dearer_case_is_named():
    line = {"case": "a", "kernel": "k", "instructions": 100.0, "unit": "row", "matrix": 1.0, "barriers": 2}
    line |= {"registers": 40, "programs": 4}
    assert gates.worse_model([line], [line | {"instructions": 101.0}]) == []
    for change in ({"instructions": 103.0}, {"matrix": 1.67}, {"barriers": 10}, {"programs": 3}):
        (complaint,) = gates.worse_model([line], [line | change])
        assert complaint.startswith(next(iter(change)))


def test_a_worse_kernel_is_named():
    """A table compared with itself passes; one register more, a narrower load, an unknown and a lost line do not."""
    line = {
        "kernel": "predict", "dtypes": "bf16", "target": "sm_90",
        "registers": 40, "shared_bytes": 64, "spilled_bytes": 0, "load_bits": 128,
    }  # fmt: skip
    assert gates.worse_kernels([line], [line]) == []
    assert gates.worse_kernels([line], [line | {"registers": 39}]) == []
    for change in ({"registers": 41}, {"load_bits": 64}, {"load_bits": ""}, {"shared_bytes": 65}):
        (complaint,) = gates.worse_kernels([line], [line | change])
        assert complaint.startswith(next(iter(change)))
        assert "predict,bf16,sm_90" in complaint
    assert len(gates.worse_kernels([line], [line | {"kernel": "other"}])) == 2


def test_cpu_path_does_no_more_than_its_line():
    """Calls, passes over (n, c) and matrix products of every public function."""
    version, expected = gates.read(gates.CALLS)
    same_torch = version == f"torch {gates.minor(torch.__version__)}"
    assert_none(gates.more_work(expected, gates.call_table(), same_torch), "calls")


def test_one_more_pass_is_named():
    """The counter sees what a careless change would do: one more exponential of the logits, one more product."""
    shape = (96, 300, 32)
    n, c, m = shape
    logits, z, W = torch.randn(n, c), torch.randn(n, m), torch.randn(c, m)
    before = gates.count(lambda: logits.logsumexp(1), shape)
    after = gates.count(lambda: logits.exp().logsumexp(1), shape)
    product = gates.count(lambda: logits.logsumexp(1) + (z @ W.T).sum(1), shape)
    assert after["passes"] == pytest.approx(before["passes"] + 2)  # reads (n, c), writes (n, c)
    assert after["calls"] == before["calls"] + 1
    assert product["products"] == pytest.approx(1.0)
    line = {"function": "f", "n": n, "c": c, "m": m}
    (complaint,) = gates.more_work([line | before], [line | after], same_torch=True)
    assert complaint.startswith("calls, passes")
    assert gates.more_work([line | before], [copy.copy(line) | before], same_torch=True) == []
