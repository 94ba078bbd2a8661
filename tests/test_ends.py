"""The losses at the ends of the range of numbers: rows of W much longer, shorter or nearer than others, and a fuzz.

What is asked: the error of plain PyTorch in the same dtype, times a small number, plus a few roundings.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ood_fast
from ood_fast import reference

ROUNDINGS = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """[value, a gradient for each input], in float64."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*inputs)
    return [t.detach().cpu().double() for t in (value, *torch.autograd.grad(value.sum(), inputs))]


def worst_row(actual: Tensor, truth: Tensor, size: Tensor | None = None) -> float:
    """The largest error of a row beside its own length, or beside `size` where that is more. Rows that are outside the
    range of the dtype are left out."""
    actual, truth = (t.flatten(1) if t.dim() > 1 else t.reshape(-1, 1) for t in (actual, truth))
    lengths = truth.norm(dim=1)
    kept = (lengths > 1e-34) & (lengths < 1e36)
    if size is not None:
        lengths = torch.maximum(lengths, size)
    errors = (actual - truth).norm(dim=1).div(lengths)[kept].nan_to_num(math.inf)
    return errors.amax().item() if len(errors) else 0.0


def check(functions, inputs: tuple[Tensor, ...], names: str, device: torch.device | str = "cpu", factor: float = 20.0):
    """Ours against the truth, row by row; `functions` are ours and the reference."""
    ours, reference_of = functions
    truth = value_and_gradients(reference_of, *(t.double() for t in inputs))
    plain = value_and_gradients(reference_of, *inputs)
    actual = value_and_gradients(ours, *(t.to(device) for t in inputs))
    for name, a, t, p in zip(["value", *names.split()], actual, truth, plain, strict=True):
        allowed = factor * min(worst_row(p, t), 1e-3) + 30 * ROUNDINGS[inputs[-1].dtype]
        assert (error := worst_row(a, t)) <= allowed, f"{name}: a row is off by {error:.1e}, allowed {allowed:.1e}"


def giants(W: Tensor, ratio: float) -> dict[str, Tensor]:
    """Heads of which some rows are `ratio` times as long as the others."""
    c = len(W)
    factor = torch.ones(c, 1, dtype=W.dtype)
    heads = {}
    for name, rows in {"one": [c // 2], "first and last": [0, -1], "most": list(range(2, c))}.items():
        longer = factor.clone()
        longer[rows] = ratio
        heads[name] = W * longer
    heads["two alike"] = W.clone()
    heads["two alike"][[0, 1]] = W[0] * ratio + W[:2]
    heads["offset"] = torch.where(torch.arange(c).unsqueeze(1) == 1, W * ratio, W + 30 * W[0])
    return heads


def loss_of(y: Tensor, **keywords):
    return tuple(
        lambda f, W, of=of: of.elogitnorm(f, None, W, None, y.to(f.device), **keywords) for of in (ood_fast, reference)
    )


SHAPES = {"n >= c": (12, 6, 5), "n < c": (4, 9, 5)}


@pytest.mark.parametrize("ratio", [1e4, 1e6, 1e8, 1e15])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rows_much_longer_than_the_others(shape, ratio, backend):
    n, c, m = shape
    logits, y = torch.randn(n, c), torch.randint(0, c, (n,))
    heads = giants(torch.randn(c, m), ratio)
    if backend.name == "triton":  # one of them: the interpreter takes seconds for each
        if ratio != 1e6:
            pytest.skip("one ratio in the kernels")
        check(loss_of(y), (logits, heads["one"]), "df dW", backend.device)
        return
    for W in heads.values():
        check(loss_of(y), (logits, W), "df dW", backend.device)
        functions = ood_fast.boundary_distance, reference.boundary_distance
        check(functions, (logits, W), "df dW", backend.device)


@pytest.mark.parametrize("ratio", [1e4, 1e7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rows_much_longer_without_logits(shape, ratio):
    """z has small entries where a row is long, so that no logit rules all others."""
    n, c, m = shape
    y = torch.randint(0, c, (n,))
    functions = tuple(
        lambda z, b, W, of=of: of.linear_elogitnorm(z, W, b, y.to(z.device)) for of in (ood_fast, reference)
    )
    W, z = torch.randn(c, m), torch.randn(n, m)
    W[c // 2] = 0
    W[c // 2, -1] = ratio
    z[:, -1] /= ratio
    check(functions, (z, torch.randn(c), W), "dz db dW")


def test_giants_in_float64():
    for shape in SHAPES.values():
        n, c, m = shape
        logits, y = torch.randn(n, c).double(), torch.randint(0, c, (n,))
        for W in giants(torch.randn(c, m).double(), 1e12).values():
            check(loss_of(y), (logits, W), "df dW")


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-8, 1e8, 1e18, 1e25, 1e35])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_scale_of_the_head_is_exact(shape, scale):
    """f and W times a power of two: the same D, gradients divided by it; W alone: D divided by it."""
    n, c, m = shape
    factor = 2.0 ** round(math.log2(scale))
    logits, W = torch.randn(n, c), torch.randn(c, m)
    expected = value_and_gradients(ood_fast.boundary_distance, logits, W)
    actual = value_and_gradients(ood_fast.boundary_distance, logits * factor, W * factor)
    for e, a, unit in zip(expected, actual, (1.0, factor, factor), strict=True):
        torch.testing.assert_close(a * unit, e, rtol=2e-5, atol=2e-6)
    scaled = ood_fast.boundary_distance(logits, W * factor).double() * factor
    torch.testing.assert_close(scaled, ood_fast.boundary_distance(logits, W).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e18, 3e19, 1e25, 1e38])
def test_one_row_beyond_squares(size, backend):
    W, logits = torch.randn(3, 9, device=backend.device), torch.randn(5, 3, device=backend.device)
    W[2] *= size / W[2].double().norm().float()
    logits[:, 0] += 3
    for rows in (logits[:2],) if backend.name == "triton" else (logits, logits[:2]):
        truth = reference.boundary_distance(rows.double(), W.double())
        torch.testing.assert_close(ood_fast.boundary_distance(rows, W).double(), truth, rtol=1e-5, atol=0)


def test_rows_shorter_than_squares(backend):
    """Rows of 1e-25, near to each other but far from the others, and what is drawn between them."""
    W, logits = torch.randn(5, 6, device=backend.device), torch.randn(8, 5, device=backend.device)
    W[1:3] *= 1e-25
    for rows in (logits[:3],) if backend.name == "triton" else (logits, logits[:3]):
        truth = reference.boundary_distance(rows.double(), W.double())
        torch.testing.assert_close(ood_fast.boundary_distance(rows, W).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("apart", [1e-2, 1e-5, 1e-7])
def test_close_pairs_keep_the_digits_of_plain_pytorch(shape, apart):
    n, c, m = shape
    y = torch.randint(0, c, (n,))
    logits, W = torch.randn(n, c), torch.randn(c, m)
    W[1] = W[0] + apart * torch.randn(m)
    logits[0, :2] = logits[0].max() + torch.tensor([1.0, 0.5])
    check(loss_of(y), (logits, W), "df dW")


def test_half_precision_rounds_the_sum_once(backend):
    """What comes through the distances alone is beyond float16; dW is not."""
    W = torch.tensor([[1.0, 0.0], [1.0 + 2.0**-10, 0.0], [0.0, 1.0]]).half()
    z, y = torch.tensor([[60.0, 0.0]] * 4).half(), torch.zeros(4, dtype=torch.long)

    def function(of, **more):
        return lambda z, W: of.linear_elogitnorm(z, W, None, y.to(z.device), reduction="sum", average="classes", **more)

    # The kernels take the prediction, and the gaps, from logits in the dtype of their factors.
    rounded = {"logits_dtype": torch.float16} if backend.name == "triton" else {}
    truth = value_and_gradients(function(reference, **rounded), z.double(), W.double())
    actual = value_and_gradients(function(ood_fast), z.to(backend.device), W.to(backend.device))
    torch.testing.assert_close(actual[2], truth[2], rtol=2e-2, atol=2e-2 * truth[2].abs().max().item())


# ---- a fuzz


def example(generator: torch.Generator) -> dict:
    """A small batch with what may go wrong: scales, offsets, long, short, close and equal rows, masks, strides."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def power(low: float, high: float) -> float:
        return 10 ** (low + (high - low) * float(torch.rand((), generator=generator)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, c, m = number(1, 12), number(2, 12), number(1, 20)
    dtype = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16][number(0, 4)]
    ends = 3.0 if dtype == torch.float16 else 17.0
    W, scale = normal(c, m), power(-ends, ends) if number(0, 1) else 1.0
    if number(0, 2) == 0:
        W += normal(m) * power(0, 4)
    for low, high in ((0.0, ends), (-ends, 0.0)):
        if number(0, 2) == 0:
            W[torch.randint(0, c, (number(1, 3),), generator=generator)] *= power(low, high)
    if number(0, 2) == 0:
        W[number(0, c - 1)] = W[number(0, c - 1)] + power(-8, 0) * normal(m)
    if number(0, 3) == 0:
        W[number(0, c - 1)] = W[number(0, c - 1)]
    if number(0, 9) == 0:
        W[number(0, c - 1)] = 0
    logits = normal(n, c) * power(-2, 2) * (scale if number(0, 1) else 1.0)
    largest = 0.9 * torch.finfo(dtype).max
    W, logits = ((t.clamp(-largest, largest)).to(dtype) for t in (W * scale, logits))
    y = torch.randint(0, c, (n,), generator=generator)
    if number(0, 4) == 0:
        masked = torch.rand(n, c, generator=generator) < 0.3
        y = logits.argmax(1)
        logits = logits.masked_fill(masked.scatter(1, y.unsqueeze(1), False), -math.inf)
    elif number(0, 3) == 0:
        y = normal(n, c).softmax(1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if number(0, 3) == 0:
        W, logits = W.t().contiguous().t(), logits.t().contiguous().t()
    keywords = {
        "reduction": ["mean", "sum"][number(0, 1)],
        "label_smoothing": [0.0, 0.1][number(0, 1)],
        "average": ["boundaries", "classes"][number(0, 1)],
    }
    return {"logits": logits, "W": W, "y": y, "keywords": keywords}


def judge(logits: Tensor, W: Tensor, y: Tensor, keywords: dict, device: torch.device | str = "cpu") -> list[str]:
    """What is wrong with the loss, the distance and their gradients."""
    dtype, average = W.dtype, keywords["average"]

    def loss(of):
        def function(f, W):
            target = y.double() if y.is_floating_point() and f.dtype == torch.float64 else y
            return of.elogitnorm(f, None, W, None, target.to(f.device), **keywords)

        return function

    def distance(of):
        return lambda f, W: of.boundary_distance(f, W, average=average)

    D = reference.boundary_distance(logits.double(), W.double(), average=average)
    near_eps = ((D / 1e-6 - 1).abs() < 1e-2).any().item()
    # What the terms of a logit gradient are, which cancel in all of it where there are two classes.
    terms = torch.where(D <= 1e-6, 1.0, D).reciprocal() / (len(D) if keywords["reduction"] == "mean" else 1)
    wrong = []
    for name, function in (("loss", loss), ("D", distance)):
        if name == "loss" and near_eps:
            continue
        truth = value_and_gradients(function(reference), logits.double(), W.double())
        plain = value_and_gradients(
            function(reference), *(t.float() if dtype.itemsize == 2 else t for t in (logits, W))
        )
        actual = value_and_gradients(function(ood_fast), logits.to(device), W.to(device))
        for part, a, t, p in zip(("value", "df", "dW"), actual, truth, plain, strict=True):
            size = terms if part == "df" and name == "loss" else None
            if part != "value" and dtype.itemsize == 2:  # rows that the dtype holds
                largest = t.abs().amax(1)
                held = (largest < torch.finfo(dtype).max / 2) & (largest > 1e3 * torch.finfo(dtype).smallest_normal)
                a, t, p, size = a[held], t[held], p[held], None if size is None else size[held]
            if (error_of_plain := worst_row(p, t, size)) > 1e-2:
                continue  # 1 / D^2 is outside the range of float32, say
            allowed = 30 * error_of_plain + 5 * ROUNDINGS[dtype]
            if (error := worst_row(a, t, size)) > allowed:
                wrong.append(f"{name}: {part} is off by {error:.1e}, allowed {allowed:.1e}, {dtype}, {keywords}")
    return wrong


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_fuzz(first):
    for number in range(first, first + 100):
        wrong = judge(**example(torch.Generator().manual_seed(number)))
        assert not wrong, f"example {number}: {wrong}"
