"""Files that are either whole or not there: atomic writes, hashed tensors, no pickle."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fl_lightning.errors import AuditError


class StorageError(AuditError):
    """A file could not be written, or is not what it should be; the message says what to do."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes `path`'s place only when the block ends without an error.

    Raises:
        StorageError: the disk is full or the folder cannot be written. What stood at `path` before still does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"Could not write '{path}': {error}. Free disk space or name another folder, then run the same command "
            "again; files written before are intact."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write plain JSON types atomically; numbers that JSON does not know (infinite or missing) become null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(strict, indent=2, allow_nan=False) + "\n")


def save_record(stem: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Save tensors as `stem.safetensors` and the facts about them, with a hash of that file, as `stem.json`."""
    path = stem.with_suffix(".safetensors")
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        digest = sha256_of(temporary)
    write_json(stem.with_suffix(".json"), {**facts, "sha256": digest})


def load_record(stem: Path, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what `save_record` saved.

    Raises:
        StorageError: a file is missing, cut short, changed, or of another format version.
    """
    facts = read_json(stem.with_suffix(".json"))
    if facts.get("version") != version:
        raise StorageError(
            f"'{stem}.json' has format version {facts.get('version')}, but this program reads version {version}. "
            "Run the federation again into another folder."
        )
    path = stem.with_suffix(".safetensors")
    try:
        if sha256_of(path) != facts.get("sha256"):
            raise StorageError(
                f"'{path}' is not the file that '{stem.name}.json' describes: its SHA-256 differs, so it was cut short "
                "or changed. Delete the folder and run the federation again, or restore the file."
            )
        return load_file(path), facts
    except (OSError, SafetensorError) as error:
        raise StorageError(f"'{path}' cannot be read as safetensors: {error}. Restore it or make it anew.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StorageError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"'{path}' cannot be read as JSON: {error}. Restore it or make it anew.") from error
    if not isinstance(content, dict):
        raise StorageError(f"'{path}' holds a JSON {type(content).__name__}, but an object is needed.")
    return content


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain types atomically, to be read with `weights_only=True`."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of tensors and plain types.

    Raises:
        StorageError: the file is not such a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut short or foreign
        raise StorageError(
            f"'{path}' cannot be read as a checkpoint ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Name another checkpoint, or leave it out to start anew."
        ) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(chunk)
    return digest.hexdigest()
