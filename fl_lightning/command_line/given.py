"""What a user wrote: the command line, and the configurations that it names."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fl_lightning.errors import AuditError


class UsageError(AuditError):
    """The command line or a configuration cannot be read as settings."""


@dataclass(frozen=True)
class Given:
    """A command line and the keys of its configurations.

    Attributes:
        arguments: all that stands behind the program's name.
        files: configurations in the order of the command line -> their settings, by the names that these have on the
            command line (`model.lr`).
    """

    arguments: list[str]
    files: dict[str, set[str]]

    @classmethod
    def read(cls, arguments: list[str]) -> "Given":
        """Read the configurations that are named.

        Raises:
            UsageError: one is missing, or is no YAML of settings.
        """
        named = [value for option, value in pairwise(arguments) if option in ("--config", "-c")]
        named += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
        return cls(arguments, {name: _read(name)[1] for name in named})

    def place(self, key: str) -> str:
        """` in 'FILE'` if a setting is given by a file, and nothing if it is by the command line."""
        if any(argument.split("=")[0] == f"--{key}" for argument in self.arguments):
            return ""
        return "".join(f" in '{name}'" for name in [name for name, keys in self.files.items() if key in keys][-1:])

    def is_early(self, key: str) -> bool:
        """Whether a setting stands on the command line before a configuration."""
        options = [argument.split("=")[0] for argument in self.arguments]
        return f"--{key}" in options and any(o in ("--config", "-c") for o in options[options.index(f"--{key}") :])


def settings_in(name: str) -> dict[str, Any]:
    """The settings of a configuration, nested as in YAML.

    Args:
        name: of its file, or the settings themselves as YAML.

    Raises:
        UsageError: it is missing, or is no YAML of settings.
    """
    return _read(name)[0]


def _read(name: str) -> tuple[dict[str, Any], set[str]]:
    """The settings of a configuration, and the names of all of them."""
    path = Path(name)
    try:
        there = path.exists()
        text = path.read_text(encoding="utf-8") if there else name  # settings may be given instead of a file's name
        settings = yaml.safe_load(text)
        keys = set(_keys(settings))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context
        raise UsageError(
            f"'{_short(name)}'{line} is not valid YAML ({problem}). Correct it, or name another file."
        ) from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
        raise UsageError(
            f"The configuration '{_short(name)}' cannot be read as text ({reason}). Name a YAML file."
        ) from error
    if isinstance(settings, dict):
        return settings, keys
    if not there:
        beside = get_close_matches(path.stem, _configurations(path.parent), n=1)
        nearest = [f"Did you mean '{path.with_name(f'{stem}{path.suffix}')}'?" for stem in beside]
        raise UsageError(
            f"There is no configuration '{_short(name)}'. {(nearest or ['configs/README.md lists ours.'])[0]}"
        )
    content = "nothing" if settings is None else f"a {type(settings).__name__}"
    raise UsageError(f"'{name}' holds {content}, but a configuration holds settings: `trainer: {{max_steps: 100}}`.")


def _configurations(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.y*ml")] if folder.is_dir() else []


def _keys(settings: Any, prefix: str = "") -> Iterator[str]:
    """Names of all settings at any depth, joined by dots, without the words that YAML needs for classes."""
    if isinstance(settings, list):
        for item in settings:
            yield from _keys(item, prefix)
    if isinstance(settings, dict):
        for name, value in settings.items():
            key = prefix if name in ("class_path", "init_args", "dict_kwargs") else f"{prefix}.{name}".lstrip(".")
            yield key
            yield from _keys(value, key)


def _short(text: str, most: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
