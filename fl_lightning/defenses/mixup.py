"""Mixup: local training on mixtures of two images."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_lightning.defenses.defense import ClientDefense, Occasion
from fl_lightning.errors import SettingError, positive
from fl_lightning.models import ImageClassifier


@dataclass(frozen=True)
class Mixup(ClientDefense):
    """Each image and its label are mixed with another one's of the batch (Zhang et al. 2018), anew in each batch.

    Args:
        alpha: the share `lam` of the one image is drawn for each batch from a Beta distribution of `alpha, alpha`.
        lam: in place of `alpha`, a fixed share.
    """

    alpha: float | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.alpha, self.lam) if value is not None]
        if len(given) != 1 or not positive(*given) or (self.lam is not None and self.lam >= 1):
            raise SettingError(
                f"Mixup needs either alpha > 0 or lam between 0 and 1, but got alpha={self.alpha}, lam={self.lam}."
            )

    def on_batch(
        self, model: ImageClassifier, images: Tensor, targets: Tensor, occasion: Occasion
    ) -> tuple[Tensor, Tensor]:
        if targets.ndim == 1:
            targets = F.one_hot(targets, model.hparams["num_classes"]).to(images.dtype)
        share = self.lam
        if share is None:  # two gamma variables give a beta variable; torch's own one takes no generator
            first, second = torch._standard_gamma(
                torch.full((2,), self.alpha, dtype=torch.float64), generator=occasion.generator
            ).tolist()
            share = first / (first + second)
        others = torch.randperm(len(images), generator=occasion.generator).to(images.device)
        return torch.lerp(images[others], images, share), torch.lerp(targets[others], targets, share)
