"""Clients run one after the other in this process."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, local_update


class Engine(ABC):
    """Runs the local training of a round's clients."""

    @abstractmethod
    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        """Yield `local_update` of each task, in order."""


class InProcess(Engine):
    """Clients train one after the other in this process, so that only one of them is in memory."""

    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        for task in tasks:
            yield local_update(task, training, accelerator)
