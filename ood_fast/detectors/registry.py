"""Detectors by name, for the command line, for `compare` and for files.

@ood_fast.detectors.register
class MyScore(ood_fast.detectors.Detector): ...

ood_fast.detectors.create("MyScore")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from .. import checks

if TYPE_CHECKING:
    from .detector import Detector

_REGISTRY: dict[str, type[Detector]] = {}
D = TypeVar("D", bound="type[Detector]")


def register(cls: D) -> D:
    """Class decorator: makes the detector known by its class name and its label."""
    _REGISTRY[_key(cls.__name__)] = cls
    return cls


def known() -> list[str]:
    """Names of all registered detectors, in the order of their definition."""
    return [cls.__name__ for cls in _REGISTRY.values()]


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
    labels = (cls for cls in _REGISTRY.values() if _key(cls.label) == key)
    return _REGISTRY.get(key) or next(labels, None)


def _key(name: str) -> str:
    return "".join(name.lower().split())
