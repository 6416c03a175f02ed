"""DDRM (Kawar et al. 2022, arXiv 2201.11793) for block means; the paper's equations apply per coefficient."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.sampler import Denoise, Noise, Sampler, upsample
from fl_lightning.errors import SettingError


class DDRM(Sampler):
    """Denoising diffusion restoration models (DDRM).

    The first iterate is scaled like all later ones, as in the paper. The authors' code divides it by sigma_T instead,
    which matters for small sigma_T.

    Args:
        eta: fraction of fresh noise in unmeasured components, and where the iterate is less noisy than the
            measurement, in [0, 1].
        eta_b: weight of the measurement where the iterate is noisier than it, in [0, 1].

    Raises:
        SettingError: `eta` or `eta_b` is outside [0, 1].
    """

    def __init__(self, eta: float = 0.85, eta_b: float = 1.0) -> None:
        if not (0 <= eta <= 1 and 0 <= eta_b <= 1):
            raise SettingError(f"DDRM needs eta and eta_b in [0, 1], but got eta={eta}, eta_b={eta_b}.")
        self.eta = eta
        self.eta_b = eta_b

    def __call__(
        self, denoise: Denoise, means: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noise: Noise
    ) -> Tensor:
        """Draw samples, see `Sampler`; the last denoised images are the result, and noise is drawn once per level."""
        factor = start.shape[-1] // means.shape[-1]
        observed = upsample(means, factor)  # the paper's y-bar, in pixel space
        known = upsample((factor * sigma_y).expand(means.shape), factor)  # its noise level: sigma_y / singular value
        levels = sigmas.view(len(sigmas), -1, 1, 1, 1)

        def combine(seen: Tensor, unseen: Tensor) -> Tensor:
            """Combine the block means of `seen` with the within-block detail of `unseen`."""
            return unseen + upsample(F.avg_pool2d(seen - unseen, factor), factor)

        # Equation 4. Measurements noisier than the first iterate are ignored, as in the authors' code.
        first = levels[0]
        informed = known < first
        seen = torch.where(informed, observed, start)
        spread = torch.where(informed, (first**2 - known**2).clamp_min(0).sqrt(), first)
        fresh = noise()
        x = combine(seen + spread * fresh, start + first * fresh)

        for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
            clean = denoise(x, sigmas[step])
            fresh = noise()
            kept = (1 - self.eta**2) ** 0.5 * sigma_next
            unseen = clean + kept * (x - clean) / sigma + self.eta * sigma_next * fresh  # equation 7, unmeasured
            cleaner = clean + kept * (observed - clean) / known.clamp_min(1e-12) + self.eta * sigma_next * fresh
            noisier_spread = (sigma_next**2 - (self.eta_b * known) ** 2).clamp_min(0).sqrt()
            noisier = (1 - self.eta_b) * clean + self.eta_b * observed + noisier_spread * fresh
            x = combine(torch.where(sigma_next < known, cleaner, noisier), unseen)
        return denoise(x, sigmas[-1])
