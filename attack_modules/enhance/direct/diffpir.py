"""DiffPIR (Zhu et al. 2023, arXiv 2305.08995): plug and play with a diffusion model."""

from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.sampler import Denoise, Noise, Sampler, upsample
from fl_lightning.errors import SettingError


class DiffPIR(Sampler):
    """Images that are likely under the denoiser, and near to what was observed as far as that is sure.

    Algorithm 1 of the paper, whose proximal step has a closed form: of blocks of one pixel it is a weighted mean.

    Args:
        strength: the paper's lambda, weight of the prior beside the observation.
        zeta: share of fresh noise in every step, in [0, 1]; with 0 nothing is random but the start. With all of it a
            wrong guess is soonest forgotten, and where the noise drawn is zero, nothing of an iterate is kept but its
            denoised image, as in plug and play by half-quadratic splitting.

    Raises:
        SettingError: a strength that is not positive, or a share outside [0, 1].
    """

    def __init__(self, strength: float = 0.3, zeta: float = 1.0) -> None:
        if strength <= 0 or not 0 <= zeta <= 1:
            raise SettingError(
                f"DiffPIR needs strength > 0 and zeta in [0, 1], but got strength={strength}, zeta={zeta}."
            )
        self.strength = strength
        self.zeta = zeta

    def __call__(
        self, denoise: Denoise, means: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noise: Noise
    ) -> Tensor:
        """See `Sampler`; with noise of zeros the result comes near to the posterior's mean.

        Noise is drawn at the start and, unless zeta is 0, before each further level.
        """
        factor = start.shape[-1] // means.shape[-1]
        levels = sigmas.view(len(sigmas), -1, 1, 1, 1)
        # Where the start is noisier than the first level it already is the iterate.
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
