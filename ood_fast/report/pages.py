"""What the HTML pages of the package share: one file each, without requests, light and dark, readable on a phone."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
from collections.abc import Mapping
from importlib import resources
from typing import Any
from urllib.parse import quote


@functools.cache
def resource(name: str) -> str:
    """A file beside this one: style.css, page.js or demo.js."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def document(title: str, body: str, generator: str = "ood_fast", script: str = "", policy: str = "") -> str:
    """A page of `body`, HTML, with the style that all share; with `script`, which may do what `policy` adds, or the one
    that sorts tables where there is one."""
    code = script or (f"\n{resource('page.js')}" if "<table class=sortable>" in body else "")
    policy = _policy(code, body) + policy
    element = f"<script>{code}</script>" if code else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>
{resource("style.css")}</style></head><body>
{body}
{element}</body></html>
"""


def _policy(code: str, body: str) -> str:
    """What the page may do: show its own style and run this code. A name that stood in it unescaped would run nothing,
    and nothing leaves the page."""
    allowed = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    scripts = f" script-src 'sha256-{allowed}';" if code else ""
    images = " img-src data:;" if '<img alt="" src="data:image/' in body else ""
    return f"default-src 'none'; style-src 'unsafe-inline';{scripts}{images} base-uri 'none'; form-action 'none'"


def thumbnail(image: Any) -> str:
    """HTML of a PIL image, small: its longer side has at most 96 pixels."""
    small = image.copy()
    small.thumbnail((96, 96))
    held = io.BytesIO()
    small.save(held, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}">'


def definitions(facts: Mapping[str, str]) -> str:
    """A list of names and what belongs to them."""
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{listed}</dl>"


def folded(title: str, content: str, *, opened: bool = False) -> str:
    """HTML that a click on its title shows."""
    return f"<details{' open' if opened else ''}><summary>{html.escape(title)}</summary>{content}</details>"


def download(name: str, text: str) -> str:
    """A link that saves `text`, which the page holds, as the file `name`."""
    return f'<a download="{html.escape(name)}" href="data:text/csv;charset=utf-8,{quote(text, safe=",.")}">CSV</a>'
