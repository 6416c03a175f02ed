"""An engine that trains clients sequentially in the current process."""

from collections.abc import Iterable, Iterator

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, local_update
from fl_lightning.engines.engine import Engine


class InProcess(Engine):
    """Trains clients sequentially in the current process, so that only one of them is in memory at a time."""

    def train(self, tasks: Iterable[ClientTask], training: LocalTraining, accelerator: str) -> Iterator[ClientUpdate]:
        for task in tasks:
            yield local_update(task, training, accelerator)
