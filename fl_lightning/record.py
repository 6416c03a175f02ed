"""A federation's folder on disk: its settings and checkpoint, what was observed, and the ground truth."""

import hashlib
import inspect
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fl_lightning.errors import AuditError
from fl_lightning.server_optimizers import FedAvg
from fl_lightning.storage import locked, read_json, write_json

NEW = {
    "initial_weights": None,
    "frozen": [],
    "server": FedAvg().describe(),
    "server_defenses": [],
    "seat": {"class": "CuriousClient"},
}
"""Settings that older records do not speak of, and what they mean by that."""
NEW_OF_CLIENTS = {"optimizer": "SGD", "label_smoothing": 0.0, "class_weights": None, "defenses": []}
"""The same of `client`."""


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

    def observation(self, round_: int, client: int | None = None) -> Path:
        """Stem of a round's Observation, or of that of one client's update in it."""
        return self.directory / "observed" / _stem(round_, client)

    def truth(self, round_: int, client: int | None = None) -> Path:
        """Stem of a round's Truth, or of that of one client in it."""
        return self.directory / "truth" / _stem(round_, client)

    @property
    def observed_rounds(self) -> list[int]:
        """Rounds whose Observation is on disk, ascending."""
        return sorted({int(path.stem.split("_")[1]) for path in self.directory.glob("observed/round_*.json")})

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
        elif differing := differences(_in_full(read_json(self.settings)), _in_full(settings)):
            raise RecordError(
                f"'{self.directory}' holds a federation with other settings: {summary(differing)}. "
                "Name another folder with `--observation`, or delete this one."
            )

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from writing to the directory, after waiting for one that does.

        Raises:
            StorageError: the directory is not writable.
        """
        return locked(
            self.directory / "federation.lock",
            f"Another run simulates the federation of '{self.directory}': waiting for its end.",
        )


def _stem(round_: int, client: int | None) -> str:
    return f"round_{round_:04d}" + ("" if client is None else f"_client_{client:04d}")


def fingerprint(settings: dict[str, Any]) -> str:
    """A short name for a federation's settings: equal settings have equal names, those of older records included."""
    brief = _without_channels(_without(NEW, settings))
    if "client" in brief:
        brief["client"] = _without(NEW_OF_CLIENTS, brief["client"])
    return hashlib.sha256(json.dumps(brief, sort_keys=True).encode()).hexdigest()[:12]


def _without(new: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without new ones that are not given."""
    return {name: value for name, value in settings.items() if name not in new or value != new[name]}


def _in_full(settings: dict[str, Any]) -> dict[str, Any]:
    """A federation's settings, of whatever age, with the new ones."""
    return _without_channels({**NEW, **settings, "client": {**NEW_OF_CLIENTS, **settings.get("client", {})}})


def _without_channels(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the images' channels: older records do not tell them, and the model's image shape does."""
    if "data" not in settings:
        return settings
    return {**settings, "data": {name: value for name, value in settings["data"].items() if name != "channels"}}


def describe(component: Any) -> Any:
    """The settings of a component in JSON types, to compare those of one run with those of another.

    Of an object these are the name of its class, and the arguments of its constructor that it keeps under their names.
    """
    if component is None or isinstance(component, bool | int | float | str):
        return component
    if isinstance(component, list | tuple):
        return [describe(item) for item in component]
    if isinstance(component, dict):
        return {str(name): describe(item) for name, item in component.items()}
    if isinstance(component, Path):
        return str(component)
    constructors = [vars(base)["__init__"] for base in type(component).__mro__ if "__init__" in vars(base)]
    arguments = [argument for made in constructors for argument in inspect.signature(made).parameters.values()]
    names = {a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)}
    kept = {name: describe(getattr(component, name)) for name in sorted(names) if hasattr(component, name)}
    return {"class": type(component).__name__, **kept}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs, in words; settings that an earlier version did not record yet are not compared."""
    found = []
    for key in sorted(old):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} was {_shown(before)} and is now {_shown(after)}")
    return found


def summary(differing: list[str], most: int = 3) -> str:
    """The first differences, and how many more there are."""
    more = len(differing) - most
    return "; ".join(differing[:most]) + (f"; and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
