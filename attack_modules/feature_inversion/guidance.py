"""Guidance: a diffusion model in the loop of feature inversion (plug and play)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.simulation.distributed import Ranks
from attack_modules.threat_model.requirements import ImageSize, Requirement
from fl_lightning.errors import SettingError, non_negative, positive


class DiffusionGuidance(nn.Module):
    """A penalty that draws images towards their denoised versions.

    It pays with ResNets, whose features are fewer than the pixels, so that total variation alone reaches its limit
    early. With LeNet5, fresh or trained, it gains little in several times the time.

    Every `denoise_every` steps each image x is denoised, `z = D(x, sigma)`. Until the next time, `|x - z|^2 / sigma^2`,
    averaged over the pixels, is a penalty (half-quadratic splitting as in DiffPIR, arXiv 2305.08995; with Adam instead
    of the proximal step, its gradient is that of RED, arXiv 1611.02862). Nothing is differentiated through the network.

    The noise level follows each image's data consistency: `sigma` is proportional to the root of its relative squared
    feature error. It falls while the image improves, down to the error of the leaked features themselves.

    Args:
        denoiser: a file that `DiffusionPrior` exported, or any `Denoiser`; for RGB images.
        weight: of the penalty, beside log E and `balance` log P.
        sigma_per_error: sigma, in units of [0, 1], at a relative feature error (not squared) of one.
        sigma_start: upper limit of sigma, which holds for the first steps.
        denoise_every: steps between denoisings.
    """

    def __init__(
        self,
        denoiser: Path | Denoiser,
        weight: float = 0.5,
        sigma_per_error: float = 1.5,
        sigma_start: float = 0.1,
        denoise_every: int = 12,
    ) -> None:
        super().__init__()
        if not non_negative(weight) or not positive(sigma_per_error, sigma_start) or denoise_every < 1:
            raise SettingError(
                "`guidance` needs weight >= 0, sigma_per_error > 0, sigma_start > 0 and denoise_every >= 1, but got "
                f"weight={weight}, sigma_per_error={sigma_per_error}, sigma_start={sigma_start}, "
                f"denoise_every={denoise_every}."
            )
        prior = denoiser if isinstance(denoiser, Denoiser) else _trained(denoiser)
        self._denoiser = (prior.requires_grad_(False).eval(),)  # a tuple, so that checkpoints do not hold it
        self.weight = weight
        self.sigma_per_error = sigma_per_error
        self.sigma_start = sigma_start
        self.denoise_every = denoise_every

    @property
    def denoiser(self) -> Denoiser:
        """The diffusion prior."""
        return self._denoiser[0]

    def requirements(self) -> list[Requirement]:
        """Images that the denoiser accepts."""
        return [ImageSize(self.denoiser.multiple, rgb=True, reason="set `model.guidance: null`")]

    def start(self, images: Tensor) -> None:
        """Begin with images (N, C, H, W) that were not denoised yet, in their precision and where they lie."""
        self.denoiser.to(images.device, images.dtype)
        self.register_buffer("denoised", images.clone())
        self.register_buffer("sigmas", torch.full((len(images),), torch.inf))  # of the last denoising
        self.register_buffer("errors", torch.ones(len(images)))  # relative squared feature errors of the last step

    @property
    def sigma(self) -> Tensor:
        """(N,) noise level at which each image would be denoised now."""
        sigma = self.sigma_per_error * self.errors.sqrt()
        return sigma.clamp(self.denoiser.sigma_min, min(self.sigma_start, self.denoiser.sigma_max))

    def denoises_at(self, step: int) -> bool:
        """Whether the images are denoised at this step."""
        return step > 0 and step % self.denoise_every == 0

    @torch.no_grad()
    def denoise(self, images: Tensor, ranks: Ranks, chunk_size: int) -> None:
        """Denoise the current images (N, C, H, W), which the penalty then refers to."""

        def denoise(chunk: Tensor) -> Tensor:
            noisy = images[chunk].contiguous(memory_format=torch.channels_last)
            return self.denoiser(noisy, self.sigmas[chunk]).clamp(0, 1)

        self.sigmas.copy_(self.sigma)
        ranks.gather(self.denoised, denoise, chunk_size)

    def penalty(self, images: Tensor, chunk: Tensor) -> Tensor:
        """(n,) weighted penalty of images (n, C, H, W) with the indices `chunk` (n,)."""
        return self.weight * (images - self.denoised[chunk]).square().mean((1, 2, 3)) / self.sigmas[chunk].square()

    def introduction(self) -> str:
        """How images are guided, in one line."""
        return (
            f"Guidance: {type(self.denoiser).__name__} denoises every {self.denoise_every} steps, at sigma "
            f"{self.sigma_per_error:g} times the relative feature error."
        )


def _trained(path: Path) -> Denoiser:
    from attack_modules.diffusion.trained.photo_prior import TrainedPrior  # loads diffusers

    return TrainedPrior.load(path)
