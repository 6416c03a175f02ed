"""Interface of diffusion models that are used as denoisers."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Denoiser(nn.Module, ABC):
    """Diffusion model as a Gaussian denoiser that returns the posterior mean of the clean image.

    Subclasses adapt networks that predict the noise, the velocity or the image, in any pixel range. All return
    `E[x | y]` for `y = x + sigma * n` (Tweedie's formula), with images in [0, 1] and `sigma` in the same units. This is
    the variance-exploding parameterisation of DDRM (arXiv 2201.11793) and EDM (arXiv 2206.00364).
    """

    sigma_min: float
    """Lowest noise level of training, in units of [0, 1]."""
    sigma_max: float
    """Highest noise level of training, in units of [0, 1]."""
    multiple: int
    """Image height and width must be multiples of this number of pixels."""

    @abstractmethod
    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the posterior mean of the clean images.

        Args:
            noisy: (N, 3, H, W) images in [0, 1] plus Gaussian noise, not clamped.
            sigma: () or (N,) standard deviation of that noise, from `sigma_min` to `sigma_max`.

        Returns:
            (N, 3, H, W) images, not clamped.
        """
