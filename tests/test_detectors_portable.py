"""What every detector here can do as a module: state_dict, casts, compilation, export, variants over its grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from detector_cases import IN_FLOAT64
from torch import nn

from ood_fast.detectors import (
    ASH,
    DICE,
    DML,
    FDBD,
    GEN,
    GMM,
    LTS,
    MCM,
    MSP,
    NCI,
    SCALE,
    SML,
    VRA,
    BoundaryDistance,
    CombOOD,
    Detector,
    Energy,
    Entropy,
    FeatureNorm,
    GradNorm,
    KLMatching,
    MaxLogit,
    OpenMax,
    ReAct,
    Relation,
    Residual,
    TemperatureScaling,
    TemperedMSP,
    WeiPer,
    boundary,
)

N, C, M = 12, 5, 10
TARGETS = torch.arange(60) % C  # of the training data
DETECTORS = [
    MSP(),
    MSP(temperature=3.0),
    MaxLogit(),
    Energy(),
    Energy(temperature=2.0),
    Entropy(),
    GEN(),
    GEN(M=3),
    GEN(M=3, reduction="mean", clamp=1e-7),
    KLMatching(),
    FeatureNorm(),
    FeatureNorm(p=1, of="logits"),
    FeatureNorm(p=3),
    NCI(),
    NCI(p=2),
    NCI(proximity=False),
    FDBD(),
    FDBD(reduction="mean", denominator="norm"),
    BoundaryDistance(),
    BoundaryDistance(average="classes"),
    TemperedMSP(),
    TemperedMSP("norm"),
    TemperedMSP(2.0, of="features"),
    ReAct(),
    ASH(),
    ASH(variant="s"),
    ASH(variant="p"),
    SCALE(),
    VRA(),
    VRA(95, 5, below="zero"),
    DICE(),
    LTS(),
    SML(),
    GradNorm(),
    TemperatureScaling(),
    DML(),
    MCM(),
    Residual(dim=4),
    GMM(),
    GMM("tied"),
    OpenMax(),
    CombOOD(k=3),
    Relation(),
    WeiPer(repeats=3),
]
detectors = pytest.mark.parametrize("prototype", DETECTORS, ids=repr)


def copy(detector: Detector) -> Detector:
    return type(detector)(**detector.settings())


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(M, C).requires_grad_(False)


@pytest.fixture
def features() -> torch.Tensor:
    z = torch.randn(N, M).relu()
    z[0] = 0
    return z


def fitted(prototype: Detector, head: nn.Linear) -> Detector:
    z = torch.randn(60, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64).relu().to(head.weight.dtype)
    return copy(prototype).fit_features(z, head(z), TARGETS, head)


def test_a_state_without_what_may_be_absent_replaces_it(head, features):
    """Of an older version, which kept no `boundaries`, or of a head too large for a table: into a fitted detector."""
    detector = BoundaryDistance().fit_features(None, head=head)
    other = nn.Linear(M, C).requires_grad_(False)
    other.weight[1] = other.weight[0]
    for absent in ({"boundaries"}, {"table", "boundaries"}):
        loaded = BoundaryDistance().fit_features(None, head=other)
        loaded.load_state_dict({name: t for name, t in detector.state_dict().items() if name not in absent})
        assert all(getattr(loaded, name) is None for name in absent)
        logits = head(features)
        torch.testing.assert_close(loaded.score_features(None, logits), detector.score_features(None, logits))
    loaded.load_state_dict({}, strict=False)
    assert loaded.fitted


@detectors
@pytest.mark.parametrize("table_bytes", [boundary.TABLE_BYTES, 0])
def test_compiled_scores_are_the_eager_ones(prototype, table_bytes, head, features, monkeypatch):
    if table_bytes == 0 and not isinstance(prototype, boundary.BoundaryDetector):
        return
    monkeypatch.setattr(boundary, "TABLE_BYTES", table_bytes)
    detector = fitted(prototype, head)
    torch.compiler.reset()
    compiled = torch.compile(detector.score_features, fullgraph=True, backend="aot_eager")
    logits = head(features)
    torch.testing.assert_close(compiled(features, logits), detector.score_features(features, logits))


@detectors
def test_one_compiled_program_for_any_number_of_rows(prototype, head, features):
    """With dynamic=True numbers that a detector keeps, such as the order of a norm, are symbols too."""
    detector, logits = fitted(prototype, head), head(features)
    torch.compiler.reset()
    compiled = torch.compile(detector, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (N, 3):
        torch.testing.assert_close(compiled(features[:n], logits[:n]), detector(features[:n], logits[:n]))


@pytest.mark.slow
def test_inductor_compiles_one_of_each_family(head, features):
    torch.compiler.reset()
    families = (GEN(M=3), KLMatching(), NCI(), FDBD(), ASH(variant="s"))
    fitted_detectors = [fitted(prototype, head) for prototype in families]
    compiled = torch.compile(lambda z, f: [d.score_features(z, f) for d in fitted_detectors], fullgraph=True)
    logits = head(features)
    for detector, scores in zip(fitted_detectors, compiled(features, logits), strict=True):
        torch.testing.assert_close(scores, detector.score_features(features, logits), msg=repr(detector))


@detectors
def test_exported_scores_are_the_eager_ones(prototype, head, features):
    detector, logits = fitted(prototype, head), head(features)
    rows = torch.export.Dim("n", min=2)
    dynamic = {
        "features": {0: rows} if detector.needs_features else None,
        "logits": {0: rows} if detector.needs_logits else None,
    }
    inputs = (features if detector.needs_features else None, logits if detector.needs_logits else None)
    program = torch.export.export(detector, inputs, dynamic_shapes=dynamic).module()
    for n in (N, 5):
        given = [None if value is None else value[:n] for value in inputs]
        torch.testing.assert_close(program(*given), detector.score_features(*given))


@detectors
def test_variants_are_what_their_settings_construct(prototype, head, features):
    z = torch.randn(60, M).relu()
    begun = copy(prototype)
    if begun.needs_fit:
        begun.partial_fit(z, head(z), TARGETS)
    logits = head(features)
    candidates = list(itertools.product(*begun.grid.values()))
    variants = list(begun.variants())
    assert len(variants) == len(candidates)
    for variant, values in zip(variants, candidates, strict=True):
        settings = {**prototype.settings(), **dict(zip(begun.grid, values, strict=True))}
        assert variant.settings() == settings
        constructed = type(prototype)(**settings).fit_features(z, head(z), TARGETS, head)
        variant.finalize(head)
        expected = constructed.score_features(features, logits)
        assert torch.equal(variant.score_features(features, logits), expected)


@detectors
def test_no_rows_have_no_scores(prototype, head):
    scores = fitted(prototype, head).score_features(torch.empty(0, M), torch.empty(0, C))
    assert scores.shape == (0,)
    at_temperature = type(prototype).__name__ in IN_FLOAT64 or getattr(prototype, "temperature", 1) == 3
    assert scores.dtype == (torch.float64 if at_temperature else torch.float32)  # which do not tie


@detectors
def test_scoring_changes_no_input(prototype, head, features):
    logits = head(features)
    before = features.clone(), logits.clone()
    fitted(prototype, head).score_features(features, logits)
    assert torch.equal(features, before[0])
    assert torch.equal(logits, before[1])


def test_casts_of_a_whole_model_leave_its_threshold():
    """Rounded to half precision it would flag others; so would the temperature."""
    f = torch.randn(60, C)
    detector = TemperatureScaling().fit_features(None, f, TARGETS.where(TARGETS > 1, f.argmax(1)))
    scores = detector.score_features(None, f)
    detector.threshold = scores.median() * (1 + 1e-6)
    whole = nn.ModuleDict({"model": nn.Linear(3, C), "detector": detector})
    for cast in (whole.half, whole.bfloat16, whole.float):
        cast()
        assert torch.equal(detector.is_ood(detector.score_features(None, f)), detector.is_ood(scores))
        assert torch.equal(detector.score_features(None, f), scores)
    assert whole.double()["detector"].threshold.dtype == torch.float64
