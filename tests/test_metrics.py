"""Metrics against scalar loops written from the definitions, and against scikit-learn as OpenOOD calls it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from ood_fast import metrics

# Continuous scores (no ties), few distinct scores (ties within and across the sets), all scores equal, one score each.
SAMPLES = {
    "continuous": (torch.randn(157, generator=torch.Generator().manual_seed(1)) + 1, torch.linspace(-2, 2, 203)),
    "ties": (
        torch.randint(2, 9, (83,), generator=torch.Generator().manual_seed(2)),
        torch.randint(0, 7, (120,), generator=torch.Generator().manual_seed(3)),
    ),
    "all equal": (torch.ones(5), torch.ones(9)),
    "single": (torch.tensor([0.3]), torch.tensor([0.7])),
    "apart": (torch.arange(5, 9), torch.arange(0, 5)),
}
samples = pytest.mark.parametrize(("id_scores", "ood_scores"), SAMPLES.values(), ids=SAMPLES)


def as_openood(id_scores: torch.Tensor, ood_scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels (OOD = 1) and confidences."""
    labels = np.concatenate([np.zeros(len(id_scores)), np.ones(len(ood_scores))])
    return labels, torch.cat([id_scores, ood_scores]).double().numpy()


@samples
def test_auroc_is_the_share_of_ordered_pairs(id_scores, ood_scores):
    wins = sum((i > o) + 0.5 * (i == o) for i in id_scores.tolist() for o in ood_scores.tolist())
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(wins / (len(id_scores) * len(ood_scores)), abs=1e-12)


@samples
def test_auroc_and_aupr_are_those_of_openood(id_scores, ood_scores):
    labels, confidence = as_openood(id_scores, ood_scores)
    precision_in, recall_in, _ = sk.precision_recall_curve(1 - labels, confidence)
    precision_out, recall_out, _ = sk.precision_recall_curve(labels, -confidence)
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(sk.roc_auc_score(labels, -confidence), abs=1e-12)
    assert metrics.aupr(id_scores, ood_scores, positive="id") == pytest.approx(
        sk.auc(recall_in, precision_in), abs=1e-12
    )
    assert metrics.aupr(id_scores, ood_scores) == pytest.approx(sk.auc(recall_out, precision_out), abs=1e-12)


def compute_all_metrics(id_scores: torch.Tensor, ood_scores: torch.Tensor) -> dict[str, float]:
    """OpenOOD's function of that name (v1.5, openood/evaluators/metrics.py), but for the accuracy: OOD is positive and
    the confidence negated for the ROC curve, whose first point with 95 % recall counts; all areas are trapezoids."""
    is_ood, confidence = as_openood(id_scores, ood_scores)
    false_positive_rate, true_positive_rate, _ = sk.roc_curve(is_ood, -confidence)
    precision_in, recall_in, _ = sk.precision_recall_curve(1 - is_ood, confidence)
    precision_out, recall_out, _ = sk.precision_recall_curve(is_ood, -confidence)
    return {
        "auroc": sk.auc(false_positive_rate, true_positive_rate),
        "fpr95_ood_positive": false_positive_rate[np.argmax(true_positive_rate >= 0.95)],
        "aupr_in": sk.auc(recall_in, precision_in),
        "aupr_out": sk.auc(recall_out, precision_out),
    }


def drawn_samples(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 to 150 scores a set; with odd seeds, few distinct ones."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 150, 2)
    if seed % 2:
        return tuple(torch.from_numpy(random.integers(0, 1 + seed % 7, size).astype(float)) for size in sizes)
    return torch.from_numpy(random.normal(1, 1, sizes[0])), torch.from_numpy(random.normal(0, 2, sizes[1]))


@pytest.mark.parametrize("seed", range(60))
def test_detection_is_openoods_compute_all_metrics(seed):
    id_scores, ood_scores = drawn_samples(seed)
    found = metrics.detection(id_scores, ood_scores)
    other_convention = found.pop("fpr95_id_positive")
    assert found == pytest.approx(compute_all_metrics(id_scores, ood_scores), abs=1e-9)
    assert other_convention == metrics.fpr_at_tpr(id_scores, ood_scores, positive="id")


@samples
def test_detection_of_ties_and_corners_is_openoods(id_scores, ood_scores):
    found = metrics.detection(id_scores, ood_scores)
    expected = compute_all_metrics(id_scores, ood_scores)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_tied_scores_can_move_openoods_fpr95():
    """Along a straight piece of the ROC curve scikit-learn keeps the ends alone, and 95 % may lie between them."""
    id_scores = torch.arange(1.0, 21).repeat_interleave(5)
    ood_scores = torch.arange(1.0, 21).repeat_interleave(5)
    assert metrics.fpr_at_tpr(id_scores, ood_scores) == pytest.approx(0.95)
    assert metrics.fpr_at_tpr(id_scores, ood_scores, drop_intermediate=True) == 1.0
    assert compute_all_metrics(id_scores, ood_scores)["fpr95_ood_positive"] == 1.0
    assert metrics.detection(id_scores, ood_scores)["fpr95_ood_positive"] == 1.0


@samples
def test_fpr95_is_the_first_roc_point_of_openood(id_scores, ood_scores):
    labels, confidence = as_openood(id_scores, ood_scores)
    false_positive_rate, true_positive_rate, _ = sk.roc_curve(labels, -confidence, drop_intermediate=False)
    expected = false_positive_rate[np.argmax(true_positive_rate >= 0.95)]
    assert metrics.fpr_at_tpr(id_scores, ood_scores) == pytest.approx(expected, abs=1e-12)


@samples
@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("positive", ["ood", "id"])
def test_fpr_at_tpr_is_the_best_threshold_that_reaches_it(id_scores, ood_scores, tpr, positive):
    positives, negatives = (ood_scores, id_scores) if positive == "ood" else (id_scores, ood_scores)
    sign = -1 if positive == "ood" else 1  # OOD is positive where the score is low
    positives, negatives = (sign * positives).tolist(), (sign * negatives).tolist()
    rates = [
        sum(value >= threshold for value in negatives) / len(negatives)
        for threshold in {*positives, *negatives}
        if sum(value >= threshold for value in positives) / len(positives) >= tpr
    ]
    assert metrics.fpr_at_tpr(id_scores, ood_scores, tpr, positive) == pytest.approx(min(rates), abs=1e-12)


def test_the_two_conventions_of_fpr95_differ():
    # 100 ID scores 0..99; half of the OOD scores far below, the other half among the highest 10 ID scores.
    id_scores = torch.arange(100.0)
    ood_scores = torch.cat([torch.full((50,), -1.0), torch.full((50,), 89.5)])
    # To catch 95 % of the OOD inputs, everything up to 89.5 must go: 90 of 100 ID inputs.
    assert metrics.fpr_at_tpr(id_scores, ood_scores, positive="ood") == pytest.approx(0.9)
    # To keep 95 % of the ID inputs, accept from 5 upwards: half of the OOD inputs pass.
    assert metrics.fpr_at_tpr(id_scores, ood_scores, positive="id") == pytest.approx(0.5)


def test_roc_curve_runs_from_corner_to_corner_without_going_back():
    false_positive_rate, true_positive_rate = metrics.roc_curve(*SAMPLES["ties"])
    assert (false_positive_rate[0], true_positive_rate[0]) == (0, 0)
    assert (false_positive_rate[-1], true_positive_rate[-1]) == (1, 1)
    assert (false_positive_rate.diff() >= 0).all()
    assert (true_positive_rate.diff() >= 0).all()


def test_higher_scores_for_id_give_an_auroc_above_one_half():
    assert metrics.auroc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert metrics.auroc([0.0, 1.0], [2.0, 3.0]) == 0.0


def ece_by_loop(confidence, correct, n_bins=15):
    error = 0.0
    for b in range(n_bins):
        low, high = b / n_bins, (b + 1) / n_bins
        members = [i for i, value in enumerate(confidence) if low < value <= high]
        if members:
            accuracy = sum(correct[i] for i in members) / len(members)
            mean_confidence = sum(confidence[i] for i in members) / len(members)
            error += len(members) / len(confidence) * abs(accuracy - mean_confidence)
    return error


def test_ece_is_that_of_a_loop_over_the_bins():
    probabilities = torch.softmax(2 * torch.randn(500, 4, dtype=torch.float64), dim=1)
    target = torch.randint(4, (500,))
    confidence, predicted = probabilities.max(dim=1)
    expected = ece_by_loop(confidence.tolist(), (predicted == target).tolist())
    assert metrics.expected_calibration_error(probabilities, target) == pytest.approx(expected, abs=1e-12)


def test_ece_puts_a_confidence_on_an_edge_into_the_bin_below():
    # Two bins: 0.5 belongs to (0, 0.5]. Were it in (0.5, 1], the two errors would cancel in part.
    probabilities = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    target = torch.tensor([0, 1])  # right at 0.5, wrong at 0.9
    assert metrics.expected_calibration_error(probabilities, target, n_bins=2) == pytest.approx((0.5 + 0.9) / 2)


def test_ece_of_certain_and_right_is_zero_and_of_certain_and_wrong_is_one():
    probabilities = torch.eye(3)
    assert metrics.expected_calibration_error(probabilities, torch.arange(3)) == 0.0
    assert metrics.expected_calibration_error(probabilities, torch.tensor([1, 2, 0])) == 1.0


def test_accuracy():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 2.0]])
    assert metrics.accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75


# ---- intervals


@pytest.mark.parametrize("name", ["continuous", "ties", "apart"])
def test_bootstrap_is_the_metrics_of_each_drawn_sample(name):
    """A plain loop: the images that each draw holds, as often as it holds them, and the metrics of these samples."""
    id_scores, ood_scores = (scores.double() for scores in SAMPLES[name])
    draws = metrics.Bootstrap(20, seed=3)
    found = draws.detection(draws.below(id_scores, "id"), draws.below(ood_scores, "far"))
    counts = {set_name: draws.counts(set_name, len(s)) for set_name, s in (("id", id_scores), ("far", ood_scores))}
    for draw in range(20):
        inside, outside = (
            torch.tensor([value for value, n in zip(scores.tolist(), row.tolist(), strict=True) for _ in range(n)])
            for scores, row in ((id_scores, counts["id"][draw]), (ood_scores, counts["far"][draw]))
        )
        assert (len(inside), len(outside)) == (len(id_scores), len(ood_scores))
        expected = {
            "auroc": metrics.auroc(inside, outside),
            "fpr95_ood_positive": metrics.fpr_at_tpr(inside, outside, positive="ood"),
            "fpr95_id_positive": metrics.fpr_at_tpr(inside, outside, positive="id"),
            "aupr_in": metrics.aupr(inside, outside, positive="id"),
            "aupr_out": metrics.aupr(inside, outside, positive="ood"),
        }
        assert {metric: values[draw].item() for metric, values in found.items()} == pytest.approx(expected, abs=1e-12)


def test_bootstrap_draws_are_with_replacement_and_paired():
    draws, again = metrics.Bootstrap(300, seed=1), metrics.Bootstrap(300, seed=1)
    counts = draws.counts("id", 50).double()
    assert (counts.sum(dim=1) == 50).all()
    assert counts.mean(dim=0).sub(1).abs().max() < 0.3  # 5 standard errors of 300 draws: 0.29
    assert counts.var(dim=0).mean().item() == pytest.approx(1 - 1 / 50, abs=0.05)  # as of a multinomial
    assert torch.equal(counts, again.counts("id", 50).double())
    assert not torch.equal(counts, draws.counts("far", 50).double())
    assert not torch.equal(counts, metrics.Bootstrap(300, seed=2).counts("id", 50).double())


def test_bootstrap_of_means_and_calibration_is_that_of_a_loop():
    confidence = torch.rand(40, dtype=torch.float64)
    right = torch.rand(40) < confidence
    draws = metrics.Bootstrap(10)
    means, errors = draws.mean(right, "id"), draws.calibration_error(confidence, right, "id")
    for draw, row in enumerate(draws.counts("id", 40).tolist()):
        rows = [index for index, n in enumerate(row) for _ in range(n)]
        assert means[draw].item() == pytest.approx(right[rows].double().mean().item())
        drawn, whole = (ece_by_loop(confidence[of].tolist(), right[of].tolist()) for of in (rows, slice(None)))
        assert errors[draw].item() == pytest.approx(max(0.0, 2 * whole - drawn), abs=1e-12)


def test_intervals_of_the_calibration_error_hold_the_true_one():
    """Of 100 nets that are 3 % too sure: five standard errors of 92 % are 14 %. Draws that are not reflected: 31 %."""
    generator, draws, held = torch.Generator().manual_seed(0), metrics.Bootstrap(100), 0
    for confidence, uniform in torch.rand(100, 2, 500, generator=generator, dtype=torch.float64):
        confidence = 1 - 0.5 * confidence**3
        low, high = metrics.percentile_interval(draws.calibration_error(confidence, uniform < confidence - 0.03, "id"))
        held += low <= 0.03 <= high
    assert held >= 92 - 14


def test_bootstrap_of_many_images_takes_every_kth_point():
    """Above `POINTS` distinct scores the curve has fewer points, and the metrics hardly change."""
    id_scores, ood_scores = torch.randn(30_000, dtype=torch.float64) + 1, torch.randn(20_000, dtype=torch.float64)
    draws = metrics.Bootstrap(3)
    coarse = draws.detection(draws.below(id_scores, "id"), draws.below(ood_scores, "far"))
    draws.POINTS = 1 << 20
    exact = draws.detection(draws.below(id_scores, "id"), draws.below(ood_scores, "far"))
    for metric, values in exact.items():
        assert (coarse[metric] - values).abs().max() < 1e-3, metric


def test_percentile_interval():
    assert metrics.percentile_interval(torch.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert metrics.percentile_interval(torch.arange(101.0), 0.5) == pytest.approx((25, 75))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auroc([], [1.0]), "id_scores: got shape"),
        (lambda: metrics.auroc([1.0], [[1.0]]), "ood_scores: got shape"),
        (lambda: metrics.auroc([1.0, float("nan")], [1.0]), "1 of 2 scores are NaN"),
        (lambda: metrics.fpr_at_tpr([1.0], [0.0], positive="OOD"), "positive: got 'OOD'"),
        (lambda: metrics.fpr_at_tpr([1.0], [0.0], tpr=95), "tpr: got 95"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_infinite_scores_have_their_place_in_the_order():
    assert metrics.auroc([float("inf"), 1.0], [float("-inf"), 0.0]) == 1.0


P = torch.tensor([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: metrics.accuracy(P, torch.tensor([[0], [1], [0]])), r"target: got torch.int64 of shape \(3, 1\)"),
        (lambda: metrics.accuracy(P, torch.tensor([0, 1])), r"of shape \(2,\) for logits \(3, 2\)"),
        (lambda: metrics.accuracy(P, P), "target: got torch.float32"),
        (lambda: metrics.accuracy(P[:0], torch.tensor([], dtype=torch.int64)), "n >= 1"),
        (lambda: metrics.accuracy(P * math.nan, torch.tensor([0, 1, 0])), "logits: got NaN"),
        (lambda: metrics.expected_calibration_error(3 * P, torch.tensor([0, 1, 0])), "from 0 to 3 .*softmax"),
        (lambda: metrics.expected_calibration_error(P.log(), torch.tensor([0, 1, 0])), "expected probabilities"),
        (lambda: metrics.expected_calibration_error(P, torch.tensor([0, 1, 0]), 0), "n_bins: got 0"),
        (lambda: metrics.calibration_error(P[:, 0], P[:2, 0] > 0.3), r"got shapes \(3,\) and \(2,\)"),
        (lambda: metrics.auroc([None], [1.0]), "id_scores: got list, expected numbers"),
        (lambda: metrics.auroc([0.5], torch.tensor([1j])), "ood_scores: got torch.complex64, expected real"),
    ],
)
def test_what_would_be_a_wrong_number_is_refused(call, told):
    with pytest.raises((TypeError, ValueError), match=told):
        call()
