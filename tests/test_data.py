"""The readers of image data sets, through small files in the real formats, and the benchmarks made of them."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from torchvision import transforms

from ood_fast import checks
from ood_fast.data import benchmarks, folders, images, open_benchmark, readers, shifted
from ood_fast.data.loading import Loader

MEAN, STD = benchmarks.SPECS["cifar10"].mean, benchmarks.SPECS["cifar10"].std


# ---- files as the originals are


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote in 2009: byte strings for text and for the bytes of arrays, and NumPy's old name."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text):
        data = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_bytes

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[type(np.dtype)] = dispatch[type] = dispatch[type(np.empty(0).__reduce__()[0])] = save_global


def dump_python2(content, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)


def pixels_of(n: int, seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def planes(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1))


def write_cifar10(root: Path, n_train: int = 50, n_test: int = 40) -> dict[str, np.ndarray]:
    folder, truth = root / "cifar-10-batches-py", {}
    truth["train"], truth["test"] = pixels_of(n_train, 1), pixels_of(n_test, 2)
    for number, part in enumerate(np.array_split(np.arange(n_train), 5), start=1):
        batch = {"data": planes(truth["train"][part]), "labels": [int(row % 10) for row in part], "batch_label": "x"}
        dump_python2(batch, folder / f"data_batch_{number}")
    dump_python2({"data": planes(truth["test"]), "labels": [row % 10 for row in range(n_test)]}, folder / "test_batch")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    dump_python2({"label_names": names, "num_cases_per_batch": 10000}, folder / "batches.meta")
    return truth


def write_cifar100(root: Path, n: int = 200) -> None:
    folder = root / "cifar-100-python"
    for split in ("train", "test"):
        batch = {"data": planes(pixels_of(n, 3)), "fine_labels": [row % 100 for row in range(n)]}
        dump_python2({**batch, "coarse_labels": [0] * n}, folder / split)
    dump_python2({"fine_label_names": [f"fine {row}" for row in range(100)]}, folder / "meta")


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def write_mnist(root: Path) -> np.ndarray:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    grey = np.random.default_rng(4).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    for part, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(grey[rows]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[rows]))
    return grey


def write_svhn(root: Path, name: str = "svhn/test_32x32.mat") -> np.ndarray:
    pixels = pixels_of(20, 5)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    savemat(root / name, {"X": pixels.transpose(1, 2, 3, 0), "y": (np.arange(20) % 10 + 1)[:, None].astype(np.uint8)})
    return pixels


def write_image(path: Path, size=(40, 50), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path)


def write_dtd(root: Path) -> None:
    for number, part in enumerate(("train", "val", "test")):
        names = [f"{kind}/{kind}_{number}.jpg" for kind in ("banded", "woven")]
        for name in names:
            write_image(root / "dtd/dtd/images" / name)
        lists = root / "dtd/dtd/labels"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}1.txt").write_text("".join(f"{name}\n" for name in names))


def write_places(root: Path, n: int = 3) -> None:
    names = [f"Places365_val_{number:08d}.jpg" for number in range(n)]
    for name in names:
        write_image(root / "places365/val_256" / name, (256, 256))
    (root / "places365/places365_val.txt").write_text("".join(f"{name} {row}\n" for row, name in enumerate(names)))


def write_tiny_imagenet(root: Path, n_test: int = 40) -> None:
    folder, classes = root / "tiny-imagenet-200", [f"n{label:08d}" for label in range(200)]
    folder.mkdir()
    (folder / "wnids.txt").write_text("\n".join(reversed(classes)))
    for row in range(n_test):
        write_image(folder / f"val/images/val_{row}.JPEG", (64, 64), row)
    lines = [f"val_{row}.JPEG\t{classes[row]}\t0\t0\t63\t63\n" for row in range(n_test)]
    (folder / "val/val_annotations.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data folder with everything that the CIFAR benchmarks need, in torchvision's layout."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar10(folder)
    write_cifar100(folder)
    write_mnist(folder)
    write_svhn(folder)
    write_dtd(folder)
    write_places(folder)
    write_tiny_imagenet(folder)
    return folder


def prepared(pixels: np.ndarray, mean=MEAN, std=STD) -> torch.Tensor:
    x = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ---- readers


def test_cifar10_images_labels_and_names(tmp_path):
    truth = write_cifar10(tmp_path)
    data_set = readers.DATA_SETS["cifar10"]
    for split, n_images in (("train", 50), ("test", 40)):
        source = data_set.read(tmp_path, split, data_set.title, data_set.how)
        np.testing.assert_array_equal(source.pixels, truth[split])
        assert source.labels.tolist() == [row % 10 for row in range(n_images)]
        assert source.classes[1] == "automobile"


def test_our_pickles_are_python_2s(tmp_path):
    """As pickletools shows the original: byte strings and numpy.core: what is out there."""
    import pickletools

    write_cifar10(tmp_path)
    text = io.StringIO()
    pickletools.dis((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes(), out=text)
    assert "GLOBAL     'numpy.core.multiarray _reconstruct'" in text.getvalue()
    assert "BINSTRING" in text.getvalue()
    assert "UNICODE" not in text.getvalue()


def test_cifar_pickles_of_python_3_are_read_too(tmp_path):
    write_cifar10(tmp_path)
    data = planes(pixels_of(40, 2))
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({"data": data, "labels": [0] * 40}, protocol=2))
    np.testing.assert_array_equal(readers.safe_unpickle(path)["data"], data)


class Malicious:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("content", [{"data": Malicious(), "labels": []}, np.array([Malicious()], dtype=object)])
def test_a_pickle_that_calls_anything_is_refused(tmp_path, capsys, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(checks.UserError, match=r"data_batch_1: .*print, expected only NumPy arrays"):
        readers.safe_unpickle(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "code", [b"cos\nsystem\n(S'true'\ntR.", b"c_codecs\nencode\n(Va\nVrot13\ntR.", b"\x80\x02}q", b""]
)
def test_a_hostile_or_broken_pickle_is_refused(tmp_path, code):
    path = tmp_path / "batch"
    path.write_bytes(code)
    with pytest.raises(checks.UserError, match="batch: cannot be read as a pickle of arrays"):
        readers.safe_unpickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((4, 3072), np.float32), "labels": [0] * 4}, "expected 'data' to be uint8"),
        ({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 3}, "3 labels for 4 images"),
        ({"data": np.zeros((4, 3072), np.uint8)}, "no labels for 4 images"),
        ({"data": np.zeros((4, 3072), np.uint8), "labels": [0, 10, 0, 0]}, r"label 10, expected one in \[0, 10\)"),
        ([], "holds a list, expected a dict"),
    ],
)
def test_a_cifar_batch_that_makes_no_sense(tmp_path, content, message):
    write_cifar10(tmp_path)
    dump_python2(content, tmp_path / "cifar-10-batches-py" / "test_batch")
    with pytest.raises(checks.UserError, match=message):
        readers.read_cifar(readers._CIFAR10, tmp_path, "test", "CIFAR-10", "")


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, zipped):
    grey = write_mnist(tmp_path)
    if zipped:
        for path in (tmp_path / "MNIST" / "raw").iterdir():
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    source = readers.read_mnist(tmp_path, "test", "MNIST", "")
    np.testing.assert_array_equal(source.pixels, grey)  # all images, training ones first
    assert source.labels.tolist() == [row % 10 for row in range(30)]
    assert source.image(3).mode == "RGB"
    if not zipped:  # what torchvision reads from the same files
        theirs = torchvision.datasets.MNIST(tmp_path, train=False)
        np.testing.assert_array_equal(theirs.data.numpy(), grey[20:])


def test_an_idx_file_that_was_cut_off(tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte"
    content = idx(np.zeros((3, 28, 28), np.uint8))
    for cut, message in (
        (content[:-5], "2347 values for shape"),
        (b"<html>", "does not begin"),
        (content[:6], r"0 values for .* not complete"),
        (content + b"x", "more than 2352 values"),
        (content[:4] + b"\xff\xff\xff\xff" + content[8:], "2352 values for shape .4294967295, 28, 28"),
        (content[:11] + b"\x01" + content[12:], r"shape \(3, 1, 28\), expected \('n', 28, 28\)"),
        (idx(np.zeros(3, np.uint8)), "does not begin as an idx file of 3 dimensions"),
    ):
        path.write_bytes(cut)
        with pytest.raises(checks.UserError, match=message):
            readers.read_idx(path, 28, 28)


@pytest.mark.parametrize("name", ["svhn/test_32x32.mat", "test_32x32.mat"])
def test_svhn(tmp_path, name):
    pixels = write_svhn(tmp_path, name)
    source = readers.read_svhn(tmp_path, "test", "SVHN", "")
    np.testing.assert_array_equal(source.pixels, pixels)
    assert source.labels.tolist() == [(row % 10 + 1) % 10 for row in range(20)]  # 10 is the digit 0
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
    with pytest.raises(checks.UserError, match="cannot be read as a MATLAB file"):
        readers.read_svhn(tmp_path, "test", "SVHN", "")


def test_gtsrb(tmp_path):
    for label in range(43):
        write_image(tmp_path / f"gtsrb/GTSRB/Training/{label:05d}/00000_00000.ppm")
    names = [f"{row:05d}.ppm" for row in range(3)]
    for name in names:
        write_image(tmp_path / "gtsrb/GTSRB/Final_Test/Images" / name)
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    table = tmp_path / "gtsrb/GT-final_test.csv"
    table.write_text(header + "".join(f"{name};40;50;5;5;30;30;{7 * row}\n" for row, name in enumerate(names)))
    test = readers.read_gtsrb(tmp_path, "test", "GTSRB", "")
    assert test.labels.tolist() == [0, 7, 14]
    train = readers.read_gtsrb(tmp_path, "train", "GTSRB", "")
    for source, split in ((train, "train"), (test, "test")):
        theirs = torchvision.datasets.GTSRB(tmp_path, split)
        assert [(source.path(row), source.labels[row]) for row in range(len(source))] == theirs._samples
    table.write_text(header.replace("ClassId", "Class"))
    table.write_text(table.read_text() + "00000.ppm;1;1;1;1;1;1;0\n")
    with pytest.raises(checks.UserError, match="expected columns Filename and ClassId"):
        readers.read_gtsrb(tmp_path, "test", "GTSRB", "")


def test_dtd_gives_all_its_images(root):
    source = readers.read_dtd(root, "test", "Textures", "")
    theirs = [torchvision.datasets.DTD(root, split) for split in ("train", "val", "test")]
    assert [source.path(row) for row in range(6)] == [str(path) for part in theirs for path in part._image_files]
    assert source.labels.tolist() == [0, 1] * 3
    assert source.classes == ("banded", "woven")


def test_tiny_imagenet_labels_count_the_sorted_classes(root):
    source = readers.read_tiny_imagenet(root, "test", "Tiny ImageNet", "")
    assert source.labels.tolist() == list(range(40))
    assert source.path(3).endswith("val/images/val_3.JPEG")


def test_an_image_folder_is_what_torchvision_says(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a/sub/x.webp", "a/y.bmp", "c/z.jpeg"):
        write_image(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._1.JPG").write_text("what a Mac leaves behind")
    source = readers.read_image_folder(tmp_path, "own", "")
    (tmp_path / "b" / "._1.JPG").unlink()
    theirs = torchvision.datasets.ImageFolder(tmp_path)
    assert [(source.path(row), source.labels[row]) for row in range(len(source))] == theirs.samples
    assert list(source.classes) == theirs.classes
    (tmp_path / "empty").mkdir()
    with pytest.raises(checks.UserError, match=r"no images in .*empty \(\.jpg, "):
        readers.read_image_folder(tmp_path, "own", "")


# ---- what is missing or broken


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    write_cifar10(tmp_path)
    for number in (2, 4):
        (tmp_path / "cifar-10-batches-py" / f"data_batch_{number}").unlink()
    benchmark = open_benchmark("cifar10", tmp_path)
    with pytest.raises(checks.UserError) as error:
        _ = benchmark.train
    message = str(error.value)
    assert message == (
        f"CIFAR-10: missing in {tmp_path}: cifar-10-batches-py/data_batch_2, cifar-10-batches-py/data_batch_4; "
        "get it from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, or ask for the download (--download)"
    )
    assert len(benchmark.test) == 36  # what is there can be used


def test_check_names_everything_at_once(tmp_path):
    write_svhn(tmp_path)
    with pytest.raises(checks.UserError) as error:
        open_benchmark("cifar10", tmp_path).check()
    lines = str(error.value).split("\n")
    assert [line.split(":")[0] for line in lines].count("CIFAR-10") == 2  # the training and the test files
    assert {line.split(":")[0] for line in lines} == {
        "CIFAR-10",
        "CIFAR-100",
        "Tiny ImageNet",
        "MNIST",
        "Textures",
        "Places365",
    }
    open_benchmark("digits").check()


def test_missing_images_of_a_list_are_counted(root, tmp_path):
    write_places(tmp_path, n=9)
    for path in list((tmp_path / "places365/val_256").iterdir())[:7]:
        path.unlink()
    with pytest.raises(checks.UserError, match=r"Places365: missing in .*val_256/Places365_val_\d+\.jpg.* and 2 more;"):
        readers.read_places365(tmp_path, "test", "Places365", "")


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"x"]
)
def test_a_broken_image_is_named(tmp_path, damage):
    path = tmp_path / "a" / "1.jpg"
    write_image(path, (300, 300))
    path.write_bytes(damage(path.read_bytes()))
    dataset = images.ImageDataset(readers.read_flat_folder(tmp_path, "own", ""), images.preparation(32, 32, MEAN, STD))
    with pytest.raises(checks.UserError, match=rf"image {path}: cannot be read"):
        dataset[0]
    path.unlink()
    with pytest.raises(checks.UserError, match="no such file"):
        dataset[0]


def test_a_broken_image_is_named_by_workers_too(tmp_path):
    path = tmp_path / "1.jpg"
    path.write_bytes(b"no image")
    loader = Loader(images.ImageDataset(readers.read_flat_folder(tmp_path, "own", "")), num_workers=1)
    with pytest.raises(checks.UserError, match=rf"^image {path}: cannot be read .*\)$"):  # and no traceback behind it
        next(iter(loader))


def test_download_only_when_asked_and_with_torchvision(tmp_path, monkeypatch):
    asked = []

    def fake(root, train=True, download=False):
        asked.append((root, train, download))
        write_cifar10(Path(root))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    with pytest.raises(checks.UserError):
        _ = open_benchmark("cifar10", tmp_path).test
    assert asked == []
    assert len(open_benchmark("cifar10", tmp_path, download=True).test) == 36
    assert asked == [(str(tmp_path), False, True)]
    assert len(open_benchmark("cifar10", tmp_path, download=True).train) == 50  # is there now
    assert len(asked) == 1

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "SVHN", offline)
    with pytest.raises(checks.UserError, match=r"SVHN: the download failed \(no network\); get it from http://ufldl"):
        _ = open_benchmark("cifar10", tmp_path, download=True, ood=("svhn",)).ood


@pytest.mark.parametrize("name", [name for name, data_set in readers.DATA_SETS.items() if data_set.download])
def test_every_download_names_a_data_set_of_torchvision_with_these_arguments(name, tmp_path, monkeypatch):
    """The real classes and their real signatures; only the network is cut."""

    class Reached(Exception):
        pass

    def reached(*arguments, **keywords):
        raise Reached

    for function in ("download_and_extract_archive", "download_url"):
        for module in ("utils", "cifar", "mnist", "svhn", "gtsrb", "dtd", "places365"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", reached, raising=False)
    with pytest.raises(Reached):
        readers.DATA_SETS[name].download(tmp_path, "test")


def test_without_torchvision_the_error_says_how_to_get_it(root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    images.preparation.cache_clear()
    with pytest.raises(checks.UserError, match="pip install torchvision"):
        _ = open_benchmark("cifar10", root).test


# ---- benchmarks


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_benchmark_from_real_formats(root, name):
    benchmark = open_benchmark(name, root)
    benchmark.check()
    other = "cifar100" if name == "cifar10" else "cifar10"
    assert {key: dataset.group for key, dataset in benchmark.ood.items()} == {
        other: "near",
        "tin": "near",
        **dict.fromkeys(("mnist", "svhn", "texture", "places365"), "far"),
    }
    for dataset in [benchmark.train, benchmark.fit, benchmark.validation, benchmark.test, benchmark.validation_ood]:
        x, y = dataset[0]
        assert x.shape == benchmark.image_shape == (3, 32, 32)
        assert x.dtype == torch.float32
        assert type(y) is int
    for dataset in [benchmark.validation_ood, *benchmark.ood.values()]:
        assert dataset[len(dataset) - 1][1] == -1
        assert set(dataset.targets.tolist()) == {-1}
    assert benchmark.n_classes == len(benchmark.class_names) == {"cifar10": 10, "cifar100": 100}[name]


def test_preparation_and_normalisation_by_the_id_statistics(root):
    benchmark = open_benchmark("cifar10", root)
    pixels = pixels_of(50, 1)
    torch.testing.assert_close(benchmark.fit[7][0], prepared(pixels[7]))
    # Every OOD set by the same statistics: short side to 32, the middle, as torchvision does it.
    source = benchmark.ood["texture"].source
    image = Image.open(source.path(0)).convert("RGB")
    cut = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])(image)
    torch.testing.assert_close(benchmark.ood["texture"][0][0], prepared(np.asarray(cut)))
    grey = np.asarray(benchmark.ood["mnist"].source.image(0).resize((32, 32), Image.Resampling.BILINEAR))
    torch.testing.assert_close(benchmark.ood["mnist"][0][0], prepared(grey))


def test_specs_are_openoods():
    specs = benchmarks.SPECS
    assert (specs["cifar10"].mean, specs["cifar10"].std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert (specs["cifar100"].mean, specs["cifar100"].std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    for name in ("imagenet", "imagenet200"):
        assert (specs[name].mean, specs[name].std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (specs[name].resize, specs[name].crop) == (256, 224)
        assert specs[name].near + specs[name].far == ("ssb_hard", "ninco", "inaturalist", "textures", "openimage_o")
    for spec in specs.values():
        assert {spec.id_set, spec.validation_ood, *spec.near, *spec.far} <= set(readers.DATA_SETS)


def test_validation_images_are_held_out_of_the_test_images(tmp_path):
    truth = write_cifar10(tmp_path, n_test=400)
    benchmark = open_benchmark("cifar10", tmp_path)
    validation, test = benchmark.validation.source, benchmark.test.source
    assert (len(validation), len(test)) == (40, 360)
    assert np.bincount(validation.labels).tolist() == [4] * 10
    together = {image.tobytes() for image in np.concatenate([validation.pixels, test.pixels])}
    assert together == {image.tobytes() for image in truth["test"]}
    again = open_benchmark("cifar10", tmp_path, seed=5).test.source
    np.testing.assert_array_equal(again.pixels, test.pixels)  # the split is no matter of a run's seed


def test_holding_out_by_a_slow_count():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    held_out, rest = benchmarks.hold_out(images.Pixels(np.zeros((100, 1, 1), np.uint8), labels), 9)
    assert np.bincount(held_out.labels).tolist() == [3, 3, 3]
    assert len(rest) == 91
    full, _ = benchmarks.hold_out(images.Pixels(np.zeros((50_000, 1, 1), np.uint8), np.arange(50_000) % 1000), 5000)
    assert set(np.bincount(full.labels)) == {5}


def test_validation_ood_is_not_tested_on(root):
    benchmark = open_benchmark("cifar10", root)
    paths = [
        {dataset.path(row) for row in range(len(dataset))}
        for dataset in (benchmark.validation_ood, benchmark.ood["tin"])
    ]
    assert len(paths[0]) == 4
    assert len(paths[1]) == 36
    assert not paths[0] & paths[1]


def test_training_images_are_cropped_and_flipped(root):
    benchmark = open_benchmark("cifar10", root, seed=3)
    original = prepared(pixels_of(50, 1)[0])
    black = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    padded = black.view(3, 1, 1).repeat(1, 40, 40)
    padded[:, 4:36, 4:36] = original
    crops = {}
    for flipped in (False, True):
        for top in range(9):
            for left in range(9):
                crop = padded[:, top : top + 32, left : left + 32]
                crops[(crop.flip(2) if flipped else crop).numpy().tobytes()] = (top, left, flipped)
    seen = set()
    for epoch in range(60):
        benchmark.train.set_epoch(epoch)
        seen.add(crops[benchmark.train[0][0].numpy().tobytes()])
    assert len(seen) > 40
    assert {flipped for *_, flipped in seen} == {False, True}
    torch.testing.assert_close(benchmark.fit[0][0], original)


def test_augmentation_depends_on_seed_epoch_and_image_alone(root):
    def epoch_of(benchmark, epoch, n_workers, **keywords):
        benchmark.train.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(benchmark.train, batch_size=8, num_workers=n_workers, **keywords)
        return torch.cat([x for x, _ in loader])

    first = open_benchmark("cifar10", root, seed=3)
    expected = [epoch_of(first, epoch, 0) for epoch in range(3)]
    torch.manual_seed(99)  # what ran before does not matter
    before = torch.get_rng_state()
    assert torch.equal(epoch_of(open_benchmark("cifar10", root, seed=3), 2, 2), expected[2])
    first.train[1]
    torch.set_rng_state(before)
    first.train[1]
    assert torch.equal(torch.get_rng_state(), before)  # nor does it change what comes after
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(epoch_of(open_benchmark("cifar10", root, seed=4), 0, 0), expected[0])
    # Workers that live on through the epochs hear of the next one.
    benchmark = open_benchmark("cifar10", root, seed=3)
    loader = torch.utils.data.DataLoader(benchmark.train, batch_size=8, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        benchmark.train.set_epoch(epoch)
        assert torch.equal(torch.cat([x for x, _ in loader]), expected[epoch])


def test_small_files_are_decoded_once_in_training_and_only_there(tmp_path, monkeypatch):
    for index, size in enumerate([(32, 32), (32, 32), (400, 300)]):
        write_image(tmp_path / "a" / f"{index}.png", size, seed=index)
    source = images.Files(tmp_path, [f"a/{index}.png" for index in range(3)], [0, 0, 0])
    read, transform = [], images.augmentation("pad_crop", 32, 32, MEAN, STD)
    monkeypatch.setattr(source, "image", lambda index: read.append(index) or images.Files.image(source, index))

    def of(epoch, dataset):
        dataset.set_epoch(epoch)
        return torch.stack([dataset[index][0] for index in range(3)])

    fresh = [of(epoch, images.ImageDataset(source, transform, augment_seed=3)) for epoch in range(2)]
    training = images.ImageDataset(source, transform, augment_seed=3)
    read.clear()
    for epoch in range(2):
        assert torch.equal(of(epoch, training), fresh[epoch])
    assert read == [0, 1, 2, 2]  # the large one again
    monkeypatch.setattr(images, "KEPT", 3 * 32 * 32)  # bytes: of one image
    training = images.ImageDataset(source, transform, augment_seed=3)
    read.clear()
    of(0, training), of(1, training)
    assert read == [0, 1, 2, 1, 2]
    evaluated = images.ImageDataset(source, images.preparation(32, 32, MEAN, STD))
    read.clear()
    of(0, evaluated), of(1, evaluated)
    assert read == [0, 1, 2] * 2


def test_imagenet_training_images_are_resized_crops():
    transform = images.augmentation("resized_crop", 256, 224, MEAN, STD)
    assert [type(step).__name__ for step in transform.transforms] == [
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "ToTensor",
        "Normalize",
    ]
    assert transform(Image.fromarray(pixels_of(1)[0]).resize((300, 500))).shape == (3, 224, 224)


@pytest.mark.parametrize("recipe", ["pad_crop", "resized_crop"])
def test_training_images_are_prepared_as_the_others(root, recipe, monkeypatch):
    """Another model's preparation holds for training too: grey stays grey."""
    spec = dataclasses.replace(benchmarks.SPECS["cifar10"], augment=recipe)
    monkeypatch.setitem(benchmarks.SPECS, "cifar10", spec)
    grey = {"size": 8, "resize": (9, 9), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic"}
    benchmark = open_benchmark("cifar10", root, prepared=grey)
    assert benchmark.train[0][0].shape == benchmark.test[0][0].shape == benchmark.image_shape == (1, 8, 8)
    assert "bicubic" in repr(benchmark.train.transform)
    of_bundle = {"size": 8, "resize": [9, 9], "mean": [0.5], "std": [0.5]}  # as JSON has it, without the default
    assert open_benchmark("cifar10", root, prepared=of_bundle).train[0][0].shape == (1, 8, 8)


def test_signs_are_not_mirrored():
    names = [type(step).__name__ for step in images.augmentation("pad_crop", 32, 32, MEAN, STD, flip=False).transforms]
    assert "RandomHorizontalFlip" not in names
    assert not benchmarks.SPECS["gtsrb"].flip


def test_synthetic_sets(root):
    benchmark = open_benchmark("cifar10", root, synthetic=True, ood=("svhn",))
    assert list(benchmark.ood) == ["svhn", "noise", "scrambled"]
    scrambled, test, noise = benchmark.ood["scrambled"], benchmark.test, benchmark.ood["noise"]
    assert len(scrambled) == len(noise) == len(test)
    assert scrambled.group == noise.group == "synthetic"
    for row in (0, 5):
        x, original = scrambled[row][0].flatten(1), test[row][0].flatten(1)
        assert not torch.equal(x, original)
        places = [sorted(map(tuple, image.T.tolist())) for image in (x, original)]
        assert places[0] == places[1]  # whole pixels have moved
        assert torch.equal(scrambled[row][0], scrambled[row][0])
    assert not torch.equal(noise[0][0], noise[1][0])
    assert torch.equal(noise[1][0], open_benchmark("cifar10", root, synthetic=True).ood["noise"][1][0])
    x = torch.stack([noise[row][0] for row in range(len(noise))])
    pixels = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert -1e-6 <= pixels.min()
    assert pixels.max() <= 1 + 1e-6
    assert x.mean().abs() < 0.05
    assert 0.8 < x.std() < 1  # clipped at black and white


def test_digits_in_this_form():
    benchmark = open_benchmark("digits", seed=2)
    assert benchmark.image_shape == (1, 8, 8)
    assert len(benchmark.class_names) == benchmark.n_classes == 6
    for split in (benchmark.train, benchmark.validation, benchmark.test):
        images, targets = split.held()
        assert torch.equal(torch.stack([split[row][0] for row in range(len(split))]), images)
        assert [split[row][1] for row in range(len(split))] == targets.tolist()
    assert {name: dataset.group for name, dataset in benchmark.ood.items()} == {
        "near": "near",
        "photographs": "far",
        "noise": "far",
    }
    assert len(benchmark.validation_ood) == len(benchmark.validation)
    assert list(open_benchmark("digits", ood=("near",)).ood) == ["near"]


def test_imagenet_200_in_folders(tmp_path):
    write_image(tmp_path / "one.jpg", (300, 280))

    def put(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "one.jpg", tmp_path / name)

    for label in range(200):
        put(f"imagenet200/train/n{label:08d}/a.jpg")
        for row in range(10):
            put(f"imagenet200/val/n{label:08d}/{row}.jpg")
    for row in range(30):
        put(f"openimage_o/{row}.jpg")
    benchmark = open_benchmark("imagenet200", tmp_path, ood=("openimage_o",))
    assert benchmark.class_names[7] == "n00000007"
    assert [len(getattr(benchmark, part)) for part in ("train", "validation", "test")] == [200, 200, 1800]
    assert set(np.bincount(benchmark.validation.targets)) == {1}
    assert benchmark.train[0][0].shape == benchmark.test[0][0].shape == benchmark.image_shape == (3, 224, 224)
    assert (len(benchmark.validation_ood), len(benchmark.ood["openimage_o"])) == (3, 27)
    put("imagenet200/train/n99999999/a.jpg")
    with pytest.raises(
        checks.UserError, match=r"ImageNet-200: 201 folders in .*train, expected 200; get it from https"
    ):
        _ = open_benchmark("imagenet200", tmp_path).train


def test_tiny_imagenet_as_the_id_set(root, tmp_path):
    benchmark = open_benchmark("tin", root)
    assert benchmark.n_classes == 200
    assert benchmark.test[0][0].shape == (3, 64, 64)
    assert list(benchmark.ood) == ["cifar100", "svhn"]
    with pytest.raises(checks.UserError, match=r"Tiny ImageNet: no folder .*train; expected one folder of images"):
        _ = benchmark.train


# ---- OpenOOD's layout


def write_openood(root: Path, newline: str = "\r\n") -> None:
    """The lists and images of the benchmark cifar10, as OpenOOD unpacks them."""
    lists = {
        "train_cifar10": ("cifar10/train/{kind}/{row}.png", 20),
        "val_cifar10": ("cifar10/test/{kind}/v{row}.png", 10),
        "test_cifar10": ("cifar10/test/{kind}/t{row}.png", 10),
        "val_tin": ("tin/val/{row}.png", 3),
        "test_tin": ("tin/test/{row}.png", 4),
        "test_cifar100": ("cifar100/test/{row}.png", 5),
        "test_mnist": ("mnist/test/{row}.png", 6),
        "test_svhn": ("svhn/test/{row}.png", 7),
        "test_texture": ("texture/banded/{row}.png", 8),
        "test_places365": ("places365/{row}.png", 9),
    }
    folder = root / "benchmark_imglist" / "cifar10"
    folder.mkdir(parents=True)
    for name, (pattern, n_images) in lists.items():
        lines = []
        for row in range(n_images):
            label = row % 10 if name.endswith("cifar10") else -1
            image = pattern.format(kind=f"class{label}", row=row)
            write_image(root / "images_classic" / image, (32, 32), row)
            lines.append(f"{image} {label}")
        (folder / f"{name}.txt").write_bytes((newline.join(lines) + newline).encode())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("inside", [".", "data"])
def test_openood_layout(tmp_path, newline, inside):
    write_openood(tmp_path / inside, newline)
    benchmark = open_benchmark("cifar10", tmp_path)
    benchmark.check()
    assert [len(getattr(benchmark, part)) for part in ("train", "fit", "validation", "test")] == [20, 20, 10, 10]
    assert {name: len(dataset) for name, dataset in benchmark.ood.items()} == {
        "cifar100": 5,
        "tin": 4,
        "mnist": 6,
        "svhn": 7,
        "texture": 8,
        "places365": 9,
    }
    assert len(benchmark.validation_ood) == 3
    assert benchmark.class_names == tuple(f"class{label}" for label in range(10))
    path = tmp_path / inside / "images_classic/cifar10/test/class3/t3.png"
    assert benchmark.test.path(3) == str(path)
    x, y = benchmark.test[3]
    assert y == 3
    torch.testing.assert_close(x, prepared(np.asarray(Image.open(path))))
    assert benchmark.ood["svhn"][2][1] == -1


def test_openood_imagenet_textures_lie_with_the_classic_images(tmp_path):
    lists = tmp_path / "benchmark_imglist" / "imagenet200"
    lists.mkdir(parents=True)
    for name, folder in (("textures", "images_classic"), ("ninco", "images_largescale")):
        write_image(tmp_path / folder / name / "1.jpg", (300, 400))
        (lists / f"test_{name}.txt").write_text(f"{name}/1.jpg -1\r\n")
    ood = open_benchmark("imagenet200", tmp_path, ood=("textures", "ninco")).ood
    assert list(ood) == ["ninco", "textures"]
    assert all(dataset[0][0].shape == (3, 224, 224) for dataset in ood.values())


def test_openood_covariate_shifted_sets(tmp_path):
    lists = tmp_path / "benchmark_imglist" / "imagenet200"
    lists.mkdir(parents=True)
    for name in ("v2", "c", "r"):
        write_image(tmp_path / f"images_largescale/imagenet_{name}/1.jpg", (224, 224))
        (lists / f"test_imagenet200_{name}.txt").write_text(f"imagenet_{name}/1.jpg 199\n")
    csid = open_benchmark("imagenet200", tmp_path, csid=("all",), ood=()).csid
    assert {name: (part.group, part.title, part[0][1]) for name, part in csid.items()} == {
        "imagenet_v2": ("csid", "ImageNet-V2", 199),
        "imagenet_c": ("csid", "ImageNet-C", 199),
        "imagenet_r": ("csid", "ImageNet-R", 199),
    }
    whole = transforms.functional.to_tensor(csid["imagenet_c"].source.image(0))  # not scaled to 256 and cut
    spec = benchmarks.SPECS["imagenet200"]
    assert torch.equal(csid["imagenet_c"][0][0], transforms.functional.normalize(whole, spec.mean, spec.std))
    assert list(open_benchmark("imagenet200", tmp_path, csid=("imagenet_r",), ood=()).csid) == ["imagenet_r"]
    assert open_benchmark("imagenet200", tmp_path, ood=()).csid == {}
    (lists / "test_imagenet200_r.txt").write_text("imagenet_r/1.jpg 200\n")
    with pytest.raises(
        checks.UserError, match=r"test_imagenet200_r.txt, line 1: label 200, expected one in \[0, 200\)"
    ):
        _ = open_benchmark("imagenet200", tmp_path, csid=("imagenet_r",), ood=()).csid
    with pytest.raises(checks.UserError, match="csid: got 'all', but benchmark cifar100 has none"):
        open_benchmark("cifar100", tmp_path, csid=("all",))
    with pytest.raises(checks.UserError, match="covariate-shifted set 'imagenet_x'"):
        open_benchmark("imagenet200", tmp_path, csid=("imagenet_x",))
    with pytest.raises(checks.UserError, match=r"ImageNet-V2: is read by OpenOOD's lists; from folders.*--csid-folder"):
        open_benchmark("imagenet", tmp_path / "no lists", csid=("imagenet_v2",), ood=()).check(["validation_ood"])


def test_openood_images_that_are_missing(tmp_path):
    write_openood(tmp_path)
    (tmp_path / "images_classic/svhn/test/3.png").unlink()
    (tmp_path / "benchmark_imglist/cifar10/test_mnist.txt").unlink()
    with pytest.raises(checks.UserError) as error:
        open_benchmark("cifar10", tmp_path).check()
    mnist, svhn, others = str(error.value).split("\n")
    assert others == "to go on with the sets that are there: --ood cifar100,tin,texture,places365"
    assert mnist.startswith(
        f"MNIST: missing: {tmp_path / 'benchmark_imglist/cifar10/test_mnist.txt'}; get it from https"
    )
    assert svhn.startswith(
        f"SVHN: missing in {tmp_path / 'images_classic'}: svhn/test/3.png; get it from https://github"
    )
    (tmp_path / "benchmark_imglist/cifar10/val_tin.txt").unlink()
    with pytest.raises(checks.UserError, match=r"val_tin\.txt; get it .*; parameters are chosen on it, --no-tune does"):
        open_benchmark("cifar10", tmp_path, ood=()).check()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png", r"line 2: got 'a.png', expected 'path label'"),
        ("a.png cat", r"line 2: got 'a.png cat'"),
        ("../a.png 0", "line 2: .* is not below"),
        ("/etc/a.png 0", "line 2: .* is not below"),
        ("a.png 10", r"line 2: label 10, expected one in \[0, 10\)"),
    ],
)
def test_a_bad_line_of_a_list_is_named(tmp_path, line, message):
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"a.png 0\r\n{line}\r\n")
    with pytest.raises(checks.UserError, match=message):
        folders.read_image_list(tmp_path / "list.txt", tmp_path, "list", "", 10)


# ---- own folders


def test_own_folders(tmp_path):
    for row in range(20):
        for kind in ("cat", "dog"):
            write_image(tmp_path / f"train/{kind}/{row}.jpg", seed=row)
    write_image(tmp_path / "test/dog/1.jpg")
    write_image(tmp_path / "near/wolf/deep/1.jpg")
    write_image(tmp_path / "ood/cars/1.jpg")
    write_image(tmp_path / "elsewhere/1.jpg")
    write_image(tmp_path / "csid/dark/dog/1.jpg")
    write_image(tmp_path / "numbered/1/1.jpg")
    (tmp_path / "numbered/.thumbnails").mkdir()
    np.save(tmp_path / "fog.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.array([0, 1, 1]))
    more = {"numbered": tmp_path / "numbered", "fog": tmp_path / "fog.npy"}
    benchmark = open_benchmark(
        "folder", tmp_path, image_size=32, ood_folders={"elsewhere": tmp_path / "elsewhere"}, csid_folders=more
    )
    benchmark.check()
    assert {name: part.targets.tolist() for name, part in benchmark.csid.items()} == {
        "dark": [1],
        "numbered": [1],
        "fog": [0, 1, 1],
    }
    assert benchmark.csid["fog"][0][0].shape == (3, 32, 32)
    assert open_benchmark("folder", tmp_path, csid=()).csid == {}
    assert benchmark.n_classes == 2
    assert benchmark.class_names == ("cat", "dog")
    assert np.bincount(benchmark.validation.targets).tolist() == [2, 2]  # a tenth of the training images
    assert len(benchmark.train) == 36
    assert benchmark.test.targets.tolist() == [1]
    assert {name: dataset.group for name, dataset in benchmark.ood.items()} == {
        "wolf": "near",
        "cars": "far",
        "elsewhere": "far",
    }
    assert benchmark.ood["wolf"][0][0].shape == (3, 32, 32)
    assert len(benchmark.validation_ood) == 4  # scrambled validation images
    assert open_benchmark("folder", tmp_path).test[0][0].shape == (3, 224, 224)
    write_image(tmp_path / "val/cat/1.jpg")
    benchmark = open_benchmark("folder", tmp_path)
    assert (len(benchmark.train), benchmark.validation.targets.tolist()) == (40, [0])
    write_image(tmp_path / "test/bird/1.jpg")
    with pytest.raises(checks.UserError, match=r"test/bird is none of the 2 classes of the training \(cat, dog\)"):
        _ = open_benchmark("folder", tmp_path).test
    write_image(tmp_path / "near/cars/1.jpg")
    with pytest.raises(checks.UserError, match="cars is below both"):
        open_benchmark("folder", tmp_path)


def test_a_tenth_of_a_few_images_is_none(tmp_path):
    """Accuracy on no image is NaN, and no epoch better than the first."""
    for name in ("train/cat/0", "train/dog/0", "test/cat/0"):
        write_image(tmp_path / f"{name}.png")
    benchmark = open_benchmark("folder", tmp_path)
    assert len(benchmark.train) == 2
    with pytest.raises(checks.UserError, match=r"2 images in .*train, too few to hold a tenth out; expected .*val/"):
        _ = benchmark.validation


def test_shifted_images_that_do_not_fit(tmp_path):
    classes, pixels = ("cat", "dog"), np.zeros((3, 8, 8, 3), np.uint8)
    for name, array in {"a": pixels, "b": pixels[..., 0], "c": pixels.astype(float)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    for name, told in {
        "b": r"b.npy holds uint8 of shape \(3, 8, 8\)",
        "c": "c.npy holds float64",
        "d": "cannot read",
    }.items():
        with pytest.raises(checks.UserError, match=told if name == "d" else "cannot read .*labels.npy"):
            shifted.read_shifted(tmp_path / f"{name}.npy", "x", classes)
        np.save(tmp_path / "labels.npy", np.array([0, 1, 1]))
        with pytest.raises(checks.UserError, match=told):
            shifted.read_shifted(tmp_path / f"{name}.npy", "x", classes)
        (tmp_path / "labels.npy").unlink()
    for labels, told in (([0, 1], "3 images in .*, but labels.npy"), ([0, 1, 2], r"label 2, expected one in \[0, 2\)")):
        np.save(tmp_path / "labels.npy", np.array(labels))
        with pytest.raises(checks.UserError, match=told):
            shifted.read_shifted(tmp_path / "a.npy", "x", classes)
    write_image(tmp_path / "set/bird/1.jpg")
    with pytest.raises(checks.UserError, match="bird is none of the 2 classes"):
        shifted.read_shifted(tmp_path / "set", "x", classes)
    with pytest.raises(checks.UserError, match=r"no folder .*nowhere"):
        shifted.read_shifted(tmp_path / "nowhere", "x", classes)


def test_one_class_of_ones_own_is_refused(tmp_path):
    write_image(tmp_path / "train/cat/1.jpg")
    with pytest.raises(checks.UserError, match=r"one class in .*train \(cat\), expected at least two"):
        open_benchmark("folder", tmp_path)


def test_a_missing_root_is_told_as_an_empty_one(tmp_path):
    (tmp_path / "empty").mkdir()
    told = []
    for name in ("nowhere", "empty"):
        with pytest.raises(checks.UserError, match=r"data_batch_1.*get it from https.*--download") as error:
            _ = open_benchmark("cifar10", tmp_path / name).train
        told.append(str(error.value).replace(name, "DIR"))
    assert told[0] == told[1]


def test_own_folders_that_are_not_there(tmp_path):
    with pytest.raises(checks.UserError, match=r"no folder .*train; expected one folder of images for each class"):
        open_benchmark("folder", tmp_path)
    with pytest.raises(checks.UserError, match=r"no folder .*nowhere \(--data-root\)"):
        open_benchmark("folder", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("cifar",), {}, "unknown benchmark 'cifar'; known: .*; did you mean 'cifar10'"),
        (("cifar10",), {}, "needs the folder of its data"),
        (("cifar10", "."), {"layout": "openod"}, "did you mean 'openood'"),
        (("cifar10", "."), {"ood": ("svhm",)}, "unknown OOD set 'svhm'.*did you mean 'svhn'"),
        (("digits",), {"ood": ("photos",)}, "unknown OOD set 'photos'"),
        (("cifar10", "."), {"image_size": 64}, "image_size: benchmark cifar10 has images of 32 pixels"),
        (("gtsrb", "."), {"layout": "openood"}, "OpenOOD has no lists for it"),
    ],
)
def test_requests_that_cannot_be_met(arguments, keywords, message):
    with pytest.raises(checks.UserError, match=message):
        open_benchmark(*arguments, **keywords)


# ---- the data set as such


def test_a_fingerprint_changes_with_what_it_stands_for(root, tmp_path):
    prints = {open_benchmark("cifar10", root).test.fingerprint() for _ in range(2)}
    assert len(prints) == 1
    benchmark = open_benchmark("cifar10", root, synthetic=True)
    parts = [benchmark.fit, benchmark.validation, benchmark.test, *benchmark.ood.values()]
    prints |= {dataset.fingerprint() for dataset in parts}
    prints.add(open_benchmark("cifar100", root).ood["cifar10"].fingerprint())  # the same images, other statistics
    assert len(prints) == len(parts) + 1
    write_image(tmp_path / "1.png", seed=1)
    flat = images.ImageDataset(readers.read_flat_folder(tmp_path, "own", ""))
    before = flat.fingerprint()
    write_image(tmp_path / "1.png", (41, 50), seed=2)
    assert flat.fingerprint() != before


def test_the_content_of_images_is_that_of_copies_and_of_no_others(root, tmp_path, monkeypatch):
    for place, seed in (("here", 1), ("copy", 1), ("other", 2)):
        (tmp_path / place).mkdir()
        write_image(tmp_path / place / "1.png", seed=seed)
    os.utime(tmp_path / "copy/1.png", (1, 1))
    here, copied, other = (
        images.ImageDataset(readers.read_flat_folder(tmp_path / place, "own", "")).content
        for place in ("here", "copy", "other")
    )
    assert here == copied != other
    monkeypatch.setattr(images, "N_BYTES", 100)  # every fifth
    contents = []
    for changed in (None, 1, 5):
        pixels = np.zeros((40, 2, 2, 3), np.uint8)
        if changed:
            pixels[changed] = 9
        contents.append(images.ImageDataset(images.Pixels(pixels, np.zeros(40, np.int64))).content)
    assert contents[0] == contents[1] != contents[2]
    monkeypatch.undo()
    assert open_benchmark("cifar10", root).train.content != open_benchmark("cifar10", root).test.content


def test_a_data_set_ends(root):
    test = open_benchmark("cifar10", root).test
    assert sum(1 for _ in test) == len(test) == 36
    with pytest.raises(IndexError):
        test[36]


@pytest.mark.slow
def test_data_sets_reach_workers_that_are_spawned(root):
    dataset = open_benchmark("cifar10", root).test
    expected = torch.stack([x for x, _ in dataset])
    loader = torch.utils.data.DataLoader(dataset, batch_size=9, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([x for x, _ in loader]), expected)
