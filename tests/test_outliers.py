"""Outliers in training: the losses against the papers' equations written out, what is drawn, what is refused."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from test_data import write_cifar10
from torch import nn

import ood_fast
from ood_fast import checks, data, recipes
from ood_fast import train as training
from ood_fast.training import build, mixing
from ood_fast.training.contrastive import CIDERLoss
from ood_fast.training.objective import Plain, StepBatch, WithFeatures
from ood_fast.training.outliers import EnergyBoundedLoss, OutlierExposureLoss, VOSLoss
from ood_fast.training.synthesis import NPOSLoss, Synthesis

N, C, M = 10, 3, 4


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(M, C)


def sample(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, M), torch.arange(n) % C


def filled(head: nn.Linear, **keywords) -> VOSLoss:
    """VOS with full queues."""
    criterion = VOSLoss(head, queue=6, **keywords)
    z, y = sample(6 * C)
    criterion(head(z), z, y, active=False)
    return criterion


# ---- VOS


@pytest.mark.parametrize("average", ["samples", "sets"])
def test_vos_is_the_papers_equation(head, average, monkeypatch):
    """Sample by sample: energies by their sum, the logistic regression by its sigmoid."""
    criterion = filled(head, weight=0.3, average=average)
    virtual = torch.randn(5, M)
    monkeypatch.setattr(criterion, "virtual_outliers", lambda: virtual)
    z, y = sample()
    loss = criterion(head(z), z, y)

    W, b = head.weight.tolist(), head.bias.tolist()
    u, (a0, a1) = criterion.energy_weight.tolist(), criterion.logistic.weight.flatten().tolist()
    c0, c1 = criterion.logistic.bias.tolist()
    logits_of = lambda row: [sum(w * v for w, v in zip(W[j], row, strict=True)) + b[j] for j in range(C)]  # noqa: E731

    def phi(row):
        e = math.log(sum(max(u[j], 0) * math.exp(f) for j, f in enumerate(logits_of(row))))
        return (a1 - a0) * e + (c1 - c0)

    inside = [math.log(1 + math.exp(-phi(row))) for row in z.tolist()]
    outside = [math.log(1 + math.exp(phi(row))) for row in virtual.tolist()]
    means = {"sets": sum(inside) / N + sum(outside) / 5, "samples": (sum(inside) + sum(outside)) / (N + 5)}
    cross_entropy = 0.0
    for row, label in zip(z.tolist(), y.tolist(), strict=True):
        f = logits_of(row)
        cross_entropy += (math.log(sum(map(math.exp, f))) - f[label]) / N
    assert loss.item() == pytest.approx(cross_entropy + 0.3 * means[average], rel=1e-5)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in [*criterion.parameters(), *head.parameters()])


def test_virtual_outliers_are_the_least_dense_of_the_candidates(head):
    """As drawn one by one from each Gaussian: the length in units of Σ, and every direction."""
    criterion = filled(head, candidates=20, select=3)
    mean = criterion.samples.mean(dim=1)
    centred = (criterion.samples - mean[:, None]).reshape(-1, M)
    covariance = sum(torch.outer(row, row) for row in centred) / len(centred) + 1e-4 * torch.eye(M)
    precision = torch.linalg.inv(covariance)
    drawn = torch.stack([criterion.virtual_outliers() for _ in range(150)]).view(150, C, 3, M)
    off = drawn - mean[:, None]
    lengths = torch.einsum("ncsi,ij,ncsj->ncs", off, precision, off)
    plain = torch.distributions.MultivariateNormal(torch.zeros(M), covariance)
    candidates = plain.sample((2000, 20))
    expected = (-plain.log_prob(candidates)).topk(3, dim=1).values  # + const = half the squared length
    constant = plain.log_prob(torch.zeros(M))
    torch.testing.assert_close(lengths.mean((0, 1)), (2 * (expected + constant)).mean(0), rtol=0.08, atol=0)
    torch.testing.assert_close(lengths.std((0, 1)), (2 * expected).std(0), rtol=0.2, atol=0)
    whitened = off.reshape(-1, M) @ torch.linalg.cholesky(precision)
    directions = whitened / whitened.norm(dim=1, keepdim=True)
    assert directions.mean(0).abs().max() < 0.08
    torch.testing.assert_close(directions.T @ directions / len(directions), torch.eye(M) / M, atol=0.04, rtol=0)


@pytest.mark.parametrize("kind", [VOSLoss, NPOSLoss, CIDERLoss])
def test_a_copy_follows_the_copied_head_or_refuses(kind, head):
    z, y = sample()
    given = (z, y) if kind is CIDERLoss else (head(z), z, y)
    other_head, other = copy.deepcopy((head, kind(head)))
    assert other._head() is other_head
    restored_head, restored = pickle.loads(pickle.dumps((head, kind(head))))
    assert restored._head() is restored_head
    with pytest.raises(RuntimeError, match="copied without the model; copy both in one call"):
        copy.deepcopy(kind(head))(*given)


# ---- NPOS


HOW = Synthesis(neighbours=3, boundary=4, anchors=2, candidates=7, keep=3, deviation=0.5)


def npos(head: nn.Linear, criterion=None, **keywords) -> NPOSLoss:
    """NPOS with full queues."""
    made = NPOSLoss(head, criterion, queue=6, synthesis=HOW, **keywords)
    z, y = sample(6 * C)
    made(head(z), z, y, active=False)
    return made


def test_npos_draws_where_the_class_has_few_neighbours(head):
    """Point by point, by sorted distances of unit vectors. Two may be each other's third: the order is left open."""
    unit = lambda v: [x / math.sqrt(sum(y * y for y in v)) for x in v]  # noqa: E731

    def far(point, bank):  # squared distance to the third of the class, itself counted
        return sorted(sum((a - b) ** 2 for a, b in zip(unit(point), unit(other), strict=True)) for other in bank)[2]

    criterion = npos(head)
    gap = 0.0
    while gap < 1e-3:  # between the fourth, which is of the boundary, and the fifth
        criterion.samples = torch.randn(C, 6, M)
        banks = criterion.samples.tolist()
        ranked = [sorted(bank, key=lambda v: -far(v, bank)) for bank in banks]
        gap = min(far(rows[3], bank) - far(rows[4], bank) for rows, bank in zip(ranked, banks, strict=True))
    criterion.synthesis = HOW._replace(anchors=4)
    torch.manual_seed(4)
    found = criterion.virtual_outliers()
    torch.manual_seed(4)
    noise, expected = (0.5 * torch.randn(7, M)).tolist(), []
    for rows, bank in zip(ranked, banks, strict=True):
        for edge in rows[:4]:
            candidates = [[a + e for a, e in zip(edge, row, strict=True)] for row in noise]
            expected += sorted(candidates, key=lambda v: -far(v, bank))[:3]
    torch.testing.assert_close(torch.tensor(sorted(found.tolist())), torch.tensor(sorted(expected)))
    criterion.synthesis = HOW._replace(anchors=1, candidates=1, keep=1, deviation=1e-9)
    drawn = torch.cat([criterion.virtual_outliers() for _ in range(60)]).round(decimals=4)
    assert len(drawn.unique(dim=0)) == 4 * C  # each of the boundary, now and then
    for dead in (0.0, 1e18):
        criterion.samples = torch.full((C, 6, M), dead)
        assert criterion.virtual_outliers().isfinite().all()


@pytest.mark.parametrize("average", ["samples", "sets"])
def test_npos_is_the_papers_equation(head, average, monkeypatch):
    criterion = npos(head, weight=0.3, average=average, criterion_weight=0.5)
    virtual, (z, y) = torch.randn(5, M), sample()
    monkeypatch.setattr(criterion, "virtual_outliers", lambda: virtual)
    loss = criterion(head(z), z, y)
    phi = criterion.told_by(torch.cat([z, virtual])).flatten().tolist()
    inside, outside = [math.log(1 + math.exp(-f)) for f in phi[:N]], [math.log(1 + math.exp(f)) for f in phi[N:]]
    means = {"sets": sum(inside) / N + sum(outside) / 5, "samples": (sum(inside) + sum(outside)) / (N + 5)}
    expected = 0.5 * nn.functional.cross_entropy(head(z), y).item() + 0.3 * means[average]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(criterion(head(z.detach()), z, y), z)
    assert grad.abs().sum() > 0


def test_npos_beside_a_contrast_of_two_views(head):
    criterion = npos(head, CIDERLoss(head, projection=5), criterion_weight=0.5, start=0.5)
    assert criterion.companion == "views"
    x, y = sample()
    batch, network = StepBatch(x, y, x + 0.1, 0.4), lambda x: (head(x), x)
    prototypes = criterion.criterion.prototypes
    loss, logits = criterion.step(network, batch)
    torch.testing.assert_close(logits, head(x))
    criterion.criterion.prototypes = prototypes
    alone, _ = criterion.criterion.step(network, batch)
    torch.testing.assert_close(loss, 0.5 * alone)
    criterion.criterion.prototypes = prototypes
    with torch.autocast("cpu", torch.bfloat16):
        later, _ = criterion.step(network, batch._replace(done=0.5))
    assert later > loss
    later.backward()
    assert all(p.grad is not None for p in criterion.parameters())
    plain = npos(head, ood_fast.ELogitNormLoss(head))
    assert plain.companion == ""
    assert plain.step(network, batch._replace(beside=None))[1].shape == (N, C)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"synthesis": HOW._replace(neighbours=7)}, "neighbours: got 7, expected at most 6"),
        ({"synthesis": HOW._replace(boundary=7)}, "boundary: got 7, expected at most 6"),
        ({"synthesis": HOW._replace(anchors=5)}, "anchors: got 5, expected at most 4"),
        ({"synthesis": HOW._replace(keep=8)}, "keep: got 8, expected at most 7"),
        ({"synthesis": HOW._replace(deviation=0.0)}, "deviation: got 0"),
        ({"criterion_weight": -1.0}, "criterion_weight: got -1"),
        ({"average": "no"}, "average: got 'no'"),
    ],
)
def test_what_npos_refuses(head, keywords, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        NPOSLoss(head, queue=6, **keywords)


def test_npos_recipes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(M, C))
    found = recipes.find("cifar10-npos")
    assert (found.batch_size, found.learning_rate, found.weight_decay, found.loss) == (256, 0.1, 1e-4, "cider")
    made = build.objective_of(found, model)
    assert isinstance(made, NPOSLoss)
    assert (made.synthesis, made.start, made.weight, made.criterion_weight) == (Synthesis(), 0.4, 0.1, 0.5)
    assert isinstance(made.criterion, CIDERLoss)
    other = build.objective_of(recipes.find("digits-elogitnorm-npos"), model)
    assert isinstance(other.criterion, ood_fast.ELogitNormLoss)
    assert (other.queue, other.synthesis.neighbours, other.criterion_weight) == (100, 30, 1)
    assert Synthesis.of_queue(1) == Synthesis(1, 1, 1)


def test_queues_hold_the_last_of_each_class(head):
    criterion, kept = VOSLoss(head, queue=3), [[] for _ in range(C)]
    for n in (2, 7, 1, 20, 5):
        z, y = torch.randn(n, M), torch.randint(0, C, (n,))
        y[0] = -100 if n == 7 else y[0]
        z[-1, 0] = float("nan") if n == 5 else z[-1, 0]
        criterion(head(z), z, y)
        for row, label in zip(z, y.tolist(), strict=True):
            if label >= 0 and row.isfinite().all():
                kept[label] = [*kept[label], row][-3:]
    assert criterion.full
    for rows, queue in zip(kept, criterion.samples, strict=True):
        assert sorted(map(tuple, torch.stack(rows).tolist())) == sorted(map(tuple, queue.tolist()))


def test_queues_stay_in_eval_mode(head):
    criterion, z = VOSLoss(head, queue=4), torch.randn(8, head.in_features)
    criterion.eval()(head(z), z, torch.zeros(8, dtype=torch.int64))
    assert not criterion.seen.any()


def test_the_term_begins_when_queues_are_full_and_at_the_start(head):
    z, y = sample()
    plain = nn.functional.cross_entropy(head(z), y)
    empty = VOSLoss(head, queue=N)
    assert torch.equal(empty(head(z), z, y), plain)
    criterion = filled(head, start=0.5)
    network = lambda x: (head(x), x)  # noqa: E731
    assert torch.equal(criterion.step(network, StepBatch(z, y, done=0.49))[0], plain)
    loss, logits = criterion.step(network, StepBatch(z, y, done=0.5))
    assert loss > plain
    assert torch.equal(logits, head(z))


def test_with_elogitnorm_and_its_state_comes_back(head):
    criterion = filled(head, criterion=ood_fast.ELogitNormLoss(head), candidates=10)
    z, y = sample()
    torch.manual_seed(3)
    state = {name: value.clone() for name, value in criterion.state_dict().items()}
    loss = criterion(head(z), z, y)
    assert loss > ood_fast.elogitnorm(head(z), None, head.weight, None, y)
    again = VOSLoss(head, ood_fast.ELogitNormLoss(head), queue=6, candidates=10)
    assert not again.full
    again.load_state_dict(state)
    torch.manual_seed(3)
    assert torch.equal(again(head(z), z, y), loss)
    assert "head" not in " ".join(state)


@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_dead_and_large_features_are_drawn_around(head, scale):
    criterion = VOSLoss(head, queue=2)
    criterion.samples.copy_(scale * torch.randn(C, 2, M))
    criterion.samples[..., 1:] = 0  # Σ of rank 1
    criterion.seen.fill_(2)
    assert criterion.virtual_outliers().isfinite().all()


def test_vos_under_autocast(head):
    criterion = filled(head)
    z, y = sample()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        loss = criterion(head(z), z, y)
    torch.manual_seed(0)
    torch.testing.assert_close(loss.float(), filled_again(criterion, z, y, head), rtol=0.02, atol=0)


def filled_again(criterion, z, y, head):
    criterion.seen -= torch.bincount(y, minlength=C)  # the same places again
    return criterion(head(z), z, y)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"queue": 0}, "queue: got 0"),
        ({"candidates": 2, "select": 3}, "select: got 3, expected at most candidates=2"),
        ({"average": "both"}, "average: got 'both'"),
        ({"weight": -1.0}, "weight: got -1"),
        ({"start": 1.5}, "start: got 1.5"),
    ],
)
def test_vos_refuses_settings(head, settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        VOSLoss(head, **settings)


def test_vos_refuses_what_does_not_fit(head):
    with pytest.raises(TypeError, match="head: got ReLU"):
        VOSLoss(nn.ReLU())
    with pytest.raises(ValueError, match="head: got one class"):
        VOSLoss(nn.Linear(M, 1))
    z, y = sample()
    criterion = VOSLoss(head)
    with pytest.raises(ValueError, match="z: got shape"):
        criterion(head(z), z[:, 1:], y)
    with pytest.raises(TypeError, match="y: got class probabilities"):
        criterion(head(z), z, torch.full((N, C), 1 / C))


# ---- outliers that are images


def test_outlier_exposure_is_openoods_line(head):
    z, y = sample()
    others = torch.randn(7, C)
    expected = nn.functional.cross_entropy(head(z), y)
    expected = expected + 0.5 * -(others.mean(1) - torch.logsumexp(others, dim=1)).mean()
    torch.testing.assert_close(OutlierExposureLoss()(head(z), others, y), expected)


def test_outlier_exposure_with_elogitnorm_is_that_of_the_tempered_logits(head):
    z, y = sample()
    others = head(torch.randn(7, M)).detach()
    criterion = OutlierExposureLoss(ood_fast.ELogitNormLoss(head), weight=2.0)
    tempered = others / ood_fast.boundary_distance(others, head.weight)[:, None]
    expected = ood_fast.elogitnorm(head(z), None, head.weight, None, y)
    expected = expected + 2 * (tempered.logsumexp(1) - tempered.mean(1)).mean()
    torch.testing.assert_close(criterion(head(z), others, y), expected)


def test_energy_bounds_sample_by_sample(head):
    z, y = sample()
    others = torch.randn(7, C)
    energy = lambda row: -math.log(sum(map(math.exp, row)))  # noqa: E731
    above = [max(energy(row) + 1.5, 0) ** 2 for row in head(z).tolist()]
    below = [max(-0.5 - energy(row), 0) ** 2 for row in others.tolist()]
    expected = nn.functional.cross_entropy(head(z), y).item() + 0.2 * (sum(above) / N + sum(below) / 7)
    found = EnergyBoundedLoss(weight=0.2, inside=-1.5, outside=-0.5)(head(z), others, y)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="expected inside < outside"):
        EnergyBoundedLoss(inside=0.0, outside=-1.0)


def test_images_and_outliers_go_through_the_network_together(head):
    z, y = sample()
    others, calls = torch.randn(6, M), []

    def network(x):
        calls.append(len(x))
        return head(x)

    loss, logits = OutlierExposureLoss().step(network, StepBatch(z, y, others))
    assert calls == [16]
    assert torch.equal(logits, head(torch.cat([z, others]))[:N])
    torch.testing.assert_close(loss, OutlierExposureLoss()(head(z), head(others), y))
    for none in (None, others[:0]):
        with pytest.raises(ValueError, match="outliers: got none"):
            OutlierExposureLoss().step(network, StepBatch(z, y, none))
    with pytest.raises(ValueError, match=r"outlier_logits: got shape \(4, 2\), expected \(k, 3\)"):
        OutlierExposureLoss()(head(z), torch.zeros(4, 2), y)
    with pytest.raises(ValueError, match="logits: got one class"):
        OutlierExposureLoss()(torch.zeros(4, 1), torch.zeros(4, 1), y[:4])


# ---- mixed images


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 1, 4, 4), torch.arange(n) % C


def test_regmixup_is_the_authors_criterion(monkeypatch):
    """λ CE(f, y_a) + (1 − λ) CE(f, y_b) over images and mixed images together."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, C))
    x, y = images(N)
    monkeypatch.setattr(mixing, "_drawn", lambda: np.random.default_rng(5))
    loss, logits = mixing.RegMixupLoss(alpha=2.0).step(model, StepBatch(x, y))
    random = np.random.default_rng(5)
    other, share = torch.from_numpy(random.permutation(N)), random.beta(2.0, 2.0)
    f = model(torch.cat([x, share * x + (1 - share) * x[other]]))
    cross_entropy = nn.functional.cross_entropy
    first, second = torch.cat([y, y]), torch.cat([y, y[other]])
    torch.testing.assert_close(loss, share * cross_entropy(f, first) + (1 - share) * cross_entropy(f, second))
    torch.testing.assert_close(logits, model(x))
    f, mixed_f, mixed_y = torch.randn(N, C), torch.randn(N, C), torch.rand(N, C).softmax(1)
    summed = mixing.RegMixupLoss(average="sum")(f, mixed_f, y, mixed_y)
    assert summed == 2 * mixing.RegMixupLoss()(f, mixed_f, y, mixed_y)


@pytest.mark.parametrize("make", [mixing.RegMixupLoss, mixing.MixOELoss])
def test_an_ignored_image_has_no_share_in_what_is_mixed(make):
    x, y = images(N)
    y[1] = -100
    expected = nn.functional.one_hot(y.clamp(min=0), C).float()
    expected[1] = 0
    assert torch.equal(mixing._probabilities(y, torch.randn(N, C)), expected)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, C))
    loss, _ = make().step(model, StepBatch(x, y, torch.rand(3, 1, 4, 4)))
    loss.backward()
    assert model[1].weight.grad.isfinite().all()
    with pytest.raises(TypeError, match=r"y: got dtype torch\.int32, expected int64 class indices"):
        make().step(model, StepBatch(x, y.int(), x))


def test_what_is_mixed_follows_torchs_generator():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([mixing._drawn().random(), mixing._drawn().random()])
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixoe_tells_how_much_is_an_outlier(kind):
    """Images of 0, outliers of 1: the mean of a mixed image is the share of the outlier. Two outliers go round."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, C))
    x, y = torch.zeros(N, 1, 4, 4), torch.arange(N) % C
    seen, shares = [], set()

    def network(batch):
        seen.append(batch)
        return model(batch)

    criterion = mixing.MixOELoss(weight=0.7, kind=kind, alpha=1.0)
    for _ in range(5):
        loss, logits = criterion.step(network, StepBatch(x, y, torch.ones(2, 1, 4, 4)))
        mixed = seen[-1][N:]
        share = 1 - mixed[0].mean().item()
        shares.add(share)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), torch.full((N,), 1 - share))
        log_p = model(mixed).log_softmax(dim=1)
        soft = -(share * log_p[torch.arange(N), y] + (1 - share) * log_p.mean(dim=1)).mean()
        expected = nn.functional.cross_entropy(model(x), y) + 0.7 * soft
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(logits, model(x))
    assert len(shares) > 1
    with pytest.raises(ValueError, match="outliers: got none"):
        criterion.step(network, StepBatch(x, y))


def test_mixing_refuses_settings():
    with pytest.raises(ValueError, match="kind: got 'cutout'"):
        mixing.MixOELoss(kind="cutout")
    with pytest.raises(ValueError, match="alpha: got 0"):
        mixing.RegMixupLoss(alpha=0.0)


# ---- in the loop


@pytest.mark.parametrize("outliers", ["oe", "mixoe"])
def test_a_run_with_images_of_outliers_and_continued_to_the_same_bits(outliers, tmp_path):
    write_cifar10(tmp_path / "data", n_train=48, n_test=20)
    (tmp_path / "others").mkdir()
    for index in range(9):
        pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "others" / f"{index}.png")
    recipe = recipes.TrainingRecipe(
        benchmark="cifar10", model="tiny", loss="elogitnorm", epochs=2, batch_size=16, outliers=outliers,
        outlier_batch_size=4,
    )  # fmt: skip

    def run(place: str, at: int | None = None, **options) -> dict[str, torch.Tensor]:
        benchmark = data.open_benchmark("cifar10", tmp_path / "data", outliers=tmp_path / "others")

        class Stops(training.Watcher):
            def on_step(self, run):
                if run.epoch * 3 + run.step == at:
                    raise KeyboardInterrupt

        return training.fit_recipe(
            recipe, benchmark, tmp_path / place, 3, watcher=Stops(), **options
        ).model.state_dict()

    with tiny_models.registered():
        whole = run("whole")
        with pytest.raises(KeyboardInterrupt):
            run("parts", 4, save_minutes=0.0)
        parts = run("parts", resume=True)
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        plain = data.open_benchmark("cifar10", tmp_path / "data")
        with pytest.raises(checks.UserError, match="outliers: got none, expected a folder"):
            training.fit_recipe(recipe, plain, tmp_path / "none")
        with pytest.raises(checks.UserError, match="outlier_images: 9 there, null here"):
            training.fit_recipe(recipe, plain, tmp_path / "whole", 3, resume=True)


def test_recipes_say_what_is_built():
    model = nn.Sequential(nn.Flatten(), nn.Linear(M, C))
    recipe = recipes.override(recipes.find("cifar10-elogitnorm-vos"), ["outlier_weight=0.2", "outlier_queue=7"])
    made = build.objective_of(recipe, model)
    assert isinstance(made, VOSLoss)
    assert isinstance(made.criterion, ood_fast.ELogitNormLoss)
    assert (made.weight, made.queue, made.start, made.average) == (0.2, 7, 0.4, "samples")
    assert isinstance(build.objective_of(recipes.find("cifar10-oe"), model), OutlierExposureLoss)
    assert isinstance(build.objective_of(recipes.find("cifar10-ce"), model), Plain)
    alphas = [build.objective_of(recipes.find(f"{name}-regmixup"), model).alpha for name in recipes.BENCHMARKS]
    assert alphas == [20, 10, 10]  # OpenOOD's scripts
    mixoe = recipes.find("cifar10-mixoe")
    assert (mixoe.epochs, mixoe.learning_rate) == (10, 1e-3)
    with pytest.raises(checks.UserError, match="regmixup: expected 0 with"):
        recipes.override(mixoe, ["regmixup=20"])
    assert "digits-vos" in recipes.RECIPES
    assert "digits-oe" not in recipes.RECIPES  # there are no images of outliers
    with pytest.raises(checks.UserError, match="mixup, cutmix: expected 0 with outliers=vos"):
        recipes.override(recipe, ["mixup=0.2"])
    with pytest.raises(checks.UserError, match=r"outlier_start: got 1\.5"):
        recipes.override(recipe, ["outlier_start=1.5"])
    with pytest.raises(checks.UserError, match="outliers: got somewhere, expected none"):
        data.open_benchmark("digits", outliers="somewhere")


def test_features_are_seen_while_they_are_wanted():
    model = nn.Sequential(nn.Linear(M, 5), nn.ReLU(), nn.Linear(5, C))
    network, x = WithFeatures(model, model[-1]), torch.randn(N, M)
    logits, z = network(x)
    assert torch.equal(logits, model(x))
    assert torch.equal(z, model[:2](x))
    model(x)
    assert network._kept.z is None
    network.model = nn.Linear(M, C)  # what never calls the head
    with pytest.raises(RuntimeError, match="no features were seen"):
        network(x)
    del network
    gc.collect()
    assert not model[-1]._forward_pre_hooks
