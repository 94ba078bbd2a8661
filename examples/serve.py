"""A service: an image in, its class, its score and whether it is out-of-distribution out; health says whether to worry.

    python examples/serve.py --port 8000
    curl --data-binary @image.png http://127.0.0.1:8000/score
    curl http://127.0.0.1:8000/health

Python's own server, so that nothing has to be installed. `Service.score` and `Service.health` are what the routes of
another framework (FastAPI, Flask) would call. One deployed module serves all threads. It neither encrypts nor knows who
asks: without a proxy in front of it, it is for this machine alone.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from made_data import N_CLASSES, SIZE, images
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader

import ood_fast
from ood_fast.data import decoding
from ood_fast.data.images import preparation

LARGEST = 10 * 2**20  # bytes of a request
MOST_PIXELS = 50_000_000
TIMEOUT = 30.0  # seconds without a byte, after which a client is given up


class Service:
    """What is served: no request changes anything of it but the monitor."""

    def __init__(
        self, deployed: nn.Module, prepare: Callable, monitor: ood_fast.Monitor, classes: list[str] | None = None
    ) -> None:
        self.deployed, self.prepare, self.monitor, self.classes = deployed, prepare, monitor, classes

    def score(self, content: bytes) -> dict:
        """What is said of one image file. ValueError for what is none."""
        try:
            with decoding.pillow().open(io.BytesIO(content)) as file:
                if file.width * file.height > MOST_PIXELS:  # a small file may unpack to gigabytes
                    raise ValueError(f"{file.width}×{file.height} pixels, expected at most {MOST_PIXELS}")
                x = self.prepare(decoding.rgb(file, True))[None]
        except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"no image that can be read: {error}") from error
        with torch.inference_mode():
            logits, score, is_ood = self.deployed(x)
        self.monitor.update(score)
        k = int(logits.argmax())
        said = {"class": k if self.classes is None else self.classes[k], "probability": float(logits.softmax(1).max())}
        return said | {"score": float(score), "is_ood": bool(is_ood)}

    def health(self) -> dict:
        """How many images were flagged, and whether the stream is no longer what the threshold was set on."""
        reading = self.monitor.reading()
        said = {"images": reading.n, "flagged": reading.n_flagged, "alarm": reading.alarm, "alarm_at": reading.alarm_at}
        return said | {"flag_rate": reading.flag_rate if reading.n else None}


class Handler(BaseHTTPRequestHandler):
    """GET /health, POST /score with the bytes of an image file; answers JSON."""

    service: Service
    timeout = TIMEOUT

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, self.service.health())
        else:
            self._answer(404, {"error": "expected GET /health or POST /score"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        n_bytes = int(length) if length.isdecimal() else 0
        content = self.rfile.read(min(n_bytes, LARGEST + 2**20))  # what is left unread may cost the client our answer
        if self.path != "/score":
            self._answer(404, {"error": "expected GET /health or POST /score"})
            return
        if not 0 < n_bytes <= LARGEST:
            self._answer(413, {"error": f"Content-Length: got {length!r}, expected 1 to {LARGEST} bytes"})
            return
        try:
            self._answer(200, self.service.score(content))
        except ValueError as error:
            self._answer(400, {"error": str(error)})
        except Exception:
            logging.exception("a request failed")  # for us, not for whoever asks
            self._answer(500, {"error": "internal error"})

    def _answer(self, status: int, said: dict) -> None:
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        logging.info(*arguments)


class Server(ThreadingHTTPServer):
    """A thread for each request."""

    daemon_threads = True
    request_queue_size = 64  # connections that wait to be accepted: bursts are not refused


def server(service: Service, host: str = "127.0.0.1", port: int = 8000) -> Server:
    """Ready to `serve_forever`; port 0 takes a free one, see `server_address`."""
    return Server((host, port), type("ServiceHandler", (Handler,), {"service": service}))


def made_service() -> Service:
    """A small model on made images; in its place: `models.create`, `models.load_checkpoint` and `detectors.load`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, N_CLASSES))
    criterion, optimizer = (
        ood_fast.ELogitNormLoss(model[-1]),
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    )
    loader = DataLoader(images(256, seed=1), batch_size=32, shuffle=True)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    logging.info("trained, loss %.3f", loss.item())
    detector = ood_fast.detectors.NCI().fit(model, loader)
    scores = detector.score(model, images(300, seed=3).tensors[0])
    detector.calibrate(scores, alpha=0.05)
    monitor = ood_fast.Monitor(scores, alpha=0.001, threshold=detector.threshold)
    prepare = preparation(SIZE, SIZE, (0.5, 0.5, 0.5), (0.15, 0.15, 0.15))
    return Service(ood_fast.deploy(model, detector), prepare, monitor, [f"pattern {k}" for k in range(N_CLASSES)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    logging.basicConfig(level=logging.INFO)
    with server(made_service(), port=parser.parse_args().port) as listening:
        logging.info("serving at http://%s:%d", *listening.server_address)
        try:
            listening.serve_forever()
        except KeyboardInterrupt:
            logging.info("stopped")


if __name__ == "__main__":
    main()
