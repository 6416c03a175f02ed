"""The image detail that a latent cannot represent, modelled as noise of the features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attack_modules.gradient_matching.upsampling import nearest_latent, upsampled
from attack_modules.simulation.feature_map import feature_map_shape
from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate
from fl_lightning.client import Tensors
from fl_lightning.data import Photographs
from fl_lightning.models import ImageClassifier, ImageShape

RIDGE = 0.01
"""Share of the largest variance that is added to all: the covariance is estimated from few photographs."""


@dataclass(frozen=True)
class Detail:
    """Mean and covariance of the change that image detail beyond the latent makes in the features of photographs.

    A latent downscaled by k has 1/k^2 of an image's degrees of freedom. The rest of the image changes the features too,
    and matching the features of the full image makes the latent imitate them by dots at its grid. So the rest is
    modelled as noise: its mean is added to the features of every upsampled latent, and the first linear layer's update,
    a sum of outer products with features, is compared after whitening by its covariance (generalised least squares,
    Aitken 1936). Both are taken as constant over the positions of the feature map.

    Attributes:
        layer: parameter name of the first linear layer's weight.
        mean: (D,) mean change of the features.
        whitening: (c, c) matrix by which the c channels of the features at one position are multiplied.
    """

    layer: str
    mean: Tensor
    whitening: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: ImageClassifier, images: Tensor, latent_downscale: int, update: Tensors) -> "Detail":
        """Statistics of the detail of some images.

        Args:
            model: computes the features.
            images: (M, C, H, W) photographs in [0, 1], of the attacked images' shape but not among them.
            latent_downscale: of the latent.
            update: the observed update by parameter name. Whitening is scaled to keep the norm of the first linear
                layer's, and so the layer's weight in the objective.
        """
        shown = upsampled(nearest_latent(images, latent_downscale), latent_downscale)
        channels = feature_map_shape(model, images.shape[1:])[0]
        changes = (model.embed(images) - model.embed(shown)).unflatten(1, (channels, -1))
        mean = changes.mean((0, 2))
        centred = (changes - mean[:, None]).transpose(0, 1).flatten(1)
        variances, axes = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
        whitening = (axes * (variances + RIDGE * variances[-1]).rsqrt()) @ axes.T
        first = model.first_layer
        found = cls(first, mean.repeat_interleave(changes.shape[2]), whitening)
        return cls(first, found.mean, whitening * (update[first].norm() / found.whiten(update[first]).norm()))

    def whiten(self, rows: Tensor) -> Tensor:
        """(B, D) features, or rows of a weight -> (B, D)."""
        return (self.whitening @ rows.unflatten(1, (len(self.whitening), -1))).flatten(1)

    def whitened(self, update: SimulatedUpdate | Tensors) -> SimulatedUpdate:
        """An update by parameter name, with that of the first linear layer whitened."""
        first = update[self.layer]
        if isinstance(first, LowRank):
            base = self.whiten(first.base) if first.scale else first.base
            first = LowRank(base, first.scale, first.left, tuple(self.whiten(right) for right in first.right))
        else:
            first = self.whiten(first)
        return {**update, self.layer: first}


def public_photographs(image_shape: ImageShape) -> Tensor:
    """(M, C, H, W) the photographs that come with scikit-image and scikit-learn, in [0, 1]."""
    source = Photographs(image_size=image_shape[1], channels=image_shape[0])
    catalogue = source.catalogue()
    return catalogue.read_all(torch.arange(len(catalogue.labels)), image_shape).images
