"""Dropout in the head during local training."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn import functional as F

from fl_lightning.defenses.defense import ClientDefense, Occasion, linear_layers
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier


@dataclass(frozen=True)
class Dropout(ClientDefense):
    """Inputs of the head's linear layers are dropped at random while clients train, other ones for each image and step.

    The global model itself has no dropout, so what was dropped cannot be known.

    Args:
        p: share of the inputs that is dropped; the others are scaled by 1 / (1 - p).
        where: `hidden`, the inputs of all linear layers but the first; `features`, those of the first; or `all`.
    """

    p: float = 0.5
    where: Literal["hidden", "features", "all"] = "hidden"

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise SettingError(f"Dropout needs p between 0 and 1, but got {self.p}.")

    def rates(self, layers: int) -> tuple[float, ...]:
        """Rate at which the inputs of each of so many linear layers are dropped."""
        first, later = self.p * (self.where != "hidden"), self.p * (self.where != "features")
        return first, *[later] * (layers - 1)

    def start(self, model: ImageClassifier, occasion: Occasion) -> None:
        layers = linear_layers(model)
        chosen = [layer for layer, rate in zip(layers, self.rates(len(layers)), strict=True) if rate]
        if not chosen:
            raise SettingError(
                "Dropout of hidden units needs a head of two linear layers, but this model's has one. Set `where: "
                "features`."
            )
        for layer in chosen:
            layer.register_forward_pre_hook(self._drop)

    def _drop(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (F.dropout(inputs[0], self.p, layer.training), *inputs[1:])
