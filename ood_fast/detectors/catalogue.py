"""The table of all detectors, from their classes: `python -m ood_fast.detectors.catalogue`.

What a detector keeps is read off a fit on data whose sizes are all different numbers.
"""

from __future__ import annotations

import inspect
import re

import torch

from .registry import find, known

N, C, M = 211, 7, 23  # training samples, classes, features
_SMALL = {"KNN": {"k": 5}, "NNGuide": {"k": 5, "fraction": 1.0}, "ViM": {"dim": 11}, "NECO": {"dim": 11}}
_LETTERS = {N: "N", C: "c", M: "m", 11: "d"}

# What scoring one sample reads or multiplies beyond the model. R: the (c, c) table of 1/‖w_p − w_j‖.
COSTS = {
    "MSP": "c",
    "MaxLogit": "c",
    "Energy": "c",
    "Entropy": "c",
    "GEN": "c",
    "KLMatching": "c²",
    "ReAct": "c·m",
    "ASH": "c·m",
    "SCALE": "c·m",
    "FDBD": "c + m; c·m without R",
    "BoundaryDistance": "c; c·m without R",
    "TemperedMSP": "c; c·m without R",
    "FeatureNorm": "m",
    "NCI": "c + m",
    "Mahalanobis": "m² + c·m",
    "RMDS": "2m² + c·m",
    "SHE": "m",
    "ODIN": "2 passes of the model, 1 backward",
    "KNN": "N·m",
    "NNGuide": "N/100·m",
    "ViM": "m·d",
    "NECO": "m·d",
}


def table() -> str:
    """A Markdown table: method, paper, what fitting needs, what it keeps, cost of a sample, keywords."""
    lines = [
        "| detector | paper | fitted on | keeps | a sample costs | keywords (first: pytorch-ood's form) |",
        "|---|---|---|---|---|---|",
    ]
    for name in known():
        cells = [f"`{name}`", _paper(name), *_fit(name), COSTS.get(name, ""), _others(name)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _fit(name: str) -> tuple[str, str]:
    """(what fitting reads, the shapes of what it keeps)."""
    detector = find(name)(**_SMALL.get(name, {}))
    if not detector.needs_fit:
        return "–", "–"
    reads = {read for part in detector.gathers().values() for read in part.reads}
    reads = [read for read in ("features", "logits", "targets") if read in reads]
    fitted_on = ", ".join(reads) + (" of validation data" if detector.fits_on == "validation" else "")
    if detector.needs_head:
        fitted_on = f"{fitted_on}, head" if reads else "head"
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.randn(*shape, generator=generator) for shape in ((N, M), (C, M)))
    logits = z @ W.T
    detector.fit_features(z, logits, logits.argmax(dim=1), (W, None))
    shapes = [_shape(buffer) for buffer in detector.state_dict().values()]
    return fitted_on, ", ".join(dict.fromkeys(shapes))


def _shape(buffer: torch.Tensor) -> str:
    if buffer.dim() == 0:
        return "1"
    return "·".join(_LETTERS.get(size, str(size)) for size in buffer.shape)


def _paragraphs(name: str) -> list[str]:
    return [" ".join(text.split()) for text in inspect.getdoc(find(name)).split("\n\n")]


def _paper(name: str) -> str:
    """First authors and venue, linked to arXiv where the docstring gives the number."""
    for text in _paragraphs(name):
        found = re.search(r"(\b[A-Z][\w-]+(?:(?:, [A-Z][\w-]+)* and [A-Z][\w-]+| et al\.)?),(?: \"[^\"]+\",)? ", text)
        venue = re.search(r"\b((?:[A-Z][A-Za-z]+ )?20\d\d)\b", text)
        if found and venue:
            first = re.split(r",| and | et al", found[1])[0]
            cited = f"{first}, {venue[1]}"
            number = re.search(r"arXiv:(\d{4}\.\d{5})", text)
            return f"[{cited}](https://arxiv.org/abs/{number[1]})" if number else cited
    return ""


def _others(name: str) -> str:
    """pytorch-ood's setting where the docstring writes it as a call, and all keywords."""
    text = " ".join(_paragraphs(name))
    calls = re.findall(r"pytorch-ood's (?:default )?is `(\w+\([^`]*\))`|(\w+\([^`()]*\)) is pytorch-ood's", text)
    written = ", ".join(f"`{one or other}`" for one, other in calls)
    keywords = ", ".join(f"`{parameter}`" for parameter in find(name).parameters_of())
    return "; ".join(text for text in (written, keywords) if text)


if __name__ == "__main__":
    print(table(), end="")
