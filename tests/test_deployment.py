"""`ood_fast.deploy`: one module with logits, score and decision, as it is, compiled, exported, and in onnxruntime."""

from __future__ import annotations

import copy
import io
import threading
import warnings

import pytest
import torch
from detector_cases import sizes
from torch import nn

from ood_fast import detectors
from ood_fast.deployment import deploy
from ood_fast.detectors import KNN, MSP, NCI

C = 5
SETTINGS = {**sizes(k=3, dim=6), "GMM": {"covariance": "tied"}}  # eight samples a class tie under one of their own
EXPORTED = [name for name in detectors.known() if not detectors.find(name).needs_model]  # ODIN asks for gradients


def small_cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32, C),
    )
    model(torch.randn(32, 3, 8, 8))  # running statistics that are not 0 and 1
    return model


def small_mlp() -> nn.Module:
    """Little to export beside the detector."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, C))


def resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=C)


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=C,
    )
    return transformers.ViTForImageClassification(config)


MODELS = {"small CNN": small_cnn, "torchvision resnet18": resnet18, "Hugging Face ViT": hf_vit}


@pytest.fixture
def batch():
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def fitted(name: str, model: nn.Module, x: torch.Tensor, alpha: float = 0.2) -> detectors.Detector:
    detector = detectors.create(name, **SETTINGS.get(name, {}))
    detector.fit(model, [(x, torch.arange(len(x)) % C)])
    scores = detector.score(model, x)
    detector.calibrate(scores, alpha=alpha)
    # Halfway to the next lower score: the threshold is a score, and a program that rounds otherwise may tip that one.
    detector.threshold = (detector.threshold + scores[scores < detector.threshold].max()) / 2
    return detector


def assert_same(actual, expected, tolerance: float) -> None:
    """logits, score, is_ood; scores relative to their size, as the logits of a large model may be far from 1."""
    for left, right in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    assert torch.equal(actual[2], expected[2])


def exported(deployed: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(deployed, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},))


def onnx_session(deployed: nn.Module | torch.export.ExportedProgram, x: torch.Tensor, path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            deployed,
            (x,),
            path,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["x"],
            output_names=["logits", "score", "is_ood"],
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: tuple(torch.from_numpy(output) for output in session.run(None, {"x": x.numpy()}))


@pytest.mark.parametrize("name", EXPORTED)
def test_every_detector_is_exported(name, batch, tmp_path):
    """torch.export and ONNX, with batches of other sizes than the one exported with, 1 among them."""
    torch.manual_seed(0)
    model = small_mlp()
    detector = fitted(name, model, batch)
    deployed = deploy(model, detector)
    program = exported(deployed, batch)
    session = onnx_session(program, batch, tmp_path / "model.onnx")
    program = program.module()
    for n in (1, 7, 40):
        x = torch.randn(n, 3, 8, 8)
        logits, score, is_ood = deployed(x)
        torch.testing.assert_close(score, detector.score(model, x), rtol=1e-5, atol=1e-6)
        assert torch.equal(is_ood, score < detector.threshold)
        assert_same(program(x), (logits, score, is_ood), 1e-5)
        assert_same(session(x), (logits, score, is_ood), 1e-4)
    assert is_ood.dtype == torch.bool


@pytest.mark.parametrize("build", MODELS)
def test_every_model_is_exported(build, batch, tmp_path):
    """By `torch.onnx.export` of the module itself, which exports it in a way of its own."""
    torch.manual_seed(0)
    model = MODELS[build]()
    detector = fitted("NCI", model, batch)
    deployed = deploy(model, detector)
    x = torch.randn(3, 3, 8, 8)
    expected = deployed(x)
    torch.testing.assert_close(expected[1], detector.score(model, x))
    assert_same(exported(deployed, batch).module()(x), expected, 1e-5)
    assert_same(onnx_session(deployed, batch, tmp_path / "model.onnx")(x), expected, 1e-4)
    if build.startswith("Hugging"):
        assert_same(deployed({"pixel_values": x}), expected, 1e-5)


def test_a_saved_program_needs_nothing_of_this_package(batch, tmp_path):
    model = small_cnn()
    deployed = deploy(model, fitted("NCI", model, batch))
    program = exported(deployed, batch)
    assert all(
        str(node.target).startswith(("aten.", "_operator", "<built-in"))
        for node in program.graph.nodes
        if node.op == "call_function"
    )
    torch.export.save(program, tmp_path / "it.pt2")
    assert_same(torch.export.load(tmp_path / "it.pt2").module()(batch), deployed(batch), 1e-5)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the hook's, undone by `take`
def test_strict_export(batch):
    model = small_cnn()
    deployed = deploy(model, fitted("KNN", model, batch))
    program = torch.export.export(deployed, (batch,), strict=True)
    assert_same(program.module()(batch), deployed(batch), 1e-5)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_detector_compiles(name, batch):
    torch._dynamo.reset()
    model = small_mlp()
    deployed = deploy(model, fitted(name, model, batch))
    compiled = torch.compile(deployed, fullgraph=True, backend="aot_eager")
    for x in (batch, batch[:7], batch):
        assert_same(compiled(x), deployed(x), 1e-5)


def test_it_stays_what_it_was(batch):
    """Neither training the model further nor another fit or threshold of the detector changes what was deployed."""
    model = small_cnn()
    model.train()
    detector = fitted("NCI", model, batch)
    deployed = deploy(model, detector)
    assert deployed.detector.mean is detector.mean  # large buffers are not copied
    assert deployed.detector.head_weight.data_ptr() == deployed.model[-1].weight.data_ptr()
    expected = deployed(batch)
    assert model.training
    assert not deployed.model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    detector.fit_features(torch.rand(9, 32), head=(torch.rand(C, 32), None)).calibrate(torch.rand(30))
    assert_same(deployed(batch), expected, 0)
    assert_same(deployed.train()(batch), expected, 0)
    assert not deployed.train().training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(output.requires_grad for output in deployed(batch))
    assert not model[-1]._forward_pre_hooks


def test_moving_one_does_not_move_the_other(batch):
    model = small_cnn()
    detector = fitted("NCI", model, batch)
    deployed = deploy(model, detector).to(torch.float64)
    assert deployed(batch.double())[1].dtype == torch.float64
    assert detector.mean.dtype == torch.float32
    torch.testing.assert_close(deployed(batch.double())[1].float(), detector.score(model, batch))


def test_a_copy_and_a_pickle_are_modules_of_their_own(batch):
    model = small_cnn()
    deployed = deploy(model, fitted("NCI", model, batch))
    expected = deployed(batch)
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    for twin in (copy.deepcopy(deployed), torch.load(file, weights_only=False)):
        assert twin._seen is not deployed._seen
        assert_same(twin(batch), expected, 0)


@pytest.mark.parametrize("name", ["MSP", "NCI"])
@pytest.mark.parametrize("used", [False, True])
def test_other_weights_that_come_later_are_refused(name, used, batch):
    model, other = (nn.Sequential(*small_cnn()[:-1], *(nn.Linear(32, k) for k in (32,) * 5 + (C,))) for _ in range(2))
    model, other = model.eval(), other.state_dict()
    detector = fitted(name, model, batch)
    changes = {
        "loaded": lambda deployed: deployed.model.load_state_dict(other),
        "assigned": lambda deployed: deployed.model.load_state_dict(other, assign=True),
        "in place": lambda deployed: deployed.model[0].weight.mul_(2),
        "statistics": lambda deployed: deployed.model[1].running_var.mul_(4),
        "one of many": lambda deployed: deployed.model[8].bias.add_(1),
    }
    for how, change in changes.items():
        deployed = deploy(model, detector)
        expected = deployed(batch) if used else None
        deployed.model.load_state_dict(model.state_dict())
        deployed.model[1].train()
        assert expected is None or torch.equal(deployed(batch)[1], expected[1]), how
        change(deployed)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"its weights are not those of the model that {name} was fitted on"):
                deployed(batch)
        deployed.detector.fitted_on = None  # that is meant
        deployed.model.load_state_dict(model.state_dict())
        assert len(deployed(batch)) == 3


def test_weights_in_the_place_of_those_that_are_gone_are_other_ones(batch):
    model = small_cnn()
    deployed = deploy(model, fitted("MSP", model, batch))
    deployed(batch)
    for _ in range(100):
        for _ in range(2):  # the second often lies where the first one's predecessor lay
            deployed.model[-1].weight = nn.Parameter(torch.randn(C, model[-1].in_features), requires_grad=False)
        with pytest.raises(ValueError, match="its weights are not those"):
            deployed(batch)


def test_threads_do_not_mix_their_features(batch):
    """One module, called from several threads at once, each of which waits inside the forward pass for the others."""
    meet = threading.Barrier(4)

    class Meeting(nn.Module):
        def forward(self, x):
            meet.wait(timeout=30)
            return x

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, C))
    detector = fitted("NCI", model, batch)
    model.append(Meeting())
    deployed = deploy(model, detector, head="3")
    inputs = torch.randn(4, 6, 3, 8, 8)
    results = [None] * 4

    def call(i: int) -> None:
        results[i] = deployed(inputs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        torch.testing.assert_close(results[i][1], detector.score(model[:-1], inputs[i]))
    assert not deployed._seen.features


def test_wrappers_and_heads_by_layer(batch):
    model = small_cnn()
    detector = fitted("NCI", model, batch)
    expected = deploy(model, detector)(batch)
    assert_same(deploy(nn.DataParallel(model), detector)(batch), expected, 0)
    assert_same(deploy(torch.compile(model), detector)(batch), expected, 0)
    assert_same(deploy(model, detector, head=model[-1])(batch), expected, 0)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_quantized_with_its_head(batch):
    model = small_mlp()
    deployed = deploy(model, fitted("KNN", model, batch))
    in_eight_bits = torch.ao.quantization.quantize_dynamic(deployed, {nn.Linear})
    assert not isinstance(in_eight_bits.model[-1], nn.Linear)
    torch.testing.assert_close(in_eight_bits(batch)[1], deployed(batch)[1], rtol=0.02, atol=0.02)


def test_traced_before_its_first_batch(batch):
    model = small_cnn()
    deployed = deploy(model, fitted("NCI", model, batch))
    assert_same(torch.jit.trace(deployed, (batch,))(batch[:7]), deployed(batch[:7]), 1e-6)


def test_a_logit_detector_looks_for_no_head(batch):
    """SqueezeNet-like: no linear layer at all."""
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    deployed = deploy(model, MSP().calibrate(torch.rand(50)))
    assert deployed(batch)[1].shape == (40,)


def test_refuses(batch):
    model = small_cnn()
    with pytest.raises(RuntimeError, match="MSP has no threshold: call calibrate"):
        deploy(model, MSP())
    with pytest.raises(RuntimeError, match="NCI is not fitted"):
        deploy(model, NCI())
    with pytest.raises(TypeError, match=r"model: got NoneType, expected an nn\.Module"):
        deploy(None, MSP())
    with pytest.raises(TypeError, match="detector: got str 'MSP', expected a Detector"):
        deploy(model, "MSP")
    detector = fitted("KNN", model, batch)
    with pytest.raises(ValueError, match=r"detector: bank: is on meta, expected cpu, where the model is"):
        deploy(model, copy.deepcopy(detector).to("meta"))
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, C))
    wrong = KNN(k=1).fit_features(torch.randn(4, 192)).calibrate(torch.randn(20))
    with pytest.raises(ValueError, match="head: got a layer 192 → 8, but the logits have shape"):
        deploy(two, wrong, head="1")(batch)


@pytest.mark.parametrize("name", [name for name in detectors.known() if detectors.find(name).needs_model])
def test_refuses_detectors_that_need_the_model(name):
    with pytest.raises(ValueError, match="passes inputs of its own through the model"):
        deploy(small_cnn(), detectors.create(name))


def test_a_head_that_does_not_run_as_a_module(batch):
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, C)

        def forward(self, x):
            return nn.functional.linear(x.flatten(1), self.fc.weight, self.fc.bias)

    knn = KNN(k=1).fit_features(torch.randn(4, 192)).calibrate(torch.randn(20))
    with pytest.raises(RuntimeError, match="its head did not run as a module"):
        deploy(Direct(), knn)(batch)


def test_a_model_that_is_nothing_but_its_head():
    model, z = nn.Linear(6, C), torch.randn(30, 6)
    detector = NCI().fit(model, [(z, torch.arange(30) % C)])
    detector.calibrate(detector.score(model, z))
    assert torch.equal(deploy(model, detector)(z)[1], detector.score(model, z))


@pytest.mark.filterwarnings("ignore")
def test_nan_is_flagged_in_programs(batch, tmp_path):
    """Also where the threshold is what every score passes."""
    model = small_mlp().eval()
    detector = fitted("Energy", model, batch)
    detector.threshold = torch.tensor(-1e30)
    deployed = deploy(model, detector)
    x = batch.clone()
    x[0], x[1] = torch.nan, 3e38  # a score of NaN, and one of inf or NaN
    expected = [True, True] + [False] * (len(x) - 2)
    assert exported(deployed, batch).module()(x)[2].tolist() == expected
    session = onnx_session(deployed, batch, tmp_path / "model.onnx")
    assert session(x)[2].tolist() == expected
