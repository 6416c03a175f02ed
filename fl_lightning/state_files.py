"""Model files of other systems: read without running code from them, and fitted to a model's names and shapes."""

import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fl_lightning.errors import AuditError, MissingFile
from fl_lightning.storage import sha256_of

Tensors = dict[str, Tensor]
"""Tensors by parameter (or buffer) name."""
State = dict[str, Tensor] | list[Tensor]
"""Tensors by name, or nameless in the order of the model's state dict, as Flower sends and saves them."""
TORCH = (".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of files that `torch.save` wrote."""
HALF = (torch.float16, torch.bfloat16)


class StateError(AuditError):
    """A model file cannot be read without running code from it, or does not hold the model that was named."""


def read_state(path: Path) -> State:
    """Read the tensors of a model file: .pt, .pth, .ckpt or .bin of `torch.save`, .safetensors, or .npz.

    A dictionary that holds one dictionary or list of tensors among other things, as Lightning's checkpoints do, is
    unwrapped.

    Raises:
        MissingFile: there is no such file.
        StateError: it is of another kind, holds Python objects that would run code, or not exactly one model.
    """
    if not path.is_file():
        raise _missing(path)
    if path.suffix not in (*TORCH, ".safetensors", ".npz"):
        raise StateError(
            f"'{path}' is no model file by its suffix. Give one of {', '.join((*TORCH, '.safetensors', '.npz'))}."
        )
    try:
        if path.suffix == ".safetensors":
            return _with_their_names(load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return _with_their_names({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise StateError(f"'{path}' cannot be read ({_first_line(error)}). Copy or write it again.") from error
    except Exception as error:  # torch and numpy raise many types for content that is no plain tensor
        raise StateError(
            f"'{path}' is damaged or holds pickled Python objects, such as a whole module, which would run code when "
            f"read ({type(error).__name__}). Where it was made, save the tensors alone: "
            "`torch.save(model.state_dict(), FILE)`."
        ) from error
    return _unwrapped(content, path)


def content_of(path: Path) -> str:
    """A short name for the content of a model file.

    Raises:
        MissingFile: there is no such file.
    """
    if not path.is_file():
        raise _missing(path)
    return _digest(path.resolve(), path.stat().st_mtime_ns)


def _missing(path: Path) -> MissingFile:
    return MissingFile(f"There is no file '{path}'. Name a file with a model's state.")


@lru_cache(maxsize=8)  # settings are asked for several times, and a model may have gigabytes
def _digest(path: Path, changed: int) -> str:
    return sha256_of(path)[:12]


def _with_their_names(tensors: Tensors) -> State:
    """The tensors, as a list where they have none: as of `np.savez(FILE, *arrays)`."""
    numbered = [f"arr_{i}" for i in range(len(tensors))]
    return [tensors[name] for name in numbered] if tensors.keys() == set(numbered) else tensors


def _is_state(content: Any) -> bool:
    if isinstance(content, Mapping):
        return bool(content) and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items())
    return isinstance(content, list | tuple) and bool(content) and all(isinstance(t, Tensor) for t in content)


def _unwrapped(content: Any, path: Path) -> State:
    if _is_state(content):
        return dict(content) if isinstance(content, Mapping) else list(content)
    inner = content.items() if isinstance(content, Mapping) else ()
    states = {str(name): part for name, part in inner if _is_state(part)}
    if len(states) != 1:
        found = f"{len(states)} of them ({', '.join(states)})" if states else f"a {type(content).__name__} without one"
        raise StateError(
            f"'{path}' must hold one model's tensors by name, but it holds {found[:150]}. Save one model's tensors: "
            "`torch.save(model.state_dict(), FILE)`."
        )
    ((name, state),) = states.items()
    rank_zero_info(f"'{path}': the model's tensors are its '{name}'.")
    return _unwrapped(state, path)


def fitted(state: Mapping[str, Tensor] | list[Tensor], expected: Mapping[str, Tensor], source: str) -> Tensors:
    """The tensors under a model's own names, in its order and dtypes.

    A prefix that all names of the model have in the state, such as `module.` or `model.`, is removed; what is not under
    it (metrics, the weights of a loss) is left out.

    Args:
        state: tensors by name, or nameless in the order of the model's state dict.
        expected: the model's state dict; its tensors may be on the meta device.
        source: whose state it is, in errors.

    Raises:
        StateError: names are missing or too many, or a shape is another.
    """
    if isinstance(state, list):
        if len(state) != len(expected):
            raise StateError(
                f"{source} holds {len(state)} nameless tensors, but the model has {len(expected)}. Give all of its "
                "state dict in its order, or tensors with names."
            )
        state = dict(zip(expected, state, strict=True))
    state = _without_prefix(state, expected, source)
    if differing := set(state) ^ set(expected):
        missing, more = (
            ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])]) or "nothing"
            for names in (differing - set(state), differing - set(expected))
        )
        raise StateError(
            f"{source} is not of this model: it lacks {missing[:120]}, and has {more[:120]} too much. Give the "
            "model's class and arguments as they were trained."
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise StateError(
                f"'{name}' of {source} has the shape {tuple(state[name].shape)}, but the model's has "
                f"{tuple(tensor.shape)}. Give the model's arguments and the image shape as they were trained."
            )
    if any(tensor.dtype in HALF for tensor in state.values()):
        rank_zero_warn(
            f"{source} has 16-bit numbers, whose rounding is noise on the update: images come out worse, or not at all "
            "where the round changed the model little. Observe models in 32 bits if you can."
        )
    return {name: state[name].detach().cpu().to(tensor.dtype, copy=True) for name, tensor in expected.items()}


def completed(state: State, whole: Mapping[str, Tensor], head: list[str], source: str) -> State:
    """A state that holds the head alone, as where the other layers stay with the clients, with a model's other tensors.

    Args:
        state: any; others are returned as they are.
        whole: the model's state dict.
        head: names of the head's parameters.
        source: whose state it is, in the warning.
    """
    if isinstance(state, list):
        state = dict(zip(head, state, strict=True)) if len(state) == len(head) < len(whole) else state
    if isinstance(state, list) or set(head) == set(whole):
        return state
    part = _without_prefix(state, {name: whole[name] for name in head}, source)
    if set(part) != set(head):
        return state
    rank_zero_warn(
        f"{source} holds the head alone, so the given model's other layers stand in: labels, numbers of images and "
        "features are read all the same, but images are right only if the peers' other layers are these."
    )
    return {**whole, **part}


def _without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """The part of a state under the prefix with which it has all expected names, without that prefix."""
    if set(state) >= set(expected):
        return state
    first = next(iter(expected))
    for prefix in [name.removesuffix(first) for name in state if name.endswith(f".{first}")]:
        part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if set(part) == set(expected):
            rank_zero_info(f"{source}: the prefix '{prefix}' of its names is left out.")
            return part
    return state


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:150] if str(error) else type(error).__name__
