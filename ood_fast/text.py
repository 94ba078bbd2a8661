"""Heads made of text, for vision-language models: W are embeddings of the names of the classes, z those of images.

model = TextClassifier(clip.encode_image, prompts)      # prompts (c, t, m): t prompts for each class, encoded
criterion = ELogitNormLoss(model.head)
MCM().fit_features(None, head=(model.head.weight, None)).score_features(z)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import checks
from .functional import l2_normalize

SCALE = 100.0  # CLIP's exp(logit_scale), where it was clipped in training


def text_head(embeddings: Tensor | Sequence[Tensor], scale: float | Tensor = SCALE) -> nn.Linear:
    """The linear layer of a zero-shot classifier: for unit z, F.linear(z, W) = scale · cos(z, t_j).

        t_j = unit(mean over the prompts of class j of unit(embedding))        W = scale · t        no bias

    A plain `nn.Linear`, so that all that reads a head reads this one: `ELogitNormLoss`, `boundary_distance`, every
    detector. The boundary between p and j is where both names are equally near, and D is in the unit of the embeddings
    whatever the scale. z has to be of unit length, as `TextClassifier` makes it.

    Args:
        embeddings: (c, m), or (c, t, m) with t prompts a class, or a sequence of c tensors (t_j, m). Of any length.
        scale: above 0; what the cosines are multiplied by in training, `model.logit_scale.exp()` of CLIP.

    Returns:
        nn.Linear(m, c, bias=False), float32, on the device of the embeddings, trainable.

    Raises:
        TypeError: no floating-point tensor. ValueError: other shapes, one class, a class without prompts, embeddings
        that are not finite or without length, prompts whose mean has none.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
    arXiv:2103.00020.
    """
    scale = scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 else scale
    checks.real("scale", scale, 0.0, open_low=True)
    if isinstance(embeddings, Tensor):
        checks.float_tensor("embeddings", embeddings, 3 if embeddings.dim() == 3 else 2, "(c, m) or (c, t, m)")
        embeddings = list(embeddings.unsqueeze(1) if embeddings.dim() == 2 else embeddings)
    checks.several_classes("embeddings", len(embeddings))
    rows = []
    for number, prompts in enumerate(embeddings):
        checks.float_tensor(f"embeddings[{number}]", prompts, 2, "(t, m)")
        if not len(prompts) or prompts.shape[1] != embeddings[0].shape[1]:
            got, width = tuple(prompts.shape), embeddings[0].shape[1]
            raise ValueError(f"embeddings[{number}]: got shape {got}, expected (t, {width}), at least one prompt")
        unit, lengths = l2_normalize(prompts.detach().float())
        mean, length = l2_normalize(unit.mean(dim=0, keepdim=True))
        if not (lengths.isfinite() & (lengths > 0)).all() or not length > 1e-6:
            raise ValueError(f"embeddings[{number}]: no direction: a row is zero or not finite, or they cancel")
        rows.append(mean)
    weight = scale * torch.cat(rows)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    head.weight = nn.Parameter(weight)
    return head


class TextClassifier(nn.Module):
    """An image encoder under a head made of text: scale · cos(encoder(x), t_j).

    Args:
        encoder: x -> embeddings (n, m), of any float dtype: a module, whose parameters are then trained with the
            model's, or a function; None: x are embeddings, as stored ones. embeddings, scale: as in `text_head`.

    Attributes:
        head: the linear layer, which `find_head` finds; what enters it is of unit length.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        embeddings: Tensor | Sequence[Tensor],
        scale: float | Tensor = SCALE,
    ) -> None:
        super().__init__()
        self.encoder = nn.Identity() if encoder is None else encoder
        self.head = text_head(embeddings, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, c) of images, or of embeddings (n, m)."""
        logits: Tensor = self.head(l2_normalize(self.encoder(x))[0].to(self.head.weight.dtype))
        return logits
