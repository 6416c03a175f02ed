"""Images from features by linear regression, within seconds: where the inversion of features begins."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.feature_inversion.dead_leaves import dead_leaves
from attack_modules.simulation.feature_map import feature_map_shape
from fl_lightning.models import ImageClassifier, ImageShape

PLACES = 16384
"""Places of feature maps that are learned from, at least, unless `MOST_IMAGES` have fewer."""
MOST_IMAGES = 64
MOST_INPUTS = 1024
"""Features that are regressed on, unless those of one place are more."""
RIDGE = 1e-4
"""Share of the features' mean square that is added to each."""
CHUNK = 16
"""Images that are passed through the model at once."""


class FeatureDecoder(nn.Module):
    """Blocks of pixels as an affine function of the features around their place.

    A feature map is coarser than the image, so that each of its places belongs to a block of pixels. Ridge regression
    finds the block from the features of the place and its eight neighbours, alike for all places. It learns from
    `dead_leaves`, so that neither photographs nor a pretrained model are needed.

    Args:
        model: whose features are meant.
        image_shape: (C, H, W) of the images.

    Raises:
        ValueError: no feature map can be divided among the pixels, see `fits`.
    """

    def __init__(self, model: ImageClassifier, image_shape: ImageShape) -> None:
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
            ridge = RIDGE * gram.diagonal()[:-1].mean() * torch.eye(inputs).to(gram)
            self.register_buffer("weight", torch.linalg.solve(gram + ridge, moments))

    @staticmethod
    def fits(model: ImageClassifier, image_shape: ImageShape) -> bool:
        """Whether the model's features are a map whose places have square blocks of pixels to themselves."""
        return _divides(feature_map_shape(model, image_shape), image_shape)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(N, D) features -> (N, C, H, W) images in [0, 1]."""
        images = []
        for chunk in features.split(CHUNK):
            blocks = (self._around(chunk) @ self.weight).unflatten(0, (len(chunk), -1)).transpose(1, 2)
            images.append(F.fold(blocks, self.image_size, self.block, stride=self.block))
        return torch.cat(images).clamp(0, 1)

    def _around(self, features: Tensor) -> Tensor:
        """(N, D) features -> (N h w, inputs) the features around every place, and 1."""
        size = self.neighbourhood
        around = F.unfold(features.unflatten(1, self.map_shape), size, padding=size // 2)
        return F.pad(around.transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)


def _divides(map_shape: tuple[int, int, int], image_shape: ImageShape) -> bool:
    """Whether several places of a map share an image's pixels in square blocks."""
    _, height, width = map_shape
    block = image_shape[1] // height
    return height * width > 1 and (height * block, width * block) == tuple(image_shape[1:])
