"""`ood-fast export`, `onnx_export.write`, `deploy` of several detectors: the file gives what PyTorch gives."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ood_fast import cli, deployment, detectors, files, onnx_export
from ood_fast.detectors import MSP, NCI, DetectorSet, Energy

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torchvision")
from PIL import Image

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)).eval()
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_a_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    sys.modules.pop("exportedmodel", None)
    Path("exportedmodel.py").write_text(MODEL)


def build() -> nn.Module:
    import exportedmodel

    return exportedmodel.build()


def images(n: int = 24) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8)


def fitted(chosen: list, model: nn.Module) -> DetectorSet:
    x = (images() - 0.5) / 0.25
    fitted = DetectorSet(chosen).fit(model, [(x, torch.arange(len(x)) % 3)])
    for name, scores in fitted.score(model, x).items():
        fitted[name].calibrate(scores, tpr=0.7)
    return fitted


def session(path: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def saved(chosen: list | None = None, **notes) -> DetectorSet:
    """detectors.safetensors as `ood-fast fit` writes it."""
    made = fitted(chosen or ["NCI", "Energy", "MSP"], build())
    given = {
        "model": "exportedmodel:build",
        "size": 8,
        "resize": 9,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
    }
    made.save("detectors.safetensors", ("r", "g", "b"), notes=given | notes)
    return made


EXPORT = ["export", "detectors.safetensors", "--model", "exportedmodel:build"]


def test_export_as_a_user_runs_it(capsys):
    made = saved()
    Path("photos").mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 255, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{index}.png")
    assert cli.main([*EXPORT, "--data", "photos", "--out", "out/model.onnx"]) == 0, capsys.readouterr().err
    assert "onnxruntime agrees with PyTorch on 10 images" in capsys.readouterr().out
    assert sorted(path.name for path in Path("out").iterdir()) == ["model.json", "model.onnx"]

    said = json.loads(Path("out/model.json").read_text())
    assert said["sha256"] == hashlib.sha256(Path("out/model.onnx").read_bytes()).hexdigest()
    assert said["input"]["shape"] == ["batch", 3, 8, 8]
    assert said["input"]["normalisation"] == {"where": "in the file", "mean": list(MEAN), "std": list(STD)}
    assert said["classes"] == ["r", "g", "b"]
    assert list(said["detectors"]) == ["NCI", "Energy", "MSP"]
    assert said["preparation"]["resize"] == 9
    thresholds = torch.stack([made[name].threshold for name in made])
    torch.testing.assert_close(torch.tensor(said["optional_input"]["default"]), thresholds.float())

    # In another process, by another library; a batch of another size.
    ran = session("out/model.onnx")
    x = images(7)
    logits, score, is_ood = (torch.from_numpy(each) for each in ran.run(None, {"images": x.numpy()}))
    prepared = (x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    torch.testing.assert_close(logits, build()(prepared), rtol=1e-4, atol=1e-5)
    expected = torch.stack(list(made.score(build(), prepared).values()), 1)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)
    sure = (expected - thresholds).abs() > 1e-4
    assert torch.equal(is_ood[sure], (expected < thresholds)[sure])
    lowest = np.full(3, -1e30, np.float32)
    assert not ran.run(["is_ood"], {"images": x.numpy(), "threshold": lowest})[0].any()
    unknown = np.full_like(x.numpy(), np.nan)
    assert ran.run(["is_ood"], {"images": unknown, "threshold": lowest})[0].all(), "NaN is flagged"

    # A second one is refused, and replaces the first when asked to.
    assert cli.main([*EXPORT, "--out", "out/model.onnx"]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    again = [*EXPORT, "--detectors", "MSP", "--out", "out/model.onnx", "--overwrite", "--quiet"]
    assert cli.main(again) == 0
    assert capsys.readouterr().out == ""
    assert session("out/model.onnx").get_outputs()[1].shape == ["batch"], "one detector: no columns"


def test_a_set_is_deployed_by_columns():
    model = build()
    made = fitted([NCI(), MSP(), Energy()], model)
    deployed = deployment.deploy(model, made)
    x = images(5)
    logits, score, is_ood = deployed(x)
    expected = made.score(model, x)
    torch.testing.assert_close(score, torch.stack(list(expected.values()), 1))
    assert torch.equal(is_ood, torch.stack([made[name].is_ood(each) for name, each in expected.items()], 1))
    assert deployed.thresholds.shape == (3,)
    made["NCI"].threshold = made["NCI"].threshold.reshape(1)  # by hand it may be so
    assert deployment.deploy(model, made).thresholds.shape == (3,)
    single = deployment.deploy(model, made["NCI"])
    torch.testing.assert_close(single(x)[1], score[:, 0])
    torch.testing.assert_close(single(x)[0], logits)
    assert single.thresholds.shape == ()
    program = torch.export.export(deployed, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    torch.testing.assert_close(program.module()(images(9))[1].shape, (9, 3))
    made["MSP"].threshold = None
    with pytest.raises(RuntimeError, match="MSP has no threshold"):
        deployment.deploy(model, made)
    with pytest.raises(ValueError, match="ODIN passes inputs of its own"):
        deployment.deploy(model, DetectorSet(["ODIN"]))


class WithoutExport(nn.Module):
    """Whether a batch is large is asked of Python."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) if x.sum() > -1e9 else self.model(-x)


def test_what_cannot_be_exported_leaves_nothing(capsys, monkeypatch):
    model = build()
    deployed = deployment.deploy(WithoutExport(model), fitted(["MSP"], model)["MSP"])
    with pytest.raises(onnx_export.ExportError, match="cannot export this model"):
        onnx_export.write(deployed, "it.onnx", images())
    monkeypatch.setattr(onnx_export, "_export", lambda module, images, file: file.write_bytes(b"no model"))
    saved(["MSP"])
    assert cli.main([*EXPORT, "--out", "it.onnx"]) == 1
    assert "onnxruntime cannot run the exported model" in capsys.readouterr().err
    assert not list(Path().glob("*.onnx"))
    assert not list(Path().glob("it*"))


def test_other_numbers_in_onnxruntime_are_found():
    """The file of one model against another."""
    model = build()
    detector = fitted(["MSP"], model)["MSP"]
    module = onnx_export.Prepared(deployment.deploy(model, detector), MEAN, STD, 3).eval()
    x = images(6)
    onnx_export._export(module, x, Path("it.onnx"))
    logits, score, is_ood = (each.detach() for each in module(x, module.threshold))
    onnx_export._check(Path("it.onnx"), module, x, (logits, score, is_ood))
    with pytest.raises(onnx_export.ExportError, match="another logits than PyTorch"):
        onnx_export._check(Path("it.onnx"), module, x, (logits * 1.1, score, is_ood))
    with pytest.raises(onnx_export.ExportError, match="another score than PyTorch"):
        onnx_export._check(Path("it.onnx"), module, x, (logits, score + 0.1, is_ood))


def test_each_score_is_compared_by_its_own_size():
    """MSP beside an energy of thousands; and where the largest is no number."""
    model = build()
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
    module = onnx_export.Prepared(deployment.deploy(model, fitted(["Energy", "MSP"], model)), MEAN, STD, 3).eval()
    x = images(6)
    onnx_export._export(module, x, Path("it.onnx"))
    logits, score, is_ood = (each.detach() for each in module(x, module.threshold))
    onnx_export._check(Path("it.onnx"), module, x, (logits, score, is_ood))
    with pytest.raises(onnx_export.ExportError, match="another score than PyTorch"):
        onnx_export._check(Path("it.onnx"), module, x, (logits, score - torch.tensor([0.0, 0.1]), is_ood))
    allowed = onnx_export._allowed("score", torch.tensor([[-torch.inf, 1.0], [2.0, 3.0]]))
    torch.testing.assert_close(allowed, torch.tensor([2e-3, 3e-3]))


@pytest.mark.parametrize("chosen", [["NCI", "ASH", "ReAct"], ["BoundaryDistance"]])  # with features, and without
def test_a_head_stands_in_the_file_once(chosen, monkeypatch):
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(detectors.boundary, "TABLE_BYTES", 0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1400))  # what is smaller the exporter works out
    deployed = deployment.deploy(model, fitted(chosen, model)).to("cpu")
    onnx_export.write(deployed, "it.onnx", images())
    deployed.double().float()  # each is moved by itself
    torch.onnx.export(deployed, (images(),), "plain.onnx", dynamo=True, verbose=False)
    for file in ("it.onnx", "plain.onnx"):
        shapes = [list(held.dims) for held in onnx.load(file).graph.initializer]
        assert shapes.count(list(model[-1].weight.shape)) == 1


def test_more_classes_than_a_table_is_kept_of(monkeypatch):
    """Close rows of the head keep their digits, rows that coincide have no boundary."""
    monkeypatch.setattr(detectors.boundary, "TABLE_BYTES", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    with torch.no_grad():
        model[-1].weight[1:3] = model[-1].weight[0] + 1e-4 * torch.randn(2, 192)
        model[-1].weight[4] = model[-1].weight[3]
    chosen = DetectorSet(["FDBD", "BoundaryDistance", "TemperedMSP"])
    chosen.fit(model, [(x := images(), torch.arange(24) % 7)])
    scores = chosen.score(model, x)
    for name, each in chosen.items():
        assert getattr(each, "table", None) is None
        each.calibrate(scores[name], tpr=0.7)
    onnx_export.write(deployment.deploy(model, chosen), "it.onnx", x)
    found = torch.from_numpy(session("it.onnx").run(["score"], {"images": x.numpy()})[0])
    torch.testing.assert_close(found, torch.stack(list(scores.values()), 1), rtol=1e-4, atol=1e-6)


def test_distances_averaged_over_classes_have_a_form_in_onnx():
    """With rows of the head that coincide, classes that are masked, and NaN."""
    torch.manual_seed(0)
    W, f = torch.randn(5, 12), torch.randn(60, 5)
    W[1] = W[0]
    f[:10, 3] = -torch.inf
    detector = detectors.BoundaryDistance(average="classes").fit_features(None, None, None, (W, None))
    torch.onnx.export(detector.eval(), (None, f), "classes.onnx", dynamo=True, verbose=False, input_names=["f"])
    expected = detector.score_features(None, f)
    f[20, 1] = expected[20] = torch.nan
    (found,) = session("classes.onnx").run(None, {"f": f.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, equal_nan=True)


def test_nan_is_flagged_whatever_a_maximum_makes_of_it():
    """onnxruntime's maxima and its max pooling drop NaN: of pixels, and of some logits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3))
    onnx_export.write(deployment.deploy(model, fitted(["Energy", "KNN"], model)), "it.onnx", x := images())
    x[1, 0, 0, 0] = torch.nan
    _, score, is_ood = session("it.onnx").run(None, {"images": x.numpy()})
    assert np.isnan(score).any(1).tolist() == [index == 1 for index in range(24)]
    assert is_ood[1].all()

    z, f = torch.rand(60, 12), torch.randn(60, 5)
    reading = DetectorSet(["SML", "SHE", detectors.NECO(dim=4)]).fit_features(
        z, f, f.argmax(1), (torch.randn(5, 12), None)
    )
    torch.onnx.export(reading, (z, f), "reading.onnx", dynamo=True, verbose=False, input_names=["z", "f"])
    f[2, 3] = torch.nan
    for scores in session("reading.onnx").run(None, {"z": z.numpy(), "f": f.numpy()}):
        assert np.isnan(scores).nonzero()[0].tolist() == [2]


def test_scores_that_tie_in_float32_are_told_apart():
    """Beside others: columns of one dtype."""
    model = build()
    model[-1].weight.data *= 40
    model[-1].bias.data *= 40
    x = images(200)
    for chosen in ([MSP(0.04)], [Energy(), MSP(0.04), detectors.GEN(10)]):
        found = fitted(chosen, model)
        for name, scores in found.score(model, x).items():
            found[name].calibrate(scores, tpr=0.7)
        said = onnx_export.write(deployment.deploy(model, found if len(chosen) > 1 else found["MSP"]), "it.onnx", x[:9])
        flags = session("it.onnx").run(None, {"images": x.numpy()})[2]
        assert (abs(flags.mean(0) - 0.3) < 0.02).all()
        assert said["optional_input"]["dtype"] == "float64"


def test_flags_are_those_of_deploy(monkeypatch):
    model = build()
    module = onnx_export.Prepared(deployment.deploy(model, fitted(["MSP"], model)["MSP"]), MEAN, STD, 3)
    scores = torch.tensor([torch.inf, torch.nan, 1.0, -1.0])
    monkeypatch.setattr(module.deployed, "forward", lambda x: (x, scores, None))
    assert module(images(4), torch.tensor(0.0))[2].tolist() == [True, True, False, True]


def test_refuses(monkeypatch):
    model = build()
    deployed = deployment.deploy(model, fitted(["MSP"], model)["MSP"])
    for arguments, message in (
        ((deployed, "it.pt", images()), "expected a name ending in .onnx"),
        ((deployed, "it.onnx", images(1)), "at least 2"),
        ((deployed, "it.onnx", images(), (1.0, 2.0)), "mean: got"),
        ((deployed, "it.onnx", images(), (0.0,), (0.0,)), "std: got"),
        ((deployed, "it.onnx", images().to("meta")), "expected the CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            onnx_export.write(*arguments)
    with pytest.raises(TypeError, match="deployed: got Sequential"):
        onnx_export.write(model, "it.onnx", images())


def test_many_weights_stand_beside_the_file(monkeypatch):
    """What one protocol buffer cannot hold; told of in the JSON, and gone with the next file of the name."""
    model = build()
    deployed = deployment.deploy(model, fitted(["KNN"], model)["KNN"])
    x = images()
    whole = onnx_export.write(deployed, "folder/it.onnx", x)
    monkeypatch.setattr(onnx_export, "MOST", 100)
    said = onnx_export.write(deployed, "folder/it.onnx", x)
    assert said["weights"] == "it.onnx.data"
    assert said["weights_sha256"] == files.sha256("folder/it.onnx.data")
    assert json.loads(Path("folder/it.json").read_text())["weights"] == "it.onnx.data"
    Path("folder").rename("elsewhere")
    found = session("elsewhere/it.onnx").run(["logits", "score"], {"images": x.numpy()})
    for one, expected in zip(found, deployed(x), strict=False):
        torch.testing.assert_close(torch.from_numpy(one), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(onnx_export, "MOST", 2**30)
    assert onnx_export.write(deployed, "elsewhere/it.onnx", x)["sha256"] == whole["sha256"]
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["it.json", "it.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "model.pt"], "expected a name ending in .onnx"),
        (["--out", "it.onnx", "--detectors", "NCJ"], "did you mean 'NCI'?"),
        (["--out", "it.onnx", "--detectors", "NCI,ODIN"], "leave it out with --detectors NCI"),
        (["--out", "it.onnx", "--detectors", "Energy"], "Energy has no threshold: fit with --validation"),
        (["--out", "it.onnx", "--detectors", "NCI", "--size", "1"], "the model cannot take images of (3, 1, 1)"),
        (["--out", "it.onnx", "--detectors", "NCI", "--data", "none"], "none: no such file or folder"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    made = fitted(["NCI", "Energy"], build())
    made["Energy"].threshold = None
    made = DetectorSet({**dict(made.items()), "ODIN": detectors.create("ODIN")})
    made.save("detectors.safetensors", notes={"size": 8, "resize": 8, "mean": MEAN, "std": STD})
    assert cli.main([*EXPORT, *arguments]) in (1, 2)
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not list(Path().glob("*.onnx"))


def test_without_the_packages(monkeypatch, capsys):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "onnxscript" else found(name, *more))
    saved(["MSP"])
    assert cli.main([*EXPORT, "--out", "it.onnx"]) == 2
    assert "ONNX needs onnxscript, which is not installed: pip install onnxscript" in capsys.readouterr().err


def test_other_weights_are_refused(capsys):
    saved(["MSP"], fingerprint="of others")
    assert cli.main([*EXPORT, "--out", "it.onnx"]) == 2
    assert "--other-model" in capsys.readouterr().err
