"""What the package shows: tables, charts and pages.

`page.py` makes the page of `ood-fast report` and of `ood-fast compare`: `runs.py` reads what is on the disk
into the records of `record.py`, `diagnoses.py` computes what is not there, `evaluations.py` makes the tables of
evaluations, `figures.py` the plots. They show what `tables.py`, `charts.py` and `pages.py` draw.

    records = runs.open_records(["runs/cifar10-ce/s0", "runs/cifar10-elogitnorm/s0"])
    diagnoses.diagnose_runs(records)            # reads the features that `ood-fast evaluate` keeps; runs no model
    page.write("report.html", records, {"command": "", "started": ""})
"""
