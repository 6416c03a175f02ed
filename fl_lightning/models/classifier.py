"""Interface of the global models: a convolutional feature extractor followed by a head of linear layers."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor, nn

from fl_lightning.errors import SettingError, positive

ImageShape = tuple[int, int, int]
"""(C, H, W) of one image."""

FIRST_LAYER = "head.0.weight"
"""Parameter name of the weight of the head's first linear layer, whose inputs are the features."""


class ImageClassifier(nn.Module, HyperparametersMixin):
    """Classifier that maps images `x` in [0, 1] to the logits `head(features((x - mean) / std))`.

    Normalisation is part of the model, so all code outside it, including the attack, handles pixels in [0, 1]. A
    subclass builds `features` and `head` and calls `save_hyperparameters()`, so that an Observation can record the
    model's class and arguments and rebuild it.

    Args:
        mean: mean subtracted from the input, one value per channel or one for all channels.
        std: positive standard deviation by which the input is divided, one value per channel or one for all channels.

    Raises:
        SettingError: a value of `std` is not positive.
    """

    features: nn.Module
    """Feature extractor: (N, C, H, W) normalised images -> feature maps or vectors, flattened to (N, D) by `embed`."""
    head: nn.Sequential
    """(N, D) features -> (N, num_classes) logits, by linear layers and ReLUs only."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not positive(*std) or not all(map(math.isfinite, mean)):
            raise SettingError(
                f"A model's `std` must be positive and its `mean` finite, but they are {list(std)} and {list(mean)}. "
                "Give one value per channel."
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters and buffers; those without a version, as they come over the wire, are of today's version."""
        state = OrderedDict(state_dict)
        state._metadata = getattr(state_dict, "_metadata", self.state_dict()._metadata)  # MNASNet refuses to do without
        return super().load_state_dict(state, strict, assign)

    def embed(self, images: Tensor) -> Tensor:
        """Compute the features: (N, C, H, W) images in [0, 1] -> (N, D) inputs of the head."""
        return self.features(self.normalise(images)).flatten(1)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise (N, C, H, W) images in [0, 1] to inputs of `features` of the same shape."""
        return (images - self.mean) / self.std


ClassifierFactory = Callable[[int, ImageShape], ImageClassifier]
"""Callable `(num_classes, image_shape) -> model`; in YAML, a `class_path` with the remaining `init_args`."""


@torch.no_grad()
def feature_width(features: nn.Module, image_shape: ImageShape) -> int:
    """Determine D, the number of features per image, by a forward pass of one zero image.

    Raises:
        SettingError: images of this shape, e.g. too small ones, do not fit `features`.
    """
    try:
        return features(torch.zeros(1, *image_shape)).shape[1]
    except NotImplementedError:  # the model looks at values, which the meta device has not
        raise
    except RuntimeError as error:
        raise SettingError(
            f"Images of shape {tuple(image_shape)} do not fit this model ({error}). "
            "Use larger images (`data.image_size`) or another `federation.model`."
        ) from error
