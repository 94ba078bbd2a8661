"""Two processes on one file or folder, damaged checkpoints, names that lead elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import COMMAND, forked
from torch import nn

from ood_fast import checks, features, files, models, recipes
from ood_fast.models.checkpoints import read_checkpoint

N_FILES, N_ROWS = 200, 20


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    W = random.normal(size=(3, 6)).astype(np.float32)
    Path("f").mkdir()
    for name, rows in [("train", 60), *((f"f/{index:05d}", N_ROWS) for index in range(N_FILES))]:
        z = random.normal(size=(rows, 6)).astype(np.float32)
        np.savez(f"{name}.npz", features=z, logits=z @ W.T, W=W)
    fit = ["fit", "--features", "train.npz", "--detectors", "NCI", "--out", "d.safetensors", "--quiet"]
    assert forked(*COMMAND, *fit).returncode == 0
    return tmp_path


@pytest.mark.slow
def test_two_that_continue_one_run_write_no_row_twice(stored):
    command = [*COMMAND, "score", "--detectors", "d.safetensors", "--features", "f", "--out", "s.csv", "--quiet"]
    begun = subprocess.Popen([sys.executable, *command])
    part = Path(".s.csv.part0")
    while begun.poll() is None and not (part.exists() and part.stat().st_size > 5000):
        time.sleep(0.01)
    begun.send_signal(signal.SIGSTOP)  # still alive, and holds the file
    second = forked(*command)
    assert second.returncode == 2, second.stderr
    assert "another ood-fast score is at work on s.csv" in second.stderr
    begun.kill()
    begun.wait()
    assert forked(*command).returncode == 0
    rows = Path("s.csv").read_text().splitlines()[1:]
    assert len(rows) == len({row.split(",")[0] for row in rows}) == N_FILES * N_ROWS


@pytest.mark.slow
def test_two_trainings_in_one_folder(tmp_path):
    command = [*COMMAND, "train", "--recipe", "digits-ce", "--set", "epochs=3", "--workers", "0", "--quiet"]
    command += ["--out", str(tmp_path / "run"), "--seed"]
    both = [subprocess.Popen([sys.executable, *command, seed], stderr=subprocess.PIPE, text=True) for seed in "01"]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    trained = json.loads((tmp_path / "run/run.json").read_text())
    assert both[trained["seed"]].returncode == 0
    assert trained["status"] == "complete"


def test_a_training_waits_for_the_folder_and_then_refuses(tmp_path, monkeypatch):
    from ood_fast.training.folder import RunFolder

    monkeypatch.setattr(files.locked.__wrapped__, "__defaults__", (0.1,))
    busy = pytest.raises(checks.UserError, match="another training is at work")
    with files.locked(tmp_path), busy, RunFolder(tmp_path).alone():
        pass
    with RunFolder(tmp_path).alone():
        pass


def test_nothing_is_left_of_a_training_that_did_not_begin(tmp_path):
    from ood_fast.training.folder import RunFolder

    with pytest.raises(KeyError), RunFolder(tmp_path / "a/b").alone():
        raise KeyError
    assert not (tmp_path / "a").exists()


# ---- damaged files


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth"])
def test_a_flipped_bit_is_found(ending, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    path = tmp_path / f"best.{ending}"
    models.save_checkpoint(model, path)
    content = bytearray(path.read_bytes())
    at = content.find(model.weight.detach().numpy().tobytes()[:64])
    for bit in (1, 0x40):
        flipped = bytearray(content)
        flipped[at + 3] ^= bit
        path.write_bytes(flipped)
        with pytest.raises(checks.UserError, match=r"best.*is damaged.*checksum"):
            models.load_checkpoint(nn.Linear(64, 10), path)
    path.write_bytes(content)
    models.load_checkpoint(nn.Linear(64, 10), path)


def test_a_flipped_bit_in_stored_features_is_found(tmp_path):
    z = torch.randn(50, 8)
    torch.save({"features": z}, tmp_path / "z.pt")
    content = bytearray((tmp_path / "z.pt").read_bytes())
    content[content.find(z.numpy().tobytes()[:64]) + 3] ^= 0x40
    (tmp_path / "z.pt").write_bytes(content)
    with pytest.raises(checks.UserError, match="damaged"):
        features.load(tmp_path / "z.pt")


# ---- checkpoints that hold more than weights


class Whole(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        ({"state_dict": {"w": torch.ones(1)}, "best": np.float64(0.5)}, "numpy"),
        (Whole(2, 2), "Whole"),
        ({"model": Whole(2, 2)}, "Whole"),
    ],
)
def test_a_checkpoint_with_objects_names_them_and_the_way_out(content, named, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(checks.UserError) as caught:
        read_checkpoint(tmp_path / "w.pth")
    message = str(caught.value)
    assert named in message
    assert "torch.load(" in message
    assert "torch.save(" in message
    assert "\x1b" not in message
    assert "\n" not in message


# ---- names


@pytest.mark.parametrize("name", ["", ".", "..", "../../x", "/tmp/x", "a/b", "a\\b", "x\0y", "C:x", 3, None])
def test_a_recipe_has_a_name_that_a_folder_can_have(name, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"base": "digits-ce", "name": name}))
    with pytest.raises(checks.UserError, match="name"):
        recipes.find(tmp_path / "r.json")


@pytest.mark.parametrize("base", ["r.json", "../r.json", "nothing", 1, None, []])
def test_the_base_of_a_recipe_is_one_of_the_package(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text(json.dumps({"base": base}))
    with pytest.raises(checks.UserError, match="base: unknown recipe"):
        recipes.find("r.json")
    assert os.listdir() == ["r.json"]


def test_parts_are_held_until_they_are_merged(tmp_path, monkeypatch):
    """The second process of torchrun is done first: until the first has merged its part, nobody else gets it."""
    from ood_fast.commands import table
    from ood_fast.detectors import MSP, DetectorSet

    meeting = threading.Barrier(2)
    detectors, out, seen = DetectorSet([MSP()]), tmp_path / "s.csv", []

    class Rank(SimpleNamespace):
        size = 2

        def everyone(self, value):
            return [meeting.wait(20), value]

    fcntl = pytest.importorskip("fcntl")

    def score(rank: int) -> None:
        with table.ScoreTable(out, detectors, "same", Rank(rank=rank), overwrite=False) as scores:
            scores.write([rank], [f"{rank}.png"], torch.tensor([0]), {"MSP": torch.tensor([0.5])})
            scores.finish()

    merged = table.ScoreTable._merged

    def slowly(self):
        time.sleep(0.2)  # the other one is long done
        with open(tmp_path / ".s.csv.part1", "rb") as part, pytest.raises(BlockingIOError):
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(1)
        return merged(self)

    monkeypatch.setattr(table.ScoreTable, "_merged", slowly)
    threads = [threading.Thread(target=score, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [1]
    assert len(out.read_text().splitlines()) == 3
