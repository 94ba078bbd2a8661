"""What the features of a trained classifier look like. Every quantity has its formula and source in its docstring.

Features come as chunks (features (n, m), logits (n, c), targets (n,) or None), any number of them, each seen once: sums
are in float64, and what is kept of a sample is a few numbers, never its features. The training features are seen for
their first two moments (`Moments`), the test sets then for the numbers of each sample (`Samples`).

`spectrum.py` singular values, effective rank; `collapse.py` neural collapse; `samples.py` norms, distances and
calibration; `plane.py` two-dimensional view, decision regions; `change.py` change between checkpoints; `diagnosis.py`
all of them.
"""

from .change import FeatureChange, change_by_norm, feature_change, squared_change
from .collapse import Moments, NeuralCollapse, neural_collapse
from .diagnosis import NUMBERS, Diagnosis, diagnose, diagnose_model, epoch_diagnostics
from .plane import Plane, plane_of
from .samples import (
    NormBins,
    Reliability,
    Samples,
    accuracy_by_norm,
    coefficient_of_variation,
    correlation,
    reliability,
    samples,
)
from .spectrum import effective_rank, singular_values, spectrum

__all__ = ["NUMBERS", "Diagnosis", "FeatureChange", "Moments", "NeuralCollapse", "NormBins", "Plane", "Reliability"]
__all__ += ["Samples", "accuracy_by_norm", "change_by_norm", "coefficient_of_variation", "correlation", "diagnose"]
__all__ += ["diagnose_model", "effective_rank", "epoch_diagnostics", "feature_change", "neural_collapse", "plane_of"]
__all__ += ["reliability", "samples", "singular_values", "spectrum", "squared_change"]
