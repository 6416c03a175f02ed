"""Direct enhancement: images drawn from a diffusion model, given what was reconstructed. No original, no attack."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.diffusion.schedules import Karras, Schedule
from attack_modules.enhance.direct.diffpir import DiffPIR
from attack_modules.enhance.direct.sampler import Noise, Sampler
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.noise_level import likeliest_noise, noise_map
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError
from fl_lightning.seeds import seed_of

PRIOR = CHECKPOINTS / "prior_photos.safetensors"
"""The diffusion model that this project trains and ships."""

CANDIDATES = (0.01, 0.3, 9)
"""Least and most noise of a reconstruction that is looked for, and how many levels."""


class DirectEnhancement(Enhancer):
    """Posterior sampling with a diffusion model as prior, as in arXiv 2410.04661, section 4.3, and beyond.

    Of images that were upsampled from a smaller latent, block means are what is observed: they are nearer to those of
    the original than the latent is (on gradient matching's reconstructions, an rms error of 0.069 and not 0.091),
    because the latent overshoots to make up for the interpolation's blur. Images at full resolution are observed pixel
    by pixel.

    How noisy the observation is, is estimated image by image and, within it, place by place: under which noise the
    observation is likeliest by the very same diffusion model. A fixed level lets the noise of bad reconstructions
    through, and blurs good ones.

    Args:
        denoiser: the diffusion model; null for the one that this project ships.
        sampler: how images are drawn; null for `DiffPIR()`. The paper's is `DDRM`.
        schedule: noise levels of sampling; null for `Karras()`. At full resolution, as many steps lead from each
            image's own noise to a tenth of it.
        sigma_0: noise of what is observed, in units of [0, 1]; null to estimate it.
        window: side of the window in which noise is told apart from place to place, in observed pixels, odd; 0 for one
            noise level an image. Without effect if `sigma_0` is given.
        caution: factor on the estimated noise.
        temperature: factor on all noise that is drawn. At 1 the result is a sample of the posterior, with texture that
            may be invented; at 0 it is near the posterior's mean, which is smoother and nearer to the original.
            Under a Gaussian prior with the spectrum of photographs, DDRM in 4 steps is then 0.080 away from the truth,
            as is the posterior's mean; a sample is 0.092 away.
        samples: how many are averaged.
        magnify: the model works on images so many times larger, and the result is averaged down again: for a model of
            larger images than those of the attack.
        chunk_size: images that are enhanced at a time, which bounds memory and changes nothing else.

    Raises:
        SettingError: a setting that cannot be.
        MissingFile: no denoiser is given and the one of this project is not there.
    """

    def __init__(
        self,
        denoiser: Denoiser | None = None,
        sampler: Sampler | None = None,
        schedule: Schedule | None = None,
        sigma_0: float | None = None,
        window: int = 7,
        caution: float = 1.0,
        temperature: float = 0.0,
        samples: int = 1,
        magnify: int = 1,
        chunk_size: int = 16,
    ) -> None:
        if min(samples, magnify, chunk_size) < 1 or caution <= 0:
            raise SettingError(
                "`postprocess` needs samples, magnify and chunk_size >= 1 and caution > 0, but got "
                f"samples={samples}, magnify={magnify}, chunk_size={chunk_size}, caution={caution}."
            )
        if not 0 <= temperature <= 1 or (sigma_0 is not None and sigma_0 < 0):
            raise SettingError(
                "`postprocess` needs temperature in [0, 1] and sigma_0 >= 0 or null, but got "
                f"temperature={temperature}, sigma_0={sigma_0}."
            )
        if window < 0 or (window and window % 2 == 0):
            raise SettingError(f"`postprocess.window` is {window}, but it is an odd number of pixels, or 0 for none.")
        self.denoiser = denoiser or _shipped_prior()
        self.sampler = sampler or DiffPIR()
        self.schedule = schedule or Karras()
        self.sigma_0 = sigma_0
        self.window = window
        self.caution = caution
        self.temperature = temperature
        self.samples = samples
        self.magnify = magnify
        self.chunk_size = chunk_size

    @torch.no_grad()
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        images = reconstruction.images.float()
        if not len(images):
            return images
        self.denoiser.to(images.device)
        numbers = torch.arange(len(images)) if reconstruction.numbers is None else reconstruction.numbers
        enhanced = []
        with torch.autocast(images.device.type, enabled=False):  # differences of neighbouring noise levels are small
            for indices in torch.arange(len(images)).split(self.chunk_size):
                # Each image has its own numbers, so that chunks are only a matter of memory.
                generators = [torch.Generator().manual_seed(seed_of(seed, n)) for n in numbers[indices].tolist()]
                chunk = images[indices.to(images.device)]
                enhanced.append(self._mean_sample(chunk, reconstruction.latent_downscale, generators))
        return torch.cat(enhanced).clamp(0, 1)

    def _mean_sample(self, images: Tensor, latent_downscale: int, generators: list[torch.Generator]) -> Tensor:
        """The mean of samples of the posterior, given images (n, C, H, W) that were upsampled by a factor."""
        observed = F.avg_pool2d(images, latent_downscale)
        sigma_y = self._noise_of(observed, generators)
        start = F.interpolate(images, scale_factor=self.magnify, mode="bicubic") if self.magnify > 1 else images
        pixelwise = start.shape == observed.shape
        sigmas = self._falling(sigma_y, len(images)) if pixelwise else self.schedule(self.denoiser).to(images)
        noise = _drawing(generators, start, self.temperature)
        samples = [self.sampler(self._denoise, observed, sigma_y, sigmas, start, noise) for _ in range(self.samples)]
        return F.avg_pool2d(torch.stack(samples).mean(0), self.magnify)

    def _falling(self, sigma_y: Tensor, count: int) -> Tensor:
        """(T, n) from the most noise of each image to a tenth of it."""
        first = sigma_y.expand(count, -1, -1, -1).amax((1, 2, 3))
        falling = torch.logspace(0, -1, self.schedule.steps, device=first.device)
        return (falling[:, None] * first).clamp(self.denoiser.sigma_min, self.denoiser.sigma_max)

    def _noise_of(self, observed: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Standard deviation of the noise in observed images (n, C, h, w): (n or 1, 1, 1 or h, 1 or w)."""
        if self.sigma_0 is not None:
            return observed.new_full((1, 1, 1, 1), self.sigma_0)
        low, high, count = CANDIDATES
        candidates = torch.logspace(0, 1, count, high / low).to(observed) * low
        noise = _drawing(generators, observed)
        sigma = likeliest_noise(self._denoise, observed, candidates, noise)
        if not self.window:
            return self.caution * sigma[:, None, None, None]
        return self.caution * noise_map(self._denoise, observed, sigma, self.window, noise)

    def _denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser for images of any size and of 1 or 3 channels; grey ones are shown to it as RGB."""
        height, width = noisy.shape[-2:]
        bottom, right = -height % self.denoiser.multiple, -width % self.denoiser.multiple
        mode = "reflect" if bottom < height and right < width else "replicate"
        shown = F.pad(noisy, (0, right, 0, bottom), mode).expand(-1, 3, -1, -1)
        clean = self.denoiser(shown, sigma)[..., :height, :width]
        return clean if noisy.shape[1] == 3 else clean.mean(1, keepdim=True)


def _drawing(generators: list[torch.Generator], like: Tensor, scale: float = 1.0) -> Noise:
    """Normal numbers in the shape of (N, ...) images, each image's from its own generator, on any device."""

    def draw() -> Tensor:
        drawn = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return scale * torch.stack(drawn).to(like)

    return draw


def _shipped_prior() -> Denoiser:
    from attack_modules.diffusion.trained.photo_prior import TrainedPrior  # a user of another model does not need it

    return TrainedPrior.load(PRIOR)
