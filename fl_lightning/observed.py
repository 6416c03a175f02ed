"""The data of an attack: the rounds that a curious client observed."""

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from lightning.pytorch import LightningDataModule

from fl_lightning.data import FederatedData
from fl_lightning.federation import Federation
from fl_lightning.knowledge import Knowledge
from fl_lightning.observation import Observation
from fl_lightning.record import Record, RecordError, fingerprint
from fl_lightning.truth import Truth

RECORDS = Path("runs/federations")
"""Where records lie that have no name of their own: one folder for each fingerprint of the settings."""


class ObservedRounds(LightningDataModule):
    """Observations of a federation, which is simulated first if its record is not on disk.

    The attack reads `observations`. Its dataloaders only count: one item for each step of the attack, and one for
    an evaluation; the Observation itself stays where the attack put it.

    Args:
        federation: the federation that is observed.
        data: the clients' images.
        knowledge: what the attacker is told, guesses, or must infer.
        directory: the federation's record; None for `runs/federations/<fingerprint of the settings>`. A folder with
            Observations and no `settings.json` comes from another system: it is read and nothing is simulated.
    """

    def __init__(
        self, federation: Federation, data: FederatedData, knowledge: Knowledge, directory: Path | None = None
    ) -> None:
        super().__init__()
        self.federation = federation
        self.data = data
        self.knowledge = knowledge
        self.directory = directory
        self.observations: list[Observation] = []

    @cached_property
    def record(self) -> Record:
        """The federation's record on disk."""
        if self.directory is None:
            self.data.setup()
            return Record(RECORDS / fingerprint(self.federation.settings(self.data)))
        return Record(Path(self.directory))

    @property
    def simulated(self) -> bool:
        """Whether the record is, or will be, this federation's; otherwise it comes from another system."""
        return self.record.settings.exists() or not self.record.observed_rounds

    def prepare_data(self) -> None:
        """Simulate the rounds that are missing on disk."""
        if self.simulated:
            self.data.setup()
            print(self.introduction(), flush=True)
            self.federation.run(self.data, self.knowledge, self.record.directory)

    def introduction(self) -> str:
        """Who attacks whom, and what the attacker knows, in plain words."""
        sizes = [len(images) for images in self.data.clients]
        victims = [size for client, size in enumerate(sizes) if client != self.data.attacker]
        told = [name for name, source in self.knowledge.sources.items() if source == "known"]
        rest = [f"{name} ({source})" for name, source in self.knowledge.sources.items() if source != "known"]
        return (
            f"Federation: {self.federation.rounds} round(s), {len(sizes)} clients, "
            f"{type(self.data).__name__} images of shape {self.data.image_shape} in {self.data.num_classes} classes.\n"
            f"Client {self.data.attacker}, with {sizes[self.data.attacker]} images of its own, is honest but curious: "
            f"from two consecutive global models it reconstructs the {sum(victims)} images of its {len(victims)} "
            f"peers.\nIt is told {', '.join(told) or 'nothing'}; not told: {', '.join(rest) or 'nothing'}."
        )

    def setup(self, stage: str | None = None) -> None:
        """Load the Observations, with what this run's attacker believes of them.

        Raises:
            RecordError: there is none.
            KnowledgeError: something is to be known that nobody knows.
            StorageError: a file is damaged or foreign.
        """
        record = self.record
        if not record.observed_rounds:
            raise RecordError(f"'{record.directory}' holds no Observation. Run `python cli.py federate` into it first.")
        self.observations = [
            dataclasses.replace(
                Observation.load(record.observation(round_)),
                beliefs=self.knowledge.beliefs(Truth.load(record.truth(round_)) if self.simulated else None),
                sources=self.knowledge.sources,
            )
            for round_ in record.observed_rounds
        ]

    def train_dataloader(self) -> Iterable[int]:
        """One item for each step of the attack, in every process: no DataLoader, which Lightning would divide."""
        return range(max(self.trainer.max_steps, 1))

    def val_dataloader(self) -> Iterable[int]:
        """One item: the reconstruction is looked at once."""
        return range(1)

    test_dataloader = predict_dataloader = val_dataloader
