"""What a trained classifier is worth on a benchmark: the names of `ood_fast.evaluation`, where each of them lives.

evaluate_run(run, benchmark, detectors)  on the images of `data.open_benchmark`; evaluate_runs for several
evaluate_features(train, test, ood)      on stored features
evaluate_loaders(model, test, {name: ood})  on loaders of your own; also `ood_fast.evaluate(model, test, ...)` itself
"""

import sys
from types import ModuleType
from typing import Any

from .evaluation.loaders import Evaluation, evaluate_loaders
from .evaluation.measure import temperatures
from .evaluation.results import DETECTION, ID, Measurement, Results, RunResult, Summary
from .evaluation.run import evaluate_run, evaluate_runs
from .evaluation.stored import evaluate_features

__all__ = ["DETECTION", "ID", "Evaluation", "Measurement", "Results", "RunResult", "Summary", "evaluate_features"]
__all__ += ["evaluate_loaders", "evaluate_run", "evaluate_runs", "temperatures"]


class _Callable(ModuleType):
    """The module, which is called as `evaluate_loaders` is."""

    def __call__(self, *given: Any, **options: Any) -> Evaluation:
        return evaluate_loaders(*given, **options)


sys.modules[__name__].__class__ = _Callable
