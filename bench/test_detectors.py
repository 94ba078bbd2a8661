"""Detectors from stored features and logits, ours beside pytorch-ood's with the same definition: the table "latency".

What every row returns is compared with float64. Neither time nor memory of fitting is measured: pytorch-ood's
detectors get what they would have fitted where their own way takes minutes or memory beyond this machine's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ood_fast
from ood_fast import detectors, models
from ood_fast.heads import capture_features

from . import counts
from .baselines import no_compiler
from .cases import IMAGENET, Case
from .conftest import DEVICE, relative_error
from .latency import LATENCY, ONE_READ, OURS, PYTORCH_OOD, WITH_MODEL, Stored, cell, pytorch_ood_left_out, stored
from .measure import in_turns, ratio_in_groups

# pytorch-ood works through the classes one by one: seconds for these images of ImageNet-1K.
GAUSSIAN = Case("ImageNet-1K", 32, 1000, 2048)
# The training features of CIFAR on a ResNet-18, all kept.
NEIGHBOURS = Case("50,000 neighbours", 1000, 100, 512)
# A hundredth of the training images, as KNN's paper has it.
SUBSET = Case("ImageNet-1K, 12,800 neighbours", 256, 1000, 2048)
TRAIN = {GAUSSIAN.name: 4000, NEIGHBOURS.name: 50_000, SUBSET.name: 12_800}

# Name -> our settings, where they are not the default, for the definition that pytorch-ood has.
SETTINGS = {
    "GEN": {"M": 100, "reduction": "mean", "clamp": 1e-7},
    "ASH": {"variant": "s", "p": 65},
    "SCALE": {"p": 65},
    "Mahalanobis": {"half": True},
    "NCI": {"alpha": 1e-3},
    "KNN": {"squared": False},
    "NNGuide": {"k": 10, "fraction": 1.0},
}
LOGITS = ("MSP", "MaxLogit", "Energy", "Entropy", "GEN")
RESHAPED = ("ReAct", "ASH", "SCALE")
IMAGENET_ROWS = (*LOGITS, *RESHAPED, "FDBD", "NCI")
GAUSSIANS = ("Mahalanobis", "RMDS")
ROWS = [
    *((name, IMAGENET) for name in IMAGENET_ROWS),
    *((name, GAUSSIAN) for name in GAUSSIANS),
    ("KNN", SUBSET),
    *((name, NEIGHBOURS) for name in ("KNN", "NNGuide")),
]


@functools.lru_cache(maxsize=1)
def data(case: Case) -> Stored:
    return stored(case, DEVICE, TRAIN.get(case.name, 2000))


def distinct_predictions(x: Stored) -> int:
    return int(x.logits.argmax(1).unique().numel())


@functools.lru_cache(maxsize=1)
def fitted(name: str, case: Case) -> detectors.Detector:
    x = data(case)
    detector = detectors.create(name, **SETTINGS.get(name, {}))
    return detector.fit_features(x.train_features, x.train_logits, x.train_targets, (x.W, x.b))


def head(x: Stored) -> nn.Linear:
    layer = nn.Linear(x.W.shape[1], len(x.W), device=x.W.device).requires_grad_(False)
    layer.weight.copy_(x.W)
    layer.bias.copy_(x.b)
    return layer


Score = Callable[[Tensor, Tensor], Tensor]  # of features and logits


def scorer(name: str, library: str, case: Case) -> Score:
    return peer(name, case) if library == PYTORCH_OOD else fitted(name, case).score_features


def prepare(name: str, library: str, case: Case) -> Callable[[], Tensor]:
    """The step of a cell. It has run once; one that goes through the classes for seconds, with eight of them."""
    score, x = scorer(name, library, case), data(case)
    first = peer(name, case, n_classes=8) if library == PYTORCH_OOD and name in GAUSSIANS else score
    first(x.features, x.logits)
    return functools.partial(score, x.features, x.logits)


# ---- pytorch-ood, with its sign


def peer(name: str, case: Case, n_classes: int | None = None) -> Score:
    """`n_classes`: of a Gaussian for each class, the first ones only."""
    from pytorch_ood import detector as theirs

    x = data(case)
    scores = {"MSP": theirs.MaxSoftmax, "MaxLogit": theirs.MaxLogit, "Energy": theirs.EnergyBased}
    if name in scores:
        return lambda z, f: scores[name].score(f)
    if name == "Entropy":
        return lambda z, f: theirs.Entropy.score(f)
    if name == "GEN":
        return lambda z, f: theirs.GEN.score(f, gamma=0.1, M=100)
    if name in RESHAPED:  # of feature maps, here of one pixel
        layer, more = head(x), {"threshold": clip(case)} if name == "ReAct" else {}
        detector = getattr(theirs, name)(nn.Identity(), lambda maps: layer(maps.flatten(1)), **more)
        return lambda z, f: detector.predict_feature_maps(z[:, :, None, None])
    if name == "FDBD":
        detector = theirs.fDBD(nn.Identity(), head(x))
        detector.train_mean = x.train_features.mean(0)
        detector._denom_matrix = torch.cdist(x.W, x.W).fill_diagonal_(1.0)
    elif name == "NCI":
        detector = theirs.NCI(nn.Identity(), head(x), alpha=1e-3).fit_features(x.train_features, x.train_targets)
    elif name in GAUSSIANS:
        detector = theirs.Mahalanobis(None) if name == "Mahalanobis" else theirs.RMD(None)
        means, P, mean, P0 = (t.float() for t in gaussians(case))
        detector.mu, detector.precision = means[:n_classes], P
        detector.background_mu, detector.background_precision = mean, P0
    elif name == "KNN":
        detector = theirs.KNN(None, k=50).fit_features(x.train_features.cpu(), x.train_targets.cpu())
    else:
        detector = theirs.NNGuide(None, head(x), k=10).fit_features(x.train_features, x.train_targets)
    return lambda z, f: detector.predict_features(z)


# ---- the truth, in float64


@functools.lru_cache(maxsize=1)
def gaussians(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class means, the inverse covariance about them, the mean, and the inverse covariance about it."""
    x = data(case)
    z, y = x.train_features.double(), x.train_targets
    means = torch.zeros(case.n_classes, case.n_features, dtype=torch.float64, device=DEVICE).index_add_(0, y, z)
    means /= torch.bincount(y, minlength=case.n_classes).unsqueeze(1)
    inverse = lambda rows: torch.linalg.inv(rows.T @ rows / len(rows))  # noqa: E731
    return means, inverse(z - means[y]), z.mean(0), inverse(z - z.mean(0))


@functools.lru_cache(maxsize=1)
def clip(case: Case) -> float:
    """ReAct's 90th percentile of all training features."""
    return float(np.percentile(data(case).train_features.cpu().numpy(), 90))


def reshaped(name: str, case: Case) -> Tensor:
    z = data(case).features.double()
    if name == "ReAct":
        return z.clamp(max=clip(case))
    kept = z.shape[1] - round(0.65 * z.shape[1])
    largest = z.topk(kept).values
    factor = (z.sum(1, keepdim=True) / largest.sum(1, keepdim=True)).exp()
    return factor * (torch.where(z >= largest[:, -1:], z, 0.0) if name == "ASH" else z)


def truth(name: str, case: Case) -> Tensor:
    """Higher = more in-distribution."""
    x = data(case)
    f, z = x.logits.double(), x.features.double()
    if name in RESHAPED:
        return (reshaped(name, case) @ x.W.double().T + x.b.double()).logsumexp(1)
    if name in GAUSSIANS:
        means, P, mean, P0 = gaussians(case)
        L = torch.linalg.cholesky(P)  # xᵀ P x = ‖xᵀ L‖²
        distance = torch.cdist(z @ L, means @ L, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)
        return -distance / 2 if name == "Mahalanobis" else (((z - mean) @ P0) * (z - mean)).sum(1) - distance
    unit, bank = (nn.functional.normalize(rows.double()) for rows in (x.features, x.train_features))
    if name == "KNN":
        return -torch.cdist(unit, bank).topk(50, largest=False).values[:, -1]
    if name == "NNGuide":
        bank = bank * x.train_logits.double().logsumexp(1, keepdim=True)
        return (unit @ bank.T).topk(10).values.mean(1) * f.logsumexp(1)
    top, predicted = f.max(1)
    centred = z - x.train_features.double().mean(0)
    length = centred.norm(dim=1)
    if name == "NCI":
        return (centred * x.W.double()[predicted]).sum(1) / length + 1e-3 * z.abs().sum(1)
    if name == "FDBD":
        between = torch.cdist(x.W.double(), x.W.double()).fill_diagonal_(1.0)
        return ((top.unsqueeze(1) - f) / between[predicted]).sum(1) / length
    p = f.softmax(1)
    largest = p.clamp(1e-7, 1 - 1e-7).topk(min(100, case.n_classes)).values
    return {
        "MSP": lambda: p.amax(1),
        "MaxLogit": lambda: top,
        "Energy": lambda: f.logsumexp(1),
        "Entropy": lambda: (p * f.log_softmax(1)).sum(1),
        "GEN": lambda: -(largest**0.1 * (1 - largest) ** 0.1).mean(1),
    }[name]()


@functools.lru_cache(maxsize=2)
def known_truth(name: str, case: Case) -> Tensor:
    return truth(name, case)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row[0])
def row(request) -> tuple[str, Case]:
    return request.param


@pytest.fixture(scope="module")
def case(row) -> Case:
    return row[1]


@pytest.mark.parametrize("library", [OURS, PYTORCH_OOD])
@torch.no_grad()
def test_detector(library, row, measure, leave_out):
    name, case = row
    scale = 1.0
    if library == PYTORCH_OOD:
        leave_out(LATENCY, case, f"{name}, {PYTORCH_OOD}", pytorch_ood_left_out())
        scale = -(case.n_classes - 1) if name == "FDBD" else -1.0  # the mean over classes, higher = OOD
    x = data(case)
    step = functools.partial(scorer(name, library, case), x.features, x.logits)

    def error(scores: Tensor) -> float:
        return relative_error([scale * scores], [known_truth(name, case)])

    more: dict[str, object] = {"error": error}
    if (name, library) == ("Entropy", PYTORCH_OOD):
        more = {
            "not_compared": "it clips the softmax at 1e-7, and of predictions as sure as these nothing else is left"
        }
    distinct = distinct_predictions(x)
    kept = {"N": len(x.train_features), "M": SETTINGS.get(name, {}).get("M", 0)}
    needed = counts.operation(name, counts.Sizes.of(case.shape, case.dtype, distinct, **kept))
    again = functools.partial(prepare, name, library, case)
    cell(measure, name, library, step, len(x.features), counts=needed, prepare=again, distinct=distinct, **more)


# ---- ours beside ours: what the issue of a user with many detectors asks


TOGETHER = Case("together, ImageNet-1K", 256, 1000, 2048)
# Every score that is a function of row statistics; GEN is one over all classes.
FROM_STATISTICS = {name: {} for name in (*LOGITS, "FeatureNorm", "FDBD", "NCI", "BoundaryDistance")} | {
    "GEN": {"M": None}
}


@functools.lru_cache(maxsize=1)
def together() -> detectors.DetectorSet:
    x = data(TOGETHER)
    made = {name: detectors.create(name, **settings) for name, settings in FROM_STATISTICS.items()}
    assert all(detector.statistics() for detector in made.values())
    return detectors.DetectorSet(made).fit_features(x.train_features, x.train_logits, x.train_targets, (x.W, x.b))


COMPILED = ", torch.compile"
COMPILE = ("MSP", "GEN", "NCI", "all")  # MSP, what takes longest alone, NCI and all; a second or two each


@functools.lru_cache(maxsize=1)
def scorers() -> dict[str, Callable[[Tensor, Tensor], Tensor | dict[str, Tensor]]]:
    made = {name: one.score_features for name, one in [*together().items(), ("all", together())]}
    return made | {name + COMPILED: torch.compile(made[name], dynamic=False) for name in COMPILE}


def why_not_compiled() -> str | None:
    return "on a GPU the kernel is one pass, compiled or not" if DEVICE.type == "cuda" else no_compiler(DEVICE)


def prepare_together(name: str) -> Callable[[], object]:
    x = data(TOGETHER)
    step = torch.no_grad()(functools.partial(scorers()[name], x.features, x.logits))
    step()
    return step


@pytest.mark.parametrize(
    "row",
    [(name, TOGETHER) for name in (*FROM_STATISTICS, "all", *(name + COMPILED for name in COMPILE))],
    indirect=True,
    ids=lambda row: row[0],
)
@torch.no_grad()
def test_together(row, measure, benchmark, leave_out):
    """Every score alone; all of them from one read, beside the slowest alone; and NCI, which reads three times the
    bytes of MSP, beside MSP. The same under torch.compile, each beside what is compiled too."""
    name, case = row
    score, how = name.removesuffix(COMPILED), COMPILED if name.endswith(COMPILED) else ""
    leave_out(ONE_READ, case, name, why_not_compiled() if how else None)
    x = data(case)
    steps = {each: functools.partial(one, x.features, x.logits) for each, one in scorers().items()}
    found = steps[name]()
    found = found if score == "all" else {score: found}
    exact = [scorers()[each](x.features.double(), x.logits.double()) for each in found]
    more: dict[str, object] = {"error": relative_error([*found.values()], exact)}
    alone = {"NCI": ["MSP"], "all": [each for each in (COMPILE if how else FROM_STATISTICS) if each != "all"]}
    if score in alone:
        beside = [each + how for each in alone[score]]
        turns = in_turns({each: steps[each] for each in (name, *beside)}, DEVICE, 0 if benchmark.disabled else 1.0)
        slowest = max(beside, key=turns.__getitem__)
        to = f"{slowest}, the slowest alone" if score == "all" else slowest
        more |= {"ratio": turns[name] / turns[slowest], "ratio_to": to}
    more |= {"distinct": distinct_predictions(x), "prepare": functools.partial(prepare_together, name)}
    measure(ONE_READ, steps[name], row=name, counts="together" if score == "all" else score, **more)


# Small, for two cores: a step takes a third of a second.
BEHIND = Case("ResNet-50 at 224 pixels", 4, 1000, 2048)


@functools.lru_cache(maxsize=1)
def behind() -> dict[str, nn.Module]:
    """A ResNet-50 of random weights with each of the two, as one module."""
    model = models.create("resnet50", BEHIND.n_classes).to(DEVICE).eval()
    z = torch.randn(2000, BEHIND.n_features, device=DEVICE).relu()
    f = model.fc(z)
    made = [
        detectors.create(name, **SETTINGS.get(name, {})).fit_features(z, f, None, model.fc) for name in ("MSP", "NCI")
    ]
    return {
        type(detector).__name__: ood_fast.deploy(model, detector.calibrate(detector.score_features(z, f)))
        for detector in made
    }


def images() -> Tensor:
    return torch.randn(BEHIND.n_samples, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def prepare_behind(name: str) -> Callable[[], object]:
    step = torch.no_grad()(functools.partial(behind()[name], images()))
    step()
    return step


def needed_behind(name: str, step: Callable[[], object]) -> counts.Counts:
    """Images and parameters read once and logits written once, with the flops that torch counts; and the score."""
    case, tensors = BEHIND, [*behind()[name].model.state_dict().values(), images()]
    with FlopCounterMode(display=False) as counter:
        step()
    moved = sum(t.numel() * t.element_size() for t in tensors) + 4 * case.n_samples * case.n_classes
    model = counts.Counts(float(moved), float(counter.get_total_flops()))
    return model + counts.operation(name, counts.Sizes.of(case.shape, case.dtype))


@pytest.mark.parametrize("row", [(name, BEHIND) for name in ("MSP", "NCI")], indirect=True, ids=lambda row: row[0])
@torch.no_grad()
def test_behind_a_model(row, measure, benchmark, leave_out):
    """Model and score from images: beside the model nobody sees which of the two scores it is."""
    name, case = row
    what = WITH_MODEL
    leave_out(what, case, name, None if importlib.util.find_spec("torchvision") else "torchvision is not installed")
    steps = {each: functools.partial(deployed, images()) for each, deployed in behind().items()}
    more = {"counts": needed_behind(name, steps[name]), "prepare": functools.partial(prepare_behind, name)}
    deployed = behind()[name]
    with capture_features(deployed.model.fc) as captured:
        logits, scores, _ = steps[name]()
    f, z = logits.double(), captured.features.double()
    if name == "MSP":
        measure(what, steps[name], row="MSP", error=relative_error([scores], [f.softmax(1).amax(1)]), **more)
        return
    W, centred = deployed.detector.head_weight.double(), z - deployed.detector.mean.double()
    exact = (centred * W[f.argmax(1)]).sum(1) / centred.norm(dim=1) + deployed.detector.alpha * z.abs().sum(1)
    ratio = ratio_in_groups(steps["NCI"], steps["MSP"], DEVICE, seconds=0 if benchmark.disabled else 10.0)
    more |= {"ratio": ratio, "ratio_to": "MSP"}
    measure(what, steps[name], row="NCI", error=relative_error([scores], [exact]), **more)


# ---- what reads other layers or runs the model again, beside MSP of the same images


SEEING = Case("small CNN at 16 pixels", 16, 10, 64)
SEEING_TRAIN = 64
LAYERS = ("backbone.2", "backbone.5", "backbone.8")
BY_SIGNS = "it steps by signs and counts in cells: a digit more is another step"  # of a gradient, a state
BY_BITS = "which training samples it holds out goes by the bits of what it reads"
# How it is made, how many passes of the model it takes, a backward one counted as one, and why it is not compared.
SEES: dict[str, tuple[Callable[[], detectors.Detector], int, str | None]] = {
    "MSP": (detectors.MSP, 1, None),
    "LayerMahalanobis": (lambda: detectors.LayerMahalanobis(LAYERS), 1, None),
    "Gram": (lambda: detectors.Gram(LAYERS), 1, BY_BITS),
    "BlockNorm": (lambda: detectors.BlockNorm(LAYERS[-1:]), 1, None),
    "RankFeat": (lambda: detectors.RankFeat(LAYERS[-1:]), 1, None),
    "NAC of layers": (lambda: detectors.NAC(LAYERS), 3, BY_SIGNS),
    "AdaSCALE-A": (lambda: detectors.AdaSCALE("a"), 4, BY_SIGNS),
    "AdaSCALE-L": (lambda: detectors.AdaSCALE("l"), 4, BY_SIGNS),
    "MCDropout": (detectors.MCDropout, 5, None),
    "TestTimeAugmentation": (detectors.TestTimeAugmentation, 2, None),
    "Ensemble": (detectors.Ensemble, 2, None),
}


@functools.lru_cache(maxsize=2)
def seeing(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The steps, each from images to scores, by one net, or by two in the ensemble."""
    nets = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = models.SmallCNN(SEEING.n_classes, in_channels=3)
        net.backbone.append(nn.Dropout(0.3))
        nets.append(net.to(DEVICE, dtype).eval())
    images = torch.randn(SEEING_TRAIN + SEEING.n_samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    train, x = images.to(DEVICE, dtype).split([SEEING_TRAIN, SEEING.n_samples])
    y = torch.arange(SEEING_TRAIN) % SEEING.n_classes
    made = {name: make() for name, (make, *_) in SEES.items()}
    several = made.pop("Ensemble").fit(nets, [(train, y)])
    detectors.DetectorSet(made).fit(nets[0], [(train, y)])
    steps = {name: functools.partial(one.score, nets[0], x) for name, one in made.items()}
    return steps | {"Ensemble": functools.partial(several.score, nets, x)}


def prepare_seeing(name: str) -> Callable[[], Tensor]:
    step = seeing(torch.float32)[name]
    step()
    return step


@pytest.mark.parametrize("row", [(name, SEEING) for name in SEES], indirect=True, ids=lambda row: row[0])
@pytest.mark.filterwarnings("ignore:.*no training sample is predicted")
def test_seeing_the_model(row, measure, benchmark):
    name = row[0]
    steps, (_, passes, why_not) = seeing(torch.float32), SEES[name]
    with FlopCounterMode(display=False) as counter:
        steps["MSP"]()
    moved = 4 * (SEEING.n_samples * (3 * 16 * 16 + SEEING.n_classes) + 57_130)  # images, logits, parameters
    more: dict[str, object] = {"counts": counts.Counts(float(moved), float(passes * counter.get_total_flops()))}
    if why_not:
        more["not_compared"] = why_not
    else:
        more["error"] = relative_error([steps[name]()], [seeing(torch.float64)[name]()])
    if name != "MSP":
        turns = ratio_in_groups(steps[name], steps["MSP"], DEVICE, seconds=0 if benchmark.disabled else 5.0)
        more |= {"ratio": turns, "ratio_to": "MSP"}
    measure(WITH_MODEL, steps[name], row=name, prepare=functools.partial(prepare_seeing, name), **more)


@pytest.mark.parametrize("row", [("KNN(probes=16)", SUBSET)], indirect=True, ids=lambda row: row[0])
@torch.no_grad()
def test_approximate_neighbours(row, measure, leave_out):
    name, case = row
    leave_out(LATENCY, case, f"{name}, {OURS}", None if importlib.util.find_spec("faiss") else "faiss is not installed")
    x = data(case)
    detector = detectors.KNN(k=50, squared=False, probes=16).fit_features(x.train_features)
    step = functools.partial(detector.score_features, x.features)
    needed = counts.operation("KNN", counts.Sizes.of(case.shape, case.dtype, N=len(x.train_features)))
    more = {"counts": needed, "not_compared": "an approximation, whose recall its fit tells"}
    cell(measure, name, OURS, step, len(x.features), prepare="faiss takes its memory elsewhere", **more)
