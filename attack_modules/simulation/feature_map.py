"""The feature map before it is flattened: its shape, and a memory layout in which it is computed fast."""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attack_modules.simulation.image_convolution import ImageConvolution
from fl_lightning.models import ImageClassifier, ImageShape


@torch.no_grad()
def feature_map_shape(model: ImageClassifier, image_shape: ImageShape) -> tuple[int, int, int]:
    """(c, h, w) of the map that is flattened to one image's features; (D, 1, 1) where there is no such map."""
    trial = deepcopy(model.features).eval()  # in train mode BatchNorm refuses a single image and updates its statistics
    images = torch.linspace(0, 1, math.prod(image_shape), device=model.mean.device).view(1, *image_shape)
    with _Maps() as maps:
        features = trial(model.normalise(images)).flatten(1)
    is_features = maps.last is not None and torch.equal(maps.last.flatten(1), features)
    return tuple(maps.last.shape[1:]) if is_features else (features.shape[1], 1, 1)


class _Maps(TorchFunctionMode):
    """Keeps the last map that any operation makes, also one that is no module."""

    last: Tensor | None = None
    """(N, c, h, w)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if isinstance(outputs, Tensor) and outputs.ndim == 4:
            self.last = outputs
        return outputs


def for_speed(model: ImageClassifier, device: torch.device) -> ImageClassifier:
    """The model on a device, with itself and the gradient of its feature map in channels_last layout.

    On a CPU, a first convolution that is not trained is replaced by `ImageConvolution`.
    """
    for name, layer in list(model.features.named_modules()):
        if isinstance(layer, nn.Flatten):
            layer.register_forward_pre_hook(_keep_layout)
        if device.type == "cpu" and ImageConvolution.fits(layer):
            model.features.set_submodule(name, ImageConvolution(layer))
    return model.to(device, memory_format=torch.channels_last)


def _keep_layout(layer: nn.Flatten, inputs: tuple[Tensor]) -> None:
    """Lay the gradient of a flattened map out like the map: autograd would make it contiguous."""
    if inputs[0].requires_grad:
        inputs[0].register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
