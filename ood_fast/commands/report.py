"""`ood-fast report`: one page about trained runs, side by side."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from .code import import_plugins
from .common import RunError, context_of, device
from .options import share
from .progress import Bar


def add(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "report",
        help="one page about trained runs: training, evaluation, diagnostics of the features",
        description="Write a page, one HTML file, about runs of `ood-fast train`, side by side: settings, training "
        "curves, what `ood-fast evaluate` found, and diagnostics of the features that it keeps. No model is run, but "
        "with --feature-change.",
        examples=(
            "ood-fast report runs/cifar10-ce runs/cifar10-elogitnorm",
            "ood-fast report runs/cifar10-elogitnorm/s0 --out page.html",
        ),
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a folder of `ood-fast train`, one with such runs as s0, s1, ..., or a results folder of `ood-fast "
        "evaluate`, for the runs in it",
    )
    parser.add_argument("--out", metavar="FILE", help="(default: RUN/report.html; with several RUNs report.html here)")
    change = parser.add_argument_group("change of the features by norm (Haas et al., eq. 8)")
    change.add_argument(
        "--feature-change",
        action="store_true",
        help="run the model of each checkpoint in RUN/epochs (train --keep-every) over the ID test images; kept for "
        "later reports",
    )
    share(change, "data-root", "device", "batch-size", "workers")
    share(parser, "plugin", "quiet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """The command."""
    from ..report import gallery, page, runs

    import_plugins(options.plugin)
    context = context_of(command)
    records = runs.open_records(options.runs)
    default = Path(options.runs[0]).expanduser() if len(options.runs) == 1 else Path()
    file = page.check_file(default / "report.html" if options.out is None else options.out)

    progress = functools.partial(Bar, quiet=options.quiet)
    if options.feature_change:
        given = {"device": device(options.device), "batch_size": options.batch_size, "workers": options.workers}
        for record in records:
            runs.measure_change(record, options.data_root, **given, progress=progress)
    runs.diagnose_runs(records, progress)
    gallery.add(records, options.data_root)
    try:
        page.write(file, records, context)
    except OSError as error:
        raise RunError(str(error)) from error
    if not options.quiet:
        for note, names in runs.missing(records).items():
            print(f"not in the report: {', '.join(names)}: {note}", file=sys.stderr)
        print(f"The report is in {file}")
