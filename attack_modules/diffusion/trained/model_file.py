"""Model files: one safetensors file with half-precision weights and the settings in its metadata."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fl_lightning.errors import MissingFile
from fl_lightning.storage import StorageError, atomic_path


def save_model(model: nn.Module, settings: dict[str, Any], path: Path, **facts: str) -> None:
    """Write a model's state dict and settings to one file, atomically.

    Args:
        model: the model, whose state dict is stored in half precision.
        settings: constructor arguments that rebuild the model, of JSON types.
        path: the file to write.
        facts: further metadata.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, {**facts, "settings": json.dumps(settings)})


@contextmanager
def opened_model(
    path: Path, missing: str, kind: str, advice: str
) -> Iterator[tuple[dict[str, str], dict[str, Tensor]]]:
    """Yield the metadata (with the settings as JSON) and the float32 state dict, on the CPU, of a `save_model` file.

    The caller rebuilds the model inside the `with` block; errors raised there are reported as errors of the file.

    Args:
        path: the file to read.
        missing: error message if the file does not exist.
        kind: what the file should hold, with its article, for the error message.
        advice: what to do if the file holds something else, for the error message.

    Raises:
        MissingFile: the file does not exist.
        StorageError: the file is truncated or does not hold such a model.
    """
    if not Path(path).is_file():
        raise MissingFile(missing)
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        yield facts, state
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise StorageError(f"'{path}' cannot be read as {kind}: {error}. {advice}") from error
