"""What a global model must be: convolutional features, then a linear head."""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor, nn

from fl_lightning.errors import SettingError

ImageShape = tuple[int, int, int]
"""(C, H, W) of one image."""

FIRST_LAYER = "head.0.weight"
"""Name of the first weight of every head, which belongs to the features."""


class ImageClassifier(nn.Module, HyperparametersMixin):
    """Logits `head(features((x - mean) / std))` of images `x` in [0, 1].

    Normalisation is part of the model, so everything outside it, the attack included, speaks of pixels in [0, 1].
    A subclass builds `features` and `head` and calls `save_hyperparameters()`, by which an Observation can name the
    model and build it again.

    Args:
        mean: per-channel mean (or one for all channels) that the model subtracts from its input.
        std: per-channel (or one) standard deviation that it divides by.
    """

    features: nn.Module
    """(N, C, H, W) normalised images -> features, flattened by `embed`."""
    head: nn.Sequential
    """(N, D) features -> (N, num_classes) logits, through linear layers and ReLUs only."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if min(std) <= 0:
            raise SettingError(f"A model's `std` must be positive, but it is {list(std)}. Give one value a channel.")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> (N, D) inputs of the head."""
        return self.features(self.normalise(images)).flatten(1)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> (N, C, H, W) inputs of `features`."""
        return (images - self.mean) / self.std


ClassifierFactory = Callable[[int, ImageShape], ImageClassifier]
"""`(num_classes, image_shape) -> model`; in YAML a `class_path` with the remaining `init_args`."""


@torch.no_grad()
def feature_width(features: nn.Module, image_shape: ImageShape) -> int:
    """D, the number of features that `features` makes of one image; refuses images too small for it."""
    try:
        return features(torch.zeros(1, *image_shape)).shape[1]
    except RuntimeError as error:
        raise SettingError(
            f"Images of shape {tuple(image_shape)} do not fit this model ({error}). "
            "Give larger images (`data.image_size`) or another `federation.model`."
        ) from error
