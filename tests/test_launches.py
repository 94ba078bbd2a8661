"""What launchers do, without running a kernel: tensors without data (device "meta") and a recorder of launches.

A host that waited for the device would need data, which there is none of: what passes here can be captured in a graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ood_fast
from ood_fast import ops, reference
from ood_fast.statistics import row_statistics

aot_compile = pytest.importorskip("aot_compile", reason="triton is not installed")
launch = pytest.importorskip("ood_fast.kernels.launch")
meta = aot_compile.meta

# The most programs of each axis of a grid, on NVIDIA.
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...], Any]]]:
    """(kernel, grid, what it would be compiled for) of every launch, none of which takes place."""
    grids: list[tuple[str, tuple[int, ...], Any]] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        grids.append((kernel.fn.__name__, grid, aot_compile.job_of(kernel, "sm_90", "", arguments, options)))

    for module in aot_compile.MODULES:
        for name, stand_in in (("launch", record), ("target_of", lambda tensor: "sm_90")):
            if callable(getattr(module, name, None)):
                monkeypatch.setattr(module, name, stand_in)
    with ops.use_backend("triton"):
        yield grids


def steps(n: int, c: int, m: int, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Any]]:
    """Each public function on (n, c, m), with its backward pass."""
    logits, z, W = (meta(*shape, dtype=dtype).requires_grad_() for shape in ((n, c), (n, m), (c, m)))
    b, y, mean = meta(c, dtype=dtype).requires_grad_(), meta(n, dtype=torch.int64), meta(m)
    grad = torch.autograd.grad
    return {
        "elogitnorm": lambda: grad(ood_fast.elogitnorm(logits, z, W, b, y), (logits, W)),
        "elogitnorm, none": lambda: grad(
            ood_fast.elogitnorm(logits, z, W, b, y, reduction="none"), (logits, W), meta(n)
        ),
        "linear_elogitnorm": lambda: grad(ood_fast.linear_elogitnorm(z, W, b, y), (z, W, b)),
        "logitnorm": lambda: grad(ood_fast.logitnorm(logits, y), logits),
        "boundary_distance": lambda: grad(ood_fast.boundary_distance(logits, W).sum(), (logits, W)),
        "nci_score": lambda: grad(ood_fast.nci_score(z, W, b, mean, logits).sum(), (z, W)),
        "nci_score, from features": lambda: ood_fast.nci_score(z.detach(), W.detach(), b.detach(), mean),
        "row_statistics": lambda: row_statistics(["max", "gen"], logits.detach()),
        "one process among two": lambda: aot_compile.run_shard(n, c, m, dtype),
    }


@pytest.mark.parametrize(
    "shape", [(96, 3_000_000, 64), (64, 10_000_000, 32), (3_000_000, 1000, 512), (70_000, 80_000, 8)]
)
@pytest.mark.parametrize("name", steps(2, 3, 4))
def test_no_grid_is_larger_than_a_gpu_takes(launched: list, shape: tuple[int, int, int], name: str) -> None:
    """Classes and samples go along axis x: the others end at 65,535 programs."""
    steps(*shape)[name]()
    assert launched
    assert [
        found for found in launched if any(k > most for k, most in zip(found[1], MOST_PROGRAMS, strict=False))
    ] == []


@pytest.mark.parametrize("name", [*steps(2, 3, 4)][:6])
def test_nothing_is_compiled_for_a_smaller_last_batch(launched: list, name: str) -> None:
    """A second or more for each kernel, in mid-epoch."""
    found = []
    for n in (4096, 1500):
        launched.clear()
        steps(n, 100, 512)[name]()
        found.append({job for *_, job in launched})
    assert found[0] == found[1]


class _Trace(TorchDispatchMode):
    """The names of all operators; what makes a tensor of a size that only data tells, or a number, would raise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(300, 10, 8), (9, 40, 8), (4096, 21841, 16)])
@pytest.mark.parametrize("name", steps(2, 3, 4))
def test_nothing_waits_for_the_device(launched: list, shape: tuple[int, int, int], name: str) -> None:
    """So a step can be captured in a CUDA graph."""
    step = steps(*shape)[name]
    with _Trace() as trace:
        step()
    assert launched
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
    assert [name for name in trace.names if any(f"aten.{wait}." in name for wait in waits)] == []


def test_without_a_c_compiler_the_cure_is_said() -> None:
    class Kernel:
        fn = test_nothing_waits_for_the_device

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            def run(*arguments: Any, **options: Any) -> None:
                raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

            return run

    with pytest.raises(RuntimeError, match=r"no C compiler.*install gcc.*OOD_FAST_BACKEND=eager"):
        launch.launch(Kernel(), (1,), torch.zeros(1), num_warps=1)


class _Compiled:
    """What Triton gives back for a kernel that it has compiled, and notes what it is launched with."""

    launch_metadata = None

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        self.ran: list[tuple] = []

    def run(self, *arguments: Any) -> None:
        self.ran.append(arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        assert len(grid) == 3
        return lambda *arguments: self.launched.append((grid, arguments))


class _Kernel:
    """A jitted function that notes what it is compiled for."""

    def __init__(self, handle: object) -> None:
        self.handle, self.compiled = handle, []
        self.fn = lambda: None  # a function of its own: handles are kept by it
        self.fn.__name__ = "kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(*arguments: Any, **options: Any) -> object:
            self.compiled.append(arguments)
            return self.handle

        return run


def test_a_kernel_is_launched_by_its_handle_only_where_it_is_the_same() -> None:
    """Compiled once for each class of its arguments that Triton tells apart; grids have three axes then."""
    kernel, tensor = _Kernel(_Compiled()), torch.zeros(32)
    compiled, handled = kernel.compiled, kernel.handle.launched
    different = [(tensor, size) for size in (1, 2, 16, 2**35, 2**35 + 1)]
    different += [(tensor[1:], 2), (tensor.half(), 2), (None, tensor, 2), (tensor, 2.0), (tensor, None)]
    for repeat in range(2):
        for arguments in different:
            launch.launch(kernel, (7,), *arguments, BLOCK=32, num_warps=1)
        assert len(compiled) == len(different)
        assert len(handled) == repeat * len(different)
    launch.launch(kernel, (3, 2), tensor, 6, BLOCK=32, num_warps=1)
    assert handled[-1] == ((3, 2, 1), (tensor, 6, 32))


def test_a_prepared_launch_is_by_its_handle_once_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past Triton's own way, which is left to Tritons that nobody looked at and to hooks of profilers."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_stream=lambda device: 7))
    kernel, tensor, hooks = _Kernel(_Compiled()), torch.zeros(32), triton.knobs.runtime.launch_exit_hook
    ours, theirs = kernel.handle.ran, kernel.handle.launched
    step = launch.StepLaunch(kernel, (3, 2), 6, BLOCK=32, num_warps=1)
    for _ in range(3):
        step(tensor, None, floats=(0.5,))
    assert kernel.compiled == [(tensor, None, 0.5, 6)]
    assert ours == 2 * [(3, 2, 1, 7, "function", "metadata", None, None, None, tensor, None, 0.5, 6, 32)]
    monkeypatch.setattr(hooks, "calls", [print])
    step(tensor, None, floats=(0.5,))
    assert theirs == [((3, 2, 1), (tensor, None, 0.5, 6, 32))]
    monkeypatch.setattr(hooks, "calls", [])
    monkeypatch.setattr(launch, "DIRECT", ())
    other = launch.StepLaunch(kernel, (3, 2), 6, BLOCK=32, num_warps=1)
    other(tensor)
    other(tensor)
    assert (len(ours), len(theirs)) == (2, 2)


def test_a_prepared_launch_is_for_tensors_of_one_kind() -> None:
    """In the interpreter, where whoever prepares a launch for others is found by all tests."""
    tensor = torch.zeros(32)
    for other in (None, tensor.half(), tensor[1:]):
        step = launch.StepLaunch(_Kernel(None), (3, 2), 6, BLOCK=32, num_warps=1)
        step(tensor, tensor)
        with pytest.raises(AssertionError, match="kernel: made for"):
            step(tensor, other)


@pytest.mark.parametrize("handle", [None, object()])
def test_a_triton_of_other_handles_is_asked_each_time(handle: object, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, tensor = _Kernel(handle), torch.zeros(32)
    step = launch.StepLaunch(kernel, (3,), 6, BLOCK=32, num_warps=1)
    for _ in range(3):
        step(tensor)
    assert kernel.compiled == [(tensor, 6)] * 3


def test_no_handle_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """There Triton compiles for memory of less than 2 GiB, too, which nothing here looks at."""
    monkeypatch.setattr(launch, "_HAS_HANDLES", False)
    kernel, tensor = _Kernel(_Compiled()), torch.zeros(32)
    step = launch.StepLaunch(kernel, (3,), 6, BLOCK=32, num_warps=1)
    step(tensor)
    step(tensor)
    assert len(kernel.compiled) == 2
    assert kernel.handle.launched == []


# ----------------------------------------------------------------------------------------------------------------------
# Through the interpreter
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(backend: Any) -> Iterator[Any]:
    """Fresh memory is filled with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield backend
    torch.use_deterministic_algorithms(False)


def _inputs(n: int, c: int, m: int, backend: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, W = 2 * torch.randn(n, c), torch.randn(c, m)
    return logits.to(backend.device), W.to(backend.device), torch.randint(c, (n,), device=backend.device)


def _layouts(matrix: Tensor) -> dict[str, Tensor]:
    rows, columns = matrix.shape
    shifted = matrix.new_zeros(matrix.numel() + 1)[1:].view(rows, columns).copy_(matrix)
    wide = matrix.new_zeros(rows, 2 * columns + 1)
    wide[:, ::2][:, :columns] = matrix
    return {
        "misaligned": shifted,
        "wider rows": torch.nn.functional.pad(matrix, (0, 3))[:, :columns],
        "column stride": wide[:, ::2][:, :columns],
        "transposed": matrix.t().contiguous().t(),
    }


@pytest.mark.parametrize("shape", [(7, 5, 4), (3, 9, 4)])
@pytest.mark.parametrize("layout", ["misaligned", "wider rows", "column stride", "transposed"])
def test_any_layout_and_no_unwritten_output(poisoned: Any, shape: tuple[int, int, int], layout: str) -> None:
    logits, W, y = _inputs(*shape, poisoned)
    found = []
    for f, w in ((logits, W), (_layouts(logits)[layout], _layouts(W)[layout])):
        f, w = f.detach().requires_grad_(), w.detach().requires_grad_()
        loss = ood_fast.elogitnorm(f, None, w, None, y)
        found.append((loss, *torch.autograd.grad(loss, (f, w))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)
    assert all(t.isfinite().all() for t in found[0])


def test_saved_tensors_that_come_back_as_others(backend: Any) -> None:
    """Hooks may hand a compact copy to the backward pass, as those do that keep them on the host."""
    logits, W, y = _inputs(7, 5, 4, backend)
    logits, W = _layouts(logits)["wider rows"].requires_grad_(), _layouts(W)["wider rows"].requires_grad_()
    loss = ood_fast.elogitnorm(logits, None, W, None, y)
    expected = torch.autograd.grad(loss, (logits, W))

    def compact(tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(compact, lambda tensor: tensor):
        loss = ood_fast.elogitnorm(logits, None, W, None, y)
    torch.testing.assert_close(torch.autograd.grad(loss, (logits, W)), expected, rtol=0, atol=0)


def test_rows_of_stride_0(poisoned: Any) -> None:
    logits, W, y = _inputs(6, 5, 4, poisoned)
    row = logits[:1].expand(6, 5)
    torch.testing.assert_close(
        ood_fast.elogitnorm(row, None, W, None, y), ood_fast.elogitnorm(row.contiguous(), None, W, None, y)
    )


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs in the order that nobody expects, and looks at every address."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, place = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    copied, inside = executor._init_args_hst, []

    def arguments(self: Any, *given: Any) -> tuple:
        found = copied(self, *given)
        tensors = [t for t in found[0] if isinstance(t, Tensor)]
        ends = [sum((n - 1) * by for n, by in zip(t.shape, t.stride(), strict=True)) + 1 for t in tensors]
        inside[:] = [(t.data_ptr(), t.data_ptr() + n * t.itemsize) for t, n in zip(tensors, ends, strict=True)]
        return found

    def check(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for address in pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist():
            assert any(begin <= address <= end - size for begin, end in inside)

    def load_checked(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def store_checked(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, values, mask, *rest)

    def last_first(self: Any, *index: int) -> None:
        place(self, *(size - 1 - i for size, i in zip(self.grid_dim, index, strict=True)))

    monkeypatch.setattr(executor, "_init_args_hst", arguments)
    monkeypatch.setattr(builder, "create_masked_load", load_checked)
    monkeypatch.setattr(builder, "create_masked_store", store_checked)
    monkeypatch.setattr(builder, "set_grid_idx", last_first)


@pytest.mark.parametrize(("shape", "reduction"), [((3, 2, 3), "mean"), ((2, 5, 3), "mean"), ((1, 2, 1), "none")])
def test_programs_in_any_order_within_their_tensors(
    shape: tuple[int, int, int], reduction: str, request: pytest.FixtureRequest
) -> None:
    """A GPU promises no order of the programs of a launch: the same bits, and no address outside the arguments."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the interpreter: a GPU has compute-sanitizer")
    n, c, m = shape
    inputs = torch.randn(n, m, requires_grad=True), torch.randn(c, m, requires_grad=True), torch.randn(m)
    found = []
    for _ in range(2):
        with ops.use_backend("triton"):
            z, W, mean = inputs
            logits, y = z.detach() @ W.detach().t(), torch.arange(n) % c
            loss = ood_fast.elogitnorm(logits.requires_grad_(), None, W, None, y, reduction=reduction)
            score = ood_fast.nci_score(z, W, None, mean)
            found.append((loss, score, *torch.autograd.grad(loss.sum() + score.sum(), (logits, z, W))))
        request.getfixturevalue("strict")
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6, 4, 3), (3, 5, 3)])
def test_rows_1e_20_apart_have_a_boundary(backend: Any, shape: tuple[int, int, int]) -> None:
    """The square of their distance is no normal float32."""
    logits, W, y = _inputs(*shape, backend)
    W = W * 1e-10
    W[1] = 0.0
    W[2] = 0.0
    W[2, 0] = 1e-20
    found = ood_fast.elogitnorm(logits, None, W, None, y, return_distance=True)
    expected = reference.elogitnorm(logits.double(), None, W.double(), None, y, return_distance=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_does_not_choose_another_dtype(backend: Any, reduction: str) -> None:
    """In and outside of autocast the same bits, and in the backward pass, which computes them again for "none"."""
    z, W = torch.randn(5, 4, device=backend.device), torch.randn(7, 4, device=backend.device)
    y = torch.randint(7, (5,), device=backend.device)
    found = []
    for enabled in (False, True):
        a, w = z.detach().requires_grad_(), W.detach().requires_grad_()
        with torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = ood_fast.linear_elogitnorm(a, w, None, y, reduction=reduction)
        found.append((loss, *torch.autograd.grad(loss.sum(), (a, w))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("c", [33_000, 66_000])
def test_more_elements_than_int32_counts(c: int) -> None:
    """n c > 2^31: the last rows are those of the same samples alone."""
    n = 2**31 // c + 2
    logits, W = torch.zeros(n, c, dtype=torch.bfloat16, device="cuda"), torch.randn(c, 8, device="cuda")
    logits[-3:] = torch.randn(3, c, device="cuda")
    y = torch.randint(c, (n,), device="cuda")
    with torch.no_grad():
        loss = ood_fast.elogitnorm(logits, None, W, None, y, reduction="none")
        alone = ood_fast.elogitnorm(logits[-3:], None, W, None, y[-3:], reduction="none")
    torch.testing.assert_close(loss[-3:], alone)


@pytest.mark.gpu
def test_side_stream() -> None:
    logits, W, y = (t.cuda() for t in (2 * torch.randn(64, 10), torch.randn(10, 8), torch.randint(10, (64,))))
    expected = ood_fast.elogitnorm(logits, None, W, None, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ood_fast.elogitnorm(logits, None, W, None, y)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
