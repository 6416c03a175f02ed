"""Checks of settings before work starts: their numbers, and what the machine must have for them."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from fl_lightning.client import silent_trainer
from fl_lightning.errors import MissingFile, SettingError, counted
from fl_lightning.storage import StorageError, load_checkpoint

LARGEST_SEED = 2**32 - 1
PROCESSES_PER_CORE = 4
"""Processes on a processor's core share it, so that more of them are slower; far more exhaust the memory."""


def refuse_unfit_numbers(settings: dict[str, Any]) -> None:
    """Refuse numbers that no setting can mean, whatever class it belongs to.

    Args:
        settings: of a command, nested, as in YAML.

    Raises:
        SettingError: a number is NaN or infinite, does not fit into 64 bits, or is a seed outside [0, 2**32 - 1].
    """
    for key, number in _numbers(settings):
        if not math.isfinite(number) or (abs(number) >= 2**63 and isinstance(number, int)):
            raise SettingError(f"`{key}` is {number:.4g}, but must be a finite number of at most 64 bits.")
        if key.rpartition(".")[2] in ("seed", "seed_everything") and not 0 <= number <= LARGEST_SEED:
            raise SettingError(f"`{key}` is {number}, but a seed is a whole number from 0 to {LARGEST_SEED}.")


def _numbers(setting: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(setting, dict):
        for name, value in setting.items():
            word = name in ("class_path", "init_args", "dict_kwargs")
            yield from _numbers(value, key if word else f"{key}.{name}".lstrip("."))
    elif isinstance(setting, list | tuple):
        for value in setting:
            yield from _numbers(value, key)
    elif isinstance(setting, int | float):
        yield key, setting


def refuse_unfit_machine(trainer: Trainer, precision: str | int | None, attacks: bool) -> None:
    """Refuse a precision that the device or an attack does not compute in, and far more processes than cores.

    Args:
        trainer: it knows on what the run would be.
        precision: as it was asked for; the trainer replaces what it does not have.
        attacks: whether the run is an attack.

    Raises:
        SettingError: with what to choose instead.
    """
    device, asked = trainer.strategy.root_device.type, str(precision or "32-true")
    if attacks and asked in ("bf16-true", "16-true"):
        raise SettingError(
            f"`trainer.precision` is {asked}, but attacks solve linear equations, which is not done in half precision. "
            "Choose 32-true, 16-mixed or bf16-mixed."
        )
    if device == "cpu":
        if asked.startswith("16"):
            raise SettingError(
                f"`trainer.precision` is {asked}, but processors do not compute in float16. Choose 32-true, or "
                "bf16-mixed where the processor has bf16."
            )
        if asked.startswith("bf16") and not _has_bf16():
            raise SettingError(
                f"`trainer.precision` is {asked}, but this processor does not compute in bf16. Choose 32-true."
            )
        cores = os.cpu_count() or 1
        if trainer.num_devices > PROCESSES_PER_CORE * cores:
            raise SettingError(
                f"`trainer.devices` is {trainer.num_devices}, but this machine has {counted(cores, 'core')}. Choose "
                f"at most {cores}, a process for each."
            )
    if device == "cuda" and asked.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SettingError(f"`trainer.precision` is {asked}, but this GPU has no bf16. Choose 32-true or 16-mixed.")


def refuse_missing_accelerator(name: str) -> None:
    """Refuse a device for the clients' training that this machine does not have.

    Raises:
        SettingError: with what Lightning says of it.
    """
    try:
        silent_trainer(accelerator=name)
    except (MisconfigurationException, ValueError) as error:  # the latter of a name that it does not know
        reason = str(error).rstrip(".")
        raise SettingError(
            f"`federation.accelerator` is {name!r}, which cannot be used here ({reason}). Leave it out for cpu."
        ) from error


def _has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def refuse_unwritable(directory: Path, setting: str) -> None:
    """Refuse a folder in which nothing can be written; what is created to find out is removed again.

    Args:
        directory: it need not exist.
        setting: the name of the setting that chooses it.

    Raises:
        SettingError: with the system's reason.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:  # the latter of names that hold a null character
        raise SettingError(
            f"Nothing can be written in '{directory}' ({getattr(error, 'strerror', None) or error}). Choose another "
            f"folder by `{setting}`."
        ) from error
    finally:
        for path in missing:
            with suppress(OSError, ValueError):  # another run may have written there in the meantime
                path.rmdir()


def refuse_foreign_checkpoint(path: Path) -> None:
    """Refuse a file that is no checkpoint of a run.

    Raises:
        MissingFile: it does not exist.
        StorageError: it is damaged, or holds something else.
    """
    if not path.exists():
        raise MissingFile(
            f"There is no checkpoint '{path}'. Name the last.ckpt of a run's folder, or start without one."
        )
    content = load_checkpoint(path) if is_zipfile(path) else None
    needed = {"state_dict", "global_step", "epoch", "pytorch-lightning_version"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise StorageError(
            f"'{path}' is no checkpoint of a run. Name the last.ckpt of a run's folder, or start without one."
        )
