"""What every enhancement asks of a diffusion model: the expected clean image."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Denoiser(nn.Module, ABC):
    """A diffusion model in the one form that all its users share: the mean of the posterior under Gaussian noise.

    Whatever a network predicts (noise, velocity, the image) and in whatever range, its adapter gives `E[x | y]` for
    `y = x + sigma * n`, with images in [0, 1] and `sigma` in the same units (Tweedie's formula; variance exploding, as
    DDRM, arXiv 2201.11793, and EDM, arXiv 2206.00364, write it).
    """

    sigma_min: float
    """The least noise that the network was trained on, in units of [0, 1]."""
    sigma_max: float
    """The most."""
    multiple: int
    """Height and width must be multiples of this many pixels."""

    @abstractmethod
    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The expected clean images.

        Args:
            noisy: (N, 3, H, W) images in [0, 1] plus Gaussian noise, not clamped.
            sigma: () or (N,) standard deviation of that noise, from `sigma_min` to `sigma_max`.

        Returns:
            (N, 3, H, W), not clamped.
        """
