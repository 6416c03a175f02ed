"""Models that we train, each in one safetensors file: weights in half precision, settings in its metadata."""

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
    """Write a model's state and settings to one file, which is whole or not there.

    Args:
        model: its state is stored in half precision.
        settings: of plain JSON types, from which the model is built again.
        path: the file.
        facts: further metadata.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, {**facts, "settings": json.dumps(settings)})


@contextmanager
def opened_model(
    path: Path, missing: str, kind: str, advice: str
) -> Iterator[tuple[dict[str, str], dict[str, Tensor]]]:
    """What `save_model` wrote: metadata, with the settings as JSON, and the state in single precision on the CPU.

    What fails inside the `with`, where the model is built from them, is the file's fault and said so.

    Args:
        path: the file.
        missing: the sentences for a file that is not there.
        kind: what the file should hold, with its article.
        advice: what to do about a file that holds something else.

    Raises:
        MissingFile: there is no such file.
        StorageError: it is cut short, or no such model.
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
