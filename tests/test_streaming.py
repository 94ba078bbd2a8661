"""What fitting gathers: against the whole data at once, in batches and in halves, and the memory that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ood_fast import detectors
from ood_fast.detectors import streaming
from ood_fast.detectors.streaming import Bank, ClassMeans, FeatureMean, MeanMaxLogit, Percentiles, Scatter

N, C, M = 500, 7, 12


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, logits and targets; the last class is never a target."""
    z = torch.randn(N, M, dtype=torch.float64) * torch.logspace(-3, 1, M) + 5
    return z, torch.randn(N, C, dtype=torch.float64), torch.randint(0, C - 1, (N,))


def taken(part, data, cuts=(N,)):
    for z, f, y in zip(*(t.split(cuts) for t in data), strict=True):
        part.take(z, f, y)
    return part


def results(part) -> list[torch.Tensor]:
    if isinstance(part, Scatter):
        return [part.mean, part.scatter, part.covariance()]
    if isinstance(part, Percentiles):
        return [torch.tensor(part.percentile(p)) for p in (0, 1, 35.5, 90, 100)]
    return [part.value(), *([part.count] if isinstance(part, ClassMeans) else [])]


MAKERS = {
    "Scatter": Scatter,
    "FeatureMean": FeatureMean,
    "MeanMaxLogit": MeanMaxLogit,
    "ClassMeans of targets": ClassMeans,
    "ClassMeans of correct rows": lambda: ClassMeans("correct"),
    "ClassMeans of the softmax": lambda: ClassMeans("predicted", "softmax"),
    "Percentiles, exact": Percentiles,
    "Percentiles, sketched": lambda: Percentiles(exact=100),
    "Percentiles, going over": lambda: Percentiles(exact=N * M // 2 + 3),
    "Bank of all": lambda: Bank("unit"),
    "Bank of a fraction": lambda: Bank("energy", fraction=0.3),
    "Bank with a budget": lambda: Bank(budget=40, seed=3),
    "Bank with a budget of values": lambda: Bank(values=60 * M),
}


def test_every_class_is_in_the_list():
    of = {type(make()) for make in MAKERS.values()}
    # Those of other modules, imported or not, have their own tests.
    assert of == {each for each in streaming.Gathered.__subclasses__() if each.__module__ == streaming.__name__}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("cuts", [[1] * 20 + [N - 20], [130, 0, 369, 1]], ids=["single rows", "an empty batch"])
def test_batches_do_not_matter(name, cuts, data):
    whole, pieces = taken(MAKERS[name](), data), taken(MAKERS[name](), data, cuts)
    assert whole.rows == pieces.rows == N
    torch.testing.assert_close(results(pieces), results(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("at", [0, 1, 333, N], ids=["nothing first", "one row first", "uneven", "nothing last"])
def test_two_halves_are_one(name, at, data):
    first, second = MAKERS[name](), MAKERS[name]()
    taken(first, [t[:at] for t in data], (at,))
    taken(second, [t[at:] for t in data], (N - at,))
    first.join(second)
    assert first.rows == N
    torch.testing.assert_close(results(first), results(taken(MAKERS[name](), data)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_taken_in_is_not_written_to(name, data):
    before = [t.clone() for t in data]
    part = taken(MAKERS[name](), data, (200, 300))
    values = results(part)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))
    for tensor in data:
        tensor.zero_()
    torch.testing.assert_close(results(part), values, rtol=0, atol=0)


# ---- each against NumPy


def test_scatter(data):
    part, z = taken(Scatter(), data, (100, 400)), data[0].numpy()
    np.testing.assert_allclose(part.covariance().numpy(), np.cov(z.T, bias=True), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(part.mean.numpy(), z.mean(0), rtol=1e-14)


def test_scatter_keeps_its_digits_far_from_the_origin():
    # Variance 1 at 1e7: the sum of squares less N μ² would keep two digits of it in float64.
    z = torch.randn(2000, 3, dtype=torch.float64)
    part = Scatter()
    for batch in (z + 1e7).split(64):
        part.take(batch, None, None)
    torch.testing.assert_close(part.covariance(), torch.cov(z.T, correction=0), rtol=1e-7, atol=1e-7)


def test_means_keep_their_digits_over_many_rows():
    # In float32 a sum of 1e6 numbers of size 1e4 + 0.125 loses the eighth.
    part = FeatureMean()
    for _ in range(100):
        part.take(torch.full((10_000, 3), 1e4 + 0.125), None, None)
    assert part.value().dtype == torch.float32
    torch.testing.assert_close(part.value(), torch.full((3,), 1e4 + 0.125), rtol=0, atol=0)


def test_class_means(data):
    z, f, y = (t.numpy() for t in data)
    predicted = f.argmax(1)
    softmax = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    for part, of, rows in (
        (ClassMeans(), y, z),
        (ClassMeans("correct"), np.where(predicted == y, y, -1), z),
        (ClassMeans("predicted", "softmax"), predicted, softmax),
    ):
        taken(part, data, (250, 250))
        for c in range(C):
            assert part.count[c] == (of == c).sum()
            expected = rows[of == c].mean(0) if (of == c).any() else np.zeros(rows.shape[1])
            np.testing.assert_allclose(part.value()[c].numpy(), expected, rtol=1e-12)


def test_ties_are_predicted_as_the_first_class():
    part = ClassMeans("predicted", "softmax")
    part.take(None, torch.zeros(4, 3), None)
    assert part.count.tolist() == [4, 0, 0]


def test_scatter_within_classes(data):
    z, _, y = (t.numpy() for t in data)
    within = taken(ClassMeans(), data).within(taken(Scatter(), data)).numpy()
    centred = z - np.stack([z[y == c].mean(0) if (y == c).any() else z[0] for c in range(C)])[y]
    np.testing.assert_allclose(within, centred.T @ centred, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", [-1, C])
def test_class_means_refuse_what_is_no_class(target, data):
    z, f, y = data
    y[13] = target
    with pytest.raises(ValueError, match=rf"targets: got {target} in row 13, expected class indices in \[0, {C}\)"):
        ClassMeans().take(z, f, y)


def test_half_precision_is_summed_in_float64():
    z = torch.randn(100, 4).bfloat16()
    part = Scatter()
    part.take(z, None, None)
    assert part.like.dtype == torch.float32
    torch.testing.assert_close(part.mean, z.double().mean(0), rtol=1e-14, atol=0)


# ---- percentiles


def test_exact_percentiles_are_those_of_numpy(data):
    part, z = taken(Percentiles(), data, (1, 499)), data[0].numpy()
    for p in (0, 0.1, 10, 50, 99.99, 100):
        assert part.percentile(p) == pytest.approx(np.percentile(z, p), rel=1e-14)
    median = part.percentile(50)
    assert part.to("meta").percentile(50) == median, "numbers stay on the CPU when a fit in processes moves the rest"


@pytest.mark.parametrize("kind", ["signed", "rectified", "wide"])
def test_sketched_percentiles_keep_their_stated_error(kind):
    z = torch.randn(4000, 5)
    z = {"signed": z, "rectified": z.relu(), "wide": (10 * z).exp() * z.sign()}[kind]
    part = Percentiles(exact=7)
    part.take(z, None, None)
    values = np.sort(z.numpy().astype(np.float64).ravel())
    for p in (0, 3.3, 25, 50, 75, 90, 99, 99.9, 100):
        low, high = (values[f(p / 100 * (values.size - 1))] for f in (lambda r: int(r), lambda r: int(np.ceil(r))))
        expected, allowed = np.percentile(values, p), 2.0**-12 * max(abs(low), abs(high))
        assert abs(part.percentile(p) - expected) <= allowed * (1 + 1e-6), (p, expected)


def test_sketched_percentiles_of_ends_and_gaps():
    part = Percentiles(exact=1)
    part.take(torch.tensor([[-torch.inf, -1.0, -0.0, 0.0, 1.0, 3.0, torch.inf]]), None, None)
    assert part.percentile(0) == -np.inf
    assert part.percentile(100) == np.inf
    assert part.percentile(50) == 0.0
    assert part.percentile(75) == pytest.approx(2.0, rel=2**-11), "between order statistics, as numpy interpolates"


# ---- banks


def test_a_bank_keeps_rows_in_order(data):
    torch.testing.assert_close(taken(Bank(), data, (77, 423)).value(), data[0], rtol=0, atol=0)
    unit = data[0] / data[0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(taken(Bank("unit"), data).value(), unit)
    energy = data[1].exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(taken(Bank("energy"), data).value(), unit * energy)
    half = taken(Bank(dtype=torch.float16), data).value()
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), data[0], rtol=1e-3, atol=1e-6)


def test_a_zero_row_stays_zero():
    part = Bank("energy")
    part.take(torch.zeros(2, 3), torch.zeros(2, 2), None)
    assert torch.equal(part.value(), torch.zeros(2, 3))


@pytest.mark.parametrize("settings", [{"budget": 2000}, {"values": 2000 * 4}, {"fraction": 0.1}], ids=str)
def test_every_row_has_the_same_chance(settings):
    """20,000 rows, a tenth kept: over 20 seeds each tenth of the stream gives as many; 4 standard deviations."""
    z = torch.randn(20_000, 4)
    z[:, 0] = torch.arange(20_000)
    counts, distinct = torch.zeros(10), set()
    for seed in range(20):
        part = Bank(seed=seed, **settings)
        for batch in z.split(999):
            part.take(batch, None, None)
        rows = part.value()[:, 0].long()
        assert (rows.diff() > 0).all(), "rows keep their order"
        counts += torch.bincount(rows // 2000, minlength=10)
        distinct.add(tuple(rows[:50].tolist()))
        if "fraction" not in settings:
            assert len(rows) == 2000
    assert len(distinct) == 20, "every seed draws others"
    assert ((counts - 4000).abs() < 4 * (4000 * 0.9) ** 0.5).all(), counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_draw_the_same_rows_in_whatever_dtype(dtype):
    """An evaluation fits in float64 what `fit` takes in float32."""
    z = torch.randn(1000, 6).to(dtype)
    kept = [Bank(budget=30) for _ in range(2)]
    for part, rows in zip(kept, (z, z.double()), strict=True):
        part.take(rows, None, None)
    torch.testing.assert_close(kept[0].value().double(), kept[1].value(), rtol=0, atol=0)


def test_the_sample_does_not_depend_on_the_order(data):
    rows = taken(Bank(budget=30), data).value()
    order = torch.randperm(N)
    shuffled = taken(Bank(budget=30), [t[order] for t in data], (123, 377)).value()
    torch.testing.assert_close(shuffled.sort(dim=0).values, rows.sort(dim=0).values, rtol=0, atol=0)


def test_one_bank_serves_all_who_ask(data):
    part = taken(Bank("unit"), data, (100, 400))
    assert part.value() is part.value()


# ---- memory


def held(detector: detectors.Detector) -> int:
    """Bytes of all tensors that a fit in progress holds."""
    parts = detector.gathered.values()
    values = [value for part in parts for value in vars(part).values()]
    tensors = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return sum(item.untyped_storage().nbytes() for item in tensors if isinstance(item, torch.Tensor))


STREAMED = {
    "Mahalanobis": {},
    "RMDS": {},
    "SHE": {},
    "ViM": {"dim": 16},
    "NECO": {"dim": 16},
    "NCI": {},
    "FDBD": {},
    "KLMatching": {},
    "ReAct": {},
    "SML": {},
    "TemperatureScaling": {},
    "KNN": {"budget": 1000, "k": 10},
    "NNGuide": {"budget": 1000, "k": 10},
}


@pytest.mark.slow
def test_a_million_rows_take_no_more_memory_than_some(monkeypatch):
    """m = 64, a million rows in batches of 10,000: what a fit holds, looked at after each batch, stops growing."""
    monkeypatch.setattr(streaming, "SAMPLE_VALUES", 1 << 20)
    monkeypatch.setattr(detectors.ReAct, "gathers", lambda self: {"values": Percentiles(exact=1 << 20)})
    named = {name: detectors.create(name, **keywords) for name, keywords in STREAMED.items()}
    streams = detectors.DetectorSet(named)
    head = torch.randn(10, 64) / 8
    sizes: dict[str, list[int]] = {name: [] for name in named}
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        z = torch.randn(10_000, 64, generator=generator)
        logits = z @ head.T
        streams.partial_fit(z, logits, logits.argmax(1))
        for name, detector in streams.items():
            sizes[name].append(held(detector))
    streams.finalize((head, None))
    for name, size in sizes.items():
        assert max(size[20:]) <= 1.01 * max(size[:20]), f"{name}: {size[::10]}"
        assert max(size) < 32 << 20, name
        assert streams[name].fitted
    assert len(streams["KNN"].bank) == 1000
