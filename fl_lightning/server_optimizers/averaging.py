"""Federated averaging, plain (McMahan et al. 2017) and with the server's momentum (Hsu et al. 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fl_lightning.errors import SettingError
from fl_lightning.server_optimizers.optimizer import ServerOptimizer
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class FedAvg(ServerOptimizer):
    """The mean update is the step."""

    def step(self, update: Tensor, memory: Tensors, round_: int) -> Tensor:
        return update

    def needed(self, round_: int) -> list[int]:
        return []

    def undo(self, steps: Sequence[Tensor], round_: int) -> Tensor:
        return steps[-1]


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """The step is `v_t = momentum * v_{t-1} + u_t`, as of PyTorch's SGD and Flower's FedAvgM.

    Args:
        momentum: in [0, 1).

    Raises:
        SettingError: it is not.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise SettingError(f"`momentum` of FedAvgM is {self.momentum}, but it must be at least 0 and below 1.")

    def step(self, update: Tensor, memory: Tensors, round_: int) -> Tensor:
        memory["velocity"] = self.momentum * memory["velocity"] + update if memory else update
        return memory["velocity"]

    def needed(self, round_: int) -> list[int]:
        return [round_ - 1] if round_ else []

    def undo(self, steps: Sequence[Tensor], round_: int) -> Tensor:
        return steps[-1] - self.momentum * steps[-2] if round_ else steps[-1]
