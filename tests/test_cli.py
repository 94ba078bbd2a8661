"""The command line: what it prints, its exit codes, and that an error writes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from processes import COMMAND, environment, forked, python

import ood_fast
from ood_fast import cli, detectors, evaluation, models, recipes
from ood_fast.commands import compare as compare_command
from ood_fast.commands.progress import Bar
from ood_fast.training import Run

writing = importlib.import_module("ood_fast.evaluation.write")

SHORT = ["--losses", "ce,elogitnorm", "--detectors", "msp,knn", "--seeds", "2", "--epochs", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- compare


def test_compare_prints_the_tables_and_writes_the_folder(tmp_path, capsys):
    assert cli.main(["compare", *SHORT]) == 0
    output = capsys.readouterr()
    for part in ("AUROC (%)", "ECE f/D", "near-OOD"):
        assert part in output.out
    assert "runs/compare-digits/report.html" in output.out
    assert "bold" not in output.out
    assert "\x1b[" not in output.out + output.err, "colours belong on a terminal"
    assert [line.split(":")[0] for line in output.err.splitlines()] == [
        "[1/4] seed 0 ce",
        "[2/4] seed 0 elogitnorm",
        "[3/4] seed 1 ce",
        "[4/4] seed 1 elogitnorm",
    ]
    folder = tmp_path / "runs" / "compare-digits"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*writing.FILES, "report.html", "runs", "verdict.svg"]
    )
    results = evaluation.read(folder)
    assert results["command"] == "ood-fast compare --losses ce,elogitnorm --detectors msp,knn --seeds 2 --epochs 1"
    assert results["versions"]["ood_fast"] == ood_fast.__version__
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{results['seconds']:.0f} s" in page
    assert "2 runs of ood-fast train" in page
    assert "2 more are in the tables above alone" in page
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        ("ce", 0),
        ("ce", 1),
        ("elogitnorm", 0),
        ("elogitnorm", 1),
    ]
    assert list(results["runs"][0]["detectors"]) == ["MSP", "KNN"]
    assert results["runs"][0]["detectors"]["KNN"]["k"] == 10


def test_compare_again_gives_the_same_numbers_also_in_another_process(tmp_path):
    arguments = ["compare", *SHORT, "--quiet", "--out"]
    assert cli.main([*arguments, "first"]) == 0
    again = forked(*COMMAND, *arguments, "second")
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert again.stdout == ""
    first, second = (evaluation.read(tmp_path / name) for name in ("first", "second"))
    assert [run["measurements"] for run in first["runs"]] == [run["measurements"] for run in second["runs"]]
    assert first["summary"] == second["summary"]


def test_a_comparison_is_extended_and_what_is_trained_is_taken(tmp_path, capsys):
    short = ["compare", "--detectors", "msp", "--epochs", "1", "--out", "results"]
    assert cli.main([*short, "--losses", "ce", "--seeds", "1"]) == 0
    trained = (tmp_path / "results/runs/ce/s0/run.json").read_bytes()
    assert cli.main([*short, "--losses", "ce,l2norm", "--seeds", "0,7", "--set", "KNN.k=1"]) == 2
    assert cli.main([*short, "--losses", "ce,l2norm", "--seeds", "0,7"]) == 0
    assert (tmp_path / "results/runs/ce/s0/run.json").read_bytes() == trained
    found = evaluation.read(tmp_path / "results")
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        ("ce", 0),
        ("ce", 7),
        ("l2norm", 0),
        ("l2norm", 7),
    ]
    assert {row["method"] for row in found["summary"] if row["gain"] is not None} == {"l2norm"}
    capsys.readouterr()
    assert cli.main([*short, "--losses", "ce", "--seeds", "1", "--set", "lr=0.2"]) == 2
    assert "learning_rate: 0.1 there, 0.2 here" in capsys.readouterr().err
    assert cli.main([*short, "--losses", "ce", "--seeds", "1", "--set", "lr=0.2", "--overwrite", "--quiet"]) == 0
    assert [run["seed"] for run in evaluation.read(tmp_path / "results")["runs"]] == [0]
    taken = ["compare", "results/runs/ce", "--detectors", "msp", "--out", "taken", "--csid", "all", "--quiet"]
    assert cli.main(taken) == 0
    assert "Accuracy under covariate shift" in (tmp_path / "taken/report.html").read_text(encoding="utf-8")
    assert evaluation.read(tmp_path / "taken")["runs"][0]["method"] == "ce"
    for option in (["--epochs", "3"], ["--channels-last"]):
        assert cli.main(["compare", "results/runs/ce", *option]) == 2
        assert f"{option[0]}: not used with RUN" in capsys.readouterr().err


def test_compare_trains_as_fast_as_train(tmp_path, monkeypatch):
    runs, train = [], Run.train
    monkeypatch.setattr(Run, "train", lambda run: (runs.append(run), train(run)))
    short = ["compare", "--detectors", "msp", "--epochs", "1", "--losses", "ce", "--seeds", "1", "--out", "fast"]
    assert cli.main([*short, "--quiet", "--amp", "bf16", "--channels-last"]) == 0
    assert [(run.recipe.amp, run.options.channels_last, run.options.compile) for run in runs] == [("bf16", True, False)]


MODEL = """
from torch import nn
def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6))
"""


def test_compare_takes_a_model_of_the_user_and_weights_to_start_from(tmp_path, capsys, monkeypatch):
    (tmp_path / "comparedmodel.py").write_text(MODEL)
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    short = ["compare", "--model", "comparedmodel:build", "--losses", "ce", "--seeds", "1", "--epochs", "1"]
    short += ["--detectors", "msp", "--quiet"]
    assert cli.main([*short, "--out", "first"]) == 0
    start = "first/runs/ce/s0/final.ckpt"
    assert cli.main([*short, "--init", start, "--set", "schedule=onecycle", "--out", "second"]) == 0
    assert json.loads((tmp_path / "second/runs/ce/s0/run.json").read_text())["recipe"]["init"].endswith(start)
    assert json.loads((tmp_path / "second/results.json").read_text())["runs"][0]["checkpoint"].endswith("final.ckpt")
    taken = ["compare", "second/runs/ce", "--model", "comparedmodel:build", "--detectors", "msp", "--quiet", "--out"]
    for name, more in (("final", ()), ("best", ("--checkpoint", "best"))):
        assert cli.main([*taken, name, *more]) == 0
        assert json.loads((tmp_path / name / "results.json").read_text())["runs"][0]["checkpoint"].endswith(
            f"{name}.ckpt"
        )
    (tmp_path / "comparedmodel.py").write_text(MODEL.replace("ReLU", "GELU"))
    assert cli.main([*short, "--out", "first"]) == 2
    assert "holds a run with other settings (model_code: " in capsys.readouterr().err
    (tmp_path / "comparedmodel.py").write_text(MODEL)
    assert cli.main([*short, "--out", "first"]) == 0
    assert cli.main([*short, "--init", start, "--pretrained", "--out", "third"]) == 2
    assert "init, pretrained: expected one of them" in capsys.readouterr().err
    assert cli.main([*short, "--init", "none.ckpt", "--out", "third"]) == 2
    assert "--init: no file none.ckpt" in capsys.readouterr().err
    assert cli.main(["compare", "--set", "model=comparedmodel:other"]) == 2
    assert "expected MODULE:CALLABLE" in capsys.readouterr().err
    made = torch.load(start, weights_only=True)
    torch.save({name: value * math.nan for name, value in made.items()}, "nan.ckpt")
    taken = ["compare", "nan.ckpt", "--model", "comparedmodel:build", "--benchmark", "digits", "--detectors", "msp"]
    assert cli.main(taken) == 1
    assert "ood-fast: failed: test: image 0: features: got NaN" in capsys.readouterr().err


BAD = {
    "unknown loss": (["--losses", "ce,elogitnrm"], ["'elogitnrm'", "known: ce,", "did you mean 'elogitnorm'?"]),
    "unknown detector": (["--detectors", "knnn"], ["'knnn'", "MSP", "did you mean 'KNN'?"]),
    "unknown data": (["--data", "digit"], ["'digit'", "did you mean 'digits'?"]),
    "no losses": (["--losses", ","], ["losses: got none"]),
    "a loss twice": (["--losses", "ce,ce"], ["losses: got ce, ce"]),
    "no seeds": (["--seeds", "0"], ["--seeds: got '0', expected at least 1"]),
    "negative seeds": (["--seeds=-3"], ["--seeds: got '-3'"]),
    "a negative seed": (["--seeds=0,-3"], ["seeds: got -3"]),
    "an empty list of seeds": (["--seeds", ","], ["seeds: got none"]),
    "seeds in words": (["--seeds", "five"], ["--seeds: got 'five'"]),
    "no epochs": (["--epochs", "0"], ["epochs: got 0"]),
    "epochs in words": (["--epochs", "many"], ["epochs: got 'many', expected"]),
    "unknown device": (["--device", "abacus"], ["--device: cannot use 'abacus', PyTorch knows no such device"]),
    "no such GPU": (["--device", "cuda:99"], ["--device: cannot use 'cuda:99', PyTorch finds", "use --device cpu"]),
    "a device without numbers": (["--device", "meta"], ["--device: cannot use 'meta', PyTorch cannot compute on it"]),
    "no option value": (["--out"], ["--out", "see ood-fast compare --help"]),
    "out is nothing": (["--out", ""], ["--out: got '', expected a folder"]),
    "out is too long": (["--out", "x" * 300], ["--out: cannot write to xxx", "name too long"]),
    "out is too long inside": (["--out", f"new/{'x' * 300}/y"], ["--out: cannot write to new/xxx", "name too long"]),
    "out is at nobody's": (["--out", "~nobody-at-all/x"], ["--out"]),
    "unknown option": (["--loss", "ce", "--nonsense"], ["--nonsense"]),
    "out is a file": (["--out", "taken"], ["--out", "is a file"]),
    "out below a file": (["--out", "taken/deeper"], ["--out", "is a file"]),
    "out is someone else's": (["--out", "full"], ["--out", "not empty"]),
}


@pytest.mark.parametrize(("arguments", "messages"), BAD.values(), ids=BAD)
def test_bad_input_is_told_and_nothing_is_written(arguments, messages, tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all of it")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("ood_fast.compare.Comparison.run", lambda *_: pytest.fail("training began"))
    assert cli.main(["compare", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("ood-fast: error: ")
    assert output.err.count("\n") == 1
    for message in messages:
        assert message in output.err
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_in_a_process_of_its_own(tmp_path):
    result = forked(*COMMAND, "compare", "--losses", "elogitnrm")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "ood-fast: error: unknown loss 'elogitnrm'; did you mean 'elogitnorm'? "
        f"known: {', '.join(sorted(recipes.METHODS))}; one of your own needs --plugin MODULE\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_command_at_all_prints_the_help(capsys):
    assert cli.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: ood-fast")
    assert "COMMAND" in output.err
    for command in ("compare", "fit", "score", "evaluate"):
        assert f"\n    {command} " in output.err


def test_a_missing_package_is_named(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    assert cli.main(["compare"]) == 2
    assert "scikit-learn, which is not installed: pip install scikit-learn" in capsys.readouterr().err


def test_a_training_that_diverges_fails_with_code_1(tmp_path, capsys):
    assert cli.main(["compare", *SHORT, "--losses", "ce", "--set", "lr=1e30"]) == 1
    error = capsys.readouterr().err
    assert "failed: the training loss became NaN or infinite in epoch 1" in error
    assert "what was trained is kept in runs/compare-digits" in error


def test_a_full_disk_fails_with_code_1(tmp_path, capsys, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation.Results, "to_json", no_space)
    assert cli.main(["compare", *SHORT, "--quiet"]) == 1
    assert "cannot write runs/compare-digits: No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs/compare-digits").iterdir()] == ["runs"]


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a signal")
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, *COMMAND, "compare", "--epochs", "2", "--seeds", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr.readline().startswith("[1/2000] seed 0 ce")  # training has begun
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    assert errors.splitlines()[-1] == "ood-fast: interrupted" or "saved. To continue: ood-fast compare" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "runs/compare-digits/runs/ce/s0/run.json").read_text())["status"] == "complete"


def test_the_bar_counts_every_epoch(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = []

    class Kept(compare_command.ComparisonBar):
        def __enter__(self):
            shown.append(self)
            return super().__enter__()

    monkeypatch.setattr(compare_command, "ComparisonBar", Kept)
    assert cli.main(["compare", *SHORT, "--losses", "ce"]) == 0
    (task,) = shown[0].bar.tasks
    assert (task.completed, task.total) == (2, 2)
    assert task.description.split() == ["run", "2/2", "seed", "1", "ce"]


def test_a_bar_is_told_the_total_later(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = Bar("fitting", None, quiet=False)
    bar.expect(12)
    assert [task.total for task in bar.bar.tasks] == [12]


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_the_bar_fits_the_terminal(width, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    from rich.console import Console

    progress = compare_command.ComparisonBar(quiet=False)
    progress.bar.update(progress.task, total=1200)
    progress.at(1199, "run 10/20  seed 4  elogitnorm")
    console = Console(width=width)
    with console.capture() as capture:
        console.print(progress.bar.get_renderable())
    (line,) = capture.get().splitlines()
    assert len(line.rstrip()) <= width
    if width >= 50:
        assert "run 10/20  seed 4  elogitnorm" in line
        assert "1199/1200" in line


# ---- the rest


def test_an_unknown_backend_is_told_in_one_line():
    for command in ("info", "compare"):
        result = python(*COMMAND, command, OOD_FAST_BACKEND="foo")
        assert result.returncode == 2
        assert result.stderr == ("ood-fast: error: OOD_FAST_BACKEND: got 'foo', expected one of auto, eager, triton\n")


def test_a_backend_that_does_not_run_on_the_device(capsys, monkeypatch):
    monkeypatch.setattr("ood_fast.ops.backend._chosen", "triton")
    monkeypatch.setattr("ood_fast.ops.backend.has_triton", lambda: False)
    assert cli.main(["compare"]) == 2
    assert capsys.readouterr().err.startswith("ood-fast: error: OOD_FAST_BACKEND=triton, but triton is not installed")
    assert cli.main(["info"]) == 0
    assert "cpu: none (OOD_FAST_BACKEND=triton, but" in capsys.readouterr().out


def test_ctrl_c_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    result = python(*COMMAND, "info", first=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "ood-fast: interrupted\n")


def test_every_public_name_is_found():
    assert set(ood_fast.__all__) <= set(dir(ood_fast))
    for name in (*ood_fast.__all__, *ood_fast._MODULES):
        assert getattr(ood_fast, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="no attribute 'elogitnrm'"):
        _ = ood_fast.elogitnrm


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ood_fast {ood_fast.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_help(arguments, capsys):
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "usage: ood-fast" in text
    assert "None" not in text
    assert "False" not in text
    if "compare" in arguments:
        assert "(default: runs/compare-BENCHMARK)" in text
        for loss in recipes.LOSSES:
            assert loss in text


def test_info_names_versions_devices_losses_and_detectors(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["ood_fast"] == ood_fast.__version__
    assert lines["devices"].startswith("cpu")
    assert lines["backend"].startswith("cpu: ")
    assert lines["losses"] == ", ".join(recipes.METHODS)
    listed = lines["detectors"].split(", ")
    assert listed[: len(recipes.DETECTORS)] == list(recipes.DETECTORS)
    assert sorted(listed) == sorted(detectors.known())
    assert lines["machine"].endswith(f", {os.cpu_count()} CPUs")


def test_info_works_without_the_optional_packages():
    # A finder in front of all others that denies what only `compare` and GPUs need.
    code = """
import importlib.abc, importlib.metadata, sys
class Deny(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"sklearn", "scipy", "matplotlib", "rich", "triton"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Deny())
from ood_fast.cli import main
sys.exit(main(["info"]))
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "elogitnorm" in result.stdout


def test_the_command_line_imports_what_compare_needs_only_when_it_is_needed():
    code = """
import sys, ood_fast.cli, ood_fast.detectors, ood_fast.metrics, ood_fast.data
assert ood_fast.cli.main(["--version"]) == 0
print([name for name in ("sklearn", "scipy", "matplotlib", "rich", "triton", "torchvision") if name in sys.modules])
"""
    result = python("-c", code)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_warning_is_a_line(monkeypatch, capsys):
    """Without the file, the line and the code of whoever warned; afterwards Python's own form is back."""
    before = warnings.formatwarning

    def run(options, command):
        print(warnings.formatwarning(UserWarning("KNN: k"), UserWarning, "fitting.py", 82), end="", file=sys.stderr)

    monkeypatch.setattr("ood_fast.commands.info.run", run)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "ood-fast: warning: KNN: k\n"
    assert warnings.formatwarning is before
