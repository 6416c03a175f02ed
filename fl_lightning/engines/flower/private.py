"""What a client has of its own on its device, and its training there."""

import pickle
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining, Tensors, local_update
from fl_lightning.storage import atomic_path

Arrays = dict[str, np.ndarray]


class Private:
    """A client's device: its images, seed and settings, and whatever else never crosses the wire.

    A folder stands for it, since Flower runs each message in a process of its own. It lies in the temporary folder of
    the federation's process, which alone writes there and removes it; so pickled objects can be trusted.

    Args:
        folder: of this client alone.
    """

    def __init__(self, folder: Path) -> None:
        self.task = folder / "task.pickle"
        self.result = folder / "result.pickle"

    def give(self, task: ClientTask, training: LocalTraining, accelerator: str) -> Arrays:
        """Put what the client has of its own for a round on its device.

        Returns:
            What is sent to it: the global model.
        """
        self.task.parent.mkdir(exist_ok=True)
        with atomic_path(self.task) as temporary:
            temporary.write_bytes(pickle.dumps((replace(task, in_file=False), training, accelerator)))
        return arrays(task.model.state_dict())

    def train(self, received: Arrays) -> tuple[Arrays, int]:
        """On the device: train the model that was received.

        Returns:
            What is sent back: the client's model without what it does not train, and the number of its images.
        """
        task, training, accelerator = pickle.loads(self.task.read_bytes())
        task.model.load_state_dict(tensors(received))
        result = local_update(task, training, accelerator)
        before = task.model.state_dict()
        kept, shared = (result.buffers, {}) if task.own_buffers is not None else ({}, result.buffers)
        sent = {name: before[name] - update for name, update in result.update.items()} | shared
        with atomic_path(self.result) as temporary:
            temporary.write_bytes(pickle.dumps(replace(result, update={}, buffers=kept)))
        return arrays(sent), result.num_examples

    def take(self, before: Arrays, sent: Arrays, parameters: Collection[str]) -> ClientUpdate:
        """The result of the training, as `local_update` gives it, from what was sent to the client and back."""
        own, old, result = tensors(sent), tensors(before), pickle.loads(self.result.read_bytes())
        return replace(
            result,
            update={name: old[name] - tensor for name, tensor in own.items() if name in parameters},
            buffers=result.buffers | {name: tensor for name, tensor in own.items() if name not in parameters},
        )


def arrays(state: Tensors) -> Arrays:
    """As Flower sends them."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def tensors(state: Arrays) -> Tensors:
    """Of arrays that Flower brought."""
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}
