"""Commands that end early: a full disk, Ctrl-C, a process that dies. A line, an exit code, and nothing half done."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import TORCHRUN, python

from ood_fast import cli, files, models
from ood_fast.data.images import Files

resource = pytest.importorskip("resource")

FIT = ["fit", "--features", "train.npz", "--detectors", "KNN,NCI", "--set", "KNN.k=3", "--out", "d.safetensors"]
SCORE = ["score", "--detectors", "given.safetensors", "--features", "test.npz", "--overwrite", "--out"]
EVALUATE = ["evaluate", "--features", "train.npz", "--test", "test.npz", "--ood-features", "x=ood.npz"]
EVALUATE += ["--detectors", "MSP", "--bootstrap", "0", "--out", "eval"]
TRAIN = ["train", "--recipe", "digits-ce", "--set", "epochs=1", "--workers", "0", "--out", "run"]
COMPARE = ["compare", "--epochs", "1", "--seeds", "1", "--losses", "ce", "--detectors", "MSP", "--out", "compared"]
WRITERS = {  # the command, and a size of a file that it goes beyond
    "fit": (FIT, 1000),
    "score csv": ([*SCORE, "s.csv"], 60_000),
    "score parquet": ([*SCORE, "s.parquet"], 1000),
    "evaluate": (EVALUATE, 1000),
    "train": (TRAIN, 10_000),
    "compare": (COMPARE, 1000),
    "report": (["report", "given run"], 1000),
}


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond this: a write says so as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    W = random.normal(size=(3, 6)).astype(np.float32)
    for name, rows in (("train", 60), ("test", 1500), ("ood", 200)):
        z = random.normal(size=(rows, 6)).astype(np.float32)
        logits = z @ W.T
        np.savez(folder / f"{name}.npz", features=z, logits=logits, targets=logits.argmax(1), W=W)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*FIT[:-1], "given.safetensors", "--quiet"]) == 0
        assert cli.main([*TRAIN[:-1], "given run", "--quiet"]) == 0
    return folder


@pytest.fixture
def folder(given, tmp_path, monkeypatch) -> Path:
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def without_progress(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without what the next run continues from: rows of `score`, what `train` says of its run."""
    return {name: value for name, value in found.items() if not name.startswith((".s.", "run/log", "run/run"))}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk(kind, folder, capsys):
    command, n_bytes = WRITERS[kind]
    before = tree()
    with full_disk(n_bytes):
        code = cli.main([*command, "--quiet"])
    told = capsys.readouterr().err
    assert code == 1, told
    assert told.startswith("ood-fast: failed: ")
    assert told.count("\n") == 1
    assert "too large" in told.lower() or "full" in told
    assert without_progress(tree()) == before
    again = [*command, "--resume"] if kind == "train" else command
    assert cli.main([*again, "--quiet"]) == 0, capsys.readouterr().err
    assert not [path for path in Path().rglob(".*") if path.is_file()]


def interrupted(path: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", WRITERS)
def test_ctrl_c(kind, folder, capsys, monkeypatch):
    """While what was written goes to the disk, before it takes its place."""
    if kind == "train":
        pytest.skip("a signal, see test_cli_train.py")

    before = tree()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", interrupted)
        assert cli.main([*WRITERS[kind][0], "--quiet"]) == 130
    assert capsys.readouterr().err == "ood-fast: interrupted\n"
    assert without_progress(tree()) == before


def test_a_disk_without_room_for_one_row_leaves_no_part(folder, capsys):
    for n_bytes in (0, 30):
        with full_disk(n_bytes):
            assert cli.main([*SCORE, "s.csv", "--quiet"]) == 1
        assert not list(Path().glob(".s.csv*"))


@pytest.mark.parametrize(
    "line",
    [b'[3, "x", 1', b"[]", b'{"a": 1}', b'["0", "x", 1, [1.0, 2.0]]', b'[0, "x", 1, [1.0]]', b"\xff\xff", b"[" * 9],
)
def test_damaged_rows_of_an_interrupted_run_are_not_continued(line, folder, capsys, monkeypatch):
    command = [*SCORE, "s.csv", "--quiet"]
    command.remove("--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", interrupted)
        assert cli.main(command) == 130
    part = Path(".s.csv.part0")
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:5], line + b"\n", *lines[6:]]))
    assert cli.main(command) == 2
    assert "line 6: is damaged; pass --overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0


def test_parts_of_more_processes_are_removed(folder):
    Path(".s.csv.part1").touch()
    Path(".s.csv.part1.mine").touch()
    assert cli.main([*SCORE, "s.csv", "--quiet"]) == 0
    assert [path.name for path in Path().glob(".s.csv*")] == [".s.csv.part1.mine"]


# ---- processes that die


@pytest.fixture
def images(folder) -> list[str]:
    random = np.random.default_rng(0)
    Path("images").mkdir()
    for index in range(8):
        pixels = random.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"images/{index}.png")
    torch.manual_seed(0)
    models.save_checkpoint(models.create("small_cnn", 2, in_channels=3), "w.pth")
    options = ["--data", "images", "--model", "small_cnn", "--checkpoint", "w.pth", "--n-classes", "2", "--size", "16"]
    return [*options, "--resize", "16", "--mean", "0,0,0", "--std", "1,1,1", "--device", "cpu", "--workers", "0"]


def kill_workers(patch: pytest.MonkeyPatch) -> None:
    def dying(self: object, index: int) -> None:
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(Files, "image", dying)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked: they know of the patch")
@pytest.mark.parametrize("command", ["fit", "score", "train"])
def test_a_loading_process_that_dies_ends_the_command(command, images, capsys, monkeypatch):
    fit = ["fit", *images, "--detectors", "NCI", "--out", "e.safetensors", "--quiet"]
    assert command != "score" or cli.main(fit) == 0
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        shutil.copytree("images", f"own/{folder}")
    own = ["--set", "model=small_cnn", "--set", "batch_size=4", "--data-root", "own", "--image-size", "16"]
    arguments = {
        "fit": fit,
        "score": ["score", *images, "--detectors", "e.safetensors", "--out", "s.csv", "--quiet"],
        "train": ["train", "--recipe", "folder-ce", *TRAIN[3:5], "--out", "run", *own, "--quiet"],
    }[command]
    capsys.readouterr()
    kill_workers(monkeypatch)
    assert cli.main([*arguments, "--workers", "1"]) == 1
    told = capsys.readouterr().err
    assert "ood-fast: failed: a process that loads images has died" in told
    assert told.count("\n") == 1
    assert not Path("s.csv").exists()


PLUGIN = """
import os, signal
from ood_fast.data.images import Files
read = Files.image
def dying(self, index):
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index)
Files.image = dying
"""


@pytest.mark.slow
def test_a_process_of_torchrun_that_dies_ends_all(images):
    Path("dying.py").write_text(PLUGIN)
    command = ["fit", *images, "--detectors", "NCI", "--out", "e.safetensors", "--quiet", "--plugin", "dying"]
    done = python(*TORCHRUN, *command)
    assert done.returncode != 0
    assert not Path("e.safetensors").exists()
