"""Images from the map behind a first convolution, ReLU and max pooling, by drawing where each maximum was taken.

Given the positions of the maxima, such a map is linear in the image, and so is the gradient of the convolution, given
the errors behind the pooling: its row c is the sum of errors times the patches at the positions. Under a Gaussian prior
of photographs the image is then a least squares problem. Given an image, each window's position is independent of the
others'. Both are found in turn (Gibbs sampling of the positions), under noise that falls from the size of the map to
its error. Taking the likeliest positions instead of drawing them ends 1.2 dB lower.

The gradient is exact, but as long as positions are wrong it is explained by wrong images. So each of its rows counts by
what the last image and the drawn positions leave unexplained of it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from attack_modules.feature_inversion.soft_pooling import SoftPooling
from fl_lightning.models import ImageClassifier, ImageShape

ROUNDS = 100
"""Drawings of all positions."""
STEPS = 15
"""Conjugate gradient steps for the images after each."""
FIRST_NOISE = 1.0
"""Noise of the map at the first drawing, over its root mean square."""
LAST_NOISE = 0.01
"""At the last one."""
USES_GRADIENT = 0.1
"""That noise, below which the convolution's gradient counts."""
ROUNDING = 0.003
"""Least unexplained share of a row of the gradient."""
CLOSED = 0.01
"""Entry over the map's root mean square, up to which ReLU may have made it, so that it tells no maximum."""
SEED = 0


class PhotographPrior:
    """Gaussian images: independent cosine waves, of which long and grey ones are the strongest, as in photographs.

    The standard deviation of a wave of `f` half periods an image is `SIZE f^-POWER (1 + f / BEND)^-STEEPER` of the
    amplitude that pixels have, for brightness, and `COLOURFUL` times that for two differences of colours; fitted to
    BSDS500's training images.

    Args:
        image_shape: (C, H, W), of one channel or three.
    """

    MEAN = (0.45, 0.45, 0.4)
    COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
    COLOURFUL = (1.0, 0.28, 0.13)
    SIZE, POWER, BEND, STEEPER = 0.108, 0.88, 30.0, 0.8
    MEAN_COLOUR = (0.2, 0.11, 0.04)

    def __init__(self, image_shape: ImageShape) -> None:
        channels, height, width = image_shape
        self.rows, self.columns = _cosines(height), _cosines(width)
        waves = torch.hypot(torch.arange(float(height))[:, None], torch.arange(float(width))[None])
        bright = self.SIZE * waves.clamp_min(1) ** -self.POWER * (1 + waves / self.BEND) ** -self.STEEPER
        colourful, mean = (torch.tensor(of)[:channels, None, None] for of in (self.COLOURFUL, self.MEAN_COLOUR))
        spread = torch.where(waves > 0, colourful * bright, mean)
        self.spread = spread * math.sqrt(height * width)  # of orthonormal waves
        self.colours = F.normalize(torch.tensor(self.COLOURS)[:channels, :channels], dim=1)
        self.mean = torch.tensor(self.MEAN)[:channels, None, None].expand(image_shape)

    def images(self, waves: Tensor) -> Tensor:
        """(N, C, H, W) differences to the mean image, of waves (N, C, H, W) in standard deviations."""
        mixed = torch.einsum("dc,ndhw->nchw", self.colours, self.spread * waves)
        return self.rows.T @ mixed @ self.columns

    def waves(self, images: Tensor) -> Tensor:
        """The adjoint of `images`."""
        mixed = torch.einsum("dc,nchw->ndhw", self.colours, self.rows @ images @ self.columns.T)
        return self.spread * mixed


class Gradient(NamedTuple):
    """What a convolution's update shows of its input beside the map behind it.

    Attributes:
        weight: (out, c, kh, kw) its gradient.
        errors: (N, out, h, w) derivative of the aggregated loss by the maps behind ReLU and pooling, as large.
    """

    weight: Tensor
    errors: Tensor


class PoolingPositions:
    """Images from the maps behind a model's first convolution, a ReLU and max pooling.

    Args:
        model: of which the convolution takes the normalised images.
        layer: the convolution.
        pooling: the max pooling.
        image_shape: (C, H, W).
    """

    def __init__(
        self, model: ImageClassifier, layer: nn.Conv2d, pooling: nn.MaxPool2d, image_shape: ImageShape
    ) -> None:
        self.prior = PhotographPrior(image_shape)
        self.image_shape = image_shape
        self.geometry = {"stride": layer.stride, "padding": layer.padding}
        self.std = model.std.detach().cpu()
        self.weight = layer.weight.detach().cpu()
        bias = None if layer.bias is None else layer.bias.detach().cpu()
        self.flat = model.normalise(self.prior.mean[None].to(model.mean)).detach().cpu()
        self.constant = F.conv2d(self.flat, self.weight, bias, **self.geometry)  # outputs of the mean image
        self.places = self.constant.shape[2:]
        numbers = torch.arange(1.0, 1 + self.constant[0, 0].numel()).view(1, 1, *self.places)
        each = F.unfold(numbers, pooling.kernel_size, padding=pooling.padding, stride=pooling.stride)
        self.window = each[0].T.long() - 1  # (h w, places), -1 in the padding

    @staticmethod
    def fits(layer: nn.Module, pooling: nn.Module, image_shape: ImageShape) -> bool:
        """Whether a convolution and the max pooling behind it are of the kind that is inverted."""
        plain = type(layer) is nn.Conv2d and layer.groups == 1 and set(layer.dilation) == {1}
        plain = plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and SoftPooling.fits(pooling) and image_shape[0] in (1, 3)

    @torch.no_grad()
    def __call__(self, features: Tensor, gradient: Gradient | None = None) -> Tensor:
        """(N, C, H, W) images in [0, 1] of the maps (N, D).

        Args:
            features: the maps.
            gradient: of the convolution, from these images alone; None where it is not known.
        """
        target = features.cpu().unflatten(1, (len(self.weight), -1))  # (N, out, h w)
        size = target.square().mean((1, 2), keepdim=True).sqrt().clamp_min(torch.finfo(target.dtype).tiny)
        target, opened = target / size, (target > CLOSED * size).to(target)
        errors = None if gradient is None else gradient.errors.cpu().flatten(2) * opened
        generator = torch.Generator().manual_seed(SEED)
        waves = target.new_zeros(len(target), *self.image_shape)
        for round_ in range(ROUNDS):
            noise = FIRST_NOISE * (LAST_NOISE / FIRST_NOISE) ** (round_ / (ROUNDS - 1))
            outputs = self._outputs(waves) + self.constant
            positions = self._drawn(outputs.flatten(2) / size, target, noise, generator)
            equations = _Equations(self, positions, opened / (noise * size).square())
            if gradient is not None and noise < USES_GRADIENT:
                equations.count(gradient.weight.cpu(), errors, waves)
            waves = equations.solved(size * target, waves)
        return (self.prior.mean + self.prior.images(waves)).clamp(0, 1).to(features)

    def _drawn(self, outputs: Tensor, target: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        """(N, out, h w) positions, by how well the outputs there agree with the maximum, and others stay below it."""
        off = (outputs[:, :, self.window.clamp_min(0)] - target[..., None]) / noise
        below = torch.special.log_ndtr(-off)
        scores = below.sum(3, keepdim=True) - below - off.square() / 2
        scores = scores.masked_fill(self.window < 0, -torch.inf)
        chosen = torch.rand(scores.shape, generator=generator).clamp_min(1e-12).log().neg().log().neg().add_(scores)
        return self.window[torch.arange(len(self.window)), chosen.argmax(3)]

    def _outputs(self, waves: Tensor) -> Tensor:
        """The convolution's outputs (N, out, H', W') beyond those of the mean image."""
        return F.conv2d(self.prior.images(waves) / self.std, self.weight, **self.geometry)


class _Equations:
    """Linear equations for images, given the positions of maxima.

    Args:
        of: whose convolution.
        positions: (N, out, h w) in its outputs.
        weights: (N, out, h w) of the map's equations.
    """

    def __init__(self, of: PoolingPositions, positions: Tensor, weights: Tensor) -> None:
        self.of, self.positions, self.weights = of, positions, weights
        self.outer: Tensor | None = None

    def count(self, gradient: Tensor, errors: Tensor, waves: Tensor) -> None:
        """Let the gradient (out, c, kh, kw) count, each row by what these images leave unexplained of it."""
        self.outer = self._at_positions(errors)
        self.right = gradient - self._gradient(self.of.flat.expand(len(waves), -1, -1, -1))
        off = self.right - self._gradient(self.of.prior.images(waves) / self.of.std)
        least = ROUNDING * gradient.square().mean().sqrt()
        self.rows = 1 / off.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(least).square()

    def solved(self, target: Tensor, waves: Tensor) -> Tensor:
        """Waves nearer to the solution under the prior, by conjugate gradients."""
        constant = self.of.constant.flatten(2).expand(len(waves), -1, -1).gather(2, self.positions)
        right = self._adjoint(
            self.weights * (target - constant), None if self.outer is None else self.rows * self.right
        )
        off = right - self._normal(waves)
        direction, square = off, off.square().sum()
        for _ in range(STEPS):
            turned = self._normal(direction)
            step = square / (direction * turned).sum()
            waves, off = waves + step * direction, off - step * turned
            before, square = square, off.square().sum()
            direction = off + square / before * direction
        return waves

    def _normal(self, waves: Tensor) -> Tensor:
        images = self.of.prior.images(waves) / self.of.std
        outputs = F.conv2d(images, self.of.weight, **self.of.geometry).flatten(2).gather(2, self.positions)
        rows = None if self.outer is None else self.rows * self._gradient(images)
        return waves + self._adjoint(self.weights * outputs, rows)

    def _adjoint(self, values: Tensor, rows: Tensor | None) -> Tensor:
        """(N, C, H, W) waves of values (N, out, h w) at the positions, and of rows of the gradient."""
        shape = len(values), *self.of.image_shape
        images = conv2d_input(shape, self.of.weight, self._at_positions(values), **self.of.geometry)
        if rows is not None:
            images = images + conv2d_input(shape, rows, self.outer, **self.of.geometry)
        return self.of.prior.waves(images / self.of.std)

    def _gradient(self, images: Tensor) -> Tensor:
        return conv2d_weight(images, self.of.weight.shape, self.outer, **self.of.geometry)

    def _at_positions(self, values: Tensor) -> Tensor:
        """(N, out, H', W') values (N, out, h w) where the maxima were taken."""
        height, width = self.of.places
        found = values.new_zeros(*values.shape[:2], height * width)
        return found.scatter_add(2, self.positions, values).unflatten(2, (height, width))


def _cosines(size: int) -> Tensor:
    """(size, size) orthonormal cosine waves (DCT-II), one a row."""
    numbers = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * (numbers + 0.5) * numbers[:, None] / size) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.float()
