"""The benchmark `digits`: what is in it, that its parts do not overlap, and that a seed decides all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images

from ood_fast import data
from ood_fast.data import digits
from ood_fast.data.images import ImageDataset

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def benchmark_of_seed(request) -> data.ImageBenchmark:
    return data.open_benchmark("digits", seed=request.param)


def rows_of(images: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in images.flatten(1)}


def splits(benchmark: data.ImageBenchmark) -> list[ImageDataset]:
    return [benchmark.train, benchmark.validation, benchmark.test]


def test_six_classes_in_and_the_other_four_near(benchmark_of_seed):
    benchmark = benchmark_of_seed
    assert benchmark.n_classes == 6
    inside = {int(name) for name in benchmark.class_names}
    targets = load_digits().target
    assert sum(len(split.held()[0]) for split in splits(benchmark)) == np.isin(targets, list(inside)).sum()
    assert len(benchmark.ood["near"].held()[0]) == (~np.isin(targets, list(inside))).sum()
    assert {name: ood_set.group for name, ood_set in benchmark.ood.items()} == {
        "near": "near",
        "photographs": "far",
        "noise": "far",
    }


def test_shifted_images_are_the_test_images_elsewhere():
    benchmark = data.open_benchmark("digits", seed=3, csid=("all",), ood=("near",))
    assert list(benchmark.tested) == ["moved", "blurred", "near"]
    (plain, targets), (moved, of_moved), (blurred, _) = (
        part.held() for part in (benchmark.test, benchmark.csid["moved"], benchmark.csid["blurred"])
    )
    assert torch.equal(of_moved, targets)
    black = plain.min()  # of the border
    padded = torch.nn.functional.pad(plain - black, (1, 1, 1, 1)) + black
    for row in range(5):
        ways = [padded[row, :, y : y + 8, x : x + 8] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
        assert any(torch.allclose(moved[row], way, atol=1e-6) for way in ways)
    mean = torch.nn.functional.avg_pool2d(padded, 3, stride=1)
    torch.testing.assert_close(blurred, mean, atol=1e-5, rtol=0)
    assert benchmark.csid["moved"].group == "csid"


def test_no_image_is_in_two_parts(benchmark_of_seed):
    parts = [rows_of(split.held()[0]) for split in splits(benchmark_of_seed)]
    parts.append(rows_of(benchmark_of_seed.ood["near"].held()[0]))
    # The digits hold no two equal images, so that overlaps are counted rightly.
    assert sum(map(len, parts)) == len(set().union(*parts)) == 1797


def test_labels_are_the_classes_in_order(benchmark_of_seed):
    benchmark = benchmark_of_seed
    source = load_digits()
    by_image = {tuple(image.ravel()): label for image, label in zip(source.images, source.target, strict=True)}
    mean, std = normalisation(benchmark)
    for split in splits(benchmark):
        pixels = ((split.held()[0] * std + mean) * 16).round().flatten(1)
        names = [str(by_image[tuple(image)]) for image in pixels.tolist()]
        assert [benchmark.class_names[target] for target in split.targets.tolist()] == names
        assert split.targets.dtype == torch.int64


def normalisation(benchmark: data.ImageBenchmark) -> tuple[float, float]:
    """Mean and standard deviation, found from the lightest and darkest pixel of the digits, which are 0 and 1."""
    low, high = benchmark.train.held()[0].min().item(), benchmark.train.held()[0].max().item()
    return -low / (high - low), 1 / (high - low)


def test_every_class_has_the_same_shares(benchmark_of_seed):
    counts = np.array([np.bincount(split.targets, minlength=6) for split in splits(benchmark_of_seed)])
    shares = counts / counts.sum(axis=0)
    np.testing.assert_allclose(shares, [[0.60] * 6, [0.15] * 6, [0.25] * 6], atol=0.01)


def test_all_sets_are_scaled_alike(benchmark_of_seed):
    benchmark = benchmark_of_seed
    assert benchmark.train.held()[0].mean().abs() < 1e-5
    assert benchmark.train.held()[0].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    mean, std = normalisation(benchmark)
    for images in [split.held()[0] for split in splits(benchmark)] + [
        part.held()[0] for part in benchmark.ood.values()
    ]:
        assert images.dtype == torch.float32
        assert images.shape[1:] == (1, 8, 8)
        pixels = images * std + mean
        assert pixels.min() >= -1e-6
        assert pixels.max() <= 1 + 1e-6
    noise = benchmark.ood["noise"].held()[0] * std + mean
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_a_seed_gives_the_same_benchmark_again_and_another_seed_another():
    first, again, other = (
        data.open_benchmark("digits", seed=3),
        data.open_benchmark("digits", seed=3),
        data.open_benchmark("digits", seed=4),
    )
    for a, b in zip(splits(first), splits(again), strict=True):
        assert torch.equal(a.held()[0], b.held()[0])
        assert torch.equal(a.targets, b.targets)
    for name in first.ood:
        assert torch.equal(first.ood[name].held()[0], again.ood[name].held()[0])
        assert not torch.equal(first.ood[name].held()[0][:5], other.ood[name].held()[0][:5])
    assert len({data.open_benchmark("digits", seed=seed).class_names for seed in range(5)}) > 1


def test_crops_are_block_means_of_the_photographs():
    crops = digits._photograph_crops(50, np.random.default_rng(0))
    assert crops.shape == (50, 8, 8)
    assert crops.min() >= 0
    assert crops.max() <= 1
    # Photographs have structure: neighbouring pixels agree far more than those of shuffled crops.
    shuffled = np.random.default_rng(1).permuted(crops.reshape(50, 64), axis=1).reshape(50, 8, 8)
    assert np.abs(np.diff(crops, axis=2)).mean() < 0.6 * np.abs(np.diff(shuffled, axis=2)).mean()
    assert crops.std(axis=(1, 2)).min() > 0


def test_a_crop_of_a_ramp(monkeypatch):
    ramp = np.repeat(np.arange(128.0)[:, None, None], 128, axis=1).repeat(3, axis=2)
    photographs = type("Photographs", (), {"images": [ramp]})
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: photographs)
    monkeypatch.setattr(digits, "CROP_SIDES", (128,))
    (crop,) = digits._photograph_crops(1, np.random.default_rng(0))
    expected = (np.arange(8) * 16 + 7.5) / 255  # the mean of 16 successive rows
    np.testing.assert_allclose(crop, np.repeat(expected[:, None], 8, axis=1), rtol=1e-12)


def test_both_photographs_are_large_enough_for_every_crop():
    for image in load_sample_images().images:
        assert min(image.shape[:2]) >= max(digits.CROP_SIDES)


@pytest.mark.parametrize(
    "option", [{"classes": ["a"]}, {"image_size": 4}, {"ood_folders": {"a": "b"}}, {"prepared": {"size": 4}}]
)
def test_options_of_images_in_files_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: got"):
        data.open_benchmark("digits", **option)
