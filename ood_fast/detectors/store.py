"""Fitted detectors as files: safetensors, which hold numbers and text and can run no code.

A file holds one detector or a `DetectorSet`. Its tensors are the buffers, each stored once however many detectors share
it, under the names "KNN/bank", "NCI/mean". Its metadata, all text:

    format, format_version    "ood_fast detectors", "1"
    ood_fast, torch           the versions that wrote it
    kind                      "detector" or "set"
    detectors                 JSON: name -> {method, settings, calibration,
                              tensors: {buffer: {key, dtype, shape, crc32}}}
    class_names               JSON: a list, or null
    notes                     JSON: what the caller wants to remember, such as how images are prepared
    crc32                     of all of the above

The settings are the keywords of the class, in JSON, where {"dtype": "float16"}, {"tuple": [...]}, {"float": "inf"} and
{"mapping": {...}} stand for what JSON has no word for.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..files import replacing
from . import registry
from .threshold import Calibration

if TYPE_CHECKING:
    from .base import Detector
    from .sets import DetectorSet

FORMAT, FORMAT_VERSION = "ood_fast detectors", 1


def save(
    detectors: Detector | DetectorSet,
    path: str | os.PathLike,
    class_names: Iterable[str] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a fitted detector or a set of them. The file appears under its name once it is complete, or not at all.

    Args:
        path: the file, an older one is replaced; the suffix .safetensors is usual.
        class_names: one a class, in the order of the logits; None: the `class_names` of the detector.
        notes: numbers, strings, lists and mappings of your own, which `notes` reads back.

    Raises:
        OSError: the path is a folder, or its folder does not exist or cannot be written to.
        RuntimeError: a detector is not fitted.
        ValueError: a class that is not registered, or class names that do not fit the head.
        TypeError: a setting that is no number, string, dtype, nor a tuple, list or mapping of those.
    """
    from safetensors.torch import save_file

    from .. import __version__

    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OSError(f"{path}: expected the path of a file in a folder that exists")
    named = dict(detectors.items()) if hasattr(detectors, "items") else {type(detectors).__name__: detectors}
    if class_names is None:
        class_names = next((d.class_names for d in named.values() if d.class_names is not None), None)
    class_names = _checked_names(class_names, named)
    stored: dict[tuple, tuple[str, Tensor]] = {}
    entries = {name: _entry(name, detector, stored) for name, detector in named.items()}
    tensors = dict(stored.values())
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "ood_fast": __version__,
        "torch": torch.__version__,
        "kind": "set" if hasattr(detectors, "items") else "detector",
        "detectors": json.dumps(entries),
        "class_names": json.dumps(class_names),
        "notes": json.dumps(dict(notes or {})),
    }
    metadata["crc32"] = _checksum_of_text(metadata)
    with replacing(path) as part:
        save_file(tensors, part, metadata)


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> Detector | DetectorSet:
    """Read what `save` wrote: a detector or a set of them, fitted, with its threshold, on `device`.

    A detector class of your own has to be registered first, see `ood_fast.detectors.register`.

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: it is damaged, not of this package, of a newer format, or holds a detector that is not known.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    entries, class_names = json.loads(metadata["detectors"]), json.loads(metadata["class_names"])
    _check_tensors(path, entries, tensors)
    tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    detectors = {name: _detector(path, entry, tensors) for name, entry in entries.items()}
    for detector in detectors.values():
        detector.class_names = None if class_names is None else tuple(class_names)
    if metadata["kind"] == "detector":
        (detector,) = detectors.values()
        return detector
    from .sets import DetectorSet

    return DetectorSet(detectors)


def notes(path: str | os.PathLike) -> dict[str, Any]:
    """The notes that were saved with the detectors; raises as `load`."""
    metadata, _ = _read(Path(path))
    return json.loads(metadata.get("notes", "{}"))


# ---- writing


def _entry(name: str, detector: Detector, stored: dict[tuple, tuple[str, Tensor]]) -> dict[str, Any]:
    """What the metadata say of one detector; its tensors are added to `stored`, those that are there already once."""
    method = type(detector).__name__
    if _registered(method) is not type(detector):
        raise ValueError(
            f"{method}: is not registered, so that no file of it could be read; put @ood_fast.detectors.register "
            "before the class"
        )
    detector._require_fitted()
    stated = {}
    for buffer, tensor in detector.state_dict().items():
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if identity not in stored or not tensor.numel():  # empty tensors all lie at address 0
            stored[identity] = (f"{name}/{buffer}", _alone(tensor, {other[0] for other in stored}))
        key, written = stored[identity]
        stated[buffer] = {"key": key, **_kind(tensor), "crc32": _checksum(written)}
    calibration = detector.calibration
    if detector.threshold is None or (calibration and calibration.threshold != float(detector.threshold)):
        calibration = None  # the threshold was set by other means since
    return {
        "method": method,
        "settings": {key: _encoded(f"{method}: {key}", value) for key, value in detector.settings().items()},
        "calibration": None if calibration is None else _encoded("calibration", calibration._asdict())["mapping"],
        "tensors": stated,
    }


def _alone(tensor: Tensor, addresses: set[int]) -> Tensor:
    """The tensor in memory of its own, without gaps, on the CPU: the format takes no other."""
    tensor = tensor.detach().cpu().contiguous()
    shares = tensor.data_ptr() in addresses or tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if shares else tensor


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _checked_names(class_names: Iterable[str] | None, named: Mapping[str, Detector]) -> list[str] | None:
    if class_names is None:
        return None
    if isinstance(class_names, str):
        raise TypeError(f"class_names: got the string {class_names!r}, expected one string a class")
    class_names = list(class_names)
    for name in class_names:
        checks.instance("class_names", name, str, "one string a class")
    for detector in named.values():
        n_classes = len(detector.head_weight) if detector.needs_head and detector.fitted else len(class_names)
        if len(class_names) != n_classes:
            raise ValueError(
                f"class_names: got {len(class_names)}, expected {n_classes}, the classes of the head that "
                f"{detector.label} was fitted with"
            )
    return class_names


def _encoded(what: str, value: Any) -> Any:
    """A setting in JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        items = [_encoded(what, item) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _encoded(what, item) for key, item in value.items()}}
    raise TypeError(
        f"{what}: got {type(value).__name__} {value!r}, which no file can hold, expected a number, a string, a "
        "torch.dtype, or a tuple, list or mapping of those"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "float":
        return float(inner)
    if kind == "dtype" and isinstance(getattr(torch, inner, None), torch.dtype):
        return getattr(torch, inner)
    if kind == "tuple":
        return tuple(_decoded(item) for item in inner)
    if kind == "mapping":
        return {key: _decoded(item) for key, item in inner.items()}
    raise ValueError(f"no setting is written as {value!r}")


def _checksum_of_text(metadata: Mapping[str, str]) -> str:
    text = json.dumps({key: value for key, value in metadata.items() if key != "crc32"}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()):08x}"


def _registered(method: str) -> type[Detector] | None:
    try:
        return registry.find(method)
    except checks.UserError:
        return None


# ---- reading


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of this format and version; the rest of it is not checked yet."""
    from safetensors import SafetensorError, safe_open

    from .. import __version__

    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file that save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: the tensors given are windows on the file, and change or fail with it.
            tensors = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as safetensors, truncated or another kind of file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: is a safetensors file, but not one that Detector.save of ood_fast wrote")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format version {version!r}, written by ood_fast {metadata.get('ood_fast', '?')}; ood_fast "
            f"{__version__} reads up to {FORMAT_VERSION}: install a newer one"
        )
    if not {"kind", "detectors", "class_names"} <= {*metadata} or metadata.get("crc32") != _checksum_of_text(metadata):
        raise ValueError(f"{path}: the file is damaged: its metadata do not match their checksum")
    return metadata, tensors


def _check_tensors(path: Path, entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless the file holds the tensors that its metadata state, and no other."""
    stated = {tensor["key"]: tensor for entry in entries.values() for tensor in entry["tensors"].values()}
    missing, extra = sorted({*stated} - {*tensors}), sorted({*tensors} - {*stated})
    if missing:
        raise ValueError(f"{path}: the file is damaged: the tensor {', '.join(missing)} is missing")
    if extra:
        raise ValueError(f"{path}: the file is damaged: it has the tensor {', '.join(extra)} of no detector")
    for key, tensor in tensors.items():
        found, expected = _kind(tensor), {name: stated[key][name] for name in ("dtype", "shape")}
        if found != expected:
            got, want = (f"{kind['dtype']} {tuple(kind['shape'])}" for kind in (found, expected))
            raise ValueError(f"{path}: the file is damaged: the tensor {key} is {got}, expected {want}")
        if _checksum(tensor) != stated[key]["crc32"]:
            raise ValueError(f"{path}: the file is damaged: the tensor {key} does not match its checksum")


def _detector(path: Path, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Detector:
    method = entry["method"]
    cls = _registered(method)
    if cls is None:
        raise ValueError(
            f"{path}: {checks.unknown('detector', method, registry.known())}; a class of your own has to be imported, "
            "with @ood_fast.detectors.register before it, before its file is read"
        )
    try:
        detector = cls(**{key: _decoded(value) for key, value in entry["settings"].items()})
        buffers = {buffer: tensors[stated["key"]] for buffer, stated in entry["tensors"].items()}
        detector.load_state_dict(buffers, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: the {method} of this ood_fast cannot be made from the file: {error}") from error
    if not detector.fitted:
        raise ValueError(f"{path}: the file holds a {method} without what it was fitted on")
    if entry["calibration"] is not None:
        detector.calibration = Calibration(**{key: _decoded(value) for key, value in entry["calibration"].items()})
    return detector
