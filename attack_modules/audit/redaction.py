"""What a report for circulation leaves out: originals, and all that names a person or a person's file."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from attack_modules.audit.readings import Picture, Reading
from attack_modules.evaluation.finished_run import ImageRow
from fl_lightning.errors import SettingError

LEFT_OUT = "LEFT_OUT"
"""In a command, in place of what may name a file."""
NO_REASON = "The reason may name files, so it is left out here; it stands in the report with originals."
AN_IMAGE = "an image"
OWN_FILES = re.compile(r"configs/[\w/]+\.yaml")
"""Configurations that ship with this program."""
OWN_CLASSES = re.compile(r"(attack_modules|fl_lightning|lightning|torch)(\.\w+)+")
A_WORD = re.compile(r"[\w,+-]{0,100}")
NAME_FILES = {
    "checkpoint", "ckpt_path", "config", "csv", "initial_weights", "module", "observation", "out", "path", "root",
    "strangers", "vae_weights", "weights",
}  # fmt: skip
"""Settings, by the last part of their dotted names, whose values name files even where they look like words."""
ROOT = Path(__file__).parents[2]


def redacted(readings: Sequence[Reading]) -> list[Reading]:
    """Cells without originals and names. Persons become `person 1`, `person 2`, the same ones in all cells."""
    persons: dict[str, str] = {}

    def hidden(row: ImageRow) -> ImageRow:
        person = persons.setdefault(row.person, f"person {len(persons) + 1}") if row.person else ""
        return replace(row, source="", person=person, class_name=AN_IMAGE)

    def without(reading: Reading) -> Reading:
        worst, middle = (
            [Picture(hidden(shown.row), None, shown.reconstruction) for shown in pictures]
            for pictures in (reading.worst, reading.middle)
        )
        arguments = tuple(without_names(reading.cell.arguments))
        return replace(
            reading, cell=replace(reading.cell, arguments=arguments), sentence=reading.sentence and NO_REASON,
            rows=[hidden(row) for row in reading.rows], worst=worst, middle=middle,
        )  # fmt: skip

    return [without(reading) for reading in readings]


def without_names(words: Sequence[str]) -> list[str]:
    """A command line in which only numbers, words, and this program's own files and classes are left of values."""
    found, name = [], ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            found.append(f"--{name}={_shown(name, value)}" if equals else word)
        else:
            found.append(_shown(name, word) if name else word)  # the program and its command come first
    return found


def refuse_names(grid: dict[str, list[Any]], scenario: str) -> None:
    """Refuse a grid over files, whose names would be those of its scenarios.

    Raises:
        SettingError: it is one.
    """
    for name, values in grid.items():
        if any(_safe(name, value) != value for value in values):
            raise SettingError(
                f"`redact` leaves names of files out, but the grid of the scenario '{scenario}' writes the values of "
                f"`{name}` into the names of its scenarios. Make each value a scenario with a name of its own."
            )


def _shown(name: str, value: str) -> str:
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return LEFT_OUT
    kept = _safe(name, parsed)
    return value if kept == parsed else kept if isinstance(kept, str) else json.dumps(kept)


def _safe(name: str, value: Any) -> Any:
    """A setting's value in which every string that may name a file is replaced."""
    if isinstance(value, dict):
        return {str(key): _safe(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_safe(name, inner) for inner in value]
    if not isinstance(value, str):  # a number; a date can only be a mistake
        return value if isinstance(value, int | float | None) else LEFT_OUT
    if OWN_CLASSES.fullmatch(value) or (OWN_FILES.fullmatch(value) and (ROOT / value).is_file()):
        return value
    if not A_WORD.fullmatch(value) or name.rpartition(".")[2] in NAME_FILES or Path(value).exists():
        return LEFT_OUT
    return value
