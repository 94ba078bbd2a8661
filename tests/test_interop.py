"""Our detectors in the frameworks of others: pytorch-ood as it is installed, and the loop of OpenOOD's evaluator.

OpenOOD is on no package index. `Evaluator` below is written after what `openood.evaluation_api.Evaluator` and
`openood.evaluators` of v1.5 call on a postprocessor, in what order and with what, and no more; the class is not theirs.
"""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import pickle
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from detector_cases import sizes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ood_fast import detectors, metrics
from ood_fast.detectors import FDBD, KNN, MSP, NCI
from ood_fast.interop.openood import Postprocessor

C, M = 4, 16
SETTINGS = sizes(k=3, dim=6)
ANY_MODEL = [name for name in detectors.known() if name != "Ensemble"]  # which takes several
SMALL_GRIDS = {"KNN": {"k": (1, 3, 5)}, "NNGuide": {"k": (1, 3)}, "ViM": {"dim": (4, 6)}, "NECO": {"dim": (4, 6)}}


class Counting(nn.Module):
    """A classifier that counts its passes, in training mode as frameworks may hand it over; dropout would show."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, M), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(M, C)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.fc(self.body(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Counting().train()


def images(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) + shift


def fitted(name: str, model: nn.Module) -> detectors.Detector:
    return detectors.create(name, **SETTINGS.get(name, {})).fit(model, [(images(60, 0), torch.arange(60) % C)])


# ---- pytorch-ood


@pytest.fixture
def adapters():
    pytest.importorskip("pytorch_ood")
    from ood_fast.interop import pytorch_ood

    return pytorch_ood


def their_loader(n: int, seed: int, ood: bool = False, **keywords) -> DataLoader:
    targets = torch.full((n,), -1) if ood else torch.arange(n) % C
    return DataLoader(TensorDataset(images(n, seed, 3.0 * ood), targets), batch_size=16, **keywords)


@pytest.mark.parametrize("name", ANY_MODEL)
@pytest.mark.filterwarnings("ignore:AUTC is undefined")  # SHE: a class that was never right is -inf
def test_pytorch_ood_detector(name, model, adapters):
    """A detector of theirs: fitted on a loader, minus our score, and fed to their metrics with both kinds of data."""
    from pytorch_ood.api import Detector, FeaturesDetector
    from pytorch_ood.metrics import OODMetrics

    adapter = adapters.PytorchOOD(detectors.create(name, **SETTINGS.get(name, {})), model)
    assert isinstance(adapter, Detector)
    assert isinstance(adapter, FeaturesDetector)
    assert type(adapter).__name__ == name
    train = DataLoader(TensorDataset(images(60, 0), torch.arange(60) % C), batch_size=16)
    assert adapter.fit(train) is adapter
    made = detectors.create(name)  # one that reads layers looks for them when it is fitted
    assert adapter.requires_fit == (made.needs_fit and (made.needs_model or bool(made.gathers())))
    x = images(10, 1)
    torch.testing.assert_close(adapter(x), -fitted(name, model).score(model, x))
    assert model.training
    scored = OODMetrics()
    inside, outside = [], []
    for loader, scores in ((their_loader(40, 2), inside), (their_loader(40, 3, ood=True), outside)):
        for x, y in loader:
            scored.update(adapter(x), y)
            scores.append(-adapter(x))
    expected = metrics.auroc(torch.cat(inside), torch.cat(outside))
    assert scored.compute()["AUROC"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", [n for n in detectors.known() if not detectors.find(n).needs_model])
def test_pytorch_ood_features(name, model, adapters):
    """fit_features and predict_features, with and without a model; OOD rows are left out of the fit."""
    z = model.eval().body(images(60, 0)).detach()
    y = torch.arange(60) % C
    whole = torch.cat([z, 100 + z[:5]]), torch.cat([y, -torch.ones(5, dtype=torch.int64)])
    new = model.body(images(10, 1)).detach()
    expected = -fitted(name, model).score(model, images(10, 1))
    for arguments in ((model,), (model, "fc"), (None, model.fc)):
        adapter = adapters.PytorchOOD(detectors.create(name, **SETTINGS.get(name, {})), *arguments)
        assert adapter.fit_features(*whole) is adapter
        torch.testing.assert_close(adapter.predict_features(new), expected)


def test_pytorch_ood_fit_leaves_ood_samples_out(model, adapters):
    mixed = [(images(60, 0), torch.arange(60) % C), (images(20, 9, 50.0), torch.full((20,), -1))]
    adapter = adapters.PytorchOOD(NCI(), model).fit(mixed)
    torch.testing.assert_close(adapter.detector.mean, fitted("NCI", model).mean)


def test_pytorch_ood_batches_of_ood_alone_and_labels_of_any_dtype(model, adapters):
    """Their `validation_set()` ends in batches that hold OOD data alone; data sets give int32 and float labels."""
    expected = fitted("Mahalanobis", model).score(model, images(5, 1))
    alone = (images(8, 9, 50.0), torch.full((8,), -1))
    for dtype in (torch.int32, torch.int16, torch.float32, torch.float64):
        batches = [alone, (images(60, 0), (torch.arange(60) % C).to(dtype)), alone]
        adapter = adapters.PytorchOOD(detectors.Mahalanobis(), model).fit(batches)
        torch.testing.assert_close(adapter(images(5, 1)), -expected)
    z = model.eval().body(images(60, 0)).detach()
    stored = adapters.PytorchOOD(detectors.Mahalanobis(), model).fit_features(z, (torch.arange(60) % C).float())
    torch.testing.assert_close(stored(images(5, 1)), -expected)
    with pytest.raises(ValueError, match=r"y: got 0\.5 in row 1, expected class indices"):
        adapters.PytorchOOD(NCI(), model).fit([(images(2, 0), torch.tensor([0.0, 0.5]))])
    with pytest.raises(ValueError, match="no data to fit on"):
        adapters.PytorchOOD(NCI(), model).fit([alone])


@pytest.mark.parametrize("name", ["ASH", "SCALE", "BoundaryDistance", "TemperedMSP"])
def test_pytorch_ood_without_fit_where_there_is_nothing_to_fit(name, model, adapters):
    """The head alone is needed: that of the model as it is when it is asked, also after training it further."""
    adapter = adapters.PytorchOOD(detectors.create(name), model)
    assert not adapter.requires_fit
    x = images(6, 1)
    for _ in range(2):
        torch.testing.assert_close(adapter(x), -fitted(name, model).score(model, x))
        z = adapter.encoder(x)
        torch.testing.assert_close(adapter.predict_features(z), adapter(x))
        with torch.no_grad():
            model.fc.weight.mul_(torch.linspace(0.5, 2, C).unsqueeze(1))
    kept = adapters.PytorchOOD(fitted(name, model), model)
    before = kept.detector.head_weight.clone()
    with torch.no_grad():
        model.fc.bias.add_(1)
    with pytest.raises(ValueError, match="its weights are not those"):
        kept(x)
    assert torch.equal(kept.detector.head_weight, before), "a fitted one stays as it is"
    from pytorch_ood.api import RequiresFittingException

    assert adapters.PytorchOOD(detectors.ReAct(), model).requires_fit, "its percentile is of the data"
    with pytest.raises(RequiresFittingException):
        adapters.PytorchOOD(detectors.create(name)).predict_features(torch.randn(2, M))


@pytest.mark.parametrize("name", ANY_MODEL)
@pytest.mark.filterwarnings("ignore:.*class [0-9]")
def test_pytorch_ood_as_their_own_tests_use_theirs(name, model, adapters):
    """What their files in tests/detectors check: one sample a batch, float labels, shuffled loaders, an adapter called
    in training mode and without gradients, finite scores a sample, RequiresFittingException before the fit."""
    from pytorch_ood.api import RequiresFittingException

    adapter = adapters.PytorchOOD(detectors.create(name, **SETTINGS.get(name, {})), model)
    x = images(16, 1)
    if adapter.requires_fit:
        with pytest.raises(RequiresFittingException):
            adapter(x)
        if not adapter.detector.needs_model:
            with pytest.raises(RequiresFittingException):
                adapter.predict_features(torch.randn(3, M))
    model.eval()
    train = images(40, 0)
    with torch.no_grad():
        y = model(train).argmax(1).float()  # each class that is predicted is right
    model.train()
    adapter.fit(DataLoader(TensorDataset(train, y), batch_size=1, shuffle=True))
    with torch.no_grad():
        scores = adapter(x)
    assert scores.shape == (16,)
    assert not scores.requires_grad
    assert (scores.isfinite() | (scores.isinf() & torch.tensor(name == "SHE"))).all()
    torch.testing.assert_close(torch.cat([adapter(each) for each in x.split(1)]), scores, rtol=1e-4, atol=1e-5)
    assert adapter(images(1, 2) * 10).shape == (1,)


def test_pytorch_ood_dense_logits_are_refused_in_words(adapters):
    """Their scores of a segmentation model are (n, h, w); ours are of classifiers."""
    dense = nn.Conv2d(3, C, 1)
    for detector in (MSP(), detectors.Entropy()):
        with pytest.raises(ValueError, match=r"model: got an output of shape \(5, 4, 6, 6\), expected logits \(n, c\)"):
            adapters.PytorchOOD(detector, dense)(images(5, 0))
        with pytest.raises(ValueError, match=r"logits: got shape \(5, 4, 6, 6\), expected 2 dimensions \(n, c\)"):
            detector.score_features(None, dense(images(5, 0)).detach())


def test_pytorch_ood_errors(model, adapters):
    from pytorch_ood.api import ModelNotSetException, RequiresFittingException

    with pytest.raises(RequiresFittingException):
        adapters.PytorchOOD(NCI(), model).predict(images(2, 0))
    with pytest.raises(RequiresFittingException):
        adapters.PytorchOOD(NCI(), model).predict_features(torch.randn(2, M))
    with pytest.raises(ModelNotSetException):
        adapters.PytorchOOD(NCI()).fit([])
    with pytest.raises(ModelNotSetException):
        adapters.PytorchOOD(MSP()).predict(images(2, 0))
    with pytest.raises(TypeError, match="detector: got str 'MSP', expected a detector of ood_fast"):
        adapters.PytorchOOD("MSP", model)
    with pytest.raises(TypeError, match=r"head: got str 'fc', expected an nn\.Linear where there is no model"):
        adapters.PytorchOOD(MSP(), None, "fc")
    with pytest.raises(ValueError, match="unknown hyperparameter 'k'; known: alpha"):
        adapters.PytorchOOD(NCI(), model).set_hyperparameters(k=3)


def test_pytorch_ood_logit_detector_without_a_linear_head(adapters):
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    adapter = adapters.PytorchOOD(MSP(), model)
    assert adapter.encoder is None
    torch.testing.assert_close(adapter(images(5, 0)), -MSP().score(model, images(5, 0)))
    with pytest.raises(ValueError, match=r"has no nn\.Linear"):
        adapters.PytorchOOD(NCI(), model)


def test_pytorch_ood_moves_with_theirs(model, adapters):
    adapter = adapters.PytorchOOD(fitted("NCI", model), model)
    assert adapter.device == torch.device("cpu")
    assert adapter.to("meta").detector.mean.device.type == "meta"
    assert model.fc.weight.device.type == "meta"


def test_pytorch_ood_encoders_are_shared_and_not_kept(model, adapters):
    one, two = (adapters.PytorchOOD(detector, model) for detector in (MSP(), KNN()))
    assert one.encoder is two.encoder
    gone = weakref.ref(one.encoder)
    del one, two
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:AUTC is undefined")
def test_pytorch_ood_copies_and_pickles(model, adapters):
    class Mine(adapters.PytorchOOD):
        """Of a user."""

    for adapter in (adapters.PytorchOOD(NCI(), model), adapters.PytorchOOD(detectors.ASH(), model), Mine(NCI(), model)):
        adapter.fit(their_loader(40, 0))
        expected = adapter.predict(images(5, 1))
        twins = [copy.deepcopy(adapter), copy.copy(adapter)]
        twins += [] if isinstance(adapter, Mine) else [pickle.loads(pickle.dumps(adapter))]
        for twin in twins:
            assert torch.equal(twin.predict(images(5, 1)), expected)
            assert type(twin).__name__ == type(adapter).__name__
            assert (twin.model is model) == (twin is twins[1])
            assert any(layer is twin.head for layer in twin.model.modules())
            assert twin.requires_fit == adapter.requires_fit


def test_pytorch_ood_benchmark(model, adapters):
    """Their benchmark, whole: our detectors and theirs side by side, on one pass over each data set for all of ours."""
    from pytorch_ood.benchmark import Benchmark
    from pytorch_ood.detector import MaxSoftmax
    from pytorch_ood.detector import fDBD as TheirFDBD

    class Synthetic(Benchmark):
        ood_names = ("near", "far")

        def train_set(self):
            return TensorDataset(images(60, 0), torch.arange(60) % C)

        def test_sets(self, known=True, unknown=True):
            inside = images(40, 1)
            labels = torch.cat([torch.arange(40) % C, torch.full((40,), -1)])
            return [TensorDataset(torch.cat([inside, images(40, 2, shift)]), labels) for shift in (0.5, 3.0)]

    benchmark = Synthetic()
    train = DataLoader(benchmark.train_set(), batch_size=16)
    model.eval()
    theirs = [MaxSoftmax(model), TheirFDBD(model.body, model.fc).fit(train)]
    names = [name for name in detectors.known() if not detectors.find(name).needs_model]
    adapted = [adapters.PytorchOOD(fitted(name, model), model) for name in names]
    model.passes = 0
    results = benchmark.evaluate([*theirs, *adapted], loader_kwargs={"batch_size": 40})
    assert model.passes == 2 * 2 * 2  # data sets × batches × (their one on logits, all of ours)
    assert [result["Detector"] for result in results] == 2 * ["MaxSoftmax", "fDBD", *names]
    by_name = {(result["Detector"], result["Dataset"]): result for result in results}
    for dataset in benchmark.ood_names:
        for key in ("AUROC", "AUPR-IN", "FPR95TPR"):  # the same score
            assert by_name["MSP", dataset][key] == pytest.approx(by_name["MaxSoftmax", dataset][key], abs=1e-6)
            assert by_name["FDBD", dataset][key] == pytest.approx(by_name["fDBD", dataset][key], abs=1e-6)
    single = benchmark.evaluate(adapted[names.index("NCI")], loader_kwargs={"batch_size": 40})
    assert single[1]["AUROC"] == pytest.approx(by_name["NCI", "far"]["AUROC"])


@pytest.mark.parametrize(("name", "space"), [("NCI", None), ("KNN", {"k": [1, 5, 20]}), ("ReAct", None)])
def test_pytorch_ood_grid_search(name, space, model, adapters):
    """Their search chooses what ours would, and runs the model once over each loader."""
    from pytorch_ood.metrics import OODMetrics
    from pytorch_ood.utils import GridSearch

    adapter = adapters.PytorchOOD(detectors.create(name), model)
    validation = [*their_loader(30, 4), *their_loader(30, 5, ood=True)]
    search = GridSearch(adapter, their_loader(60, 0), validation, hyperparameter_space=space)
    best = search.run()
    assert model.passes == 4 + 4  # batches of the two loaders, whatever the number of candidates
    assert adapter.get_hyperparameters() == best
    assert len(search.results_) == len(next(iter((space or detectors.find(name).grid).values())))
    for trial in search.results_:
        literal = detectors.create(name, **trial["params"]).fit(model, their_loader(60, 0))
        scored = OODMetrics()
        for x, y in validation:
            scored.update(-literal.score(model, x), y)
        assert trial["score"] == pytest.approx(scored.compute()["AUROC"], abs=1e-6)


# ---- OpenOOD


def their_batches(x: torch.Tensor, label: torch.Tensor) -> list[dict]:
    """Mappings as OpenOOD's image lists give them."""
    return [
        {
            "image_name": [f"{start + i}.png" for i in range(len(part))],
            "data": part,
            "data_aux": part,
            "label": label[start : start + 16],
            "soft_label": torch.zeros(len(part), C),
            "index": torch.arange(start, start + len(part)),
            "pred": "",
            "conf": 0,
        }
        for start, part in zip(range(0, len(x), 16), x.split(16), strict=True)
    ]


class Evaluator:
    """See the docstring of the file. Not kept of theirs: CUDA, data, tables."""

    def __init__(self, net: nn.Module, postprocessor: Postprocessor, loaders: dict) -> None:
        postprocessor.setup(net, loaders["id"], loaders["ood"])
        self.net, self.postprocessor, self.loaders = net, postprocessor, loaders
        self.tried: list[tuple[list, float]] = []
        if postprocessor.APS_mode and not postprocessor.hyperparam_search_done:
            self.hyperparam_search()
        self.net.eval()

    def auroc(self, id_loader, ood_loader) -> float:
        _, id_conf, id_gt = self.postprocessor.inference(self.net, id_loader, False)
        _, ood_conf, ood_gt = self.postprocessor.inference(self.net, ood_loader, False)
        label = np.concatenate([id_gt, -1 * np.ones_like(ood_gt)])
        conf = np.concatenate([id_conf, ood_conf])
        return metrics.auroc(conf[label >= 0], conf[label < 0])

    def hyperparam_search(self) -> None:
        combinations = [
            list(values[::-1]) for values in itertools.product(*reversed(self.postprocessor.args_dict.values()))
        ]
        best = max_auroc = 0
        for i, hyperparam in enumerate(combinations):
            self.postprocessor.set_hyperparam(hyperparam)
            auroc = self.auroc(self.loaders["id"]["val"], self.loaders["ood"]["val"])
            self.tried.append((hyperparam, auroc))
            if auroc > max_auroc:
                best, max_auroc = i, auroc
        self.postprocessor.set_hyperparam(combinations[best])
        self.postprocessor.hyperparam_search_done = True

    def eval_ood(self) -> dict[str, float]:
        self.net.eval()
        return {
            name: self.auroc(self.loaders["id"]["test"], loader) for name, loader in self.loaders["ood"]["far"].items()
        }


@pytest.fixture
def loaders():
    def inside(n, seed):
        return their_batches(images(n, seed), torch.arange(n) % C)

    def outside(n, seed, shift):
        return their_batches(images(n, seed, shift), torch.full((n,), -1))

    return {
        "id": {"train": inside(60, 0), "val": inside(30, 1), "test": inside(40, 2)},
        "ood": {"val": outside(30, 3, 1.0), "near": {}, "far": {"a": outside(40, 4, 2.0), "b": outside(33, 5, 0.5)}},
    }


@pytest.mark.filterwarnings("ignore:ODIN. no Normalize found")
@pytest.mark.parametrize("name", ANY_MODEL)
def test_openood_evaluator(name, model, loaders):
    """Setup, search, evaluation, for every detector; every number is that of detectors fitted one by one."""
    start = detectors.create(name, **SETTINGS.get(name, {}))
    postprocessor = Postprocessor(start, args_dict=SMALL_GRIDS.get(name))
    assert postprocessor.APS_mode == bool(postprocessor.args_dict)
    assert name in SMALL_GRIDS or list(postprocessor.args_dict) == list(start.grid)
    evaluator = Evaluator(model, postprocessor, loaders)
    fit_on = loaders["id"]["val" if start.fits_on == "validation" else "train"]
    pairs = [(batch["data"], batch["label"]) for batch in fit_on]

    def literal(settings: dict, id_loader, ood_loader) -> float:
        detector = type(start)(**{**start.settings(), **settings}).fit(model, pairs)
        inside, outside = (
            torch.cat([detector.score(model, batch["data"]) for batch in loader]) for loader in (id_loader, ood_loader)
        )
        return metrics.auroc(inside, outside)

    tried = {tuple(values): auroc for values, auroc in evaluator.tried}
    n_candidates = int(np.prod([len(values) for values in postprocessor.args_dict.values()]))
    assert len(tried) == (n_candidates if postprocessor.APS_mode else 0)
    for values, auroc in list(tried.items())[:8]:
        settings = dict(zip(postprocessor.args_dict, values, strict=True))
        expected = literal(settings, loaders["id"]["val"], loaders["ood"]["val"])
        assert auroc == pytest.approx(expected, abs=1e-5)
    chosen = {name: getattr(postprocessor.args, name) for name in postprocessor.args_dict}
    assert all(tried[tuple(chosen.values())] >= auroc for auroc in tried.values())
    for dataset, auroc in evaluator.eval_ood().items():
        expected = literal(chosen, loaders["id"]["test"], loaders["ood"]["far"][dataset])
        assert auroc == pytest.approx(expected, abs=1e-5)


def test_openood_postprocess_and_inference(model, loaders):
    postprocessor = Postprocessor(NCI(), APS_mode=False)
    postprocessor.setup(model, loaders["id"], loaders["ood"])
    literal = NCI().fit(model, [(batch["data"], batch["label"]) for batch in loaders["id"]["train"]])
    data = loaders["id"]["test"][0]["data"]
    model.train()
    predicted, confidence = postprocessor.postprocess(model, data)
    assert model.training
    torch.testing.assert_close(confidence, literal.score(model, data))
    assert torch.equal(predicted, model.eval()(data).argmax(1))
    predicted, confidence, label = postprocessor.inference(model, loaders["id"]["test"], progress=True)
    assert [array.shape for array in (predicted, confidence, label)] == [(40,)] * 3
    assert predicted.dtype.kind == label.dtype.kind == "i"
    assert confidence.dtype == np.float32
    np.testing.assert_array_equal(label, np.arange(40) % C)


def test_openood_search_runs_the_net_once_a_loader(model, loaders):
    """Whatever the number of candidates: one pass to fit, one over each validation set."""
    Evaluator(model, Postprocessor(NCI()), loaders)
    assert model.passes == sum(len(x) for x in (loaders["id"]["train"], loaders["id"]["val"], loaders["ood"]["val"]))


def test_openood_search_leaves_out_what_does_not_fit(model, loaders):
    """60 training images of 16 features: OpenOOD's own grids hold what no such data allow."""
    knn = Evaluator(model, Postprocessor(KNN(k=3)), loaders).postprocessor
    assert knn.args_dict == {"k": [50]}
    assert knn.args.k == 50
    vim = Evaluator(model, Postprocessor(detectors.ViM(), args_dict={"dim": [4, 1000, 8]}), loaders)
    assert vim.postprocessor.args_dict == {"dim": [4, 8]}
    assert [values for values, _ in vim.tried] == [[4], [8]]
    guide = Postprocessor(detectors.NNGuide(), args_dict={"k": [3, 40, 100], "fraction": [1.0, 0.5]})
    evaluator = Evaluator(model, guide, loaders)  # 40 of half of 60 is too many, 100 always
    assert 100 not in guide.args_dict["k"]
    assert len(evaluator.tried) == len(guide.args_dict["k"]) * len(guide.args_dict["fraction"]) == 2
    with pytest.raises(ValueError, match="ViM: dim: got 256, expected less than 16"):
        Postprocessor(detectors.ViM()).setup(model, loaders["id"], loaders["ood"])
    few = Postprocessor(detectors.NNGuide())  # k = 100 of the hundredth that is kept
    with pytest.warns(UserWarning, match="NNGuide: k: the default of 100 does not fit, .* takes 60"):
        few.setup(model, loaders["id"], loaders["ood"])
    assert few.inference(model, loaders["id"]["test"], False)[1].shape == (40,)
    again = Postprocessor(KNN())
    again.setup(model, loaders["id"], loaders["ood"])
    many = [{"data": images(300, 7), "label": torch.arange(300) % C}]
    again.setup(model, {"train": many}, {})
    assert again.args_dict == {"k": [50, 100, 200]}, "each setup begins with all candidates"


def test_openood_without_a_search_scores_one_candidate(model, loaders, monkeypatch):
    """`OODEvaluator` never says that the search is done, and may make none."""
    scored = []
    score_loader = detectors.DetectorSet.score_loader

    def counting(self, *args):
        scored.append(len(self))
        return score_loader(self, *args)

    monkeypatch.setattr(detectors.DetectorSet, "score_loader", counting)
    test = [loaders["id"]["test"], *loaders["ood"]["far"].values()]
    start = detectors.GEN()
    postprocessor = Postprocessor(start)
    postprocessor.setup(model, loaders["id"], loaders["ood"])
    for loader in test:
        postprocessor.inference(model, loader, False)
    assert scored == [1, 1, 1]
    evaluator = Evaluator(model, postprocessor, loaders)
    assert scored[3:] == [42, 42], "the two of the search"
    postprocessor.hyperparam_search_done = False
    settings = postprocessor.args
    for loader in test:
        _, got, _ = postprocessor.inference(model, loader, False)
        literal = detectors.GEN(gamma=settings.gamma, M=settings.M)
        expected = torch.cat([literal.score(model, batch["data"]) for batch in loader])
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5)
    assert scored[5:] == [1, 1, 1]
    assert len(evaluator.tried) == 42


class Preprocessed(torch.utils.data.Dataset):
    """As OpenOOD's ImglistDataset holds its preprocessor, and this the transform of torchvision."""

    def __init__(self, x, std) -> None:
        self.x, self.transform_image = (
            x,
            types.SimpleNamespace(
                transform=types.SimpleNamespace(transforms=[str, types.SimpleNamespace(mean=[0.5] * 3, std=std)])
            ),
        )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return {"data": self.x[index], "label": index % C}


@pytest.mark.parametrize("subset", [False, True])
def test_openood_odin_takes_the_deviation_of_the_images(subset, model):
    std = [0.25, 0.5, 0.2]
    dataset = Preprocessed(images(20, 1), std)
    loader = DataLoader(torch.utils.data.Subset(dataset, range(20)) if subset else dataset, batch_size=8)
    postprocessor = Postprocessor(detectors.ODIN(), APS_mode=False)
    postprocessor.setup(model, {"train": loader}, {})
    assert postprocessor.args.std == tuple(std)
    expected = detectors.ODIN(std=std).score(model, images(20, 1))
    np.testing.assert_allclose(postprocessor.inference(model, loader, False)[1], expected.numpy(), rtol=1e-5)
    for detector in (detectors.ODIN(), detectors.IODIN(), detectors.LayerMahalanobis()):
        searched = Postprocessor(detector, args_dict={"eps": [0.0, 0.0028]})
        searched.setup(model, {"train": loader}, {})
        searched.set_hyperparam([0.0028])
        assert (type(searched.detector), searched.args.std) == (type(detector), tuple(std))
    own = Postprocessor(detectors.ODIN(std=(1, 1, 1)), APS_mode=False)
    own.setup(model, {"train": loader}, {})
    assert own.args.std == (1, 1, 1), "what is given stays"
    with pytest.warns(UserWarning, match=r"pass ODIN\(std=\.\.\.\)"):
        Postprocessor(detectors.ODIN(), APS_mode=False).setup(model, {"train": []}, {})


def test_openood_parameters(model, loaders):
    postprocessor = Postprocessor(NCI(alpha=0.01), args_dict={"alpha": [0.01, 0.5], "proximity": [True, False]})
    assert postprocessor.args.alpha == 0.01
    assert postprocessor.APS_mode
    assert not postprocessor.hyperparam_search_done
    postprocessor.setup(model, loaders["id"], loaders["ood"])
    assert postprocessor.get_hyperparam() == [0.01, True]
    postprocessor.set_hyperparam([0.5, False])
    assert postprocessor.get_hyperparam() == [0.5, False]
    assert postprocessor.detector.fitted
    with pytest.raises(ValueError, match=r"hyperparam: got \[0\.7, True\], expected one of"):
        postprocessor.set_hyperparam([0.7, True])
    single = Postprocessor(KNN(), args_dict={"k": [2, 5]})
    single.set_hyperparam([5])
    assert single.get_hyperparam() == 5
    assert not Postprocessor(MSP()).APS_mode
    with pytest.raises(TypeError, match="detector: got type, expected a detector of ood_fast"):
        Postprocessor(MSP)


def test_openood_a_fitted_detector_is_taken_as_it_is(model, loaders):
    detector = FDBD().fit_features(torch.randn(9, M), head=model.fc)
    mean = detector.mean
    postprocessor = Postprocessor(detector, APS_mode=False)
    postprocessor.setup(model, {}, {})
    assert postprocessor.detector.mean is mean
    assert postprocessor.postprocess(model, images(3, 0))[1].shape == (3,)


def test_openood_derives_from_theirs_where_it_is_installed(monkeypatch):
    """Their `Evaluator` asks for an instance of `BasePostprocessor`, whose `__init__` wants a configuration."""

    class BasePostprocessor:
        def __init__(self, config) -> None:
            raise AssertionError("there is no configuration")

    theirs = types.ModuleType("openood.postprocessors")
    theirs.BasePostprocessor = BasePostprocessor
    monkeypatch.setitem(sys.modules, "openood", types.ModuleType("openood"))
    monkeypatch.setitem(sys.modules, "openood.postprocessors", theirs)
    monkeypatch.delitem(sys.modules, "ood_fast.interop.openood")
    adapter = importlib.import_module("ood_fast.interop.openood").Postprocessor(NCI())
    assert isinstance(adapter, BasePostprocessor)
    assert adapter.config is None


def test_pytorch_ood_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    monkeypatch.delitem(sys.modules, "ood_fast.interop.pytorch_ood", raising=False)
    with pytest.raises(ImportError, match=r"needs pytorch-ood 0\.4 or newer: pip install pytorch-ood"):
        importlib.import_module("ood_fast.interop.pytorch_ood")
