"""The evaluation of trained models on a benchmark of image files.

    run = open_run("runs/cifar10-elogitnorm-s0", benchmark.n_classes, benchmark.image_shape)
    results = evaluate_runs([run], benchmark, device="cuda")
    results.runs[0].value("auroc", "MSP", "farood")
    write("out", results, {})

`cache.py` keeps what the model makes of images, `run.py` fits, tunes and measures, `stored.py` does so from feature
files, `results.py` says what was found, `verdict.py` in sentences, `tables.py` in tables, `write.py` in files;
`trained.py` opens what training left.
"""

from .cache import FeatureCache, Outputs, read_head, read_outputs
from .results import ID, Measurement, Results, RunResult, Summary
from .run import evaluate_run, evaluate_runs
from .stored import evaluate_features
from .tables import build, print_tables
from .trained import Trained, open_run, paths_of
from .verdict import verdict
from .write import check_folder, read, read_scores, write

__all__ = ["ID", "FeatureCache", "Measurement", "Outputs", "Results", "RunResult", "Summary", "Trained", "build"]
__all__ += ["check_folder", "evaluate_features", "evaluate_run", "evaluate_runs", "open_run", "paths_of"]
__all__ += ["print_tables", "read", "read_head", "read_outputs", "read_scores", "verdict", "write"]
