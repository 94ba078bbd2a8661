"""Diagnostics against transcriptions of their formulas in NumPy, and cases that can be worked out by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ood_fast import checks, detectors, diagnostics, heads, metrics
from ood_fast.diagnostics import collapse, plane

C, M = 4, 7


def cut(features, logits, targets, size=9):
    """In chunks, the last of them smaller."""
    targets = [None] * 99 if targets is None else targets.split(size)
    return list(zip(features.split(size), logits.split(size), targets, strict=False))


@pytest.fixture
def data():
    """Features (50, 7) in clusters that are not centred, their head, logits with some errors, and OOD features."""
    generator = np.random.default_rng(0)
    y = np.concatenate([np.arange(C), generator.integers(0, C, 46)])
    z = 5 + 2 * generator.normal(size=(C, M))[y] + generator.normal(size=(50, M)) * np.linspace(0.3, 2, M)
    W, b = generator.normal(size=(C, M)), generator.normal(size=C)
    return z, y, W, b, 3 + generator.normal(size=(30, M))


def diagnosed(data, dtype=torch.float64):
    z, y, W, b, ood = data
    train = cut(torch.tensor(z, dtype=dtype), torch.tensor(z @ W.T + b, dtype=dtype), torch.tensor(y))
    outside = cut(torch.tensor(ood, dtype=dtype), torch.tensor(ood @ W.T + b, dtype=dtype), None)
    return diagnostics.diagnose(train, train, {"far": outside}, (torch.tensor(W, dtype=dtype), torch.tensor(b)))


def geometry_of(z, y, n_classes):
    z = torch.as_tensor(z, dtype=torch.float64)
    return diagnostics.Moments.of(cut(z, torch.zeros(len(z), n_classes), torch.as_tensor(y)))


def simplex(n_classes: int) -> np.ndarray:
    """The corners of a simplex equiangular tight frame, (c, c)."""
    return (np.eye(n_classes) - 1 / n_classes) * math.sqrt(n_classes / (n_classes - 1))


# ---- spectrum


def test_spectrum_of_the_covariance_is_that_of_the_features(data):
    z = torch.tensor(data[0])
    wanted = np.linalg.svd((data[0] - data[0].mean(0)) / math.sqrt(50), compute_uv=False)
    np.testing.assert_allclose(diagnostics.spectrum(geometry_of(*data[:2], C).covariance), wanted, rtol=1e-12)
    np.testing.assert_allclose(diagnostics.singular_values(z), wanted, rtol=1e-12)
    shares = wanted / wanted.sum()
    wanted_rank = math.exp(-(shares * np.log(shares)).sum())
    assert diagnosed(data).numbers["effective_rank"] == pytest.approx(wanted_rank, rel=1e-12)


def test_directions_that_are_rounding_have_no_singular_value():
    z = torch.randn(60, 2, dtype=torch.float64) @ torch.randn(2, 30, dtype=torch.float64) + 100
    values = diagnostics.spectrum(geometry_of(z, torch.zeros(60).long(), 1).covariance)
    assert (values > 0).sum() == 2
    assert diagnostics.spectrum(torch.zeros(3, 3)).tolist() == [0, 0, 0]


# ---- neural collapse


def test_neural_collapse_is_its_equations(data):
    z, y, W, *_ = data
    found = diagnosed(data).collapse
    means = np.stack([z[y == c].mean(0) for c in range(C)])
    centred = means - means.mean(0)
    within = sum(np.outer(z[i] - means[y[i]], z[i] - means[y[i]]) for i in range(50)) / 50
    between = sum(np.outer(row, row) for row in centred) / C
    assert found.nc1 == pytest.approx(np.trace(within @ np.linalg.pinv(between, rcond=1e-12)) / C, rel=1e-9)
    norms = np.linalg.norm(centred, axis=1)
    assert found.equinormality == pytest.approx(norms.std() / norms.mean(), rel=1e-12)
    unit = centred / norms[:, None]
    deviation = unit @ unit.T + 1 / (C - 1)
    np.fill_diagonal(deviation, 0)
    assert found.equiangularity == pytest.approx(np.abs(deviation).sum() / (C * (C - 1)), rel=1e-12)
    difference = W / np.linalg.norm(W) - centred / np.linalg.norm(centred)
    assert found.nc3 == pytest.approx((difference**2).sum(), rel=1e-12)
    assert found.cosine_counts.sum() == C * (C - 1) / 2
    wanted = (W * centred).sum(1) / np.linalg.norm(W, axis=1) / norms
    np.testing.assert_allclose(found.weight_cosines, wanted, rtol=1e-12)
    np.testing.assert_allclose(found.mean_norms, norms, rtol=1e-12)
    assert found.ratios.sum() / C == pytest.approx(found.nc1)


def test_float32_features_are_summed_in_float64(data):
    exact, single = diagnosed(data).numbers, diagnosed(data, torch.float32).numbers
    for name, value in exact.items():
        assert single[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_complete_collapse_is_zero_everywhere():
    corners = 3 * simplex(5) + 20
    y = torch.arange(5).repeat(8)
    found = diagnostics.neural_collapse(geometry_of(corners[y], y, 5), torch.tensor(simplex(5)))
    for name in ("nc1", "equinormality", "equiangularity", "nc3"):
        assert getattr(found, name) == pytest.approx(0, abs=1e-12), name
    turned = diagnostics.neural_collapse(geometry_of(corners[y], y, 5), torch.tensor(-simplex(5)))
    assert turned.nc3 == pytest.approx(4)
    assert turned.weight_cosines.tolist() == pytest.approx([-1] * 5)


def test_equiangularity_of_two_pairs_worked_by_hand():
    # Means on a cross: cosines -1 (twice) and 0 (four times), the simplex has -1/3.
    z = [[2.0, 0], [-2, 0], [0, 4], [0, -4]]
    found = diagnostics.neural_collapse(geometry_of(z, [0, 1, 2, 3], 4), torch.zeros(4, 2))
    assert found.equiangularity == pytest.approx((2 * 2 / 3 + 4 * 1 / 3) / 6)
    assert found.equinormality == pytest.approx(1 / 3)  # norms 2, 2, 4, 4
    assert math.isnan(found.nc3)  # no weights


def test_nc1_worked_by_hand_and_by_direction():
    # Means ±(3, 0); around each ±(1, 0) and ±(0, 5): Σ_W = diag(1/2, 25/2), Σ_B = diag(9, 0).
    around = np.array([[1, 0], [-1, 0], [0, 5], [0, -5]])
    z = np.concatenate([around + np.array([3, 0]), around - np.array([3, 0])])
    found = diagnostics.neural_collapse(geometry_of(z, [0] * 4 + [1] * 4, 2), torch.ones(2, 2))
    assert found.nc1 == pytest.approx(0.5 / 9 / 2)
    assert found.ratios.tolist() == pytest.approx([0.5 / 9])


@pytest.mark.parametrize(
    ("z", "y"),
    [
        pytest.param(torch.randn(6, 3), [0] * 6, id="one class"),
        pytest.param(torch.zeros(6, 3), [0, 1] * 3, id="zero features"),
        pytest.param(torch.full((6, 3), 0.1), [0, 1, 2] * 2, id="equal means"),
    ],
)
def test_collapse_without_classes_apart_is_not_a_number(z, y):
    found = diagnostics.neural_collapse(geometry_of(z, y, 3), torch.ones(3, 3))
    assert [getattr(found, name) for name in ("nc1", "equinormality", "equiangularity", "nc3")] == pytest.approx(
        [math.nan] * 4, nan_ok=True
    )


def test_classes_without_samples_do_not_count(data):
    z, y, W, *_ = data
    some = diagnostics.neural_collapse(geometry_of(z[y < 3], y[y < 3], 3), torch.tensor(W[:3]))
    spread = diagnostics.neural_collapse(geometry_of(z[y < 3], 2 * y[y < 3], 8), torch.tensor(np.repeat(W, 2, 0)))
    assert spread.classes.tolist() == [0, 2, 4]
    for name in ("nc1", "equinormality", "equiangularity", "nc3"):
        assert getattr(spread, name) == pytest.approx(getattr(some, name)), name


def test_angles_are_the_same_a_few_classes_at_a_time(monkeypatch):
    centred = torch.randn(11, 6, dtype=torch.float64)
    whole = collapse._angles(centred)
    monkeypatch.setattr(collapse, "ROWS_AT_ONCE", 3)
    pieces = collapse._angles(centred)
    assert pieces[0] == pytest.approx(whole[0])
    assert torch.equal(pieces[1], whole[1])


# ---- samples


def test_numbers_of_each_sample_are_their_formulas(data):
    z, y, W, b, ood = data
    found = diagnosed(data)
    for name, x in (("test", z), ("far", ood)):
        of_set, f = found.sets[name], x @ W.T + b
        p = f.argmax(1)
        gaps = f.max(1, keepdims=True) - f
        apart = np.linalg.norm(W[p][:, None] - W[None], axis=2)
        D = np.array([np.mean([gaps[i, j] / apart[i, j] for j in range(C) if j != p[i]]) for i in range(len(x))])
        means = np.stack([z[y == c].mean(0) for c in range(C)])
        np.testing.assert_array_equal(of_set.predicted, p)
        np.testing.assert_allclose(of_set.norm, np.linalg.norm(x, axis=1), rtol=1e-12)
        np.testing.assert_allclose(of_set.distance, D, rtol=1e-9)
        np.testing.assert_allclose(of_set.confidence, softmax(f).max(1), rtol=1e-12)
        np.testing.assert_allclose(of_set.confidence_by_distance, softmax(f / D[:, None]).max(1), rtol=1e-9)
        centred = x - z.mean(0)
        np.testing.assert_allclose(of_set.p_score, (W[p] * centred).sum(1) / np.linalg.norm(centred, axis=1), rtol=1e-9)
        nearest = np.linalg.norm(x[:, None] - means[None], axis=2).argmin(1)
        np.testing.assert_array_equal(of_set.nearest, nearest)
        assert of_set.nearest_mean_agreement() == np.mean(nearest == p)
    numbers, test, far = found.numbers, found.sets["test"], found.sets["far"]
    assert far.target.tolist() == [-1] * 30
    assert numbers["nc4"] == test.nearest_mean_agreement()
    assert numbers["pscore_auroc/far"] == metrics.auroc(test.p_score, far.p_score)
    assert numbers["norm_cv"] == pytest.approx(stats.variation(np.linalg.norm(z, axis=1)))
    r = stats.pearsonr(test.distance, test.norm).statistic
    assert numbers["distance_norm_correlation"] == pytest.approx(r, rel=1e-9)
    r = stats.pearsonr(far.distance, far.norm).statistic
    assert numbers["distance_norm_correlation_ood/far"] == pytest.approx(r, rel=1e-9)
    assert numbers["ece"] == pytest.approx(
        metrics.expected_calibration_error(torch.softmax(torch.tensor(z @ W.T + b), 1), torch.tensor(y))
    )


def softmax(f):
    e = np.exp(f - f.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_zero_features_have_numbers():
    zero = cut(torch.zeros(20, 3), torch.zeros(20, 2), torch.tensor([0, 1] * 10))
    found = diagnostics.diagnose(zero, zero, {"same": zero}, (torch.zeros(2, 3), None))
    assert found.sets["test"].confidence_by_distance.tolist() == [0.5] * 20  # D = 0: the logits as they are
    assert found.numbers["effective_rank"] == 0
    assert found.numbers["nc4"] == 1  # all classes tie, in both: the first
    assert found.numbers["pscore_auroc/same"] == 0.5
    assert math.isnan(found.numbers["norm_cv"])
    assert math.isnan(found.numbers["distance_norm_correlation"])


def test_sets_may_be_empty_but_not_the_training_set(data):
    z, y, W, b, _ = data
    train = cut(torch.tensor(z), torch.tensor(z @ W.T + b), torch.tensor(y))
    found = diagnostics.diagnose(train, [], {"none": []}, (torch.tensor(W), torch.tensor(b)))
    assert len(found.sets["none"]) == 0
    assert math.isnan(found.numbers["nc4"])
    assert math.isnan(found.numbers["pscore_auroc/none"])
    assert math.isfinite(found.numbers["nc1"])
    with pytest.raises(ValueError, match="no training sample"):
        diagnostics.Moments.of([])
    with pytest.raises(ValueError, match="targets: got None"):
        diagnostics.Moments.of([(torch.zeros(2, 3), torch.zeros(2, 2), None)])
    with pytest.raises(FloatingPointError, match="1 rows"):
        diagnostics.Moments.of([(torch.tensor([[1.0, math.inf], [0, 0]]), torch.zeros(2, 2), torch.tensor([0, 1]))])


def test_correlation_and_variation_by_hand():
    x = torch.tensor([1.0, 2, 3, 4])
    assert diagnostics.correlation(x, 5 - 2 * x) == pytest.approx(-1)
    assert math.isnan(diagnostics.correlation(x, torch.ones(4)))
    assert diagnostics.coefficient_of_variation(torch.tensor([1.0, 3])) == pytest.approx(0.5)
    assert math.isnan(diagnostics.coefficient_of_variation(torch.zeros(3)))


def test_accuracy_by_norm_has_bins_of_equal_size():
    norm = torch.arange(105.0).flip(0)
    correct = norm >= 42  # of the bins of 21, two are all wrong, three all right
    found = diagnostics.accuracy_by_norm(norm, correct)
    assert found.count.tolist() == [21] * 5
    assert found.accuracy.tolist() == [0, 0, 1, 1, 1]
    assert found.norm.tolist() == pytest.approx([10, 31, 52, 73, 94])
    assert found.rank_correlation == pytest.approx(stats.spearmanr(range(5), found.accuracy).statistic)
    assert len(diagnostics.accuracy_by_norm(torch.rand(10_000), torch.rand(10_000) > 0.5).count) == 125
    assert math.isnan(diagnostics.accuracy_by_norm(torch.rand(9), torch.ones(9).bool()).rank_correlation)


def test_reliability_by_hand_and_its_error():
    confidence, correct = torch.tensor([0.2, 0.25, 0.5, 0.9, 1.0]), torch.tensor([True, False, True, True, True])
    found = diagnostics.reliability(confidence, correct, n_bins=4)
    assert found.count.tolist() == [2, 1, 0, 2]  # an edge belongs to the bin below it
    assert found.accuracy.tolist() == pytest.approx([0.5, 1, math.nan, 1], nan_ok=True)
    assert found.confidence.tolist() == pytest.approx([0.225, 0.5, math.nan, 0.95], nan_ok=True)
    assert found.ece == pytest.approx((2 * 0.275 + 0.5 + 2 * 0.05) / 5)
    probabilities = torch.softmax(3 * torch.randn(500, 6), 1)
    targets = torch.randint(0, 6, (500,))
    confidence, predicted = probabilities.max(1)
    ece = diagnostics.reliability(confidence, predicted == targets).ece
    assert ece == pytest.approx(metrics.expected_calibration_error(probabilities, targets), rel=1e-9)


# ---- plane


def test_plane_is_that_of_the_principal_components(data):
    z, y, W, b, _ = data
    found = diagnostics.plane_of(geometry_of(z, y, C))
    u, s, vt = np.linalg.svd(z - z.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found.axes.numpy() @ vt[:2].T), np.eye(2), atol=1e-9)
    assert found.share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    assert not found.direct
    np.testing.assert_allclose(found.project(torch.tensor(z)).abs(), np.abs(u[:, :2] * s[:2]), rtol=1e-9)
    weight, bias = found.head(torch.tensor(W), torch.tensor(b))
    points = torch.randn(5, 2, dtype=torch.float64)
    wanted = (found.origin + points @ found.axes).numpy() @ W.T + b
    np.testing.assert_allclose(points @ weight.T + bias, wanted, rtol=1e-9)


@pytest.mark.parametrize("n_features", [1, 2])
def test_up_to_two_features_are_drawn_as_they_are(n_features):
    z = torch.randn(9, n_features, dtype=torch.float64)
    found = diagnostics.plane_of(geometry_of(z, [0] * 9, 1))
    assert found.direct
    assert found.share == 1
    assert torch.equal(found.project(z)[:, :n_features], z)


def test_regions_tile_the_box_and_hold_what_they_say():
    weight, bias = torch.randn(12, 2, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    box = (-3.0, 5.0, -2.0, 2.0)
    found = plane.regions(weight, bias, box)
    assert sum(plane._area(corners) for corners in found.values()) == pytest.approx(32)
    for p, corners in found.items():
        middle = torch.tensor(corners, dtype=torch.float64).mean(0)
        assert (weight @ middle + bias).argmax() == p
    # Coincident classes: the first has the region. A class that wins nowhere has none.
    weight = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [0, 0]], dtype=torch.float64)
    found = plane.regions(weight, torch.tensor([0.0, 0, 0, -1], dtype=torch.float64), (-1, 1, -1, 1))
    assert sorted(found) == [0, 2]
    assert sorted(found[0]) == [(0, -1), (0, 1), (1, -1), (1, 1)]


# ---- change


def test_feature_change_is_equation_8():
    z = np.random.default_rng(0).normal(size=(4, 40, 3)) * np.linspace(1, 3, 40)[:, None]  # checkpoints, samples
    norm = np.linalg.norm(z[-1], axis=1)
    edges = [0.0, 1.5, 3.0, 4.5]
    steps = torch.stack(
        [diagnostics.squared_change(torch.tensor(z[t - 1]).split(7), torch.tensor(z[t]).split(7)) for t in range(1, 4)]
    )
    found = diagnostics.change_by_norm(steps, torch.tensor(norm), edges)
    for m, (low, high) in enumerate(zip(edges, [*edges[1:], math.inf], strict=True)):
        group = (norm >= low) & (norm < high)
        wanted = sum(((z[t, group] - z[t - 1, group]) ** 2).sum() / group.sum() for t in range(1, 4))
        assert found.total[m].item() == pytest.approx(wanted, rel=1e-12)
        assert found.count[m] == group.sum()
    quartiles = diagnostics.change_by_norm(steps, torch.tensor(norm))
    assert quartiles.count.tolist() == [10] * 4
    assert diagnostics.change_by_norm(steps, torch.tensor(norm), [3.0]).count.tolist() == [(norm >= 3).sum()]


def test_feature_change_over_models_and_what_it_refuses():
    images = [torch.randn(5, 3), torch.randn(2, 3)]
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(3)]
    z = torch.stack([model[0](torch.cat(images)).detach() for model in models]).double()
    found = diagnostics.feature_change(iter(models), images, edges=[0.0])
    wanted = [((z[t] - z[t - 1]) ** 2).sum() / 7 for t in (1, 2)]
    assert found.steps.flatten().tolist() == pytest.approx([float(value) for value in wanted])
    norm = z[-1].norm(dim=1)
    low, high = diagnostics.feature_change(models, images, edges=[0.0, norm.median().item()]).steps.T
    moved = (z[1:] - z[:-1]).square().sum(dim=2)
    assert low.tolist() == pytest.approx(moved[:, norm < norm.median()].mean(dim=1).tolist())
    assert high.tolist() == pytest.approx(moved[:, norm >= norm.median()].mean(dim=1).tolist())
    same = diagnostics.feature_change([models[0], copy.deepcopy(models[0])], images)
    assert same.total.tolist() == [0] * 4
    fewer = iter([images, images[:1]])
    with pytest.raises(ValueError, match="got a chunk of shape None"):
        diagnostics.feature_change(models[:2], type("Loader", (), {"__iter__": lambda _: iter(next(fewer))})())
    with pytest.raises(ValueError, match="at least two checkpoints"):
        diagnostics.feature_change(models[:1], images)
    with pytest.raises(ValueError, match=r"expected \(5, 4\)"):
        diagnostics.squared_change([torch.zeros(5, 4)], [torch.zeros(4, 4)])
    with pytest.raises(ValueError, match="got a chunk of shape None"):
        diagnostics.squared_change([torch.zeros(5, 4)], [])
    with pytest.raises(ValueError, match="ascending"):
        diagnostics.change_by_norm(torch.zeros(1, 3), torch.zeros(3), [2.0, 1.0])


# ---- the whole


class Net(nn.Module):
    def __init__(self, head=nn.Linear):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout()), head(5, 3)

    def forward(self, x):
        return self.fc(self.body(x))


def loader(n, targets=True):
    x, y = torch.randn(n, 3, 2, 2), torch.arange(n) % 3
    return [(x[i : i + 8], y[i : i + 8]) if targets else (x[i : i + 8],) for i in range(0, n, 8)]


@pytest.mark.parametrize("head", [nn.Linear, lambda m, c: heads.L2NormLinear(m, c, tau=0.1)])
def test_epoch_diagnostics_are_the_numbers_of_the_model(head):
    model = Net(head).train()
    train, validation, ood = loader(40), loader(20), loader(17, targets=False)
    found = diagnostics.epoch_diagnostics(model, train, validation, ood)
    assert list(found) == list(diagnostics.NUMBERS)
    found.pop("accuracy_norm_correlation")  # 20 images are one bin
    assert all(math.isfinite(value) for value in found.values()), found
    assert model.training
    model.eval()

    def features(of):
        with torch.no_grad():
            return model.body(torch.cat([batch[0] for batch in of]))

    detector = detectors.NCI(alpha=0.0)
    detector.fit(model, train)
    scores = [torch.cat([detector.score(model, batch[0]) for batch in of]) for of in (validation, ood)]
    assert found["pscore_auroc"] == pytest.approx(metrics.auroc(*scores))
    z = features(train).double().numpy()
    assert found["norm_cv"] == pytest.approx(stats.variation(np.linalg.norm(z, axis=1)), rel=1e-6)
    nn.init.constant_(model.body[1].weight, math.inf)
    assert all(math.isnan(value) for value in diagnostics.epoch_diagnostics(model, train, validation, ood).values())


def test_a_diagnosis_is_read_as_it_was_written(data, tmp_path):
    found = diagnosed(data)
    found.about["checkpoint"] = "best.ckpt"
    file = tmp_path / "diagnosis.npz"
    found.save(file)
    again = diagnostics.Diagnosis.load(file)
    assert [path.name for path in tmp_path.iterdir()] == ["diagnosis.npz"]
    assert (again.numbers, again.about, again.plane_share) == (found.numbers, found.about, found.plane_share)
    assert again.collapse.nc1 == found.collapse.nc1
    assert torch.equal(again.sets["far"].distance, found.sets["far"].distance)
    assert torch.equal(again.collapse.ratios, found.collapse.ratios)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(checks.UserError, match=r"is damaged, or not a file of \.npz"):
        diagnostics.Diagnosis.load(file)
    np.savez(file, json='{"format": "other"}')
    with pytest.raises(checks.UserError, match="another version"):
        diagnostics.Diagnosis.load(file)
