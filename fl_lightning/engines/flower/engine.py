"""An engine that trains clients on Flower's deployment engine."""

import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining
from fl_lightning.engines.engine import Engine
from fl_lightning.engines.flower.deployment import START, Deployment, FlowerError
from fl_lightning.engines.flower.private import Arrays, Private, arrays
from fl_lightning.errors import SettingError, positive
from fl_lightning.foreign import recorded_rounds
from fl_lightning.models import ImageClassifier
from fl_lightning.observation import Observation
from fl_lightning.state_files import read_state

if TYPE_CHECKING:
    from multiprocessing.connection import Connection  # Windows has none

BRIDGE = Path(__file__).parent / "bridge"
RECORDED = "recorded"
"""Folder in the federation's, of what the observer's mod records."""
LOGS = "flower_logs"
"""Folder in the federation's, of the logs of a failure."""


@dataclass
class Run:
    """A run of the bridge on Flower.

    Attributes:
        deployment: its processes.
        connection: to its ServerApp.
        records: what the observer's mod records.
        timeout: seconds in which all clients must have answered.
        holds: the round whose global model each client received last.
    """

    deployment: Deployment
    connection: "Connection"
    records: Path
    timeout: float
    holds: dict[int, int] = field(default_factory=dict)

    def private(self, client: int) -> Private:
        """A client's own device."""
        return Private(device(self.deployment.folder, client))

    def exchange(self, kind: str, server_round: int, models: dict[int, Arrays]) -> dict[int, Arrays]:
        """Send each client its model, and wait for what they all answer.

        Args:
            kind: `train` or `evaluate`.
            server_round: as Flower counts rounds, from 1.
            models: by client.

        Raises:
            FlowerError: a client fails, a process has ended, or the time is over.
        """
        try:
            self.connection.send((kind, server_round, models))
            self.deployment.wait(self.connection.poll, f"{kind} in round {server_round - 1}", self.timeout)
            replies: dict[int, Arrays | str] = self.connection.recv()
        except (EOFError, OSError) as error:
            raise FlowerError(
                f"Flower's ServerApp has ended, so the round cannot be finished ({error!r}). Finished rounds are kept, "
                f"and the same command goes on after them. Its log is in '{self.deployment.logs}'."
            ) from error
        for client in models:
            reply = replies.get(client, "no answer")
            if isinstance(reply, str):
                raise FlowerError(
                    f"Client {client} fails to {kind} on Flower: {' '.join(reply.split())[:200]}. Finished rounds are "
                    f"kept, and the same command goes on after them. Logs: '{self.deployment.logs}'."
                )
        return replies


class Flower(Engine):
    """Trains clients on Flower's deployment engine on this machine: a SuperNode for each, all at once.

    Clients do what they do in the federation's own process, and with the same results, but all models cross Flower's
    wire, and what is observed is what a mod around the curious client recorded of it. Needs the extra `flower`.

    Args:
        timeout: seconds in which all clients of a round must have answered.
    """

    def __init__(self, timeout: float = 3600.0) -> None:
        if not positive(timeout):
            raise SettingError(f"`federation.engine.timeout` is {timeout}. Give the seconds of a round, above 0.")
        self.timeout = timeout
        self._run: Run | None = None

    @contextmanager
    def running(self, num_clients: int, observer: int, directory: Path) -> Iterator[None]:
        """As of every engine.

        Raises:
            FlowerError: Flower is not installed, or does not start.
        """
        records = (directory / RECORDED).resolve()
        with tempfile.TemporaryDirectory(prefix="flower_") as temporary:
            folder = Path(temporary)
            nodes = [
                {
                    "client": client,
                    "folder": str(device(folder, client)),
                    "records": str(records) if client == observer else "",
                }
                for client in range(num_clients)
            ]
            deployment = Deployment(folder, nodes, (directory / LOGS).resolve())
            print(f"Flower starts a SuperLink and {num_clients} SuperNodes on loopback.", flush=True)
            with deployment, _connected(deployment, num_clients) as connection:
                self._run = Run(deployment, connection, records, self.timeout)
                try:
                    yield
                finally:
                    self._run = None

    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        """As of every engine.

        Raises:
            FlowerError: a client fails, or a process of Flower's has ended.
        """
        run = self._run
        sent: dict[int, Arrays] = {}
        for task in tasks:
            sent[task.client] = run.private(task.client).give(task, training, accelerator)
            run.holds[task.client] = task.round
            parameters, round_ = dict(task.model.named_parameters()).keys(), task.round
        replies = run.exchange("train", round_ + 1, sent)
        for client, before in sent.items():
            yield run.private(client).take(before, replies[client], parameters)

    def announce(self, model: ImageClassifier, round_: int, clients: Sequence[int]) -> None:
        run = self._run
        new = [client for client in clients if run.holds.get(client) != round_]
        if new:
            run.exchange("evaluate", round_, dict.fromkeys(new, arrays(model.state_dict())))
            run.holds |= dict.fromkeys(new, round_)

    def received(self, observation: Observation) -> Observation:
        """What the mod recorded of the round; the observer's share is what the federation knows it to be.

        Raises:
            AuditError: it recorded nothing, or not this round.
        """
        by_round = {files.round: files for files in recorded_rounds(self._run.records)}
        if observation.round not in by_round:
            raise FlowerError(
                f"The mod of the observing client has not recorded round {observation.round} in "
                f"'{self._run.records}'. Its log says why: '{self._run.deployment.logs}'."
            )
        files = by_round[observation.round]
        before, after = read_state(files.before), read_state(files.after)
        own = read_state(files.own) if observation.own_update else {}
        own_update = {name: before[name] - own[name] for name in observation.own_update}
        own_buffers = {name: own[name] for name in observation.own_buffers}
        return replace(observation, before=before, after=after, own_update=own_update, own_buffers=own_buffers)


def device(folder: Path, client: int) -> Path:
    """Folder of what a client has of its own."""
    return folder / f"client_{client}"


@contextmanager
def _connected(deployment: Deployment, num_clients: int) -> Iterator["Connection"]:
    """The bridge's ServerApp, once all clients are there."""
    from multiprocessing.connection import Connection

    address = str(deployment.folder / "federation")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        listening.settimeout(0.1)
        deployment.submit(BRIDGE, {"address": address, "num-clients": num_clients})
        accepted: list[socket.socket] = []

        def has_called() -> bool:
            try:
                accepted.append(listening.accept()[0])
            except TimeoutError:
                return False
            return True

        deployment.wait(has_called, "connect its clients", START)
    with Connection(accepted[0].detach()) as connection:
        yield connection
