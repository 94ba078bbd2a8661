"""Damage of every format: found, or the same numbers; never another exception, never numbers of a header's promise."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ood_fast import checks, detectors, diagnostics, evaluation, features, intact, models, recipes
from ood_fast.data import readers
from ood_fast.evaluation import cache
from ood_fast.training.folder import read_info

N_MUTATIONS = 60


def mutations(content: bytes, n: int = N_MUTATIONS) -> Iterator[bytes]:
    """Flipped bits, foreign bytes, and ends that were cut off."""
    numbers = random.Random(0)
    for index in range(n):
        changed, at = bytearray(content), numbers.randrange(len(content))
        if index % 3 == 0:
            changed[at] ^= 1 << numbers.randrange(8)
        elif index % 3 == 1:
            changed[at : at + 4] = numbers.randbytes(4)
        else:
            del changed[at:]
        if changed != content:
            yield bytes(changed)


def refusal(read: Callable[[Path], Any], path: Path) -> tuple[str | None, Any]:
    """What the reader says of the file, or what it reads."""
    try:
        return None, read(path)
    except ValueError as error:
        return str(error), None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


Z, TARGETS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
HEAD = nn.Linear(6, 3)
LOGITS = HEAD(Z).detach()
STORED = {"features": Z, "logits": LOGITS, "targets": TARGETS, "W": HEAD.weight.detach(), "b": HEAD.bias.detach()}
PATHS = [f"{row}.png" for row in range(40)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    head = nn.Linear(6, 3)
    models.load_checkpoint(head, path)
    return dict(head.state_dict())


def stored(path: Path) -> dict[str, Any]:
    return dict(vars(next(features.batches(path))))


def scores(path: Path) -> dict[str, torch.Tensor]:
    found = detectors.load(path)
    return {name: found[name].score_features(Z, LOGITS) for name in found}


def fitted(path: Path) -> None:
    found = detectors.DetectorSet([detectors.KNN(k=3), detectors.NCI()])
    found.partial_fit(Z, LOGITS, TARGETS)
    found.finalize((HEAD.weight, HEAD.bias))
    found.save(path, class_names=["a", "b", "c"])


def parquet(path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"features": list(Z.numpy()), "target": TARGETS.numpy(), "path": PATHS}
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def of_the_cache(path: Path) -> None:
    for name in ("features", "logits", "targets"):
        np.save(path.with_name(f"{name}.npy"), STORED[name].numpy())
        intact.seal(path.with_name(f"{name}.npy"))
    meta = {"set": "test", "title": "Test", "group": "id"}
    path.with_name("meta.json").write_text(json.dumps({**meta, "crc32": intact.checksum_of(meta)}))


def outputs(path: Path) -> dict[str, Any]:
    held = cache.read_outputs(path.parent)
    return {**vars(held), "scores": {}}


def diagnosis(path: Path) -> None:
    chunk = [(Z, LOGITS, TARGETS)]
    diagnostics.diagnose(chunk, chunk, {}, (HEAD.weight, HEAD.bias)).save(path)


def kept_diagnosis(path: Path) -> dict[str, Any]:
    return {"text": repr(diagnostics.Diagnosis.load(path))}


ARRAYS = {name: value.numpy() for name, value in STORED.items()} | {"paths": PATHS}
FORMATS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "d.safetensors": (fitted, scores),
    "c.ckpt": (lambda path: models.save_checkpoint(HEAD, path), weights),
    "c.safetensors": (lambda path: models.save_checkpoint(HEAD, path), weights),
    "f.npz": (lambda path: np.savez(path, **ARRAYS), stored),
    "compressed.npz": (lambda path: np.savez_compressed(path, **ARRAYS), stored),
    "f.pt": (lambda path: torch.save({**STORED, "paths": PATHS}, path), stored),
    "f.parquet": (parquet, stored),
    "features.npy": (of_the_cache, outputs),
    "targets.npy": (of_the_cache, outputs),
    "meta.json": (of_the_cache, outputs),
    "diagnosis.npz": (diagnosis, kept_diagnosis),
}


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_found_or_changes_nothing(name, tmp_path):
    write, read = FORMATS[name]
    path = tmp_path / name
    write(path)
    content, expected, n_found = path.read_bytes(), read(path), 0
    for changed in mutations(content):
        path.write_bytes(changed)
        told, found = refusal(read, path)
        if told is None:
            assert same(found, expected)
        else:
            assert str(tmp_path) in told
            assert "\n" not in told
            n_found += 1
    assert n_found > N_MUTATIONS / 2


def test_damaged_recipes_are_told_with_their_path(tmp_path):
    path = tmp_path / "r.json"
    content = json.dumps({"base": "digits-ce", "name": "mine", "epochs": 4, "milestones": [1, 2], "lr": 0.1}).encode()
    for changed in mutations(content, 150):
        path.write_bytes(changed)
        told, _ = refusal(recipes.find, path)  # text has no checksum: another number is another recipe
        assert told is None or f"recipe {path}: " in told


def test_a_seal_stands_behind_what_readers_read(tmp_path):
    path, values = tmp_path / "x.npy", np.arange(5.0)
    np.save(path, values)
    with pytest.raises(ValueError, match=r"x\.npy does not agree with its checksum"):
        intact.check_seal(path)
    intact.seal(path)
    intact.check_seal(path)
    np.testing.assert_array_equal(np.load(path), values)
    np.testing.assert_array_equal(np.load(path, mmap_mode="c"), values)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="checksum"):
        intact.check_seal(path)


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def test_what_would_not_fit_into_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = npz(tmp_path / "x.npz", features=array(np.zeros((300, 4))), logits=array(np.zeros((300, 4))))
    torch.save({"features": torch.zeros(300, 8)}, tmp_path / "x.pt")
    torch.save({"features": torch.zeros(1, 1).expand(1 << 40, 8)}, tmp_path / "many.pt")  # 4 bytes in the file
    with pytest.raises(checks.UserError, match=r"many\.pt: takes .* GiB, more than this machine has"):
        features.load(tmp_path / "many.pt")
    monkeypatch.setattr(intact, "memory", lambda: 10_000.0)
    monkeypatch.setattr(np.lib.format, "read_array", None)  # each is small enough, both are not
    with pytest.raises(checks.UserError, match=r"x\.npz: logits: takes .* more than this machine has"):
        intact.read_npz(path)
    monkeypatch.setattr(intact, "memory", lambda: 9_000.0)
    with pytest.raises(checks.UserError, match=r"x\.pt: .*more than this machine has"):
        features.load(tmp_path / "x.pt")


def test_a_name_that_was_changed_in_one_of_its_two_places_is_found(tmp_path):
    path = npz(tmp_path / "x.npz", features=array([[1.0]]), logits=array([[1.0]]))
    content = path.read_bytes()
    at = content.rindex(b"logits.npy")
    path.write_bytes(content[:at] + b"Logits.npy" + content[at + 10 :])
    with pytest.raises(checks.UserError, match="damaged"):
        features.load(path)


# ---- results.json


def results_folder(folder: Path) -> Path:
    rows = {name: Z.numpy() + shift for name, shift in (("train", 0), ("test", 0), ("ood", 3))}
    W, b = STORED["W"].numpy(), STORED["b"].numpy()
    for name, z in rows.items():
        np.savez(folder / f"{name}.npz", **{**ARRAYS, "features": z, "logits": z @ W.T + b})
    files = {name: folder / f"{name}.npz" for name in rows}
    ood = {"x": ("far", files["ood"])}
    found = evaluation.evaluate_features(files["train"], files["test"], ood, ["MSP", "NCI"], bootstrap=5)
    evaluation.write(folder / "eval", found, {"command": "ood-fast evaluate ..."})
    return folder / "eval"


def test_results_are_read_as_they_were_written(tmp_path):
    folder = results_folder(tmp_path)
    held = evaluation.read(folder)
    found = evaluation.Results.from_json(held)
    assert [run.trained.name for run in found.runs] == [run["run"] for run in held["runs"]]
    assert [vars(number) for number in found.runs[0].measurements] == held["runs"][0]["measurements"]
    assert [vars(row) | {"difference": None} for row in found.summaries()] == held["summary"]
    assert next(table.title for table in evaluation.build(found)) == "AUROC (%)"


def test_damaged_results_are_refused_or_written_anew(tmp_path):
    folder = results_folder(tmp_path)
    file = folder / "results.json"
    content, n_found = file.read_bytes(), 0
    held = json.loads(content)
    for changed in mutations(content, 150):
        file.write_bytes(changed)
        told, _ = refusal(evaluation.read, folder)
        n_found += told is not None
        assert told is None or str(folder) in told
    assert n_found > 50
    for change in (
        {"runs": [{**held["runs"][0], "scores": "../../elsewhere"}]},
        {"runs": [{**held["runs"][0], "detectors": {"../x": {}}}]},
        {"runs": [{**held["runs"][0], "folder": 3}]},
        {"runs": [{**held["runs"][0], "notes": [None]}]},
        {"summary": [{**held["summary"][0], "mean": "0.5"}]},
        {"summary": [{**held["summary"][0], "method": "another"}]},
        {"sets": []},
        {"command": None},
        {"benchmark": 5},
    ):
        file.write_text(json.dumps({**held, **change}))
        with pytest.raises(checks.UserError, match=r"results\.json: is damaged: .*--overwrite"):
            evaluation.read(folder)
        assert evaluation.check_folder(folder) == folder  # with --overwrite
    file.write_bytes(content[: len(content) // 2])
    assert evaluation.check_folder(folder) == folder


# ---- lists of data sets


@pytest.mark.parametrize(
    "name", ["../../secret.png", "/etc/passwd", "a/../../../x.png", "C:/x.png", "a\\..\\..\\x", "n" * 300]
)
def test_tables_of_data_sets_name_no_file_elsewhere(name, tmp_path):
    tables = {
        "gtsrb/GT-final_test.csv": ("Filename;ClassId", f"{name};3", readers.read_gtsrb),
        "dtd/labels/val1.txt": ("", name, readers.read_dtd),
        "places365/places365_val.txt": ("", f"{name} 3", readers.read_places365),
        "tiny-imagenet-200/val/val_annotations.txt": ("", f"{name}\tn1", readers.read_tiny_imagenet),
    }
    for part in ("train1", "test1"):
        (tmp_path / "dtd/labels").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"dtd/labels/{part}.txt").touch()
    for table, (header, row, _) in tables.items():
        (tmp_path / table).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / table).write_text(f"{header}\n{row}\n")
    (tmp_path / "tiny-imagenet-200/wnids.txt").write_text("n1\n")
    for _, _, read in tables.values():
        with pytest.raises(checks.UserError, match=r"is not below the folder|missing in"):
            read(tmp_path, "test", "title", "where")
    (tmp_path / "places365/places365_val.txt").write_text(f"a.png {'9' * 5000}\n")
    with pytest.raises(checks.UserError, match=r"line 1: got"):
        readers.read_places365(tmp_path, "test", "title", "where")


def test_a_pipe_is_never_waited_for(tmp_path):
    for name in ("r.json", "d.safetensors", "f.npz", "run.json", "places365/places365_val.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: recipes.find(tmp_path / "r.json"),
        lambda: detectors.load(tmp_path / "d.safetensors"),
        lambda: features.load_head(features.files(tmp_path)[0]),
        lambda: read_info(tmp_path),
        lambda: readers.read_places365(tmp_path, "test", "title", "where"),
    ):
        with pytest.raises(ValueError, match="regular file"):
            read()


def test_arrays_of_any_name_are_written(tmp_path):
    """`np.savez` takes "file" and "allow_pickle" for keywords of its own."""
    held = {"file": np.arange(3), "allow_pickle": np.ones(2), "a/b c": np.zeros(0)}
    for packed in (False, True):
        intact.write_npz(tmp_path / "a.npz", held, packed)
        found = intact.read_npz(tmp_path / "a.npz")
        assert {name: array.tolist() for name, array in found.items()} == {k: v.tolist() for k, v in held.items()}
