"""An engine that trains clients sequentially in the current process."""

from collections.abc import Iterable, Iterator, Sequence

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, local_update
from fl_lightning.engines.engine import Engine
from fl_lightning.models import ImageClassifier


class InProcess(Engine):
    """Trains clients sequentially in the current process, so that only one of them is in memory at a time."""

    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        for task in tasks:
            yield local_update(task, training, accelerator)

    def announce(self, model: ImageClassifier, round_: int, clients: Sequence[int]) -> None:
        """Nothing: clients of this process are only asked to train."""
