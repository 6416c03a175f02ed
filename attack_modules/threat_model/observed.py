"""The data of an attack: the rounds that the attacker observed, with what it assumes of them."""

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.knowledge import Knowledge, KnowledgeError
from fl_lightning.allocation import release_freed_memory, release_pages
from fl_lightning.client import Tensors
from fl_lightning.data import FederatedData
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.models.freezing import freeze
from fl_lightning.observation import Observation, build_on_meta
from fl_lightning.record import Record, RecordError, fingerprint
from fl_lightning.seats import CuriousClient, Seat, View
from fl_lightning.server_optimizers import FedAvg, ServerOptimizer
from fl_lightning.storage import has_record
from fl_lightning.truth import Truth


def refuse_unknown_rounds(server: ServerOptimizer, round_: int, known: Collection[int]) -> None:
    """Refuse a round whose server's optimiser kept something of rounds that were not observed.

    Args:
        server: its optimiser, as the attacker takes it to be.
        round_: number of the round.
        known: numbers of the other observed rounds.

    Raises:
        KnowledgeError: with the rounds that are missing.
    """
    if missing := [number for number in server.needed(round_) if number not in known]:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise KnowledgeError(
            f"The server's {type(server).__name__} keeps something of earlier rounds, so round {round_} tells the mean "
            f"update only with round {shown}, which the attacker did not observe. Observe the first round, or all "
            "rounds (`federation.broadcast: all` or more `clients_per_round`), or set `knowledge.server: FedAvg`."
        )


RECORDS = Path("runs/federations")
"""Where records lie that are not given a directory: one folder for each fingerprint of the settings."""


@dataclass(frozen=True)
class ObservedRound:
    """One round as an attack sees it.

    Attributes:
        observation: what crossed the wire.
        assumptions: what the attacker takes the peers' training and data to be.
        earlier: what crossed the wire before, oldest first, where it tells what the server's optimiser kept.
        client: number of the client whose update alone it is, as a server sees it; None for the mean of all.
        in_files: whether the observations' tensors are mapped files, whose pages need not stay in memory.
    """

    observation: Observation
    assumptions: Assumptions
    earlier: Sequence[Observation] = ()
    client: View = None
    in_files: bool = False

    def aggregated_update(self) -> Tensors:
        """The weighted mean of all clients' updates, the attacker's own included, by parameter name.

        Raises:
            KnowledgeError: the server's optimiser cannot be undone, since a round before was not observed.
        """
        rate, server, round_ = self.assumptions.server_lr, self.assumptions.server, self.observation.round
        known = {seen.round: seen for seen in self.earlier}
        refuse_unknown_rounds(server, round_, known)
        rounds = [*(known[number] for number in server.needed(round_)), self.observation]
        steps = []
        for seen in rounds:
            steps.append(seen.aggregated_update(rate))
            self._release(seen)
        return {name: server.undo([step.pop(name) for step in steps], round_) for name in list(steps[0])}

    def peers_update(self) -> Tensors:
        """The weighted mean of the peers' updates, by parameter name; raises as `aggregated_update`."""
        update = self.observation.without_own(self.aggregated_update())
        self._release(self.observation)
        return update

    def _release(self, seen: Observation) -> None:
        """Give back what the update was made of: three models, of which the attack needs no more than the first."""
        if self.in_files:
            release_pages([*seen.before.values(), *seen.after.values(), *seen.own_update.values()])

    def without_weight_decay(self, update: Tensors) -> Tensors:
        """The part of an update that the loss's gradients caused."""
        return self.assumptions.without_weight_decay(update, self.observation.before)


@dataclass(frozen=True)
class RoundsSummary:
    """What is known of the observed rounds without their tensors, and even before they are simulated.

    Attributes:
        model: the architecture of the global model, on the meta device; what the peers did not train is frozen.
        image_shape: (C, H, W) of an image.
        assumptions: of each observed round, oldest first.
        dataset: class name of the simulated clients' dataset; None for a user's own images and foreign rounds.
        clients: of each observed round, see `ObservedRound`; empty where every round shows the mean of all.
    """

    model: ImageClassifier
    image_shape: ImageShape
    assumptions: Sequence[Assumptions]
    dataset: str | None = None
    clients: Sequence[View] = ()

    @classmethod
    def of(cls, rounds: Sequence[ObservedRound], dataset: str | None = None) -> "RoundsSummary":
        """Of rounds that are in memory."""
        frozen = frozenset.intersection(*(seen.observation.unchanged for seen in rounds))
        description, assumptions = rounds[0].observation.model, [seen.assumptions for seen in rounds]
        return cls.of_model(description, assumptions, dataset, frozen, [seen.client for seen in rounds])

    @classmethod
    def of_model(
        cls,
        description: dict[str, Any],
        assumptions: Sequence[Assumptions],
        dataset: str | None = None,
        frozen: Collection[str] = (),
        clients: Sequence[View] = (),
    ) -> "RoundsSummary":
        """Of rounds of a model that is described by `class_path` and `init_args`, without training what is `frozen`."""
        model = freeze(copy.deepcopy(build_on_meta(description)), frozen)
        return cls(model, tuple(description["init_args"]["image_shape"]), assumptions, dataset, clients)


class GivenRounds(LightningDataModule):
    """The data of an attack: observed rounds that are at hand.

    The dataloaders only count: one item for each step of the attack, and one for an evaluation.

    Args:
        rounds: oldest first.
    """

    def __init__(self, rounds: Sequence[ObservedRound] = ()) -> None:
        super().__init__()
        self.rounds = list(rounds)

    def summary(self) -> RoundsSummary:
        """What is known of the rounds."""
        return RoundsSummary.of(self.rounds)

    def train_dataloader(self) -> Iterable[int]:
        """One item for each step of the attack, in every process: Lightning would divide a DataLoader's."""
        return range(max(self.trainer.max_steps, 1))

    def val_dataloader(self) -> Iterable[int]:
        """One item: the reconstruction is looked at once."""
        return range(1)

    test_dataloader = predict_dataloader = val_dataloader


class ObservedRounds(GivenRounds):
    """The observed rounds of one record; its federation is simulated first where rounds are missing on disk.

    Attacks read `rounds`. Once `setup` has loaded them, nothing that is reachable from here holds the peers' images.

    Args:
        knowledge: what the attacker is told, guesses, or must infer.
        federation: the federation that is observed.
        data: the clients' images; None where the rounds are of another system.
        directory: the federation's record; None for `runs/federations/<fingerprint of the settings>`. A directory with
            Observations and without `settings.json` was written by another system: nothing is simulated then, and
            `federation` and `data` have no effect. If a `truth/` lies in it, the attacker can be told of it.

    Raises:
        SettingError: a round to be observed does not reach the attacker.
    """

    def __init__(
        self, knowledge: Knowledge, federation: Federation, data: FederatedData | None, directory: Path | None = None
    ) -> None:
        super().__init__()
        self.knowledge = knowledge
        self.foreign = directory is not None and Record(directory).foreign
        self._source: tuple[Federation, FederatedData] | None = None
        self._dataset: str | None = None
        self._wanted: list[tuple[int, View]] | None = None  # None for all that are there
        if not self.foreign:
            data.setup()
            self._source = federation, data
            settings = federation.settings(data)
            self._wanted = federation.participation(data).views(settings["observed_rounds"])
            self._dataset = None if settings["data"]["csv"] else settings["data"]["class"]
            directory = directory or RECORDS / fingerprint(settings)
        self.record = Record(directory)
        #: who looked; a client, where the rounds are of another system
        self.seat: Seat = CuriousClient() if self.foreign else federation.seat

    def summary(self) -> RoundsSummary:
        """What is known of the rounds, also before they are simulated and loaded."""
        if not self._source:
            if not self.rounds:
                self.setup()
            return RoundsSummary.of(self.rounds, self._dataset)
        federation, data = self._source
        views, recorded = self._wanted, federation.participation(data).recorded()
        truths = [federation.truth(round_, data, client) for round_, client in views]
        assumptions = [self._assumptions(truth, client) for truth, (_, client) in zip(truths, views, strict=True)]
        for (round_, _), assumed in zip(views, assumptions, strict=True):
            refuse_unknown_rounds(assumed.server, round_, recorded)
        settings = federation.settings(data)
        clients = [client for _, client in views]
        return RoundsSummary.of_model(settings["model"], assumptions, self._dataset, settings["frozen"], clients)

    def prepare_data(self) -> None:
        """Simulate the rounds that are missing on disk."""
        if self._source:
            federation, data = self._source
            print(federation.introduction(data), flush=True)
            federation.run(data, self.record.directory)
            release_freed_memory()  # the attack's tensors are others
        elif self.foreign:
            print(
                f"'{self.record.directory}' has no settings.json: its rounds are taken as observed in another system, "
                "and `federation` and `data` have no effect.",
                flush=True,
            )

    def setup(self, stage: str | None = None) -> None:
        """Load the observed rounds, with what this run's attacker assumes of them.

        Raises:
            RecordError: one is missing.
            KnowledgeError: something is to be known, but there is no truth.
            StorageError: a file is damaged or foreign.
        """
        self._source = None  # from here on, the attack could reach it
        record = self.record
        if self.rounds:
            return
        wanted = [(number, None) for number in record.observed_rounds] if self._wanted is None else self._wanted
        if missing := sorted({view[0] for view in wanted if not has_record(record.observation(*view))}):
            raise RecordError(
                f"'{record.directory}' lacks observed round {', '.join(map(str, missing))}. Run `python cli.py "
                "federate` with the same settings, which simulates what is missing, or call `prepare_data` first."
            )
        self.rounds = [self._observed(round_, client) for round_, client in wanted]

    def _assumptions(self, truth: Truth | None, client: View) -> Assumptions:
        """What the attacker assumes; of a client's own update it knows that no server's step lies on it."""
        assumed = self.knowledge.assumptions(truth)
        return assumed if client is None else replace(assumed, server=FedAvg(), server_lr=1.0)

    def _observed(self, round_: int, client: View) -> ObservedRound:
        assumptions, there = self._assumptions(self._truth(round_, client), client), self.record.observed_rounds
        needed = [(number, None) for number in assumptions.server.needed(round_) if number in there]
        seen, *earlier = (Observation.load(self.record.observation(*view)) for view in ((round_, client), *needed))
        return ObservedRound(seen, assumptions, earlier, client, in_files=True)

    def _truth(self, round_: int, client: View) -> Truth | None:
        stem = self.record.truth(round_, client)
        return None if self.foreign and not has_record(stem) else Truth.load(stem)
