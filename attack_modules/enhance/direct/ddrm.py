"""DDRM (Kawar et al. 2022, arXiv 2201.11793): the paper's equations hold here coefficient by coefficient."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.sampler import Denoise, Noise, Sampler, upsample
from fl_lightning.errors import SettingError


class DDRM(Sampler):
    """Denoising diffusion restoration.

    The authors' program divides its first iterate by sigma_T instead of scaling it as all later ones, which shows for
    small sigma_T; here it is the paper's.

    Args:
        eta: share of fresh noise where nothing is observed or the iterate is cleaner than the means, in [0, 1].
        eta_b: how far the iterate follows the means where it is noisier than they, in [0, 1].

    Raises:
        SettingError: a share outside [0, 1].
    """

    def __init__(self, eta: float = 0.85, eta_b: float = 1.0) -> None:
        if not (0 <= eta <= 1 and 0 <= eta_b <= 1):
            raise SettingError(f"DDRM needs eta and eta_b in [0, 1], but got eta={eta}, eta_b={eta_b}.")
        self.eta = eta
        self.eta_b = eta_b

    def __call__(
        self, denoise: Denoise, means: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noise: Noise
    ) -> Tensor:
        """See `Sampler`; the last denoised image is the result, and noise is drawn once a level."""
        factor = start.shape[-1] // means.shape[-1]
        observed = upsample(means, factor)  # the paper's y-bar, in pixels
        known = upsample((factor * sigma_y).expand(means.shape), factor)  # its noise, sigma_y over the singular value
        levels = sigmas.view(len(sigmas), -1, 1, 1, 1)

        def combine(seen: Tensor, unseen: Tensor) -> Tensor:
            """What the block means see of one image, and what they do not see of another."""
            return unseen + upsample(F.avg_pool2d(seen - unseen, factor), factor)

        # Equation 4; where the means are noisier than the first iterate, it ignores them, as the authors' program does.
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
            unseen = clean + kept * (x - clean) / sigma + self.eta * sigma_next * fresh  # equation 7, unseen
            cleaner = clean + kept * (observed - clean) / known.clamp_min(1e-12) + self.eta * sigma_next * fresh
            noisier_spread = (sigma_next**2 - (self.eta_b * known) ** 2).clamp_min(0).sqrt()
            noisier = (1 - self.eta_b) * clean + self.eta_b * observed + noisier_spread * fresh
            x = combine(torch.where(sigma_next < known, cleaner, noisier), unseen)
        return denoise(x, sigmas[-1])
