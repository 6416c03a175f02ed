"""A linear decoder from features to images, fitted within seconds: the start of feature inversion."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.feature_inversion.dead_leaves import dead_leaves
from attack_modules.simulation.feature_map import feature_map_shape
from fl_lightning.models import ImageClassifier, ImageShape

PLACES = 16384
"""Least number of feature map positions in the training set, unless `MOST_IMAGES` have fewer."""
MOST_IMAGES = 64
MOST_INPUTS = 1024
"""Most features in the regression; a single position may have more."""
RIDGE = 1e-4
"""Ridge, as a share of the mean square of a feature."""
CHUNK = 16
"""Images that are passed through the model at once."""


class FeatureDecoder(nn.Module):
    """Blocks of pixels as an affine function of the features at and around their position.

    A feature map is coarser than the image, so each of its positions corresponds to a block of pixels. Ridge
    regression predicts the block from the features of the position and its eight neighbours, with the same weights at
    all positions. It is fitted to `dead_leaves`, so neither photographs nor a pretrained model are needed.

    Args:
        model: whose features are meant.
        image_shape: (C, H, W) of the images.
        noise: of the features that will be decoded, relative to their size.

    Raises:
        ValueError: the features are no map that fits the pixels, see `fits`.
    """

    def __init__(self, model: ImageClassifier, image_shape: ImageShape, noise: float = 0.0) -> None:
        super().__init__()
        self.map_shape = channels, height, width = feature_map_shape(model, image_shape)
        if not _divides(self.map_shape, image_shape):
            raise ValueError(f"Features of shape {self.map_shape} are no map of images of shape {tuple(image_shape)}.")
        self.image_size = image_shape[1:]
        self.block = image_shape[1] // height
        self.neighbourhood = 3 if 9 * channels <= MOST_INPUTS else 1
        images = dead_leaves(min(-(-PLACES // (height * width)), MOST_IMAGES), image_shape).to(model.mean)
        inputs = channels * self.neighbourhood**2 + 1
        gram = images.new_zeros(inputs, inputs)
        moments = images.new_zeros(inputs, image_shape[0] * self.block**2)
        with torch.no_grad():
            for chunk in images.split(CHUNK):
                around = self._around(model.embed(chunk))
                blocks = F.unfold(chunk, self.block, stride=self.block).transpose(1, 2).flatten(0, 1)
                gram += around.T @ around
                moments += around.T @ blocks
            ridge = max(RIDGE, noise**2) * gram.diagonal()[:-1].mean() * torch.eye(inputs).to(gram)
            self.register_buffer("weight", torch.linalg.solve(gram + ridge, moments))

    @staticmethod
    def fits(model: ImageClassifier, image_shape: ImageShape) -> bool:
        """Whether the model's features are a map whose positions correspond to disjoint square blocks of pixels."""
        return _divides(feature_map_shape(model, image_shape), image_shape)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) features -> (N, C, H, W) images in [0, 1]."""
        return self.affine(features).clamp(0, 1)

    @torch.no_grad()
    def affine(self, features: Tensor) -> Tensor:
        """The same before pixels are limited to [0, 1]: an affine function of the features."""
        images = []
        for chunk in features.split(CHUNK):
            blocks = (self._around(chunk) @ self.weight).unflatten(0, (len(chunk), -1)).transpose(1, 2)
            images.append(F.fold(blocks, self.image_size, self.block, stride=self.block))
        return torch.cat(images)

    def _around(self, features: Tensor) -> Tensor:
        """(N, D) features -> (N h w, inputs) features of each position's neighbourhood, and a constant 1."""
        size = self.neighbourhood
        around = F.unfold(features.unflatten(1, self.map_shape), size, padding=size // 2)
        return F.pad(around.transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)


def _divides(map_shape: tuple[int, int, int], image_shape: ImageShape) -> bool:
    """Whether a map of more than one position divides an image into square blocks of pixels."""
    _, height, width = map_shape
    block = image_shape[1] // height
    return height * width > 1 and (height * block, width * block) == tuple(image_shape[1:])
