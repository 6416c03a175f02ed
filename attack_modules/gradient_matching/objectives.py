"""Distances between a simulated update and the observed one."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate, inner, squared_distance, squared_norm
from fl_lightning.client import Tensors
from fl_lightning.errors import SettingError, non_negative


class Objective(ABC):
    """A dimensionless distance between two updates, 0 where they are equal.

    Args:
        layer_weights: weight of parameters whose name starts with the key; 1 for those that no key fits.

    Raises:
        SettingError: a weight is negative.
    """

    def __init__(self, layer_weights: dict[str, float] | None = None) -> None:
        self.layer_weights = layer_weights or {}
        if not non_negative(*self.layer_weights.values()):
            raise SettingError(f"Layer weights must not be negative, but they are {self.layer_weights}.")

    @abstractmethod
    def __call__(self, simulated: SimulatedUpdate, observed: Tensors) -> Tensor:
        """The distance (a scalar) of two updates by parameter name."""

    def weights(self, names: list[str]) -> list[float]:
        """The weight of each parameter.

        Raises:
            SettingError: a key of `layer_weights` fits no parameter, or no weight is left.
        """
        for prefix in self.layer_weights:
            if not any(name.startswith(prefix) for name in names):
                raise SettingError(
                    f"`layer_weights` names '{prefix}', but no parameter starts so; there are {', '.join(names)}."
                )
        weights = [next((w for p, w in self.layer_weights.items() if name.startswith(p)), 1.0) for name in names]
        if not any(weights):
            raise SettingError(f"`layer_weights` is {self.layer_weights}, which leaves no parameter to compare.")
        return weights

    def weighted(self, simulated: SimulatedUpdate, observed: Tensors) -> list[tuple[float, Tensor | LowRank, Tensor]]:
        """Weight, simulated and observed update of each parameter whose weight is not 0."""
        parts = zip(self.weights(list(observed)), observed.items(), strict=True)
        return [(weight, simulated[name], update) for weight, (name, update) in parts if weight]


class SquaredL2(Objective):
    """`|simulated - observed|^2 / |observed|^2` over all layers: that of DLG (Zhu et al. 2019), made relative.

    Args:
        layer_weights: weight of parameters whose name starts with the key; 1 for those that no key fits.
    """

    def __call__(self, simulated: SimulatedUpdate, observed: Tensors) -> Tensor:
        parts = self.weighted(simulated, observed)
        return sum(w * squared_distance(s, u) for w, s, u in parts) / sum(w * squared_norm(u) for w, _, u in parts)


class Cosine(Objective):
    """`1 - <simulated, observed> / (|simulated| |observed|)` over all layers (Geiping et al. 2020).

    Args:
        layer_weights: weight of parameters whose name starts with the key; 1 for those that no key fits.
    """

    def __call__(self, simulated: SimulatedUpdate, observed: Tensors) -> Tensor:
        parts = self.weighted(simulated, observed)
        product = sum(w * inner(s, u) for w, s, u in parts)
        norms = sum(w * squared_norm(s) for w, s, _ in parts) * sum(w * squared_norm(u) for w, _, u in parts)
        return 1 - product / torch.sqrt(norms)
