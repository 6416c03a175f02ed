"""DiffPIR (Zhu et al. 2023, arXiv 2305.08995): plug-and-play image restoration with a diffusion model."""

from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.sampler import Denoise, Noise, Sampler, upsample
from fl_lightning.errors import SettingError, positive


class DiffPIR(Sampler):
    """Alternates denoising with data consistency, weighted by the noise levels of iterate and measurement.

    This is Algorithm 1 of the paper. Its proximal step has a closed form for block means; for blocks of one pixel it is
    a weighted mean of denoised image and measurement.

    Args:
        strength: the paper's lambda, the weight of the prior relative to the measurement.
        zeta: fraction of fresh noise in every step, in [0, 1]. At 0, only the start is random. At 1, errors of earlier
            iterates are forgotten fastest; if the noise drawn is zero as well, only the denoised image of an iterate is
            kept, as in plug-and-play half-quadratic splitting.

    Raises:
        SettingError: `strength` is not positive, or `zeta` is outside [0, 1].
    """

    def __init__(self, strength: float = 0.3, zeta: float = 1.0) -> None:
        if not positive(strength) or not 0 <= zeta <= 1:
            raise SettingError(
                f"DiffPIR needs strength > 0 and zeta in [0, 1], but got strength={strength}, zeta={zeta}."
            )
        self.strength = strength
        self.zeta = zeta

    def __call__(
        self, denoise: Denoise, means: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noise: Noise
    ) -> Tensor:
        """Draw samples, see `Sampler`; with zero noise the result approximates the posterior mean.

        Noise is drawn at the start and, unless `zeta` is 0, before each further level.
        """
        factor = start.shape[-1] // means.shape[-1]
        levels = sigmas.view(len(sigmas), -1, 1, 1, 1)
        # A start that is noisier than the first level already is the first iterate.
        inherent = upsample(sigma_y.expand(means.shape), factor)
        x = start + (levels[0] ** 2 - inherent**2).clamp_min(0).sqrt() * noise()
        for step, level in enumerate(levels):
            clean = denoise(x, sigmas[step])
            gain = 1 / (1 + self.strength * (factor * sigma_y / level) ** 2)
            clean = clean + upsample(gain * (means - F.avg_pool2d(clean, factor)), factor)
            if step + 1 == len(levels):
                return clean
            fresh = noise() if self.zeta else 0.0
            x = clean + levels[step + 1] * ((1 - self.zeta) ** 0.5 * (x - clean) / level + self.zeta**0.5 * fresh)
