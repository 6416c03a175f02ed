"""DDRM (Kawar et al. 2022, arXiv 2201.11793) for images of which block means are known.

The mean over blocks of r x r pixels needs no decomposition by computer: all its singular values are 1/r, and what it
sees of an image is the image with every block replaced by its mean. Blocks share no pixel, so that each may have a
noise level of its own and the paper's equations still hold, coefficient by coefficient.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(N, C, H, W) noisy images, () or (N,) noise level -> (N, C, H, W) expected clean images."""
Noise = Callable[[], Tensor]
"""Fresh standard normal numbers (N, C, H, W)."""


def ddrm(
    denoise: Denoise,
    means: Tensor,
    sigma_y: Tensor,
    sigmas: Tensor,
    start: Tensor,
    noise: Noise,
    eta: float = 0.85,
    eta_b: float = 1.0,
) -> Tensor:
    """One image for every image of block means, drawn from the denoiser's distribution given those means.

    Variance exploding throughout, as the paper writes it: x_t = x + sigma_t n, with no factor on x. The authors'
    program divides its first iterate by sigma_T instead of scaling it as all later ones, which shows for small sigma_T.

    Args:
        denoise: the prior.
        means: (N, C, H/r, W/r) observed block means of images in [0, 1], plus noise.
        sigma_y: () or any shape that broadcasts to `means`: standard deviation of that noise.
        sigmas: (T,) noise levels, falling; the last denoised image is the result.
        start: (N, C, H, W) expected images before anything is observed; what the means say takes precedence.
        noise: the only source of chance, called once a level.
        eta: share of fresh noise where nothing is observed or the iterate is cleaner than the means, in [0, 1].
        eta_b: how far the iterate follows the means where it is noisier than they, in [0, 1].

    Returns:
        (N, C, H, W), not clamped.
    """
    factor = start.shape[-1] // means.shape[-1]
    observed = upsample(means, factor)  # the paper's y-bar, in pixels
    known = upsample((factor * sigma_y).expand(means.shape), factor)  # its noise there, sigma_y over the singular value

    def combine(seen: Tensor, unseen: Tensor) -> Tensor:
        """What the block means see of one image, and what they do not see of another."""
        return unseen + upsample(F.avg_pool2d(seen - unseen, factor), factor)

    # Equation 4; where the means are noisier than the first iterate, it ignores them, as the authors' program does.
    first = sigmas[0]
    informed = known < first
    seen = torch.where(informed, observed, start)
    spread = torch.where(informed, (first**2 - known**2).clamp_min(0).sqrt(), first)
    fresh = noise()
    x = combine(seen + spread * fresh, start + first * fresh)

    following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
    for sigma, sigma_next in zip(sigmas, following, strict=True):
        clean = denoise(x, sigma)
        if sigma_next == 0:
            break
        fresh = noise()
        kept = (1 - eta**2) ** 0.5 * sigma_next
        unseen = clean + kept * (x - clean) / sigma + eta * sigma_next * fresh  # equation 7, zero singular values
        cleaner = clean + kept * (observed - clean) / known.clamp_min(1e-12) + eta * sigma_next * fresh
        noisier_spread = (sigma_next**2 - (eta_b * known) ** 2).clamp_min(0).sqrt()
        noisier = (1 - eta_b) * clean + eta_b * observed + noisier_spread * fresh
        x = combine(torch.where(sigma_next < known, cleaner, noisier), unseen)
    return clean


def upsample(means: Tensor, factor: int) -> Tensor:
    """(N, C, h, w) -> (N, C, h * factor, w * factor), every value repeated."""
    return means.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
