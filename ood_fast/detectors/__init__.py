"""Post-hoc detectors. Score direction: higher = more in-distribution. The contract is in `base.py`.

One file a family: `logit` (nothing but logits), `feature` (norms, proximity to the weights), `boundary` (distances to
the decision boundaries), `neighbour` (kept training features).
"""

from .base import Detector, create, find, known, register
from .boundary import FDBD
from .feature import NCI, FeatureNorm
from .logit import MSP, Energy, MaxLogit
from .neighbour import KNN

__all__ = [
    "FDBD",
    "KNN",
    "MSP",
    "NCI",
    "Detector",
    "Energy",
    "FeatureNorm",
    "MaxLogit",
    "create",
    "find",
    "known",
    "register",
]
