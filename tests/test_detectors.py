"""The contract that all detectors share; the formulas of each are in the file of its family."""

from __future__ import annotations

import pytest
import torch
from detector_cases import FITTED, GATHERING, HEADED, IN_FLOAT64, NAMES, C, M, N, Net, classes_of, make
from torch import nn

import ood_fast
from ood_fast import checks, detectors, registry
from ood_fast.commands.common import detector_set
from ood_fast.detectors import KNN, NCI, Detector, Mahalanobis
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


# ---- every detector


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
    assert scores.dtype == (torch.float64 if name in IN_FLOAT64 else torch.float32)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
    assert make(name).to("cpu", torch.float64).needs_fit == detector.needs_fit  # nothing to cast yet


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs_are_scored_in_float32_or_better(name, head, train_features, features):
    logits = head(train_features)
    detector = make(name)
    detector.fit_features(train_features.bfloat16(), logits.bfloat16(), classes_of(logits), head.float())
    z, f = features.bfloat16(), head(features.float()).bfloat16()
    scores = detector.score_features(z, f)
    assert scores.dtype == (torch.float64 if name in IN_FLOAT64 else torch.float32)
    expected = detector.score_features(z.float(), f.float())
    torch.testing.assert_close(scores, expected, rtol=2e-2, atol=2e-2)


# ---- corners


@pytest.mark.parametrize("name", NAMES)
def test_zero_features_and_features_at_the_mean_are_not_nan(name, head, train_features):
    detector = fitted(name, head, train_features)
    z = torch.stack([torch.zeros(M, dtype=torch.float64), train_features.mean(dim=0)])
    scores = detector.score_features(z, head(z))
    assert scores.isfinite().all()


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
    with pytest.raises(checks.UserError, match=r"'xyz'; known: .*MSP.*WeiPer; one of your own needs --plugin MODULE$"):
        detectors.create("xyz")
    short = checks.unknown("loss", "loss03", [f"loss{i}" for i in range(checks.SHORT_LIST)])
    assert short.endswith("loss9; one of your own needs --plugin MODULE; did you mean 'loss3'?"), (
        "behind a list that is read at a glance"
    )


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


def test_true_or_false_is_no_text_and_dtypes_have_names():
    for call in (lambda: KNN(squared="no"), lambda: Mahalanobis(half="false"), lambda: NCI(1e-3, 1, "no")):
        with pytest.raises(TypeError, match="expected True or False"):
            call()
    for text, expected in {"no": False, "False": False, "true": True, "1": True}.items():
        assert detector_set("KNN", [f"KNN.squared={text}"], False)["KNN"].squared is expected
    for text in ("float16", "torch.float16"):
        assert detector_set("KNN", [f"KNN.dtype={text}"], False)["KNN"].dtype == torch.float16
    assert detector_set("KNN", ["KNN.dtype=None"], False)["KNN"].dtype is None
    for text in ("squared=maybe", "dtype=int8", "dtype=float17", "dtype=device"):
        with pytest.raises(checks.UserError, match=f"--set.*{text.partition('=')[0]}"):
            detector_set("KNN", [f"KNN.{text}"], False)


@pytest.mark.parametrize("name", GATHERING)
def test_a_batch_that_is_refused_leaves_nothing_behind(name, head, train_features):
    logits, targets = head(train_features), torch.arange(100) % C
    fitted, other = make(name), make(name)
    wrong = targets[50:].clone()
    wrong[-1] = C
    nan = train_features[50:].clone()
    nan[-1, -1] = torch.nan
    for detector in (fitted, other):
        detector.partial_fit(train_features[:50], logits[:50], targets[:50])
    refused = [(train_features[50:], logits[50:], wrong), (nan, logits[50:], targets[50:])]
    refused += [(train_features[50:], logits[50:], targets[51:]), (train_features[50:, 1:], logits[50:, 1:], wrong)]
    if any("targets" in part.reads for part in other.gathered.values()):
        for batch in refused:
            with pytest.raises(ValueError, match=r"features|targets|logits"):
                other.partial_fit(*batch)
    for detector in (fitted, other):
        detector.partial_fit(train_features[50:], logits[50:], targets[50:]).finalize(head)
    assert all(torch.equal(a, b) for a, b in zip(fitted.buffers(), other.buffers(), strict=True))
