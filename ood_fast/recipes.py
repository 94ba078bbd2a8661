"""Settings as data: the losses, how they are trained, and what `compare` scores with. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

TAU = 0.04  # LogitNorm's temperature (Wei et al., ICML 2022), for its loss and for softmax(f / (τ‖f‖))


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum and a cosine schedule by step, as the ELogitNorm authors train (they: 100 epochs)."""

    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 0.1
    final_learning_rate: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 5e-4


# name -> what it is; `train.model_for` and `train.criterion_for` build it
LOSSES = {
    "ce": "cross-entropy, the baseline",
    "logitnorm": f"LogitNorm: cross-entropy of f / (τ‖f‖), τ = {TAU}",
    "elogitnorm": "ELogitNorm: cross-entropy of f / D, D = mean distance to the decision boundaries",
    "l2norm": "cross-entropy with features of unit length in training (L2NormLinear)",
}
BASELINE = "ce"

# detector class name -> parameters that differ from the class's defaults
DETECTORS: dict[str, dict[str, object]] = {
    "MSP": {},
    "MaxLogit": {},
    "Energy": {},
    "KNN": {"k": 10},  # about 110 training images a class: the 50th neighbour would lie in another one for many
    "NCI": {},  # α is chosen on validation images, see `evaluate.evaluate`
    "FDBD": {},
    "FeatureNorm": {},
}
