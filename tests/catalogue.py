"""The table of all detectors in docs/detectors.md: `python tests/catalogue.py`.

What a detector keeps is read off a fit on data whose sizes are all different numbers.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from ood_fast.detectors import find, known

N, C, M = 211, 7, 23  # training samples, classes, features
_SMALL: dict[str, dict[str, Any]] = {"KNN": {"k": 5}, "CombOOD": {"k": 5}, "NNGuide": {"k": 5, "fraction": 1.0}}
_SMALL |= {name: {"dim": 11} for name in ("ViM", "NECO", "Residual")}
_LETTERS = {N: "N", C: "c", M: "m", 11: "d", 100 * C: "100c", 10 * M: "10m"}


class About(NamedTuple):
    """What is said of a detector."""

    cost: str  # of scoring a sample, beyond the model; R: the (c, c) table of 1/‖w_p − w_j‖; L layers of s positions
    cited: str
    arxiv: str
    pytorch_ood: str = ""  # our keywords for their definition, where the default is another
    openood: str = ""  # the same


ABOUT = {
    "MSP": About("c", "Hendrycks, ICLR 2017", "1610.02136"),
    "MaxLogit": About("c", "Hendrycks, ICML 2022", "1911.11132"),
    "Energy": About("c", "Liu, NeurIPS 2020", "2010.03759"),
    "Entropy": About("c", "Chan, ICCV 2021", "2012.06575"),
    "GEN": About("c", "Liu, CVPR 2023", "", 'GEN(M=None, reduction="mean", clamp=1e-7)'),
    "KLMatching": About("c²", "Hendrycks, ICML 2022", "1911.11132"),
    "TemperatureScaling": About("c", "Guo, ICML 2017", "1706.04599"),
    "SML": About("c", "Jung, ICCV 2021", "2107.11264"),
    "GradNorm": About("c + m", "Huang, NeurIPS 2021", "2110.00218"),
    "ReAct": About("c·m", "Sun, NeurIPS 2021", "2111.12797"),
    "ASH": About("c·m", "Djurisic, ICLR 2023", "2209.09858", 'ASH("s", 65)'),
    "SCALE": About("c·m", "Xu, ICLR 2024", "2310.00227", "SCALE(65)"),
    "VRA": About("c·m", "Xu, NeurIPS 2023", "2302.11716", "VRA(99, 1, per_feature=True)"),
    "DICE": About("c·m", "Sun, ECCV 2022", "2111.09805"),
    "LTS": About("c + m", "Djurisic, MVA 2025", "2409.01175"),
    "FDBD": About("c + m; c·m without R", "Liu, ICML 2024", "2312.11536", 'FDBD("mean")'),
    "BoundaryDistance": About("c; c·m without R", "Ding, CVPR 2026", "2504.11434"),
    "TemperedMSP": About("c; c·m without R", "Ding, CVPR 2026", "2504.11434"),
    "FeatureNorm": About("m", "Haas, TMLR 2024", "2306.04072"),
    "NCI": About("c + m", "Liu, CVPR 2025", "2311.01479", "NCI(0.0)"),
    "DML": About("c·m", "Zhang, CVPR 2023", ""),
    "MCM": About("c·m", "Ming, NeurIPS 2022", "2211.13445"),
    "Mahalanobis": About(
        "m² + c·m", "Lee, NeurIPS 2018", "1807.03888", "Mahalanobis(half=True, scatter=True, ridge=1e-6)"
    ),
    "RMDS": About("2m² + c·m", "Ren, 2021", "2106.09022", "RMDS(scatter=True, ridge=1e-6)"),
    "SHE": About("m", "Zhang, ICLR 2023", ""),
    "ODIN": About("2 passes of the model, 1 backward", "Liang, ICLR 2018", "1706.02690", "", "ODIN(sign_of_zero=1)"),
    "IODIN": About("2 passes of the model, 1 backward", "Regmi, 2025", "2411.10794", "", "IODIN(sign_of_zero=1)"),
    "AdaSCALE": About("3 passes of the model, 1 backward", "Regmi, 2025", "2503.08023"),
    "LayerMahalanobis": About(
        "L·(m² + c·m)", "Lee, NeurIPS 2018", "1807.03888", "LayerMahalanobis(weights=(1, ..., 1), ridge=1e-6 / N)"
    ),
    "Gram": About("10·s·m", "Sastry, ICML 2020", "1912.12510", 'Gram(orders=L, by="target")'),
    "BlockNorm": About("s·m", "Yu, CVPR 2023", "2212.02295"),
    "RankFeat": About("s·m²", "Song, NeurIPS 2022", "2209.08590"),
    "MCDropout": About("T passes of the model", "Gal, ICML 2016", "1506.02142", 'MCDropout("variance", passes=30)'),
    "TestTimeAugmentation": About("a pass of the model a view", "Krizhevsky, NeurIPS 2012", ""),
    "NAC": About("2c·m", "Liu, ICLR 2024", "2306.02879"),
    "Ensemble": About("a pass of each model", "Lakshminarayanan, NeurIPS 2017", "1612.01474"),
    "GMM": About("c·m²", "Mukhoti, CVPR 2023", "2102.11582", "GMM(ridge=reg·m/tr(Σ))"),
    "OpenMax": About("3c", "Bendale, CVPR 2016", "1511.06233", "OpenMax(tail=25, alpha=10)"),
    "KNN": About("N·m", "Sun, ICML 2022", "2204.06507", "KNN(squared=False)"),
    "NNGuide": About("N/100·m", "Park, ICCV 2023", "2309.14888", "NNGuide(k=10, fraction=1.0)"),
    "CombOOD": About("N·m + m²", "Rajasekaran, SDM 2024", "2602.07042"),
    "Relation": About("N·(m + c)", "Kim, NeurIPS 2023", "2301.12321", "", "Relation(budget=None)"),
    "WeiPer": About("100c·m", "Granz, NeurIPS 2024", "2405.17164"),
    "ViM": About("m·d", "Wang, CVPR 2022", "2203.10807"),
    "Residual": About("m·d", "Wang, CVPR 2022", "2203.10807"),
    "NECO": About("m·d", "Ammar, ICLR 2024", "2310.06823"),
}


def table() -> str:
    """A Markdown table: method, paper, what fitting needs, what it keeps, cost of a sample, keywords."""
    lines = [
        "| detector | paper | fitted on | keeps | a sample costs | keywords |",
        "|---|---|---|---|---|---|",
    ]
    for name in known():
        about = ABOUT.get(name, About("", "", ""))
        paper = f"[{about.cited}](https://arxiv.org/abs/{about.arxiv})" if about.arxiv else about.cited
        cells = [f"`{name}`", paper, *_fit(name), about.cost, _keywords(name, about)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _fit(name: str) -> tuple[str, str]:
    """(what fitting reads, the shapes of what it keeps)."""
    detector = find(name)(**_SMALL.get(name, {}))
    if not detector.needs_fit:
        return "–", "–"
    read_by = {read for part in detector.gathers().values() for read in part.reads}
    reads = [read for read in ("layers", "features", "logits", "targets") if read in read_by]
    fitted_on = ", ".join(reads) + (" of validation data" if detector.fits_on == "validation" else "")
    if detector.needs_head:
        fitted_on = f"{fitted_on}, head" if reads else "head"
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.randn(*shape, generator=generator) for shape in ((N, M), (C, M)))
    logits = z @ W.T
    if detector.needs_model:
        model = nn.Sequential(nn.Conv2d(3, M, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(M, C))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.fit(model, [(torch.randn(N, 3, 2, 2, generator=generator), torch.arange(N) % C)])
    else:
        detector.fit_features(z, logits, logits.argmax(dim=1), (W, None))
    shapes = [_shape(buffer) for buffer in detector.state_dict().values()]
    per_layer = "; of each layer" if len(getattr(detector, "members", ())) and detector.gathers() else ""
    return fitted_on or "–", (", ".join(dict.fromkeys(shapes)) + per_layer) or "–"


def _shape(buffer: torch.Tensor) -> str:
    if buffer.dim() == 0:
        return "1"
    return "·".join(_LETTERS.get(size, str(size)) for size in buffer.shape)


def _keywords(name: str, about: About) -> str:
    keywords = ", ".join(f"`{parameter}`" for parameter in find(name).parameters_of())
    forms = (("OpenOOD", about.openood), ("pytorch-ood", about.pytorch_ood))
    return "; ".join([keywords] * bool(keywords) + [f"{whose}: `{form}`" for whose, form in forms if form])


if __name__ == "__main__":
    print(table(), end="")
