"""From an image file that Pillow has opened to 8-bit RGB: the one place that says what a pixel means.

1, L, P, RGB, YCbCr, HSV, CMYK, LAB as Pillow converts them
alpha, transparent palettes         dropped, as torchvision does: the stored colour counts, premultiplied ones divided
16-bit grey                         scaled, 65535 is white (of TIFF with 12 bits, 4095)
floating point                      scaled, 1 is white; refused outside of [0, 1]
32-bit integers                     refused: nothing says which number is white
several frames or pages             the first
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Formats that Pillow registers and cannot decode by itself; EPS would start Ghostscript.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and of TIFF
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")


@functools.cache
def pillow() -> Any:
    """PIL.Image with all its formats, and those of pillow-heif if that is installed."""
    from PIL import Image

    Image.init()
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    return Image


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings of the files that can be decoded, in lower case."""
    image = pillow()
    formats = {name for name in image.OPEN if name not in NOT_DECODED}
    return frozenset(suffix for suffix, name in image.registered_extensions().items() if name in formats)


def has_signature(path: str) -> bool:
    """Whether a file, whatever it is called, begins as an image of a common format does."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:
        return False
    container = start[8:12] == b"WEBP" or start[4:12] in (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1")
    return start.startswith(SIGNATURES) or container


class _Switch:
    """Pillow's, one for all threads: those that want it alike are inside together, the others wait."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nobody is inside."""
        self.changed = threading.Condition()
        self.inside = 0
        self.before = False

    def enter(self, wanted: bool) -> None:
        """Wait until it may stand so, and set it."""
        from PIL import ImageFile

        with self.changed:
            self.changed.wait_for(lambda: not self.inside or ImageFile.LOAD_TRUNCATED_IMAGES == wanted)
            if not self.inside:
                self.before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, wanted
            self.inside += 1

    def leave(self) -> None:
        """The last one out restores it."""
        from PIL import ImageFile

        with self.changed:
            self.inside -= 1
            if not self.inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self.before
                self.changed.notify_all()


_SWITCH = _Switch()
if hasattr(os, "register_at_fork"):  # who was inside is not there in a forked process
    os.register_at_fork(after_in_child=_SWITCH.reset)


@contextmanager
def truncated_files(allowed: bool) -> Iterator[None]:
    """Whether Pillow gives what is there of a file that ends too early, the rest grey or black, or raises OSError."""
    pillow()
    _SWITCH.enter(allowed)
    try:
        yield
    finally:
        _SWITCH.leave()


def rgb(file: Image.Image, upright: bool = True) -> Image.Image:
    """The image in 8-bit RGB; `upright` turns it as its EXIF orientation says. ValueError if its numbers mean nothing.

    Pillow turns TIFF files in any case.
    """
    file.load()
    image = _eight_bits(file)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours without Pillow's warning
    image = image.convert("RGB")
    orientation = _orientation(file) if upright else 1  # as it is stored; 2 is the first of `TURNS`
    return image.transpose(pillow().Transpose[TURNS[orientation - 2]]) if 2 <= orientation <= 8 else image


def _eight_bits(file: Image.Image) -> Image.Image:
    mode, tags = file.mode, getattr(file, "tag_v2", {})
    sixteen = mode.startswith("I;16") or (mode == "I" and file.format in ("PNG", "PPM"))  # "I" in older Pillows
    if mode == "I" and not sixteen:
        raise ValueError("32-bit or signed integers: nothing says which number is white; save it with 8 or 16 bits")
    if not sixteen and mode != "F":
        return file
    values = np.asarray(file)
    if sixteen:
        white = 4095 if tuple(tags.get(BITS, ())) == (12,) else 65535
        levels = (values.astype(np.int64) * 510 + white) // (2 * white)  # rounded
    else:
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}, expected 0 (black) to 1 (white)")
        levels = np.rint(values * np.float64(255))
    if tags.get(PHOTOMETRIC) == 0:  # white is zero; of 8 bits and less Pillow turns it round itself
        levels = 255 - levels
    image: Image.Image = pillow().fromarray(levels.clip(0, 255).astype(np.uint8))
    return image


def _orientation(file: Image.Image) -> int:
    try:
        return int(file.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF fails in many ways, and the pixels are there
        return 1
