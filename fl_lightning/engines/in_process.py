"""Engine interface, and an engine that trains clients sequentially in the current process."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, local_update


class Engine(ABC):
    """Executes the local training of a round's clients."""

    @abstractmethod
    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        """Yield the result of `local_update` for each task, in the order of the tasks."""


class InProcess(Engine):
    """Trains clients sequentially in the current process, so that only one of them is in memory at a time."""

    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        for task in tasks:
            yield local_update(task, training, accelerator)
