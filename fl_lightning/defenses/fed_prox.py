"""FedProx: local training that stays near the global model."""

from dataclasses import dataclass

from torch import Tensor

from fl_lightning.defenses.defense import ClientDefense, Occasion
from fl_lightning.errors import SettingError, non_negative
from fl_lightning.models import ImageClassifier


@dataclass(frozen=True)
class FedProx(ClientDefense):
    """`mu / 2 * |w - w_t|^2` is added to the local loss (Li et al. 2020); it changes nothing in the first local step.

    Args:
        mu: weight of the term, at least 0.
    """

    mu: float = 0.1

    def __post_init__(self) -> None:
        if not non_negative(self.mu):
            raise SettingError(f"FedProx needs mu >= 0, but got {self.mu}.")

    def on_gradient(self, model: ImageClassifier, images: Tensor, occasion: Occasion) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad += self.mu * (parameter.detach() - occasion.before[name].to(parameter.device))
