"""Which noise levels a sampler passes through."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attack_modules.diffusion.denoiser import Denoiser
from fl_lightning.errors import SettingError


class Schedule(ABC):
    """Noise levels from much noise to little.

    Args:
        steps: how many, each of which costs one evaluation of the denoiser.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise SettingError(f"A schedule needs at least one step, but `steps` is {steps}.")
        self.steps = steps

    @abstractmethod
    def __call__(self, denoiser: Denoiser) -> Tensor:
        """(steps,) falling noise levels of images in [0, 1], within what the denoiser was trained on."""


class Karras(Schedule):
    """Even in sigma^(1/7), from a first to the least noise (Karras et al. 2022, arXiv 2206.00364, equation 5).

    Args:
        steps: how many levels, each of which costs one evaluation of the denoiser.
        first: the first level, in units of [0, 1]; lowered to the denoiser's most.
        last: the last; raised to the denoiser's least.
    """

    def __init__(self, steps: int = 20, first: float = 0.3, last: float = 0.02) -> None:
        super().__init__(steps)
        if not 0 < last < first:
            raise SettingError(f"A schedule falls from `first` to `last` > 0, but they are {first} and {last}.")
        self.first = first
        self.last = last

    def __call__(self, denoiser: Denoiser) -> Tensor:
        first, last = min(self.first, denoiser.sigma_max), max(self.last, denoiser.sigma_min)
        return torch.linspace(first ** (1 / 7), last ** (1 / 7), self.steps, dtype=torch.float64).pow(7).float()


class LinearBetas(Schedule):
    """Every so many of the 1000 times of a diffusion with linear betas from 1e-4 to 0.02 (Ho et al. 2020).

    Args:
        steps: how many times, each of which costs one evaluation of the denoiser; a divisor of 1000.
    """

    def __init__(self, steps: int = 50) -> None:
        super().__init__(steps)
        if 1000 % steps:
            raise SettingError(f"`steps` is {steps}, which does not divide 1000 times evenly. Take a divisor.")

    def __call__(self, denoiser: Denoiser) -> Tensor:
        sigmas = linear_beta_sigmas()[:: 1000 // self.steps].flip(0) / 2
        return sigmas.clamp(denoiser.sigma_min, denoiser.sigma_max).float()


def linear_beta_sigmas() -> Tensor:
    """(1000,) float64 noise levels, rising, of images in [-1, 1] at the times of a diffusion with linear betas."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return ((1 - alpha_bar) / alpha_bar).sqrt()
