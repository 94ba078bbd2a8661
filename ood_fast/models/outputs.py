"""What a model gives: the logits in it, whether these are logits, and which layer made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..capturing import CapturedFeatures
from ..eager.precision import MKLDNN, is_exporting
from ..heads import inference_head

CHECKED_ROWS = 64  # of stored features and logits
BFLOAT16 = 2.0**-8  # what logits may have been rounded to, on a GPU or under autocast
CHECKED = 8, 64  # rows of logits by themselves: the fewest that tell, one sums to 1 by chance, and the most looked at


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: a tensor, an object or mapping with `logits`, or a tuple's first."""
    got = None
    if isinstance(output, Mapping):
        got = f"a mapping of {', '.join(map(str, output))}"
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if hasattr(output, "full_tensor"):  # of a head that tensor parallelism shards
        output = output.full_tensor()
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = got or (f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__)
        raise ValueError(
            f"model: got an output of {got}, expected logits (n, c), or an object or mapping with `logits`"
        )
    return output


def maker_of(outputs: Mapping[nn.Linear, Tensor | None], logits: Tensor) -> nn.Linear | bool | None:
    """The layer whose output the logits are, up to a cast to half precision and back; False where layers as wide made
    others, None where there are none."""
    wide = {layer: out for layer, out in outputs.items() if out is not None and out.shape == logits.shape}
    same = (m for m, out in wide.items() if torch.allclose(out.float(), logits.float(), 2**-8, 1e-7, equal_nan=True))
    return next(same, False) if wide else None


def check_width(head: nn.Linear, logits: Tensor) -> None:
    """ValueError for a layer that has not as many outputs as there are logits."""
    if logits.shape[1] != head.out_features:
        raise ValueError(
            f"head: got a layer {head.in_features} → {head.out_features}, but the logits have shape "
            f"{tuple(logits.shape)}; pass head=..., the nn.Linear that makes them or its name; with a head of "
            "another kind, use fit_features and score_features; of a model that returns a tuple the first is read, of "
            "a mapping `logits`"
        )


def check_head(head: nn.Linear, captured: CapturedFeatures, logits: Tensor) -> None:
    """ValueError where F.linear(z, W, b) are not the logits, up to rounding: something adds to them or changes them.

    The size of a rounding is that of the least exact dtype at hand.
    """
    if not captured.seen:
        raise ValueError(
            f"head: the layer {head.in_features} → {head.out_features} did not run as a module; pass head=..., the "
            "nn.Linear that makes the logits; of a model that computes with its weight, as by F.linear, use "
            "fit_features and score_features"
        )
    if type(head.weight).__module__.startswith("torchao."):
        raise ValueError(
            f"head: got a quantized weight ({type(head.weight).__name__}), expected a plain one; leave the head out as "
            "you quantize the model, by the filter_fn of quantize_"
        )
    z = captured.features.detach()
    if z.is_meta or logits.is_meta:
        return
    if z.shape[:-1] != logits.shape[:1]:
        raise ValueError(
            f"features: got shape {tuple(z.shape)} at the head for logits {tuple(logits.shape)}, expected (n, m): the "
            "model makes its logits of several rows; pass it through fit_features and score_features"
        )
    weight, bias = inference_head(head)
    dtypes = {value.dtype for value in (z, weight, logits)} | ({captured.dtype} if captured.dtype else set())
    wide = torch.float64 if dtypes == {torch.float64} else torch.float32
    z, weight, given = (value.detach().to(wide) for value in (z, weight, logits))
    unit, tiny = max(_unit(d, z.device) for d in dtypes), max(torch.finfo(d).tiny for d in dtypes)
    expected, difference, allowed = _off(given, z, weight, bias, unit)
    beyond = (difference > allowed + tiny) & ~(given.isinf() & (expected.abs() > torch.finfo(logits.dtype).max))
    if not beyond.any():  # also where something is NaN, which has messages of its own
        return
    worst = int(difference.masked_fill(~beyond, -1.0).argmax())
    row, k = divmod(worst, given.shape[1])
    raise ValueError(
        f"head: the layer {head.in_features} → {head.out_features} does not make the logits: they differ from "
        f"F.linear(z, W, b) by up to {difference[row, k]:.3g} (row {row}, class {k}: {given[row, k]:.4g} for "
        f"{expected[row, k]:.4g}){_cause(expected, given)}. Let the model return what its last linear layer makes; "
        "merge an adapter such as LoRA (model.merge_and_unload()) or several heads into one nn.Linear; or call "
        "fit_features(features, logits, targets, head=(W, b)) and score_features with those that belong together"
    )


def _off(given: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """F.linear(z, W, b), by how much the logits given are off it, and by how much they may be, each (n, c).

    An error of many roundings of relative size u is about u (Σ_j z_j² W_kj² + b_k²)^½: eight of them are allowed.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(z)
    with torch.autocast(z.device.type, enabled=False):
        expected = F.linear(z, weight, bias)
        spread = F.linear(z.square(), weight.square(), bias.square()).sqrt()
        length = F.linear(z.abs(), weight.abs(), bias.abs())
    allowed = 8 * unit * spread + 32 * torch.finfo(z.dtype).eps * length + 2 * unit * expected.abs()
    return expected, (expected - given).abs(), allowed


def other_logits(features: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None) -> float | None:
    """The largest difference of stored logits and F.linear(z, W, b) in the first rows; None up to digits of bfloat16,
    and where sizes do not fit, which others say."""
    z, given = features[:CHECKED_ROWS].float(), logits[:CHECKED_ROWS].float()
    if weight.shape != (given.shape[1], z.shape[1]) or len(z) != len(given):
        return None
    _, difference, allowed = _off(given, z, weight.to(z), bias, BFLOAT16)
    difference = difference.masked_fill(given.isinf(), 0.0)
    return float(difference.nan_to_num().amax()) if (difference > allowed).any() else None


def _unit(dtype: torch.dtype, device: torch.device) -> float:
    """The relative size of one rounding of a linear layer: float32 may be multiplied in fewer digits."""
    if dtype != torch.float32:
        return torch.finfo(dtype).eps
    if device.type == "cpu":
        fewer = {"bf16": 2.0**-7, "tf32": 2.0**-10}
        return fewer.get(MKLDNN.matmul.fp32_precision, torch.finfo(dtype).eps)
    return 2.0**-10


def _cause(expected: Tensor, given: Tensor) -> str:
    """What the logits look like beside those of the head, for a message."""
    scale = float((given * expected).sum() / expected.square().sum().clamp_min(1e-30))
    candidates = _changed(expected, given)
    candidates[f"{scale:.4g} times (a temperature?) the output"] = scale * expected
    for name, candidate in candidates.items():
        if _close(candidate, given):
            return f": the model returns {name} of this layer"
    if _close(expected.sort(1).values, given.sort(1).values):
        return ": the model returns the output of this layer with its classes in another order"
    return ""


def check_output(logits: Tensor, beside: nn.Linear | None = None, captured: CapturedFeatures | None = None) -> None:
    """ValueError for an output that scores of logits would take for logits: rows of probabilities or of their
    logarithms; beside the last linear layer that ran, if it makes as many outputs, its sigmoid or clamped outputs; and
    what enters that layer. A temperature, an average of heads, another order of classes pass: these are logits.
    """
    if logits.is_meta or logits.shape[1] < 2:
        return
    rows, expected = logits.detach().float(), None
    z = captured.features.detach() if beside is not None and captured is not None and captured.seen else None
    fits = z is not None and z.dim() == 2 and len(z) == len(rows)
    if beside is not None and z is not None and fits and beside.out_features == logits.shape[1]:
        weight, bias = inference_head(beside)
        with torch.autocast(z.device.type, enabled=False):
            expected = F.linear(z.float(), weight.float(), None if bias is None else bias.float())
        if _close(expected, rows):
            return
    what, cure = _no_logits(rows, expected, 16 * torch.finfo(logits.dtype).eps, beside is None)
    if z is not None and z.shape == logits.shape and expected is None and torch.equal(z, logits):
        what = f"the features {tuple(z.shape)} that enter its last layer"
        cure = (
            "of a model that returns a tuple the first is read, of a mapping `logits`: let it return the logits first"
        )
    if what:
        raise ValueError(f"model: got {what}, expected logits: {cure}")


def refuse_probabilities(logits: Tensor) -> None:
    """ValueError for logits (n, c) that came without a model, of which enough rows are probabilities or logarithms of
    these."""
    if torch.compiler.is_compiling() or is_exporting() or logits.is_meta:
        return
    if len(logits) < CHECKED[0] or logits.shape[1] < 2:
        return
    rows = logits.detach()[: CHECKED[1]].float()
    low, high = torch.stack(rows.aminmax()).tolist()
    if not (high <= 0 or 0 <= low <= high <= 1):
        return
    if what := _no_logits(rows, None, 16 * torch.finfo(logits.dtype).eps, True)[0]:
        raise ValueError(f"logits: got {what}, expected what the last layer makes, before a softmax")


def _no_logits(rows: Tensor, expected: Tensor | None, rounding: float, unknown: bool) -> tuple[str, str]:
    """What the output is instead, and the cure; two empty texts if nothing speaks against logits."""
    sharp = unknown and not ((rows > 0) & (rows < 1)).any()  # ones and zeros: nothing tells what made them
    slack = 1e-2 * rows.shape[1] ** -0.5
    if not sharp and ((rows >= 0) & (rows <= 1)).all() and ((rows.sum(1) - 1).abs() < slack).all():
        return "an output whose rows are probabilities, 0 to 1 with sum 1", "leave out the softmax at its end"
    if (rows <= 0).all() and (rows.logsumexp(1).abs() <= rounding * (1 + rows.abs().amax(1))).all():
        return "an output whose rows are logarithms of probabilities", "leave out the log-softmax at its end"
    relu = bool(rows.min() == 0)  # a network of features that ends so has a norm of its outputs
    for name in ("the sigmoid", *(() if relu else ("the clamped output",))):
        if expected is not None and _close(_changed(expected, rows)[name], rows):
            return f"{name} of its last layer", "let it return what that layer makes"
    return "", ""


def _changed(expected: Tensor, given: Tensor) -> dict[str, Tensor]:
    return {
        "the softmax": expected.softmax(1),
        "the log-softmax": expected.log_softmax(1),
        "the sigmoid": expected.sigmoid(),
        "the clamped output": expected.clamp(given.min(), given.max()),
    }


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-2, atol=1e-3)
