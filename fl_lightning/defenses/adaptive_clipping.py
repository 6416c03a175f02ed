"""Clipping to a norm that follows the clients' norms."""

from dataclasses import dataclass

import torch

from fl_lightning.defenses.clipping import clipped
from fl_lightning.defenses.defense import Occasion, ServerDefense, norm_of
from fl_lightning.errors import SettingError, positive
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class AdaptiveClipping(ServerDefense):
    """The server clips updates on arrival to a norm that comes to be a quantile of the clients' norms.

    Andrew et al. 2021, "Differentially private learning with adaptive clipping", without noise:
    `norm *= exp(-lr * (share of updates within the norm - quantile))` after each round. What enters the mean of the
    observing client's own update is known to it, since the norm is sent with the model.

    Args:
        initial: norm of the first round.
        quantile: of the clients' norms, in (0, 1); 0.5 is the median.
        lr: of the norm's logarithm.
    """

    initial: float = 0.1
    quantile: float = 0.5
    lr: float = 0.2

    def __post_init__(self) -> None:
        if not (positive(self.initial, self.lr) and 0 < self.quantile < 1):
            raise SettingError(
                f"AdaptiveClipping needs initial > 0, quantile between 0 and 1 and lr > 0, but got {self.initial}, "
                f"{self.quantile} and {self.lr}."
            )

    def on_arrival(self, update: Tensors, num_examples: int, occasion: Occasion) -> Tensors:
        norm = occasion.memory.setdefault("norm", torch.tensor(self.initial)).item()
        count = occasion.memory.setdefault("within", torch.zeros(2))  # updates within the norm, and all
        occasion.memory["within"] = count + torch.tensor([float(norm_of(update) <= norm), 1.0])
        return clipped(update, norm)

    def on_mean(self, update: Tensors, occasion: Occasion) -> Tensors:
        within, arrived = occasion.memory.pop("within").tolist()
        occasion.memory["norm"] = (
            occasion.memory["norm"] * torch.tensor(-self.lr * (within / arrived - self.quantile)).exp()
        )
        return update
