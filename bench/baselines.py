"""The rows of the tables: ours, and what a user would otherwise run, each as a function of the same inputs."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ood_fast
from ood_fast import reference
from ood_fast.ops import backend_name

from .cases import CIFAR10, CIFAR100, IMAGENET, Case, Inputs

# Above this the reference takes seconds a step on a CPU, and the whole run should take minutes.
CPU_REFERENCE_LIMIT = 2**30


def gram_elogitnorm(logits: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """ELogitNorm with ‖w_p − w_j‖² = ‖w_p‖² + ‖w_j‖² − 2 w_p·w_j for the predicted rows only, (n, c).

    What a careful user would write in plain PyTorch: no (c, c, m) tensor, gradients by autograd, float32 inside.
    """
    logits, W = _wide(logits), _wide(W)
    top, predicted = logits.max(1, keepdim=True)
    rows = W[predicted[:, 0]]
    squared = rows.square().sum(1, keepdim=True) + W.square().sum(1) - 2 * rows @ W.T
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter(1, predicted, True)
    # 1 in place of the 0 (or the rounding error below it) at j = p: its square root has no gradient.
    length = squared.masked_fill(itself, 1).clamp_min(1e-12).sqrt()
    D = ((top - logits) / length).sum(1, keepdim=True) / (logits.shape[1] - 1)
    return F.cross_entropy(logits / D, y)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: a difference of weight rows in bfloat16 has no digits left."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Row:
    """One line of a table: a function of `Inputs`, the inputs that it is differentiated for (none: a score), and its
    own truth."""

    name: str
    run: Callable[[Inputs], Tensor]
    wants: tuple[str, ...]
    counts: str  # of bench/counts.py
    truth: Callable[[Inputs], Tensor]  # the same function, for float64 inputs
    left_out: Callable[[Case, torch.device], str | None] = lambda case, device: None
    forward_only: bool = True  # also in the table of the forward pass

    def __reduce__(self) -> tuple[Callable[[int], Row], tuple[int]]:
        """Pickled as its place in `ALL`: its functions have no names."""
        return _at, (ALL.index(self),)

    @property
    def reads_logits(self) -> bool:
        return "logits" in self.wants or not self.wants

    def forward(self, x: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [self.run(x)]

    def step(self, x: Inputs) -> list[Tensor]:
        """The value and its gradients. One that is no loss (the head) gets ones for incoming gradients."""
        return self._step(self.run, x)

    def true_step(self, x: Inputs) -> list[Tensor]:
        return self._step(self.truth, x)

    def prepare(self, case: Case, device: torch.device, forward: bool = False) -> Callable[[], list[Tensor]]:
        """The step, or the forward pass alone, with its inputs; it has run once."""
        x = Inputs.of(case, device, with_logits=self.reads_logits)
        step = functools.partial(self.forward if forward else self.step, x)
        step()
        return step

    def _step(self, function: Callable[[Inputs], Tensor], x: Inputs) -> list[Tensor]:
        with torch.set_grad_enabled(bool(self.wants)):
            value = function(x)
        if not self.wants:
            return [value]
        incoming = None if value.dim() == 0 else torch.ones_like(value)
        return [value.detach(), *torch.autograd.grad(value, [getattr(x, name) for name in self.wants], incoming)]


def reference_bytes(case: Case) -> int:
    """What the literal definition needs: three tensors (c, c, m) at once, by arithmetic.

    They are the differences of all pairs of rows of W, kept for the backward pass; there their gradient; a temporary.
    """
    return 3 * case.n_classes**2 * case.n_features * 4


def _reference_left_out(case: Case, device: torch.device, tensors: int = 3) -> str | None:
    needed = reference_bytes(case) // 3 * tensors
    limit = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_REFERENCE_LIMIT
    if needed <= limit:
        return None
    c, m = case.n_classes, case.n_features
    return f"out of memory at {needed / 1e9:.1f} GB: {tensors} × {c}×{c}×{m} numbers, limit {limit / 1e9:.1f} GB"


def _reference_distance_left_out(case: Case, device: torch.device) -> str | None:
    """Without a backward pass: the differences and a temporary."""
    return _reference_left_out(case, device, 2)


def no_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device, or None."""
    if device.type == "cuda" or any(map(shutil.which, ("g++", "clang++", "c++"))):
        return None
    return "torch.compile needs a C++ compiler, and there is none"


def _compiled_left_out(case: Case, device: torch.device) -> str | None:
    """Compilation takes ten seconds or more a case on a CPU: once there is enough to see what it brings."""
    if device.type == "cuda":
        return None if case.name in (CIFAR10.name, CIFAR100.name, IMAGENET.name) else "compiled at three cases only"
    if reason := no_compiler(device):
        return reason
    fits = case.name == IMAGENET.name and case.dtype == torch.float32
    return None if fits else f"compiled at {IMAGENET.name} in float32 only: it takes ten seconds a case"


@functools.cache
def _compiled_gram() -> Callable:
    return torch.compile(gram_elogitnorm, dynamic=False)


def _liger_left_out(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "Liger's kernels run on a GPU only"
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def _liger_cross_entropy(x: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(x.logits.clone(), x.y)  # a copy: it overwrites the logits


def _liger_linear(x: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x.z, x.W, x.y, x.b)


def _torch_linear_left_out(case: Case, device: torch.device) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return "F.linear_cross_entropy came with torch 2.13"
    if device.type == "cpu" and case.n_classes == 100_000:
        return "several seconds a step at 100,000 classes: `python -m bench.ratios linear` times it"
    return None


def _torch_linear(x: Inputs) -> Tensor:
    return F.linear_cross_entropy(x.z, x.W, x.y, linear_bias=x.b, options=torch.nn.LinearCrossEntropyOptions())


def _true_elogitnorm(x: Inputs) -> Tensor:
    return gram_elogitnorm(x.logits, x.W, x.y)  # float64 needs no care with rows as far apart as these


def _true_detached(x: Inputs) -> Tensor:
    return gram_elogitnorm(x.logits, x.W.detach(), x.y)


def _cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy(x.logits, x.y)


def _logits(x: Inputs) -> Tensor:
    return F.linear(x.z, x.W, x.b)


def _true_logits(x: Inputs) -> Tensor:
    """z W^T + b; where kernels serve with the values of `x.logits`, as they were rounded before `Inputs.double`."""
    exact = _logits(x)
    return exact if backend_name(x.z.device) == "eager" else exact + (x.logits - exact).detach()


def _true_linear(x: Inputs) -> Tensor:
    return gram_elogitnorm(_true_logits(x), x.W, x.y)


def _true_linear_detached(x: Inputs) -> Tensor:
    return gram_elogitnorm(_true_logits(x), x.W.detach(), x.y)


def _linear_cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy(_logits(x), x.y)


def _logits_left_out(case: Case, device: torch.device) -> str | None:
    """Half a dozen copies of the logits is what the form with logits takes at its peak."""
    needed = 6 * 4 * case.n_samples * case.n_classes
    limit = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    return (
        None if needed <= limit else f"out of memory at {needed / 1e9:.1f} GB: six (n, c), limit {limit / 1e9:.1f} GB"
    )


_BOTH, _LOGITS, _HEAD = ("logits", "W"), ("logits",), ("z", "W", "b")

# Given logits. The first row is what the others are compared with.
LOSSES = (
    Row(
        "elogitnorm",
        lambda x: ood_fast.elogitnorm(x.logits, x.z, x.W, x.b, x.y),
        _BOTH,
        "elogitnorm",
        _true_elogitnorm,
    ),
    Row(
        "elogitnorm, detached",
        lambda x: ood_fast.elogitnorm(x.logits, x.z, x.W, x.b, x.y, detach_geometry=True),
        _LOGITS,
        "elogitnorm, detached",
        _true_detached,
        forward_only=False,
    ),
    Row(
        "literal definition",
        lambda x: reference.elogitnorm(_wide(x.logits), x.z, _wide(x.W), x.b, x.y),
        _BOTH,
        "elogitnorm",
        _true_elogitnorm,
        _reference_left_out,
    ),
    Row(
        "Gram form, autograd",
        lambda x: gram_elogitnorm(x.logits, x.W, x.y),
        _BOTH,
        "elogitnorm",
        _true_elogitnorm,
    ),
    Row(
        "Gram form, torch.compile",
        lambda x: _compiled_gram()(x.logits, x.W, x.y),
        _BOTH,
        "elogitnorm",
        _true_elogitnorm,
        _compiled_left_out,
        forward_only=False,
    ),
    Row(
        "logitnorm",
        lambda x: ood_fast.logitnorm(x.logits, x.y),
        _LOGITS,
        "logitnorm",
        lambda x: reference.logitnorm(x.logits, x.y),
    ),
    Row("F.cross_entropy", _cross_entropy, _LOGITS, "cross_entropy", _cross_entropy),
    Row("Liger cross-entropy", _liger_cross_entropy, _LOGITS, "cross_entropy", _cross_entropy, _liger_left_out),
    Row("F.linear (the head)", _logits, _HEAD, "head", _logits),
)

# From features: the logits are never stored by ours and by the two peers.
LINEAR_LOSSES = (
    Row(
        "linear_elogitnorm",
        lambda x: ood_fast.linear_elogitnorm(x.z, x.W, x.b, x.y),
        _HEAD,
        "linear_elogitnorm",
        _true_linear,
    ),
    Row(
        "linear_elogitnorm, detached",
        lambda x: ood_fast.linear_elogitnorm(x.z, x.W, x.b, x.y, detach_geometry=True),
        _HEAD,
        "linear_elogitnorm, detached",
        _true_linear_detached,
    ),
    Row(
        "F.linear + elogitnorm",
        lambda x: ood_fast.elogitnorm(_logits(x), x.z, x.W, x.b, x.y),
        _HEAD,
        "linear_elogitnorm",
        _true_linear,
        _logits_left_out,
    ),
    Row(
        "F.linear + F.cross_entropy",
        _linear_cross_entropy,
        _HEAD,
        "linear_cross_entropy",
        _linear_cross_entropy,
        _logits_left_out,
    ),
    Row(
        "F.linear_cross_entropy",
        _torch_linear,
        _HEAD,
        "linear_cross_entropy",
        _linear_cross_entropy,
        _torch_linear_left_out,
    ),
    Row(
        "Liger fused linear cross-entropy",
        _liger_linear,
        _HEAD,
        "linear_cross_entropy",
        _linear_cross_entropy,
        _liger_left_out,
    ),
)
ROWS = {row.name: row for row in LOSSES + LINEAR_LOSSES}


def _gram_distance(x: Inputs) -> Tensor:
    """D by the Gram form, for float64."""
    predicted = x.logits.argmax(1)
    rows = x.W[predicted]
    s = rows.square().sum(1, keepdim=True) + x.W.square().sum(1) - 2 * rows @ x.W.T
    gaps = x.logits.gather(1, predicted[:, None]) - x.logits
    s.scatter_(1, predicted[:, None], 1.0)
    return (gaps / s.sqrt()).sum(1) / (x.logits.shape[1] - 1)


def _reference_nci(x: Inputs) -> Tensor:
    return reference.nci_score(x.z, x.W, x.b, x.mean, x.logits)


def _reference_nci_from_features(x: Inputs) -> Tensor:
    return reference.nci_score(x.z, x.W, x.b, x.mean)


def _softmax_maximum(x: Inputs) -> Tensor:
    return x.logits.softmax(1).amax(1)


# Scores of a batch, by table.
SCORES = {
    "NCI from logits": (
        Row("nci_score", lambda x: ood_fast.nci_score(x.z, x.W, x.b, x.mean, x.logits), (), "nci", _reference_nci),
        Row("literal definition", _reference_nci, (), "nci", _reference_nci),
        Row("MSP, torch", _softmax_maximum, (), "row_statistics, MSP", _softmax_maximum),
    ),
    "NCI from features alone": (
        Row(
            "nci_score",
            lambda x: ood_fast.nci_score(x.z, x.W, x.b, x.mean),
            (),
            "nci from features",
            _reference_nci_from_features,
        ),
        Row("literal definition", _reference_nci_from_features, (), "nci from features", _reference_nci_from_features),
    ),
    "D from logits": (
        Row(
            "boundary_distance",
            lambda x: ood_fast.boundary_distance(x.logits, x.W),
            (),
            "boundary_distance",
            _gram_distance,
        ),
        Row(
            "literal definition",
            lambda x: reference.boundary_distance(_wide(x.logits), _wide(x.W)),
            (),
            "boundary_distance",
            _gram_distance,
            _reference_distance_left_out,
        ),
    ),
}
ALL = (*LOSSES, *LINEAR_LOSSES, *(row for rows in SCORES.values() for row in rows))


def _at(place: int) -> Row:
    return ALL[place]
