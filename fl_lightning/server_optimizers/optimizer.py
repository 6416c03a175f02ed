"""Interface of the server's optimisers."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fl_lightning.state_files import Tensors
from fl_lightning.storage import StorageError


class ServerOptimizer(ABC):
    """Turns the clients' mean update `u` into the step s of `w_{t+1} = w_t - server_lr * s`, parameter by parameter.

    A subclass is a frozen dataclass of its settings. Whoever is told these, and sees the models, can undo it.
    """

    @abstractmethod
    def step(self, update: Tensor, memory: Tensors, round_: int) -> Tensor:
        """The step of one parameter.

        Args:
            update: the mean update of the parameter, before minus after.
            memory: what was kept of this parameter's former rounds, changed in place; empty in round 0.
            round_: number of the round, from 0.
        """

    @abstractmethod
    def needed(self, round_: int) -> list[int]:
        """Numbers of the rounds before it whose steps must be known to undo the step of a round, ascending."""

    @abstractmethod
    def undo(self, steps: Sequence[Tensor], round_: int) -> Tensor:
        """The mean update of a parameter from its steps.

        Args:
            steps: of the needed rounds and then of the round itself; `(w_t - w_{t+1}) / server_lr` of each.
            round_: number of the last of them, from 0.
        """

    def describe(self) -> dict[str, Any]:
        """`class_path` and `init_args` in JSON types, for `restored`."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": asdict(self)}

    @staticmethod
    def restored(description: dict[str, Any]) -> "ServerOptimizer":
        """What was described.

        Raises:
            StorageError: the class is not loaded, or is no optimiser of the server; a file must not choose what is run.
        """
        module, _, name = description["class_path"].rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
        if not (isinstance(found, type) and issubclass(found, ServerOptimizer)):
            raise StorageError(
                f"'{description['class_path']}' is no loaded class of a server's optimiser. Import its module first."
            )
        return found(**description["init_args"])
