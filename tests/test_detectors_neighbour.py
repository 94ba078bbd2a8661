"""KNN and NNGuide: exact to rounding, whatever the features, in whatever precision they are kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ood_fast import detectors
from ood_fast.detectors import neighbour
from ood_fast.detectors.neighbour import largest

N, M, C = 300, 16, 5


def unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1, length)


def true_knn(train: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    """By differences of all pairs, in float64."""
    bank, rows = unit(train.double().numpy()), unit(queries.double().numpy())
    squared = np.stack([np.sort(((bank - row) ** 2).sum(1))[k - 1] for row in rows])
    return -torch.from_numpy(squared)


def true_nnguide(train, train_logits, queries, logits, k) -> torch.Tensor:
    def energy(rows):
        return np.array([math.log(sum(math.exp(value) for value in row)) for row in rows.tolist()])

    bank = unit(train.numpy()) * energy(train_logits)[:, None]
    scores = [
        e * np.mean(sorted((bank @ row).tolist())[-k:])
        for row, e in zip(unit(queries.numpy()), energy(logits), strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)


@pytest.fixture
def train() -> torch.Tensor:
    return torch.randn(N, M, dtype=torch.float64).relu()


@pytest.fixture
def queries() -> torch.Tensor:
    return torch.randn(40, M, dtype=torch.float64).relu()


# ---- the k largest of a row


@pytest.mark.parametrize("shape", [(3, 5000), (2, 4999), (1, 64), (4, 7), (0, 5000)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_largest_is_topk(shape, k):
    table = torch.randn(shape)
    values, columns = largest(table, k)
    torch.testing.assert_close(values, table.topk(k, dim=1).values, rtol=0, atol=0)
    torch.testing.assert_close(table.gather(1, columns), values, rtol=0, atol=0)


def test_largest_with_ties_and_nan():
    table = torch.randint(0, 3, (5, 6000)).float()
    values, columns = largest(table, 20)
    assert (values == 2).all()
    assert all(len(set(row.tolist())) == 20 for row in columns), "no column twice"
    table[1, 4321] = torch.nan
    assert largest(table, 20)[0][1].isnan().any()


# ---- KNN


@pytest.mark.parametrize("k", [1, 2, 9, 50, N])
def test_knn(k, train, queries):
    scores = detectors.KNN(k=k).fit_features(train).score_features(queries)
    torch.testing.assert_close(scores, true_knn(train, queries, k), rtol=1e-12, atol=1e-14)
    scores = detectors.KNN(k=k).fit_features(train.float()).score_features(queries.float())
    torch.testing.assert_close(scores.double(), true_knn(train, queries, k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4])
def test_knn_in_float32_ranks_close_features_by_their_differences(spread):
    """What float32 itself keeps of such features is what is compared: the same rounded rows, in float64.

    Down to 1e-2 most queries are settled by the ranking in float32; below, it hides the k-th and they are ranked again.
    """
    centre = torch.randn(1, M)
    train, queries = (centre + spread * torch.randn(n, M) for n in (2000, 60))
    detector = detectors.KNN(k=10).fit_features(train)
    scores = detector.score_features(queries).double()
    rounded = torch.nn.functional.normalize(queries).double()
    expected = -torch.cdist(rounded, detector.bank.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    expected = expected.topk(10, dim=1).values[:, -1]
    torch.testing.assert_close(scores, expected, rtol=1e-6 + 1e-7 / spread, atol=0)


def test_knn_ranks_again_only_what_is_in_doubt():
    train, queries = torch.randn(3000, 64), torch.randn(200, 64)
    detector = detectors.KNN().fit_features(train)
    assert detector._ranked(torch.nn.functional.normalize(queries), torch.float32)[1].float().mean() < 0.05
    close = detectors.KNN().fit_features(1 + 1e-4 * train)
    assert close._ranked(torch.nn.functional.normalize(1 + 1e-4 * queries), torch.float32)[1].all()


def test_knn_among_duplicates(train, queries):
    repeated = train.float().repeat_interleave(30, dim=0)
    for k in (1, 30, 31, 45):
        scores = detectors.KNN(k=k).fit_features(repeated).score_features(queries.float())
        torch.testing.assert_close(scores.double(), true_knn(repeated, queries, k), rtol=1e-5, atol=1e-6)
    assert (detectors.KNN(k=30).fit_features(repeated).score_features(train.float()) > -1e-12).all()


def test_knn_of_zero_features(train):
    train[:3] = 0
    queries = torch.zeros(1, M, dtype=torch.float64)
    for k, expected in ((3, 0.0), (4, -1.0)):
        assert detectors.KNN(k=k).fit_features(train).score_features(queries).item() == pytest.approx(expected)


def test_knn_keywords(train, queries):
    squared = detectors.KNN(k=3).fit_features(train).score_features(queries)
    plain = detectors.KNN(k=3, squared=False).fit_features(train).score_features(queries)
    torch.testing.assert_close(plain, -(-squared).sqrt())
    filtered = detectors.KNN(k=3, alpha=0.25).fit_features(train).score_features(queries)
    torch.testing.assert_close(filtered, squared + 0.25 * queries.abs().sum(1))


def test_knn_kept_in_float16(train, queries):
    detector = detectors.KNN(k=5, dtype=torch.float16).fit_features(train.float())
    assert detector.bank.dtype == torch.float16
    scores = detector.score_features(queries.float())
    torch.testing.assert_close(scores.double(), true_knn(train, queries, 5), rtol=1e-2, atol=1e-3)
    # Exact for the rows as they are kept.
    rounded = torch.nn.functional.normalize(queries.float()).double()
    expected = -torch.cdist(rounded, detector.bank.double()).square().topk(5, largest=False).values[:, -1]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_give_what_one_table_gives(dtype, train, queries, monkeypatch):
    knn = detectors.KNN(k=5, dtype=dtype).fit_features(train.float())
    guide = detectors.NNGuide(k=5, fraction=1.0, dtype=dtype).fit_features(train.float(), torch.randn(N, C))
    z, f = queries.float(), torch.randn(40, C)
    whole = knn.score_features(z), guide.score_features(z, f)
    monkeypatch.setattr(neighbour, "CHUNK_ELEMENTS", 3 * N + 1)
    monkeypatch.setattr(neighbour, "BANK_TILE", 64)
    torch.testing.assert_close((knn.score_features(z), guide.score_features(z, f)), whole, rtol=1e-5, atol=1e-6)


def test_no_queries(train):
    assert detectors.KNN(k=2).fit_features(train).score_features(train[:0]).shape == (0,)
    guide = detectors.NNGuide(k=2, fraction=1.0).fit_features(train, torch.randn(N, C))
    assert guide.score_features(train[:0], torch.randn(0, C)).shape == (0,)


def test_a_budget_keeps_a_sample_of_the_bank(train):
    detector = detectors.KNN(k=5, budget=50).fit_features(train)
    assert detector.bank.shape == (50, M)
    whole = {tuple(row) for row in detectors.KNN(k=5).fit_features(train).bank.tolist()}
    assert {tuple(row) for row in detector.bank.tolist()} <= whole
    assert not torch.equal(detectors.KNN(k=5, budget=50, seed=1).fit_features(train).bank, detector.bank)


# ---- NNGuide


@pytest.mark.parametrize("k", [1, 10, N])
def test_nnguide(k, train, queries):
    train_logits, logits = torch.randn(N, C, dtype=torch.float64), torch.randn(40, C, dtype=torch.float64)
    detector = detectors.NNGuide(k=k, fraction=1.0).fit_features(train, train_logits)
    expected = true_nnguide(train, train_logits, queries, logits, k)
    torch.testing.assert_close(detector.score_features(queries, logits), expected, rtol=1e-10, atol=1e-12)


def test_nnguide_keeps_a_random_share():
    z, f = torch.randn(20_000, 4), torch.randn(20_000, C)
    z[:, 0] += torch.linspace(-50, 50, 20_000)  # the direction tells the place in the list
    bank = detectors.NNGuide().fit_features(z, f).bank
    assert abs(len(bank) - 200) < 4 * 200**0.5
    assert 0.35 < (bank[:, 0] > 0).double().mean() < 0.65, "not the first 1 % of the list"


def test_nnguide_of_zero_features_is_zero(train):
    detector = detectors.NNGuide(k=3, fraction=1.0).fit_features(train, torch.randn(N, C, dtype=torch.float64))
    assert detector.score_features(torch.zeros(2, M), torch.randn(2, C)).tolist() == [0, 0]


# ---- errors


def test_more_neighbours_than_rows_names_the_cure(train):
    with pytest.raises(ValueError, match=r"k: got 301, expected at most 300, .* take a smaller k, such as 30, or more"):
        detectors.KNN(k=301).fit_features(train)
    with pytest.raises(ValueError, match=r"KNN: k: got 20, expected at most 10, .* take a smaller k, such as 1, or"):
        detectors.KNN(k=20, budget=10).fit_features(train)
    with pytest.raises(ValueError, match=r"k: got 100, expected at most \d, .* or a larger fraction than 0\.01"):
        detectors.NNGuide().fit_features(train, torch.randn(N, C))
    with pytest.raises(ValueError, match=r"NNGuide: k: .* at most 0, .* take a larger fraction than 1e-08"):
        detectors.NNGuide(fraction=1e-8).fit_features(train, torch.randn(N, C))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"k": 0}, ValueError),
        ({"k": True}, ValueError),
        ({"budget": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"dtype": torch.int8}, TypeError),
        ({"dtype": "float16"}, TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["KNN", "NNGuide"])
def test_bad_settings(name, settings, error):
    with pytest.raises(error, match=f"{next(iter(settings))}: got"):
        detectors.create(name, **settings)


def test_bad_weights():
    with pytest.raises(ValueError, match="alpha: got"):
        detectors.KNN(alpha=-1.0)
    with pytest.raises(ValueError, match="fraction: got"):
        detectors.NNGuide(fraction=0.0)


# ---- state, compilation, the peer


@pytest.mark.parametrize("name", ["KNN", "NNGuide"])
def test_state_dict_with_rows_in_float16(name, train, queries):
    settings = {"k": 4, "dtype": torch.float16, **({"fraction": 1.0} if name == "NNGuide" else {})}
    f = torch.randn(40, C, dtype=torch.float64)
    detector = detectors.create(name, **settings).fit_features(train, torch.randn(N, C, dtype=torch.float64))
    fresh = detectors.create(name, **settings)
    fresh.load_state_dict(detector.state_dict())
    assert torch.equal(fresh.score_features(queries, f), detector.score_features(queries, f))


@pytest.mark.parametrize("name", ["KNN", "NNGuide"])
def test_compiled_and_exported(name, train, queries):
    settings = {"k": 4, **({"fraction": 1.0} if name == "NNGuide" else {})}
    detector = detectors.create(name, **settings).fit_features(train.float(), torch.randn(N, C))
    z, f = queries.float(), torch.randn(40, C)
    expected = detector(z, f)
    torch.testing.assert_close(torch.compile(detector, fullgraph=True, backend="aot_eager")(z, f), expected)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(detector, (z, f), dynamic_shapes=({0: rows}, {0: rows})).module()
    torch.testing.assert_close(exported(z, f), expected)
    torch.testing.assert_close(exported(z[:7], f[:7]), expected[:7])


def test_knn_beside_pytorch_ood(train, queries):
    peer = pytest.importorskip("pytorch_ood.detector").KNN(None, k=7)
    peer.fit_features(train.float(), torch.zeros(N, dtype=torch.int64))
    ours = detectors.KNN(k=7, squared=False).fit_features(train.float()).score_features(queries.float())
    torch.testing.assert_close(-ours.double(), peer.predict_features(queries.float()).double(), rtol=1e-5, atol=1e-5)


def test_nnguide_beside_pytorch_ood(train, queries):
    head = torch.nn.Linear(M, C).requires_grad_(False)
    peer = pytest.importorskip("pytorch_ood.detector").NNGuide(None, head, k=10)
    peer.fit_features(train.float(), torch.zeros(N, dtype=torch.int64))
    z = queries.float()
    ours = detectors.NNGuide(k=10, fraction=1.0).fit_features(train.float(), head(train.float()))
    torch.testing.assert_close(-ours.score_features(z, head(z)), peer.predict_features(z), rtol=1e-5, atol=1e-5)
