"""Loading of released weights: no arbitrary unpickling, and strict checks of tensor names and shapes."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fl_lightning.errors import MissingFile, in_short
from fl_lightning.storage import StorageError, load_checkpoint

LISTED = 4
"""Maximum number of mismatches listed in an error message."""


def read_weights(path: Path, source: str, parts: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or a torch checkpoint onto the CPU.

    Args:
        path: weights file.
        source: where to get the file, for error messages.
        parts: keys of the state dict in a checkpoint that holds several, in order of preference; if none is present,
            the checkpoint itself is the state dict.

    Returns:
        The tensors by name.

    Raises:
        MissingFile: the file does not exist.
        StorageError: the file cannot be read, or does not consist of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"There are no weights at '{path}'. Get them from {source} and save them there.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"'{path}' cannot be read as safetensors ({in_short(error)}). Get it again from {source}."
            ) from error
    state = load_checkpoint(path)
    if isinstance(state, Mapping):
        state = next((state[part] for part in parts if part in state), state)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise StorageError(
            f"'{path}' is a checkpoint, but does not consist of named tensors only. Give the weights from {source}."
        )
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Assign a state dict to a module without copying (`load_state_dict(assign=True)`); all tensors must match.

    Args:
        module: module that takes over the tensors.
        state: tensors by name.
        path: file that they come from, for the error message.

    Raises:
        StorageError: a name is missing or unknown, or a shape differs; the message lists the first `LISTED`.
    """
    expected, found = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (module.state_dict(), state))
    differing = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differing += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    differing += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if differing:
        shown = "; ".join(sorted(differing)[:LISTED])
        more = f" and {len(differing) - LISTED} more" if len(differing) > LISTED else ""
        raise StorageError(
            f"'{path}' does not fit {type(module).__name__} with its {len(expected)} tensors: {len(differing)} names "
            f"or shapes differ: {shown}{more}. Give weights of exactly this architecture."
        )
    module.load_state_dict(state, assign=True)
