"""What the package shows: tables, charts and pages.

`comparison.py` writes the folder of `ood-fast compare`. `page.py` makes the page of `ood-fast report` about trained
runs: `runs.py` reads what is on the disk, `evaluations.py` makes the tables of evaluations, `figures.py` the plots.
All of them show what `tables.py`, `charts.py` and `pages.py` draw.

    records = runs.open_records(["runs/cifar10-ce/s0", "runs/cifar10-elogitnorm/s0"])
    runs.diagnose_runs(records)                 # reads the features that `ood-fast evaluate` keeps; runs no model
    page.write("report.html", records, {"command": "", "started": ""})

The names of a comparison are also here, imported when they are first used: `evaluation`, which it reads, prints with
`tables.py`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CONVENTIONS", "FILES", "FORMAT", "check_folder", "holds_comparison", "results_dict", "write"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import comparison

    return getattr(comparison, "free_folder" if name == "check_folder" else name)
