"""Models as people bring them: shared by threads, compiled, wrapped, with something between the head and the logits."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ood_fast
from ood_fast import heads
from ood_fast.detectors import FDBD, MSP, NCI, ODIN, BlockNorm, DetectorSet, Mahalanobis
from ood_fast.heads import capture_features, find_head
from ood_fast.models import running
from ood_fast.models.running import evaluating
from ood_fast.ops import registration

N_THREADS = 8


class Net(nn.Module):
    """An MLP with batch norm; `after` stands between the head and what it returns."""

    def __init__(self, after: Callable = lambda logits, z: logits, m: int = 16, c: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, m), nn.BatchNorm1d(m), nn.ReLU())
        self.fc = nn.Linear(m, c)
        self.after = after

    def forward(self, x):
        z = self.body(x)
        return self.after(self.fc(z), z)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(64, 8) * torch.linspace(0.2, 4, 64)[:, None]


def in_threads(work: Callable[[int], object]) -> list:
    """What work(k) gives in each of eight threads that start together; what one raises is raised."""
    results, start = [None] * N_THREADS, threading.Barrier(N_THREADS)

    def run(k: int) -> None:
        start.wait()
        try:
            results[k] = work(k)
        except Exception as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# Threads

COMPILED = {
    "plain": lambda model: model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
}


@pytest.mark.parametrize("wrap", COMPILED)
def test_threads_score_and_fit_as_one_does(wrap, x):
    """One model in training mode, eight threads: each gets its own scores and fit, and the model is as before."""
    model = Net().train()
    expected = DetectorSet(["MSP", "NCI", "FDBD"]).fit(model, [x])
    want = [expected.score(model, x[k : k + 4]) for k in range(N_THREADS)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    used = COMPILED[wrap](model)

    def work(k: int) -> None:
        for _ in range(5):
            fitted = DetectorSet(["MSP", "NCI", "FDBD"]).fit(used, [x])
            for detectors in (expected, fitted):
                for name, scores in detectors.score(used, x[k : k + 4]).items():
                    torch.testing.assert_close(scores, want[k][name])

    in_threads(work)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model.fc._forward_hooks
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", COMPILED)
def test_threads_capture_their_own_features(wrap, x):
    model = Net().eval()
    used = COMPILED[wrap](model)
    with torch.no_grad():
        used(x)  # compiled before anything captures
        want = model.body(x)

    def work(k: int) -> None:
        for _ in range(30):
            with torch.no_grad(), capture_features(model.fc) as captured:
                used(x[k : k + 3])
                torch.testing.assert_close(captured.features, want[k : k + 3])

    in_threads(work)
    assert not model.fc._forward_hooks
    with torch.no_grad():
        used(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", [*COMPILED, "a compiled part"])
def test_another_thread_stays_compiled(wrap, x):
    """What another thread has compiled runs compiled while a detector fits and scores, unless a compiled program runs
    the head."""
    ran = []

    def backend(graph, _):
        return lambda *args: ran.append(len(ran)) or graph(*args)

    other = torch.compile(nn.Linear(2, 2).eval(), backend=backend)
    other(torch.ones(1, 2))

    class Calling(Net):
        def forward(self, x):
            if not torch.compiler.is_compiling():
                thread = threading.Thread(target=other, args=(torch.ones(1, 2),))
                thread.start()
                thread.join()
            return super().forward(x)

    model = Calling().eval()
    want = NCI().fit_features(model.body(x).detach(), head=model.fc)
    expected = want.score_features(model.body(x), model(x)).detach()
    if wrap == "a compiled part":  # beside the head
        model.body, used = torch.compile(model.body, backend="eager"), model
    else:
        used = COMPILED[wrap](model)
    before = len(ran)
    torch.testing.assert_close(NCI().fit(used, [x]).score(used, x), expected)
    assert len(ran) >= before + 2
    torch._dynamo.reset()


def test_what_compiled_programs_run_the_head_is_found(x):
    class Inner(nn.Module):
        def __init__(self, model, run):
            super().__init__()
            self.model = model
            self.run = run(self._run)

        def _run(self, x):
            return self.model(x)

        def forward(self, x):
            return self.run(x)

    model = Net().eval()
    with torch.no_grad():
        want = NCI().fit_features(model.body(x), head=model.fc).score_features(model.body(x), model(x))
    compiling = functools.partial(torch.compile, backend="eager")
    hidden = {"run": compiling(model)}  # where nobody looks
    within = {
        "a part": nn.Sequential(compiling(model)),
        "a compiled part": nn.Sequential(COMPILED["model.compile()"](model)),
        "a function": Inner(model, compiling),
        "a function elsewhere": Inner(model, lambda run: lambda x: hidden["run"](x)),
    }
    for name, outer in within.items():
        with torch.no_grad():
            outer(x)  # compiled before anything captures
        fitted = NCI().fit(outer, [x], head=model.fc)
        torch.testing.assert_close(fitted.score(outer, x, head=model.fc), want, msg=name)
    torch._dynamo.reset()


def test_the_head_is_checked_in_each_run(x):
    """Nothing says for sure that a model stayed as it was."""

    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.factor, self.last = 1.0, nn.Identity()

        def forward(self, x):
            return self.last(self.factor * super().forward(x))

    model = Scaled().train()
    fitted = NCI().fit(model, [x])
    fitted.score(model, x)
    model.last = nn.Softmax(1)
    with pytest.raises(ValueError, match="the model returns the softmax of this layer"):
        fitted.score(model, x)
    model.last = nn.Identity()
    model.factor = 3.0
    with pytest.raises(ValueError, match="a temperature"):
        fitted.score(model, x)
    model.factor = 1.0
    hook = model.fc.register_forward_hook(lambda module, args, output: output.clamp(max=0.1))
    with pytest.raises(ValueError, match="does not make the logits"):
        fitted.score(model, x)
    hook.remove()
    other = copy.deepcopy(model)
    fitted.score(other, x)
    gone = weakref.ref(other.fc)
    del other
    gc.collect()
    assert gone() is None, "nothing keeps a model alive"


def test_captures_inside_each_other(x):
    """Both see the passes that run while both are open, the outer one also those after."""
    model = Net().eval()
    with capture_features(model.fc) as outer:
        with capture_features(model.fc) as inner:
            model(x)
        model(x[:3])
    assert len(inner.features) == 64
    assert len(outer.features) == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_train_as_one_does(compiled):
    """One criterion on one head, eight threads: the losses and distances of each are those of its own batch."""
    torch.manual_seed(0)
    head = nn.Linear(16, 5)
    criterion = ood_fast.ELogitNormLoss(head, return_distance=True)
    called = torch.compile(criterion, backend="eager") if compiled else criterion
    z, y = torch.randn(N_THREADS, 12, 16), torch.randint(0, 5, (N_THREADS, 12))
    want = [criterion(head(z[k]), y[k]) for k in range(N_THREADS)]

    def work(k: int) -> None:
        for _ in range(20):
            loss, distance = called(head(z[k]), y[k])
            torch.testing.assert_close(loss, want[k][0])
            torch.testing.assert_close(distance, want[k][1])
            loss.backward()

    in_threads(work)
    torch._dynamo.reset()


def test_the_last_one_out_restores_the_modes():
    """Also of models that share layers, and whatever the order of leaving."""
    model = Net().train()
    model.body[1].eval()  # a frozen layer
    first, second = evaluating(model), evaluating(model.body)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.training
    assert not any(module.training for module in model.body.modules())
    second.__exit__(None, None, None)
    assert model.body[0].training
    assert not model.body[1].training


# The head makes the logits

CHANGED = {
    "softmax": (lambda f, z: f.softmax(1), "returns the softmax"),
    "log-softmax": (lambda f, z: f.log_softmax(1), "returns the log-softmax"),
    "sigmoid": (lambda f, z: f.sigmoid(), "returns the sigmoid"),
    "temperature": (lambda f, z: f / 1.5, "0.6667 times"),
    "clamp": (lambda f, z: f.clamp(-0.3, 0.3), "clamped"),
    "permutation": (lambda f, z: f[:, [1, 0, 2, 3]], "another order"),
    "a second head": (lambda f, z: (f + z[:, :4]) / 2, "merge an adapter"),
    "an adapter": (lambda f, z: f + 0.01 * z[:, 4:8], "merge an adapter"),
    "centred": (lambda f, z: f - f.mean(1, keepdim=True), "merge an adapter"),
    "masked": (lambda f, z: f.masked_fill(torch.arange(4) == 1, -torch.inf), "up to inf"),
    "(features, logits)": (lambda f, z: (z, f), r"the logits have shape \(\d+, 16\).*a tuple the first is read"),
    "features as wide as the logits": (lambda f, z: (z[:, :4], f), "does not make the logits"),
    "a mapping without logits": (lambda f, z: {"output": f, "z": z}, "got an output of a mapping of output, z"),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("tracked", [True, False])
def test_norms_that_take_the_statistics_of_a_batch_are_told(norm, tracked):
    images = torch.randn(8, 3, 4, 4)
    model = nn.Sequential(norm(3, track_running_stats=tracked), nn.Flatten(), nn.Linear(48, 4)).eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        detector = MSP().fit(model, [images])
        scores = detector.score(model, images)
        depends = not torch.allclose(scores[:2], detector.score(model, images[:2]), atol=1e-5)
    assert ["batch norm '0' keeps no running statistics" in str(each.message) for each in told] == [True] * depends
    assert depends == (norm is nn.BatchNorm2d and not tracked)
    if depends:
        detector.calibrate(scores)
        with pytest.warns(UserWarning, match="keeps no running statistics"):
            ood_fast.deploy(copy.deepcopy(model), detector)


@pytest.mark.parametrize("kind", ["dropout kept on", "draws for nothing", "dropout in training"])
def test_random_numbers_in_eval_mode_are_told(kind, x):
    class Drawing(Net):
        def forward(self, x):
            kept = F.dropout(torch.ones_like(x) if kind == "draws for nothing" else x, training="training" not in kind)
            return super().forward(kept if "kept" in kind else x)

    model = Drawing()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        NCI().fit(model, [x])
        MSP().score(model, x)
        MSP().score(model, x)
    assert ["draws random numbers in eval mode" in str(each.message) for each in told] == [True] * ("kept" in kind)
    assert all(each.filename == __file__ for each in told)  # also of what torch.no_grad decorates
    again, state = copy.deepcopy(model), torch.get_rng_state()
    model.eval()(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    MSP().score(again, x)
    assert torch.equal(torch.get_rng_state(), after)  # one more pass draws from a state of its own


def test_a_head_that_computes_elsewhere_is_told(x):
    model = Net(lambda logits, z: logits)
    model.forward = lambda x: F.linear(model.body(x), model.fc.weight, model.fc.bias)
    with pytest.raises(ValueError, match=r"head: the layer 16 → 4 did not run as a module; pass head="):
        NCI().fit(model, [x])


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_the_logits_is_refused(name, x):
    after, message = CHANGED[name]
    model = Net(after).eval()
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    fitted = NCI().fit(plain, [x])
    for call in (
        lambda: NCI().fit(model, [x], head="fc"),
        lambda: fitted.score(model, [x, x[:1]], head="fc"),
        lambda: DetectorSet([fitted]).score(model, x, "fc"),
        lambda: ood_fast.deploy(model, fitted.calibrate(fitted.score(plain, x)), head="fc")(x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


SAME = {
    "a tensor": lambda f, z: f,
    "a tuple": lambda f, z: (f, z),
    "a mapping": lambda f, z: {"features": z, "logits": f},
    "a copy in another dtype": lambda f, z: f.double(),
    "a copy in bfloat16": lambda f, z: f.bfloat16(),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_what_makes_the_logits_is_taken(name, dtype, scale, x):
    model = Net(SAME[name], m=512).eval().to(dtype)
    with torch.no_grad():
        model.fc.weight.mul_(scale)
    assert FDBD().fit(model, [x.to(dtype)]).score(model, x.to(dtype)).shape == (64,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_the_model_is_rounding(dtype, x):
    class Inside(Net):
        def forward(self, x):
            with torch.autocast("cpu", dtype=dtype):
                logits = super().forward(x)
            return logits.float()

    model = Inside(m=512).eval()
    assert NCI().fit(model, [x]).score(model, x).isfinite().all()


def test_an_empty_batch_is_no_proof(x):
    model = Net(lambda f, z: f.softmax(1)).eval()
    with pytest.raises(ValueError, match="returns the softmax"):
        NCI().fit(model, [x[:0], x])


def test_probabilities_are_no_logits(x):
    with pytest.raises(ValueError, match=r"rows are probabilities.*leave out the softmax"):
        MSP().score(Net(lambda f, z: f.softmax(1)).eval(), x)
    one_hot = nn.Sequential(nn.Flatten())
    assert MSP().score(one_hot, torch.eye(3)).shape == (3,)


def test_a_head_that_torchao_quantized_is_to_be_left_out(x):
    class Int8Tensor(torch.Tensor):
        __module__ = "torchao.quantization"

    model = Net().eval().requires_grad_(False)
    model.fc.weight = nn.Parameter(model.fc.weight.as_subclass(Int8Tensor), requires_grad=False)
    with pytest.raises(ValueError, match=r"head: got a quantized weight \(Int8Tensor\).*leave the head out"):
        NCI().fit(model, [x])
    assert len(MSP().score(model, x)) == len(x)


def test_empty_weights_of_zero_3(x):
    """Whole in the forward pass alone."""
    model = Net().eval()
    whole, empty = model.fc.weight.data, torch.empty(0)

    def fill(*_: object) -> None:
        model.fc.weight.data = whole

    def drop(*_: object) -> None:
        model.fc.weight.data = empty

    drop()
    model.fc.register_forward_pre_hook(fill)
    model.fc.register_forward_hook(drop)
    criterion = ood_fast.ELogitNormLoss(model.fc)
    message = r"weight of shape \(0,\), as DeepSpeed's ZeRO-3.*GatheredParameters"
    with pytest.raises(ValueError, match=message):
        criterion(model(x), torch.arange(64) % 4)
    with pytest.raises(ValueError, match=message):
        FDBD().fit(model, [x])
    fill()
    assert criterion(model.body(x) @ whole.T, torch.arange(64) % 4).isfinite()  # gathered around the call


# Compiled and wrapped

WRAPPED = {
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "model.compile()": lambda m: m.compile(backend="eager") or m,
    "a compiled part": lambda m: setattr(m, "body", torch.compile(m.body, backend="eager")) or m,
    "a compiled head": lambda m: setattr(m, "fc", torch.compile(m.fc, backend="eager")) or m,
    "a compiled forward": lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")) or m,
    "a scripted part": lambda m: setattr(m, "body", torch.jit.script(m.body)) or m,
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.fc) and m,
    "old weight_norm": lambda m: nn.utils.weight_norm(m.fc) and m,
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m.fc) and m,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models(name, used_before, x):
    model = Net().eval()
    wrapped = WRAPPED[name](model)
    used = wrapped.eval()
    if used_before:
        used(x)
    with torch.no_grad():
        logits = used(x)
        z = model.body(x)
    weight, bias = (value.detach() for value in (find_head(used).weight, find_head(used).bias))
    want = NCI().fit_features(z, logits, head=(weight, bias))
    fitted = NCI().fit(used, [x])
    torch.testing.assert_close(fitted.score(used, x), want.score_features(z, logits))
    deployed = ood_fast.deploy(used, fitted.calibrate(fitted.score(used, x)))
    torch.testing.assert_close(deployed(x)[1], fitted.score(used, x))
    loss, plain = ood_fast.ELogitNormLoss(used, "fc"), ood_fast.elogitnorm(logits, None, weight, bias, logits.argmax(1))
    torch.testing.assert_close(loss(logits, logits.argmax(1)), plain)
    before = deployed(x)[1]
    with torch.no_grad():
        used.get_parameter(next(name for name, _ in used.named_parameters())).zero_()
    assert torch.equal(deployed(x)[1], before)
    torch._dynamo.reset()


def test_a_forward_that_runs_the_original_is_not_copied(x):
    for wrap in (lambda run: functools.wraps(run)(lambda x: run(x)), lambda run: lambda x, run=run: run(x)):
        model = Net().eval()
        model.forward = wrap(model.forward)
        with pytest.raises(ValueError, match=r"Net.forward was replaced by a function that runs the model itself"):
            ood_fast.deploy(model, MSP().calibrate(torch.rand(9)))


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_and_distributed_models(process_group, x):
    from torch.distributed.fsdp import fully_shard

    model = Net().eval()
    want = NCI().fit(model, [x])
    scores = want.calibrate(torch.rand(50)).score(model, x)
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.testing.assert_close(NCI().fit(wrapped, [x]).score(wrapped, x), scores)
    torch.testing.assert_close(ood_fast.deploy(wrapped, want)(x)[1], scores)
    fully_shard(model.fc)
    fully_shard(model)
    fitted = NCI().fit(model, [x])
    assert type(fitted.head_weight) is torch.Tensor
    torch.testing.assert_close(fitted.score(model, x), scores)
    with pytest.raises(ValueError, match=r"is sharded over processes, expected a whole model.*full_state_dict"):
        ood_fast.deploy(model, want)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model_says_what_to_pass(x):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    scripted = torch.jit.trace(model, x)
    for call in (lambda: NCI().fit(scripted, [x]), lambda: NCI().fit(scripted, [x], head="2")):
        with pytest.raises(ValueError, match=r"got a ScriptModule.*pass the module that it was made from"):
            call()
    torch.testing.assert_close(MSP().score(scripted, x), MSP().score(model, x))
    torch.testing.assert_close(MSP().score(torch.jit.freeze(torch.jit.script(model)), x), MSP().score(model, x))
    for head in ((scripted, "2"), (torch.jit.script(model), "2"), (torch.jit.script(model[2]),)):
        with pytest.raises(ValueError, match=r"pass the module that it was made from, or call ood_fast.elogitnorm"):
            ood_fast.ELogitNormLoss(*head)


# NaN


def test_nan_is_out():
    detector = MSP().calibrate(torch.rand(50))
    scores = torch.tensor([float("nan"), float("-inf"), -1.0, 2.0])
    assert detector.is_ood(scores).tolist() == [True, True, True, False]
    for by_hand in ("nan", "-inf", "inf"):
        detector.threshold = torch.tensor(float(by_hand))
        assert detector.is_ood(scores).all()
        assert detector.predict(None, torch.randn(3, 4)).all()
    for by_hand in (torch.rand(4), torch.rand(2, 1)):  # one a score, or a table
        detector.threshold = by_hand
        with pytest.raises(ValueError, match=r"threshold: got shape \(.*expected one number"):
            detector.is_ood(scores)


# PEFT


def lora(**config):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, **config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_the_loss_follows_an_adapter(x):
    model = lora(target_modules=["fc"])
    layer = model.base_model.model.fc
    W = layer.base_layer.weight + layer.get_delta_weight("default")
    y = torch.arange(64) % 4
    logits = model(x)
    want = ood_fast.boundary_distance(logits, W)
    for criterion in (
        ood_fast.ELogitNormLoss(layer, return_distance=True),
        ood_fast.ELogitNormLoss(model, "fc", return_distance=True),
        ood_fast.ELogitNormLoss(model, "base_model.model.fc.base_layer", return_distance=True),
    ):
        loss, distance = criterion(model(x), y)
        torch.testing.assert_close(distance, want)
        model.zero_grad()
        loss.backward()
        assert layer.lora_A["default"].weight.grad.any()
    with model.disable_adapter():
        _, distance = criterion(model(x), y)
        torch.testing.assert_close(distance, ood_fast.boundary_distance(model(x), layer.base_layer.weight))
    model.merge_adapter()
    torch.testing.assert_close(criterion(model(x), y)[1], want)
    with pytest.raises(ValueError, match="merge the adapter"):
        ood_fast.ELogitNormLoss(lora(target_modules=["fc"], use_dora=True), "fc")(logits, y)
    with pytest.raises(ValueError, match="merge the adapter first"):
        NCI().fit(model, [x], head="fc")
    with pytest.raises(ValueError, match=r"cannot tell which layer.*merge the adapter first"):
        NCI().fit(model, [x])


def test_modules_to_save_by_the_plain_name(x):
    model = lora(target_modules=["body.0"], modules_to_save=["fc"])
    saved = model.base_model.model.fc.modules_to_save["default"]
    nn.init.normal_(saved.weight)
    assert find_head(model) is find_head(model, "fc") is saved
    assert ood_fast.ELogitNormLoss(model, "fc").head is saved
    fitted = NCI().fit(model, [x])
    torch.testing.assert_close(fitted.head_weight, saved.weight.detach())
    torch.testing.assert_close(NCI().fit(model, [x], head="fc").score(model, x), fitted.score(model, x))


@pytest.mark.parametrize("x_name", ["image", "x", "img"])
@pytest.mark.parametrize("y_name", ["label", "labels", "fine_label", "class_idx", None])
def test_batches_as_mappings_have_any_names(x_name, y_name):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    batch = {x_name: x, **({} if y_name is None else {y_name: y})}
    fitted = NCI().fit(model, [batch])
    torch.testing.assert_close(fitted.score(model, [batch]), NCI().fit(model, [(x, y)]).score(model, x))
    if y_name is not None:
        by_class, expected = Mahalanobis().fit(model, [batch]), Mahalanobis().fit(model, [(x, y)])
        torch.testing.assert_close(by_class.score(model, x), expected.score(model, x))


# ---- outputs that are no logits, where no features are read


class Output(nn.Module):
    """`of(z, logits)` of a small net."""

    def __init__(self, of):
        super().__init__()
        self.body, self.fc, self.of = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 4), of
        with torch.no_grad():
            self.fc.weight.mul_(5.0)

    def forward(self, x):
        z = self.body(x)
        return self.of(z, self.fc(z))


NO_LOGITS = {
    "softmax": (lambda z, f: f.softmax(1), "probabilities"),
    "saturated": (lambda z, f: (200 * f).softmax(1), "probabilities"),
    "half": (lambda z, f: f.softmax(1).half(), "probabilities"),
    "log-softmax": (lambda z, f: f.log_softmax(1), "logarithms of probabilities"),
    "log-softmax in half": (lambda z, f: f.log_softmax(1).bfloat16(), "logarithms of probabilities"),
    "sigmoid": (lambda z, f: f.sigmoid(), "the sigmoid of its last layer"),
    "clamp": (lambda z, f: f.clamp(-0.1, 0.1), "the clamped output of its last layer"),
    "features first": (lambda z, f: (z, f), "the features .* that enter its last layer"),
}
LOGITS = {
    "temperature": lambda z, f: f / 3,
    "another order": lambda z, f: f[:, [2, 0, 3, 1]],
    "two heads": lambda z, f: (f + f.flip(1)) / 2,
    "a wide clamp": lambda z, f: f.clamp(-99, 99),
    "features behind": lambda z, f: (f, z),
}


def msp_deployed(model):
    detector = MSP()
    detector.threshold = torch.tensor(0.5)
    return ood_fast.deploy(model, detector)


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("what", NO_LOGITS)
def test_logit_detectors_refuse_what_is_no_logits(what, n):
    of, told = NO_LOGITS[what]
    x, model = torch.randn(n, 3, 2, 2), Output(of).eval()
    for score in (lambda: MSP().score(model, x), lambda: msp_deployed(model)(x)):
        with pytest.raises(ValueError, match=f"model: got .*{told}"):
            score()


@pytest.mark.parametrize("what", LOGITS)
def test_logit_detectors_take_other_logits(what):
    x, model = torch.randn(40, 3, 2, 2), Output(LOGITS[what]).eval()
    expected = MSP().score_features(None, running.logits_of(model(x)))
    for _ in range(2):  # the second time the model is known
        torch.testing.assert_close(MSP().score(model, x), expected)
    model.of = NO_LOGITS["softmax"][0]
    with pytest.raises(ValueError, match="probabilities"):
        MSP().score(model, x)


@pytest.mark.parametrize(
    "rest",
    [
        {"label": torch.arange(8) % 4, "idx": torch.arange(8)},
        {"label": [0, 1, 2, 3] * 2, "index": torch.arange(8), "image_name": ["a"] * 8},
        {"label": np.arange(8) % 4, "mask": torch.rand(8, 1, 2, 2)},
    ],
)
def test_batches_with_more_than_the_model_takes(rest):
    model = Output(lambda z, f: f)
    batch = {"img": torch.randn(8, 3, 2, 2), **rest}
    fitted = Mahalanobis().fit(model, [batch])
    assert torch.equal(fitted.score(model, batch), fitted.score(model, batch["img"]))


class Fields(NamedTuple):
    index: torch.Tensor
    label: object
    image: torch.Tensor


def test_batches_as_tuples_with_more_than_two_parts():
    model, x, y = Output(lambda z, f: f), torch.randn(8, 3, 2, 2), torch.arange(8) % 4
    expected = Mahalanobis().fit(model, [(x, y)]).score(model, x)
    for batch in (Fields(torch.arange(8), y, x), (x, y.tolist(), ["a"] * 8), (x, y.numpy())):
        assert torch.equal(Mahalanobis().fit(model, [batch]).score(model, x), expected)
    with pytest.raises(ValueError, match=r"begins with torch.int64 of shape \(8,\).*expected the inputs first"):
        Mahalanobis().fit(model, [(torch.arange(8), x, y)])


@pytest.mark.parametrize("part", ["fc", "body"])
def test_models_without_numbers_are_refused(part, x):
    fitted, model = Mahalanobis().fit(Net(), [(x, torch.arange(len(x)) % 4)]), Net()
    model.get_submodule(part).to("meta")
    for call in (
        lambda: Mahalanobis().fit(model, [x]),
        lambda: fitted.score(model, x),
        lambda: DetectorSet(["MSP"]).score(model, x),
        lambda: ODIN().score(model, x),
        lambda: BlockNorm(("body",)).score(model, x),
        lambda: ood_fast.deploy(model, fitted),
        lambda: ood_fast.save_bundle("bundle", model, fitted, preparation={}),
    ):
        with pytest.raises(ValueError, match=rf"model: {part}\..* is on the meta device, without numbers"):
            call()


def test_logits_that_look_like_probabilities_are_taken_where_the_head_made_them():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    nn.init.eye_(model[0].weight)
    for x in ([[0.3, 0.7]], [[-0.1, -2.3522]]):
        assert MSP().score(model, torch.tensor(x)).shape == (1,)
        assert msp_deployed(model)(torch.tensor(x))[1].shape == (1,)


def test_programs_say_what_to_pass(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    images = torch.randn(5, 3, 2, 2)
    with pytest.raises(ValueError, match="got a ScriptModule"):
        msp_deployed(torch.jit.trace(model, images))
    program = torch.export.export(model, (images,)).module()
    with pytest.raises(TypeError, match="cannot be put into eval mode"):
        MSP().score(program, images)


def test_batches_that_leave_open_what_the_model_takes():
    model = Output(lambda z, f: f)
    batch = {"left": torch.randn(8, 3, 2, 2), "right": torch.randn(8, 3, 2, 2)}
    with pytest.raises(ValueError, match=r"got a batch of left \(8, 3, 2, 2\), right .*expected one tensor of images"):
        MSP().score(model, batch)
    two = {"img": torch.randn(8, 3, 2, 2), "fine": torch.arange(8) % 4, "coarse": torch.arange(8) % 2}
    with pytest.raises(ValueError, match=r"targets: got None.* a batch that is a mapping has them as labels"):
        Mahalanobis().fit(model, [two])


@pytest.mark.parametrize("name", ["_call_impl", "_compiled_call_impl", "_torchdynamo_orig_callable", "_orig_mod"])
def test_compiled_models_where_torch_calls_its_private_names_otherwise(name, x, monkeypatch):
    """Nothing tells then that a model is compiled; the head that does not run as a module is found all the same."""
    source = inspect.getsource(registration).replace(f'"{name}"', '"_gone"')
    renamed = {"__name__": registration.__name__, "__package__": registration.__package__}
    part = source[source.index("COMPILED_CALL =") : source.index("# -----", source.index("COMPILED_CALL ="))]
    exec(compile("from __future__ import annotations\nimport torch\n" + part, name, "exec"), renamed)
    for module in (registration, heads, running):
        for own in ("COMPILED_CALL", "is_compiled", "uncompiled"):
            if hasattr(module, own):
                monkeypatch.setattr(module, own, renamed[own])
    model = Net().eval()
    with torch.no_grad():
        want = NCI().fit_features(model.body(x), head=model.fc).score_features(model.body(x), model(x))
    for used in (torch.compile(model, backend="eager"), COMPILED["model.compile()"](copy.deepcopy(model))):
        torch.testing.assert_close(NCI().fit(used, [x]).score(used, x), want)
    torch._dynamo.reset()
