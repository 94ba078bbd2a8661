"""Fitted detectors as files: safetensors, which hold numbers and text and can run no code.

Here bytes become metadata and tensors, and the reverse; `sets.load` makes detectors of them.

A file holds one detector or a `DetectorSet`. Its tensors are the buffers, each stored once however many detectors share
it, under the names "KNN/bank", "NCI/mean". Its metadata, all text:

    format, format_version    "ood_fast detectors", "1"
    ood_fast, torch           the versions that wrote it
    kind                      "detector" or "set"
    detectors                 JSON: name -> {method, settings, calibration,
                              tensors: {buffer: {key, dtype, shape, crc32}}, model,
                              input_range: the smallest and the largest number of the images of the fit}
    models                    JSON: the weights they were fitted on, see `models.weights`; entries give the place
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..files import replacing
from ..intact import checksum_of as _checksum_of_text
from ..models.weights import Weights

FORMAT, FORMAT_VERSION = "ood_fast detectors", 1


class Saved(NamedTuple):
    """What a file holds of one detector."""

    method: str  # the name of its class
    settings: dict[str, Any]
    calibration: dict[str, Any] | None
    buffers: dict[str, Tensor]
    fitted_on: Weights | None = None
    input_range: tuple[float, float] | None = None


class Content(NamedTuple):
    """What a file holds."""

    kind: str  # "detector" or "set"
    detectors: dict[str, Saved]
    class_names: list[str] | None
    notes: dict[str, Any]


def write(path: str | os.PathLike[str], content: Content) -> None:
    """Write a file, as `Detector.save` says."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from .. import __version__

    path = Path(path)
    # safetensors writes a file of its own and renames it: in the place of a device too, if it may
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise OSError(f"{path}: expected the path of a file in a folder that exists")
    checks.utf8_path("path", path)
    stored: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    models = list({record.fitted_on: None for record in content.detectors.values() if record.fitted_on})
    entries = {name: _entry(name, record, stored) for name, record in content.detectors.items()}
    for name, record in content.detectors.items():
        entries[name]["model"] = models.index(record.fitted_on) if record.fitted_on else None
        entries[name]["input_range"] = _encoded("input_range", record.input_range)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "ood_fast": __version__,
        "torch": torch.__version__,
        "kind": content.kind,
        "detectors": json.dumps(entries),
        "models": json.dumps(models),
        "class_names": json.dumps(content.class_names),
        "notes": json.dumps(content.notes),
    }
    metadata["crc32"] = _checksum_of_text(metadata)
    with replacing(path) as part:
        try:
            save_file(dict(stored.values()), part, metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"cannot write {path}: {error}; is the disk full?") from error


def read_file(path: str | os.PathLike[str]) -> Content:
    """What `write` wrote, with each tensor found as its metadata state it.

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: it is damaged, not of this package, or of a newer format.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    try:
        entries, class_names = json.loads(metadata["detectors"]), json.loads(metadata["class_names"])
        found = json.loads(metadata.get("notes", "{}"))
        stated = {each["key"]: each for entry in entries.values() for each in entry["tensors"].values()}
        _check_tensors(stated, tensors)
        models = [
            Weights(int(crc), *(tuple(map(float, each)) for each in waves))
            for crc, *waves in json.loads(metadata.get("models", "[]"))
        ]
        records = {name: _record(entry, tensors, models) for name, entry in entries.items()}
        if metadata["kind"] != "set" and (metadata["kind"] != "detector" or len(records) != 1):
            raise ValueError(f"its kind is {metadata['kind']!r}, of {len(records)} detectors")
        if class_names is not None and not all(isinstance(name, str) for name in class_names):
            raise ValueError(f"its class names are {class_names!r}")
        return Content(metadata["kind"], records, class_names, dict(found))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else f"its metadata are not as they are written ({error!r})"
        raise ValueError(f"{path}: the file is damaged: {reason}") from None


def save(detectors: Any, path: str | os.PathLike[str], class_names: Any = None, notes: Any = None) -> None:
    """`detectors.save(path, class_names, notes)`, as scripts call it that were written for earlier versions."""
    detectors.save(path, class_names, notes)


def notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes that were saved with the detectors; raises as `read_file`."""
    return read_file(path).notes


# ---- writing


def _entry(name: str, record: Saved, stored: dict[tuple[Any, ...], tuple[str, Tensor]]) -> dict[str, Any]:
    """What the metadata say of one detector; its tensors are added to `stored`, those that are there already once."""
    stated = {}
    for buffer, tensor in record.buffers.items():
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if identity not in stored or not tensor.numel():  # empty tensors all lie at address 0
            stored[identity] = (f"{name}/{buffer}", _alone(tensor, {other[0] for other in stored}))
        key, written = stored[identity]
        stated[buffer] = {"key": key, **_kind(tensor), "crc32": _checksum(written)}
    settings = {key: _encoded(f"{record.method}: {key}", value) for key, value in record.settings.items()}
    calibration = None if record.calibration is None else _encoded("calibration", record.calibration)["mapping"]
    return {"method": record.method, "settings": settings, "calibration": calibration, "tensors": stated}


def _alone(tensor: Tensor, addresses: set[int]) -> Tensor:
    """The tensor in memory of its own, without gaps, on the CPU: the format takes no other."""
    tensor = tensor.detach().cpu().contiguous()
    shares = tensor.data_ptr() in addresses or tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if shares else tensor


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


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


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


# ---- reading


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of this format and version; the rest of it is not checked yet."""
    from safetensors import SafetensorError, safe_open

    from .. import __version__

    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file that save wrote")
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path}: is no regular file, expected one that save wrote")
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


def _check_tensors(stated: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless the file holds the tensors that its metadata state, and no other."""
    missing, extra = sorted({*stated} - {*tensors}), sorted({*tensors} - {*stated})
    if missing:
        raise ValueError(f"the tensor {', '.join(missing)} is missing")
    if extra:
        raise ValueError(f"it has the tensor {', '.join(extra)} of no detector")
    for key, tensor in tensors.items():
        found, expected = _kind(tensor), {name: stated[key][name] for name in ("dtype", "shape")}
        if found != expected:
            got, want = (f"{kind['dtype']} {tuple(kind['shape'])}" for kind in (found, expected))
            raise ValueError(f"the tensor {key} is {got}, expected {want}")
        if _checksum(tensor) != stated[key]["crc32"]:
            raise ValueError(f"the tensor {key} does not match its checksum")


def _record(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], models: list[Weights]) -> Saved:
    method, calibration = entry["method"], entry["calibration"]
    if not isinstance(method, str):
        raise ValueError(f"the name of a method is {method!r}")
    settings = {key: _decoded(value) for key, value in entry["settings"].items()}
    buffers = {buffer: tensors[each["key"]] for buffer, each in entry["tensors"].items()}
    if calibration is not None:
        calibration = {key: _decoded(value) for key, value in calibration.items()}
    place, reach = entry.get("model"), _decoded(entry.get("input_range"))
    model = None if place is None else models[place]
    # A number: files that are older than the pair have the largest size alone.
    low, high = (0.0, reach) if reach is None or isinstance(reach, (int, float)) else reach
    low_high = None if high is None else (float(low), float(high))
    return Saved(method, settings, calibration, buffers, model, low_high)
