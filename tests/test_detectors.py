"""Detectors against independent transcriptions of their formulas, and the contract that they share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detector_cases import FITTED, GATHERING, HEADED, NAMES, C, M, N, Net, classes_of, make
from torch import nn

import ood_fast
from ood_fast import checks, detectors, registry
from ood_fast.detectors import Detector
from ood_fast.detectors.streaming import FeatureMean


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(M, C).double().requires_grad_(False)


@pytest.fixture
def train_features() -> torch.Tensor:
    return torch.randn(100, M, dtype=torch.float64).relu() + 0.3


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(N, M, dtype=torch.float64).relu()


def fitted(name: str, head: nn.Linear, train_features: torch.Tensor) -> Detector:
    logits = head(train_features)
    return make(name).fit_features(train_features, logits, classes_of(logits), head)


# ---- formulas, one sample at a time with scalars


def msp(z, f, head, train):
    return max(math.exp(value) for value in f) / sum(math.exp(value) for value in f)


def energy(z, f, head, train):
    return math.log(sum(math.exp(value) for value in f))


def feature_norm(z, f, head, train):
    return math.sqrt(sum(value**2 for value in z))


def training_mean(train):
    return [sum(column) / len(train) for column in zip(*train, strict=True)]


def nci(z, f, head, train):
    weight = head.weight.tolist()[f.index(max(f))]
    centred = [value - mean for value, mean in zip(z, training_mean(train), strict=True)]
    length = math.sqrt(sum(value**2 for value in centred))
    return sum(w * d for w, d in zip(weight, centred, strict=True)) / length + 1e-4 * sum(abs(value) for value in z)


def fdbd(z, f, head, train):
    weights, p = head.weight.tolist(), f.index(max(f))
    total = sum(abs(f[p] - f[j]) / math.dist(weights[p], weights[j]) for j in range(len(f)) if j != p)
    return total / math.dist(z, training_mean(train))


def knn(z, f, head, train):
    def unit(vector):
        length = math.hypot(*vector)
        return [value / length for value in vector]

    return -sorted(math.dist(unit(z), unit(other)) ** 2 for other in train)[7 - 1]


FORMULAS = {
    "MSP": msp,
    "MaxLogit": lambda z, f, head, train: max(f),
    "Energy": energy,
    "FeatureNorm": feature_norm,
    "NCI": nci,
    "FDBD": fdbd,
    "KNN": knn,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_are_those_of_the_formula(name, head, train_features, features):
    logits = head(features)
    scores = fitted(name, head, train_features).score_features(features, logits)
    train = train_features.tolist()
    expected = [FORMULAS[name](z, f, head, train) for z, f in zip(features.tolist(), logits.tolist(), strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_energy_temperature():
    logits = torch.tensor([[1.0, 3.0], [-200.0, 900.0]], dtype=torch.float64)
    scores = detectors.Energy(temperature=2.0).score_features(None, logits)
    expected = [2 * math.log(math.exp(0.5) + math.exp(1.5)), 900.0]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("p", "expected"), [(1, 7.0), (2, 5.0), (float("inf"), 4.0)])
def test_feature_norm_order(p, expected):
    assert detectors.FeatureNorm(p=p).score_features(torch.tensor([[3.0, -4.0, 0.0]])).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_far_away_inputs_score_lower_than_training_inputs(name, train_features):
    # Weights along the class means, features near them: what every method takes for in-distribution.
    directions = torch.eye(C, M, dtype=torch.float64)
    inside = 5 * directions.repeat(20, 1) + 0.1 * torch.randn(20 * C, M, dtype=torch.float64)
    outside = 0.5 * torch.randn(30, M, dtype=torch.float64)
    head = nn.Linear(M, C, bias=False).double()
    head.weight.data.copy_(directions)
    logits = inside @ directions.T
    detector = make(name).fit_features(inside, logits, logits.argmax(dim=1), head)
    inside_scores = detector.score_features(inside, inside @ directions.T)
    outside_scores = detector.score_features(outside, outside @ directions.T)
    assert inside_scores.mean() > outside_scores.mean()


# ---- fitting: three ways, one result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_targets", [True, False], ids=["(x, y) batches", "x batches"])
def test_fit_on_a_model_is_fit_on_its_features(name, with_targets):
    net, x = Net().train(), torch.randn(50, 6)
    y = torch.randint(C, (50,))
    if not with_targets and any("targets" in part.reads for part in make(name).gathers().values()):
        with pytest.raises(ValueError, match=f"{make(name).label}: targets: got None"):
            make(name).fit(net, [x])
        return
    loader = [(x[:32], y[:32]), (x[32:], y[32:])] if with_targets else [x[:32], x[32:]]
    by_model = make(name).fit(net, loader)
    assert net.training, "the mode of the model must be restored"
    assert net.backbone[1].num_batches_tracked == 0, "fitting must not train the BatchNorm"

    net.eval()
    with torch.no_grad():
        z = net.backbone(x)
        by_features = make(name).fit_features(z, net.fc(z), y, net.fc)
        expected = by_features.score_features(z, net.fc(z))
    torch.testing.assert_close(by_model.score(net, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FITTED)
def test_batches_of_any_size_give_the_same_fit(name, head, train_features, features):
    whole = fitted(name, head, train_features)
    pieces = make(name)
    targets = classes_of(head(train_features))
    for rows in torch.arange(100).split([1, 60, 39]):
        pieces.partial_fit(train_features[rows], head(train_features[rows]), targets[rows])
    pieces.finalize((head.weight, head.bias))
    torch.testing.assert_close(
        pieces.score_features(features, head(features)), whole.score_features(features, head(features))
    )


@pytest.mark.parametrize("name", FITTED)
def test_a_second_fit_forgets_the_first(name, head, train_features, features):
    detector = fitted(name, head, train_features)
    other = train_features[:30] + 1
    detector.fit_features(other, head(other), classes_of(head(other)), head)
    expected = fitted(name, head, other).score_features(features, head(features))
    torch.testing.assert_close(detector.score_features(features, head(features)), expected)


@pytest.mark.parametrize("name", GATHERING)
def test_a_fit_that_failed_leaves_nothing_behind(name, head, train_features, features):
    detector = make(name)

    def broken():
        yield torch.randn(8, 6), torch.arange(8) % C
        raise OSError("disk gone")

    net = Net()
    with pytest.raises(OSError, match="disk gone"):
        detector.fit(net, broken())
    assert net.training
    logits = head(train_features)
    detector.fit_features(train_features, logits, classes_of(logits), head)
    expected = fitted(name, head, train_features).score_features(features, head(features))
    torch.testing.assert_close(detector.score_features(features, head(features)), expected)


def test_the_model_is_set_back_before_a_failure_of_the_detector_is_seen():
    class Broken(FeatureMean):
        def update(self, features, logits, targets):
            raise ZeroDivisionError

    class BrokenKNN(detectors.KNN):
        def gathers(self):
            return {"bank": Broken()}

    net = Net()
    try:
        BrokenKNN().fit(net, [torch.randn(8, 6)])
    except ZeroDivisionError:
        assert net.training
        assert not net.fc._forward_pre_hooks
    else:
        pytest.fail("the error was swallowed")


@pytest.mark.parametrize("name", FITTED)
def test_fitting_copies_what_it_keeps(name, head, train_features, features):
    logits = head(features)
    detector = fitted(name, head, train_features)
    before = detector.score_features(features, logits)
    train_features.zero_()
    head.weight.zero_()
    torch.testing.assert_close(detector.score_features(features, logits), before)


def test_running_mean_keeps_its_digits_over_many_rows():
    # In float32 a sum of 1e6 ones of size 1e4 + 0.1 loses the tenth.
    running = FeatureMean()
    for _ in range(100):
        running.take(torch.full((10_000, 3), 1e4 + 0.125), None, None)
    assert running.value().dtype == torch.float32
    torch.testing.assert_close(running.value(), torch.full((3,), 1e4 + 0.125), rtol=0, atol=0)


# ---- state


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_restores_a_fresh_detector(name, head, train_features, features):
    detector = fitted(name, head, train_features)
    fresh = make(name)
    fresh.load_state_dict(detector.state_dict())
    assert fresh.fitted
    logits = head(features)
    assert torch.equal(fresh.score_features(features, logits), detector.score_features(features, logits))


@pytest.mark.parametrize("name", NAMES)
def test_casting_the_module_casts_what_it_keeps(name, head, train_features, features):
    detector = fitted(name, head, train_features)
    expected = detector.score_features(features, head(features))
    scores = detector.float().score_features(features.float(), head(features).float())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs_are_scored_in_float32(name, head, train_features, features):
    logits = head(train_features)
    detector = make(name)
    detector.fit_features(train_features.bfloat16(), logits.bfloat16(), classes_of(logits), head.float())
    z, f = features.bfloat16(), head(features.float()).bfloat16()
    scores = detector.score_features(z, f)
    assert scores.dtype == torch.float32
    expected = detector.score_features(z.float(), f.float())
    torch.testing.assert_close(scores, expected, rtol=2e-2, atol=2e-2)


# ---- corners


@pytest.mark.parametrize("name", NAMES)
def test_zero_features_and_features_at_the_mean_are_not_nan(name, head, train_features):
    detector = fitted(name, head, train_features)
    z = torch.stack([torch.zeros(M, dtype=torch.float64), train_features.mean(dim=0)])
    scores = detector.score_features(z, head(z))
    assert scores.isfinite().all()


def test_knn_with_zero_features():
    detector = detectors.KNN(k=1).fit_features(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    scores = detector.score_features(torch.tensor([[0.0, 0.0], [6.0, 8.0], [-3.0, -4.0]]))
    # zero to zero: 0; the same direction: 0; opposite direction: the zero row is nearer (1) than the other one (4)
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.0, -1.0]), rtol=0, atol=1e-6)


def test_knn_in_chunks_is_knn_at_once(monkeypatch, train_features, features):
    whole = detectors.KNN(k=3).fit_features(train_features).score_features(features)
    monkeypatch.setattr("ood_fast.detectors.neighbour.CHUNK_ELEMENTS", 300)  # 100 rows in the bank: 3 queries a chunk
    chunked = detectors.KNN(k=3).fit_features(train_features).score_features(features)
    assert len(chunked) == N
    torch.testing.assert_close(chunked, whole)


def test_knn_keeps_its_digits_next_to_a_neighbour():
    # Unit vectors 1e-4 apart: their squared distance is 1e-8, of which 2 − 2 cos in float32 keeps nothing.
    bank = torch.tensor([[1.0, 0.0]])
    query = torch.tensor([[1.0, 1e-4]])
    score = detectors.KNN(k=1).fit_features(bank).score_features(query)
    torch.testing.assert_close(score, torch.tensor([-1e-8]), rtol=1e-3, atol=0)


def test_nci_without_logits_predicts_from_the_kept_head(head, train_features, features):
    detector = fitted("NCI", head, train_features)
    torch.testing.assert_close(detector.score_features(features), detector.score_features(features, head(features)))


# ---- errors


@pytest.mark.parametrize("name", FITTED)
def test_scoring_before_fitting_says_what_to_call(name, features):
    with pytest.raises(RuntimeError, match=r"is not fitted: call fit\(model, loader\)"):
        make(name).score_features(features, torch.randn(N, C))
    with pytest.raises(RuntimeError, match="is not fitted"):
        make(name).score(Net(), torch.randn(2, 6))


@pytest.mark.parametrize("name", GATHERING)
def test_no_data_is_an_error(name, head):
    with pytest.raises(ValueError, match="no data to fit on"):
        make(name).fit(Net(), [])
    with pytest.raises(ValueError, match="no data to fit on"):
        make(name).fit_features(torch.empty(0, M), torch.empty(0, C), torch.empty(0, dtype=torch.int64), head)


@pytest.mark.parametrize("name", [name for name in FITTED if detectors.find(name).needs_features])
def test_features_of_another_width_are_refused(name, head, train_features):
    detector = fitted(name, head, train_features)
    with pytest.raises(ValueError, match=rf"features: got shape \(3, {M + 1}\), expected \(n, {M}\)"):
        detector.score_features(torch.randn(3, M + 1, dtype=torch.float64), torch.randn(3, C, dtype=torch.float64))


@pytest.mark.parametrize("name", HEADED)
def test_a_missing_head_is_an_error(name, head, train_features):
    logits = head(train_features)
    with pytest.raises(ValueError, match="head: got None"):
        make(name).fit_features(train_features, logits, classes_of(logits))


@pytest.mark.parametrize("name", GATHERING)
def test_nan_in_training_data_names_the_row(name, head, train_features):
    logits, targets = head(train_features), classes_of(head(train_features))
    train_features[7, 2] = float("nan")
    with pytest.raises(ValueError, match="features: got NaN in 1 of 100 rows, the first is row 7"):
        make(name).fit_features(train_features, logits, targets, head)


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_what_is_scored_names_the_row(name, head, train_features, features):
    detector, logits = fitted(name, head, train_features), head(features)
    for argument, values, reads in (("features", features, "needs_features"), ("logits", logits, "needs_logits")):
        if getattr(detector, reads):
            kept, values[11, 3] = values[11, 3].item(), float("nan")
            with pytest.raises(ValueError, match=f"{argument}: got NaN in 1 of {N} rows, the first is row 11"):
                detector.score_features(features, logits)
            values[11, 3] = kept


LOGIT_ONLY = tuple(name for name in NAMES if not make(name).needs_features and not make(name).needs_fit)


@pytest.mark.parametrize("name", LOGIT_ONLY)
def test_logit_detectors_say_that_they_need_logits(name, features):
    with pytest.raises(TypeError, match="logits: got NoneType"):
        make(name).score_features(features)


def test_more_neighbours_than_features():
    with pytest.raises(ValueError, match="k: got 50, expected at most 20"):
        detectors.KNN().fit_features(torch.randn(20, M))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: detectors.KNN(k=0), ValueError),
        (lambda: detectors.KNN(k=2.0), ValueError),
        (lambda: detectors.Energy(temperature=0.0), ValueError),
        (lambda: detectors.FeatureNorm(p=0.5), ValueError),
        (lambda: detectors.NCI(alpha=-1.0), ValueError),
        (lambda: detectors.NCI(alpha="auto"), TypeError),
    ],
)
def test_bad_parameters(call, error):
    with pytest.raises(error):
        call()


# ---- the head of a model, and what is no model, no loader, no input


class ConvolutionalHead(nn.Module):
    """Its only linear layer is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, M)
        self.logits = nn.Conv2d(M, C, 1)

    def forward(self, x):
        return self.logits(self.hidden(x)[..., None, None]).flatten(1)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, C)
        self.aux = nn.Linear(6, C)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("name", [name for name in GATHERING if make(name).needs_features])
def test_fit_refuses_a_hidden_layer(name):
    message = rf"head: got a layer 6 → {M}, but the logits have shape \(20, {C}\); pass head="
    with pytest.raises(ValueError, match=message):
        make(name).fit(ConvolutionalHead(), [(torch.randn(20, 6), torch.arange(20) % C)])


def test_score_refuses_a_hidden_layer():
    model = ConvolutionalHead().train()
    with pytest.raises(ValueError, match=rf"head: got a layer 6 → {M}, but the logits have shape \(3, {C}\)"):
        detectors.FeatureNorm().score(model, torch.randn(3, 6))
    assert model.training
    assert not model.hidden._forward_pre_hooks


@pytest.mark.parametrize("name", [name for name in FITTED if make(name).needs_features])
def test_the_head_can_be_named_or_given(name):
    model, x, y = TwoHeads(), torch.randn(20, 6), torch.arange(20) % C
    with pytest.raises(ValueError, match=r"pass its name \(a detector takes it as head=\.\.\.\)"):
        make(name).fit(model, [(x, y)])
    named = make(name).fit(model, [(x, y)], head="fc")
    with pytest.raises(ValueError, match="pass its name"):
        named.score(model, x)
    with torch.no_grad():
        logits = model.fc(x)
    expected = make(name).fit_features(x, logits, y, model.fc).score_features(x, logits)
    for head in ("fc", model.fc):
        torch.testing.assert_close(make(name).fit(model, [(x, y)], head=head).score(model, x, head=head), expected)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("fcc", ValueError, "head: unknown layer of TwoHeads 'fcc'; known: aux, fc; did you mean 'fc'"),
        (3, TypeError, r"head: got int 3, expected the name of a layer or an nn\.Linear"),
        (nn.Linear(6, C), ValueError, r"head: the nn\.Linear given is no layer of TwoHeads"),
    ],
)
def test_a_head_that_is_none(head, error, message):
    for call in (detectors.KNN(k=1).fit, detectors.FeatureNorm().score):
        with pytest.raises(error, match=message):
            call(TwoHeads(), torch.randn(2, 6) if call.__name__ == "score" else [torch.randn(2, 6)], head=head)


@pytest.mark.parametrize("name", LOGIT_ONLY)
@pytest.mark.parametrize("model", [ConvolutionalHead(), TwoHeads(), nn.Flatten()], ids=lambda m: type(m).__name__)
def test_what_reads_logits_only_needs_no_head(name, model):
    x = torch.randn(4, 6)
    torch.testing.assert_close(make(name).score(model, x), make(name).score_features(None, model(x)))


def test_targets_that_are_no_tensor_are_left_out():
    net, x = Net().eval(), torch.randn(9, 6)
    expected = detectors.KNN(k=1).fit(net, [x]).bank
    assert torch.equal(detectors.KNN(k=1).fit(net, [(x, ["a.png"] * 9)]).bank, expected)


X = torch.randn(8, 6)
DATASET = torch.utils.data.TensorDataset(X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda detector: detector.fit(None, [X]), r"model: got NoneType, expected an nn\.Module"),
        (lambda detector: detector.score(None, X), r"model: got NoneType, expected an nn\.Module"),
        (lambda detector: detector.fit(Net(), X), "loader: got Tensor, expected an iterable of batches"),
        (lambda detector: detector.fit(Net(), DATASET), "loader: got TensorDataset, expected an iterable of batches"),
        (lambda detector: detector.fit(Net(), 8), "loader: got int, expected an iterable of batches"),
        (lambda detector: detector.fit(Net(), X.numpy()), "loader: got ndarray, expected an iterable of batches"),
        (lambda detector: detector.score(Net(), DATASET), "x: got TensorDataset, expected a tensor, one batch of"),
        (lambda detector: detector.score(Net(), X.numpy()), "x: got ndarray, expected a tensor, one batch of inputs"),
        (lambda detector: detector.score(Net(), None), "x: got NoneType, expected a tensor, .* or an iterable of"),
        (
            lambda detector: detector.score(Net(), [X, torch.arange(8)]),
            r"x: got a list \(x, y\), expected the tensor",
        ),
    ],
)
@pytest.mark.parametrize("name", ["MSP", "KNN"])
def test_what_is_no_model_no_loader_or_no_input(name, call, message):
    with pytest.raises(TypeError, match=message):
        call(make(name))


@pytest.mark.parametrize("name", ["MSP", "KNN"])
def test_a_loader_is_scored_as_its_batches_are(name):
    """A last batch of another size; batches with targets and without; one that gives nothing."""
    net, y = Net().train(), torch.arange(8)
    detector = make(name).fit(net, [X])
    expected = torch.cat([detector.score(net, X[:5]), detector.score(net, X[5:])])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=5)
    torch.testing.assert_close(detector.score(net, loader), expected)
    torch.testing.assert_close(detector.score(net, [X[:5], X[5:]]), expected)
    torch.testing.assert_close(detector.score(net, (x for x in X.split(5))), expected)
    together = detectors.DetectorSet([detector, "Energy"])
    scores = together.score(net, loader)
    torch.testing.assert_close(scores[name], expected)
    torch.testing.assert_close(scores["Energy"], detectors.Energy().score(net, X))
    for scoring in (detector, together):
        with pytest.raises(ValueError, match="x: got a loader without a batch"):
            scoring.score(net, [])
        with pytest.raises(ValueError, match=r"got NaN in \d of 3 rows"):
            scoring.score(net, [X[:5], X[5:] * float("nan")])
        assert net.training


@pytest.mark.parametrize("batch", [{"labels": X}, [], X.numpy(), (X.numpy(), X)])
def test_batches_without_a_tensor(batch):
    net = Net().train()
    with pytest.raises(TypeError, match=r"loader: x of a batch: got .*, expected a tensor; batches are x, "):
        detectors.KNN().fit(net, [batch])
    assert net.training


def test_a_data_set_that_yields_batches_is_a_loader():
    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([X])

    net = Net()
    assert torch.equal(detectors.KNN(k=1).fit(net, Batches()).bank, detectors.KNN(k=1).fit(net, [X]).bank)


# ---- registry


def test_names_are_found_in_any_case():
    assert isinstance(detectors.create("fdbd"), detectors.FDBD)
    assert detectors.create("KNN", k=3).k == 3


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_names_too(name):
    cls = detectors.find(name)
    for written in (cls.label, cls.label.upper(), f" {cls.label.lower()} ", cls.label.replace(" ", "")):
        assert detectors.find(written) is cls


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(checks.UserError, match=r"unknown detector 'enrgy'; did you mean 'Energy'\? known: .*MSP"):
        detectors.create("enrgy")
    with pytest.raises(checks.UserError, match=r"unknown detector 'xyz'; known: .*MSP.*WeiPer$"):
        detectors.create("xyz")
    short = checks.unknown("loss", "loss03", [f"loss{i}" for i in range(checks.SHORT_LIST)])
    assert short.endswith("loss9; did you mean 'loss3'?"), "behind a list that is read at a glance"


def test_an_own_detector_is_registered_by_one_decorator(monkeypatch, features):
    monkeypatch.setitem(registry._ADDED, "detector", dict(registry.added("detector")))

    @detectors.register
    class SecondLogit(Detector):
        needs_logits = True

        def _score(self, features, logits):
            return -logits.topk(2, dim=1).values[:, 1]

    assert "SecondLogit" in detectors.known()
    assert SecondLogit.label == "SecondLogit"
    monkeypatch.setattr(SecondLogit, "label", "Runner-up")
    assert detectors.find("runner-up") is SecondLogit
    scores = detectors.create("secondlogit").score_features(None, torch.tensor([[1.0, 5.0, 3.0]]))
    assert scores.tolist() == [-3.0]


def test_layers_keep_their_own_modes():
    """A BatchNorm that is frozen inside a training model is still frozen afterwards."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
    model.train()
    model[1].eval()
    detectors.NCI().fit(model, [torch.randn(8, 4)])
    assert [module.training for module in model] == [True, False, True]


def test_a_head_with_a_temperature_predicts_as_it_does_in_evaluation():
    head = ood_fast.L2NormLinear(5, 4, tau=0.1).eval()
    with torch.no_grad():
        head.bias.copy_(torch.randn(4) * 3)
    z = torch.randn(200, 5)
    nci = detectors.NCI().fit_features(z, head=head)
    torch.testing.assert_close(nci.score_features(z), nci.score_features(z, head(z)))


def test_nothing_to_fit_on():
    with pytest.raises(ValueError, match="NCI: no data to fit on"):
        detectors.NCI().partial_fit(torch.empty(0, 3)).finalize(torch.nn.Linear(3, 2))


def test_knn_tells_close_neighbours_apart():
    """Unit features 1e-4 apart, as classes have them when they collapse: the right neighbour, to float32's digits."""
    bank = F.normalize(torch.randn(16), dim=0) + 1e-4 * torch.randn(500, 16)
    queries = bank[:20] + 1e-4 * torch.randn(20, 16)
    scores = detectors.KNN(k=10).fit_features(bank).score_features(queries)
    unit_bank, unit = (F.normalize(t, dim=1).double() for t in (bank, queries))
    expected = -(unit[:, None] - unit_bank).square().sum(2).kthvalue(10, dim=1).values
    torch.testing.assert_close(scores.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", GATHERING)
def test_infinite_training_data_names_the_row(name, head, train_features):
    """Half precision overflows to it; means and covariances of it are NaN for every input."""
    detector, logits = make(name), head(train_features)
    targets = classes_of(logits)
    argument = "features" if any("features" in part.reads for part in detector.gathers().values()) else "logits"
    {"features": train_features, "logits": logits}[argument][7, 2] = float("inf")
    with pytest.raises(ValueError, match=f"{argument}: got inf in 1 of 100 rows, the first is row 7"):
        detector.fit_features(train_features, logits, targets, head)


@pytest.mark.parametrize("name", NAMES)
def test_no_score_is_nan_in_silence(name, head, train_features, features):
    """NaN is below no threshold: it would pass for in-distribution."""
    detector = fitted(name, head, train_features)
    for argument in ("features", "logits"):
        given = {"features": features.clone(), "logits": head(features)}
        given[argument][11, 3] = float("inf")
        try:
            assert not detector.score_features(**given).isnan().any()
        except ValueError as error:
            assert f"{argument}: got inf in 1 of {N} rows, the first is row 11" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs_features and make(name).needs_logits])
@pytest.mark.parametrize(("n_features", "n_logits"), [(4, 3), (1, 4), (4, 1)])
def test_features_and_logits_of_other_rows_are_refused(name, n_features, n_logits, head, train_features, features):
    detector = fitted(name, head, train_features)
    with pytest.raises(ValueError, match=f"features: got {n_features} rows, expected {n_logits}, one for each row"):
        detector.score_features(features[:n_features], head(features)[:n_logits])


@pytest.mark.parametrize("name", GATHERING)
@pytest.mark.parametrize("width", [1, 3])
def test_batches_of_other_widths_are_refused(name, width, head, train_features):
    detector, logits = make(name), head(train_features)
    given = {"features": train_features, "logits": logits, "targets": classes_of(logits).clamp(max=width - 1)}
    reads = {read for part in detector.gathers().values() for read in part.reads}
    argument = "features" if "features" in reads else "logits"
    detector.partial_fit(**given)
    other = rf"got shape \(100, {width}\), (expected \(n, \d+\) as in the batch|one logit a row, expected)"
    with pytest.raises(ValueError, match=f"{argument}: {other}"):
        detector.partial_fit(**{**given, argument: given[argument][:, :width]})


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda W, b: W.detach(), TypeError, r"head: got Tensor, expected an nn\.Linear or \(W, b\)"),
        (lambda W, b: (W, b[:-1]), ValueError, rf"b: got shape \({C - 1},\), expected \({C},\) to fit W"),
        (lambda W, b: (W.long(), b), TypeError, "head: W: got dtype torch.int64, expected a floating-point tensor"),
        (lambda W, b: (W[0], b), ValueError, rf"head: W: got shape \({M},\), expected 2 dimensions"),
    ],
)
def test_what_is_no_head(name, change, error, message, head, train_features):
    logits = head(train_features)
    given = (train_features, logits, classes_of(logits))
    with pytest.raises(error, match=message):
        make(name).fit_features(*given, change(head.weight, head.bias))
    with pytest.raises(error, match=message):
        make(name).partial_fit(*given).finalize(change(head.weight, head.bias))


@pytest.mark.parametrize("name", ["NCI", "ViM", "ReAct"])
def test_a_head_of_another_size_is_refused_and_the_right_one_can_follow(name, head, train_features, features):
    logits = head(train_features)
    detector = make(name).partial_fit(train_features, logits, classes_of(logits))
    with pytest.raises(ValueError, match=rf"head: got W of shape \({C}, {M - 1}\), expected \({C}, {M}\) to fit"):
        detector.finalize((head.weight[:, 1:], head.bias))
    detector.finalize(head)
    expected = fitted(name, head, train_features).score_features(features, head(features))
    torch.testing.assert_close(detector.score_features(features, head(features)), expected)
