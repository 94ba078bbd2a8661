"""The search for parameters: the best AUROC on validation data wins, and the model runs no more often for it."""

from __future__ import annotations

import pytest
import torch
from detector_cases import NAMES, C, M, Net, make
from torch import nn

from ood_fast import checks, detectors, metrics
from ood_fast.detectors import NCI, DetectorSet
from ood_fast.detectors.search import Search, tune

X = torch.randn(60, 6)
Y = torch.arange(60) % C


def test_the_best_auroc_wins_and_the_first_of_equals():
    # pScore is 1 for all four, and the norm decides: any alpha above 0 separates perfectly.
    inside, outside = torch.tensor([[9.0, 0.0], [0.0, 8.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    for grid, best in (((1e-4, 1e-3, 1e-2, 1e-1), 1e-4), ((0.0, 0.1), 0.1), ((0.0,), 0.0)):
        search = Search(DetectorSet([NCI(alpha=5.0)]), {"NCI": {"alpha": grid}})
        search.fit_features(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), head=(torch.eye(2), None))
        outside_scores = search.score_features(outside, torch.eye(2))
        chosen, trials = search.choose(search.score_features(inside, torch.eye(2)), {"far": outside_scores})
        assert chosen["NCI"].alpha == best
        assert [trial.settings["alpha"] for trial in trials["NCI"]] == (list(grid) if len(grid) > 1 else [])


def test_sets_count_alike():
    """The mean over the OOD sets, whatever their sizes."""
    search = Search(DetectorSet(["FeatureNorm"]), {"FeatureNorm": {"p": (1.0, 2.0)}})
    first, second = search.names
    one, other = torch.tensor([0.0]), torch.tensor([2.0])
    # p=1 wins on the small set, p=2 on the large one by less.
    inside = {first: torch.tensor([1.0]), second: torch.tensor([1.0])}
    outside = {
        "small": {first: one, second: other},
        "large": {first: torch.tensor([0.0, 2.0, 2.0, 2.0]), second: torch.tensor([0.0, 0.0, 0.0, 2.0])},
    }
    chosen, trials = search.choose(inside, outside)
    assert [trial.auroc for trial in trials["FeatureNorm"]] == pytest.approx([(1 + 0.25) / 2, (0 + 0.75) / 2])
    assert chosen["FeatureNorm"].p == 1.0


class CountingNet(Net):
    n_passes = 0

    def forward(self, x):
        self.n_passes += 1
        return super().forward(x)


GRIDS = {"KNN": {"k": (1, 5)}, "ViM": {"dim": (2, 4)}, "NECO": {"dim": (2, 4)}, "NNGuide": {"k": (1, 5)}}


def test_all_candidates_of_all_detectors_in_one_pass_over_each_set():
    net = CountingNet()
    chosen = DetectorSet({name: make(name) for name in NAMES})
    grids = {name: grid for name, grid in GRIDS.items() if name in NAMES}
    near, far = [torch.randn(20, 6) + 1], [torch.randn(10, 6) * 3, torch.randn(7, 6)]
    fitted, trials = tune(chosen, net, [(X, Y)], [(X + 0.1, Y)], {"near": near, "far": far}, grids=grids)
    on_validation = any(make(name).fits_on == "validation" for name in NAMES)
    assert net.n_passes == 1 + on_validation + 1 + 1 + 2  # to fit on the two sets; to score validation, near and far
    assert fitted.names == chosen.names
    assert {name for name, tried in trials.items() if tried} == {
        name for name in NAMES if len(list(make(name).variants(grids.get(name)))) > 1
    }
    # What was found is what a user finds who tries one candidate after the other.
    for name, tried in trials.items():
        for trial in tried[:2]:
            alone = detectors.create(name, **{**make(name).settings(), **trial.settings})
            alone.fit(net, [(X, Y)] if alone.fits_on == "train" else [(X + 0.1, Y)])
            inside = alone.score(net, X + 0.1)
            each = [torch.cat([alone.score(net, x) for x in loader]) for loader in (near, far)]
            expected = sum(metrics.auroc(inside, scores) for scores in each) / 2
            assert trial.auroc == pytest.approx(expected, abs=1e-9), name


def test_what_cannot_be_tuned():
    with pytest.raises(checks.UserError, match="unknown detector of the set 'KNNN'; known: KNN; did you mean 'KNN'"):
        Search(DetectorSet(["KNN"]), {"KNNN": {"k": (1,)}})
    with pytest.raises(ValueError, match="ood_validation: got no set"):
        tune(DetectorSet(["MSP"]), nn.Linear(M, C), [X], [X], {})


def test_candidates_that_do_not_fit_the_data_take_no_part():
    """60 training features: of OpenOOD's k only 50 has as many neighbours; of ViM's dimensions none is below 12."""
    net = Net()
    far = {"far": [torch.randn(10, 6) * 3]}
    fitted, trials = tune(DetectorSet(["KNN"]), net, [(X, Y)], [(X, Y)], far)
    assert fitted["KNN"].k == 50
    assert trials["KNN"] == []  # one candidate is no choice
    fitted.fit(net, [(X, Y)])
    with pytest.raises(ValueError, match="k: got 50, expected at most 40"):
        fitted.fit(net, [(X[:40], Y[:40])])
    with pytest.warns(UserWarning, match=f"ViM: dim: the default of 256 does not fit, .* takes {M - 1}, the largest"):
        fitted, trials = tune(DetectorSet(["ViM"]), net, [(X, Y)], [(X, Y)], far)
    assert (fitted["ViM"].dim, trials["ViM"]) == (M - 1, [])
    with pytest.raises(ValueError, match="ViM: dim: got 256, expected less than 12"):
        tune(DetectorSet(["ViM"]), net, [(X, Y)], [(X, Y)], far, grids={"ViM": {"dim": (256,)}})


def test_an_empty_grid_keeps_what_a_detector_was_given():
    far = {"far": [torch.randn(10, 6) * 3]}
    for grids, k in (({"KNN": {}}, 10), ({"KNN": {"k": (3,)}}, 3), (None, 50)):
        fitted, trials = tune(DetectorSet([detectors.KNN(k=10, alpha=0.5)]), Net(), [X], [X], far, grids=grids)
        assert (fitted["KNN"].k, fitted["KNN"].alpha) == (k, 0.5)
        assert trials["KNN"] == []


def test_what_is_left_out_is_told():
    """Of 60 training features with width 12, KNN has one candidate of five, ViM none; MSP has nothing to fit."""
    z, head = torch.randn(60, M), nn.Linear(M, C).requires_grad_(False)
    data = (z, head(z), Y, head)
    grids = {"ViM": {"dim": (256, 1000)}}
    search = Search(DetectorSet(["MSP", "KNN", "ViM"]), grids, optional=True).fit_features(*data)
    assert search.left_out == []
    scores = search.score_features(z, head(z))
    assert list(scores) == ["MSP 0", "KNN 0"]
    assert [note.partition(": got ")[0] for note in search.left_out] == [
        *(f"KNN: k={k} left out: k" for k in (100, 200, 500, 1000)),
        "ViM: left out: dim",
    ]
    winners, _ = search.choose(scores, {"far": scores})
    assert list(winners) == ["MSP", "KNN"]
    search.leave_out()
    assert len(search.left_out) == 5, "told once"
    with pytest.raises(ValueError, match="ViM: dim: got 256"):
        Search(DetectorSet(["MSP", "ViM"]), grids).fit_features(*data).leave_out()
    with pytest.warns(UserWarning, match="takes 11, the largest"):
        own = Search(DetectorSet(["ViM"])).fit_features(*data)
    own.leave_out()
    assert [note.partition(": got ")[0] for note in own.left_out] == [
        "ViM: dim=256 does not fit the data: 11 is taken, the largest that does",
        "ViM: dim=1000 left out: dim",
    ]


def test_a_fit_in_parts_leaves_out_the_same():
    """As `ood-fast fit` does: the candidates are fitted in sets of their own."""
    z, head = torch.randn(60, M), nn.Linear(M, C).requires_grad_(False)
    search = Search(DetectorSet(["KNN", "ReAct"]))
    for name in ("KNN", "ReAct"):
        search.only([candidate for candidate in search if candidate.startswith(name)]).fit_features(z, head(z), Y, head)
    assert list(search.score_features(z, head(z))) == ["KNN 0", *(f"ReAct {index}" for index in range(4))]
