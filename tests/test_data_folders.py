"""What is taken of a folder, what is left out and told, and lists of names."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from PIL import Image

from ood_fast import checks
from ood_fast.data import folders, open_benchmark, readers


def draw(path: Path, **keywords) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, **keywords)


def names_of(source) -> list[str]:
    return [os.path.relpath(source.path(row), source.root) for row in range(len(source))]


def flat(folder: Path):
    return folders.read_flat_folder(folder, "own", "")


def test_hidden_at_every_depth(tmp_path):
    root = tmp_path / ".cache" / "data"  # that the folder itself lies in a hidden one does not matter
    for name in (
        "a/1.png",
        "a/.checkpoints/2.png",
        "a/b/.deep/c/3.png",
        ".thumbs/4.png",
        "a/._1.png",
        "b/.5.png",
        "b/6.png",
    ):
        draw(root / name)
    assert names_of(flat(root)) == ["a/1.png", "b/6.png"]
    source = folders.read_image_folder(root, "own", "")
    assert names_of(source) == ["a/1.png", "b/6.png"]
    assert source.classes == ("a", "b")
    assert source.left_out == flat(root).left_out == ""


def test_links_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    draw(root / "z" / "1.png")
    draw(elsewhere / "2.png")
    for link, target in {"a": root / "z", "loop": root, "z/up": "..", "z/out": elsewhere, "out": elsewhere}.items():
        (root / link).symlink_to(target)
    (elsewhere / "back").symlink_to(tmp_path)
    source = flat(root)
    assert names_of(source) == ["out/2.png", "z/1.png"]
    assert "5 × a link to a folder that was read or that holds this one (a, loop, ...)" in source.left_out
    (root / "self").symlink_to("self")
    (root / "other").symlink_to("again")
    (root / "again").symlink_to("other")
    assert names_of(flat(root)) == ["out/2.png", "z/1.png"]
    entered = tmp_path / "entered"
    entered.symlink_to(root)
    assert len(flat(entered)) == 2


def test_class_folders_that_are_links(tmp_path):
    draw(tmp_path / "pool" / "1.png")
    for name in ("cat", "dog"):
        draw(tmp_path / "train" / name / "1.png")
    (tmp_path / "train" / "wolf").symlink_to(tmp_path / "pool")
    (tmp_path / "train" / "all").symlink_to(tmp_path / "train")
    draw(tmp_path / "train" / "cover.png")
    source = folders.read_image_folder(tmp_path / "train", "own", "")
    assert source.classes == ("cat", "dog", "wolf")
    assert "a link to a folder that holds this one (all)" in source.left_out
    assert "beside the class folders (cover.png)" in source.left_out
    (tmp_path / "train" / "hound").symlink_to("dog")
    with pytest.raises(checks.UserError, match=r"classes dog and hound of .* are one folder"):
        folders.read_image_folder(tmp_path / "train", "own", "")


def test_what_is_no_file_neither_ends_nor_blocks(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = flat(tmp_path)
    assert names_of(source) == ["a.png"]
    assert "1 × a dangling link (gone.png)" in source.left_out
    assert "1 × no regular file (pipe.png)" in source.left_out
    named = folders.Files(tmp_path, ["pipe.png", "gone.png"], [0, 0])
    for row, why in enumerate(("is no regular file", "no such file")):
        with pytest.raises(checks.UserError, match=why):
            named.image(row)
    named.update(hashlib.sha256())  # reading them is what tells


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "lost+found").mkdir(mode=0)
    assert "a folder that cannot be listed: Permission denied (lost+found)" in flat(tmp_path).left_out


def test_suffixes(tmp_path):
    for name in ("a.gif", "b.JFIF", "c.avif", "d.jp2", "e.tga", "f.ico", "g.PNG", "h.qoi"):
        formats = {"b.JFIF": "JPEG", "h.qoi": "QOI"}
        if name == "h.qoi":
            (tmp_path / name).write_bytes(b"qoif\0\0\0\1\0\0\0\1\3\0\xfe\xff\0\0" + bytes(7) + b"\1")
        else:
            draw(tmp_path / name, format=formats.get(name))
    draw(tmp_path / "photo", format="JPEG")
    for name in ("notes.txt", "x.heic", "weights.h5", "figure.eps", "Makefile"):
        (tmp_path / name).write_text("no image")
    source = flat(tmp_path)
    taken = ["a.gif", "b.JFIF", "c.avif", "d.jp2", "e.tga", "f.ico", "g.PNG", "h.qoi", "photo"]
    assert names_of(source) == taken
    assert all(source.image(row).mode == "RGB" for row in range(len(source)))
    assert source.left_out.startswith(f"5 below {tmp_path} left out: ")
    for part in ("1 × .txt (notes.txt)", "1 × .heic (x.heic)", "1 × no suffix (Makefile)", "pip install pillow-heif"):
        assert part in source.left_out


def test_a_folder_of_other_things_says_what_is_there(tmp_path):
    (tmp_path / "a.npy").write_text("")
    with pytest.raises(checks.UserError, match=r"no images in .* 1 × \.npy \(a\.npy\)"):
        flat(tmp_path)


def test_own_folders_warn_of_what_is_left_out(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png"):
        draw(tmp_path / name)
    (tmp_path / "train/cat/x.txt").write_text("")
    benchmark = open_benchmark("folder", tmp_path, image_size=8, classes=["dog", "cat"])
    with pytest.warns(UserWarning, match=r"1 × \.txt \(cat/x\.txt\)"):
        assert benchmark.train.targets.tolist() == [0, 1]
    assert benchmark.class_names == ("dog", "cat")
    with pytest.raises(TypeError, match=r"unknown option 'sead'.*did you mean 'seed'"):
        open_benchmark("folder", tmp_path, sead=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png 0\nb.png 0\ncaf\xe9.png 1\n", r"line 3: got 'café\.png 1', not in UTF-8"),
        (b"a.png 0\n\\\\host\\a.png 0\n", "line 2: .* is not below"),
        (b"a/../../a.png 0\n", "line 1: .* is not below"),
        (b"C:\\a.png 0\n", "line 1: .* is not below"),
        (b"..\\a.png 0\n", "line 1: .* is not below"),
    ],
)
def test_lists(tmp_path, content, message):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(checks.UserError, match=message):
        folders.read_image_list(tmp_path / "list.txt", tmp_path, "list", "", 10)


def test_the_tables_of_data_sets_name_nothing_outside(tmp_path):
    draw(tmp_path / "secret.png")
    images = tmp_path / "gtsrb/GTSRB/Final_Test/Images"
    images.mkdir(parents=True)
    table = tmp_path / "gtsrb/GT-final_test.csv"
    table.write_text("Filename;ClassId\n../../../../secret.png;1\n")
    with pytest.raises(checks.UserError, match="is not below the folder of the images"):
        readers.read_gtsrb(tmp_path, "test", "GTSRB", "")
    (tmp_path / "places365").mkdir()
    places = tmp_path / "places365/places365_val.txt"
    places.write_text("../../secret.png 1\n")
    with pytest.raises(checks.UserError, match="is not below the folder of the images"):
        readers.read_places365(tmp_path, "test", "Places365", "")
    places.write_text("a.jpg 1\nb.jpg\n")
    with pytest.raises(checks.UserError, match=r"line 2: got 'b\.jpg'"):
        readers.read_places365(tmp_path, "test", "Places365", "")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.txt", "b\na\r\n\nc d\n", ["b", "a", "c d"]),
        ("c.json", '["b", "a"]', ["b", "a"]),
        ("c.json", '{"b": 1, "a": 0}', ["a", "b"]),
        ("c.json", '{"1": "b", "0": "a"}', ["a", "b"]),
        ("c.txt", "a\na\n", "'a' stands there twice"),
        ("c.txt", "", "holds no name"),
        ("c.json", '{"a": 0, "b": 2}', "no name for 1; expected a list of names"),
        ("c.json", "[1, 2]", "expected a list of names"),
        ("c.json", "{", "expected a list of names"),
    ],
)
def test_class_names_of_a_file(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    if isinstance(expected, list):
        assert folders.class_names(tmp_path / name) == expected
        return
    with pytest.raises(checks.UserError, match=expected):
        folders.class_names(tmp_path / name)


def test_a_folder_that_names_two_classes_is_refused(tmp_path):
    """ImageNet has two kinds of cranes: each image would be there twice, once with either label."""
    for name in ("crane", "dog"):
        draw(tmp_path / name / "0.png")
    with pytest.raises(checks.UserError, match="crane may be more than one of the 4 classes"):
        folders.read_image_folder(tmp_path, "t", "", ["crane", "dog", "crane", "x"], all_of_them=False)
    found = folders.read_image_folder(tmp_path, "t", "", ["crane", "dog", "x", "x"], all_of_them=False)
    assert found.labels.tolist() == [0, 1]


def test_the_natural_order():
    assert sorted(["cls10", "cls2", "Zebra", "apple", "10", "9"], key=folders.natural) == [
        "9",
        "10",
        "apple",
        "cls2",
        "cls10",
        "Zebra",
    ]
