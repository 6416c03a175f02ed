"""A run's own directory: one run at a time, and no run over another's results."""

import os
from pathlib import Path

from fl_lightning.errors import AuditError


class RunDirectoryError(AuditError):
    """The run directory belongs to another run."""


def claim(directory: Path) -> Path:
    """Claim a directory for this run.

    Returns:
        The lock file; deleting it releases the directory.

    Raises:
        RunDirectoryError: another run is writing there, or has left its results.
    """
    if (directory / "results.json").exists():
        raise RunDirectoryError(
            f"'{directory}' holds the results of a finished run. Leave `trainer.logger.version` out to get a new "
            "directory, or delete this one."
        )
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / "run.lock"
    try:
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        owner = lock.read_text()
        if owner.isdecimal() and Path(f"/proc/{owner}").exists() and int(owner) != os.getpid():
            raise RunDirectoryError(
                f"Process {owner} is writing to '{directory}'. Wait for it, or leave `trainer.logger.version` out to "
                "get a new directory."
            ) from None
        lock.write_text(str(os.getpid()))  # left behind by a run that was killed
    return lock
