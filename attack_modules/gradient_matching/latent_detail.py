"""What a latent leaves out of an image, counted as noise of the features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attack_modules.gradient_matching.upsampling import nearest_latent, upsampled
from attack_modules.simulation.feature_map import feature_map_shape
from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate
from fl_lightning.client import Tensors
from fl_lightning.data import Photographs
from fl_lightning.models import FIRST_LAYER, ImageClassifier, ImageShape

RIDGE = 0.01
"""Share of the largest variance that is added to all, because a covariance of few photographs is no surer."""


@dataclass(frozen=True)
class Detail:
    """How the detail that no latent can show changes the features of photographs: mean and covariance.

    A latent that is 1/k of the size shows 1/k^2 of an image's numbers. The others change the features too, and matching
    the features of the true image as they are would make the latent imitate them: detail comes out as dots at the
    latent's grid. So they count as noise: its mean is added to the features of every decoded latent, and the first
    linear layer's update, a sum of outer products with features, is compared where that noise is white (generalised
    least squares, Aitken 1936). Both are taken alike at all places of the feature map.

    Attributes:
        mean: (D,) what detail adds to the features.
        whitening: (c, c) matrix by which the c channels of the features at one place are multiplied.
    """

    mean: Tensor
    whitening: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: ImageClassifier, images: Tensor, latent_downscale: int, update: Tensor) -> "Detail":
        """The detail of some images.

        Args:
            model: whose features are meant.
            images: (M, C, H, W) photographs in [0, 1], of the attacked images' shape but none of them.
            latent_downscale: of the latent.
            update: (out, D) of the first linear layer as observed. Whitening is scaled so as to keep its norm, and with
                it the layer's weight beside the others.
        """
        shown = upsampled(nearest_latent(images, latent_downscale), latent_downscale)
        channels = feature_map_shape(model, images.shape[1:])[0]
        changes = (model.embed(images) - model.embed(shown)).unflatten(1, (channels, -1))
        mean = changes.mean((0, 2))
        centred = (changes - mean[:, None]).transpose(0, 1).flatten(1)
        variances, axes = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
        whitening = (axes * (variances + RIDGE * variances[-1]).rsqrt()) @ axes.T
        found = cls(mean.repeat_interleave(changes.shape[2]), whitening)
        return cls(found.mean, whitening * (update.norm() / found.whiten(update).norm()))

    def whiten(self, rows: Tensor) -> Tensor:
        """(B, D) features, or rows of a weight -> (B, D)."""
        return (self.whitening @ rows.unflatten(1, (len(self.whitening), -1))).flatten(1)

    def whitened(self, update: SimulatedUpdate | Tensors) -> SimulatedUpdate:
        """An update by parameter name, the first linear layer's in the metric of the detail."""
        first = update[FIRST_LAYER]
        if isinstance(first, LowRank):
            base = self.whiten(first.base) if first.scale else first.base
            first = LowRank(base, first.scale, first.left, tuple(self.whiten(right) for right in first.right))
        else:
            first = self.whiten(first)
        return {**update, FIRST_LAYER: first}


def public_photographs(image_shape: ImageShape) -> Tensor:
    """(M, C, H, W) the photographs that come with scikit-image and scikit-learn, in [0, 1]."""
    source = Photographs(image_size=image_shape[1])
    source.channels = image_shape[0]
    catalogue = source.catalogue()
    return catalogue.read_all(torch.arange(len(catalogue.labels)), image_shape).images
