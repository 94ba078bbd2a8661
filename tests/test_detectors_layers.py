"""Detectors that read layers beside the head: transcriptions of their papers, one pass, any model, files, errors."""

from __future__ import annotations

import threading

import pytest
import torch
from catalogue import ABOUT
from detector_cases import Net, make
from torch import nn
from torch.nn.functional import avg_pool2d, relu

import ood_fast
from ood_fast import cli, detectors
from ood_fast.detectors import (
    NAC,
    BlockNorm,
    DetectorSet,
    Gram,
    LayerMahalanobis,
    Mahalanobis,
    RankFeat,
    load,
    norm_ratios,
)
from ood_fast.detectors.gram import Bounds
from ood_fast.models.layers import maps as maps_of
from ood_fast.models.layers import stages

N, C = 150, 4
NAMES = ["LayerMahalanobis", "Gram", "BlockNorm", "RankFeat"]


class Stages(nn.Module):
    """Two blocks; what comes after the first works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.act = nn.ReLU(inplace=True)
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU())
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, C)
        self.passes = 0

    def maps(self, x):
        first = self.layer1(x)
        return first, self.layer2(relu(first))

    def forward(self, x):
        self.passes += 1
        return self.fc(self.drop(self.layer2(self.act(self.layer1(x))).mean((2, 3))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Stages().eval()
    with torch.no_grad():  # every class is predicted
        z = model.maps(torch.randn(500, 3, 8, 8))[1].mean((2, 3))
        model.fc.bias.copy_(-model.fc.weight @ z.mean(0))
    return model


@pytest.fixture
def x():
    return torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y():
    return torch.arange(N) % C


def batches(x, y, size=64):
    return list(zip(x.split(size), y.split(size), strict=True))


@torch.no_grad()
def test_mahalanobis_over_layers(model, x, y):
    expected = 0
    for maps in model.maps(x):
        z = maps.double().mean((2, 3))
        means = torch.stack([z[y == k].mean(0) for k in range(C)])
        precision = torch.linalg.pinv((z - means[y]).T @ (z - means[y]) / N)
        distances = torch.stack([((z - mean) @ precision * (z - mean)).sum(1) for mean in means])
        own = distances.gather(0, y[None])[0].mean()
        expected = expected - distances.amin(0) / own
    detector = LayerMahalanobis().fit(model, batches(x, y))
    assert detector.layers == ("layer1", "layer2")
    torch.testing.assert_close(detector.score(model, x).double(), expected, rtol=1e-4, atol=1e-4)
    one = LayerMahalanobis(("layer2",), weights=(2.0,)).fit(model, batches(x, y))
    z = model.maps(x)[1].mean((2, 3))
    torch.testing.assert_close(one.score(model, x), 2 * Mahalanobis().fit_features(z, None, y).score_features(z))


def test_mahalanobis_of_moved_inputs(model, x, y):
    """Lee et al.'s loop: each layer by the gradient of its own score, none of it left in the model."""
    model.train()
    detector = LayerMahalanobis(eps=0.05, std=(0.5, 1.0, 2.0)).fit(model, batches(x, y))
    expected, test = 0, 2 * x[:20]
    model.eval()
    for number, (member, scale) in enumerate(zip(detector.members, detector.scales, strict=True)):

        def own(inputs, number=number, member=member):
            z = model.maps(inputs)[number].mean((2, 3))
            root, means = member.root, member.class_means
            return torch.stack([-((z - member.mean) @ root - mean).square().sum(1) for mean in means]).amax(0)

        moving = test.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(own(moving).sum(), moving)
        moved = test + 0.05 * gradient.sign() / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
        expected = expected + scale * own(moved).detach()
    model.train()
    before = model.passes
    found = DetectorSet([detector, "Gram"]).fit(model, batches(x, y)).score(model, test)["LayerMahalanobis"]
    assert model.passes - before == 3 + 1 + 2 * 2  # to fit; to score; two more for each layer
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found > LayerMahalanobis().fit(model, batches(x, y)).score(model, test)).all()
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(detector.score(model, test.clone()), found)
    with pytest.raises(ValueError, match=r"x: got shape \(20, 3, 8, 8\), expected \(n, 2, ...\), a channel for each"):
        LayerMahalanobis(eps=0.1, std=(1.0, 1.0)).fit(model, batches(x, y)).score(model, test)


def test_a_layer_that_never_varies_does_not_count(model, x, y):
    with torch.no_grad():
        model.layer1[1].weight.zero_()  # what the block gives is its bias, 0.3
        model.layer1[1].bias.fill_(0.3)
    with pytest.raises(ValueError, match="over layers: layers: got the same for all samples of a class, expected some"):
        LayerMahalanobis(("layer1",)).fit(model, [(x, y)])
    live = nn.Conv2d(3, 8, 1)
    model.layer2.forward = lambda maps: live(x[: len(maps)])
    both, alone = (LayerMahalanobis(names).fit(model, [(x, y)]) for names in (("layer1", "layer2"), ("layer2",)))
    assert both.scales[0] == 0
    torch.testing.assert_close(both.score(model, x), alone.score(model, x))


def test_mahalanobis_plus_plus(y):
    z = torch.randn(N, 5, dtype=torch.float64) + 1
    unit = z / z.norm(dim=1, keepdim=True)
    expected = Mahalanobis().fit_features(unit, None, y).score_features(unit)
    torch.testing.assert_close(Mahalanobis(normalize=True).fit_features(z, None, y).score_features(3 * z), expected)


@torch.no_grad()
def test_mahalanobis_beside_pytorch_ood(model, x, y):
    peer = pytest.importorskip("pytorch_ood.detector").MultiMahalanobis([nn.Identity(), nn.Identity()])
    rows = [maps.mean((2, 3)) for maps in model.maps(x)]
    theirs = peer.fit_structured(rows, y).predict_structured(rows)
    ours = LayerMahalanobis(weights=(1, 1), ridge=1e-6 / N).fit(model, [(x, y)]).score(model, x)
    torch.testing.assert_close(-ours / (2 * N), theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("by", ["predicted", "target"])
def test_gram(by, model, x, y):
    train, test = x[:130], x[130:] * 2
    detector = Gram(orders=3, by=by).fit(model, batches(train, y[:130], 70))
    predicted = model(test).argmax(1)
    expected = torch.zeros(len(test), dtype=torch.float64)

    def rows(maps):
        f = maps.double().flatten(2)
        grams = [(f**p @ (f**p).transpose(1, 2)).sum(2) for p in (1, 2, 3)]
        return torch.stack([g.sign() * g.abs() ** (1 / p) for g, p in zip(grams, (1, 2, 3), strict=True)], 1).flatten(1)

    for member, maps, of_test in zip(detector.members, model.maps(train), model.maps(test), strict=True):
        g, classes = rows(maps), y[:130] if by == "target" else model(train).argmax(1)
        held = detectors.streaming.Bank(budget=1).draw(detector.read(maps.flatten(2))) < 0.1
        assert 0 < held.sum() < 40
        low = torch.stack([g[~held & (classes == k)].amin(0) for k in predicted])
        high = torch.stack([g[~held & (classes == k)].amax(0) for k in predicted])
        values = rows(of_test)
        deviation = relu(low - values) / (low.abs() + 1e-6) + relu(values - high) / (high.abs() + 1e-6)
        expected -= deviation.sum(1) / member.mean.double()
    torch.testing.assert_close(detector.score(model, test).double(), expected, rtol=1e-3, atol=1e-3)


def test_gram_of_a_small_channel():
    """Its tenth powers are below float32's smallest number."""
    maps = torch.rand(3, 4, 9) * torch.tensor([1, 1e-6, 1, 1e-3]).unsqueeze(1)
    f = maps.double()
    expected = torch.cat([(f**q @ (f**q).mT).sum(2) ** (1 / q) for q in range(1, 11)], dim=1)
    torch.testing.assert_close(Gram().read(maps).double(), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_rank_feat(model, x):
    maps = model.maps(x)[1].flatten(2)
    u, s, vh = torch.linalg.svd(maps, full_matrices=False)
    pruned = maps - s[:, :1, None] * u[:, :, :1] @ vh[:, :1]
    expected = model.fc(pruned.mean(2)).logsumexp(1)
    torch.testing.assert_close(RankFeat().fit(model, [x]).score(model, x), expected, rtol=1e-4, atol=1e-4)
    doubled = RankFeat().fit(model.double(), [x.double()]).score(model, x.double())
    torch.testing.assert_close(doubled, model.fc(pruned.double().mean(2)).logsumexp(1), rtol=1e-6, atol=1e-6)
    model.float()
    wide = maps[:, :4]  # more positions than channels
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    expected = (wide - s[:, :1, None] * u[:, :, :1] @ vh[:, :1]).mean(2)
    torch.testing.assert_close(RankFeat().read(wide)[:, :4], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the mean over positions of 'layer1' is not what enters the head"):
        RankFeat(("layer1",)).fit(model, [x])


@torch.no_grad()
def test_block_norm_and_the_choice_of_the_block(model, x):
    first, last = model.maps(x)
    norms = relu(last).square().sum((2, 3)).sqrt().mean(1)
    torch.testing.assert_close(BlockNorm().fit(model, []).score(model, x), norms)
    given = BlockNorm(("layer1",))
    assert not given.needs_fit
    torch.testing.assert_close(given.score(model, x), relu(first).square().sum((2, 3)).sqrt().mean(1))
    smooth = avg_pool2d(torch.randn(20, 3, 32, 32), 9, stride=1, padding=4) * 5  # a puzzle has more edges
    ratios = norm_ratios(model, [smooth[:10], smooth[10:]], pieces=32)
    assert list(ratios) == ["layer1", "layer2"]
    assert all(ratio != pytest.approx(1, abs=1e-3) for ratio in ratios.values())
    with pytest.raises(ValueError, match="pieces: got 5, expected a divisor of 32 and 32"):
        norm_ratios(model, [smooth], pieces=5)
    with pytest.raises(ValueError, match="layer layer1: got inf in 2 of 2 rows"):  # NaN would be the largest ratio
        norm_ratios(model, [1e25 * smooth[:2]])


def test_one_pass_for_all_and_files(model, x, y, tmp_path):
    both = DetectorSet([*NAMES, "MSP", "NCI"]).fit(model, batches(x, y))
    assert model.passes == 3
    scores = both.score(model, x)
    assert model.passes == 4
    for name in NAMES:
        assert torch.equal(both[name].score(model, [x[:60], x[60:]]), scores[name]) or name == "LayerMahalanobis"
    both.save(tmp_path / "set")
    back = load(tmp_path / "set")
    assert back["Gram"].layers == ("layer1", "layer2")
    assert all(torch.equal(found, scores[name]) for name, found in back.score(model, x).items())
    with pytest.raises(RuntimeError, match="reads layers of the model"):
        back["Gram"].score_features(x)
    with pytest.raises(ValueError, match="layers: got None, expected what fit"):
        LayerMahalanobis().fit_features(torch.randn(9, 3), torch.randn(9, C), y[:9])


# What runs the model again for each input, by how many passes; the first of these also when it is fitted.
AGAIN = {"AdaSCALE": 2, "ODIN": 2, "IODIN": 2, "MCDropout": 5, "TestTimeAugmentation": 2}


@pytest.mark.filterwarnings("ignore")
def test_all_of_the_catalogue_in_one_pass(model, x, y):
    """But for `AGAIN`; an Ensemble is of several models. The scores are those of each detector by itself."""
    assert {name for name, about in ABOUT.items() if "pass" in about.cost} == {*AGAIN, "Ensemble"}
    names = [name for name in ABOUT if name != "Ensemble"]
    assert set(detectors.in_all()) - {"ODIN", "IODIN"} == set(names) - set(AGAIN)
    every = DetectorSet({name: make(name) for name in names}).fit(model, [(x, y)])
    assert model.passes == 1 + AGAIN["AdaSCALE"]
    model.passes, test = 0, torch.cat([x[:20], 3 * x[20:40]])
    scores = every.score(model, test)
    assert model.passes == 1 + sum(AGAIN.values())
    assert set(scores) == set(names)
    for name in names:
        alone = make(name).fit(model, [(x, y)]).score(model, test)
        assert alone.isfinite().all(), name
        assert alone.unique().numel() > 3, name
        torch.testing.assert_close(scores[name], alone, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_processes_and_threads(model, x, y):
    parts = [LayerMahalanobis().gathers, Gram().gathers]
    assert all("layers" in part()["layers"].reads for part in parts)
    whole = DetectorSet(["LayerMahalanobis", "Gram"]).fit(model, [(x, y)])
    split = [DetectorSet(["LayerMahalanobis"]) for _ in range(2)]
    found = []
    for own, rows in zip(split, (slice(0, 80), slice(80, None)), strict=True):
        fitting = detectors.fitting.Fit(own.detectors, anew=True)
        batch = next(detectors.fitting.run_model(model, [(x[rows], y[rows])], None, fitting.prepare(model)))
        fitting.take(None, batch.logits, batch.targets, batch.read)
        found.append(fitting)
    for mine, theirs in zip(found[0].parts, found[1].parts, strict=True):
        mine.to("cpu").join(theirs)
    found[0].finish(None)
    for name, buffer in split[0].state_dict().items():
        torch.testing.assert_close(buffer, whole.state_dict()[name], rtol=1e-3, atol=1e-4)
    z, logits = torch.randn(N, 3), torch.randn(N, C)
    one, first, second = (Bounds() for _ in range(3))
    one.take(z, logits, None)
    first.take(z[:50], logits[:50], None)
    second.take(z[50:], logits[50:], None)
    first.to("cpu").join(second)
    assert torch.equal(first.low, one.low)
    assert torch.equal(first.high, one.high)
    assert torch.equal(first.held.value(), one.held.value())
    inputs = [x[:10] * k for k in range(1, 5)]
    alone = [whole["Gram"].score(model, part) for part in inputs]
    seen: dict[int, torch.Tensor] = {}
    run = [
        threading.Thread(target=lambda k=k: seen.update({k: whole["Gram"].score(model, inputs[k])})) for k in range(4)
    ]
    for thread in run:
        thread.start()
    for thread in run:
        thread.join()
    assert all(torch.equal(seen[k], alone[k]) for k in range(4))
    assert not any(module._forward_hooks for module in model.modules())


def test_errors(model, x, y):
    with pytest.raises(ValueError, match=r"unknown layer of Stages 'layer3'; known: act, drop, fc, layer1, .*'layer2'"):
        Gram(("layer3",)).fit(model, [x])
    with pytest.raises(ValueError, match="layers: got 'layer1', expected the names"):
        Gram("layer1")
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' does not run"):
        BlockNorm(("unused",)).score(model, x)
    with pytest.raises(ValueError, match="weights: got 1, expected 2"):
        LayerMahalanobis(weights=(1.0,)).fit(model, [(x, y)])
    with pytest.raises(ValueError, match="got NaN in 1 of 150 rows, the first is row 7"):
        Gram().fit(model, [torch.where(torch.arange(N).view(-1, 1, 1, 1) == 7, torch.nan, x)])


def test_tokens_blocks_without_names_and_flat_nets(y):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=C, depth=2, img_size=32).eval()
    x = torch.randn(40, 3, 32, 32)
    detector = LayerMahalanobis(ridge=0.1).fit(vit, [(x, y[:40])])
    assert detector.layers == ("blocks.0", "blocks.1")
    assert detector.members[0].mean.shape == (192,)
    assert detector.score(vit, x[:3]).shape == (3,)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Flatten()
    )
    assert stages(plain) == ("1", "3")
    assert stages(Net()) == ("backbone",)


class Along(nn.Module):
    """A net of convolutions over a length, `flat`, or over images of height 1 with the same weights."""

    def __init__(self, flat: bool, width: int = 16) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if flat else (nn.Conv2d, nn.BatchNorm2d)
        size = 3 if flat else (1, 3)
        self.layer1 = nn.Sequential(conv(3, width, size), norm(width, affine=False), nn.ReLU())
        self.layer2 = nn.Sequential(conv(width, width, size), nn.ReLU())
        self.pool, self.fc = nn.Flatten(2), nn.Linear(width, C)

    def forward(self, x):
        return self.fc(self.pool(self.layer2(self.layer1(x))).mean(2))


@pytest.mark.parametrize("length", [20, 18, 40])  # of layer1 18, 16, 38; the channels are 16
@pytest.mark.parametrize("layers", [("layer1", "layer2"), ("layer1.1", "layer2.1")])
def test_the_channels_of_convolutions_over_a_length(y, length, layers):
    torch.manual_seed(0)
    images, x = Along(False).eval(), torch.randn(60, 3, length)
    along = Along(True).eval()
    along.load_state_dict({name: w.squeeze(2) if w.dim() == 4 else w for name, w in images.state_dict().items()})
    for make_one in (
        lambda: LayerMahalanobis(layers, ridge=0.1),
        lambda: Gram(layers),
        lambda: BlockNorm(layers),
        lambda: RankFeat(layers[1:]),
        lambda: NAC(layers),
    ):
        expected = make_one().fit(images, [(x.unsqueeze(2), y[:60])]).score(images, x[:9].unsqueeze(2))
        got = make_one().fit(along, [(x, y[:60])]).score(along, x[:9])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_which_dimension_has_the_channels():
    torch.manual_seed(0)
    conv, linear, norm = nn.Conv1d(3, 8, 1), nn.Linear(8, 8), nn.LayerNorm(8)
    model = nn.Module()
    model.conv, model.linear, model.both = conv, linear, nn.Sequential(nn.Conv1d(8, 8, 1), norm)
    model.image, model.fc = nn.Conv2d(3, 5, 1), nn.Linear(8, C)
    model.attention, model.rnn = nn.MultiheadAttention(8, 2), nn.LSTM(8, 4, batch_first=True, bidirectional=True)
    numbers = torch.randn(2, 6, 8)
    turned = numbers.movedim(1, 2)
    for layer in ("conv", "linear", "both"):  # one dimension is as wide as a layer
        assert torch.equal(maps_of(model, layer, numbers), turned)
        assert torch.equal(maps_of(model, layer, turned), turned)
    square = torch.randn(2, 8, 8)
    assert torch.equal(maps_of(model, "conv", square), square)  # both are
    assert torch.equal(maps_of(model, "linear", square), square.movedim(1, 2))
    assert torch.equal(maps_of(model, "rnn", (square, None)), square.movedim(1, 2))
    with pytest.raises(
        ValueError, match=r"'both' gives \('n', 8, 8\), and nothing tells which .* name a layer inside it"
    ):
        maps_of(model, "both", square)
    wide = torch.randn(2, 5, 5, 7)  # channels that are as many as rows, of an image that is no square
    assert torch.equal(maps_of(model, "image", wide), wide.flatten(2))
    with pytest.raises(ValueError, match=r"attention with batch_first=False.*take batches of another size"):
        maps_of(model, "attention", torch.randn(6, 6, 8))


def test_evaluate_and_the_command_line(model, x, y, tmp_path, monkeypatch):
    chosen = [*NAMES, "MSP"]
    result = ood_fast.evaluate(model, [(x[:50], y[:50])], {"far": [3 * x[:30]]}, fit=batches(x, y), detectors=chosen)
    assert {row["detector"] for row in result.rows()} >= set(chosen)

    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "layered.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))\n"
    )
    for index in range(40):
        (tmp_path / "train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        pixels = (torch.rand(8, 8, 3) * 255).byte().numpy()
        image.fromarray(pixels).save(tmp_path / "train" / "ab"[index % 2] / f"{index}.png")
    own = ["--model", "layered:build", "--size", "8", "--resize", "8", "--workers", "0", "--quiet"]
    fit = ["fit", *own, "--data", "train", "--any-accuracy", "--detectors", ",".join(NAMES), "--out", "d.safetensors"]
    assert cli.main(fit) == 0
    assert load("d.safetensors")["Gram"].layers == ("1",)
    data = ["--data", "train", "--out", "s.csv"]
    assert cli.main(["score", "--model", "layered:build", "--detectors", "d.safetensors", "--workers", "0", *data]) == 0
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 41
