"""What users add by a name of their own, by one decorator. Imports no part of the package, and so does no harm
at the top of any file.

    @ood_fast.register("loss")
    def focal(model, recipe):  # ood-fast train --plugin mine --set loss=focal
        return lambda logits, y: ...

What is decorated is returned as it is. `docs/extending.md` has a whole one of each kind.
"""

from __future__ import annotations

import builtins
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

LIBRARIES = ("builtins", "torch", "torchvision", "timm", "transformers", "ood_fast")  # whose code stays what it is
# kind -> what is decorated
KINDS = {
    "detector": "a subclass of ood_fast.detectors.Detector",
    "loss": "(model, recipe) -> criterion, (logits, y) -> scalar, or a training.objective.Objective",
    "model": "(n_classes, in_channels, image_size) -> nn.Module that ends in one linear layer",
    "benchmark": "(root) -> (data.benchmarks.Spec, read), read(set name, split) -> data.images.Source",
    "metric": "(id_scores, ood_scores), float64 (n,) and (k,) -> float; higher scores mean more in-distribution",
}
# what the package itself has, but detectors, which register like others
TAKEN: dict[str, tuple[str, ...]] = {
    kind: tuple(names.split())
    for kind, names in {
        "loss": "ce logitnorm elogitnorm l2norm t2fnorm vos elogitnorm-vos oe elogitnorm-oe mixoe regmixup supcon "
        "cider ish npos elogitnorm-npos palm",
        "benchmark": "cifar10 cifar100 digits folder gtsrb imagenet imagenet200 tin",
        "model": "small_cnn resnet18_32x32 cct_7_3x1 resnet18 resnet50 vgg16 densenet121 vit_b_16 swin_t swin_v2_t "
        "convnext_tiny",
        "metric": "auroc fpr95_ood_positive fpr95_id_positive aupr_in aupr_out",
    }.items()
}
_ADDED: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str | None = None) -> Callable[[T], T]:
    """A decorator that makes a class or function known to recipes, the command line and tables.

    Args:
        kind: one of `KINDS`, which says what is decorated.
        name: what it is called there; None: as it is defined. A detector has the name of its class, in files too.

    Raises:
        ValueError: an unknown kind; a name for a detector; a name that has another meaning already.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "detector" and name is not None:
        raise ValueError(f"name: got {name!r} for a detector, expected none: it is known by the name of its class")

    def decorator(thing: T) -> T:
        known = name or getattr(thing, "__name__", None)
        if known is None:
            raise ValueError(f"name: got none for a {type(thing).__name__}, expected one: it has none of its own")
        before = _ADDED[kind].get(known, thing)
        # A module that is imported again, as notebooks do, registers what it registered.
        again = all(getattr(before, name, 0) == getattr(thing, name, 1) for name in ("__module__", "__qualname__"))
        if known in TAKEN.get(kind, ()) or (before is not thing and not again):
            raise ValueError(f"name: there is a {kind} {known!r} already, expected another name")
        _ADDED[kind][known] = thing
        return thing

    return decorator


def added(kind: str) -> dict[str, Any]:
    """What has been registered of a kind, by name, in its order."""
    return _ADDED[kind]


def code_key(things: Iterable[Any]) -> str | None:
    """A hash of the text of those classes and functions that no library holds, of one that is wrapped its own, of their
    bases, and of the functions, classes and CONSTANTS of their package that they name. None without such text: typed
    in, or of libraries."""
    left, texts = list(things), dict[int, str]()
    while left:
        thing = inspect.unwrap(left.pop())
        place = str(getattr(thing, "__module__", None))
        top = place.partition(".")[0]
        if id(thing) in texts or top in LIBRARIES:
            continue
        try:
            text = inspect.getsource(thing)
        except (OSError, TypeError):
            continue
        texts[id(thing)] = text
        known = vars(sys.modules.get(place, builtins))
        named = {word: known[word] for word in re.findall(r"\b(?!__)\w+", text) if word in known}
        own = (value for value in named.values() if inspect.isclass(value) or inspect.isfunction(value))
        left += [value for value in own if str(value.__module__).partition(".")[0] == top]
        left += getattr(thing, "__bases__", ())
        constants = {word: value for word, value in named.items() if word.isupper() and _is_plain(value)}
        texts[id(thing)] += repr(sorted(constants.items()))
    return hashlib.sha256("".join(sorted(texts.values())).encode()).hexdigest()[:16] if texts else None


def _is_plain(value: Any) -> bool:
    """Whether its text is the same in every process."""
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, (bool, int, float, str))
