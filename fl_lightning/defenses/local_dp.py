"""Local differential privacy: noise on each client's clipped update."""

import math
from dataclasses import dataclass

from fl_lightning.defenses.clipping import clipped
from fl_lightning.defenses.defense import ClientDefense, Occasion
from fl_lightning.defenses.privacy import Privacy, epsilon_of, refuse_unaccountable
from fl_lightning.errors import SettingError, positive
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class LocalDP(ClientDefense):
    """Each client clips its update and adds noise before it sends it, as Flower's `LocalDpMod`.

    The noise has a standard deviation of `sensitivity * sqrt(2 ln(1.25 / delta)) / epsilon`, with a sensitivity of
    `2 * norm`, by which two updates can differ. The reported epsilon is that of all rounds, by Opacus' account.

    Args:
        norm: largest norm of an update over all parameters.
        epsilon: of a single round, as the formula has it.
        delta: of a single round, and at which the epsilon of all rounds is reported.

    Raises:
        SettingError: Opacus, which accounts for the privacy, is not installed.
    """

    norm: float = 0.1
    epsilon: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        refuse_unaccountable("LocalDP", self.delta)
        if not positive(self.norm, self.epsilon):
            raise SettingError(f"LocalDP needs norm > 0 and epsilon > 0, but got {self.norm} and {self.epsilon}.")

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over the sensitivity."""
        return math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon

    def privacy(self, rounds: int, local_epochs: int) -> Privacy:
        return Privacy("client", epsilon_of(self.noise_multiplier, rounds, self.delta), self.delta, False)

    def on_update(self, update: Tensors, occasion: Occasion) -> Tensors:
        std = self.noise_multiplier * 2 * self.norm
        return {name: t + std * occasion.normal_like(t) for name, t in clipped(update, self.norm).items()}
