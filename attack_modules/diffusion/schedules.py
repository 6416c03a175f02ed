"""Noise level schedules of samplers."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attack_modules.diffusion.denoiser import Denoiser
from fl_lightning.errors import SettingError, positive


class Schedule(ABC):
    """Decreasing sequence of noise levels.

    Args:
        steps: number of noise levels; each costs one denoiser evaluation.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise SettingError(f"A schedule needs at least one step, but `steps` is {steps}. Set it to 1 or more.")
        self.steps = steps

    @abstractmethod
    def __call__(self, denoiser: Denoiser) -> Tensor:
        """Return the (steps,) decreasing noise levels for images in [0, 1], within the range of the denoiser."""


class Karras(Schedule):
    """Noise levels evenly spaced in sigma^(1/7) (Karras et al. 2022, arXiv 2206.00364, equation 5).

    Args:
        steps: number of noise levels; each costs one denoiser evaluation.
        first: first and highest level, in units of [0, 1]; lowered to the denoiser's `sigma_max` if it is above.
        last: last and lowest level, in units of [0, 1]; raised to the denoiser's `sigma_min` if it is below.

    Raises:
        SettingError: `steps` < 1, or not 0 < `last` < `first`.
    """

    def __init__(self, steps: int = 20, first: float = 0.3, last: float = 0.02) -> None:
        super().__init__(steps)
        if not 0 < last < first or not positive(first):
            raise SettingError(f"A schedule falls from `first` to `last` > 0, but got first={first}, last={last}.")
        self.first = first
        self.last = last

    def __call__(self, denoiser: Denoiser) -> Tensor:
        first = max(min(self.first, denoiser.sigma_max), denoiser.sigma_min)
        last = min(max(self.last, denoiser.sigma_min), first)
        return karras_sigmas(self.steps, first, last).float()


class LinearBetas(Schedule):
    """Noise levels of evenly spaced timesteps of a 1000-step diffusion with linear betas (Ho et al. 2020).

    The betas rise from 1e-4 to 0.02. Levels outside the range of the denoiser are clamped to it.

    Args:
        steps: number of timesteps, a divisor of 1000; each costs one denoiser evaluation.

    Raises:
        SettingError: `steps` < 1, or not a divisor of 1000.
    """

    def __init__(self, steps: int = 50) -> None:
        super().__init__(steps)
        if 1000 % steps:
            raise SettingError(f"`steps` is {steps}, which does not divide 1000. Set it to a divisor, such as 50.")

    def __call__(self, denoiser: Denoiser) -> Tensor:
        sigmas = linear_beta_sigmas()[:: 1000 // self.steps].flip(0) / 2
        return sigmas.clamp(denoiser.sigma_min, denoiser.sigma_max).float()


def karras_sigmas(count: int, first: float, last: float) -> Tensor:
    """Return (count,) float64 noise levels evenly spaced in sigma^(1/7), from `first` to `last` (EDM, equation 5)."""
    return torch.linspace(first ** (1 / 7), last ** (1 / 7), count, dtype=torch.float64) ** 7


def linear_beta_alphas() -> Tensor:
    """Return the (1000,) float64 `alpha bar` of DDPM's linear betas, decreasing (arXiv 2006.11239)."""
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def linear_beta_sigmas() -> Tensor:
    """Return the (1000,) float64 increasing noise levels of a linear-beta diffusion, for images in [-1, 1]."""
    alpha_bar = linear_beta_alphas()
    return ((1 - alpha_bar) / alpha_bar).sqrt()
