"""Class means and subspaces: Mahalanobis, RMDS, SHE, ViM and NECO against NumPy transcriptions of their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ood_fast import detectors
from ood_fast.detectors import streaming

N, M, C = 400, 12, 5
NAMES = ("Mahalanobis", "RMDS", "SHE", "ViM", "NECO")
SMALL = {"ViM": {"dim": 4}, "NECO": {"dim": 4}}


class Data:
    """Features about class means, a head that mostly gets them right, and features to score."""

    def __init__(self, n: int = N, n_classes: int = C, m: int = M, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        centres = 2 * normal(n_classes, m) + 1
        self.targets = torch.arange(n) % n_classes
        self.train = centres[self.targets] + normal(n, m) * torch.linspace(0.2, 1.5, m)
        self.head = nn.Linear(m, n_classes).double().requires_grad_(False)
        self.head.weight.copy_(centres / 4)
        self.head.bias.copy_(normal(n_classes))
        self.features = torch.cat([centres[:3] + 0.3 * normal(3, m), 3 * normal(20, m)])
        self.train_logits, self.logits = self.head(self.train), self.head(self.features)

    def fit(self, detector: str | detectors.Detector, **settings) -> detectors.Detector:
        if isinstance(detector, str):
            detector = detectors.create(detector, **{**SMALL.get(detector, {}), **settings})
        return detector.fit_features(self.train, self.train_logits, self.targets, self.head)

    def scores(self, detector: str, **settings) -> torch.Tensor:
        return self.fit(detector, **settings).score_features(self.features, self.logits)

    def numpy(self):
        return (t.numpy() for t in (self.train, self.train_logits, self.targets, self.features, self.logits))


@pytest.fixture
def data() -> Data:
    return Data()


# ---- the formulas


def true_mahalanobis(data: Data, *, half=False, scatter=False, ridge=0.0, relative=False) -> np.ndarray:
    train, _, y, z, _ = data.numpy()
    means = {c: train[y == c].mean(0) for c in np.unique(y)}
    centred = np.stack([row - means[c] for row, c in zip(train, y, strict=True)])
    mean = train.mean(0)

    def inverse(rows):
        matrix = rows.T @ rows / (1 if scatter else len(rows)) + ridge * np.eye(rows.shape[1])
        return np.linalg.pinv(matrix, rcond=1e-10, hermitian=True)

    P, P0 = inverse(centred), inverse(train - mean)
    scores = np.array([max(-(row - mu) @ P @ (row - mu) for mu in means.values()) for row in z])
    if relative:
        scores = scores + np.array([(row - mean) @ P0 @ (row - mean) for row in z])
    return scores / 2 if half else scores


SETTINGS = [{}, {"half": True}, {"scatter": True, "ridge": 1e-6}, {"ridge": 0.5}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["Mahalanobis", "RMDS"])
def test_mahalanobis(name, settings, data):
    expected = true_mahalanobis(data, **settings, relative=name == "RMDS")
    np.testing.assert_allclose(data.scores(name, **settings).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["Mahalanobis", "RMDS"])
@pytest.mark.parametrize("n", [C + 1, M, 2 * M], ids=["all but one alone", "N = m", "N = 2 m"])
def test_mahalanobis_of_few_samples_inverts_what_varies(name, n):
    data = Data(n=n)
    expected = true_mahalanobis(data, relative=name == "RMDS")
    np.testing.assert_allclose(data.scores(name).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_mahalanobis_cut_of_eigenvalues(data):
    train, _, y, z, _ = data.numpy()
    means = np.stack([train[y == c].mean(0) for c in range(C)])
    values, vectors = np.linalg.eigh((train - means[y]).T @ (train - means[y]) / N)
    kept = values > 0.3 * values[-1]
    assert 0 < kept.sum() < M
    P = vectors[:, kept] / values[kept] @ vectors[:, kept].T
    expected = [max(-(row - mu) @ P @ (row - mu) for mu in means) for row in z]
    np.testing.assert_allclose(data.scores("Mahalanobis", rtol=0.3).numpy(), expected, rtol=1e-9)


def test_collapsed_classes_of_one_point_each_give_no_direction():
    data = Data()
    data.train = data.train[:C][data.targets]
    assert torch.equal(data.scores("Mahalanobis"), torch.zeros(23, dtype=torch.float64))
    assert data.scores("RMDS").isfinite().all()


def test_mahalanobis_in_float32_keeps_its_digits_among_collapsed_classes():
    """Class means 100 times as far apart as samples of a class, deviations over three decades, m = 256."""
    m, n = 256, 5000
    deviations = torch.logspace(0, -3, m, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q
    centres, y = 10 * torch.randn(20, m, dtype=torch.float64) / m**0.5, torch.arange(n) % 20
    train = (centres[y] + 0.1 * (torch.randn(n, m, dtype=torch.float64) * deviations) @ turn).float()
    z = train[:200] + 0.01 * torch.randn(200, m)
    single = detectors.Mahalanobis().fit_features(train, None, y).score_features(z)
    double = detectors.Mahalanobis().fit_features(train.double(), None, y).score_features(z.double())
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=0)


def true_she(data: Data, metric="inner") -> np.ndarray:
    train, train_logits, y, z, logits = data.numpy()
    scores = []
    for row, f in zip(z, logits, strict=True):
        p = f.argmax()
        pattern = train[(y == p) & (train_logits.argmax(1) == p)].mean(0)
        scores.append(
            {
                "inner": row @ pattern,
                "euclidean": -np.sqrt(((row - pattern) ** 2).sum()),
                "cosine": row @ pattern / np.sqrt((row @ row) * (pattern @ pattern)),
            }[metric]
        )
    return np.array(scores)


@pytest.mark.parametrize("metric", ["inner", "euclidean", "cosine"])
def test_she(metric, data):
    assert (data.train_logits.argmax(1) != data.targets).any(), "some are wrong and left out"
    np.testing.assert_allclose(data.scores("SHE", metric=metric).numpy(), true_she(data, metric), rtol=1e-10)


def test_she_without_a_pattern_is_the_lowest_score(data):
    data.targets = torch.where(data.targets == 2, 1, data.targets)  # nothing of class 2 is right
    scores = data.scores("SHE")
    without = data.logits.argmax(1) == 2
    assert 0 < without.sum() < len(without)
    assert (scores[without] == -torch.inf).all()
    assert scores[~without].isfinite().all()


def test_she_of_zeros_is_zero(data):
    zeros = torch.zeros(2, M, dtype=torch.float64)
    for metric in ("inner", "cosine"):
        assert data.fit("SHE", metric=metric).score_features(zeros, data.logits[:2]).tolist() == [0, 0]


def test_she_refuses_logits_of_another_head(data):
    with pytest.raises(ValueError, match=rf"logits: got shape \(23, {C + 2}\), expected \(n, {C}\)"):
        data.fit("SHE").score_features(data.features, torch.randn(23, C + 2))


def true_vim(data: Data, dim: int) -> np.ndarray:
    train, train_logits, _, z, logits = data.numpy()
    W, b = data.head.weight.numpy(), data.head.bias.numpy()
    u = -np.linalg.pinv(W) @ b
    values, vectors = np.linalg.eig((train - u).T @ (train - u) / len(train))
    null = vectors[:, np.argsort(-values)[dim:]]
    alpha = train_logits.max(1).mean() / np.linalg.norm((train - u) @ null, axis=1).mean()
    return np.log(np.exp(logits).sum(1)) - alpha * np.linalg.norm((z - u) @ null, axis=1)


@pytest.mark.parametrize("dim", [1, 4, M - 1])
def test_vim(dim, data):
    np.testing.assert_allclose(data.scores("ViM", dim=dim).numpy(), true_vim(data, dim), rtol=1e-9)


def test_vim_without_bias(data):
    data.head = nn.Linear(M, C, bias=False).double().requires_grad_(False)
    detector = data.fit("ViM")
    assert detector.origin.eq(0).all()


def test_vim_of_a_head_with_a_masked_class(data):
    expected = data.scores("ViM", dim=3)
    head = nn.Linear(M, C + 1, dtype=torch.float64).requires_grad_(False)
    head.weight[:C], head.bias[:C], head.bias[C] = data.head.weight, data.head.bias, -torch.inf
    data.head = head
    data.train_logits, data.logits = (F.pad(f, (0, 1), value=-torch.inf) for f in (data.train_logits, data.logits))
    torch.testing.assert_close(data.scores("ViM", dim=3), expected)


def test_vim_samples_the_residuals_of_many_rows(monkeypatch):
    data = Data(n=20_000)
    exact = data.fit("ViM").alpha
    monkeypatch.setattr(streaming, "SAMPLE_VALUES", 2000 * M)
    sampled = data.fit("ViM").alpha
    assert sampled != exact
    assert sampled == pytest.approx(exact.item(), rel=0.03)  # v = 0.3: a standard error of 0.7 %


@pytest.mark.parametrize("name", ["ViM", "NECO"])
@pytest.mark.parametrize("dim", [M, 1000])
def test_no_direction_left_names_the_cure(name, dim, data):
    with pytest.raises(ValueError, match=rf"dim: got {dim}, expected less than {M}, .* take a smaller dim, such as 6"):
        data.fit(name, dim=dim)


@pytest.mark.parametrize("metric", ["inner", "euclidean", "cosine"])
def test_she_in_half_precision_scores_in_float32(metric):
    """A product of features of a hundred is beyond float16."""
    z, f, y = 100 * torch.rand(40, 64), torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
    detector = detectors.SHE(metric).fit_features(z, f, y)
    expected = detector.score_features(z, f)
    torch.testing.assert_close(detector.half().score_features(z, f), expected, rtol=1e-3, atol=0)


def test_few_samples_leave_no_residual():
    with pytest.raises(ValueError, match="dim: got 8, but the training features lie in 8 dimensions"):
        Data(n=7).fit("ViM", dim=8)
    with pytest.raises(ValueError, match="NECO: dim: got 100, but 1 training features span less; no dim fits"):
        detectors.NECO().fit_features(torch.randn(1, M))
    with pytest.raises(ValueError, match=r"NECO: dim: got 7, but 7 training features span less; .*, such as 4"):
        Data(n=7).fit("NECO", dim=7)


def true_neco(data: Data, dim: int, standardize=True, use_max_logit=True, raw_length=False) -> np.ndarray:
    train, _, _, z, logits = data.numpy()
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 1e-9, deviation, 1) if standardize else 1
    _, _, directions = np.linalg.svd((train - mean) / deviation, full_matrices=False)
    x = (z - mean) / deviation
    share = np.linalg.norm(x @ directions[:dim].T, axis=1) / np.linalg.norm(z if raw_length else x, axis=1)
    return share * logits.max(1) if use_max_logit else share


@pytest.mark.parametrize(
    "settings", [{}, {"standardize": False}, {"use_max_logit": False}, {"raw_length": True}, {"dim": 1}], ids=str
)
def test_neco(settings, data):
    settings = {"dim": 4, **settings}
    np.testing.assert_allclose(data.scores("NECO", **settings).numpy(), true_neco(data, **settings), rtol=1e-9)


def test_neco_with_features_that_never_vary(data):
    data.train[:, 3] = 7.1
    data.train[:, 4] = 0.0
    np.testing.assert_allclose(data.scores("NECO").numpy(), true_neco(data, 4), rtol=1e-9)


def test_neco_of_no_length_is_zero(data):
    at_mean = data.train.mean(0, keepdim=True)
    detector = data.fit("NECO", use_max_logit=False)
    detector.mean = at_mean[0]
    assert detector.score_features(at_mean).item() == 0
    raw = data.fit("NECO", use_max_logit=False, raw_length=True)
    assert raw.score_features(torch.zeros(1, M, dtype=torch.float64)).item() == 0


def test_neco_without_the_logit_needs_none(data):
    detector = detectors.NECO(dim=3, use_max_logit=False).fit_features(data.train)
    assert detector.score_features(data.features).shape == (23,)


# ---- corners that all share


@pytest.mark.parametrize("name", NAMES)
def test_one_class(name):
    data = Data(n_classes=1)
    if detectors.find(name).needs_logits:
        with pytest.raises(ValueError, match=r"one logit a row, expected .* give two, \[0, f\]"):
            data.scores(name)
        return
    scores = data.scores(name)
    assert scores.isfinite().all()
    if name == "RMDS":  # both Gaussians are one
        torch.testing.assert_close(scores, torch.zeros_like(scores), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["Mahalanobis", "RMDS"])
def test_a_class_never_seen_is_left_out(name):
    data = Data()
    expected = data.scores(name)
    data.targets, data.train_logits = 2 * data.targets, torch.randn(N, 2 * C + 3)  # indices with gaps
    data.head = nn.Linear(M, 2 * C + 3).double()
    torch.testing.assert_close(data.scores(name), expected)
    assert len(data.fit(name).class_means) == C


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_exported(name, data):
    torch.compiler.reset()
    data.train, data.features, data.logits = data.train.float(), data.features.float(), data.logits.float()
    detector, z, f = data.fit(name), data.features, data.logits
    expected = detector(z, f)
    torch.testing.assert_close(torch.compile(detector, fullgraph=True, backend="aot_eager")(z, f), expected)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(detector, (z, f), dynamic_shapes=({0: rows}, {0: rows})).module()
    torch.testing.assert_close(exported(z[:7], f[:7]), expected[:7])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: detectors.Mahalanobis(ridge=-1.0), "ridge"),
        (lambda: detectors.Mahalanobis(rtol=-1.0), "rtol"),
        (lambda: detectors.SHE(metric="hamming"), "metric"),
        (lambda: detectors.ViM(dim=0), "dim"),
        (lambda: detectors.NECO(dim=2.5), "dim"),
    ],
)
def test_bad_settings(call, error):
    with pytest.raises(ValueError, match=f"{error}: got"):
        call()


# ---- the peer, where the definitions coincide


@pytest.mark.parametrize("name", NAMES[:-1])
def test_beside_pytorch_ood(name, data):
    peer = pytest.importorskip("pytorch_ood.detector")
    data.train, data.features, data.head = data.train.float(), data.features.float(), data.head.float()
    data.train_logits, data.logits = data.head(data.train), data.head(data.features)
    as_theirs = {"scatter": True, "ridge": 1e-6}
    theirs, settings = {
        "Mahalanobis": lambda: (peer.Mahalanobis(None), {"half": True, **as_theirs}),
        "RMDS": lambda: (peer.RMD(None), as_theirs),
        "SHE": lambda: (peer.SHE(None, data.head), {}),
        "ViM": lambda: (peer.ViM(None, 4, data.head.weight, data.head.bias), {"dim": 4}),
    }[name]()
    theirs.fit_features(data.train, data.targets)
    expected = theirs.predict_features(data.features)
    torch.testing.assert_close(-data.scores(name, **settings), expected, rtol=1e-3, atol=1e-4)
