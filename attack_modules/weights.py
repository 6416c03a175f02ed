"""Released weights: read without pickle's powers, and taken only where every name and shape agrees."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fl_lightning.errors import MissingFile
from fl_lightning.storage import StorageError, load_checkpoint

LISTED = 8
"""Differing names that a message shows."""


def read_weights(path: Path, source: str, parts: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a torch checkpoint, on the CPU.

    Args:
        path: the file.
        source: where to get it, for the sentence that is said when it is missing.
        parts: names of the state dict in a checkpoint that holds several, the preferred first; where there is none of
            these, the checkpoint itself is the state dict.

    Raises:
        MissingFile: it is not there.
        StorageError: it cannot be read, or holds other things than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"There are no weights at '{path}'. Get them from {source}, and put them there.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"'{path}' cannot be read as safetensors: {error}. Get it anew from {source}."
            ) from error
    state = load_checkpoint(path)
    if isinstance(state, Mapping):
        state = next((state[part] for part in parts if part in state), state)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise StorageError(
            f"'{path}' is a checkpoint, but not one of named tensors alone. Name the file that {source} publishes."
        )
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give a module the tensors of a file, which become its own without a copy (`nn.Module.load_state_dict(assign)`).

    Raises:
        StorageError: a name is missing or unknown, or a shape is another; the message lists them.
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
        more = "; ..." if len(differing) > LISTED else ""
        raise StorageError(
            f"'{path}' does not fit {type(module).__name__} with its {len(expected)} tensors: {len(differing)} names "
            f"or shapes differ: {shown}{more}. Name the weights of this very architecture."
        )
    module.load_state_dict(state, assign=True)
