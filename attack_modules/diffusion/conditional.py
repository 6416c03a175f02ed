"""Interface of class-conditional diffusion models for semantic enhancement, with DDIM sampling."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attack_modules.diffusion.classes import ImageClass
from fl_lightning.errors import SettingError


class ConditionalModel(nn.Module, ABC):
    """Class-conditional latent diffusion model: a noise predictor and a latent decoder.

    Timesteps are discrete: the noisy latent at timestep t is `sqrt(alphas[t]) x + sqrt(1 - alphas[t]) n`.
    """

    classes: Sequence[ImageClass]
    """Classes of the model, in label order."""
    image_size: int
    """Height and width of the RGB images, in pixels."""
    latent_shape: tuple[int, int, int]
    """Shape of a latent: (channels, height, width)."""
    alphas: Tensor
    """(T,) fraction of signal variance at each timestep, decreasing; `alpha bar` in DDPM (arXiv 2006.11239)."""

    @abstractmethod
    def noise(self, latents: Tensor, timestep: int, labels: Tensor) -> Tensor:
        """Predict the noise in noisy latents, with the model's own classifier-free guidance.

        Args:
            latents: (N, *latent_shape) noisy latents.
            timestep: timestep of all latents, 0 to T - 1.
            labels: (N,) class labels, long.

        Returns:
            (N, *latent_shape) predicted noise.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode (N, *latent_shape) latents to (N, 3, image_size, image_size) images in [0, 1], not clamped."""


class Sample(NamedTuple):
    """Result of sampling from given initial noise."""

    latents: Tensor
    """(N, *latent_shape) clean latents."""
    gain: float
    """d latents / d initial noise with the predicted noise held constant: one scalar for all elements."""


def explicit_timesteps(steps: int, total: int) -> list[int]:
    """Return `steps` evenly spaced timesteps from total - 1 down to 0, both included; a single one is 0.

    They equal the respacing of guided diffusion, DiT and MDT (`space_timesteps`), which adds up the stride in floating
    point and rounds half to even: the middle of 21 in 1000 is 499, because the sum falls just short of 499.5. Rounding
    makes some gaps differ by one, so a sampler has to iterate over this list; assuming equal gaps causes an error of
    1.5 % after 250 steps.

    Raises:
        SettingError: `steps` is not from 1 to `total`.
    """
    if not 1 <= steps <= total:
        raise SettingError(
            f"`timesteps` is {steps}, but the diffusion model has {total}. Give a number from 1 to {total}."
        )
    stride = (total - 1) / max(steps - 1, 1)
    return [round(place) for place in accumulate(repeat(stride, steps - 1), initial=0.0)][::-1]


@torch.no_grad()
def ddim(model: ConditionalModel, noise: Tensor, labels: Tensor, timesteps: list[int]) -> Sample:
    """Sample with deterministic DDIM (arXiv 2010.02502, equation 12 with sigma = 0) down to zero noise.

    Each step is linear in the latents and the predicted noise. With the predictions held constant, the sample is
    therefore an affine function of the initial noise, whose slope is the product of `sqrt(alpha_next / alpha)`.

    Args:
        model: the noise predictor.
        noise: (N, *latent_shape) initial noise, standard normal.
        labels: (N,) class labels, long.
        timesteps: decreasing timesteps.

    Returns:
        The clean latents and the slope (`gain`).
    """
    latents = noise
    alphas = [float(model.alphas[t]) for t in timesteps]
    for timestep, alpha, following in zip(timesteps, alphas, [*alphas[1:], 1.0], strict=True):
        predicted = model.noise(latents, timestep, labels)
        clean = (latents - (1 - alpha) ** 0.5 * predicted) / alpha**0.5
        latents = following**0.5 * clean + (1 - following) ** 0.5 * predicted
    return Sample(latents, alphas[0] ** -0.5)
