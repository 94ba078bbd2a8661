"""A detector class of somebody else: it need not think of dtypes, and a part that it leaves out is named."""

from __future__ import annotations

import pytest
import torch
from detector_cases import C, M, Net
from torch import nn

import ood_fast
from ood_fast.detectors import Detector, DetectorSet, streaming

X = torch.randn(40, 6)
Y = torch.arange(40) % C


class NearestMean(Detector):
    needs_features = True
    state = ("means",)

    def __init__(self, dtype: str = "as it comes") -> None:
        super().__init__()
        self.dtype = dtype

    def gathers(self):
        return {"means": streaming.ClassMeans()}

    def _finish(self, means):
        self.means = means.value() if self.dtype == "as it comes" else means.value().float()

    def _score(self, features, logits):
        return -torch.cdist(features, self.means).amin(dim=1)


@pytest.mark.parametrize("dtype", ["as it comes", "float32"])
def test_features_come_in_the_dtype_of_its_state(dtype):
    net = Net().eval()
    detector = NearestMean(dtype).fit(net, [(X, Y)])
    z = net.backbone(X).detach()
    want = -torch.cdist(z.double(), torch.stack([z[Y == k].mean(0) for k in range(C)]).double()).amin(dim=1)
    for scores in (detector.score(net, X), detector.score_features(z.double()), detector.score_features(z)):
        torch.testing.assert_close(scores.double(), want, rtol=1e-4, atol=1e-5)
    assert detector.score_features(z.bfloat16()).shape == (40,)
    loader = [(X, Y)]
    found = ood_fast.evaluate(net, loader, {"far": loader}, fit=loader, detectors={"mine": NearestMean(dtype)})
    assert [row["value"] for row in found.rows() if (row["metric"], row["set"]) == ("auroc", "far")] == [0.5]


def test_a_parameter_that_is_false_or_a_number():
    def init(self, clip: float | bool = False, sharp: bool = False) -> None:
        Detector.__init__(self)
        self.clip, self.sharp = clip, sharp

    mine = of(__init__=init, _score=lambda self, z, f: f.amax(1))
    assert mine(clip=0.5).settings() == {"clip": 0.5, "sharp": False}
    with pytest.raises(TypeError, match=r"sharp: got 0\.5, expected True or False"):
        mine(sharp=0.5)


def of(**parts):
    return type("Mine", (Detector,), {"__module__": __name__, "needs_logits": True, **parts})


def test_what_a_class_leaves_out_is_named():
    gathers, score = (lambda self: {"mean": streaming.FeatureMean()}), lambda self, z, f: f.amax(1)
    with pytest.raises(TypeError, match="Mine: has gathers, but names no buffers in state"):
        of(gathers=gathers, _score=score)()
    with pytest.raises(TypeError, match="Mine: has no _finish, which fills mean"):
        of(gathers=gathers, _score=score, state=("mean",))()
    with pytest.raises(TypeError, match=r"Mine.state: got the string 'mean', expected a tuple"):
        of(gathers=gathers, _score=score, state="mean")()
    with pytest.raises(TypeError, match=r"Mine.grid: 'tt' is no parameter"):
        of(_score=score, grid={"tt": (1, 2)})()
    cls = of(gathers=gathers, _finish=lambda self, mean: None, _score=score, state=("mean",), needs_features=True)
    for one in (cls(), DetectorSet({"mine": cls()})):
        with pytest.raises(TypeError, match="Mine: _finish left mean unset"):
            one.fit(Net(), [X])

    class Lost(Detector):
        def __init__(self, p: float = 1.0) -> None:
            super().__init__()
            self.power = p

    with pytest.raises(TypeError, match="Lost: keeps no attribute p"):
        Lost().settings()


@pytest.mark.parametrize("score", [lambda f: f, lambda f: f.amax(1, keepdim=True), lambda f: f.sum(), lambda f: 1.0])
def test_a_score_that_is_not_one_number_a_row_names_the_detector(score):
    detector = of(_score=lambda self, z, f: score(f))()
    with pytest.raises(TypeError, match=r"Mine: its score is of .*, expected \(40,\)"):
        detector.score(Net(), X)
    with pytest.raises(TypeError, match="Mine: its score is of"):
        DetectorSet({"a": detector}).score(Net(), X)


def test_a_score_of_nan():
    with pytest.raises(ValueError, match="logits: row 0, of 40 such, scores NaN by this Mine"):
        of(_score=lambda self, z, f: f.amax(1) * torch.nan)().score(Net(), X)


def test_it_is_exported():
    net = nn.Sequential(nn.Linear(6, M), nn.ReLU(), nn.Linear(M, C)).eval()

    class Exported(NearestMean):  # cdist is one operation up to 25 rows and another beyond
        def _score(self, features, logits):
            return -torch.linalg.vector_norm(features.unsqueeze(1) - self.means, dim=2).amin(dim=1)

    detector = Exported().fit(net, [(X, Y)])
    deployed = ood_fast.deploy(net, detector.calibrate(detector.score(net, X)))
    program = torch.export.export(deployed, (X,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},)).module()
    torch.testing.assert_close(program(X[:7])[1], detector.score(net, X[:7]))
