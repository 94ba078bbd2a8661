"""On a device without float64 (MPS) nothing asks for it: detectors, statistics, losses, metrics, diagnostics."""

from __future__ import annotations

import detector_cases as cases
import no_float64
import pytest
import torch

import ood_fast
from ood_fast import metrics, statistics
from ood_fast.diagnostics.samples import accuracy_by_norm, coefficient_of_variation, correlation
from ood_fast.diagnostics.spectrum import singular_values
from ood_fast.eager.precision import double, has_float64

torch.manual_seed(0)
Z, W, B = torch.randn(cases.N, cases.M), torch.randn(cases.C, cases.M), torch.randn(cases.C)
F = Z @ W.T + B
Y = cases.classes_of(F)


@pytest.fixture
def there():
    with no_float64.device() as move:
        yield move


def test_the_fake_refuses(there):
    with pytest.raises(TypeError, match="has no float64"):
        there(Z).double()
    assert there(Z).cpu().double().dtype == torch.float64
    assert double(there(Z)).device.type == "cpu"
    assert not has_float64(there(Z).device)
    assert torch.zeros(2, device="meta").device.type == "meta"


@pytest.mark.parametrize("name", cases.NAMES)
def test_detectors(name, there):
    detector, plain = cases.make(name), cases.make(name)
    plain.fit_features(Z, F, Y, head=(W, B))
    detector.fit_features(there(Z), there(F), there(Y), head=(there(W), there(B)))
    scores = detector.score_features(there(Z[:8]), there(F[:8]))
    assert scores.device.type == "meta"
    torch.testing.assert_close(scores.cpu(), plain.score_features(Z[:8], F[:8]), rtol=1e-4, atol=1e-4)


def test_losses_and_scores(there):
    z, w, b, f, y = map(there, (Z, W, B, F, Y))
    for found, expected in (
        (ood_fast.elogitnorm(f, z, w, b, y), ood_fast.elogitnorm(F, Z, W, B, Y)),
        (ood_fast.logitnorm(f, y), ood_fast.logitnorm(F, Y)),
        (ood_fast.boundary_distance(f, w), ood_fast.boundary_distance(F, W)),
        (ood_fast.nci_score(z, w, b, there(Z.mean(0))), ood_fast.nci_score(Z, W, B, Z.mean(0))),
    ):
        torch.testing.assert_close(found.cpu(), expected)
    names = ("logsumexp", "entropy", "confidence")
    given = statistics.row_statistics(names, f)
    assert set(given) == set(names)


def test_metrics(there):
    inside, outside = torch.randn(30) + 1, torch.randn(20)
    assert metrics.detection(there(inside), there(outside)) == metrics.detection(inside, outside)
    assert metrics.accuracy(there(F), there(Y)) == metrics.accuracy(F, Y)
    p = F.softmax(1)
    assert metrics.expected_calibration_error(there(p), there(Y)) == metrics.expected_calibration_error(p, Y)
    confidence, right = p.amax(1), F.argmax(1) == Y
    assert metrics.calibration_error(there(confidence), there(right)) == metrics.calibration_error(confidence, right)


def test_diagnostics(there):
    assert correlation(there(Z[:, 0]), there(Z[:, 1])) == correlation(Z[:, 0], Z[:, 1])
    assert coefficient_of_variation(there(B)) == coefficient_of_variation(B)
    norm, right = Z.norm(dim=1), F.argmax(1) == Y
    binned = accuracy_by_norm(there(norm), there(right))
    assert torch.equal(binned.accuracy, accuracy_by_norm(norm, right).accuracy)
    torch.testing.assert_close(singular_values(there(Z)), singular_values(Z))
