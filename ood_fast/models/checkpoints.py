"""Checkpoints: written so that the last good one survives, read without running code from the file.

OpenOOD writes `layer2.0.shortcut.0.weight` where torchvision says `layer2.0.downsample.0.weight`; here models have
torchvision's names, and `load_checkpoint` takes both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import checks
from ..files import replacing
from ..heads import HEAD_NAMES, unwrapped
from ..intact import check_zip

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")  # of several mappings of weights, the one that is meant
INDEX = (".safetensors.index.json", ".bin.index.json")  # of weights in several files, as transformers writes them
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

    What wrappers and training frameworks put in front of names, with what lies beside, and OpenOOD's names are
    understood. On the CPU first; `model` stays where it is.

    Raises:
        UserError: no such file; not read, because it holds more than tensors and plain values; keys or shapes that do
            not fit, all listed; weights of several models. Then `model` is as before.
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
        if path.name.endswith(INDEX):
            files = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
            return {k: v for file in files for k, v in read_checkpoint(path.parent / Path(file).name).items()}
        if _is_safetensors(path):
            return _read_safetensors(path)
        check_zip(path)
        with open(path, "rb") as file:  # by a path, PyTorch would go by its ending
            content = torch.load(file, map_location="cpu", weights_only=True)
    except checks.UserError:
        raise
    except Exception as error:  # a file that is no checkpoint fails in any way: pickle, zip, struct, KeyError, ...
        raise checks.UserError(f"{path}: {checks.why_not_read(path, error)}") from error
    if not isinstance(content, Mapping):
        raise checks.UserError(f"{path}: holds a {type(content).__name__}, expected a state_dict")
    return dict(content)


def weight_fingerprint(model: nn.Module, head: nn.Module | None) -> str:
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


def _is_safetensors(path: Path) -> bool:
    """By what is in it, whatever it is called: the length of a header, and the header in JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{" or (path.suffix == ".safetensors" and not zipfile.is_zipfile(path))


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
    matrices = {key: value for key, value in state.items() if value.dim() == 2}
    matrices = matrices or {key: value for key, value in state.items() if value.shape[2:] == (1, 1)}  # of convolutions
    depths = {key: next((d for d, part in enumerate(key.split(".")) if part in HEAD_NAMES), 99) for key in matrices}
    heads = [value for key, value in matrices.items() if depths[key] == min(depths.values())]
    return len(heads[-1]) if heads else None


def _state_dict(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of the mapping of weights in a checkpoint; of several the one that `STATE_KEYS` names first."""
    held = dict(_mappings(content)) or {(): content}
    most = max(len(tensors) for tensors in held.values())
    held = {place: tensors for place, tensors in held.items() if 2 * len(tensors) >= most}  # not those of a criterion
    meant = [place for key in STATE_KEYS for place in held if key in place[:1]] or [*held]
    state = {key: value for key, value in held[meant[0]].items() if isinstance(value, Tensor)}
    if not state:
        raise checks.UserError(f"{path}: holds no state_dict; got {_listed([*map(str, content)]) or 'nothing'}")
    if len(held) > 1:
        first, *others = map(_place, (meant[0], *(place for place in held if place != meant[0])))
        first = first or "itself"
        told = f"{path}: holds weights in {first} and {_listed(others)}"
        cure = f'torch.save(torch.load({str(path)!r}){others[0]}, "weights.pth")'
        if meant[0] and not set(meant[0]) & set(STATE_KEYS):
            raise checks.UserError(f"{told}; save those that are meant by themselves: {cure}")
        checks.warn_caller(f"{told}; {first} is taken, for the others: {cure}")
    return state


def _place(keys: tuple[str, ...]) -> str:
    return "".join(f"[{key!r}]" for key in keys)


def _mappings(content: Mapping[Any, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Each mapping of weights, by the keys that lead to it; not what optimizers keep."""
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if any("weight" in str(key) for key in tensors):
        yield place, tensors
    for key, value in content.items():
        optimizer = re.search("optim(?!al|um)", str(key))
        if isinstance(value, Mapping) and "param_groups" not in value and not optimizer:
            yield from _mappings(value, (*place, key))


def _fitting(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state under the names of the model: those that lie together below one prefix, which most of its names have.

    What lies beside that prefix is not the model's: a criterion, metrics, the count of a moving average.
    """
    wanted = {_plain(name): name for name in own}
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if _plain(key) in plain:
            raise checks.UserError(f"{path}: more than one key means {_plain(key)}")
        plain[_plain(key)] = value
    owner = next(iter(wanted)).partition(".")[0] + "." if wanted else ""
    if all(name.startswith(owner) for name in wanted) and not any(key.startswith(owner) for key in plain):
        wanted = {name.removeprefix(owner): own_name for name, own_name in wanted.items()}  # the model is the wrapper
    prefixes = {""} | {key[: at + 1] for key in plain for at, sign in enumerate(key) if sign == "."}
    counts = {prefix: sum(prefix + name in plain for name in wanted) for prefix in sorted(prefixes)}
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most] if 2 * most >= len(wanted) else [""]
    if len(best) > 1 and most:
        raise checks.UserError(
            f"{path}: holds weights of this model below {_listed([repr(prefix) for prefix in best])}; save those that "
            "are meant by themselves"
        )
    if beside := [name for name, value in plain.items() if value.is_floating_point() and not name.startswith(best[0])]:
        checks.warn_caller(f"{path}: weights below {best[0]!r} are taken, not those beside: {_listed(beside)}")
    return {
        wanted.get(name.removeprefix(best[0]), name): value for name, value in plain.items() if name.startswith(best[0])
    }


def _plain(key: str) -> str:
    """Without what wrappers put into names, and as torchvision has it; the first part stays."""
    first, *parts = key.split(".")
    name = ".".join(part for part in parts if part not in WRAPPERS)
    return next(iter(torchvision_keys({f"{first}.{name}" if name else first: None})))


def _listed(keys: list[str]) -> str:
    return checks.shortened(keys, N_LISTED)
