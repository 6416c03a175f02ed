"""How long a study will take, and how much memory, before it begins and while it runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack_modules.audit.study import Cell
from attack_modules.audit.workers import CellRecord
from fl_lightning.errors import counted
from fl_lightning.memory import whole
from fl_lightning.seats import CuriousClient, Seat
from fl_lightning.storage import StorageError, made_again, read_json

START = 12.0
"""Seconds that a run takes before its first step: imports, data and the federation's first round. Measured: 8 to 20."""
PER_PIXEL = {"FeatureInversion": 1.8e-6, "GradientInversion": 4e-6}
"""Seconds of one core per step, image and pixel with LeNet5. Deeper models take some ten times as long."""
PER_CLIENT = 0.3
"""Seconds of one client's training in a round, of a few images with LeNet5."""
MEMORY = 2000
"""MiB that a run takes, where neither a forecast nor a measured run tells. Measured: LeNet5 1000 to 2000 at 64 to 128
pixels."""

RECENT = 10
"""So many cells of a kind, the latest, correct the first guess for the others."""


@dataclass(frozen=True)
class Work:
    """What a run has to do, as far as its settings tell.

    Attributes:
        kind: the attack's and the model's class; runs of one kind scale with their size.
        seconds: a first guess, None where the number of images is not known from the settings.
    """

    kind: str
    seconds: float | None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Work":
        """Of the parsed settings of a run, nested as in YAML."""
        model, data, federation = (settings.get(name) or {} for name in ("model", "data", "federation"))
        attack = str(model.get("class_path", "")).rpartition(".")[2]
        network = federation.get("model")
        network = network.get("class_path") if isinstance(network, Mapping) else network
        kind = f"{attack} {str(network).rpartition('.')[2]}"
        arguments = data.get("init_args") or {}
        images, side = _peer_images(arguments, federation.get("seat")), arguments.get("image_size")
        steps = (settings.get("trainer") or {}).get("max_steps") or 0
        if attack not in PER_PIXEL or not images or not side:
            return cls(kind, None)
        rounds = federation.get("rounds") or 1
        return cls(
            kind, START + PER_CLIENT * rounds * arguments["num_clients"] + PER_PIXEL[attack] * steps * images * side**2
        )


class Forecast:
    """Seconds and memory of cells, from their settings, corrected by those that have ended.

    Args:
        out: the study's folder.
        cells: of the study.
        works: of each cell, by its name.
        peak_memory: bytes that a cell takes at most beside the program; None if that is not known.
    """

    def __init__(
        self, out: Path, cells: Sequence[Cell], works: Mapping[str, Work], peak_memory: int | None = None
    ) -> None:
        self.out = out
        self.cells = list(cells)
        self.works = works
        self.peak_memory = peak_memory
        self._seconds: dict[str, list[float]] = {}  # of ended cells, by kind
        self._ratios: dict[str, list[float]] = {}  # of these seconds to the first guesses
        self._seen: set[str] = set()
        self.look(self.cells)

    def look(self, cells: Sequence[Cell]) -> None:
        """Learn from those of these cells that have ended."""
        for cell in cells:
            record = None if cell.name in self._seen else CellRecord.load(cell.folder(self.out))
            if record is None:
                continue
            self._seen.add(cell.name)
            if record.status == "done":
                work = self.works[cell.name]
                self._seconds.setdefault(work.kind, []).append(record.seconds)
                if work.seconds:
                    self._ratios.setdefault(work.kind, []).append(record.seconds / work.seconds)

    def seconds(self, cell: Cell) -> float | None:
        """Seconds that a cell is expected to take, by those that were looked at; None if nothing is known."""
        work = self.works[cell.name]
        if work.seconds and work.kind in self._ratios:
            return work.seconds * statistics.fmean(self._ratios[work.kind][-RECENT:])
        if work.kind in self._seconds:
            return statistics.fmean(self._seconds[work.kind][-RECENT:])
        return work.seconds

    def memory(self) -> tuple[float, str]:
        """MiB that a cell takes at most, and by what that is known."""
        found = []
        for cell in self.cells:
            try:
                found.append(read_json(cell.folder(self.out) / "run" / "results.json").get("peak_memory_mb"))
            except StorageError:  # not yet run
                continue
        if found := [memory for memory in found if memory]:
            return max(found), f"measured on {counted(len(found), 'run')}"
        if self.peak_memory is not None:
            return whole(self.peak_memory) / 2**20, "by forecast"
        return MEMORY, "an assumption until the first run has ended"


def _peer_images(data: Mapping[str, Any], seat: Mapping[str, Any] | None) -> int | None:
    """Images that are attacked: those of the clients that do not look."""
    clients, each, attacker = (data.get(name) for name in ("num_clients", "images_per_client", "attacker_images"))
    if not clients or not each:
        return None
    sizes = list(each) if isinstance(each, list) else [each] * clients
    if attacker is not None:
        sizes[-1] = attacker
    looking = (made_again(seat, Seat, "seat") if seat else CuriousClient()).members(len(sizes))
    return sum(size for client, size in enumerate(sizes) if client not in looking)
