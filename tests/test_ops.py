"""The operators as torch.library, torch.compile, autocast and the backend switch see them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from support import Batch
from torch.fx.experimental.proxy_tensor import make_fx

import ood_fast
from ood_fast import ops


def operator_calls(device, n_classes: int = 4) -> dict[str, tuple]:
    """Name -> sample arguments of every operator in the library; two samples have the same prediction."""
    batch = Batch.of(5, n_classes, 3, device=device)
    batch.logits[1] = batch.logits[0]
    logits, W, y = batch.logits, batch.W, batch.y
    mean = torch.randn(3, device=device)
    calls = {
        "elogitnorm": (logits, W, y, None, -100, "mean", 0.1, 1e-6, 0, True),
        "logitnorm": (logits, y, torch.rand(n_classes, device=device), -100, "sum", 0.0, 0.04, True),
        "boundary_distance": (logits, W, 1),
        "nci_score": (batch.z, W, batch.b, mean, None, 1e-3),
        "linear_elogitnorm": (batch.z, W, batch.b, y, None, -100, "mean", 0.1, 1e-6, 0, False, True, True, True),
    }
    out = {name: getattr(torch.ops.ood_fast, name)(*args) for name, args in calls.items()}
    calls["row_statistics"] = (["max", "entropy", "norm1"], logits, batch.z, None, None, None, 0.1)
    one, each = torch.ones((), device=device), torch.rand(5, device=device)
    saved = list(out["elogitnorm"][2:])
    calls["elogitnorm_backward"] = (one, logits, W, y, None, saved, -100, "mean", 0.1, True, True)
    calls["logitnorm_backward"] = (one, logits, y, calls["logitnorm"][2], list(out["logitnorm"][1:]), -100, "sum", 0.0)
    calls["boundary_distance_backward"] = (each, logits, W, list(out["boundary_distance"][1:]), True, True)
    calls["linear_elogitnorm_backward"] = (one, *calls["linear_elogitnorm"])
    calls["nci_score_backward"] = (each, batch.z, W, mean, *out["nci_score"][1:], 1e-3, True, True, True)
    return calls


DIFFERENTIABLE = ("elogitnorm", "linear_elogitnorm", "logitnorm", "boundary_distance", "nci_score")
OPERATORS = [*(name + suffix for name in DIFFERENTIABLE for suffix in ("", "_backward")), "row_statistics"]


def test_every_operator_is_in_the_list():
    assert sorted(operator_calls("cpu")) == sorted(OPERATORS)
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "ood_fast::" in name
    }
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("n_classes", [4, 9], ids=["n>=c", "n<c"])
def test_opcheck(name, n_classes, backend):
    args = operator_calls(backend.device, n_classes)[name]
    if name in DIFFERENTIABLE:
        args = tuple(
            a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() and i < 2 else a
            for i, a in enumerate(args)
        )
    torch.library.opcheck(getattr(torch.ops.ood_fast, name).default, args)


def test_the_operator_differentiates_as_the_function_does(backend):
    """The same bits on a CPU; in the kernels, where the function divides each loss and makes both gradients ahead, but
    for rounding."""
    batch = Batch.of(3, 4, 3, device=backend.device)
    logits, W = batch.logits.requires_grad_(), batch.W.requires_grad_()
    by_operator = torch.ops.ood_fast.elogitnorm(logits, W, batch.y, None, -100, "mean", 0.0, 1e-6, 0, True)[0]
    by_function = ood_fast.elogitnorm(logits, None, W, None, batch.y)
    found = [(loss, *torch.autograd.grad(loss, [logits, W])) for loss in (by_operator, by_function)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if backend.name == "eager" else torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def model_loss(z, W, b, y, mean):
    """A training objective that uses every operator."""
    logits = torch.nn.functional.linear(z, W, b)
    loss = ood_fast.elogitnorm(logits, z, W, b, y) + ood_fast.logitnorm(logits, y)
    return loss + ood_fast.boundary_distance(logits, W).mean() - ood_fast.nci_score(z, W, b, mean).mean()


@pytest.mark.parametrize("ignored", [False, True], ids=["all targets", "ignored targets"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_equals_eager(compiler, ignored, backend):
    torch.compiler.reset()
    batch = Batch.of(6, 5, 4, device=backend.device)
    mean = torch.randn(4, device=backend.device)
    if ignored:
        batch.y[::2] = -100
    results = []
    # Inductor's cache on disk does not know when the outputs of an operator change: an old entry would be the test.
    with torch._inductor.config.patch(force_disable_caches=True):
        for function in (model_loss, torch.compile(model_loss, fullgraph=True, backend=compiler)):
            z, W, b = (t.detach().requires_grad_() for t in (batch.z, batch.W, batch.b))
            loss = function(z, W, b, batch.y, mean)
            results.append([loss.detach(), *torch.autograd.grad(loss, [z, W, b])])
    for eager_result, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager_result, rtol=1e-5, atol=1e-6)


def test_compile_with_dynamic_shapes(backend):
    torch.compiler.reset()
    compiled = torch.compile(model_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_samples in (6, 3, 8):
        batch = Batch.of(n_samples, 5, 4, device=backend.device)
        mean = torch.zeros(4, device=backend.device)
        args = (batch.z, batch.W.requires_grad_(), batch.b, batch.y, mean)
        torch.testing.assert_close(compiled(*args), model_loss(*args))


def test_make_fx_records_the_operators(backend):
    """Of true tensors, and of other ones than it is run on: a graph has nothing of what a kernel does by pointers."""

    def step(z, W, b, y, mean):
        z, W, b = (t.detach().requires_grad_() for t in (z, W, b))
        return torch.autograd.grad(model_loss(z, W, b, y, mean), [z, W, b])

    batches = [Batch.of(3, 5, 4, device=backend.device) for _ in range(2)]
    first, other = ((b.z, b.W, b.b, b.y, b.z[0]) for b in batches)
    torch.testing.assert_close(make_fx(step)(*first)(*other), step(*other), rtol=1e-5, atol=1e-6)


def test_compiled_criterion(backend):
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).to(backend.device)
    criterion = ood_fast.ELogitNormLoss(model[2])
    x, y = torch.randn(5, 4, device=backend.device), torch.tensor([0, 1, 2, -100, 0], device=backend.device)

    def step(x, y):
        return criterion(model(x), y)

    expected = torch.autograd.grad(step(x, y), list(model.parameters()))
    compiled = torch.autograd.grad(
        torch.compile(step, fullgraph=True, backend="aot_eager")(x, y), list(model.parameters())
    )
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_reach_the_distances(backend):
    """Forward and backward inside autocast give what they give outside on the same logits: no product drops to bf16."""
    batch = Batch.of(6, 5, 64, device=backend.device)
    results = []
    for enabled in (False, True):
        logits, W = batch.logits.detach().requires_grad_(), batch.W.detach().requires_grad_()
        with torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = ood_fast.elogitnorm(logits, None, W, None, batch.y)
            results.append([loss.detach(), *torch.autograd.grad(loss, [logits, W])])
    for inside, outside in zip(results[1], results[0], strict=True):
        assert torch.equal(inside, outside)


def test_matmul_precision_does_not_reach_the_distances(backend):
    batch = Batch.of(70, 65, 64, device=backend.device)
    results = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            logits, W = batch.logits.detach().requires_grad_(), batch.W.detach().requires_grad_()
            loss = ood_fast.elogitnorm(logits, None, W, None, batch.y)
            results.append([loss.detach(), *torch.autograd.grad(loss, [logits, W])])
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# The choice of backend
# ----------------------------------------------------------------------------------------------------------------------


def test_backend_name():
    with ops.use_backend("auto"):
        assert ops.backend_name("cpu") == "eager"
        assert ops.backend_name("cpu", torch.float64) == "eager"
        assert ops.backend_name("cuda") == ("triton" if ops.has_triton() else "eager")
    with ops.use_backend("eager"):
        assert ops.backend_name("cuda") == "eager"
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of"), ops.use_backend("cuda"):
        pass


def test_kernels_really_run(backend):
    """The launch counter: the public functions, forward and backward, go through the kernels, or through none."""
    if not ops.has_triton():
        pytest.skip("triton is not installed")
    from ood_fast.kernels import launch

    launch.launches.clear()
    batch = Batch.of(5, 4, 3, device=backend.device)
    W = batch.W.requires_grad_()
    ood_fast.elogitnorm(batch.logits.requires_grad_(), batch.z, W, batch.b, batch.y).backward()
    ood_fast.logitnorm(batch.logits, batch.y).backward()
    ood_fast.boundary_distance(batch.logits, W).sum().backward()
    ood_fast.nci_score(batch.z, W, batch.b, batch.z.mean(0)).sum().backward()
    ran = set(launch.launches)
    if backend.name == "eager":
        assert not ran
    else:
        assert len(ran) >= 8, f"only {sorted(ran)} were launched"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("OOD_FAST_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


TRAIN_STEP = """
    import torch, ood_fast
    torch.manual_seed(0)
    f, W, y = torch.randn(6, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True), torch.arange(6) % 5
    loss = ood_fast.elogitnorm(f, None, W, None, y)
    loss.backward()
    score = ood_fast.nci_score(torch.randn(6, 4), W, None, torch.zeros(4))
    print(*[t.item() for t in (loss, f.grad.abs().sum(), W.grad.abs().sum(), score.sum())])
"""


@pytest.mark.skipif(not ops.has_triton(), reason="triton is not installed")
def test_environment_switch():
    """OOD_FAST_BACKEND=triton and TRITON_INTERPRET=1 send a fresh process through the kernels, to the same numbers."""
    plain = run_python(TRAIN_STEP)
    counted = (
        "    from ood_fast.kernels import launch\n    assert sum(launch.launches.values()) >= 5, launch.launches\n"
    )
    kernels = run_python(TRAIN_STEP + counted, OOD_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    assert plain.returncode == 0, plain.stderr
    assert kernels.returncode == 0, kernels.stderr
    values = [torch.tensor([float(v) for v in run.stdout.split()]) for run in (plain, kernels)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


def test_environment_switch_errors():
    unknown = run_python("import ood_fast.ops", OOD_FAST_BACKEND="tritn")
    assert "OOD_FAST_BACKEND: got 'tritn', expected one of auto, eager, triton" in unknown.stderr
    if ops.has_triton():
        not_interpreted = run_python(TRAIN_STEP, OOD_FAST_BACKEND="triton")
        assert "set TRITON_INTERPRET=1 before Python starts" in not_interpreted.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Private names of torch
# ----------------------------------------------------------------------------------------------------------------------

# What a torch would be that has renamed them; every other operator is found as ever.
WITHOUT = {
    "_are_functorch_transforms_active": "hide_from_import('_are_functorch_transforms_active')",
    "_get_dispatch_mode": "hide_from_import('_get_dispatch_mode')",
    "_functorch": "hide_from_import('_functorch')",
    "_linear_pointwise": "hide('_linear_pointwise')",
    "_embedding_bag_per_sample_weights_backward": "hide('_embedding_bag_per_sample_weights_backward')",
    "_current_level": "import ood_fast.ops.registration as own; own.FORWARD_LEVEL = 'gone'",  # torch itself needs it
}
# Of models that torch.compile made, looked up by name each time: tests/test_running.py has them under other names.
LOOKED_UP = {"_orig_mod", "_call_impl", "_compiled_call_impl", "_torchdynamo_orig_callable"}
HIDE = """
    import torch

    def hide(name):
        namespace, found = torch._ops._OpNamespace, torch._ops._OpNamespace.__getattr__

        def find(self, wanted):
            if wanted == name:
                raise AttributeError(name)
            return found(self, wanted)

        namespace.__getattr__ = find

    def hide_from_import(name):  # torch itself needs it afterwards
        kept = getattr(torch._C, name)
        delattr(torch._C, name)
        import ood_fast.ops
        setattr(torch._C, name, kept)
"""
LOSS_AND_SCORES = """
    import ood_fast
    from ood_fast.statistics import row_statistics
    torch.manual_seed(0)
    f, W, y = torch.randn(300, 200, requires_grad=True), torch.randn(200, 64, requires_grad=True), torch.arange(300) % 9
    z = torch.randn(300, 64)
    loss = ood_fast.elogitnorm(f, None, W, None, y)
    loss.backward()
    of_func = torch.func.grad(lambda f: ood_fast.elogitnorm(f, None, W, None, y))(f.detach())
    assert torch.equal(of_func, f.grad)
    kept = ood_fast.elogitnorm(f, None, W, None, y, reduction="none")
    (again,) = torch.autograd.grad(kept.mean(), f)
    torch.testing.assert_close(again, f.grad)
    linear = ood_fast.linear_elogitnorm(z, W, None, y)
    (of_linear,) = torch.autograd.grad(linear, W)
    names = ["max", "entropy", "projection"]
    statistics = row_statistics(names, f.detach(), z, W=W.detach(), mean=z.mean(0))
    numbers = [loss, f.grad.abs().sum(), W.grad.abs().sum(), linear, of_linear.abs().sum()]
    print(*[t.item() for t in numbers + [statistics[name].sum() for name in names]])
"""


@pytest.mark.parametrize("name", WITHOUT)
def test_a_private_name_of_torch_is_missed_by_nobody(name):
    """Without it `import ood_fast`, the loss and the scores work, and give the same numbers."""
    with_it, without = (run_python(HIDE + line + LOSS_AND_SCORES) for line in ("", f"    {WITHOUT[name]}\n"))
    assert with_it.returncode == 0, with_it.stderr
    assert without.returncode == 0, without.stderr
    values = [torch.tensor([float(v) for v in run.stdout.split()]) for run in (with_it, without)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


def test_every_private_name_of_torch_is_tested():
    """`ops/registration.py` is the one file that uses any (tests/house.py), and these are all of them."""
    source = Path(ood_fast.ops.registration.__file__).read_text()
    assert set(re.findall(r'"(_[a-z_]+)"', source)) - {"_backward"} == set(WITHOUT) | LOOKED_UP
