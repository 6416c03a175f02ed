"""A study: named scenarios, defences and seeds, each combination of which is one ordinary run of an attack."""

import hashlib
import itertools
import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fl_lightning.errors import MissingFile, SettingError

OF_THE_STUDY = ("trainer.logger", "trainer.enable_checkpointing", "ckpt_path", "seed_everything", "config")
"""Settings that a study sets itself, for each of its runs."""
OF_THE_FEDERATION = ("data", "federation", "seed_everything")
"""Sections of a configuration that determine the federation: runs that share them share its record."""
UNDEFENDED = "none"
"""Name of the defence that is none; what leaks without defence is what the others are compared with."""


@dataclass(frozen=True)
class Scenario:
    """A situation in which the attack is tried.

    Args:
        name: in the report, at most 60 characters.
        about: what it is, for a reader who does not know the settings.
        settings: by dotted name, as on the command line of `fit`: `federation.client.lr: 0.01`.
        grid: dotted name -> list of values, each combination of which makes a scenario of its own.
        base: configurations in place of the study's.
        configs: configurations on top of these.
        defences: names of the study's defences that are tried; null for all.
    """

    name: str
    about: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    base: list[Path] | None = None
    configs: list[Path] = field(default_factory=list)
    defences: list[str] | None = None


@dataclass(frozen=True)
class Defence:
    """What the federation does so that less leaks.

    Args:
        name: in the report, at most 60 characters.
        about: what it is, for a reader who does not know the settings.
        settings: by dotted name, as those of a scenario, which they add to.
        configs: configurations on top of the scenario's, such as configs/defenses/gaussian_noise.yaml.
    """

    name: str
    about: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    configs: list[Path] = field(default_factory=list)


NO_DEFENCE = Defence(UNDEFENDED, "The federation as it is.")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        scenario: with its settings.
        defence: with its settings.
        seed: of the data, the federation and the attack.
        arguments: of `fit`, without those that say where results lie.
        federation: name of the record that the run reads; None for rounds of another system.
        identity: of the settings, those in the configurations' files included.
    """

    scenario: Scenario
    defence: Defence
    seed: int
    arguments: tuple[str, ...]
    federation: str | None
    identity: str

    @property
    def title(self) -> str:
        """The cell in words."""
        return f"{self.scenario.name} / {self.defence.name} / seed {self.seed}"

    @cached_property
    def name(self) -> str:
        """The name of its folder; other settings have another name."""
        words = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")[:60]
        return f"{words}-{self.identity}"

    @property
    def command(self) -> str:
        """What repeats the run by itself."""
        return shlex.join(["python", "cli.py", "fit", *self.arguments])

    def placed(self, out: Path) -> list[str]:
        """The arguments of `fit`, results and records of the federation below `out`."""
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(self.folder(out)), "name": "", "version": "run"},
        }
        record = [] if self.federation is None else [f"--observation={self.record(out)}"]
        return [
            *self.arguments,
            *record,
            f"--trainer.logger={json.dumps(logger)}",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.limit_val_batches=0",  # panels during the run, which nobody looks at
        ]

    def record(self, out: Path) -> Path | None:
        """The record that the run reads; None for rounds of another system."""
        return None if self.federation is None else out / "federations" / self.federation

    def folder(self, out: Path) -> Path:
        """Where the cell's results lie: `run/` is the attack's run directory."""
        return out / "cells" / self.name


@dataclass(frozen=True)
class Study:
    """What is to be found out.

    Args:
        title: of the report.
        scenarios: situations, the most telling first.
        base: configurations of `fit`, in the order in which they are read.
        settings: by dotted name, for all runs.
        defences: the first is what the others are compared with, and is usually called `none`.
        seeds: each combination is run with each seed; intervals need three.

    Raises:
        SettingError: there is nothing to do, a name occurs twice or is unknown, or a setting is the study's own.
        MissingFile: a configuration does not exist.
    """

    title: str
    scenarios: list[Scenario]
    base: list[Path]
    settings: dict[str, Any] = field(default_factory=dict)
    defences: list[Defence] = field(default_factory=lambda: [NO_DEFENCE])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        for what, given in (("scenarios", self.scenarios), ("defences", self.defences), ("seeds", self.seeds)):
            if not given:
                raise SettingError(f"`{what}` is empty, so there is nothing to do. Give at least one.")
        for what, names in (
            ("scenario", [scenario.name for scenario in self.expanded()]),
            ("defence", [defence.name for defence in self.defences]),
            ("seed", self.seeds),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise SettingError(f"The {what} '{twice[0]}' occurs twice. Give each one another name, or leave one.")
            long = [name for name in names if len(str(name)) > 60]
            if long:
                raise SettingError(f"The name '{long[0][:57]}...' of a {what} has more than 60 characters. Shorten it.")
        known = {defence.name for defence in self.defences}
        for scenario in self.scenarios:
            if scenario.defences == []:
                raise SettingError(
                    f"The scenario '{scenario.name}' has an empty list of `defences`, so it would not be run. Name "
                    "some of the study's, or leave the list out for all."
                )
            unknown = sorted(set(scenario.defences or ()) - known)
            if unknown:
                raise SettingError(
                    f"The scenario '{scenario.name}' names the defence '{unknown[0]}', but the study has "
                    f"{', '.join(sorted(known))}. Correct the name, or add it to `defences`."
                )
        for place in (self, *self.expanded(), *self.defences):
            for key in place.settings:
                if key.startswith(OF_THE_STUDY):
                    raise SettingError(
                        f"`{key}` is set by the study itself, for each of its runs. Leave it out of `settings`; seeds "
                        "are listed in `seeds`, and results lie in `out`."
                    )
        for path in {path for s in self.scenarios for d in self.defences for path in self._configs(s, d)}:
            if not path.is_file():
                raise MissingFile(f"There is no configuration '{path}'. Correct `base` or `configs`, which name files.")

    def expanded(self) -> list[Scenario]:
        """The scenarios, one for each combination of its `grid`."""
        found = []
        for scenario in self.scenarios:
            for chosen in itertools.product(*scenario.grid.values()):
                picked = dict(zip(scenario.grid, chosen, strict=True))
                shown = ", ".join(
                    _text(value) if len(picked) == 1 else f"{key.rpartition('.')[2]} {_text(value)}"
                    for key, value in picked.items()
                )
                name = f"{scenario.name}: {shown}" if picked else scenario.name
                found.append(replace(scenario, name=name, settings={**scenario.settings, **picked}, grid={}))
        return found

    def cells(self) -> list[Cell]:
        """All runs, the most telling first: every scenario and defence with the first seed, then the next seed."""
        scenarios, read = self.expanded(), {}
        for path in {path for s in scenarios for d in self.defences for path in self._configs(s, d)}:
            read[path] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return [
            self._cell(scenario, defence, seed, read)
            for seed in self.seeds
            for scenario in scenarios
            for defence in self.defences
            if scenario.defences is None or defence.name in scenario.defences
        ]

    def _configs(self, scenario: Scenario, defence: Defence) -> list[Path]:
        return [*(scenario.base or self.base), *scenario.configs, *defence.configs]

    def _cell(self, scenario: Scenario, defence: Defence, seed: int, read: dict[Path, dict[str, Any]]) -> Cell:
        base = self._configs(scenario, defence)
        settings = {**self.settings, **scenario.settings, **defence.settings, "seed_everything": seed}
        arguments = [word for path in base for word in ("--config", str(path))]
        arguments += [f"--{key}={_text(value)}" for key, value in settings.items()]
        # What the files hold is a part of what is run: a cell of an edited configuration is another cell.
        contents = [read[path] for path in base]
        deciding = [{name: content.get(name) for name in OF_THE_FEDERATION} for content in contents]
        deciding.append({key: value for key, value in settings.items() if key.partition(".")[0] in OF_THE_FEDERATION})
        foreign = "observation" in settings
        record = None if foreign else _digest(deciding)
        return Cell(scenario, defence, seed, tuple(arguments), record, _digest([arguments, contents]))


def _text(value: Any) -> str:
    """A setting's value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]
