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


def test_knn_ranks_again_only_what_is_in_doubt(monkeypatch):
    train, queries = torch.randn(3000, 64), torch.randn(200, 64)
    ranked = []
    once = detectors.KNN._ranked
    monkeypatch.setattr(detectors.KNN, "_ranked", lambda self, q: ranked.append((q.dtype, len(q))) or once(self, q))
    for k in (50, 700):  # the neighbours are the denser, the larger k
        detectors.KNN(k=k).fit_features(train).score_features(queries)
        assert ranked.pop(0) == (torch.float32, 200)
        assert sum(n for _, n in ranked) < 0.05 * 200
        ranked.clear()
    detectors.KNN().fit_features(1 + 1e-4 * train).score_features(1 + 1e-4 * queries)
    assert ranked == [(torch.float32, 200), (torch.float64, 200)]
    ranked.clear()
    apart = torch.eye(64).repeat_interleave(3, dim=0) + 0.1 * torch.rand(192, 64)
    detectors.KNN(k=2).fit_features(apart).score_features(apart[:9])
    assert ranked == [(torch.float32, 9)], "nothing in doubt: the bank is not converted"


def exact_knn(detector: detectors.KNN, queries: torch.Tensor) -> torch.Tensor:
    """By differences in float64, of the float32 queries and the rows as they are kept."""
    unit, bank = torch.nn.functional.normalize(queries).double(), detector.bank.double()
    return -torch.stack([(bank - row).square().sum(1).kthvalue(detector.k).values for row in unit])


def clusters(n: int, m: int, spread: float, *, centres: int = 10) -> torch.Tensor:
    centre = torch.nn.functional.normalize(torch.randn(centres, m, generator=torch.Generator().manual_seed(0)))
    return centre[torch.arange(n) % centres] + spread / m**0.5 * torch.randn(n, m)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize(("m", "k"), [(16, 1), (16, 20), (64, 150), (64, 400), (1024, 50)])
def test_knn_in_collapsed_classes(m, k, spread):
    """Classes far apart whose features lie together, 200 rows each: their squared distances, of 1e-10, are far below
    the rounding errors of a float32 near 1, in products and in the kept ‖x − μ‖² alike."""
    detector = detectors.KNN(k=k).fit_features(clusters(2000, m, spread))
    queries = clusters(30, m, spread)
    scores = detector.score_features(queries).double()
    torch.testing.assert_close(scores, exact_knn(detector, queries), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m", [3, 64, 2048])
def test_knn_knows_how_much_its_ranking_may_err(m, dtype):
    centre = torch.randn(m)
    train = {
        "after a ReLU": torch.randn(1000, m).relu(),
        "collapsed": clusters(1000, m, 1e-3),
        "about one centre": centre + 1e-3 * torch.randn(1000, m),
        "one common part": 100 + torch.randn(1000, m),
    }
    for name, rows in train.items():
        detector = detectors.KNN(k=5, dtype=dtype).fit_features(rows)
        queries = torch.nn.functional.normalize(torch.cat([rows[:50] * 1.001, rows[50:100] + 0.1 * torch.randn(50, m)]))
        table, error = detector._nearness(queries, detector.mean, detector.squares)
        mean = detector.mean.double()
        squares = (detector.bank.double() - mean).square().sum(1)
        exact = 2 * (queries.double() - mean) @ detector.bank.double().T - squares
        assert ((table - exact).abs() <= error).all(), name


@pytest.mark.parametrize("k", [1, 5, 50, 300, 1000])
def test_knn_is_exact_whatever_the_errors_of_its_ranking(k, monkeypatch):
    """Within the bound: every entry off by all of it, the k-th and what is behind it upwards, what is before it down,
    and at random. What rounding gives is nowhere near this."""
    train, queries = torch.randn(1000, 256).relu(), torch.randn(30, 256).relu()
    detector = detectors.KNN(k=k).fit_features(train)
    exact = exact_knn(detector, queries)
    nearness = detectors.KNN._nearness

    def wrong(self, queries, mean, squares, sign):
        table, error = nearness(self, queries, mean, squares)
        assert table.shape == (len(queries), 1000)
        return table + 0.99 * error * sign(table), error

    def upside_down(table):
        return torch.where(table > table.topk(k, dim=1).values[:, -1:], -1.0, 1.0)

    for sign in (upside_down, lambda table: -upside_down(table), lambda table: torch.randn_like(table).sign()):
        monkeypatch.setattr(detectors.KNN, "_nearness", lambda *a, sign=sign: wrong(*a, sign=sign))
        torch.testing.assert_close(detector.score_features(queries).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("casts", ["half float", "bfloat16 float", "half", "double"])
def test_knn_in_another_dtype_is_exact_for_the_bank_that_it_then_keeps(casts, spread):
    data = clusters(3100, 64, spread)
    train, queries = data[:3000], data[3000:]
    in_a_set = detectors.DetectorSet([detectors.KNN(k=50)]).fit_features(train)
    for name in casts.split():
        in_a_set = getattr(in_a_set, name)()
    detector = in_a_set["KNN"]
    queries = queries.to(detector.mean.dtype)
    torch.testing.assert_close(
        detector.score_features(queries).double(), exact_knn(detector, queries), rtol=1e-5, atol=1e-7
    )


def test_a_traced_knn_takes_other_numbers_of_rows(train, queries):
    detector = detectors.KNN(k=5).fit_features(train)
    program = torch.jit.trace(detector, (queries[:10],))
    torch.testing.assert_close(program(queries), detector.score_features(queries))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_knn_names_the_row_that_is_no_number(bad, train, queries):
    """Comparisons with NaN are false: it must not pass for far from everything."""
    queries = queries.float()
    queries[3, 1] = bad
    with pytest.raises(ValueError, match="1 of 40 rows, the first is row 3"):
        detectors.KNN(k=20).fit_features(train.float()).score_features(queries)


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_gradient_of_knn(spread):
    """That of the distance to the k-th neighbour, also where it is found in float64."""
    detector = detectors.KNN(k=5).fit_features(1 + spread * torch.randn(200, 8))
    queries = (1 + spread * torch.randn(6, 8)).requires_grad_()
    (grad,) = torch.autograd.grad(detector.score_features(queries).sum(), queries)
    unit = torch.nn.functional.normalize(queries.double())
    distances = (unit.unsqueeze(1) - detector.bank.double()).square().sum(2)
    (expected,) = torch.autograd.grad(-distances.kthvalue(5, dim=1).values.sum(), queries)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3 * spread)


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
    monkeypatch.setattr(neighbour, "TILE_ELEMENTS", 64 * M)
    monkeypatch.setattr(neighbour, "PAIR_ELEMENTS", 7 * M)
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


def test_nnguide_in_a_dtype_that_does_not_hold_the_energies_is_refused():
    z, f = torch.rand(40, 4) + 1, torch.full((40, 3), 2e5)
    with pytest.raises(ValueError, match=r"NNGuide: dtype: got torch.float16, which holds numbers up to 6.55e\+04"):
        detectors.NNGuide(3, fraction=1.0, dtype=torch.float16).fit_features(z, f)
    detector = detectors.NNGuide(3, fraction=1.0, dtype=torch.bfloat16).fit_features(z, f)
    assert detector.score_features(z, f).isfinite().all()


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
        detectors.NNGuide(k=100).fit_features(train, torch.randn(N, C))
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


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("name", ["KNN", "NNGuide"])
def test_compiled_and_exported(name, dtype, train, queries, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(neighbour, "TILE_ELEMENTS", 128 * M)  # three tiles of a bank in float16
    settings = {"k": 4, "dtype": dtype, **({"fraction": 1.0} if name == "NNGuide" else {})}
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
