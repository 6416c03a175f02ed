"""Clipping of a client's update to a norm."""

from dataclasses import dataclass

from fl_lightning.defenses.defense import ClientDefense, Occasion, ServerDefense, norm_of
from fl_lightning.errors import SettingError, positive
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class Clipping(ClientDefense, ServerDefense):
    """A client's update is scaled down to a norm if it is longer (McMahan et al. 2018); at the client, or on arrival.

    Args:
        norm: largest Euclidean norm over all parameters.
    """

    norm: float = 1.0

    def __post_init__(self) -> None:
        if not positive(self.norm):
            raise SettingError(f"Clipping needs norm > 0, but got {self.norm}.")

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        return clipped(update, self.norm)

    def on_arrival(self, update: Tensors, num_examples: int, occasion: Occasion) -> Tensors:
        return clipped(update, self.norm)


def clipped(update: Tensors, norm: float) -> Tensors:
    """The update, scaled down to the norm if it is longer."""
    factor = min(1.0, norm / max(norm_of(update).item(), 1e-30))
    return {name: tensor * factor for name, tensor in update.items()}
