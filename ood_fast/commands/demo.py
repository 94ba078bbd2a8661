"""`ood-fast demo`: a page to drop an image on, which says its class and what each detector thinks of it."""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import serving
from ..bundle import load_bundle
from ..checks import UserError
from ..data.images import prepared_as
from ..deployment import deploy
from ..detectors import DetectorSet
from ..report.pages import document, resource
from ..serving import Service
from . import RunError
from .code import import_plugins
from .common import listed, refuse_given
from .model import cannot_take, deployable, fitted, is_callable, named, preparation_of, text_of

POLICY = "; connect-src 'self'; img-src blob:"  # it asks this server alone, and shows the image that was dropped
OF_WEIGHTS = ("checkpoint", "pretrained", "n_classes", "other_model")


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command, until it is interrupted."""
    if options.port > 65535:
        raise UserError(f"--port: got {options.port}, expected at most 65535")
    import_plugins(options)
    service = service_of(options)
    with serving.server(service, options.host, options.port) as listening:
        if not options.quiet:
            print("http://{}:{}  (Ctrl-C ends it)".format(*listening.server_address[:2]), flush=True)
        try:
            listening.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def service_of(options: argparse.Namespace) -> Service:
    """What the options of the command serve."""
    folder = Path(options.file).expanduser()
    model, detectors, prepared = _of_bundle(folder, options) if folder.is_dir() else fitted(options)
    try:
        deployed = deploy(model, detectors, options.head)
        size = prepared["size"], prepared["size"]
        deployed(torch.rand(2, len(prepared["mean"]), *size))  # what does not fit is told now
    except RuntimeError as error:
        raise RunError(cannot_take(prepared, error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    classes = next((each.class_names for _, each in detectors.items() if each.class_names), None)
    upright = prepared.get("orientation", "exif") == "exif"
    return Service(deployed, prepared_as(prepared), None, classes, _page(folder.name, prepared), upright)


def _of_bundle(folder: Path, options: argparse.Namespace) -> tuple[nn.Module, DetectorSet, dict[str, Any]]:
    """The model and detectors of `save_bundle`, and how its images are prepared."""
    refuse_given(options, "not used with a bundle, which has its weights", *OF_WEIGHTS)
    model = named(options.model) if options.model and is_callable(options.model) else options.model
    try:
        bundle = load_bundle(folder, model)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    found = bundle.detectors if isinstance(bundle.detectors, DetectorSet) else DetectorSet([bundle.detectors])
    for _, each in found.items():
        each.class_names = each.class_names or bundle.classes
    kept = {"interpolation": "bilinear", "orientation": "exif"} | bundle.preparation
    prepared = preparation_of(options, bundle.model, kept)
    return bundle.model, deployable(found, listed(options.detectors or "")), prepared


def _page(name: str, prepared: dict[str, Any]) -> str:
    body = f"""<h1>{html.escape(name)}</h1>
<p class=lead>Drop an image anywhere on this page, paste one, or choose: <input type=file accept="image/*"></p>
<p><img alt="" width=224></p><h2 id=verdict></h2>
<table><thead><tr><th>detector<th>score<th>threshold<th>verdict</tr></thead><tbody></tbody></table>
<p class=caption>Scores below the threshold are out-of-distribution. Images: {html.escape(text_of(prepared))}.</p>"""
    return document(f"ood_fast demo: {name}", body, "ood_fast demo", resource("demo.js"), POLICY)
