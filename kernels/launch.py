"""How kernels are launched: shapes of blocks from the sizes and the target, each threshold with its reason, and a
counter of launches.

Registers and shared memory behind the thresholds were read from ahead-of-time compilation for sm_80, sm_90, sm_100
and gfx942 (``tests/test_kernels_aot.py``; the table is in ``README.md``). Nothing here imports Triton.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# How often each kernel was launched, by the name of its function. Tests read it to prove that the kernels ran.
launches: Counter[str] = Counter()

# Logits of one chunk of the form without logits. 2^26 are 128 MiB in bf16, 640 MiB with their gradient and the
# distances: little on a GPU, and the matrix products of a chunk still have hundreds of rows at 100,000 classes.
LINEAR_LOGIT_ELEMENTS = 1 << 26


NO_COMPILER = (
    "ood_fast: Triton found no C compiler, which it needs to launch kernels; install gcc (or name one by the "
    "environment variable CC), or choose the slower PyTorch path: OOD_FAST_BACKEND=eager"
)


# Compiled kernels by what their code depends on. Triton's own way to the same takes 10 to 17 us a launch, this one 5.
# Not on ROCm: there Triton also looks at how large the memory behind each pointer is.
_handles: dict[tuple, Any] = {}
_HAS_HANDLES = torch.version.hip is None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 2, **constants: Any
) -> Any:
    """Run `kernel` on `grid`, on the device of its tensors, and count it. `constants` come in the kernel's order.

    Returns the compiled kernel where it may be launched again with arguments of the same classes, otherwise None.
    `enable_fp_fusion` is set because Triton 3.9 warns where it is not and 3.10 changes the default: with it, a
    product and the sum that follows round once, in every version.
    """
    key = [kernel.fn, num_warps, num_stages, *constants.values()]
    append, device = key.append, None
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or isinstance(argument, Tensor):
            if device is None:
                device = argument.device
            append(argument.dtype)
            append(argument.data_ptr() & 15 == 0)
        elif kind is int:  # its class, as Triton tells them apart: 1, multiples of 16, 64 bits
            append(-1 if argument == 1 else (argument & 15 == 0) + 2 * (-(2**31) <= argument < 2**31))
        else:
            append(kind)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, whatever the tensors' device is
            return launch(kernel, grid, *arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    launches[kernel.fn.__name__] += 1
    append(device.index)
    key = tuple(key)
    handle = _handles.get(key)
    if handle is not None:
        handle[(*grid, 1, 1)[:3]](*arguments, *constants.values())
        return handle
    try:
        handle = kernel[grid](
            *arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
        )
    except RuntimeError as error:
        if "C compiler" in str(error):  # Triton compiles a launcher in C for each kernel that it meets
            raise RuntimeError(NO_COMPILER) from error
        raise
    if not _HAS_HANDLES or not hasattr(handle, "launch_metadata"):  # interpreted, or of another Triton
        return None
    _handles[key] = handle
    return handle


# Those whose `CompiledKernel.run` takes (*grid, stream, function, packed metadata, launch metadata, hooks, *arguments).
# Their `handle[grid]` makes launch metadata each time, for hooks of profilers, and has the launcher call these though
# there are none: two thirds of what a launch takes in Python.
DIRECT = ("3.5", "3.6", "3.7", "3.8")


def _direct(handle: Any, grid: tuple[int, int, int], device: int | None) -> Callable:
    """handle[grid] without metadata or hooks, unless somebody hooks in."""
    import triton

    if triton.__version__.rpartition(".")[0] not in DIRECT:
        return handle[grid]
    knobs, stream_of = triton.knobs.runtime, triton.runtime.driver.active.get_current_stream
    run, function, metadata = handle.run, handle.function, handle.packed_metadata

    def launched(*arguments: Any) -> None:
        if knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls:
            handle[grid](*arguments)
        else:
            run(*grid, stream_of(device), function, metadata, None, None, None, *arguments)

    return launched


class StepLaunch:
    """A launch but for its tensors and floats, for the kernels of a training step: in a small one the host is what
    takes time. They have their pointers first, then floats, then whole numbers.

    It is made once (`prepared`), and its tensors are looked at once: they are always of the same kinds (`kinds_of`).
    Those of a step are its inputs, by whose kinds its `Layout` is found, and what it makes itself: fresh memory, parts
    of it that begin on 16 bytes, and None where the name of the step says so. Launches without a handle, as all in the
    interpreter, look each time whether that is so.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: int, **options: Any) -> None:
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        constants = (value for name, value in options.items() if name not in ("num_warps", "num_stages"))
        self._rest, self._name = (*numbers, *constants), kernel.fn.__name__
        self._run: Callable | None = None
        self._kinds: tuple | None = None
        self._device: int | None = None

    def __call__(self, *tensors: Tensor | None, floats: tuple[float, ...] = ()) -> None:
        """Launch it on the device of the first tensor."""
        if self._run and (self._device is None or self._device == torch.cuda.current_device()):
            launches[self._name] += 1
            self._run(*tensors, *floats, *self._rest)
            return
        kinds = kinds_of(*tensors)
        assert self._kinds in (None, kinds), f"{self._name}: made for {self._kinds}, launched with {kinds}"
        self._kinds, self._device = kinds, kinds[0]
        handle = launch(self.kernel, self.grid, *tensors, *floats, *self.numbers, **self.options)
        if handle is not None:
            self._run = _direct(handle, (*self.grid, 1, 1)[:3], self._device)


# For functions that make a `StepLaunch`, or what else follows from a `Layout`: of the last so many.
prepared = functools.lru_cache(maxsize=1024)


def kinds_of(*tensors: Tensor | None) -> tuple:
    """What Triton compiles for, of each tensor: its dtype and whether it lies on 16 bytes; the device of the first."""
    kinds = [tensors[0].device.index]
    for tensor in tensors:
        kinds.append(None if tensor is None else (tensor.dtype, tensor.data_ptr() & 15 == 0))
    return tuple(kinds)


class Layout:
    """Sizes, strides and target of (n, c) logits and their (c, m) head, and the kinds of these and of all other inputs
    of a step: what all its launches follow from. Equal ones are one object (`layout_of`), by whose identity what is
    `prepared` is found. `n_rows` of the table, for the classes of one process among many."""

    def __init__(
        self,
        step: str,
        target: str,
        kinds: tuple,
        shape: tuple[int, int],
        strides: tuple[int, int],
        weight_shape: tuple[int, int] = (0, 0),
        weight_strides: tuple[int, int] = (0, 0),
        n_rows: int | None = None,
    ) -> None:
        self.step, self.target, self.kinds, self.shape, self.stride = step, target, kinds, shape, strides[0]
        self.weight_dtype = kinds[2] and kinds[2][0]
        self.weight_shape, self.weight_stride = weight_shape, weight_strides[0]
        self.n_samples, self.n_classes = shape
        self.is_shard = n_rows is not None
        self.by_row = self.is_shard or self.n_samples < self.n_classes  # a table row for each distinct prediction
        self.n_rows = min(shape) if n_rows is None else n_rows
        self.width = 16 * cdiv(self.n_classes, 16)  # of the rows of S: whole 128-bit loads
        self.boost = boost_of(*shape)


layout_of = prepared(Layout)


def laid_out(step: str, logits: Tensor, head_weight: Tensor, *others: Tensor | None) -> tuple[Layout, Tensor, Tensor]:
    """(the layout of a step, logits and W with unit strides). `others`: all else that its launches are given from
    outside; `step`, a name for it, says what they are given beside, and which outputs are None."""
    rows, weight = unit_stride(logits), unit_stride(head_weight)
    kinds, target = kinds_of(rows, weight, *others), target_of(rows)
    layout = layout_of(step, target, kinds, rows.shape, rows.stride(), weight.shape, weight.stride())
    return layout, rows, weight


def boost_of(n_samples: int, n_classes: int) -> float:
    """A slope is divided by the number of classes, its gradient by that of the samples: without the product of both, a
    power of two, the squares of distances of 1e-15 would take it out of the range."""
    return float(next_power_of_2(n_samples * n_classes))


@functools.cache
def _cuda_target(device_index: int) -> str:
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"


def target_of(tensor: Tensor) -> str:
    """What the kernels on this tensor run on: "sm_90", "hip", ... or "interpreter" for a tensor that is on no GPU."""
    if tensor.device.type != "cuda":
        return "interpreter"
    return _cuda_target(tensor.device.index)


def unit_stride(matrix: Tensor) -> Tensor:
    """The matrix itself where its columns are neighbours in memory (rows may lie anywhere); otherwise a contiguous
    copy.

    Any op that reads a transposed matrix row by row pays for the strided reads; one copy pays once.
    """
    return matrix if matrix.stride()[-1] == 1 else matrix.contiguous()


def packed(record: Any) -> Any:
    """A record whose tensors are contiguous: what hooks of saved tensors give back need not lie as it lay."""
    return type(record)(
        *(t.contiguous() if isinstance(t, Tensor) else packed(t) if isinstance(t, tuple) else t for t in record)
    )


def gradient_buffer(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Where a kernel writes the gradient of `like`: in its dtype, or in `dtype`, rounded once, at the store.

    Triton's interpreter truncates fp32 to bf16 instead of rounding, so there PyTorch rounds afterwards.
    """
    dtype = dtype or like.dtype
    truncates = dtype == torch.bfloat16 and target_of(like) == "interpreter"
    return torch.empty(shape, dtype=torch.float32 if truncates else dtype, device=like.device)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def lanes_of(target: str) -> int:
    """Threads of a warp: a wavefront of gfx942 has 64."""
    return 64 if target == "hip" else 32


@functools.cache
def has_exp2(target: str) -> bool:
    """Whether `rows.exp2` and `rows.log2` may name NVIDIA's instructions."""
    return target.startswith("sm_")


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is no less than n."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def alignment(*counts: int) -> int:
    """The largest of 8, 4, 2, 1 that divides every count: given to a kernel as ALIGN, it lets loads and stores be
    128 bits wide.

    Triton sees by itself only whether an argument is a multiple of 16, and c = 1000 is not: every load would be scalar.
    (In a kernel, `c // ALIGN * ALIGN` tells the compiler what it needs. 8 elements are 128 bits in half precision.)
    """
    return next(align for align in (8, 4, 2, 1) if all(count % align == 0 for count in counts))


@dataclass(frozen=True)
class RowConfig:
    """One program a row of `n_columns`: the row at once (`looped` False), or `block` columns at a time."""

    block: int
    looped: bool
    num_warps: int


# At 8192 columns and 8 warps a thread has 32 columns and no target spills; at 16384 both directions spill on sm_80,
# sm_90 and sm_100. So longer rows are looped.
ROW_IN_REGISTERS = 8192
# Columns of a turn of the looped form: 4 warps with 8 columns a thread, so that several programs fit a multiprocessor
# and one computes while another waits for memory. With 2048, Triton 3.8 spills 8 bytes in bf16 on sm_100.
ROW_LOOP_BLOCK = 1024


@functools.cache
def row_config(n_columns: int, target: str) -> RowConfig:
    """For kernels that give every row a program.

    A thread has 32 columns: the fewer warps a row has, the fewer times each reduction is issued, and instructions are
    what bounds these kernels (up to 1024 columns one warp, no shared memory, no barrier).
    """
    if n_columns > ROW_IN_REGISTERS:
        return loop_config(n_columns, target)
    # 32 columns at least: one a lane. Narrower blocks only repeat the same column over the lanes.
    block = max(next_power_of_2(n_columns), 32)
    return RowConfig(block, False, max(block // (32 * lanes_of(target)), 1))


@functools.cache
def loop_config(n_columns: int, target: str) -> RowConfig:
    """8 columns a thread, since a lane keeps up to five running sums for each of its columns."""
    block = min(max(next_power_of_2(n_columns), 32), ROW_LOOP_BLOCK)
    return RowConfig(block, True, max(block // (8 * lanes_of(target)), 1))


@dataclass(frozen=True)
class ScanConfig:
    """One program a row that only scans it for its maximum, `block` columns at a time whatever its length."""

    block: int
    num_warps: int


@functools.cache
def scan_config(n_columns: int, target: str) -> ScanConfig:
    """16 columns a thread, at most 4096 a turn: the fewer warps, the fewer times each of the reductions is issued, and
    two 128-bit loads a thread are enough in flight."""
    block = min(max(next_power_of_2(n_columns), 32), 4096)
    return ScanConfig(block, min(max(block // (16 * lanes_of(target)), 1), 8))


def feature_block(n_features: int, num_warps: int, target: str) -> int:
    """Features of a turn, for the kernels that sum over a row of them: 8 a thread, one 128-bit load in half precision,
    because each of up to four sums has a register for each."""
    return max(min(next_power_of_2(n_features), 8 * lanes_of(target) * num_warps), 32)


@dataclass(frozen=True)
class TileConfig:
    """A tile of a matrix product: `rows` x `columns` results, `inner` of the summed dimension at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    precision: str


def dot_precision(target: str) -> str:
    """How fp32 operands are multiplied: never by a single TF32 product, whose 11 bits would ruin a difference of
    weight rows.

    "tf32x3" (three TF32 products on tensor cores, 22 bits) where there are TF32 tensor cores, else plain fp32
    multiply-adds: gfx942 does not compile tf32x3, and before sm_80 there is no TF32.
    """
    return "tf32x3" if target.startswith("sm_") and int(target[3:]) >= 80 else "ieee"


@functools.cache
def tile_config(target: str, exact: bool = False, columns: int = 64) -> TileConfig:
    """Two stages: the next operands load while these multiply (a third would pass 64 KiB of shared memory on gfx942).

    Chosen for each target, by what its compiled code issues; tf32x3 keeps each operand twice.
    sm_90: a warp group multiplies 64 rows, and two groups on the same 64 would each do two of the three products in
    full (20 instructions for 12), so 8 warps have 128 x 64 results.
    sm_100: its 8 warps issue 12 for 12 at 64 x 64; with 4 warps, or 128 x 64, fp32 spills.
    sm_80 and others: the operands lie in registers: turns of 16.
    gfx942: plain multiply-adds, 4 wavefronts.
    `exact` (bf16): one or two products for three, without conversion: longer turns, and `columns` where there are
    registers for 128.
    """
    precision = dot_precision(target)
    if precision == "ieee":
        return TileConfig(64, 64, 32, num_warps=4, num_stages=2, precision=precision)
    generation = int(target[3:]) // 10
    if exact and generation == 9:
        return TileConfig(128, columns, 64, num_warps=8, num_stages=3, precision="ieee")
    rows, inner = 128 if generation == 9 else 64, 32 if generation >= 9 or exact else 16
    return TileConfig(rows, 64, inner, num_warps=8, num_stages=2, precision="ieee" if exact else precision)


# Tiles of the product that sums over all classes for the few rows of distinct predictions: with 64 rows and m = 512
# there are 8, for 132 multiprocessors. The classes are therefore cut into splits until there are about this many
# programs (two to four for each multiprocessor of an H100 or MI300), as long as a split has at least 8 turns of
# `inner` classes to amortise its result.
SPLIT_PROGRAMS = 512
SPLIT_TURNS = 8


def class_splits(n_tiles: int, n_classes: int, inner: int) -> int:
    """How many splits the classes of the "own rows" product are cut into."""
    return max(1, min(cdiv(SPLIT_PROGRAMS, n_tiles), n_classes // (inner * SPLIT_TURNS)))


@dataclass(frozen=True)
class SegmentConfig:
    """Segmented sum: a program has `columns` columns and reads `samples` rows at a time."""

    samples: int
    columns: int
    num_warps: int


# Samples of a segment that one program adds. Where every sample predicts one class, a segment is the whole batch:
# it is cut into pieces of this many, so the longest chain of additions is PIECE / samples turns, then n / PIECE
# pieces.
PIECE = 128
# Up to so many, each program of a segmented sum finds its samples itself: for a small step, a sort and what follows
# from it are ten calls of the host. The longest chain is then SCAN_SAMPLES / samples turns.
SCAN_SAMPLES = 512


# Values of a program that scales them. Most find a factor of 1 and end: so they are few.
SCALE_BLOCK = 4096


@functools.cache
def segment_config(n_columns: int, n_samples: int, n_segments: int) -> SegmentConfig:
    """8 rows in flight hide the latency of rows that lie anywhere in memory. 128 columns are one 128-bit load a
    lane in float32, and 8 values a thread; with 256, sm_100 spills.

    Segments of a sample or two, as of a batch with fewer samples than classes, would leave seven of the eight empty:
    one at a time, and sixteen times the columns, since half of what a program of 1024 issues comes before its sums.
    """
    if n_samples < 4 * n_segments:
        return SegmentConfig(1, min(max(next_power_of_2(n_columns), 32), 2048), num_warps=4)
    return SegmentConfig(8, min(max(next_power_of_2(n_columns), 32), 128), num_warps=4)


# Class splits of the features-only arg-max: as SPLIT_PROGRAMS, at least four tiles of classes a split.
def argmax_splits(n_row_tiles: int, n_class_tiles: int) -> int:
    """In how many parts the classes of a row are searched."""
    return max(1, min(cdiv(SPLIT_PROGRAMS, n_row_tiles), cdiv(n_class_tiles, 4)))
