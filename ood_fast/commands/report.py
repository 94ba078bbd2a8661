"""`ood-fast report`: one page about trained runs, side by side."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from ..report import diagnoses, gallery, page, runs
from .code import import_plugins
from .common import context_of, device, given
from .progress import Bar


def run(options: argparse.Namespace, command: str) -> None:
    """The command."""
    import_plugins(options)
    context = context_of(command)
    records = runs.open_records(options.runs)
    default = Path(options.runs[0]).expanduser() if len(options.runs) == 1 else Path()
    file = page.check_file(default if options.out is None else options.out)

    progress = functools.partial(Bar, quiet=options.quiet)
    if options.feature_change:
        loading = {"device": device(options.device), **given(options, "batch_size", "workers")}
        for record in records:
            diagnoses.measure_change(record, options.data_root, **loading, progress=progress)
    diagnoses.diagnose_runs(records, progress)
    gallery.add(records, options.data_root)
    page.write(file, records, context)
    if not options.quiet:
        for note, names in runs.missing(records).items():
            print(f"not in the report: {', '.join(names)}: {note}", file=sys.stderr)
        print(f"The report is in {file}")
