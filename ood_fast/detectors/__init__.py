"""Post-hoc detectors. Score direction: higher = more in-distribution. The contract is in `base`.

One file a family: `logit` (nothing but logits), `feature` (norms, proximity to the weights), `boundary` (distances to
the decision boundaries), `activation` (features reshaped before the head), `gaussian` (means and covariances),
`mixture` (a distribution a class), `subspace` (directions that the data does not use), `neighbour` (kept training
features), `perturbed` (heads with noise), `gradient` and `adascale` (inputs moved along gradients), `layers`, `gram`,
`block_norm` and `rank` (more layers than the head's), `passes` (thinned nets, views), `ensemble` (several models). What
every detector does is in `detector`, what fitting gathers in `streaming`, the pass over the data in `fitting`, many
detectors at once in `sets`, the search for parameters in `search`, thresholds in `threshold`, files in `store`.
"""

from .activation import ASH, DICE, LTS, SCALE, VRA, ReAct
from .adascale import AdaSCALE
from .block_norm import BlockNorm, norm_ratios
from .boundary import FDBD, BoundaryDistance, TemperedMSP
from .coverage import NAC
from .detector import Detector
from .ensemble import Ensemble, ModelEnsemble
from .feature import DML, MCM, NCI, FeatureNorm
from .gaussian import RMDS, SHE, Mahalanobis
from .gradient import IODIN, ODIN
from .gram import Gram
from .layers import LayerDetector, LayerMahalanobis
from .logit import GEN, MSP, SML, Energy, Entropy, GradNorm, KLMatching, MaxLogit, TemperatureScaling
from .mixture import GMM, OpenMax
from .neighbour import KNN, CombOOD, NNGuide, Relation
from .passes import MCDropout, TestTimeAugmentation
from .perturbed import WeiPer
from .rank import RankFeat
from .registry import create, find, in_all, known, register
from .search import tune
from .sets import DetectorSet, load
from .subspace import NECO, Residual, ViM
from .threshold import Calibration, conformal_pvalue, conformal_threshold, tpr_threshold

__all__ = ["ASH", "DICE", "DML", "FDBD", "GEN", "GMM", "IODIN", "KNN", "LTS", "MCM", "MSP", "NAC", "NCI", "NECO"]
__all__ += ["ODIN", "RMDS", "SCALE", "SHE", "SML", "VRA", "AdaSCALE", "BlockNorm", "BoundaryDistance", "Calibration"]
__all__ += ["CombOOD", "Detector", "DetectorSet", "Energy", "Ensemble", "Entropy", "FeatureNorm", "GradNorm", "Gram"]
__all__ += ["KLMatching", "LayerDetector", "LayerMahalanobis", "MCDropout", "Mahalanobis", "MaxLogit"]
__all__ += ["ModelEnsemble", "NNGuide", "OpenMax", "RankFeat", "ReAct", "Relation", "Residual", "TemperatureScaling"]
__all__ += ["TemperedMSP", "TestTimeAugmentation", "ViM", "WeiPer", "conformal_pvalue", "conformal_threshold"]
__all__ += ["create", "find", "in_all", "known", "load", "norm_ratios", "register", "tpr_threshold", "tune"]
