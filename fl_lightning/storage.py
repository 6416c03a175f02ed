"""Atomic file writes, locks, and tensors and components in files without pickle; tensors verified by SHA-256."""

import hashlib
import io
import json
import os
import platform
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fl_lightning.errors import AuditError, in_short

T = TypeVar("T")


class StorageError(AuditError):
    """A file could not be written, or its content is not as expected; the message says what to do."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Provide a temporary path next to `path`; the file there replaces `path` if the block ends without an error.

    Raises:
        StorageError: the disk is full or the folder is not writable; a previous file at `path` is left unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise not_writable(path, error) from error


def not_writable(path: Path | None, error: Exception) -> StorageError:
    """The error to raise when a file or folder cannot be written; without a path if it is not known which."""
    return StorageError(
        f"Could not write {f'{str(path)!r}' if path else 'a file'}: {getattr(error, 'strerror', None) or error}. Free "
        "disk space or choose another folder, then run the same command again; files written before are intact."
    )


@contextmanager
def locked(path: Path, notice: str) -> Iterator[None]:
    """Hold a lock of the operating system, which ends with the process, whatever ends it.

    Args:
        path: the lock file; it exists only while the lock is held.
        notice: printed if another process holds the lock, before waiting for it.

    Raises:
        StorageError: the folder is not writable.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(notice, flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
        raise not_writable(path, error) from error
    try:
        yield
    finally:
        unlock(lock)


def unlock(lock: FileLock) -> None:
    """Release a lock and remove its file."""
    file = Path(lock.lock_file)
    if os.name == "posix":
        file.unlink(missing_ok=True)  # while it is held: afterwards, it could be another process's
        lock.release()
    else:
        lock.release()
        with suppress(OSError):  # Windows removes no open file: neither our own before, nor another's now
            file.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; infinite and NaN numbers, which JSON cannot represent, become null."""
    write_text(path, strict_json(content))


def strict_json(content: Any) -> str:
    """JSON text; infinite and NaN numbers, which JSON cannot represent, become null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(strict, indent=2, allow_nan=False) + "\n"


def save_record(stem: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Save tensors as `stem.safetensors`, and their metadata `facts` with the SHA-256 of that file as `stem.json`.

    The JSON file is there only with its tensors: a former one goes first, and the new one comes last.
    """
    described, path = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    with atomic_path(described) as new_facts, atomic_path(path) as new_tensors:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new_tensors)
        new_facts.write_text(strict_json({**facts, "sha256": sha256_of(new_tensors)}), encoding="utf-8")
        described.unlink(missing_ok=True)


def has_record(stem: Path) -> bool:
    """Whether both files that `save_record` writes are there."""
    return stem.with_suffix(".json").exists() and stem.with_suffix(".safetensors").exists()


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
        raise StorageError(
            f"'{path}' cannot be read as safetensors ({in_short(error)}). Restore or recreate it."
        ) from error


def in_a_file(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors as a mapped file, whose pages memory need not hold, see `release_pages`; elsewhere than on Linux
    themselves.

    Args:
        tensors: of the CPU, by name, none of which shares its memory with another.
        path: where the file is written; its name is gone at once, and it itself with the last of the tensors.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    if platform.system() != "Linux":
        return tensors
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    found = load_file(path)
    path.unlink()
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top-level value is an object.

    Raises:
        StorageError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"'{path}' cannot be read as JSON ({in_short(error)}). Restore or recreate it.") from error
    if not isinstance(content, dict):
        raise StorageError(f"'{path}' contains a JSON {type(content).__name__}, but an object is needed. Restore it.")
    return content


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain Python types atomically, readable with `weights_only=True`."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        writer = _Writer(file)
        try:
            torch.save(content, writer)  # not into memory first, where a checkpoint may have gigabytes
        except RuntimeError as error:  # torch's, which does not name the cause
            raise writer.error or error from error


class _Writer(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of tensors and plain Python types to the CPU.

    Raises:
        StorageError: the file cannot be read as such a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many exception types for truncated or foreign files
        raise StorageError(
            f"'{path}' cannot be read as a checkpoint ({in_short(error)}). "
            "Specify another checkpoint, or none to start from the beginning."
        ) from error


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(chunk)
    return digest.hexdigest()


def described(component: Any) -> dict[str, Any]:
    """`class_path` and `init_args` of a dataclass in JSON types, for `made_again`."""
    return {
        "class_path": f"{type(component).__module__}.{type(component).__qualname__}",
        "init_args": asdict(component),
    }


def made_again(description: dict[str, Any], kind: type[T], what: str) -> T:
    """The component that was described.

    Args:
        description: `class_path` and `init_args`.
        kind: class of which it must be.
        what: such a component, in words.

    Raises:
        StorageError: its class is not loaded, is of another kind, or does not take these settings.
    """
    path = str(description.get("class_path", ""))
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)  # a file must not choose what code is run
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise StorageError(
            f"A record names the {what} '{path[:120]}', but no such class is loaded, and a file may not load one. If "
            f"you trust it, `import {module[:80]}` first, or name it in the settings."
        )
    try:
        return found(**description.get("init_args", {}))
    except TypeError as error:
        raise StorageError(
            f"A record names settings that {name} does not have ({in_short(error)}). Simulate the federation again "
            "into another folder."
        ) from error
