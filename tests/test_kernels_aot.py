"""Every kernel compiles for every target, in the shapes it is launched in, within the resources of the target.
Needs no GPU.

`aot_compile.py` does the work, once for this file and test_gates.py, in another process: this one may have imported
Triton as an interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import gates
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# What one program can have. Triton compiles past these without a word, and the launch fails.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MOST_WARPS = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 16}

Record = dict[str, Any]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return gates.compiled()


def offenders(compiled: dict[str, Any], target: str, is_bad: Callable[[Record], bool]) -> list[Record]:
    return [record for record in compiled["records"] if record["target"] == target and is_bad(record)]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(compiled: dict[str, Any], target: str) -> None:
    assert {record["kernel"] for record in offenders(compiled, target, lambda record: True)} == set(compiled["kernels"])


def test_every_jitted_function_is_a_kernel_or_part_of_one(compiled: dict[str, Any]) -> None:
    """A kernel is what ends in _kernel; another jitted function that no kernel calls would never be compiled here."""
    assert compiled["unused"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(compiled: dict[str, Any], target: str) -> None:
    """One number, of one kernel, with the oldest Triton."""
    most = 8 if compiled["triton"].startswith("3.5.") else 0
    assert offenders(compiled, target, lambda record: record["spilled_bytes"] > most) == []


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits(compiled: dict[str, Any], target: str) -> None:
    assert offenders(compiled, target, lambda record: record["shared_bytes"] > SHARED_BYTES[target]) == []


@pytest.mark.parametrize("target", TARGETS)
def test_threads_fit(compiled: dict[str, Any], target: str) -> None:
    assert offenders(compiled, target, lambda record: record["num_warps"] > MOST_WARPS[target]) == []


@pytest.mark.parametrize("target", TARGETS)
def test_no_atomics(compiled: dict[str, Any], target: str) -> None:
    """Atomic additions of floats come in any order: two runs would differ in their last bits."""
    assert offenders(compiled, target, lambda record: record["atomics"] != []) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", ["predict", "fused_row", "nci_forward", "segment_sum"])
def test_rows_of_1000_classes_are_read_128_bits_at_a_time(compiled: dict[str, Any], target: str, kernel: str) -> None:
    """1000 is no multiple of 16, so without the ALIGN argument of the kernels all of these loads would be scalar."""
    rows = offenders(compiled, target, lambda r: r["kernel"] == f"{kernel}_kernel" and r["launch"] == "imagenet")
    assert rows
    assert all(record["accesses"].get("v4.b32", 0) > 0 for record in rows)
