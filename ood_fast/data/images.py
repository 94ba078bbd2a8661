"""Map-style data sets of images: where the pixels come from (a source), and what is done to them (a transform).

Every data set gives `(x, y)`: x float32 (channels, height, width), normalised; y int, −1 for images without a class.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .. import checks
from . import decoding

Colour = tuple[float, ...]  # a number for each channel
Labels = Sequence[int] | np.ndarray | Tensor

N_SIZES, N_BEGINNINGS = 10_000, 64  # files whose size, and whose first bytes, `ImageDataset.content` looks at
N_BYTES = 1 << 28  # of pixels that it looks at; all of CIFAR's
SMALL, KEPT = 64 * 64, 1 << 28  # pixels of an image that training decodes once, and bytes that it keeps of all
DECODING = 2  # counts the changes of what pixels a file gives: fingerprints tell them apart
NO_CLASS = -1  # the label of an OOD image, as in OpenOOD's lists


def torchvision() -> Any:
    """The module; `UserError` says how to get it."""
    return checks.optional_import("an image data set", "torchvision")


# ---- sources: images by number, before any transform


class Source:
    """Images by number. Subclasses give `image(i)` (a PIL image in RGB, or a tensor that is ready), and `take(rows)`.

    Attributes:
        labels: (n,) int64.
        classes: the name of each class, or None where nobody has named them.
    """

    def __init__(self, labels: Labels, classes: Iterable[str] | None = None) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Any:
        """One image: a PIL image in RGB, or a tensor that is ready."""
        raise NotImplementedError

    def path(self, index: int) -> str | None:
        """The file of an image; None where one file holds many."""
        return None

    def take(self, rows: np.ndarray) -> Source:
        """The source of these rows, in this order."""
        raise NotImplementedError

    def update(self, digest: Any) -> None:
        """Feed what identifies the images to a hash."""
        raise NotImplementedError

    def update_content(self, digest: Any) -> None:
        """As `update`, but alike for copies, wherever and whenever they were made."""
        self.update(digest)


class Pixels(Source):
    """Images in memory: uint8 (n, height, width), grey, or (n, height, width, 3)."""

    def __init__(self, pixels: np.ndarray, labels: Labels, classes: Iterable[str] | None = None) -> None:
        super().__init__(labels, classes)
        self.pixels = pixels

    def image(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB")

    def take(self, rows: np.ndarray) -> Pixels:
        return Pixels(self.pixels[rows], self.labels[rows], self.classes)

    def update(self, digest: Any) -> None:
        digest.update(np.ascontiguousarray(self.pixels))

    def update_content(self, digest: Any) -> None:
        """Of many pixels, which may be mapped from a file larger than the memory, images evenly over them."""
        digest.update(np.ascontiguousarray(self.pixels[:: 1 + self.pixels.nbytes // N_BYTES]))


class Files(Source):
    """Image files below one folder, decoded as `decoding` says.

    `upright` False leaves images as they are stored whatever their EXIF orientation says, as torchvision does.
    `truncated` True takes what is there of files that end too early, as OpenOOD does; else they are errors.
    `left_out` says in words what else lies there and is not taken.

    The names are one NumPy array of bytes, not a list of strings: data-loader workers are forked, and touching a
    million Python objects would copy all of their pages into each worker.
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str] | np.ndarray,
        labels: Labels,
        classes: Sequence[str] | None = None,
        *,
        upright: bool = True,
        truncated: bool = False,
        left_out: str = "",
    ) -> None:
        super().__init__(labels, classes)
        self.root, self.upright, self.truncated, self.left_out = Path(root), upright, truncated, left_out
        self.names = names if isinstance(names, np.ndarray) else np.array([os.fsencode(name) for name in names], "S")

    def path(self, index: int) -> str:
        """The folder and the name; the name alone below the current folder."""
        name = os.fsdecode(bytes(self.names[index]))
        return name if self.root == Path() else os.path.join(self.root, name)

    def image(self, index: int) -> Any:
        """8-bit RGB; UserError with the path and the reason if there is no image, or none that can be read."""
        path = self.path(index)
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise checks.UserError(f"image {path}: {'is no regular file' if os.path.exists(path) else 'no such file'}")
        try:
            with decoding.truncated_files(self.truncated), decoding.pillow().open(path) as file:
                return decoding.rgb(file, self.upright)
        except Exception as error:  # decoders fail in every way
            why = str(error) or type(error).__name__
            cure = "; --truncated allow takes what is there" * ("truncated" in why or "broken data" in why)
            raise checks.UserError(f"image {path}: cannot be read ({why}{cure})") from error

    def take(self, rows: np.ndarray) -> Files:
        taken = copy.copy(self)
        taken.names, taken.labels = self.names[rows], self.labels[rows]
        return taken

    def update(self, digest: Any) -> None:
        """Names, sizes and times of change, and how the files are decoded."""
        digest.update(b"\n".join(self.names.tolist()))
        digest.update(f"decoding {DECODING} {self.upright}{' truncated' * self.truncated};".encode())
        for index in range(len(self)):
            try:
                status = os.stat(self.path(index))
            except OSError:  # `image` says so
                digest.update(b"missing;")
                continue
            digest.update(f"{status.st_size} {status.st_mtime_ns};".encode())

    def update_content(self, digest: Any) -> None:
        """Names; sizes and beginnings of files evenly over them, which a million on a network would not let us see."""
        digest.update(b"\n".join(self.names.tolist()))
        for index in np.linspace(0, len(self) - 1, min(len(self), N_SIZES), dtype=int):
            with suppress(OSError):  # `image` says so
                digest.update(f"{os.path.getsize(self.path(index))};".encode())
        for index in np.linspace(0, len(self) - 1, min(len(self), N_BEGINNINGS), dtype=int):
            if os.path.isfile(path := self.path(index)):
                with suppress(OSError), open(path, "rb") as file:
                    digest.update(file.read(1 << 16))


class Tensors(Source):
    """Images that are prepared: float32 (n, channels, height, width)."""

    def __init__(self, images: Tensor, labels: Labels, classes: Iterable[str] | None = None) -> None:
        super().__init__(labels, classes)
        self.images = images

    def image(self, index: int) -> Tensor:
        return self.images[index]

    def take(self, rows: np.ndarray) -> Tensors:
        return Tensors(self.images[torch.from_numpy(rows)], self.labels[rows], self.classes)

    def update(self, digest: Any) -> None:
        digest.update(self.images.contiguous().cpu().numpy())


class Noise(Source):
    """Gaussian noise with the mean and deviation of each channel of the ID images, clipped to what a pixel can be."""

    def __init__(self, n_images: int, shape: tuple[int, int, int], mean: Colour, std: Colour, seed: int) -> None:
        super().__init__(np.full(n_images, NO_CLASS))
        self.shape, self.seed = shape, seed
        at, by = (torch.tensor(values, device="cpu").view(-1, 1, 1) for values in (mean, std))
        self.low, self.high = -at / by, (1 - at) / by

    def image(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(mixed(self.seed, index))
        noise = torch.randn(self.shape, generator=generator, device="cpu")
        return noise.clamp(self.low, self.high)

    def update(self, digest: Any) -> None:
        digest.update(f"noise {len(self)} {self.shape} {self.seed} {self.low.tolist()} {self.high.tolist()}".encode())


class Scrambled(Source):
    """The images of a data set, prepared, with the pixels of each in an order of its own; channels stay together."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        super().__init__(np.full(len(dataset), NO_CLASS))
        self.dataset, self.seed = dataset, seed

    def image(self, index: int) -> Tensor:
        x, _ = self.dataset[index]
        n_places = x.shape[1] * x.shape[2]
        generator = torch.Generator().manual_seed(mixed(self.seed, index))
        order = torch.randperm(n_places, generator=generator, device="cpu")
        return x.flatten(1)[:, order].view_as(x)

    def path(self, index: int) -> str | None:
        return self.dataset.source.path(index)

    def update(self, digest: Any) -> None:
        digest.update(f"scrambled {self.seed} {self.dataset.fingerprint()}".encode())


def mixed(*numbers: int) -> int:
    """32 bits that depend on all the numbers (all that torch's CPU generator takes from a seed)."""
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


# ---- the data set


class ImageDataset(torch.utils.data.Dataset[Any]):
    """A map-style data set: `dataset[i]` is (x, y), x float32 (channels, height, width), y int.

    With `augment_seed`, `transform` draws random numbers: those of image i in epoch e depend on (seed, e, i) alone, not
    on the number of workers, the order of the images or what ran before. So a resumed run sees what the uninterrupted
    one would have seen. `set_epoch(e)` reaches workers that live on.

    Attributes:
        title, group: what tables call it; "id", "near", "far" or "synthetic".
        targets: (n,) int64 tensor, read without loading an image.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Any] | None = None,
        *,
        title: str = "",
        group: str = "id",
        augment_seed: int | None = None,
    ) -> None:
        self.source, self.transform = source, transform
        self.title, self.group = title, group
        self.augment_seed = augment_seed
        self._decoded: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self.source.labels[index])  # IndexError past the end, before an image is made
        image = self._image(index)
        if self.transform is not None:
            seed = None if self.augment_seed is None else mixed(self.augment_seed, int(self._epoch), index)
            with nullcontext() if seed is None else _global_generator_seeded(seed):
                image = self.transform(image)
        return image, label

    def _image(self, index: int) -> Any:
        """Small files of training are decoded once, where no workers do it beside the model."""
        if index in self._decoded:
            return decoding.pillow().frombytes("RGB", *self._decoded[index])
        image = self.source.image(index)
        if self.augment_seed is not None and isinstance(self.source, Files) and get_worker_info() is None:
            width, height = image.size
            if width * height <= SMALL and (len(self._decoded) + 1) * 3 * width * height <= KEPT:
                self._decoded[index] = image.size, image.tobytes()
        return image

    def set_epoch(self, epoch: int) -> None:
        """Augment as in that epoch, also in workers that live on; before the data loader is iterated anew."""
        self._epoch.fill_(epoch)

    @property
    def targets(self) -> Tensor:
        """The labels, (n,) int64."""
        return torch.from_numpy(self.source.labels)

    def held(self) -> tuple[Tensor, Tensor] | None:
        """All images and classes, where they lie in memory as they are given; None where each is made by itself."""
        return (self.source.images, self.targets) if type(self.source) is Tensors and not self.transform else None

    def path(self, index: int) -> str | None:
        """The file of an image; None where one file holds many."""
        return self.source.path(index)

    def fingerprint(self) -> str:
        """A key for what was computed from these images: their content or, of single files, name, size and time of
        change; the labels; the transform."""
        digest = hashlib.sha256(f"{self.transform!r} {self.augment_seed} {int(self._epoch)}".encode())
        digest.update(self.source.labels.tobytes())
        self.source.update(digest)
        return digest.hexdigest()

    @functools.cached_property
    def content(self) -> str:
        """What tells the images and labels from others of the same number, before they are transformed; alike for
        copies. Of single files: names and, of some, sizes and the first bytes."""
        digest = hashlib.sha256(self.source.labels.tobytes())
        self.source.update_content(digest)
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"ImageDataset({self.title!r}, {self.group}, {len(self)} images)"


@contextmanager
def _global_generator_seeded(seed: int) -> Iterator[None]:
    """torchvision's transforms draw from torch's global generator: seed it, and give it back as it was."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


# ---- transforms


@functools.lru_cache
def preparation(
    resize: int | tuple[int, int], crop: int, mean: Colour, std: Colour, interpolation: str = "bilinear"
) -> Callable[[Any], Tensor]:
    """PIL image -> normalised tensor: short side to `resize` (all of it to (height, width)), the middle `crop`×`crop`;
    grey for a single mean."""
    transforms = torchvision().transforms
    resized = transforms.Resize(resize, transforms.InterpolationMode(interpolation))
    steps = [*_grey(mean), resized, transforms.CenterCrop(crop), *_normalised(mean, std)]
    composed: Callable[[Any], Tensor] = transforms.Compose(steps)
    return composed


def prepared_as(said: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """`preparation` by what a run, a file of detectors or a bundle says, perhaps as JSON has it."""
    resize = said["resize"] if isinstance(said["resize"], int) else tuple(said["resize"])
    mean, std = tuple(said["mean"]), tuple(said["std"])
    return preparation(resize, said["size"], mean, std, said.get("interpolation", "bilinear"))


@functools.lru_cache
def augmentation(
    kind: str,
    resize: int | tuple[int, int],
    crop: int,
    mean: Colour,
    std: Colour,
    interpolation: str = "bilinear",
    flip: bool = True,
) -> Callable[..., Any]:
    """The same with random crops and flips. `kind`: "pad_crop" pads by 4 and cuts `crop`×`crop`; "resized_crop" cuts
    8 to 100 % of the area and scales it."""
    transforms = torchvision().transforms
    by = transforms.InterpolationMode(interpolation)
    steps = _grey(mean)
    if kind == "pad_crop":
        steps += [transforms.Resize(resize, by), transforms.CenterCrop(crop), transforms.RandomCrop(crop, padding=4)]
    else:
        steps.append(transforms.RandomResizedCrop(crop, interpolation=by))
    if flip:
        steps.append(transforms.RandomHorizontalFlip())
    composed: Callable[[Any], Tensor] = transforms.Compose([*steps, *_normalised(mean, std)])
    return composed


def _grey(mean: Colour) -> list[Callable[..., Any]]:
    return [torchvision().transforms.Grayscale()] if len(mean) == 1 else []


def _normalised(mean: Colour, std: Colour) -> tuple[Any, ...]:
    transforms = torchvision().transforms
    return transforms.ToTensor(), transforms.Normalize(mean, std)
