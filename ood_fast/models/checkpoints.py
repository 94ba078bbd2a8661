"""Checkpoints: written so that the last good one survives, read without running code from the file.

OpenOOD writes `layer2.0.shortcut.0.weight` where torchvision says `layer2.0.downsample.0.weight`; here models have
torchvision's names, and `load_checkpoint` takes both.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import checks
from ..files import replacing
from ..heads import HEAD_NAMES, unwrapped
from ..intact import check_zip

WRAPPER = "module."  # DistributedDataParallel and DataParallel
COMPILED = "_orig_mod."  # torch.compile, of the model or of a part
OWNERS = ("model.", "net.", "network.")  # what training frameworks call the model inside their own module
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where a checkpoint of more than weights keeps them
CHECKSUM = "blake2b"  # in the metadata of our safetensors files
N_LISTED = 4  # keys that a message lists before it counts the others


Held = TypeVar("Held")  # a tensor; None where only names matter


def openood_keys(state: Mapping[str, Held]) -> dict[str, Held]:
    """A state_dict under the names of OpenOOD's ResNet18_32x32."""
    return {key.replace(".downsample.", ".shortcut."): value for key, value in state.items()}


def torchvision_keys(state: Mapping[str, Held]) -> dict[str, Held]:
    """The way back: torchvision's names, which the models here have."""
    return {key.replace(".shortcut.", ".downsample."): value for key, value in state.items()}


def save_checkpoint(contents: nn.Module | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a model's state_dict (without the prefixes of wrappers), or the mapping given, to `path`.

    The file appears under its name when all of it is on the disk: a full disk or a killed process leaves the one that
    was there before. What torch.load reads with `weights_only=True`; safetensors if the name ends so (tensors only).

    Raises:
        OSError: it cannot be written; nothing but the old file remains.
    """
    path = Path(path)
    state = unwrapped(contents).state_dict() if isinstance(contents, nn.Module) else contents
    with replacing(path) as part, open(part, "wb") as file:
        if path.suffix == ".safetensors":
            tensors = {key: value.contiguous() for key, value in state.items()}
            file.write(safetensors.torch.save(tensors, {CHECKSUM: _checksum(tensors)}))
            return
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise OSError(f"cannot write {path}: {error}; is the disk full?") from error


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights into `model` from a state_dict, one inside a larger checkpoint, or safetensors.

    Prefixes of wrappers and OpenOOD's names are understood. On the CPU first; `model` stays where it is.

    Raises:
        UserError: no such file; not read, because it holds more than tensors and plain values; keys or shapes that do
            not fit, all listed. Then `model` is as before.
    """
    model = unwrapped(model)
    own = model.state_dict()
    state = _fitting(_state_dict(read_checkpoint(path), path), own, path)
    for key, value in own.items():  # checkpoints from before PyTorch 0.4.1 and some exports lack these counters
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise checks.UserError(f"{path} does not fit {type(model).__name__}: {listed}")
    model.load_state_dict(state)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU; tensors and plain values only (`weights_only=True`)."""
    path = Path(path)
    if not path.is_file():
        raise checks.UserError(f"no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except checks.UserError:
        raise
    except Exception as error:  # a file that is no checkpoint fails in any way: pickle, zip, struct, KeyError, ...
        raise checks.UserError(f"{path}: {checks.why_not_read(path, error)}") from error
    if not isinstance(content, Mapping):
        raise checks.UserError(f"{path}: holds a {type(content).__name__}, expected a state_dict")
    return dict(content)


def weight_fingerprint(model: nn.Module, head: nn.Module) -> str:
    """A hash of what decides features and logits, apart from the code: all weights and buffers, and which layer is the
    head. The same on every device, and for a model and its wrapped form."""
    model = unwrapped(model)
    place = next((path for path, module in model.named_modules() if module is head), "")
    digest = hashlib.sha256(place.encode())
    update_with_weights(digest, model.state_dict())
    return digest.hexdigest()


def update_with_weights(digest: Any, state: Mapping[str, Any]) -> None:
    """Put names, dtypes, shapes and bytes of all tensors of a state_dict into a hash."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        kept = (file.metadata() or {}).get(CHECKSUM)  # of files that we wrote; the format has none
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    if kept is not None and kept != _checksum(state):
        raise checks.UserError(f"{path}: is damaged, its checksum does not fit")
    return state


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    update_with_weights(digest, {key: state[key] for key in sorted(state)})
    return digest.hexdigest()


def n_classes_of(path: str | os.PathLike[str]) -> int | None:
    """How many classes the classifier in a checkpoint tells apart: rows of the last matrix that is called as heads are,
    else of the last one; None without a matrix. Raises as `load_checkpoint`."""
    # safetensors keeps names in alphabetical order: there the last is often one of another layer
    state = _state_dict(read_checkpoint(path), path)
    matrices = {_inner_name(key): value for key, value in state.items() if value.dim() == 2}
    heads = [value for key, value in matrices.items() if key.partition(".")[0] in HEAD_NAMES]
    return len((heads or [*matrices.values()])[-1]) if matrices else None


def _inner_name(key: str) -> str:
    """Without what wrappers and training frameworks put in front."""
    while key.startswith((WRAPPER, COMPILED, *OWNERS)):
        key = key.partition(".")[2]
    return key


def _state_dict(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    for key in STATE_KEYS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state or len(state) < len(content):
        strange = [str(key) for key in content if key not in state]
        raise checks.UserError(f"{path}: holds no state_dict; got {_listed(strange) if strange else 'nothing'}")
    return state


def _fitting(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state under the names of the model, as far as there is one for a key."""
    fitting: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _own_name(key, own)
        if name in fitting:
            raise checks.UserError(f"{path}: more than one key means {name}")
        fitting[name] = value
    return fitting


def _own_name(key: str, own: Mapping[str, Tensor]) -> str:
    if key in own:
        return key
    stripped = key.replace(COMPILED, "")
    while stripped.startswith(WRAPPER):
        stripped = stripped.removeprefix(WRAPPER)
    candidates = [stripped, stripped.partition(".")[2]] if stripped.startswith(OWNERS) else [stripped]
    for name in candidates:
        for renamed in (name, *torchvision_keys({name: None}), *openood_keys({name: None}), f"model.{name}"):
            if renamed in own:
                return renamed
    return stripped


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - N_LISTED} more" if len(keys) > N_LISTED else ""
    return ", ".join(keys[:N_LISTED]) + more
