"""Interface of the global models: a convolutional feature extractor followed by a head of linear layers."""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor, nn

from fl_lightning.errors import SettingError, in_short, positive

ImageShape = tuple[int, int, int]
"""(C, H, W) of one image."""


class Arguments:
    """A model's class and the arguments of its constructor, to be built again; equal where these are equal.

    Args:
        model_class: of the model.
        arguments: JSON types; other objects are equal only to themselves.
    """

    def __init__(self, model_class: "type[ImageClassifier]", arguments: Mapping[str, Any]) -> None:
        self.model_class = model_class
        self.arguments = dict(arguments)  # keeps the objects, so that no other one gets the same id
        self._key = model_class, json.dumps(self.arguments, sort_keys=True, default=id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arguments) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def build(self) -> "ImageClassifier":
        """A new model."""
        return self.model_class(**self.arguments)


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

    @property
    def built_from(self) -> Arguments:
        """The class and arguments of this model."""
        return Arguments(type(self), dict(self.hparams))

    @property
    def head_layers(self) -> list[tuple[str, nn.Module]]:
        """The modules of the head in the order in which they are computed, with the prefix of their parameters."""
        return [(f"head.{name}", layer) for name, layer in self.head.named_children()]

    @property
    def head_parameters(self) -> list[str]:
        """Names of the head's parameters, in the order of its layers."""
        return [f"{prefix}.{name}" for prefix, layer in self.head_layers for name, _ in layer.named_parameters()]

    @property
    def first_layer(self) -> str:
        """Parameter name of the weight of the head's first linear layer, whose inputs are the features."""
        return next(f"{prefix}.weight" for prefix, layer in self.head_layers if isinstance(layer, nn.Linear))

    def feature_names(self, names: Iterable[str]) -> dict[str, str]:
        """Parameters of this model outside its head -> their names in `features`."""
        return {name: name.removeprefix("features.") for name in names if name.startswith("features.")}

    def embed(self, images: Tensor) -> Tensor:
        """Compute the features: (N, C, H, W) images in [0, 1] -> (N, D) inputs of the head."""
        return self.features(self.normalise(images)).flatten(1)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise (N, C, H, W) images in [0, 1] to inputs of `features` of the same shape."""
        return (images - self.mean) / self.std


def refuse_tied_parameters(model: nn.Module, shown: str) -> None:
    """Refuse a model that has one parameter under several names.

    Args:
        model: whose parameters are looked at.
        shown: what the sentence calls it.

    Raises:
        SettingError: it has; it names two.
    """
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := names.setdefault(parameter, name)) != name:
            raise SettingError(
                f"{shown} has one parameter as {other} and {name}, but parameters are aggregated by name, which would "
                "make two of it. Give each module a parameter of its own."
            )


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
    except RuntimeError as error:
        raise SettingError(
            f"Images of shape {tuple(image_shape)} do not fit this model ({in_short(error)}). "
            "Use larger images (`data.image_size`) or another `federation.model`."
        ) from error
