"""DP-FedAvg: noise on the mean of clipped updates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fl_lightning.defenses.adaptive_clipping import AdaptiveClipping
from fl_lightning.defenses.clipping import clipped
from fl_lightning.defenses.defense import Occasion, ServerDefense
from fl_lightning.defenses.privacy import Privacy, epsilon_of, refuse_unaccountable
from fl_lightning.errors import SettingError, positive
from fl_lightning.state_files import Tensors


@dataclass(frozen=True)
class DPFedAvg(ServerDefense):
    """The server clips each client's update and adds noise to their mean (McMahan et al. 2018): central privacy.

    The noise has a standard deviation of `noise_multiplier * norm * (largest share of a client in the mean)`; with
    clients of equal weight that is Flower's `noise_multiplier * clipping_norm / num_sampled_clients`.

    Args:
        norm: largest norm of an update over all parameters.
        noise_multiplier: standard deviation of the noise over what one client can change; 1 or more for a guarantee
            that means something.
        delta: at which epsilon is reported.

    Raises:
        SettingError: Opacus, which accounts for the privacy, is not installed.
    """

    norm: float = 0.1
    noise_multiplier: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        refuse_unaccountable("DPFedAvg", self.delta)
        if not positive(self.norm, self.noise_multiplier):
            raise SettingError(
                f"DPFedAvg needs norm > 0 and noise_multiplier > 0, but got {self.norm} and {self.noise_multiplier}."
            )

    def refuse_among(self, earlier: Sequence[ServerDefense], later: Sequence[ServerDefense]) -> None:
        changing = [e for e in earlier if type(e).on_mean != ServerDefense.on_mean]
        changing += [other for other in later if isinstance(other, AdaptiveClipping)]
        if changing:
            raise SettingError(
                f"DPFedAvg guarantees nothing with {type(changing[0]).__name__}, by which a client changes the mean by "
                "more than the norm, or the norm is told without noise. In `federation.server_defenses`, list DPFedAvg "
                "before what changes the mean, and leave AdaptiveClipping out."
            )

    def privacy(self, rounds: int, local_epochs: int) -> Privacy:
        return Privacy("client", epsilon_of(self.noise_multiplier, rounds, self.delta), self.delta, True)

    def on_arrival(self, update: Tensors, num_examples: int, occasion: Occasion) -> Tensors:
        before = occasion.memory.get("weights", torch.zeros(0))
        occasion.memory["weights"] = torch.cat([before, torch.tensor([float(num_examples)])])
        return clipped(update, self.norm)

    def on_mean(self, update: Tensors, occasion: Occasion) -> Tensors:
        weights = occasion.memory.pop("weights")
        std = self.noise_multiplier * self.norm * (weights.max() / weights.sum()).item()
        return {name: tensor + std * occasion.normal_like(tensor) for name, tensor in update.items()}
