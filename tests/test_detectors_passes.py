"""More passes behind one score: literal computations, reproducibility, threads, sets, files, commands, errors."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

import ood_fast
from ood_fast import cli, detectors
from ood_fast.detectors import (
    IODIN,
    KNN,
    MSP,
    ODIN,
    DetectorSet,
    Ensemble,
    MCDropout,
    ModelEnsemble,
    TestTimeAugmentation,
    load,
)

C = 4
LOOKS = ("mean_logits", "mean_softmax", "predictive_entropy", "mutual_information", "variance", "disagreement")


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.channels = nn.Dropout2d(0.3)
        self.dropout = nn.Dropout(0.5, inplace=True)
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        return self.fc(self.dropout(self.channels(torch.relu(self.norm(self.conv(x)))).mean((2, 3))))


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def batches(x):
    return [(x[:5], torch.arange(5) % C), (x[5:], torch.arange(len(x) - 5) % C)]


def literal(of: str, logits: list[list[list[float]]]) -> list[float]:
    """Of passes, rows and classes, by loops."""
    scores = []
    for rows in zip(*logits, strict=True):
        soft = [[math.exp(f) / sum(map(math.exp, row)) for f in row] for row in rows]
        mean = [sum(column) / len(soft) for column in zip(*soft, strict=True)]
        means = [math.exp(sum(column) / len(rows)) for column in zip(*rows, strict=True)]
        entropy = lambda p: -sum(value * math.log(value) for value in p)  # noqa: E731
        pairs = [sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2 for p, q in itertools.combinations(soft, 2)]
        squares = [(p[k] - mean[k]) ** 2 / (len(soft) - 1) for p in soft for k in range(C)]
        scores.append(
            {
                "mean_logits": max(means) / sum(means),
                "mean_softmax": max(mean),
                "predictive_entropy": -entropy(mean),
                "mutual_information": sum(map(entropy, soft)) / len(soft) - entropy(mean),
                "variance": -sum(squares) / C,
                "disagreement": -sum(pairs) / len(pairs),
            }[of]
        )
    return scores


# ---- dropout


@torch.no_grad()
def thinned(net, x, passes, seed):
    """The logits of nets whose masks are drawn here."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(passes):
        channels = (torch.rand(1, 6, 1, 1, generator=generator) >= 0.3) / 0.7
        units = (torch.rand(1, 6, generator=generator) >= 0.5) / 0.5
        maps = torch.relu(net.norm(net.conv(x))) * channels
        found.append(net.fc(maps.mean((2, 3)) * units))
    return found


@pytest.mark.parametrize("of", LOOKS)
def test_mc_dropout_is_its_definition(net, x, of):
    scores = MCDropout(of, passes=3, seed=7).fit(net, batches(x)).score(net, x)
    expected = literal(of, [logits.tolist() for logits in thinned(net, x, 3, 7)])
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_thinned_nets_are_the_same_for_every_input_and_call(net, x):
    net.train()
    net.norm.eval()
    detector = MCDropout("mutual_information", passes=4)
    scores = detector.score(net, x)
    assert torch.equal(detector.score(net, x), scores)
    torch.testing.assert_close(detector.score(net, [x[:2], x[2:]]), scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(detector.score(net, x.flip(0)).flip(0), scores, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(MCDropout("mutual_information", passes=4, seed=1).score(net, x), scores)
    assert [m.training for m in net.children()] == [True, False, True, True, True]
    assert net.norm.num_batches_tracked == 0


def test_other_threads_see_no_dropout(net, x):
    detector, plain = MCDropout(passes=20), MSP().score(net, x)
    expected, seen, stop = detector.score(net, x), [], threading.Event()

    def run():
        while not stop.is_set():
            seen.append(torch.equal(MSP().score(net, x), plain))

    other = threading.Thread(target=run)
    other.start()
    found = [detector.score(net, x) for _ in range(5)]
    stop.set()
    other.join()
    assert all(seen)
    assert all(torch.equal(one, expected) for one in found)


def test_the_detectors_of_thinned_nets(net, x):
    """Fitted on the whole net; also those that read layers, and in a set."""
    fitted = DetectorSet({"knn": MCDropout(KNN(k=2), passes=3), "norm": MCDropout("BlockNorm"), "KNN": KNN(k=2)})
    scores = fitted.fit(net, batches(x)).score(net, x)
    assert torch.equal(fitted["knn"].member.bank, fitted["KNN"].bank)
    with torch.no_grad():
        for mask in ((net.channels, 0.3, (1, 6, 1, 1)), (net.dropout, 0.5, (1, 6))):
            assert mask[0].p == mask[1]
        generator, expected = torch.Generator().manual_seed(0), 0
        for _ in range(3):
            channels = (torch.rand(1, 6, 1, 1, generator=generator) >= 0.3) / 0.7
            units = (torch.rand(1, 6, generator=generator) >= 0.5) / 0.5
            z = (torch.relu(net.norm(net.conv(x))) * channels).mean((2, 3)) * units
            expected = expected + fitted["KNN"].score_features(z) / 3
    torch.testing.assert_close(scores["knn"], expected, rtol=1e-4, atol=1e-5)
    assert scores["norm"].shape == (9,)


def test_the_detectors_of_passes_are_fitted_as_alone(net, x):
    """On validation data where that is their own, and with defaults that may be lowered, also of a copy."""
    of = {"alone": "ReAct", "passes": MCDropout("ReAct"), "ViM": MCDropout("ViM").changed(seed=1)}
    validation = [(3 * images, y) for images, y in batches(x)]
    fitted = DetectorSet(of).fit(net, batches(x), validation=validation)
    assert torch.equal(fitted["passes"].member.clip, fitted["alone"].clip)
    for detector in (fitted["ViM"], fitted["ViM"].member):
        again = detector.changed()
        assert getattr(again, "member", again).dim == 256, "what was lowered is back"
    assert fitted["ViM"].member.dim < 6


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.4), nn.FeatureAlphaDropout(0.4), nn.Dropout1d(0.4)])
def test_kinds_of_dropout_keep_the_mean(layer):
    model = nn.Sequential(nn.Flatten(0, 0), layer, nn.Identity())
    x = torch.randn(1, 4000, 3)
    with detectors.passes._Thinning(3):
        dropped = model.eval()(x)
    assert dropped.mean().item() == pytest.approx(0, abs=0.05)
    assert (dropped == 0).all(2).float().mean().item() == pytest.approx(0.4 * isinstance(layer, nn.Dropout1d), abs=0.05)
    if "Alpha" in type(layer).__name__:
        assert dropped.std().item() == pytest.approx(1, abs=0.05)


def test_transformers_drop(x):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), layer, nn.Flatten(), nn.Linear(24, C)).eval()
    assert (MCDropout("variance").score(model, x) < 0).all()  # torch's fused layer would drop nothing


def test_a_net_without_dropout_is_refused(x):
    plain = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(192, C))
    named = r"Sequential has no dropout layer .* take a model that was trained with nn\.Dropout layers, or Test"
    for call in (
        lambda: MCDropout().fit(plain, batches(x)),
        lambda: DetectorSet(["MCDropout", "MSP"]).fit(plain, batches(x)),
        lambda: MCDropout().score(plain, x),
    ):
        with pytest.raises(ValueError, match=named):
            call()
    plain.unused = nn.Dropout()
    plain.forward = lambda x: plain[2](x.flatten(1))
    with pytest.raises(ValueError, match="runs none of its dropout layers"):
        MCDropout().score(plain, x)


# ---- views


@torch.no_grad()
def test_views_of_images(net, x):
    crops = [x[:, :, i : i + 7, j : j + 7] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))]
    views = {
        "flip": [x, x.flip(3)],
        "crops": [x, *(interpolate(crop, (8, 8), mode="bilinear") for crop in crops)],
    }
    views[("flip", "crops")] = [*views["flip"], *views["crops"][1:]]
    for given, expected in views.items():
        logits = [net(view) for view in expected]
        for of in LOOKS:
            found = TestTimeAugmentation(of, views=given).score(net, x)
            literally = torch.tensor(literal(of, [f.tolist() for f in logits]), dtype=torch.float64)
            torch.testing.assert_close(found, literally, rtol=1e-4, atol=1e-6)
        knn = KNN(k=2).fit(net, batches(x))
        mean = sum(knn.score(net, view) for view in expected) / len(expected)
        torch.testing.assert_close(TestTimeAugmentation(knn, views=given).score(net, x), mean)
    named = TestTimeAugmentation("variance", views="flip")
    assert torch.equal(named.score(net, [{"x": x, "labels": torch.arange(9)}]), named.score(net, x))
    own = TestTimeAugmentation("Energy", views=(lambda x: x, lambda x: x * 2)).score(net, x)
    mean = (net(x).logsumexp(1) + net(2 * x).logsumexp(1)) / 2
    torch.testing.assert_close(own, mean, check_dtype=False)


def test_views_that_do_not_fit(net, x, tmp_path):
    flat = nn.Sequential(nn.Dropout(), nn.Linear(6, C))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 6\), expected 4 dimensions"):
        TestTimeAugmentation().score(flat, torch.randn(2, 6))
    with pytest.raises(ValueError, match="gives 18 rows for 9 inputs"):
        TestTimeAugmentation(views=lambda x: x.repeat(2, 1, 1, 1)).score(net, x)
    with pytest.raises(ValueError, match=r"views: got 'turn', expected .*flip"):
        TestTimeAugmentation(views="turn")
    with pytest.raises(ValueError, match="views: got one, expected two or more, whose variance is taken"):
        TestTimeAugmentation("variance", views=lambda x: x)
    with pytest.raises(ValueError, match="views: got none"):
        TestTimeAugmentation(views=())
    with pytest.raises(TypeError, match=r"views: got function .* which no file can hold"):
        TestTimeAugmentation(views=lambda x: x).save(tmp_path / "it")
    assert not list(tmp_path.iterdir())


# ---- several models


@torch.no_grad()
def test_several_models(x):
    models = [Net(seed).eval() for seed in range(3)]
    for of in LOOKS:
        expected = torch.tensor(literal(of, [model(x).tolist() for model in models]), dtype=torch.float64)
        torch.testing.assert_close(Ensemble(of).score(models, x), expected, rtol=1e-4, atol=1e-6)
    scores = Ensemble("KNN", {"k": 2}).fit(models, batches(x)).score(nn.ModuleList(models), [x[:4], x[4:]])
    expected = sum(KNN(k=2).fit(model, batches(x)).score(model, x) for model in models) / 3
    torch.testing.assert_close(scores, expected)
    views = Ensemble(TestTimeAugmentation(KNN(k=2))).fit(models, batches(x)).score(models, x)
    torch.testing.assert_close(
        views, sum(TestTimeAugmentation(KNN(k=2)).fit(m, batches(x)).score(m, x) for m in models) / 3
    )
    assert Ensemble(TestTimeAugmentation("variance")).score(models, x).shape == (9,)
    together = DetectorSet({"a": Ensemble(KNN(k=2)), "b": Ensemble("disagreement"), "MSP": MSP()})
    found = together.fit(ModelEnsemble(models), batches(x)).score(ModelEnsemble(models), x)
    torch.testing.assert_close(found["a"], expected)
    torch.testing.assert_close(found["MSP"], Ensemble("mean_logits").score(models, x), check_dtype=False)


@pytest.mark.parametrize(
    "detector",
    [
        *(TestTimeAugmentation(of, views=lambda x: x) for of in ("mean_softmax", "mean_logits", "MSP")),
        *(MCDropout("MSP"), ODIN(1.0, 0.0), IODIN(1.0, 0.0)),
    ],
    ids=lambda detector: f"{detector.label} {getattr(detector, 'of', '')}",
)
def test_certain_predictions_are_told_apart(detector):
    """In float32 the softmax of all of these is 1, and ties decide what an evaluation measures."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(1e-9)).eval()
    nn.init.eye_(model[0].weight)
    x = torch.tensor([[18.0, 0, 0], [19.0, 0, 0], [21.0, 0, 0]])
    scores = detector.score(model, x)
    assert (scores.diff() > 0).all(), scores
    torch.testing.assert_close(scores, x.double().softmax(1).amax(1), rtol=1e-12, atol=0)


def test_what_is_no_ensemble(x, net):
    with pytest.raises(ValueError, match="model: got Net, expected two or more for Deep ensemble"):
        Ensemble("KNN").fit(net, batches(x))
    with pytest.raises(ValueError, match="got 1 models"):
        Ensemble().score([net], x)
    fitted = Ensemble("KNN", {"k": 2}).fit([net, Net(1)], batches(x))
    with pytest.raises(ValueError, match="got 3 models, expected 2, as in the fit"):
        fitted.score([net, net, net], x)
    with pytest.raises(ValueError, match="loader: got a generator, which can be read once"):
        Ensemble("KNN").fit([net, net], (batch for batch in batches(x)))
    with pytest.raises(RuntimeError, match="is not fitted"):
        Ensemble("KNN").score([net, net], x)
    with pytest.raises(RuntimeError, match=r"call fit\(models, loader\)"):
        Ensemble("KNN").fit_features(torch.randn(9, 6))
    with pytest.raises(RuntimeError, match=r"call fit\(models, loader\)"):
        Ensemble("KNN").partial_fit(torch.randn(9, 6))
    with pytest.raises(ValueError, match="k: got 50"):
        Ensemble("KNN", {"k": 50}).fit([net, copy.deepcopy(net)], batches(x))
    with pytest.raises(ValueError, match="model: got one model several times"):
        Ensemble("mutual_information").fit([net, nn.DataParallel(net)], batches(x))
    for models in ([], [nn.Linear(6, 3), nn.Linear(6, 2)]):
        with pytest.raises(ValueError, match=r"model: got logits of shapes .*, expected models of the same classes"):
            ModelEnsemble(models)(torch.randn(3, 6))


# ---- all of them


@pytest.mark.parametrize("cls", [MCDropout, TestTimeAugmentation, Ensemble])
def test_what_is_no_score(cls):
    with pytest.raises(ValueError, match=r"unknown score 'disagrement'; did you mean 'disagreement'\?"):
        cls("disagrement")
    with pytest.raises(TypeError, match="of: got int 3, expected a detector, or one of mean_logits"):
        cls(3)
    with pytest.raises(ValueError, match=r"options: got .* no detector"):
        cls("variance", {"k": 3})
    with pytest.raises(ValueError, match=r"options: got .* beside a KNN"):
        cls(KNN(), {"k": 3})
    with pytest.raises(ValueError, match="of: got a Deep ensemble, which stands outside"):
        cls(Ensemble("KNN"))
    with pytest.raises(RuntimeError, match="scores inputs, not features"):
        cls().score_features(torch.randn(3, 4))
    assert cls.__name__ in detectors.known()
    assert cls.__name__ not in detectors.in_all()
    assert len(detectors.in_all()) >= 41


def test_files_and_thresholds(net, x, tmp_path):
    models = [net, Net(1).eval()]
    made = {
        "dropout": (MCDropout(KNN(k=2)), net),
        "views": (TestTimeAugmentation("BlockNorm", views=("flip", "crops")), net),
        "models": (Ensemble(KNN(k=2)), models),
    }
    for name, (detector, model) in made.items():
        scores = detector.fit(model, batches(x)).score(model, x)
        detector.calibrate(scores).save(tmp_path / name, notes={"a": 1})
        back = load(tmp_path / name)
        assert back.settings() == detector.settings()
        assert torch.equal(back.score(model, x), scores)
        assert torch.equal(back.is_ood(scores), detector.is_ood(scores))


def test_files_of_ensembles_have_what_each_fit_made(tmp_path):
    """Layers that were found, and a default that was lowered: of nets alike, and of others."""
    x = torch.randn(30, 3, 4, 4)
    for detector, hidden in (("LayerMahalanobis", (6, 6)), ("ViM", (6, 9)), ("KNN", (6, 6))):
        nets = [
            nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), m), nn.Tanh(), nn.Linear(m, 4)).eval() for m in hidden
        ]
        train = [(x, torch.arange(30) % 4)]
        with warnings.catch_warnings(action="ignore"):
            ensemble = Ensemble(detector).fit(nets, train)
        assert isinstance(ensemble.options, list) == (hidden == (6, 9))
        ensemble.save(tmp_path / "it")
        back = load(tmp_path / "it")
        assert torch.equal(back.score(nets, x), ensemble.score(nets, x))
        assert repr(back.settings()) == repr(ensemble.settings())
    with pytest.raises(ValueError, match="options: got 1, expected a mapping, or one for each of size=2 models"):
        Ensemble("KNN", [{"k": 1}], size=2)


def test_nan_names_the_row(net, x):
    x[7, 0, 0, 0] = math.nan
    for detector, model in ((MCDropout(), net), (TestTimeAugmentation("Energy"), net), (Ensemble(), [net, net])):
        with pytest.raises(ValueError, match="got NaN in 1 of 4 rows, the first is row 7"):
            detector.score(model, [x[:5], x[5:]])


def test_evaluate_and_the_command_line(net, x, tmp_path, monkeypatch):
    chosen = {"a": MCDropout(), "b": TestTimeAugmentation(KNN(k=2)), "KNN": KNN(k=2)}
    result = ood_fast.evaluate(net, batches(x), {"far": [3 * x]}, fit=batches(x), detectors=chosen)
    assert {row["detector"] for row in result.rows()} >= set(chosen)

    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dropping.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 2))\n"
    )
    for index in range(20):
        (tmp_path / "train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        pixels = (torch.rand(8, 8, 3) * 255).byte().numpy()
        image.fromarray(pixels).save(tmp_path / "train" / "ab"[index % 2] / f"{index}.png")
    own = ["--model", "dropping:build", "--size", "8", "--resize", "8", "--workers", "0", "--quiet"]
    named = ["--detectors", "MCDropout,TestTimeAugmentation", "--set", "TestTimeAugmentation.of=NCI"]
    fit = ["fit", *own, "--data", "train", "--any-accuracy", *named, "--out", "d.safetensors"]
    assert cli.main(fit) == 0
    assert load("d.safetensors")["TestTimeAugmentation"].of == "NCI"
    data = ["--data", "train", "--out", "s.csv"]
    assert (
        cli.main(["score", "--model", "dropping:build", "--detectors", "d.safetensors", "--workers", "0", *data]) == 0
    )
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 21
