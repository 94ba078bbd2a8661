"""The benchmarks that are known by name: their sets, sizes and statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """A benchmark. Set names are those of `readers.DATA_SETS`; the OOD sets are tested in this order.

    Of every set the short side is scaled to `resize` and the middle `crop`×`crop` cut out, then normalised by `mean`
    and `std`, the statistics of the ID images. Training images are augmented instead, see `images.augmentation`.
    """

    title: str
    id_set: str
    n_classes: int
    near: tuple[str, ...]
    far: tuple[str, ...]
    validation_ood: str
    resize: int | tuple[int, int]
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: str
    flip: bool = True
    interpolation: str = "bilinear"
    openood_images: str | None = None  # OpenOOD's folder of images; None: OpenOOD has no such benchmark
    csid: tuple[str, ...] = ()  # covariate-shifted ID sets, the same classes in other images


IMAGENET: dict[str, Any] = {
    "near": ("ssb_hard", "ninco"),
    "far": ("inaturalist", "textures", "openimage_o"),
    "csid": ("imagenet_v2", "imagenet_c", "imagenet_r"),
    "validation_ood": "openimage_o",
    "resize": 256,
    "crop": 224,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "augment": "resized_crop",
    "openood_images": "images_largescale",
}
_ES = {**IMAGENET, "csid": (*IMAGENET["csid"], "imagenet_es")}
_FAR = ("mnist", "svhn", "texture", "places365")
_CLASSIC = "images_classic"
_STATISTICS = {  # mean and std of small ID images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "tin": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}


def _small(title: str, id_set: str, n_classes: int, *ood: Any, size: int = 32, **more: Any) -> Spec:
    """Of small images; `ood`: the near, the far and the validation set."""
    (near, far, validation_ood), (mean, std) = ood, _STATISTICS[id_set]
    return Spec(title, id_set, n_classes, near, far, validation_ood, size, size, mean, std, "pad_crop", **more)


# The first four are OpenOOD's (v1.5), sets, sizes and statistics. `gtsrb` and `tin` are trained on by Haas et al. (TMLR
# 2024, tables 5 and 6), who tell the OOD sets and nothing more: what is near and far, the sizes and the images for
# validation are ours. Their statistics are those in common use and were not counted again: check them if they matter.
_CIFAR10: dict[str, Any] = {"csid": ("cifar10c",), "openood_images": _CLASSIC}
SPECS = {
    "cifar10": _small("CIFAR-10", "cifar10", 10, ("cifar100", "tin"), _FAR, "tin", **_CIFAR10),
    "cifar100": _small("CIFAR-100", "cifar100", 100, ("cifar10", "tin"), _FAR, "tin", openood_images=_CLASSIC),
    "imagenet200": Spec("ImageNet-200", "imagenet200", 200, **IMAGENET),
    "imagenet": Spec("ImageNet-1K", "imagenet", 1000, **_ES),
    # a mirrored sign is another sign
    "gtsrb": _small("GTSRB", "gtsrb", 43, (), ("svhn", "cifar100", "tin"), "tin", flip=False),
    "tin": _small("Tiny ImageNet", "tin", 200, ("cifar100",), ("svhn",), "cifar100", size=64),
}
