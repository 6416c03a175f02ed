"""How noisy an image is: by the likelihood that a diffusion model gives it, or by its finest detail alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.sampler import Denoise, Noise

STEP = 0.3
"""Of the finite difference that gives the denoiser's slope, in units of the noise level."""


@torch.no_grad()
def likeliest_noise(denoise: Denoise, images: Tensor, candidates: Tensor, noise: Noise) -> Tensor:
    """The noise level under which the images are likeliest.

    The density p_s of noisy images solves the heat equation in s^2, and Tweedie's formula gives the gradient and
    Laplacian of its logarithm by the denoiser D and its divergence, so that for images y of n pixels

        d log p_s(y) / d log s  =  |D(y) - y|^2 / s^2  +  div D(y)  -  n,

    which is integrated over the candidates. A wavelet's median deviation, by contrast, takes texture for noise: it
    doubles the noise of images as small as a latent.

    Args:
        denoise: the prior, D.
        images: (N, C, H, W) in [0, 1], plus noise.
        candidates: (K,) noise levels, rising.
        noise: one probe of the divergence a candidate (Hutchinson 1989).

    Returns:
        (N,) noise levels, from the first to the last candidate.
    """
    slopes = []
    for sigma in candidates:
        clean, probe = denoise(images, sigma), noise()
        divergence = probe * (denoise(images + STEP * sigma * probe, sigma) - clean) / (STEP * sigma)
        slopes.append(((clean - images).square() / sigma**2 + divergence - 1).sum((1, 2, 3)))
    slope = torch.stack(slopes)  # (K, N)
    widths = candidates.log().diff()[:, None]
    gains = (slope[1:] + slope[:-1]) / 2 * widths
    likelihood = torch.cat([torch.zeros_like(gains[:1]), gains.cumsum(0)])
    best = likelihood.argmax(0).clamp(1, len(candidates) - 2)
    # The slope crosses zero between the best candidate and a neighbour: linear there, in log sigma.
    low = torch.where(slope.gather(0, best[None])[0] > 0, best, best - 1)
    first, second = slope.gather(0, low[None])[0], slope.gather(0, low[None] + 1)[0]
    share = (first / (first - second)).nan_to_num(0.0).clamp(0, 1)
    return torch.lerp(candidates.log()[low], candidates.log()[low + 1], share).exp()


@torch.no_grad()
def noise_map(denoise: Denoise, images: Tensor, sigma: Tensor, window: int, noise: Noise) -> Tensor:
    """Where in an image there is more noise than elsewhere.

    The slope of the likelihood (above) is zero, pixel by pixel, where (D(y) - y)^2 + s^2 dD/dy = s^2: the left side,
    averaged over a window, is the local variance. Where the denoiser sees nothing to remove, dD/dy is 1 and it is s^2.

    Args:
        denoise: the prior, D.
        images: (N, C, H, W) in [0, 1], plus noise.
        sigma: (N,) their overall noise levels.
        window: side of the square window, in pixels, odd.
        noise: the probe of the slope.

    Returns:
        (N, 1, H, W) standard deviations, from half to twice `sigma`.
    """
    clean, probe = denoise(images, sigma), noise()
    level = sigma[:, None, None, None]
    slope = probe * (denoise(images + STEP * level * probe, sigma) - clean) / (STEP * level)
    variance = ((clean - images).square() + level**2 * slope).mean(1, keepdim=True)
    local = F.avg_pool2d(variance, window, 1, window // 2, count_include_pad=False)
    return torch.clamp(local.clamp_min(0).sqrt(), level / 2, 2 * level)


def wavelet_noise(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N,) variance of the noise in images, by the median of their finest diagonal detail.

    That detail, of an orthonormal Haar transform, is mostly noise; its median absolute value is 0.6745 standard
    deviations of a Gaussian (Donoho and Johnstone 1994). 0 where an image has less than 2 pixels a side.
    """
    height, width = (2 * (side // 2) for side in images.shape[-2:])
    if not height or not width:
        return images.new_zeros(len(images))
    even, odd = images[..., 0:height:2, :width], images[..., 1:height:2, :width]
    detail = (even[..., 0::2] - even[..., 1::2] - odd[..., 0::2] + odd[..., 1::2]) / 2
    return (detail.abs().flatten(1).median(1).values / 0.6745).square()
