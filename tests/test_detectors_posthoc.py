"""Detectors of features, logits and head against transcriptions of their formulas in NumPy, and against pytorch-ood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, special, stats
from torch import nn

from ood_fast import detectors
from ood_fast.detectors import (
    DICE,
    DML,
    GMM,
    IODIN,
    LTS,
    MCM,
    ODIN,
    SML,
    VRA,
    CombOOD,
    DetectorSet,
    GradNorm,
    OpenMax,
    Relation,
    Residual,
    TemperatureScaling,
    WeiPer,
    mixture,
)
from ood_fast.detectors.numbers import first_largest

N, M, C = 400, 12, 5


class Data:
    """Features about class means in float64, a head that gets most of them right, and queries."""

    def __init__(self, relu: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        centres = 2 * rng.normal(size=(C, M)) + 1
        self.y = np.arange(N) % C
        self.train = centres[self.y] + rng.normal(size=(N, M)) * np.linspace(0.2, 1.5, M)
        self.z = np.concatenate([centres[:3], 3 * rng.normal(size=(20, M))])
        if relu:
            self.train, self.z = self.train.clip(0), self.z.clip(0)
        self.W, self.b = centres / 4, rng.normal(size=C)
        self.f_train, self.f = self.train @ self.W.T + self.b, self.z @ self.W.T + self.b

    def fit(self, detector: detectors.Detector) -> detectors.Detector:
        train, f_train, y, W, b = (torch.from_numpy(t) for t in (self.train, self.f_train, self.y, self.W, self.b))
        return detector.fit_features(train, f_train, y, (W, b))

    def scores(self, detector: detectors.Detector) -> np.ndarray:
        return self.fit(detector).score_features(torch.from_numpy(self.z), torch.from_numpy(self.f)).numpy()

    def variance(self) -> float:
        """The mean variance within classes."""
        return float(
            sum(((rows - rows.mean(0)) ** 2).sum() for rows in (self.train[self.y == k] for k in range(C))) / N / M
        )

    def head(self) -> nn.Linear:
        head = nn.Linear(M, C).requires_grad_(False)
        head.weight.copy_(torch.from_numpy(self.W))
        head.bias.copy_(torch.from_numpy(self.b))
        return head

    def single(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.train).float(), torch.from_numpy(self.z).float()


@pytest.fixture
def data() -> Data:
    return Data()


def assert_close(scores: np.ndarray, expected: np.ndarray, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(scores, expected, rtol=rtol, atol=1e-12)


# ---- logits


def best_temperature(f: np.ndarray, y: np.ndarray) -> float:
    def nll(log_t: float) -> float:
        scaled = f / np.exp(log_t)
        return (special.logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]).mean()

    return float(np.exp(optimize.minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10}).x))


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_temperature_scaling(scale, data):
    data.f_train, data.f = scale * data.f_train, scale * data.f
    data.y = np.where(np.arange(N) % 7, data.f_train.argmax(1), data.y)
    T = best_temperature(data.f_train, data.y)
    assert data.fit(TemperatureScaling()).temperature.item() == pytest.approx(T, rel=1e-6)
    assert_close(data.scores(TemperatureScaling()), special.softmax(data.f / T, axis=1).max(1), rtol=1e-5)


def test_temperature_of_what_is_always_right_is_at_its_bound(data):
    data.y = data.f_train.argmax(1)
    with pytest.warns(UserWarning, match="Temperature scaling: the temperature is at its bound, 0.015625"):
        data.fit(TemperatureScaling())


def test_temperature_scaling_refuses_masked_targets(data):
    data.f_train[:, 2] = -np.inf
    data.y[:] = 0
    data.fit(TemperatureScaling())
    data.y[5] = 2
    with pytest.raises(ValueError, match="targets: got class 2 where its logit is -inf"):
        data.fit(TemperatureScaling())


def test_sml(data):
    p, top = data.f_train.argmax(1), data.f_train.max(1)
    mean, deviation = (np.array([of(top[p == k]) for k in range(C)]) for of in (np.mean, np.std))
    expected = (data.f.max(1) - mean[data.f.argmax(1)]) / deviation[data.f.argmax(1)]
    assert_close(data.scores(SML()), expected)


def test_sml_of_classes_that_are_not_predicted_takes_all(data):
    data.f_train[:, 3] -= 100  # never predicted
    data.f_train[0, 3] += 200  # but once
    data.f_train[:, 4] = -np.inf
    top, p = data.f_train.max(1), data.f_train.argmax(1)
    with pytest.warns(
        UserWarning, match="no sample is predicted as class 4: inputs predicted so are compared with all"
    ):
        scores = data.scores(SML())
    for k in (3, 4):
        rows = data.f.argmax(1) == k
        assert_close(scores[rows], (data.f.max(1)[rows] - top.mean()) / top.std())
    rows = data.f.argmax(1) == 0
    assert_close(scores[rows], (data.f.max(1)[rows] - top[p == 0].mean()) / top[p == 0].std())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradnorm_is_the_norm_of_the_gradient(temperature, data):
    W, b = torch.from_numpy(data.W).requires_grad_(), torch.from_numpy(data.b)
    expected = []
    for z in torch.from_numpy(data.z):
        loss = -F.log_softmax((W @ z + b) / temperature, dim=0).sum()
        expected.append(temperature * torch.autograd.grad(loss, W)[0].abs().sum().item())
    assert_close(data.scores(GradNorm(temperature)), np.array(expected))


def test_gradnorm_of_nearly_uniform_logits_keeps_its_digits():
    f = torch.tensor([[0.0, 1e-9, 0.0], [0.0, 2e-9, -1.0], [0.0, 1.0, -torch.inf]])
    scores = GradNorm().score_features(torch.ones(3, 2), f)
    p = special.softmax(f.double().numpy(), axis=1)
    terms = 3 * p - 1
    terms[0] = np.array([-1, 2, -1]) * 1e-9 / 3
    terms[2] = [*(2 * p[2, :2] - 1), 0]
    np.testing.assert_allclose(scores.numpy(), 2 * np.abs(terms).sum(1), rtol=1e-6)


# ---- features reshaped before the head


def energy(z: np.ndarray, data: Data) -> np.ndarray:
    return special.logsumexp(z @ data.W.T + data.b, axis=1)


@pytest.mark.parametrize(("high", "low"), [(90, 10), (99, 1), (50, 50), (100, 0)])
@pytest.mark.parametrize("below", ["clip", "zero"])
def test_vra(high, low, below, data):
    top, bottom = np.percentile(data.train, high), np.percentile(data.train, low)
    reshaped = [[min(v, top) if v >= bottom else (bottom if below == "clip" else 0.0) for v in row] for row in data.z]
    assert_close(data.scores(VRA(high, low, below=below)), energy(np.array(reshaped), data))


@pytest.mark.parametrize("p", [0, 10, 90, 100])
def test_dice(p, data):
    contribution = data.W * data.train.mean(0)
    sparse = np.where(contribution > np.percentile(contribution, p), data.W, 0)
    assert_close(data.scores(DICE(p)), special.logsumexp(data.z @ sparse.T + data.b, axis=1))


@pytest.mark.parametrize("p", [0, 65, 95, 100])
@pytest.mark.parametrize("relu", [True, False])
def test_lts(p, relu):
    data = Data(relu)
    k = max(1, M - round(M * p / 100))
    positive = np.sort(data.z.clip(0), axis=1)
    scale = (positive.sum(1) / positive[:, -k:].sum(1)) ** 2
    assert_close(data.scores(LTS(p)), special.logsumexp(data.f * scale[:, None], axis=1))


def test_lts_without_a_positive_feature_is_the_energy():
    f = torch.tensor([[1.0, 2.0], [0.0, -torch.inf]])
    torch.testing.assert_close(LTS().score_features(-torch.ones(2, 3), f), f.logsumexp(1))


# ---- directions


def test_residual(data):
    u = -np.linalg.pinv(data.W) @ data.b
    values, vectors = np.linalg.eigh((data.train - u).T @ (data.train - u) / N)
    null = vectors[:, np.argsort(-values)[4:]]
    assert_close(data.scores(Residual(dim=4)), -np.linalg.norm((data.z - u) @ null, axis=1))


def cosines(z: np.ndarray, W: np.ndarray) -> np.ndarray:
    return z @ W.T / np.outer(np.linalg.norm(z, axis=1), np.linalg.norm(W, axis=1))


def test_dml(data):
    expected = 30 * cosines(data.z, data.W).max(1) + np.linalg.norm(data.z, axis=1)
    assert_close(data.scores(DML(weight=30)), expected)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_mcm(temperature, data):
    expected = special.softmax(cosines(data.z, data.W) / temperature, axis=1).max(1)
    assert_close(data.scores(MCM(temperature)), expected)


def test_mcm_of_text_embeddings_needs_nothing_else(data):
    text, images = torch.from_numpy(data.W), torch.from_numpy(data.z)
    scores = MCM().fit_features(None, head=(text, None)).score_features(images)
    assert_close(scores.numpy(), data.scores(MCM()))


# ---- a distribution a class


def true_gmm(data: Data, covariance: str, ridge: float) -> np.ndarray:
    classes = [data.train[data.y == k] for k in np.unique(data.y)]
    of_classes = [np.cov(rows.T, ddof=0) for rows in classes]
    within = sum(len(rows) * matrix for rows, matrix in zip(classes, of_classes, strict=True)) / N
    logs = []
    for rows, own in zip(classes, of_classes, strict=True):
        matrix = (own if covariance == "class" else within) + ridge * np.trace(within) / M * np.eye(M)
        logs.append(np.log(len(rows) / N) + stats.multivariate_normal(rows.mean(0), matrix).logpdf(data.z))
    return special.logsumexp(logs, axis=0)


@pytest.mark.parametrize("covariance", ["class", "tied"])
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_gmm(covariance, ridge, data):
    data.y[:50] = 1  # shares that differ
    assert_close(data.scores(GMM(covariance, ridge)), true_gmm(data, covariance, ridge), rtol=1e-7)


def test_gmm_of_few_samples_a_class_and_of_a_missing_one(data):
    data.y = np.where(data.y == 2, 1, data.y)
    data.y[data.y == 4] = 3
    data.y[0] = 4  # a class of one sample
    with pytest.warns(UserWarning, match="GMM: no training sample of class 2: inputs of it count as those of others"):
        scores = data.scores(GMM())
    assert_close(scores, true_gmm(data, "class", 1e-6), rtol=1e-6)


def test_gmm_in_parts_and_of_too_many_numbers(data, monkeypatch):
    whole = data.scores(GMM())
    parts = GMM()
    train, y = torch.from_numpy(data.train), torch.from_numpy(data.y)
    for rows in torch.randperm(N).split(37):
        parts.partial_fit(train[rows], None, y[rows])
    assert_close(parts.finalize().score_features(torch.from_numpy(data.z)).numpy(), whole, rtol=1e-7)
    monkeypatch.setattr(mixture.ClassScatter, "__init__", lambda self: self.__post_init__())
    monkeypatch.setattr(mixture.ClassScatter, "most", C * M**2 - 1)
    with pytest.raises(
        ValueError, match="GMM: covariance: got 'class', which of all classes takes more than 719 numbers"
    ):
        data.fit(GMM("class"))
    tied = true_gmm(data, "tied", 1e-6)
    with pytest.warns(UserWarning, match="GMM: covariance: one a class, .* takes one for all"):
        together = data.fit(DetectorSet(["GMM", "MSP"]))
    scores = together.score_features(torch.from_numpy(data.z), torch.from_numpy(data.f))["GMM"]
    assert_close(scores.numpy(), tied, rtol=1e-7)


def weibull(distances: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The distribution function at `queries`, fitted to `distances` after libMR's shift."""
    shift = 1e4 - distances.min()

    def nll(log_parameters: np.ndarray) -> float:  # of x / scale, by hand: scipy's logpdf takes a hundred times as long
        k, log_x = np.exp(log_parameters[0]), np.log((distances + shift) / 1e4) - log_parameters[1]
        return -(log_parameters[0] + k * log_x - np.exp(k * log_x)).sum()

    start = [np.log(1e4 / distances.std()), distances.std() / 1e4]
    best = optimize.minimize(
        nll, start, method="Nelder-Mead", options={"xatol": 1e-13, "fatol": 1e-11, "maxiter": 9999}
    )
    return stats.weibull_min.cdf(queries + shift, np.exp(best.x[0]), scale=1e4 * np.exp(best.x[1]))


@pytest.mark.parametrize(("tail", "alpha"), [(20, 3), (7, 1), (500, 10)])
def test_openmax(tail, alpha, data):
    data.f[0] = data.f_train[data.y == 0].mean(0)  # w = 0
    right = data.f_train.argmax(1) == data.y
    assert not right.all()
    w = np.zeros_like(data.f)
    for k in range(C):
        rows = data.f_train[right & (data.y == k)]
        distances = np.sort(np.linalg.norm(rows - rows.mean(0), axis=1))[-tail:]
        w[:, k] = weibull(distances, np.linalg.norm(data.f - rows.mean(0), axis=1))
    expected = []
    for f, of_row in zip(data.f, w, strict=True):
        omega, n = np.zeros(C), min(alpha, C)
        omega[np.argsort(-f)[:n]] = [(n - i) / n for i in range(n)]
        unknown = (f * omega * of_row).sum()
        e = np.exp([*(f * (1 - omega * of_row)), unknown])
        expected.append(np.log(e[:-1].sum() / e[-1]))
    np.testing.assert_allclose(data.scores(OpenMax(tail, alpha)), expected, rtol=1e-4, atol=1e-4)


def test_of_tied_logits_openmax_takes_the_first():
    """topk takes others in other batches."""
    torch.manual_seed(0)
    logits = torch.randint(0, 2, (200, 40)).float()
    found, columns = first_largest(logits, 7)
    assert torch.equal(found, logits.topk(7, dim=1).values)
    expected = [sorted(range(40), key=lambda k: (-row[k], k))[:7] for row in logits.tolist()]
    assert columns.tolist() == expected


def test_openmax_of_classes_that_are_never_right(data):
    data.f_train[:, 4] -= 100
    with pytest.warns(UserWarning, match="OpenMax: no tail of correct training samples of class 4"):
        fitted = data.fit(OpenMax(alpha=1))
    f = torch.tensor([[0.0, 0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    expected = np.log(4 + 1) - 3  # all of the logit goes to the unknown class
    assert fitted.score_features(None, f).item() == pytest.approx(expected)
    data.y = (data.f_train.argmax(1) + 1) % C
    with pytest.raises(ValueError, match="OpenMax: logits: got no class with correct samples"):
        data.fit(OpenMax())


# ---- heads with noise


def divergence(values: np.ndarray, train: np.ndarray, bins: int, width: int, floor: float) -> np.ndarray:
    """KL in both directions of the histograms of the rows from the mean one of `train`, the row's smoothed."""
    edges = np.linspace(train.min(), train.max(), bins + 1)
    p = np.mean([np.histogram(row, edges)[0] / len(row) for row in train], axis=0) + floor
    p, found = p / p.sum(), []
    for row in values:
        share = np.pad(np.histogram(row, edges)[0] / len(row), ((width - 1) // 2, width // 2), mode="edge")
        q = np.array([share[i : i + width].mean() for i in range(bins)]) + floor
        q = q / q.sum()
        found.append((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())
    return np.array(found)


@pytest.mark.parametrize(
    "settings", [{}, {"bins": 30, "smoothing": 3, "smoothing_perturbed": 6, "delta": 0.5}], ids=str
)
def test_weiper(settings, data):
    detector = data.fit(WeiPer(repeats=8, **settings))
    heads = detector.heads.numpy().reshape(8, C, M)
    length = np.linalg.norm(data.W, axis=1)
    np.testing.assert_allclose(np.linalg.norm(heads - data.W, axis=2), np.tile(detector.delta * length, (8, 1)))
    directions = (heads - data.W).reshape(-1, M)
    assert np.abs(cosines(directions, directions) - np.eye(8 * C)).max() < 0.95, "each its own"
    f, f_train = (np.einsum("nm,rcm->nrc", z, heads) + data.b for z in (data.z, data.train))
    bins = detector.bins
    expected = (
        -divergence(data.z, data.train, bins, detector.smoothing, 0.01)
        - 2.5 * divergence(f.reshape(len(f), -1), f_train.reshape(N, -1), bins, detector.smoothing_perturbed, 0.025)
        + 0.1 * special.softmax(f, axis=2).max(2).mean(1)
    )
    assert_close(data.scores(WeiPer(repeats=8, **settings)), expected, rtol=1e-8)


def test_weiper_takes_as_many_heads_as_fit(data, monkeypatch):
    monkeypatch.setattr("ood_fast.detectors.perturbed.HEAD_VALUES", 7 * C * M + 1)
    with pytest.raises(ValueError, match=r"WeiPer: repeats: got 100, expected at most 7: heads of .*; take 7"):
        data.fit(WeiPer(repeats=100))
    with pytest.warns(UserWarning, match="WeiPer: repeats: the default of 100 does not fit, .*: takes 7"):
        fitted = data.fit(WeiPer())
    z = torch.from_numpy(data.z)
    assert torch.equal(fitted.score_features(z), data.fit(WeiPer(repeats=7)).score_features(z))


# ---- kept training samples


def test_combood(data):
    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    squared = np.sort(((unit(data.z)[:, None] - unit(data.train)) ** 2).sum(2), axis=1)[:, 6]
    x = (data.z - data.train.mean(0)) / data.train.std(0)
    inverse = np.linalg.inv(np.corrcoef(data.train.T) + np.eye(M))
    far = np.einsum("ni,ij,nj->n", x, inverse, x)
    assert_close(data.scores(CombOOD(k=7)), -np.sqrt(M) * np.log(squared) - far, rtol=1e-8)
    assert_close(data.scores(CombOOD(k=7, weight=M)), -M * np.log(squared) - far, rtol=1e-8)
    data.z = data.train[:1]
    assert np.isfinite(data.scores(CombOOD(k=1))).all()


@pytest.mark.parametrize("settings", [{}, {"pow": 4}, {"cutoff": 0.4}], ids=str)
def test_relation(settings, data):
    cosine = cosines(data.z, data.train).clip(0)
    r = cosine * (special.softmax(data.f, axis=1) @ special.softmax(data.f_train, axis=1).T)
    expected = (np.where(r > settings.get("cutoff", 0.03), r, 0) ** settings.get("pow", 1)).sum(1)
    assert_close(data.scores(Relation(**settings)), expected)


def test_relation_of_a_sample_and_in_chunks(data, monkeypatch):
    whole = data.scores(Relation())
    monkeypatch.setattr("ood_fast.detectors.neighbour.CHUNK_ELEMENTS", 4 * N)
    assert_close(data.scores(Relation()), whole)
    sampled = data.fit(Relation(budget=100))
    assert len(sampled.bank) == len(sampled.softmax) == 100
    scores = sampled.score_features(torch.from_numpy(data.z), torch.from_numpy(data.f)).numpy()
    assert np.corrcoef(scores, whole)[0, 1] > 0.95


# ---- inputs


def test_iodin_moves_one_number():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    std, T, eps = torch.tensor([0.5, 1.0, 2.0]), 10.0, 0.05
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    loss = F.cross_entropy(logits / T, logits.argmax(1), reduction="sum")
    gradient = torch.autograd.grad(loss, leaf)[0]
    moved = x.clone()
    for row, g in enumerate(gradient):
        at = np.unravel_index(int(g.abs().argmax()), g.shape)
        moved[(row, *at)] -= eps * g[at].sign() / std[at[0]]
    expected = torch.softmax(model(moved) / T, 1).amax(1).detach()
    detector = IODIN(temperature=T, eps=eps, std=std.tolist())
    torch.testing.assert_close(detector.score(model, x), expected)
    assert not torch.equal(ODIN(temperature=T, eps=eps, std=std.tolist()).score(model, x), expected)


# ---- the other library


def test_beside_pytorch_ood(data):
    peer = pytest.importorskip("pytorch_ood.detector")
    data = Data(relu=True)
    (train, z), head, y = data.single(), data.head(), torch.from_numpy(data.y)
    dice = peer.DICE(None, head.weight, head.bias, 0.9).fit_features(train, y)
    scaled = peer.GradNorm(head, param_filter=lambda name: name == "weight")
    pairs = [
        (DICE(90), dice.predict_features(z)),
        (LTS(), peer.LTS(None, head).predict_features(z)),
        (
            VRA(99, 1, per_feature=True),
            peer.VRA(nn.Identity(), head).fit_feature_maps(train, y).predict_feature_maps(z),
        ),
        (MCM(), peer.MCM(None, head.weight).predict_features(z)),
        (GradNorm(), C * scaled.predict(z)),
        (GMM(ridge=1e-3 / data.variance()), peer.GMM(None, reg=1e-3).fit_features(train, y).predict_features(z)),
    ]
    for detector, theirs in pairs:
        scores = detector.fit_features(train, head(train), y, head).score_features(z, head(z))
        torch.testing.assert_close(scores, -theirs.to(scores), rtol=1e-4, atol=1e-5)
    data.y = data.f_train.argmax(1)
    theirs = peer.OpenMax(None, tailsize=20, alpha=3).fit_logits(
        torch.from_numpy(data.f_train), torch.from_numpy(data.y)
    )
    unknown = theirs.predict_logits(torch.from_numpy(data.f)).numpy()
    np.testing.assert_allclose(special.expit(-data.scores(OpenMax())), unknown, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VRA(high=101), "high: got 101"),
        (lambda: VRA(high=10, low=20), "low: got 20, expected at most high, 10"),
        (lambda: VRA(below="cut"), "below: got 'cut'"),
        (lambda: DICE(p=-1), "p: got -1"),
        (lambda: LTS(p=101), "p: got 101"),
        (lambda: GradNorm(temperature=0), "temperature: got 0"),
        (lambda: DML(weight=-1), "weight: got -1"),
        (lambda: MCM(temperature=0), "temperature: got 0"),
        (lambda: Residual(dim=0), "dim: got 0"),
        (lambda: GMM("diagonal"), "covariance: got 'diagonal'"),
        (lambda: GMM(ridge=0), "ridge: got 0"),
        (lambda: OpenMax(tail=1), "tail: got 1"),
        (lambda: OpenMax(alpha=0), "alpha: got 0"),
        (lambda: WeiPer(repeats=0), "repeats: got 0"),
        (lambda: WeiPer(delta=0), "delta: got 0"),
        (lambda: WeiPer(bins=1, smoothing=1, smoothing_perturbed=1), "bins: got 1"),
        (lambda: WeiPer(bins=10), "smoothing_perturbed: got 15, expected at most bins, 10"),
        (lambda: WeiPer(seed=-1), "seed: got -1"),
        (lambda: WeiPer().fit_features(torch.ones(9, 3), head=(torch.rand(2, 3), None)), "features: got one number"),
        (lambda: CombOOD(weight=-1), "weight: got -1"),
        (lambda: Relation(pow=0), "pow: got 0"),
        (lambda: Relation(cutoff=1.0), "cutoff: got 1.0"),
        (lambda: Relation(budget=0), "budget: got 0"),
        (lambda: SML().fit_features(None, torch.ones(9, 3)), "logits: got the largest logit 1 in all rows"),
        (lambda: TemperatureScaling().fit_features(None, torch.rand(3, 2), torch.tensor([0, 1, 2])), "targets: got 2"),
    ],
)
def test_bad_parameters(call, message):
    with pytest.raises(ValueError, match=message):
        call()
