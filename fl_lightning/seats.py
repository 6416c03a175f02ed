"""Who looks at the federation, and so what an Observation holds: one client, several that collude, or the server."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fl_lightning.aggregation import aggregate
from fl_lightning.client import ClientUpdate
from fl_lightning.errors import SettingError
from fl_lightning.observation import Observation

View = int | None
"""What an Observation is of: None for the mean of a round's clients, else the client whose update alone it is."""


class Seat(ABC):
    """A seat in the federation, honest but curious: it follows the protocol, and keeps what it gets anyway."""

    @property
    @abstractmethod
    def words(self) -> str:
        """Who looks, for a sentence."""

    @abstractmethod
    def members(self, num_clients: int) -> range:
        """The clients that look: what they did is known, and their images are no target."""

    def receives(self, receivers: Sequence[int], num_clients: int) -> bool:
        """Whether the seat has the models before and after a round, which go to the clients `receivers`."""
        return any(client in receivers for client in self.members(num_clients))

    def views(self, clients: Sequence[int]) -> list[View]:
        """What is observed of a round in which these clients are attacked."""
        return [None]

    def keeps(self, client: int, num_clients: int) -> bool:
        """Whether the seat knows a client's update."""
        return client in self.members(num_clients)

    @property
    def has_the_mean(self) -> bool:
        """Whether it has the clients' mean before the server's defences change it, which no Observation shows."""
        return False

    @abstractmethod
    def observe(self, whole: Observation, updates: Mapping[int, ClientUpdate], total: int) -> dict[View, Observation]:
        """What crosses the wire at this seat in one round.

        Args:
            whole: of an observer that did not train.
            updates: of the clients whose update the seat knows.
            total: number of examples of all clients of the round.
        """


@dataclass(frozen=True)
class CuriousClient(Seat):
    """The last client, which sees the models and its own update; secure aggregation hides nothing of that."""

    @property
    def number(self) -> int:
        """Clients that look."""
        return 1

    @property
    def words(self) -> str:
        return "an honest-but-curious client"

    def members(self, num_clients: int) -> range:
        return range(num_clients - self.number, num_clients)

    def observe(self, whole: Observation, updates: Mapping[int, ClientUpdate], total: int) -> dict[View, Observation]:
        if not updates:
            return {None: whole}
        own = aggregate(updates.values()) if len(updates) > 1 else next(iter(updates.values()))
        seen = replace(whole, own_update=own.update, own_weight=own.num_examples / total, own_buffers=own.buffers)
        return {None: seen}


@dataclass(frozen=True)
class ColludingClients(CuriousClient):
    """The last clients, which subtract all their updates: fewer peers are left, and each weighs more.

    Args:
        count: of clients that collude, the last ones.

    Raises:
        SettingError: it is below 1.
    """

    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SettingError(f"`federation.seat.count` is {self.count}, but at least one client has to look.")

    @property
    def number(self) -> int:
        return self.count

    @property
    def words(self) -> str:
        return f"{self.count} honest-but-curious clients that collude"


@dataclass(frozen=True)
class CuriousServer(Seat):
    """The server, which sees each client's update, or behind secure aggregation their mean.

    Each client's update is an Observation of its own, as if that client were a federation's only one: before is the
    global model, after the client's. All clients are attacked, the last one as well.

    Args:
        secure_aggregation: whether it gets the mean of the updates alone.
    """

    secure_aggregation: bool = False

    @property
    def words(self) -> str:
        sees = "the mean of the updates" if self.secure_aggregation else "each client's update"
        return f"an honest-but-curious server that sees {sees}"

    def members(self, num_clients: int) -> range:
        return range(0)

    def receives(self, receivers: Sequence[int], num_clients: int) -> bool:
        return True

    def views(self, clients: Sequence[int]) -> list[View]:
        return [None] if self.secure_aggregation else list(clients)

    def keeps(self, client: int, num_clients: int) -> bool:
        return not self.secure_aggregation

    @property
    def has_the_mean(self) -> bool:
        return self.secure_aggregation

    def observe(self, whole: Observation, updates: Mapping[int, ClientUpdate], total: int) -> dict[View, Observation]:
        if self.secure_aggregation:
            return {None: whole}
        views: dict[View, Observation] = {}
        for client, sent in updates.items():
            trained = {name: whole.before[name] - update for name, update in sent.update.items()}
            rest = {n: tensor.clone() for n, tensor in whole.before.items() if n not in trained | sent.buffers}
            views[client] = replace(whole, after={**rest, **sent.buffers, **trained})
        return views
