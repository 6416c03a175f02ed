"""The interface of what runs clients."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining
from fl_lightning.models import ImageClassifier
from fl_lightning.observation import Observation


class Engine(ABC):
    """Runs the clients: their local training, and what they receive. All else is the federation's."""

    @abstractmethod
    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        """Yield the result of `local_update` for each task of a round, in the order of the tasks."""

    @contextmanager
    def running(self, num_clients: int, observer: int, directory: Path) -> Iterator[None]:
        """Keep the clients ready for the rounds within the block.

        Args:
            num_clients: clients are numbered from 0.
            observer: the curious one.
            directory: the federation's, for what the observer records, and for logs of a failure.
        """
        yield

    @abstractmethod
    def announce(self, model: ImageClassifier, round_: int, clients: Sequence[int]) -> None:
        """Send the model with which a round begins, to be looked at, to those clients that do not have it yet."""

    def received(self, observation: Observation) -> Observation:
        """A round as the observer's own wire brought it, after `announce` of the model that follows the round.

        Args:
            observation: the round as the federation knows that it reaches the observer.
        """
        return observation
