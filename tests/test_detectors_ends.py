"""Detectors on numbers at the ends of float32, on features that do not vary, and on logits far from 0."""

from __future__ import annotations

import copy

import pytest
import torch
from detector_cases import NAMES, C, M, make
from torch import nn

from ood_fast import checks, deploy, detectors, metrics
from ood_fast.detectors import KNN, NCI, NECO, ODIN, Detector, DetectorSet, Mahalanobis, fitting, load


def data(n: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    z, W = torch.randn(n, M).relu() + 0.1, torch.randn(C, M)
    return z, z @ W.T, torch.arange(n) % C, W


def fitted(name: str) -> tuple[Detector, torch.Tensor]:
    z, f, y, W = data()
    return make(name).fit_features(z, f, y, (W, None)), W


@pytest.mark.parametrize("size", [1.9e19, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("name", NAMES)
def test_rows_too_long_for_float32_are_right_or_refused(name, size):
    """Of the order of float64's score, or a ValueError that names the row; -inf for what is further than float32."""
    detector, W = fitted(name)
    z = torch.randn(5, M)
    z[3] = size * torch.rand(M)
    f = (z.double() @ W.double().T).float()
    try:
        scores = detector.score_features(z, f)
    except ValueError as error:
        assert "the first is row 3" in str(error)  # noqa: PT017
        return
    exact = detector.double().score_features(z.double(), f.double())
    within = exact[3].abs() < torch.finfo(torch.float32).max
    torch.testing.assert_close(
        scores[3].double(), exact[3] if within else exact[3].sign() * torch.inf, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).gathers() and make(name).needs_features])
def test_training_rows_too_long_are_refused(name):
    z, f, y, W = data()
    z[7] = 1e20
    with pytest.raises(ValueError, match=r"features: got numbers beyond 2.0e\+17 in 1 of 60 rows, the first is row 7"):
        make(name).fit_features(z, f, y, (W, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs_head])
def test_a_head_that_is_no_numbers_is_refused(name, bad):
    z, f, y, W = data()
    W[2, 1] = bad
    with pytest.raises(ValueError, match=r"head: W: got (NaN|inf) in 1 of 5 rows, the first is row 2"):
        make(name).fit_features(z, f, y, (W, None))
    with pytest.raises(ValueError, match="head: b: got NaN or inf"):
        make(name).fit_features(z, f, y, (W.nan_to_num(0.0, 0.0), torch.tensor([0.0, bad, 0.0, 0.0, 0.0])))


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("dead", ["zero", "constant", "repeated"])
def test_neco_takes_no_directions_that_rounding_left(rank, scale, dead):
    z = torch.randn(80, M) * scale
    z[:, rank:] = {"zero": 0.0, "constant": 0.1 * scale, "repeated": z[:, :1] if rank else 0.3}[dead]
    with pytest.raises(ValueError, match=rf"NECO: dim: got {rank + 1}, but the training features vary in {rank} "):
        NECO(dim=rank + 1).fit_features(z)
    if rank:
        whole, parts = NECO(dim=rank).fit_features(z), NECO(dim=rank)
        for rows in torch.randperm(80).split(7):
            parts.partial_fit(z[rows])
        queries, logits = torch.randn(9, M) * scale, torch.rand(9, 4)
        parts.finalize()
        torch.testing.assert_close(
            whole.score_features(queries, logits), parts.score_features(queries, logits), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-3, 1234.567])
@pytest.mark.parametrize("name", ["Mahalanobis", "RMDS"])
def test_constant_features_give_no_direction(name, value):
    scores = (
        make(name)
        .fit_features(torch.full((97, M), value), None, torch.arange(97) % C)
        .score_features(torch.randn(5, M))
    )
    assert (scores == 0).all()


def test_a_feature_that_varies_little_still_counts():
    z = 1 + 1e-5 * torch.randn(200, M)
    scores = Mahalanobis().fit_features(z, None, torch.arange(200) % C).score_features(z)
    assert -3 * M < scores.mean() < -M / 3


def test_one_direction_is_the_same_bits_from_a_file(tmp_path):
    z, f, *_ = data()
    detector = NECO(dim=1).fit_features(z, f)
    detector.save(tmp_path / "it")
    assert torch.equal(load(tmp_path / "it").score_features(z, f), detector.score_features(z, f))


# Scores of gaps between logits; the two left out score a level, the one standardised, the other times a share.
SHIFTED = tuple(n for n in NAMES if make(n).needs_logits and not make(n).needs_features and n not in ("SML", "OpenMax"))


def rates(scores: torch.Tensor, n: int) -> tuple[float, float]:
    found = metrics.detection(scores[:n], scores[n:])
    return found["auroc"], found["fpr95_id_positive"]


@pytest.mark.parametrize("top", [20.0, 300.0, 1e3])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", [name for name in SHIFTED if name not in ("MaxLogit", "Energy")])
def test_scores_of_gaps_keep_their_digits_far_from_0(name, top, together):
    """Two logits whose gap decides: as with the top at 0, to what rounding the logits themselves costs."""
    n = 4000
    generator = torch.Generator().manual_seed(0)
    gaps = 2.5 * torch.randn(2 * n, generator=generator) + torch.tensor([9.0, 7.5]).repeat_interleave(n)
    gaps = (gaps.clamp(min=0) * 1024).round() / 1024  # exact beside 1e3 in float32
    near = torch.stack([torch.zeros_like(gaps), -gaps], 1)
    near[::3] = near[::3].flip(1)
    targets = near.argmax(1)
    targets[::5] = 1 - targets[::5]
    detector = detectors.create(name).fit_features(None, near, targets, (torch.eye(2), None))

    def scored(logits: torch.Tensor) -> torch.Tensor:
        if together:
            return DetectorSet([detector, "MaxLogit" if name != "MaxLogit" else "MSP"]).score_features(None, logits)[
                name
            ]
        return detector.score_features(None, logits)

    assert rates(scored(near + top), n) == pytest.approx(rates(scored(near), n), abs=1e-3)


def test_nan_is_out():
    detector = detectors.MSP().calibrate(torch.rand(100))
    assert detector.is_ood(torch.tensor([float("nan"), float("inf"), -float("inf")])).tolist() == [True, True, True]


# ---- logits that all have something added


CATALOGUE = (*NAMES, "NECO raw", "GEN of all", "MSP at 3", "TemperedMSP of norm", "KNN + L1")
LEVELS = (
    "MaxLogit",
    "Energy",
    "ReAct",
    "ASH",
    "SCALE",
    "ViM",
    "NECO",
    "NNGuide",
    "VRA",
    "DICE",
    "LTS",
    "SML",
    "OpenMax",
)  # a level moves with the logits


def of_catalogue(name: str) -> Detector:
    others = {
        "NECO raw": lambda: NECO(dim=4, use_max_logit=False),
        "GEN of all": lambda: detectors.GEN(M=None),
        "MSP at 3": lambda: detectors.MSP(temperature=3.0),
        "TemperedMSP of norm": lambda: detectors.TemperedMSP("norm"),
        "KNN + L1": lambda: detectors.KNN(k=5, alpha=0.1),
    }
    return others[name]() if name in others else make(name)


class Shifted(torch.nn.Module):
    """A classifier whose head has `shift` added to its bias."""

    def __init__(self, W: torch.Tensor, shift: float) -> None:
        super().__init__()
        self.body, self.fc = torch.nn.Identity(), torch.nn.Linear(M, C)
        self.fc.weight.data, self.fc.bias.data = W.clone(), torch.full((C,), shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


@pytest.fixture(scope="module")
def shifts() -> dict:
    """Features, inside and outside, whose logits float32 rounds by up to 3e-5 beside 1e3; models by shift."""
    g = torch.Generator().manual_seed(5)
    W = torch.randn(C, M, generator=g)
    centre = 1.2 * W[torch.arange(3000) % C]
    z = torch.cat([centre[:1500] + torch.randn(1500, M, generator=g), torch.randn(1500, M, generator=g).abs()])
    y = (z @ W.T).argmax(1)
    return {"z": z, "y": y, "models": {shift: Shifted(W, shift).eval() for shift in (0.0, 300.0, 1e3, -1e3)}}


def scores_of(detector: Detector, model: torch.nn.Module, shifts: dict, way: str) -> torch.Tensor:
    z, y, loader = shifts["z"], shifts["y"], [(shifts["z"][:1500], shifts["y"][:1500])]
    if way == "set":
        together = DetectorSet({"it": detector, "MSP": "MSP", "MaxLogit": "MaxLogit", "NCI": "NCI"})
        return together.fit(model, loader).score(model, z)["it"]
    if way == "pytorch-ood":
        pytest.importorskip("pytorch_ood")
        from ood_fast.interop.pytorch_ood import PytorchOOD

        return -PytorchOOD(detector, model).fit(loader)(z)
    if way == "openood":
        from ood_fast.interop.openood import Postprocessor

        postprocessor = Postprocessor(detector, APS_mode=False)
        batches = [{"data": z[:1500], "label": y[:1500]}]
        postprocessor.setup(model, {"train": batches}, {})
        return torch.from_numpy(postprocessor.inference(model, [{"data": z, "label": y}], False)[1])
    detector.fit(model, loader)
    if way == "alone":
        return detector.score(model, z)
    detector.threshold = torch.tensor(0.0)
    deployed = deploy(model, detector)
    if way == "export":
        deployed = torch.export.export(deployed, (z,)).module()
    if way == "onnx":
        deployed = torch.onnx.export(deployed, (z,), dynamo=True, verbose=False)
    return deployed(z)[1]


def assert_rates_stay(name: str, way: str, shift: float, shifts: dict) -> None:
    """Of a detector whose score is another one with another bias (a share times a level, ViM's origin W⁺b), as in
    float64. Where a score is a level, its own digits at that size count too."""
    found = rates(scores_of(of_catalogue(name), shifts["models"][shift], shifts, way), 1500)
    if name in ("NECO", "NNGuide", "ViM", "Residual", "LTS", "OpenMax", "TemperedMSP of norm"):
        exact = copy.deepcopy(shifts["models"][shift]).double()
        wide = {**shifts, "z": shifts["z"].double()}
        expected = rates(scores_of(of_catalogue(name), exact, wide, "alone"), 1500)
    else:
        expected = rates(scores_of(of_catalogue(name), shifts["models"][0.0], shifts, "alone"), 1500)
    assert found == pytest.approx(expected, abs=2e-3 if name in LEVELS else 1e-3)


@pytest.mark.parametrize(
    ("way", "shift"),
    [*((way, 1e3) for way in ("alone", "set", "pytorch-ood", "openood", "deploy")), ("set", 300.0), ("set", -1e3)],
)
@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.filterwarnings("ignore:.*class [0-9]")
def test_a_constant_added_to_all_logits_moves_no_rate(name, way, shift, shifts):
    assert_rates_stay(name, way, shift, shifts)


@pytest.mark.parametrize("way", ["export", "onnx"])
@pytest.mark.parametrize("name", ["MSP", "GEN of all", "TemperedMSP", "ReAct"])
def test_nor_in_a_program(name, way, shifts):
    if way == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert_rates_stay(name, way, 1e3, shifts)


def test_errors_name_the_row_of_all_data(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4)).eval()
    z, y = torch.rand(8, 3), torch.arange(8) % 4
    bad = z.clone()
    bad[6, 1] = torch.nan
    fitted = NCI().fit(model, [z])
    given = [bad[:0], bad[:2], bad[2:4], bad[4:]]
    for call in (
        lambda: NCI().fit(model, given),
        lambda: fitted.score(model, given),
        lambda: DetectorSet([fitted]).score(model, given),
        lambda: ODIN().score(model, given),
    ):
        with pytest.raises(checks.RowError, match="the first is row 6, ") as error:
            call()
        assert (error.value.row, error.value.in_batch) == (6, 2)
    monkeypatch.setattr(fitting, "FIT_CHUNK", 4)
    with pytest.raises(ValueError, match="the first is row 6, "):
        KNN(k=1).fit_features(bad)
    y[7] = 10**12
    for logits in (torch.rand(8, 4), None):
        with pytest.raises(ValueError, match="targets: got 1000000000000 in row 7, expected class indices in "):
            Mahalanobis().fit_features(z, logits, y)


def test_short_rows_are_told_by_all_of_them():
    z = torch.rand(6, 3)
    scores = NCI().fit_features(torch.cat([1e-30 * z, z]), head=(W := torch.eye(3), None)).score_features(z)
    parts = NCI().partial_fit(1e-30 * z).partial_fit(z).finalize((W, None))
    torch.testing.assert_close(parts.score_features(z), scores)
    with pytest.raises(ValueError, match=r"features: got rows of length .* at most, expected some of"):
        NCI().partial_fit(1e-30 * z).partial_fit(0 * z).finalize((W, None))


@pytest.mark.parametrize("name", ["MaxLogit", "SML", "NNGuide", "ViM", "LTS"])
def test_logits_that_ran_over_are_not_the_most_in_distribution(name):
    z, f, y = torch.randn(60, 8).relu(), torch.randn(60, 4), torch.arange(60) % 4
    settings = {"NNGuide": {"k": 3, "fraction": 1.0}, "ViM": {"dim": 3}}
    detector = detectors.create(name, **settings.get(name, {})).fit_features(z, f, y, head=(torch.randn(4, 8), None))
    f[7, 2] = torch.inf
    for score in (detector.score_features, detectors.DetectorSet([detector, "MSP"]).score_features):
        with pytest.raises(ValueError, match="logits: got inf in 1 of 60 rows, the first is row 7"):
            score(z, f)
