"""What the benchmarks work on, and where their rows go."""

from dataclasses import dataclass

from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.record import Record

PEERS = 4


@dataclass(frozen=True)
class Setting:
    """The paper's setting: LeNet5, four peers, 3 full-batch local epochs at rate 0.003, one round."""

    rounds: ObservedRounds
    images: int
    size: int
    repetitions: int
    attack_steps: int

    @property
    def record(self) -> Record:
        return self.rounds.record


class Table:
    """Collects rows; a session prints them all at its end."""

    def __init__(self, rows: list[tuple[str, ...]]) -> None:
        self.rows = rows

    def add(self, what: str, value: str, ratio: str = "", remark: str = "") -> None:
        self.rows.append((what, value, ratio, remark))
