"""The benchmarks' own arithmetic: counts, memory, errors, tables, and the script for a machine with a GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # where the package is not installed as an editable checkout
    sys.path.insert(0, str(ROOT))

from bench import baselines, cases, conftest, counts, gpu_smoke, kernel_times, latency, measure, report, scaling, static  # noqa: E402
from ood_fast import ops  # noqa: E402

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")


# ---- counts


def test_counts_by_hand():
    """n = 2 < c = 3, m = 4, fp32: every number worked out on paper."""
    sizes = counts.Sizes.of((2, 3, 4), torch.float32)
    assert counts.of("predict", sizes) == (4 * 6, 24)
    assert counts.of("distance_gram", sizes) == (4 * (2 + 3) * 4 + 4 * 6, 2 * 2 * 3 * 4)
    assert counts.of("weight_gradient_all", sizes) == (24 + 48 + 32 + 48, 48)
    assert counts.of("head backward", sizes).flops == 4 * 24
    assert counts.operation("cross_entropy", sizes) == (3 * 24, 7 * 6)
    half = counts.Sizes.of((2, 3, 4), torch.bfloat16, u=1)
    assert counts.of("tempered_forward, ELogitNorm", half).bytes == 2 * 6 + 4 * 3
    assert counts.Counts(10.0, 100.0).floor(1.0, 50.0) == 10.0


def test_counts_of_detectors_by_hand():
    """n = 2, c = 3, m = 4, fp32, one prediction, 10 training features: W 48 bytes, features 32, logits 24."""
    sizes = counts.Sizes.of((2, 3, 4), torch.float32, u=1, N=10)
    every, largest = counts.operation("GEN", sizes), dataclasses.replace(sizes, M=2)
    assert every == counts.of("row_statistics, GEN", sizes) == (24, 15 * 6)
    assert counts.operation("GEN", largest) == (24, 7 * 6 + 8 * 2 * 2)
    assert counts.operation("MSP", sizes) == counts.operation("Energy", sizes) == (24, 42)
    assert counts.operation("MaxLogit", sizes) == (24, 24)
    assert counts.operation("Entropy", sizes) == (24, 60)
    assert counts.operation("FeatureNorm", sizes) == (32, 16)
    assert counts.operation("FDBD", sizes) == (24 + 12 + 32, 48 + 24)
    assert counts.operation("NCI", sizes) == (24 + 32 + 16, 24 + 64)
    assert counts.operation("BoundaryDistance", sizes) == (24 + 12, 48)
    assert counts.operation("Mahalanobis", sizes) == (32 + 64 + 48, 2 * 2 * 16 + 2 * 2 * 3 * 4)
    assert counts.operation("RMDS", sizes) == (32 + 2 * 64 + 48, 4 * 2 * 16 + 2 * 2 * 3 * 4)
    assert counts.operation("KNN", sizes) == (32 + 160, 2 * 2 * 10 * 4 + 24)
    assert counts.operation("NNGuide", sizes) == (24 + 32 + 160, 42 + 2 * 2 * 10 * 4 + 24)
    assert counts.operation("together", sizes) == (24 + 12 + 32 + 16, 22 * 6 + 10 * 8)


def test_every_row_has_counts():
    sizes = counts.Sizes.of((256, 1000, 64), torch.float32)
    for row in baselines.ALL:
        needed = counts.operation(row.counts, sizes)
        assert needed.bytes > 0
        assert needed.flops > 0
        if row.forward_only and row in baselines.LOSSES:
            forward = counts.operation(f"{row.counts} forward", sizes)
            assert 0 < forward.bytes < needed.bytes


def plain(cell: str) -> str:
    """A cell of the README without notes, dots and spaces."""
    cell = re.sub(r" \([^)]*\)", "", cell).partition(", and ")[0]
    return re.sub(r"[·\s]", "", cell) or "0"


def rendered(expression: str) -> str:
    expression = re.sub(r"ceil\(([^)]*)\)", r"⌈\1⌉", expression.replace("c*c", "c²").replace("m*m", "m²"))
    return re.sub(r"[*\s]", "", expression)


def test_kernels_readme_has_the_same_formulas():
    """Section 6 of kernels/README.md against `counts`, cell by cell; cells of words are skipped."""
    formulas = counts.KERNELS | counts.DETECTORS
    section = (ROOT / "kernels" / "README.md").read_text().partition("## 6.")[2].partition("## 7.")[0]
    compared, whole = 0, set()
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`(\w+)`", name)
        for kernel in names:
            if kernel in ("fused_row", "tempered_forward", "row_statistics"):
                kernel = f"{kernel}, {name.partition(', ')[2]}"
            if kernel not in formulas:
                continue
            for cell, expression in zip(cells, formulas[kernel], strict=True):
                words = re.search(r"[a-zA-Z]{4,}", plain(cell).replace("min(", "("))
                if words is None and "/" not in re.sub("⌈.*⌉", "", cell):
                    assert plain(cell) == rendered(expression), (
                        f"{kernel}: {cell} in the README, {expression} in counts"
                    )
                    compared += 1
                    whole |= {kernel} if kernel.startswith("row_statistics") or kernel in counts.DETECTORS else set()
    assert compared >= 54 + 3 * len(counts.DETECTORS)
    assert whole == {name for name in counts.KERNELS if name.startswith("row_statistics")} | counts.DETECTORS.keys()


# ---- inputs, errors, memory


def test_inputs_are_the_case():
    case = cases.CIFAR10
    assert case.on("cuda").n_samples > case.on("cpu").n_samples == 128
    x = cases.Inputs.of(case, CPU)
    assert (x.logits.shape, x.W.shape, x.z.shape) == ((128, 10), (10, 512), (128, 512))
    assert all(t.requires_grad and t.is_leaf for t in (x.logits, x.z, x.W, x.b))
    assert torch.equal(x.logits, cases.Inputs.of(case, CPU).logits)
    assert x.first(8).logits.shape == (8, 10)
    exact = x.double()
    assert exact.W.dtype == torch.float64
    assert torch.equal(exact.W.float(), x.W)
    assert x.distinct_predictions == 10


def test_relative_error_never_passes_nan():
    truth = [torch.ones(3, dtype=torch.float64)]
    assert conftest.relative_error([torch.ones(3)], truth) == 0.0
    assert conftest.relative_error([torch.tensor([1.0, 1.0, 2.0])], truth) == pytest.approx(3**-0.5)
    assert conftest.relative_error([torch.tensor([1.0, 1.0, torch.nan])], truth) == float("inf")


def test_literal_definition_is_left_out_by_arithmetic():
    row = baselines.ROWS["literal definition"]
    assert row.left_out(cases.CIFAR100, CPU) is None
    assert row.left_out(cases.IMAGENET, CPU).startswith("out of memory at 24.6 GB: 3 × 1000×1000×2048")
    distance = baselines.SCORES["D from logits"][1]
    assert distance.left_out(cases.IMAGENET, CPU).startswith("out of memory at 16.4 GB: 2 × 1000×1000×2048")


@pytest.mark.parametrize("what", baselines.SCORES)
def test_scores_agree_with_their_truth(what):
    """What bench/test_nci.py times: no gradients, and the right values."""
    case = cases.Case("small", 20, 7, 5)
    x = cases.Inputs.of(case, CPU)
    for row in baselines.SCORES[what]:
        (score,), (truth,) = row.step(x), row.true_step(x.double())
        assert not score.requires_grad
        assert conftest.relative_error([score], [truth]) < 1e-5, row.name
    assert (
        baselines.SCORES["D from logits"][1].left_out(cases.IMAGENET, CPU).startswith("out of memory at 16.4 GB: 2 ×")
    )


NOISE = 0.5  # MB: what each processor has counted is added up from time to time only


def step_that_takes(temporary: int, returned: int):
    """A step that has so many bytes more than it returns at its peak."""

    def step():
        result = torch.ones(returned, dtype=torch.uint8)
        torch.ones(temporary, dtype=torch.uint8)
        return {"result": result}

    step()
    return step


@on_linux
def test_peak_worker_ends_with_its_parent(tmp_path):
    """Also where the parent could not tell it: it holds half a gigabyte, and the output of the parent open."""
    script = """
import functools, os, torch
from bench import measure
measure.peak_megabytes(functools.partial(functools.partial, os.getpid), torch.device("cpu"))
print(*measure._worker()._processes, flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == -9, ended.stderr
    assert int(ended.stdout) > 1  # and run() has come back: the pipe is closed, so nobody holds it any more


@on_linux
@pytest.mark.slow
def test_peak_is_measured():
    """The definition keeps c × c × m numbers three times, which arithmetic knows; ours nothing of the kind."""
    literal, ours, forward, score = (
        measure.peak_megabytes(functools.partial(row.prepare, cases.CIFAR100, CPU, forward), CPU)
        for row, forward in (
            (baselines.ROWS["literal definition"], False),
            (baselines.ROWS["elogitnorm"], False),
            (baselines.ROWS["elogitnorm"], True),
            (baselines.SCORES["NCI from logits"][0], False),
        )
    )
    assert literal == pytest.approx(baselines.reference_bytes(cases.CIFAR100) / 1e6, rel=0.1)
    assert 0 <= forward <= ours + NOISE
    assert ours < 10
    assert 0 <= score < 10
    step = functools.partial(step_that_takes, 50_000_000, 30_000_000)
    again = [measure.peak_megabytes(step, CPU) for _ in range(3)]
    assert again == pytest.approx([50.0] * 3, abs=2 * NOISE), "what earlier steps have freed hides nothing"


def test_peak_is_not_told_where_memory_does_not_go_back(monkeypatch):
    """An allocator that keeps what is freed would give 0; a system without /proc gives no figure either."""
    resident = iter([0, 2**26])
    monkeypatch.setattr(measure, "_resident", lambda field: next(resident))
    measure._is_returned.cache_clear()
    assert measure._cpu_peak(lambda: pytest.fail("must not be prepared")) is None

    def none(field):
        raise FileNotFoundError

    monkeypatch.setattr(measure, "_resident", none)
    measure._is_returned.cache_clear()
    assert measure._cpu_peak(lambda: pytest.fail("must not be prepared")) is None
    measure._is_returned.cache_clear()


def test_every_row_can_be_sent_to_the_worker():
    for row in baselines.ALL:
        assert pickle.loads(pickle.dumps(row)) is row
    returned = {"a": torch.zeros(3), "b": [(torch.zeros(2, dtype=torch.float64), 1.0), None]}
    assert measure._bytes(returned) == 12 + 16


def test_device_timer_reads_events(monkeypatch):
    """0, then the time between two events; the sleep in front is longer than the launch, up to a limit."""
    slept = []

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 2.5
            self.at = Event.now

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    timer = measure.DeviceTimer()
    timer.reset(wait=1e-3)
    start = timer()
    assert (start, timer() - start) == (0.0, pytest.approx(2.5e-3))
    assert slept[0] == pytest.approx(2e-3 * timer.CYCLES_A_SECOND, rel=0.1)
    timer.reset(wait=1.0)
    timer()
    assert slept[1] == pytest.approx(timer.LONGEST * timer.CYCLES_A_SECOND, rel=0.1)


def test_kernel_times_by_name():
    events = [("predict_kernel", 1e-6), ("predict_kernel", 3e-6), ("predict_kernel", 2e-6), ("void cub::sort", 5e-6)]
    found = kernel_times.by_kernel(events, rounds=3)
    assert found["predict"] == {"launches": 1.0, "seconds": pytest.approx(2e-6)}
    assert found["torch"]["seconds"] == pytest.approx(5e-6 / 3)
    sizes = counts.Sizes.of((2, 3, 4), torch.float32)
    measured = {"predict": {"launches": 1, "seconds": 24e-9}} | {
        name: {"launches": 1, "seconds": 24e-9} for name in kernel_times.ROW_KERNELS[1:]
    }
    lines = {line["kernel"]: line for line in kernel_times.table(measured, sizes, {"copy": 2.0, "fp32": 1e6}, "fp32")}
    assert lines["predict"]["GB_per_s"] == pytest.approx(1.0)
    assert lines["predict"]["share_of_copy"] == pytest.approx(0.5)
    assert lines["row kernels, one read and one write"]["GB_per_s"] == pytest.approx(1.0)  # 48 bytes in 48 ns


def test_smoke_agrees_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_smoke", "--once", "--device", "cpu"])
    monkeypatch.setattr(gpu_smoke, "ONCE", ((33, 37, 19),))
    gpu_smoke.main()
    assert re.match(r"(\d+) of \1 agree", capsys.readouterr().out)


@pytest.mark.skipif(not ops.has_triton(), reason="triton is not installed")
def test_truth_has_the_logits_that_kernels_round():
    """Rounding changes one prediction of eight, which a truth without it would count as an error of an eighth."""
    case, row = cases.Case("near", 8, 1000, 16, dtype=torch.bfloat16), baselines.ROWS["linear_elogitnorm, detached"]
    with ops.use_backend("triton"):
        x = cases.Inputs.of(case, conftest.DEVICE, with_logits=False)
        exact = x.double()
        assert conftest.relative_error(row.step(x), row.true_step(exact)) <= conftest.TOLERANCE[torch.bfloat16]
    assert not torch.equal(exact.logits.argmax(1), (exact.z @ exact.W.T + exact.b).argmax(1))


# ---- scaling


def test_model_grows_as_it_says():
    constant = {"calls": 1.0, "element": 1e-3, "rate": 1e3}
    step = scaling.model(constant, "elogitnorm", (10, 1000, 8), 10) - 1.0
    assert step == pytest.approx(3 * 2 * 10 * 1000 * 8 / 1e3 + 10 * 1000 * 1e-3)
    detached = scaling.model(constant, "detached", (10, 1000, 8), 5) - 1.0
    assert detached == pytest.approx(2 * 5 * 1000 * 8 / 1e3 + 10 * 1000 * 1e-3)
    assert scaling.products("elogitnorm", (128, 10, 512)) == 2 * 2 * 10 * 10 * 512
    assert scaling.model(constant | {"rate": 1e30}, "elogitnorm", (128, 10, 512)) == pytest.approx(1.0 + 1280e-3)


def test_page_holds_the_committed_points():
    """docs/performance.md shows what scaling.json holds, word for word."""
    page = (ROOT / "docs" / "performance.md").read_text()
    (folder,) = re.findall(r"\]\((results/\S+)/scaling\.png\)", page)
    found = json.loads((ROOT / "bench" / folder / "scaling.json").read_text())
    between = page.partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert between.strip() == scaling.tables(found).strip()


# ---- the report


def entry(group: str, row: str, seconds: float, **extra) -> dict:
    info = {
        "row": row,
        "case": "Case",
        "n": 4,
        "c": 10,
        "m": 8,
        "dtype": "fp32",
        "correct": True,
        "error": 1e-7,
    } | extra
    return {
        "group": group,
        "name": f"test[{row}]",
        "stats": {"median": seconds, "iqr": 0.0, "rounds": 5},
        "extra_info": {"what": group.partition(",")[0]} | info,
    }


def document(*entries: dict, left_out: tuple[dict, ...] = ()) -> dict:
    environment = {"machine": "Test CPU", "device": "cpu", "threads": 2, "torch": "2.15", "commit": "abc"}
    return {
        "machine_info": {"environment": environment},
        "ceilings": {"copy": 20.0, "fp32": 100.0, "bf16": 200.0},
        "benchmarks": list(entries),
        "left_out": list(left_out),
    }


LOSS = "loss forward + backward, Case (4, 10, 8)"


def three_rows(**ours) -> list[dict]:
    rates = {"bytes": 2.5e6, "flops": 1.235e12, "GB_per_s": 1.0, "GFLOP_per_s": 0.5, "share_of_ceiling": 0.25}
    return [
        entry(LOSS, "elogitnorm", 3e-3, peak_MB=1.5, **rates, **ours),
        entry(LOSS, "F.cross_entropy", 1e-3, **rates),
        entry(LOSS, "F.linear (the head)", 4e-3, **rates),
    ]


def results_of(*documents: dict) -> report.Results:
    results = report.Results()
    for one in documents:
        results.add(one)
    return results


def test_ratios():
    reason = {"group": LOSS, "row": "literal definition", "reason": "out of memory at 9.9 GB: 3 × much, limit 1 GB"}
    absent = {"group": LOSS, "row": "Liger cross-entropy", "reason": "Liger's kernels run on a GPU only"}
    text = report.markdown(results_of(document(*three_rows(), left_out=(reason, absent))), "command", [])
    loss_line = next(line for line in text.splitlines() if line.startswith("| Case (4, 10, 8) fp32"))
    cells = [cell.strip() for cell in loss_line.strip("|").split("|")]
    assert cells[1:4] == ["1", "4", "3"]
    assert cells[7:10] == ["out of memory at 9.9 GB", "3.00", "0.50"]  # (3 − 1) / 4
    ours = next(line for line in text.splitlines() if line.startswith("| elogitnorm |"))
    assert [cell.strip() for cell in ours.strip("|").split("|")][3:] == [
        *("1.00", "3.00", "1.5", "2.5", "1,235", "1", "0.5", "25%", "1e-07")
    ]
    assert "| literal definition | out of memory at 9.9 GB: 3 × much" in text
    assert "Left out. Liger cross-entropy: Liger's kernels run on a GPU only." in text


def test_unsteady_times_are_marked():
    entries = three_rows()
    entries[0]["stats"]["iqr"] = 0.9e-3
    entries[2]["stats"]["rounds"] = 1
    text = report.markdown(results_of(document(*entries)), "", [])
    line = next(line for line in text.splitlines() if line.startswith("| Case (4, 10, 8) fp32"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert [cells[1], cells[2], cells[3], cells[8]] == ["1", "~4", "~3", "~3.00"]
    ours = next(line for line in text.splitlines() if line.startswith("| elogitnorm |"))
    assert "| ~3 | 0.9 | ~1.00 | ~3.00 |" in ours


@pytest.mark.parametrize("correct", [False, None])
def test_no_ratio_without_a_right_result(correct):
    """A wrong result, or one that nothing was compared with, keeps its time and loses every ratio."""
    results = results_of(document(*three_rows(correct=correct)))
    rows = {row["row"]: row for row in results.groups()[LOSS]}
    assert report.ratio(rows["elogitnorm"], rows["F.cross_entropy"]) is None
    assert report.extra_over_head(rows, "elogitnorm") is None
    assert report.ratio(rows["F.cross_entropy"], rows["F.linear (the head)"]) == 0.25
    lines = report.markdown(results, "", []).splitlines()
    header, line = (next(line for line in lines if line.startswith(start)) for start in ("| row |", "| elogitnorm"))
    assert "÷ ours" not in header, "nothing is left of this column"
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["÷ cross-entropy"] == ""
    assert ("wrong result" in line) == (correct is False)


def test_latency_table():
    group = "latency, Case (4, 10, 8)"
    cells = [
        entry(group, "NCI, ood_fast", 2e-3, detector="NCI", library="ood_fast", images=4, peak_MB=1.25),
        entry(group, "NCI, pytorch-ood", 8e-3, detector="NCI", library="pytorch-ood", images=4, peak_MB=3.0),
        entry(group, "NECO, ood_fast", 4e-3, detector="NECO", library="ood_fast", images=4),
        entry(group, "KNN, ood_fast", 4e-3, detector="KNN", library="ood_fast", images=4, correct=False),
        entry(group, "KNN, pytorch-ood", 8e-3, detector="KNN", library="pytorch-ood", images=4),
    ]
    text = report.markdown(results_of(document(*cells)), "", [])
    assert "| NCI | 0.5 | 2 | 4.00 | 1.2 | 3.0 |" in text
    assert "| NECO | 1 |  |  |  |  |" in text
    assert "| KNN | 1 | 2 |  |  |  |" in text
    assert "| NCI, ood_fast | 2 | 0.0e+00 | 1.2 | 1e-07 |" in text


def test_columns_without_figures_are_left_out_and_notes_stand_below():
    group = f"{latency.WITH_MODEL}, Case (4, 10, 8)"
    graph = entry(
        group, "graph", 1e-3, no_peak="a replay allocates nothing", bytes=5.0, flops=5e6, not_compared="it rounds"
    )
    text = report.markdown(results_of(document(graph)), "", [])
    assert "| row | ms | IQR | MB | GFLOP | error |\n" in text
    assert "| graph | 1 | 0.0e+00 | 5e-06 | 0.005 | 1e-07 |" in text
    assert report.NOTES[latency.WITH_MODEL] in text
    assert "No peak memory: a replay allocates nothing." in text
    assert "No ratio for graph: it rounds." in text


def test_ratios_measured_in_turns_are_shown():
    group = "scores from row statistics, Case (4, 10, 8)"
    right = entry(group, "all", 2e-3, ratio=1.5, ratio_to="GEN, the slowest alone")
    wrong = entry(group, "wrong", 2e-3, ratio=1.25, ratio_to="GEN", correct=False)
    text = report.markdown(results_of(document(right, wrong)), "", [])
    assert "| all (1.5 × GEN, the slowest alone, in turns) | 2 |" in text
    assert "1.25" not in text


def test_steps_are_timed_in_turns():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "ab"}
    times = measure.in_turns(steps, CPU, seconds=10.0, rounds=3)
    assert called == list("abababab"), "the first of each is the warm-up"
    assert all(0 < seconds < 0.1 for seconds in times.values())
    called.clear()
    measure.in_turns(steps, CPU, seconds=0.0)
    assert called == list("abab")


def test_the_ratio_in_groups_knows_no_drift(monkeypatch):
    now, called = 0.0, []

    def clock() -> float:
        return now

    def step(name: str) -> None:
        nonlocal now
        called.append(name)
        now += len(called)  # each call takes a second more than the one before

    monkeypatch.setattr(measure.time, "perf_counter", clock)
    both = functools.partial(step, "a"), functools.partial(step, "b")
    assert measure.ratio_in_groups(*both, CPU, seconds=0.0) == 1
    assert called == list("ababba"), "the first of each is the warm-up"


def test_written_results_can_be_read_again(tmp_path):
    """Files are joined, the last one wins, plots are drawn, and results.json gives the same tables."""
    later = document(entry(LOSS, "elogitnorm", 5e-3))
    results = results_of(document(*three_rows()), later)
    assert results.rows[LOSS, "elogitnorm"]["seconds"] == 5e-3
    folder = report.write(results, tmp_path / "machine", "command")
    assert {file.name for file in folder.iterdir()} == {"README.md", "results.json", "time-memory.png", "roofline.png"}
    again = report.load([folder / "results.json"])
    assert report.markdown(again, "command", []) == report.markdown(results, "command", [])
    assert report.slug(report.title(results)) == "test-cpu-2-threads"
    with pytest.raises(SystemExit, match="no such file"):
        report.load([tmp_path / "none.json"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="not the JSON of a run"):
        report.load([tmp_path / "other.json"])


def test_files_are_of_one_machine(tmp_path):
    """A row that one file left out and another measured stands once; another machine's file is refused by name."""
    reason = {"group": LOSS, "row": "elogitnorm", "reason": "not installed"}
    results = results_of(document(*three_rows()), document(left_out=(reason,)))
    assert not results.left_out
    other = document(*three_rows())
    other["machine_info"]["environment"]["device"] = "A GPU"
    paths = tmp_path / "cpu.json", tmp_path / "gpu.json"
    for path, content in zip(paths, (document(*three_rows()), other), strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"gpu.json: measured on A GPU, the files before it on Test CPU, 2 threads"):
        report.load(paths)


@pytest.mark.slow
def test_a_run_from_pytest_to_tables(tmp_path):
    file = tmp_path / "run.json"
    names = ("elogitnorm", "F.cross_entropy", "literal definition")
    chosen = [f"bench/test_loss.py::test_loss[CIFAR-10-fp32-{name}]" for name in names]
    chosen += ["bench/test_loss.py::test_forward[CIFAR-10-fp32-elogitnorm]"]
    chosen += ["bench/test_nci.py::test_score[CIFAR-10-fp32-NCI from logits-nci_score]"]
    chosen += ["bench/test_statistics.py::test_softmax_maximum[CIFAR-100-fp32]"]
    chosen += ["bench/test_detectors.py::test_detector[NCI-ood_fast]", "bench/test_detectors.py::test_together[GEN]"]
    command = [sys.executable, "-m", "pytest", *chosen, "-q", "--benchmark-only", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, f"--benchmark-json={file}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = report.load([file])
    assert len(results.rows) == len(chosen)
    rows = {row["row"]: row for row in results.groups()["loss forward + backward, CIFAR-10 (128, 10, 512)"]}
    assert set(rows) == set(names)
    assert report.ratio(rows["elogitnorm"], rows["F.cross_entropy"]) > 0
    for row in results.rows.values():
        assert row["seconds"] > 0
        assert row["GB_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["GFLOP_per_s"] == pytest.approx(row["flops"] / row["seconds"] / 1e9)
        assert row["share_of_ceiling"] > 0
        assert row["error"] < 1e-5
        assert not Path("/proc/self/clear_refs").exists() or row["peak_MB"] >= 0
    text = report.markdown(results, "", [])
    header = next(line for line in text.splitlines() if line.startswith("| row |"))
    assert header.endswith(" MB | GFLOP | GB/s | GFLOP/s | of ceiling | error |")
    assert not re.search(r"^\| NCI, ood_fast \|.*\|\s*\|", text, re.MULTILINE), "a figure in every column"
    assert results.ceilings.keys() == {"copy", "fp32", "bf16"}
    assert results.environment["torch"].startswith(torch.__version__.partition("+")[0])


@pytest.mark.slow
def test_a_row_without_its_figures_fails(tmp_path):
    """Whoever adds one learns of it, also where CI only runs each once."""
    (tmp_path / "test_new.py").write_text(
        "def test_alone(benchmark):\n    benchmark(int)\n\n"
        "def test_measured(measure):\n    measure('what', int, row='row', prepare=lambda: int)\n\n"
        "def test_whole(measure):\n"
        "    measure('what', int, row='row', counts='nci', prepare='it takes none')\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", str(tmp_path), "-q", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, "--benchmark-disable"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "test_alone: a row without bytes, flops, peak_MB: measure it" in run.stdout
    assert "missing 1 required keyword-only argument: 'counts'" in run.stdout
    assert re.search(r"4 failed, 3 passed", run.stdout), run.stdout[-2000:]  # each for three cases but test_alone


# ---- the script for a GPU machine


def gpu_script(tmp_path, *arguments: str, python: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHON": python or sys.executable} | environment,
    )  # fmt: skip


def fake_python(tmp_path, body: str) -> str:
    file = tmp_path / "python"
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_gpu_script_needs_a_gpu(tmp_path):
    run = gpu_script(tmp_path, str(tmp_path / "out"))
    assert run.returncode == 2
    assert "no GPU found" in run.stdout
    assert gpu_script(tmp_path).returncode == 2
    assert "usage" in gpu_script(tmp_path, "--nonsense").stderr


def test_gpu_script_leaves_no_link_to_the_kernels_where_they_are_not_found(tmp_path):
    for folder in ("bench", "ood_fast", "kernels"):
        (tmp_path / folder).mkdir()
    script = shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    body = 'case "$*" in *"import ood_fast.kernels"*) exit 1 ;; *gpu_smoke*) ls -l ood_fast ;; esac; echo "$*"'
    command = ["bash", script, "--dry-run", "1", str(tmp_path / "out")]
    given = os.environ | {"PYTHON": fake_python(tmp_path, body)}
    assert subprocess.run(command, env=given, capture_output=True, timeout=120, check=False).returncode == 0
    assert "kernels -> ../kernels" in (tmp_path / "out/small_step.log").read_text()
    assert not list((tmp_path / "ood_fast").iterdir())


def test_gpu_script_dry_run_takes_every_step(tmp_path):
    """With a Python that only says what it was asked for: the paths of the script itself."""
    python = fake_python(tmp_path, 'echo "$*"')
    run = gpu_script(tmp_path, "--dry-run", str(tmp_path / "out"), python=python)
    assert run.returncode == 0, run.stdout
    assert "FAILED" not in run.stdout
    assert "LEFT OUT" not in run.stdout
    steps = re.findall(r"^(\w+): ok", (tmp_path / "out" / "summary.txt").read_text(), re.MULTILINE)
    wanted = ["install", "small_step", "tests", "racecheck", "kernel_times", "predicted", "sweep", "host", "targets"]
    wanted += ["imagenet", "linear", "scores", "loss", "counters", "training", "report"]
    assert [step for step in steps if step in wanted] == wanted
    for target in re.findall(r"-m pytest (bench/\S+)", run.stdout):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.skipif(not ops.has_triton(), reason="triton is not installed")
def test_gpu_entry_points_run_without_one(tmp_path):
    """What the script starts there, by a driver that launches nothing."""
    command = (
        "import sys; from bench import kernel_times, sweep;"
        "sys.argv = ['kernel_times', '--dry', '--shapes', '64x32x16', '--out', sys.argv[1]]; kernel_times.main();"
        "sys.argv = ['sweep', '--dry']; sweep.main()"
    )
    out = tmp_path / "kernel_times.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", command, str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert static.measured([out])["elogitnorm 64x32x16 bf16", "fused_row"] == pytest.approx(1.0)


def test_measured_times_stand_beside_the_predicted(tmp_path, monkeypatch):
    """`bench.static` on what `bench.kernel_times` wrote on a GPU; a kernel that was not measured has none."""
    lines = [{"kernel": "fused_row", "seconds": 91e-6}, {"kernel": "torch", "seconds": 9e-6}]
    lines.append({"kernel": "row kernels, one read and one write", "seconds": 91e-6})
    (tmp_path / "kernel_times.json").write_text(
        json.dumps({"dtype": "bf16", "cases": [{"shape": [65536, 1000, 2048], "rows": {"elogitnorm": lines}}]})
    )
    line = {"case": "elogitnorm 65536x1000x2048", "kernel": "fused_row", "instructions": 948.0, "unit": "row"}
    line |= {"matrix": "", "barriers": 1, "programs": 16, "issue": 64e-6, "tensor": 0.0, "bytes": 66e-6}
    monkeypatch.setattr(static, "launches", lambda case: [line, line | {"kernel": "distance_gram"}])
    text = static.show(static.CASES[:1], static.measured([tmp_path / "kernel_times.json"]))
    assert re.search(r"^fused_row .* 66.0 +91.0$", text, re.MULTILINE), text
    assert re.search(r"^distance_gram .* 66.0$", text, re.MULTILINE)
    assert re.search(r"^all +183 +100$", text, re.MULTILINE)


@pytest.mark.slow
def test_gpu_script_keeps_going_and_keeps_what_was_written(tmp_path):
    """A step that fails is reported and the next one runs; a step at its limit is stopped; the rest is left out."""
    python = fake_python(
        tmp_path,
        'case "$*" in *pip*) echo "no pip" >&2; exit 3;; *kernel_times*) echo "{}" > "${@: -1}"; sleep 60;; '
        "*cuda.is_available*) exit 0;; *) echo fine;; esac",
    )
    out = tmp_path / "out"
    run = gpu_script(tmp_path, str(out), python=python, DEADLINE="18")
    assert run.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert "versions: ok" in summary
    assert re.search(r"install: FAILED with exit code 3 .*\nno pip", summary)
    assert "tests: ok" in summary
    assert re.search(r"kernel_times: STOPPED", summary)
    assert "imagenet: LEFT OUT" in summary
    assert json.loads((out / "kernel_times.json").read_text()) == {}


@pytest.mark.slow
def test_gpu_script_makes_tables_of_a_step_that_the_deadline_stopped(tmp_path):
    """What such a step wrote is reported though it took seconds to end; the report has its own time."""
    python = fake_python(
        tmp_path,
        'case "$*" in *cuda.is_available*|*json.dumps*|*pip*|*tests*|*smoke*|*kernel_times*) echo fine;; '
        "*bench.report*) echo written;; "
        '*test_gpu_targets*) for a in "$@"; do case "$a" in --benchmark-json=*) echo "{}" > "${a#*=}";; esac; done; '
        "trap 'sleep 4; exit 2' INT; sleep 60;; *) echo fine;; esac",
    )
    out = tmp_path / "out"
    run = gpu_script(tmp_path, str(out), python=python, DEADLINE="17")
    summary = (out / "summary.txt").read_text()
    assert re.search(r"targets: STOPPED", summary)
    assert "imagenet: LEFT OUT" in summary
    assert "report: ok" in summary, summary
    assert float(re.search(r"==== (\d+) s", run.stdout)[1]) < 17 + 20
