"""What a trained classifier is worth on a benchmark: the names of `ood_fast.evaluation`, where each of them lives.

evaluate_run(run, benchmark, detectors)  on the images of `data.open_benchmark`; evaluate_runs for several
evaluate_features(train, test, ood)      on stored features
"""

from .evaluation.measure import temperatures
from .evaluation.results import DETECTION, ID, Measurement, Results, RunResult, Summary
from .evaluation.run import evaluate_run, evaluate_runs
from .evaluation.stored import evaluate_features

__all__ = [
    "DETECTION",
    "ID",
    "Measurement",
    "Results",
    "RunResult",
    "Summary",
    "evaluate_features",
    "evaluate_run",
    "evaluate_runs",
    "temperatures",
]
