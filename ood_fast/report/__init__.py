"""What the package shows: tables, charts and pages.

`comparison.py` writes the folder of `ood-fast compare`. `page.py` makes the page of `ood-fast report` about trained
runs: `runs.py` reads what is on the disk, `evaluations.py` makes the tables of evaluations, `figures.py` the plots.
All of them show what `tables.py`, `charts.py` and `pages.py` draw.

    records = runs.open_records(["runs/cifar10-ce/s0", "runs/cifar10-elogitnorm/s0"])
    runs.diagnose(records)                       # reads the features that `ood-fast evaluate` keeps; runs no model
    page.write("report.html", records, {"command": "", "started": ""})

`runs` and `page` are imported by those who use them: `evaluation`, which they read, prints with `tables.py`.
"""

from .comparison import CONVENTIONS, FILES, FORMAT, check_folder, holds_comparison, results_dict, write

__all__ = ["CONVENTIONS", "FILES", "FORMAT", "check_folder", "holds_comparison", "results_dict", "write"]
