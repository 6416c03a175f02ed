"""Random crops and flips in local training."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_lightning.defenses.defense import ClientDefense, Occasion
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier


@dataclass(frozen=True)
class Augmentation(ClientDefense):
    """Each image is trained on as another view in every local step: a random crop of the padded image, maybe mirrored.

    Args:
        crop: pixels of black padding on each side, out of which an image of the former size is cropped; 0 for none.
        flip: whether half of the views are mirrored left to right.
    """

    crop: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.crop < 0 or not (self.crop or self.flip):
            raise SettingError(f"Augmentation needs crop >= 1, or 0 with flip, but got {self.crop} and {self.flip}.")

    def on_batch(
        self, model: ImageClassifier, images: Tensor, targets: Tensor, occasion: Occasion
    ) -> tuple[Tensor, Tensor]:
        count, _, height, width = images.shape
        padded = F.pad(images, (self.crop,) * 4)
        corners = torch.randint(2 * self.crop + 1, (count, 2), generator=occasion.generator).tolist()
        mirrored = (torch.rand(count, generator=occasion.generator) < 0.5).tolist() if self.flip else [False] * count
        views = [
            view[:, top : top + height, left : left + width].flip(-1 if mirror else ())
            for view, (top, left), mirror in zip(padded, corners, mirrored, strict=True)
        ]
        return torch.stack(views), targets
