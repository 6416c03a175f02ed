"""The files of an audit: report.html for people, report.json and cells.csv for programs."""

import csv
import io
import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attack_modules.audit.conclusions import BY_CHANCE, CONFIDENCE, NO_PROOF, Conclusions, Group, Interval
from attack_modules.audit.readings import COPY, Reading, letter
from attack_modules.audit.workers import in_words
from attack_modules.evaluation.finished_run import ImageRow
from attack_modules.evaluation.persons import RECOGNISABLE
from attack_modules.evaluation.strangers import FALSE_ALARMS
from fl_lightning.errors import AuditError, SettingError, counted
from fl_lightning.storage import strict_json, write_text

TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_BYTES = 10 * 2**20
"""Size of a report, beyond which pictures are left out."""
PICTURED = 6
"""Settings whose pictures are shown; those of the others are shown on demand."""
MOST_LISTED = 40
"""Items of a list in report.html; report.json has all."""
LETTERS = {
    "A": "sees updates alone",
    "B": "and knows what images look like in general",
    "C": "and knows how the peers train (rate, epochs, batches)",
    "D": "and has public images to learn from",
    "E": "and knows which classes the peers hold",
    "F": "an active attacker, who changes the model: not tried here",
    "G": "likewise, with public images: not tried here",
    "H": "likewise, who also chooses the clients: not tried here",
}
"""Threat models of Carletti et al. (USENIX Security 2025), each with what it adds to the one before."""
NO_JINJA2 = (
    "report.html needs Jinja2, which is not installed: `pip install 'curious-client[audit]'`, then the same command "
    "again."
)
PACKAGES = ("torch", "lightning", "torchvision", "jinja2")


class Report:
    """What a study found, in words, pictures and tables.

    Args:
        conclusions: of the study.
        settings_of: a cell -> its parsed settings; None if they could not be read.
        origins: what reconstructions were compared with, in words.
        redacted: whether originals are left out.
        command: that made the report.
    """

    def __init__(
        self,
        conclusions: Conclusions,
        settings_of: Callable[[Reading], Mapping[str, Any] | None],
        origins: Sequence[str],
        redacted: bool,
        command: str,
    ) -> None:
        self.conclusions = conclusions
        self.settings_of = settings_of
        self.origins = list(origins)
        self.redacted = redacted
        self.command = command

    def write(self, out: Path) -> Path:
        """Write `cells.csv`, `report.json` and `report.html`, each of them whatever becomes of the others.

        Returns:
            The path of the report.

        Raises:
            StorageError: a file cannot be written; those that can be are.
            SettingError: the template engine is not installed; the other two files are written.
        """
        files: dict[str, Callable[[], str]] = {  # the smallest first, so that a full disk has room for it
            "cells.csv": self.cells,
            "report.json": lambda: strict_json(self.content),
            "report.html": self.page,
        }
        failed: dict[str, AuditError] = {}
        for name, content in files.items():
            try:
                write_text(out / name, content())
            except AuditError as error:
                failed[name] = error
        if failed:
            first = next(iter(failed.values()))
            written = [name for name in files if name not in failed]
            raise type(first)(f"{first} Written all the same: {', '.join(written) or 'nothing'}.")
        return out / "report.html"

    def cells(self) -> str:
        """One row a cell, empty where nothing is known."""
        text = io.StringIO()
        lines = [reading.line() for reading in self.conclusions.readings]
        writer = csv.DictWriter(text, list(lines[0]))
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in line.items()} for line in lines)
        return text.getvalue()

    @cached_property
    def content(self) -> dict[str, Any]:
        """What the report says, in JSON types, without pictures."""
        found = self.conclusions
        return {
            "title": found.study.title,
            "verdict": found.verdict(),
            "groups": [self._group(group) for group in found.groups],
            "clients": self.leaked_by(lambda row: row.client),
            "persons": self.leaked_by(lambda row: row.person or None),
            "comparisons": [
                {"more": one.title, "less": other.title, "told": {item: list(pair) for item, pair in items.items()}}
                for one, other, items in found.comparisons()
            ],
            "failures": [list(failure) for failure in found.failures()],
            "actions": [vars(action) for action in found.actions()],
            "thresholds": self.thresholds(),
            "provenance": self.provenance(),
            "cells": [reading.line() for reading in found.readings],
        }

    def page(self) -> str:
        """The report in HTML.

        Raises:
            SettingError: Jinja2 is not installed.
        """
        try:
            from jinja2 import Environment, StrictUndefined
        except ImportError as error:
            raise SettingError(NO_JINJA2) from error
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {
            "share": _share, "number": _number, "words": in_words, "interval": _vars, "counted": counted,
        }  # fmt: skip
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        shown = self._pictured()
        while True:
            page = template.render(
                found=self.conclusions, report=self, shown=shown, content=self.content, letters=LETTERS,
                most=MOST_LISTED, pictured=PICTURED, no_proof=NO_PROOF, compared=self.conclusions.comparisons(),
                plot=self.plot(),
                made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            )  # fmt: skip
            if len(page.encode()) <= MOST_BYTES or not shown:
                return page
            shown = shown[: len(shown) // 2]

    def _pictured(self) -> list[tuple[Group, Reading]]:
        """Groups with a reading that has pictures, the worst first, as many as a report has room for."""
        pairs = [(g, r) for g in self.conclusions.groups for r in g.done if r.worst]
        kept, room = [], MOST_BYTES
        for pair in sorted(pairs, key=lambda pair: pair[0].severity, reverse=True):
            pictures = [*pair[1].worst, *pair[1].middle]
            room -= sum(len(picture.original or "") + len(picture.reconstruction or "") for picture in pictures)
            if room < 0:
                break
            kept.append(pair)
        return kept

    def _group(self, group: Group) -> dict[str, Any]:
        claimed = group.share(lambda reading: reading.claimed)
        levels = [str((reading.results.get("verdict") or {}).get("level", "")) for reading in group.done]
        first = group.done[0] if group.done else None
        settings = self.settings_of(first) if first else None
        told = first.told if first else {}
        counted = [(r.diagnosis("num_images"), len(r.rows)) for r in group.compared]
        peers = [r.results["attribution"] for r in group.done if r.results.get("attribution")]
        separated = [
            (r.diagnosis("disentangled"), r.diagnosis("num_images")) for r in group.done if r.diagnosis("disentangled")
        ]
        return {
            "scenario": group.scenario.name,
            "defence": group.defence.name,
            "seat": group.seat,
            "letter": letter(settings, told) if settings is not None and told else None,
            "runs": len(group.done),
            "of_runs": len(group.readings),
            "images": group.images,
            "counts": [list(pair) for pair in counted if pair[0] is not None],
            "counts_told": told.get("num_images") == "known",
            "labels_found": _vars(group.mean_score("labels_found")),
            "labels_told": "known" in (told.get("labels"), told.get("label_counts")),
            "peers": [[found["peers"], found["clients"]] for found in peers],
            "features_separated": [list(pair) for pair in separated],
            "features_error": _vars(Interval.of([r.diagnosis("uncertainty") for r in group.done])),
            "leaked": group.leaked if group.compared else None,
            "leaked_share": _vars(group.leaked_share),
            "above_chance": group.above_chance,
            "chance": max((reading.chance for reading in group.compared), default=None),
            "confirmed": _vars(Interval.of([r.confirmed and r.confirmed.rate for r in group.done], 0.0, 1.0)),
            "confirmed_by_others": _vars(
                Interval.of([r.confirmed and r.confirmed.by_others for r in group.done], 0.0, 1.0)
            ),
            "confirmation_area": _vars(Interval.of([r.confirmed and r.confirmed.area for r in group.done], 0.0, 1.0)),
            "recognisable": _vars(group.share(lambda reading: reading.recognisable)),
            "classified": _vars(group.share(lambda reading: reading.classified)),
            "persons_seen": _vars(group.persons_seen),
            "copies": _vars(group.share(lambda reading: reading.copies)),
            "psnr": _vars(group.mean_score("psnr_mean")),
            "ssim": _vars(group.mean_score("ssim_mean")),
            "claimed": _vars(claimed),
            "own_verdicts": {level: levels.count(level) for level in sorted(set(levels))},
            "accuracy": _vars(group.accuracy),
            "privacy": (first.results.get("privacy") or []) if first else [],
            "accuracy_of": next((r.accuracy[0] for r in group.done if r.accuracy), None),
            "told": told,
        }

    def leaked_by(self, owner: Callable[[ImageRow], Any]) -> list[dict[str, Any]]:
        """What of each owner leaked in the worst group, over all seeds, in the owners' order.

        Args:
            owner: of an image, such as its client; None where it is not known.
        """
        worst = self.conclusions.worst
        owned: dict[Any, list[ImageRow]] = {}
        for reading in worst.compared if worst else ():
            for row in reading.rows:
                if (of := owner(row)) is not None:
                    owned.setdefault(of, []).append(row)
        found = []
        for of in sorted(owned):
            rows = owned[of]
            psnr = [row.psnr for row in rows if not math.isnan(row.psnr)]
            names = [row.source or row.class_name for row in rows if row.nearer == 0]
            found.append(
                {
                    "of": of,
                    "clients": sorted({row.client for row in rows if row.client is not None}),
                    "images": len(rows),
                    "leaked": sum(row.nearer == 0 for row in rows),
                    "recognisable": sum(row.psnr >= RECOGNISABLE for row in rows),
                    "copies": sum(row.psnr >= COPY for row in rows),
                    "best_psnr": max(psnr, default=None),
                    "names": [] if self.redacted else sorted(set(names)),
                }
            )
        return found

    def thresholds(self) -> dict[str, Any]:
        """When something counts as what."""
        return {
            "strangers": self.origins,
            "recognisable_db": RECOGNISABLE,
            "copy_db": COPY,
            "false_alarms": FALSE_ALARMS,
            "confidence": CONFIDENCE,
            "by_chance": BY_CHANCE,
        }

    def plot(self) -> list[dict[str, Any]]:
        """Leak against accuracy, a point for each group where both are known, in percent."""
        points = []
        for group in self.conclusions.groups:
            share, accuracy = group.leaked_share, group.accuracy
            if share and accuracy:
                name = chr(ord("A") + len(points) % 26) + (str(len(points) // 26) if len(points) >= 26 else "")
                points.append(
                    {"name": name, "title": group.title, "leaked": 100 * share.mean, "accuracy": 100 * accuracy.mean}
                )
        return points

    def provenance(self) -> dict[str, Any]:
        """By which code and where the runs were made."""
        readings = self.conclusions.readings
        versions = [reading.results["versions"] for reading in readings if reading.results.get("versions")]
        return {
            "command": self.command,
            "commit": commit(),
            "program": _version("curious-client"),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "versions_of_runs": [dict(pairs) for pairs in sorted({tuple(v.items()) for v in versions})],
            "machines": sorted({reading.machine for reading in readings if reading.machine}),
            "seeds": list(self.conclusions.study.seeds),
            "seconds": round(sum(reading.seconds or 0.0 for reading in readings), 1),
        }


def commit() -> str | None:
    """The commit of this project's checkout, marked where files differ from it; None if it is no checkout."""
    root = Path(__file__).parents[2]
    with suppress(OSError, subprocess.CalledProcessError):
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top) == root:
            changed = _git(root, "status", "--porcelain", "--untracked-files=no")
            return _git(root, "rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _vars(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else vars(interval)


def _plain(value: Any) -> Any:
    """A number in short, nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _share(interval: Mapping[str, float] | None) -> str:
    """An interval of shares in words."""
    if interval is None:
        return "not known"
    mean, low, high = (f"{interval[name]:.0%}" for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def _number(interval: Mapping[str, float] | None, digits: int = 1) -> str:
    """An interval of numbers in words."""
    if interval is None:
        return "not known"
    mean, low, high = (f"{interval[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"
