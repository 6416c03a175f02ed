"""Soteria: the gradient of the first linear layer is hidden where images could best be read from it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_lightning.defenses.defense import ClientDefense, Occasion, linear_layers
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier


@dataclass(frozen=True)
class Soteria(ClientDefense):
    """Columns of the gradient of the head's first layer are set to 0 (Sun et al. 2021, "Soteria").

    They are those of the features with the smallest `|d feature / d image| / feature`, summed over the batch. The norm
    is estimated by Hutchinson's method from directional derivatives (forward mode), with a relative error of about
    `sqrt(1 / (2 * probes))`, since one backward pass for each of thousands of features would take minutes.

    Args:
        percent: of the features that are not 0 in all images, those whose columns are hidden; 1 in the paper.
        probes: random directions.
    """

    percent: float = 1.0
    probes: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.percent < 100 or self.probes < 1:
            raise SettingError(
                f"Soteria needs percent between 0 and 100 and probes >= 1, but got {self.percent} and {self.probes}."
            )

    def on_gradient(self, model: ImageClassifier, images: Tensor, occasion: Occasion) -> None:
        parameter = linear_layers(model)[0].weight
        if parameter.grad is None:  # it is frozen
            return
        sizes, features = self._sensitivities(model, images, occasion)
        active = features > 0
        ratios = torch.where(active, sizes / features.where(active, torch.ones_like(features)), 0.0).sum(0)
        shown = active.any(0)
        hidden = shown & (ratios < ratios[shown].quantile(self.percent / 100))
        parameter.grad[:, hidden] = 0

    @torch.no_grad()
    def _sensitivities(self, model: ImageClassifier, images: Tensor, occasion: Occasion) -> tuple[Tensor, Tensor]:
        """(N, D) norms of the features' gradients with respect to their image, and (N, D) the features."""
        total, features = 0.0, torch.empty(0)
        for _ in range(self.probes):
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
                features, slope = torch.func.jvp(model.embed, (images,), (occasion.normal_like(images),))
            total = total + slope.square()
        return (total / self.probes).sqrt(), features
