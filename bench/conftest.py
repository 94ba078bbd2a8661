"""Fixtures of the benchmarks: the device, what a row measures, and what is written down about it.

A bench test asks for `measure` and calls it once:

    measure("NCI from logits", step, row="nci_score", counts="nci", prepare=functools.partial(prepare, case))

is a row "nci_score" of a table "NCI from logits, <case>": `step` is timed, the peak memory is that of the step that
`prepare(case)` makes, on a CPU in another process, and "nci" of bench/counts.py says what bytes and flops it needs.
`case` and `inputs` follow the three usual cases; a file with others defines a `case` fixture of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from . import counts as formulas
from .baselines import Row
from .cases import CASES, SHORT_NAMES, Case, Inputs, cases, machine
from .measure import DeviceTimer, Prepare, ceilings, environment, gpu_state, input_sets, peak_megabytes, synchronizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMER = DeviceTimer()
# Four minutes for everything, set-up included. The plugin's own calibration fixes the number of rounds by the
# fastest call: on a busy machine one row then took 38 s. A cap on the rounds bounds it.
SECONDS_A_ROW = 0.2
MOST_ROUNDS = 100
LONG_STEP = 0.25  # seconds: such a step is timed in 3 rounds, above four times that once; shorter ones in 5 at least
# ‖actual − truth‖ / ‖truth‖ of the loss and of each gradient, beyond which no ratio is reported. The tests of the
# package are far stricter: this one tells that the right thing was timed.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
LEFT_OUT: list[dict[str, str]] = []


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One thing at a time: it is timed."""
    return 0


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return DEVICE


@pytest.fixture(scope="module", params=[case.on(DEVICE) for case in CASES], ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def over(which: Sequence[Case]) -> dict[str, Any]:
    """Arguments of a `case` fixture over other cases, each in its dtypes: `@pytest.fixture(**over(DENSE))`."""
    return {
        "scope": "module",
        "params": cases(tuple(which), DEVICE),
        "ids": lambda case: f"{case.name}-{SHORT_NAMES[case.dtype]}",
    }


@pytest.fixture(scope="module")
def inputs(case: Case, device: torch.device) -> Inputs:
    return Inputs.of(case, device)


Measure = Callable[..., None]


@pytest.fixture
def measure(benchmark: Any, case: Case, device: torch.device) -> Measure:
    """measure(what, step, …): time `step()` to the end of its work on the device, in the table of `what` for this case.

    `step` may be a list of steps that do the same with other inputs: a GPU takes turns with them. `row` names the line;
    `counts` names an operation of bench/counts.py, or is what it counts; `prepare` makes the step of which the peak
    memory is measured, or says why there is none; `error` is what a comparison with float64 gave, or the function of
    what the step returns that compares; `once` is how many seconds the step took if it has run. Every further keyword
    is written down as it is.
    """

    def measure(
        what: str,
        step: Callable[[], Any] | Sequence[Callable[[], Any]],
        *,
        row: str,
        counts: str | formulas.Counts,
        prepare: Prepare | str,
        error: float | Callable[[Any], float] | None = None,
        distinct: int | None = None,
        once: float = 0.0,
        **more: object,
    ) -> None:
        steps = [step] if callable(step) else list(step)
        if isinstance(counts, str):
            counts = formulas.operation(counts, formulas.Sizes.of(case.shape, case.dtype, distinct))
        if isinstance(prepare, str):
            more["no_peak"] = prepare
        else:
            more["peak_MB"] = None if benchmark.disabled else peak_megabytes(prepare, device)
        benchmark.group = f"{what}, {case}"
        benchmark.extra_info.update(
            what=what,
            row=row,
            case=case.name,
            n=case.n_samples,
            c=case.n_classes,
            m=case.n_features,
            dtype=SHORT_NAMES[case.dtype],
            distinct_predictions=distinct,
            **counts._asdict(),
            device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(),
            threads=torch.get_num_threads(),
            machine=machine(),
            torch=torch.__version__,
            **more,
        )
        returned = _time(benchmark, steps, device, once)
        error = error(returned) if callable(error) else error
        correct = None if error is None else error <= TOLERANCE[case.dtype]
        benchmark.extra_info.update(error=error, correct=correct)
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info.update(_rates(counts, benchmark, case.dtype, device))
        if correct is False:
            pytest.fail(
                f"{benchmark.group}: {row}: error {error:.1e} > {TOLERANCE[case.dtype]:.0e}; no ratio is reported"
            )

    return measure


def _time(benchmark: Any, steps: list[Callable[[], Any]], device: torch.device, once: float) -> Any:
    """Warm-up, then rounds. Kernels are compiled and buffers made before the clock runs. What a step returned.

    `once`: seconds of a warm-up that has been.
    """
    synchronize = synchronizer(device)
    if benchmark.disabled:  # --benchmark-disable: once, to see that it runs
        returned = benchmark(steps[0])
        synchronize()
        return returned
    launched = once
    if once < LONG_STEP or device.type != "cpu":
        launched, once = _seconds(steps[0], synchronize)
    if once < LONG_STEP:  # a longer one has had its warm-up
        for step in steps:
            step()
        launched, once = _seconds(steps[0], synchronize)
    TIMER.reset(wait=launched)
    at_least = 5 if once < LONG_STEP else 3 if once < 4 * LONG_STEP else 1
    rounds = min(max(int(SECONDS_A_ROW / once), at_least), MOST_ROUNDS)
    turn = iter(range(rounds + 1))
    return benchmark.pedantic(lambda: steps[next(turn) % len(steps)](), rounds=rounds, warmup_rounds=0)


def _seconds(step: Callable[[], Any], synchronize: Callable[[], None]) -> tuple[float, float]:
    """How long the call takes to return, and to be done."""
    start = time.perf_counter()
    step()
    launched = time.perf_counter() - start
    synchronize()
    return launched, time.perf_counter() - start


def _rates(needed: formulas.Counts, benchmark: Any, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What was achieved of bytes and flops, and that as a share of what this machine can do at best."""
    most = ceilings(str(device))
    seconds = benchmark.stats.stats.median
    product = most[SHORT_NAMES[dtype]]
    return {
        "GB_per_s": needed.bytes / seconds / 1e9,
        "GFLOP_per_s": needed.flops / seconds / 1e9,
        "share_of_ceiling": needed.floor(most["copy"] * 1e9, product * 1e9) / seconds,
    }


@pytest.fixture
def leave_out() -> Callable[[str, Case, str, str | None], None]:
    """leave_out(what, case, row, reason): skip, and write the reason where the row would have stood."""

    def leave_out(what: str, case: Case, row: str, reason: str | None) -> None:
        if reason is not None:
            LEFT_OUT.append({"group": f"{what}, {case}", "what": what, "case": case.name, "row": row, "reason": reason})
            pytest.skip(f"{what}, {case}: {row}: {reason}")

    return leave_out


def relative_error(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest ‖actual − truth‖ / ‖truth‖; infinity for NaN, so that it never passes."""
    worst = 0.0
    for a, t in zip(actual, truth, strict=True):
        error = torch.linalg.vector_norm(a.detach().double() - t) / torch.linalg.vector_norm(t).clamp_min(1e-300)
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


@functools.lru_cache(maxsize=2)
def _truth(truth: Callable[[Inputs], Tensor], wants: tuple[str, ...], case: Case, samples: int | None) -> list[Tensor]:
    row = Row("", truth, wants, "", truth)
    x = Inputs.of(case, DEVICE, with_logits=row.reads_logits)
    x = x if samples is None else x.first(samples)
    return row.true_step(x.double())


@pytest.fixture
def measure_row(case: Case, device: torch.device, measure: Measure, leave_out) -> Callable[..., None]:
    """measure_row(what, row, x, forward, samples): compare the row with float64, on its first samples only if `samples`
    says so, then measure its time and its memory."""

    def measure_row(what: str, row: Row, x: Inputs, *, forward: bool = False, samples: int | None = None) -> None:
        leave_out(what, case, row.name, row.left_out(case, device))
        start = time.perf_counter()
        actual = row.step(x if samples is None else x.first(samples))
        once = time.perf_counter() - start if samples is None and not forward else 0.0
        truth = _truth(row.truth, row.wants, case, samples)
        error = relative_error(*((values[:1] for values in (actual, truth)) if forward else (actual, truth)))
        del actual
        run = row.forward if forward else row.step
        measure(
            what,
            [functools.partial(run, one) for one in input_sets(x, device)],
            row=row.name,
            counts=f"{row.counts} forward" if forward else row.counts,
            error=error,
            once=once,
            prepare=functools.partial(row.prepare, case, device, forward),
            distinct=x.distinct_predictions,
        )

    return measure_row


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """No row without bytes, flops and peak memory, or why there is none; with --benchmark-disable too."""
    result = yield  # raises for a test that was skipped
    if "benchmark" in getattr(item, "funcargs", ()):
        found = item.funcargs["benchmark"].extra_info
        missing = [name for name in ("bytes", "flops", "peak_MB") if name not in found]
        if set(missing) - ({"peak_MB"} if "no_peak" in found else set()):
            pytest.fail(f"{item.nodeid}: a row without {', '.join(missing)}: measure it with the fixture `measure`")
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Narrow tables, unless other columns are asked for. No mean: it tells what else the machine had to do."""
    config.option.benchmark_columns = config.option.benchmark_columns or ["min", "median", "iqr", "rounds"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU its own clock, for every benchmark that does not bring another."""
    if DEVICE.type == "cuda":
        for item in items:
            if "benchmark" in getattr(item, "fixturenames", ()) and item.get_closest_marker("benchmark") is None:
                item.add_marker(pytest.mark.benchmark(timer=TIMER))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["environment"] = environment()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """What bench/report.py reads besides the rows: this machine's ceilings, what was left out, the last clocks."""
    output_json["ceilings"] = ceilings(str(DEVICE)) if benchmarks else {}
    output_json["left_out"] = LEFT_OUT
    if DEVICE.type == "cuda":
        output_json["gpu_state_at_end"] = gpu_state()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the tables leave out, and on what they were measured."""
    # What does not fit is said for each case, what this machine does not have once.
    for reason in dict.fromkeys(
        f"{entry['group']}: {entry['row']}: {entry['reason']}"
        if entry["reason"].startswith("out of memory")
        else f"{entry['row']}: {entry['reason']}"
        for entry in LEFT_OUT
    ):
        terminalreporter.write_line(f"left out: {reason}")
    said = {f"{entry['group']}: {entry['row']}: {entry['reason']}" for entry in LEFT_OUT}
    reasons = (report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    for reason in dict.fromkeys(reason for reason in reasons if reason not in said):
        terminalreporter.write_line(f"left out: {reason}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    terminalreporter.write_line(
        f"measured with torch {torch.__version__} on {device}, {torch.get_num_threads()} threads, {machine()}"
    )
