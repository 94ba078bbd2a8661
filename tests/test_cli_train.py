"""`ood-fast train`: what it prints and writes, its exit codes; killed, out of disk, on two processes."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from processes import COMMAND, forked
from test_data import write_cifar10

import ood_fast
from ood_fast import cli, data, recipes, train
from ood_fast.compare import one_thread
from ood_fast.training import loop

SETTINGS = {"model": "tiny", "epochs": 2, "batch_size": 16, "lr": 0.05}
N_IMAGES = 70


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_cifar10(path, n_train=N_IMAGES, n_test=40)
    return path


@pytest.fixture(autouse=True)
def in_an_empty_folder_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with one_thread(), tiny_models.registered():  # as the subprocesses do by --plugin
        yield


def arguments(root: Path, *more: str, **changes) -> list[str]:
    settings = [f"--set={name}={value}" for name, value in {**SETTINGS, **changes}.items()]
    return ["train", "--recipe", "cifar10-elogitnorm", *settings, f"--data-root={root}", "--workers=0", *more]


def final(out: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(Path(out) / "final.ckpt", weights_only=True)


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def run(*command: str, launcher: tuple[str, ...] = COMMAND, **more: Any) -> subprocess.CompletedProcess:
    return forked(*launcher, *command, "--plugin=training_plugin", **more)


# ---- what it prints and writes


def test_train_tells_each_epoch_and_keeps_the_run(root, tmp_path, capsys):
    assert cli.main(arguments(root, "--seed=3", lr=0.02)) == 0
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    for part in ("loss ", "accuracy ", "validation ", "images/s"):
        assert part in lines[0]
    assert "Trained 2 epochs: validation accuracy " in output.out
    out = tmp_path / "runs" / "cifar10-elogitnorm" / "s3"
    assert str(out.relative_to(tmp_path)) in output.out
    model, recipe, info = train.load_run(out)
    assert isinstance(model, torch.nn.Sequential)
    assert recipe == recipes.override(
        recipes.find("cifar10-elogitnorm"), ["model=tiny", "epochs=2", "batch_size=16", "lr=0.02"]
    )
    assert info["data"] == {"root": str(root), "layout": "auto", "image_size": None}
    assert info["command"].startswith("ood-fast train --recipe cifar10-elogitnorm")
    assert info["versions"]["ood_fast"] == ood_fast.__version__
    assert info["seed"] == 3


def test_the_batch_that_a_rate_is_made_for_is_told(root, capsys):
    assert cli.main([*arguments(root, "--out=run", epochs=1)[:-1], "--set=lr=0.1", "--out=run", "--workers=0"]) == 0
    assert "the learning rate 0.1 was made for 128 images a step, here are 16" in capsys.readouterr().err


def test_quiet_prints_nothing(root, capsys):
    assert cli.main(arguments(root, "--quiet", "--out=run", epochs=1)) == 0
    output = capsys.readouterr()
    assert output.out + output.err == ""


def test_a_recipe_of_ones_own_with_amp(root, tmp_path):
    (tmp_path / "mine.json").write_text('{"base": "cifar10-ce", "model": "tiny", "epochs": 1, "batch_size": 32}')
    assert cli.main(["train", "--recipe=mine.json", f"--data-root={root}", "--amp=bf16", "--workers=0", "--quiet"]) == 0
    info = json.loads((tmp_path / "runs" / "mine" / "s0" / "run.json").read_text())
    assert (info["recipe"]["amp"], info["recipe"]["loss"], info["recipe"]["batch_size"]) == ("bf16", "ce", 32)


def test_weights_to_start_from_are_named_as_everywhere(tmp_path, capsys):
    (tmp_path / "w.pth").touch()
    show = ["train", "--recipe=cifar10-ce", "--show"]
    for given, settings in (
        (["--checkpoint", str(tmp_path / "w.pth")], {"init": str(tmp_path / "w.pth"), "pretrained": False}),
        (["--init", str(tmp_path / "w.pth"), "--epochs", "3"], {"init": str(tmp_path / "w.pth"), "epochs": 3}),
        (["--pretrained"], {"init": "", "pretrained": True}),
    ):
        assert cli.main([*show, *given]) == 0
        assert json.loads(capsys.readouterr().out).items() >= settings.items()
    assert cli.main([*show, "--checkpoint", "none.pth"]) == 2
    assert "--init: no file none.pth" in capsys.readouterr().err
    assert cli.main([*show, "--checkpoint", str(tmp_path / "w.pth"), "--pretrained"]) == 2
    assert "expected one of them" in capsys.readouterr().err


def test_a_recipe_shown_is_a_recipe_file(tmp_path, capsys):
    assert cli.main(["train", "--recipe=cifar10-l2norm-60", "--set=lr=0.05", "--amp=bf16", "--show"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    expected = recipes.override(recipes.find("cifar10-l2norm-60"), ["lr=0.05", "amp=bf16"])
    assert recipes.find(tmp_path / "mine.json") == expected
    assert not (tmp_path / "runs").exists()


def test_list_of_recipes(capsys):
    assert cli.main(["train", "--recipe=list"]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == len(recipes.RECIPES)
    assert "cifar10-elogitnorm-200" in output


def test_tensorboard(root, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert cli.main(arguments(root, "--tensorboard", "--out=run", "--quiet")) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert logged == pytest.approx([row["loss"] for row in state["history"]])


def test_a_bar_on_a_terminal(root, monkeypatch, capsys):
    """The numbers and the time left on a terminal of 100 columns; the lines of finished epochs stay above it."""
    from rich.console import Console

    from ood_fast.commands import train as command

    monkeypatch.setattr(command.Told, "REFRESH", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    original = Console.__init__
    monkeypatch.setattr(
        Console, "__init__", lambda self, **keywords: original(self, **keywords, width=100, force_terminal=True)
    )
    assert cli.main(arguments(root, "--out=run")) == 0
    shown = capsys.readouterr().err
    for part in ("epoch 1/2: loss", "epoch 2/2: loss", "images/s", "epoch 2/2", "accuracy", "0:00:0"):
        assert part in shown


BAD = {
    "unknown recipe": (["--recipe=cifar10-elogitnrm"], ["unknown recipe", "did you mean 'cifar10-elogitnorm'"]),
    "unknown setting": (["--set=learning=1"], ["unknown setting 'learning'", "did you mean"]),
    "bad value": (["--set=lr=fast"], ["lr: got 'fast', expected a number"]),
    "negative seed": (["--seed=-1"], ["--seed: got -1"]),
    "negative workers": (["--workers=-1"], ["--workers: got -1"]),
    "keep every none": (["--keep-every=0"], ["--keep-every: got 0"]),
    "negative minutes": (["--save-minutes=-1"], ["--save-minutes: got -1"]),
    "no data": (
        ["--data-root=nowhere"],
        ["CIFAR-10: missing in nowhere: cifar-10-batches-py", "get it from https", "--download"],
    ),
    "unknown layout": (["--layout=disk"], ["unknown layout 'disk'"]),
    "no such device": (["--device=cuda:99"], ["--device: cannot use 'cuda:99'"]),
    "no such plugin": (["--plugin=nothing_like_it"], ["--plugin: cannot import 'nothing_like_it'"]),
    "sync-bn on the CPU": (["--sync-bn", "--device=cpu"], ["SyncBatchNorm runs on GPUs"]),
    "out is nothing": (["--out="], ["--out: got ''"]),
    "out is a file": (["--out=taken"], ["--out", "is a file"]),
    "out is someone else's": (["--out=full"], ["is not empty and holds no run"]),
}


@pytest.mark.parametrize(("more", "messages"), BAD.values(), ids=BAD)
def test_bad_input_is_told_and_nothing_is_written(more, messages, root, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments(root, *more)) == 2
    output = capsys.readouterr()
    for message in messages:
        assert message in output.err
    assert "Traceback" not in output.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_not_overwritten(root, capsys):
    assert cli.main(arguments(root, "--out=run", "--quiet", epochs=1)) == 0
    assert cli.main(arguments(root, "--out=run", epochs=1)) == 2
    assert (
        "holds this run, 1 of 1 epochs done; pass --resume to continue it, or another --out" in capsys.readouterr().err
    )
    assert cli.main(arguments(root, "--out=run", "--resume", "--seed=5", epochs=1, lr=0.3)) == 2
    error = capsys.readouterr().err
    assert "learning_rate: 0.05 there, 0.3 here; seed: 0 there, 5 here" in error
    assert "another --out" in error


def test_diverged(root, tmp_path, capsys, monkeypatch):
    step = loop.Run._train_step

    def spoiled(run, x, y):
        step(run, x * float("inf") if (run.epoch, run.step) == (1, 1) else x, y)

    monkeypatch.setattr(loop.Run, "_train_step", spoiled)
    assert cli.main(arguments(root, "--out=run")) == 1
    error = capsys.readouterr().err
    assert "failed: the training loss became NaN or infinite in epoch 2 at step 2" in error
    assert "the checkpoints before it are kept in run" in error
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_saved_and_continued(signum, code, root, capsys, monkeypatch):
    assert cli.main(arguments(root, "--out=whole", "--quiet")) == 0
    step = loop.Run._train_step

    def stopped(run, x, y):
        if (run.epoch, run.step) == (1, 1):
            os.kill(os.getpid(), signum)
        step(run, x, y)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "_train_step", stopped)
        assert cli.main(arguments(root, "--out=run")) == code
    error = capsys.readouterr().err
    assert f"stopped by {signum.name} in epoch 2, after step 2; saved. To continue: ood-fast train --recipe" in error
    assert error.rstrip().endswith("--resume")
    assert cli.main(arguments(root, "--out=run", "--resume")) == 0
    assert "continuing in epoch 2 after step 2" in capsys.readouterr().err
    assert_same_bits(final("run"), final("whole"))


def test_a_download_that_fails(tmp_path, capsys, monkeypatch):
    import torchvision

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    assert cli.main(arguments(tmp_path, "--download", "--out=run")) == 2
    assert "CIFAR-10: the download failed (no network); get it from https://www.cs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_for_diagnostics_are_asked_for_before_the_first_epoch(root, tmp_path, capsys):
    assert cli.main(arguments(root, "--diagnostics", "--out=run")) == 2
    assert "Tiny ImageNet: missing in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- folders of one's own

OWN_DATA = Path(__file__).parent.parent / "docs" / "own-data.md"


def write_folders(root: Path, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    """Noise, brighter from class to class; OOD sets bluebird (near) and texture (far)."""
    pixels = np.random.default_rng(0)

    def write(folder: str, n_images: int, brightness: int) -> None:
        (root / folder).mkdir(parents=True)
        for number in range(n_images):
            image = pixels.integers(0, 100, (20, 24, 3), dtype=np.uint8) + np.uint8(brightness)
            Image.fromarray(image).save(root / folder / f"{number:02d}.png")

    for label, name in enumerate(classes):
        write(f"train/{name}", 20, 70 * label)
        write(f"val/{name}", 6, 70 * label)
        write(f"test/{name}", 6, 70 * label)
    write("near/bird", 6, 140)
    write("ood/texture", 6, 155)


def on_folders(root: Path, *more: str) -> list[str]:
    settings = [f"--set={setting}" for setting in ("model=tiny", "epochs=1", "batch_size=8")]
    return ["train", "--recipe=folder-ce", f"--data-root={root}", "--image-size=16", "--out=run", *settings, *more]


@pytest.mark.slow
def test_the_page_on_folders_of_ones_own(tmp_path, monkeypatch):
    """Its commands as they stand, with one epoch, smaller images and fewer draws."""
    write_folders(tmp_path / "photos")
    block, later = re.findall(r"^```bash\n(.*?)^```", OWN_DATA.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [command[:2] for command in commands if command] == [
        ["ood-fast", "train"],
        ["ood-fast", "train"],
        ["ood-fast", "evaluate"],
        ["ood-fast", "evaluate"],
        ["ood-fast", "report"],
    ]
    less = {
        "train": ["--set=epochs=1", "--set=batch_size=16", "--image-size=32", "--workers=0", "--quiet"],
        "evaluate": ["--bootstrap=5", "--workers=0", "--quiet", "--detectors=MSP,NCI,FDBD"],
        "report": [],
    }
    for _, name, *rest in commands:
        assert cli.main([name, *rest, *less[name]]) == 0
    for recipe in ("folder-ce", "folder-elogitnorm"):
        results = (tmp_path / "runs" / recipe / "eval" / "folder" / "results.md").read_text(encoding="utf-8")
        for part in ("bird", "texture", "NCI"):
            assert part in results
    assert (tmp_path / "photos.html").is_file()
    later = later.replace("\\\n", "").replace("photos/val", "photos/test").replace("new-photos/", "photos/test")
    for line in later.splitlines():  # with the net just trained; KNN has fewer images than its k
        _, name, *rest = shlex.split(line.replace("NCI,KNN", "NCI"))
        assert cli.main([name, *rest, "--workers=0", "--any-accuracy"][: -1 if name == "score" else None]) == 0
    assert (tmp_path / "scores.csv").is_file()


def test_one_class_is_refused(tmp_path, capsys):
    write_folders(tmp_path / "one", ("cat",))
    assert cli.main(on_folders(tmp_path / "one")) == 2
    assert "one class in" in (error := capsys.readouterr().err)
    assert "(cat), expected at least two" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert cli.main(on_folders(tmp_path / "nowhere")) == 2
    assert f"no folder {tmp_path / 'nowhere'} (--data-root); expected" in capsys.readouterr().err


def test_evaluation_says_what_is_missing_and_where_to_get_it(root, tmp_path, capsys):
    assert cli.main(arguments(root, "--out=run", "--quiet", epochs=1)) == 0
    (tmp_path / "empty").mkdir()
    told = []
    for folder in ("nowhere", "empty"):
        assert cli.main(["evaluate", "run", f"--data-root={folder}", "--workers=0"]) == 2
        told.append(capsys.readouterr().err.replace(folder, "DIR"))
    assert told[0] == told[1]
    assert "CIFAR-10: missing in DIR: cifar-10-batches-py" in told[0]
    assert "https://" in told[0]
    assert "--download" in told[0]


def test_the_benchmarks_are_named_in_the_help(capsys):
    assert [*recipes.BENCHMARK_NAMES] == data.benchmarks.known()
    assert cli.main(["train", "--help"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(", ".join(recipes.BENCHMARK_NAMES)) == 1


# ---- in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", ["train/cat/05.png", "val/dog/03.png"])
def test_a_broken_image_ends_the_training_with_its_name(broken, workers, tmp_path):
    write_folders(tmp_path / "photos")
    (tmp_path / "photos" / broken).write_bytes(b"no image")
    ended = run(*on_folders(tmp_path / "photos", f"--workers={workers}", "--quiet"))  # TimeoutExpired if it hangs
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"ood-fast: error: image {tmp_path / 'photos' / broken}: cannot be read")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "death", "code"), [([], "SIGTERM:1:2", 143), (["--set=lr=1e30"], "", 1)])
def test_workers_hold_no_exit_up(settings, death, code, tmp_path):
    write_folders(tmp_path / "photos")
    environment = {"OOD_FAST_TEST_SIGNAL": death} if death else {}
    ended = run(*on_folders(tmp_path / "photos", "--workers=2", "--quiet", *settings), **environment)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_workers_hold_an_exit_by_a_bug_up_neither(tmp_path):
    write_folders(tmp_path / "photos")
    code = (
        "import sys; from ood_fast.data import images; from ood_fast.cli import main; "
        "images.Files.path = lambda *_: {}['a bug']; sys.exit(main())"
    )
    ended = run(*on_folders(tmp_path / "photos", "--workers=2", "--quiet"), launcher=("-c", code))
    assert ended.returncode == 1
    assert "KeyError" in ended.stderr


@pytest.mark.slow
def test_killed_in_mid_epoch_and_continued_to_the_same_bits(root, tmp_path):
    """kill -9 in epoch 2 before step 3, with dropout, mixing and loading processes: what is on the disk suffices."""
    command = arguments(root, "--workers=2", model="tiny_dropout", mixup=0.5, epochs=3)
    assert cli.main([*command, "--out=whole", "--quiet"]) == 0
    killed = run(*command, "--out=run", OOD_FAST_TEST_SIGNAL="SIGKILL:2:3")
    assert killed.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert not (tmp_path / "run" / "final.ckpt").exists()
    again = run(*command, "--out=run", "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_bits(final("run"), final("whole"))
    assert_same_bits(
        torch.load(tmp_path / "run" / "best.ckpt", weights_only=True),
        torch.load(tmp_path / "whole" / "best.ckpt", weights_only=True),
    )


@pytest.mark.slow
def test_no_room_for_a_checkpoint(root, tmp_path):
    """A limit on the size of files, below that of last.ckpt, stands for a full disk: the one of before stays."""
    command = arguments(root, "--out=run", model="small_cnn", epochs=2)
    assert run(*command, OOD_FAST_TEST_SIGNAL="SIGTERM:2:1").returncode == 143
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({len(before) // 2}, {hard}))"
    code = f"{limit}; import sys; from ood_fast.cli import main; sys.exit(main())"
    stuck = run(*command, "--resume", launcher=("-c", code))
    assert stuck.returncode == 1, stuck.stderr
    assert "failed: " in stuck.stderr
    assert "last.ckpt" in stuck.stderr
    assert "the checkpoints before it are kept in run" in stuck.stderr
    assert "Traceback" not in stuck.stderr
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


torchrun = functools.partial(run, processes=2)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_train_as_one(root, tmp_path):
    """Half the batch on each of two: the weights of one process with the whole batch, and the same on both. One of them
    fetches the images.
    """
    assert cli.main(arguments(root, "--out=one", "--quiet")) == 0
    (fetched := tmp_path / "fetched").mkdir()
    finished = torchrun(
        *arguments(fetched, "--out=two", "--download", batch_size=8),
        OOD_FAST_TEST_WEIGHTS="1",
        OOD_FAST_TEST_DOWNLOAD=f"{N_IMAGES}:40",
    )
    assert finished.returncode == 0, finished.stderr
    assert (fetched / "asked").read_text() == "rank 0\n"
    assert finished.stdout.count("Trained 2 epochs") == 1
    first, second = (torch.load(tmp_path / "two" / f"weights of rank {rank}.pt") for rank in (0, 1))
    assert_same_bits(first, second)
    for name, value in final("one").items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    one, two = (torch.load(tmp_path / name / "last.ckpt", weights_only=True)["history"] for name in ("one", "two"))
    for row, expected in zip(two, one, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["train_accuracy"] == expected["train_accuracy"]
        assert row["validation_accuracy"] == expected["validation_accuracy"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_stopped_and_continued_to_the_same_bits(root, tmp_path):
    """SIGTERM reaches one of the two; both stop at one step. Dropout differs between them, and comes back."""
    command = arguments(root, model="tiny_dropout", batch_size=8)
    whole = torchrun(*command, "--out=whole", OOD_FAST_TEST_WEIGHTS="1")
    assert whole.returncode == 0, whole.stderr
    first, second = (torch.load(tmp_path / "whole" / f"weights of rank {rank}.pt") for rank in (0, 1))
    assert_same_bits(first, second)  # running means included
    stopped = torchrun(*command, "--out=run", OOD_FAST_TEST_SIGNAL="SIGTERM:2:2")
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped by SIGTERM in epoch 2, after step 2; saved") == 1
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["step"], len(state["ranks"])) == (1, 2, 2)
    other = cli.main([*command, "--out=run", "--resume"])  # one process is another run
    assert other == 2
    stopped = torchrun(*command, "--out=run", "--resume", OOD_FAST_TEST_SIGNAL="SIGTERM:2:validation")
    last_step = N_IMAGES // 16
    assert f"stopped by SIGTERM in epoch 2, after step {last_step}; saved" in stopped.stderr
    again = torchrun(*command, "--out=run", "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_bits(final("run"), final("whole"))
