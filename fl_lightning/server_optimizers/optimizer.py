"""Interface of the server's optimisers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fl_lightning.state_files import Tensors
from fl_lightning.storage import described, made_again


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
        return described(self)

    @staticmethod
    def restored(description: dict[str, Any]) -> "ServerOptimizer":
        """What was described.

        Raises:
            StorageError: the class is not loaded, is no optimiser of the server, or does not take these settings.
        """
        return made_again(description, ServerOptimizer, "server's optimiser")
