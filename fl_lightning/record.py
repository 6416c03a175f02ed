"""A federation's folder on disk: its settings and checkpoint, what was observed, and the ground truth."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fl_lightning.errors import AuditError
from fl_lightning.storage import read_json, write_json


class RecordError(AuditError):
    """A directory does not hold the record that was asked for."""


class Record:
    """A federation's directory: `observed/` is for attacks, `truth/` for evaluation.

    Args:
        directory: holds `settings.json`, `federation.ckpt`, `tensorboard/`, `observed/` and `truth/`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = directory / "federation.ckpt"
        self.settings = directory / "settings.json"

    def observation(self, round_: int) -> Path:
        """Stem of a round's Observation."""
        return self.directory / "observed" / f"round_{round_:04d}"

    def truth(self, round_: int) -> Path:
        """Stem of a round's Truth."""
        return self.directory / "truth" / f"round_{round_:04d}"

    @property
    def observed_rounds(self) -> list[int]:
        """Rounds whose Observation is on disk, ascending."""
        return sorted(int(path.stem.removeprefix("round_")) for path in self.directory.glob("observed/round_*.json"))

    @property
    def foreign(self) -> bool:
        """Whether the rounds were observed in another system: there are Observations, but no settings of ours."""
        return not self.settings.exists() and bool(self.observed_rounds)

    def claim(self, settings: dict[str, Any]) -> None:
        """Bind the directory to a federation's settings.

        Raises:
            RecordError: it belongs to a federation with other settings.
        """
        if not self.settings.exists():
            write_json(self.settings, settings)
        elif differing := _differences(read_json(self.settings), settings):
            raise RecordError(
                f"'{self.directory}' holds a federation with other settings: {'; '.join(differing)}. "
                "Name another folder with `--observation`, or delete this one."
            )


def fingerprint(settings: dict[str, Any]) -> str:
    """A short name for settings: equal settings have equal names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs; settings that an earlier version did not record yet are not compared."""
    found = []
    for key in sorted(old):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} was {before!r} and is now {after!r}")
    return found
