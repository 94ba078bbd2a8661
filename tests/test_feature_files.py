"""Feature files that are damaged, or hold something else than a value in every row: errors name file, row, column."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ood_fast import checks, detectors, evaluation, features, intact

ROWS = [[float(10 * i + j) for j in range(8)] for i in range(4)]


def parquet(path: Path, /, **columns) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def lists(rows, kind=None, size=-1):
    pa = pytest.importorskip("pyarrow")
    return pa.array(rows, pa.list_(kind or pa.float32(), size))


def parquet_columns() -> dict[str, tuple[dict, str]]:
    pa = pytest.importorskip("pyarrow")
    good = lists(ROWS)
    holed = [ROWS[0], ROWS[1], [*ROWS[2][:5], None, *ROWS[2][6:]], ROWS[3]]
    return {
        "null row": ({"features": lists([ROWS[0], None, *ROWS[2:]])}, "row 1, column 'features': got null"),
        "null row of a fixed size": (
            {"features": lists([*ROWS[:3], None], size=8)},
            "row 3, column 'features': got null",
        ),
        "lengths that add up": (
            {"features": lists([ROWS[0][:3], ROWS[1][:5], ROWS[2][:3], ROWS[3][:5]])},
            "row 1, column 'features': got 5 values, expected 3",
        ),
        "empty first": ({"features": lists([[], *ROWS[1:]])}, "row 0, column 'features': got 0 values"),
        "all empty": ({"features": lists([[]] * 4)}, "row 0, column 'features': got 0 values"),
        "empty last": ({"features": lists([*ROWS[:3], []])}, "row 3, column 'features': got 0 values, expected 8"),
        "a null inside": ({"features": lists(holed)}, "row 2, column 'features': got null at place 5"),
        "a null inside a fixed size": (
            {"features": lists(holed, size=8)},
            "row 2, column 'features': got null at place 5",
        ),
        "no lists": ({"features": pa.array([1.0] * 4)}, "row 0, column 'features': got double"),
        "lists of text": ({"features": pa.array([["a"]] * 4)}, "row 0, column 'features': got list.*string"),
        "integers": ({"features": lists([[1, 2]] * 4, pa.int64())}, "got list.*int64.*, expected lists of floating"),
        "null logits": ({"features": good, "logits": lists([*ROWS[:2], None, ROWS[3]])}, "row 2, column 'logits'"),
        "null target": ({"features": good, "target": pa.array([0, 1, None, 2])}, "row 2, column 'target': got null"),
        "float target": ({"features": good, "target": pa.array([0.0, 1.0, 2.0, 1.0])}, "column 'target': got double"),
        "null path": ({"features": good, "path": pa.array(["a", None, "c", "d"])}, "row 1, column 'path': got null"),
    }


CASES = "null row, null row of a fixed size, lengths that add up, empty first, all empty, empty last, a null inside, "
CASES += (
    "a null inside a fixed size, no lists, lists of text, integers, null logits, null target, float target, null path"
)


@pytest.mark.parametrize("name", CASES.split(", "))
def test_parquet_errors(tmp_path, name):
    columns, message = parquet_columns()[name]
    path = parquet(tmp_path / "x.parquet", **columns)
    with pytest.raises(checks.UserError, match=rf"x\.parquet: .*{message}"):
        next(features.batches(path))


def test_parquet_errors_count_rows_of_the_file(tmp_path):
    rows = [[1.0, 2.0]] * 30
    path = parquet(tmp_path / "x.parquet", features=lists([*rows[:25], None, *rows[26:]]))
    with pytest.raises(checks.UserError, match="row 25, column 'features': got null"):
        list(features.batches(path, size=10))
    path = parquet(tmp_path / "x.parquet", features=lists([*rows[:10], *[[1.0, 2.0, 3.0]] * 10]))
    with pytest.raises(checks.UserError, match="row 10, column 'features': got 3 values, expected 2"):
        list(features.batches(path, size=10))


@pytest.mark.parametrize("kind", ["list", "fixed", "large", "dictionary", "half", "double"])
def test_parquet_types_that_are_read(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    types = {
        "list": pa.list_(pa.float32()),
        "fixed": pa.list_(pa.float32(), 8),
        "large": pa.large_list(pa.float32()),
        "dictionary": pa.list_(pa.float32()),
        "half": pa.list_(pa.float16()),
        "double": pa.list_(pa.float64()),
    }
    numbers = [np.array(row, np.float16) for row in ROWS] if kind == "half" else ROWS
    paths = pa.array([b"\xff.png", b"b", b"c", b"d"]) if kind == "fixed" else pa.array(["a", "b", "a", "d"])
    targets = pa.array([2, 0, 1, 2], pa.uint8())
    if kind == "dictionary":
        paths, targets = paths.dictionary_encode(), targets.dictionary_encode()
    path = parquet(tmp_path / "x.parquet", features=pa.array(numbers, types[kind]), target=targets, path=paths)
    stored = next(features.batches(path))
    assert stored.features.tolist() == ROWS
    assert stored.targets.tolist() == [2, 0, 1, 2]
    assert stored.paths == (("\udcff.png", "b", "c", "d") if kind == "fixed" else ("a", "b", "a", "d"))


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".parquet"])
@pytest.mark.parametrize("names", [("labels", "path"), ("y", "paths"), ("target", "path")])
def test_targets_and_paths_by_other_names(tmp_path, suffix, names):
    file, held = tmp_path / f"x{suffix}", dict(zip(names, ([2, 0], ["a", "b"]), strict=True))
    if suffix == ".parquet":
        parquet(file, features=lists(ROWS[:2]), **held)
    elif suffix == ".pt":
        torch.save({"features": torch.tensor(ROWS[:2]), **held}, file)
    else:
        np.savez(file, features=ROWS[:2], **held)
    stored = next(features.batches(file))
    assert (stored.targets.tolist(), stored.paths) == ([2, 0], ("a", "b"))


def test_names_that_mean_the_same_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", features=ROWS, labels=[0] * 4, targets=[1] * 4)
    with pytest.raises(checks.UserError, match=r"x.npz: holds `labels` and `targets`, expected one of them"):
        features.load(tmp_path / "x.npz")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_arrays([lists(ROWS)] * 2, ["features"] * 2)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(checks.UserError, match=r"x.parquet: has more than one column 'features'"):
        next(features.batches(tmp_path / "x.parquet"))


def test_hidden_files_of_a_folder_are_left_out(tmp_path):
    np.savez(tmp_path / "x.npz", features=ROWS)
    (tmp_path / "._x.npz").write_bytes(b"of macOS")
    assert [len(stored) for stored in features.batches(tmp_path)] == [4]


def test_another_byte_order_is_refused_with_the_cure(tmp_path):
    np.savez(tmp_path / "big.npz", features=np.asarray(ROWS, ">f4"))
    with pytest.raises(
        checks.UserError, match=r"big\.npz: features: got >f4 of another byte order; .*astype\('float32'\)"
    ):
        features.load(tmp_path / "big.npz")


def npz_header(shape: str, descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def test_damaged_files(tmp_path, monkeypatch):
    z = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    np.savez_compressed(tmp_path / "bits.npz", features=z)
    content = bytearray((tmp_path / "bits.npz").read_bytes())
    content[700:716] = bytes(16)
    (tmp_path / "bits.npz").write_bytes(content)
    (tmp_path / "array.npz").write_bytes(array(z))
    zipped(tmp_path / "huge.npz", features=npz_header("(1099511627776, 4)"))
    zipped(tmp_path / "short.npz", features=npz_header("(3, 4)") + bytes(47))
    zipped(tmp_path / "negative.npz", features=npz_header("(-1, 4)"))
    zipped(tmp_path / "narrow.npz", features=array(z[:, :0]))
    zipped(tmp_path / "paths.npz", features=array(z), paths=array(np.array(3.0)))
    np.savez(tmp_path / "objects.npz", features=z, paths=np.array(["a", None] * 30, dtype=object))
    torch.save({"features": torch.zeros(3, 2), "paths": 5}, tmp_path / "paths.pt")
    torch.save({"features": torch.zeros(3, 2), "paths": ["a", None, "c"]}, tmp_path / "null.pt")
    torch.save({"features": torch.zeros(3, 2).to_sparse()}, tmp_path / "sparse.pt")
    torch.save({"features": torch.zeros(3, 2).to(torch.float8_e4m3fn)}, tmp_path / "float8.pt")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(checks.UserError, match=f"{file.name}: "):
            next(features.batches(file))
    with pytest.raises(checks.UserError, match="paths, row 1: got null, expected text"):
        features.load(tmp_path / "null.pt")
    zipped(tmp_path / "good.npz", features=array(z), paths=array(np.array([b"\xe9.png"] * 60)), other=array(z))
    assert features.load(tmp_path / "good.npz").paths[0] == "\udce9.png"  # no "b'...'"
    monkeypatch.setattr(intact, "memory", lambda: 1000)
    with pytest.raises(checks.UserError, match=r"features: takes .* more than this machine has"):
        features.load(tmp_path / "good.npz")


@pytest.mark.parametrize("name", ["features", "logits"])
@pytest.mark.parametrize("suffix", ["npz", "pt", "parquet"])
def test_nan_is_told_with_the_row_of_the_file(tmp_path, name, suffix):
    held = {name: np.zeros((100, 3), np.float32) for name in ("features", "logits")}
    held[name][77, 1] = np.nan
    paths = [f"{row}.png" for row in range(100)]
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(path, **held, paths=paths)
    elif suffix == "pt":
        torch.save({**{key: torch.from_numpy(value) for key, value in held.items()}, "paths": paths}, path)
    else:
        parquet(path, **{key: lists(value.tolist()) for key, value in held.items()}, path=paths)
    batches = features.batches(path, size=30)
    assert len(next(batches)) == len(next(batches)) == 30
    with pytest.raises(checks.UserError, match=rf"{name}: got NaN in 1 of 30 .* row 77 of the file \(77\.png\)"):
        next(batches)


def test_what_detectors_say_of_a_row_names_that_of_the_file(tmp_path):
    held = np.ones((100, 3), np.float32)
    held[77, 1] = np.inf
    np.savez(tmp_path / "x.npz", features=held, paths=[f"{row}.png" for row in range(100)])
    *_, third, _ = features.batches(tmp_path / "x.npz", size=30)
    for part in (third, third.rows(slice(5, None))):
        message = r"x\.npz: features: got inf in .* row 77 of the file \(77\.png\)"
        with pytest.raises(checks.UserError, match=message), part.named():
            detectors.KNN(k=1).fit_features(part.features)


def test_files_of_one_folder_have_one_width(tmp_path):
    for number, width in enumerate((3, 3, 4)):
        np.savez(tmp_path / f"{number}.npz", features=np.zeros((2, width), np.float32))
    with pytest.raises(checks.UserError, match=r"2\.npz: features: got 4 a row, expected 3"):
        list(features.batches(tmp_path))


def test_logits_that_the_head_does_not_make_are_refused(tmp_path):
    z, W, b = torch.randn(20, 6), torch.randn(3, 6), torch.randn(3)
    f = torch.nn.functional.linear(z, W, b)
    masked = f.clone()
    masked[3, 1] = -torch.inf
    for logits in (f, f.bfloat16().float(), f.half(), masked):
        torch.save({"features": z, "logits": logits, "W": W, "b": b}, tmp_path / "x.pt")
        (stored,) = features.batches(tmp_path / "x.pt")
        assert stored.with_logits(None) is stored is stored.with_logits((W, b))
    wrong = {"rows": (f.flip(0), W, b), "classes": (f.flip(1), W, b), "scale": (f, 2 * W, b), "no bias": (f, W, None)}
    for logits, *head in wrong.values():
        given = {"W": head[0]} if head[1] is None else {"W": head[0], "b": head[1]}
        torch.save({"features": z, "logits": logits, **given}, tmp_path / "x.pt")
        (stored,) = features.batches(tmp_path / "x.pt")
        for of in (None, tuple(head)):
            with pytest.raises(checks.UserError, match=r"x\.pt: the logits are not F\.linear.*another order"):
                stored.with_logits(of)


@pytest.mark.parametrize("part", ["train", "test", "csid"])
def test_targets_in_another_order_are_refused_by_an_evaluation(tmp_path, part):
    torch.manual_seed(0)
    W = torch.randn(4, 6)
    for name in ("train", "test", "csid", "far"):
        z = torch.randn(60, 6)
        y = (z @ W.T).argmax(1)
        y[::6] = 0
        held = {"features": z, "logits": z @ W.T, "targets": (y + (name == part)) % 4, "W": W}
        np.savez(tmp_path / f"{name}.npz", **{key: value.numpy() for key, value in held.items()})
    ood = {"far": ("far", tmp_path / "far.npz"), "c": ("csid", tmp_path / "csid.npz")}
    with pytest.raises(checks.UserError, match=f"{part}.npz: the targets are not in the order of the model's classes"):
        evaluation.evaluate_features(tmp_path / "train.npz", tmp_path / "test.npz", ood, ["MSP"], bootstrap=0)


@pytest.mark.parametrize(
    ("train", "test", "far", "said"),
    [("a", "b", "b", "far: is the same as test"), ("a", "a", "c", "test: is the same as train")],
)
def test_one_file_in_two_roles_is_refused(tmp_path, train, test, far, said):
    for name in "abc":
        np.savez(tmp_path / f"{name}.npz", features=np.ones((4, 2)), logits=np.ones((4, 2)))
    path = lambda name: tmp_path / ".." / tmp_path.name / f"{name}.npz"  # noqa: E731
    with pytest.raises(checks.UserError, match=said):
        evaluation.evaluate_features(path(train), tmp_path / f"{test}.npz", {"far": ("far", path(far))}, ["MSP"])


def test_files_of_torch_before_1_6(tmp_path):
    held = {"features": torch.tensor(ROWS)}
    torch.save(held, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert features.load(tmp_path / "x.pt").features.tolist() == ROWS
