"""Files of others that are damaged, hostile or of another kind: an error that names them, never other numbers."""

import json
import os

import numpy as np
import pytest
from torch import nn

from ood_fast import checks, cli, detectors, features, models, recipes


def flipped(path, needle, bit=0x40):
    """The file with an exponent bit of the first number of `needle` changed."""
    content = bytearray(path.read_bytes())
    content[bytes(content).index(needle) + 3] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.safetensors"])
def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    net = nn.Linear(64, 10)
    models.save_checkpoint(net, tmp_path / name)
    models.load_checkpoint(nn.Linear(64, 10), tmp_path / name)
    flipped(tmp_path / name, net.weight.detach().numpy().tobytes()[:32])
    with pytest.raises(checks.UserError, match=f"{name}: .*is damaged"):
        models.load_checkpoint(nn.Linear(64, 10), tmp_path / name)


def test_safetensors_of_others_have_no_checksum_and_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net = nn.Linear(4, 2)
    safetensors.save_file(net.state_dict(), tmp_path / "a.safetensors")
    models.load_checkpoint(nn.Linear(4, 2), tmp_path / "a.safetensors")


# ---- recipes and runs


@pytest.mark.parametrize("name", ["/anywhere", "../x", "a/b", "a\\b", "..", "", "a\0b", "C:x"])
def test_a_recipe_cannot_choose_where_it_is_written(tmp_path, name):
    (tmp_path / "r.json").write_text(json.dumps({"base": "digits-ce", "name": name}))
    with pytest.raises(checks.UserError, match="name: got"):
        recipes.find(tmp_path / "r.json")


def test_settings_without_a_name_are_a_recipe(tmp_path):
    assert recipes.from_dict({"epochs": 3}).epochs == 3
    plain = recipes.TrainingRecipe()
    assert recipes.from_dict(recipes.as_dict(plain)) == plain  # as load_run reads it
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(checks.UserError, match="no JSON"):
        recipes.find(tmp_path / "r.json")


def test_a_flipped_bit_in_parquet_is_found_where_its_writer_left_checksums(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    z = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    path, table = tmp_path / "z.parquet", pa.table({"features": pa.array(list(z))})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    assert next(features.batches(path)).features.tolist() == z.tolist()
    flipped(path, z.tobytes()[:32])
    with pytest.raises(checks.UserError, match=r"z\.parquet: .*(damaged|cannot be read)"):
        next(features.batches(path))


# ---- what `fit` writes


@pytest.mark.parametrize(("out", "message"), [
    ("d.pt", "what is written is safetensors"),
    ("d.NPZ", "what is written is safetensors"),
    ("folder", "is a folder"),
    ("file/d.safetensors", "cannot be a folder"),
])  # fmt: skip
def test_fit_looks_at_out_before_it_works(tmp_path, monkeypatch, capsys, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["fit", "--features", "not-there.npz", "--out", out]) == 2
    assert message in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_what_is_no_file_is_not_replaced_by_detectors(tmp_path, capsys):
    """safetensors would put a file in the place of /dev/null, if root asks."""
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["fit", "--features", "not-there.npz", "--out", str(tmp_path / "pipe")]) == 2
    assert "pipe is no regular file, expected the name of a file" in capsys.readouterr().err
    with pytest.raises(OSError, match="expected the path of a file"):
        detectors.MSP().save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_while_detectors_are_written(tmp_path, monkeypatch, capsys):
    safetensors = pytest.importorskip("safetensors")

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    np.savez("z.npz", features=np.ones((8, 3), np.float32), W=np.eye(3, dtype=np.float32))
    assert cli.main(["fit", "--features", "z.npz", "--detectors", "MSP", "--out", "d.safetensors", "--quiet"]) == 1
    assert "cannot write d.safetensors: I/O error" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.npz"]
