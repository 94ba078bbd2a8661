"""Benchmarks as data: which images are in-distribution, which are not, and how all of them are prepared.

    benchmark = open_benchmark("cifar10", "~/data")
    benchmark.train[0]                    # (x, y), augmented
    benchmark.ood["svhn"][0]              # (x, -1)

Sets are read when they are first asked for: training needs no OOD images on the disk. `benchmark.check()` reads all of
them and names everything that is missing.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks
from ..registry import added
from ..values import IMAGE_SIZE
from . import folders, shifted
from .images import NO_CLASS, Files, ImageDataset, Noise, Scrambled, Source, augmentation, mixed, preparation
from .own import Read, hold_out, own_folders
from .readers import DATA_SETS, OPENOOD
from .specs import SPECS, Spec

LAYOUTS = ("auto", "torchvision", "openood")


def known() -> list[str]:
    """The names that `open_benchmark` takes."""
    return sorted([*SPECS, *added("benchmark"), "digits", "folder"])


def _part(name: str) -> functools.cached_property[ImageDataset]:
    return functools.cached_property(lambda self: self._parts[name]())


class ImageBenchmark:
    """One in-distribution task, and the sets that are to be told from it; see `open_benchmark`.

    Attributes:
        name, n_classes.
        image_shape: (channels, height, width) of every x.
        prepared: size, resize, mean, std and interpolation; None for "digits".
        train: the training images, augmented; `train.set_epoch(e)` chooses the random numbers.
        fit: the training images prepared as the test images are, for fitting detectors.
        validation, test: ID images with their classes.
        validation_ood: OOD images for choosing parameters, none of them among those of `ood`.
        ood: name -> data set; `.group` is "near", "far" or "synthetic". csid: ID classes in other images.
        views: the training images with other random numbers. outliers: images to train against, augmented, or None.
        class_names: what the classes are called, or their numbers.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        image_shape: tuple[int, int, int],
        parts: Mapping[str, Callable[[], ImageDataset]],
        tested: Mapping[str, Callable[[], ImageDataset]],
    ) -> None:
        self.name, self.n_classes, self.image_shape = name, n_classes, image_shape
        self._parts, self._tested = parts, tested
        self.prepared: dict[str, Any] | None = None

    train = _part("train")
    fit = _part("fit")
    validation = _part("validation")
    test = _part("test")
    validation_ood = _part("validation_ood")

    @functools.cached_property
    def views(self) -> ImageDataset:
        """The training images, augmented another time; the same where they are not augmented, as those of "digits"."""
        views = copy.copy(self.train)
        if views.augment_seed is not None:
            views.augment_seed = mixed(views.augment_seed, 1)
        return views

    @functools.cached_property
    def outliers(self) -> ImageDataset | None:
        """OOD images to train against, augmented as those of training; None if none were given."""
        return self._parts["outliers"]() if "outliers" in self._parts else None

    @functools.cached_property
    def tested(self) -> dict[str, ImageDataset]:
        """What is tested with besides `test`: `csid` and `ood`."""
        return {name: opened() for name, opened in self._tested.items()}

    @property
    def ood(self) -> dict[str, ImageDataset]:
        """The OOD sets by name."""
        return {name: part for name, part in self.tested.items() if part.group != "csid"}

    @property
    def csid(self) -> dict[str, ImageDataset]:
        """The covariate-shifted ID sets by name: images of the ID classes, with their labels."""
        return {name: part for name, part in self.tested.items() if part.group == "csid"}

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, or their numbers."""
        return self.fit.source.classes or tuple(map(str, range(self.n_classes)))

    def check(self, parts: Iterable[str] | None = None) -> None:
        """Read every set, or those `parts` and the OOD sets; one `UserError` with all that is missing."""
        problems: dict[str, str] = {}
        there: dict[str, ImageDataset] = {}
        for name, opened in [*((name, self._parts[name]) for name in parts or self._parts), *self._tested.items()]:
            try:
                there[name] = opened()
            except checks.UserError as error:
                cure = "; parameters are chosen on it, --no-tune does without" * (name == "validation_ood")
                problems[name] = f"{error}{cure}"
        if problems:
            spec = SPECS.get(self.name)
            left = [name for name, part in there.items() if name in self._tested and part.group != "csid"]
            if left and spec is not None and {*problems} <= {*spec.near, *spec.far}:
                problems[""] = f"to go on with the sets that are there: --ood {','.join(left)}"
            raise checks.UserError("\n".join(dict.fromkeys(problems.values())))


@dataclass(frozen=True)
class Options:
    """What `open_benchmark` takes besides the name and the folder; told there."""

    download: bool = False
    layout: str = "auto"
    ood: Sequence[str] | None = None
    ood_folders: Mapping[str, str | Path] | None = None
    csid: Sequence[str] | None = None
    csid_folders: Mapping[str, str | Path] | None = None
    synthetic: bool = False
    image_size: int | None = None
    seed: int = 0
    classes: Sequence[str] | None = None
    upright: bool | None = None
    truncated: bool = False
    prepared: Mapping[str, Any] | None = None
    outliers: str | Path | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise checks.UserError(checks.unknown("layout", self.layout, LAYOUTS))

    def chosen(self, names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """Those OOD sets of `names` that are asked for; `ood` may name `others` too."""
        names = list(names)
        known_sets = [*names, *others]
        for name in self.ood or ():
            if name not in known_sets:
                raise checks.UserError(checks.unknown("OOD set", name, known_sets))
        return [name for name in names if self.ood is None or name in self.ood]

    def chosen_csid(self, benchmark: str, names: Sequence[str]) -> Sequence[str]:
        """Those covariate-shifted sets of `names` that are asked for; those of "folder" lie there to be tested."""
        if self.csid is None:
            return names if benchmark == "folder" else ()
        for name in self.csid:
            if name not in (*names, "all"):
                raise checks.UserError(checks.unknown("covariate-shifted set", name, (*names, "all")))
        if "all" in self.csid and not names:
            told = "expected covariate-shifted sets of your own: --csid-folder NAME=DIR"
            raise checks.UserError(f"csid: got 'all', but benchmark {benchmark} has none, {told}")
        return names if "all" in self.csid else self.csid


def open_benchmark(name: str, root: str | os.PathLike[str] | None = None, **options: Any) -> ImageBenchmark:
    """The benchmark of that name from the files below `root`.

    Args:
        name: one of `known()`. "digits" needs no files. "folder" is a task of your own: `root/train/<class>/`,
            `root/test/<class>/`, if there is one `root/val/<class>/` (else a tenth of the training images), and the OOD
            sets `root/ood/<name>/` (far) and `root/near/<name>/`, or `ood_folders`.
        root: the folder of the data sets.

    Options, by keyword:
        download = False: fetch what is missing, where torchvision can.
        layout = "auto": "torchvision" (what its data sets leave below `root`), "openood" (its image lists: `root` or
            `root/data` holds `benchmark_imglist`), or "auto": OpenOOD's if there are such lists.
        ood = None: which OOD sets, default all.
        ood_folders = None: more OOD sets, name -> folder of images; group "far".
        csid = None: which covariate-shifted ID sets, images of the same classes; ("all",): all that the benchmark has.
            Default none, of "folder" all in `root/csid/<name>/<class>/`; the others' are read by OpenOOD's lists.
        csid_folders = None: more of these, name -> folder or .npy, see `shifted.read_shifted`.
        synthetic = False: also Gaussian noise and ID test images with scrambled pixels, as in Haas et al.; group
            "synthetic".
        image_size = None: of "folder" only, default `values.IMAGE_SIZE`, 224.
        seed = 0: of the augmentation and of synthetic images. Splits are the same for every seed, except for "digits".
        classes = None: of "folder" only, the class folders in the order of a model's outputs, default by name.
        upright = None: turn images as their EXIF orientation says; default for "folder" only, as torchvision and
            OpenOOD, whose numbers the others give, take them as stored.
        truncated = False: take what is there of image files that end too early, as OpenOOD does.
        prepared = None: size, resize, mean, std and interpolation, or some of them, in place of the benchmark's, for a
            model that was trained with others, see `models.own_preparation`; not for "digits".
        outliers = None: a folder of images to train against, for losses that need some; not for "digits".

    In torchvision's layout, validation images are held out of the test images, as many as in OpenOOD and in equal parts
    of the classes. OpenOOD also leaves out OOD images whose subject is an ID class (of Tiny ImageNet, Places365): for
    its numbers use its lists.

    Raises:
        UserError: an unknown name; here or when a set is first used, files that are missing or cannot be read.
        TypeError: an option that is none of these.
    """
    names = [option.name for option in fields(Options)]
    for option in options:
        if option not in names:
            raise TypeError(f"open_benchmark: {checks.unknown('option', option, names)}")
    asked = Options(**options)
    if name not in known():
        raise checks.UserError(checks.unknown("benchmark", name, known()))
    if name == "digits":
        return _digits(asked)
    if root is None:
        raise checks.UserError(f"benchmark {name}: needs the folder of its data (--data-root)")
    root = Path(root).expanduser()
    own = added("benchmark").get(name)
    read: Read | None = None
    if name == "folder":
        spec, read = own_folders(root, asked.image_size or IMAGE_SIZE, asked.classes)
    else:
        if asked.classes is not None:
            raise checks.UserError(f"classes: benchmark {name} has an order of its own")
        spec, read = own(root) if own else (SPECS[name], None)
        if asked.image_size is not None:
            raise checks.UserError(f"image_size: benchmark {name} has images of {spec.crop} pixels")
        read = read or _reader(name, spec, root, asked)
    if asked.prepared is not None:
        of_spec = {"size": "crop"} | {name: name for name in ("resize", "mean", "std", "interpolation")}
        told = ((of_spec[key], value) for key, value in asked.prepared.items() if key in of_spec)
        changed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told}
        spec = replace(spec, **changed)
    upright = name == "folder" if asked.upright is None else asked.upright
    return _Opener(spec, read, replace(asked, upright=upright)).benchmark(name)


class _Opener:
    """Data sets of what `read(set name, split)` gives, prepared as `spec` says."""

    def __init__(self, spec: Spec, read: Read, options: Options) -> None:
        self.spec, self.options = spec, options
        self._read = read
        self.prepared = functools.partial(preparation, spec.resize, spec.crop, spec.mean, spec.std, spec.interpolation)

    def benchmark(self, name: str) -> ImageBenchmark:
        spec = self.spec
        parts: dict[str, Callable[[], ImageDataset]] = {
            "train": self.training,
            "fit": functools.partial(self.inside, "train"),
            "validation": functools.partial(self.inside, "val"),
            "test": functools.partial(self.inside, "test"),
            "validation_ood": functools.partial(self.outside, spec.validation_ood, "val", "validation")
            if spec.validation_ood
            else functools.partial(self.scrambled, "val", "validation"),
        }
        if self.options.outliers is not None:
            parts["outliers"] = self.against
        groups = dict.fromkeys(spec.near, "near") | dict.fromkeys(spec.far, "far")
        added: dict[str, Callable[[], ImageDataset]] = {
            title: functools.partial(self.folder, title, folder)
            for title, folder in (self.options.ood_folders or {}).items()
        }
        made: dict[str, Callable[[], ImageDataset]] = {}
        if self.options.synthetic:
            made = {"noise": self.noise, "scrambled": functools.partial(self.scrambled, "test", "synthetic")}
        chosen = self.options.chosen(groups, (*added, *made))
        if both := [title for title in added if title in (*chosen, *made)]:
            raise checks.UserError(
                f"--ood-folder: {both[0]!r} is a set of the benchmark already, expected another, or --ood without it"
            )
        added |= made
        ood = {title: functools.partial(self.outside, title, "test", groups[title]) for title in chosen} | added
        csid = {title: functools.partial(self.shifted, title) for title in self.options.chosen_csid(name, spec.csid)}
        for title, place in (self.options.csid_folders or {}).items():
            csid[title] = functools.partial(self.shifted, title, place)
        if both := [title for title in csid if title in ood]:
            raise checks.UserError(f"csid: {both[0]!r} is an OOD set already, expected another name")
        opened = ImageBenchmark(name, spec.n_classes, (len(spec.mean), spec.crop, spec.crop), parts, {**csid, **ood})
        own = {name: getattr(spec, name) for name in ("resize", "mean", "std", "interpolation")}
        opened.prepared = {"size": spec.crop, **own}
        return opened

    def read(self, set_name: str, split: str) -> Source:
        return self._told(self._read(set_name, split))

    def _told(self, source: Source) -> Source:
        if isinstance(source, Files):
            source.upright, source.truncated = bool(self.options.upright), self.options.truncated
            if source.left_out:
                checks.warn_caller(source.left_out)
        return source

    def training(self) -> ImageDataset:
        return self._augmented(self.read(self.spec.id_set, "train"), self.spec.title, "id")

    def _augmented(self, source: Source, title: str, group: str) -> ImageDataset:
        spec = self.spec
        prepared = (spec.resize, spec.crop, spec.mean, spec.std, spec.interpolation)
        augmented = augmentation(spec.augment, *prepared, spec.flip)
        return ImageDataset(source, augmented, title=title, group=group, augment_seed=self.options.seed)

    def inside(self, split: str) -> ImageDataset:
        return ImageDataset(self.read(self.spec.id_set, split), self.prepared(), title=self.spec.title)

    def outside(self, set_name: str, split: str, group: str) -> ImageDataset:
        source = self.read(set_name, split)
        source = source.take(np.arange(len(source)))
        source.labels, source.classes = np.full(len(source), NO_CLASS), None
        title = DATA_SETS[set_name].title if set_name in DATA_SETS else set_name
        return ImageDataset(source, self.prepared(), title=title, group=group)

    def shifted(self, name: str, place: str | Path | None = None) -> ImageDataset:
        spec, title = self.spec, DATA_SETS[name].title if place is None and name in DATA_SETS else name
        if place is None:
            source = self.read(name, "test")
        else:
            named = (self.read(spec.id_set, split).classes for split in ("test", "train"))
            classes = next(filter(None, named), tuple(map(str, range(spec.n_classes))))
            source = self._told(shifted.read_shifted(place, title, classes))
        ready = place is None and name == "imagenet_c"  # 224 pixels already; OpenOOD cuts nothing off either
        transform = (
            preparation(spec.crop, spec.crop, spec.mean, spec.std, spec.interpolation) if ready else self.prepared()
        )
        return ImageDataset(source, transform, title=title, group="csid")

    def folder(self, title: str, folder: str | Path) -> ImageDataset:
        return ImageDataset(self._flat(title, folder), self.prepared(), title=title, group="far")

    def _flat(self, title: str, folder: str | Path) -> Source:
        return self._told(folders.read_flat_folder(Path(folder).expanduser(), title, "expected a folder of images"))

    def against(self) -> ImageDataset:
        return self._augmented(self._flat("outliers", self.options.outliers or ""), "outliers", "outliers")

    def noise(self) -> ImageDataset:
        spec = self.spec
        shape = (len(spec.mean), spec.crop, spec.crop)
        source = Noise(len(self.inside("test")), shape, spec.mean, spec.std, self.options.seed)
        return ImageDataset(source, title="Gaussian noise", group="synthetic")

    def scrambled(self, split: str, group: str) -> ImageDataset:
        return ImageDataset(Scrambled(self.inside(split), self.options.seed), title="scrambled pixels", group=group)


def _reader(name: str, spec: Spec, root: Path, options: Options) -> Read:
    """read(set name, "train" | "val" | "test") for the layout of `root`; each file is read once."""
    lists = next((folder for folder in (root, root / "data") if (folder / "benchmark_imglist").is_dir()), None)
    if options.layout == "openood" or (options.layout == "auto" and lists is not None):
        if spec.openood_images is None:
            raise checks.UserError(f"benchmark {name}: OpenOOD has no lists for it; pass layout='torchvision'")
        return _openood_reader(name, spec, lists or root)

    @functools.cache
    def whole(set_name: str, split: str) -> Source:
        data_set = DATA_SETS[set_name]

        def attempt() -> Source:
            return data_set.read(root, split, data_set.title, data_set.how)

        if not options.download or data_set.download is None:
            return attempt()
        try:
            return attempt()
        except checks.UserError:
            try:
                data_set.download(root, split)
            except (OSError, RuntimeError) as error:  # no network, or not what was expected
                what = f"{data_set.title}: the download failed ({error})"
                raise checks.UserError(f"{what}; get it from {data_set.where}") from error
            return attempt()

    @functools.cache
    def read(set_name: str, split: str) -> Source:
        n_held_out = DATA_SETS[set_name].n_held_out
        if split == "train" or not n_held_out:
            return whole(set_name, split)
        held_out, rest = hold_out(whole(set_name, "test"), n_held_out)
        return held_out if split == "val" else rest

    return read


def _openood_reader(name: str, spec: Spec, root: Path) -> Read:
    @functools.cache
    def read(set_name: str, split: str) -> Source:
        images = "images_classic" if set_name == "textures" else spec.openood_images or ""
        listed = set_name.replace("imagenet_", f"{name}_") if set_name in spec.csid else set_name
        path = root / "benchmark_imglist" / name / f"{split}_{listed}.txt"
        title = DATA_SETS[set_name].title
        n_classes = spec.n_classes if set_name in (spec.id_set, *spec.csid) else None
        return folders.read_image_list(path, root / images, title, f"get it from {OPENOOD}", n_classes)

    return read


def _digits(options: Options) -> ImageBenchmark:
    """The benchmark `digits`, whose OOD images for validation are scrambled validation images."""
    from . import digits

    for name in ("outliers", "ood_folders", "csid_folders", "image_size", "classes", "prepared"):
        if value := getattr(options, name):
            raise checks.UserError(f"{name}: got {value}, expected none: the images of benchmark digits are no files")
    splits, tested = digits.drawn(options.seed)
    csid = options.chosen_csid("digits", [name for name, part in tested.items() if part.group == "csid"])
    names = [*csid, *options.chosen(name for name, part in tested.items() if part.group != "csid")]
    chosen = {name: functools.partial(tested.__getitem__, name) for name in names}
    opened = {name: functools.partial(splits.__getitem__, name) for name in splits}
    channels, height, width = splits["train"][0][0].shape
    return ImageBenchmark("digits", digits.N_ID_CLASSES, (channels, height, width), opened, chosen)
