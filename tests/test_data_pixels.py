"""What the pixels of a file mean: depth, mode, orientation."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from ood_fast import checks
from ood_fast.data import decoding
from ood_fast.data.images import Files, ImageDataset

RAMP = np.linspace(0, 65535, 24 * 16).reshape(24, 16).astype(np.uint16)
EIGHT = np.rint(RAMP / 257).astype(np.uint8)


def read(path: Path, **keywords) -> np.ndarray:
    image = Files(path.parent, [path.name], [0], **keywords).image(0)
    assert image.mode == "RGB"
    return np.asarray(image)


def write_pgm16(path: Path, values: np.ndarray) -> None:
    path.write_bytes(b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes())


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_look_like_their_eight_bit_copy(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "pgm":
        write_pgm16(path, RAMP)
    else:
        Image.fromarray(RAMP).save(path)
    got = read(path)
    assert np.abs(got.astype(int) - EIGHT[..., None]).max() <= (2 if suffix == "jp2" else 0)
    assert (got[..., 0] == got[..., 2]).all()


def test_sixteen_bits_big_endian_and_white_is_zero(tmp_path):
    Image.frombytes("I;16B", RAMP.shape[::-1], RAMP.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    np.testing.assert_array_equal(read(tmp_path / "big.tif")[..., 0], EIGHT)
    Image.fromarray(RAMP).save(tmp_path / "white.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "white.tif") as file:
        inverted = file.tag_v2[262] == 0
    if inverted:  # this Pillow writes the tag that it is given
        np.testing.assert_array_equal(read(tmp_path / "white.tif")[..., 0], 255 - EIGHT)


def test_a_black_and_a_white_image_keep_their_ends(tmp_path):
    for level in (0, 65535):
        Image.fromarray(np.full((4, 4), level, np.uint16)).save(tmp_path / "x.png")
        assert (read(tmp_path / "x.png") == level // 257).all()


def test_floating_point(tmp_path):
    path = tmp_path / "x.tiff"
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(path)
    assert np.abs(read(path)[..., 0].astype(int) - EIGHT).max() <= 1
    for values, told in (([[0.0, 300.0]], "from 0 to 300"), ([[-0.5, 1.0]], "from -0.5"), ([[np.nan, 1.0]], "nan")):
        Image.fromarray(np.array(values, np.float32)).save(path)
        with pytest.raises(checks.UserError, match=rf"x\.tiff: cannot be read \(floating-point pixels.*{told}"):
            read(path)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_what_has_no_white_is_refused(tmp_path, dtype):
    pixels = np.array([[0, 70_000], [5, 9]], dtype)
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(checks.UserError, match="32-bit or signed integers: nothing says which number is white"):
        read(tmp_path / "x.tif")


def test_modes(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read(tmp_path / "alpha.png"), colours)  # whatever the alpha
    grey = image.convert("L")
    Image.merge("LA", (grey, Image.new("L", grey.size, 7))).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read(tmp_path / "la.png")[..., 1], np.asarray(grey))
    palette = image.quantize(4)
    palette.save(tmp_path / "p.png", transparency=b"\0\x80\xff\xff")
    np.testing.assert_array_equal(read(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(read(tmp_path / "cmyk.tif"), np.asarray(image.convert("CMYK").convert("RGB")))
    lab = Image.new("LAB", (3, 3), (255, 128, 128))
    lab.save(tmp_path / "lab.tif")
    np.testing.assert_array_equal(read(tmp_path / "lab.tif"), np.asarray(lab.convert("RGB")))
    image.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read(tmp_path / "bits.png"))) <= {0, 255}
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "w" in name else {})
        )
        np.testing.assert_array_equal(read(tmp_path / name), np.asarray(frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_orientation(tmp_path, orientation, suffix):
    """Every orientation, against what ImageOps makes of it."""
    from PIL import ImageOps

    colours = np.random.default_rng(orientation).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(colours).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    np.testing.assert_array_equal(read(path), expected)
    assert expected.shape[:2] == ((4, 6) if orientation > 4 else (6, 4))
    if suffix != "tiff":  # Pillow turns them when it loads them
        np.testing.assert_array_equal(read(path, upright=False), colours)


def test_damaged_exif_leaves_the_pixels(tmp_path):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read(tmp_path / "x.jpg").shape == (6, 4, 3)


def test_orientation_is_part_of_a_fingerprint_and_of_a_selection(tmp_path):
    Image.new("RGB", (4, 6)).save(tmp_path / "x.png")
    prints = {ImageDataset(Files(tmp_path, ["x.png"], [0], upright=way)).fingerprint() for way in (True, False)}
    assert len(prints) == 2
    assert Files(tmp_path, ["x.png"], [0], upright=False).take(np.array([0])).upright is False


def test_threads_that_allow_truncated_files_and_others_keep_apart():
    inside, leave = threading.Event(), threading.Event()

    def allowing() -> None:
        with decoding.truncated_files(True):
            inside.set()
            assert ImageFile.LOAD_TRUNCATED_IMAGES
            leave.wait(10)

    with decoding.truncated_files(False), decoding.truncated_files(False):
        thread = threading.Thread(target=allowing)
        thread.start()
        assert not inside.wait(0.05)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert inside.wait(10)
    with decoding.truncated_files(True):  # another that allows it need not wait
        leave.set()
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    thread.join()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_how_to_take_truncated_files_is_told_in_every_format(tmp_path):
    for name in ("x.jp2", "x.png", "x.gif"):
        Image.effect_noise((32, 32), 50).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-60])
        with pytest.raises(checks.UserError, match="--truncated allow takes what is there"):
            read(tmp_path / name)
