"""`examples/serve.py`: eight clients at once get what one after the other gets; what is no image is an answer too."""

from __future__ import annotations

import copy
import importlib
import io
import json
import socket
import struct
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image

from ood_fast import Monitor, serving


@pytest.fixture(scope="module")
def serve() -> Iterator:
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
        yield importlib.import_module("serve")
        for name in ("serve", "made_data"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def service(serve):
    return serve.made_service()


@pytest.fixture
def address(serve, service) -> Iterator[str]:
    with serve.server(service, port=0) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield "http://{}:{}".format(*listening.server_address)
        listening.shutdown()
        thread.join()


def files(serve, n: int) -> list[bytes]:
    """PNG files: half of them of the classes, half noise."""
    inside = serve.images(n - n // 2, seed=5).tensors[0]
    found = []
    for x in [*inside, *torch.randn(n // 2, 3, serve.SIZE, serve.SIZE)]:
        pixels = (255 * (0.15 * x + 0.5)).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "png")
        found.append(buffer.getvalue())
    return found


def ask(url: str, content: bytes | None = None, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(url, content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_eight_clients_at_once(serve, service, address):
    contents = files(serve, 40)
    serial = [service.score(content) for content in contents]
    before = service.health()["images"]
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda content: ask(f"{address}/score", content), contents))
    for (status, said), expected in zip(together, serial, strict=True):
        assert status == 200
        assert (said["class"], said["is_ood"]) == (expected["class"], expected["is_ood"])
        assert said["score"] == pytest.approx(expected["score"], rel=1e-5)
        assert said["probability"] == pytest.approx(expected["probability"], rel=1e-5)
    flagged = [said["is_ood"] for _, said in together]
    assert sum(flagged[:20]) < 8 < sum(flagged[20:])
    status, health = ask(f"{address}/health")
    assert status == 200
    assert health["images"] - before == 40
    assert health["flagged"] == 2 * sum(flagged)


def test_what_is_no_image_is_told(serve, service, address, monkeypatch):
    whole = files(serve, 2)[0]
    unknown_flags = bytearray(128)  # for which Pillow raises no OSError
    unknown_flags[:8], unknown_flags[80:84] = b"DDS \x7c\x00\x00\x00", b"\x80\xff\x00\x00"
    for content in (b"no image", whole[:60], b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(unknown_flags)):
        status, said = ask(f"{address}/score", content)
        assert status == 400
        assert "no image that can be read" in said["error"]
        assert "object at 0x" not in said["error"], "an address in memory"
    assert ask(f"{address}/score", b"")[0] == 400
    assert ask(f"{address}/score", b"x", **{"Content-Length": "many"})[0] == 411
    assert ask(f"{address}/score", b"x", **{"Content-Length": "9" * 5000})[0] == 413  # more digits than int() takes
    monkeypatch.setattr(serving, "MOST_PIXELS", 100)
    assert "32×32 pixels, expected at most 100" in ask(f"{address}/score", whole)[1]["error"]
    monkeypatch.setattr(serving, "LARGEST", 10)
    assert ask(f"{address}/score", whole)[0] == 413
    assert ask(f"{address}/etc/passwd")[0] == ask(f"{address}/", b"x")[0] == 404
    monkeypatch.undo()
    Image.new("RGB", (1, 20_000)).save(thin := io.BytesIO(), "png")
    assert "1×20000 pixels, expected sides within 1:100" in ask(f"{address}/score", thin.getvalue())[1]["error"]
    for failing in (lambda x: 1 / 0, lambda x: (_ for _ in ()).throw(ValueError("ours"))):
        monkeypatch.setattr(service, "deployed", failing)
        assert ask(f"{address}/score", whole) == (500, {"error": "internal error"})
    monkeypatch.undo()
    assert ask(f"{address}/score", whole)[0] == 200, "it goes on"


@pytest.mark.parametrize("gone", [False, True])
def test_clients_that_stop_in_the_middle(gone, serve, service, address, capfd):
    """What came of an image that decoders would take is not scored; who has gone is no traceback."""
    Image.open(io.BytesIO(files(serve, 2)[0])).save(buffer := io.BytesIO(), "tga")
    before = service.health()["images"]
    with socket.create_connection(address.removeprefix("http://").split(":")) as client:
        begun = buffer.getvalue()[: None if gone else -20]
        client.sendall(b"POST /score HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(buffer.getvalue()) + begun)
        if gone:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
        else:
            client.shutdown(socket.SHUT_WR)
            assert b" 400 " in client.recv(1000)
    assert ask(f"{address}/score", files(serve, 2)[0])[0] == 200, "it goes on"
    assert service.health()["images"] - before <= 1 + gone
    assert "Traceback" not in capfd.readouterr().err


def test_numbers_that_json_has_not_are_none(serve, service, monkeypatch):
    """A browser reads no NaN."""
    found = torch.tensor([[torch.nan, 1.0]]), torch.tensor([torch.nan]), torch.tensor([True])
    monkeypatch.setattr(service, "deployed", lambda x: found)
    monkeypatch.setattr(service, "monitor", None)
    monkeypatch.setattr(service, "classes", None)
    monkeypatch.setattr(service.deployed, "detector", None, raising=False)
    said = service.score(files(serve, 2)[0])
    assert (said["probability"], said["score"], said["is_ood"]) == (None, None, True)


def test_what_does_not_belong_together_is_refused(serve, service):
    """A monitor that counts others than are flagged, names of other classes."""
    deployed, prepare = service.deployed, service.prepare
    with pytest.raises(ValueError, match="monitor: got one that flags scores below"):
        serving.Service(deployed, prepare, Monitor(torch.randn(200)))
    with pytest.raises(TypeError, match="prepare: got dict, expected a function"):
        serving.Service(service.deployed, {"size": 32})
    with pytest.raises(TypeError, match="classes: got 2 names, expected"):
        serving.Service(deployed, prepare, classes=["a", "b"]).score(files(serve, 2)[0])
    in_half = serving.Service(copy.deepcopy(deployed).bfloat16(), prepare)
    assert (
        in_half.score(files(serve, 2)[0])["class"]
        == serving.Service(deployed, prepare).score(files(serve, 2)[0])["class"]
    )
    of_flags = serving.Service(deployed, prepare, Monitor(torch.rand(200) < 0.05))
    said = [of_flags.score(file)["is_ood"] for file in files(serve, 6)]
    assert of_flags.health()["flagged"] == sum(said) > 0
