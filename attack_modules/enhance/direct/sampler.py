"""Common interface of all samplers: they draw images under a diffusion prior, given measured block means."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(N, C, H, W) noisy images, () or (N,) noise level -> (N, C, H, W) posterior mean of the clean images."""
Noise = Callable[[], Tensor]
"""Draws fresh normal noise (N, C, H, W); standard normal unless scaled by a temperature."""


class Sampler(ABC):
    """Samples over decreasing noise levels, with one denoiser evaluation per level.

    The measurement averages blocks of r x r pixels. It needs no numerical SVD: all its singular values are 1/r, and the
    projection onto its row space replaces every block by its mean. Blocks are disjoint, so each may have its own noise
    level. With blocks of one pixel, the measurement is the image itself.
    """

    @abstractmethod
    def __call__(
        self, denoise: Denoise, means: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noise: Noise
    ) -> Tensor:
        """Draw one image for each image of block means.

        The variance-exploding form is used throughout: x_t = x + sigma_t n, with no factor on x.

        Args:
            denoise: denoiser of the diffusion prior.
            means: (N, C, H/r, W/r) measured block means of images in [0, 1], plus noise.
            sigma_y: standard deviation of that noise, () or any shape that broadcasts to `means`.
            sigmas: (T,) noise levels of all images or (T, N) of each image, decreasing.
            start: (N, C, H, W) expected images before the measurement is used.
            noise: the only source of randomness.

        Returns:
            (N, C, H, W), not clamped.
        """


def upsample(means: Tensor, factor: int) -> Tensor:
    """Nearest-neighbour upsampling: (N, C, h, w) -> (N, C, h * factor, w * factor)."""
    return means.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
