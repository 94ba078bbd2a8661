"""A short form of `bench/soak.py`, and its slopes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import soak  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what is held is read from Linux's /proc")


@pytest.mark.parametrize(("work", "n"), [(soak.steps, 100), (soak.rows, 10 * soak.ROWS)])
def test_nothing_grows(work, n):
    samples = soak.watch(work(), n, 4)
    found = soak.slopes(samples)
    assert found["descriptors"].growth == found["threads"].growth == 0
    assert abs(found["objects"].growth) < 20
    assert found["memory"].growth < 20_000


def test_what_grows_is_seen(tmp_path):
    held = []

    def leaking():
        while True:
            held.append([(tmp_path / "file").open("w"), []])
            yield 1

    found = soak.slopes(soak.watch(leaking(), 40, 4))
    assert round(found["descriptors"].growth) == 40
    assert found["objects"].growth >= 40
    for file, _ in held:
        file.close()
    assert "40 leaks" in soak.row("leaks", [soak.Sample(k, 1.0, k, 1, 5) for k in range(41)], 1.0)
