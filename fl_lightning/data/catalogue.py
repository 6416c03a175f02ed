"""What a dataset offers before any image is read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from fl_lightning.data.images import ImageSet
from fl_lightning.models.classifier import ImageShape


@dataclass
class Catalogue:
    """Labels of all images, and the means to read those that somebody gets."""

    labels: Tensor
    """Class index of each image, long (M,)."""
    class_names: list[str]
    """Name of each class, in the order of the labels."""
    read: Callable[[int], Tensor]
    """Number of an image -> its pixels, uint8 (C, H, W)."""

    def read_all(self, indices: Tensor, image_shape: ImageShape) -> ImageSet:
        """The images of these numbers, in this order; a progress bar shows when they are more than 1000."""
        numbers = track(indices.tolist(), "Reading images", transient=True, disable=len(indices) <= 1000)
        pixels = torch.empty((len(indices), *image_shape), dtype=torch.uint8)
        for row, number in enumerate(numbers):
            pixels[row] = self.read(number)
        return ImageSet(pixels, self.labels[indices])


def label_indices(names: list[str], class_names: list[str]) -> Tensor:
    """Each name's place among `class_names`, long (M,)."""
    place = {name: index for index, name in enumerate(class_names)}
    return torch.tensor([place[name] for name in names])
