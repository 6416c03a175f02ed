"""Who takes part in the rounds of a federation: whom the server samples, who receives the models, what is observed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fl_lightning.errors import SettingError
from fl_lightning.seats import Seat, View
from fl_lightning.seeds import seed_of
from fl_lightning.server_optimizers import ServerOptimizer


@dataclass(frozen=True)
class Participation:
    """The clients of each round, known before any is run.

    Attributes:
        sizes: images of each client.
        seat: who looks.
        rounds: of the federation.
        clients_per_round: sampled of those with images and the observer; None for all of them.
        broadcast: see `Federation`.
        observed_rounds: that are asked for, ascending; None for the last that can be observed.
        server: the server's optimiser.
        seed: of the sampling.
    """

    sizes: Sequence[int]
    seat: Seat
    rounds: int
    clients_per_round: int | None
    broadcast: Literal["participants", "all"]
    observed_rounds: list[int] | None
    server: ServerOptimizer
    seed: int

    @property
    def members(self) -> range:
        """The clients that look."""
        return self.seat.members(len(self.sizes))

    def sampled(self, round_: int) -> list[int]:
        """The clients of a round, in ascending order: of those with images, and the observer.

        Raises:
            SettingError: there are fewer than `clients_per_round`.
        """
        able = [client for client, size in enumerate(self.sizes) if size or client in self.members]
        if self.clients_per_round is None:
            return able
        if self.clients_per_round > len(able):
            raise SettingError(
                f"`federation.clients_per_round` is {self.clients_per_round}, but only {len(able)} clients can take "
                "part: those with images, and the attacker. Lower it, or raise `data.num_clients`."
            )
        generator = torch.Generator().manual_seed(seed_of(self.seed, round_))
        chosen = torch.randperm(len(able), generator=generator)[: self.clients_per_round]
        return sorted(able[i] for i in chosen.tolist())

    def training(self, round_: int) -> list[int]:
        """The sampled clients that have images."""
        return [client for client in self.sampled(round_) if self.sizes[client]]

    def receivers(self, round_: int) -> Sequence[int]:
        """The clients that receive the models before and after a round."""
        return range(len(self.sizes)) if self.broadcast == "all" else self.sampled(round_)

    def peers(self, round_: int) -> list[int]:
        """The clients that train in a round, without those that look."""
        return [client for client in self.training(round_) if client not in self.members]

    def is_received(self, round_: int) -> bool:
        """Whether the seat receives a round's models."""
        return self.seat.receives(self.receivers(round_), len(self.sizes))

    def views(self, rounds: Sequence[int]) -> list[tuple[int, View]]:
        """The Observations of rounds: the number of the round, and of the client if they are of single clients."""
        return [(round_, client) for round_ in rounds for client in self.seat.views(self.peers(round_))]

    def observed(self) -> list[int]:
        """The rounds that are to be attacked, ascending.

        Raises:
            SettingError: the observer does not receive the models of one of them.
        """
        reached = [round_ for round_ in range(self.rounds) if self.is_received(round_)]
        unseen = sorted(set(self.observed_rounds or []) - set(reached))
        if self.observed_rounds is not None and not unseen:
            return self.observed_rounds
        seen = [round_ for round_ in reached if self.peers(round_)]
        if self.observed_rounds is None and seen:
            return seen[-1:]
        wanted = f"round {listed(unseen)} of `federation.observed_rounds`" if unseen else "any round with peers"
        instead = f"observe round {listed(seen)}, " if seen else ""
        raise SettingError(
            f"The attacker does not take part in {wanted}, so it does not receive the models. To change that, {instead}"
            f"raise `federation.clients_per_round` ({self.clients_per_round}) or `federation.rounds` ({self.rounds}), "
            "or set `federation.broadcast: all` if your system sends every round's model to all clients."
        )

    def recorded(self) -> list[int]:
        """The observed rounds, and earlier ones that tell what the server's optimiser kept, if they are received."""
        observed = self.observed()
        if None not in self.seat.views([0]):  # it has the clients' own updates
            return observed
        needed = {earlier for round_ in observed for earlier in self.server.needed(round_)}
        return sorted({*observed, *(round_ for round_ in needed if self.is_received(round_))})


def listed(rounds: Sequence[int], most: int = 8) -> str:
    """Numbers of rounds, in short where they are many."""
    return ", ".join(map(str, rounds[:most])) + (f", ... ({len(rounds)} in all)" if len(rounds) > most else "")
