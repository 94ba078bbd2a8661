"""A deployed classifier behind HTTP, by Python's own server: nothing has to be installed.

    service = Service(ood_fast.deploy(model, detector), transform, monitor, classes)
    with server(service, port=8000) as listening:
        listening.serve_forever()

    curl --data-binary @image.png http://127.0.0.1:8000/score
    curl http://127.0.0.1:8000/health

`Service.score` and `Service.health` are what the routes of another framework (FastAPI, Flask) would call. One deployed
module serves all threads. It neither encrypts nor knows who asks: without a proxy in front of it, it is for this
machine alone.
"""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from . import checks
from .data import decoding
from .deployment import Deployed
from .detectors import DetectorSet
from .monitor import Monitor

LARGEST = 10 * 2**20  # bytes of a request
MOST_PIXELS = 50_000_000
WIDEST = 100  # times the short side; what is resized by that one grows by its square: 157 bytes of 1×20,000 took 5 GB
TIMEOUT = 30.0  # seconds without a byte, after which a client is given up


class UnreadableError(ValueError):
    """No image, or none that is scored here."""


class Service:
    """What is served: no request changes anything of it but the monitor.

    Args:
        deployed: what `ood_fast.deploy` gave, of one detector or of a set.
        prepare: PIL image in RGB -> the tensor (channels, size, size) that the model takes.
        monitor: watches the score, or the flag, of a set that of its first detector, whose threshold it has to have;
            None: `health` tells nothing. classes: their names in the order of the logits.
        page: HTML that GET / shows, and the content-security policy that goes with it.
        upright: whether images are turned as their EXIF orientation says.

    Raises ValueError for a monitor with another threshold, TypeError for a preparation that is no function; `score`
    TypeError for classes of another number.
    """

    def __init__(
        self,
        deployed: Deployed,
        prepare: Callable[[Any], Tensor],
        monitor: Monitor | None = None,
        classes: Sequence[str] | None = None,
        page: str | None = None,
        upright: bool = True,
    ) -> None:
        if not callable(prepare):
            got = type(prepare).__name__
            raise TypeError(f"prepare: got {got}, expected a function from an image to a tensor, such as a transform")
        self.deployed, self.prepare, self.monitor, self.classes = deployed, prepare, monitor, classes
        self.page, self.upright = page, upright
        self._like = next(deployed.parameters(), None)
        ours = deployed.thresholds.flatten()[0].item()
        if monitor is not None and not monitor.flags and not math.isclose(monitor.threshold, ours, rel_tol=1e-6):
            got = f"one that flags scores below {monitor.threshold:.6g}"
            raise ValueError(f"monitor: got {got}, expected {ours:.6g}: Monitor(scores, threshold=detector.threshold)")

    def score(self, content: bytes) -> dict[str, Any]:
        """What is said of one image file: class, probability, score, is_ood; of a set, a list `detectors` of the last
        two with name and threshold. Numbers that are NaN or infinite are None. `UnreadableError`, a ValueError, for
        what is no image."""
        x = self._prepared(content)[None]
        if self._like is not None:
            x = x.to(self._like if checks.is_float(self._like) else self._like.device)
        with torch.inference_mode():
            logits, score, is_ood = self.deployed(x)
        if self.classes is not None and len(self.classes) != logits.shape[1]:
            raise TypeError(f"classes: got {len(self.classes)} names, expected {logits.shape[1]}, one for each logit")
        if self.monitor is not None:
            self.monitor.update((is_ood if self.monitor.flags else score).reshape(1, -1)[:, 0])
        k = int(logits.argmax())
        said: dict[str, Any] = {"class": k if self.classes is None else self.classes[k]}
        said["probability"] = _number(logits.softmax(1).max())
        if not isinstance(self.deployed.detector, DetectorSet):
            return said | {"score": _number(score), "is_ood": bool(is_ood)}
        columns = (each.flatten().tolist() for each in (score, self.deployed.thresholds, is_ood))
        said["detectors"] = [
            {"name": n, "score": _number(s), "threshold": _number(t), "is_ood": o}
            for n, s, t, o in zip(self.deployed.detector, *columns, strict=True)
        ]
        return said

    def _prepared(self, content: bytes) -> Tensor:
        pillow = decoding.pillow()
        try:
            with pillow.open(io.BytesIO(content)) as file:
                if file.width * file.height > MOST_PIXELS:  # a small file may unpack to gigabytes
                    raise ValueError(f"{file.width}×{file.height} pixels, expected at most {MOST_PIXELS}")
                if max(file.size) > WIDEST * min(file.size):
                    raise ValueError(f"{file.width}×{file.height} pixels, expected sides within 1:{WIDEST}")
                image = decoding.rgb(file, self.upright)
        except Exception as error:  # decoders fail in every way
            reason = "its format is unknown" if isinstance(error, pillow.UnidentifiedImageError) else error
            raise UnreadableError(f"no image that can be read: {reason}") from error
        try:
            return self.prepare(image)
        except ValueError as error:
            raise UnreadableError(f"no image that is taken here: {error}") from error

    def health(self) -> dict[str, Any]:
        """How many images were flagged, and whether the stream is no longer what the threshold was set on."""
        if self.monitor is None:
            return {"alarm": None}
        reading = self.monitor.reading()
        said = {"images": reading.n, "flagged": reading.n_flagged, "alarm": reading.alarm, "alarm_at": reading.alarm_at}
        return said | {"flag_rate": reading.flag_rate if reading.n else None}


def _number(value: Any) -> float | None:
    """As JSON has it: None in place of NaN and infinities."""
    return float(value) if math.isfinite(value) else None


class Handler(BaseHTTPRequestHandler):
    """GET /health, POST /score with the bytes of an image file, which answer JSON; GET / where there is a page."""

    service: Service
    timeout = TIMEOUT

    def do_GET(self) -> None:
        """Health, or the page."""
        if self.path == "/health":
            self._answer(200, self.service.health())
        elif self.path == "/" and self.service.page is not None:
            self._send(200, "text/html; charset=utf-8", self.service.page.encode())
        else:
            self._answer(404, {"error": "expected GET /health or POST /score"})

    def do_POST(self) -> None:
        """The score of an image."""
        length = self.headers.get("Content-Length", "")
        n_bytes = int(length) if length.isdecimal() and len(length) < 20 else 0
        content = self.rfile.read(min(n_bytes, LARGEST + 2**20))  # what is left unread may cost the client our answer
        expected = f"expected 1 to {LARGEST} bytes"
        if self.path != "/score":
            self._answer(404, {"error": "expected GET /health or POST /score"})
        elif not length.isdecimal():  # such as chunks
            self._answer(411, {"error": f"Content-Length: got {length or 'none'}, {expected}"})
        elif n_bytes > LARGEST or len(length) >= 20:
            self._answer(413, {"error": f"Content-Length: got {length[:20]}, {expected}"})
        elif not 0 < n_bytes == len(content):  # decoders take some images that end too early
            self._answer(400, {"error": f"body: got {len(content)} of {n_bytes} bytes, {expected}"})
        else:
            self._answer(*self._said(content))

    def _said(self, content: bytes) -> tuple[int, dict[str, Any]]:
        try:
            return 200, self.service.score(content)
        except UnreadableError as error:
            return 400, {"error": str(error)}
        except Exception:
            logging.exception("a request failed")  # for us, not for whoever asks
            return 500, {"error": "internal error"}

    def _answer(self, status: int, said: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(said).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """To the log of Python."""
        logging.info(*arguments)


class Server(ThreadingHTTPServer):
    """A thread for each request."""

    daemon_threads = True
    request_queue_size = 64  # connections that wait to be accepted: bursts are not refused

    def handle_error(self, request: Any, client_address: Any) -> None:
        """To the log of Python; a client that is gone is no error."""
        gone = isinstance(sys.exc_info()[1], ConnectionError)
        logging.log(logging.INFO if gone else logging.ERROR, "no answer was sent", exc_info=not gone)


def server(service: Service, host: str = "127.0.0.1", port: int = 8000) -> Server:
    """Ready to `serve_forever`; port 0 takes a free one, see `server_address`. OSError if the port is taken."""
    return Server((host, port), type("ServiceHandler", (Handler,), {"service": service}))
