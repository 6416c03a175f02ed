"""Feature inversion guided by a diffusion model: plug and play."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.diffusion.trained.photo_prior import TrainedPrior
from attack_modules.feature_inversion.inversion import FeatureInversion
from fl_lightning.errors import SettingError


class GuidedInversion(FeatureInversion):
    """Feature inversion whose images are drawn towards what a denoiser makes of them.

    It pays with ResNets, whose features are fewer than the pixels, so that total variation alone soon comes to its end.
    With LeNet5, fresh or trained, it gains little, and that only in several times the time.

    Every `denoise_every` steps each image x is denoised, `z = D(x, sigma)`; until the next time `|x - z|^2 / sigma^2`,
    a mean over the pixels, is a penalty (half-quadratic splitting as in DiffPIR, arXiv 2305.08995; with Adam in place
    of the proximal step, its gradient is that of RED, arXiv 1611.02862). Nothing is differentiated through the network.

    The noise level follows what the attacker sees, image by image: `sigma` is proportional to the root of the relative
    feature error. It falls as the image emerges, and ends where the leak's own error ends, which no image can explain.

    Args:
        denoiser: a diffusion prior that `DiffusionPrior` exported, or any `Denoiser`; for RGB images.
        weight: of the penalty, beside log E and `balance` log P.
        sigma_per_error: sigma, in units of [0, 1], for a relative feature error (not squared) of one.
        sigma_start: the largest sigma, which the first steps would surpass.
        denoise_every: steps between denoisings.
        settings: those of `FeatureInversion`.
    """

    def __init__(
        self,
        denoiser: Path | Denoiser,
        weight: float = 0.5,
        sigma_per_error: float = 1.5,
        sigma_start: float = 0.1,
        denoise_every: int = 12,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if weight < 0 or min(sigma_per_error, sigma_start) <= 0 or denoise_every < 1:
            raise SettingError(
                "`model` needs weight >= 0, sigma_per_error > 0, sigma_start > 0 and denoise_every >= 1, but got "
                f"weight={weight}, sigma_per_error={sigma_per_error}, sigma_start={sigma_start}, "
                f"denoise_every={denoise_every}."
            )
        prior = denoiser if isinstance(denoiser, Denoiser) else TrainedPrior.load(denoiser)
        self._denoiser = (prior.requires_grad_(False).eval(),)  # no submodule: it is not this attack's to save
        self.weight = weight
        self.sigma_per_error = sigma_per_error
        self.sigma_start = sigma_start
        self.denoise_every = denoise_every

    def configure_model(self) -> None:
        if hasattr(self, "images"):
            return
        super().configure_model()
        channels, height, width = self.images.shape[1:]
        multiple = self.denoiser.multiple
        if channels != 3 or height % multiple or width % multiple:
            raise SettingError(
                f"The denoiser takes RGB images whose height and width are multiples of {multiple}, but the attacked "
                f"model's are {channels} x {height} x {width}. Choose another `data.image_size`, or `FeatureInversion`."
            )
        self.denoiser.to(self.trainer.strategy.root_device)
        self.register_buffer("denoised", self.images.detach().clone())
        self.register_buffer("sigmas", torch.full((len(self.images),), torch.inf))  # of that denoising; none so far
        self.register_buffer("errors", torch.ones(len(self.images)))  # relative feature errors, squared, of last time

    @property
    def denoiser(self) -> Denoiser:
        return self._denoiser[0]

    @property
    def sigma(self) -> Tensor:
        """(N,) noise level at which each image would be denoised now."""
        sigma = self.sigma_per_error * self.errors.sqrt()
        return sigma.clamp(self.denoiser.sigma_min, min(self.sigma_start, self.denoiser.sigma_max))

    def training_step(self, batch: int, batch_idx: int) -> None:
        if self.global_step and self.global_step % self.denoise_every == 0:
            self._denoise()
        super().training_step(batch, batch_idx)

    @torch.no_grad()
    def _denoise(self) -> None:
        def denoise(chunk: Tensor) -> Tensor:
            images = self.images[chunk].contiguous(memory_format=torch.channels_last)
            return self.denoiser(images, self.sigmas[chunk]).clamp(0, 1)

        self.sigmas.copy_(self.sigma)
        self.ranks.gather(self.denoised, denoise, self.chunk_size)
        self.log("sigma", self.sigmas.mean())

    def guidance(self, images: Tensor, chunk: Tensor) -> Tensor:
        return self.weight * (images - self.denoised[chunk]).square().mean((1, 2, 3)) / self.sigmas[chunk].square()

    @torch.no_grad()
    def _remember(self, errors: Tensor, losses: Tensor) -> None:
        """Keep the last iterate: losses of different steps have different penalties, and the rate falls to zero."""
        self.best.copy_(self.images)
        self.errors.copy_(errors)

    def introduction(self) -> str:
        return (
            f"{super().introduction()}\nGuided by {type(self.denoiser).__name__}: denoised every "
            f"{self.denoise_every} steps, at sigma {self.sigma_per_error:g} times the relative feature error."
        )
