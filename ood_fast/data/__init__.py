"""Data sets: one in-distribution classification task, and the sets that are to be told from it.

`open_benchmark(name, root)` gives an `ImageBenchmark`, map-style data sets: CIFAR, ImageNet, own folders
(`benchmarks.py`, with the readers in `readers.py`), and digits in memory.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("ImageBenchmark", "open_benchmark"):
        return getattr(importlib.import_module(".benchmarks", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
