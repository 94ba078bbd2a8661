"""Post-hoc detectors. Score direction: higher = more in-distribution. The contract is in `base.py`.

One file a family: `logit` (nothing but logits), `feature` (norms, proximity to the weights), `boundary` (distances to
the decision boundaries), `activation` (features reshaped before the head), `gaussian` (means and covariances),
`subspace` (directions that the data does not use), `neighbour` (kept training features), `gradient` (passes of their
own through the model). What fitting gathers is in `streaming`, the pass over the data in `run`, many detectors at once
in `sets`, the search for parameters in `tune`, thresholds in `threshold`, files in `store`.
"""

from .base import Detector
from .boundary import FDBD
from .feature import NCI, FeatureNorm
from .logit import MSP, Energy, MaxLogit
from .neighbour import KNN
from .registry import create, find, known, register
from .sets import DetectorSet

__all__ = [
    "FDBD",
    "KNN",
    "MSP",
    "NCI",
    "Detector",
    "DetectorSet",
    "Energy",
    "FeatureNorm",
    "MaxLogit",
    "create",
    "find",
    "known",
    "register",
]
