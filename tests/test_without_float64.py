"""On a device without float64 (MPS) nothing asks for it: detectors, statistics, losses, metrics, diagnostics. On one
with it nothing asks for what torch.use_deterministic_algorithms refuses on CUDA."""

from __future__ import annotations

import detector_cases as cases
import no_float64
import pytest
import torch

import ood_fast
from ood_fast import metrics, statistics
from ood_fast.detectors import DetectorSet
from ood_fast.diagnostics import change_by_norm, diagnose
from ood_fast.diagnostics.samples import accuracy_by_norm, coefficient_of_variation, correlation, reliability
from ood_fast.diagnostics.spectrum import singular_values
from ood_fast.eager.precision import double, has_float64

torch.manual_seed(0)
Z, W, B = torch.randn(cases.N, cases.M), torch.randn(cases.C, cases.M), torch.randn(cases.C)
F = Z @ W.T + B
Y = cases.classes_of(F)


@pytest.fixture(params=["no float64", "deterministic"])
def there(request):
    with no_float64.device(float64=request.param == "deterministic") as move:
        yield move


@pytest.mark.parametrize("there", ["deterministic"], indirect=True)
def test_the_deterministic_fake_refuses(there):
    assert there(Z).double().dtype == torch.float64
    assert there(Y).cumsum(0).device.type == "meta"
    for refused in (lambda: there(Z).cumsum(0), lambda: there(Z).median(0), lambda: torch.bincount(there(Y), there(B))):
        with pytest.raises(RuntimeError, match="no deterministic implementation"):
            refused()


@pytest.mark.parametrize("there", ["no float64"], indirect=True)
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
    expected = plain.score_features(Z[:8], F[:8])
    assert scores.dtype == (torch.float32 if not has_float64(scores.device) else expected.dtype)
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_a_set_lowers_defaults(there):
    names = ["ViM", "NECO", "KNN", "NNGuide"]
    detectors = DetectorSet(names)
    with pytest.warns(UserWarning, match="takes"):
        detectors.fit_features(there(Z), there(F), there(Y), head=(there(W), there(B)))
    assert all(scores.device.type == "meta" for scores in detectors.score_features(there(Z), there(F)).values())


@pytest.mark.parametrize("loss", ["elogitnorm", "linear_elogitnorm", "logitnorm"])
@pytest.mark.parametrize("n", [cases.C - 1, cases.N])
def test_gradients(loss, n, there):
    def gradients(move):
        z, w, b = (move(t.clone()).requires_grad_() for t in (Z[:n], W, B))
        y, weight = move(Y[:n]), move(torch.linspace(0.5, 1, cases.C))
        f = torch.nn.functional.linear(z, w, b)
        given = {"elogitnorm": (f, z, w, b), "linear_elogitnorm": (z, w, b), "logitnorm": (f,)}[loss]
        getattr(ood_fast, loss)(*given, y, weight=weight, label_smoothing=0.1).backward()
        return z.grad, w.grad

    for found, expected in zip(gradients(there), gradients(lambda t: t), strict=True):
        torch.testing.assert_close(found.cpu(), expected)


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
    draws = metrics.Bootstrap(3)
    drawn = [draws.detection(draws.below(m(inside), "a"), draws.below(m(outside), "b")) for m in (there, torch.clone)]
    assert torch.equal(*(found["auroc"] for found in drawn))
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
    changes = change_by_norm(there(Z.T), there(norm))
    assert torch.equal(changes.steps, change_by_norm(Z.T, norm).steps)
    assert reliability(there(norm.sigmoid()), there(right)).ece == reliability(norm.sigmoid(), right).ece
    chunk, moved = (Z, F, Y), (there(Z), there(F), there(Y))
    plain = diagnose([chunk], [chunk], {}, (W, B)).numbers
    assert diagnose([moved], [moved], {}, (there(W), there(B))).numbers == pytest.approx(plain, nan_ok=True)
    torch.testing.assert_close(singular_values(there(Z)).cpu(), singular_values(Z))
