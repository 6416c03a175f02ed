"""Class-conditional diffusion models as the semantic enhancement asks for them: noise that is predicted, a decoder."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attack_modules.diffusion.classes import ImageClass


class ConditionalModel(nn.Module, ABC):
    """A diffusion model of latents given an image's class, and the latents' decoder.

    Time is discrete: at timestep t the noisy latent is `sqrt(alphas[t]) x + sqrt(1 - alphas[t]) n`.
    """

    classes: Sequence[ImageClass]
    """The classes that it knows, in the order of its labels."""
    image_size: int
    """Height and width of its images, in pixels; they are RGB."""
    latent_shape: tuple[int, int, int]
    """(channels, height, width) of a latent."""
    alphas: Tensor
    """(T,) share of the signal's variance at each timestep, falling; `alpha bar` in DDPM (arXiv 2006.11239)."""

    @abstractmethod
    def noise(self, latents: Tensor, timestep: int, labels: Tensor) -> Tensor:
        """The noise in noisy latents, under the model's own classifier-free guidance.

        Args:
            latents: (N, *latent_shape).
            timestep: 0 to T - 1.
            labels: (N,) long.

        Returns:
            (N, *latent_shape).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(N, *latent_shape) clean latents -> (N, 3, image_size, image_size) images in [0, 1], not clamped."""


class Sample(NamedTuple):
    """What came of some initial noise."""

    latents: Tensor
    """(N, *latent_shape) clean latents."""
    gain: float
    """d latents / d initial noise, one number for all, if what the model predicted on the way is held constant."""


def explicit_timesteps(steps: int, total: int) -> list[int]:
    """`steps` of the timesteps 0 to total - 1, evenly spaced with both ends, from the noisiest down.

    They are those of DDPM's respacing, as used by DiT and MDT. The gaps differ by one here and there, so a sampler has
    to step over the list itself; one that assumes equal gaps is 1.5 % off after 250 steps.
    """
    return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0).tolist()


@torch.no_grad()
def ddim(model: ConditionalModel, noise: Tensor, labels: Tensor, timesteps: list[int]) -> Sample:
    """Deterministic DDIM (arXiv 2010.02502, equation 12 with sigma = 0) over the given timesteps, to noise zero.

    A step is linear in latents and predicted noise, so that with the predictions held constant the sample is an affine
    function of the initial noise. Its slope is the product of `sqrt(alpha_next / alpha)` over the steps.

    Args:
        model: what predicts the noise.
        noise: (N, *latent_shape) standard normal.
        labels: (N,) long.
        timesteps: falling.
    """
    latents = noise
    alphas = [float(model.alphas[t]) for t in timesteps]
    for timestep, alpha, following in zip(timesteps, alphas, [*alphas[1:], 1.0], strict=True):
        predicted = model.noise(latents, timestep, labels)
        clean = (latents - (1 - alpha) ** 0.5 * predicted) / alpha**0.5
        latents = following**0.5 * clean + (1 - following) ** 0.5 * predicted
    return Sample(latents, alphas[0] ** -0.5)


def linear_alphas(total: int = 1000, first: float = 1e-4, last: float = 2e-2) -> Tensor:
    """(total,) `alpha bar` of DDPM's linear betas, float64."""
    return (1 - torch.linspace(first, last, total, dtype=torch.float64)).cumprod(0)


def edm_alphas(total: int = 1000, sigma_min: float = 0.02, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """(total,) `alpha bar` whose noise levels sigma are evenly spaced in sigma^(1/rho) (EDM, equation 5), float64."""
    sigmas = torch.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), total, dtype=torch.float64) ** rho
    return 1 / (1 + sigmas.square())
