"""Index of a dataset whose images are read on demand."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from fl_lightning.data.images import ImageSet
from fl_lightning.errors import SettingError
from fl_lightning.memory import exceeds_memory
from fl_lightning.models.classifier import ImageShape


@dataclass
class Catalogue:
    """Labels of all images of a dataset, and a function that reads a single image."""

    labels: Tensor
    """Class index of each image, long (M,)."""
    class_names: list[str]
    """Name of each class, in the order of the class indices."""
    read: Callable[[int], Tensor]
    """Index of an image -> its pixels, uint8 (C, H, W)."""
    source: Callable[[int], str] = "image {}".format
    """Index of an image -> where it comes from: a path, or a name."""
    person: Callable[[int], str] = "".format
    """Index of an image -> whom it shows; an empty string where that is not known."""

    def read_all(self, indices: Tensor, image_shape: ImageShape) -> ImageSet:
        """Read the images at `indices`, in this order; more than 1000 images are read with a progress bar.

        Raises:
            SettingError: the images do not fit into memory.
            UnreadableImage: an image cannot be read.
        """
        images = f"{len(indices)} images of {'x'.join(map(str, image_shape))}"
        needed = len(indices) * math.prod(image_shape)
        lower = "Lower `data.image_size` or `data.images_per_client`."
        if excess := exceeds_memory(needed):  # to allocate it may succeed all the same, until it is filled
            raise SettingError(f"{images} need {excess}. {lower}")
        try:
            pixels = torch.empty((len(indices), *image_shape), dtype=torch.uint8)
        except RuntimeError as error:
            raise SettingError(f"{images} need {needed / 1e9:.0f} GB, more memory than is free. {lower}") from error
        numbers = track(indices.tolist(), "Reading images", transient=True, disable=len(indices) <= 1000)
        for row, number in enumerate(numbers):
            pixels[row] = self.read(number)
        sources, persons = ([name(number) for number in indices.tolist()] for name in (self.source, self.person))
        return ImageSet(pixels, self.labels[indices], sources, persons)


def first_of(names: list[str]) -> str:
    """The first three of some names, separated by commas."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def label_indices(names: list[str], class_names: list[str]) -> Tensor:
    """Convert the class name of each image to its class index in `class_names`, long (M,)."""
    place = {name: index for index, name in enumerate(class_names)}
    return torch.tensor([place[name] for name in names])
