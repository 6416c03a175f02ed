"""What all samplers share: they draw images that are likely under a denoiser, given block means of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(N, C, H, W) noisy images, () or (N,) noise level -> (N, C, H, W) expected clean images."""
Noise = Callable[[], Tensor]
"""Fresh standard normal numbers (N, C, H, W)."""


class Sampler(ABC):
    """Goes through falling noise levels, one evaluation of the denoiser each.

    The mean over blocks of r x r pixels needs no decomposition by computer: all its singular values are 1/r, and what
    it sees of an image is the image with every block replaced by its mean. Blocks share no pixel, so that each may have
    a noise level of its own. Blocks of one pixel are the image itself.
    """

    @abstractmethod
    def __call__(
        self, denoise: Denoise, means: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noise: Noise
    ) -> Tensor:
        """One image for every image of block means.

        Variance exploding throughout: x_t = x + sigma_t n, with no factor on x.

        Args:
            denoise: the prior.
            means: (N, C, H/r, W/r) observed block means of images in [0, 1], plus noise.
            sigma_y: () or any shape that broadcasts to `means`: standard deviation of that noise.
            sigmas: (T,) or (T, N) noise levels, falling, the same for all images or each one's own.
            start: (N, C, H, W) expected images before anything is observed.
            noise: the only source of chance.

        Returns:
            (N, C, H, W), not clamped.
        """


def upsample(means: Tensor, factor: int) -> Tensor:
    """(N, C, h, w) -> (N, C, h * factor, w * factor), every value repeated."""
    return means.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
