"""`ood-fast demo` by an HTTP client: the page, its policy, and what it says of an image."""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import ood_fast
from ood_fast import cli, serving
from ood_fast.checks import UserError
from ood_fast.commands import demo
from ood_fast.detectors import DetectorSet

pytest.importorskip("torchvision")
from PIL import Image

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
"""
PREPARED = {"size": 4, "resize": 4, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear"}


@pytest.fixture
def fitted(tmp_path, monkeypatch) -> DetectorSet:
    """detectors.safetensors and bundle/ below the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    sys.modules.pop("shownmodel", None)
    Path("shownmodel.py").write_text(MODEL)
    import shownmodel

    model, x = shownmodel.build(), torch.randn(60, 3, 4, 4)
    made = DetectorSet(["NCI", "MSP"]).fit(model, [(x, torch.arange(60) % 3)])
    for name, scores in made.score(model, x).items():
        made[name].calibrate(scores)
    made.save("detectors.safetensors", ("<b>r", "g", "b"), notes={"model": "shownmodel:build", **PREPARED})
    ood_fast.save_bundle("bundle", model, made, PREPARED, classes=("<b>r", "g", "b"))
    return made


def options(*arguments: str) -> argparse.Namespace:
    return cli._parser()[0].parse_args(["demo", "--model", "shownmodel:build", *arguments])


def png() -> bytes:
    Image.new("RGB", (6, 5), (250, 10, 30)).save(file := io.BytesIO(), "png")
    return file.getvalue()


def test_a_bundle_takes_a_preparation_and_no_weights(fitted):
    """They were left aside without a word."""
    service = demo.service_of(options("bundle", "--mean", "0.1,0.2,0.3", "--orientation", "stored"))
    assert not service.upright
    assert "mean 0.1,0.2,0.3" in service.page
    with pytest.raises(UserError, match="--checkpoint: not used with a bundle"):
        demo.service_of(options("bundle", "--checkpoint", "other.pt"))


@pytest.mark.parametrize("file", ["detectors.safetensors", "bundle"])
def test_page_and_answers(file, fitted):
    service = demo.service_of(options(file))
    with serving.server(service, port=0) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        address = "http://{}:{}".format(*listening.server_address)
        try:
            with urllib.request.urlopen(f"{address}/", timeout=60) as answer:
                page = answer.read().decode()
                assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            with urllib.request.urlopen(f"{address}/score", png(), timeout=60) as answer:
                said = json.load(answer)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(f"{address}/score", b"no image", timeout=60)
        finally:
            listening.shutdown()
            thread.join()
    policy = re.search(r'Content-Security-Policy" content="(.*?)">', page)[1]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'; base-uri" in policy
    assert policy.startswith("default-src 'none'")
    assert policy.endswith("form-action 'none'; connect-src 'self'; img-src blob:")
    assert "innerHTML" not in script
    x = service.prepare(Image.open(io.BytesIO(png())).convert("RGB"))[None]
    assert said["class"] == ("<b>r", "g", "b")[int(service.deployed.model(x).argmax())]
    for each in said["detectors"]:
        assert each["is_ood"] == (not each["score"] >= each["threshold"])
        assert each["threshold"] == float(fitted[each["name"]].threshold)
    assert [each["name"] for each in said["detectors"]] == ["NCI", "MSP"]


def test_what_does_not_fit_is_told_before_anything_is_served(fitted, capsys, monkeypatch):
    monkeypatch.setattr(serving, "server", lambda *_: pytest.fail("it was served"))
    model = ("--model", "shownmodel:build")
    for code, message, *arguments in (
        (2, "No such file", "missing.safetensors", *model),
        (1, "the model cannot take images of (3, 5, 5)", "detectors.safetensors", *model, "--size", "5"),
        (2, "the bundle names no architecture", "bundle"),
        (2, "did you mean 'NCI'?", "bundle", *model, "--detectors", "NIC"),
        (2, "expected at most 65535", "bundle", *model, "--port", "70000"),
    ):
        assert cli.main(["demo", *arguments]) == code
        told = capsys.readouterr().err
        assert message in told, told
        assert told.startswith("ood-fast: ")
    Path("bundle/model.safetensors").write_bytes(Path("bundle/model.safetensors").read_bytes()[:-1] + b"?")
    assert cli.main(["demo", "bundle", *model]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_port_that_is_taken_and_ctrl_c(fitted, capsys, monkeypatch):
    service = demo.service_of(options("bundle"))
    monkeypatch.setattr(demo, "service_of", lambda options: service)
    with serving.server(service, port=0) as taken:
        port = str(taken.server_address[1])
        assert cli.main(["demo", "bundle", "--port", port]) == 1
    assert "in use" in capsys.readouterr().err

    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serving.Server, "serve_forever", interrupted)
    assert cli.main(["demo", "bundle", "--port", "0"]) == 0
    assert capsys.readouterr().err == "stopped\n"
