"""Noise level estimation: by maximum likelihood under a diffusion model, or from the finest wavelet detail."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.sampler import Denoise, Noise

STEP = 0.3
"""Step of the finite difference that estimates the denoiser's derivative, in units of the noise level."""


@torch.no_grad()
def likeliest_noise(denoise: Denoise, images: Tensor, candidates: Tensor, noise: Noise) -> Tensor:
    """Estimate each image's noise level by maximum likelihood under the diffusion prior.

    The density p_s of noisy images solves the heat equation in s^2. Tweedie's formula expresses the gradient and the
    Laplacian of log p_s by the denoiser D and its divergence, so that for an image y of n pixel values

        d log p_s(y) / d log s  =  |D(y) - y|^2 / s^2  +  div D(y)  -  n,

    This derivative is integrated over the candidates. A wavelet-based median estimate, by contrast, mistakes texture
    for noise, which doubles the estimate for images as small as a latent.

    Args:
        denoise: denoiser D of the diffusion prior.
        images: (N, C, H, W) images in [0, 1] plus noise.
        candidates: (K,) candidate noise levels, increasing.
        noise: probes of Hutchinson's divergence estimator (Hutchinson 1989), drawn once per candidate.

    Returns:
        (N,) noise levels, between the first and the last candidate.
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
    # The maximum is where the slope crosses zero: interpolate linearly in log sigma between the best candidate and the
    # neighbour on the other side of the crossing.
    low = torch.where(slope.gather(0, best[None])[0] > 0, best, best - 1)
    first, second = slope.gather(0, low[None])[0], slope.gather(0, low[None] + 1)[0]
    share = (first / (first - second)).nan_to_num(0.0).clamp(0, 1)
    return torch.lerp(candidates.log()[low], candidates.log()[low + 1], share).exp()


@torch.no_grad()
def noise_map(denoise: Denoise, images: Tensor, sigma: Tensor, window: int, noise: Noise) -> Tensor:
    """Estimate the local noise level at every pixel.

    The per-pixel slope of the log-likelihood (see `likeliest_noise`) is zero where (D(y) - y)^2 + s^2 dD/dy = s^2. The
    left side, averaged over channels and a window, is the local noise variance. Where the denoiser removes nothing,
    dD/dy = 1 and the left side equals s^2.

    Args:
        denoise: denoiser D of the diffusion prior.
        images: (N, C, H, W) images in [0, 1] plus noise.
        sigma: (N,) overall noise level of each image.
        window: side of the square averaging window, in pixels, odd.
        noise: probe of the derivative, drawn once.

    Returns:
        (N, 1, H, W) noise standard deviations, clamped to [sigma / 2, 2 sigma].
    """
    clean, probe = denoise(images, sigma), noise()
    level = sigma[:, None, None, None]
    slope = probe * (denoise(images + STEP * level * probe, sigma) - clean) / (STEP * level)
    variance = ((clean - images).square() + level**2 * slope).mean(1, keepdim=True)
    local = F.avg_pool2d(variance, window, 1, window // 2, count_include_pad=False)
    return torch.clamp(local.clamp_min(0).sqrt(), level / 2, 2 * level)


def wavelet_noise(images: Tensor) -> Tensor:
    """Estimate the noise variance of images from the median of their finest diagonal wavelet detail.

    The diagonal detail of an orthonormal Haar transform is mostly noise. The median absolute value of zero-mean
    Gaussian noise is 0.6745 standard deviations (Donoho and Johnstone 1994).

    Args:
        images: (N, C, H, W).

    Returns:
        (N,) variances; 0 for images of less than 2 pixels in height or width.
    """
    height, width = (2 * (side // 2) for side in images.shape[-2:])
    if not height or not width:
        return images.new_zeros(len(images))
    even, odd = images[..., 0:height:2, :width], images[..., 1:height:2, :width]
    detail = (even[..., 0::2] - even[..., 1::2] - odd[..., 0::2] + odd[..., 1::2]) / 2
    return (detail.abs().flatten(1).median(1).values / 0.6745).square()
