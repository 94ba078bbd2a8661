"""Data that lack something for a detector: classes, rows, features, a second logit."""

from __future__ import annotations

import warnings

import pytest
import torch
from detector_cases import NAMES, C, M, Net, make
from torch import nn

from ood_fast import deploy, detectors
from ood_fast.detectors import (
    KNN,
    NECO,
    RMDS,
    SHE,
    CombOOD,
    DetectorSet,
    KLMatching,
    Mahalanobis,
    NNGuide,
    Residual,
    ViM,
    conformal_threshold,
    fitting,
    load,
    tpr_threshold,
)
from ood_fast.detectors.search import Search

N = 40


def data(n: int = N, m: int = M) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple]:
    z, W = torch.randn(n, m), torch.randn(C, m)
    f = z @ W.T
    return z, f, f.argmax(1), (W, None)


def fitted_on(detector, z, f, y, head, rows):
    return detector.fit_features(z[rows], f[rows], y[rows], head)


# ---- classes


@pytest.mark.parametrize("name", ["Mahalanobis", "RMDS", "SHE", "KLMatching"])
@pytest.mark.parametrize("in_set", [False, True])
def test_classes_that_were_not_seen_are_told_once(name, in_set):
    z, f, y, head = data(200)
    rows = (y != 1) & (y != 4)
    detector = DetectorSet([name, "MSP"]) if in_set else make(name)
    with pytest.warns(
        UserWarning, match=rf"{make(name).label}: no .* class 1, 4[ :].*; fit on data of all classes"
    ) as told:
        fitted_on(detector, z, f, y, head, rows)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(name).fit_features(z, f, y, head)


def test_many_classes_are_counted_and_names_are_used():
    z, y = torch.randn(40, M), torch.arange(40) % 2 * 50
    detector = Mahalanobis()
    detector.class_names = ("cat", "dog")
    with pytest.warns(UserWarning, match=r"no training sample of class 'dog', 2, 3, .* and 39 more: "):
        detector.fit_features(z, None, y)


@pytest.mark.parametrize("kind", [Mahalanobis, RMDS])
def test_one_sample_a_class_has_no_covariance(kind):
    z, y = torch.randn(C, M), torch.arange(C)
    with pytest.raises(ValueError, match=r"targets: got one training sample a class, expected two or more"):
        kind().fit_features(z, None, y)
    assert kind(ridge=1.0).fit_features(z, None, y).score_features(torch.randn(4, M)).unique().numel() == 4
    kind().fit_features(torch.randn(C + 1, M), None, torch.tensor([*range(C), 0]))


def test_she_needs_something_right():
    z, f, y, head = data()
    with pytest.raises(ValueError, match="SHE: targets: got no training sample that is classified correctly"):
        SHE().fit_features(z, f, (y + 1 + torch.arange(N) % 4) % C, head)


def test_a_binary_classifier_with_one_logit_has_two_classes():
    z, y = torch.randn(N, M), torch.arange(N) % 2
    expected = Mahalanobis().fit_features(z, None, y).score_features(z)
    found = Mahalanobis().fit_features(z, torch.randn(N, 1), y).score_features(z)
    torch.testing.assert_close(found, expected)


# ---- thresholds


@pytest.mark.parametrize("low", [-torch.inf, torch.inf])
def test_a_threshold_at_infinity_is_refused(low):
    scores = torch.cat([torch.full((20,), low), torch.randn(80)])
    for call in (
        lambda: tpr_threshold(scores, 0.95 if low < 0 else 0.1),
        lambda: conformal_threshold(scores, 0.1 if low < 0 else 0.9),
        lambda: SHE().calibrate(scores, tpr=0.95 if low < 0 else 0.1),
    ):
        with pytest.raises(ValueError, match=rf"scores: got {low} in 20 of 100, so that it would be the threshold"):
            call()
    few = torch.cat([torch.full((3,), -torch.inf), torch.randn(97)])  # below the threshold like any other
    assert tpr_threshold(few, 0.95).isfinite()
    assert conformal_threshold(few, 0.05).isfinite()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_a_threshold_that_is_no_number_is_not_kept(value, tmp_path):
    detector = detectors.MSP()
    detector.threshold = torch.tensor(value)
    with pytest.raises(ValueError, match=r"threshold: got .*, expected a number"):
        detector.save(tmp_path / "it")
    with pytest.raises(ValueError, match=r"threshold: got .*, expected a number"):
        deploy(Net(), detector)


# ---- one logit, no features, features below 0


@pytest.mark.parametrize("name", ["ASH", "SCALE"])
def test_features_below_0_are_told_where_a_fit_sees_them(name):
    z, f, y, head = data()
    with pytest.warns(UserWarning, match=f"{name}: features: got some below 0, expected those after a ReLU") as told:
        DetectorSet([name, "NCI"]).fit_features(z, f, y, head)
    assert len(told) == 1
    alone = make(name).fit_features(None, None, None, head)  # sees no features
    with pytest.warns(UserWarning, match=f"{name}: features: got some below 0") as told:
        alone.score_features(z, f), alone.score_features(z, f)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relu = z.relu()
        make(name).fit_features(None, None, None, head).score_features(relu, f)
        DetectorSet([name, "NCI", "GradNorm"]).fit_features(relu, relu @ head[0].T, y, head)
        DetectorSet(["NCI", "GradNorm", "LTS"]).fit_features(z, f, y, head)


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs_logits or make(name).needs_head])
def test_one_logit_is_refused_by_all_that_read_logits_or_a_head(name):
    z, W = torch.randn(N, M), torch.randn(1, M)
    with pytest.raises(ValueError, match=r"one logit a row, expected .* give two, \[0, f\]"):
        make(name).fit_features(z, z @ W.T, torch.zeros(N).long(), (W, None)).score_features(z, z @ W.T)


@pytest.mark.parametrize("name", ["KNN", "Mahalanobis", "RMDS", "FeatureNorm"])
def test_one_logit_does_not_matter_to_features(name):
    z, f = torch.randn(N, M), torch.randn(N, 1)
    scores = make(name).fit_features(z, f, torch.arange(N) % 2).score_features(z, f)
    torch.testing.assert_close(
        scores, DetectorSet({"it": make(name)}).fit_features(z, f, torch.arange(N) % 2)(z, f)["it"]
    )


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs_features])
def test_no_features_are_refused(name):
    z, f, y, head = data()
    with pytest.raises(
        ValueError, match=r"features: got shape \(40, 0\), expected at least one feature|head: got W of"
    ):
        make(name).fit_features(z[:, :0], f, y, head).score_features(z[:, :0], f)
    with pytest.raises(ValueError, match=r"features: got shape \(40, 0\), expected at least one feature"):
        make(name).fit_features(z, f, y, head).score_features(z[:, :0], f)


# ---- parameters


@pytest.mark.parametrize(
    ("detector", "most"),
    [(KNN, N), (NNGuide, N), (CombOOD, N), (ViM, M - 1), (Residual, M - 1), (NECO, M - 1)],
)
def test_a_default_takes_the_largest_that_fits(detector, most):
    name, parameter = detector.__name__, "k" if "k" in detector().settings() else "dim"
    default = getattr(detector(), parameter)
    given = data()
    z, f, *_ = given
    together = DetectorSet([name, "MSP"])
    with pytest.warns(
        UserWarning, match=rf"{name}: {parameter}: the default of {default} does not fit, .* takes {most}"
    ) as told:
        together.fit_features(*given)
    assert len(told) == 1
    assert getattr(together[name], parameter) == most
    fixed = detector(**{parameter: most}, **({"fraction": 1.0} if detector is NNGuide else {})).fit_features(*given)
    torch.testing.assert_close(together.score_features(z, f)[name], fixed.score_features(z, f))
    with pytest.raises(ValueError, match=rf"{name}: {parameter}: got {default}, "):
        DetectorSet([detector(**{parameter: default})]).fit_features(*given)
    with pytest.warns(UserWarning, match=rf"takes {most}, the largest") as told:
        alone = detector().fit_features(*given)
    assert len(told) == 1
    torch.testing.assert_close(alone.score_features(z, f), fixed.score_features(z, f))
    big = data(1000, 600)
    together.fit_features(*big)
    assert getattr(together[name], parameter) == default, "a larger fit has its default"


def test_the_largest_is_that_of_the_directions_and_not_of_the_width():
    z, f, y, head = data()
    z[:, 5:] = 0
    with pytest.warns(UserWarning, match="takes"):
        fitted = DetectorSet([NECO(), ViM()]).fit_features(z, f, y, head)
    assert (fitted["NECO"].dim, fitted["ViM"].dim) == (5, 4)
    with pytest.raises(ValueError, match=r"NECO: dim: got 100, .* no dim fits such data"):
        DetectorSet(["NECO"]).fit_features(torch.ones(N, M), f)


def test_a_set_that_was_lowered_is_loaded_as_it_is(tmp_path):
    given = data()
    with pytest.warns(UserWarning, match="takes"):
        fitted = DetectorSet(["KNN", "ViM"]).fit_features(*given)
    fitted.save(tmp_path / "set")
    loaded = load(tmp_path / "set")
    assert (loaded["KNN"].k, loaded["ViM"].dim) == (N, M - 1)
    for name, scores in loaded.score_features(*given[:2]).items():
        torch.testing.assert_close(scores, fitted[name].score_features(*given[:2]))


def test_nnguide_keeps_k_rows_of_few():
    """A hundredth of 300 features is three: as many as neighbours are kept, the same whatever the batches."""
    z, f, y, head = data(300)
    fitted = DetectorSet(["NNGuide"]).fit_features(z, f, y, head)
    assert fitted["NNGuide"].bank.shape == (100, M)
    parts = DetectorSet(["NNGuide"])
    for rows in torch.randperm(300).split(17):
        parts.partial_fit(z[rows], f[rows])
    parts.finalize()
    torch.testing.assert_close(parts.score_features(z, f), fitted.score_features(z, f))
    many = data(30_000, 3)
    assert 200 < len(DetectorSet(["NNGuide"]).fit_features(*many)["NNGuide"].bank) < 400, "a hundredth"


def test_a_search_lowers_its_smallest_candidate_and_says_so():
    given = data()
    with pytest.warns(UserWarning, match="ViM: dim: the default of 256 does not fit"):
        search = Search(DetectorSet(["ViM", "KNN"])).fit_features(*given)
    scores = search.score_features(*given[:2])
    winners, _ = search.choose(scores, {"far": scores})
    assert (winners["ViM"].dim, winners["KNN"].k) == (M - 1, N)
    assert [note.kind for note in search.left_out] == ["lowered", "lowered", *["left out"] * 5]
    with pytest.raises(ValueError, match="ViM: dim: got 11, expected less than 4"):
        winners.fit_features(*data(N, 4))  # what a search has chosen is no default
    assert KLMatching().given == frozenset()


@pytest.mark.parametrize("wrong", ["order", "bias", None])
def test_logits_that_the_head_does_not_make_are_told(wrong, recwarn):
    torch.manual_seed(0)
    z, head = torch.randn(200, M).relu(), nn.Linear(M, C).requires_grad_(False)
    logits = head(z)
    given = {"order": logits.flip(0), "bias": logits + 1, None: logits.bfloat16().float()}
    detectors.NCI().fit_features(z, given[wrong], None, head)
    told = [
        str(each.message)
        for each in recwarn
        if "NCI: logits: they are not F.linear(features, W, b)" in str(each.message)
    ]
    assert len(told) == (wrong is not None)


# ---- what a fit belongs to


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_set_by_hand_is_as_if_made_with_it_or_refused(name):
    """At every parameter that has another value: nothing fitted with the old one meets the new one."""
    torch.manual_seed(0)
    z, f, y, head = data()
    fit = lambda one: one.fit_features(z, f, y, head) if one.needs_fit else one  # noqa: E731
    for parameter, old in make(name).settings().items():
        words = ["mean", "features", "s", "tied", "cosine"]
        kinds = {bool: [not old], int: [3, 4], float: [0.5, 70.0, 2.0], str: words}
        for value in kinds.get(type(old), [None, torch.float64, 3]):
            try:
                other = fit(make(name).changed(**{parameter: value})).score_features(z, f)
            except (ValueError, TypeError):
                continue
            one = fit(make(name))
            before = one.score_features(z, f)
            one.calibrate(before)
            if value != old:
                with pytest.raises(RuntimeError, match=f"was fitted or calibrated with .*{parameter}=.*: make it with"):
                    make(name).changed(**{parameter: value}).load_state_dict(one.state_dict())
            if one.needs_fit and (one.state or not one.needs_head):
                with pytest.raises(ValueError, match=f"{parameter}: got .* after a fit with"):
                    setattr(one, parameter, value)
                assert torch.equal(one.score_features(z, f), before)
            else:
                setattr(one, parameter, value)
                assert one.threshold is None
                assert parameter in one.given
                torch.testing.assert_close(one.score_features(z, f), other)


@pytest.mark.filterwarnings("ignore:KNN")
def test_a_state_dict_belongs_to_parameters(tmp_path):
    z, f, y, head = data()
    one = KNN(dtype=torch.float16).fit_features(z[:20])  # k is lowered to 20
    torch.save(one.state_dict(), tmp_path / "state.pt")
    fresh = KNN(dtype=torch.float16)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert fresh.k == 20
    one.changed().load_state_dict(one.state_dict())  # with the k that was taken
    assert fresh.fit_features(z).k == one.fit_features(z).k == 40, "the default is back, and lowered anew"
    both = DetectorSet({"near": KNN(k=3), "ash": detectors.ASH(p=90)}).fit_features(z, f, y, head)
    other = DetectorSet({"near": KNN(k=4), "ash": detectors.ASH(p=65)})
    with pytest.raises(RuntimeError, match=r"detectors\.0: was fitted or calibrated with k=3, this KNN has k=4"):
        other.load_state_dict(both.state_dict())
    assert torch.equal(other["ash"].score_features(z), detectors.ASH(p=65).fit_features(None, head=head)(z))


def test_a_parameter_set_by_hand_is_checked_and_begins_no_second_fit():
    one = detectors.GEN()
    with pytest.raises(ValueError, match="gamma: got -1"):
        one.gamma = -1
    assert one.gamma != -1
    layers = detectors.NAC()
    layers.layers = ("backbone",)
    assert layers.needs_model, "what is made of a parameter follows it"
    started = KNN(k=3).partial_fit(data()[0])
    with pytest.raises(ValueError, match=r"dtype: got .* after a fit with None"):
        started.dtype = torch.float16
    assert started.finalize().k == 3
    ensemble = detectors.Ensemble("KNN", {"k": 3}).fit([Net(), Net()], [torch.randn(N, 6)])
    with pytest.raises(ValueError, match="size: got 3 after a fit with 2"):
        ensemble.size = 3


@pytest.mark.parametrize("by", ["features", "model", "set"])
def test_targets_in_another_order_than_the_logits_are_refused(by):
    torch.manual_seed(1)
    z, head = torch.randn(200, M), nn.Linear(M, C, bias=False)
    y = head(z).argmax(1)
    y[::5] = 0
    fits = {
        "features": lambda y: Mahalanobis().fit_features(z, head(z).detach(), y, head),
        "model": lambda y: Mahalanobis().fit(nn.Sequential(head), [(z, y)]),
        "set": lambda y: DetectorSet(["KNN", "SHE"]).fit(
            nn.Sequential(head), zip(z.split(50), y.split(50), strict=True)
        ),
    }
    fits[by](y)
    with pytest.raises(ValueError, match=r"targets are not in the order of the model's classes.*0 -> 1.*number the"):
        fits[by]((y - 1) % C)
    KNN(k=3).fit(nn.Sequential(head), [(z, (y - 1) % C)])  # reads no targets
    with pytest.warns(UserWarning, match=r"accuracy .*, no better than chance \(20.0 %\)"):
        fits[by](y[torch.randperm(200, generator=torch.Generator().manual_seed(0))])  # of other rows


@pytest.mark.parametrize("most", [C - 1, C])
def test_more_classes_than_are_counted_fit_and_join(monkeypatch, most):
    monkeypatch.setattr(fitting, "MOST_COUNTED", most)
    z, f, y, head = data(200)
    assert Mahalanobis().fit_features(z, f, y, head).fitted
    whole, *ranks = (fitting.Confusion(most=most) for _ in range(3))
    for part, rows in zip((whole, *ranks), (slice(None), slice(80), slice(80, None)), strict=True):
        part.take(None, f[rows], y[rows])
    ranks[0].join(ranks[1])
    assert ranks[0].rows == 200
    if most < C:
        assert ranks[0].counts is None
    else:
        assert torch.equal(ranks[0].counts, whole.counts)
        assert whole.counts.sum() == 200


@pytest.mark.parametrize("change", [lambda f: f.softmax(1), lambda f: f.log_softmax(1), lambda f: f.softmax(1).half()])
def test_probabilities_in_place_of_logits_are_refused(change):
    z, f, y, head = data(200)
    given = change(f)
    calls = [
        lambda: detectors.MSP().score_features(None, given),
        lambda: detectors.Energy().score_features(None, given),
        lambda: DetectorSet(["MSP", "GEN"]).score_features(None, given),
        lambda: KLMatching().fit_features(None, given),
        lambda: Mahalanobis().fit_features(z, given, y),
        lambda: detectors.FDBD().fit_features(z, f, y, head).score_features(z, given),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"logits: got .* of probabilities|logits: got .* are probabilities"):
            call()
    detectors.MSP().score_features(None, torch.tensor([[0.3, 0.7]]))  # one row may sum to 1 by chance
