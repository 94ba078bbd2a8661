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


_CIFAR: dict[str, Any] = {"far": ("mnist", "svhn", "texture", "places365"), "validation_ood": "tin"}
_CIFAR |= {"resize": 32, "crop": 32, "augment": "pad_crop", "openood_images": "images_classic"}
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

# The first four are OpenOOD's (v1.5), sets, sizes and statistics. `gtsrb` and `tin` are trained on by Haas et al. (TMLR
# 2024, tables 5 and 6), who tell the OOD sets and nothing more: what is near and far, the sizes and the images for
# validation are ours. Their statistics are those in common use and were not counted again: check them if they matter.
SPECS = {
    "cifar10": Spec(
        "CIFAR-10",
        "cifar10",
        10,
        near=("cifar100", "tin"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        csid=("cifar10c",),
        **_CIFAR,
    ),
    "cifar100": Spec(
        "CIFAR-100",
        "cifar100",
        100,
        near=("cifar10", "tin"),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        **_CIFAR,
    ),
    "imagenet200": Spec("ImageNet-200", "imagenet200", 200, **IMAGENET),
    "imagenet": Spec("ImageNet-1K", "imagenet", 1000, **{**IMAGENET, "csid": (*IMAGENET["csid"], "imagenet_es")}),
    "gtsrb": Spec(
        "GTSRB",
        "gtsrb",
        43,
        near=(),
        far=("svhn", "cifar100", "tin"),
        validation_ood="tin",
        resize=32,
        crop=32,
        mean=(0.3403, 0.3121, 0.3214),
        std=(0.2724, 0.2608, 0.2669),
        augment="pad_crop",
        flip=False,  # a mirrored sign is another sign
    ),
    "tin": Spec(
        "Tiny ImageNet",
        "tin",
        200,
        near=("cifar100",),
        far=("svhn",),
        validation_ood="cifar100",
        resize=64,
        crop=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        augment="pad_crop",
    ),
}
