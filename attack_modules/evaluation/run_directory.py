"""A run's own directory: one run at a time, no run over another's results, and files written whole or not at all."""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from fl_lightning.errors import AuditError
from fl_lightning.storage import not_writable, save_checkpoint, unlock

PRELIMINARY = ("config.yaml", "hparams.yaml", "metrics.csv", "run.lock")
"""Files that are written before a run has results, beside TensorBoard's events."""


class RunDirectoryError(AuditError):
    """The run directory belongs to another run."""


class NotLogged(CSVLogger):
    """Gives a run whose metrics are not logged (`trainer.logger: false`) a directory of its own all the same."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any = None) -> None:
        pass

    def save(self) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


class SafeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads none that would run code; a full disk is a sentence."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only is not False)


def runs_of(trainer: Trainer) -> Path | None:
    """The run's directory, or the one in which it gets a directory of its own; None if its logger writes no files."""
    if _is_unnumbered(trainer.logger):
        return Path(os.path.expanduser(os.path.expandvars(trainer.logger.root_dir)))
    return None if trainer.log_dir is None else Path(trainer.log_dir)


def make_next_version(trainer: Trainer) -> Path | None:
    """Make the next free `version_N` and give it to the run, unless its logger has a version.

    Lightning would look for a free number now and make the directory later, so that runs that are started at once
    would share it.

    Returns:
        The directory that was made; None if the run has one, or it is another process's to make.

    Raises:
        StorageError: it cannot be made.
    """
    if rank_zero_only.rank or not _is_unnumbered(trainer.logger):
        return None
    root = runs_of(trainer)
    numbers = [path.name.removeprefix("version_") for path in root.glob("version_*")]
    for number in itertools.count(max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1):
        made = root / f"version_{number}"
        try:
            made.mkdir(parents=True)
        except FileExistsError:
            continue  # another run was faster
        except OSError as error:
            raise not_writable(made, error) from error
        trainer.logger._version = number  # its constructor takes one, but a run that is refused later needs none
        return made


def _is_unnumbered(logger: Logger | None) -> bool:
    return isinstance(logger, TensorBoardLogger | CSVLogger) and logger._version is None


def claim(directory: Path) -> FileLock:
    """Claim a directory for this run.

    Returns:
        The lock, held by the operating system until it is released (`storage.unlock`) or the process ends.

    Raises:
        RunDirectoryError: another run is writing there, or has left its results.
        StorageError: the directory is not writable.
    """
    lock = FileLock(directory / "run.lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunDirectoryError(
            f"Another run is writing to '{directory}'. Wait for it, or leave `trainer.logger.version` out to get a new "
            "directory."
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
        raise not_writable(directory, error) from error
    if (directory / "results.json").exists():
        unlock(lock)
        raise RunDirectoryError(
            f"'{directory}' holds the results of a run. Leave `trainer.logger.version` out to get a new directory, or "
            "delete this one."
        )
    return lock


def remove_if_without_results(directory: Path) -> None:
    """Remove a directory that holds only what is written before there are results; leave any other as it is."""
    files = list(directory.glob("*"))
    if all(file.name in PRELIMINARY or file.name.startswith("events.out.tfevents") for file in files):
        try:
            for file in files:
                file.unlink()
            directory.rmdir()
        except OSError:  # Windows: a file is still open. It is a nuisance, not an error
            pass
