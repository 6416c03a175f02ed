"""What a cell of a study says, as numbers: the ladder from counts to copies. It reads results only."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from attack_modules.attack import Level
from attack_modules.audit.study import Cell
from attack_modules.audit.workers import CellRecord
from attack_modules.evaluation.finished_run import FinishedRun, ImageRow, StrangersOf
from attack_modules.evaluation.persons import RECOGNISABLE
from attack_modules.evaluation.strangers import Confirmed
from attack_modules.panels import to_pil
from fl_lightning import seats
from fl_lightning.errors import AuditError, counted, in_short

COPY = 30.0
"""PSNR in dB from which a reconstruction is a copy."""
SHOWN = 4
"""Pairs of pictures of each kind."""
LONGEST_SIDE = 160
"""Pixels of a picture's longer side in the report."""
SURROGATE = ("guidance", "detail")
"""Settings of attacks that use what was learned from public images."""


@dataclass(frozen=True)
class Picture:
    """A reconstruction beside its original, as they stand in a report.

    Attributes:
        row: what is known of it.
        original: as a data URI; None where it is left out, or there is none.
        reconstruction: likewise; None if it was not found.
    """

    row: ImageRow
    original: str | None
    reconstruction: str | None


@dataclass(frozen=True)
class Reading:
    """One cell, with what it says as far as it was run and can be read.

    Attributes:
        cell: of the study.
        status: `done`, `failed`, `unreadable` or `not run`.
        sentence: why there is no result.
        seconds: of the process.
        machine: on which it ran, with its number of threads.
        results: of `results.json`.
        rows: see `FinishedRun`.
        strangers: that each reconstruction was compared with; 0 without originals.
        chance: share of the images that count as leaked at most where reconstructions have nothing of their originals.
        confirmed: see `FinishedRun`.
        accuracy: of the global model, see `FinishedRun`.
        worst: pictures of what leaked most; empty but for one seed.
        middle: pictures of the median.
    """

    cell: Cell
    status: str
    sentence: str = ""
    seconds: float | None = None
    machine: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[ImageRow] = ()
    strangers: int = 0
    chance: float = 1.0
    confirmed: Confirmed | None = None
    accuracy: tuple[str, float] | None = None
    worst: Sequence[Picture] = ()
    middle: Sequence[Picture] = ()

    @classmethod
    def of(cls, cell: Cell, out: Path, strangers_of: StrangersOf, pictures: bool) -> "Reading":
        """Read a cell.

        Args:
            cell: of the study.
            out: the study's folder.
            strangers_of: what reconstructions are compared with.
            pictures: whether to keep some.
        """
        record = CellRecord.load(cell.folder(out))
        if record is None:
            return cls(cell, "not run")
        ran = {"seconds": record.seconds, "machine": f"{record.machine}, {counted(record.threads, 'thread')}"}
        if record.status != "done":
            return cls(cell, "failed", record.sentence, **ran)
        try:
            run = FinishedRun.load(cell.folder(out) / "run", strangers_of, cell.record(out))
        except AuditError as error:
            return cls(cell, "unreadable", str(error), **ran)
        except Exception as error:  # a damaged file must not cost the report of all others
            return cls(cell, "unreadable", f"Its results cannot be read ({in_short(error)}).", **ran)
        worst, middle = _pictures(run) if pictures else ((), ())
        return cls(
            cell, "done", "", **ran, results=run.results, rows=run.rows, strangers=run.strangers, chance=run.chance,
            confirmed=run.confirmed, accuracy=run.accuracy, worst=worst, middle=middle,
        )  # fmt: skip

    @property
    def compared(self) -> bool:
        """Whether originals were at hand."""
        return self.strangers > 0

    @property
    def told(self) -> dict[str, str]:
        """What the attacker was told: item -> `known`, `guessed` or `inferred`."""
        return dict(self.results.get("knowledge") or {})

    @property
    def seat(self) -> str | None:
        """Who looked, in words; None where no result says it."""
        described = dict(self.results.get("seat") or {})
        name = described.pop("class", None)
        kind = getattr(seats, name or "", None)
        return kind(**described).words if kind else name

    @property
    def leaked(self) -> int | None:
        """Images whose reconstruction is nearer to the original than to any stranger; None without originals."""
        return sum(row.nearer == 0 for row in self.rows) if self.compared else None

    @property
    def recognisable(self) -> int | None:
        """Images that a person recognises, by their PSNR."""
        return sum(row.psnr >= RECOGNISABLE for row in self.rows) if self.compared else None

    @property
    def classified(self) -> int | None:
        """Reconstructions whose true class a classifier names; None without one."""
        known = [row.recognised for row in self.rows if row.recognised is not None]
        return sum(known) if known else None

    @property
    def copies(self) -> int | None:
        """Images of which the reconstruction is a copy, by its PSNR."""
        return sum(row.psnr >= COPY for row in self.rows) if self.compared else None

    @property
    def claimed(self) -> int:
        """Images of which the attack itself says that it has them, certainly or likely."""
        return sum(row.verdict in (Level.CERTAIN.value, Level.LIKELY.value) for row in self.rows)

    @property
    def persons(self) -> int | None:
        """Whom the originals show; None where the data does not tell."""
        return len({row.person for row in self.rows if row.person}) or None

    @property
    def persons_seen(self) -> int | None:
        """Persons of whom at least one image is recognisable."""
        seen = {row.person for row in self.rows if row.person and row.psnr >= RECOGNISABLE}
        return len(seen) if self.persons else None

    def score(self, name: str) -> float | None:
        """One of the scores of `results.json`, None where it is missing."""
        value = (self.results.get("scores") or {}).get(name)
        return None if value is None or math.isnan(value) else float(value)

    def diagnosis(self, name: str) -> Any:
        """One of the attack's own findings, None where it has none."""
        return (self.results.get("diagnosis") or {}).get(name)

    def line(self) -> dict[str, Any]:
        """The cell's row in `cells.csv`."""
        attribution = self.results.get("attribution") or {}
        accuracy = self.accuracy or (None, None)
        return {
            "scenario": self.cell.scenario.name,
            "defence": self.cell.defence.name,
            "seed": self.cell.seed,
            "status": self.status,
            "sentence": self.sentence,
            "attack": self.results.get("attack"),
            "own_verdict": (self.results.get("verdict") or {}).get("level"),
            "originals": len(self.rows) if self.compared else None,
            "images_counted": self.diagnosis("num_images"),
            "labels_found": self.score("labels_found"),
            "peers": attribution.get("clients"),
            "peers_found": attribution.get("peers"),
            "features_separated": self.diagnosis("disentangled"),
            "features_error": self.diagnosis("uncertainty"),
            "leaked": self.leaked,
            "leaked_by_chance": round(self.chance * len(self.rows), 3) if self.compared else None,
            "confirmed_at_1_percent": self.confirmed and self.confirmed.rate,
            "confirmed_by_others": self.confirmed and self.confirmed.by_others,
            "confirmation_area": self.confirmed and self.confirmed.area,
            "recognisable_20db": self.recognisable,
            "persons": self.persons,
            "persons_seen": self.persons_seen,
            "classified": self.classified,
            "copies_30db": self.copies,
            "claimed": self.claimed if self.status == "done" else None,
            "psnr_mean": self.score("psnr_mean"),
            "psnr_min": self.score("psnr_min"),
            "psnr_max": max((row.psnr for row in self.rows if not math.isnan(row.psnr)), default=None),
            "ssim_mean": self.score("ssim_mean"),
            "misfit": self.results.get("misfit"),
            "accuracy": accuracy[1],
            "accuracy_of": accuracy[0],
            "seconds": self.seconds,
            "peak_memory_mb": self.results.get("peak_memory_mb"),
            "folder": self.cell.name,
            "command": self.cell.command,
        }


def letter(settings: Mapping[str, Any], told: Mapping[str, str]) -> str:
    """The threat model of a run in the letters of Carletti et al. (USENIX Security 2025), which LeakPro uses, too.

    Of the passive ones: A sees updates alone, B has basic knowledge of images, C knows how the peers train, D has
    public images like theirs, E knows the distribution of their labels. Attacks here always use basic knowledge.

    Args:
        settings: parsed, of the run.
        told: what the attacker was told.
    """
    if "known" in (told.get("labels"), told.get("label_counts")):
        return "E"
    arguments = (settings.get("model") or {}).get("init_args") or {}
    if any(arguments.get(name) for name in SURROGATE) or settings.get("postprocess", "none") != "none":
        return "D"
    return "C" if "known" in (told.get("client_lr"), told.get("local_epochs"), told.get("batch_size")) else "B"


def _pictures(run: FinishedRun) -> tuple[list[Picture], list[Picture]]:
    """What leaked most, and what lies in the middle, by PSNR; in their order where there are no originals."""
    order = sorted(range(len(run.rows)), key=lambda row: _rank(run.rows[row]))
    count = min(SHOWN, max(1, len(order) // 3))
    worst, start = order[:count], (len(order) - count + 1) // 2
    middle = order[start : start + count] if start >= count else []

    def picture(row: int) -> Picture:
        original = None if run.originals is None else _data_uri(run.originals[row])
        return Picture(
            run.rows[row], original, _data_uri(run.images[row]) if run.images[row].isfinite().all() else None
        )

    return [picture(row) for row in worst], [picture(row) for row in middle]


def _rank(row: ImageRow) -> float:
    return math.inf if math.isnan(row.psnr) else -row.psnr


def _data_uri(image: Tensor) -> str:
    """A (C, H, W) image in [0, 1] as JPEG, at most 160 pixels wide and high; small ones are enlarged by a whole factor
    without interpolation."""
    picture = to_pil(image).convert("RGB")
    longest = max(picture.size)
    if longest > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    elif (factor := LONGEST_SIDE // longest) > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), 0)
    buffer = io.BytesIO()
    picture.save(buffer, format="jpeg", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
