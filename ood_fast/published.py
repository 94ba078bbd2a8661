"""Numbers that others have published, in percent, by benchmark and by what was trained. Imports no torch.

    of("cifar10", "cifar10-ce")["auroc", "MSP", "farood"].value    # 90.73

A method is the name of a recipe, or "pretrained-NAME" for torchvision's weights. What no recipe here repeats is not
listed: T2FNorm on ImageNet-1K, Haas et al.'s CCT (our recipe has no RandAugment), numbers on sets that OpenOOD has not
(NCI's tables), and those told without their detector. FPR95 is listed where its convention is known. Where OpenOOD and
the ELogitNorm paper both measured cross-entropy (GEN, SCALE, KNN on CIFAR-10), OpenOOD's number is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OPENOOD = "OpenOOD v1.5, mean over three seeds"
OPENOOD_IMAGENET = "OpenOOD v1.5, torchvision's weights IMAGENET1K_V1"
ELOGITNORM = "Ding et al., CVPR 2026, arXiv:2504.11434"
HAAS = "Haas et al., TMLR 2024, arXiv:2306.04072"


@dataclass(frozen=True)
class Published:
    """One number, in percent, and where it stands."""

    value: float
    source: str


Key = tuple[str, str, str]  # metric, detector, OOD set ("nearood", "farood": the means); the last two may be empty

# ---- near / far AUROC, by detector

_MEASURED = ("cifar10", "cifar100", "imagenet200", "imagenet")
_CE = {  # detector -> near / far on each of these
    "MSP": ((88.03, 90.73), (80.27, 77.76), (83.34, 90.13), (76.02, 85.23)),
    "Energy": ((87.58, 91.21), (80.91, 79.77), (82.50, 90.86), (75.89, 89.47)),
    "GEN": ((88.20, 91.35), (81.31, 79.68), (83.68, 91.36), (76.85, 89.76)),
    "KNN": ((90.64, 92.96), (80.18, 82.40), (81.57, 93.16), (71.10, 90.18)),
    "Mahalanobis": ((84.20, 89.72), (58.69, 69.39), (61.93, 74.72), (55.44, 74.25)),
    "ViM": ((88.68, 93.48), (74.98, 81.70), (78.68, 91.26), (72.08, 92.68)),
    "FDBD": ((90.42, 93.16), (81.26, 79.85), (84.27, 93.45), (76.63, 92.77)),
    "NCI": ((88.86, 91.27), (81.03, 81.32), (83.50, 93.71), (78.69, 95.53)),
    "SCALE": ((82.55, 86.39), (80.99, 81.42), (84.84, 93.98), (81.36, 96.53)),
    "ASH": ((75.27, 78.49), (78.20, 80.58), (82.38, 93.90), (78.17, 95.74)),
}
_TRAINED = {  # method -> near / far AUROC of MSP
    "cifar10-logitnorm": (92.33, 96.74),
    "cifar100-logitnorm": (78.47, 81.53),
    "imagenet200-logitnorm": (82.66, 93.04),
    "cifar10-t2fnorm": (92.79, 96.98),
    "cifar100-t2fnorm": (79.84, 82.73),
    "imagenet200-t2fnorm": (83.00, 93.55),
}
_ELOGITNORM_FAR = {"MSP": 96.68, "GEN": 97.30, "ReAct": 97.63, "SCALE": 97.47, "KNN": 97.75}  # CIFAR-10

# ---- accuracy and calibration

_ACCURACY = {"cifar10-ce": 95.06, "cifar100-ce": 77.25, "imagenet200-ce": 86.37, "pretrained-resnet50": 76.18}
_ACCURACY_200 = {  # table 5: CE, LogitNorm, ELogitNorm, 200 epochs
    "cifar10": (95.10, 94.83, 95.11),
    "cifar100": (77.47, 76.06, 77.37),
    "imagenet200": (86.58, 86.41, 87.12),
}
_LOSSES = ("ce", "logitnorm", "elogitnorm")
_ECE = {  # CIFAR-10: of f, f/(τ‖f‖), f/D
    "cifar10-ce": (3.3, 4.8, 2.3),
    "cifar10-logitnorm": (58.7, 4.1, 52.3),
    "cifar10-elogitnorm": (26.7, 4.7, 1.8),
}

# ---- Haas et al.: AUROC of the feature norm by OOD set, accuracy

_PARTS_ARE_OURS = (  # more than momentum and weight decay
    "cifar10-l2norm-convnext",
    "cifar10-nol2-convnext",
    "cifar10-nol2-vgg16-350",
    "cifar100-l2norm-resnet50-150",
    "cifar10-logitnorm-plus",
)
_HAAS = {
    "cifar10-l2norm-60": ("tables 2, 4 and 8", {"svhn": 97.4, "cifar100": 88.7, "tin": 91.1}, 92.6),
    "cifar10-l2norm-350": ("table 4", {"svhn": 96.0, "cifar100": 89.7, "tin": 90.4}, 93.4),
    "cifar10-l2norm-resnet50-100": ("tables 2 and 4", {"svhn": 98.6, "cifar100": 90.4, "tin": 91.9}, 94.1),
    "cifar10-l2norm-resnet50-350": ("table 4", {"svhn": 96.1, "cifar100": 88.9, "tin": 89.3}, 94.6),
    "cifar10-l2norm-vgg16-60": ("tables 2 and 4", {"svhn": 95.8, "cifar100": 88.4, "tin": 89.9}, 92.0),
    "cifar10-l2norm-convnext": ("table 4", {"svhn": 88.4, "cifar100": 85.5, "tin": 85.5}, 89.2),
    "cifar10-nol2-350": ("table 4", {"svhn": 77.8, "cifar100": 81.0, "tin": 80.5}, 93.7),
    "cifar10-nol2-60": ("table 8", {"svhn": 65.6, "cifar100": 77.1, "tin": 80.4}, 89.8),
    "cifar10-nol2-resnet50-350": ("table 4", {"svhn": 85.8, "cifar100": 77.7, "tin": 77.8}, 93.8),
    "cifar10-nol2-vgg16-350": ("table 4", {"svhn": 82.4, "cifar100": 84.4, "tin": 86.4}, 92.4),
    "cifar10-nol2-convnext": ("table 4", {"svhn": 82.1, "cifar100": 82.2, "tin": 83.3}, 88.2),
    "gtsrb-l2norm-60": ("table 5", {"svhn": 95.6, "cifar100": 93.6, "tin": 94.8}, 82.8),
    "gtsrb-nol2-60": ("table 5", {"svhn": 50.5, "cifar100": 45.7, "tin": 49.4}, 84.7),
    "tin-l2norm-60": ("table 6", {"svhn": 85.4, "cifar100": 62.0}, 39.9),
    "tin-nol2-60": ("table 6", {"svhn": 65.7, "cifar100": 63.5}, 46.5),
    "tin-l2norm-resnet50-60": ("table 6", {"svhn": 85.9, "cifar100": 64.8}, 49.1),
    "tin-nol2-resnet50-60": ("table 6", {"svhn": 68.5, "cifar100": 66.2}, 52.5),
    "cifar100-l2norm-resnet50-150": ("table 7", {"svhn": 91.1, "cifar10": 77.1, "tin": 84.2}, 74.7),
    "cifar100-nol2-resnet50-350": ("table 7", {"svhn": 83.0, "cifar10": 73.2, "tin": 73.4}, 74.2),
}


def _all() -> dict[tuple[str, str], dict[Key, Published]]:
    found: dict[tuple[str, str], dict[Key, Published]] = {}

    def add(benchmark: str, method: str, key: Key, value: float, source: str) -> None:
        found.setdefault((benchmark, method), {})[key] = Published(value, source)

    for benchmark, pairs in zip(_MEASURED, zip(*_CE.values(), strict=True), strict=True):
        method = "pretrained-resnet50" if benchmark == "imagenet" else f"{benchmark}-ce"
        source = OPENOOD_IMAGENET if benchmark == "imagenet" else OPENOOD
        for detector, pair in zip(_CE, pairs, strict=True):
            for ood_set, value in zip(("nearood", "farood"), pair, strict=True):
                add(benchmark, method, ("auroc", detector, ood_set), value, source)
    for method, pair in _TRAINED.items():
        for ood_set, value in zip(("nearood", "farood"), pair, strict=True):
            add(method.partition("-")[0], method, ("auroc", "MSP", ood_set), value, OPENOOD)
    for detector, value in _ELOGITNORM_FAR.items():
        add("cifar10", "cifar10-elogitnorm", ("auroc", detector, "farood"), value, ELOGITNORM)
    add("cifar10", "cifar10-ce", ("auroc", "ReAct", "farood"), 92.56, ELOGITNORM)
    for loss, near, far, fpr in (("elogitnorm", 76.88, 92.81, 27.74), ("logitnorm", 74.62, 91.54, 31.32)):
        fine_tuned = "imagenet", f"imagenet-finetune-{loss}"
        add(*fine_tuned, ("auroc", "MSP", "nearood"), near, ELOGITNORM)
        add(*fine_tuned, ("auroc", "MSP", "farood"), far, ELOGITNORM)
        add(*fine_tuned, ("fpr95_ood_positive", "MSP", "farood"), fpr, ELOGITNORM)
    add("imagenet", "pretrained-resnet50", ("fpr95_ood_positive", "MSP", "farood"), 51.45, ELOGITNORM)

    for method, value in _ACCURACY.items():
        benchmark = "imagenet" if method.startswith("pretrained") else method.partition("-")[0]
        add(benchmark, method, ("accuracy", "", ""), value, OPENOOD_IMAGENET if benchmark == "imagenet" else OPENOOD)
    for benchmark, values in _ACCURACY_200.items():
        for loss, value in zip(_LOSSES, values, strict=True):
            source = f"{ELOGITNORM}, table 5 (200 epochs)"
            add(benchmark, f"{benchmark}-{loss}-200", ("accuracy", "", ""), value, source)
    for method, values in _ECE.items():
        for name, value in zip(("softmax", "scaled_by_norm", "scaled_by_distance"), values, strict=True):
            add("cifar10", method, (f"ece_{name}", "", ""), value, f"{ELOGITNORM}, calibration")

    for method, (where, aurocs, accuracy) in _HAAS.items():
        benchmark, source = method.partition("-")[0], f"{HAAS}, {where}{_remark(method)}"
        for ood_set, value in aurocs.items():
            add(benchmark, method, ("auroc", "FeatureNorm", ood_set), value, source)
        add(benchmark, method, ("accuracy", "", ""), accuracy, source)
    for ood_set, value in {"svhn": 96.9, "cifar100": 88.8}.items():
        add("cifar10", "cifar10-l2norm-60", ("auroc", "MaxLogit", ood_set), value, f"{HAAS}, table 3")
    plus = "cifar10-logitnorm-plus"
    source = f"{HAAS}, table 1 (LogitNorm+){_remark(plus)}"
    for ood_set, value in {"svhn": 97.1, "cifar100": 91.0}.items():
        add("cifar10", plus, ("auroc", "MSP", ood_set), value, source)
    add("cifar10", plus, ("accuracy", "", ""), 94.4, source)
    return found


def _remark(method: str) -> str:
    return "; what the paper does not tell of the training is ours, see the recipe" if method in _PARTS_ARE_OURS else ""


PUBLISHED = _all()  # (benchmark, method) -> (metric, detector, OOD set) -> number


def of(benchmark: str, method: str) -> Mapping[Key, Published]:
    """What is published of a method on a benchmark; empty if nothing is."""
    return PUBLISHED.get((benchmark, method), {})
