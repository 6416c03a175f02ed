"""Atomic file writes, and reading and writing of tensors without pickle, verified by SHA-256."""

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
    """A file could not be written, or its content is not as expected; the message says what to do."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Provide a temporary path next to `path`; the file there replaces `path` if the block ends without an error.

    Raises:
        StorageError: the disk is full or the folder is not writable; a previous file at `path` is left unchanged.
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
            f"Could not write '{path}': {error}. Free disk space or choose another folder, then run the same "
            "command again; files written before are intact."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; infinite and NaN numbers, which JSON cannot represent, become null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(strict, indent=2, allow_nan=False) + "\n")


def save_record(stem: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Save tensors as `stem.safetensors`, and their metadata `facts` with the SHA-256 of that file as `stem.json`."""
    path = stem.with_suffix(".safetensors")
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        digest = sha256_of(temporary)
    write_json(stem.with_suffix(".json"), {**facts, "sha256": digest})


def load_record(stem: Path, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load tensors and metadata written by `save_record`.

    Args:
        stem: path of the two files without their suffixes.
        version: the latest format version that the caller reads.

    Raises:
        StorageError: a file is missing, truncated, modified, or of a later format version.
    """
    facts = read_json(stem.with_suffix(".json"))
    if facts.get("version") not in range(1, version + 1):
        raise StorageError(
            f"'{stem}.json' has format version {facts.get('version')}, but this program reads up to {version}. "
            "Run the federation again with another output folder."
        )
    path = stem.with_suffix(".safetensors")
    try:
        if sha256_of(path) != facts.get("sha256"):
            raise StorageError(
                f"'{path}' is not the file that '{stem.name}.json' describes: its SHA-256 differs, so it was truncated "
                "or modified. Restore the file, or delete the folder and run the federation again."
            )
        return load_file(path), facts
    except (OSError, SafetensorError) as error:
        raise StorageError(f"'{path}' cannot be read as safetensors: {error}. Restore or recreate it.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top-level value is an object.

    Raises:
        StorageError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"'{path}' cannot be read as JSON: {error}. Restore or recreate it.") from error
    if not isinstance(content, dict):
        raise StorageError(f"'{path}' contains a JSON {type(content).__name__}, but an object is needed. Restore it.")
    return content


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain Python types atomically, readable with `weights_only=True`."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of tensors and plain Python types to the CPU.

    Raises:
        StorageError: the file cannot be read as such a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many exception types for truncated or foreign files
        raise StorageError(
            f"'{path}' cannot be read as a checkpoint ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Specify another checkpoint, or none to start from the beginning."
        ) from error


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(chunk)
    return digest.hexdigest()
