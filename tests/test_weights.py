"""A detector knows the weights of the model that it was fitted on, in any form, and refuses others."""

from __future__ import annotations

import copy

import pytest
import torch
from detector_cases import M, Net
from torch import nn

import ood_fast
from ood_fast import detectors
from ood_fast.detectors import MSP, NCI, DetectorSet, load
from ood_fast.models import weights
from ood_fast.ops import registration

X = torch.randn(40, 6)
OTHER = "its weights are not those of the model that .* was fitted on"


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def detector(net: Net) -> NCI:
    return NCI().fit(net, [X])


def another_head(net: Net) -> nn.Module:
    other = copy.deepcopy(net)
    other.fc = nn.Linear(M, net.fc.out_features)
    return other.eval()


def another_backbone(net: Net) -> nn.Module:
    other = copy.deepcopy(net)
    other.backbone[0].reset_parameters()
    return other


def trained_on(net: Net) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    nn.functional.cross_entropy(net(X), torch.arange(40) % net.fc.out_features).backward()
    optimizer.step()
    return net


def longer_weights(net: Net) -> nn.Module:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.backbone[0].weight.mul_(1.1)
    return other


OTHERS = {
    "longer": longer_weights,
    "new": lambda net: Net().eval(),
    "head": another_head,
    "backbone": another_backbone,
    "trained": trained_on,
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=list(OTHERS))
@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_other_weights_are_refused(net, detector, change, kept, tmp_path):
    threshold = detector.calibrate(detector.score(net, X)).threshold
    if kept:
        detector.save(tmp_path / "nci.safetensors")
        detector = load(tmp_path / "nci.safetensors")
    want, other = detector.score(net, X), change(net)
    with pytest.raises(ValueError, match=OTHER):
        detector.score(other, X)
    with pytest.raises(ValueError, match=OTHER):
        ood_fast.deploy(other, detector)
    with pytest.raises(ValueError, match=OTHER):
        ood_fast.save_bundle(tmp_path / "b", other, detector, {"size": 1, "resize": 1, "mean": (0.5,), "std": (1.0,)})
    detector.fitted_on = None  # told
    assert not torch.equal(detector.score(other, X), want)
    assert detector.threshold == threshold


def swapped(net: nn.Module) -> None:
    for parameter in net.parameters():  # as moving averages are put in place: no version counts it
        parameter.data.copy_(torch.randn_like(parameter))


def replaced(net: nn.Module) -> None:
    net.fc.weight.data = torch.randn_like(net.fc.weight)


@pytest.mark.parametrize("change", [swapped, replaced])
def test_changes_that_no_version_counts(net, detector, change):
    detector.score(net, X)
    change(net)
    with pytest.raises(ValueError, match=OTHER):
        detector.score(net, X)


def test_statistics_of_norms_are_weights():
    net = nn.Sequential(nn.Linear(6, M), nn.BatchNorm1d(M), nn.ReLU(), nn.Linear(M, 5)).eval()
    detector = NCI().fit(net, [X])
    assert detector.score(copy.deepcopy(net).half(), X.half()).shape == (40,)
    net[1].running_mean.add_(1)  # as passes in training mode do
    with pytest.raises(ValueError, match=OTHER):
        detector.score(net, X)


def test_what_is_loaded_or_fitted_says_nothing_of_the_fit_before(net, detector):
    other = Net().eval()
    detector.load_state_dict(NCI().fit(other, [X]).state_dict())
    assert detector.score(other, X).shape == (40,)
    with pytest.raises(ValueError, match="its head is not the one"):  # all that a state_dict says
        detector.score(net, X)
    for one in (detector, MSP().fit(net, [X]), detectors.MCDropout("NCI"), detectors.Ensemble("NCI")):
        one.threshold = torch.tensor(0.5)
        models = [other, net] if isinstance(one, detectors.Ensemble) else other
        if isinstance(one, detectors.MCDropout):
            other.backbone.append(nn.Dropout(0.1))
        one.fit(models, [X])
        assert one.threshold is None
        with pytest.raises(RuntimeError, match="a new fit drops that of the one before"):
            one.is_ood(torch.zeros(3))
    kept = MSP().fit(other, [X])
    kept.threshold = torch.tensor(0.5)
    assert kept.fit(other, [X]).threshold == 0.5  # the same model, of which it keeps nothing


def test_of_a_set_those_too_that_keep_nothing_of_the_data(net, tmp_path):
    both = DetectorSet(["MSP", "NCI"]).fit(net, [X])
    both.save(tmp_path / "set.safetensors")
    both = load(tmp_path / "set.safetensors")
    assert list(both.score(net, X)) == ["MSP", "NCI"]
    for case in (both, both["MSP"], MSP().fit(net, [X])):
        with pytest.raises(ValueError, match=OTHER):
            case.score(Net(), X)


def test_other_forms_of_the_model_are_taken(net, detector):
    copied = Net().eval()
    copied.load_state_dict(net.state_dict())
    forms = [
        net.train(),
        copied,
        nn.DataParallel(net),
        torch.compile(net, backend="eager"),
        copy.deepcopy(net).double(),
    ]
    forms += [copy.deepcopy(net).half(), copy.deepcopy(net).bfloat16(), copy.deepcopy(net).requires_grad_(False)]
    for form in forms:
        inner = form.module if isinstance(form, nn.DataParallel) else form
        x = X.to(next(inner.parameters()).dtype)
        assert detector.score(form, x).shape == (40,)


@pytest.mark.parametrize("shift", [0, 1e-9])  # float16 rounds weights of 1e-9 to 0
@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_hold_in_other_dtypes_and_memory_formats(seed, shift):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Conv2d(40, 40, 3), nn.Flatten(), nn.Linear(40, 7))
    nn.init.normal_(model[1].bias, std=shift)
    want = weights.identity_of(model)
    for form in (model.half(), model.float().to(memory_format=torch.channels_last), model.bfloat16()):
        found = weights.identity_of(form)
        assert found.shapes == want.shapes
        assert max(abs(a - b) for a, b in zip(found.waves, want.waves, strict=True)) < weights.TOLERANCE / 4


def test_they_are_read_once_and_again_after_a_change(net, monkeypatch):
    read = []
    monkeypatch.setattr(weights, "_read", lambda parameters: read.append(parameters))
    for _ in range(3):
        weights.identity_of(net)
    assert len(read) == 1
    with torch.no_grad():
        net.fc.weight[0, 0] += 1
    weights.identity_of(net)
    net.fc = nn.Linear(M, 5)
    weights.identity_of(net)
    assert len(read) == 3
    monkeypatch.setattr(registration, "version_of", lambda tensor: object())  # a torch without the private name
    monkeypatch.setattr(weights, "version_of", registration.version_of)
    weights.identity_of(net)
    weights.identity_of(net)
    assert len(read) == 5


def test_weights_that_a_process_does_not_hold_tell_nothing():
    class Sharded(nn.Parameter):
        pass

    net = Net().eval()
    detector = MSP().fit(net, [X])
    other = Net().eval()
    other.fc.weight = Sharded(other.fc.weight.detach())
    assert weights.identity_of(other) is None
    assert detector.score(other, X).shape == (40,)
    assert MSP().fit(other, [X]).fitted_on is None


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("name", ["NCI", "KNN", "KLMatching"])
def test_a_fit_on_features_knows_the_head_that_came_with_them(net, name, kept, tmp_path):
    z = net.backbone(X).detach()
    options = {"k": 3} if name == "KNN" else {}
    detector = detectors.create(name, **options).fit(net, [X]).fit_features(z, net.fc(z).detach(), None, net.fc)
    if kept:
        detector.save(tmp_path / "one.safetensors")
        detector = load(tmp_path / "one.safetensors")
    detector.threshold = torch.tensor(0.0)
    expected = detector.score_features(z, net.fc(z).detach())
    torch.testing.assert_close(detector.score(net, X), expected)
    net.to(torch.bfloat16)
    assert detector.score(nn.Sequential(net), X.bfloat16()).shape == (40,)
    net.float().fc.weight.data += 0.0
    for score in (detector.score, lambda model, _: ood_fast.deploy(model, detector), DetectorSet([detector]).score):
        with pytest.raises(ValueError, match=r"its head is not the one that .* was fitted on"):
            score(another_head(net), X)
    pair = net.fc.weight.detach(), net.fc.bias.detach()
    assert detector.changed().fit_features(z, net.fc(z).detach(), None, pair).score(net, X).shape == (40,)
    if name != "NCI":  # nothing came that could be compared
        free = detector.changed().fit_features(z, net.fc(z).detach())
        assert free.fitted_on is None
        assert free.score(another_head(net), X).shape == (40,)


def test_the_head_is_that_of_evaluation(net):
    net.fc = ood_fast.L2NormLinear(M, 5, bias=False, tau=0.5, scale_at_test=True)
    z = net.backbone(X).detach()
    detector = NCI().fit_features(z, None, None, net.fc)
    assert detector.score(net, X).shape == (40,)
    with pytest.raises(ValueError, match="its head is not the one"):
        NCI().fit_features(z, None, None, (net.fc.weight.detach(), None)).score(net, X)


def test_parameters_of_inference_mode(net):
    with torch.inference_mode():
        other = copy.deepcopy(net)
        assert NCI().fit(net, [X]).score(other, X).shape == (40,)


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("name", ["ODIN", "MCDropout", "TestTimeAugmentation", "LayerMahalanobis", "Ensemble"])
def test_those_too_that_run_the_model_themselves(net, name, kept, tmp_path):
    model, other = ([net, Net().eval()], [net, Net().eval()]) if name == "Ensemble" else (net, Net().eval())
    settings = {"TestTimeAugmentation": {"views": torch.neg}, "LayerMahalanobis": {"layers": ("backbone",)}}
    detector = detectors.create(name, **settings.get(name, {})).fit(model, [(X, torch.arange(40) % 5)])
    if kept and name != "TestTimeAugmentation":  # with a function of one's own no file can be written
        detector.save(tmp_path / "one.safetensors")
        detector = load(tmp_path / "one.safetensors")
    assert detector.score(model, X).shape == (40,)
    with pytest.raises(ValueError, match=OTHER):
        detector.score(other, X)


# ---- the scale of images, beside the weights what a fit belongs to

IMAGES = torch.rand(40, 3, 8, 8).mul(1.2).sub(0.1).clamp(0, 1)  # with black and white
SCALES = {  # how images were prepared at fit and at score, and whether that is told
    "alike": (lambda x: (x - 0.45) / 0.226, lambda x: (x - 0.45) / 0.226, False),
    "black": (lambda x: (x - 0.45) / 0.226, lambda x: (0 * x - 0.45) / 0.226, False),
    "noise": (lambda x: x, torch.randn_like, False),
    "dark fit": (lambda x: 0.02 * x, lambda x: x, False),
    "0 to 255 at score": (lambda x: x, lambda x: 255 * x, True),
    "uint8 at score": (lambda x: x, lambda x: (255 * x).byte(), True),
    "normalised from 255": (lambda x: (x - 0.45) / 0.226, lambda x: (255 * x - 0.45) / 0.226, True),
    "twice": (lambda x: (x - 0.45) / 0.226, lambda x: ((x - 0.45) / 0.226 - 0.45) / 0.226, True),
    "twice by 0.5": (lambda x: (x - 0.5) / 0.5, lambda x: ((x - 0.5) / 0.5 - 0.5) / 0.5, True),
    "not normalised": (lambda x: (x - 0.45) / 0.226, lambda x: x, True),
    "not normalised by 0.5": (lambda x: (x - 0.5) / 0.5, lambda x: x, True),
    "bright": (lambda x: (x - 0.45) / 0.226, lambda x: (0.5 + 0.1 * x - 0.45) / 0.226, False),
    "noise by 0.5": (lambda x: (x - 0.5) / 0.5, torch.randn_like, False),
    "0 to 255 at fit": (lambda x: (255 * x).byte(), lambda x: x, True),
    "black of 255": (lambda x: (255 * x).round(), lambda x: 0 * x, False),
    "a cap on the lens": (lambda x: (255 * x).round(), lambda x: x.round(), False),
}


@pytest.mark.parametrize("name", SCALES)
def test_images_of_another_scale_than_in_the_fit_are_told(name, tmp_path, recwarn):
    fitted, scored, told = SCALES[name]
    net = nn.Sequential(ToFloat(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    detector = detectors.KNN(k=3).fit(net.eval(), [fitted(IMAGES)])
    detector.calibrate(detector.score(net, fitted(IMAGES)))
    detector.save(tmp_path / "one.safetensors")
    detector, x = load(tmp_path / "one.safetensors"), scored(IMAGES)
    passes = detectors.TestTimeAugmentation("KNN", {"k": 3}, views=torch.fliplr).fit(net, [fitted(IMAGES)])
    deployed = ood_fast.deploy(net, detector)
    for score in (lambda: detector.score(net, [x, x]), lambda: DetectorSet([detector]).score(net, x)):
        score()
    passes.score(net, x), deployed(x), deployed(x)
    ood_fast.evaluate(net, [fitted(IMAGES)], {"far": [x]}, detectors=["MSP"])
    found = [each for each in recwarn if "inputs are numbers from" in str(each.message)]
    assert len(found) == (5 if told else 0)
    assert detector.load_state_dict(detector.state_dict())
    assert detector.input_range is None


PREPARED = {  # of images that a net was trained on as (x - 0.45) / 0.226
    "as in training": (lambda x: (x - 0.45) / 0.226, None),
    "by other numbers": (lambda x: (x - 0.5) / 0.25, None),
    "darker": (lambda x: (0.5 * x - 0.45) / 0.226, None),
    "not normalised": (lambda x: x, "not normalised"),
    "0 to 255": (lambda x: 255 * x, "of 0 to 255, or normalised twice"),
    "twice": (lambda x: ((x - 0.45) / 0.226 - 0.45) / 0.226, "of 0 to 255, or normalised twice"),
    "twice by 0.5": (lambda x: ((x - 0.5) / 0.5 - 0.5) / 0.5, "normalised twice by 0.5"),
}


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("trained", [True, False])
def test_images_that_the_model_was_not_trained_on_are_told_by_its_first_norm(name, trained, recwarn):
    torch.manual_seed(0)
    prepare, told = PREPARED[name]
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    net = nn.Sequential(conv, norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    for _ in range(50 * trained):
        net.train()((IMAGES - 0.45) / 0.226)
    net.eval()
    x = prepare(IMAGES)
    detector = detectors.NCI().fit(net, [x[:25], x[25:]])
    assert detector.input_range == (float(x.min()), float(x.max()))
    ood_fast.evaluate(net, [x], {"far": [x + 0.01]}, detectors=["MSP"])
    found = [str(each.message) for each in recwarn if "inputs are" in str(each.message)]
    of_norm = told is not None and (trained or "by 0.5" in told)
    assert len(found) == 2 * of_norm
    assert all(f"inputs are {told}: they lie within" in each for each in found)


class ToFloat(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.filterwarnings("ignore:torch.ao")
def test_fused_and_quantized_forms_are_taken_once_that_is_said():
    net = nn.Sequential(nn.Conv2d(3, M, 3), nn.BatchNorm2d(M), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(M, 4))
    net.train()(IMAGES)
    detector = DetectorSet(["NCI", "MSP"]).fit(net.eval(), [IMAGES])
    expected = detector.score(net, IMAGES)
    fused = torch.ao.quantization.fuse_modules(copy.deepcopy(net), ["0", "1"])
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear})
    for form in (fused, quantized):
        with pytest.raises(
            ValueError, match=r"fitted_on = None, of a set for each of detectors\.detectors; in the shell"
        ):
            detector.score(form, IMAGES)
    for each in detector.detectors:
        each.fitted_on = None
    torch.testing.assert_close(detector.score(fused, IMAGES), expected)
    with pytest.raises(ValueError, match=r"its last quantized layer is 4: leave the head out when you quantize"):
        detector.score(quantized, IMAGES)
    torch.testing.assert_close(detector["MSP"].score(quantized, IMAGES), expected["MSP"], rtol=0.02, atol=0.02)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.use_head = nn.Sequential(nn.Linear(6, M), nn.ReLU()), 0
        self.heads, self.scale = nn.ModuleList([nn.Linear(M, 5), nn.Linear(M, 5)]), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[self.use_head](self.body(x)).mul_(self.scale)


LOGITS = "its logits are (made by another linear layer than|not what the linear layer gives that made them)"
CHANGES = {
    "scaled in place": lambda net: setattr(net, "scale", 3.0),
    "switched": lambda net: setattr(net, "use_head", 1),
    "hook of the head": lambda net: net.heads[0].register_forward_hook(lambda layer, args, output: 3 * output),
    "hook of the model": lambda net: net.register_forward_hook(lambda model, args, output: 3 * output),
}


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("name", ["BoundaryDistance", "KLMatching", "OpenMax", "NCI", "set"])
@pytest.mark.filterwarnings("ignore:.*class")
def test_logits_that_come_from_elsewhere_than_in_the_fit(name, change, kept, tmp_path):
    torch.manual_seed(0)
    net = TwoHeads().eval()
    one = DetectorSet(["MSP", "KLMatching"]) if name == "set" else detectors.create(name)
    one.fit(net, [(X, net(X).argmax(1))], head="heads.0")
    if kept:
        one.save(tmp_path / "d.safetensors")
        one = load(tmp_path / "d.safetensors")
    assert one.score(copy.deepcopy(net).bfloat16(), X.bfloat16(), head="heads.0") is not None
    assert one.score(torch.compile(net, backend="eager"), X, head="heads.0") is not None
    change(net)
    with pytest.raises((ValueError, RuntimeError), match=LOGITS if name != "NCI" else "head"):
        one.score(net, X, head="heads.0")
    if name in ("KLMatching", "OpenMax"):
        one.threshold = torch.tensor(0.5)
        with pytest.raises(ValueError, match=LOGITS):
            ood_fast.deploy(net, one)(X)
    if name == "NCI" and net.use_head:  # its W is that of the other head
        with pytest.raises(ValueError, match=LOGITS):
            one.score(net, X, head="heads.1")


def test_logits_that_went_through_half_precision_are_those_of_the_head(net):
    with torch.no_grad():
        z, logits = net.backbone(X), net(X)
    detector = detectors.KLMatching().fit_features(z, logits, head=net.fc)
    net.register_forward_hook(lambda _, __, logits: logits.bfloat16().float())
    assert detector.score(net, X).shape == (len(X),)
