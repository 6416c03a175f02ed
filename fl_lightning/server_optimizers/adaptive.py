"""Adaptive server optimisers (Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2)."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_lightning.errors import SettingError, positive
from fl_lightning.server_optimizers.optimizer import ServerOptimizer
from fl_lightning.state_files import Tensors

SOLVED = 1e-9
"""Relative distance from a step at which float64 counts an update as a solution; wrong branches are far off."""
ENTRIES = 2**22
"""Entries of a parameter that are undone at once, in float64; bounds memory."""


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """Steps `rate_t m_t / (sqrt(v_t) + tau)`, m and v running means of the updates and of their squares.

    Args:
        beta_1: of m, in [0, 1).
        beta_2: of v, in (0, 1).
        tau: positive; the smaller, the more a step is a sign.

    Raises:
        SettingError: a value is out of range.
    """

    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if not (0 <= self.beta_1 < 1 and 0 < self.beta_2 < 1 and positive(self.tau)):
            raise SettingError(
                f"{type(self).__name__} needs beta_1 in [0, 1), beta_2 in (0, 1) and tau > 0, but got {self}."
            )

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """v_t from v_{t-1} and the square of the update."""

    @abstractmethod
    def candidates(self, v: Tensor) -> list[tuple[Tensor, float]]:
        """v_t as a linear function of the square of the update: constant and factor, of each branch."""

    def rate(self, round_: int) -> float:
        """Factor of the step of a round."""
        return 1.0

    @property
    def first_v(self) -> float:
        """v before round 0."""
        return self.tau**2

    def step(self, update: Tensor, memory: Tensors, round_: int) -> Tensor:
        m = memory.get("m", torch.zeros_like(update))
        v = memory.get("v", torch.full_like(update, self.first_v))
        memory["m"] = self.beta_1 * m + (1 - self.beta_1) * update
        memory["v"] = self.second(v, update.square())
        return self.rate(round_) * memory["m"] / (memory["v"].sqrt() + self.tau)

    def needed(self, round_: int) -> list[int]:
        return list(range(round_))

    def undo(self, steps: Sequence[Tensor], round_: int) -> Tensor:
        parts = [self._undo(part) for part in zip(*(step.flatten().split(ENTRIES) for step in steps), strict=True)]
        return torch.cat(parts).view_as(steps[-1]).to(steps[-1])

    def _undo(self, steps: Sequence[Tensor]) -> Tensor:
        m = torch.zeros_like(steps[0], dtype=torch.float64)
        v, update = torch.full_like(m, self.first_v), m
        for round_, step in enumerate(steps):
            update = self._solved(step.double() / self.rate(round_), m, v, update)
            m, v = self.beta_1 * m + (1 - self.beta_1) * update, self.second(v, update.square())
        return update

    def _solved(self, step: Tensor, m: Tensor, v: Tensor, former: Tensor) -> Tensor:
        """The update d with `beta_1 m + (1 - beta_1) d = step (sqrt(v_t(d)) + tau)`, entry by entry.

        Squared, it is a quadratic equation in each branch of `v_t`. In round 0 one d solves it; later there may be two
        where tau is below the size of the updates, of which the one nearer to the former round's update is taken.
        """
        share, constant = 1 - self.beta_1, self.beta_1 * m - step * self.tau
        best, least = torch.zeros_like(step), torch.full_like(step, math.inf)
        for base, factor in self.candidates(v):
            a = share**2 - step.square() * factor
            half_b, c = share * constant, constant.square() - step.square() * base
            root = (half_b.square() - a * c).clamp_min(0).sqrt()
            q = -(half_b + torch.where(half_b < 0, -root, root))  # without cancellation
            for d in (q / a, c / q):
                d = torch.where(d.isfinite(), d, 0.0)
                m_now, v_now = self.beta_1 * m + share * d, self.second(v, d.square())
                off = (m_now / (v_now.sqrt() + self.tau) - step).abs() / step.abs().clamp_min(1e-300)
                off = off.where(off > SOLVED, SOLVED)
                better = (off < least) | ((off == least) & ((d - former).abs() < (best - former).abs()))
                best, least = torch.where(better, d, best), torch.where(better, off, least)
        return best


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """`v_t = beta_2 v_{t-1} + (1 - beta_2) u_t^2`, from `v = tau^2`, without bias correction.

    Args:
        beta_1: of m, in [0, 1).
        beta_2: of v, in (0, 1).
        tau: positive; the smaller, the more a step is a sign.
    """

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * v + (1 - self.beta_2) * square

    def candidates(self, v: Tensor) -> list[tuple[Tensor, float]]:
        return [(self.beta_2 * v, 1 - self.beta_2)]


@dataclass(frozen=True)
class FlowerFedAdam(FedAdam):
    """Flower's FedAdam: from `v = 0`, with Adam's bias correction one round ahead (flwr 1.41).

    Args:
        beta_1: of m, in [0, 1).
        beta_2: of v, in (0, 1).
        tau: positive; the smaller, the more a step is a sign.
    """

    def rate(self, round_: int) -> float:
        power = round_ + 2  # Flower counts rounds from 1, and adds 1
        return math.sqrt(1 - self.beta_2**power) / (1 - self.beta_1**power)

    @property
    def first_v(self) -> float:
        return 0.0


@dataclass(frozen=True)
class FedYogi(Adaptive):
    """`v_t = v_{t-1} - (1 - beta_2) u_t^2 sign(v_{t-1} - u_t^2)`, from `v = tau^2`.

    Args:
        beta_1: of m, in [0, 1).
        beta_2: of v, in (0, 1).
        tau: positive; the smaller, the more a step is a sign.
    """

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta_2) * square * (v - square).sign()

    def candidates(self, v: Tensor) -> list[tuple[Tensor, float]]:
        return [(v, -(1 - self.beta_2)), (v, 1 - self.beta_2)]
