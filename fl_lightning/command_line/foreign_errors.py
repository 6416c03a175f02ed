"""What libraries raise because of a user's settings, told apart from defects of this program."""

import errno
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fl_lightning.errors import AuditError, SettingError
from fl_lightning.storage import not_writable

LIBRARIES = {"cli", "__main__", "jsonargparse", "lightning", "lightning_utilities", "torch", "fsspec", "tensorboard"}
"""Top-level packages whose code, with the standard library, stands between a setting and a refusal of it."""
FULL_DISK = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS") if hasattr(errno, name)}  # fewer on Windows


def for_the_user(error: BaseException) -> AuditError | None:
    """What to tell the user of an error; None if it is a defect of this program.

    These are errors of this project, also as the cause of another one (jsonargparse wraps what a constructor raises);
    memory that is exhausted; a disk that is full when a library writes; and Lightning's `MisconfigurationException`
    where no code of this project or of the user has asked Lightning for what it refuses.
    """
    for cause in _causes(error):
        if isinstance(cause, AuditError):
            return cause
        if _is_full_memory(cause):
            return SettingError(
                "This run needs more memory than there is. Lower `data.image_size`, the number of images or "
                f"`model.chunk_size`, or choose a smaller `federation.model`. ({short(cause, 120)})"
            )
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return not_writable(cause.filename and Path(cause.filename), cause)
    if isinstance(error, MisconfigurationException) and from_libraries_alone(error):
        return SettingError(f"Lightning refuses these settings: {short(error, 300)}")
    return None


def refused_by_trainer(error: Exception, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> SettingError:
    """The error for the user where Lightning's Trainer cannot be made from settings.

    Args:
        error: raised by the constructor.
        settings: all arguments of the constructor.
        defaults: their default values.
    """
    message = short(error, 220)
    changed = [name for name, value in settings.items() if value != defaults.get(name) and _is_plain(value)]
    named = [name for name in changed if name in message]
    named = named or [name for name in changed if len(str(settings[name])) > 1 and str(settings[name]) in message]
    shown = ", ".join(f"`trainer.{name}: {settings[name]}`" for name in named[:2])
    return SettingError(f"Lightning refuses {shown or 'the settings of `trainer`'}: {message}")


def from_libraries_alone(error: BaseException) -> bool:
    """Whether only code of libraries and of the command line runs between the start of the program and an error."""
    allowed = LIBRARIES | sys.stdlib_module_names
    frames = [frame for cause in _causes(error) for frame, _ in walk_tb(cause.__traceback__)]
    return all(frame.f_globals.get("__name__", "").partition(".")[0] in allowed for frame in frames)


def short(error: BaseException, most: int) -> str:
    """The first sentences of the message of an error's first cause, in one line, without addresses in memory."""
    *_, first = _causes(error)
    text = " ".join(str(first).split()) or type(first).__name__
    text = re.sub(r"<(?:\w+\.)*(\w+) object at 0x\w+>", r"\1", text)
    text = text if len(text) <= most else text[: most - 3].rpartition(" ")[0] + " ..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and, one after another, what caused it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, bool | int | float | str) for part in parts)


def _is_full_memory(error: BaseException) -> bool:
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return allocator or isinstance(error, MemoryError | torch.OutOfMemoryError)
