"""The report of trained runs: one page of what was run, how it trained, what it detects, what its features look like.

    records = open_records(["runs/cifar10-ce/s0", "runs/cifar10-elogitnorm/s0"])
    diagnose(records)                       # reads the features that `ood-fast evaluate` keeps; runs no model
    write("report.html", records, {"command": "", "started": ""})

`records.py` reads what is on the disk, `evaluations.py` makes the tables of evaluations, `figures.py` the plots,
`page.py` the page. (`ood_fast.report` is that of `ood-fast compare`.)
"""

from .page import GENERATOR, page
from .records import Evaluated, Record, diagnose, measure_change, missing, open_records
from .write import check_file, write

__all__ = [
    "GENERATOR",
    "Evaluated",
    "Record",
    "check_file",
    "diagnose",
    "measure_change",
    "missing",
    "open_records",
    "page",
    "write",
]
