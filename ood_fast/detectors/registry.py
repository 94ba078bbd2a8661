"""Detectors by name, for the command line, for `compare` and for files.

@ood_fast.register("detector")
class MyScore(ood_fast.detectors.Detector): ...

ood_fast.detectors.create("MyScore")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import checks
from ..registry import added
from ..registry import register as register_kind

if TYPE_CHECKING:
    from .detector import Detector

register = register_kind("detector")  # class decorator: makes the detector known by its class name and its label


def known() -> list[str]:
    """Names of all registered detectors, in the order of their definition."""
    return list(added("detector"))


def in_all() -> list[str]:
    """Those that "all" means: without what runs the model several times over, which are taken by their names."""
    return [name for name in known() if find(name).in_all]


def create(name: str, **settings: Any) -> Detector:
    """A new detector by name, see `find`."""
    return find(name)(**settings)


def find(name: str) -> type[Detector]:
    """The detector class of that name, or with that label, in any case and with or without spaces.

    UserError with the known names and the nearest one otherwise.
    """
    if cls := registered(name):
        return cls
    raise checks.UserError(checks.unknown("detector", name, known()))


def registered(name: str) -> type[Detector] | None:
    """As `find`; None where there is none."""
    key = _key(name)
    named = {_key(own): cls for own, cls in added("detector").items()}
    labels = (cls for cls in named.values() if _key(cls.label) == key)
    return named.get(key) or next(labels, None)


def label_of(name: str) -> str:
    """How tables call the detector of that name: by the label of its class, one of a name of your own by that."""
    cls = registered(name)
    return name if cls is None else cls.label


def _key(name: str) -> str:
    return "".join(name.lower().split())
